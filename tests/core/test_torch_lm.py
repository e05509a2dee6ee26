"""The torch engine against transformers' own forward of each sequence alone, and its refusals."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from safetensors.torch import load_file, save_file
from step_driver import DrivenSequence, StepDriver
from tiny_models import MAX_POSITIONS, VOCABULARY, TinyTokenizer, save_tiny_llama, tiny_llama
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from realtime_serve.config import ModelConfig
from realtime_serve.engine.launch import LoadSpec, load_runner
from realtime_serve.engine.step_loop import EngineLimits
from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.runners.torch_lm import TorchLM

MAX_BATCH_SIZE = 8
TOLERANCE = 1e-4


def load(path: Path, **changes: Any) -> TorchLM:
    settings: dict[str, Any] = {
        "tokenizer": TinyTokenizer(),
        "device": "cpu",
        "dtype": "float32",
        "max_context": MAX_POSITIONS,
        "max_batch_size": MAX_BATCH_SIZE,
    }
    return TorchLM.load(path, **(settings | changes))


def random_tokens(seed: int, lengths: Sequence[int], vocabulary: int = VOCABULARY) -> list[list[int]]:
    numbers = random.Random(seed)
    return [[numbers.randrange(vocabulary) for _ in range(length)] for length in lengths]


def drive(runner: TorchLM, prompts: Sequence[Sequence[int]], *, max_chunk: int, seed: int = 0) -> list[DrivenSequence]:
    driver = StepDriver(runner, max_batch_size=MAX_BATCH_SIZE, seed=seed)
    sequences = [driver.add(prompt) for prompt in prompts]
    driver.run(sequences, max_chunk=max_chunk)
    return sequences


@torch.inference_mode()
def assert_matches(reference: LlamaForCausalLM, sequence: DrivenSequence, tolerance: float = TOLERANCE) -> None:
    expected = reference(input_ids=torch.tensor([sequence.tokens])).logits[0].float().numpy()
    logits = np.stack(sequence.logits)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
    best_two = np.sort(expected, axis=-1)[:, -2:]
    clear = best_two[:, 1] - best_two[:, 0] > tolerance
    np.testing.assert_array_equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"tie_word_embeddings": True}, id="grouped heads, tied"),
        pytest.param({"num_key_value_heads": 4}, id="a KV head each, untied"),
        pytest.param({"num_key_value_heads": 1, "head_dim": 32}, id="one KV head, wide heads"),
        pytest.param({"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 3}, id="biases"),
    ],
)
def test_mixed_batches_match_each_sequence_alone(tmp_path: Path, changes: dict[str, Any], seed: int) -> None:
    reference = save_tiny_llama(tmp_path, seed=seed, **changes)
    prompts = random_tokens(seed, [1, 2, 15, 16, 17, 40, 75, 130])
    for sequence in drive(load(tmp_path), prompts, max_chunk=24, seed=seed):
        assert_matches(reference, sequence)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 500.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rotary_positions_are_the_models(tmp_path: Path, rope: dict[str, Any]) -> None:
    reference = save_tiny_llama(tmp_path, rope_parameters=rope)
    (sequence,) = drive(load(tmp_path), random_tokens(0, [200]), max_chunk=64)
    assert_matches(reference, sequence)


def test_decoding_sequences_of_very_different_lengths_share_a_step(tmp_path: Path) -> None:
    reference = save_tiny_llama(tmp_path)
    driver = StepDriver(load(tmp_path), max_batch_size=MAX_BATCH_SIZE)
    sequences = [driver.add(tokens) for tokens in random_tokens(0, [500, 3, 90, 300, 67, 68])]
    driver.step([(sequence, len(sequence.tokens) - 2) for sequence in sequences])
    for _ in range(2):
        driver.step([(sequence, 1) for sequence in sequences])
    for sequence in sequences:
        assert_matches(reference, sequence)


def test_a_poisoned_sequence_harms_neither_its_neighbours_nor_who_gets_its_blocks(tmp_path: Path) -> None:
    reference = tiny_llama()
    poison = VOCABULARY - 1
    with torch.no_grad():
        reference.model.embed_tokens.weight[poison] = torch.nan
    reference.save_pretrained(tmp_path)
    driver = StepDriver(load(tmp_path), max_batch_size=MAX_BATCH_SIZE)

    poisoned = driver.add([poison] * 40)
    neighbour = driver.add(random_tokens(0, [20], poison)[0])
    driver.run([poisoned, neighbour], max_chunk=8)
    driver.free(poisoned)
    # Two lengths in one decoding step, so that the shorter is padded.
    heirs = [driver.add(tokens) for tokens in random_tokens(1, [3, 40], poison)]
    driver.step([(heir, heir.remaining - 1) for heir in heirs])
    driver.step([(heir, 1) for heir in heirs])

    assert np.isnan(poisoned.logits).all()
    assert set(heirs[0].blocks + heirs[1].blocks) & set(poisoned.blocks)
    for sequence in [neighbour, *heirs]:
        assert_matches(reference, sequence)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.25), ("float16", 0.03)])
def test_half_precision(tmp_path: Path, dtype: str, tolerance: float) -> None:
    reference = save_tiny_llama(tmp_path)
    for sequence in drive(load(tmp_path, dtype=dtype), random_tokens(0, [3, 40, 75]), max_chunk=24):
        expected = reference(input_ids=torch.tensor([sequence.tokens])).logits[0].detach().numpy()
        logits = np.stack(sequence.logits)
        assert logits.dtype == np.float32
        np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)


def test_logits_are_computed_where_they_are_wanted(tmp_path: Path) -> None:
    reference = save_tiny_llama(tmp_path)
    runner = load(tmp_path)
    driver = StepDriver(runner, max_batch_size=MAX_BATCH_SIZE)
    tokens = random_tokens(0, [10])[0]
    batch = driver.batch([(driver.add(tokens), 10)])
    batch.logits_at = np.array([2, 9], np.int64)
    given: list[np.ndarray[Any, Any]] = []
    batch.sample = given.append
    runner.step(batch)

    (logits,) = given
    assert logits.dtype == np.float32
    assert logits.flags.c_contiguous
    expected = reference(input_ids=torch.tensor([tokens])).logits[0, [2, 9]].detach().numpy()
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOLERANCE)


def test_a_step_that_wants_no_logits_samples_nothing(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    runner = load(tmp_path)
    driver = StepDriver(runner, max_batch_size=MAX_BATCH_SIZE)
    batch = driver.batch([(driver.add([1, 2, 3]), 3)])
    batch.logits_at = np.array([], np.int64)
    batch.sample = lambda logits: pytest.fail("there was nothing to sample")
    runner.step(batch)


def test_weights_in_several_shards(tmp_path: Path) -> None:
    reference = tiny_llama()
    reference.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (sequence,) = drive(load(tmp_path), random_tokens(0, [20]), max_chunk=20)
    assert_matches(reference, sequence)


def test_the_vocabulary_is_padded_to_the_number_of_logits(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    runner = load(tmp_path, tokenizer=TinyTokenizer(VOCABULARY - 2))
    assert runner.vocabulary_tokens[-3:] == [b"125", b"", b""]
    assert len(runner.vocabulary_tokens) == VOCABULARY
    assert runner.special_tokens == {0}
    assert runner.eos_tokens == {1}


def test_sizes(tmp_path: Path) -> None:
    save_tiny_llama(tmp_path)
    # A full batch of 8 sequences of 100 positions, 7 blocks each, takes less than the default cache.
    runner = load(tmp_path, max_context=100)
    assert (runner.max_context, runner.block_size, runner.num_blocks) == (100, 16, 56)
    # 2 layers x (key and value) x 2 KV heads x 16 values x 4 bytes x 16 positions = 8 KiB a block.
    assert load(tmp_path, kv_cache_mb=1, max_batch_size=100).num_blocks == 128
    assert load(tmp_path, dtype="bfloat16", kv_cache_mb=1, max_batch_size=100).num_blocks == 256
    assert load(tmp_path, max_context=10 * MAX_POSITIONS).max_context == MAX_POSITIONS


# GGUF


def write_gguf(path: Path, model: LlamaForCausalLM, *, rope_factors: list[float] | None = None) -> None:
    """As llama.cpp's converter does: its names, and query and key rows permuted to rotary pairs side by side."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    if config.rope_parameters["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_parameters["factor"])
    if rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", np.array(rope_factors, np.float32))
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, parameter in model.named_parameters():
        rows = parameter.detach().numpy()
        if "q_proj" in name or "k_proj" in name:
            rows = rows.reshape(-1, 2, config.head_dim // 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight", ".bias")), np.ascontiguousarray(rows))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"attention_bias": True, "head_dim": 32}, id="untied, biases, wide heads"),
        pytest.param(
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}, id="linear rope scaling"
        ),
    ],
)
def test_gguf(tmp_path: Path, changes: dict[str, Any]) -> None:
    reference = tiny_llama(**changes)
    write_gguf(tmp_path / "model.gguf", reference)
    for sequence in drive(load(tmp_path / "model.gguf"), random_tokens(0, [17, 60]), max_chunk=24):
        assert_matches(reference, sequence)


