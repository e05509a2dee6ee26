"""The control connection between a supervisor and its worker: small JSON packets, with file descriptors.

It carries what is rare (load, attach, ready, failed, stop); requests and tokens never pass here.
"""

from __future__ import annotations

import json
import socket
from typing import Any

MAX_PACKET_BYTES = 64 * 1024
_MAX_FDS = 8


def encode(message: dict[str, Any]) -> bytes:
    """Raises ValueError or TypeError where a message cannot be sent: it is too large, or not JSON."""
    packet = json.dumps(message).encode()
    if len(packet) > MAX_PACKET_BYTES:
        raise ValueError(f"a message of {len(packet)} bytes; the most is {MAX_PACKET_BYTES}")
    return packet


class ControlSocket:
    """One end of a SOCK_SEQPACKET pair; a packet is one message."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    @classmethod
    def pair(cls) -> tuple[ControlSocket, ControlSocket]:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        return cls(ours), cls(theirs)

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: dict[str, Any], fds: tuple[int, ...] = ()) -> None:
        """Raises BrokenPipeError or ConnectionResetError where the peer is gone."""
        self.send_packet(encode(message), fds)

    def send_packet(self, packet: bytes, fds: tuple[int, ...] = ()) -> None:
        """Sends what `encode` made."""
        socket.send_fds(self._sock, [packet], fds)

    def receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        """The next message and the descriptors sent with it; None once the peer has closed."""
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, MAX_PACKET_BYTES, _MAX_FDS)
        except ConnectionResetError:
            return None, []
        return (json.loads(data) if data else None), fds

    def close(self) -> None:
        self._sock.close()
