"""Each family that the torch engine runs, in batches of sequences at different positions, against transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from step_driver import StepDriver
from tiny_models import WINDOW, save_tiny_model, tiny_model
from torch_reference import MAX_BATCH_SIZE, TOLERANCE, assert_matches, drive, load, random_tokens, reference_logits

from realtime_serve.runners.torch_lm.families import FAMILIES


@pytest.mark.usefixtures("each_attention")
@pytest.mark.parametrize("family", FAMILIES)
def test_mixed_batches_match_each_sequence_alone(tmp_path: Path, family: str) -> None:
    reference = save_tiny_model(tmp_path, family)
    prompts = random_tokens(0, [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 40, 75, 130])
    for sequence in drive(load(tmp_path), prompts, max_chunk=24):
        assert_matches(reference, sequence)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        pytest.param("gemma2", {"attn_logit_softcapping": None, "final_logit_softcapping": None}, id="no soft caps"),
        pytest.param("gemma2", {"sliding_window": 1}, id="a window of one position"),
        pytest.param("gpt2", {"scale_attn_by_inverse_layer_idx": True}, id="scales by layer"),
        pytest.param("gpt2", {"tie_word_embeddings": False}, id="GPT-2 untied"),
        pytest.param("gpt_neox", {"use_parallel_residual": False, "tie_word_embeddings": True}, id="GPT-NeoX tied"),
        pytest.param("mistral", {"sliding_window": None}, id="Mistral without a window"),
        pytest.param("olmo", {"clip_qkv": None}, id="OLMo without clipping"),
        pytest.param("phi", {"qk_layernorm": True}, id="Phi with norms"),
        pytest.param("qwen2", {"use_sliding_window": False}, id="Qwen2 without a window"),
        pytest.param("qwen3", {"attention_bias": True, "num_key_value_heads": 1}, id="Qwen3 with biases"),
    ],
)
def test_what_a_configuration_can_change(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    reference = save_tiny_model(tmp_path, family, **changes)
    for sequence in drive(load(tmp_path), random_tokens(1, [3, 30, 75]), max_chunk=24):
        assert_matches(reference, sequence)


@pytest.mark.usefixtures("each_attention")
@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "mistral", "qwen2"])
@pytest.mark.parametrize("chunk", [1, 7, WINDOW, 64, 256])
def test_chunks_of_any_size_pass_a_window(tmp_path: Path, family: str, chunk: int) -> None:
    reference = save_tiny_model(tmp_path, family)
    driver = StepDriver(load(tmp_path), max_batch_size=MAX_BATCH_SIZE)
    sequence = driver.add(random_tokens(0, [70])[0])
    while sequence.remaining:
        driver.step([(sequence, min(chunk, sequence.remaining))])
    assert_matches(reference, sequence)


@pytest.mark.usefixtures("each_attention")
@pytest.mark.parametrize("family", ["gemma2", "llama", "mistral"])
def test_decoding_sequences_of_very_different_lengths_share_a_step(tmp_path: Path, family: str) -> None:
    reference = save_tiny_model(tmp_path, family)
    driver = StepDriver(load(tmp_path), max_batch_size=MAX_BATCH_SIZE)
    sequences = [driver.add(tokens) for tokens in random_tokens(0, [500, 3, 90, 300, 67, 68])]
    driver.step([(sequence, len(sequence.tokens) - 2) for sequence in sequences])
    for _ in range(2):
        driver.step([(sequence, 1) for sequence in sequences])
    for sequence in sequences:
        assert_matches(reference, sequence)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gemma2", {"sliding_window": WINDOW + 1}),
        ("gemma2", {"attn_logit_softcapping": 2.0}),
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("gemma2", {"query_pre_attn_scalar": 32}),
        ("gemma3_text", {"sliding_window": WINDOW - 1}),
        ("mistral", {"sliding_window": WINDOW + 1}),
        ("phi3", {"sliding_window": WINDOW + 1}),
        ("qwen2", {"max_window_layers": 2}),
        ("olmo", {"clip_qkv": 1.0}),
        ("granite", {"attention_multiplier": 0.2}),
        ("gpt_neox", {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.25}}),
    ],
    ids=str,
)
def test_another_configuration_gives_other_logits(tmp_path: Path, family: str, changes: dict[str, Any]) -> None:
    """The tiny models show each of these: comparing them says something."""
    own, other = save_tiny_model(tmp_path, family), tiny_model(family, **changes)
    other.load_state_dict(own.state_dict())
    tokens = random_tokens(0, [60])[0]
    (sequence,) = drive(load(tmp_path), [tokens], max_chunk=24)
    difference = np.abs(np.stack(sequence.logits) - reference_logits(other, tokens)).max()
    assert difference > 10 * TOLERANCE


def test_long_rope_stays_within_its_original_context(tmp_path: Path) -> None:
    reference = save_tiny_model(
        tmp_path,
        "phi3",
        original_max_position_embeddings=64,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 500.0,
            "original_max_position_embeddings": 64,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
            "long_factor": [2.0] * 8,
        },
    )
    runner = load(tmp_path)
    assert runner.max_context == 64
    (sequence,) = drive(runner, random_tokens(0, [64]), max_chunk=24)
    assert_matches(reference, sequence)


# How checkpoints that others saved name their tensors.


def rename(folder: Path, changes: Callable[[str], str], **more: torch.Tensor) -> None:
    path = folder / "model.safetensors"
    save_file({changes(name): tensor for name, tensor in load_file(path).items()} | more, path)


def test_a_gpt2_without_its_output_layer(tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path, "gpt2")
    rename(tmp_path, lambda name: name.removeprefix("transformer."), **{"h.0.attn.bias": torch.ones(1, 1, 8, 8)})
    (sequence,) = drive(load(tmp_path), random_tokens(0, [30]), max_chunk=24)
    assert_matches(reference, sequence)


def test_a_gpt_neox_of_former_versions(tmp_path: Path) -> None:
    reference = save_tiny_model(tmp_path, "gpt_neox")
    rename(
        tmp_path,
        lambda name: name.replace("lm_head.", "embed_out."),
        **{
            "gpt_neox.layers.0.attention.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
            "gpt_neox.layers.0.attention.masked_bias": torch.tensor(-1e9),
            "gpt_neox.layers.0.attention.rotary_emb.inv_freq": torch.ones(4),
        },
    )
    (sequence,) = drive(load(tmp_path), random_tokens(0, [30]), max_chunk=24)
    assert_matches(reference, sequence)
