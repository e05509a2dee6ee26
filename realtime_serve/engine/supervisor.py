"""Keeps one model version's worker alive: starts it, waits until it is ready, watches, restarts and stops it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

from realtime_serve.engine.client import ChannelClient
from realtime_serve.engine.handles import ProcessWorker, Report, ThreadWorker, WorkerHandle
from realtime_serve.engine.load_spec import LoadSpec
from realtime_serve.errors import ModelLoadError, ModelUnavailableError

log = logging.getLogger(__name__)

# A worker that dies sooner than this after it was ready is taken to be broken: each restart then waits longer.
_STABLE_AFTER_S = 30.0
_BACKOFF_S = (0.0, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
_STOP_GRACE_S = 5.0
# What a model's health_check may take.
_HEALTH_WITHIN_S = 5.0
# A worker that answers nothing for so long after a request's timeout hangs, unless requests may take longer.
_HANGS_AFTER_S = 30.0


class OpenChannel(Protocol):
    """Makes the channel of a worker's next incarnation."""

    def __call__(self, generation: int, *, shared: bool, carries_payloads: bool) -> ChannelClient: ...


class WorkerState(Enum):
    STARTING = "starting"
    READY = "ready"
    RESTARTING = "restarting"
    FAILED = "failed"
    STOPPED = "stopped"


