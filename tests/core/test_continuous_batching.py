"""The engine on a real model under random loads: chunks, prefixes in common, preemptions, cancels."""

from __future__ import annotations

import asyncio
import os
import random
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from support import DEADLINE_S, until
from tiny_models import TinyTokenizer, save_tiny_llama

from realtime_serve.engine.client import ChannelClient, ChannelShape
from realtime_serve.engine.step_loop import EngineLimits, StepLoop
from realtime_serve.runners.torch_lm import TorchLM
from realtime_serve.stream import TokenStream
from realtime_serve.types import InferenceRequest, RequestPriority

LIMITS = EngineLimits(max_batch_size=8, max_step_tokens=48, max_queue=256, ageing_ms=50)
CONTEXT = 256
# Where the two best logits are closer than this, either may come first: their rounding depends on the batch's shape.
TOO_CLOSE = 1e-4
ROUNDS = 20 if os.environ.get("RTS_SOAK", "0") not in ("", "0") else 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose KV block takes 64 KiB, so that a megabyte is one sequence's context."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_llama(folder, num_key_value_heads=4, head_dim=64)
    return folder


class Engine:
    """A model behind the scheduler in a thread of its own, and a channel to it."""

    def __init__(self, folder: Path, *, kv_cache_mb: int, prefix_cache_mb: int) -> None:
        self.runner = TorchLM.load(
            folder,
            tokenizer=TinyTokenizer(),
            device="cpu",
            dtype="float32",
            max_context=CONTEXT,
            max_batch_size=LIMITS.max_batch_size,
            kv_cache_mb=kv_cache_mb,
            prefix_cache_mb=prefix_cache_mb,
        )
        self._step_loop = StepLoop(self.runner, LIMITS)
        self._thread = threading.Thread(target=self._step_loop.run, daemon=True)
        self._thread.start()
        self.client = ChannelClient(ChannelShape(slots=128, buffer_tokens=100), 1, shared=False)
        self._step_loop.attach(self.client.channel)

    def submit(
        self, prompt: list[int], max_tokens: int, priority: RequestPriority = RequestPriority.NORMAL
    ) -> TokenStream:
        request = InferenceRequest(
            "r",
            "tiny",
            "x",
            max_tokens=max_tokens,
            temperature=0.0,
            priority=priority,
            ignore_eos=True,
            timeout=DEADLINE_S,
        )
        return TokenStream(self.client.submit(request, prompt, model="tiny", version="1"))

    def stop(self) -> None:
        self._step_loop.stop()
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive()


@dataclass
class Request:
    prompt: list[int]
    max_tokens: int
    priority: RequestPriority
    leaves_after: int | None
    """Tokens, where the client does not stay to the end."""


def a_mix(rng: random.Random, count: int) -> list[Request]:
    bases = [[rng.randrange(2, 128) for _ in range(CONTEXT)] for _ in range(3)]
    mix = []
    for _ in range(count):
        shared = rng.choice(bases)[: rng.randrange(1, 120)]
        own = [rng.randrange(2, 128) for _ in range(rng.randrange(0, 20))]
        prompt = shared + own
        mix.append(
            Request(
                prompt,
                rng.randrange(1, 110),
                rng.choice(list(RequestPriority)),
                rng.randrange(1, 20) if rng.random() < 0.2 else None,
            )
        )
    return mix


async def answer(engine: Engine, request: Request) -> tuple[list[int], TokenStream]:
    stream = engine.submit(request.prompt, request.max_tokens, request.priority)
    tokens: list[int] = []
    async with asyncio.timeout(DEADLINE_S):
        async for token in stream:
            tokens.append(token.token_id)
            if len(tokens) == request.leaves_after:
                await stream.aclose()
                break
    return tokens, stream


def check_as_alone(model: torch.nn.Module, prompt: list[int], tokens: list[int]) -> None:
    """Every token is the model's own best one behind what came before it."""
    if not tokens:
        return
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + tokens[:-1]])).logits[0, len(prompt) - 1 :]
    best, at = logits.topk(2)
    for step, token in enumerate(tokens):
        if token != at[step, 0]:
            assert token == at[step, 1]
            assert best[step, 0] - best[step, 1] < TOO_CLOSE, f"token {step} of {len(tokens)}"


