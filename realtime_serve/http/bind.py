"""The listening socket. It is made before aiohttp is imported: a port in use is told at once."""

from __future__ import annotations

import contextlib
import errno
import logging
import resource
import socket

from realtime_serve.errors import ConfigError

log = logging.getLogger(__name__)

BACKLOG = 1024
# Bytes that the kernel may hold for one connection beyond what its peer has acknowledged room for: the ring and the
# sequence's pause are where a slow reader is to be felt, not megabytes of socket buffer.
_NOTSENT_LOWAT = 64 * 1024
_SEND_BUFFER = 64 * 1024
_TCP_NOTSENT_LOWAT = getattr(socket, "TCP_NOTSENT_LOWAT", 25)
# Open files that are no served connections: models' workers, connections that are being refused, the host's own.
_OTHER_FILES = 256


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


def room_for(connections: int) -> int:
    """How many of so many connections the limit of open files has room for, raised as far as they need and it may be.

    Logs a warning where that is less.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + _OTHER_FILES
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
            soft = raised
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return connections
    room = max(1, min(connections, soft - min(_OTHER_FILES, soft // 2)))
    if room < connections:
        log.warning(
            "max_connections is %d, but the %d files that this process may have open (ulimit -n) leave room for %d",
            connections,
            soft,
            room,
        )
    return room
