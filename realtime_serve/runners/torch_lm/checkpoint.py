"""A model on disk, whatever its file format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from transformers import PreTrainedConfig


class Checkpoint(Protocol):
    """A model's configuration, and its tensors under transformers' names."""

    @property
    def source(self) -> str:
        """The file or folder, for messages."""

    @property
    def config(self) -> PreTrainedConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor that there is."""

    @property
    def rope_factors(self) -> torch.Tensor | None:
        """What each rotary frequency is divided by, beyond what the configuration says."""

    def check_type(self, name: str) -> None:
        """Raises UnsupportedModelError where `read` cannot make floats of what is stored."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, in whatever float type it comes. Raises ModelLoadError where it cannot be read."""
