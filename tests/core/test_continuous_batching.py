"""The engine on real models under random loads: chunks, prefixes in common, preemptions, cancels, stops."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from step_driver import StepDriver
from support import DEADLINE_S, until
from tiny_models import TinyTokenizer, save_tiny_model

from realtime_serve.engine.client import ChannelClient, ChannelShape
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.engine.step_loop import StepLoop
from realtime_serve.runners.arrays import Float32
from realtime_serve.runners.base import Runner
from realtime_serve.runners.cpu_lm import CpuLM
from realtime_serve.runners.cpu_lm.families import FAMILIES as NATIVE_FAMILIES
from realtime_serve.runners.torch_lm import TorchLM
from realtime_serve.runners.torch_lm.families import FAMILIES
from realtime_serve.stream import TokenStream
from realtime_serve.types import InferenceRequest, RequestPriority

LIMITS = EngineLimits(max_batch_size=8, max_step_tokens=48, max_queue=256, ageing_ms=50)
CONTEXT = 256
BLOCKS = CONTEXT // 16
"""Of one sequence; eight can run at once."""
ROUNDS = 20 if os.environ.get("RTS_SOAK", "0") not in ("", "0") else 1


@dataclass
class Model:
    """A tiny model and who says what it is to say."""

    load: Callable[[], Runner]
    logits: Callable[[list[int]], Float32]
    """Of each position of a text that is computed alone, [tokens, vocabulary]."""
    too_close: float
    """Where the two best are closer than this, either may come first."""


def torch_model(folder: Path, family: str) -> Model:
    alone = save_tiny_model(folder, family)

    @torch.inference_mode()
    def logits(tokens: list[int]) -> Float32:
        return np.asarray(alone(torch.tensor([tokens])).logits[0])

    def load() -> Runner:
        return TorchLM.load(
            folder,
            tokenizer=TinyTokenizer(),
            device="cpu",
            dtype="float32",
            max_context=CONTEXT,
            max_batch_size=LIMITS.max_batch_size,
        )

    return Model(load, logits, too_close=1e-4)  # rounding depends on the batch's shape


def native_model(folder: Path, family: str) -> Model:
    save_tiny_model(folder, family)

    def load(max_batch_size: int = LIMITS.max_batch_size) -> CpuLM:
        return CpuLM.load(
            folder,
            tokenizer=TinyTokenizer(),
            max_context=CONTEXT,
            max_batch_size=max_batch_size,
            max_step_tokens=LIMITS.max_step_tokens,
            threads=2,
        )

    alone = load(max_batch_size=CONTEXT)

    def logits(tokens: list[int]) -> Float32:
        driver = StepDriver(alone, max_batch_size=1)
        sequence = driver.add(tokens)
        driver.step([(sequence, len(tokens))])
        return np.stack(sequence.logits)

    return Model(load, logits, too_close=0.0)


ENGINES = {"torch": torch_model, "native": native_model}
# By engine and family; the native one's fallback is the torch engine.
CASES = [("torch", family) for family in FAMILIES] + [("native", family) for family in NATIVE_FAMILIES]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Model]:
    made: dict[tuple[str, str], Model] = {}

    def model(engine: str, family: str = "llama") -> Model:
        if (engine, family) not in made:
            made[engine, family] = ENGINES[engine](tmp_path_factory.mktemp(f"{engine}-{family}"), family)
        return made[engine, family]

    return model


class Engine:
    """A model behind the scheduler in a thread of its own, and a channel to it."""

    def __init__(self, model: Model, *, blocks: int, cached_blocks: int) -> None:
        runner = model.load()
        assert blocks <= runner.num_blocks
        runner.num_blocks, runner.cached_blocks = blocks, cached_blocks
        self._step_loop = StepLoop(runner, LIMITS)
        self._thread = threading.Thread(target=self._step_loop.run, daemon=True)
        self._thread.start()
        self.client = ChannelClient(ChannelShape(slots=128, buffer_tokens=100), 1, shared=False)
        self._step_loop.attach(self.client.channel)

    def submit(self, request: Request) -> TokenStream:
        wanted = InferenceRequest(
            "r",
            "tiny",
            "x",
            max_tokens=request.max_tokens,
            temperature=0.0,
            priority=request.priority,
            stop=request.stop,
            ignore_eos=True,
            timeout=DEADLINE_S,
        )
        return TokenStream(self.client.submit(wanted, request.prompt, model="tiny", version="1"))

    def stop(self) -> None:
        self._step_loop.stop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


@contextlib.asynccontextmanager
async def running(model: Model, *, blocks: int, cached_blocks: int) -> AsyncIterator[Engine]:
    """No block is in use behind it."""
    engine = Engine(model, blocks=blocks, cached_blocks=cached_blocks)
    try:
        yield engine
        await until(lambda: engine.client.channel.stats()["running"] == 0)
        await until(lambda: engine.client.channel.stats()["kv_blocks_used"] == 0)
    finally:
        engine.stop()


@dataclass
class Request:
    prompt: list[int]
    max_tokens: int
    priority: RequestPriority = RequestPriority.NORMAL
    stop: tuple[str, ...] = ()
    leaves_after: int | None = None
    """Tokens, where the client does not stay to the end."""


@dataclass
class Answer:
    tokens: list[int]
    text: str
    stream: TokenStream


async def ask(engine: Engine, request: Request) -> Answer:
    stream = engine.submit(request)
    answer = Answer([], "", stream)
    async with asyncio.timeout(DEADLINE_S):
        async for token in stream:
            answer.tokens.append(token.token_id)
            answer.text += token.token
            if len(answer.tokens) == request.leaves_after:
                await stream.aclose()
                break
    return answer


def a_mix(rng: random.Random, count: int) -> list[Request]:
    bases = [[rng.randrange(2, 128) for _ in range(CONTEXT)] for _ in range(3)]
    mix = []
    for _ in range(count):
        prompt = rng.choice(bases)[: rng.randrange(1, 120)]
        prompt += [rng.randrange(2, 128) for _ in range(rng.randrange(0, 20))]
        mix.append(
            Request(
                prompt,
                rng.randrange(1, 110),
                rng.choice(list(RequestPriority)),
                (str(rng.randrange(10, 100)),) if rng.random() < 0.3 else (),
                rng.randrange(1, 20) if rng.random() < 0.2 else None,
            )
        )
    return mix


def check_as_alone(model: Model, request: Request, answer: Answer) -> None:
    """Every token is the model's own best one behind what came before it, and it ends where it is to end."""
    prompt, tokens = request.prompt, answer.tokens
    logits = model.logits(prompt + tokens[:-1])[len(prompt) - 1 :]
    for step, token in enumerate(tokens):
        assert logits[step].max() - logits[step, token] <= model.too_close, f"token {step} of {len(tokens)}"
    spelled = ["" if token in TinyTokenizer.special_tokens else str(token) for token in tokens]
    printed = "".join(spelled)
    ends = [end for stop in request.stop if (end := printed.find(stop)) >= 0]
    if answer.stream.finish_reason == "stop":
        assert answer.text == printed[: min(ends)]
        assert not any(stop in "".join(spelled[:-1]) for stop in request.stop), "it went on behind its stop"
    elif request.leaves_after is None or request.leaves_after > len(tokens):
        assert (len(tokens), answer.stream.finish_reason, ends) == (request.max_tokens, "length", [])
        assert answer.text == printed


