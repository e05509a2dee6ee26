"""The sampler against its definition in NumPy, over random rows and parameters."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from realtime_serve._core import Channel, EngineCore, Vocabulary
from realtime_serve._pump import Pump
from realtime_serve.engine.step_buffers import StepBuffers
from realtime_serve.runners.arrays import Float32

VOCABULARY = 40
EOS = VOCABULARY - 1
PROMPT = [3, 5, 3]
# A token is decided by rounding where the draw comes as close as this to its border.
CLOSE = 1e-5


@dataclass
class Asked:
    """A request's parameters, by the names that Pump.submit has for them."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    min_tokens: int = 0
    top_logprobs: int = 0
    logit_bias: dict[int, float] = field(default_factory=dict)
    stop_token_ids: list[int] = field(default_factory=list)


def philox(key: int, counter: int) -> int:
    """64 of Philox4x32-10's bits, as philox.hpp gives them."""
    mask = 2**32 - 1
    low, high = key & mask, key >> 32
    words = [counter & mask, counter >> 32, 0, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * words[0], 0xCD9E8D57 * words[2]
        words = [(b >> 32) ^ words[1] ^ low, b & mask, (a >> 32) ^ words[3] ^ high, a & mask]
        low, high = (low + 0x9E3779B9) & mask, (high + 0xBB67AE85) & mask
    return words[0] << 32 | words[1]


def adjusted(logits: Float32, asked: Asked, generated: list[int]) -> Float32:
    """Bias, penalties and what min_tokens rules out."""
    scores = logits.copy()
    for token, bias in asked.logit_bias.items():
        scores[token] += np.float32(bias)
    seen = sorted({*PROMPT, *generated})
    penalty = np.float32(asked.repetition_penalty)
    scores[seen] = np.where(scores[seen] > 0, scores[seen] / penalty, scores[seen] * penalty)
    counts = np.bincount(generated, minlength=VOCABULARY)
    scores -= np.float32(asked.presence_penalty) * (counts > 0)
    scores -= np.float32(asked.frequency_penalty) * counts.astype(np.float32)
    if len(generated) < asked.min_tokens:
        scores[[EOS, *asked.stop_token_ids]] = -np.inf
    return scores.astype(np.float32)


def possible(scores: Float32, asked: Asked, position: int) -> set[int]:
    """The token that is to be drawn; all whose turn rounding decides, where it is that close."""
    best = int(np.argmax(scores))
    if asked.temperature == 0:
        return {token for token in range(VOCABULARY) if scores[token] >= scores[best] - 1e-5}
    weights = np.exp((scores.astype(np.float64) - scores[best]) / asked.temperature)
    cuts_k = 0 < asked.top_k < VOCABULARY
    order = np.arange(VOCABULARY)
    borders = []
    if cuts_k or asked.top_p < 1 or asked.min_p > 0:
        order = np.lexsort((order, -scores))
    gaps = -np.diff(scores[order][np.isfinite(scores[order])])
    if cuts_k:
        order = order[: asked.top_k]
    if asked.top_p < 1:
        shares = np.cumsum(weights[order]) / weights[order].sum()
        borders.append(np.abs(shares - asked.top_p).min())
        order = order[: int(np.searchsorted(shares, asked.top_p)) + 1]
    if asked.min_p > 0:
        borders.append(np.abs(weights[order] - asked.min_p).min())
        order = order[weights[order] >= asked.min_p]
    shares = np.cumsum(weights[order]) / weights[order].sum()
    u = (philox(asked.seed, position) >> 11) * 2.0**-53
    borders.append(np.abs(shares[:-1] - u).min(initial=1))
    # Neighbours that differ, but so little that float may order them otherwise.
    if min(borders) < CLOSE or ((np.abs(gaps) < CLOSE) & (gaps != 0)).any():
        return set(range(VOCABULARY))
    return {int(order[np.searchsorted(shares, u, side="right")])}


class Bench:
    """An engine whose model is the test."""

    def __init__(self) -> None:
        tokens = [bytes((ord("0") + token,)) for token in range(VOCABULARY)]
        self.core = EngineCore(
            max_batch_size=1, max_step_tokens=16, block_size=16, num_blocks=16, cached_blocks=0, max_context=64,
            max_queue=8, ageing_ms=1000, target_step_ms=100, vocabulary=Vocabulary(tokens, [EOS], [EOS]),
        )  # fmt: skip
        self.buffers = StepBuffers(self.core, max_tokens=16, max_rows=1, max_blocks=4)
        channel = Channel.create(slots=4, ring_records=100, lane_bytes=1 << 16, generation=1, shared=False)
        self.loop = asyncio.new_event_loop()
        self.pump = Pump(channel, self.loop)
        self.core.attach(channel)

    def run(self, asked: Asked, rows: list[Float32]) -> list[tuple[Any, ...]]:
        """What the stream's reader gets, with a row of logits for each token."""
        stream = self.pump.submit(
            request_id="r", model="m", version="1", prompt_ids=PROMPT, priority=1, timeout_s=600.0, ignore_eos=True,
            logprobs=True, max_tokens=len(rows), **vars(asked),
        )  # fmt: skip
        assert stream is not None
        tokens: list[tuple[Any, ...]] = []
        for row in rows:
            assert self.core.schedule() is not None
            self.core.sample(row[None])
            self.core.commit()
            token = stream.next_token()
            assert token is not None
            tokens.append(token)
            assert stream.next_token() is None
            if stream.ended:
                assert stream.error == ""
                break
        stream.close()
        self.core.schedule()
        return tokens

    def close(self) -> None:
        self.core.close()
        self.loop.close()


_tokens = st.integers(0, VOCABULARY - 1)
_asked = st.builds(
    Asked,
    temperature=st.sampled_from([0.0, 0.5, 1.0, 1.7]),
    top_p=st.one_of(st.just(1.0), st.floats(0, 1)),
    top_k=st.one_of(st.just(0), st.integers(1, VOCABULARY + 5)),
    min_p=st.one_of(st.just(0.0), st.floats(0.001, 1)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 2)),
    presence_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    frequency_penalty=st.one_of(st.just(0.0), st.floats(-2, 2)),
    seed=st.integers(0, 2**64 - 1),
    min_tokens=st.integers(0, 6),
    top_logprobs=st.integers(0, 20),
    logit_bias=st.dictionaries(_tokens, st.floats(-100, 100), max_size=8),
    stop_token_ids=st.lists(_tokens, max_size=6),
)


