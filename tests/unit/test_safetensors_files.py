"""Safetensors files, as the package writes them, and as nobody should."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from realtime_serve.checkpoints.safetensors_files import open_safetensors
from realtime_serve.errors import ModelLoadError

ENTRY = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}
HALVES = {"dtype": "F16", "shape": [4], "data_offsets": [16, 24]}


def write(path: Path, header: object, content: bytes = bytes(24)) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(ModelLoadError) as refused:
        open_safetensors(path)
    message = str(refused.value)
    start = f"{path}: not a readable safetensors file: "
    assert message.startswith(start)
    return message.removeprefix(start)


@pytest.mark.parametrize(
    ("dtype", "name"),
    [
        (torch.float64, "F64"),
        (torch.float32, "F32"),
        (torch.float16, "F16"),
        (torch.bfloat16, "BF16"),
        (torch.float8_e4m3fn, "F8_E4M3"),
        (torch.float8_e5m2, "F8_E5M2"),
        (torch.int64, "I64"),
        (torch.int32, "I32"),
        (torch.int16, "I16"),
        (torch.int8, "I8"),
        (torch.uint8, "U8"),
        (torch.bool, "BOOL"),
    ],
)
def test_what_the_package_writes(tmp_path: Path, dtype: torch.dtype, name: str) -> None:
    stored = {
        "matrix": torch.arange(-6, 6).reshape(3, 4).to(dtype),
        "number": torch.tensor(3).to(dtype),
        "nothing": torch.zeros(0, 5, dtype=dtype),
        "of another type": torch.ones(3, dtype=torch.bfloat16),
    }
    save_file(stored, tmp_path / "x.safetensors", metadata={"format": "pt"})
    tensors = open_safetensors(tmp_path / "x.safetensors")
    assert tensors.keys() == stored.keys()
    for key, tensor in tensors.items():
        assert tensor.dtype == ("BF16" if key == "of another type" else name)
        assert tensor.shape == tuple(stored[key].shape)
        assert tensor.data.dtype == np.uint8
        assert tensor.data.tobytes() == bytes(stored[key].reshape(-1).view(torch.uint8).numpy())


def test_data_outlives_the_name_of_its_file_and_cannot_be_written(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"a": ENTRY}, bytes(range(16)))
    data = open_safetensors(path)["a"].data
    path.unlink()
    assert data.tobytes() == bytes(range(16))
    with pytest.raises(ValueError, match="read-only"):
        data[0] = 1


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        open_safetensors(tmp_path / "x.safetensors")


def test_what_is_no_file(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (bytes(7), "a header of 0 bytes in a file of 7"),
        (bytes(8), "its header is not JSON"),
        (b"\xff" * 20, "a header of 18446744073709551615 bytes in a file of 20"),
        ((13).to_bytes(8, "little") + b'{"a":' + bytes(7), "a header of 13 bytes in a file of 20"),
    ],
)
def test_files_without_a_header(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    assert message in refusal(path)


def test_a_header_beyond_the_formats_limit(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # a hole that takes no space on the disk
    assert refusal(path) == "a header of 100000001 bytes in a file of 200000000"


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"\x80", "its header is not JSON"),
        (b"[" * 100_000, "its header is not JSON"),
        (b"1" * 10_000, "its header is not JSON"),
        ([], "its header is no JSON object"),
        ({"a": 1}, "tensor 'a' lacks one of dtype, shape and two data_offsets"),
        ({"a": {"dtype": "F32", "shape": [4]}}, "tensor 'a' lacks one of dtype, shape and two data_offsets"),
        ({"a": ENTRY | {"data_offsets": [0, 8, 16]}}, "tensor 'a' lacks one of dtype, shape and two data_offsets"),
        ({"a": ENTRY | {"shape": "4"}}, "tensor 'a' lacks one of dtype, shape and two data_offsets"),
        ({"a": ENTRY | {"dtype": "F4"}}, "tensor 'a' has the unknown type 'F4'"),
        ({"a": ENTRY | {"shape": [-2, -2]}}, "tensor 'a' has a shape that none can have"),
        ({"a": ENTRY | {"shape": [2.0, 2]}}, "tensor 'a' has a shape that none can have"),
        ({"a": ENTRY | {"shape": [True, 4]}}, "tensor 'a' has a shape that none can have"),
        ({"a": ENTRY | {"shape": [2**63, 0]}}, "tensor 'a' has a shape that none can have"),
        ({"a": ENTRY | {"shape": [9] * 1_000_000}}, "tensor 'a' has a shape that none can have"),
        ({"a": ENTRY | {"data_offsets": [16, 0]}}, "tensor 'a' has data_offsets that are no range"),
        ({"a": ENTRY | {"data_offsets": [-16, 0]}}, "tensor 'a' has data_offsets that are no range"),
        ({"a": ENTRY | {"data_offsets": [0.0, 16]}}, "tensor 'a' has data_offsets that are no range"),
        ({"a": ENTRY | {"shape": [2, 3]}}, "tensor 'a' is F32 of shape [2, 3], and its bytes are 16"),
        ({"a": ENTRY | {"dtype": "F64"}}, "tensor 'a' is F64 of shape [2, 2], and its bytes are 16"),
        ({"a": ENTRY | {"shape": [2**62, 4]}}, "and its bytes are 16"),
        ({"a": ENTRY, "b": HALVES | {"data_offsets": [15, 23]}}, "tensor 'b' overlaps another"),
        ({"a": ENTRY, "b": ENTRY}, "tensor 'b' overlaps another"),
        ({"a": ENTRY | {"data_offsets": [8, 24]}}, "tensor 'a' does not begin where another ends"),
        (
            {"a": ENTRY, "b": HALVES | {"shape": [5], "data_offsets": [16, 26]}},
            "tensor 'b' ends 2 bytes beyond the file",
        ),
        ({"a": ENTRY}, "8 bytes at its end belong to no tensor"),
        ({"a": ENTRY | {"shape": [2**62], "data_offsets": [0, 2**64]}}, f"ends {2**64 - 24} bytes beyond the file"),
        ({"x" * 10_000: 1}, "xxx… lacks one of"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_headers_that_cannot_be(tmp_path: Path, header: object, message: str) -> None:
    refused = refusal(write(tmp_path / "x.safetensors", header))
    assert message in refused
    assert len(refused) < 300


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
OFFSETS = st.sampled_from([-1, 0, 8, 15, 16, 17, 24, 25, 2**62, 2**64])
MUTATIONS = st.one_of(
    st.fixed_dictionaries({"data_offsets": st.tuples(OFFSETS, OFFSETS)}),
    st.fixed_dictionaries({"shape": st.lists(OFFSETS | st.integers(0, 8), max_size=4)}),
    st.fixed_dictionaries({"dtype": st.sampled_from(["F16", "BF16", "F32", "F64", "f32", ""])}),
    st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON, max_size=3),
)


def check_any(path: Path) -> None:
    """That it is refused, or all it has lies within the file."""
    try:
        tensors = open_safetensors(path)
    except ModelLoadError:
        refusal(path)
        return
    assert sum(len(tensor.data) for tensor in tensors.values()) <= path.stat().st_size
    for tensor in tensors.values():
        assert len(tensor.data) % max(1, np.prod(tensor.shape)) == 0


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(first=MUTATIONS, second=MUTATIONS, more=st.dictionaries(st.text(max_size=3), JSON, max_size=2))
def test_mutated_headers(tmp_path: Path, first: dict[str, Any], second: dict[str, Any], more: dict[str, Any]) -> None:
    header = {"a": ENTRY | first, "b": HALVES | second} | more
    check_any(write(tmp_path / "x.safetensors", header))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(flips=st.lists(st.tuples(st.integers(0, 160), st.integers(0, 255)), max_size=3), end=st.integers(0, 200))
def test_mutated_bytes(tmp_path: Path, flips: list[tuple[int, int]], end: int) -> None:
    path = write(tmp_path / "x.safetensors", {"a": ENTRY, "b": HALVES})
    content = bytearray(path.read_bytes())
    for at, byte in flips:
        content[at % len(content)] = byte
    path.write_bytes(content[: end or None])
    check_any(path)
