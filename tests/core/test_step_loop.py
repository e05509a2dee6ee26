"""The worker's loop over channels, with runners that misbehave."""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from support import DEADLINE_S, until

from realtime_serve._core import NativeModel
from realtime_serve.engine.client import ChannelClient, ChannelShape
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.engine.step_loop import StepLoop
from realtime_serve.errors import ModelFailedError
from realtime_serve.runners.base import Runner, StepBatch
from realtime_serve.runners.null import NullRunner
from realtime_serve.stream import TokenStream
from realtime_serve.types import InferenceRequest, StreamToken

LIMITS = EngineLimits(max_batch_size=8, max_step_tokens=64, max_queue=8, ageing_ms=1000)


class ScriptedRunner(NullRunner):
    """The null model in Python, whose steps a test can see, hold up and spoil."""

    native_model = None

    def __init__(self) -> None:
        super().__init__(max_context=4096, max_batch_size=LIMITS.max_batch_size)
        self.steps = 0
        self.spoil: Callable[[StepBatch], None] = lambda batch: None
        self.gate = threading.Event()
        self.gate.set()
        self.held = threading.Event()
        """Set by a step that is being held up."""

    def step(self, batch: StepBatch) -> None:
        while not self.gate.wait(0.002):
            self.held.set()
        self.steps += 1
        super().step(batch)
        self.spoil(batch)


class Loop:
    """A step loop in a thread of its own, and channels to it."""

    def __init__(self, runner: Runner) -> None:
        self.step_loop = StepLoop(runner, LIMITS)
        self.thread = threading.Thread(target=self.step_loop.run, daemon=True)
        self.thread.start()
        self._generations = iter(range(1, 100))

    def connect(self) -> ChannelClient:
        client = ChannelClient(ChannelShape(slots=16, buffer_tokens=100), next(self._generations), shared=False)
        self.step_loop.attach(client.channel)
        return client

    def end(self) -> None:
        self.step_loop.stop()
        self.thread.join(DEADLINE_S)
        assert not self.thread.is_alive()


class ScriptedLoop(Loop):
    """Its model's steps are Python."""

    def __init__(self) -> None:
        self.runner = ScriptedRunner()
        super().__init__(self.runner)

    def end(self) -> None:
        self.runner.gate.set()
        super().end()


@pytest.fixture
def loop() -> Iterator[ScriptedLoop]:
    loop = ScriptedLoop()
    yield loop
    loop.end()


@pytest.fixture
def native_loop() -> Iterator[Loop]:
    """Its model's steps are C++."""
    loop = Loop(NullRunner(max_context=4096, max_batch_size=LIMITS.max_batch_size))
    yield loop
    loop.end()


@pytest.fixture(params=["loop", "native_loop"])
def any_loop(request: pytest.FixtureRequest) -> Loop:
    return request.getfixturevalue(request.param)


def submit(client: ChannelClient, *, max_tokens: int = 4, prompt: int = 3, name: str = "r") -> TokenStream:
    request = InferenceRequest(name, "null", "x", max_tokens=max_tokens, ignore_eos=True, timeout=DEADLINE_S)
    return TokenStream(client.submit(request, [1] * prompt, model="null", version="1"))


async def read(stream: TokenStream) -> list[StreamToken]:
    async with asyncio.timeout(DEADLINE_S):
        return [token async for token in stream]


async def test_a_stream_runs_to_its_length(any_loop: Loop) -> None:
    stream = submit(any_loop.connect(), max_tokens=4, prompt=3)
    tokens = await read(stream)
    assert len(tokens) == 4
    assert all(token.token.startswith(" ") and token.logprob is None for token in tokens)
    assert stream.finish_reason == "length"
    assert (stream.usage.prompt_tokens, stream.usage.completion_tokens) == (3, 4)


async def test_a_step_that_raises_ends_its_sequences_and_the_loop_goes_on(loop: ScriptedLoop) -> None:
    client = loop.connect()

    def fail(batch: StepBatch) -> None:
        raise RuntimeError("out of everything")

    loop.runner.gate.clear()
    streams = [submit(client), submit(client)]
    loop.runner.spoil = fail
    loop.runner.gate.set()
    for stream in streams:
        with pytest.raises(ModelFailedError, match="failed in a step") as caught:
            await read(stream)
        assert caught.value.code == "model_failed"
        assert stream.finish_reason == "error"
    loop.runner.spoil = lambda batch: None
    assert len(await read(submit(client))) == 4
    assert client.pump.open_streams == 0


async def test_a_step_that_raises_later_leaves_the_tokens_before_it(loop: ScriptedLoop) -> None:
    client = loop.connect()

    def fail_at_third(batch: StepBatch) -> None:
        if loop.runner.steps == 3:
            raise ValueError("third")

    loop.runner.spoil = fail_at_third
    stream = submit(client, max_tokens=50)
    assert [await anext(stream), await anext(stream)]
    with pytest.raises(ModelFailedError):
        await anext(stream)
    assert len(await read(submit(client, max_tokens=5))) == 5


async def test_one_sequences_invalid_logits_are_its_own_failure(loop: ScriptedLoop) -> None:
    client = loop.connect()
    loop.runner.gate.clear()
    good, bad = submit(client, prompt=3, max_tokens=6), submit(client, prompt=20, max_tokens=6)

    def spoil(batch: StepBatch) -> None:
        batch.sampled[batch.positions[batch.logits_at] == 21] = -1  # the third token of the one

    loop.runner.spoil = spoil
    loop.runner.gate.set()
    with pytest.raises(ModelFailedError, match="not finite") as caught:
        await read(bad)
    assert caught.value.code == "invalid_logits"
    assert bad.usage.completion_tokens == 2
    assert len(await read(good)) == 6


