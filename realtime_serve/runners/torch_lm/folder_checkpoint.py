"""A Hugging Face folder: config.json and safetensors files. Nothing in it is executed or unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.runners.torch_lm.families import make_config

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_FLOATS = ("F32", "F16", "BF16", "F64")
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class FolderCheckpoint:
    """See `Checkpoint`. Raises UnsupportedModelError or ModelLoadError that names the file or tensor at fault."""

    rope_factors = None

    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        self.config = _read_config(folder / _CONFIG)
        self._shards = {name: _open(folder / name) for name in _shard_names(folder)}
        self._shard_of = {tensor: shard for shard, file in self._shards.items() for tensor in file.keys()}  # noqa: SIM118
        for tensor, shard in _weight_map(folder).items():
            if self._shard_of.get(tensor) != shard:
                raise ModelLoadError(f"{folder / shard}: the index lists tensor {tensor!r} in it, and it is not there")
        self.shapes = {tensor: tuple(self._slice(tensor).get_shape()) for tensor in self._shard_of}

    def check_type(self, name: str) -> None:
        stored = self._slice(name).get_dtype()
        if stored not in _FLOATS:
            raise UnsupportedModelError(
                f"{self.source}: tensor {name!r} is stored as {stored}; supported: {', '.join(_FLOATS)}"
            )

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._shards[self._shard_of[name]].get_tensor(name)
        return tensor

    def _slice(self, name: str) -> Any:
        """Its type and shape, without its values."""
        return self._shards[self._shard_of[name]].get_slice(name)


def _read_config(path: Path) -> PreTrainedConfig:
    values = _read_json(path)
    if "auto_map" in values:
        raise UnsupportedModelError(f"{path}: the model needs code of its own (auto_map), which is never run")
    if "quantization_config" in values:
        raise UnsupportedModelError(f"{path}: quantized weights are not supported in this format; use a GGUF file")
    return make_config(values, str(path))


def _weight_map(folder: Path) -> dict[str, str]:
    """The file of each tensor, as the index has it; empty without one."""
    index = folder / _INDEX
    if not index.is_file():
        return {}
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise ModelLoadError(f"{index}: 'weight_map' must map each tensor to a file of this folder")
    return weight_map


def _shard_names(folder: Path) -> list[str]:
    if (folder / _INDEX).is_file():
        return sorted(set(_weight_map(folder).values()))
    if (folder / _WEIGHTS).is_file():
        return [_WEIGHTS]
    pickled = sorted(file.name for pattern in _PICKLES for file in folder.glob(pattern))
    if pickled:
        raise UnsupportedModelError(
            f"{folder}: the weights are pickled ({pickled[0]}), and loading a pickle can run code;"
            " convert them to safetensors"
        )
    raise ModelLoadError(f"{folder}: neither {_WEIGHTS} nor {_INDEX} is there")


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: the index lists this file, and it is not there") from None
    except (OSError, SafetensorError) as error:
        raise ModelLoadError(f"{path}: not a readable safetensors file: {error}") from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: not there") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path}: must hold a JSON object")
    return values
