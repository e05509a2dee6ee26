"""What the native engine loads and refuses, where its packed weights are kept, and which engine a model gets."""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf_writer import write_gguf
from step_driver import DrivenSequence, StepDriver
from tiny_models import (
    MAX_POSITIONS,
    VOCABULARY,
    TinyTokenizer,
    change_tensors,
    save_tiny_llama,
    save_tiny_model,
    tiny_model,
)

from realtime_serve import _core
from realtime_serve.config import ModelConfig
from realtime_serve.engine import language_model
from realtime_serve.engine.language_model import load_language_model
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.errors import ConfigError, ModelLoadError, UnsupportedModelError
from realtime_serve.runners.base import Runner
from realtime_serve.runners.cpu_lm import CpuLM
from realtime_serve.runners.cpu_lm.packed_cache import packed_paths
from realtime_serve.runners.torch_lm import TorchLM

PROMPT = [5, 9, 100, 33, 7, 61, 90, 14, 3, 77]
LIMITS = EngineLimits(max_batch_size=16, max_step_tokens=64, max_queue=16, ageing_ms=1000)


def load(path: Path, **changes: Any) -> CpuLM:
    settings: dict[str, Any] = {
        "tokenizer": TinyTokenizer(),
        "max_context": MAX_POSITIONS,
        "max_batch_size": 16,
        "max_step_tokens": 64,
        "threads": 2,
    }
    return CpuLM.load(path, **(settings | changes))


def logits_of(runner: CpuLM) -> np.ndarray[Any, np.dtype[np.float32]]:
    driver = StepDriver(runner, max_batch_size=1)
    sequence: DrivenSequence = driver.add(PROMPT)
    driver.step([(sequence, len(PROMPT))])
    return np.stack(sequence.logits)


@pytest.fixture(autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("REALTIME_SERVE_CACHE", str(folder))
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path)
    return tmp_path


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "gemma3_text", "gpt2"])
def test_a_gguf_file_and_a_folder_of_the_same_weights_are_the_same_model(tmp_path: Path, family: str) -> None:
    changes: dict[str, Any] = {"query_pre_attn_scalar": 32} if family == "gemma3_text" else {}
    if family.startswith("qwen"):
        changes = {"use_sliding_window": False}
    if family == "mistral":
        changes = {"sliding_window": None}
    model = tiny_model(family, **changes)
    model.save_pretrained(tmp_path / "folder")
    write_gguf(tmp_path / "model.gguf", model)
    np.testing.assert_allclose(
        logits_of(load(tmp_path / "model.gguf")), logits_of(load(tmp_path / "folder")), rtol=0, atol=1e-4
    )


_TYPES = gguf.GGMLQuantizationType


@pytest.mark.parametrize(
    "kind", [_TYPES.F16, _TYPES.BF16, _TYPES.Q4_0, _TYPES.Q4_1, _TYPES.Q5_0, _TYPES.Q5_1, _TYPES.Q8_0], ids=str
)
def test_each_stored_type(tmp_path: Path, kind: gguf.GGMLQuantizationType) -> None:
    """As near to the weights that the file holds, dequantized, as these are to themselves in 8 bits."""
    model = tiny_model("llama")
    write_gguf(tmp_path / "stored.gguf", model, types=(kind,))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                stored = gguf.quants.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(gguf.quants.dequantize(stored, kind)))
        exact = model(input_ids=torch.tensor([PROMPT])).logits[0].numpy()
    error = np.linalg.norm(logits_of(load(tmp_path / "stored.gguf")) - exact) / np.linalg.norm(exact)
    assert error < 0.04


@pytest.mark.parametrize("isa", _core.available_cpu_kernels())
def test_every_instruction_set_computes_the_same(folder: Path, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = logits_of(load(folder))
    monkeypatch.setenv("RTS_CPU_ISA", isa)
    assert _core.cpu_kernels() == isa
    np.testing.assert_allclose(logits_of(load(folder)), expected, rtol=0, atol=0.05)


def test_an_instruction_set_that_is_not_there_is_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RTS_CPU_ISA", "avx9")
    assert "RTS_CPU_ISA=avx9 cannot be had here; there is " in refusal(folder)


def refusal(path: Path, **changes: Any) -> str:
    with pytest.raises(ModelLoadError) as refused:
        load(path, **changes)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, model__layers__1__mlp__up_proj__weight=None)
    assert refusal(folder) == f"{folder}: tensor 'model.layers.1.mlp.up_proj.weight' is missing"


