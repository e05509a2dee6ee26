"""Values to bytes and back, and bytes that are not what they are said to be."""

from __future__ import annotations

import base64
import io
import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from realtime_serve import payload
from realtime_serve._core import PayloadKind
from realtime_serve.payload import Payload, PayloadError

JSON, BYTES, NUMPY, TEXT = PayloadKind.JSON, PayloadKind.BYTES, PayloadKind.NUMPY, PayloadKind.TEXT
DTYPES = ["?", "i1", "u2", "<i4", ">i4", "i8", "u8", "f2", "<f4", ">f8", "c8", "S3", "U2", "M8[s]", "m8[ms]"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(st.text(st.characters(exclude_categories=["Cs"])), inner, max_size=4),
    max_leaves=20,
)  # fmt: skip


def npy(header: str, data: bytes = b"", version: tuple[int, int] = (1, 0)) -> bytes:
    """A file that says what it likes."""
    text = header.encode() + b"\n"
    length = struct.pack("<H" if version == (1, 0) else "<I", len(text))
    return b"\x93NUMPY" + bytes(version) + length + text + data


def header(shape: str, descr: str = "'<f4'") -> str:
    return f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}"


def saved(array: Any, **options: Any) -> bytes:
    out = io.BytesIO()
    np.save(out, array, **options)
    return out.getvalue()


@given(json_values)
def test_json_comes_back(value: object) -> None:
    made = Payload.of(value, JSON)
    assert made.kind is JSON
    assert made.value() == json.loads(made.data) == value


@given(st.binary())
def test_bytes_come_back(value: bytes) -> None:
    for form in (value, bytearray(value), memoryview(value)):
        assert Payload.of(form) == Payload(BYTES, value)
    assert Payload(BYTES, value).value() == value
    assert Payload.of(value, JSON).data == b'"' + base64.b64encode(value) + b'"'


@given(
    st.sampled_from(DTYPES), st.lists(st.integers(0, 4), max_size=4), st.binary(min_size=3100, max_size=3100),
    st.sampled_from(["C", "F", "reversed"]),
)  # fmt: skip
def test_arrays_come_back(dtype: str, shape: list[int], data: bytes, layout: str) -> None:
    kind = np.dtype(dtype)
    if kind.kind in "?U":  # not every byte is a truth value, nor four of them a character
        data = bytes(len(data))
    array = np.frombuffer(data[: math.prod(shape) * kind.itemsize], kind).reshape(shape)
    array = (
        array[::-1] if layout == "reversed" and array.ndim else np.asarray(array, order="F" if layout == "F" else "C")
    )
    back = Payload.of(array, NUMPY).value()
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    assert back.tobytes() == array.tobytes()
    assert back.flags.writeable


def test_structured_arrays_are_kept() -> None:
    array = np.array([(1, 2.5), (3, 4.5)], [("a", "i4"), ("b", "f8")])
    assert Payload.of(array).value().tolist() == [(1, 2.5), (3, 4.5)]
    assert Payload.of(array, JSON).value() == [[1, 2.5], [3, 4.5]]


@dataclass
class Box:
    label: str
    score: np.float32


@pytest.mark.parametrize(
    ("value", "data"),
    [
        (np.float32(0.5), b"0.5"),
        (np.float64(0.5), b"0.5"),
        (np.int64(-3), b"-3"),
        (np.uint64(2**64 - 1), b"18446744073709551615"),
        (np.bool_(True), b"true"),
        (np.str_("a"), b'"a"'),
        (np.array(3), b"3"),
        (torch.tensor(3), b"3"),
        (torch.tensor(2.5, requires_grad=True), b"2.5"),
        ({"label": np.str_("cat"), "scores": np.array([0.25, 1])}, b'{"label":"cat","scores":[0.25,1.0]}'),
        ({np.int64(7): np.float32(0.5)}, b'{"7":0.5}'),
        ([torch.tensor([1, 2]), (3,)], b"[[1,2],[3]]"),
        ([math.nan, math.inf, -math.inf, np.float32("nan")], b"[null,null,null,null]"),
        ({"x": [np.array([np.nan, 1.0])]}, b'{"x":[[null,1.0]]}'),
        (Box("cat", np.float32(0.5)), b'{"label":"cat","score":0.5}'),
        (None, b"null"),
        ("é", '"é"'.encode()),
    ],
)
def test_what_models_return_is_json_by_itself(value: object, data: bytes) -> None:
    assert Payload.of(value) == Payload(JSON, data)


@pytest.mark.parametrize(
    ("tensor", "dtype", "values"),
    [
        (torch.tensor([[1, 2], [3, 4]]).T, "int64", [[1, 3], [2, 4]]),
        (torch.tensor([0.5], requires_grad=True) * 3, "float32", [1.5]),
        (torch.tensor([1.5, -2], dtype=torch.bfloat16), "float32", [1.5, -2]),
        (torch.tensor([1.5], dtype=torch.float16), "float16", [1.5]),
        (torch.tensor([True, False]), "bool", [True, False]),
        (torch.empty(0, 3), "float32", []),
    ],
)
def test_tensors_are_arrays(tensor: torch.Tensor, dtype: str, values: list[object]) -> None:
    back = Payload.of(tensor).value()
    assert (back.dtype, back.shape, back.tolist()) == (np.dtype(dtype), tuple(tensor.shape), values)
    assert Payload.of(tensor, JSON).value() == values


def test_a_payload_stays_as_it_is() -> None:
    made = Payload(TEXT, "é".encode())
    assert Payload.of(made, JSON) is made
    assert made.value() == "é"


class Hostile:
    """What is asked whether it is an array raises."""

    @property
    def __array__(self) -> object:
        raise RuntimeError("no")


