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
from typing import Any

from realtime_serve._core import Channel
from realtime_serve.engine.control import ControlSocket
from realtime_serve.engine.launch import LoadSpec, WorkerLoop, load_worker
from realtime_serve.errors import ServeError

log = logging.getLogger(__name__)

_MAX_REASON_CHARS = 2000


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="realtime_serve.engine.worker", description="A model worker.")
    parser.add_argument("--control-fd", type=int, required=True)
    args = parser.parse_args(argv)
    # A Ctrl-C, or a service manager's SIGTERM, goes to the whole group; the supervisor decides when a worker ends. They
    # were blocked until here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
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


def ready_report(loop: WorkerLoop) -> dict[str, Any]:
    return {"op": "ready", "kind": loop.kind, "max_context": loop.max_context}


def failed_report(model: str, error: BaseException, *, is_users: bool) -> dict[str, Any]:
    """Why a model did not load. Where a user's loader raised, its traceback goes to the log."""
    if isinstance(error, ServeError):
        return {"op": "failed", "message": describe(error)}
    log.log(logging.ERROR if is_users else logging.DEBUG, "model %s did not load", model, exc_info=error)
    return {"op": "failed", "message": f"model {model!r} did not load: {describe(error)}"}


def describe(error: BaseException) -> str:
    """One line for a person: our own errors speak for themselves, others are named."""
    try:
        text = " ".join(str(error)[:_MAX_REASON_CHARS].split())
    except Exception:  # of a class whose own text fails
        text = "(its text cannot be had)"
    return text if isinstance(error, ServeError) else f"{type(error).__name__}: {text}"


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
