"""A model on disk as the native engine reads it: its configuration, and its tensors' bytes as they are stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from realtime_serve._core import GgufFile
from realtime_serve.checkpoints.folder import open_weights, read_config
from realtime_serve.checkpoints.gguf_architectures import ROPE_FACTORS, architecture_of, config_of
from realtime_serve.checkpoints.gguf_metadata import GgufMetadata
from realtime_serve.errors import ModelLoadError

Bytes = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Tensor:
    """Bytes of a type that GGUF names, row by row."""

    type: str
    shape: tuple[int, ...]
    data: Bytes

    @classmethod
    def of_floats(cls, values: npt.NDArray[np.float32]) -> Tensor:
        stored = np.ascontiguousarray(values, dtype="<f4")
        return cls("F32", stored.shape, stored.reshape(-1).view(np.uint8))

    def floats(self) -> npt.NDArray[np.float32]:
        """Its values, where they are stored as floats."""
        if self.type == "BF16":
            wide = self.data.view("<u2").astype("<u4") << np.uint32(16)
            return wide.view("<f4").reshape(self.shape)
        kind = {"F32": "<f4", "F16": "<f2", "F64": "<f8"}.get(self.type)
        if kind is None:
            raise ModelLoadError(f"values stored as {self.type} are no floats")
        return np.frombuffer(self.data.tobytes(), kind).astype(np.float32).reshape(self.shape)


@dataclass(frozen=True, slots=True)
class CpuCheckpoint:
    """Tensors go by transformers' names."""

    source: str
    config: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    has_rotary_pairs: bool = False
    """Rows of the query and key projections are rotary pairs side by side, not a head's two halves."""
    has_norm_offset: bool = False
    """Norms' weights hold what the family adds to them already."""
    is_transposed: bool = False
    """GPT-2's projections are stored inputs first."""
    rope_factors: npt.NDArray[np.float32] | None = None
    files: tuple[Path, ...] = ()
    """What the weights are read from."""
    release: Callable[[], None] = lambda: None
    """To be called once the weights are packed: the pages of the file that were read for it count as memory."""


def open_checkpoint(path: Path) -> CpuCheckpoint:
    """Raises UnsupportedModelError or ModelLoadError that names the file and what is wrong."""
    return _open_folder(path) if path.is_dir() else _open_gguf(path)


def _open_folder(folder: Path) -> CpuCheckpoint:
    config = read_config(folder)
    tensors = {
        name: Tensor(stored.dtype, stored.shape, stored.data)
        if stored.dtype != "F64"
        else Tensor.of_floats(Tensor("F64", stored.shape, stored.data).floats())
        for name, stored in open_weights(folder).items()
    }
    files = tuple(sorted(folder.glob("*.safetensors")))
    return CpuCheckpoint(str(folder), config, tensors, is_transposed=config.get("model_type") == "gpt2", files=files)


def _open_gguf(path: Path) -> CpuCheckpoint:
    try:
        file = GgufFile(path)
    except RuntimeError as error:
        raise ModelLoadError(str(error)) from error
    metadata = GgufMetadata(file.metadata, file.tensors, str(path))
    architecture = architecture_of(metadata)
    factors = file.dequantize(ROPE_FACTORS) if ROPE_FACTORS in file.tensors else None
    tensors = {
        architecture.name_of(name): Tensor(info.type, tuple(info.shape), file.raw(name))
        for name, info in file.tensors.items()
        if name != ROPE_FACTORS
    }
    return CpuCheckpoint(
        str(path),
        config_of(metadata),
        tensors,
        has_rotary_pairs=architecture.has_rotary_pairs,
        has_norm_offset=architecture.norm_offset != 0.0,
        rope_factors=factors,
        files=(path,),
        release=file.release_pages,
    )
