"""
common.py: helpers that the scripts share, without any of the ideas: flags, device, checkpoints, the
log, errors.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from data.errors import UserError, printable
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# flags


def flag(default, help, min=None, max=None, below=None, choices=None):
    """a field of a config dataclass that is a command-line flag: what it means and may be"""
    limits = dict(min=min, max=max, below=below, choices=choices)
    return dataclasses.field(default=default, metadata={"help": help, **limits})



def parse(cls, text, extra=(), argv=None):
    """flags from a dataclass -> (dict of the flags that were given, the rest)"""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for field in dataclasses.fields(cls):
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        else:
            options = dict(type=field.type, metavar=field.type.__name__)
        help = f"{field.metadata['help']} (default {field.default!r})".replace("%", "%%")
        parser.add_argument(f"--{field.name}", default=argparse.SUPPRESS, help=help, **options)
    for name, options in extra:
        parser.add_argument(name, **options)
    given = vars(parser.parse_args(argv))
    rest = {}
    for name, _ in extra:
        name = name.lstrip("-")
        rest[name] = given.pop(name)
    return given, rest


def check_flags(cfg):
    """raises a UserError for the first flag with a value outside its range or its choices"""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        problem = expected(value, field.metadata)
        if problem:
            raise UserError(f"--{field.name} is {value!r}; it must be {problem}")


def expected(value, limits):
    """-> what the value should be, in words, or None where it is fine"""
    low, high, below = limits.get("min"), limits.get("max"), limits.get("below")
    choices = limits.get("choices")
    if choices is not None:
        return None if value in choices else "one of " + ", ".join(filter(None, choices))
    if isinstance(value, float) and not math.isfinite(value):
        return "a finite number"
    if low is not None and value < low:
        good = False
    elif high is not None and value > high:
        good = False
    else:
        good = below is None or value < below
    if good:
        return None
    text = f"at least {low}"
    if high is not None:
        text += f" and at most {high}"
    return text if below is None else f"{text} and below {below}"


# -----------------------------------------------------------------------------
# device and processes


def processes():
    """-> (rank of this process, number of processes), as torchrun sets them; (0, 1) without it"""
    missing = [name for name in ("RANK", "WORLD_SIZE") if name not in os.environ]
    if len(missing) == 1:
        raise UserError("only one of the environment variables RANK and WORLD_SIZE is set, "
                        f"{missing[0]} is not: unset the other (a cluster's job may have left it), "
                        "or start with torchrun")
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def pick_device(name):
    """auto is CUDA where there is a GPU, else the CPU; mps only on request, for it is untested"""
    available = ["cpu"]
    if torch.cuda.is_available():
        available.insert(0, "cuda")
    if torch.backends.mps.is_available():
        available.append("mps")
    if name == "auto":
        name = available[0]
    if name not in available:
        here = ", ".join(available)
        raise UserError(f"--device is {name!r}; it must be one of {here} here, or auto")
    return torch.device(name)


def pick_dtype(name, device):
    """-> (dtype of the matrix products, why)"""
    if name != "auto":
        return getattr(torch, name), "as requested"
    if device.type == "cpu":
        return torch.float32, "cpu: fp32 is the safe choice"
    if device.type != "cuda":
        return torch.float32, f"{device.type} is untested: fp32 is the safe choice"
    if torch.cuda.get_device_capability()[0] >= 8:
        return torch.bfloat16, "this GPU computes in bf16"
    return torch.float32, "this GPU has no fast bf16"


def autocast(device, dtype):
    if dtype == torch.bfloat16:
        return torch.autocast(device.type, dtype)
    return contextlib.nullcontext()


def git_commit():
    command = ["git", "rev-parse", "HEAD"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    except OSError:
        return None
    return run.stdout.strip() or None


# -----------------------------------------------------------------------------
# checkpoints


@contextlib.contextmanager
def writing(path):
    """make the folder of `path`; what goes wrong while it is written is shown in one line"""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        raise UserError(f"could not write {path} ({error}); what was there before is unchanged: "
                        "free some space, or choose another folder with --out") from None


def save_checkpoint(path, model, **meta):
    """one file of tensors and plain values (torch.load(weights_only=True) opens it). It is written
    beside and then renamed: whatever happens during the write, a complete checkpoint stays there"""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    config = dataclasses.asdict(model.config)
    content = {"format": "mtp-d-1", "config": config, "model": model.state_dict(), **meta}
    try:
        with writing(path):
            torch.save(content, part)
            os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def keep_old(folder):
    """rename what an earlier run left in this folder, so that a new run destroys nothing: one
    generation is kept. best.pt and the log go with it, or they would pass for the new run's"""
    folder = Path(folder)
    if not any((folder / name).exists() for name in ("ckpt.pt", "best.pt")):
        return
    kept = []
    for name in ("ckpt.pt", "best.pt", "log.jsonl"):
        path = folder / name
        old = path.with_name(f"{path.stem}.old{path.suffix}")
        old.unlink(missing_ok=True)            # of the generation before
        if path.exists():
            os.replace(path, old)
            kept.append(old.name)
    print(f"{printable(str(folder))} holds an earlier run; it is kept as {', '.join(kept)}")


