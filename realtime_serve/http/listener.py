"""The connections of a listening socket: taking them, up to a number, and ending them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import socket
from collections.abc import Callable
from typing import cast

from realtime_serve.errors import TooManyConnectionsError
from realtime_serve.http.bind import room_for
from realtime_serve.http.connection import App, Connection
from realtime_serve.http.responses import last_error

log = logging.getLogger(__name__)

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
        app: App,
        *,
        max_connections: int,
        slow_reader_timeout: float,
        on_refused: Callable[[], object] = lambda: None,
        before_request: Callable[[], object] = lambda: None,
    ) -> None:
        """`on_refused` is called for each connection too many, `before_request` before a client's data is looked at."""
        self._app = app
        self.before_request = before_request
        self._max_connections = max_connections
        self.reads_within_s = slow_reader_timeout + _AFTER_THE_PUMP_S
        """What a client may leave unread before it is cut."""
        self._on_refused = on_refused
        self._open: set[Connection] = set()
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
        await self._end_handlers()
        hurried = hurry is not None and hurry.is_set()
        await self._flushed(_LAST_BYTES_S if hurried else max(flush_s, _LAST_BYTES_S), None if hurried else hurry)
        for connection in list(self._open):
            connection.abort()

    async def _end_handlers(self) -> None:
        """Lets what is in work be answered, within a time."""
        for connection in list(self._open):
            connection.end()
        serving = [connection.task for connection in self._open if connection.task is not None]
        if serving:
            _, late = await asyncio.wait(serving, timeout=_HANDLERS_END_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=_HANDLERS_END_S)

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

    def closed(self, connection: Connection | _Refusal) -> None:
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

    def _protocol(self) -> Connection | _Refusal:
        if len(self._open) < self._max_connections:
            connection = Connection(self._app, self, asyncio.get_running_loop())
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

    async def _connect(self, sock: socket.socket, connection: Connection | _Refusal) -> None:
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
        self._transport.write(last_error(error))
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
