"""Models, their versions and the workers behind them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar, cast

from realtime_serve import hub
from realtime_serve._core import PayloadKind
from realtime_serve._pump import Stream
from realtime_serve.config import BatchConfig, ModelConfig
from realtime_serve.devices import cuda_device_count
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.engine.load_spec import NULL_MODEL, LoadSpec
from realtime_serve.engine.supervisor import Supervisor
from realtime_serve.errors import (
    ConfigError,
    InvalidRequestError,
    ModelLoadError,
    ModelNotFoundError,
    ModelUnavailableError,
    bounded_retry_after,
)
from realtime_serve.extras import has_torch, torch_missing
from realtime_serve.front_tokenizer import FrontTokenizer, load_tokenizer
from realtime_serve.payload import Payload, PayloadError
from realtime_serve.runners.loader import Loader, import_name
from realtime_serve.stream import StreamManager, TokenStream
from realtime_serve.types import InferenceRequest, PredictRequest, check_context, check_max_tokens, check_token_ids

log = logging.getLogger(__name__)

T = TypeVar("T")

# Encoding costs about 0.3 µs a character; longer texts than this are encoded in a thread.
_ENCODE_INLINE_CHARS = 4096


class Model:
    """A loaded model version: its worker, its counts, and its tokenizer where it takes token ids."""

    def __init__(self, config: ModelConfig, model_obj: Supervisor, tokenizer: FrontTokenizer | None = None) -> None:
        self.config = config
        self.worker = model_obj
        self.health_check_passed = False
        self.inference_count = 0
        self.total_tokens_generated = 0
        self._tokenizer = tokenizer
        self._loaded_at = time.monotonic()

    @property
    def name(self) -> str:
        return self.config.name

    @property
    def version(self) -> str:
        return self.config.version

    @property
    def kind(self) -> str:
        """What requests it takes: tokens (one of our engines, or an object with `step`), generate or predict."""
        return self.worker.kind

    @property
    def weights(self) -> str:
        """As what its weights are computed with, for a person; empty where that is not known."""
        return self.worker.weights

    @property
    def max_context(self) -> int:
        """Positions that a sequence of this model can have, prompt included."""
        return self.worker.max_context

    def record_inference(self, tokens: int) -> None:
        self.inference_count += 1
        self.total_tokens_generated += tokens

    def uptime_seconds(self) -> float:
        return time.monotonic() - self._loaded_at

    async def submit(self, request: InferenceRequest) -> Stream:
        """Queues a request on this version. Raises ServeError where it cannot be served, naming the field."""
        client = self.worker.client
        if self.kind == "predict":
            raise InvalidRequestError(f"model {self.name!r} predicts and generates no text: POST /predict", "model")
        if self._tokenizer is None:
            check_max_tokens(request.max_tokens, self.max_context)
            prompt = Payload(PayloadKind.TEXT, request.prompt.encode())
            return client.submit(request, prompt, model=self.name, version=self.version)
        check_token_ids(request, self._tokenizer.size)
        if len(request.prompt) <= _ENCODE_INLINE_CHARS:
            prompt_ids = self._tokenizer.encode(request.prompt)
        else:
            loop = asyncio.get_running_loop()
            prompt_ids = await loop.run_in_executor(None, self._tokenizer.encode, request.prompt)
            client = self.worker.client
        check_context(len(prompt_ids), request.max_tokens, self.max_context)
        return client.submit(request, prompt_ids, model=self.name, version=self.version)

    def submit_inputs(self, request: PredictRequest) -> list[Stream]:
        """Queues a request's inputs on this version, a stream each; all of them or none.

        Raises ServeError where they cannot be served, naming the field.
        """
        client = self.worker.client
        if self.kind != "predict":
            raise InvalidRequestError(f"model {self.name!r} generates text and predicts nothing: POST /infer", "model")
        if len(request.inputs) > client.channel.slots:
            raise InvalidRequestError(
                f"inputs must be at most {client.channel.slots} here; there are {len(request.inputs)}", "inputs"
            )
        client.check_room(len(request.inputs), self.name)
        streams: list[Stream] = []
        try:
            for value in request.inputs:
                payload = _as_payload(value)
                streams.append(client.submit_input(request, payload, model=self.name, version=self.version))
        except BaseException:
            for stream in streams:
                stream.close()
            raise
        return streams


class ModelRegistry:
    """Model versions by name; one version a name is active and gets the requests."""

    def __init__(
        self,
        stream_manager: StreamManager,
        limits: EngineLimits,
        *,
        isolation: str = "process",
        log_level: str = "INFO",
        batching: BatchConfig | None = None,
    ) -> None:
        """`batching` is how callable models' requests are batched where their loader was registered without."""
        self._streams = stream_manager
        self._limits = limits
        self._isolation = isolation
        self._log_level = log_level
        self._batching = batching or BatchConfig()
        self._loaders: dict[str, tuple[Loader, BatchConfig]] = {}
        self._versions: dict[str, dict[str, Model]] = {}
        self._active: dict[str, str] = {}
        self._loading: dict[tuple[str, str], ModelConfig] = {}
        self._loading_since: dict[tuple[str, str], float] = {}

    def register_loader(self, name: str, loader: Loader, batching: BatchConfig | None = None) -> None:
        """What loads the versions of model `name` from now on, in place of our own engines.

        `loader` takes the ModelConfig and returns, or is async and returns, an object with `step(batch)`,
        `generate(prompt, …)` or `predict(list) -> list`. It is called in the worker: a process of its own where it can
        be imported by name, else a thread of this one. Raises ValueError where it is no callable.
        """
        if not callable(loader):
            raise ValueError(f"the loader of model {name!r} must be callable; it is a {type(loader).__name__}")
        self._loaders[name] = (loader, batching or self._batching)

    async def load_model(
        self, config: ModelConfig, loader: Loader | None = None, batching: BatchConfig | None = None
    ) -> Model:
        """Loads, warms up and health-checks a version, then makes it the active one. `loader` makes its object; without
        one that which is registered for its name does, and else our own engines serve it.

        Raises ModelLoadError, ModelNotFoundError or PullError with the reason; everything is then as it was.
        """
        check_device(config)
        key = (config.name, config.version)
        if key in self._loading or config.version in self._versions.get(config.name, {}):
            raise ModelLoadError(f"model {config.name!r} version {config.version!r} is loaded already, or being loaded")
        self._loading[key] = config
        self._loading_since[key] = time.monotonic()
        try:
            if loader is None:
                loader, batching = self._loaders.get(config.name, (None, None))
            model = await self._load(config, loader, batching or self._batching)
        finally:
            del self._loading[key], self._loading_since[key]
        model.health_check_passed = True
        self._versions.setdefault(config.name, {})[config.version] = model
        self._active[config.name] = config.version
        return model

    async def _load(self, config: ModelConfig, loader: Loader | None, batching: BatchConfig) -> Model:
        if loader is not None:
            spec, isolation = self._loader_spec(config, loader, batching)
        else:
            check_engine(config)
            path = await _in_daemon_thread(lambda: resolve_model(config))
            spec, isolation = LoadSpec(config, self._limits, self._log_level, path), self._isolation
        worker = Supervisor(
            spec, self._streams.open_channel, isolation=isolation, hangs_after_s=self._streams.default_timeout
        )
        try:
            worker.start()
            tokenizer = None
            if spec.loader is None:  # the worker loads meanwhile
                tokenizer = await _in_daemon_thread(lambda: load_tokenizer(spec.path))
            await worker.wait_ready()
            if worker.kind == "tokens" and tokenizer is None:
                tokenizer = await self._tokenizer_for(config)
            model = Model(config, worker, tokenizer)
            await self._warm_up(model)
        except BaseException:
            await worker.stop()
            raise
        return model

    def _loader_spec(self, config: ModelConfig, loader: Loader, batching: BatchConfig) -> tuple[LoadSpec, str]:
        """With the isolation that the loader permits."""
        isolation = self._isolation
        if isolation == "process" and import_name(loader) is None:
            log.warning(
                "model %s runs in a thread of this process: its loader cannot be imported by name from another one",
                config.name,
            )
            isolation = "thread"
        return LoadSpec(config, self._limits, self._log_level, loader=loader, batching=batching), isolation

    async def _tokenizer_for(self, config: ModelConfig) -> FrontTokenizer:
        """A user's model that takes token ids names in `model_path` what has the tokenizer."""
        if not config.model_path:
            raise ModelLoadError(
                f"model {config.name!r} has step(batch), so its prompts must be tokenized: set model_path to the folder"
                " or GGUF file that has its tokenizer"
            )
        path = await _in_daemon_thread(lambda: resolve_model(config))
        return await _in_daemon_thread(lambda: load_tokenizer(path))

    async def _warm_up(self, model: Model) -> None:
        """One inference through the whole path: `warmup_tokens` of prompt, one token out. A model that predicts has
        only its own `warmup`: nobody knows what its inputs are."""
        if model.kind == "predict" or model.config.warmup_tokens == 0:
            return
        words = max(1, min(model.config.warmup_tokens, model.max_context - 1) // 2)
        request = InferenceRequest("warm-up", model.name, "a " * words, max_tokens=1, temperature=0.0)
        try:
            async with TokenStream(await model.submit(request)) as stream:
                async for _ in stream:
                    pass
        except Exception as error:
            raise ModelLoadError(f"model {model.name!r} failed its warm-up: {error}") from error

    async def unload_model(self, name: str, version: str | None = None) -> None:
        """Stops a version's worker, or every version's. Unknown names are ignored."""
        versions = self._versions.get(name, {})
        for gone in [version] if version is not None else list(versions):
            model = versions.pop(gone, None)
            if model is not None:
                await model.worker.stop()
            if self._active.get(name) == gone:
                del self._active[name]
        if not versions:
            self._versions.pop(name, None)
        elif name not in self._active:
            self._active[name] = next(reversed(versions))

    def get_model(self, name: str, version: str | None = None) -> Model | None:
        """A version of a model; the active one where none is named."""
        wanted = self._active.get(name) if version is None else version
        return self._versions.get(name, {}).get(wanted) if wanted is not None else None

    def require_model(self, name: str | None) -> Model:
        """The active version of `name`; of the only model where none is named.

        Raises ModelNotFoundError, or ModelUnavailableError where it is being loaded.
        """
        loading = [config.name for config in self._loading.values()]
        if name is None and len(self._active) == 1:
            name = next(iter(self._active))
        model = self.get_model(name) if name is not None else None
        if model is None and (name in loading or (name is None and loading)):
            raise ModelUnavailableError(f"model {name or next(iter(loading))!r} is being loaded", self.loaded_in())
        if model is None:
            served = ", ".join(repr(served) for served in self._active) or "none yet"
            raise ModelNotFoundError(
                f"model {name!r} is not served here; served: {served}"
                if name is not None
                else f"the request names no model; served: {served}"
            )
        return model

    def list_models(self) -> dict[str, list[str]]:
        return {name: list(versions) for name, versions in self._versions.items()}

    def active_version(self, name: str) -> str | None:
        return self._active.get(name)

    def set_active_version(self, name: str, version: str) -> bool:
        """False where that version is not loaded."""
        if self.get_model(name, version) is None:
            return False
        self._active[name] = version
        return True

    async def health_check(self, name: str) -> bool:
        """Asks the active version's worker, and its model where that has a `health_check`."""
        model = self.get_model(name)
        if model is None:
            return False
        model.health_check_passed = await model.worker.is_well()
        return model.health_check_passed

    def model_stats(self, name: str) -> dict[str, Any]:
        """Raises KeyError where no such model is loaded."""
        model = self.get_model(name)
        if model is None:
            raise KeyError(name)
        count = model.inference_count
        return {
            "name": model.name,
            "version": model.version,
            "device": model.config.device,
            "uptime_seconds": model.uptime_seconds(),
            "inference_count": count,
            "total_tokens_generated": model.total_tokens_generated,
            "tokens_per_inference": model.total_tokens_generated / count if count else 0.0,
            "healthy": model.health_check_passed and model.worker.is_ready,
        }

    def loading(self) -> list[ModelConfig]:
        return list(self._loading.values())

    def loaded_in(self) -> float:
        """Seconds after which what is being loaded may serve. Nobody knows how long a load takes: as long again as the
        longest has taken so far."""
        return bounded_retry_after(max((time.monotonic() - since for since in self._loading_since.values()), default=0))

    def models(self) -> list[Model]:
        """By name, whichever was loaded first; the versions of a model in the order of their loading."""
        return [model for _, versions in sorted(self._versions.items()) for model in versions.values()]

    async def shutdown(self) -> None:
        await asyncio.gather(*(model.worker.stop() for model in self.models()))
        self._versions.clear()
        self._active.clear()


def _as_payload(value: Any) -> Payload:
    try:
        return Payload.of(value)
    except PayloadError as error:
        raise InvalidRequestError(f"an input cannot be sent to the model: {error}", "inputs") from None


def check_device(config: ModelConfig) -> None:
    """Raises ConfigError, in one line with the fix, where the device is not there."""
    kind, _, index = config.device.partition(":")
    devices = cuda_device_count() if kind == "cuda" else 0
    if kind == "cuda" and int(index or 0) >= devices:
        found = f"this machine has {devices}" if devices else "no CUDA device was found on this machine"
        raise ConfigError(
            f"device {config.device!r} of model {config.name!r}: {found}; use device='cpu'", field="device"
        )


async def _in_daemon_thread(call: Callable[[], T]) -> T:
    """Like asyncio.to_thread, but nothing waits for the thread once this is cancelled: a download that goes on must not
    keep a stopped server from ending."""
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def tell(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(cast(T, value))

    def run() -> None:
        value, error = None, None
        try:
            value = call()
        except BaseException as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the event loop is closed
            loop.call_soon_threadsafe(tell, value, error)

    threading.Thread(target=run, name="load", daemon=True).start()
    return await result


def check_engine(config: ModelConfig) -> None:
    """Raises ModelLoadError where none of our own engines that are installed runs on the device."""
    if config.device != "cpu" and _wanted(config) != NULL_MODEL and not has_torch():
        raise torch_missing(config.name, f"the native one does not support device {config.device!r}")


def resolve_model(config: ModelConfig) -> str:
    """Where the model's files are, pulled where need be. A model without a path is looked up by its name."""
    wanted = _wanted(config)
    return NULL_MODEL if wanted == NULL_MODEL else str(hub.resolve(wanted))


def _wanted(config: ModelConfig) -> str:
    return config.model_path or config.name
