"""Where the torch engine's attention is computed by our own kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step_driver import StepDriver
from tiny_models import save_tiny_model
from torch_reference import MAX_BATCH_SIZE, load, random_tokens

from realtime_serve import _core
from realtime_serve.runners.torch_lm.gathered_attention import GatheredAttention
from realtime_serve.runners.torch_lm.native_attention import NativeAttention


def attends(folder: Path, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> set[type]:
    """Which attentions a step of a model goes through."""
    called: set[type] = set()
    for kind in (NativeAttention, GatheredAttention):
        own: Any = kind.attend

        def attend(self: Any, *arguments: Any, own: Any = own, kind: type = kind, **options: Any) -> Any:
            called.add(kind)
            return own(self, *arguments, **options)

        monkeypatch.setattr(kind, "attend", attend)
    runner = load(folder, **settings)
    driver = StepDriver(runner, max_batch_size=MAX_BATCH_SIZE)
    driver.step([(driver.add(tokens), len(tokens)) for tokens in random_tokens(0, [1, 20])])
    return called


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2"])
def test_float32_on_a_cpu_is_native(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    save_tiny_model(tmp_path, family)
    assert attends(tmp_path, monkeypatch) == {NativeAttention}


@pytest.mark.parametrize(
    ("family", "changes", "settings"),
    [
        pytest.param("llama", {}, {"dtype": "bfloat16"}, id="another type"),
        pytest.param("llama", {"head_dim": 12}, {}, id="heads of a size that the kernels do not have"),
        pytest.param("llama", {"head_dim": 264}, {}, id="heads that are too large"),
        pytest.param("gemma2", {}, {}, id="a soft cap"),
    ],
)
def test_all_else_is_gathered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, changes: dict[str, Any], settings: dict[str, Any]
) -> None:
    save_tiny_model(tmp_path, family, **changes)
    assert attends(tmp_path, monkeypatch, **settings) == {GatheredAttention}


def test_another_device_is_not_native(tmp_path: Path) -> None:
    config = save_tiny_model(tmp_path, "llama").config
    assert NativeAttention.supports(config, torch.float32, torch.device("cpu"))
    assert not NativeAttention.supports(config, torch.float32, torch.device("cuda"))


def a_step() -> _core.PagedAttention:
    """Of two tokens."""
    attention = _core.PagedAttention(layers=1, heads=4, kv_heads=2, head_dim=16, num_blocks=4, threads=1)
    attention.begin_step(
        query_start=np.array([0, 2], np.int32),
        context_len=np.array([2], np.int32),
        rows=np.array([0], np.int32),
        block_table=np.zeros((1, 1), np.int32),
        kv_slots=np.array([0, 1]),
    )
    return attention


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"layer": 1}, IndexError),
        ({"query": np.zeros((3, 4, 16), np.float32)}, ValueError),
        ({"key": np.zeros((2, 4, 16), np.float32)}, ValueError),
        ({"value": np.zeros((2, 2, 8), np.float32)}, ValueError),
        ({"query": np.zeros((2, 4, 32), np.float32)[..., ::2]}, ValueError),
        ({"query": np.zeros((2, 4, 16), np.float64)}, TypeError),
        ({"out": np.zeros((2, 4, 32), np.float32)[..., :16]}, TypeError),
        ({"out": np.zeros((1, 4, 16), np.float32)}, ValueError),
    ],
    ids=str,
)
def test_arrays_that_do_not_fit_are_refused(changes: dict[str, Any], error: type[Exception]) -> None:
    numbers = np.zeros((2, 4, 16), np.float32)
    arguments: dict[str, Any] = {
        "layer": 0,
        "query": numbers,
        "key": numbers[:, :2],
        "value": numbers[:, :2],
        "out": numbers.copy(),
    }
    settings: dict[str, Any] = {"scale": 1.0, "window": None}
    a_step().attend(**arguments, **settings)
    with pytest.raises(error):
        a_step().attend(**(arguments | changes), **settings)


def test_a_steps_arrays_fit_each_other() -> None:
    fitting: dict[str, Any] = {
        "query_start": np.array([0, 2], np.int32),
        "context_len": np.array([2], np.int32),
        "rows": np.array([0], np.int32),
        "block_table": np.zeros((1, 1), np.int32),
        "kv_slots": np.array([0, 1]),
    }
    a_step().begin_step(**fitting)
    for name in ("query_start", "rows", "kv_slots"):
        with pytest.raises(ValueError, match=r"fit each other|a slot a token"):
            a_step().begin_step(**(fitting | {name: fitting[name][:1].repeat(3)}))
