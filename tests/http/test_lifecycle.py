"""A server's life: it starts, loads, serves, drains, stops; in whatever order it is told to."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading

import pytest
from client import Connection, ask, infer, request_bytes
from support import DEADLINE_S, null_model, serving, until

from realtime_serve import InferenceRequest, InferenceServer, ModelConfig, ServerConfig, models
from realtime_serve.engine import launch
from realtime_serve.engine.supervisor import Supervisor
from realtime_serve.errors import (
    ConfigError,
    ModelLoadError,
    ModelNotFoundError,
    ServeError,
    ShuttingDownError,
    TokenTimeoutError,
)
from realtime_serve.http.listener import Listener


def a_server(**settings: object) -> InferenceServer:
    return InferenceServer(ServerConfig(**{"host": "127.0.0.1", "port": 0, "isolation": "thread", **settings}))


def a_request(**fields: object) -> InferenceRequest:
    return InferenceRequest(**{"request_id": "r", "model": "null", "prompt": "x", "max_tokens": 5, **fields})


class HeldLoads:
    """Keeps loads of worker threads from finishing until `release` is set."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.release = threading.Event()
        load_runner = launch.load_runner

        def load(spec: object) -> object:
            assert self.release.wait(DEADLINE_S)
            return load_runner(spec)

        monkeypatch.setattr(launch, "load_runner", load)


async def test_health_ready_and_models() -> None:
    async with serving(null_model(), null_model("second")) as server:
        health = await ask(server.port, "GET", "/health")
        assert (health.status, health.json()) == (200, {"status": "ok", "stalled": []})
        ready = await ask(server.port, "GET", "/ready")
        assert (ready.status, ready.json()) == (200, {"ready": True, "waiting_for": []})
        await infer(server.port, max_tokens=7)
        listed = (await ask(server.port, "GET", "/models")).json()["models"]
        assert [model["name"] for model in listed] == ["null", "second"]
        uptime = listed[0].pop("uptime_seconds")
        assert 0 <= uptime < DEADLINE_S
        assert listed[0] == {
            "name": "null",
            "version": "1.0.0",
            "active": True,
            "state": "ready",
            "kind": "tokens",
            "device": "cpu",
            "max_context": 4096,
            "inference_count": 1,
            "total_tokens_generated": 7,
            "restarts": 0,
        }
        unnamed = await ask(server.port, "POST", "/infer", {"prompt": "x"})
        assert (unnamed.status, unnamed.error()["code"]) == (404, "model_not_found")


async def test_while_it_loads_it_answers_and_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    held = HeldLoads(monkeypatch)
    server = a_server()
    server.register_model(null_model())
    running = asyncio.ensure_future(server.start())
    await until(lambda: server.port is not None)
    await until(lambda: server.model_registry.loading())
    ready = await ask(server.port, "GET", "/ready")
    assert (ready.status, ready.json()) == (503, {"ready": False, "waiting_for": ["null 1.0.0"]})
    assert (await ask(server.port, "GET", "/health")).status == 200
    for model in ("null", None):
        refused = await infer(server.port, model=model)
        assert (refused.status, refused.error()["code"]) == (503, "model_unavailable")
        assert "Retry-After" in refused.headers
    assert (await infer(server.port, model="other")).status == 404
    held.release.set()
    await until(lambda: server.model_registry.models())
    assert (await infer(server.port)).status == 200
    await server.stop()
    await running


async def test_stop_lets_streams_finish_and_takes_no_more() -> None:
    async with serving(null_model(max_seq_length=100_000)) as server:
        async with (
            await Connection.open(server.port) as connection,
            await Connection.open(server.port) as other,
            await Connection.open(server.port) as balancer,
        ):
            assert (await balancer.ask("GET", "/ready")).status == 200
            connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 20_000}))
            head = await connection.head()
            stopping = asyncio.ensure_future(server.stop())
            await until(lambda: server._service.is_draining)
            refused = await other.ask("POST", "/infer", {"prompt": "x"})
            assert (refused.status, refused.error()["code"]) == (503, "shutting_down")
            assert await other.is_closed()
            for _ in range(2):
                ready = await balancer.ask("GET", "/ready")
                assert (ready.status, ready.json()["waiting_for"]) == (503, ["shutdown"])
            with pytest.raises(ShuttingDownError):
                await server.infer(a_request())
            head.chunks = [chunk async for chunk in connection.body(head)]
            assert len(head.events()) == 20_001
            assert head.events()[-1].data["finish_reason"] == "length"
            await stopping
            assert await connection.is_closed()
        assert server.port is None


