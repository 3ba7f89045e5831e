"""
common.py: what the scripts share and no idea depends on: flags, the machine, checkpoint files, errors in one line.
"""

import argparse
import dataclasses
import os
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

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
