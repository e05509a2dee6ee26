"""From the bytes of a body to a validated request."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, fields
from typing import Any

import msgspec

from realtime_serve.config import ServerConfig
from realtime_serve.errors import InvalidRequestError, did_you_mean
from realtime_serve.types import InferenceRequest, RequestPriority, flag_problem, shown

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
    given = {name: value for name, value in decode_object(body, _decoder).items() if value is not None}
    check_names(given, _FIELDS)
    if "prompt" not in given:
        raise InvalidRequestError("prompt is required", "prompt", "missing_field")
    stream = given.pop("stream", None)
    if stream is not None and (problem := flag_problem(stream)):
        raise InvalidRequestError(f"stream {problem}", "stream")
    if "priority" in given:
        given["priority"] = parse_priority(given["priority"])
    if "metadata" in given:
        check_metadata(given["metadata"])
    given.setdefault("timeout", defaults.request_timeout)
    return InferBody(InferenceRequest(request_id, given.pop("model", None), **given), stream)


def check_names(given: Iterable[str], known: Collection[str], what: str = "field") -> None:
    """Raises InvalidRequestError where there is a name that is not known."""
    for name in given:
        if name not in known:
            raise InvalidRequestError(
                f"unknown {what} {shown(name)}{did_you_mean(name, known)}", shown(name)[1:-1], f"unknown_{what}"
            )


def decode_object(body: bytes, decoder: msgspec.json.Decoder[Any]) -> dict[str, Any]:
    """Raises InvalidRequestError where the bytes are no JSON object."""
    try:
        decoded = decoder.decode(body)
    except RecursionError:
        raise InvalidRequestError("the body is nested too deeply", code="invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        if str(error).startswith("Expected `object`"):
            raise InvalidRequestError("the body must be a JSON object", code="invalid_json") from None
        raise InvalidRequestError(f"the body is not valid JSON: {error}", code="invalid_json") from None
    if not isinstance(decoded, dict):
        raise InvalidRequestError(f"the body must be a JSON object; it is {shown(decoded)}", code="invalid_json")
    return decoded


def parse_priority(name: object) -> RequestPriority:
    priority = RequestPriority.__members__.get(name.upper()) if isinstance(name, str) else None
    if priority is None:
        allowed = ", ".join(RequestPriority.__members__)
        raise InvalidRequestError(f"priority must be one of {allowed}; it is {shown(name)}", "priority")
    return priority


def check_metadata(metadata: object) -> None:
    if not isinstance(metadata, dict):
        raise InvalidRequestError(f"metadata must be an object; it is {shown(metadata)}", "metadata")
    size = len(msgspec.json.encode(metadata))
    if size > _MAX_METADATA_BYTES:
        raise InvalidRequestError(
            f"metadata must be at most {_MAX_METADATA_BYTES} bytes of JSON; it has {size}", "metadata"
        )
