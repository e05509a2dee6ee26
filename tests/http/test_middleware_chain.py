"""The middleware chain around real requests, over HTTP and in process."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace

import pytest
from client import Connection, ask, infer
from support import null_model, serving, until

from realtime_serve import InferenceRequest
from realtime_serve.errors import InvalidRequestError
from realtime_serve.middleware import Handler
from realtime_serve.types import Outcome


async def test_a_rate_is_held_for_each_client() -> None:
    async with serving(rate_limit_per_minute=2) as server:
        for _ in range(2):
            assert (await infer(server.port, max_tokens=1)).status == 200
        refused = await infer(server.port, max_tokens=1)
        assert (refused.status, refused.error()["code"]) == (429, "rate_limited")
        assert "127.0.0.1" in refused.error()["message"]
        assert int(refused.headers["Retry-After"]) == 30
        assert (await infer(server.port, max_tokens=1, client_id="another")).status == 200
        assert server.rate_limiter.get_client_stats("another")["available_tokens"] == pytest.approx(1, abs=0.1)


async def test_zero_is_no_rate_limit() -> None:
    async with serving(rate_limit_per_minute=0) as server:
        answers = [await infer(server.port, max_tokens=1) for _ in range(20)]
        assert {answer.status for answer in answers} == {200}


async def test_ones_own_middleware_changes_refuses_and_sees_the_end() -> None:
    outcomes: list[Outcome] = []

    async def house_rules(request: InferenceRequest, next: Handler) -> Outcome:
        if "forbidden" in request.prompt:
            raise InvalidRequestError("prompt breaks the house rules", "prompt", "house_rules")
        outcome = await next(replace(request, max_tokens=min(request.max_tokens, 3)))
        outcomes.append(outcome)
        return outcome

    async with serving() as server:
        server.middleware_chain.add(house_rules)
        refused = await infer(server.port, prompt="a forbidden word")
        assert (refused.status, refused.error()["code"], refused.error()["param"]) == (400, "house_rules", "prompt")
        events = (await infer(server.port, max_tokens=50)).events()
        assert events[-1].data["usage"]["completion_tokens"] == 3
        answer = (await infer(server.port, max_tokens=50, stream=False)).json()
        assert len(answer["tokens"]) == 3
        assert [(o.model, o.finish_reason, o.usage.completion_tokens) for o in outcomes] == [("null", "length", 3)] * 2


async def test_middleware_that_raises_is_a_500_and_no_more() -> None:
    async def broken(request: InferenceRequest, next: Handler) -> Outcome:
        if request.client_id == "unlucky":
            raise ZeroDivisionError("secret detail")
        return await next(request)

    async with serving() as server:
        server.middleware_chain.add(broken)
        failed = await infer(server.port, client_id="unlucky")
        assert (failed.status, failed.error()["code"]) == (500, "internal_error")
        assert "secret" not in failed.error()["message"]
        assert (await infer(server.port, max_tokens=1)).status == 200


async def test_middleware_that_raises_behind_the_stream_leaves_it_whole(caplog: pytest.LogCaptureFixture) -> None:
    async def broken(request: InferenceRequest, next: Handler) -> Outcome:
        await next(request)
        raise ZeroDivisionError

    async with serving() as server:
        server.middleware_chain.add(broken)
        async with await Connection.open(server.port) as connection:
            for _ in range(2):  # no second answer stands between them
                answer = await connection.ask("POST", "/infer", {"prompt": "x", "max_tokens": 3})
                assert (answer.status, len(answer.events())) == (200, 4)
            failed = await connection.ask("POST", "/infer", {"prompt": "x", "max_tokens": 3, "stream": False})
            assert failed.status == 500
    assert sum("failed behind its answer's beginning" in record.getMessage() for record in caplog.records) == 2


async def test_requests_are_logged_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "realtime_serve.requests")
    async with serving() as server:
        await infer(server.port, max_tokens=4)
        await infer(server.port, model="missing")
        lines = [json.loads(r.getMessage()) for r in caplog.records if r.name == "realtime_serve.requests"]
        assert [(line["status"], line["model"]) for line in lines] == [("ok", "null"), ("model_not_found", "missing")]
        assert lines[0]["completion_tokens"] == 4
        assert lines[0]["client_id"] == "127.0.0.1"

        metrics = await ask(server.port, "GET", "/metrics")
        assert metrics.headers["Content-Type"].startswith("text/plain")
        text = metrics.body.decode()
        assert 'rts_requests_total{model="null",outcome="length"} 1.0' in text
        assert 'rts_requests_total{model="",outcome="not_found"} 1.0' in text
        assert "missing" not in text
        assert (await server.metrics_collector.get_metrics("null"))["total_tokens"] == 4

        status = (await ask(server.port, "GET", "/status")).json()
        assert status["ready"] is True
        assert status["requests"]["null"]["request_count"] == 1
        assert [model["name"] for model in status["models"]] == ["null"]


async def test_metrics_can_be_off() -> None:
    async with serving(enable_metrics=False) as server:
        assert (await ask(server.port, "GET", "/metrics")).status == 404


async def test_a_client_that_leaves_is_counted_as_cancelled() -> None:
    async with serving(null_model(step_ms=5)) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        body = json.dumps({"model": "null", "prompt": "x", "max_tokens": 4000}).encode()
        writer.write(b"POST /infer HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        await until(lambda: server.stream_manager.open_count() == 1)
        writer.close()
        await until(lambda: b'outcome="cancelled"' in server.metrics_collector.render())
        await until(lambda: server.stream_manager.open_count() == 0)


async def test_calls_in_process_pass_the_chain_too() -> None:
    seen: list[str] = []

    async def tracing(request: InferenceRequest, next: Handler) -> Outcome:
        if request.client_id == "refused":
            raise InvalidRequestError("not you", "client_id")
        try:
            outcome = await next(request)
        except asyncio.CancelledError:
            seen.append("cancelled")
            raise
        seen.append(f"{outcome.finish_reason} {outcome.usage.completion_tokens}")
        return outcome

    async with serving() as server:
        server.middleware_chain.add(tracing)
        response = await server.infer(InferenceRequest("1", "null", "x", max_tokens=3))
        assert len(response.tokens) == 3
        assert len([token async for token in server.stream(InferenceRequest("2", "null", "x", max_tokens=4))]) == 4
        left = server.stream(InferenceRequest("3", "null", "x", max_tokens=4000))
        await anext(left)
        await left.aclose()
        assert seen == ["length 3", "length 4", "cancelled"]
        for call in (server.infer, lambda request: anext(server.stream(request))):
            with pytest.raises(InvalidRequestError, match="not you"):
                await call(InferenceRequest("4", "null", "x", client_id="refused"))
        await until(lambda: server.stream_manager.open_count() == 0)
