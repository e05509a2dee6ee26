"""POST /infer and /infer_stream, byte by byte, against a server that listens."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import aiohttp
import pytest
import pytest_asyncio
from client import Connection, Event, ask, infer, parse_events, request_bytes
from support import DEADLINE_S, null_model, serving, until

from realtime_serve import InferenceServer


@pytest_asyncio.fixture
async def server() -> AsyncIterator[InferenceServer]:
    async with serving(null_model(max_seq_length=100_000)) as server:
        yield server
        await until(lambda: server.stream_manager.open_count() == 0, "the end of every stream")


def check_events(events: list[Event], count: int, **done: object) -> list[str]:
    """Whether that is a whole stream of `count` tokens; their texts."""
    *tokens, last = events
    assert [event.name for event in tokens] == ["message"] * count
    assert [event.id for event in tokens] == [str(index) for index in range(count)]
    for index, event in enumerate(tokens):
        assert set(event.data) == {"token", "token_id", "index"}
        assert event.data["index"] == index
        assert isinstance(event.data["token_id"], int)
    assert last.name == "done"
    assert last.data["usage"]["completion_tokens"] == count
    assert {key: last.data[key] for key in done} == done
    return [event.data["token"] for event in tokens]


async def test_the_stream_is_exactly_what_is_documented(server: InferenceServer) -> None:
    answer = await infer(server.port, max_tokens=3)
    assert (answer.version, answer.status) == ("HTTP/1.1", 200)
    assert answer.headers["Content-Type"] == "text/event-stream"
    assert answer.headers["Cache-Control"] == "no-cache"
    assert answer.headers["Transfer-Encoding"] == "chunked"
    assert "Connection" not in answer.headers
    lines = answer.body.decode().split("\n")
    assert lines[:9] == [
        "id: 0", 'data: {"token":" the","token_id":256,"index":0}', "",
        "id: 1", 'data: {"token":" of","token_id":257,"index":1}', "",
        "id: 2", 'data: {"token":" and","token_id":258,"index":2}', "",
    ]  # fmt: skip
    assert lines[9] == "event: done"
    assert lines[11:] == ["", ""]
    done = json.loads(lines[10].removeprefix("data: "))
    assert done["request_id"] == answer.headers["X-Request-Id"]
    assert (done["model"], done["version"], done["finish_reason"]) == ("null", "1.0.0", "length")
    assert done["usage"] == {"prompt_tokens": 1, "completion_tokens": 3, "cached_tokens": 0, "total_tokens": 4}
    assert set(done["timings"]) == {"queue_ms", "prefill_ms", "decode_ms", "stalled_ms"}
    assert all(value >= 0 for value in done["timings"].values())


@pytest.mark.parametrize("path", ["/infer", "/infer_stream"])
async def test_a_long_stream_arrives_whole(server: InferenceServer, path: str) -> None:
    answer = await ask(server.port, "POST", path, {"model": "null", "prompt": "hello", "max_tokens": 5000})
    check_events(answer.events(), 5000, finish_reason="length")


async def test_a_standard_client_reads_it(server: InferenceServer) -> None:
    body = {"model": "null", "prompt": "x", "max_tokens": 300}
    async with (
        aiohttp.ClientSession() as session,
        session.post(f"http://127.0.0.1:{server.port}/infer", json=body) as response,
    ):
        lines = [line async for line in response.content]
    check_events(parse_events(b"".join(lines)), 300)


@pytest.mark.parametrize("how", ["body", "accept", "both"])
async def test_one_object(server: InferenceServer, how: str) -> None:
    body = {"model": "null", "prompt": "x", "max_tokens": 3, **({} if how == "accept" else {"stream": False})}
    headers = {} if how == "body" else {"Accept": "application/json"}
    answer = await ask(server.port, "POST", "/infer", body, **headers)
    assert (answer.status, answer.headers["Content-Type"]) == (200, "application/json")
    whole = answer.json()
    assert list(whole) == [
        "request_id", "model", "version", "tokens", "text", "finish_reason", "usage", "timings",
    ]  # fmt: skip
    assert whole["request_id"] == answer.headers["X-Request-Id"]
    assert whole["tokens"] == [
        {"token": " the", "token_id": 256, "logprob": None},
        {"token": " of", "token_id": 257, "logprob": None},
        {"token": " and", "token_id": 258, "logprob": None},
    ]
    assert whole["text"] == " the of and"
    assert whole["finish_reason"] == "length"


async def test_what_asks_for_a_stream_gets_one(server: InferenceServer) -> None:
    body = {"model": "null", "prompt": "x", "max_tokens": 2}
    for path, more, headers in [
        ("/infer", {"stream": True}, {"Accept": "application/json"}),
        ("/infer", {"stream": None}, {"Accept": "*/*"}),
        ("/infer_stream", {"stream": False}, {"Accept": "application/json"}),
    ]:
        answer = await ask(server.port, "POST", path, {**body, **more}, **headers)
        check_events(answer.events(), 2)


async def test_stop_strings_end_it_before_them(server: InferenceServer) -> None:
    answer = await infer(server.port, max_tokens=50, stop=["never", "and to i"])
    check = answer.events()
    assert "".join(event.data["token"] for event in check[:-1]) == " the of "
    assert check[-1].data["finish_reason"] == "stop"
    whole = await infer(server.port, max_tokens=50, stop="and to i", stream=False)
    assert (whole.json()["text"], whole.json()["finish_reason"]) == (" the of ", "stop")


async def test_seeds_and_ignore_eos(server: InferenceServer) -> None:
    answers = [await infer(server.port, max_tokens=500, seed=seed, ignore_eos=True) for seed in (1, 2**64 - 1)]
    texts = [check_events(answer.events(), 500, finish_reason="length") for answer in answers]
    assert texts[0] == texts[1]  # this model draws nothing; both are taken


async def test_logprobs(server: InferenceServer) -> None:
    events = (await infer(server.port, max_tokens=2, logprobs=True)).events()
    assert [event.data["logprob"] for event in events[:-1]] == [0, 0]
    whole = (await infer(server.port, max_tokens=2, logprobs=True, stream=False)).json()
    assert [token["logprob"] for token in whole["tokens"]] == [0, 0]


@pytest.mark.parametrize("prompt", ["x", "é🎉\n\0", "x" * 4097, "🎉" * 5000])
async def test_prompts(server: InferenceServer, prompt: str) -> None:
    answer = await infer(server.port, prompt=prompt, max_tokens=2)
    events = answer.events()
    assert events[-1].data["usage"]["prompt_tokens"] == len(prompt.encode())


async def test_http_1_0_gets_a_body_that_ends_with_the_connection(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 100}, version="1.0"))
        answer = await connection.answer()
        assert "Transfer-Encoding" not in answer.headers
        assert answer.headers["Connection"] == "close"
        check_events(answer.events(), 100)


async def test_connection_close_is_heeded(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        answer = await connection.ask("POST", "/infer", {"prompt": "x", "max_tokens": 5}, Connection="close")
        assert answer.headers["Connection"] == "close"
        check_events(answer.events(), 5)
        assert await connection.is_closed()


async def test_a_connection_is_kept_alive_through_streams_errors_and_objects(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        for _ in range(3):
            answer = await connection.ask("POST", "/infer", {"prompt": "x", "max_tokens": 40})
            check_events(answer.events(), 40)
            assert (await connection.ask("POST", "/infer", {"prompt": "x", "stream": False})).status == 200
            assert (await connection.ask("POST", "/infer", {"prompt": ""})).status == 400
            assert (await connection.ask("GET", "/nothing")).status == 404
            assert (await connection.ask("GET", "/ready")).json() == {"ready": True, "waiting_for": []}


async def test_pipelined_requests_are_answered_in_order(server: InferenceServer) -> None:
    counts = [300, 1, 20, 2]
    async with await Connection.open(server.port) as connection:
        connection.send(
            b"".join(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": count}) for count in counts)
            + request_bytes("GET", "/ready")
        )
        for count in counts:
            check_events((await connection.answer()).events(), count)
        assert (await connection.answer()).json()["ready"]


async def test_a_body_in_pieces_and_chunks(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        whole = request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 4})
        for at in range(0, len(whole), 7):
            connection.send(whole[at : at + 7])
            await connection.writer.drain()
            await asyncio.sleep(0)
        check_events((await connection.answer()).events(), 4)
        connection.send(
            b"POST /infer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
            b'9\r\n{"prompt"\r\n15\r\n: "x","max_tokens":3}\r\n0\r\n\r\n'
        )
        check_events((await connection.answer()).events(), 3)


async def test_many_connections_at_once(server: InferenceServer) -> None:
    counts = [1 + 7 * index for index in range(100)]
    answers = await asyncio.gather(*(infer(server.port, max_tokens=count) for count in counts))
    for count, answer in zip(counts, answers, strict=True):
        check_events(answer.events(), count)
    stats = server.model_registry.model_stats("null")
    assert (stats["inference_count"], stats["total_tokens_generated"]) == (len(counts), sum(counts))


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_leaves_frees_its_sequence(server: InferenceServer, stream: bool) -> None:
    async with await Connection.open(server.port) as connection:
        body = {"prompt": "x", "max_tokens": 90_000, "stream": stream}
        connection.send(request_bytes("POST", "/infer", body))
        if stream:
            await connection.head()
        await until(lambda: server.stream_manager.open_count() == 1)
    await until(lambda: server.stream_manager.open_count() == 0, "the sequence's end")
    check_events((await infer(server.port, max_tokens=3)).events(), 3)
    assert server.model_registry.model_stats("null")["total_tokens_generated"] < 90_000


async def test_clients_that_leave_do_not_disturb_those_that_stay(server: InferenceServer) -> None:
    staying = [asyncio.ensure_future(infer(server.port, max_tokens=2000)) for _ in range(8)]
    for _ in range(30):
        async with await Connection.open(server.port) as connection:
            connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 90_000}))
            await connection.head()
    for answer in staying:
        check_events((await answer).events(), 2000)


async def test_a_client_that_stalls_disturbs_nobody_and_then_gets_everything() -> None:
    async with (
        serving(null_model(max_seq_length=100_000), max_batch_size=4) as server,
        await Connection.open(server.port, receive_buffer=4096) as stalled,
    ):
        stalled.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 8_000}))
        head = await stalled.head()
        for _ in range(3):
            check_events((await infer(server.port, max_tokens=8_000)).events(), 8_000)
        assert server.stream_manager.open_count() == 1
        assert (await ask(server.port, "GET", "/health")).status == 200
        async with asyncio.timeout(DEADLINE_S):
            head.chunks = [chunk async for chunk in stalled.body(head)]
        check_events(head.events(), 8_000, finish_reason="length")
        assert head.events()[-1].data["timings"]["stalled_ms"] > 0
        # The connection is as good as new.
        check_events((await stalled.ask("POST", "/infer", {"prompt": "x", "max_tokens": 9})).events(), 9)


async def test_what_is_held_for_a_client_that_stalls_is_bounded() -> None:
    buffers = 3 * 64 * 1024 + 4 * 4096 + 200 * 100  # the transport's, the kernel's of both sides, the ring's
    async with (
        serving(null_model(max_seq_length=100_000), max_batch_size=4) as server,
        await Connection.open(server.port, receive_buffer=4096) as stalled,
    ):
        stalled.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 90_000}))
        head = await stalled.head()
        check_events((await infer(server.port, max_tokens=20_000)).events(), 20_000)  # it had the time for as many
        unloading = asyncio.ensure_future(server.model_registry.unload_model("null"))
        async with asyncio.timeout(DEADLINE_S):
            head.chunks = [chunk async for chunk in stalled.body(head)]
        await unloading
        events = head.events()
        assert len(head.body) < buffers
        check_events(events, len(events) - 1, finish_reason="cancelled")
