"""Rate limits, request log, metrics and their order, without a server."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_serve import InferenceRequest, MetricsCollector, MiddlewareChain, RateLimiter, RequestLogger
from realtime_serve.errors import InvalidRequestError, RateLimitedError, WorkerDiedError
from realtime_serve.middleware import ClientPriorities
from realtime_serve.types import Outcome, RequestPriority, Timings, Usage


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def request(client_id: str = "someone", **changes: object) -> InferenceRequest:
    return InferenceRequest("r1", "m", "hello", client_id=client_id, **changes)  # type: ignore[arg-type]


OUTCOME = Outcome("m", "1.0.0", "length", Usage(3, 5, 1), Timings(1.5, 2.5, 40.0, 4.0))


async def answered(request: InferenceRequest) -> Outcome:
    return OUTCOME


# ClientPriorities


@pytest.mark.parametrize("asked", RequestPriority)
async def test_a_bound_client_has_its_priority_and_others_theirs(asked: RequestPriority) -> None:
    passed: list[InferenceRequest] = []

    async def handler(request: InferenceRequest) -> Outcome:
        passed.append(request)
        return OUTCOME

    bound = {"batch": RequestPriority.LOW, "vip": RequestPriority.HIGH}
    priorities = ClientPriorities(bound)
    bound.clear()
    given = [request(client, priority=asked) for client in ("batch", "vip", "someone", "Batch", "")]
    for one in given:
        assert await priorities(one, handler) is OUTCOME
    assert [one.priority for one in passed] == [RequestPriority.LOW, RequestPriority.HIGH, asked, asked, asked]
    # Callers keep what is theirs, and nothing else is changed.
    assert {one.priority for one in given} == {asked}
    assert [replace(one, priority=asked) for one in passed] == given


# RateLimiter


async def test_a_bucket_is_full_at_first_and_refills_continuously() -> None:
    clock = Clock()
    limiter = RateLimiter(tokens_per_minute=60, clock=clock)
    assert [await limiter.check_rate_limit("a") for _ in range(61)] == [True] * 60 + [False]
    assert limiter.get_client_stats("a") == {"available_tokens": 0.0, "tokens_per_minute": 60.0}
    assert limiter.retry_after("a") == 1.0
    clock.now += 0.5
    assert not await limiter.check_rate_limit("a")
    assert limiter.retry_after("a") == pytest.approx(0.5)
    clock.now += 0.5
    assert await limiter.check_rate_limit("a")
    assert not await limiter.check_rate_limit("a")
    clock.now += 3600
    assert limiter.get_client_stats("a")["available_tokens"] == 60.0


async def test_clients_have_buckets_of_their_own() -> None:
    limiter = RateLimiter(tokens_per_minute=1, clock=Clock())
    assert await limiter.check_rate_limit("a")
    assert not await limiter.check_rate_limit("a")
    assert await limiter.check_rate_limit("b")
    assert limiter.get_client_stats("never seen")["available_tokens"] == 1.0


async def test_requests_that_cost_more() -> None:
    limiter = RateLimiter(tokens_per_minute=100, tokens_per_request=40, clock=Clock())
    assert [await limiter.check_rate_limit("a") for _ in range(3)] == [True, True, False]
    assert limiter.get_client_stats("a")["available_tokens"] == 20.0
    assert limiter.retry_after("a") == pytest.approx(20 / 100 * 60)


async def test_zero_is_no_limit() -> None:
    limiter = RateLimiter(tokens_per_minute=0)
    assert all([await limiter.check_rate_limit("a") for _ in range(1000)])
    assert limiter.clients == 0


async def test_memory_is_bounded_however_many_clients() -> None:
    clock = Clock()
    limiter = RateLimiter(tokens_per_minute=60, max_clients=100, clock=clock)
    for client in range(1000):
        await limiter.check_rate_limit(str(client))
        assert limiter.clients <= 100
    # Those that are full again go as others come.
    clock.now += 2.0
    for client in range(100):
        await limiter.check_rate_limit(f"late {client}")
    assert limiter.clients == 100
    assert limiter.get_client_stats("999")["available_tokens"] == 60.0


async def test_who_is_over_the_limit_is_not_forgotten_while_there_is_room() -> None:
    clock = Clock()
    limiter = RateLimiter(tokens_per_minute=2, max_clients=10, clock=clock)
    await limiter.check_rate_limit("greedy")
    await limiter.check_rate_limit("greedy")
    for client in range(9):
        await limiter.check_rate_limit(str(client))
    assert not await limiter.check_rate_limit("greedy")


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 30)), max_size=60), st.integers(1, 20))
def test_nobody_gets_more_than_the_bucket_and_what_has_flowed_in(steps: list[tuple[str, float]], size: int) -> None:
    clock = Clock()
    limiter = RateLimiter(tokens_per_minute=size, clock=clock)
    allowed = {"a": 0, "b": 0}
    for client, pause in steps:
        clock.now += pause
        allowed[client] += asyncio.run(limiter.check_rate_limit(client))
        elapsed = clock.now - 1000.0
        assert allowed[client] <= size + elapsed * size / 60 + 1e-6


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"tokens_per_minute": -1}, "tokens_per_minute"),
        ({"tokens_per_minute": float("nan")}, "tokens_per_minute"),
        ({"tokens_per_request": 0}, "tokens_per_request"),
        ({"tokens_per_minute": 10, "tokens_per_request": 11}, "tokens_per_request"),
        ({"max_clients": 0}, "max_clients"),
    ],
)
def test_limits_that_cannot_be(arguments: dict[str, float], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        RateLimiter(**arguments)


async def test_as_middleware_it_refuses_with_the_time_to_wait() -> None:
    clock = Clock()
    limiter = RateLimiter(tokens_per_minute=6, tokens_per_request=6, clock=clock)
    assert await limiter(request("a"), answered) is OUTCOME
    clock.now += 30
    with pytest.raises(RateLimitedError, match=r"client 'a' has made more than 1 requests a minute") as refused:
        await limiter(request("a"), answered)
    assert refused.value.retry_after == pytest.approx(30)
    assert await limiter(request("b"), answered) is OUTCOME


# MiddlewareChain


async def test_the_first_is_outermost_and_each_sees_request_and_outcome() -> None:
    seen: list[object] = []

    def tracing(name: str) -> Callable[..., Awaitable[Outcome]]:
        async def middleware(request: InferenceRequest, next: Callable[..., Awaitable[Outcome]]) -> Outcome:
            seen.append((name, request.max_tokens))
            outcome = await next(replace(request, max_tokens=request.max_tokens + 1))
            seen.append((name, outcome.finish_reason))
            return replace(outcome, finish_reason=f"{outcome.finish_reason} {name}")

        return middleware

    chain = MiddlewareChain([tracing("a")])
    chain.add(tracing("b"))
    outcome = await chain.run(request(max_tokens=5), answered)
    assert seen == [("a", 5), ("b", 6), ("b", "length"), ("a", "length b")]
    assert outcome.finish_reason == "length b a"


async def test_a_refusal_goes_past_the_handler_and_out() -> None:
    async def refusing(request: InferenceRequest, next: object) -> Outcome:
        raise RateLimitedError("no")

    async def handler(request: InferenceRequest) -> Outcome:
        raise AssertionError("it was refused")

    with pytest.raises(RateLimitedError):
        await MiddlewareChain([refusing]).run(request(), handler)
    assert await MiddlewareChain().run(request(), answered) is OUTCOME


# RequestLogger


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, object]]:
    return [json.loads(record.getMessage()) for record in caplog.records if record.name == "realtime_serve.requests"]


async def test_one_line_a_request_with_its_phases(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "realtime_serve.requests")
    await RequestLogger()(request(priority=RequestPriority.HIGH), answered)
    (line,) = lines(caplog)
    assert line.pop("latency_ms") >= 0  # type: ignore[operator]
    assert line.pop("time") > 1.7e9  # type: ignore[operator]
    assert line == {
        "event": "request_completed", "request_id": "r1", "model": "m", "client_id": "someone", "priority": "HIGH",
        "status": "ok", "version": "1.0.0", "finish_reason": "length", "prompt_tokens": 3, "completion_tokens": 5,
        "cached_tokens": 1, "queue_ms": 1.5, "prefill_ms": 2.5, "decode_ms": 40.0, "stalled_ms": 4.0,
    }  # fmt: skip
    assert "\n" not in caplog.records[0].getMessage()


async def test_at_debug_the_arrival_is_logged_too(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "realtime_serve.requests")
    await RequestLogger("DEBUG")(request(), answered)
    assert [line["event"] for line in lines(caplog)] == ["request_received", "request_completed"]
    assert not any("hello" in record.getMessage() for record in caplog.records)


@pytest.mark.parametrize(
    ("raised", "status", "level"),
    [
        (WorkerDiedError("gone"), "worker_died", logging.WARNING),
        (RateLimitedError("slow down"), "rate_limited", logging.INFO),
        (ZeroDivisionError("oops"), "ZeroDivisionError", logging.WARNING),
        (asyncio.CancelledError(), "cancelled", logging.INFO),
    ],
)
async def test_how_it_failed_is_logged(
    caplog: pytest.LogCaptureFixture, raised: BaseException, status: str, level: int
) -> None:
    caplog.set_level("DEBUG", "realtime_serve.requests")

    async def failing(request: InferenceRequest) -> Outcome:
        raise raised

    with pytest.raises(type(raised)):
        await RequestLogger()(request(), failing)
    (line,) = lines(caplog)
    assert (line["status"], caplog.records[0].levelno) == (status, level)


async def test_a_client_cannot_break_or_flood_the_log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "realtime_serve.requests")
    await RequestLogger()(request('a"\n{}' * 50), answered)
    (line,) = lines(caplog)
    assert line["client_id"] == ('a"\n{}' * 50)[:128]


async def test_above_its_level_it_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "realtime_serve.requests")
    await RequestLogger("ERROR")(request(), answered)
    assert lines(caplog) == []
    with pytest.raises(ValueError, match="log_level"):
        RequestLogger("LOUD")


# MetricsCollector


async def test_what_a_program_asks() -> None:
    clock = Clock()
    collector = MetricsCollector(clock=clock)
    for latency in range(1, 101):
        await collector.record_request("m", float(latency), tokens=10)
    await collector.record_request("m", 1000.0, error="worker_died")
    clock.now += 9.999  # the first one took 1 ms, so ten seconds are over since it came
    metrics = await collector.get_metrics("m")
    assert metrics["request_count"] == 101
    assert (metrics["error_count"], metrics["error_rate"]) == (1, pytest.approx(1 / 101))
    assert metrics["total_tokens"] == 1000
    assert metrics["latency_ms"] == {
        "p50": 51.0, "p95": 96.0, "p99": 100.0, "min": 1.0, "max": 1000.0, "mean": pytest.approx(6050 / 101),
    }  # fmt: skip
    assert metrics["throughput_tokens_per_sec"] == pytest.approx(100.0)
    assert await collector.get_all_metrics() == {"m": metrics}
    assert (await collector.get_metrics("unknown"))["request_count"] == 0


async def test_percentiles_are_of_the_window_and_counts_of_all() -> None:
    collector = MetricsCollector(window_size=10, clock=Clock())
    for latency in (*[1000.0] * 50, *[1.0] * 10):
        await collector.record_request("m", latency)
    metrics = await collector.get_metrics("m")
    assert (metrics["request_count"], metrics["latency_ms"]["max"]) == (60, 1.0)
    with pytest.raises(ValueError, match="window_size"):
        MetricsCollector(window_size=0)


def samples(collector: MetricsCollector) -> dict[str, float]:
    """Without the created timestamps and the buckets."""
    text = collector.render().decode()
    values = (line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    return {name: float(value) for name, value in values if "_created" not in name and "_bucket" not in name}


async def test_what_prometheus_reads() -> None:
    collector = MetricsCollector(clock=Clock())
    await collector(request(), answered)
    values = samples(collector)
    assert values['rts_requests_total{model="m",outcome="length"}'] == 1
    assert values['rts_prompt_tokens_total{model="m"}'] == 3
    assert values['rts_cached_prompt_tokens_total{model="m"}'] == 1
    assert values['rts_generated_tokens_total{model="m"}'] == 5
    assert values['rts_queue_seconds_sum{model="m"}'] == pytest.approx(0.0015)
    assert values['rts_first_token_seconds_sum{model="m"}'] == pytest.approx(0.004)
    assert values['rts_request_seconds_count{model="m"}'] == 1


async def test_no_client_can_make_a_label() -> None:
    collector = MetricsCollector(is_served=lambda name: name == "m")

    async def failing(request: InferenceRequest) -> Outcome:
        raise ZeroDivisionError

    for name in ("m", "x" * 100, "y"):
        with pytest.raises(ZeroDivisionError):
            await collector(replace(request(), model=name), failing)
    values = samples(collector)
    assert values['rts_requests_total{model="m",outcome="internal"}'] == 1
    assert values['rts_requests_total{model="",outcome="internal"}'] == 2
    assert not any("xxx" in name for name in values)


async def test_a_client_that_left_is_no_error() -> None:
    collector = MetricsCollector(is_served=lambda name: True)

    async def left(request: InferenceRequest) -> Outcome:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await collector(request(), left)
    metrics = await collector.get_metrics("m")
    assert (metrics["request_count"], metrics["error_count"]) == (1, 0)


async def test_unread_requests_and_failed_ones_are_counted_together() -> None:
    async def refuses(request: InferenceRequest) -> Outcome:
        raise InvalidRequestError("no")

    collector = MetricsCollector()
    collector.count_unread(InvalidRequestError("not JSON"))
    with pytest.raises(InvalidRequestError):
        await collector(replace(request(), model=None), refuses)
    text = collector.render().decode()
    assert text.count('rts_requests_total{model="",outcome="invalid_request"}') == 1
    assert 'rts_requests_total{model="",outcome="invalid_request"} 2.0' in text
