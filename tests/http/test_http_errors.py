"""Every error on every route is one object, and one request's error stays its own."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import fields

import pytest
import pytest_asyncio
from client import Connection, ask, infer, request_bytes
from support import null_model, serving, until, worker_pid

from realtime_serve import InferenceRequest, InferenceServer
from realtime_serve.engine import supervisor


@pytest_asyncio.fixture
async def server() -> AsyncIterator[InferenceServer]:
    async with serving(null_model(max_seq_length=128), max_body_bytes=4096) as server:
        yield server


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "route_not_found"),
        ("POST", "/infer/", 404, "route_not_found"),
        ("GET", "/%F0%9F%8E%89?x=1", 404, "route_not_found"),
        ("GET", "/infer", 405, "method_not_allowed"),
        ("OPTIONS", "/infer", 405, "method_not_allowed"),
        ("DELETE", "/models", 405, "method_not_allowed"),
        ("POST", "/health", 405, "method_not_allowed"),
    ],
)
async def test_routes(server: InferenceServer, method: str, path: str, status: int, code: str) -> None:
    answer = await ask(server.port, method, path)
    assert (answer.status, answer.error()["code"]) == (status, code)
    assert answer.headers["Content-Type"] == "application/json"
    assert ("Allow" in answer.headers) == (status == 405)


async def test_head(server: InferenceServer) -> None:
    assert (await ask(server.port, "HEAD", "/health")).status == 200
    assert (await ask(server.port, "HEAD", "/infer")).status == 405
    assert (await ask(server.port, "HEAD", "/nothing")).status == 404


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"", 400, "invalid_json", None),
        (b"{", 400, "invalid_json", None),
        (b"\xff\xfe", 400, "invalid_json", None),
        (b"[" * 2000, 400, "invalid_json", None),
        (b'"text"', 400, "invalid_json", None),
        ({"model": "null"}, 400, "missing_field", "prompt"),
        ({"prompt": "x", "promt": "x"}, 400, "unknown_field", "promt"),
        ({"prompt": "x", "model": "other"}, 404, "model_not_found", "model"),
        ({"prompt": "x", "max_tokens": 0}, 400, "invalid_value", "max_tokens"),
        ({"prompt": "x", "max_tokens": 128}, 400, "invalid_value", "max_tokens"),
        ({"prompt": "x" * 128}, 400, "context_length_exceeded", "prompt"),
        ({"prompt": "x" * 4096}, 413, "body_too_large", None),
    ],
)
async def test_bodies(
    server: InferenceServer, body: bytes | dict[str, object], status: int, code: str, param: str | None
) -> None:
    answer = await ask(server.port, "POST", "/infer", body)
    error = answer.error()
    assert (answer.status, error["code"], error["param"]) == (status, code, param)
    assert (await infer(server.port, max_tokens=127)).status == 200
    assert server.stream_manager.open_count() == 0


FLOATS = ("temperature", "top_p", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "timeout")
INTEGERS = ("max_tokens", "top_k", "seed", "min_tokens", "top_logprobs")
FLAGS = ("ignore_eos", "logprobs", "stream")
NO_NUMBER = ('"1"', "true", "[1]", '{"a": 1}', '""')
BEYOND = ("-1e300", "1e300", "-2147483649", "18446744073709551616", "9" * 300)
WRONG = {
    **dict.fromkeys(FLOATS, (*NO_NUMBER, *BEYOND)),
    **dict.fromkeys(INTEGERS, (*NO_NUMBER, *BEYOND, "1.5", "1.0", "1e3")),
    **dict.fromkeys(FLAGS, ("0", "1", '"true"', "[]", "{}", '""')),
    "model": ("1", "true", "[]", "{}", '""', json.dumps("x" * 300)),
    "prompt": ("1", "true", "[]", '["x"]', "{}", '""'),
    "stop": ("1", "true", "{}", '""', '[""]', "[1]", "[[]]", json.dumps(["a"] * 17), json.dumps("x" * 300)),
    "logit_bias": (
        "1",
        '"1"',
        "true",
        "[]",
        "[[1, 1]]",
        '{"a": 1}',
        '{"-1": 1}',
        '{"1": 1e300}',
        '{"1": "1"}',
        '{"1": []}',
    ),
    "stop_token_ids": ("1", '"1"', "true", "{}", "[-1]", "[1.5]", '["1"]', "[[]]", "[18446744073709551616]"),
    "priority": ("1", "true", "[]", "{}", '""', '"URGENT"', '"NORMAL "'),
    "client_id": ("1", "true", "[]", "{}", json.dumps("x" * 300)),
    "metadata": ("1", "true", "[]", '""', '"x"'),
}


async def refused(connection: Connection, body: str | bytes, path: str = "/infer") -> dict[str, object]:
    """The error of a body that is no valid request; the connection serves on."""
    answer = await connection.ask("POST", path, body.encode() if isinstance(body, str) else body)
    assert (answer.status, answer.error()["type"]) == (400, "invalid_request_error"), body[:100]
    return answer.error()


def test_the_table_has_every_field() -> None:
    assert WRONG.keys() == {field.name for field in fields(InferenceRequest)} - {"request_id"} | {"stream"}


@pytest.mark.parametrize("name", WRONG)
async def test_wrong_values(server: InferenceServer, name: str) -> None:
    async with await Connection.open(server.port) as connection:
        for value in WRONG[name]:
            prompt = "" if name == "prompt" else '"prompt": "x", '
            error = await refused(connection, f'{{{prompt}"{name}": {value}}}')
            assert (error["param"], error["code"]) == (name, "invalid_value"), value
            assert len(error["message"]) < 400
        assert len((await connection.ask("POST", "/infer", {"prompt": "x", "max_tokens": 2})).events()) == 3


@pytest.mark.parametrize("path", ["/infer", "/infer_stream"])
@pytest.mark.parametrize("name", [*FLOATS, *INTEGERS, "metadata"])
async def test_numbers_that_are_none(server: InferenceServer, name: str, path: str) -> None:
    async with await Connection.open(server.port) as connection:
        for value in ("NaN", "Infinity", "-Infinity", "1e999", "-1e999", "01", "+1", "0x10", "1.", ".5"):
            error = await refused(connection, f'{{"prompt": "x", "{name}": {value}}}', path)
            assert error["code"] == "invalid_json", value
        assert (await connection.ask("GET", "/health")).status == 200


async def test_half_of_a_surrogate_pair(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        for half in (r"\ud800", r"\udfff", r"a\ud800b", r"\ude00\ud83d"):
            for body in (
                f'{{"prompt": "{half}"}}',
                f'{{"prompt": "x", "model": "{half}"}}',
                f'{{"prompt": "x", "stop": "{half}"}}',
                f'{{"prompt": "x", "stop": ["a", "{half}"]}}',
                f'{{"prompt": "x", "client_id": "{half}"}}',
                f'{{"prompt": "x", "priority": "{half}"}}',
                f'{{"prompt": "x", "metadata": {{"{half}": 1}}}}',
                f'{{"prompt": "x", "metadata": {{"a": ["{half}"]}}}}',
                f'{{"prompt": "x", "{half}": 1}}',
            ):
                assert (await refused(connection, body))["code"] == "invalid_json"
        assert len((await connection.ask("POST", "/infer", {"prompt": "\U0001f600", "max_tokens": 1})).events()) == 2


@pytest.mark.parametrize("opening", ["[", '{"prompt":', '{"prompt": "x", "metadata": {"a":' + "["])
async def test_deep_nesting(opening: str) -> None:
    async with serving() as server, await Connection.open(server.port) as connection:
        for body in (opening * 100_000, opening + "[" * 100_000 + "]" * 100_000):
            assert (await refused(connection, body))["code"] == "invalid_json"
        assert (await connection.ask("GET", "/health")).status == 200


@pytest.mark.parametrize("body", ["[]", '"x"', "1", "null", "true", "1e400", "{} {}", "{}x", "\ufeff{}", " "])
async def test_what_is_no_object(server: InferenceServer, body: str) -> None:
    async with await Connection.open(server.port) as connection:
        assert (await refused(connection, body))["code"] == "invalid_json"
        assert (await connection.ask("GET", "/health")).status == 200


@pytest.mark.parametrize("framing", ["length", "chunks"])
async def test_a_body_too_large(server: InferenceServer, framing: str) -> None:
    async with await Connection.open(server.port) as connection:
        if framing == "length":
            connection.send(request_bytes("POST", "/infer", b" " * 100_000))
        else:
            chunks = b"3e8\r\n" + b" " * 1000 + b"\r\n"
            connection.send(request_bytes("POST", "/infer", Transfer_Encoding="chunked") + chunks * 100 + b"0\r\n\r\n")
        answer = await connection.answer()
        assert (answer.status, answer.error()["code"]) == (413, "body_too_large")
        assert "4096 bytes" in answer.error()["message"]
        # What was too much is read and dropped.
        assert (await connection.ask("GET", "/health")).status == 200


async def test_a_model_that_is_not_served(server: InferenceServer) -> None:
    for name in ("other", "NULL", "null ", "../null", "n\u00fcll", "\0", "a\nb", "x" * 256):
        answer = await infer(server.port, model=name)
        assert (answer.status, answer.error()["code"], answer.error()["param"]) == (404, "model_not_found", "model")


async def test_bytes_that_are_not_http_close_their_connection_alone(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        connection.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 20 + b"\r\n\r\n")
        assert (await connection.answer()).status == 400
        assert await connection.is_closed()
    assert (await infer(server.port, max_tokens=2)).status == 200


async def test_a_full_queue_is_429_with_the_time_to_wait() -> None:
    async with serving(null_model(step_ms=1), max_batch_size=1, max_queue=1) as server:
        async with await Connection.open(server.port) as first, await Connection.open(server.port) as second:
            for connection in (first, second):
                connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 4000}))
            await until(lambda: server.stream_manager.open_count() == 2)
            refused = await infer(server.port)
            assert (refused.status, refused.error()["code"]) == (429, "queue_full")
            assert int(refused.headers["Retry-After"]) >= 1
        await until(lambda: server.stream_manager.open_count() == 0)
        assert (await infer(server.port, max_tokens=2)).status == 200


@pytest.mark.parametrize("stream", [True, False])
async def test_silence_before_the_first_token_is_504(stream: bool) -> None:
    async with serving(null_model(), isolation="process") as server:
        os.kill(worker_pid(server), signal.SIGSTOP)
        answer = await infer(server.port, timeout=0.05, stream=stream)
        assert (answer.status, answer.error()["code"]) == (504, "timeout")
        os.kill(worker_pid(server), signal.SIGCONT)
        await until(lambda: server.stream_manager.open_count() == 0)
        assert (await infer(server.port, max_tokens=2)).status == 200


async def test_silence_after_the_first_token_is_an_error_event() -> None:
    async with (
        serving(null_model(max_seq_length=1_000_000), isolation="process") as server,
        await Connection.open(server.port) as connection,
    ):
        body = {"prompt": "x", "max_tokens": 900_000, "timeout": 0.05}
        connection.send(request_bytes("POST", "/infer", body))
        head = await connection.head()
        os.kill(worker_pid(server), signal.SIGSTOP)
        head.chunks = [chunk async for chunk in connection.body(head)]
        *tokens, last = head.events()
        assert [event.id for event in tokens] == [str(index) for index in range(len(tokens))]
        assert (last.name, last.data["error"]["code"]) == ("error", "timeout")
        os.kill(worker_pid(server), signal.SIGCONT)
        # After the error came the terminator: the connection serves on.
        assert (await connection.ask("POST", "/infer", {"prompt": "x", "max_tokens": 2})).status == 200


async def test_a_worker_that_dies_mid_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.0,))
    async with serving(null_model(max_seq_length=1_000_000), isolation="process") as server:
        connections = [await Connection.open(server.port) for _ in range(5)]
        heads = []
        for connection in connections:
            connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 900_000}))
            heads.append(await connection.head())
        os.kill(worker_pid(server), signal.SIGKILL)
        for connection, head in zip(connections, heads, strict=True):
            head.chunks = [chunk async for chunk in connection.body(head)]
            *tokens, last = head.events()
            assert [event.id for event in tokens] == [str(index) for index in range(len(tokens))]
            assert (last.name, last.data["error"]["code"]) == ("error", "worker_died")
        await until(lambda: server.model_registry.get_model("null").worker.is_ready)
        for connection in connections:
            assert (await connection.ask("POST", "/infer", {"prompt": "x", "max_tokens": 2})).status == 200
            connection.writer.close()
        models = (await ask(server.port, "GET", "/models")).json()["models"]
        assert [(model["state"], model["restarts"]) for model in models] == [("ready", 1)]


@pytest.mark.parametrize("stream", [True, False])
async def test_a_worker_that_dies_before_the_first_token(monkeypatch: pytest.MonkeyPatch, stream: bool) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (3600.0,))
    async with serving(null_model(), isolation="process") as server:
        pid = worker_pid(server)
        os.kill(pid, signal.SIGSTOP)
        asking = asyncio.ensure_future(infer(server.port, stream=stream))
        await until(lambda: server.stream_manager.open_count() == 1)
        os.kill(pid, signal.SIGKILL)
        answer = await asking
        assert (answer.status, answer.error()["code"]) == (500, "worker_died")
        refused = await infer(server.port)
        assert (refused.status, refused.error()["code"]) == (503, "model_unavailable")
        assert int(refused.headers["Retry-After"]) >= 3600
        ready = await ask(server.port, "GET", "/ready")
        assert (ready.status, ready.json()["waiting_for"]) == (503, ["null 1.0.0"])
