"""
common.py: helpers that the scripts share, without any of the ideas: flags, device, checkpoints, the
log, errors.
"""

import argparse
import contextlib
import dataclasses
import errno
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch

from data.errors import UserError, printable, show
from data.temporary import leftovers, temporary
from model import GPT, GPTConfig

# -----------------------------------------------------------------------------
# flags


def flag(default, help, min=0, max=1e18, choices=()):
    """a field of a config dataclass that is a command-line flag: what it means and may be (min and
    max are for numbers; PyTorch counts to 9.2e18)"""
    return dataclasses.field(default=default, metadata=dict(help=help, limits=(min, max, choices)))


# beside the flags of a dataclass, see parse
JSON_FLAG = ("--json", dict(action="store_true", help="print the results as JSON on the last line"))


def parse(cls, text, extra=(), argv=None, only=None):
    """flags from a dataclass, or from those of its fields that `only` names
    -> (dict of the flags that were given, dict of the rest)"""
    parser = argparse.ArgumentParser(
        description=text, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    fields = dataclasses.fields(cls)
    for field in fields:
        help = field.metadata["help"]
        if only is None:
            help += f" (default {field.default!r})"
        elif field.name not in only:  # its default stands in `text`
            continue
        options = dict(type=field.type)
        if field.type is bool:
            options = dict(action=argparse.BooleanOptionalAction)
        parser.add_argument(
            f"--{field.name}", default=argparse.SUPPRESS, help=help.replace("%", "%%"), **options
        )
    for name, options in extra:
        parser.add_argument(name, **options)
    rest = vars(parser.parse_args(argv))
    given = {field.name: rest.pop(field.name) for field in fields if field.name in rest}
    return given, rest


def check_flags(cfg):
    """raises a UserError for the first flag with a value outside its range or its choices"""
    for field in dataclasses.fields(cfg):
        value = getattr(cfg, field.name)
        low, high, choices = field.metadata["limits"]
        if choices:
            good = value in choices
            expected = f"one of {', '.join(filter(None, choices))}"
        elif isinstance(value, str):
            continue
        else:
            good = low <= value <= high        # never true of nan
            expected = f"a finite number in [{low}, {high}]"
        if not good:
            raise UserError(f"--{field.name} is {value!r}; it must be {expected}")


# -----------------------------------------------------------------------------
# device and processes


@dataclasses.dataclass
class DeviceFlags:
    """flags of every script that computes"""

    device: str = flag("auto", "cpu | cuda | mps (untested); auto: cuda if there is one, else cpu")
    dtype: str = flag("auto", "float32 | bfloat16 | float64; auto: bfloat16 where the GPU has it "
                      "(autocast in training)",
                      choices=("auto", "float32", "bfloat16", "float64"))
    fast: str = flag("auto", "Triton kernels of fast/, on a CUDA GPU: auto | on | off",
                     choices=("auto", "on", "off"))


def processes():
    """-> (rank of this process, number of processes), as torchrun sets them; (0, 1) without it"""
    if ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ):
        raise UserError("only one of the variables RANK and WORLD_SIZE is set: unset it (a "
                        "cluster's job may have left it), or start with torchrun")
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
        raise UserError(f"--device is {name!r}; it must be one of {', '.join(available)} here, or "
                        "auto")
    return torch.device(name)


def pick_dtype(name, device):
    """-> (dtype of the matrix products, why)"""
    if name != "auto":
        return getattr(torch, name), "as requested"
    if device.type == "cuda" and torch.cuda.get_device_capability()[0] >= 8:
        return torch.bfloat16, "this GPU computes in bf16"
    return torch.float32, f"{device.type}: fp32 is the safe choice"


def autocast(device, dtype):
    """matrix products in bf16 where that is the dtype; nothing changes for the others"""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16)


def git_commit():
    try:
        done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True,
                              cwd=Path(__file__).parent)
    except OSError:  # no git
        return None
    return done.stdout.strip() or None


def one_line(error):
    """an exception's type and message as one short line"""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


# -----------------------------------------------------------------------------
# what a run writes: checkpoints and the log


@contextlib.contextmanager
def writing(path):
    """make the folder of `path`; what goes wrong while it is written is shown in one line"""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError when the disk is full
        full = getattr(error, "errno", None) in (None, errno.ENOSPC, errno.EDQUOT)
        space = "free some space, or " if full else ""
        raise UserError(f"could not write {path} ({error}); what was there before is unchanged: "
                        f"{space}choose another folder with --out") from None


def save_checkpoint(path, model, **meta):
    """one file of tensors and plain values (torch.load(weights_only=True) opens it). It is written
    beside and then renamed: whatever happens during the write, a complete checkpoint stays there"""
    path = Path(path)
    part = temporary(path, "part")             # its own, if two runs share a folder
    content = {"format": "mtp-d-1", "config": dataclasses.asdict(model.config),
               "model": model.state_dict(), **meta}
    with writing(path):
        for left in leftovers(path, "part"):   # of runs that were killed
            left.unlink(missing_ok=True)
        try:
            torch.save(content, part)
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)


def start_log(cfg, model, meta, start):
    """the header line of a run from step `start`: what runs, on what; meta is the dataset's"""
    cpu = f"cpu, {torch.get_num_threads()} threads"
    path = Path(cfg.out) / "log.jsonl"
    if path.exists() and path.read_bytes()[-1:] not in (b"", b"\n"):
        with writing(path), open(path, "a", encoding="utf-8") as file:
            file.write("\n")                   # after half a line: the disk was full
    append_row(cfg.out, config=dataclasses.asdict(cfg), model=dataclasses.asdict(model.config),
               parameters=model.count_parameters(), start=start, commit=git_commit(),
               torch=torch.__version__, data_sha256=meta["sha256"],
               device=torch.cuda.get_device_name() if model.weight.is_cuda else cpu)


