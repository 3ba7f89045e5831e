"""Files of weights -> tensors by name, as numpy arrays: GGUF (F32, F16, Q8_0, Q4_1) and safetensors
(F32, F16, BF16). The files are mapped, and numbers are made when they are asked for.
"""
import json
import math
import struct
from typing import NamedTuple

import numpy as np

from data.errors import UserError

AGAIN = "copy or download it again"


class Stored(NamedTuple):
    """A tensor as it stands in a file."""

    kind: str
    shape: tuple
    data: np.ndarray  # its bytes

    def numbers(self):
        """float32, in its shape"""
        values = KINDS[self.kind][2](np.array(self.data))
        return values.reshape(self.shape)


def from_f32(data):
    return data.view("<f4")


def from_f16(data):
    return data.view("<f2").astype(np.float32)


def from_bf16(data):
    return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)


def from_q8_0(data):
    """Blocks of 32 numbers in 34 bytes: a scale, then 32 int8."""
    blocks = data.reshape(-1, 34)
    scale = from_f16(blocks[:, :2].copy())                # (blocks, 1)
    return scale * blocks[:, 2:].view(np.int8)


def from_q4_1(data):
    """Blocks of 32 numbers in 20 bytes: a scale, the smallest number, 16 bytes of two digits each:
    the low ones come first, then the high ones."""
    blocks = data.reshape(-1, 20)
    head = from_f16(blocks[:, :4].copy())                 # (blocks, 2)
    digits = np.concatenate((blocks[:, 4:] & 15, blocks[:, 4:] >> 4), axis=1)
    return head[:, :1] * digits + head[:, 1:]


# kind: (numbers in a block, its bytes, the function)
KINDS = {
    "F32": (1, 4, from_f32), "F16": (1, 2, from_f16), "BF16": (1, 2, from_bf16),
    "Q8_0": (32, 34, from_q8_0), "Q4_1": (32, 20, from_q4_1),
}
GGUF_KINDS = {0: "F32", 1: "F16", 3: "Q4_1", 8: "Q8_0"}
# only to name them
OTHER_KINDS = {2: "Q4_0", 6: "Q5_0", 7: "Q5_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K",
               14: "Q6_K", 15: "Q8_K", 20: "IQ4_NL", 30: "bfloat16"}


def place(path, name, kind, shape, data, start, end=None):
    """The tensor that begins at byte `start`; `end` is where the file says that it ends."""
    if kind not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(f"{path} stores {name} as {kind}; expected {known}: convert it to F16")
    numbers, size, _ = KINDS[kind]
    count = math.prod(shape)
    stop = start + count // numbers * size
    # blocks do not cross the end of a row
    if not shape or min(shape) < 1 or shape[-1] % numbers or end not in (None, stop):
        raise UserError(f"{path} is damaged: {name} has the shape {shape}, which does not fit its "
                        f"bytes; {AGAIN}")
    if not 0 <= start <= stop <= len(data):
        raise UserError(f"{path} is cut short: {name} ends at byte {stop:,} of {len(data):,}; "
                        f"{AGAIN}")
    return Stored(kind, tuple(shape), data[start:stop])


def open_file(path):
    """The bytes of a file, mapped."""
    if not path.is_file():
        raise UserError(f"no file at {path}")
    if path.stat().st_size < 8:
        raise UserError(f"{path} has {path.stat().st_size} bytes: it is no file of weights")
    return np.memmap(path, dtype=np.uint8, mode="r")


class Gguf:
    """A GGUF file: settings by name, tensors by name. Source: docs/gguf.md of the project ggml."""

    # of a setting: code -> struct's letter; 8 is a text, 9 a list
    TYPES = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
             12: "d"}

    def __init__(self, path):
        self.data = open_file(path)
        self.at = 4
        version = self.number("I")
        if bytes(self.data[:4]) != b"GGUF" or version not in (2, 3):
            raise UserError(f"{path} begins with {bytes(self.data[:8])!r}; expected GGUF of "
                            "version 2 or 3, or a .safetensors file")
        try:
            self.read(path)
        except UserError:
            raise
        except (struct.error, ValueError, KeyError, TypeError, ArithmeticError, RecursionError):
            raise UserError(f"{path} is cut short or damaged in its header; {AGAIN}") from None

    def read(self, path):
        count = self.number("Q")
        self.settings = {}
        for _ in range(self.number("Q")):
            name = self.text()
            self.settings[name] = self.value(self.number("I"))
        entries = []
        for _ in range(count):
            name = self.text()
            shape = [self.number("Q") for _ in range(self.number("I"))]
            shape.reverse()                               # GGUF names the last dimension first
            entries.append((name, shape, self.number("I"), self.number("Q")))
        step = self.settings.get("general.alignment", 32)
        base = -(-self.at // step) * step
        self.tensors = {}
        for name, shape, code, offset in entries:
            kind = GGUF_KINDS.get(code) or OTHER_KINDS.get(code, f"type {code}")
            if name in self.tensors:
                raise UserError(f"{path} is damaged: it holds {name} twice; {AGAIN}")
            self.tensors[name] = place(path, name, kind, shape, self.data, base + offset)

    def number(self, letter):
        value, = struct.unpack_from("<" + letter, self.data, self.at)
        self.at += struct.calcsize(letter)
        return value

    def text(self):
        length = self.number("Q")
        value, = struct.unpack_from(f"{length}s", self.data, self.at)
        self.at += length
        return value.decode("utf-8")

    def value(self, code):
        if code == 8:
            return self.text()
        if code == 9:
            kind = self.number("I")
            return [self.value(kind) for _ in range(self.number("Q"))]
        return self.number(self.TYPES[code])


def read_safetensors(path):
    """The tensors of a file: 8 bytes that hold the header's length, a header in JSON, the
    numbers."""
    data = open_file(path)
    tensors = {}
    try:
        length, = struct.unpack_from("<Q", data)
        header = json.loads(bytes(data[8 : 8 + length]))
        header.pop("__metadata__", None)
        for name, entry in header.items():
            start, end = [8 + length + offset for offset in entry["data_offsets"]]
            kind = entry["dtype"]
            tensors[name] = place(path, name, kind, entry["shape"], data, start, end)
    except UserError:
        raise
    except (struct.error, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path} is cut short or no safetensors file; {AGAIN}") from None
    return tensors
