"""POST /infer of models that generate by themselves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
from collections.abc import AsyncIterator, Iterator
from typing import Any

import callable_models
import pytest
import pytest_asyncio
from callable_models import WORDS
from callables import calling
from client import Answer, Connection, ask, request_bytes
from metrics import value
from support import serving, until, worker_pid

from realtime_serve import BatchConfig, InferenceRequest, InferenceServer, ModelConfig, StreamToken
from realtime_serve.engine import supervisor

both_isolations = pytest.mark.parametrize("isolation", ["process", "thread"])


async def talk(port: int, prompt: str = "x", **body: Any) -> Answer:
    return await ask(port, "POST", "/infer", {"model": "talker", "prompt": prompt, **body})


@pytest_asyncio.fixture
async def server() -> AsyncIterator[InferenceServer]:
    loaders = {"talker": callable_models.talker, "later": callable_models.async_talker}
    async with calling(**loaders) as server:
        yield server
        await until(lambda: server.stream_manager.open_count() == 0, "the end of every stream")


def said(count: int) -> list[str]:
    return [WORDS[index % len(WORDS)] for index in range(count)]


@both_isolations
async def test_a_stream_of_words(isolation: str) -> None:
    async with calling(settings={"isolation": isolation}, talker=callable_models.talker) as server:
        answer = await talk(server.port, max_tokens=7)
        *tokens, last = answer.events()
        assert [event.data["token"] for event in tokens] == said(7)
        assert [event.id for event in tokens] == [str(index) for index in range(7)]
        assert {event.data["token_id"] for event in tokens} == {-1}
        assert (last.name, last.data["finish_reason"], last.data["model"]) == ("done", "length", "talker")
        assert last.data["usage"] == {
            "prompt_tokens": 0, "completion_tokens": 7, "cached_tokens": 0, "total_tokens": 7,
        }  # fmt: skip
        assert all(value >= 0 for value in last.data["timings"].values())


async def test_one_object(server: InferenceServer) -> None:
    whole = (await talk(server.port, "end 3", stream=False)).json()
    assert (whole["text"], whole["finish_reason"]) == ("".join(said(3)), "stop")
    assert whole["tokens"] == [{"token": word, "token_id": -1, "logprob": None} for word in said(3)]


async def test_an_async_model(server: InferenceServer) -> None:
    body = {"model": "later", "prompt": "x", "max_tokens": 3, "logprobs": True}
    *tokens, last = (await ask(server.port, "POST", "/infer", body)).events()
    assert [(event.data["token"], event.data["token_id"], event.data["logprob"]) for event in tokens] == [
        (word, index, -0.5) for index, word in enumerate(said(3))
    ]
    assert last.data["finish_reason"] == "length"


async def test_an_empty_answer_is_an_answer(server: InferenceServer) -> None:
    (done,) = (await talk(server.port, "end 0")).events()
    assert (done.name, done.data["finish_reason"]) == ("done", "stop")
    whole = (await talk(server.port, "end 0", stream=False)).json()
    assert (whole["text"], whole["tokens"], whole["finish_reason"]) == ("", [], "stop")


async def test_stop_strings(server: InferenceServer) -> None:
    *tokens, last = (await talk(server.port, stop="o three")).events()
    assert "".join(event.data["token"] for event in tokens) == " one tw"
    assert last.data["finish_reason"] == "stop"
    # What may have been the beginning of one comes out at the end.
    *tokens, last = (await talk(server.port, "end 2", stop="wo more")).events()
    assert "".join(event.data["token"] for event in tokens) == " one two"


@pytest.mark.parametrize("logprob", [float("-inf"), float("nan"), -1e300])
async def test_logprobs_that_json_has_no_number_for(logprob: float) -> None:
    class Model:
        def generate(self, prompt: str) -> StreamToken:
            return StreamToken("x", 1, logprob)

    async with calling(talker=lambda config: Model()) as server:
        for stream in (True, False):
            answer = await talk(server.port, logprobs=True, stream=stream)
            text = answer.body.decode()
            for line in [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")] or [
                text
            ]:
                json.loads(line, parse_constant=pytest.fail)


async def test_long_tokens_and_many(server: InferenceServer) -> None:
    answers = await asyncio.gather(*(talk(server.port, max_tokens=n) for n in range(1, 80, 3)))
    for count, answer in zip(range(1, 80, 3), answers, strict=True):
        assert [event.data["token"] for event in answer.events()[:-1]] == said(count)


@pytest.mark.parametrize(
    ("body", "status", "param"),
    [
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": "x", "max_tokens": 2049}, 400, "max_tokens"),
        ({"prompt": "x", "input": 3}, 400, "input"),
        ({"prompt": "x", "temperature": 3}, 400, "temperature"),
    ],
)
async def test_what_is_refused(server: InferenceServer, body: dict[str, object], status: int, param: str) -> None:
    answer = await ask(server.port, "POST", "/infer", {"model": "talker", **body})
    assert (answer.status, answer.error()["param"]) == (status, param)
    assert "2048" in answer.error()["message"] or param != "max_tokens"


def check_raised(error: dict[str, Any], request_id: str | None = None) -> None:
    assert (error["type"], error["code"]) == ("internal_error", "model_failed")
    head, _, tail = error["message"].partition(" for request ")
    given, _, tail = tail.partition(";")
    assert (head, tail) == ("the model raised LookupError", " the log has the traceback")
    assert request_id in (None, given)
    assert len(given) == 32


@both_isolations
async def test_a_model_that_raises(isolation: str, caplog: pytest.LogCaptureFixture) -> None:
    async with calling(settings={"isolation": isolation}, talker=callable_models.talker) as server:
        for stream in (True, False):
            answer = await talk(server.port, "raise 0", stream=stream)
            assert answer.status == 500
            check_raised(answer.error())
        answer = await talk(server.port, "raise 2")
        assert answer.status == 200
        *tokens, last = answer.events()
        assert [event.data["token"] for event in tokens] == said(2)
        assert last.name == "error"
        check_raised(last.data["error"], answer.headers["X-Request-Id"])
        assert b"secret" not in answer.body
        answer = await talk(server.port, "raise 2", stream=False)
        assert answer.status == 500
        check_raised(answer.error())
        answer = await talk(server.port, "nonsense 0")
        assert answer.error()["message"] == "generate gave a object, which is no StreamToken, text or token id"
        assert len((await talk(server.port, max_tokens=3)).events()) == 4
        assert value(server, "rts_requests_total", model="talker", outcome="model_failed") == 5
        if isolation == "thread":
            assert caplog.text.count("LookupError: secret of the model") == 4


async def test_a_connection_survives_its_models_errors(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        for prompt in ("raise 0", "raise 3", "end 2", "nonsense 1", "x"):
            answer = await connection.ask("POST", "/infer", {"model": "talker", "prompt": prompt, "max_tokens": 5})
            assert answer.status in (200, 500)
        assert len(answer.events()) == 6


@pytest.mark.parametrize("after", [0, 2])
async def test_a_worker_that_hangs_is_started_anew(after: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.0,))
    settings = {"isolation": "process", "request_timeout": 0.5}
    async with calling(settings=settings, talker=callable_models.talker) as server:
        answer = await talk(server.port, f"hang {after}")
        if after:
            assert [event.name for event in answer.events()] == ["message"] * after + ["error"]
            assert answer.events()[-1].data["error"]["code"] == "timeout"
        else:
            assert (answer.status, answer.error()["code"]) == (504, "timeout")
        worker = server.model_registry.get_model("talker").worker
        await until(lambda: worker.restarts == 1 and worker.is_ready)
        assert len((await talk(server.port, max_tokens=3, timeout=30)).events()) == 4


async def test_an_async_model_that_hangs_holds_nobody_up() -> None:
    class Model:
        async def generate(self, prompt: str) -> AsyncIterator[str]:
            yield "a"
            if prompt == "hang":
                await asyncio.sleep(3600)

    async with calling(BatchConfig(max_batch_size=1), talker=lambda config: Model()) as server:
        hanging = asyncio.ensure_future(talk(server.port, "hang", timeout=1.0))
        await until(lambda: value(server, "rts_running_sequences", model="talker") == 1)
        assert (await talk(server.port, "x")).events()[-1].data["finish_reason"] == "stop"  # in the place it left
        assert (await hanging).events()[-1].data["error"]["code"] == "timeout"


async def test_a_worker_that_dies_mid_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.0,))
    async with calling(settings={"isolation": "process"}, talker=callable_models.talker) as server:
        answer = await talk(server.port, "die 2")
        events = answer.events()
        assert (events[-1].name, events[-1].data["error"]["code"]) == ("error", "worker_died")
        assert [event.data["token"] for event in events[:-1]] == said(2)
        worker = server.model_registry.get_model("talker").worker
        await until(lambda: worker.restarts == 1 and worker.is_ready)
        os.kill(worker_pid(server, "talker"), signal.SIGKILL)
        await until(lambda: worker.restarts == 2 and worker.is_ready)
        assert len((await talk(server.port, max_tokens=3)).events()) == 4


@both_isolations
async def test_a_client_that_leaves_closes_the_generator(isolation: str) -> None:
    async with calling(settings={"isolation": isolation}, talker=callable_models.talker) as server:
        async with await Connection.open(server.port) as connection:
            connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 2000}))
            await connection.head()
        await until(lambda: server.stream_manager.open_count() == 0)
        await until(lambda: value(server, "rts_running_sequences", model="talker") == 0)
        assert len((await talk(server.port, max_tokens=3)).events()) == 4


async def test_calls_in_process(server: InferenceServer) -> None:
    response = await server.infer(InferenceRequest("r", "talker", "x", max_tokens=3))
    assert [token.token for token in response.tokens] == said(3)
    stream = server.stream(InferenceRequest("r", "talker", "x", max_tokens=2000))
    assert (await anext(stream)).token == said(1)[0]
    await stream.aclose()


@both_isolations
async def test_the_warm_up_goes_through_generate(isolation: str) -> None:
    model = ModelConfig("talker", device="cpu", warmup_tokens=8)
    async with serving(model, loaders={"talker": callable_models.talker}, isolation=isolation) as server:
        assert value(server, "rts_batches_total", model="talker") == 1
        assert value(server, "rts_requests_total", model="talker") == 0
    with pytest.raises(
        RuntimeError, match="'talker' failed its warm-up: the model raised TypeError for request warm-up"
    ):
        async with serving(model, loaders={"talker": lambda config: NeedsMore()}):
            pass


class NeedsMore:
    def generate(self, prompt: str, max_new_tokens: int) -> Iterator[str]:
        return iter("x")


async def test_a_model_that_outlives_its_cancellation_writes_into_nobody_elses_answer() -> None:
    class Stubborn:
        def __init__(self) -> None:
            self.other_runs = asyncio.Event()

        async def generate(self, prompt: str) -> AsyncIterator[str]:
            if prompt == "other":
                self.other_runs.set()
                for _ in range(50):
                    yield "own "
                    await asyncio.sleep(0)
                return
            yield "begun "
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
            await self.other_runs.wait()
            for _ in range(5):
                yield "SECRET "

    async with calling(model=lambda config: Stubborn()) as server:
        left = server.stream(InferenceRequest("left", "model", "stubborn", max_tokens=100))
        assert (await anext(left)).token == "begun "
        await left.aclose()
        await until(lambda: server.stream_manager.open_count() == 0)
        tokens = server.stream(InferenceRequest("other", "model", "other", max_tokens=100))
        assert [token.token async for token in tokens] == ["own "] * 50