def test_gguf_rope_factors_divide_the_frequencies(tmp_path: Path) -> None:
    reference = tiny_llama()
    factors = [1.0, 1.0, 1.5, 2.0, 4.0, 8.0, 8.0, 8.0]
    write_gguf(tmp_path / "model.gguf", reference, rope_factors=factors)
    reference.model.rotary_emb.inv_freq /= torch.tensor(factors)
    (sequence,) = drive(load(tmp_path / "model.gguf"), random_tokens(0, [60]), max_chunk=24)
    assert_matches(reference, sequence)


def write_metadata(path: Path, values: dict[str, Any]) -> None:
    """A GGUF file of metadata alone."""
    writer = gguf.GGUFWriter(path, values.pop("architecture"))
    for key, value in values.items():
        writer.add_key_value(key, value, gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


LLAMA_METADATA = {
    "architecture": "llama",
    "llama.context_length": 64,
    "llama.embedding_length": 64,
    "llama.block_count": 2,
    "llama.feed_forward_length": 96,
    "llama.attention.head_count": 4,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma' is not supported; supported: 'llama'"),
        ({"llama.expert_count": 8}, "a mixture of experts is not supported"),
        ({"llama.rope.dimension_count": 8}, "rotary positions on a part of each head is not supported"),
        ({}, "tensor 'token_embd.weight' is missing"),
    ],
)
def test_unsupported_gguf(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_metadata(tmp_path / "model.gguf", LLAMA_METADATA | changes)
    with pytest.raises(ModelLoadError, match=re.escape(f"model.gguf: {message}")):
        load(tmp_path / "model.gguf")


def test_gguf_without_a_needed_key(tmp_path: Path) -> None:
    values = dict(LLAMA_METADATA)
    del values["llama.block_count"]
    write_metadata(tmp_path / "model.gguf", values)
    with pytest.raises(ModelLoadError, match=re.escape("'llama.block_count' is missing")):
        load(tmp_path / "model.gguf")


def gguf_reference(path: Path) -> LlamaForCausalLM:
    """The model by the gguf package's reader, names and arithmetic."""
    reader = gguf.GGUFReader(path)

    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    config = LlamaConfig(
        vocab_size=value("vocab_size"),
        hidden_size=value("embedding_length"),
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=value("attention.head_count"),
        num_key_value_heads=value("attention.head_count_kv"),
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        tie_word_embeddings=True,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    stored = {tensor.name: tensor for tensor in reader.tensors}
    with torch.device("meta"):
        wanted = [name for name, _ in LlamaForCausalLM(config).named_parameters()]
    tensors = {}
    for name in wanted:
        tensor = stored[names.get_name(name, try_suffixes=(".weight",))]
        rows = dequantize(tensor.data, tensor.tensor_type)
        if "q_proj" in name or "k_proj" in name:
            # Rotary pairs lie side by side; transformers wants the first of each pair, then the second.
            halves = np.arange(config.head_dim).reshape(-1, 2).T.ravel()
            rows = rows.reshape(-1, config.head_dim, rows.shape[1])[:, halves].reshape(rows.shape)
        tensors[name] = torch.from_numpy(np.array(rows))
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=tensors).eval()


# Token ids of text: on random ids this model's logits are large, and transformers' own attention kernels differ by more
# than the tolerance.
PROMPTS = [
    # The capital of France is
    [504, 3575, 282, 4649, 314],
    # Once upon a time, in a village by the sea, there lived an old fisherman who
    [6403, 1980, 253, 655, 28, 281, 253, 6560, 411, 260, 3426, 28, 665, 4161, 354, 1573, 43663, 617],
    # def fibonacci(n):
    #     if n < 2:
    #         return n
    #     return
    [1604, 3987, 46477, 24, 94, 727, 472, 585, 304, 2067, 216, 34, 42, 448, 1003, 304, 472, 1003],
    # Gravity is a force by which all things with mass or energy are brought toward one another. On Earth, gravity gives
    # weight to physical objects, and the Moon's gravity is responsible for sublunar tides in the oceans. The
    # gravitational attraction between the original gaseous matter in the universe caused it to
    [22007, 6463, 314, 253, 3075, 411, 527, 511, 1495, 351, 2389, 355, 1439, 359, 3621, 1731, 582, 1372, 30]
    + [1985, 2591, 28, 9354, 3894, 2613, 288, 2099, 3401, 28, 284, 260, 8872, 506, 9354, 314, 3358, 327, 840]
    + [92, 11665, 27485, 281, 260, 10959, 30, 378, 16027, 16584, 826, 260, 2798, 33701, 2631, 281, 260, 6128]
    + [2952, 357, 288],
]


def test_the_default_model_matches_transformers(default_model_path: Path) -> None:
    reference = gguf_reference(default_model_path)
    runner = load(default_model_path, tokenizer=TinyTokenizer(reference.config.vocab_size))
    for sequence in drive(runner, PROMPTS, max_chunk=16):
        assert_matches(reference, sequence)


# Refusals


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tiny_llama(tmp_path)
    return tmp_path


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replaces tensors, their names with dots for double underscores; None removes one."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    for name, tensor in changes.items():
        tensors.pop(name.replace("__", "."), None)
        if tensor is not None:
            tensors[name.replace("__", ".")] = tensor
    save_file(tensors, path)


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


def test_weights_that_do_not_fit_the_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("realtime_serve.runners.torch_lm.llama.free_bytes", lambda device: 100_000)
    assert refusal(folder) == f"{folder}: the weights take 0.3 MB as float32, and cpu has 0.1 MB free"


UNSUPPORTED = [
    ({"model_type": "mamba"}, "architecture 'mamba' is not supported; supported: 'llama'"),
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
    with pytest.raises(UnsupportedModelError, match=re.escape(f"config.json: {message}")):
        load(folder)


def test_weights_that_are_not_floats(folder: Path) -> None:
    change_tensors(folder, model__norm__weight=torch.ones(64, dtype=torch.int8))
    with pytest.raises(UnsupportedModelError, match=re.escape("tensor 'model.norm.weight' is stored as int8")):
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
    config = ModelConfig("tiny", model_path=str(folder), device="cpu", quantized=quantized)
    spec = LoadSpec(
        config, EngineLimits(max_batch_size=1, max_step_tokens=8, max_queue=1, ageing_ms=1), path=str(folder)
    )
    with pytest.raises(UnsupportedModelError, match=rf"quantized={quantized!r} is not supported by the torch engine"):
        load_runner(spec)
