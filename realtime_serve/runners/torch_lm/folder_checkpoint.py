"""A Hugging Face folder: config.json and safetensors files. Nothing in it is executed or unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers.models.llama.configuration_llama import LlamaConfig

from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.runners.torch_lm.checkpoint import make_config

_CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
# Types whose frequencies depend on nothing but the configuration: a batch mixes sequences of every length.
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Buffers that old checkpoints hold and the model computes.
_COMPUTED = ".rotary_emb.inv_freq"


class FolderCheckpoint:
    """See `Checkpoint`. Raises UnsupportedModelError or ModelLoadError that names the file or tensor at fault."""

    rope_factors = None

    def __init__(self, folder: Path) -> None:
        self.source = str(folder)
        self.config = _read_config(folder / _CONFIG)
        self._shards = {name: _open(folder / name) for name in _shard_names(folder)}
        self._shard_of = {tensor: shard for shard, file in self._shards.items() for tensor in file.keys()}  # noqa: SIM118
        self.shapes = {
            tensor: tuple(self._shards[shard].get_slice(tensor).get_shape())
            for tensor, shard in self._shard_of.items()
            if not tensor.endswith(_COMPUTED)
        }

    def read(self, name: str) -> torch.Tensor:
        tensor: torch.Tensor = self._shards[self._shard_of[name]].get_tensor(name)
        if not tensor.is_floating_point() or tensor.itemsize < 2:
            stored = str(tensor.dtype).removeprefix("torch.")
            raise UnsupportedModelError(
                f"{self.source}: tensor {name!r} is stored as {stored}; float32, float16 and bfloat16 are supported"
            )
        return tensor


def _read_config(path: Path) -> LlamaConfig:
    values = _read_json(path)
    architecture = values.get("model_type")
    if "auto_map" in values:
        raise UnsupportedModelError(f"{path}: the model needs code of its own (auto_map), which is never run")
    if architecture != "llama":
        raise UnsupportedModelError(f"{path}: architecture {architecture!r} is not supported; supported: 'llama'")
    if "quantization_config" in values:
        raise UnsupportedModelError(f"{path}: quantized weights are not supported in this format; use a GGUF file")
    config = make_config(values, str(path))
    rope_type = config.rope_parameters["rope_type"]
    if rope_type not in _ROPE_TYPES:
        raise UnsupportedModelError(
            f"{path}: rope type {rope_type!r} is not supported; supported: {', '.join(map(repr, _ROPE_TYPES))}"
        )
    return config


def _shard_names(folder: Path) -> list[str]:
    index = folder / _INDEX
    if index.is_file():
        weight_map = _read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
            raise ModelLoadError(f"{index}: 'weight_map' must map each tensor to a file of this folder")
        return sorted(set(weight_map.values()))
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
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"{path}: not readable as JSON: {error}") from error
    if not isinstance(values, dict):
        raise ModelLoadError(f"{path}: must hold a JSON object")
    return values