async def check_a_mix(model: Model, seed: int, count: int, *, blocks: int, cached_blocks: int) -> None:
    mix = a_mix(random.Random(seed), count)
    async with running(model, blocks=blocks, cached_blocks=cached_blocks) as engine:
        answers = await asyncio.gather(*(ask(engine, request) for request in mix))
    for request, answer in zip(mix, answers, strict=True):
        check_as_alone(model, request, answer)
        assert answer.stream.usage.cached_tokens < len(request.prompt)
    cached = sum(answer.stream.usage.cached_tokens for answer in answers)
    assert (cached > 0) == (cached_blocks > 0)


@pytest.mark.parametrize("cached", [False, True], ids=["no prefixes", "prefixes"])
@pytest.mark.parametrize("blocks", [8 * BLOCKS, 2 * BLOCKS, BLOCKS], ids=["enough", "a quarter", "one context's"])
@pytest.mark.parametrize("seed", range(ROUNDS))
@pytest.mark.parametrize("engine", ENGINES)
async def test_every_answer_is_as_if_it_were_alone(
    tiny: Callable[..., Model], engine: str, blocks: int, cached: bool, seed: int
) -> None:
    await check_a_mix(tiny(engine), seed, 24, blocks=blocks, cached_blocks=blocks if cached else 0)


@pytest.mark.parametrize(("engine", "family"), [case for case in CASES if case[1] != "llama"])
async def test_so_it_is_with_every_family(tiny: Callable[..., Model], engine: str, family: str) -> None:
    await check_a_mix(tiny(engine, family), 1, 10, blocks=2 * BLOCKS, cached_blocks=2 * BLOCKS)


@pytest.mark.parametrize("cached_blocks", [0, 2 * BLOCKS])
@pytest.mark.parametrize("engine", ENGINES)
async def test_blocks_for_a_quarter_of_the_load(tiny: Callable[..., Model], engine: str, cached_blocks: int) -> None:
    """Eight that begin with two blocks each and grow to fourteen, and 32 blocks."""
    model = tiny(engine)
    requests = [Request([2 + own] * 20, 200) for own in range(8)]
    async with running(model, blocks=2 * BLOCKS, cached_blocks=cached_blocks) as engine:
        answers = await asyncio.gather(*(ask(engine, request) for request in requests))
        assert engine.client.channel.stats()["preemptions"] > 0
    for request, answer in zip(requests, answers, strict=True):
        check_as_alone(model, request, answer)


@pytest.mark.parametrize("engine", ENGINES)
async def test_a_prefix_in_common_is_computed_once(tiny: Callable[..., Model], engine: str) -> None:
    prompt = list(range(2, 102))
    async with running(tiny(engine), blocks=8 * BLOCKS, cached_blocks=8 * BLOCKS) as engine:
        first = await ask(engine, Request(prompt, 1))
        assert first.stream.usage.cached_tokens == 0
        for own in (103, 104):
            answer = await ask(engine, Request([*prompt, own], 1))
            assert answer.stream.usage.cached_tokens == 96


@pytest.mark.parametrize("engine", ENGINES)
async def test_requests_of_one_prefix_that_come_together(tiny: Callable[..., Model], engine: str) -> None:
    """None of them has computed it when the others are admitted."""
    prompt = list(range(2, 102))
    async with running(tiny(engine), blocks=8 * BLOCKS, cached_blocks=8 * BLOCKS) as engine:
        answers = await asyncio.gather(*(ask(engine, Request([*prompt, 103 + own], 2)) for own in range(8)))
    assert sorted(answer.stream.usage.cached_tokens for answer in answers) == [0] + 7 * [96]
