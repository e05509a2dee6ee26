"""What is no proper HTTP, and what proper HTTP asks for seldom: each gets an answer, and no traceback is logged."""

from __future__ import annotations

import gzip
import json
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio
from client import Connection, infer, request_bytes
from gate import Gate
from support import serving, until

from realtime_serve import InferenceServer

HEAD = b"POST /infer HTTP/1.1\r\nHost: t\r\n"
CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
ASKED = request_bytes("GET", "/ready")
BODY = json.dumps({"prompt": "x", "max_tokens": 2, "stream": False}).encode()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate(monkeypatch)
    yield gate
    gate.open()


@pytest_asyncio.fixture
async def server(gate: Gate, caplog: pytest.LogCaptureFixture) -> AsyncIterator[InferenceServer]:
    """Serves as before once a test is done with it, and has no more to say of it than the request log."""
    async with serving() as server:
        yield server
        assert len((await infer(server.port, max_tokens=3)).events()) == 4
        assert server.stream_manager.open_count() == 0
        logged = caplog.get_records("call")
        said = [r for r in logged if r.exc_info or (r.levelname != "INFO" and r.name != "realtime_serve.requests")]
        assert not said


UNREADABLE = {
    "a header too long": b"GET /health HTTP/1.1\r\nHost: t\r\nX: " + b"a" * 100_000 + b"\r\n\r\n",
    "too many headers": b"GET /health HTTP/1.1\r\nHost: t\r\n" + b"X: a\r\n" * 5000 + b"\r\n",
    "a header without end": b"GET /health HTTP/1.1\r\nHost: t\r\nX: " + b"a" * 100_000,
    "a path too long": b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: t\r\n\r\n",
    "a request line without end": b"GET /" + b"a" * 100_000,
    "a method without end": b"A" * 100_000,
    "a zero byte in the path": b"GET /\0 HTTP/1.1\r\nHost: t\r\n\r\n",
    "a host that is none": b"GET http://[::x/health HTTP/1.1\r\nHost: t\r\n\r\n",
    "a version that is none": b"GET /health HTTP/7.3\r\nHost: t\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no host": b"GET /health HTTP/1.1\r\n\r\n",
    "line feeds alone": b"GET /health HTTP/1.1\nHost: t\n\n",
    "a folded header": b"GET /health HTTP/1.1\r\nHost: t\r\nA: b\r\n c\r\n\r\n",
    "a space before the colon": b"GET /health HTTP/1.1\r\nHost: t\r\nA : b\r\n\r\n",
    "a negative length": HEAD + b"Content-Length: -3\r\n\r\nabc",
    "a length that is no number": HEAD + b"Content-Length: three\r\n\r\nabc",
    "a length beyond numbers": HEAD + b"Content-Length: 99999999999999999999999\r\n\r\nabc",
    "two lengths": HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd",
    "a length and chunks": HEAD + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "an unknown transfer coding": HEAD + b"Transfer-Encoding: gzip\r\n\r\nabc",
}


@pytest.mark.parametrize("request_", UNREADABLE.values(), ids=UNREADABLE)
async def test_what_cannot_be_read(server: InferenceServer, request_: bytes) -> None:
    async with await Connection.open(server.port) as connection:
        connection.send(request_)
        answer = await connection.answer()
        error = answer.error()
        assert (answer.status, error["type"], error["code"]) == (400, "invalid_request_error", "bad_request")
        assert error["message"].startswith("the request could not be read: ")
        assert len(error["message"]) < 400
        assert await connection.is_closed()
    await until(lambda: server.connections == 0)


BAD_CHUNKS = {
    "no size": b"zz\r\nabc\r\n",
    "a size too large": b"fffffffffffffffff\r\nabc\r\n",
    "a chunk without end": b"3\r\nabcdef\r\n0\r\n\r\n",
    "junk behind a chunk": b"3\r\nabc\r\nxx\r\n",
    "too many trailers": b"0\r\n" + b"X: y\r\n" * 10_000 + b"\r\n",
}


