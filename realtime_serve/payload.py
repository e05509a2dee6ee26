"""What goes into and comes out of models that predict: JSON values, bytes and NumPy arrays, as bytes."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass
from typing import Any

import msgspec

from realtime_serve._core import PayloadKind

# Of one input or output, encoded.
MAX_PAYLOAD_BYTES = 64 << 20
# Characters of a reason, which may hold anything.
_MAX_SHOWN = 200


class PayloadError(ValueError):
    """Bytes that are not what they are said to be, or a value that has no such form; the message says which."""


@dataclass(slots=True)  # not frozen: making one would take twice as long
class Payload:
    """A value's bytes and what they are."""

    kind: PayloadKind
    data: bytes

    @classmethod
    def of(cls, value: Any, kind: PayloadKind = PayloadKind.NONE) -> Payload:
        """A value in the form `kind`; without one, bytes stay bytes, arrays and tensors become NumPy's file format, and
        all else JSON. A Payload stays as it is.

        In JSON arrays and tensors are lists, bytes are base64, and numbers that are not finite are null. Raises
        PayloadError where the value has no such form.
        """
        if isinstance(value, Payload):
            return value
        if kind not in _FORMS and kind is not PayloadKind.NONE:
            raise PayloadError(f"a payload cannot be made as {kind.name}")
        try:
            if kind is PayloadKind.NONE:
                kind = _natural_kind(value)
            data = _ENCODERS[kind](value)
        except Exception as error:  # the value's own methods were called
            form = _FORMS.get(kind, "a payload")
            raise PayloadError(f"a {type(value).__name__} has no form as {form}: {_reason(error)}") from error
        if len(data) > MAX_PAYLOAD_BYTES:
            raise PayloadError(f"it has {len(data)} bytes; the most is {MAX_PAYLOAD_BYTES}")
        return cls(kind, data)

    def value(self) -> Any:
        """Raises PayloadError where the bytes are not what `kind` says."""
        match self.kind:
            case PayloadKind.JSON:
                return _from_json(self.data)
            case PayloadKind.NUMPY:
                return _from_numpy(self.data)
            case PayloadKind.TEXT:
                return _from_text(self.data)
        return self.data


def _natural_kind(value: Any) -> PayloadKind:
    if isinstance(value, bytes | bytearray | memoryview):
        return PayloadKind.BYTES
    return PayloadKind.NUMPY if _is_array(value) else PayloadKind.JSON


def _is_array(value: Any) -> bool:
    """NumPy's, and what says that it can be one: tensors of torch among others. A scalar is none, whoever's it is."""
    return (hasattr(value, "__array__") or _is_tensor(value)) and getattr(value, "shape", None) not in (None, ())


def _is_tensor(value: Any) -> bool:
    return hasattr(value, "detach") and hasattr(value, "cpu")


def _to_numpy(value: Any) -> Any:
    import numpy as np

    if not _is_tensor(value):
        return np.asarray(value)
    tensor = value.detach().cpu()
    try:
        return np.asarray(tensor)
    except TypeError:  # bfloat16 and the 8-bit floats, which NumPy does not have
        return np.asarray(tensor.float())


def _encode_bytes(value: Any) -> bytes:
    if not isinstance(value, bytes | bytearray | memoryview):
        raise TypeError("it is something else")
    return bytes(value)


def _encode_numpy(value: Any) -> bytes:
    import numpy as np

    array = _to_numpy(value)
    if array.dtype.hasobject:
        raise TypeError("it would be an array of Python objects")
    out = io.BytesIO()
    np.save(out, array, allow_pickle=False)
    return out.getvalue()


def _plain(value: Any) -> Any:
    """What JSON can say of a value that it does not know."""
    if hasattr(value, "__array__") or _is_tensor(value):
        return _to_numpy(value).tolist()
    raise NotImplementedError(f"there is a {type(value).__name__} in it")


def _from_text(data: bytes) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise PayloadError(f"it is not UTF-8: {_reason(error)}") from None


def _from_json(data: bytes) -> Any:
    try:
        return _json_decoder.decode(data)
    except RecursionError:
        raise PayloadError("it is nested too deeply") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise PayloadError(f"it is not valid JSON: {_reason(error)}") from None


def _from_numpy(data: bytes) -> Any:
    import numpy as np

    stream = io.BytesIO(data)
    try:
        # Nothing is unpickled: that would run what a client sends. What the header says is checked against the bytes
        # that there are before memory is taken for it.
        version = np.lib.format.read_magic(stream)
        read_header = {
            (1, 0): np.lib.format.read_array_header_1_0,
            (2, 0): np.lib.format.read_array_header_2_0,
        }.get(version)
        if read_header is None:
            raise PayloadError(f"version {version[0]}.{version[1]} of NumPy's format is not read here")
        shape, _, dtype = read_header(stream)
        if dtype.hasobject:
            raise PayloadError("arrays of Python objects are not taken")
        left = len(data) - stream.tell()
        if dtype.itemsize == 0 or min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != left:
            raise PayloadError(f"its header says shape {_shown(shape)} of {_shown(dtype)}, and {left} bytes follow")
        stream.seek(0)
        return np.load(stream, allow_pickle=False)
    except PayloadError:
        raise
    except Exception as error:
        raise PayloadError(f"it is not a NumPy array in the .npy format: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What an error says, in a line; its type where it says nothing."""
    try:
        return _shown(" ".join(str(error).split())) or type(error).__name__
    except Exception:  # of a class whose own text fails
        return type(error).__name__


def _shown(value: Any) -> str:
    return str(value)[:_MAX_SHOWN]


_json_encoder = msgspec.json.Encoder(enc_hook=_plain)
_json_decoder = msgspec.json.Decoder()
_ENCODERS = {PayloadKind.BYTES: _encode_bytes, PayloadKind.NUMPY: _encode_numpy, PayloadKind.JSON: _json_encoder.encode}
_FORMS = {PayloadKind.BYTES: "bytes", PayloadKind.NUMPY: "a NumPy array", PayloadKind.JSON: "JSON"}
