"""The connections of a listening socket: how many there may be, and how long they may be silent."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Callable
from typing import cast

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMethod

from realtime_serve.errors import TooManyConnectionsError
from realtime_serve.http.bind import BACKLOG
from realtime_serve.http.responses import error_body, retry_headers

log = logging.getLogger(__name__)

# From a connection's start, or its last answer, to the end of the next request's headers.
_HEADERS_WITHIN_S = 30.0
# What handlers get for their last bytes once their streams have ended.
_HANDLERS_END_S = 1.0
# What a client that reads gets for its last bytes, however little time is left.
_LAST_BYTES_S = 1.0


class Listener:
    """Serves an application on a socket that `bind` made."""

    def __init__(
        self, app: web.Application, *, max_connections: int, on_refused: Callable[[], object] = lambda: None
    ) -> None:
        """`on_refused` is called for each connection too many."""
        self._runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=_HANDLERS_END_S)
        self._max_connections = max_connections
        self._server: asyncio.Server | None = None
        self._on_refused = on_refused
        self._transports: set[asyncio.BaseTransport] = set()
        self._all_closed = asyncio.Event()

    @property
    def connections(self) -> int:
        """That are open now."""
        return len(self._transports)

    async def start(self, sock: socket.socket) -> None:
        await self._runner.setup()
        self._server = await asyncio.get_running_loop().create_server(self._connection, sock=sock, backlog=BACKLOG)

    async def stop(self, *, flush_s: float = 0.0, hurry: asyncio.Event | None = None) -> None:
        """Answers what is in work and closes every connection. Clients get `flush_s` seconds, and a second in any case,
        for what their transports still hold; `hurry`, set meanwhile, ends the wait."""
        if self._server is not None:
            self._server.close()
        await self._runner.cleanup()
        hurried = hurry is not None and hurry.is_set()
        await self._flushed(_LAST_BYTES_S if hurried else max(flush_s, _LAST_BYTES_S), None if hurried else hurry)
        for transport in list(self._transports):
            cast(asyncio.Transport, transport).abort()

    async def _flushed(self, timeout_s: float, hurry: asyncio.Event | None) -> None:
        """Waits until every connection has ended by itself; they have been told to, and end once they are flushed."""
        if not self._transports:
            return
        self._all_closed.clear()
        waits = [asyncio.ensure_future(event.wait()) for event in (self._all_closed, hurry) if event is not None]
        try:
            await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    def opened(self, transport: asyncio.BaseTransport) -> None:
        self._transports.add(transport)

    def closed(self, transport: asyncio.BaseTransport) -> None:
        self._transports.discard(transport)
        if not self._transports:
            self._all_closed.set()

    def _connection(self) -> asyncio.Protocol:
        if self.connections >= self._max_connections:
            self._on_refused()
            return _Refusal(self._max_connections)
        manager = self._runner.server
        assert manager is not None
        return _Connection(self, manager)


class _Connection(web.RequestHandler):
    __slots__ = ("_listener", "_own_transport")

    def __init__(self, listener: Listener, manager: web.Server) -> None:
        super().__init__(
            manager,
            loop=asyncio.get_running_loop(),
            keepalive_timeout=_HEADERS_WITHIN_S,
            access_log=None,  # type: ignore[arg-type]  # None is no log, as aiohttp's runners have it
        )
        self._listener = listener

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._own_transport = transport  # aiohttp lets go of its own before it is flushed
        self._listener.opened(transport)
        super().connection_made(transport)

    def connection_lost(self, exc: BaseException | None) -> None:
        self._listener.closed(self._own_transport)
        super().connection_lost(exc)

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


class _Refusal(asyncio.Protocol):
    """One connection too many: it is told so, and closed."""

    def __init__(self, limit: int) -> None:
        self._limit = limit

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        error = TooManyConnectionsError(f"{self._limit} connections are open, which is all this server takes")
        body = json.dumps(error.to_dict()).encode()
        lines = "".join(f"{name}: {value}\r\n" for name, value in retry_headers(error.retry_after).items())
        head = (
            "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json; charset=utf-8\r\n"
            f"Content-Length: {len(body)}\r\n{lines}Connection: close\r\n\r\n"
        )
        cast(asyncio.Transport, transport).write(head.encode() + body)
        transport.close()