@pytest.mark.parametrize("token", [-2, 2**31 - 1])
async def test_ids_outside_the_vocabulary_harm_nothing_else(loop: ScriptedLoop, token: int) -> None:
    client = loop.connect()
    loop.runner.spoil = lambda batch: batch.sampled.fill(token)
    with pytest.raises(ModelFailedError):
        await read(submit(client, max_tokens=3))
    loop.runner.spoil = lambda batch: None
    assert len(await read(submit(client, max_tokens=3))) == 3


async def test_a_second_channel_comes_and_goes_while_the_first_runs(any_loop: Loop) -> None:
    first, second = any_loop.connect(), any_loop.connect()
    running = submit(first, max_tokens=2000)
    await anext(running)
    there = submit(second, max_tokens=2000)
    await anext(there)
    any_loop.step_loop.detach(second.channel)
    await read(there)
    assert there.finish_reason == "cancelled"
    assert second.pump.open_streams == 0
    third = any_loop.connect()
    assert len(await read(submit(third, max_tokens=7))) == 7
    assert len(await read(running)) == 1999
    assert running.finish_reason == "length"


async def test_stop_ends_streams_as_cancelled(loop: ScriptedLoop) -> None:
    client = loop.connect()
    running = submit(client, max_tokens=4000)
    await anext(running)
    loop.runner.gate.clear()
    reading = asyncio.ensure_future(read(running))
    await until(loop.runner.held.is_set)
    late = [submit(client) for _ in range(12)]  # still in their lanes
    loop.step_loop.stop()
    loop.runner.gate.set()
    loop.thread.join(DEADLINE_S)
    assert not loop.thread.is_alive()
    await reading
    assert running.finish_reason == "cancelled"
    for stream in late:
        assert await read(stream) == []
        assert stream.finish_reason == "cancelled"
    assert client.pump.open_streams == 0


async def test_cancelling_a_waiting_sequence_frees_it(loop: ScriptedLoop) -> None:
    client = loop.connect()
    loop.runner.gate.clear()
    streams = [submit(client, name=str(index)) for index in range(12)]  # more than a step takes
    for stream in streams:
        await stream.aclose()
    loop.runner.gate.set()
    await until(lambda: client.pump.open_streams == 0)
    assert len(await read(submit(client))) == 4


async def test_logprobs_only_where_asked_for(any_loop: Loop) -> None:
    client = any_loop.connect()
    request = InferenceRequest("r", "null", "x", max_tokens=2, logprobs=True, timeout=DEADLINE_S)
    tokens = await read(TokenStream(client.submit(request, [1], model="null", version="1")))
    assert [token.logprob for token in tokens] == [0.0, 0.0]


async def test_python_and_native_null_say_the_same(loop: ScriptedLoop, native_loop: Loop) -> None:
    one, other = [await read(submit(of.connect(), max_tokens=90, prompt=3)) for of in (loop, native_loop)]
    assert [token.token for token in one] == [token.token for token in other]
    assert [token.token_id for token in one] == [token.token_id for token in other]
    assert len({token.token for token in one}) > 50


async def test_stop_ends_a_native_models_streams_as_cancelled() -> None:
    loop = Loop(NullRunner(max_context=4096, max_batch_size=LIMITS.max_batch_size, step_ms=1.0))
    client = loop.connect()
    running = submit(client, max_tokens=4000)
    await anext(running)
    loop.end()
    await read(running)
    assert running.finish_reason == "cancelled"
    assert client.pump.open_streams == 0


async def test_commands_from_before_the_loop_runs_are_followed() -> None:
    step_loop = StepLoop(NullRunner(max_context=4096, max_batch_size=LIMITS.max_batch_size), LIMITS)
    client = ChannelClient(ChannelShape(slots=16, buffer_tokens=100), 1, shared=False)
    stream = submit(client)
    step_loop.attach(client.channel)
    step_loop.stop()
    step_loop.run()
    assert await read(stream) == []
    assert stream.finish_reason == "cancelled"


async def test_a_native_models_steps_need_no_gil(native_loop: Loop) -> None:
    client = native_loop.connect()
    assert len(await read(submit(client, max_tokens=1))) == 1
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e6)  # from here on no other thread gets the GIL unless this one sleeps
    try:
        stream = submit(client, max_tokens=50)
        deadline = time.monotonic() + DEADLINE_S
        while client.channel.steps < 51 and time.monotonic() < deadline:
            pass
    finally:
        sys.setswitchinterval(interval)
    assert client.channel.steps == 51
    assert len(await read(stream)) == 50


def test_a_native_model_that_fails_is_logged_once_and_run_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step_loop = StepLoop(NullRunner(max_context=4096, max_batch_size=LIMITS.max_batch_size), LIMITS)
    runs = iter([(3, "out of everything"), None])

    class FailingCore:
        def run(self, model: NativeModel) -> tuple[int, str] | None:
            result = next(runs)
            if result is None:
                step_loop.stop()
            return result

        def interrupt(self) -> None: ...
        def close(self) -> None: ...

    monkeypatch.setattr(step_loop, "_core", FailingCore())
    step_loop.run()
    assert [record.getMessage() for record in caplog.records] == [
        "the model raised in a step of 3 sequences: they end with an error: out of everything"
    ]
    assert next(runs, "all taken") == "all taken"