class Mute(Exception):
    def __str__(self) -> str:
        raise ValueError


class RaisesMute:
    shape = (2,)

    def __array__(self, *args: object, **options: object) -> object:
        raise Mute


def nested() -> list[object]:
    value: list[object] = []
    for _ in range(100_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "kind", "message"),
    [
        (object(), JSON, "a object has no form as JSON: there is a object in it"),
        ({"a": [object()]}, JSON, "a dict has no form as JSON: there is a object in it"),
        ({(1, 2): 3}, JSON, "a dict has no form as JSON"),
        ("\ud800", JSON, "a str has no form as JSON"),
        (3j, JSON, "a complex has no form as JSON"),
        (np.array([3j]), JSON, "a ndarray has no form as JSON: there is a complex in it"),
        ("text", BYTES, "a str has no form as bytes"),
        (np.zeros(2), BYTES, "a ndarray has no form as bytes"),
        ([1, [2]], NUMPY, "a list has no form as a NumPy array"),
        ({"a": 1}, NUMPY, "a dict has no form as a NumPy array: it would be an array of Python objects"),
        (np.array([None]), NUMPY, "it would be an array of Python objects"),
        (np.array([None]), PayloadKind.NONE, "it would be an array of Python objects"),
        (Hostile(), PayloadKind.NONE, "a Hostile has no form"),
        (RaisesMute(), PayloadKind.NONE, "a RaisesMute has no form as a NumPy array: Mute"),
        ("text", TEXT, "a payload cannot be made as TEXT"),
    ],
)
def test_what_has_no_form_is_named(value: object, kind: PayloadKind, message: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Payload.of(value, kind)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_nested_without_end_has_no_form() -> None:
    with pytest.raises(PayloadError, match="a list has no form as JSON"):
        Payload.of(nested(), JSON)


def test_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload, "MAX_PAYLOAD_BYTES", 10)
    assert len(Payload.of(b"x" * 10).data) == 10
    with pytest.raises(PayloadError, match="it has 11 bytes; the most is 10"):
        Payload.of(b"x" * 11)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"{", "not valid JSON"),
        (b'"\xff"', "not valid JSON"),
        (b"NaN", "not valid JSON"),
        (b"1e999", "not valid JSON"),
        (b'"\\ud800"', "not valid JSON"),
        (b"1 2", "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
    ],
)
def test_what_is_no_json(data: bytes, message: str) -> None:
    with pytest.raises(PayloadError, match=message):
        Payload(JSON, data).value()


def test_what_is_no_text() -> None:
    with pytest.raises(PayloadError, match="not UTF-8"):
        Payload(TEXT, b"\xff").value()


HUGE = "9" * 400
HOSTILE = {
    "empty": b"",
    "no magic": b"PK\x03\x04" + bytes(40),
    "magic alone": b"\x93NUMPY",
    "no header": b"\x93NUMPY\x01\x00\xff\xff",
    "version 3": npy(header("(1,)"), bytes(4), (3, 0)),
    "version 9": npy(header("(1,)"), bytes(4), (9, 9)),
    "too few bytes": npy(header("(2,)"), bytes(4)),
    "too many bytes": npy(header("(1,)"), bytes(8)),
    "huge shape": npy(header("(1000000000000000,)"), bytes(4)),
    "shape beyond 64 bits": npy(header(f"({HUGE},)"), bytes(4)),
    "shape that overflows to what there is": npy(header(f"({2**62 + 1}, 4)", "'|u1'"), bytes(4)),
    "negative": npy(header("(-1,)"), bytes(4)),
    "negative twice": npy(header("(-2, -2)", "'|u1'"), bytes(4)),
    "nothing of much": npy(header("(0, 9223372036854775807, 9223372036854775807)")),
    "items without size": npy(header("(1000000000000,)", "'|V0'")),
    "texts without size": npy(header("(1000000000000,)", "'|S0'")),
    "shape is text": npy(header("'x'"), bytes(4)),
    "shape of floats": npy(header("(1.5,)"), bytes(4)),
    "100 dimensions": npy(header("(" + "1," * 100 + ")", "'|u1'"), bytes(1)),
    "objects": npy(header("(1,)", "'|O'"), b"cos\nsystem\n(S'false'\ntR."),
    "objects in a field": npy(header("(1,)", "[('a', '|O')]"), bytes(8)),
    "unknown dtype": npy(header("(1,)", "'<q9'"), bytes(4)),
    "code": npy("__import__('os').abort()", bytes(4)),
    "deep": npy("(" * 9000, bytes(4)),
    "no dict": npy("[]", bytes(4)),
    "keys missing": npy("{'descr': '<f4'}", bytes(4)),
    "header too long": npy(header("(1,)") + " " * 30_000, bytes(4)),
    "pickle": saved(np.array([{}], dtype=object), allow_pickle=True),
    "npz": b"PK\x05\x06" + bytes(18),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_arrays(name: str) -> None:
    with pytest.raises(PayloadError) as caught:
        Payload(NUMPY, HOSTILE[name]).value()
    assert len(str(caught.value)) < 400
    assert "\n" not in str(caught.value)


def test_version_2_is_read() -> None:
    assert Payload(NUMPY, npy(header("(2,)"), np.float32([1, 2]).tobytes(), (2, 0))).value().tolist() == [1, 2]


@given(st.data())
def test_damaged_arrays_raise_nothing_else(data: st.DataObject) -> None:
    damaged = bytearray(saved(np.arange(6, dtype="<i2").reshape(2, 3)))
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    try:
        value = Payload(NUMPY, bytes(damaged[: data.draw(st.integers(0, len(damaged)))])).value()
    except PayloadError:
        return
    assert value.nbytes <= 12