async def test_streams_that_outlast_the_grace_end_as_cancelled() -> None:
    async with (
        serving(null_model(max_seq_length=100_000, step_ms=1), graceful_shutdown_timeout=0.0) as server,
        await Connection.open(server.port) as connection,
    ):
        connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 90_000}))
        head = await connection.head()
        await server.stop()
        head.chunks = [chunk async for chunk in connection.body(head)]
        assert (head.events()[-1].name, head.events()[-1].data["finish_reason"]) == ("done", "cancelled")


async def test_a_client_that_never_reads_does_not_keep_it_from_stopping() -> None:
    async with (
        serving(null_model(max_seq_length=100_000), graceful_shutdown_timeout=0.05) as server,
        await Connection.open(server.port, receive_buffer=4096) as connection,
    ):
        connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 90_000}))
        await connection.head()
        async with asyncio.timeout(DEADLINE_S):
            await server.stop()


def stalled(server: InferenceServer) -> bool:
    """Whether a connection of the server holds bytes that its client does not take."""
    return any(connection.unsent for connection in server._listener._open)


def has_answered(listener: Listener) -> bool:
    """Whether every connection has been told to end and has no request in work any more."""
    return all(connection._ends and connection.task is None for connection in listener._open)


async def reading_nothing(server: InferenceServer, max_tokens: int) -> Connection:
    """A client with a small buffer that has asked for that many tokens."""
    connection = await Connection.open(server.port, receive_buffer=4096)
    connection.writer.transport.pause_reading()
    connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": max_tokens}))
    return connection


async def test_a_stream_that_its_slow_reader_pauses_finishes_within_the_grace() -> None:
    async with serving(null_model(max_seq_length=100_000), graceful_shutdown_timeout=DEADLINE_S) as server:
        async with await reading_nothing(server, 60_000) as connection:
            await until(lambda: server.model_registry.get_model("null").worker.stats()["worker"]["stalls"])
            stopping = asyncio.ensure_future(server.stop())
            await until(lambda: server._service.is_draining)
            connection.writer.transport.resume_reading()
            answer = await connection.answer()
            assert len(answer.events()) == 60_001
            assert answer.events()[-1].data["finish_reason"] == "length"
        await stopping


async def test_a_slow_reader_whose_stream_outlasts_the_grace_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime_serve.http.listener._LAST_BYTES_S", DEADLINE_S)
    async with serving(null_model(max_seq_length=100_000), graceful_shutdown_timeout=0.0) as server:
        async with await reading_nothing(server, 90_000) as connection:
            await until(lambda: server.model_registry.get_model("null").worker.stats()["worker"]["stalls"])
            listener = server._listener
            stopping = asyncio.ensure_future(server.stop())
            await until(lambda: has_answered(listener))  # it has had its time
            connection.writer.transport.resume_reading()
            *tokens, last = (await connection.answer()).events()
            assert (last.name, last.data["finish_reason"]) == ("done", "cancelled")
            assert last.data["usage"]["completion_tokens"] == len(tokens) < 90_000
            assert [token.id for token in tokens] == [str(index) for index in range(len(tokens))]
        await stopping


async def unread_answers(server: InferenceServer) -> tuple[Connection, int]:
    """A connection whose answers are complete, and partly in its transport still: it, and how many they are."""
    connection, count = await reading_nothing(server, 300), 1
    ended = server.model_registry.get_model("null")
    await until(lambda: ended.inference_count == count)
    while not stalled(server):
        connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 300}))
        count += 1
        await until(lambda count=count: ended.inference_count == count)
    assert server.stream_manager.open_count() == 0
    return connection, count


async def test_what_a_slow_client_has_not_taken_yet_is_not_lost() -> None:
    async with serving(graceful_shutdown_timeout=DEADLINE_S) as server:
        connection, count = await unread_answers(server)
        async with connection:
            listener = server._listener
            stopping = asyncio.ensure_future(server.stop())
            await until(lambda: has_answered(listener))  # all else has ended
            assert listener.connections == 1
            for _ in range(3):
                await asyncio.sleep(0)
            assert not stopping.done()
            connection.writer.transport.resume_reading()
            for _ in range(count):
                assert len((await connection.answer()).events()) == 301
            await stopping
            assert listener.connections == 0


async def test_a_second_signal_does_not_wait_for_slow_clients() -> None:
    async with serving(graceful_shutdown_timeout=3600.0) as server:
        connection, _ = await unread_answers(server)
        async with connection:
            listener = server._listener
            stopping = asyncio.ensure_future(server.stop())
            await until(lambda: has_answered(listener))
            assert not stopping.done()
            server._on_signal()
            async with asyncio.timeout(DEADLINE_S):
                await stopping
            await until(lambda: listener.connections == 0)  # cut: a host's event loop is not left with it