class Supervisor:
    """Belongs to the event loop's thread.

    `client` is what requests go through while the worker is ready. When the worker dies, every stream of that client
    ends with a typed error, and a new worker gets a new channel of the next generation.
    """

    def __init__(
        self, spec: LoadSpec, open_channel: OpenChannel, *, isolation: str, hangs_after_s: float = _HANGS_AFTER_S
    ) -> None:
        """`hangs_after_s` is what `suspect` waits for a sign of life at least."""
        self.spec = spec
        self.state = WorkerState.STOPPED
        self.kind = "tokens"
        """What requests the model takes: tokens, generate or predict; known once it is ready."""
        self.max_context = spec.model.max_seq_length
        self.weights = ""
        self.restarts = 0
        self._open_channel = open_channel
        self._new_worker: Callable[[], WorkerHandle] = ThreadWorker if isolation == "thread" else ProcessWorker
        self._worker: WorkerHandle | None = None
        self._client: ChannelClient | None = None
        self._generation = 0
        self._failure = ""
        self._spawned_at = 0.0
        self._ready_at = 0.0
        self._load_s = 0.0  # how long the last load took
        self._early_deaths = 0
        self._steps_seen = 0
        self._steps_seen_at = 0.0
        self._changed = asyncio.Event()
        self._health: asyncio.Future[bool] | None = None  # that somebody waits for
        self._restart: asyncio.TimerHandle | None = None
        self._hangs_after_s = hangs_after_s
        self._probe: asyncio.Task[None] | None = None  # of a worker that may hang

    @property
    def client(self) -> ChannelClient:
        """Raises ModelUnavailableError while there is no worker that could serve."""
        if self._client is None:
            raise ModelUnavailableError(
                f"model {self.spec.model.name!r} has no worker at the moment: it is {self.state.value}",
                retry_after=self.ready_in(),
            )
        return self._client

    def ready_in(self) -> float:
        """Seconds until it serves, if nothing fails: the rest of the pause before the next start and of a load as
        long as the last one."""
        now = asyncio.get_running_loop().time()
        if self._restart is not None:
            return max(0.0, self._restart.when() - now) + self._load_s
        return max(0.0, self._spawned_at + self._load_s - now)

    @property
    def is_ready(self) -> bool:
        return self.state is WorkerState.READY

    @property
    def worker(self) -> WorkerHandle | None:
        return self._worker

    def stats(self) -> dict[str, dict[str, Any]] | None:
        """What the `worker` and its channel's `pump` count; None where there is no worker."""
        client = self._client
        return None if client is None else {"worker": client.channel.stats(), "pump": client.pump.stats()}

    def stalled_for(self, now: float) -> float:
        """Seconds, by the monotonic clock's `now`, in which streams waited for the worker and it made no step."""
        client = self._client
        if client is None:
            return 0.0
        steps = client.channel.steps
        if steps != self._steps_seen:
            self._steps_seen, self._steps_seen_at = steps, now
        return min(now - self._steps_seen_at, client.pump.longest_wait_s)

    def start(self) -> None:
        """Starts a worker; `wait_ready` tells how that went."""
        self._set_state(WorkerState.STARTING)
        self._spawn()

    async def wait_ready(self) -> None:
        """Raises ModelLoadError, with the worker's reason, where it could not load its model."""
        while self.state in (WorkerState.STARTING, WorkerState.RESTARTING):
            self._changed.clear()
            await self._changed.wait()
        if self.state is not WorkerState.READY:
            raise ModelLoadError(self._failure or "the worker was stopped while it was loading")

    async def is_well(self) -> bool:
        """Whether the worker is ready and its model says that it is well; False where it does not say so in time."""
        if not self.is_ready or self._worker is None:
            return False
        try:
            return await asyncio.wait_for(asyncio.shield(self._asked_health(self._worker)), _HEALTH_WITHIN_S)
        except TimeoutError:
            return False

    def _asked_health(self, worker: WorkerHandle) -> asyncio.Future[bool]:
        if self._health is None:
            self._health = asyncio.get_running_loop().create_future()
            worker.check_health()
        return self._health

    def suspect(self) -> None:
        """A request had no answer in time: perhaps the model hangs in a call that does not end.

        A worker process that gives no sign of life then, within the longest timeout that a request to it had, is killed
        and so started anew. A thread cannot be.
        """
        worker = self._worker
        if self.is_ready and isinstance(worker, ProcessWorker) and self._probe is None:
            self._probe = asyncio.ensure_future(self._kill_if_it_hangs(worker))

    async def _kill_if_it_hangs(self, worker: ProcessWorker) -> None:
        try:
            patience = max(self._hangs_after_s, self.client.pump.longest_timeout_s)
            await asyncio.wait_for(asyncio.shield(self._asked_health(worker)), patience)
        except TimeoutError:
            if self._worker is worker and self.is_ready:
                log.error(
                    "the worker of %s %s hangs: it gave no sign of life for %.1f s and is killed",
                    self.spec.model.name, self.spec.model.version, patience,
                )  # fmt: skip
                worker.kill()
        finally:
            if self._probe is asyncio.current_task():
                self._probe = None

    def _end_probe(self) -> None:
        if self._probe is not None:
            self._probe.cancel()
            self._probe = None  # cancelled before it began, it would not do so itself

    async def stop(self) -> None:
        """Ends the worker: asked first, killed where it does not answer. Open streams end as cancelled, and with an
        error where it had to be killed."""
        if self._restart is not None:
            self._restart.cancel()
            self._restart = None
        worker, was = self._worker, self.state
        self._set_state(WorkerState.STOPPED)
        self._end_probe()
        if worker is None:
            return
        worker.request_stop()
        if was is not WorkerState.READY:
            worker.kill()  # it is loading, and has no stream to end
        for end in (worker.kill, self._leave):
            if await self._exited_within(_STOP_GRACE_S):
                return
            end()

    def _leave(self) -> None:
        """A thread that hangs is left to itself; its streams are not."""
        client, self._client = self._client, None
        if client is not None:
            client.worker_died()

    async def _exited_within(self, seconds: float) -> bool:
        try:
            async with asyncio.timeout(seconds):
                while self._worker is not None:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def _spawn(self) -> None:
        self._restart = None
        self._generation += 1
        self._spawned_at = asyncio.get_running_loop().time()
        self._worker = self._new_worker()
        try:
            self._worker.start(self.spec, self._on_report)
        except (OSError, ModelLoadError) as error:
            self._failure = str(error)
            self._on_worker_exit(-1)

    def _on_report(self, report: Report) -> None:
        match report["op"]:
            case "ready":
                self._on_worker_ready(report)
            case "failed":
                self._failure = report["message"]
            case "health":
                self._tell_health(report["is_well"])
            case "exited":
                self._on_worker_exit(report["status"])

    def _tell_health(self, is_well: bool) -> None:
        if self._health is not None and not self._health.done():
            self._health.set_result(is_well)
        self._health = None

    def _on_worker_ready(self, report: Report) -> None:
        worker = self._worker
        if worker is None or self.state is WorkerState.STOPPED:
            return
        self.kind, self.max_context, self.weights = report["kind"], report["max_context"], report["weights"]
        try:
            self._client = self._open_channel(
                self._generation, shared=worker.shared_memory, carries_payloads=self.kind != "tokens"
            )
        except (OSError, RuntimeError) as error:  # no descriptors or memory left
            self._failure = f"its channel could not be made: {error}"
            worker.kill()
            return
        worker.attach(self._client.channel)
        self._ready_at = asyncio.get_running_loop().time()
        self._load_s = self._ready_at - self._spawned_at
        self._set_state(WorkerState.READY)

    def _on_worker_exit(self, status: int) -> None:
        self._worker = None
        self._end_probe()
        self._tell_health(False)
        client, self._client = self._client, None
        if client is not None:
            client.worker_died()
        if self.state is WorkerState.STOPPED:
            self._changed.set()
        elif self.state is WorkerState.STARTING:
            self._failure = self._failure or f"the worker ended with status {status} while it was loading"
            self._set_state(WorkerState.FAILED)
        else:
            self._schedule_restart(status)

    def _schedule_restart(self, status: int) -> None:
        loop = asyncio.get_running_loop()
        if self.state is WorkerState.READY and loop.time() - self._ready_at > _STABLE_AFTER_S:
            self._early_deaths = 0
        delay = _BACKOFF_S[min(self._early_deaths, len(_BACKOFF_S) - 1)]
        self._early_deaths += 1
        self.restarts += 1
        model = self.spec.model
        reason = f": {self._failure}" if self._failure else ""
        log.error(
            "the worker of %s %s died with status %d%s; a new one starts in %.1f s",
            model.name, model.version, status, reason, delay,
        )  # fmt: skip
        self._failure = ""
        self._set_state(WorkerState.RESTARTING)
        self._restart = loop.call_later(delay, self._spawn)

    def _set_state(self, state: WorkerState) -> None:
        self.state = state
        self._changed.set()
