"""Who goes first where requests wait, over HTTP: with a model that takes one request a step, when it is told to."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Iterator

import pytest
from client import infer
from gate import Gate
from support import null_model, serving, until

from realtime_serve import InferenceRequest, InferenceServer
from realtime_serve.types import RequestPriority

_NEVER_AGES = 2**31 - 1


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


class Line:
    """Requests that come one after the other while the only place is taken. Each has one token: it takes one step."""

    def __init__(self, server: InferenceServer, gate: Gate) -> None:
        self._server = server
        self._gate = gate
        self._answers: list[asyncio.Future[object]] = []

    async def begin(self) -> Line:
        """Takes the only place, with the prompt `0`."""
        self._gate.close()
        await self.come("0")
        await until(lambda: self._gate.holds)
        return self

    async def come(self, prompt: str, **body: object) -> asyncio.Future[object]:
        open_before = self._server.stream_manager.open_count()
        answer = asyncio.ensure_future(infer(self._server.port, prompt=prompt, max_tokens=1, **body))
        self._answers.append(answer)
        await until(lambda: self._server.stream_manager.open_count() == open_before + 1)
        return answer

    async def served(self) -> list[str]:
        """The prompts in the order in which they were served."""
        self._gate.open()
        assert {answer.status for answer in await asyncio.gather(*self._answers)} == {200}
        return self._gate.prompts


async def test_high_overtakes_normal_and_normal_low(gate: Gate) -> None:
    async with serving(max_batch_size=1, ageing_ms=_NEVER_AGES) as server:
        line = await Line(server, gate).begin()
        for prompt, priority in [
            ("l", "LOW"),
            ("n", None),
            ("h", "HIGH"),
            ("L", "low"),
            ("N", "NORMAL"),
            ("H", "HIGH"),
        ]:
            await line.come(prompt, priority=priority)
        assert await line.served() == ["0", "h", "H", "n", "N", "l", "L"]


async def test_a_clients_own_priority_wins_over_what_its_requests_say(
    gate: Gate, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "realtime_serve.requests")
    bound = {"batch": "LOW", "vip": "HIGH", "127.0.0.1": "LOW"}
    async with serving(max_batch_size=1, ageing_ms=_NEVER_AGES, client_priorities=bound) as server:
        line = await Line(server, gate).begin()
        await line.come("b", client_id="batch", priority="HIGH")
        await line.come("a", priority="HIGH")  # by its address
        await line.come("n", client_id="someone")
        await line.come("v", client_id="vip", priority="LOW")
        await line.come("h", client_id="someone", priority="HIGH")
        assert await line.served() == ["0", "v", "h", "n", "b", "a"]
        # Calls without HTTP are bound as well, and keep their request as it is.
        request = InferenceRequest("r", "null", "x", max_tokens=1, client_id="batch", priority=RequestPriority.HIGH)
        await server.infer(request)
        assert request.priority is RequestPriority.HIGH
    logged = [json.loads(r.getMessage()) for r in caplog.records if r.name == "realtime_serve.requests"]
    assert {line["priority"] for line in logged if line["client_id"] == "batch"} == {"LOW"}
    assert {line["priority"] for line in logged if line["client_id"] == "vip"} == {"HIGH"}


async def test_a_low_one_under_a_flood_of_high_ones_waits_for_ageing_ms_and_one_step(gate: Gate) -> None:
    ageing_ms = 100
    async with serving(null_model(), max_batch_size=1, ageing_ms=ageing_ms) as server:
        line = await Line(server, gate).begin()
        low = await line.come("l", priority="LOW")
        aged_at = time.monotonic() + ageing_ms / 1e3
        while "l" not in gate.prompts:
            while server.stream_manager.open_count() < 4:
                await line.come("h", priority="HIGH")
            seen = len(gate.steps)
            gate.let()
            await until(lambda seen=seen: len(gate.steps) > seen)  # type: ignore[misc]
            # A step is scheduled before it comes to the gate: of those that come later than that, one may have been
            # scheduled before. The next is the low one's.
            late = [step.prompt for step in gate.steps if step.came_at > aged_at]
            assert "l" in late[:2] or len(late) < 2, f"passed over: {late}"
        assert not low.done()
        prompts = await line.served()
        # High ones that had come before its step waited longer than it.
        assert prompts[prompts.index("l") + 1 :].count("h") >= 2
