"""A request as handlers see it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from aiohttp import HttpVersion11
from aiohttp.http_parser import RawRequestMessage
from aiohttp.streams import StreamReader

if TYPE_CHECKING:
    from realtime_serve.http.connection import Connection


class HttpRequest:
    """Its head is there as a whole; its body may still be arriving."""

    __slots__ = ("_message", "body", "connection")

    def __init__(self, message: RawRequestMessage, body: StreamReader, connection: Connection) -> None:
        self._message = message
        self.body = body
        self.connection = connection

    @property
    def method(self) -> str:
        return self._message.method

    @property
    def path(self) -> str:
        """Decoded, without the query."""
        return self._message.url.path

    @property
    def query(self) -> Mapping[str, str]:
        return self._message.url.query

    @property
    def headers(self) -> Mapping[str, str]:
        """Their names may be in any case."""
        return self._message.headers

    @property
    def content_type(self) -> str:
        """In lower case and without parameters; empty where none is named."""
        return self.headers.get("Content-Type", "").partition(";")[0].strip().lower()

    @property
    def is_http_1_1(self) -> bool:
        """Whether the client knows chunks, interim answers and connections that stay open: HTTP/1.1 or later."""
        return self._message.version >= HttpVersion11

    @property
    def keeps_open(self) -> bool:
        """Whether the connection is to outlast the answer, for all the client says."""
        return not self._message.should_close and self.is_http_1_1

    @property
    def client(self) -> str:
        """The client's address; empty where it has none, as on a Unix socket."""
        return self.connection.client
