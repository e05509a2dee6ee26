"""A Hugging Face folder: config.json and safetensors files. Nothing in it is executed or unpickled."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from realtime_serve.checkpoints.safetensors_files import StoredTensor, open_safetensors
from realtime_serve.errors import ModelLoadError, UnsupportedModelError

CONFIG_FILE = "config.json"

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


def read_config(folder: Path) -> dict[str, Any]:
    """What config.json holds. Raises UnsupportedModelError or ModelLoadError that names the file."""
    path = folder / CONFIG_FILE
    values = _read_json(path)
    if "auto_map" in values:
        raise UnsupportedModelError(f"{path}: the model needs code of its own (auto_map), which is never run")
    if "quantization_config" in values:
        raise UnsupportedModelError(f"{path}: quantized weights are not supported in this format; use a GGUF file")
    return values


def open_weights(folder: Path) -> dict[str, StoredTensor]:
    """Every tensor of the folder's weights. Raises UnsupportedModelError or ModelLoadError that names the file, and the
    tensor where it is one's fault."""
    weight_map = _read_weight_map(folder)
    tensors: dict[str, StoredTensor] = {}
    shard_of: dict[str, str] = {}
    for shard in _shard_names(folder, weight_map):
        opened = _open_shard(folder / shard)
        tensors |= opened
        shard_of |= dict.fromkeys(opened, shard)
    for tensor, shard in (weight_map or {}).items():
        if shard_of.get(tensor) != shard:
            raise ModelLoadError(f"{folder / shard}: the index lists tensor {tensor!r} in it, and it is not there")
    return tensors


def _read_weight_map(folder: Path) -> dict[str, str] | None:
    """The file of each tensor, as the index has it; None without one."""
    index = folder / _INDEX
    if not index.is_file():
        return None
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(_is_file_name(name) for name in weight_map.values()):
        raise ModelLoadError(f"{index}: 'weight_map' must map each tensor to a file of this folder")
    return weight_map


def _shard_names(folder: Path, weight_map: dict[str, str] | None) -> list[str]:
    if weight_map is not None:
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


def _open_shard(path: Path) -> dict[str, StoredTensor]:
    try:
        return open_safetensors(path)
    except FileNotFoundError:
        raise ModelLoadError(f"{path}: the index lists this file, and it is not there") from None


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
