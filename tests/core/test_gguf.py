"""The GGUF reader against the `gguf` package, which writes the files here."""

import gc
import math
import os
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.constants import GGML_QUANT_SIZES
from gguf.quants import dequantize
from hypothesis import given
from hypothesis import strategies as st

from realtime_serve import _core

# Where a block's scale lies; a minimum, where it has one, is next to it.
SCALE_AT = {
    "Q4_0": 0,
    "Q4_1": 0,
    "Q5_0": 0,
    "Q5_1": 0,
    "Q8_0": 0,
    "Q2_K": 80,
    "Q3_K": 108,
    "Q4_K": 0,
    "Q5_K": 0,
    "Q6_K": 208,
}
DECODED = {name: GGMLQuantizationType[name] for name in ("F32", "F16", "BF16", *SCALE_AT)}

WriteGguf = Callable[[Callable[[GGUFWriter], Any]], str]


def _write(path: Path, fill: Callable[[GGUFWriter], Any]) -> str:
    writer = GGUFWriter(path, "test")
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(path)


@pytest.fixture
def write_gguf(tmp_path: Path) -> WriteGguf:
    return lambda fill: _write(tmp_path / "m.gguf", fill)


def _expected(raw: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
    with np.errstate(all="ignore"):
        return dequantize(raw, kind)


def _assert_same_bits(actual: np.ndarray, expected: np.ndarray, *, any_nan: bool) -> None:
    assert actual.dtype == np.float32
    assert actual.shape == expected.shape
    bits, expected_bits = (np.ascontiguousarray(array).view(np.uint32) for array in (actual, expected))
    if any_nan:
        assert np.array_equal(np.isnan(actual), np.isnan(expected))
        bits, expected_bits = (np.where(np.isnan(actual), 0, b) for b in (bits, expected_bits))
    assert np.array_equal(bits, expected_bits)


# By width in bits: zero, denormals (least and greatest), the least normal, one, the greatest, infinity and NaNs (quiet
# and signalling).
HALVES = (0x0000, 0x0001, 0x03FF, 0x0400, 0x3C00, 0x7BFF, 0x7C00, 0x7E00, 0x7C01)
BRAINS = (0x0000, 0x0001, 0x007F, 0x0080, 0x3F80, 0x7F7F, 0x7F80, 0x7FC0, 0x7F81)
SINGLES = (0, 1, 0x7FFFFF, 0x800000, 0x3F800000, 0x7F7FFFFF, 0x7F800000, 0x7FC00000, 0x7F800001)


def _with_sign(numbers: tuple[int, ...], width: int) -> list[int]:
    return [number | sign for number in numbers for sign in (0, 1 << (width - 1))]


def _special_bytes(name: str) -> np.ndarray:
    """What random bytes seldom are, in rows for the start of a block each."""
    if name == "F32":
        return np.array(_with_sign(SINGLES, 32), dtype="<u4").view(np.uint8).reshape(-1, 4)
    if name == "BF16":
        return np.array(_with_sign(BRAINS, 16), dtype="<u2").view(np.uint8).reshape(-1, 2)
    halves = _with_sign(HALVES, 16)
    if name == "F16":
        return np.array(halves, dtype="<u2").view(np.uint8).reshape(-1, 2)
    # Each scale with each minimum; where a block has none, with two values.
    return np.array([(scale, minimum) for scale in halves for minimum in halves], dtype="<u2").view(np.uint8)


@pytest.mark.parametrize("name", DECODED)
def test_values_are_those_of_the_reference(name: str, write_gguf: WriteGguf) -> None:
    kind = DECODED[name]
    _, block_bytes = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(7).integers(0, 256, (2, 3, 512, block_bytes), dtype=np.uint8)
    special = _special_bytes(name)
    first, least, greatest, *_ = np.split(blocks.reshape(-1, block_bytes)[: 3 * len(special)], 3)
    least[:], greatest[:] = 0x00, 0xFF
    for rows in (first, least, greatest):
        scales = rows[:, SCALE_AT.get(name, 0) :][:, : special.shape[1]]
        scales[:] = special[:, : scales.shape[1]]
    raw = blocks.reshape(2, 3, -1)
    file = _core.GgufFile(write_gguf(lambda writer: writer.add_tensor("t", raw, raw_dtype=kind)))
    values = file.dequantize("t")
    _assert_same_bits(values, _expected(raw, kind), any_nan=name in SCALE_AT)
    assert np.isnan(values).any()
    assert np.isinf(values).any()

    tensor = file.tensors["t"]
    assert (tensor.type, tensor.shape, tensor.nbytes) == (name, values.shape, raw.nbytes)
    assert np.array_equal(file.raw("t"), raw.ravel())
    again = file.dequantize("t")
    assert again.flags.writeable
    assert not np.shares_memory(again, values)


def test_every_half(write_gguf: WriteGguf) -> None:
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    file = _core.GgufFile(write_gguf(lambda writer: writer.add_tensor("t", halves)))
    _assert_same_bits(file.dequantize("t"), halves.astype(np.float32), any_nan=False)


# Their tensors' odd lengths reach what is left over behind the vector loops.
@given(st.sampled_from(["F32", "F16", "BF16"]), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.randoms())
def test_any_shape(tmp_path_factory: pytest.TempPathFactory, name: str, shape: list[int], random: Any) -> None:
    _, width = GGML_QUANT_SIZES[DECODED[name]]
    raw = np.frombuffer(random.randbytes(math.prod(shape) * width), np.uint8).reshape(*shape[:-1], -1)
    path = tmp_path_factory.mktemp("gguf") / "m.gguf"
    file = _core.GgufFile(_write(path, lambda writer: writer.add_tensor("t", raw, raw_dtype=DECODED[name])))
    assert file.tensors["t"].shape == tuple(shape)
    _assert_same_bits(file.dequantize("t"), _expected(raw, DECODED[name]).reshape(shape), any_nan=False)


@pytest.mark.parametrize("kind", [k for k in GGMLQuantizationType if k.name not in DECODED], ids=lambda k: k.name)
def test_other_types_are_listed_but_not_decoded(kind: GGMLQuantizationType, write_gguf: WriteGguf) -> None:
    values, width = GGML_QUANT_SIZES[kind]
    raw = np.arange(6 * width, dtype=np.uint8).reshape(2, 3 * width)
    path = write_gguf(lambda writer: writer.add_tensor("t", raw, raw_dtype=kind))
    file = _core.GgufFile(path)
    tensor = file.tensors["t"]
    assert (tensor.type, tensor.shape, tensor.nbytes) == (kind.name, (2, 3 * values), raw.nbytes)
    assert np.array_equal(file.raw("t"), raw.ravel())
    with pytest.raises(RuntimeError, match=rf"^{path}: tensor 't': its type {kind.name} cannot be decoded"):
        file.dequantize("t")


def test_metadata_of_every_kind(write_gguf: WriteGguf) -> None:
    def fill(writer: GGUFWriter) -> None:
        writer.add_uint8("u8", 255)
        writer.add_int8("i8", -128)
        writer.add_uint16("u16", 65535)
        writer.add_int16("i16", -32768)
        writer.add_uint32("u32", 2**32 - 1)
        writer.add_int32("i32", -(2**31))
        writer.add_float32("f32", 0.1)
        writer.add_uint64("u64", 2**64 - 1)
        writer.add_int64("i64", -(2**63))
        writer.add_float64("f64", 0.1)
        writer.add_bool("bool", True)
        writer.add_string("text", "grüße\0🎉")
        writer.add_array("strings", ["a", "", "€"])
        writer.add_array("bools", [True, False])
        writer.add_array("floats", [1.5, -0.0])
        writer.add_array("nested", [[1, 2], [3], [-4, 5]])

    metadata = _core.GgufFile(write_gguf(fill)).metadata
    assert dict(metadata) == {
        "general.architecture": "test",
        "u8": 255,
        "i8": -128,
        "u16": 65535,
        "i16": -32768,
        "u32": 2**32 - 1,
        "i32": -(2**31),
        "f32": struct.unpack("f", struct.pack("f", 0.1))[0],
        "u64": 2**64 - 1,
        "i64": -(2**63),
        "f64": 0.1,
        "bool": True,
        "text": "grüße\0🎉",
        "strings": ["a", "", "€"],
        "bools": [True, False],
        "floats": [1.5, -0.0],
        "nested": [[1, 2], [3], [-4, 5]],
    }
    assert [type(metadata[key]) for key in ("bool", "u8", "f32")] == [bool, int, float]
    assert [type(value) for value in metadata["bools"]] == [bool, bool]
    assert "u8" in metadata
    assert "u9" not in metadata
    assert metadata.get("u9", 7) == 7
    assert metadata.get("u8", 7) == 255
    assert list(metadata.items()) == list(dict(metadata).items())
    assert list(metadata.values())[:2] == ["test", 255]
    assert len(metadata) == len(list(metadata)) == 17
    assert isinstance(metadata, Mapping)
    with pytest.raises(KeyError):
        metadata["u9"]


texts = st.text(st.characters(exclude_categories=["Cs"]))
scalars = st.one_of(
    st.tuples(st.just(GGUFValueType.INT64), st.integers(-(2**63), 2**63 - 1)),
    st.tuples(st.just(GGUFValueType.FLOAT64), st.floats(allow_nan=False)),
    st.tuples(st.just(GGUFValueType.BOOL), st.booleans()),
    st.tuples(st.just(GGUFValueType.STRING), texts),
    st.tuples(st.just(GGUFValueType.ARRAY), st.lists(texts, min_size=1)),
    st.tuples(st.just(GGUFValueType.ARRAY), st.lists(st.integers(-(2**31), 2**31 - 1), min_size=1)),
)


@given(st.dictionaries(texts.map("k.{}".format), scalars))
def test_metadata_reads_back(
    tmp_path_factory: pytest.TempPathFactory, values: dict[str, tuple[GGUFValueType, Any]]
) -> None:
    def fill(writer: GGUFWriter) -> None:
        for key, (kind, value) in values.items():
            writer.add_key_value(key, value, kind)

    metadata = _core.GgufFile(_write(tmp_path_factory.mktemp("gguf") / "m.gguf", fill)).metadata
    assert dict(metadata) == {"general.architecture": "test"} | {key: value for key, (_, value) in values.items()}


def _text(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _string_entry(key: bytes, value: bytes) -> bytes:
    return _text(key) + struct.pack("<I", GGUFValueType.STRING) + _text(value)


def _header(tensors: int, entries: int) -> bytes:
    return struct.pack("<4sIQQ", b"GGUF", 3, tensors, entries)


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    tokens = [b"\xe2\x82", b"\xe2", b"\xff", "\ufffd".encode()]
    listed = struct.pack("<IIQ", GGUFValueType.ARRAY, GGUFValueType.STRING, len(tokens)) + b"".join(map(_text, tokens))
    entries = _string_entry(b"text", b"a\xffb") + _string_entry(b"k\xff", b"1") + _string_entry(b"k\xfe", b"2")
    tensor = _text(b"t\xff") + struct.pack("<IQIQ", 1, 1, 0, 0)
    head = _header(1, 4) + entries + _text(b"tokens") + listed + tensor
    path = tmp_path / "m.gguf"
    path.write_bytes(head + bytes(-len(head) % 32) + struct.pack("<f", 2.5))

    file = _core.GgufFile(str(path))
    assert file.metadata["text"] == "a\ufffdb"
    # What is looked up by its text stays apart from what differs.
    assert [token.encode("utf-8", "surrogateescape") for token in file.metadata["tokens"]] == tokens
    assert (file.metadata["k\udcff"], file.metadata["k\udcfe"]) == ("1", "2")
    assert file.dequantize(*file.tensors).tolist() == [2.5]


def test_unknown_tensor(write_gguf: WriteGguf) -> None:
    path = write_gguf(lambda writer: writer.add_tensor("t", np.zeros(1, np.float32)))
    file = _core.GgufFile(path)
    for call in (file.dequantize, file.raw):
        with pytest.raises(KeyError) as raised:
            call("blk.0")
        assert raised.value.args == (f"{path}: there is no tensor 'blk.0'",)


def test_errors_are_one_line_with_the_path(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"\xff m.gguf")
    with pytest.raises(RuntimeError) as raised:
        _core.GgufFile(str(path))
    assert str(raised.value) == f"{path}: cannot open: No such file or directory"
    path.write_bytes(_header(0, 1) + _string_entry(b"\xff\n", b"")[:-1])
    with pytest.raises(RuntimeError) as raised:
        _core.GgufFile(str(path))
    assert str(raised.value) == f"{path}: metadata key '??': the file ends too early: 8 bytes needed, 7 left"


def test_views_cannot_be_written(write_gguf: WriteGguf) -> None:
    file = _core.GgufFile(write_gguf(lambda writer: writer.add_tensor("t", np.zeros(1, np.float32))))
    for mapping in (file.metadata, file.tensors):
        with pytest.raises(TypeError):
            mapping["new"] = 1
    with pytest.raises(ValueError, match="read-only"):
        file.raw("t")[0] = 1


def test_the_mapping_lives_as_long_as_its_users(write_gguf: WriteGguf) -> None:
    path = write_gguf(lambda writer: writer.add_tensor("t", np.ones(1, np.float32)))

    def mapped() -> bool:
        return path in Path("/proc/self/maps").read_text()

    file = _core.GgufFile(path)
    kept = (file.tensors, file.tensors["t"], file.dequantize("t"))
    raw, metadata = file.raw("t"), file.metadata
    file.release_pages()
    del file
    gc.collect()
    assert mapped()
    assert raw.view(np.float32).tolist() == [1.0]
    del raw
    assert mapped()
    assert metadata["general.architecture"] == "test"
    del metadata
    assert not mapped()
    tensors, tensor, values = kept
    assert list(tensors) == ["t"]
    assert tensor.shape == (1,)
    assert values.tolist() == [1.0]


def test_many_threads_read_one_file(write_gguf: WriteGguf) -> None:
    values = np.random.default_rng(3).standard_normal((64, 4096)).astype(np.float16)
    file = _core.GgufFile(write_gguf(lambda writer: writer.add_tensor("t", values)))
    with ThreadPoolExecutor(4) as pool:
        for result in pool.map(lambda _: file.dequantize("t"), range(16)):
            assert np.array_equal(result, values.astype(np.float32))


def test_the_default_model(default_model_path: Path) -> None:
    file = _core.GgufFile(str(default_model_path))
    reader = GGUFReader(default_model_path)
    fields = {key: field.contents() for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    assert dict(file.metadata) == fields
    assert len(file.metadata["tokenizer.ggml.tokens"]) == 49152
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for tensor in reader.tensors:
        rows = slice(None, None, 16)  # numpy takes seconds for all of them
        expected = _expected(tensor.data[rows], tensor.tensor_type)
        _assert_same_bits(file.dequantize(tensor.name)[rows], expected, any_nan=False)
