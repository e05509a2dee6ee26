"""Answers: error objects, and the stream that the pump writes by itself."""

from __future__ import annotations

import asyncio
import math
import time
from email.utils import formatdate
from functools import lru_cache
from typing import Any

from aiohttp import HttpVersion11, web
from aiohttp.abc import AbstractStreamWriter

from realtime_serve._pump import Stream
from realtime_serve.errors import ServeError, ShuttingDownError, stream_error


def error_body(message: str, status: int) -> dict[str, Any]:
    kind, code = _STATUS_TYPES.get(status, ("internal_error", "internal_error"))
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


_STATUS_TYPES = {
    400: ("invalid_request_error", "bad_request"),
    404: ("not_found_error", "route_not_found"),
    405: ("invalid_request_error", "method_not_allowed"),
    408: ("timeout_error", "request_timeout"),
    413: ("invalid_request_error", "body_too_large"),
    417: ("invalid_request_error", "expectation_failed"),
}


def error_response(error: ServeError) -> web.Response:
    response = web.json_response(error.to_dict(), status=error.status, headers=retry_headers(error.retry_after))
    if isinstance(error, ShuttingDownError):
        response.force_close()  # the next request had better find another server
    return response


def retry_headers(seconds: float | None) -> dict[str, str]:
    """Retry-After in whole seconds; nothing where it is not known."""
    return {} if seconds is None else {"Retry-After": str(max(1, math.ceil(seconds)))}


class _DirectResponse(web.StreamResponse):
    """An answer of 200 whose bytes go straight to the transport, head and body in one write."""

    def __init__(self, request: web.BaseRequest) -> None:
        super().__init__()
        self._request = request
        self._is_chunked = request.version >= HttpVersion11
        self._stays_open = self._is_chunked and request.keep_alive

    def _transport(self) -> asyncio.Transport:
        if (transport := self._request.transport) is None:
            raise ConnectionResetError("the client left before its answer began")
        return transport

    def _head(self, headers: dict[str, str]) -> bytes:
        if not self._stays_open:
            headers["Connection"] = "close"
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers.items()])
        return f"HTTP/1.1 200 OK\r\n{lines}Date: {_date(int(time.time()))}\r\n\r\n".encode("latin-1")

    @property
    def keep_alive(self) -> bool | None:
        return self._stays_open

    async def prepare(self, request: web.BaseRequest) -> AbstractStreamWriter | None:
        """Nothing is left to prepare: the head goes out with the body."""
        return None


@lru_cache(maxsize=1)
def _date(second: int) -> str:
    return formatdate(second, usegmt=True)


class WholeResponse(_DirectResponse):
    """An answer that is there as a whole: one write."""

    def __init__(self, request: web.BaseRequest, body: bytes, content_type: str, headers: dict[str, str]) -> None:
        super().__init__(request)
        self._body_bytes = body
        self._fields = {"Content-Type": content_type, "Content-Length": str(len(body)), **headers}

    async def write_eof(self, data: bytes = b"") -> None:
        self._transport().write(self._head(self._fields) + self._body_bytes)
        await self._request.writer.drain()  # the next of pipelined requests waits for the reader of this answer


class EventStreamResponse(_DirectResponse):
    """A stream of server-sent events. Its head and body are written by the pump.

    The head goes out together with the first events, in one write: so an error before the first token can still be
    answered with its own status.
    """

    def __init__(self, request: web.BaseRequest, stream: Stream, headers: dict[str, str]) -> None:
        super().__init__(request)
        self._stream = stream
        self._fields = {"Content-Type": "text/event-stream", "Cache-Control": "no-cache", **headers}
        if self._is_chunked:
            self._fields["Transfer-Encoding"] = "chunked"

    async def run(self) -> None:
        """Streams to the end. Raises the stream's error where nothing has been written yet."""
        await self._stream.write_to(self._transport(), self._head(self._fields), self._is_chunked)
        if self._stream.error and not self._stream.started:
            raise stream_error(self._stream.error, self._stream.error_detail)

    @property
    def prepared(self) -> bool:
        return self._stream.started

    async def write_eof(self, data: bytes = b"") -> None:
        """Nothing is left to write: the pump has written the last chunk."""
