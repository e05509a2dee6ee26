"""GGUF files as llama.cpp's converter writes them, against the same weights in transformers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from gguf_writer import write_gguf
from tiny_models import TinyTokenizer, tiny_llama, tiny_model
from torch_reference import assert_matches, drive, load, random_tokens
from transformers.models.llama.configuration_llama import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaForCausalLM

from realtime_serve.errors import ModelLoadError


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("llama", {"tie_word_embeddings": True}, id="Llama, tied"),
        pytest.param("llama", {"attention_bias": True, "head_dim": 32}, id="Llama, untied, biases, wide heads"),
        pytest.param(
            "llama",
            {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
            id="Llama, linear rope scaling",
        ),
        pytest.param("mistral", {"sliding_window": None, "head_dim": 32}, id="Mistral"),
        pytest.param("qwen2", {"use_sliding_window": False}, id="Qwen2"),
        pytest.param("qwen3", {"use_sliding_window": False}, id="Qwen3"),
        pytest.param("gemma", {}, id="Gemma"),
        pytest.param("gemma2", {"query_pre_attn_scalar": 32}, id="Gemma 2"),
        pytest.param("gemma3_text", {"query_pre_attn_scalar": 32}, id="Gemma 3"),
        pytest.param("gpt2", {"tie_word_embeddings": True}, id="GPT-2"),
    ],
)
def test_gguf(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    reference = tiny_model(family, **changes)
    write_gguf(tmp_path / "model.gguf", reference)
    for sequence in drive(load(tmp_path / "model.gguf"), random_tokens(0, [17, 60]), max_chunk=24):
        assert_matches(reference, sequence)


@pytest.mark.parametrize(("family", "layers"), [("gemma2", 46), ("gemma3_text", 62)])
def test_gemmas_of_27_billion_scale_queries_otherwise(tmp_path: Path, family: str, layers: int) -> None:
    # 64 values of the embedding over 4 heads.
    reference = tiny_model(family, num_hidden_layers=layers, query_pre_attn_scalar=16, initializer_range=0.02)
    write_gguf(tmp_path / "model.gguf", reference)
    (sequence,) = drive(load(tmp_path / "model.gguf"), random_tokens(0, [40]), max_chunk=24)
    assert_matches(reference, sequence)


@pytest.mark.parametrize(
    ("pattern", "slides"), [(3, [True, True, False, True]), ([False, True, True, False], [False, True, True, False])]
)
def test_gguf_says_which_layers_have_a_window(tmp_path: Path, pattern: int | list[bool], slides: list[bool]) -> None:
    kinds = ["sliding_attention" if slide else "full_attention" for slide in slides]
    reference = tiny_model("gemma3_text", num_hidden_layers=4, query_pre_attn_scalar=32, layer_types=kinds)
    write_gguf(tmp_path / "model.gguf", reference, attention__sliding_window_pattern=pattern)
    (sequence,) = drive(load(tmp_path / "model.gguf"), random_tokens(0, [60]), max_chunk=24)
    assert_matches(reference, sequence)


def test_a_mistral_that_says_its_window(tmp_path: Path) -> None:
    reference = tiny_model("mistral")
    write_gguf(tmp_path / "model.gguf", reference, attention__sliding_window=reference.config.sliding_window)
    (sequence,) = drive(load(tmp_path / "model.gguf"), random_tokens(0, [60]), max_chunk=24)
    assert_matches(reference, sequence)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2"])
def test_quantized_gguf(tmp_path: Path, family: str) -> None:
    reference = tiny_model(family, **{"use_sliding_window": False} if family == "qwen2" else {})
    if family == "gemma2":
        reference = tiny_model(family, query_pre_attn_scalar=32)
    types = (gguf.GGMLQuantizationType.F16, gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1)
    with torch.no_grad():
        for turn, parameter in enumerate(reference.parameters()):
            if parameter.ndim == 2:
                kind = types[turn % len(types)]
                parameter.copy_(torch.from_numpy(dequantize(quantize(parameter.numpy(), kind), kind)))
    write_gguf(tmp_path / "model.gguf", reference, types=types)
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
        if isinstance(value, list):
            writer.add_array(key, value)
            continue
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
        ({"architecture": "mamba"}, "architecture 'mamba' is not supported; supported: 'llama', 'qwen2', "),
        ({"llama.attention.head_count_kv": "4"}, "'llama.attention.head_count_kv' is '4', and not a whole number"),
        ({"llama.attention.layer_norm_rms_epsilon": True}, "is True, and not a number"),
        ({"llama.attention.value_length": 8}, "values of another length than keys is not supported"),
        ({"llama.rope.scaling.type": "yarn"}, "rope scaling 'yarn' is not supported; supported: 'linear'"),
        ({"llama.attention.head_count": 0}, "'llama.attention.head_count' is 0, and not above 0"),
        ({"llama.attention.head_count": [4, 4]}, "'llama.attention.head_count' is a list of 2, and not a whole number"),
        ({"llama.expert_count": 8}, "a mixture of experts is not supported"),
        ({"llama.rope.dimension_count": 8}, "rotary positions on a part of each head is not supported"),
        ({}, "tensor 'token_embd.weight' is missing"),
    ],
)
def test_unsupported_gguf(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    write_metadata(tmp_path / "model.gguf", LLAMA_METADATA | changes)
    with pytest.raises(ModelLoadError, match=re.escape("model.gguf: ") + ".*" + re.escape(message)):
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
