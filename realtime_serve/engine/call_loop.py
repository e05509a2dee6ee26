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
    StopMatcher,
    StreamError,
    Submission,
)
from realtime_serve.batch import BatchScheduler
from realtime_serve.payload import Payload, PayloadError
from realtime_serve.runners.callable import CallableModel, NonsenseError
from realtime_serve.types import RequestPriority, StreamToken

log = logging.getLogger(__name__)

_PRIORITIES = tuple(RequestPriority)


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
        self._model = model
        self._loop = loop
        self._scheduler = scheduler
        self._ports: dict[Channel, _Port] = {}
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
        try:
            await self._model.cleanup()
        except Exception:
            log.exception("the model's cleanup raised")
        if not serving.cancelled() and serving.done():
            serving.result()
        await asyncio.gather(serving, return_exceptions=True)

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _check_health(self, tell: Callable[[bool], None]) -> None:
        try:
            tell(await self._model.is_well())
        except Exception:
            log.exception("the model's health_check raised")
            tell(False)

    # Requests in

    def _attach(self, channel: Channel) -> None:
        port = self._ports[channel] = _Port(ChannelServer(channel), self._take_in)
        self._loop.add_reader(port.server.bell_fd, self._on_bell, port)
        self._take_in()

    def _detach(self, channel: Channel) -> None:
        port = self._ports.pop(channel)
        self._loop.remove_reader(port.server.bell_fd)
        self._take_new(port)  # what is still in its lanes must not end in silence
        for call in list(port.calls.values()):
            call.end(FinishReason.CANCELLED)
        port.server.flush()

    def _on_bell(self, port: _Port) -> None:
        port.server.wake()
        self._take_in()

    def _take_in(self) -> None:
        """Takes what the channels hold, until their bells are armed."""
        for port in self._ports.values():
            server, is_armed = port.server, False
            while not is_armed:
                self._take_new(port)
                for slot in server.cancelled():
                    port.calls[slot].cancel()
                for slot in server.with_room():
                    port.calls[slot].room.set()
                is_armed = server.arm()
        self._flush()

    def _take_new(self, port: _Port) -> None:
        for submission in port.server.take():
            call = port.calls[submission.slot] = _Call(port, submission)
            deadline = submission.deadline_ns / 1e9 if submission.deadline_ns else math.inf
            self._scheduler.enqueue_nowait(call, arrival=submission.arrival_ns / 1e9, deadline=deadline)

    async def _next_batch(self, limit: int | None = None) -> list[_Call]:
        self._take_in()
        while not (batch := [call for call in await self._scheduler.get_batch(limit) if call.is_open]):
            self._take_in()  # those that it was made of have left
        for call in batch:
            call.server.start(call.slot)
        return batch

    def _count_batch(self, size: int) -> None:
        release = BatchRelease.__members__[self._scheduler.last_release.upper()]
        for port in self._ports.values():
            port.server.count_batch(size, release)

    def _flush(self) -> None:
        for port in self._ports.values():
            port.server.show_load(self._running, self._scheduler.queue_length())
            port.server.flush()

    # predict

    async def _serve_predictions(self) -> None:
        while True:
            batch = await self._next_batch()
            self._count_batch(len(batch))
            self._running = len(batch)
            started = time.monotonic_ns()
            await self._predict(_with_inputs(batch))
            self._running = 0
            for port in self._ports.values():
                port.server.count_step(time.monotonic_ns() - started)
            self._flush()
            await asyncio.sleep(0)  # commands' and slow readers' turn, also where the next batch is full already

    async def _predict(self, batch: list[tuple[_Call, Any]]) -> None:
        """Where the model raises, it is called again with each half of the batch: so the request that it raises for
        fails alone."""
        if not batch:
            return
        try:
            outputs = await self._model.predict([value for _, value in batch])
        except NonsenseError as error:
            for call, _ in batch:
                call.fail(str(error))
            return
        except Exception as error:
            if len(batch) == 1:
                batch[0][0].raised(error)
                return
        else:
            for (call, _), output in zip(batch, outputs, strict=True):
                if call.is_open:
                    self._answer(call, output)
            return
        middle = len(batch) // 2
        await self._predict(batch[:middle])
        await self._predict(batch[middle:])

    def _answer(self, call: _Call, output: Any) -> None:
        try:
            payload = Payload.of(output, call.submission.answer_kind)
        except PayloadError as error:
            call.fail(f"the output of predict cannot be sent: {error}")
            return
        if len(payload.data) <= ChannelServer.max_piece_bytes and call.server.write_payload(
            call.slot, payload.kind, payload.data
        ):
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
            batch = await self._next_batch(most - self._running)
            self._count_batch(len(batch))
            self._running += len(batch)
            for call in batch:
                call.task = self._start(self._generate(call))

    async def _generate(self, call: _Call) -> None:
        try:
            call.end(await self._write_tokens(call))
        except asyncio.CancelledError:
            call.end(FinishReason.CANCELLED)
            raise
        except NonsenseError as error:
            call.fail(str(error))
        except Exception as error:
            call.raised(error)
        finally:
            self._running -= 1
            self._place_freed.set()
            call.server.flush()

    async def _write_tokens(self, call: _Call) -> FinishReason:
        """Up to max_tokens tokens or a stop string; why it ended. With stop strings a token is written once the next
        one is there, as it may get the text that they held back."""
        submission = call.submission
        sampling = submission.sampling() | {"stop": submission.stops}
        stops = StopMatcher(submission.stops)
        held: StreamToken | None = None
        count = 0
        asked = time.monotonic_ns()
        async with contextlib.aclosing(self._model.generate(submission.payload.decode(), sampling)) as tokens:
            async for token in tokens:
                call.server.count_step(time.monotonic_ns() - asked)
                if held is not None:
                    await call.write_token(held)
                count += 1
                text, stopped = stops.push(token.token)
                held = replace(token, token=text)
                if stopped or count == submission.max_tokens:
                    break
                if not submission.stops:
                    await call.write_token(held)
                    held = None
                await asyncio.sleep(0)  # the others' turn
                asked = time.monotonic_ns()
            else:
                stopped = True
        if held is not None:
            await call.write_token(replace(held, token=held.token + stops.flush()))
        return FinishReason.STOP if stopped else FinishReason.LENGTH