@given(asked=_asked, bits=st.integers(0, 2**32 - 1), spread=st.floats(0.01, 8), ties=st.booleans())
@settings(deadline=None, max_examples=400)
def test_the_sampler_is_its_definition(asked: Asked, bits: int, spread: float, ties: bool) -> None:
    random = np.random.default_rng(bits)
    rows = [random.normal(0, spread, VOCABULARY).astype(np.float32) for _ in range(8)]
    if ties:
        rows = [np.round(row) for row in rows]
    bench = Bench()
    try:
        tokens = bench.run(asked, rows)
    finally:
        bench.close()
    generated: list[int] = []
    for position, (row, (_, token, logprob, _, top)) in enumerate(zip(rows, tokens, strict=False)):
        scores = adjusted(row, asked, generated)
        assert token in possible(scores, asked, position), (position, generated)
        generated.append(token)
        logprobs = row.astype(np.float64) - row.max()
        logprobs -= np.log(np.exp(logprobs).sum())
        assert abs(logprob - logprobs[token]) < 1e-5 * max(1, abs(logprobs[token]))
        best = np.lexsort((np.arange(VOCABULARY), -row))[: asked.top_logprobs]
        assert [entry.token_id for entry in top or ()] == best.tolist()
        for entry in top or ():
            assert abs(entry.logprob - logprobs[entry.token_id]) < 1e-5 * max(1, abs(logprobs[entry.token_id]))
    ended = [
        index for index, token in enumerate(generated) if token in asked.stop_token_ids and index >= asked.min_tokens
    ]
    assert len(generated) == (ended[0] + 1 if ended else len(rows))
