"""The torch engine against transformers' own forward of each sequence alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from step_driver import StepDriver
from tiny_models import MAX_POSITIONS, ROPES, VOCABULARY, TinyTokenizer, save_tiny_llama, tiny_llama
from torch_reference import MAX_BATCH_SIZE, TOLERANCE, assert_matches, drive, load, random_tokens


@pytest.mark.usefixtures("each_attention")
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
        *ROPES,
        {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda rope: str(rope["rope_type"]),
)
def test_rotary_positions_are_the_models(tmp_path: Path, rope: dict[str, Any]) -> None:
    reference = save_tiny_llama(tmp_path, rope_parameters=rope)
    (sequence,) = drive(load(tmp_path), random_tokens(0, [200]), max_chunk=64)
    assert_matches(reference, sequence)


@pytest.mark.usefixtures("each_attention")
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