def _with_inputs(batch: list[_Call]) -> list[tuple[_Call, Any]]:
    """The calls whose payloads are what they should be, with their values; the others are refused."""
    usable = []
    for call in batch:
        submission = call.submission
        try:
            usable.append((call, Payload(submission.payload_kind, submission.payload).value()))
        except PayloadError as error:
            call.refuse(f"input: {error}")
    return usable


class _Port:
    """A channel, and the calls of its open slots."""

    def __init__(self, server: ChannelServer, take_in: Callable[[], None]) -> None:
        self.server = server
        self.calls: dict[int, _Call] = {}
        self.take_in = take_in


class _Call:
    """A request from the channel to the end of its answer."""

    def __init__(self, port: _Port, submission: Submission) -> None:
        self.submission = submission
        self.slot = submission.slot
        self.priority = _PRIORITIES[submission.priority]
        self.server = port.server
        self.room = asyncio.Event()
        self.task: asyncio.Task[None] | None = None
        self.is_open = True
        self._port = port

    def end(self, reason: FinishReason, error: StreamError = StreamError.NONE, detail: str = "") -> None:
        if self.is_open:
            self.is_open = False
            del self._port.calls[self.slot]
            self.server.end(self.slot, reason, error, detail)

    def cancel(self) -> None:
        """Its reader has left."""
        if self.task is not None:
            self.task.cancel()
        self.end(FinishReason.CANCELLED)

    def refuse(self, detail: str) -> None:
        self.end(FinishReason.ERROR, StreamError.INVALID_REQUEST, detail)

    def fail(self, detail: str) -> None:
        """The model gave no answer that could be sent."""
        log.error("request %s: %s", self.submission.request_id, detail)
        self.end(FinishReason.ERROR, StreamError.MODEL_FAILED, detail)

    def raised(self, error: Exception) -> None:
        """What the model raised goes to the log; its caller is told the type."""
        request_id = self.submission.request_id
        log.error("request %s: the model raised", request_id, exc_info=error)
        detail = f"the model raised {type(error).__name__} for request {request_id}; the log has the traceback"
        self.end(FinishReason.ERROR, StreamError.MODEL_FAILED, detail)

    async def write_token(self, token: StreamToken) -> None:
        for text in _pieces(token.token):
            while not self.server.write_token(self.slot, text, token.token_id, token.logprob, token.is_special):
                await self._wait_for_room()
        self.server.flush()

    async def write_payload(self, payload: Payload) -> None:
        size = ChannelServer.max_piece_bytes
        for start in range(0, len(payload.data), size):
            while not self.server.write_payload(self.slot, payload.kind, payload.data[start : start + size]):
                await self._wait_for_room()
        self.end(FinishReason.STOP)
        self.server.flush()

    async def _wait_for_room(self) -> None:
        self.room.clear()
        self._port.take_in()  # its bell then rings for room as well
        await self.room.wait()


def _pieces(text: str) -> list[str]:
    """A text in parts that a token record takes; of itself where it is short."""
    size = ChannelServer.max_piece_bytes // 4  # characters: UTF-8 has at most 4 bytes for one
    if len(text) <= size:
        return [text]
    return [text[start : start + size] for start in range(0, len(text), size)]
