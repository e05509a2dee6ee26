"""The listening socket. It is made before aiohttp is imported: a port in use is told at once."""

from __future__ import annotations

import errno
import socket

from realtime_serve.errors import ConfigError

BACKLOG = 1024
# Bytes that the kernel may hold for one connection beyond what its peer has acknowledged room for: the ring and the
# sequence's pause are where a slow reader is to be felt, not megabytes of socket buffer.
_NOTSENT_LOWAT = 64 * 1024
_SEND_BUFFER = 64 * 1024
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)


def bind(host: str, port: int) -> socket.socket:
    """A bound, listening socket whose connections hold little in the kernel. Raises ConfigError naming the field."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no host name"
        raise ConfigError(f"host {host!r} cannot be listened on: {reason}", field="host") from None
    sock = socket.socket(family, kind, proto)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # Accepted connections inherit these.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER)
        sock.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, _NOTSENT_LOWAT)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        advice = "; stop what listens there, or choose another with --port" if error.errno == errno.EADDRINUSE else ""
        raise ConfigError(
            f"port {port} on {host!r} cannot be listened on: {error.strerror}{advice}", field="port"
        ) from None
    sock.setblocking(False)
    return sock
