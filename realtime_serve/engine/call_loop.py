"""The worker's loop for models that are called: take requests, batch them, call, write the answers."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Callable, Coroutine
from dataclasses import replace
from typing import Any

from realtime_serve._core import (
    BatchRelease,
    Channel,
    ChannelServer,
    FinishReason,
    PayloadKind,
    StopMatcher,
)
from realtime_serve.batch import BatchScheduler
from realtime_serve.engine.call import MAX_PIECE_BYTES, Call, Port
from realtime_serve.payload import Payload, PayloadError
from realtime_serve.runners.callable import CallableModel, NonsenseError
from realtime_serve.types import StreamToken

log = logging.getLogger(__name__)

_KINDS = tuple(PayloadKind)  # by number

# What a model's health_check may take, where it is async.
_HEALTH_WITHIN_S = 5.0
# What is left of the model's own tasks when the loop ends may take so long to end as well.
_LEAVE_WITHIN_S = 1.0


class CallLoop:
    """Calls a model for the requests of the channels attached to it, in batches that a BatchScheduler makes.

    `run` belongs to one thread, in which the model is called as well: while a call that is not async runs, nothing else
    of this loop does. `attach`, `detach`, `check_health` and `stop` may be called from any.
    """

    def __init__(
        self,
        model: CallableModel,
        loop: asyncio.AbstractEventLoop,
        scheduler: BatchScheduler,
        *,
        max_context: int,
    ) -> None:
        """`loop`, which is not running yet, is the one that the model was loaded in."""
        self.kind = model.kind
        self.max_context = max_context
        self.weights = ""
        self._model = model
        self._loop = loop
        self._scheduler = scheduler
        self._ports: dict[Channel, Port] = {}
        self._predicting: _Prediction | None = None  # the call of the model that is under way
        self._stopping = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._running = 0
        self._place_freed = asyncio.Event()

    def attach(self, channel: Channel) -> None:
        self._command(lambda: self._attach(channel))

    def detach(self, channel: Channel) -> None:
        self._command(lambda: self._detach(channel))

    def check_health(self, tell: Callable[[bool], None]) -> None:
        """Calls `tell`, in the loop's thread, with whether the model says that it is well."""
        self._command(lambda: self._start(self._check_health(tell)))

    def stop(self) -> None:
        self._command(self._stopping.set)

    def _command(self, command: Callable[[], object]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: it has ended
            self._loop.call_soon_threadsafe(command)

    def run(self) -> None:
        try:
            self._loop.run_until_complete(self._run())
        finally:
            self._loop.run_until_complete(_end_what_is_left())
            self._loop.close()

    async def _run(self) -> None:
        serve = self._serve_predictions if self._model.kind == "predict" else self._serve_generations
        serving = asyncio.ensure_future(serve())
        stopping = asyncio.ensure_future(self._stopping.wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        for task in (serving, stopping, *self._tasks):
            task.cancel()
        await asyncio.gather(stopping, *self._tasks, return_exceptions=True)
        for channel in list(self._ports):
            self._detach(channel)
        await asyncio.gather(serving, return_exceptions=True)
        try:
            await self._model.cleanup()
        except Exception:
            log.exception("the model's cleanup raised")
        if not serving.cancelled():
            serving.result()

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _check_health(self, tell: Callable[[bool], None]) -> None:
        is_well = False
        try:
            async with asyncio.timeout(_HEALTH_WITHIN_S):
                is_well = await self._model.is_well()
        except Exception:
            log.exception("the model's health_check raised, or took longer than %.0f s", _HEALTH_WITHIN_S)
        tell(is_well)

    # Requests in

    def _attach(self, channel: Channel) -> None:
        port = self._ports[channel] = Port(ChannelServer(channel), self._scheduler, self._take_in)
        self._loop.add_reader(port.server.bell_fd, self._on_bell, port)
        self._take_in()

    def _detach(self, channel: Channel) -> None:
        port = self._ports.pop(channel)
        self._loop.remove_reader(port.server.bell_fd)
        self._take_new(port)  # what is still in its lanes must not end in silence
        for call in list(port.calls.values()):
            call.cancel()
        if self._predicting is not None:
            self._predicting.give_up_if_unwanted()
        port.server.flush()

    def _on_bell(self, port: Port) -> None:
        port.server.wake()
        self._take_in()

    def _take_in(self) -> None:
        """Takes what the channels hold, until their bells are armed."""
        for port in self._ports.values():
            server, is_armed = port.server, False
            while not is_armed:
                self._take_new(port)
                if gone := server.cancelled():
                    for slot in gone:
                        port.calls[slot].cancel()
                    if self._predicting is not None:
                        self._predicting.give_up_if_unwanted()
                for slot in server.with_room():
                    port.calls[slot].has_room()
                is_armed = server.arm()
        self._flush()

    def _take_new(self, port: Port) -> None:
        for submission in port.server.take():
            call = port.calls[submission.slot] = Call(port, submission)
            deadline = submission.deadline_ns / 1e9 if submission.deadline_ns else math.inf
            arrival = submission.arrival_ns / 1e9
            call.queued_as = self._scheduler.enqueue_nowait(call, arrival=arrival, deadline=deadline)

    async def _next_batch(self, limit: int | None = None) -> list[Call]:
        self._take_in()
        batch: list[Call] = await self._scheduler.get_batch(limit)
        release = BatchRelease.__members__[self._scheduler.last_release.upper()]
        for call in batch:
            call.queued_as = None
            call.server.start(call.slot)
        for port in self._ports.values():
            port.server.count_batch(len(batch), release)
        self._running += len(batch)
        self._flush()
        return batch

    def _count_step(self, started_ns: int) -> None:
        for port in self._ports.values():
            port.server.count_step(time.monotonic_ns() - started_ns)

    def _flush(self) -> None:
        for port in self._ports.values():
            port.server.show_load(self._running, self._scheduler.queue_length())
            port.server.flush()

    # predict

    async def _serve_predictions(self) -> None:
        while not self._stopping.is_set():
            batch = await self._next_batch()
            await self._predict(_with_inputs(batch))
            self._running = 0
            self._flush()
            await asyncio.sleep(0)  # commands' and slow readers' turn, also where the next batch is full already

    async def _predict(self, batch: list[tuple[Call, Any]]) -> None:
        """Where the model raises, it is called again with each half of the batch: so the request that it raises for
        fails alone."""
        batch = [(call, value) for call, value in batch if call.is_open]
        if not batch:
            return
        started = time.monotonic_ns()
        outputs: Any
        try:
            outputs = self._model.predict([value for _, value in batch])
        except BaseException as error:  # this call is not async: whatever it raises is the model's own
            outputs = error
        if asyncio.iscoroutine(outputs):
            self._predicting = _Prediction(outputs, [call for call, _ in batch])
            try:
                outputs = await self._predicting.outputs()
            finally:
                self._predicting = None
        self._count_step(started)
        if isinstance(outputs, NonsenseError):
            for call, _ in batch:
                call.fail(str(outputs))
            return
        if isinstance(outputs, list):
            for (call, _), output in zip(batch, outputs, strict=True):
                self._answer(call, output)
            return
        if len(batch) == 1:
            batch[0][0].raised(outputs)
            return
        self._take_in()  # who has left meanwhile need not be tried again
        middle = len(batch) // 2
        await self._predict(batch[:middle])
        await self._predict(batch[middle:])

    def _answer(self, call: Call, output: Any) -> None:
        if not call.is_open:
            return
        wanted = _KINDS[call.submission.answer_kind]
        try:
            payload = Payload.of(output, wanted)
        except PayloadError as error:
            if wanted in (PayloadKind.NONE, PayloadKind.JSON):
                call.fail(f"the output of predict cannot be sent: {error}")
            else:
                call.refuse(f"Accept: the model's output cannot be sent in this form: {error}")
            return
        if len(payload.data) <= MAX_PIECE_BYTES and call.server.write_payload(call.slot, payload.kind, payload.data):
            call.end(FinishReason.STOP)
        else:  # the next batch does not wait for its reader
            call.task = self._start(call.write_payload(payload))

    # generate

    async def _serve_generations(self) -> None:
        most = self._scheduler.config.max_batch_size
        while True:
            while self._running >= most:
                self._place_freed.clear()
                await self._place_freed.wait()
            for call in await self._next_batch(most - self._running):
                call.task = self._start(self._generate(call))
                call.task.add_done_callback(self._on_generated)

    def _on_generated(self, task: asyncio.Task[None]) -> None:
        self._running -= 1
        self._place_freed.set()
        self._flush()

    async def _generate(self, call: Call) -> None:
        try:
            call.end(await self._write_tokens(call))
        except NonsenseError as error:
            call.fail(str(error))
        except asyncio.CancelledError as error:
            if _is_cancelled():
                call.end(FinishReason.CANCELLED)
                raise
            call.raised(error)
        except GeneratorExit:
            raise
        except BaseException as error:  # whatever the model raises is its own, and ends this request alone
            call.raised(error)

    async def _write_tokens(self, call: Call) -> FinishReason:
        """Up to max_tokens tokens, one of stop_token_ids or a stop string, which the first min_tokens are not searched
        for; why it ended. While a stop string may have begun, a token is kept
        until the next one is there: if none comes, it gets the text that was held back."""
        submission = call.submission
        sampling = submission.sampling() | {"stop": submission.stops}
        stops = StopMatcher(submission.stops)
        min_tokens, stop_token_ids = submission.min_tokens, submission.stop_token_ids
        held: StreamToken | None = None
        count = held_back = 0  # tokens; characters
        stopped = False
        asked = time.monotonic_ns()
        async with contextlib.aclosing(self._model.generate(submission.payload.decode(), sampling)) as tokens:
            async for token in tokens:
                call.server.count_step(time.monotonic_ns() - asked)
                if held is not None:
                    await call.write_token(held)
                    held = None
                count += 1
                text = token.token
                if count > min_tokens:
                    text, stopped = stops.push(text)
                    if token.token_id in stop_token_ids and not stopped:
                        text, stopped = text + stops.flush(), True
                held_back += len(token.token) - len(text)
                if stopped or count == submission.max_tokens or held_back:
                    held = replace(token, token=text)
                else:
                    await call.write_token(replace(token, token=text) if submission.stops else token)
                if stopped or count == submission.max_tokens:
                    break
                await asyncio.sleep(0)  # the others' turn
                asked = time.monotonic_ns()
            else:
                stopped = True
            # Before the model cleans up after itself, which may take its time or raise.
            if held is not None:
                await call.write_token(replace(held, token=held.token + stops.flush()))
        return FinishReason.STOP if stopped else FinishReason.LENGTH


def _with_inputs(batch: list[Call]) -> list[tuple[Call, Any]]:
    """The calls whose payloads are what they should be, with their values; the others are refused."""
    usable = []
    for call in batch:
        submission = call.submission
        try:
            usable.append((call, Payload(_KINDS[submission.payload_kind], submission.payload).value()))
        except PayloadError as error:
            call.refuse(f"input: {error}")
    return usable


class _Prediction:
    """A call of a `predict` that is async. It ends early where nobody waits for its outputs any more."""

    def __init__(self, work: Coroutine[Any, Any, list[Any]], calls: list[Call]) -> None:
        self._calls = calls
        self._task = asyncio.get_running_loop().create_task(_outcome(work))

    async def outputs(self) -> list[Any] | BaseException:
        """As many as there are inputs, or what the model raised."""
        try:
            return await self._task
        except asyncio.CancelledError as error:
            if _is_cancelled():
                raise
            return error  # given up, or the model's own

    def give_up_if_unwanted(self) -> None:
        if not any(call.is_open for call in self._calls):
            self._task.cancel()


async def _outcome(work: Coroutine[Any, Any, list[Any]]) -> list[Any] | BaseException:
    try:
        return await work
    except (asyncio.CancelledError, GeneratorExit):
        raise
    except BaseException as error:
        return error


def _is_cancelled() -> bool:
    """Whether the running task is being cancelled; else an asyncio.CancelledError is the model's own."""
    task = asyncio.current_task()
    return task is not None and task.cancelling() > 0


async def _end_what_is_left() -> None:
    """The model's own tasks and generators, as asyncio.run does it; but those that do not end are left."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        await asyncio.wait(left, timeout=_LEAVE_WITHIN_S)
    await asyncio.get_running_loop().shutdown_asyncgens()
