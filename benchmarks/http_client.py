"""An HTTP client that costs little: kept connections, one thread, answers told by their ends alone."""

from __future__ import annotations

import json
import selectors
import socket
from typing import Any


def post(body: dict[str, Any], path: str = "/infer") -> bytes:
    encoded = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(encoded)}\r\n\r\n"
    return head.encode() + encoded


class Client:
    """So many connections to a local server."""

    def __init__(self, port: int, connections: int) -> None:
        self._selector = selectors.DefaultSelector()
        self._sockets = [socket.create_connection(("127.0.0.1", port)) for _ in range(connections)]
        for sock in self._sockets:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(30)
            self._selector.register(sock, selectors.EVENT_READ, bytearray())

    def close(self) -> None:
        self._selector.close()
        for sock in self._sockets:
            sock.close()

    def ask(self, request: bytes, times: int = 1) -> list[bytes]:
        """The answers to `times` requests on each connection, each sent when the one before is answered."""
        answers: list[bytes] = []
        left = dict.fromkeys(self._sockets, times - 1)
        for sock in self._sockets:
            sock.sendall(request)
        while len(answers) < times * len(self._sockets):
            ready = self._selector.select(timeout=30)
            if not ready:
                raise TimeoutError("the server sent nothing for 30 seconds")
            for key, _ in ready:
                sock, buffer = key.fileobj, key.data
                _receive(sock, buffer)
                if not _is_complete(buffer):
                    continue
                answers.append(bytes(buffer))
                buffer.clear()
                if left[sock]:
                    left[sock] -= 1
                    sock.sendall(request)
        return answers


def _receive(sock: socket.socket, buffer: bytearray) -> None:
    received = sock.recv(1 << 16)
    if not received:
        raise ConnectionError("the server closed the connection")
    buffer += received


def _is_complete(answer: bytearray) -> bool:
    """Chunked, or with a length."""
    if answer.endswith(b"\r\n0\r\n\r\n"):
        return True
    head, separator, body = answer.partition(b"\r\n\r\n")
    _, found, length = head.partition(b"Content-Length: ")
    return bool(separator and found) and len(body) == int(length.partition(b"\r\n")[0])