def append_row(folder, **row):
    """one more line of log.jsonl"""
    path = Path(folder) / "log.jsonl"
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def keep_old(folder):
    """rename what an earlier run left in this folder, so that a new run destroys nothing: one
    generation is kept. best.pt and the log go with it, or they would pass for the new run's. A log
    alone is kept as log.unsaved.jsonl: its run saved nothing, or the checkpoint was moved"""
    paths = [Path(folder) / name for name in ("ckpt.pt", "best.pt", "log.jsonl")]
    with writing(paths[0]):
        name = "old" if any(path.exists() for path in paths[:2]) else "unsaved"
        for path in paths:
            old = path.with_name(f"{path.stem}.{name}{path.suffix}")
            old.unlink(missing_ok=True)        # of the generation before
            if path.exists():
                os.replace(path, old)
    if name == "old":
        show(f"{folder} holds an earlier run; it is kept as ckpt.old.pt and log.old.jsonl, and its "
             "best.pt, if any, as best.old.pt")


# -----------------------------------------------------------------------------
# reading a checkpoint


class NoInitialValues(torch.overrides.TorchFunctionMode):
    """for tensors on the device meta, which have none: the first random function there would import
    800 modules, which takes a second"""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is torch.nn.init.normal_:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def checkpoint_file(path):
    """a checkpoint's file, or the folder of its ckpt.pt -> the file"""
    path = Path(path)
    return path / "ckpt.pt" if path.is_dir() else path


def load_checkpoint(path, device="cpu", **types):
    """a checkpoint's file or folder
    -> (GPT in eval mode, dict with all else: tokenizer, step, train config, optimizer, ..). Raises
    a UserError where it can't be loaded, or lacks an entry that `types` names with its type"""
    path = checkpoint_file(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}; train.py and extend.py write OUT/ckpt.pt, and "
                        "keep an earlier run's as OUT/ckpt.old.pt")
    try:
        with zipfile.ZipFile(path) as file:
            damaged = file.testzip()           # torch.load leaves the checksums out
        if damaged:
            raise ValueError(f"the checksum of {damaged} is wrong")
        meta = torch.load(path, map_location=device, weights_only=True)
        weights = meta.pop("model")
        config = GPTConfig(**meta.pop("config"))
        if config.n_layer + config.n_mtp > len(weights) or config.block_size > 2**24:
            raise ValueError(f"{len(weights)} tensors can't be those of {config}")
        for name, weight in weights.items():
            if not (weight.is_contiguous() and weight.isfinite().all()):
                raise ValueError(f"{name} has values that are not finite, or not contiguous")
        # of shapes alone: they are compared before anything is allocated, and a weight that is not
        # loaded can't go unnoticed
        with torch.device("meta"), NoInitialValues():
            model = GPT(config)
        model.load_state_dict(weights, assign=True)
        model.to(weights["embed.weight"].dtype)
    except OSError as error:
        raise UserError(f"{path} can't be read ({error.strerror or error})") from None
    except Exception as error:  # of many types
        raise UserError(f"{path} can't be loaded ({one_line(error)}): it is cut short, damaged, of "
                        "another version, or not a checkpoint of train.py or extend.py") from error
    for name, kind in types.items():
        if not isinstance(meta.get(name), kind):
            raise UserError(f"{path} has no {name}, or one of another version: it can't be used "
                            "here; give another one, of train.py or extend.py")
    return model.eval(), meta


# -----------------------------------------------------------------------------
# the end

OUT_OF_MEMORY = ("MemoryError", "allocate memory", "size calculation overflowed")
# what PyTorch says where another process of torchrun has stopped
LOST_CONNECTION = ("DistBackendError", "DistNetworkError", "DistStoreError",
                   "Connection closed by peer", "Connection reset by peer", "Broken pipe")


def run(main):
    """call main(). A UserError is shown in one line, with exit code 1; every other exception is a
    mistake in the program and keeps its traceback"""
    for stream in (sys.stdout, sys.stderr):    # either may be None
        if hasattr(stream, "reconfigure"):     # a character that it can't encode must not end a run
            stream.reconfigure(errors="backslashreplace")
    script = Path(sys.argv[0]).name
    rank = os.environ.get("RANK", "0")
    try:
        main()
    except KeyboardInterrupt:
        advice = ""
        if script in ("train.py", "extend.py"):
            advice = "; --resume OUT/ckpt.pt continues from the last checkpoint, if there is one"
        sys.exit(f"\ninterrupted{advice}")
    except BrokenPipeError:                    # `.. | head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except UserError as error:
        # until the processes are connected, all of them find the same error: rank 0 shows it
        if rank != "0" and not torch.distributed.is_initialized():
            sys.exit(1)
        sys.exit(f"{script}: {printable(str(error), sys.stderr)}")
    except (MemoryError, RuntimeError) as error:  # PyTorch's is the latter; a CPU says it in words
        text = one_line(error)
        if "RANK" in os.environ and any(sign in text for sign in LOST_CONNECTION):
            sys.exit(f"{script}: rank {rank} stopped, because another process did")
        if not any(sign in text for sign in OUT_OF_MEMORY):
            raise
        sys.exit(f"out of memory ({text}): train with a small --micro_batch, a smaller "
                 "--block_size or model; decode with a smaller --batch or fewer --tokens")