@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
@pytest.mark.parametrize("at_once", [True, False], ids=["with the headers", "later"])
async def test_bad_chunks(server: InferenceServer, chunks: bytes, at_once: bool) -> None:
    async with await Connection.open(server.port) as connection:
        if at_once:
            connection.send(CHUNKED + chunks)
        else:
            await send_apart(server, connection, CHUNKED, chunks)
        answer = await connection.answer()
        assert (answer.status, answer.error()["code"]) == (400, "bad_request")
        assert await connection.is_closed()
    await until(lambda: server.connections == 0)


async def send_apart(server: InferenceServer, connection: Connection, *parts: bytes) -> None:
    """Each once the server has read the one before: it answers another client that asked later."""
    async with await Connection.open(server.port) as other:
        for part in parts:
            connection.send(part)
            for _ in range(3):
                assert (await other.ask("GET", "/health")).status == 200


async def test_a_request_that_is_whole_is_answered_whatever_follows_it(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        await send_apart(server, connection, request_bytes("POST", "/infer", BODY), b"junk\r\n\r\n")
        assert (await connection.answer()).json()["usage"]["completion_tokens"] == 2
        assert (await connection.answer()).status == 400
        assert await connection.is_closed()


async def test_requests_that_wait_are_whole_whatever_follows_them(server: InferenceServer, gate: Gate) -> None:
    async with await Connection.open(server.port) as connection:
        gate.close()
        await send_apart(server, connection, request_bytes("POST", "/infer", BODY) * 3, b"junk\r\n\r\n")
        gate.open()
        assert [(await connection.answer()).status for _ in range(4)] == [200, 200, 200, 400]
        assert await connection.is_closed()


async def test_a_body_shorter_than_it_says(server: InferenceServer) -> None:
    connection = await Connection.open(server.port)
    connection.send(HEAD + b"Content-Length: 300\r\n\r\n" + BODY)
    connection.writer.write_eof()
    assert await connection.is_closed()
    connection.writer.transport.abort()
    await until(lambda: server.connections == 0)


async def test_a_body_longer_than_it_says(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        await send_apart(server, connection, request_bytes("POST", "/infer", BODY), b'{"prompt": "y"}\r\n\r\n')
        assert (await connection.answer()).status == 200
        assert (await connection.answer()).status == 400
        assert await connection.is_closed()


async def test_chunks_of_a_byte(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        connection.send(CHUNKED + b"".join(b"1;ext=1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\nTrailer: x\r\n\r\n")
        assert (await connection.answer()).json()["usage"]["completion_tokens"] == 2
        assert (await connection.ask("GET", "/health")).status == 200


@pytest.mark.parametrize("path", ["/infer", "/infer_stream", "/predict"])
async def test_a_content_encoding_is_refused(server: InferenceServer, path: str) -> None:
    async with await Connection.open(server.port) as connection:
        for coding, body in (("gzip", gzip.compress(BODY)), ("gzip", b"none"), ("deflate", b"none"), ("br", b"none")):
            answer = await connection.ask("POST", path, body, Content_Encoding=coding)
            assert (answer.status, answer.error()["code"]) == (415, "unsupported_media_type")
            assert answer.error()["param"] == "Content-Encoding"
        if path == "/infer":
            assert (await connection.ask("POST", path, BODY, Content_Encoding="identity")).status == 200


async def test_expect_continue(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        connection.send(request_bytes("POST", "/infer", b"", Content_Length=str(len(BODY)), Expect="100-continue"))
        assert (await connection.head()).status == 100
        connection.send(BODY)
        assert (await connection.answer()).json()["usage"]["completion_tokens"] == 2
        assert (await connection.ask("GET", "/health")).status == 200


@pytest.mark.parametrize(("method", "path"), [("POST", "/infer"), ("GET", "/health"), ("POST", "/nothing")])
async def test_an_expectation_that_is_not_known(server: InferenceServer, method: str, path: str) -> None:
    async with await Connection.open(server.port) as connection:
        answer = await connection.ask(method, path, b"", Expect="coffee")
        assert (answer.status, answer.error()["code"]) == (417, "expectation_failed")
        assert (await connection.ask("GET", "/health")).status == 200


async def test_pipelined_requests_are_answered_in_order(server: InferenceServer) -> None:
    counts = [5, 1, 9, 3]
    asked = [request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": count}) for count in counts]
    asked[1:1] = [
        request_bytes("GET", "/nothing"),
        request_bytes("POST", "/infer", b"{"),
        request_bytes("HEAD", "/ready"),
    ]
    async with await Connection.open(server.port) as connection:
        connection.send(b"".join(asked))
        assert len((await connection.answer()).events()) == 6
        assert [(await connection.answer()).status, (await connection.answer()).status] == [404, 400]
        assert (await connection.answer("HEAD")).status == 200
        assert [len((await connection.answer()).events()) for _ in counts[1:]] == [2, 10, 4]


async def test_more_pipelined_requests_than_are_held(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        connection.send(request_bytes("GET", "/health") * 200)
        assert [(await connection.answer()).status for _ in range(200)] == [200] * 200


@pytest.mark.parametrize(
    ("method", "target", "status"),
    [
        ("CONNECT", "example.org:443", 404),
        ("OPTIONS", "*", 404),
        ("TRACE", "/health", 405),
        ("PROPFIND", "/health", 405),
        ("GET", "http://test/health", 200),
        ("GET", "//[/", 404),
        ("GET", "/%ff%zz", 404),
        ("GET", "/health?x=%ff&&=;", 200),
        ("GET", "/../health", 404),
    ],
)
async def test_unusual_targets(server: InferenceServer, method: str, target: str, status: int) -> None:
    async with await Connection.open(server.port) as connection:
        answer = await connection.ask(method, target)
        assert answer.status == status
        if status != 200:
            answer.error()


async def test_an_upgrade_that_is_not_taken_up_is_a_request_as_any(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        for protocol in ("websocket", "h2c"):
            answer = await connection.ask("GET", "/health", Connection="Upgrade", Upgrade=protocol)
            assert (answer.status, answer.json()["status"]) == (200, "ok")
        connection.send(request_bytes("GET", "/health", Connection="Upgrade", Upgrade="websocket") + ASKED)
        assert (await connection.answer()).status == 200
        assert (await connection.answer()).json()["ready"]


async def test_a_request_behind_a_body_that_nobody_wanted(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        connection.send(b"POST /none HTTP/1.1\r\nHost: t\r\nContent-Length: 300000\r\n\r\n")
        assert (await connection.answer()).status == 404
        connection.send(b"x" * 300_000 + request_bytes("GET", "/health"))
        assert (await connection.answer()).status == 200


async def test_who_still_sends_reads_why_nobody_listens(server: InferenceServer) -> None:
    """Closed at once, the connection would be reset by what was still to come, and the answer lost."""
    async with await Connection.open(server.port) as connection:
        connection.send(b"no HTTP at all\r\n\r\n" + b"x" * 8_000_000)
        assert (await connection.answer()).status == 400
        assert await connection.is_closed()


async def test_a_body_too_large_is_refused_before_it_comes(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        connection.send(HEAD + b"Content-Length: 1000000000\r\n\r\n")
        answer = await connection.answer()
        assert (answer.status, answer.error()["code"]) == (413, "body_too_large")


async def test_errors_have_the_requests_id(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        for path, body in (("/infer", b"{"), ("/infer", {"prompt": "x", "model": "none"}), ("/predict", {"input": 1})):
            answer = await connection.ask("POST", path, body)
            assert answer.status in (400, 404)
            assert len(answer.headers["X-Request-Id"]) == 32


async def test_an_unknown_route_is_told_which_there_are(server: InferenceServer) -> None:
    async with await Connection.open(server.port) as connection:
        assert "/infer" in (await connection.ask("GET", "/none")).error()["message"]
