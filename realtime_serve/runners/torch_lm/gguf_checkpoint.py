"""A GGUF file, translated to transformers' configuration, names and layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from realtime_serve._core import GgufFile
from realtime_serve.errors import ModelLoadError
from realtime_serve.runners.torch_lm.families import make_config
from realtime_serve.runners.torch_lm.gguf_architectures import (
    ARCHITECTURES,
    MODEL_NAMES,
    Architecture,
    common_config,
)
from realtime_serve.runners.torch_lm.gguf_metadata import GgufMetadata

_ROPE_FACTORS = "rope_freqs.weight"
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)")


class GgufCheckpoint:
    """See `Checkpoint`. Raises UnsupportedModelError or ModelLoadError that names the file and what is wrong."""

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        try:
            self._file = GgufFile(path)
        except RuntimeError as error:
            raise ModelLoadError(str(error)) from error
        tensors = self._file.tensors
        metadata = GgufMetadata(self._file.metadata, tensors, self.source)
        self._architecture = _architecture(metadata)
        self.config = make_config(self._config_values(metadata), self.source)
        self._check_types()
        self._stored = {_translate(name, self._architecture): name for name in tensors if name != _ROPE_FACTORS}
        self.shapes = {name: tuple(tensors[stored].shape) for name, stored in self._stored.items()}
        self.rope_factors = self._read_rope_factors()

    def check_type(self, name: str) -> None:
        """All were checked at once."""

    def read(self, name: str) -> torch.Tensor:
        tensor = self._dequantize(self._stored[name])
        if self._architecture.has_rotary_pairs:
            if ".q_proj." in name:
                return _split_halves(tensor, self.config.num_attention_heads)
            if ".k_proj." in name:
                return _split_halves(tensor, self.config.num_key_value_heads)
        if name.endswith("norm.weight"):
            return tensor - self._architecture.norm_offset
        return tensor

    def _config_values(self, metadata: GgufMetadata) -> dict[str, Any]:
        embedding = metadata.tensors.get("token_embd.weight")
        values = common_config(metadata) | self._architecture.config(metadata)
        if embedding is None:
            raise ModelLoadError(f"{self.source}: tensor 'token_embd.weight' is missing")
        return {**values, "vocab_size": embedding.shape[0] if embedding.shape else 0, "pad_token_id": None}

    def _check_types(self) -> None:
        """Decodes the smallest tensor of each type, before memory is taken for all of them."""
        smallest: dict[str, str] = {}
        for name, tensor in sorted(self._file.tensors.items(), key=lambda item: item[1].nbytes):
            smallest.setdefault(tensor.type, name)
        for name in smallest.values():
            self._dequantize(name)

    def _read_rope_factors(self) -> torch.Tensor | None:
        if _ROPE_FACTORS not in self._file.tensors:
            return None
        factors = self._dequantize(_ROPE_FACTORS)
        if factors.shape != (self.config.head_dim // 2,):
            raise ModelLoadError(
                f"{self.source}: tensor {_ROPE_FACTORS!r} has shape {list(factors.shape)}, the model needs"
                f" {[self.config.head_dim // 2]}"
            )
        return factors

    def _dequantize(self, stored: str) -> torch.Tensor:
        try:
            return torch.from_numpy(self._file.dequantize(stored))
        except RuntimeError as error:
            raise ModelLoadError(str(error)) from error


def _architecture(metadata: GgufMetadata) -> Architecture:
    architecture = ARCHITECTURES.get(str(metadata.architecture))
    if architecture is None:
        raise metadata.unsupported(
            f"architecture {metadata.architecture!r}", f"; supported: {', '.join(map(repr, ARCHITECTURES))}"
        )
    return architecture


def _translate(stored: str, architecture: Architecture) -> str:
    """transformers' name of a tensor; the stored one where it has none."""
    stem, _, kind = stored.rpartition(".")
    layer = _LAYER_TENSOR.fullmatch(stem)
    if layer and layer[2] in architecture.layer_names:
        return f"model.layers.{layer[1]}.{architecture.layer_names[layer[2]]}.{kind}"
    return f"{MODEL_NAMES[stem]}.{kind}" if stem in MODEL_NAMES else stored


def _split_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, from rotary pairs side by side, as GGUF has them, to a head's two halves."""
    rows, *columns = tensor.shape
    return tensor.view(heads, rows // heads // 2, 2, *columns).transpose(1, 2).reshape(rows, *columns)
