"""The published classes are the mechanism: each is broken, and HTTP fails."""

from __future__ import annotations

import asyncio
import json
import logging
from dataclasses import replace
from typing import Any

import callable_models
import pytest
from callables import calling, predict
from client import ask, infer
from metrics import value
from support import null_model, serving, until

from realtime_serve import (
    BatchScheduler,
    InferenceServer,
    MetricsCollector,
    MiddlewareChain,
    ModelRegistry,
    RateLimiter,
    RequestLogger,
    StreamManager,
)
from realtime_serve.errors import InvalidRequestError, ModelLoadError


class Broken(Exception):
    pass


def refuse(*args: object, **options: object) -> Any:
    raise Broken


async def test_channels_come_from_the_stream_manager(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_channel(*args: object, **options: object) -> Any:
        raise OSError("no channel for you")

    monkeypatch.setattr(StreamManager, "open_channel", no_channel)
    with pytest.raises(ModelLoadError, match="no channel for you"):
        async with serving():
            pass


async def test_a_shutdown_waits_for_the_streams_that_it_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving(graceful_shutdown_timeout=60.0) as server:
        monkeypatch.setattr(StreamManager, "open_count", lambda streams: 1)
        stopping = asyncio.ensure_future(server.stop())
        await until(lambda: server._service.is_draining)
        assert (await infer(server.port)).error()["code"] == "shutting_down"
        assert not stopping.done()
        monkeypatch.setattr(StreamManager, "open_count", lambda streams: 0)
        await stopping


async def test_batches_come_from_the_batch_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    release = BatchScheduler._release

    def the_first_alone(scheduler: BatchScheduler, most: int) -> list[Any]:
        return release(scheduler, min(most, 1))

    async with calling(echo=callable_models.echo) as server:
        assert (await predict(server.port, inputs=[1, 2, 3])).json()["outputs"] == [1, 2, 3]
        batched = value(server, "rts_batches_total", model="echo")
        assert batched < 3
        monkeypatch.setattr(BatchScheduler, "_release", the_first_alone)
        await predict(server.port, inputs=[1, 2, 3])
        assert value(server, "rts_batches_total", model="echo") == batched + 3


async def test_no_request_gets_past_the_batch_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    async def none_ever(scheduler: BatchScheduler, limit: int | None = None) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(BatchScheduler, "get_batch", none_ever)
    async with calling(echo=callable_models.echo, talker=callable_models.talker) as server:
        assert (await predict(server.port, model="echo", input=1, timeout=0.05)).status == 504
        answer = await ask(server.port, "POST", "/infer", {"model": "talker", "prompt": "x", "timeout": 0.05})
        assert answer.status == 504


async def test_models_come_from_the_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    async with calling(echo=callable_models.echo) as server:
        monkeypatch.setattr(ModelRegistry, "get_model", lambda registry, name, version=None: None)
        for answer in (await predict(server.port, model="echo", input=1), await infer(server.port, model="echo")):
            assert (answer.status, answer.error()["code"]) == (404, "model_not_found")
        monkeypatch.undo()
        assert (await predict(server.port, model="echo", input=1)).status == 200
        await server.model_registry.unload_model("echo")
        assert (await predict(server.port, model="echo", input=1)).status == 404


async def test_an_active_version_is_the_registrys(monkeypatch: pytest.MonkeyPatch) -> None:
    async with serving() as server:
        await server.model_registry.load_model(replace(null_model(), version="2"))
        assert (await infer(server.port, stream=False, max_tokens=1)).json()["version"] == "2"
        assert server.model_registry.set_active_version("null", "1.0.0")
        assert (await infer(server.port, stream=False, max_tokens=1)).json()["version"] == "1.0.0"


async def every_answer(server: InferenceServer) -> list[Any]:
    """Of both routes."""
    return [
        await ask(server.port, "POST", "/infer", {"model": "talker", "prompt": "x", "max_tokens": 2}),
        await predict(server.port, model="echo", input=1),
    ]


async def test_every_request_goes_through_the_chain(monkeypatch: pytest.MonkeyPatch) -> None:
    async def closed(chain: MiddlewareChain, request: object, handler: object) -> Any:
        raise InvalidRequestError("closed today", "model", "closed")

    async with calling(echo=callable_models.echo, talker=callable_models.talker) as server:
        assert [answer.status for answer in await every_answer(server)] == [200, 200]
        monkeypatch.setattr(MiddlewareChain, "run", closed)
        assert [answer.error()["code"] for answer in await every_answer(server)] == ["closed", "closed"]


async def test_what_is_added_to_the_chain_takes_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MiddlewareChain, "add", lambda chain, middleware: None)

    async def closed(request: object, next: object) -> Any:
        raise InvalidRequestError("closed today", "model", "closed")

    async with calling(echo=callable_models.echo, talker=callable_models.talker) as server:
        server.middleware_chain.add(closed)
        assert [answer.status for answer in await every_answer(server)] == [200, 200]
        monkeypatch.undo()
        server.middleware_chain.add(closed)
        assert [answer.error()["code"] for answer in await every_answer(server)] == ["closed", "closed"]


async def test_the_rate_limiter_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    async with calling(echo=callable_models.echo, talker=callable_models.talker) as server:
        monkeypatch.setattr(RateLimiter, "_take", lambda limiter, client_id: False)
        answers = await every_answer(server)
        assert [(answer.status, answer.error()["code"]) for answer in answers] == [(429, "rate_limited")] * 2
        monkeypatch.setattr(RateLimiter, "_take", lambda limiter, client_id: True)
        assert [answer.status for answer in await every_answer(server)] == [200, 200]
        monkeypatch.setattr(RateLimiter, "_take", refuse)
        assert [answer.status for answer in await every_answer(server)] == [500, 500]


async def test_the_metrics_are_the_collectors(monkeypatch: pytest.MonkeyPatch) -> None:
    async with calling(echo=callable_models.echo, talker=callable_models.talker) as server:
        monkeypatch.setattr(MetricsCollector, "__call__", refuse)
        assert [answer.status for answer in await every_answer(server)] == [500, 500]
        monkeypatch.undo()
        await every_answer(server)
        assert (await server.metrics_collector.get_metrics("echo"))["request_count"] == 1
        assert (
            'rts_requests_total{model="echo",outcome="stop"} 1.0'
            in (await ask(server.port, "GET", "/metrics")).body.decode()
        )
        monkeypatch.setattr(MetricsCollector, "render", lambda collector: b"broken")
        assert (await ask(server.port, "GET", "/metrics")).body == b"broken"
        monkeypatch.setattr(MetricsCollector, "get_all_metrics", refuse)
        assert (await ask(server.port, "GET", "/status")).status == 500


async def test_the_lines_are_the_request_loggers(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "realtime_serve.requests")

    def lines() -> list[str]:
        return [json.loads(r.getMessage())["model"] for r in caplog.records if r.name == "realtime_serve.requests"]

    async with calling(echo=callable_models.echo, talker=callable_models.talker) as server:
        await every_answer(server)
        assert lines() == ["talker", "echo"]
        monkeypatch.setattr(RequestLogger, "log_completion", lambda *args, **options: None)
        await every_answer(server)
        assert len(lines()) == 2
        monkeypatch.setattr(RequestLogger, "log_request", refuse)
        assert [answer.status for answer in await every_answer(server)] == [500, 500]
