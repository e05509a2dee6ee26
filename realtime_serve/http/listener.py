"""The connections of a listening socket: how many there may be, and how long they may be silent or not read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import socket
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from itertools import islice
from typing import Any, cast

from aiohttp import web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http_exceptions import BadHttpMethod, HttpProcessingError
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

from realtime_serve.errors import RequestTimeoutError, ServeError, TooManyConnectionsError
from realtime_serve.http.bind import room_for
from realtime_serve.http.responses import error_body, retry_headers

log = logging.getLogger(__name__)

# From a connection's start, or its last answer, to the end of the next request's headers.
_HEADERS_WITHIN_S = 30.0
# What a reader may be behind by before it is cut is the pump's to see, which is to come first.
_AFTER_THE_PUMP_S = 1.0
# What handlers get for their last bytes once their streams have ended.
_HANDLERS_END_S = 1.0
# What a client that reads gets for its last bytes, however little time is left.
_LAST_BYTES_S = 1.0
# Connections that are taken in one turn of the event loop.
_BURST = 64
# A refused client gets this long to read why and to close; of more than so many, the oldest is closed.
_REFUSAL_LASTS_S = 1.0
_REFUSALS = 64
# When no connection can be accepted: until the next try, if none ends before; and between two lines in the log.
_RETRY_S = 0.1
_TOLD_EVERY_S = 60.0


class Listener:
    """Serves an application on a socket that `bind` made.

    It accepts by itself. Out of file descriptors, asyncio's server logs a thousand errors a second, and uvloop's closes
    every connection that waits; here, they wait until one is free.
    """

    def __init__(
        self,
        app: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        *,
        max_connections: int,
        max_body_bytes: int,
        slow_reader_timeout: float,
        on_refused: Callable[[], object] = lambda: None,
        before_request: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_refused` is called for each connection too many, `before_request` before a client's data is looked at."""
        self._app = app
        self._max_body_bytes = max_body_bytes
        self.before_request = before_request
        self._runner: web.ServerRunner | None = None
        self._max_connections = max_connections
        self.reads_within_s = slow_reader_timeout + _AFTER_THE_PUMP_S
        """What a client may leave unread before it is cut."""
        self._on_refused = on_refused
        self._open: set[_Connection] = set()
        self._all_closed = asyncio.Event()
        self._refusals: dict[_Refusal, None] = {}  # the oldest first
        self._connecting: set[asyncio.Task[None]] = set()
        self._socket: socket.socket | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._told_at = -math.inf

    @property
    def connections(self) -> int:
        """That are open now."""
        return len(self._open)

    async def start(self, sock: socket.socket) -> None:
        server = web.Server(self._app, request_factory=self._request, handler_cancellation=True)
        self._runner = web.ServerRunner(server, shutdown_timeout=_HANDLERS_END_S)
        await self._runner.setup()
        self._max_connections = room_for(self._max_connections)
        self._socket = sock
        asyncio.get_running_loop().add_reader(sock, self._accept)

    async def stop(self, *, flush_s: float = 0.0, hurry: asyncio.Event | None = None) -> None:
        """Answers what is in work and closes every connection. Clients get `flush_s` seconds, and a second in any case,
        for what their transports still hold; `hurry`, set meanwhile, ends the wait."""
        self._stop_accepting()
        await asyncio.gather(*self._connecting)
        for refusal in list(self._refusals):
            refusal.abort()
        if self._runner is not None:
            await self._runner.cleanup()
        hurried = hurry is not None and hurry.is_set()
        await self._flushed(_LAST_BYTES_S if hurried else max(flush_s, _LAST_BYTES_S), None if hurried else hurry)
        for connection in list(self._open):
            connection.abort()

    def _request(
        self,
        message: RawRequestMessage,
        payload: StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> web.BaseRequest:
        loop = asyncio.get_running_loop()
        return web.BaseRequest(message, payload, protocol, writer, task, loop, client_max_size=self._max_body_bytes)

    def _stop_accepting(self) -> None:
        if self._socket is not None:
            if self._retry is None:
                asyncio.get_running_loop().remove_reader(self._socket)
            else:
                self._retry.cancel()
                self._retry = None
            self._socket.close()
            self._socket = None

    async def _flushed(self, timeout_s: float, hurry: asyncio.Event | None) -> None:
        """Waits until every connection has ended by itself; they have been told to, and end once they are flushed."""
        if not self._open:
            return
        self._all_closed.clear()
        waits = [asyncio.ensure_future(event.wait()) for event in (self._all_closed, hurry) if event is not None]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def closed(self, connection: _Connection | _Refusal) -> None:
        if isinstance(connection, _Refusal):
            self._refusals.pop(connection, None)
        else:
            self._open.discard(connection)
            if not self._open:
                self._all_closed.set()
        if self._retry is not None:  # its descriptor is closed once this returns
            asyncio.get_running_loop().call_soon(self._resume)

    def _accept(self) -> None:
        """Takes connections that wait, but no more at a time than leaves streams their turn."""
        assert self._socket is not None
        for _ in range(_BURST):
            try:
                sock, _address = self._socket.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            connecting = asyncio.ensure_future(self._connect(sock, self._protocol()))
            self._connecting.add(connecting)
            connecting.add_done_callback(self._connecting.discard)

    def _protocol(self) -> _Connection | _Refusal:
        if len(self._open) < self._max_connections:
            assert self._runner is not None
            assert self._runner.server is not None
            connection = _Connection(self, self._runner.server)
            self._open.add(connection)
            return connection
        self._on_refused()
        if len(self._refusals) >= _REFUSALS:
            oldest = next(iter(self._refusals))
            del self._refusals[oldest]
            oldest.abort()
        refusal = _Refusal(self, self._max_connections)
        self._refusals[refusal] = None
        return refusal

    async def _connect(self, sock: socket.socket, connection: _Connection | _Refusal) -> None:
        sock.setblocking(False)
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: connection, sock)
        except Exception:
            log.debug("a connection ended before it began", exc_info=True)
            sock.close()
            self.closed(connection)

    def _pause(self, error: OSError) -> None:
        """Lets connections wait. The socket would be reported as readable all the time."""
        assert self._socket is not None
        loop = asyncio.get_running_loop()
        loop.remove_reader(self._socket)
        self._retry = loop.call_later(_RETRY_S, self._resume)
        if loop.time() - self._told_at >= _TOLD_EVERY_S:
            self._told_at = loop.time()
            log.warning(
                "no connection can be accepted with %d open: %s; others wait until some have ended",
                len(self._open),
                error.strerror,
            )

    def _resume(self) -> None:
        if self._retry is not None and self._socket is not None:
            self._retry.cancel()
            self._retry = None
            asyncio.get_running_loop().add_reader(self._socket, self._accept)


