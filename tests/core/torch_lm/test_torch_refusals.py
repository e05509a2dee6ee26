"""What the torch engine refuses to load, and the line that says why."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, TinyTokenizer, change_tensors, save_tiny_llama, tiny_llama
from torch_reference import load

from realtime_serve.config import ModelConfig
from realtime_serve.engine.launch import load_runner
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.engine.load_spec import LoadSpec
from realtime_serve.errors import ModelLoadError, UnsupportedModelError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refusal(folder: Path, **changes: Any) -> str:
    with pytest.raises(ModelLoadError) as refused:
        load(folder, **changes)
    message = str(refused.value)
    assert "\n" not in message
    return message


def test_a_missing_config_is_named(folder: Path) -> None:
    (folder / "config.json").unlink()
    assert refusal(folder) == f"{folder}/config.json: not there"


def test_a_broken_config_is_named(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    assert refusal(folder).startswith(f"{folder}/config.json: not readable as JSON: ")


def test_a_config_that_makes_no_sense(folder: Path) -> None:
    change_config(folder, hidden_size=65)
    assert "hidden size (65)" in refusal(folder)


def test_a_shard_that_the_index_lists_but_is_not_there(tmp_path: Path) -> None:
    tiny_llama().save_pretrained(tmp_path, max_shard_size="40KB")
    shard = sorted(tmp_path.glob("*.safetensors"))[1]
    shard.unlink()
    assert refusal(tmp_path) == f"{shard}: the index lists this file, and it is not there"


def test_a_tensor_that_its_shard_lacks(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model.safetensors", "absent": "model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert refusal(folder) == (
        f"{folder}/model.safetensors: the index lists tensor 'absent' in it, and it is not there"
    )


@pytest.mark.parametrize("end", [2**20, 2**62])
def test_a_header_that_lies_about_a_size(folder: Path, end: int) -> None:
    weights = folder / "model.safetensors"
    stored = weights.read_bytes()
    size = int.from_bytes(stored[:8], "little")
    header = json.loads(stored[8 : 8 + size])
    header["model.norm.weight"] |= {"shape": [end // 4], "data_offsets": [0, end]}
    changed = json.dumps(header).encode()
    weights.write_bytes(len(changed).to_bytes(8, "little") + changed + stored[8 + size :])
    assert refusal(folder).startswith(f"{weights}: not a readable safetensors file: ")


def test_a_header_that_lies_about_its_own_size(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes((2**60).to_bytes(8, "little") + weights.read_bytes()[8:])
    assert refusal(folder).startswith(f"{weights}: not a readable safetensors file: ")


def test_more_layers_than_tensors(folder: Path) -> None:
    change_config(folder, num_hidden_layers=10**9)
    assert refusal(folder) == f"{folder}: the configuration says 1000000000 layers, and there are 21 tensors"


def test_numbers_that_make_no_model(folder: Path) -> None:
    change_config(folder, intermediate_size=-1)
    assert refusal(folder).startswith(f"{folder}: the configuration makes no model: ")


def test_key_value_heads_that_do_not_divide_the_heads(folder: Path) -> None:
    change_config(folder, num_key_value_heads=3)
    assert refusal(folder) == f"{folder}/config.json: 4 attention heads cannot share 3 key-value heads"


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    config = ModelConfig("tiny", model_path=str(folder), device="cpu")
    limits = EngineLimits(max_batch_size=1, max_step_tokens=8, max_queue=1, ageing_ms=1)
    with pytest.raises(ModelLoadError, match=re.escape(f"{folder}/tokenizer.json: not there")):
        load_runner(LoadSpec(config, limits, path=str(folder)))


def test_a_shard_outside_the_folder(folder: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "must map each tensor to a file of this folder" in refusal(folder)


def test_a_truncated_weights_file(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert refusal(folder).startswith(f"{weights}: not a readable safetensors file: ")


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert refusal(folder) == f"{folder}: neither model.safetensors nor model.safetensors.index.json is there"


def test_a_missing_tensor(folder: Path) -> None:
    change_tensors(folder, model__layers__1__mlp__up_proj__weight=None)
    assert refusal(folder) == f"{folder}: tensor 'model.layers.1.mlp.up_proj.weight' is missing"


def test_a_tensor_of_the_wrong_shape(folder: Path) -> None:
    change_tensors(folder, model__norm__weight=torch.ones(63))
    assert refusal(folder) == f"{folder}: tensor 'model.norm.weight' has shape [63], the model needs [64]"


def test_a_tensor_without_a_place(folder: Path) -> None:
    change_tensors(folder, model__layers__0__self_attn__q_proj__bias=torch.ones(64))
    assert "no place for tensor 'model.layers.0.self_attn.q_proj.bias'" in refusal(folder)


def test_frequencies_in_old_checkpoints_are_ignored(folder: Path) -> None:
    change_tensors(folder, model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(8))
    load(folder)


def test_weights_and_cache_that_do_not_fit_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A full batch of 8 sequences of 512 positions has 2 MB of keys and values in a layer pair.
    monkeypatch.setattr("realtime_serve.runners.torch_lm.runner.free_bytes", lambda device: 2_300_000)
    monkeypatch.setattr("realtime_serve.runners.torch_lm.model.ModelBuilder.load", lambda *_: pytest.fail("loaded"))
    assert refusal(folder, kv_cache_mb=2) == (
        f"{folder}: the weights take 0.3 MB as float32 and the KV cache 2.1 MB, and cpu has 2.3 MB free"
    )
    monkeypatch.setattr("realtime_serve.runners.torch_lm.runner.free_bytes", lambda device: 200_000)
    assert "the weights take 0.3 MB" in refusal(folder)


def test_a_cache_whose_size_nobody_chose_fits_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    everything = load(folder).num_blocks
    monkeypatch.setattr("realtime_serve.runners.torch_lm.runner.free_bytes", lambda device: 2_300_000)
    blocks = load(folder).num_blocks
    assert blocks == pytest.approx(0.8 * (2_300_000 - 300_000) / 8192, abs=12)
    assert blocks < everything


UNSUPPORTED = [
    ({"model_type": "unheard_of"}, "architecture 'unheard_of' is not supported; supported: 'cohere', "),
    ({"model_type": None}, "architecture None is not supported; supported: "),
    ({"model_type": "mamba", "state_size": 16}, "architecture 'mamba' is not supported (it has state-space layers)"),
    ({"model_type": "gpt_oss", "num_local_experts": 8}, "(it has attention sinks and a mixture of experts)"),
    ({"model_type": "mixtral", "num_local_experts": 8}, "(it has a mixture of experts)"),
    ({"model_type": "deepseek_v2", "kv_lora_rank": 8}, "(it has latent attention)"),
    ({"model_type": "gemma3", "vision_config": {}}, "(it has a vision tower)"),
    ({"model_type": "falcon", "alibi": True}, "(it has ALiBi)"),
    ({"model_type": "mpt"}, "(it has ALiBi)"),
    ({"model_type": "t5", "is_encoder_decoder": True}, "(it has an encoder)"),
    (
        {"model_type": "qwen3_next", "layer_types": ["linear_attention", "full_attention"]},
        "(it has layers that keep a state in place of keys and values)",
    ),
    ({"model_type": "gemma2", "use_bidirectional_attention": True}, "attention to later tokens"),
    ({"auto_map": {"AutoModel": "evil.Model"}}, "the model needs code of its own (auto_map), which is never run"),
    ({"quantization_config": {"quant_method": "gptq"}}, "quantized weights are not supported in this format"),
    (
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
        "rope type 'dynamic' is not supported; supported: 'default', 'linear', 'llama3', 'yarn'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), UNSUPPORTED, ids=lambda case: str(case)[:30])
def test_unsupported_folders(folder: Path, changes: dict[str, Any], message: str) -> None:
    change_config(folder, **changes)
    with pytest.raises(UnsupportedModelError, match=re.escape("config.json: ") + ".*" + re.escape(message)):
        load(folder)


def test_weights_that_are_not_floats(folder: Path) -> None:
    change_tensors(folder, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(UnsupportedModelError, match=re.escape("tensor 'model.norm.weight' is stored as I8;")):
        load(folder)


def test_pickled_weights_are_not_loaded(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UnsupportedModelError, match=re.escape("the weights are pickled (pytorch_model.bin)")):
        load(folder)


def test_a_tokenizer_with_more_tokens_than_logits(folder: Path) -> None:
    tokenizer = TinyTokenizer(VOCABULARY + 1)
    assert refusal(folder, tokenizer=tokenizer) == "the tokenizer has 129 tokens, the model 128"


def test_a_cache_that_holds_no_sequence(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path, max_position_embeddings=4096)
    message = refusal(tmp_path, max_context=4096, kv_cache_mb=1)
    assert message == ("the KV cache of 1 MB does not hold one sequence of 4096 positions: that takes kv_cache_mb=2")
    load(tmp_path, max_context=4096, kv_cache_mb=2)


def test_a_dtype_that_there_is_not(folder: Path) -> None:
    assert refusal(folder, dtype="int4").startswith("dtype 'int4' is not supported; supported: 'float32', ")


def test_a_device_that_there_is_not(folder: Path) -> None:
    assert "device 'cuda:99' is not available" in refusal(folder, device="cuda:99")


@pytest.mark.parametrize("quantized", ["int8", "int4", True])
def test_quantizing_is_refused_and_not_ignored(folder: Path, quantized: bool | str) -> None:
    config = ModelConfig(
        "tiny", model_path=str(folder), device="cpu", quantized=quantized, metadata={"engine": "torch"}
    )
    spec = LoadSpec(
        config, EngineLimits(max_batch_size=1, max_step_tokens=8, max_queue=1, ageing_ms=1), path=str(folder)
    )
    with pytest.raises(UnsupportedModelError, match=rf"quantized={quantized!r} is not supported by the torch engine"):
        load_runner(spec)
