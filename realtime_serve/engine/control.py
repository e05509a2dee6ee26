"""The control connection between a supervisor and its worker: small JSON packets, with file descriptors.

It carries what is rare (load, attach, ready, failed, stop); requests and tokens never pass here.
"""

from __future__ import annotations

import json
import socket
from typing import Any

_MAX_PACKET = 64 * 1024
_MAX_FDS = 8


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
        socket.send_fds(self._sock, [json.dumps(message).encode()], fds)

    def receive(self) -> tuple[dict[str, Any] | None, list[int]]:
        """The next message and the descriptors sent with it; None once the peer has closed."""
        try:
            data, fds, _, _ = socket.recv_fds(self._sock, _MAX_PACKET, _MAX_FDS)
        except ConnectionResetError:
            return None, []
        return (json.loads(data) if data else None), fds

    def close(self) -> None:
        self._sock.close()