async def test_stop_before_start_and_twice() -> None:
    server = a_server()
    await server.stop()
    server.register_model(null_model())
    running = asyncio.ensure_future(server.start())
    await until(lambda: server.model_registry.models())
    await asyncio.gather(server.stop(), server.stop())
    await running
    await server.stop()


async def test_start_twice_is_refused_and_start_after_stop_serves_again() -> None:
    server = a_server()
    server.register_model(null_model())
    for _ in range(2):
        running = asyncio.ensure_future(server.start())
        await until(lambda: server.model_registry.models())
        with pytest.raises(ServeError, match="started already"):
            await server.start()
        with pytest.raises(ServeError, match="started already"):
            async with server:
                pass
        assert (await infer(server.port, max_tokens=3)).status == 200
        await server.stop()
        await running
    async with server:
        assert (await server.infer(a_request())).total_tokens == 5


@pytest.mark.parametrize("isolation", ["thread", "process"])
@pytest.mark.parametrize("when", ["at once", "loading", "serving", "streaming"])
async def test_a_cancelled_start_leaves_nothing(isolation: str, when: str) -> None:
    server = a_server(isolation=isolation)
    server.register_model(null_model(max_seq_length=100_000))
    before = asyncio.all_tasks()
    running = asyncio.ensure_future(server.start())
    match when:
        case "loading":
            await until(lambda: server.model_registry.loading() and server._listener)
        case "serving" | "streaming":
            await until(lambda: server.model_registry.models())
    if when == "streaming":
        connection = await Connection.open(server.port)
        connection.send(request_bytes("POST", "/infer", {"prompt": "x", "max_tokens": 90_000}))
        await connection.head()
    running.cancel()
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(asyncio.CancelledError):
            await running
    assert server.model_registry.models() == []
    assert server.port is None
    if when == "streaming":
        connection.writer.transport.abort()
    await until(lambda: asyncio.all_tasks() <= before)


