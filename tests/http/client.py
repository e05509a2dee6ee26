"""A client over a raw socket: what a test says is what is sent, and it sees every byte that comes back."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from support import DEADLINE_S


@dataclass
class Answer:
    version: str
    status: int
    headers: dict[str, str]
    chunks: list[bytes] = field(default_factory=list)

    @property
    def body(self) -> bytes:
        return b"".join(self.chunks)

    def json(self) -> Any:
        return json.loads(self.body)

    def error(self) -> dict[str, Any]:
        """The error object, whose form is checked."""
        body = self.json()
        assert set(body) == {"error"}
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert "\n" not in body["error"]["message"]
        return body["error"]

    def events(self) -> list[Event]:
        return parse_events(self.body)


@dataclass
class Event:
    name: str
    id: str | None
    data: Any


def parse_events(body: bytes) -> list[Event]:
    """Events exactly as they are written here: optional id or event line, one data line, an empty line."""
    assert not body or body.endswith(b"\n\n")
    events = []
    for block in body.split(b"\n\n")[:-1]:
        *head, data = block.decode().split("\n")
        assert len(head) == 1
        key, value = head[0].split(": ", 1)
        assert key in ("id", "event")
        assert data.startswith("data: ")
        events.append(
            Event(
                name=value if key == "event" else "message",
                id=value if key == "id" else None,
                data=json.loads(data.removeprefix("data: ")),
            )
        )
    return events


def request_bytes(
    method: str, path: str, body: bytes | dict[str, Any] | None = None, version: str = "1.1", **headers: str
) -> bytes:
    payload = json.dumps(body).encode() if isinstance(body, dict) else body or b""
    fields = {"Host": "test", **{name.replace("_", "-"): value for name, value in headers.items()}}
    if body is not None:
        fields.setdefault("Content-Length", str(len(payload)))
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {path} HTTP/{version}\r\n{head}\r\n".encode() + payload


class Connection:
    """One connection, on which requests may be pipelined."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def open(cls, port: int, *, receive_buffer: int | None = None) -> Connection:
        sock = socket.socket()
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", port))
        return cls(*await asyncio.open_connection(sock=sock, limit=4096))

    async def __aenter__(self) -> Connection:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.writer.transport.abort()

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def ask(self, method: str, path: str, body: bytes | dict[str, Any] | None = None, **more: str) -> Answer:
        self.send(request_bytes(method, path, body, **more))
        return await self.answer(method)

    async def answer(self, method: str = "POST") -> Answer:
        answer = await self.head()
        async with asyncio.timeout(DEADLINE_S):
            answer.chunks = [] if method == "HEAD" else [chunk async for chunk in self.body(answer)]
        return answer

    async def head(self) -> Answer:
        async with asyncio.timeout(DEADLINE_S):
            first, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        version, status, _ = first.split(" ", 2)
        return Answer(version, int(status), dict(line.split(": ", 1) for line in lines))

    async def body(self, answer: Answer) -> AsyncIterator[bytes]:
        if answer.headers.get("Transfer-Encoding") == "chunked":
            while (size := int(await self.reader.readuntil(b"\r\n"), 16)) > 0:
                yield await self.reader.readexactly(size)
                assert await self.reader.readexactly(2) == b"\r\n"
            assert await self.reader.readexactly(2) == b"\r\n"
        elif "Content-Length" in answer.headers:
            yield await self.reader.readexactly(int(answer.headers["Content-Length"]))
        else:
            while data := await self.reader.read(65536):
                yield data

    async def is_closed(self) -> bool:
        """Waits for the server's end of it; whether nothing came before that."""
        async with asyncio.timeout(DEADLINE_S):
            return await self.reader.read(1) == b""


async def ask(port: int, method: str, path: str, body: bytes | dict[str, Any] | None = None, **more: str) -> Answer:
    async with await Connection.open(port) as connection:
        return await connection.ask(method, path, body, **more)


async def infer(port: int, **body: Any) -> Answer:
    return await ask(port, "POST", "/infer", {"model": "null", "prompt": "x", **body})