def test_a_tensor_of_another_shape_is_named(folder: Path) -> None:
    change_tensors(folder, model__norm__weight=torch.ones(63))
    assert refusal(folder) == f"{folder}: tensor 'model.norm.weight' has shape [63], the model needs [64]"


def test_a_tensor_without_a_place_is_named(folder: Path) -> None:
    change_tensors(folder, model__surprise__weight=torch.ones(2))
    assert refusal(folder) == f"{folder}: the model has no place for tensor 'model.surprise.weight'"


def test_integers_are_refused(folder: Path) -> None:
    change_tensors(folder, model__layers__0__mlp__up_proj__weight=torch.ones((96, 64), dtype=torch.int8))
    assert "'model.layers.0.mlp.up_proj.weight' is stored as I8" in refusal(folder)


@pytest.mark.parametrize("value_bits", [8, 4])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(folder: Path, value: float, value_bits: int) -> None:
    weight = torch.ones((96, 64))
    weight[95, 63] = value
    change_tensors(folder, model__layers__0__mlp__up_proj__weight=weight)
    message = refusal(folder, value_bits=value_bits)
    assert message == f"{folder}: tensor 'model.layers.0.mlp.up_proj.weight' has values that are not finite"
    assert not list(folder.glob("*.rts-packed*"))


def test_a_kv_cache_that_memory_does_not_hold_is_refused_with_the_numbers(folder: Path) -> None:
    save_tiny_llama(folder, num_hidden_layers=2, max_position_embeddings=1 << 30)
    assert "the KV cache" in (message := refusal(folder, max_context=1 << 30, kv_cache_mb=1 << 30))
    assert "MB free" in message


def test_the_second_start_packs_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    expected = logits_of(load(folder))
    assert "packing" in caplog.text
    caplog.clear()
    np.testing.assert_array_equal(logits_of(load(folder)), expected)
    assert "packing" not in caplog.text


def test_weights_that_changed_are_packed_anew(folder: Path) -> None:
    before = logits_of(load(folder))
    save_tiny_llama(folder, seed=1)
    os.utime(folder / "model.safetensors", ns=(1, 1))
    assert not np.array_equal(logits_of(load(folder)), before)


def test_a_damaged_packed_file_is_made_anew(folder: Path) -> None:
    expected = logits_of(load(folder))
    (packed,) = folder.glob("*.rts-packed")
    content = bytearray(packed.read_bytes())
    content[-100] ^= 1
    packed.write_bytes(content)
    np.testing.assert_array_equal(logits_of(load(folder)), expected)
    assert packed.read_bytes() != content


