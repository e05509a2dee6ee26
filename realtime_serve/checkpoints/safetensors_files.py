"""Safetensors files: eight bytes that say how long the header is, the header in JSON, the tensors' bytes without a gap.

The safetensors package hands out tensors of a framework, and NumPy, the only one at hand here, has no bfloat16.
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from realtime_serve.errors import ModelLoadError
from realtime_serve.types import shown

_LENGTH_BYTES = 8
# The format's own limit.
_MAX_HEADER_BYTES = 100_000_000
# More than any tensor has, and few enough that their product is a number of moderate length.
_MAX_DIMENSIONS = 64
_MAX_DIMENSION = 2**63

_ITEM_BYTES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E8M0": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "U64": 8,
    "I64": 8,
    "F64": 8,
    "C64": 8,
}


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor in a file that is mapped for as long as its data is referred to."""

    dtype: str
    """As the format calls it: "F32", "BF16"."""
    shape: tuple[int, ...]
    data: npt.NDArray[np.uint8]
    """Read-only, row by row, little-endian. Nothing aligns it."""


def open_safetensors(path: Path) -> dict[str, StoredTensor]:
    """The tensors of a file, by name.

    Raises ModelLoadError that names the file, and the tensor where it is one's fault; FileNotFoundError.
    """
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError:
        raise
    except (OSError, ValueError) as error:  # ValueError: the file is empty
        raise _unreadable(path, str(error)) from error
    header, start = _read_header(path, mapped)
    content = np.frombuffer(mapped, np.uint8)[start:]
    tensors: dict[str, StoredTensor] = {}
    extents: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        dtype, shape, begin, end = _check_entry(path, name, entry)
        tensors[name] = StoredTensor(dtype, shape, content[begin:end])
        extents.append((begin, end, name))
    _check_extents(path, sorted(extents), len(content))
    return tensors


def _read_header(path: Path, mapped: mmap.mmap) -> tuple[dict[str, Any], int]:
    """What it says of each tensor, and where their bytes begin."""
    length = int.from_bytes(mapped[:_LENGTH_BYTES], "little")
    start = _LENGTH_BYTES + length
    if len(mapped) < _LENGTH_BYTES or length > _MAX_HEADER_BYTES or start > len(mapped):
        raise _unreadable(path, f"a header of {length} bytes in a file of {len(mapped)}")
    try:
        header = json.loads(mapped[_LENGTH_BYTES:start])
    except (ValueError, RecursionError) as error:
        raise _unreadable(path, f"its header is not JSON: {error}") from error
    if not isinstance(header, dict):
        raise _unreadable(path, "its header is no JSON object")
    header.pop("__metadata__", None)
    return header, start


def _check_entry(path: Path, name: str, entry: object) -> tuple[str, tuple[int, ...], int, int]:
    """Type, shape, and where its bytes begin and end, counted from the header's end."""
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise _unreadable(path, f"tensor {shown(name)} lacks one of dtype, shape and two data_offsets")
    if dtype not in _ITEM_BYTES:
        raise _unreadable(path, f"tensor {shown(name)} has the unknown type {shown(dtype)}")
    if len(shape) > _MAX_DIMENSIONS or not all(type(size) is int and 0 <= size < _MAX_DIMENSION for size in shape):
        raise _unreadable(path, f"tensor {shown(name)} has a shape that none can have")
    if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
        raise _unreadable(path, f"tensor {shown(name)} has data_offsets that are no range")
    if math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
        raise _unreadable(path, f"tensor {shown(name)} is {dtype} of shape {shape}, and its bytes are {end - begin}")
    return dtype, tuple(shape), begin, end


def _check_extents(path: Path, extents: list[tuple[int, int, str]], length: int) -> None:
    """That they are all of the file's content, each byte once, as the format has it."""
    expected = 0
    for begin, end, name in extents:
        if begin != expected:
            fault = "overlaps another" if begin < expected else "does not begin where another ends"
            raise _unreadable(path, f"tensor {shown(name)} {fault}")
        if end > length:
            raise _unreadable(path, f"tensor {shown(name)} ends {end - length} bytes beyond the file")
        expected = end
    if expected != length:
        raise _unreadable(path, f"{length - expected} bytes at its end belong to no tensor")


def _unreadable(path: Path, why: str) -> ModelLoadError:
    return ModelLoadError(f"{path}: not a readable safetensors file: {why}")