@pytest.fixture(scope="module")
def reference(folder: Path) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM

    model: torch.nn.Module = AutoModelForCausalLM.from_pretrained(folder).eval()
    return model


@pytest.mark.parametrize(
    ("kv_cache_mb", "prefix_cache_mb"),
    [(8, 0), (8, 8), (2, 0), (2, 2), (1, 1)],
    ids=["enough", "prefixes", "a quarter of the blocks", "a quarter, with prefixes", "one context's blocks"],
)
@pytest.mark.parametrize("seed", range(ROUNDS))
async def test_every_answer_is_as_if_it_were_alone(
    folder: Path, reference: torch.nn.Module, kv_cache_mb: int, prefix_cache_mb: int, seed: int
) -> None:
    rng = random.Random(seed)
    mix = a_mix(rng, 24)
    engine = Engine(folder, kv_cache_mb=kv_cache_mb, prefix_cache_mb=prefix_cache_mb)
    try:
        assert engine.runner.num_blocks == kv_cache_mb * 16
        asked = [asyncio.ensure_future(answer(engine, request)) for request in mix]
        answers = await asyncio.gather(*asked)
        for request, (tokens, stream) in zip(mix, answers, strict=True):
            if request.leaves_after is None or request.leaves_after >= request.max_tokens:
                assert len(tokens) == request.max_tokens
                assert stream.finish_reason == "length"
            check_as_alone(reference, request.prompt, tokens)
        await until(lambda: engine.client.channel.stats()["running"] == 0)
        await until(lambda: engine.client.channel.stats()["kv_blocks_used"] == 0)
        cached = sum(stream.usage.cached_tokens for _, stream in answers)
        assert (cached > 0) == (prefix_cache_mb > 0)
        assert all(stream.usage.cached_tokens < len(r.prompt) for r, (_, stream) in zip(mix, answers, strict=True))
    finally:
        engine.stop()


@pytest.mark.parametrize("prefix_cache_mb", [0, 2])
async def test_blocks_for_a_quarter_of_the_load(folder: Path, reference: torch.nn.Module, prefix_cache_mb: int) -> None:
    """Eight that begin with two blocks each and grow to fourteen, and 32 blocks."""
    engine = Engine(folder, kv_cache_mb=2, prefix_cache_mb=prefix_cache_mb)
    try:
        prompts = [[2 + own] * 20 for own in range(8)]
        streams = [engine.submit(prompt, 200) for prompt in prompts]
        async with asyncio.timeout(DEADLINE_S):
            for prompt, stream in zip(prompts, streams, strict=True):
                tokens = [token.token_id async for token in stream]
                assert (len(tokens), stream.finish_reason) == (200, "length")
                check_as_alone(reference, prompt, tokens)
        await until(lambda: engine.client.channel.stats()["kv_blocks_used"] == 0)
        assert engine.client.channel.stats()["preemptions"] > 0
    finally:
        engine.stop()


async def test_a_prefix_in_common_is_computed_once(folder: Path) -> None:
    engine = Engine(folder, kv_cache_mb=8, prefix_cache_mb=8)
    try:
        prompt = list(range(2, 102))
        async with asyncio.timeout(DEADLINE_S):
            first = engine.submit(prompt, 1)
            assert [token async for token in first]
            assert first.usage.cached_tokens == 0
            for own in (103, 104):
                stream = engine.submit([*prompt, own], 1)
                assert [token async for token in stream]
                assert stream.usage.cached_tokens == 96
    finally:
        engine.stop()


async def test_requests_of_one_prefix_that_come_together(folder: Path) -> None:
    """None of them has computed it when the others are admitted."""
    engine = Engine(folder, kv_cache_mb=8, prefix_cache_mb=8)
    try:
        prompt = list(range(2, 102))
        streams = [engine.submit([*prompt, 103 + i], 2) for i in range(8)]
        async with asyncio.timeout(DEADLINE_S):
            for stream in streams:
                assert len([token async for token in stream]) == 2
        assert sorted(stream.usage.cached_tokens for stream in streams) == [0] + 7 * [96]
    finally:
        engine.stop()