def test_where_the_models_folder_takes_no_file_the_cache_folder_does(
    folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside, in_cache = packed_paths([folder / "model.safetensors"])
    beside.mkdir()  # root may write to any folder, but nobody a file where a folder is
    expected = logits_of(load(folder))
    assert in_cache.is_file()
    assert in_cache.is_relative_to(cache)
    np.testing.assert_array_equal(logits_of(load(folder)), expected)


def test_where_no_folder_takes_a_file_it_is_served_all_the_same(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits_of(load(folder))
    for path in packed_paths([folder / "model.safetensors"]):
        path.unlink(missing_ok=True)
        path.mkdir(parents=True)
    np.testing.assert_array_equal(logits_of(load(folder)), expected)
    assert "each start packs them" in caplog.text


def loaded(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Runner:
    import realtime_serve.tokenizer

    monkeypatch.setattr(realtime_serve.tokenizer.TokenVocabulary, "load", lambda path: TinyTokenizer())
    return load_language_model(ModelConfig("tiny", device="cpu", **changes), LIMITS, folder)


def test_a_model_gets_the_native_engine_where_that_has_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(loaded(folder, monkeypatch), CpuLM)
    assert isinstance(loaded(folder, monkeypatch, quantized="int8"), CpuLM)
    assert isinstance(loaded(folder, monkeypatch, quantized=True), CpuLM)
    assert isinstance(loaded(folder, monkeypatch, metadata={"engine": "torch"}), TorchLM)


@pytest.mark.parametrize(
    ("family", "changes", "lacks"),
    [
        ("gemma2", {}, "architecture 'gemma2'"),
        ("llama", {"hidden_act": "relu"}, "activation 'relu'"),
        ("llama", {"head_dim": 20}, "heads of 20 values"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
            "rope type 'yarn'",
        ),
    ],
)
def test_what_it_lacks_runs_on_torch_and_the_log_says_why(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    family: str,
    changes: dict[str, Any],
    lacks: str,
) -> None:
    save_tiny_model(tmp_path, family, **changes)
    caplog.set_level(logging.INFO, language_model.__name__)
    assert isinstance(loaded(tmp_path, monkeypatch), TorchLM)
    assert caplog.messages == [f"model tiny runs on the torch engine: the native one does not support {lacks}"]
    with pytest.raises(UnsupportedModelError, match=lacks):
        loaded(tmp_path, monkeypatch, metadata={"engine": "native"})


def test_weights_of_four_bits(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer to those of 8 bits than to any other model's, and not the same; each is packed in a file of its own."""
    eight, four = loaded(folder, monkeypatch), loaded(folder, monkeypatch, quantized="int4")
    assert isinstance(four, CpuLM)
    assert (eight.weights, four.weights) == ("8-bit", "4-bit")
    expected, logits = logits_of(eight), logits_of(four)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 0.005 < error < 0.3
    suffixes = sorted(path.name for path in folder.glob("*.rts-packed"))
    assert suffixes == ["model.safetensors.int4.rts-packed", "model.safetensors.rts-packed"]
    sizes = [(folder / name).stat().st_size for name in suffixes]
    assert sizes[0] < sizes[1]
    np.testing.assert_array_equal(logits_of(loaded(folder, monkeypatch, quantized="int4")), logits)


def test_keys_and_values_in_half_precision(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the same as in 8 bits, and not far from them; the same memory holds fewer."""
    expected = logits_of(loaded(folder, monkeypatch, metadata={"kv_cache_dtype": "float16"}))
    logits = logits_of(loaded(folder, monkeypatch))
    np.testing.assert_array_equal(logits_of(loaded(folder, monkeypatch, metadata={"kv_cache_dtype": "int8"})), logits)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 0 < error < 0.05
    blocks = [
        load(folder, kv_format=kept, kv_cache_mb=1, max_batch_size=1024).num_blocks for kept in ("int8", "float16")
    ]
    assert blocks[0] > 1.5 * blocks[1]


def test_weights_as_they_are_is_the_torch_engines(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(loaded(folder, monkeypatch, quantized=False), TorchLM)


def test_options_are_checked(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="engine must be one of auto, native, torch"):
        loaded(folder, monkeypatch, metadata={"engine": "fast"})
    with pytest.raises(ConfigError, match="threads must be a number"):
        loaded(folder, monkeypatch, metadata={"threads": "many"})
    with pytest.raises(ConfigError, match="kv_cache_dtype must be one of auto, int8, float16"):
        loaded(folder, monkeypatch, metadata={"kv_cache_dtype": "fp8"})
    with pytest.raises(UnsupportedModelError, match="kv_cache_dtype='int8' is not supported by the torch engine"):
        loaded(folder, monkeypatch, metadata={"kv_cache_dtype": "int8", "engine": "torch"})
    with pytest.raises(ConfigError, match="no option 'thread'"):
        loaded(folder, monkeypatch, metadata={"thread": 2})


def test_token_ids_of_rows_that_the_tokenizer_lacks_print_as_nothing(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    runner = load(tmp_path, tokenizer=TinyTokenizer(100))
    assert len(runner.vocabulary_tokens) == VOCABULARY
    assert runner.vocabulary_tokens[100:] == [b""] * (VOCABULARY - 100)
