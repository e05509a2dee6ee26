"""Every refusal says when to come back, and is counted."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

import pytest
from client import Answer, Connection, ask, infer, request_bytes
from gate import Gate
from metrics import value
from support import DEADLINE_S, null_model, serving, until

from realtime_serve import errors
from realtime_serve.engine.drain_rate import DrainRate
from realtime_serve.errors import ServeError, ShuttingDownError
from realtime_serve.http.responses import error_response
from realtime_serve.runners.base import StepBatch
from realtime_serve.runners.null import NullRunner

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServeError)]


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


def retry_after(answer: Answer) -> int:
    """The seconds, in the form that the header has to have."""
    text = answer.headers["Retry-After"]
    assert text.isascii()
    assert text.isdecimal()
    assert int(text) >= 1
    return int(text)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.status in (429, 503)])
def test_whatever_refuses_for_a_while_says_for_how_long(kind: type[ServeError]) -> None:
    error = kind("not now")
    for seconds, header in ((error.retry_after, None), (0.0, "1"), (1.0, "1"), (1.1, "2"), (3600.0, "3600")):
        error.retry_after = seconds
        response = error_response(error)
        assert response.status == kind.status
        assert response.headers["Retry-After"].isdecimal()
        assert header in (None, response.headers["Retry-After"])


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.status not in (429, 503)])
def test_whatever_is_wrong_for_good_does_not(kind: type[ServeError]) -> None:
    assert "Retry-After" not in error_response(kind("never")).headers


@pytest.mark.parametrize("kind", KINDS)
def test_only_a_shutdown_ends_the_connection(kind: type[ServeError]) -> None:
    assert (error_response(kind("no")).closes) == (kind is ShuttingDownError)


class SlowClock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_a_full_queue_says_when_it_will_have_drained(gate: Gate) -> None:
    async with serving(max_batch_size=1, max_queue=3) as server:
        client = server.model_registry.get_model("null").worker.client
        clock = SlowClock()
        client._rate = DrainRate(clock)
        open_streams = server.stream_manager.open_count
        gate.close()

        async def come() -> asyncio.Future[Answer]:
            before = open_streams()
            answer = asyncio.ensure_future(infer(server.port, max_tokens=1))
            await until(lambda: open_streams() == before + 1)
            return answer

        first = [await come() for _ in range(4)]
        await until(lambda: gate.holds)
        assert retry_after(await infer(server.port)) == 1
        clock.now = 5.0  # nothing has ended yet: 3 that wait, 5 s each
        assert retry_after(await infer(server.port)) == 14
        clock.now = 1000.0
        assert retry_after(await infer(server.port)) == 60
        assert value(server, "rts_requests_total", model="null", outcome="overloaded") == 3

        client._rate = DrainRate(clock)
        client._rate.observe(0)
        for _ in first:
            client._rate.took_one()
        gate.let(2)  # two end in 2 s, and two more take their places
        await until(lambda: open_streams() == 2 and gate.holds)
        clock.now += 2.0
        second = [await come() for _ in range(2)]
        refused = await infer(server.port)
        assert (refused.status, retry_after(refused)) == (429, 3)
        gate.open()
        assert {answer.status for answer in await asyncio.gather(*first, *second)} == {200}


async def test_a_shutdown_says_how_long_it_may_take(gate: Gate) -> None:
    for grace, least, most in ((86_400.0, 60, 60), (45.0, 2, 45)):
        async with serving(graceful_shutdown_timeout=grace) as server:
            async with await Connection.open(server.port) as early, await Connection.open(server.port) as idle:
                assert (await idle.ask("GET", "/ready")).status == 200
                gate.close()
                early.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 2}))
                await until(lambda: gate.holds)
                stopping = asyncio.ensure_future(server.stop())
                await until(lambda server=server: server._service.is_draining)  # type: ignore[misc]
                ready = await idle.ask("GET", "/ready")
                assert ready.status == 503
                refused = await idle.ask("POST", "/infer", {"prompt": "x"})
                assert (refused.status, refused.error()["code"]) == (503, "shutting_down")
                for answer in (ready, refused):
                    assert least <= retry_after(answer) <= most
                assert refused.headers["Connection"] == "close"
                assert await idle.is_closed()
                assert value(server, "rts_requests_total", outcome="shutting_down") == 1
                gate.open()
                assert len((await early.answer()).events()) == 3
            await stopping


async def test_a_load_is_taken_to_last_as_long_again(gate: Gate, monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(null_model("other")) as server:
        gate.close()  # the new model's warm-up does not get on
        server.register_model(null_model())
        registry = server.model_registry
        await until(lambda: gate.holds)
        (since,) = registry._loading_since.values()
        for earlier_s, least, most in ((0.0, 1, DEADLINE_S), (20.0, 20, 60), (1000.0, 60, 60)):
            registry._loading_since = dict.fromkeys(registry._loading_since, since - earlier_s)
            for answer in (await infer(server.port), await ask(server.port, "GET", "/ready")):
                assert answer.status == 503
                assert least <= retry_after(answer) <= most
        gate.open()
        await until(lambda: not registry.loading())
        assert registry._loading_since == {}
        assert (await ask(server.port, "GET", "/ready")).headers.get("Retry-After") is None


async def test_a_stalled_model_may_step_on_at_any_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        monkeypatch.setattr(server._service, "stalled_models", lambda: ["null 1.0.0"])
        health = await ask(server.port, "GET", "/health")
        assert (health.status, health.json()) == (503, {"status": "stalled", "stalled": ["null 1.0.0"]})
        assert retry_after(health) == 1


# What is counted


@pytest.mark.parametrize(
    ("body", "model", "outcome"),
    [
        ({"model": "null", "prompt": "x", "max_tokens": 2}, "null", "length"),
        ({"model": "null", "prompt": "x", "max_tokens": 50, "stop": " of"}, "null", "stop"),
        ({"model": "null", "prompt": "x", "max_tokens": 4096}, "null", "invalid_request"),
        ({"model": "null", "prompt": ""}, "", "invalid_request"),
        ({"model": "evil {label}", "prompt": "x"}, "", "not_found"),
        (b"{", "", "invalid_request"),
        (b"x" * 5000, "", "too_large"),
    ],
)
async def test_each_way_to_end_is_counted_once(body: bytes | dict[str, object], model: str, outcome: str) -> None:
    async with serving(max_body_bytes=4096) as server:
        await ask(server.port, "POST", "/infer", body)
        assert value(server, "rts_requests_total") == 1
        assert value(server, "rts_requests_total", model=model, outcome=outcome) == 1


async def test_rejections_by_rate_and_connections_are_counted() -> None:
    async with serving(rate_limit_per_minute=1, max_connections=3) as server:
        assert (await infer(server.port, max_tokens=1)).status == 200
        refused = await infer(server.port)
        assert (refused.status, retry_after(refused)) == (429, 60)
        assert value(server, "rts_requests_total", model="null", outcome="rate_limited") == 1
        async with contextlib.AsyncExitStack() as stack:
            await until(lambda: server.connections == 0)
            for _ in range(3):
                held = await stack.enter_async_context(await Connection.open(server.port))
                assert (await held.ask("GET", "/health")).status == 200
            for count in (1, 2):
                async with await Connection.open(server.port) as surplus:
                    answer = await surplus.answer()
                    assert (answer.status, retry_after(answer)) == (503, 1)
                assert value(server, "rts_refused_connections_total") == count
            assert b"rts_refused_connections_total 2.0" in (await held.ask("GET", "/metrics")).body


async def test_a_slow_sender_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime_serve.http.body._WITHIN_S", 0.05)
    async with serving() as server, await Connection.open(server.port) as slow:
        slow.send(b"POST /infer HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        assert (await slow.answer()).status == 408
        assert value(server, "rts_requests_total", model="", outcome="request_timeout") == 1


async def test_a_models_failure_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NullRunner, "native_model", None)
    async with serving() as server:
        monkeypatch.setattr(NullRunner, "step", _fail)
        failed = await infer(server.port, stream=False)
        assert (failed.status, failed.error()["code"]) == (500, "model_failed")
        monkeypatch.undo()
        assert value(server, "rts_requests_total", model="null", outcome="model_failed") == 1
        monkeypatch.setattr(NullRunner, "step", lambda runner, batch: batch.sampled.fill(-1))
        failed = await infer(server.port, stream=False)
        assert (failed.status, failed.error()["code"]) == (500, "invalid_logits")
        assert value(server, "rts_requests_total", model="null", outcome="model_failed") == 2


def _fail(runner: NullRunner, batch: StepBatch) -> None:
    raise RuntimeError("out of everything")


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_is_counted_and_its_sequence_freed(gate: Gate, stream: bool) -> None:
    async with serving() as server:
        gate.close()
        async with await Connection.open(server.port) as connection:
            connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 4000, "stream": stream}))
            await until(lambda: gate.holds)
            assert value(server, "rts_requests_total") == 0
        await until(lambda: value(server, "rts_requests_total", outcome="cancelled") == 1)
        gate.open()
        await until(lambda: value(server, "rts_running_sequences") == value(server, "rts_waiting_requests") == 0)
        assert value(server, "rts_requests_total") == 1