async def test_stop_while_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where the load is in a call that cannot be interrupted, as a download is."""
    began, release = threading.Event(), threading.Event()

    def resolve(config: ModelConfig) -> str:
        began.set()
        release.wait(DEADLINE_S)
        return "null"

    monkeypatch.setattr(models, "resolve_model", resolve)
    server = a_server()
    server.register_model(null_model())
    running = asyncio.ensure_future(server.start())
    await until(began.is_set)
    async with asyncio.timeout(DEADLINE_S / 2):
        await server.stop()
        await running
    assert not release.is_set()
    release.set()


@pytest.mark.parametrize("isolation", ["thread", "process"])
async def test_a_model_that_does_not_load_ends_the_start_with_the_reason(isolation: str) -> None:
    server = a_server(isolation=isolation)
    server.register_model(null_model())
    server.register_model(null_model("bad", wrong=1))
    with pytest.raises(ModelLoadError, match="no option 'wrong'"):
        await server.start()
    assert (server.port, server.model_registry.models()) == (None, [])
    with pytest.raises(ModelLoadError, match="no option 'wrong'"):
        async with server:
            pass


async def test_a_port_in_use() -> None:
    async with serving() as server:
        second = a_server(port=server.port)
        second.register_model(null_model())
        with pytest.raises(ConfigError, match=rf"port {server.port} .* in use.*--port") as caught:
            await second.start()
        assert caught.value.field == "port"
        assert second.model_registry.models() == []
        assert (await infer(server.port, max_tokens=2)).status == 200


async def test_register_after_the_start(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as server:
        server.register_model(null_model("later"))
        thread = threading.Thread(target=server.register_model, args=(null_model("from a thread"),))
        thread.start()
        await until(lambda: len(server.model_registry.models()) == 3)
        for model in ("later", "from a thread"):
            assert (await infer(server.port, model=model, max_tokens=2)).status == 200
        server.register_model(null_model("bad", wrong=1))
        server.register_model(null_model("later"))
        await until(lambda: len(caplog.records) == 2)
        assert sorted(caplog.messages) == [
            "model bad 1.0.0 did not load: model 'bad' has no option 'wrong'",
            "model later 1.0.0 did not load: model 'later' version '1.0.0' is loaded already, or being loaded",
        ]
        assert set(server.model_registry.list_models()) == {"null", "later", "from a thread"}


async def test_loads_that_still_run_end_with_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    stop = Supervisor.stop

    async def stop_slowly(self: Supervisor) -> None:
        await stop(self)
        await asyncio.sleep(0.3)  # longer than all else that the server has to end

    async with serving(isolation="process") as server:
        server.register_model(null_model("later"))
        await until(lambda: server.model_registry.loading())
        monkeypatch.setattr(Supervisor, "stop", stop_slowly)
        await server.model_registry.unload_model("null")
    assert server.model_registry.models() == []
    assert server.model_registry.loading() == []


async def test_what_is_registered_twice_is_refused() -> None:
    server = a_server()
    server.register_model(null_model())
    with pytest.raises(ConfigError, match="registered already"):
        server.register_model(null_model())


async def test_versions_through_the_registry() -> None:
    async with serving() as server:
        registry = server.model_registry
        second = ModelConfig("null", "2.0", "null", "cpu")
        loaded = await asyncio.gather(*(registry.load_model(second) for _ in range(2)), return_exceptions=True)
        assert sorted(isinstance(one, ModelLoadError) for one in loaded) == [False, True]
        assert registry.list_models() == {"null": ["1.0.0", "2.0"]}
        assert (await infer(server.port)).events()[-1].data["version"] == "2.0"
        assert registry.set_active_version("null", "1.0.0")
        assert not registry.set_active_version("null", "3.0")
        assert (await infer(server.port)).events()[-1].data["version"] == "1.0.0"
        assert await registry.health_check("null")
        await registry.unload_model("null", "1.0.0")
        assert (await infer(server.port)).events()[-1].data["version"] == "2.0"
        with pytest.raises(ModelLoadError, match="no option"):
            await registry.load_model(ModelConfig("null", "3.0", "null", "cpu", metadata={"wrong": 1}))
        assert registry.list_models() == {"null": ["2.0"]}
        await registry.unload_model("null")
        await registry.unload_model("null")
        assert registry.get_model("null") is None
        assert not await registry.health_check("null")
        assert (await infer(server.port)).status == 404
        with pytest.raises(KeyError):
            registry.model_stats("null")


async def test_without_http() -> None:
    server = a_server()
    server.register_model(null_model(max_seq_length=100_000))
    with pytest.raises(ModelNotFoundError):
        await server.infer(a_request())
    async with server:
        assert server.port is None
        answer = await server.infer(a_request())
        assert (answer.total_tokens, answer.finish_reason, answer.usage.prompt_tokens) == (5, "length", 1)
        assert [token.token for token in answer.tokens] == [token.token async for token in server.stream(a_request())]
        many = await asyncio.gather(*(server.infer(a_request(max_tokens=count)) for count in range(1, 60)))
        assert [answer.total_tokens for answer in many] == list(range(1, 60))
    with pytest.raises(ShuttingDownError):
        await server.infer(a_request())


@pytest.mark.parametrize("how", ["break", "aclose", "cancel"])
async def test_leaving_a_stream_early_cancels_it(how: str) -> None:
    server = a_server()
    server.register_model(null_model(max_seq_length=100_000))
    async with server:
        stream = server.stream(a_request(max_tokens=90_000))
        if how == "cancel":
            reading = asyncio.ensure_future(_count(stream))
            await until(lambda: server.stream_manager.open_count() == 1)
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
        else:
            async for _ in stream:
                break
            if how == "aclose":
                await stream.aclose()
            else:
                del stream
        await until(lambda: server.stream_manager.open_count() == 0)
        assert (await server.infer(a_request())).total_tokens == 5


async def _count(stream: object) -> int:
    return len([token async for token in stream])


async def test_a_timeout_without_http() -> None:
    server = a_server()
    server.register_model(null_model(step_ms=500))
    async with server:
        with pytest.raises(TokenTimeoutError):
            await server.infer(a_request(timeout=0.05, max_tokens=2))


def test_from_another_thread_than_the_main_one() -> None:
    server = a_server(isolation="process")
    server.register_model(null_model())
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    failures = []

    def run() -> None:
        try:
            asyncio.run(server.start())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run)
    thread.start()

    async def use() -> None:
        await until(lambda: failures or server.model_registry.models())
        assert (await infer(server.port, max_tokens=3)).status == 200

    asyncio.run(use())
    asyncio.run_coroutine_threadsafe(server.stop(), server._loop).result(DEADLINE_S)
    thread.join(DEADLINE_S)
    assert not thread.is_alive()
    assert not failures
    assert before == (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT))


async def test_the_hosts_signal_handlers_come_back() -> None:
    def handler(*_: object) -> None: ...

    before = signal.signal(signal.SIGTERM, handler)
    try:
        async with serving():
            assert signal.getsignal(signal.SIGTERM) is not handler
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


async def test_the_kernel_holds_little_for_a_connection() -> None:
    async with serving() as server:
        assert server._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF) <= 2 * 64 * 1024
        assert server._socket.getsockopt(socket.IPPROTO_TCP, 25) <= 64 * 1024
