"""The worker's loop over channels, with models that are called: how they are batched, and how they misbehave."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import UserDict, deque
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from support import DEADLINE_S, until

from realtime_serve import BatchConfig, BatchScheduler, RequestPriority, StreamToken, TopLogprob
from realtime_serve._core import ChannelServer, PayloadKind
from realtime_serve.engine import call_loop
from realtime_serve.engine.call_loop import CallLoop
from realtime_serve.engine.client import ChannelClient, ChannelShape
from realtime_serve.errors import InvalidRequestError, ModelFailedError, UnsupportedModelError, stream_error
from realtime_serve.payload import Payload
from realtime_serve.runners.callable import CallableModel
from realtime_serve.stream import TokenStream
from realtime_serve.types import InferenceRequest, PredictRequest

LOW, NORMAL, HIGH = RequestPriority
SLOTS = 16


class Loop:
    """A call loop in a thread of its own, and channels to it."""

    def __init__(self, model: object, batching: BatchConfig | None = None, scheduler: type | None = None) -> None:
        self.scheduler = (scheduler or BatchScheduler)("m", batching or BatchConfig(), max_queue=2 * SLOTS)
        self.call_loop = CallLoop(CallableModel(model), asyncio.new_event_loop(), self.scheduler, max_context=4096)
        self.thread = threading.Thread(target=self.call_loop.run, daemon=True)
        self.thread.start()
        self._generations = iter(range(1, 100))

    def connect(self) -> ChannelClient:
        shape = ChannelShape(slots=SLOTS, buffer_tokens=100)
        client = ChannelClient(shape, next(self._generations), shared=False, carries_payloads=True)
        self.call_loop.attach(client.channel)
        return client

    async def end(self) -> None:
        self.call_loop.stop()
        await until(lambda: not self.thread.is_alive(), "the loop's end")


class Start:
    """Makes loops, which end with the test."""

    def __init__(self) -> None:
        self.loops: list[Loop] = []

    def __call__(self, model: object, batching: BatchConfig | None = None, **more: Any) -> Loop:
        self.loops.append(Loop(model, batching, **more))
        return self.loops[-1]


@pytest.fixture
def start() -> Iterator[Start]:
    start = Start()
    yield start
    for loop in start.loops:
        loop.call_loop.stop()
        loop.thread.join(DEADLINE_S)
        assert not loop.thread.is_alive()


class Gated:
    """Predicts what it was given, or what `answer` says of it, once the gate is open."""

    def __init__(self, answer: Callable[[list[Any]], Any] = lambda inputs: inputs) -> None:
        self.answer = answer
        self.batches: list[list[Any]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.waiting = 0

    def predict(self, inputs: list[Any]) -> Any:
        self.batches.append(list(inputs))
        self.waiting += 1
        assert self.gate.wait(DEADLINE_S)
        self.waiting -= 1
        return self.answer(inputs)


class Asked:
    """An input on its way."""

    def __init__(self, client: ChannelClient, value: Any, kind: PayloadKind | None, **more: Any) -> None:
        request = PredictRequest("r1", "m", [value], timeout=DEADLINE_S, output_kind=kind, **more)
        self.stream = client.submit_input(request, Payload.of(value), model="m", version="1")

    async def output(self) -> Any:
        async with asyncio.timeout(DEADLINE_S):
            kind, data = await self.stream.whole()
        error, detail = self.stream.error, self.stream.error_detail
        reason = self.stream.finish_reason
        self.stream.close()
        if error:
            raise stream_error(error, detail)
        if reason == "cancelled":
            raise asyncio.CancelledError
        assert reason == "stop"
        return Payload(PayloadKind(kind), data).value()


def ask(client: ChannelClient, value: Any, kind: PayloadKind | None = None, **more: Any) -> Asked:
    return Asked(client, value, kind, **more)


async def failure(asked: Asked) -> str:
    with pytest.raises(ModelFailedError) as caught:
        await asked.output()
    assert caught.value.code == "model_failed"
    return str(caught.value)


def releases(client: ChannelClient) -> dict[str, int]:
    return {reason: count for reason, count in client.channel.stats()["batch_releases"].items() if count}


def sizes(client: ChannelClient) -> tuple[int, int]:
    """Batches and what was in them."""
    counts, total = client.channel.stats()["batch_sequences"]
    return sum(counts), total


# predict: batches


async def test_what_piles_up_during_a_batch_is_the_next_one(start: Start) -> None:
    model = Gated()
    model.gate.clear()
    client = start(model, BatchConfig(max_batch_size=4)).connect()
    first = ask(client, 0)
    await until(lambda: model.waiting)
    others = [ask(client, value) for value in range(1, 9)]
    model.gate.set()
    assert [await asked.output() for asked in [first, *others]] == list(range(9))
    assert model.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]
    assert releases(client) == {"idle": 1, "full": 2}
    assert sizes(client) == (3, 9)
    assert client.channel.steps == 3


async def test_priorities_within_a_batch(start: Start) -> None:
    model = Gated()
    model.gate.clear()
    client = start(model, BatchConfig(max_batch_size=3)).connect()
    asked = [ask(client, 0)]
    await until(lambda: model.waiting)
    for value, priority in [("l", LOW), ("n", NORMAL), ("h", HIGH), ("L", LOW), ("N", NORMAL), ("H", HIGH)]:
        asked.append(ask(client, value, priority=priority))
    model.gate.set()
    for one in asked:
        await one.output()
    assert model.batches == [[0], ["h", "H", "n"], ["N", "l", "L"]]


async def test_a_batch_waits_for_max_wait_ms_and_no_longer(start: Start) -> None:
    model = Gated()
    client = start(model, BatchConfig(max_batch_size=4, max_wait_ms=1, dynamic_batching=False)).connect()
    assert await ask(client, 1).output() == 1
    assert releases(client) == {"timeout": 1}


async def test_a_batch_that_would_wait_for_ever_is_released_before_its_deadline(start: Start) -> None:
    class SlowOnes(BatchScheduler):
        def __init__(self, *args: Any, **options: Any) -> None:
            super().__init__(*args, **options)
            self._step_s = DEADLINE_S - 0.05  # as if it had learned that from batches before

    batching = BatchConfig(max_batch_size=4, max_wait_ms=10**9, dynamic_batching=False)
    client = start(Gated(), batching, scheduler=SlowOnes).connect()
    assert await ask(client, 1).output() == 1
    assert releases(client) == {"deadline": 1}


async def test_min_batch_size_is_waited_for(start: Start) -> None:
    model = Gated()
    client = start(model, BatchConfig(max_batch_size=4, max_wait_ms=10**9, min_batch_size=2)).connect()
    first = ask(client, 1)
    await until(lambda: client.channel.stats()["waiting"] == 1)
    assert await ask(client, 2).output() == 2
    assert await first.output() == 1
    assert model.batches == [[1, 2]]


async def test_the_load_is_shown(start: Start) -> None:
    model = Gated()
    model.gate.clear()
    client = start(model, BatchConfig(max_batch_size=2)).connect()
    asked = [ask(client, 1)]
    await until(lambda: client.channel.stats()["running"] == 1)
    model.gate.set()
    await asked[0].output()
    await until(lambda: client.channel.stats()["running"] == 0)


async def test_two_channels_share_batches(start: Start) -> None:
    model = Gated()
    model.gate.clear()
    loop = start(model)
    clients = [loop.connect(), loop.connect()]
    first = ask(clients[0], 0)
    await until(lambda: model.waiting)
    asked = [first, *(ask(clients[value % 2], value) for value in range(1, 5))]
    model.gate.set()
    assert [await one.output() for one in asked] == list(range(5))
    assert sorted(model.batches[1]) == [1, 2, 3, 4]


# predict: what may be returned


@pytest.mark.parametrize(
    ("answer", "value", "output"),
    [
        (list, 5, 5),
        (tuple, {"a": [1, None, True]}, {"a": [1, None, True]}),
        (deque, "text", "text"),
        (np.array, 3, 3),
        (np.array, [1.5, 2], [1.5, 2]),
        (torch.tensor, [1.5, 2], [1.5, 2]),
        (lambda inputs: torch.tensor([0.25] * len(inputs), requires_grad=True), 0, 0.25),
        (lambda inputs: [np.float32(0.5)] * len(inputs), 0, 0.5),
        (lambda inputs: [None] * len(inputs), 0, None),
        (lambda inputs: [b"\0\xff"] * len(inputs), 0, b"\0\xff"),
        (lambda inputs: [b""] * len(inputs), 0, b""),
        (lambda inputs: [np.empty((0, 3))] * len(inputs), 0, []),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_outputs(start: Start, answer: Callable[..., Any], value: Any, output: Any, is_async: bool) -> None:
    class Model:
        def predict(self, inputs: list[Any]) -> Any:
            return later(inputs) if is_async else answer(inputs)

    async def later(inputs: list[Any]) -> Any:
        await asyncio.sleep(0)
        return answer(inputs)

    given = await ask(start(Model()).connect(), value).output()
    assert (given.tolist() if isinstance(given, np.ndarray) else given) == output


@pytest.mark.parametrize("value", [b"\0\xff" * 10, np.arange(6, dtype="i2").reshape(2, 3), "text", {"a": 1}])
async def test_inputs_come_as_what_they_are(start: Start, value: Any) -> None:
    seen: list[Any] = []
    model = Gated(lambda inputs: seen.extend(inputs) or [0] * len(inputs))
    assert await ask(start(model).connect(), value).output() == 0
    assert type(seen[0]) is type(value)
    assert np.array_equal(seen[0], value)


async def test_the_wanted_form(start: Start) -> None:
    client = start(Gated(lambda inputs: [np.arange(3)] * len(inputs))).connect()
    assert await ask(client, 0, PayloadKind.JSON).output() == [0, 1, 2]
    assert (await ask(client, 0, PayloadKind.NUMPY).output()).tolist() == [0, 1, 2]
    with pytest.raises(
        InvalidRequestError, match="cannot be sent in this form: a ndarray has no form as bytes"
    ) as caught:
        await ask(client, 0, PayloadKind.BYTES).output()
    assert caught.value.param == "Accept"


async def test_large_outputs_wait_for_their_readers_and_the_next_batch_does_not(start: Start) -> None:
    size = 5_000_000
    client = start(Gated(lambda inputs: [bytes([value]) * (value * size) + b"." for value in inputs])).connect()
    large = [ask(client, value) for value in (1, 2)]
    await until(lambda: client.channel.stats()["stalls"] >= 2)
    for _ in range(3):
        assert await ask(client, 0).output() == b"."
    for asked, value in zip(large, (1, 2), strict=True):
        assert await asked.output() == bytes([value]) * (value * size) + b"."


async def test_a_reader_that_leaves_a_large_output_frees_it(start: Start) -> None:
    client = start(Gated(lambda inputs: [bytes(5_000_000)] * len(inputs))).connect()
    asked = ask(client, 1)
    await until(lambda: client.channel.stats()["stalls"] >= 1)
    asked.stream.close()
    await until(lambda: client.pump.open_streams == 0)
    assert len(await ask(client, 1).output()) == 5_000_000


@pytest.mark.parametrize("extra", [-1, 0, 1])
async def test_outputs_about_as_large_as_a_piece(start: Start, extra: int) -> None:
    data = bytes(ChannelServer.max_piece_bytes + extra)
    assert await ask(start(Gated()).connect(), data).output() == data


# predict: failures


class Raising(Gated):
    """Raises for what it is told to."""

    def __init__(self, error: BaseException) -> None:
        def answer(inputs: list[Any]) -> list[Any]:
            if "bad" in inputs:
                raise error
            return inputs

        super().__init__(answer)


class OwnError(Exception):
    pass


@pytest.mark.parametrize(
    "error", [OwnError("secret"), SystemExit(3), asyncio.CancelledError(), StopIteration(), MemoryError()], ids=repr
)
async def test_what_raises_fails_alone(start: Start, error: BaseException, caplog: pytest.LogCaptureFixture) -> None:
    model = Raising(error)
    model.gate.clear()
    client = start(model, BatchConfig(max_batch_size=8)).connect()
    first = ask(client, 0)
    await until(lambda: model.waiting)
    asked = [ask(client, value) for value in (1, 2, "bad", 3, 4, 5, 6, 7)]
    model.gate.set()
    assert await first.output() == 0
    message = await failure(asked[2])
    assert message == f"the model raised {type(error).__name__} for request r1; the log has the traceback"
    assert [await one.output() for one in asked if one is not asked[2]] == [1, 2, 3, 4, 5, 6, 7]
    # By halves: of 8 inputs, no more than 2 calls at each of the 3 levels below the first.
    assert len(model.batches) == 2 + 2 * 3
    assert sizes(client) == (2, 9)
    records = [record for record in caplog.records if record.exc_info]
    assert len(records) == 1
    assert "request r1: the model raised" in records[0].getMessage()
    assert "Traceback" in logging.Formatter().format(records[0])


async def test_what_left_is_not_tried_again(start: Start) -> None:
    model = Raising(OwnError())
    model.gate.clear()
    client = start(model, BatchConfig(max_batch_size=4)).connect()
    asked = [ask(client, value) for value in ("bad", 1, 2, 3)]
    await until(lambda: model.waiting)
    for one in asked[1:]:
        one.stream.close()
    model.gate.set()
    await failure(asked[0])
    assert not any({1, 2, 3} & set(batch) for batch in model.batches[1:])


class SaysNoText:
    @property
    def __array__(self) -> object:
        raise OwnError("\ud800")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda inputs: inputs[1:], "predict returned 0 outputs for a batch of 1 inputs"),
        (lambda inputs: [*inputs, 1], "predict returned 2 outputs for a batch of 1 inputs"),
        (lambda inputs: inputs.clear() or inputs, "predict returned 0 outputs for a batch of 1 inputs"),
        (lambda inputs: None, "predict returned a NoneType, and not a list"),
        (lambda inputs: "x", "predict returned a str, and not a list"),
        (lambda inputs: b"x", "predict returned a bytes, and not a list"),
        (lambda inputs: 7, "predict returned a int, and not a list"),
        (lambda inputs: {0: 1}, "predict returned a dict, and not a list"),
        (lambda inputs: UserDict({0: 1}), "predict returned a UserDict, and not a list"),
        (lambda inputs: {1}, "predict returned a set, and not a list"),
        (lambda inputs: (value for value in inputs), "predict returned a generator, and not a list"),
        (lambda inputs: torch.tensor(1.0), "predict returned a Tensor, and not a list"),
        (lambda inputs: np.array(1.0), "predict returned a ndarray, and not a list"),
        (lambda inputs: [object()], "the output of predict cannot be sent: a object has no form as JSON"),
        (lambda inputs: ["\ud800"], "the output of predict cannot be sent: a str has no form as JSON"),
        (
            lambda inputs: [SaysNoText()],
            "the output of predict cannot be sent: a SaysNoText has no form as a payload: ?",
        ),
        (lambda inputs: [3j], "the output of predict cannot be sent: a complex has no form as JSON"),
    ],
)
async def test_nonsense_is_named(start: Start, answer: Callable[..., Any], message: str) -> None:
    model = Gated(lambda inputs: answer(inputs) if inputs == ["bad"] else inputs)
    client = start(model).connect()
    assert (await failure(ask(client, "bad"))).startswith(message)
    assert await ask(client, "good").output() == "good"


class BadLength(list[int]):
    def __iter__(self) -> Iterator[int]:
        raise OwnError


async def test_outputs_that_raise_when_they_are_read(start: Start) -> None:
    client = start(Gated(lambda inputs: BadLength() if inputs == ["bad"] else inputs)).connect()
    assert "raised OwnError" in await failure(ask(client, "bad"))
    assert await ask(client, "good").output() == "good"


async def test_one_output_that_cannot_be_sent_fails_alone(start: Start) -> None:
    model = Gated(lambda inputs: [object() if value == "bad" else value for value in inputs])
    model.gate.clear()
    client = start(model).connect()
    first = ask(client, 0)
    await until(lambda: model.waiting)
    good, bad = ask(client, "good"), ask(client, "bad")
    model.gate.set()
    await first.output()
    assert "object" in await failure(bad)
    assert await good.output() == "good"
    assert len(model.batches) == 2


async def test_inputs_that_are_not_what_they_are_said_to_be(start: Start) -> None:
    model = Gated()
    client = start(model).connect()
    for kind, message in [(PayloadKind.JSON, "input: it is not valid JSON"), (PayloadKind.NUMPY, "input: it is not a")]:
        with pytest.raises(InvalidRequestError, match=message) as caught:
            await ask(client, Payload(kind, b"\xff")).output()
        assert caught.value.param == "input"
    assert await ask(client, 1).output() == 1
    assert model.batches == [[1]]


# predict: who leaves


async def test_a_request_that_is_given_up_in_the_queue_never_reaches_the_model(start: Start) -> None:
    model = Gated()
    model.gate.clear()
    client = start(model, BatchConfig(max_batch_size=2)).connect()
    first = ask(client, 0)
    await until(lambda: model.waiting)
    left = [ask(client, f"left {index}") for index in range(5)]
    for one in left:
        one.stream.close()
    stays = ask(client, "stays")
    model.gate.set()
    assert await first.output() == 0
    assert await stays.output() == "stays"
    assert model.batches == [[0], ["stays"]]
    assert sizes(client) == (2, 2)
    assert client.pump.open_streams == 0


async def test_requests_that_come_and_leave_take_no_place_in_the_queue(start: Start) -> None:
    release = asyncio.Event()

    class Model:
        async def predict(self, inputs: list[Any]) -> list[Any]:
            while not release.is_set():  # noqa: ASYNC110 - the event is another loop's
                await asyncio.sleep(0.001)
            return inputs

    loop = start(Model(), BatchConfig(max_batch_size=1))
    client = loop.connect()
    first = ask(client, 0)
    await until(lambda: client.channel.stats()["running"] == 1)
    for _ in range(6):
        left = [ask(client, "left") for _ in range(SLOTS - 1)]
        await until(lambda: client.channel.stats()["waiting"] == SLOTS - 1)
        for one in left:
            one.stream.close()
        await until(lambda: client.channel.stats()["waiting"] == 0 and client.pump.open_streams == 1)
    stays = ask(client, "stays")
    release.set()
    assert (await first.output(), await stays.output()) == (0, "stays")


async def test_an_async_predict_that_nobody_waits_for_is_cancelled(start: Start) -> None:
    events: list[str] = []

    class Model:
        async def predict(self, inputs: list[Any]) -> list[Any]:
            if inputs != ["hang"]:
                return inputs
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                events.append("cancelled")
                raise
            return inputs

    client = start(Model()).connect()
    hangs = ask(client, "hang")
    await until(lambda: client.channel.stats()["running"] == 1)
    waits = ask(client, "waits")
    await until(lambda: client.channel.stats()["waiting"] == 1)
    hangs.stream.close()
    assert await waits.output() == "waits"
    assert events == ["cancelled"]


# The loop's end


@pytest.mark.parametrize("how", ["stop", "detach"])
async def test_the_end_ends_all_calls_as_cancelled(start: Start, how: str) -> None:
    model = Gated()
    model.gate.clear()
    loop = start(model, BatchConfig(max_batch_size=2))
    client = loop.connect()
    asked = [ask(client, 0)]
    await until(lambda: model.waiting)
    asked += [ask(client, value) for value in range(1, 6)]
    if how == "stop":
        loop.call_loop.stop()
    else:
        loop.call_loop.detach(client.channel)
    model.gate.set()
    # What the model was working on may have been answered before the end came to the loop.
    ends = await asyncio.gather(*(one.output() for one in asked), return_exceptions=True)
    assert all(isinstance(end, asyncio.CancelledError) for end in ends[1:])
    assert client.pump.open_streams == 0
    if how == "stop":
        await until(lambda: not loop.thread.is_alive())
    else:
        assert await ask(loop.connect(), "next").output() == "next"
    assert model.batches[0] == [0]
    assert not any(set(batch) & {1, 2, 3, 4, 5} for batch in model.batches)


class Tidy:
    """Notes what becomes of it."""

    def __init__(self, kind: str) -> None:
        self.events: list[str] = []
        self.started = threading.Event()
        setattr(self, kind, getattr(self, f"_{kind}"))

    async def _predict(self, inputs: list[Any]) -> list[Any]:
        self.started.set()
        try:
            await asyncio.sleep(3600)
        finally:
            self.events.append("left")
        return inputs

    async def _generate(self, prompt: str) -> AsyncIterator[str]:
        self.started.set()
        try:
            yield "a"
            await asyncio.sleep(3600)
        finally:
            self.events.append("left")

    async def cleanup(self) -> None:
        await asyncio.sleep(0)
        self.events.append("cleaned up")
        raise OwnError("in cleanup")


@pytest.mark.parametrize("kind", ["predict", "generate"])
async def test_cleanup_is_called_last(start: Start, kind: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Tidy(kind)
    loop = start(model)
    client = loop.connect()
    asked = ask(client, 0) if kind == "predict" else generate(client)
    await until(model.started.is_set)
    await loop.end()
    assert model.events == ["left", "cleaned up"]
    assert "the model's cleanup raised" in caplog.text
    if isinstance(asked, Asked):
        with pytest.raises(asyncio.CancelledError):
            await asked.output()
    else:
        assert await text(asked) == "a"
        assert asked.finish_reason == "cancelled"


async def test_a_models_own_tasks_end_with_it(start: Start) -> None:
    ended = threading.Event()

    class Model:
        async def predict(self, inputs: list[Any]) -> list[Any]:
            self.task = asyncio.ensure_future(self.work())
            await asyncio.sleep(0)
            return inputs

        async def work(self) -> None:
            try:
                await asyncio.sleep(3600)
            finally:
                ended.set()

    loop = start(Model())
    await ask(loop.connect(), 1).output()
    await loop.end()
    assert ended.is_set()


async def test_a_predict_that_will_not_be_cancelled_does_not_keep_the_loop(start: Start) -> None:
    class Model:
        entered = threading.Event()

        async def predict(self, inputs: list[Any]) -> list[Any]:
            self.entered.set()
            try:
                await asyncio.sleep(3600)
            except asyncio.CancelledError:
                return inputs
            return inputs

    model = Model()
    loop = start(model)
    asked = ask(loop.connect(), 1)
    await until(model.entered.is_set)
    await loop.end()
    await asyncio.gather(asked.output(), return_exceptions=True)  # it has an end, and may have its answer
    assert asked.stream.ended


# Health


@pytest.mark.parametrize(
    ("answer", "is_well"),
    [
        (lambda: True, True),
        (lambda: None, True),
        (lambda: False, False),
        (lambda: 1 / 0, False),
        (lambda: asyncio.sleep(0, True), True),
        (lambda: asyncio.sleep(0, False), False),
        (lambda: asyncio.sleep(3600), False),
    ],
)
async def test_health(start: Start, answer: Callable[[], Any], is_well: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(call_loop, "_HEALTH_WITHIN_S", 0.01 if not is_well else DEADLINE_S)
    model = Gated()
    model.health_check = answer  # type: ignore[attr-defined]
    loop = start(model)
    told: list[bool] = []
    loop.call_loop.check_health(told.append)
    await until(lambda: told)
    assert told == [is_well]
    assert await ask(loop.connect(), 1).output() == 1


async def test_a_model_without_a_health_check_is_well(start: Start) -> None:
    told: list[bool] = []
    start(Gated()).call_loop.check_health(told.append)
    await until(lambda: told)
    assert told == [True]


# generate


def generate(client: ChannelClient, prompt: str = "x", *, max_tokens: int = 10, **more: Any) -> TokenStream:
    request = InferenceRequest("r1", "m", prompt, max_tokens=max_tokens, timeout=DEADLINE_S, **more)
    payload = Payload(PayloadKind.TEXT, prompt.encode())
    return TokenStream(client.submit(request, payload, model="m", version="1"))


async def tokens(stream: TokenStream) -> list[StreamToken]:
    async with asyncio.timeout(DEADLINE_S):
        return [token async for token in stream]


async def text(stream: TokenStream) -> str:
    return "".join(token.token for token in await tokens(stream))


class Says:
    """Generates what it was made with."""

    def __init__(self, answer: Callable[[], Any]) -> None:
        self.answer = answer

    def generate(self, prompt: str) -> Any:
        return self.answer() if prompt != "fine" else "fine"


class Decodes(Says):
    def decode(self, ids: list[int]) -> str:
        return "".join(f"<{token_id}>" for token_id in ids)


async def async_items(*items: Any) -> AsyncIterator[Any]:
    for item in items:
        await asyncio.sleep(0)
        yield item


class CustomIterable:
    def __init__(self) -> None:
        self.closed = False

    def __iter__(self) -> Iterator[str]:
        try:
            yield from "ab"
        finally:
            self.closed = True


@pytest.mark.parametrize(
    ("answer", "given"),
    [
        (lambda: "all of it", [("all of it", -1)]),
        (lambda: "", [("", -1)]),
        (lambda: ["a", "b"], [("a", -1), ("b", -1)]),
        (lambda: iter("ab"), [("a", -1), ("b", -1)]),
        (lambda: (item for item in ["a", 7]), [("a", -1), ("<7>", 7)]),
        (lambda: async_items("a", 7), [("a", -1), ("<7>", 7)]),
        (lambda: asyncio.sleep(0, "later"), [("later", -1)]),
        (lambda: asyncio.sleep(0, ["a", "b"]), [("a", -1), ("b", -1)]),
        (lambda: asyncio.sleep(0, async_items("a")), [("a", -1)]),
        (lambda: StreamToken("x", 3), [("x", 3)]),
        (lambda: [StreamToken("x", np.int64(3))], [("x", 3)]),
        (lambda: 5, [("<5>", 5)]),
        (lambda: [0, np.int32(1), torch.tensor(2)], [("<0>", 0), ("<1>", 1), ("<2>", 2)]),
        (lambda: [2**31 - 1], [("<2147483647>", 2147483647)]),
        (lambda: np.array([5, 6]), [("<5>", 5), ("<6>", 6)]),
        (lambda: torch.tensor([5, 6]), [("<5>", 5), ("<6>", 6)]),
        (lambda: torch.tensor([5]), [("<5>", 5)]),
        (list, []),
        (lambda: iter(()), []),
        (lambda: async_items(), []),
        (lambda: CustomIterable(), [("a", -1), ("b", -1)]),
        (lambda: ["é🎉\0\n"], [("é🎉\0\n", -1)]),
    ],
)  # fmt: skip
async def test_what_generate_may_give(start: Start, answer: Callable[[], Any], given: list[tuple[str, int]]) -> None:
    stream = generate(start(Decodes(answer)).connect())
    assert [(token.token, token.token_id) for token in await tokens(stream)] == given
    assert stream.finish_reason == "stop"
    assert stream.usage.completion_tokens == len(given)


async def test_token_ids_without_a_decoder_have_no_text(start: Start) -> None:
    assert [token.token for token in await tokens(generate(start(Says(lambda: [1, 2])).connect()))] == ["", ""]


async def test_the_tokenizer_of_a_model_decodes(start: Start) -> None:
    model = Says(lambda: [1])
    model.tokenizer = Decodes(lambda: None)  # type: ignore[attr-defined]
    assert await text(generate(start(model).connect())) == "<1>"


async def test_logprobs_and_special_tokens(start: Start) -> None:
    given = [StreamToken("a", 1, -0.5, True), StreamToken("b", 2, np.float32(-2)), StreamToken("c", 3)]
    stream = generate(start(Says(lambda: given)).connect(), logprobs=True)
    assert await tokens(stream) == [StreamToken("a", 1, -0.5, True), StreamToken("b", 2, -2.0), StreamToken("c", 3)]


async def test_top_logprobs(start: Start) -> None:
    given = [StreamToken("x" * 5000, 1, -0.5, top_logprobs=[("a", np.int64(1), np.float32(-0.5)), ("b", 2, -1)])]
    first, *others = await tokens(generate(start(Says(lambda: given)).connect(), logprobs=True, top_logprobs=2))
    assert first.top_logprobs == (TopLogprob("a", 1, -0.5), TopLogprob("b", 2, -1.0))
    assert others, "a long text comes in pieces"
    assert all(token.top_logprobs is None for token in others)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda: None, "generate returned a NoneType, which is no token, text or iterator"),
        (lambda: 1.5, "generate returned a float, which is no token"),
        (lambda: b"x", "generate returned a bytes"),
        (lambda: {"text": "x"}, "generate returned a dict"),
        (lambda: [None], "generate gave a NoneType, which is no StreamToken, text or token id"),
        (lambda: [b"x"], "generate gave a bytes"),
        (lambda: [["x"]], "generate gave a list"),
        (lambda: [{"generated_text": "x"}], "generate gave a dict"),
        (lambda: [True], "generate gave a bool"),
        (lambda: [1.0], "generate gave a float"),
        (lambda: torch.tensor([[1, 2]]), "generate gave a Tensor"),
        (lambda: async_items(None), "generate gave a NoneType"),
        (lambda: [2**31], "generate gave a token whose token_id, 2147483648, is no 32-bit integer"),
        (lambda: 10**400, "generate gave a token whose token_id, an integer of 1329 bits, is no 32-bit integer"),
        (lambda: [-(2**31) - 1], "is no 32-bit integer"),
        (lambda: ["\ud800"], "whose text has half of a surrogate pair"),
        (lambda: [StreamToken(None, 1)], "generate gave a token whose text is a NoneType"),
        (lambda: [StreamToken("x", "1")], "token_id, '1', is no 32-bit integer"),
        (lambda: [StreamToken("x", None)], "token_id, None, is no 32-bit integer"),
        (lambda: [StreamToken("x", 1.0)], "token_id, 1.0, is no 32-bit integer"),
        (lambda: [StreamToken("x", 1, "high")], "logprob is 'high', not a number"),
        (lambda: [StreamToken("x", 1, top_logprobs=3)], "top_logprobs, 3, are not (text, token id, logprob) each"),
        (lambda: [StreamToken("x", 1, top_logprobs=[("x", 1)])], "are not (text, token id, logprob) each"),
        (lambda: [StreamToken("x", 1, top_logprobs=[("x", 1, None)])], "are not (text, token id, logprob) each"),
        (lambda: [StreamToken("x", 1, top_logprobs=[(b"x", 1, -1.0)])], "a token whose text is a bytes"),
        (lambda: [StreamToken("x", 1, top_logprobs=[("x", 1, -1.0)] * 21)], "a token with 21 top_logprobs; at most 20"),
    ],
)
async def test_nonsense_of_generate_is_named(start: Start, answer: Callable[[], Any], message: str) -> None:
    client = start(Decodes(answer)).connect()
    with pytest.raises(ModelFailedError) as caught:
        await tokens(generate(client))
    assert message in str(caught.value)
    assert await text(generate(client, "fine")) == "fine"


@pytest.mark.parametrize("is_async", [False, True])
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("error", [OwnError("secret"), SystemExit(1), asyncio.CancelledError()], ids=repr)
async def test_a_generate_that_raises_ends_its_own_stream(
    start: Start, is_async: bool, after: int, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    class Model:
        def generate(self, prompt: str) -> Any:
            return async_items("f") if prompt == "fine" else self.later() if is_async else self.now()

        def now(self) -> Iterator[str]:
            yield from ["a"] * after
            raise error

        async def later(self) -> AsyncIterator[str]:
            for token in self.now():
                yield token

    client = start(Model()).connect()
    stream = generate(client)
    assert [(await anext(stream)).token for _ in range(after)] == ["a"] * after
    with pytest.raises(ModelFailedError) as caught:
        await tokens(stream)
    assert str(caught.value) == f"the model raised {type(error).__name__} for request r1; the log has the traceback"
    assert "secret" not in str(caught.value)
    assert sum(bool(record.exc_info) for record in caplog.records) == 1
    assert await text(generate(client, "fine")) == "f"
    assert client.pump.open_streams == 0
    await until(lambda: client.channel.stats()["running"] == 0)


async def test_max_tokens(start: Start) -> None:
    class Model:
        def generate(self, prompt: str) -> Iterator[str]:
            while True:
                yield "a"

    client = start(Model()).connect()
    for count in (1, 7, 250):
        stream = generate(client, max_tokens=count)
        assert (await text(stream), stream.finish_reason) == ("a" * count, "length")


@pytest.mark.parametrize(
    ("pieces", "stop", "given", "reason"),
    [
        ("abcdef", "cd", ["a", "b", "", ""], "stop"),
        (["ab", "cd", "ef"], "bcde", ["a", "", ""], "stop"),
        (["xSTOPy", "z"], "STOP", ["x"], "stop"),
        (["STOP"], "STOP", [""], "stop"),
        (["a", "S", "T", "b"], "STOP", ["a", "", "", "STb"], "stop"),
        (["a", "S", "TO"], "STOP", ["a", "", "STO"], "stop"),
        (["a", "ST"], "STOP", ["a", "ST"], "stop"),
        (["é", "🎉é"], "🎉é!", ["é", "🎉é"], "stop"),
        (["a"] * 20, "never", ["a"] * 10, "length"),
        (["S"] * 20, "STOP", [""] + ["S"] * 8 + ["SS"], "length"),
        (["S", ""], "STOP", ["", "S"], "stop"),
    ],
)
@pytest.mark.parametrize("is_async", [False, True])
async def test_stop_strings_across_tokens(
    start: Start, pieces: list[str], stop: str, given: list[str], reason: str, is_async: bool
) -> None:
    client = start(Says(lambda: async_items(*pieces) if is_async else list(pieces))).connect()
    stream = generate(client, stop=[stop, "?"])
    assert [token.token for token in await tokens(stream)] == given
    assert stream.finish_reason == reason


async def test_a_stop_string_delays_only_what_may_begin_it(start: Start) -> None:
    gate = threading.Event()

    class Model:
        def generate(self, prompt: str) -> Iterator[str]:
            yield "a"
            assert gate.wait(DEADLINE_S)
            yield "b"

    stream = generate(start(Model()).connect(), stop="STOP")
    assert (await asyncio.wait_for(anext(stream), DEADLINE_S)).token == "a"
    gate.set()
    assert await text(stream) == "b"


async def test_tokens_longer_than_a_piece(start: Start) -> None:
    for long in ("a" * 100_000, "🎉" * 50_000):
        stream = generate(start(Says(lambda long=long: ["[", long, "]"])).connect(), max_tokens=3)
        assert await text(stream) == f"[{long}]"
        assert stream.finish_reason in ("length", "stop")


async def test_a_slow_reader_holds_its_generator_and_no_other(start: Start) -> None:
    given: list[int] = []

    class Model:
        def generate(self, prompt: str) -> Iterator[int]:
            for index in range(3000):
                if prompt == "slow":
                    given.append(index)
                yield index

    client = start(Model()).connect()
    slow = generate(client, "slow", max_tokens=3000)
    await until(lambda: client.channel.stats()["stalls"])
    assert len(await tokens(generate(client, "quick", max_tokens=3000))) == 3000
    assert len(given) < 3000
    assert [token.token_id for token in await tokens(slow)] == list(range(3000))


async def test_sync_generators_take_turns(start: Start) -> None:
    order: list[str] = []
    both = threading.Barrier(2)

    class Model:
        def generate(self, prompt: str) -> Iterator[str]:
            for _ in range(3):
                order.append(prompt)
                yield prompt

        async def health_check(self) -> None:
            both.wait(DEADLINE_S)  # holds the loop until both have been sent
            both.wait(DEADLINE_S)

    loop = start(Model())
    client = loop.connect()
    assert await text(generate(client, "0")) == "000"
    order.clear()
    loop.call_loop.check_health(lambda is_well: None)
    await asyncio.to_thread(both.wait, DEADLINE_S)
    streams = [generate(client, name) for name in "ab"]
    both.wait(DEADLINE_S)
    for stream in streams:
        await tokens(stream)
    assert sorted(order) == ["a"] * 3 + ["b"] * 3
    assert order[:2] in (["a", "b"], ["b", "a"])
    assert order[2:4] in (["a", "b"], ["b", "a"])


@pytest.mark.parametrize("is_async", [False, True])
async def test_a_reader_that_leaves_closes_the_generator(start: Start, is_async: bool) -> None:
    closed: list[str] = []

    class Model:
        def generate(self, prompt: str) -> Any:
            self.kept = self.later(prompt) if is_async else self.now(prompt)  # so that nothing else closes it
            return self.kept

        def now(self, prompt: str) -> Iterator[str]:
            try:
                while True:
                    yield prompt
            finally:
                closed.append(prompt)

        async def later(self, prompt: str) -> AsyncIterator[str]:
            try:
                while True:
                    yield prompt
                    if prompt == "hangs":
                        await asyncio.sleep(3600)
            finally:
                await asyncio.sleep(0)
                closed.append(prompt)

    client = start(Model()).connect()
    for prompt in ("a", "hangs"):
        stream = generate(client, prompt, max_tokens=10**6)
        assert (await anext(stream)).token == prompt
        await stream.aclose()
        await until(lambda prompt=prompt: prompt in closed)
    # Also where it ends by itself: at max_tokens and at a stop string.
    await tokens(generate(client, "b", max_tokens=3))
    await tokens(generate(client, "c", max_tokens=30, stop="ccc"))
    await until(lambda: closed == ["a", "hangs", "b", "c"])
    assert client.pump.open_streams == 0
    await until(lambda: client.channel.stats()["running"] == 0)


async def test_a_generator_that_raises_when_it_is_closed_has_given_its_tokens(start: Start) -> None:
    class Model:
        def generate(self, prompt: str) -> Iterator[str]:
            try:
                while True:
                    yield "a"
            finally:
                raise OwnError

    stream = generate(start(Model()).connect(), max_tokens=3)
    assert [(await anext(stream)).token for _ in range(3)] == ["a"] * 3
    with pytest.raises(ModelFailedError, match="raised OwnError"):
        await anext(stream)


async def test_no_more_than_max_batch_size_run_at_once(start: Start) -> None:
    running = [0, 0]
    release = threading.Event()

    class Model:
        async def generate(self, prompt: str) -> AsyncIterator[str]:
            running[0] += 1
            running[1] = max(running)
            while not release.is_set():  # noqa: ASYNC110 - the event is a thread's
                await asyncio.sleep(0.001)
            yield "a"
            running[0] -= 1

    client = start(Model(), BatchConfig(max_batch_size=3)).connect()
    streams = [generate(client, str(index)) for index in range(10)]
    await until(lambda: running[0] == 3 and client.channel.stats()["waiting"] == 7)
    assert client.channel.stats()["running"] == 3
    release.set()
    assert [await text(stream) for stream in streams] == ["a"] * 10
    assert running == [0, 3]
    await until(lambda: client.channel.stats()["running"] == 0)


async def test_a_request_that_is_given_up_as_it_is_begun_gives_its_place_back(start: Start) -> None:
    taken, left = threading.Event(), threading.Event()
    loops: list[CallLoop] = []

    class Held(BatchScheduler):
        async def get_batch(self, limit: int | None = None) -> list[Any]:
            batch = await super().get_batch(limit)
            if not taken.is_set():
                taken.set()
                assert left.wait(DEADLINE_S)
                # Before the task that is about to be made has its first turn.
                asyncio.get_running_loop().call_soon(loops[0]._take_in)
            return batch

    loop = start(Says(lambda: "a"), BatchConfig(max_batch_size=1), scheduler=Held)
    loops.append(loop.call_loop)
    client = loop.connect()
    gone = generate(client)
    await until(taken.is_set)
    await gone.aclose()
    left.set()
    assert await text(generate(client)) == "a"
    await until(lambda: client.pump.open_streams == 0 and client.channel.stats()["running"] == 0)


class Takes:
    seen: dict[str, Any] | None = None


class TakesNothing(Takes):
    def generate(self, prompt: str) -> str:
        self.seen = {}
        return prompt


class TakesSome(Takes):
    def generate(self, prompt: str, max_tokens: int, *, temperature: float = 0.1, other: int = 3) -> str:
        self.seen = {"max_tokens": max_tokens, "temperature": temperature, "other": other}
        return prompt


class TakesAll(Takes):
    def generate(self, prompt: str, **options: Any) -> str:
        self.seen = options
        return prompt


class TakesByPosition(Takes):
    def generate(self, prompt: str, max_tokens: int = 7, /) -> str:
        self.seen = {"max_tokens": max_tokens}
        return prompt


@pytest.mark.parametrize(
    ("kind", "seen"),
    [
        (TakesNothing, {}),
        (TakesSome, {"max_tokens": 9, "temperature": 0.5, "other": 3}),
        (TakesByPosition, {"max_tokens": 7}),
        (
            TakesAll,
            {
                "max_tokens": 9, "temperature": 0.5, "top_p": 0.25, "top_k": 3, "min_p": 0.125,
                "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5, "ignore_eos": True,
                "logprobs": True, "seed": 2**64 - 1, "stop": ["x", "y"], "logit_bias": {7: -1.5, 2**31 - 1: 2.0},
                "min_tokens": 2, "stop_token_ids": [5, 4], "top_logprobs": 3,
            },
        ),
    ],
)  # fmt: skip
async def test_generate_gets_what_it_takes(start: Start, kind: type[Takes], seen: dict[str, Any]) -> None:
    model = kind()
    stream = generate(
        start(model).connect(), "prompt é", max_tokens=9, temperature=0.5, top_p=0.25, top_k=3, min_p=0.125,
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, ignore_eos=True, logprobs=True,
        seed=2**64 - 1, stop=["x", "y"], logit_bias={7: -1.5, 2**31 - 1: 2.0}, min_tokens=2, stop_token_ids=[5, 4],
        top_logprobs=3,
    )  # fmt: skip
    assert await text(stream) == "prompt é"
    assert model.seen == seen


# What is a model at all


@pytest.mark.parametrize("model", [None, object(), 3, {}, type("Model", (), {"predict": 3})()])
def test_what_is_no_model(model: object) -> None:
    with pytest.raises(UnsupportedModelError, match="must return an object with step") as caught:
        CallableModel(model)
    assert type(model).__name__ in str(caught.value)


def test_a_class_is_no_model() -> None:
    with pytest.raises(UnsupportedModelError, match="must return an object; this one returned the class Gated"):
        CallableModel(Gated)


def test_generate_is_preferred() -> None:
    class Both(Gated):
        def generate(self, prompt: str) -> str:
            return prompt

    assert CallableModel(Both()).kind == "generate"
    assert CallableModel(Gated()).kind == "predict"
