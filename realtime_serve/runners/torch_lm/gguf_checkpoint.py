"""A GGUF file, translated to transformers' configuration, names and layout."""

from __future__ import annotations

from pathlib import Path

import torch

from realtime_serve._core import GgufFile
from realtime_serve.checkpoints.gguf_architectures import ROPE_FACTORS, architecture_of, config_of
from realtime_serve.checkpoints.gguf_metadata import GgufMetadata
from realtime_serve.errors import ModelLoadError
from realtime_serve.runners.torch_lm.families import make_config


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
        self._architecture = architecture_of(metadata)
        self.config = make_config(config_of(metadata), self.source)
        self._check_types()
        self._stored = {self._architecture.name_of(name): name for name in tensors if name != ROPE_FACTORS}
        self.shapes = {
            name: tuple(tensors[stored].shape)[:: -1 if self._architecture.is_transposed(name) else 1]
            for name, stored in self._stored.items()
        }
        self.rope_factors = self._read_rope_factors()

    def check_type(self, name: str) -> None:
        """All were checked at once."""

    def read(self, name: str) -> torch.Tensor:
        tensor = self._dequantize(self._stored[name])
        if self._architecture.is_transposed(name):
            return tensor.T
        if self._architecture.has_rotary_pairs:
            if ".q_proj." in name:
                return _split_halves(tensor, self.config.num_attention_heads)
            if ".k_proj." in name:
                return _split_halves(tensor, self.config.num_key_value_heads)
        if name.endswith("norm.weight"):
            return tensor - self._architecture.norm_offset
        return tensor

    def _check_types(self) -> None:
        """Decodes the smallest tensor of each type, before memory is taken for all of them."""
        smallest: dict[str, str] = {}
        for name, tensor in sorted(self._file.tensors.items(), key=lambda item: item[1].nbytes):
            smallest.setdefault(tensor.type, name)
        for name in smallest.values():
            self._dequantize(name)

    def _read_rope_factors(self) -> torch.Tensor | None:
        if ROPE_FACTORS not in self._file.tensors:
            return None
        factors = self._dequantize(ROPE_FACTORS)
        if factors.shape != (self.config.head_dim // 2,):
            raise ModelLoadError(
                f"{self.source}: tensor {ROPE_FACTORS!r} has shape {list(factors.shape)}, the model needs"
                f" {[self.config.head_dim // 2]}"
            )
        return factors

    def _dequantize(self, stored: str) -> torch.Tensor:
        try:
            return torch.from_numpy(self._file.dequantize(stored))
        except RuntimeError as error:
            raise ModelLoadError(str(error)) from error


def _split_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, from rotary pairs side by side, as GGUF has them, to a head's two halves."""
    rows, *columns = tensor.shape
    return tensor.view(heads, rows // heads // 2, 2, *columns).transpose(1, 2).reshape(rows, *columns)
