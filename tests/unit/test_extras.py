"""Models that need the extra [torch], where it is not installed."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest

from realtime_serve import InferenceServer, ModelConfig, ServerConfig, devices, hub, models
from realtime_serve.engine.launch import load_runner
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.engine.load_spec import LoadSpec
from realtime_serve.errors import ModelLoadError
from realtime_serve.extras import has_torch
from realtime_serve.models import check_engine

ON_CUDA = ModelConfig("tiny", model_path="tiny.gguf", device="cuda")
REFUSAL = (
    "model 'tiny' needs the torch engine (the native one does not support device 'cuda'), which is not installed:"
    " pip install 'realtime-ai-serve[torch]'"
)


@pytest.fixture(params=["torch", "transformers"])
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The package that is not there."""
    for module in [name for name in sys.modules if name.startswith("realtime_serve.runners.torch_lm")]:
        monkeypatch.delitem(sys.modules, module)
    package: str = request.param
    monkeypatch.setitem(sys.modules, package, None)
    return package


def test_the_extra_is_both_packages(without: str) -> None:
    assert not has_torch()


@pytest.mark.parametrize(("count", "device"), [(0, "cpu"), (1, "cuda")])
def test_the_default_device_with_torch(count: int, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: count)
    assert devices.default_device() == device


def test_the_default_device_without_torch(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 1)
    assert devices.default_device() == "cpu"


def test_a_device_that_only_torch_runs_on(without: str) -> None:
    with pytest.raises(ModelLoadError) as refused:
        check_engine(ON_CUDA)
    assert str(refused.value) == REFUSAL


def test_what_needs_no_torch_is_not_refused(without: str) -> None:
    check_engine(ModelConfig("tiny", model_path="tiny.gguf", device="cpu"))
    check_engine(ModelConfig("null", device="cuda"))
    check_engine(ModelConfig("tiny", model_path="null", device="cuda"))


def test_a_device_for_which_there_is_torch() -> None:
    check_engine(ON_CUDA)


async def test_it_is_refused_before_anything_is_pulled(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "cuda_device_count", lambda: 1)
    monkeypatch.setattr(hub, "resolve", lambda *_: pytest.fail("resolved"))
    server = InferenceServer(ServerConfig(isolation="thread"))
    server.register_model(ON_CUDA)
    with pytest.raises(ModelLoadError, match=re.escape(REFUSAL)):
        await server.__aenter__()


async def test_an_object_of_the_users_on_cuda_is_not_refused(without: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Doubler:
        def predict(self, inputs: list[Any]) -> list[Any]:
            return [2 * value for value in inputs]

    monkeypatch.setattr(models, "cuda_device_count", lambda: 1)
    server = InferenceServer(ServerConfig(isolation="thread"))
    server.register_model(ON_CUDA, loader=lambda config: Doubler())
    async with server:
        assert server.model_registry.active_version("tiny") == "1.0.0"


def test_an_engine_that_cannot_be_imported(without: str, tmp_path: Path) -> None:
    config = ModelConfig("tiny", model_path="tiny.gguf", device="cpu", metadata={"engine": "torch"})
    limits = EngineLimits(max_batch_size=1, max_step_tokens=8, max_queue=1, ageing_ms=1)
    with pytest.raises(ModelLoadError) as refused:
        load_runner(LoadSpec(config, limits, path=str(tmp_path)))
    message = str(refused.value)
    assert message.startswith("model 'tiny' needs the torch engine (")
    assert message.endswith(
        f"), which cannot be imported (import of {without} halted; None in sys.modules):"
        " pip install 'realtime-ai-serve[torch]'"
    )
    assert "\n" not in message
