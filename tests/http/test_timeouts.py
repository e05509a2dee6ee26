"""A request's time without a token, in each of its phases, with a model that stops stepping."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
import pytest_asyncio
from client import Answer, Connection, infer, request_bytes
from gate import Gate
from metrics import value
from support import serving, until

from realtime_serve import InferenceServer

_TIMEOUT_S = 0.05
# Tokens have to come in time first, on a machine that may be busy.
_AFTER_TOKENS_S = 1.0


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


@pytest_asyncio.fixture
async def server(gate: Gate) -> AsyncIterator[InferenceServer]:
    async with serving(max_batch_size=1) as server:
        gate.close()
        yield server
        gate.open()
        await until(lambda: server.stream_manager.open_count() == 0)
        for gauge in ("rts_running_sequences", "rts_waiting_requests", "rts_kv_blocks_used"):
            await until(lambda gauge=gauge: value(server, gauge) == 0, gauge)  # type: ignore[misc]
        assert (await infer(server.port, max_tokens=3)).status == 200
        assert value(server, "rts_requests_total", model="null", outcome="length") >= 1


def check_504(server: InferenceServer, answer: Answer) -> None:
    assert (answer.status, answer.error()["code"], answer.error()["type"]) == (504, "timeout", "timeout_error")
    assert value(server, "rts_requests_total", model="null", outcome="timeout") == 1


both_forms = pytest.mark.parametrize("stream", [True, False])


@both_forms
async def test_in_the_queue(server: InferenceServer, gate: Gate, stream: bool) -> None:
    running = asyncio.ensure_future(infer(server.port, max_tokens=5))
    await until(lambda: gate.holds)
    check_504(server, await infer(server.port, timeout=_TIMEOUT_S, stream=stream))
    gate.open()
    assert len((await running).events()) == 6


@both_forms
async def test_to_the_first_token(server: InferenceServer, gate: Gate, stream: bool) -> None:
    check_504(server, await infer(server.port, timeout=_TIMEOUT_S, stream=stream))
    assert gate.holds


async def test_between_two_tokens_of_a_stream(server: InferenceServer, gate: Gate) -> None:
    async with await Connection.open(server.port) as connection:
        gate.let(2)
        body = {"model": "null", "prompt": "x", "max_tokens": 50, "timeout": _AFTER_TOKENS_S}
        connection.send(request_bytes("POST", "/infer", body))
        answer = await connection.answer()
        assert answer.status == 200
        *tokens, last = answer.events()
        assert [event.id for event in tokens] == ["0", "1"]
        assert (last.name, last.data["error"]["code"]) == ("error", "timeout")
        assert value(server, "rts_requests_total", model="null", outcome="timeout") == 1
        gate.open()
        # It was ended as it should be: the connection is as good as new.
        again = await connection.ask("POST", "/infer", {"prompt": "x", "max_tokens": 2})
        assert len(again.events()) == 3


async def test_between_two_tokens_of_one_object(server: InferenceServer, gate: Gate) -> None:
    gate.let(2)
    check_504(server, await infer(server.port, max_tokens=50, timeout=_AFTER_TOKENS_S, stream=False))
    assert len(gate.steps) == 3
