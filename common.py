"""
common.py: what the scripts share and no idea depends on: flags, the machine, checkpoint files, the log,
the text that comes out of a decoder, errors in one line.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

from data.errors import UserError  # noqa: F401 (the scripts take it from here)
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# flags


def knob(default, text):
    return dataclasses.field(default=default, metadata={"help": text})


def parse(cls, text, extra=(), argv=None):
    """flags from a dataclass -> (dict of the flags that were given, the rest)"""
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in dataclasses.fields(cls):
        kind = dict(action=argparse.BooleanOptionalAction) if f.type is bool else dict(type=f.type, metavar=f.type.__name__)
        parser.add_argument(f"--{f.name}", default=argparse.SUPPRESS, **kind,
                            help=f"{f.metadata['help']} (default {f.default!r})".replace("%", "%%"))
    for name, options in extra:
        parser.add_argument(name, **options)
    args = vars(parser.parse_args(argv))
    rest = {name.lstrip("-"): args.pop(name.lstrip("-")) for name, _ in extra}
    return args, rest


# -----------------------------------------------------------------------------
# the machine


def processes():
    """-> (rank of this process, how many there are): torchrun says so"""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name):
    there = [d for d, ok in (("cuda", torch.cuda.is_available()), ("mps", torch.backends.mps.is_available()), ("cpu", True)) if ok]
    if name not in ("auto", *there):
        raise ValueError(f"--device is {name!r}; this machine has {', '.join(there)} (or auto)")
    return torch.device(there[0] if name == "auto" else name)


def pick_dtype(name, device):
    """-> (dtype of the matrix products, why)"""
    if name != "auto":
        return getattr(torch, name), "as asked for"
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
        return torch.bfloat16, "this GPU computes in bf16"
    return torch.float32, "this GPU has no fast bf16" if device.type == "cuda" else f"{device.type}: fp32 is the safe choice"


def autocast(device, dtype):
    return torch.autocast(device.type, dtype) if dtype == torch.bfloat16 else nullcontext()


def git_commit():
    try:
        run = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent)
        return run.stdout.strip() or None
    except OSError:
        return None


# -----------------------------------------------------------------------------
# checkpoints


def save_checkpoint(path, model, **meta):
    """one file of tensors and plain values (torch.load(weights_only=True) opens it), written beside and then renamed:
    whatever happens during the write, a whole checkpoint stays there"""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    try:
        torch.save({"format": "mtp-d-1", "config": dataclasses.asdict(model.config), "model": model.state_dict(), **meta}, part)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:                   # torch raises RuntimeError when the disk is full
        raise OSError(f"could not write {path} ({error}); what was there before is untouched: free some space") from None
    finally:
        part.unlink(missing_ok=True)


def load_checkpoint(path, device="cpu"):
    """-> (GPT in eval mode, dict with all else: tokenizer, step, train config, optimizer, ..)"""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; train.py writes OUT/ckpt.pt")
    try:
        meta = torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # torch.load raises many types on what is cut short or was never a checkpoint
        raise ValueError(f"{path} can't be read as a checkpoint ({type(error).__name__}): it is cut short, or another "
                         "program's file") from None
    if not isinstance(meta, dict) or meta.get("format") != "mtp-d-1":
        raise ValueError(f"{path} is a PyTorch file but not a checkpoint of train.py or extend.py")
    model = GPT(GPTConfig(**meta.pop("config"))).to(device)
    for weight in model.parameters():
        weight.data.fill_(float("nan"))                        # so that a weight which is not loaded can't go unnoticed
    dtype = meta["model"]["embed.weight"].dtype
    model.to(dtype).load_state_dict(meta.pop("model"))
    return model.eval(), meta


# -----------------------------------------------------------------------------
# what is logged and shown


class Log:
    """log.jsonl: a header line that says what ran, then a row each time; rank 0 only"""

    def __init__(self, cfg, meta, model, start, append):
        path = Path(cfg.out) / "log.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = open(path, "a" if start or append else "w", encoding="utf-8")
        device = torch.cuda.get_device_name() if model.weight.is_cuda else f"{model.weight.device.type}, {torch.get_num_threads()} threads"
        self.write(config=dataclasses.asdict(cfg), model=dataclasses.asdict(model.config), parameters=model.count_parameters(),
                   start=start, commit=git_commit(), torch=torch.__version__, device=device, data_sha256=meta["sha256"])

    def write(self, **row):
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()


def stream(tokenizer, prompt):
    """print the prompt -> a `watch` for generate() that prints the text as it comes"""
    shown = ""
    print(tokenizer.decode(prompt), end="", flush=True)

    def watch(decoder):
        nonlocal shown
        ids = decoder.buffer[0, len(prompt) : int(decoder.n[0]) + 1].tolist()
        text = tokenizer.decode(ids).rstrip("\ufffd")                   # half a character waits for its other half
        print(text[len(shown) :], end="", flush=True)
        shown = text
    return watch


HEAD_COLOURS = [32, 36, 34, 35, 33, 92, 96, 94, 95]                     # the terminal's codes for heads 1 .. 8, and for 9 and on


def trace(tokenizer, prompt, n_mtp):
    """print a legend -> a `watch` for generate() that prints a line a round: the new tokens, each with who said it, and then
    the drafts that were refused"""
    codes = {"main": 0, "refused": "9;31", **{k: HEAD_COLOURS[min(k, 9) - 1] for k in range(1, n_mtp + 1)}}
    coloured, known = sys.stdout.isatty(), len(prompt) - 1              # known: the position n that the last round left

    def paint(text, who):
        return f"\033[{codes[who]}m{text}\033[0m" if coloured else text

    def quote(token):
        return repr(tokenizer.decode([token]))[1:-1]

    def word(token, who):
        return paint(quote(token), who) if coloured else f"{quote(token)}|{who}"

    def watch(decoder):
        nonlocal known
        before, known = known, int(decoder.n[0])
        new = decoder.buffer[0, before + 1 : known + 1].tolist()
        if before < len(prompt):
            print(paint(quote(new[0]), "main"), "  <- prefill (main head)")
            return
        drafts = decoder.drafts[0].tolist()
        a = next((i for i, (token, draft) in enumerate(zip(new, drafts)) if token != draft), min(len(new), len(drafts)))
        words = [word(token, i + 1 if i < a else "main") for i, token in enumerate(new)]
        if a < len(new):                                                # else max_new_tokens cut the drafts, none was refused
            words += [word(draft, "refused") for draft in drafts[a:]]
        print("  ".join(words))

    legend = [paint("main head", "main"), *(paint(f"head {k}", k) for k in range(1, n_mtp + 1)), paint("refused", "refused")]
    print("a line a round: " + "  ".join(legend))
    return watch


# -----------------------------------------------------------------------------
# the end


def run(main):
    """call main(); what a user can cause ends in one clear line and exit code 1"""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nstopped; --resume OUT/ckpt.pt goes on from the last checkpoint")
    except RuntimeError as error:                              # torch.OutOfMemoryError is one; a CPU says it in words
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        sys.exit(f"out of memory ({str(error).splitlines()[0][:120]}): lower --micro_batch (the result stays the same, but for dropout), "
                 "--block_size or the model's size")
    except (ValueError, OSError, ImportError, FloatingPointError) as error:
        sys.exit(f"{Path(sys.argv[0]).name}: {error}")
