"""The worker process: `python -m realtime_serve.engine.worker --control-fd N`.

It is told by its control connection what to load and which channels to serve, and exits when that connection closes.
"""

from __future__ import annotations

import argparse
import logging
import signal
import socket
import sys
import threading

from realtime_serve._core import Channel, ask_for_long_slices
from realtime_serve.engine.control import ControlSocket
from realtime_serve.engine.launch import load_worker
from realtime_serve.engine.load_spec import LoadSpec
from realtime_serve.engine.reports import failed_report, ready_report
from realtime_serve.engine.worker_loop import WorkerLoop

log = logging.getLogger(__name__)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="realtime_serve.engine.worker", description="A model worker.")
    parser.add_argument("--control-fd", type=int, required=True)
    args = parser.parse_args(argv)
    # A Ctrl-C, or a service manager's SIGTERM, goes to the whole group; the supervisor decides when a worker ends. They
    # were blocked until here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    ask_for_long_slices()  # before the engine's threads are started
    return serve(ControlSocket(socket.socket(fileno=args.control_fd)))


def serve(control: ControlSocket) -> int:
    message, _ = control.receive()
    if message is None:
        return 0
    logging.basicConfig(level=message["log_level"], format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    try:
        loop = load_worker(LoadSpec.from_message(message))
    except BaseException as error:  # a loader that calls sys.exit() has a reason to tell as well
        control.send(failed_report(message["model"]["name"], error, is_users=message["loader"] is not None))
        return 1
    threading.Thread(target=_listen, args=(control, loop), name="control", daemon=True).start()
    control.send(ready_report(loop))
    loop.run()
    return 0


def _listen(control: ControlSocket, loop: WorkerLoop) -> None:
    """Turns control messages into commands of the worker's loop, until the supervisor is gone."""
    channels: dict[int, Channel] = {}
    try:
        while True:
            message, fds = control.receive()
            if message is None or message["op"] == "stop":
                return
            if message["op"] == "attach":
                channels[message["channel"]] = channel = Channel.attach(*fds)
                loop.attach(channel)
            elif message["op"] == "detach":
                loop.detach(channels.pop(message["channel"]))
            elif message["op"] == "check_health":
                loop.check_health(lambda is_well: control.send({"op": "health", "is_well": is_well}))
    finally:
        loop.stop()  # also where a message cannot be followed: a worker without its channel serves nobody


if __name__ == "__main__":
    sys.exit(main())
