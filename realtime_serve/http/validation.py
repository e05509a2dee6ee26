"""From the bytes of a body to a validated request."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import msgspec

from realtime_serve.config import ServerConfig
from realtime_serve.errors import InvalidRequestError, did_you_mean
from realtime_serve.types import InferenceRequest, RequestPriority, check_context, flag_problem, shown

__all__ = ["InferBody", "check_context", "parse_infer"]

_MAX_METADATA_BYTES = 16 * 1024
_FIELDS = (frozenset(field.name for field in fields(InferenceRequest)) - {"request_id"}) | {"stream"}

# Into plain objects: InferenceRequest checks every value by itself, for callers without HTTP as well, and decoding into
# a struct first takes as long (0.6 µs for a body of 120 bytes either way).
_decoder = msgspec.json.Decoder()


@dataclass(frozen=True, slots=True)
class InferBody:
    """What the body of /infer asks for."""

    request: InferenceRequest
    stream: bool | None
    """None: it does not say."""


def parse_infer(body: bytes, *, request_id: str, defaults: ServerConfig) -> InferBody:
    """Raises InvalidRequestError, whatever the bytes are, naming the field where one is wrong."""
    given = {name: value for name, value in _decode_object(body).items() if value is not None}
    for name in given.keys() - _FIELDS:
        raise InvalidRequestError(
            f"unknown field {shown(name)}{did_you_mean(name, _FIELDS)}", shown(name)[1:-1], "unknown_field"
        )
    if "prompt" not in given:
        raise InvalidRequestError("prompt is required", "prompt", "missing_field")
    stream = given.pop("stream", None)
    if stream is not None and (problem := flag_problem(stream)):
        raise InvalidRequestError(f"stream {problem}", "stream")
    if "priority" in given:
        given["priority"] = _priority(given["priority"])
    if "metadata" in given:
        _check_metadata(given["metadata"])
    given.setdefault("timeout", defaults.request_timeout)
    return InferBody(InferenceRequest(request_id, given.pop("model", None), **given), stream)


def _decode_object(body: bytes) -> dict[str, Any]:
    try:
        decoded = _decoder.decode(body)
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(decoded, dict):
        raise InvalidRequestError(f"the body must be a JSON object; it is {shown(decoded)}", code="invalid_json")
    return decoded


def _priority(name: object) -> RequestPriority:
    priority = RequestPriority.__members__.get(name.upper()) if isinstance(name, str) else None
    if priority is None:
        allowed = ", ".join(RequestPriority.__members__)
        raise InvalidRequestError(f"priority must be one of {allowed}; it is {shown(name)}", "priority")
    return priority


def _check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict):
        raise InvalidRequestError(f"metadata must be an object; it is {shown(metadata)}", "metadata")
    size = len(msgspec.json.encode(metadata))
    if size > _MAX_METADATA_BYTES:
        raise InvalidRequestError(
            f"metadata must be at most {_MAX_METADATA_BYTES} bytes of JSON; it has {size}", "metadata"
        )
