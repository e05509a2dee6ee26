"""`realtime-serve` whose silent connections are closed after a tenth of a second, but none before it gets SIGUSR1.

Arguments: the event loop, the soft limit of open files that it starts with, and the command line.
"""

from __future__ import annotations

import asyncio
import resource
import signal
import sys

from realtime_serve import cli
from realtime_serve.http import connection

_PUT_OFF_S = 0.1


def main() -> int:
    loop, soft, *arguments = sys.argv[1:]
    resource.setrlimit(resource.RLIMIT_NOFILE, (int(soft), resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    if loop == "asyncio":
        cli._loop_factory = lambda: asyncio.new_event_loop
    connection._HEADERS_WITHIN_S = _PUT_OFF_S
    close_if_silent = connection.Connection._check_silence
    may_close = False

    def on_signal(*_: object) -> None:
        nonlocal may_close
        may_close = True

    def put_off(silent: connection.Connection) -> None:
        if may_close:
            close_if_silent(silent)
        else:
            silent._silence = silent._loop.call_later(_PUT_OFF_S, put_off, silent)

    connection.Connection._check_silence = put_off
    signal.signal(signal.SIGUSR1, on_signal)
    return cli.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