class _Connection(web.RequestHandler):
    __slots__ = ("_at_eof", "_awaits_rest", "_body", "_client", "_cut", "_listener", "_posts", "_unanswered")

    def __init__(self, listener: Listener, manager: web.Server) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=_HEADERS_WITHIN_S,
            access_log=None,  # type: ignore[arg-type]  # None is no log, as aiohttp's runners have it
            auto_decompress=False,  # a few bytes of a bomb would keep the event loop from its streams
        )
        self._listener = listener
        self._client: asyncio.Transport | None = None
        self._cut: asyncio.TimerHandle | None = None
        self._awaits_rest = False  # of a request's headers
        self._at_eof = False
        self._unanswered = 0
        self._posts = 0  # among them
        self._body: StreamReader | None = None  # of the last one

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._client = cast(asyncio.Transport, transport)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._client = None
        self._stop_watching()
        self._listener.closed(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._listener.before_request()
        known = len(self._messages)
        super().data_received(data)
        self._awaits_rest = self._awaits_request()
        for message, body in islice(self._messages, known, None):
            self._unanswered += 1
            if isinstance(message, RawRequestMessage):
                self._posts += message.method == "POST"
                self._body = body
            elif self._body is not None and not self._body.is_eof():  # it is the body that is wrong
                self._body.set_exception(web.RequestPayloadError(message.message))

    def eof_received(self) -> bool:  # type: ignore[override]  # asyncio asks for more than aiohttp answers
        """The client sends no more. Answers that are there at once it still gets.

        One that waits for tokens is taken to have left: a client that closes its connection says no more than this, and
        sequences would run on for nobody.
        """
        self._at_eof = self._unanswered > 0 and self._posts == 0
        return self._at_eof

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_reader()

    def resume_writing(self) -> None:
        self._stop_watching()
        super().resume_writing()

    async def start(self) -> None:
        try:
            await super().start()
        finally:
            # It is closed, once the client has read what is left for it.
            if self._client is not None and self._client.get_write_buffer_size():
                self._watch_reader()

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        if isinstance(resp, web.HTTPException):  # it was raised outside the application's middleware
            resp = web.json_response(error_body(resp.text or resp.reason, resp.status), status=resp.status)
        finished = await super().finish_response(request, resp, start_time)
        self._unanswered -= 1
        self._posts -= request.method == "POST"
        if self._at_eof and not self._unanswered:
            self.close()
        return finished

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """What is no HTTP gets an error object as well, and leaves no traceback in the log: anyone can send it."""
        if status >= 500 or request.writer.output_size > 0:
            return super().handle_error(request, status, exc, message)
        log.debug("a request from %s could not be read", request.remote, exc_info=exc)
        reason = "this is an HTTP server" if isinstance(exc, BadHttpMethod) else " ".join((message or "").split())
        response = web.json_response(error_body(f"the request could not be read: {reason}", status), status=status)
        response.force_close()
        return response

    def log_exception(self, *args: Any, **kw: Any) -> None:
        if isinstance(kw.get("exc_info"), (HttpProcessingError, web.RequestPayloadError)):
            log.debug(*args, **kw)  # what a client sent is its own affair
        else:
            super().log_exception(*args, **kw)

    def _process_keepalive(self) -> None:
        """The time for a request's headers may be over: a client that has begun to send them is told so."""
        is_over = self._awaits_request() and self._loop.time() >= self._next_keepalive_close_time
        if is_over and self._awaits_rest and self._client is not None and not self._client.is_closing():
            error = RequestTimeoutError(f"the headers did not arrive within {_HEADERS_WITHIN_S:g} seconds")
            self._client.write(_answer(error))
        super()._process_keepalive()

    def _awaits_request(self) -> bool:
        return self._waiter is not None and not self._waiter.done()

    def _watch_reader(self) -> None:
        if self._cut is None:
            self._cut = self._loop.call_later(self._listener.reads_within_s, self._cut_off)

    def _stop_watching(self) -> None:
        if self._cut is not None:
            self._cut.cancel()
            self._cut = None

    def _cut_off(self) -> None:
        self._cut = None
        if self._client is not None:
            log.warning("a client that left its answer unread for %g s is cut off", self._listener.reads_within_s)
            self.abort()

    def abort(self) -> None:
        if self._client is not None:
            self._client.abort()


class _Refusal(asyncio.Protocol):
    """One connection too many: it is told so, and closed."""

    def __init__(self, listener: Listener, limit: int) -> None:
        self._listener = listener
        self._limit = limit
        self._transport: asyncio.Transport | None = None
        self._end: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        error = TooManyConnectionsError(f"{self._limit} connections are open, which is all this server takes")
        self._transport.write(_answer(error))
        # What it sends is read until it closes: closed before, the connection would be reset, and the answer lost.
        with contextlib.suppress(OSError):  # it has left
            self._transport.write_eof()
        self._end = asyncio.get_running_loop().call_later(_REFUSAL_LASTS_S, self.abort)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._transport = None
        if self._end is not None:
            self._end.cancel()
        self._listener.closed(self)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()


def _answer(error: ServeError) -> bytes:
    """An answer from outside the application, behind which the connection is closed."""
    headers = "".join(f"{name}: {value}\r\n" for name, value in retry_headers(error.retry_after).items())
    body = json.dumps(error.to_dict()).encode()
    head = (
        f"HTTP/1.1 {error.status} {HTTPStatus(error.status).phrase}\r\n"
        f"Content-Type: application/json; charset=utf-8\r\nContent-Length: {len(body)}\r\n"
        f"{headers}Connection: close\r\n\r\n"
    )
    return head.encode() + body
