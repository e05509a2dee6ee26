"""What a request says of sampling, from its body to what its reader gets, with a model that computes logits."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import pytest
import pytest_asyncio
from client import Answer, Connection, ask
from support import null_model, serving, until

from realtime_serve import InferenceRequest, InferenceServer, ModelConfig, StreamToken, TopLogprob
from realtime_serve.runners.base import StepBatch
from realtime_serve.runners.null import NullRunner, NullTokenizer

EOS = NullTokenizer.size - 1


class Letters(NullRunner):
    """The byte after the last one has the logit 4, the one after that 3, and all others 0."""

    native_model = None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(max_context=config.max_seq_length, max_batch_size=32)

    def step(self, batch: StepBatch) -> None:
        last = batch.tokens[batch.logits_at]
        logits = np.zeros((len(last), NullTokenizer.size), np.float32)
        rows = np.arange(len(last))
        logits[rows, (last + 1) % NullTokenizer.size] = 4
        logits[rows, (last + 2) % NullTokenizer.size] = 3
        batch.sample(logits)


_TOTAL = np.exp(4) + np.exp(3) + NullTokenizer.size - 2
BEST, SECOND, OTHER = (float(np.float32(value - np.log(_TOTAL))) for value in (4, 3, 0))


@pytest_asyncio.fixture
async def server() -> AsyncIterator[InferenceServer]:
    model = ModelConfig("letters", model_path="null", device="cpu", warmup_tokens=0)
    async with serving(model, null_model(), loaders={"letters": Letters}) as server:
        yield server
        await until(lambda: server.stream_manager.open_count() == 0, "the end of every stream")


async def spell(port: int, prompt: str = "a", **body: Any) -> Answer:
    asked = {"model": "letters", "prompt": prompt, "temperature": 0, "max_tokens": 5, **body}
    return await ask(port, "POST", "/infer", asked)


async def said(port: int, prompt: str = "a", **body: Any) -> tuple[str, str]:
    whole = (await spell(port, prompt, stream=False, **body)).json()
    return whole["text"], whole["finish_reason"]


async def test_a_bias_chooses_other_tokens(server: InferenceServer) -> None:
    assert await said(server.port) == ("bcdef", "length")
    assert await said(server.port, logit_bias={str(ord("c")): -100}) == ("bdefg", "length")
    assert await said(server.port, logit_bias={str(ord("z")): 4.5}) == ("zzzzz", "length")
    assert await said(server.port, logit_bias={}) == ("bcdef", "length")
    request = InferenceRequest("r", "letters", "a", max_tokens=3, temperature=0, logit_bias={ord("c"): -100})
    assert "".join(token.token for token in (await server.infer(request)).tokens) == "bde"


async def test_stop_tokens_end_it_and_are_shown(server: InferenceServer) -> None:
    assert await said(server.port, max_tokens=50, stop_token_ids=[7, ord("d")]) == ("bcd", "stop")
    assert await said(server.port, max_tokens=50, stop_token_ids=[ord("d")], ignore_eos=True) == ("bcd", "stop")


async def test_min_tokens_come_before_any_end(server: InferenceServer) -> None:
    always_end = {str(EOS): 100}
    assert await said(server.port, logit_bias=always_end) == ("", "stop")
    assert await said(server.port, logit_bias=always_end, min_tokens=3) == ("bcd", "stop")
    assert await said(server.port, logit_bias=always_end, min_tokens=5) == ("bcdef", "length")
    assert await said(server.port, max_tokens=9, stop=["c", "f"], min_tokens=3) == ("bcde", "stop")
    assert await said(server.port, max_tokens=9, stop_token_ids=[ord("c")], min_tokens=2) == ("bdefghijk", "length")


async def test_top_logprobs_in_every_form(server: InferenceServer) -> None:
    best = [
        {"token": "b", "token_id": ord("b"), "logprob": pytest.approx(BEST, abs=1e-5)},
        {"token": "c", "token_id": ord("c"), "logprob": pytest.approx(SECOND, abs=1e-5)},
        {"token": "\0", "token_id": 0, "logprob": pytest.approx(OTHER, abs=1e-5)},
    ]
    asked = {"logprobs": True, "top_logprobs": 3, "max_tokens": 1, "logit_bias": {"120": 100}}
    event = (await spell(server.port, **asked)).events()[0]
    assert event.data == {
        "token": "x", "token_id": 120, "index": 0, "logprob": pytest.approx(OTHER, abs=1e-5), "top_logprobs": best,
    }  # fmt: skip
    whole = (await spell(server.port, stream=False, **asked)).json()
    assert whole["tokens"] == [
        {"token": "x", "token_id": 120, "logprob": pytest.approx(OTHER, abs=1e-5), "top_logprobs": best}
    ]
    request = InferenceRequest("r", "letters", "a", max_tokens=2, temperature=0, logprobs=True, top_logprobs=2)
    first, second = (await server.infer(request)).tokens
    assert first.top_logprobs is not None
    assert first.top_logprobs == (
        TopLogprob("b", 98, first.logprob or 0),
        TopLogprob("c", 99, first.top_logprobs[1][2]),
    )
    assert [top.token for top in second.top_logprobs or ()] == ["c", "d"]


async def test_who_asks_for_none_gets_none(server: InferenceServer) -> None:
    for body in ({}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 0}):
        answer = await spell(server.port, **body)
        assert b"top_logprobs" not in answer.body
    # This model chooses its tokens by itself, and has no others to tell of.
    answer = await ask(server.port, "POST", "/infer", {"model": "null", "prompt": "x", "max_tokens": 2, **asked_for(3)})
    assert b"top_logprobs" not in answer.body
    assert [event.data["logprob"] for event in answer.events()[:-1]] == [0, 0]


def asked_for(count: int) -> dict[str, object]:
    return {"logprobs": True, "top_logprobs": count}


async def test_the_most_that_may_be_asked_for(server: InferenceServer) -> None:
    body: dict[str, Any] = {
        "logit_bias": {str(token): -1 for token in range(NullTokenizer.size)},
        "stop_token_ids": list(range(110, 174)),
        **asked_for(20),
    }
    answer = await spell(server.port, max_tokens=300, ignore_eos=True, min_tokens=50, **body)
    tokens = [event.data for event in answer.events()[:-1]]
    # Up to 109; from 0, the first of those that are alike, to 109 once more; and then it may end.
    assert [token["token_id"] for token in tokens] == [*range(98, 110), *range(111)]
    assert all(len(token["top_logprobs"]) == 20 for token in tokens)


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        (f'"logit_bias": {{"{NullTokenizer.size}": 1}}', "logit_bias", "vocabulary ends with"),
        ('"logit_bias": {"5": 1, "2147483647": 1}', "logit_bias", "vocabulary ends with"),
        ('"logit_bias": {"2147483648": 1}', "logit_bias", "must be at most 2147483647"),
        ('"logit_bias": {"-1": 1}', "logit_bias", "must be at least 0"),
        ('"logit_bias": {"a": 1}', "logit_bias", "must be an integer"),
        ('"logit_bias": {"1": 100.5}', "logit_bias", "must be at most 100"),
        ('"logit_bias": {"1": null}', "logit_bias", "must be a number"),
        ('"logit_bias": ' + json.dumps(dict.fromkeys(range(1025), 1)), "logit_bias", "at most 1024 token ids"),
        (f'"stop_token_ids": [1, {NullTokenizer.size}]', "stop_token_ids", "vocabulary ends with"),
        ('"stop_token_ids": [-1]', "stop_token_ids", "must be at least 0"),
        (f'"stop_token_ids": {[1] * 65}', "stop_token_ids", "at most 64 token ids"),
        ('"min_tokens": 6, "max_tokens": 5', "min_tokens", "at most max_tokens, 5; it is 6"),
        ('"min_tokens": 101', "min_tokens", "at most max_tokens, 100"),
        ('"top_logprobs": 1', "top_logprobs", "needs logprobs"),
        ('"top_logprobs": 1, "logprobs": false', "top_logprobs", "needs logprobs"),
        ('"top_logprobs": 21, "logprobs": true', "top_logprobs", "at most 20"),
    ],
)  # fmt: skip
async def test_what_is_refused(server: InferenceServer, body: str, param: str, says: str) -> None:
    async with await Connection.open(server.port) as connection:
        answer = await connection.ask("POST", "/infer", f'{{"model": "letters", "prompt": "a", {body}}}'.encode())
        error = answer.error()
        assert (answer.status, error["param"], error["code"]) == (400, param, "invalid_value")
        assert says in error["message"]
        assert (await connection.ask("POST", "/infer", {"model": "letters", "prompt": "a", "max_tokens": 1})).events()


async def test_what_a_model_that_generates_gets_and_gives() -> None:
    class Model:
        def generate(self, prompt: str, **sampling: Any) -> list[StreamToken]:
            tops = (TopLogprob("x", 1, -0.5), TopLogprob("é" * 100, 2, -1.5))
            given = {name: sampling[name] for name in ("logit_bias", "min_tokens", "stop_token_ids", "top_logprobs")}
            return [
                StreamToken(json.dumps(given), 0, -2.0, top_logprobs=tops),
                *(StreamToken("s", i) for i in range(9)),
            ]

    async with serving(
        ModelConfig("m", device="cpu", warmup_tokens=0), loaders={"m": lambda config: Model()}
    ) as server:
        body = {"logit_bias": {"7": 1.5}, "min_tokens": 3, "stop_token_ids": [1, 4], "stop": ["ss"], **asked_for(2)}
        answer = await ask(server.port, "POST", "/infer", {"prompt": "x", **body})
        *tokens, last = answer.events()
        assert json.loads(tokens[0].data["token"]) == {
            "logit_bias": {"7": 1.5}, "min_tokens": 3, "stop_token_ids": [1, 4], "top_logprobs": 2,
        }  # fmt: skip
        assert tokens[0].data["top_logprobs"] == [
            {"token": "x", "token_id": 1, "logprob": -0.5},
            {"token": "é" * 48, "token_id": 2, "logprob": -1.5},
        ]
        # The first three end nothing: then "s" and "s" complete a stop string.
        assert [token.data["token"] for token in tokens[1:]] == ["s", "s", "", ""]
        assert last.data["finish_reason"] == "stop"
        answer = await ask(server.port, "POST", "/infer", {"prompt": "x", "stop_token_ids": [2], "stop": "sx"})
        *tokens, last = answer.events()
        assert "".join(token.data["token"] for token in tokens[1:]) == "sss"
        assert (tokens[-1].data["token_id"], last.data["finish_reason"]) == (2, "stop")
