"""A worker as its supervisor sees it: a process of its own, or a thread of this one."""

from __future__ import annotations

import asyncio
import atexit
import logging
import os
import signal
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from realtime_serve._core import Channel
from realtime_serve.engine.control import ControlSocket, encode
from realtime_serve.engine.load_spec import LoadSpec
from realtime_serve.engine.reports import describe, failed_report, ready_report
from realtime_serve.engine.worker_loop import WorkerLoop
from realtime_serve.errors import ModelLoadError

log = logging.getLogger(__name__)

Report = dict[str, Any]

# What a thread gets for its end when the interpreter exits.
_EXIT_GRACE_S = 2.0


class WorkerHandle(Protocol):
    """Reports `ready`, `failed`, `health` and `exited`, in the event loop's thread, by the callback of `start`."""

    shared_memory: bool
    """Whether the channel must lie in memory that another process can map."""

    def start(self, spec: LoadSpec, report: Callable[[Report], None]) -> None:
        """Raises OSError where there is no room for one more, ModelLoadError where the spec cannot be handed over."""

    def attach(self, channel: Channel) -> None: ...
    def check_health(self) -> None: ...
    def request_stop(self) -> None: ...
    def kill(self) -> None: ...


class ProcessWorker:
    """A worker process. It is started fresh, never forked: a user's script needs no `__main__` guard."""

    shared_memory = True

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()

    def start(self, spec: LoadSpec, report: Callable[[Report], None]) -> None:
        self._report = report
        try:
            packet = encode(spec.to_message())
        except (TypeError, ValueError) as error:
            raise ModelLoadError(
                f"the options of model {spec.model.name!r} cannot be handed to a worker process: {error}"
            ) from None
        self._control, theirs = ControlSocket.pair()
        try:
            self._process, self._pidfd = _spawn(theirs.fileno())
        except OSError:
            self._control.close()
            raise
        finally:
            theirs.close()
        self._loop.add_reader(self._control.fileno(), self._on_message)
        self._loop.add_reader(self._pidfd, self._on_exit)
        self._send(packet)

    @property
    def pid(self) -> int:
        return self._process.pid

    def attach(self, channel: Channel) -> None:
        self._send(encode({"op": "attach", "channel": channel.generation}), channel.fds())

    def check_health(self) -> None:
        self._send(encode({"op": "check_health"}))

    def request_stop(self) -> None:
        self._send(encode({"op": "stop"}))

    def kill(self) -> None:
        self._process.kill()

    def _send(self, packet: bytes, fds: tuple[int, ...] = ()) -> None:
        try:
            self._control.send_packet(packet, fds)
        except OSError:
            return  # it died: `exited` is reported by its pidfd

    def _on_message(self) -> None:
        message, _ = self._control.receive()
        if message is None:
            self._loop.remove_reader(self._control.fileno())
        else:
            self._report(message)

    def _on_exit(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self._loop.remove_reader(self._control.fileno())
        os.close(self._pidfd)
        self._drain_messages()
        self._control.close()
        self._report({"op": "exited", "status": self._process.wait()})

    def _drain_messages(self) -> None:
        """A worker that failed to load says why and exits at once: the exit may be seen first."""
        os.set_blocking(self._control.fileno(), False)
        try:
            while (message := self._control.receive()[0]) is not None:
                self._report(message)
        except BlockingIOError:
            return


_thread_workers: weakref.WeakSet[ThreadWorker] = weakref.WeakSet()


class ThreadWorker:
    """The same loop in a thread, over a channel in private memory."""

    shared_memory = False

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._worker_loop: WorkerLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopped = False

    def start(self, spec: LoadSpec, report: Callable[[Report], None]) -> None:
        self._report = report
        self._thread = threading.Thread(target=self._run, args=(spec,), name=f"worker {spec.model.name}", daemon=True)
        self._thread.start()
        _thread_workers.add(self)

    def attach(self, channel: Channel) -> None:
        assert self._worker_loop is not None, "attached before ready"
        self._worker_loop.attach(channel)

    def check_health(self) -> None:
        if self._worker_loop is not None:
            self._worker_loop.check_health(lambda is_well: self._tell({"op": "health", "is_well": is_well}))

    def request_stop(self) -> None:
        self._stopped = True
        if self._worker_loop is not None:
            self._worker_loop.stop()

    def kill(self) -> None:
        """A thread cannot be killed: it ends at its next step boundary, or when a call of its model returns."""
        self.request_stop()

    def join(self, timeout_s: float) -> None:
        """Waits until the thread has ended."""
        if self._thread is not None:
            self._thread.join(timeout_s)

    def _run(self, spec: LoadSpec) -> None:
        from realtime_serve.engine.launch import load_worker  # 80 ms and 9 MB that a front end need not spend

        try:
            loop = load_worker(spec)
        except BaseException as error:  # a loader that calls sys.exit() must not leave its supervisor waiting
            self._tell(failed_report(spec.model.name, error, is_users=spec.loader is not None))
            self._tell({"op": "exited", "status": 1})
            return
        self._worker_loop = loop
        if self._stopped:
            loop.stop()
        self._tell(ready_report(loop))
        status = 0
        try:
            loop.run()
        except BaseException as error:
            log.debug("the worker ended", exc_info=True)
            status = 1
            self._tell({"op": "failed", "message": describe(error)})
        self._tell({"op": "exited", "status": status})

    def _tell(self, message: Report) -> None:
        try:
            self._loop.call_soon_threadsafe(self._report, message)
        except RuntimeError:
            return  # the event loop is closed: nobody is left to be told


@atexit.register
def _end_threads() -> None:
    """A thread that comes back from C++ into an interpreter that is gone would abort the process."""
    workers = list(_thread_workers)
    for worker in workers:
        worker.request_stop()
    for worker in workers:
        worker.join(_EXIT_GRACE_S)


def _spawn(control_fd: int) -> tuple[subprocess.Popen[bytes], int]:
    """A worker's process and its pidfd."""
    with _signals_held_back():
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", "realtime_serve.engine.worker", "--control-fd", str(control_fd)],
            pass_fds=(control_fd,),
            stdin=subprocess.DEVNULL,
            env=_child_environment(),
        )
    try:
        return process, os.pidfd_open(process.pid)
    except OSError:
        process.kill()
        process.wait()
        raise


@contextmanager
def _signals_held_back() -> Iterator[None]:
    """A process that is started meanwhile has these signals blocked, until it has said that it ignores them: a Ctrl-C
    or a service manager's SIGTERM goes to the whole group."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _child_environment() -> dict[str, str]:
    """The parent's import path, so that a worker finds what its parent does; the empty entry of an interactive parent
    is the working directory."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
