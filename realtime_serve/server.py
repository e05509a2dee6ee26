"""The server's lifecycle: start, listen, drain, stop."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
import logging
import signal
import socket
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple

from realtime_serve._pump import Stream
from realtime_serve.config import BatchConfig, ModelConfig, ServerConfig
from realtime_serve.errors import ConfigError, ServeError
from realtime_serve.http.bind import bind
from realtime_serve.middleware import MetricsCollector, MiddlewareChain, RateLimiter, RequestLogger
from realtime_serve.models import Model, ModelRegistry, check_device
from realtime_serve.runners.loader import Loader
from realtime_serve.service import InferenceService
from realtime_serve.stream import StreamManager, TokenStream
from realtime_serve.types import InferenceRequest, InferenceResponse, PredictRequest, PredictResponse, StreamToken

if TYPE_CHECKING:
    from realtime_serve.http.listener import Listener

log = logging.getLogger(__name__)


class _Registered(NamedTuple):
    config: ModelConfig
    loader: Loader | None
    batching: BatchConfig | None


class InferenceServer:
    """Serves models over HTTP (`start`), or inside this process without (`async with`, `stream`, `infer`)."""

    def __init__(
        self,
        config: ServerConfig | None = None,
        max_connections: int | None = None,
        request_timeout: float | None = None,
        max_batch_size: int | None = None,
        max_batch_wait_ms: int | None = None,
    ) -> None:
        given: dict[str, Any] = {
            "max_connections": max_connections,
            "request_timeout": request_timeout,
            "max_batch_size": max_batch_size,
            "max_batch_wait_ms": max_batch_wait_ms,
        }
        self.config = replace(config or ServerConfig(), **{k: v for k, v in given.items() if v is not None})
        self._service = InferenceService(self.config)
        self._registered: list[_Registered] = []
        self._listener: Listener | None = None
        self._socket: socket.socket | None = None
        self._stop_requested: asyncio.Event | None = None
        self._stopped: asyncio.Event | None = None
        self._loads: set[asyncio.Task[Any]] = set()
        self._loop: asyncio.AbstractEventLoop | None = None  # while it is open

    @property
    def model_registry(self) -> ModelRegistry:
        return self._service.registry

    @property
    def stream_manager(self) -> StreamManager:
        return self._service.streams

    @property
    def middleware_chain(self) -> MiddlewareChain:
        """`add` takes the user's own: `async def (request, next)`. They run inside what is built in."""
        return self._service.middleware

    @property
    def rate_limiter(self) -> RateLimiter:
        return self._service.rate_limiter

    @property
    def request_logger(self) -> RequestLogger:
        return self._service.request_logger

    @property
    def metrics_collector(self) -> MetricsCollector:
        return self._service.metrics

    @property
    def port(self) -> int | None:
        """The port that is listened on; None before `start`."""
        return self._socket.getsockname()[1] if self._socket is not None else None

    @property
    def connections(self) -> int:
        """HTTP connections that are open."""
        return self._listener.connections if self._listener is not None else 0

    def register_model(
        self, config: ModelConfig, loader: Loader | None = None, batching: BatchConfig | None = None
    ) -> None:
        """Names a model to serve; from any thread. Before the start it is loaded at the start; after it, at once in the
        background, and a failure is logged.

        `loader` makes the model's object, as ModelRegistry.register_loader says; without one our own engines serve
        what `config` names. `batching` is how the requests of such an object are batched, within max_batch_size and
        max_batch_wait_ms of the server where it is not given. Versions that are loaded by name later use the loader
        that was registered last.

        Raises ConfigError, in one line with the fix, where its device is not there or that version is registered.
        """
        check_device(config)
        registered = _Registered(config, loader, batching)
        if self._loop is None:
            if any((known.name, known.version) == (config.name, config.version) for known, *_ in self._registered):
                raise ConfigError(f"model {config.name!r} version {config.version!r} is registered already", "name")
            self._registered.append(registered)
        if loader is not None:
            self.model_registry.register_loader(config.name, loader, batching)
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._start_load, registered)

    def _start_load(self, registered: _Registered) -> None:
        if self._loop is None:  # closed meanwhile
            return
        task = self._loop.create_task(self._load_in_background(registered))
        self._loads.add(task)
        task.add_done_callback(self._loads.discard)

    async def _load_in_background(self, registered: _Registered) -> None:
        config = registered.config
        try:
            await self.model_registry.load_model(*registered)
        except Exception as error:
            log.error("model %s %s did not load: %s", config.name, config.version, error)

    async def __aenter__(self) -> InferenceServer:
        """Starts the models without listening. Raises what kept one from loading."""
        if self._loop is not None or self._socket is not None:
            raise ServeError("the server is started already")
        await self._open()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        await self._close(drain_s=0.0)

    async def _open(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._service.open()
        try:
            async with asyncio.TaskGroup() as loads:
                for registered in list(self._registered):
                    loads.create_task(self.model_registry.load_model(*registered))
        except BaseExceptionGroup as group:
            await self._close(drain_s=0.0)
            raise group.exceptions[0] from None
        except BaseException:
            await self._close(drain_s=0.0)
            raise

    async def _close(self, *, drain_s: float) -> None:
        self._loop = None
        for load in self._loads:
            load.cancel()
        left = await self._service.drain(drain_s)
        if left:
            log.warning("%d streams were still running; they end as cancelled", left)
        await asyncio.gather(*self._loads, return_exceptions=True)
        await self._service.close()

    async def stream(self, request: InferenceRequest) -> AsyncIterator[StreamToken]:
        """The answer's tokens as they come. Leaving the iterator early cancels the sequence."""
        loop = asyncio.get_running_loop()
        started: asyncio.Future[Stream | None] = loop.create_future()
        read: asyncio.Future[None] = loop.create_future()

        async def deliver(stream: Stream) -> None:
            started.set_result(stream)
            await read

        async def serve() -> None:
            try:
                await self._service.serve(request, deliver)
            except BaseException as error:
                if started.done():
                    raise
                started.set_exception(error)  # it was refused
            else:
                if not started.done():
                    started.set_result(None)  # a middleware answered by itself

        # The middleware is around all of it, while this iterator is left and entered again.
        serving = loop.create_task(serve())
        try:
            if (stream := await started) is not None:
                async for token in TokenStream(stream, raises=False):
                    yield token
                read.set_result(None)
                await serving  # which raises where the stream failed
        finally:
            if not serving.done():
                serving.cancel()
                await asyncio.gather(serving, return_exceptions=True)

    async def infer(self, request: InferenceRequest) -> InferenceResponse:
        """The whole answer."""
        started = time.perf_counter()
        tokens: list[StreamToken] = []

        async def deliver(stream: Stream) -> None:
            tokens.extend([token async for token in TokenStream(stream)])

        outcome = await self._service.serve(request, deliver)
        return InferenceResponse(
            request_id=request.request_id,
            model=outcome.model,
            tokens=tokens,
            total_tokens=len(tokens),
            latency_ms=(time.perf_counter() - started) * 1e3,
            finish_reason=outcome.finish_reason,
            version=outcome.version,
            usage=outcome.usage,
            timings=outcome.timings,
        )

    async def predict(self, request: PredictRequest) -> PredictResponse:
        """A model's outputs for the request's inputs."""
        started = time.perf_counter()
        outputs, outcome = await self._service.predict(request)
        return PredictResponse(
            request_id=request.request_id,
            model=outcome.model,
            outputs=[output.value() for output in outputs],
            latency_ms=(time.perf_counter() - started) * 1e3,
            version=outcome.version,
            timings=outcome.timings,
        )

    async def start(self, host: str | None = None, port: int | None = None) -> None:
        """Listens and serves until `stop()`, SIGTERM or SIGINT; a second signal ends it without waiting for streams.

        While the models load, /health and /ready answer and requests are refused with 503. Raises ServeError where
        the port is in use or a model does not load. Cancelled, it ends without waiting for streams.
        """
        if self._loop is not None or self._socket is not None:
            raise ServeError("the server is started already")
        host = self.config.host if host is None else host
        self._socket = bind(host, self.config.port if port is None else port)
        self._stop_requested, self._stopped = asyncio.Event(), asyncio.Event()
        try:
            with _signals_call(self._on_signal):
                await self._serve(host, self._stop_requested)
        finally:
            self._socket.close()
            self._socket = None
            self._stopped.set()

    async def _serve(self, host: str, stop_requested: asyncio.Event) -> None:
        opening = asyncio.ensure_future(self._open())
        stopping = asyncio.ensure_future(stop_requested.wait())
        drain_s = 0.0
        try:
            # aiohttp in another thread: the worker processes start meanwhile.
            await asyncio.to_thread(importlib.import_module, "realtime_serve.http.listener")
            await self._listen_http()
            await asyncio.wait((opening, stopping), return_when=asyncio.FIRST_COMPLETED)
            if opening.done():
                opening.result()
                self._announce(host)
                await stopping
                drain_s = self.config.graceful_shutdown_timeout
        finally:
            opening.cancel()
            stopping.cancel()
            await asyncio.gather(opening, stopping, return_exceptions=True)
            await self._close(drain_s=drain_s)
            if self._listener is not None:
                await self._listener.stop(flush_s=self._service.drain_left(), hurry=self._service.drain_ended)
                self._listener = None

    async def stop(self) -> None:
        """Ends `start`: new requests are refused, running streams finish within graceful_shutdown_timeout."""
        if self._stop_requested is None or self._stopped is None:
            return  # it was never started
        self._stop_requested.set()
        await self._stopped.wait()

    def _on_signal(self) -> None:
        assert self._stop_requested is not None
        if self._stop_requested.is_set():
            self._service.drain_ended.set()
        self._stop_requested.set()

    async def _listen_http(self) -> None:
        from realtime_serve.http.app import HttpApp
        from realtime_serve.http.listener import Listener

        assert self._socket is not None
        self._listener = Listener(
            HttpApp(self._service),
            max_connections=self.config.max_connections,
            slow_reader_timeout=self.config.slow_reader_timeout,
            on_refused=self._service.metrics.count_refused_connection,
            before_request=self._service.streams.serve_ready,
        )
        await self._listener.start(self._socket)

    def _announce(self, host: str) -> None:
        """Says, in one screen, where the server listens and what to try."""
        models = self._service.registry.models()
        shown = (
            f"localhost:{self.port}"
            if host in ("0.0.0.0", "::", "127.0.0.1", "localhost", "::1")
            else f"{host}:{self.port}"
        )
        lines = [f"realtime-serve listens on http://{shown}"]
        lines += [f"  {m.name} {m.version} on {m.config.device}{_weights(m)}{_context(m)}" for m in models]
        if models:
            lines += ["try:", f"  {_example(models[0], shown)}"]
        lines.append("Ctrl-C stops it.")
        print("\n".join(lines), file=sys.stderr, flush=True)


def _weights(model: Model) -> str:
    return f", {model.weights} weights" if model.weights else ""


def _context(model: Model) -> str:
    return "" if model.kind == "predict" else f", context {model.max_context} tokens"


def _example(model: Model, address: str) -> str:
    """A command that calls the model."""
    if model.kind == "predict":
        return f"""curl {address}/predict -d '{{"model":"{model.name}","input":[1.0,2.0,3.0,4.0]}}'"""
    body = f'{{"model":"{model.name}","prompt":"The capital of France is","max_tokens":16}}'
    return f"curl -N {address}/infer -d '{body}'"


async def run_server(config: ServerConfig, models: Sequence[ModelConfig] = ()) -> None:
    """Serves `models` until a signal. Raises ServeError where that cannot be."""
    server = InferenceServer(config)
    for model in models:
        server.register_model(model)
    await server.start()


@contextlib.contextmanager
def _signals_call(handler: Callable[[], None]) -> Iterator[None]:
    """SIGTERM and SIGINT call `handler` meanwhile; elsewhere than in the main thread, signals are not ours."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    for number in before:
        loop.add_signal_handler(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            loop.remove_signal_handler(number)
            if previous is not None:  # None: it was not set by Python, and cannot be set back
                signal.signal(number, previous)
