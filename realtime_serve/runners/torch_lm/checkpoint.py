"""A model on disk, whatever its file format."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import torch
from transformers.models.llama.configuration_llama import LlamaConfig

from realtime_serve.errors import ModelLoadError


class Checkpoint(Protocol):
    """A Llama's configuration, and its tensors under transformers' names."""

    @property
    def source(self) -> str:
        """The file or folder, for messages."""

    @property
    def config(self) -> LlamaConfig: ...

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Every tensor that there is."""

    @property
    def rope_factors(self) -> torch.Tensor | None:
        """What each rotary frequency is divided by, beyond what the configuration says."""

    def read(self, name: str) -> torch.Tensor:
        """A tensor on the CPU, in whatever float type it comes. Raises ModelLoadError where it cannot be read."""


def make_config(values: dict[str, Any], source: str) -> LlamaConfig:
    """Raises ModelLoadError where transformers refuses the values."""
    try:
        return LlamaConfig.from_dict(values)
    except Exception as error:
        raise ModelLoadError(f"{source}: {' '.join(str(error).split())}") from error
