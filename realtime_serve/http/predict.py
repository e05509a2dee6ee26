"""POST /predict: inputs for models that predict, as JSON, as bytes or as NumPy arrays."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import quote

import msgspec

from realtime_serve._core import PayloadKind
from realtime_serve.config import ServerConfig
from realtime_serve.errors import InvalidRequestError, ServeError, UnsupportedMediaTypeError
from realtime_serve.http.body import read_body
from realtime_serve.http.request import HttpRequest
from realtime_serve.http.responses import Response, error_response
from realtime_serve.http.validation import check_metadata, check_names, decode_object, parse_priority
from realtime_serve.payload import Payload
from realtime_serve.randomness import new_request_id
from realtime_serve.service import InferenceService
from realtime_serve.types import Outcome, PredictRequest

_FIELDS = frozenset(("model", "priority", "timeout", "client_id", "metadata", "input", "inputs"))
_QUERY = frozenset(("model", "priority", "timeout", "client_id"))
_NUMPY_TYPE, _BYTES_TYPE, _JSON_TYPE = "application/x-npy", "application/octet-stream", "application/json"
# What curl and forms call a body of which they know nothing; /infer takes it as JSON too.
_JSON_TYPES = frozenset((_JSON_TYPE, "text/json", "application/x-www-form-urlencoded"))
_OUTPUT_KINDS = {
    _JSON_TYPE: PayloadKind.JSON,
    _NUMPY_TYPE: PayloadKind.NUMPY,
    _BYTES_TYPE: PayloadKind.BYTES,
}
_CONTENT_TYPES = {kind: name for name, kind in _OUTPUT_KINDS.items()}

# Inputs stay bytes here: the worker that needs their values decodes them.
_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_list_decoder = msgspec.json.Decoder(list[msgspec.Raw])
_value_decoder = msgspec.json.Decoder()
_NULL = msgspec.Raw(b"null")


class PredictHandlers:
    def __init__(self, service: InferenceService) -> None:
        self._service = service

    async def predict(self, request: HttpRequest) -> Response:
        """`input` or `inputs` of a JSON body, or the body itself as one input, whose content type says what it is.

        The answer is in the form that Accept names; without one JSON for JSON, and for other bodies what fits.
        """
        request_id = new_request_id()
        is_json = request.content_type in _JSON_TYPES or not request.headers.get("Content-Type")
        parse = _parse_json if is_json else _parse_raw
        headers = {"X-Request-Id": request_id}
        try:
            body = await read_body(request, self._service.config.max_body_bytes)
            parsed, is_single = parse(request, body, request_id, self._service.config)
        except ServeError as error:
            self._service.metrics.count_unread(error)
            return error_response(error, headers)
        if not parsed.client_id:
            parsed.client_id = request.client
        try:
            outputs, outcome = await self._service.predict(parsed)
        except ServeError as error:
            return error_response(error, headers)
        if is_single and outputs[0].kind is not PayloadKind.JSON:
            headers |= {"X-Model": _header(outcome.model), "X-Model-Version": _header(outcome.version)}
            return Response(outputs[0].data, _CONTENT_TYPES[outputs[0].kind], headers=headers)
        answer = _json_answer(request_id, outcome, outputs, is_single)
        return Response(answer, headers=headers)


def _parse_json(
    request: HttpRequest, body: bytes, request_id: str, defaults: ServerConfig
) -> tuple[PredictRequest, bool]:
    try:
        raw = decode_object(body, _decoder)
    except InvalidRequestError as error:
        if request.content_type == _JSON_TYPE:
            raise
        advice = "; to send bytes, name their type, as in -H 'Content-Type: application/octet-stream'"
        raise InvalidRequestError(f"{error}{advice}", code=error.code) from None
    check_names(raw, _FIELDS)
    inputs, is_single = _inputs(raw, most=defaults.max_batch_size + defaults.max_queue)
    given = {name: _decoded(name, value) for name, value in raw.items() if value != _NULL}
    if "metadata" in given:
        check_metadata(given["metadata"])
    output_kind = _wanted(request) or PayloadKind.JSON
    if not is_single and output_kind is not PayloadKind.JSON:
        raise InvalidRequestError("several inputs are answered as application/json; Accept asks for another", "Accept")
    payloads = [Payload(PayloadKind.JSON, bytes(value)) for value in inputs]
    return _request(request_id, payloads, given, output_kind, defaults), is_single


def _decoded(name: str, value: msgspec.Raw) -> Any:
    try:
        return _value_decoder.decode(value)
    except RecursionError:
        raise InvalidRequestError(f"{name} is nested too deeply", name, "invalid_json") from None
    except (msgspec.DecodeError, UnicodeDecodeError) as error:  # a Raw has been skipped over, and no more
        raise InvalidRequestError(f"{name} is not valid JSON: {error}", name, "invalid_json") from None


def _inputs(raw: dict[str, msgspec.Raw], most: int) -> tuple[list[msgspec.Raw], bool]:
    """Takes `input` or `inputs` out; whether it is the first."""
    one, several = raw.pop("input", None), raw.pop("inputs", None)
    if several == _NULL:  # as everywhere: as if it were not there
        several = None
    if several is not None and one == _NULL:
        one = None
    if one is not None and several is not None:
        raise InvalidRequestError("give input or inputs, not both", "inputs")
    if one is not None:
        return [one], True
    if several is None:
        raise InvalidRequestError("input is required", "input", "missing_field")
    try:
        inputs = _list_decoder.decode(several)
    except msgspec.ValidationError:
        raise InvalidRequestError("inputs must be a list; one input goes into input", "inputs") from None
    if not inputs:
        raise InvalidRequestError("inputs must have at least one input", "inputs")
    if len(inputs) > most:
        raise InvalidRequestError(f"inputs must be at most {most} here; there are {len(inputs)}", "inputs")
    return inputs, False


def _parse_raw(
    request: HttpRequest, body: bytes, request_id: str, defaults: ServerConfig
) -> tuple[PredictRequest, bool]:
    if request.content_type.startswith("multipart/"):
        raise UnsupportedMediaTypeError(
            "multipart bodies are not read here: send one input as the body itself, with its own content type"
        )
    check_names(request.query, _QUERY, "parameter")
    given: dict[str, Any] = dict(request.query)
    if "timeout" in given:
        with contextlib.suppress(ValueError):  # the request's own check refuses what is no number
            given["timeout"] = float(given["timeout"])
    kind = PayloadKind.NUMPY if request.content_type == _NUMPY_TYPE else PayloadKind.BYTES
    return _request(request_id, [Payload(kind, body)], given, _wanted(request), defaults), True


def _request(
    request_id: str,
    inputs: list[Payload],
    given: Mapping[str, Any],
    output_kind: PayloadKind | None,
    defaults: ServerConfig,
) -> PredictRequest:
    settings = {"timeout": defaults.request_timeout, **given}
    if "priority" in settings:
        settings["priority"] = parse_priority(settings["priority"])
    return PredictRequest(request_id, settings.pop("model", None), inputs, output_kind=output_kind, **settings)


def _wanted(request: HttpRequest) -> PayloadKind | None:
    """The form of answer that Accept names, where it names one that there is."""
    for part in request.headers.get("Accept", "").split(","):
        kind = _OUTPUT_KINDS.get(part.partition(";")[0].strip().lower())
        if kind is not None:
            return kind
    return None


def _header(name: str) -> str:
    """A name as a header can have it: percent-encoded where it has more than plain characters."""
    return name if name.isascii() and name.isprintable() else quote(name)


def _json_answer(request_id: str, outcome: Outcome, outputs: list[Payload], is_single: bool) -> bytes:
    """The outputs' bytes as they came, in an object."""
    model = _named(outcome.model, outcome.version)
    data = [output.data for output in outputs]
    answer = b'"output":' + data[0] if is_single else b'"outputs":[' + b",".join(data) + b"]"
    timings = b'"queue_ms":%.3f,"compute_ms":%.3f' % (outcome.timings.queue_ms, outcome.timings.prefill_ms)
    return b'{"request_id":"%b",%b,%b,"timings":{%b}}' % (request_id.encode(), model, answer, timings)


@lru_cache
def _named(model: str, version: str) -> bytes:
    """The fields that are the same for all answers of a model."""
    return msgspec.json.encode({"model": model, "version": version})[1:-1]
