"""The torch engine's sequences beside transformers' own forward of each alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from step_driver import DrivenSequence, StepDriver
from tiny_models import MAX_POSITIONS, VOCABULARY, TinyTokenizer
from transformers import PreTrainedModel

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
def reference_logits(reference: PreTrainedModel, tokens: Sequence[int]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[len(tokens), vocabulary]"""
    logits: torch.Tensor = reference(input_ids=torch.tensor([tokens])).logits[0].float()
    return logits.numpy()


def assert_matches(reference: PreTrainedModel, sequence: DrivenSequence, tolerance: float = TOLERANCE) -> None:
    expected = reference_logits(reference, sequence.tokens)
    logits = np.stack(sequence.logits)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)
    best_two = np.sort(expected, axis=-1)[:, -2:]
    clear = best_two[:, 1] - best_two[:, 0] > tolerance
    np.testing.assert_array_equal(logits.argmax(-1)[clear], expected.argmax(-1)[clear])