def load_checkpoint(path, device="cpu"):
    """-> (GPT in eval mode, dict with all else: tokenizer, step, train config, optimizer, ..)"""
    path = Path(path)
    meta = read_checkpoint(path, device)
    config, weights = meta.pop("config"), meta.pop("model")
    unknown = set(config) - {field.name for field in dataclasses.fields(GPTConfig)}
    if unknown:
        raise UserError(f"{path} has a model with settings that this version does not know: "
                        f"{', '.join(sorted(unknown))}; use the version that wrote it")
    for name, weight in weights.items():
        problem = None
        if not weight.is_floating_point():
            problem = f"is {weight.dtype}"
        elif not weight.isfinite().all():
            problem = "has values that are not finite"
        if problem:
            raise UserError(f"{path} is damaged: its weight {name} {problem}; use another copy, "
                            "or train again")
    model = GPT(GPTConfig(**config)).to(device)
    for weight in model.parameters():
        weight.data.fill_(float("nan"))    # a weight that is not loaded can't go unnoticed
    model.to(weights["embed.weight"].dtype).load_state_dict(weights)
    return model.eval(), meta


def read_checkpoint(path, device):
    """the dict in the file, after its checksums were compared: torch.load leaves them out"""
    if not path.is_file():
        old = path.parent / f"{path.stem}.old{path.suffix}"
        hint = f"{old} is an earlier run's" if old.is_file() else "train.py writes OUT/ckpt.pt"
        raise UserError(f"no checkpoint at {path}; {hint}")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()
        meta = None if damaged else torch.load(path, map_location=device, weights_only=True)
    except Exception as error:  # of many types, for what is cut short or another program's
        raise UserError(f"{path} can't be read as a checkpoint ({type(error).__name__}): it is cut "
                        "short, damaged, or another program's file") from None
    if damaged:
        raise UserError(f"{path} is damaged: the checksum of {damaged} is wrong; use another copy, "
                        "or train again")
    if not isinstance(meta, dict) or meta.get("format") != "mtp-d-1":
        raise UserError(f"{path} is a PyTorch file but not a checkpoint of train.py or extend.py")
    return meta


# -----------------------------------------------------------------------------
# the log


class Log:
    """log.jsonl: a header line that says what ran, then a row each time; rank 0 only"""

    def __init__(self, cfg, meta, model, start, append):
        self.path = Path(cfg.out) / "log.jsonl"
        if model.weight.is_cuda:
            device = torch.cuda.get_device_name()
        else:
            device = f"{model.weight.device.type}, {torch.get_num_threads()} threads"
        if not append:
            self.path.unlink(missing_ok=True)
        self.write(config=dataclasses.asdict(cfg), model=dataclasses.asdict(model.config),
                   parameters=model.count_parameters(), start=start, commit=git_commit(),
                   torch=torch.__version__, device=device, data_sha256=meta["sha256"])

    def write(self, **row):
        with writing(self.path), open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


# -----------------------------------------------------------------------------
# the end


def make_output_safe():
    """a character that the output can't encode is printed as an escape: that must not end a run"""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def connected():
    """whether torchrun's processes have found each other"""
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def lost_connection(error):
    """whether this error only says that another process of torchrun has stopped"""
    if not connected():
        return False
    texts = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
    known = any(text in str(error) for text in texts)
    return known or isinstance(error, torch.distributed.DistError)


def run(main):
    """call main(). A UserError is shown in one line, with exit code 1; every other exception is a
    mistake in the program and keeps its traceback"""
    make_output_safe()
    script = Path(sys.argv[0]).name
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ninterrupted; training continues from its last checkpoint with "
                 "--resume OUT/ckpt.pt")
    except UserError as error:
        # until the processes are connected, all of them find the same error: rank 0 shows it
        if os.environ.get("RANK", "0") != "0" and not connected():
            sys.exit(1)
        sys.exit(f"{script}: {printable(str(error), sys.stderr)}")
    except RuntimeError as error:  # torch.OutOfMemoryError is one; a CPU says it in words
        if lost_connection(error):
            sys.exit(f"{script}: rank {os.environ['RANK']} stopped, because another process did")
        memory = isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)
        if not memory:
            raise
        reason = str(error).splitlines()[0][:120]
        sys.exit(f"out of memory ({reason}): lower --micro_batch (the result stays the same, but "
                 "for dropout), --block_size or the model's size")
