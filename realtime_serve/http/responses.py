"""Answers: objects, errors among them, and the stream that the pump writes by itself."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from email.utils import formatdate
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Protocol

import msgspec

from realtime_serve._pump import Stream
from realtime_serve.errors import ServeError, ShuttingDownError, stream_error
from realtime_serve.http.request import HttpRequest

_JSON_TYPE = "application/json"


class Answer(Protocol):
    async def send(self, request: HttpRequest) -> bool:
        """Whether the connection stays open behind it. Raises ConnectionError where the client has left."""
        ...


class Response:
    """An answer that is there as a whole: one write."""

    def __init__(
        self,
        body: bytes,
        content_type: str = _JSON_TYPE,
        *,
        status: int = 200,
        headers: Mapping[str, str] | None = None,
        closes: bool = False,
    ) -> None:
        self.body = body
        self.status = status
        self.headers = {"Content-Type": content_type, "Content-Length": str(len(body)), **(headers or {})}
        self.closes = closes

    async def send(self, request: HttpRequest) -> bool:
        connection = request.connection
        stays_open = connection.keeps_open(request) and not self.closes
        head = _head(self.status, self.headers, stays_open)
        connection.write(head if request.method == "HEAD" else head + self.body)
        if connection.writing_paused:  # the next of pipelined requests waits for the reader of this answer
            await connection.drain()
        return stays_open


class EventStreamResponse:
    """A stream of server-sent events. Its head and body are written by the pump.

    The head goes out together with the first events, in one write: so an error before the first token can still be
    answered with its own status.
    """

    def __init__(self, request: HttpRequest, stream: Stream, headers: Mapping[str, str]) -> None:
        self._request = request
        self._stream = stream
        self._stays_open = request.connection.keeps_open(request)
        self._headers = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **headers}
        if request.is_http_1_1:
            self._headers["Transfer-Encoding"] = "chunked"

    async def run(self) -> None:
        """Streams to the end. Raises the stream's error where nothing has been written yet."""
        request = self._request
        head = _head(200, self._headers, self._stays_open)
        await self._stream.write_to(request.connection.open_transport, head, request.is_http_1_1)
        if self._stream.error and not self._stream.started:
            raise stream_error(self._stream.error, self._stream.error_detail)

    @property
    def started(self) -> bool:
        """Whether its head is out: nothing else can be answered any more."""
        return self._stream.started

    async def send(self, request: HttpRequest) -> bool:
        """Nothing is left to send: `run` has."""
        return self._stays_open


def json_response(value: object, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status=status, headers=headers)


def error_response(error: ServeError, headers: Mapping[str, str] | None = None) -> Response:
    return Response(
        msgspec.json.encode(error.to_dict()),
        status=error.status,
        headers={**(headers or {}), **retry_headers(error.retry_after)},
        closes=isinstance(error, ShuttingDownError),  # the next request had better find another server
    )


def error_body(message: str, status: int) -> dict[str, Any]:
    """The error object of what goes wrong outside of a request's own terms."""
    kind, code = _STATUS_TYPES.get(status, ("internal_error", "internal_error"))
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


_STATUS_TYPES = {
    400: ("invalid_request_error", "bad_request"),
    404: ("not_found_error", "route_not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    417: ("invalid_request_error", "expectation_failed"),
}


def retry_headers(seconds: float | None) -> dict[str, str]:
    """Retry-After in whole seconds; nothing where it is not known."""
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}


def last_answer(value: object, status: int, headers: Mapping[str, str] | None = None) -> bytes:
    """An answer to no request, behind which the connection is closed."""
    body = msgspec.json.encode(value)
    headers = {"Content-Type": _JSON_TYPE, "Content-Length": str(len(body)), **(headers or {})}
    return _head(status, headers, stays_open=False) + body


def last_error(error: ServeError) -> bytes:
    return last_answer(error.to_dict(), error.status, retry_headers(error.retry_after))


def _head(status: int, headers: Mapping[str, str], stays_open: bool) -> bytes:
    lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
    closing = "" if stays_open else "Connection: close\r\n"
    return f"{_status_line(status)}{lines}{closing}Date: {_date(int(time.time()))}\r\n\r\n".encode("latin-1")


@lru_cache
def _status_line(status: int) -> str:
    return f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\n"


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)
