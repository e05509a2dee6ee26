"""The worker's loop: drain, schedule, step, commit, publish. It is C++ where the model is, and Python where not."""

from __future__ import annotations

import logging
import queue
from collections.abc import Callable

from realtime_serve._core import Channel, EngineCore, NativeModel, Vocabulary
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.engine.step_buffers import StepBuffers
from realtime_serve.runners.base import Runner

log = logging.getLogger(__name__)


class StepLoop:
    """Runs a loaded model over the channels attached to it, one step after the other.

    `run` belongs to one thread. `attach`, `detach` and `stop` may be called from any: they take effect at the next
    step boundary, and wake the loop where it sleeps.
    """

    kind = "tokens"

    def __init__(self, runner: Runner, limits: EngineLimits) -> None:
        self.max_context = runner.max_context
        self.weights = runner.weights
        self._runner = runner
        self._native_model: NativeModel | None = getattr(runner, "native_model", None)
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False
        self._core = EngineCore(
            max_batch_size=limits.max_batch_size,
            max_step_tokens=limits.max_step_tokens,
            block_size=runner.block_size,
            num_blocks=runner.num_blocks,
            cached_blocks=getattr(runner, "cached_blocks", 0),
            max_context=runner.max_context,
            max_queue=limits.max_queue,
            ageing_ms=limits.ageing_ms,
            target_step_ms=limits.target_step_ms,
            vocabulary=Vocabulary(runner.vocabulary_tokens, sorted(runner.special_tokens), sorted(runner.eos_tokens)),
        )
        self._buffers = StepBuffers(
            self._core,
            max_tokens=limits.max_step_tokens,
            max_rows=limits.max_batch_size,
            max_blocks=-(-runner.max_context // runner.block_size),
        )

    def attach(self, channel: Channel) -> None:
        self._command(lambda: self._core.attach(channel))

    def detach(self, channel: Channel) -> None:
        self._command(lambda: self._core.detach(channel))

    def check_health(self, tell: Callable[[bool], None]) -> None:
        """Calls `tell`, in the loop's thread, with whether the model says that it is well; one that says nothing is."""
        self._command(lambda: tell(self._is_well()))

    def _is_well(self) -> bool:
        health_check = getattr(self._runner, "health_check", None)
        try:
            return health_check is None or health_check() is not False
        except Exception:
            log.exception("the model's health_check raised")
            return False

    def stop(self) -> None:
        self._command(self._stop)

    def _stop(self) -> None:
        self._stopping = True

    def _command(self, command: Callable[[], None]) -> None:
        self._commands.put(command)
        self._core.interrupt()

    def run(self) -> None:
        core = self._core
        while not self._stopping:
            if self._native_model is not None:
                self._run_native(self._native_model)
            elif not self._step():
                core.wait()
            while not self._commands.empty():
                self._commands.get()()
        core.close()
        self._runner.close()

    def _run_native(self, model: NativeModel) -> None:
        """Runs steps until there is a command, or one of them fails."""
        if (failure := self._core.run(model)) is not None:
            log.error("the model raised in a step of %d sequences: they end with an error: %s", *failure)

    def _step(self) -> bool:
        """Runs one step; False where nothing was to be done."""
        core = self._core
        shape = core.schedule()
        if shape is None:
            return False
        try:
            self._runner.step(self._buffers.batch(*shape))
        except Exception:
            log.exception("the model raised in a step of %d sequences: they end with an error", shape[1])
            core.abort()
        else:
            core.commit()
        return True
