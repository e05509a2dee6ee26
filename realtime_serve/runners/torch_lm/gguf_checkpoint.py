"""A GGUF file of the Llama architecture, translated to transformers' configuration, names and layout."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from transformers.models.llama.configuration_llama import LlamaConfig

from realtime_serve._core import GgufFile
from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.runners.torch_lm.checkpoint import make_config

_ROPE_FACTORS = "rope_freqs.weight"
_MODEL_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER_TENSOR = re.compile(r"blk\.(\d+)\.(\w+)")


class GgufCheckpoint:
    """See `Checkpoint`. Raises UnsupportedModelError or ModelLoadError that names the file and what is wrong."""

    def __init__(self, path: Path) -> None:
        self.source = str(path)
        try:
            self._file = GgufFile(str(path))
        except RuntimeError as error:
            raise ModelLoadError(str(error)) from error
        tensors = self._file.tensors
        self.config = _LlamaMetadata(self._file, self.source).config()
        self._stored = {_translate(name): name for name in tensors if name != _ROPE_FACTORS}
        self.shapes = {name: tuple(tensors[stored].shape) for name, stored in self._stored.items()}
        self.rope_factors = self._dequantize(_ROPE_FACTORS) if _ROPE_FACTORS in tensors else None

    def read(self, name: str) -> torch.Tensor:
        tensor = self._dequantize(self._stored[name])
        if ".q_proj." in name:
            return _split_halves(tensor, self.config.num_attention_heads)
        if ".k_proj." in name:
            return _split_halves(tensor, self.config.num_key_value_heads)
        return tensor

    def _dequantize(self, stored: str) -> torch.Tensor:
        try:
            return torch.from_numpy(self._file.dequantize(stored))
        except RuntimeError as error:
            raise ModelLoadError(str(error)) from error


class _LlamaMetadata:
    """The file's key-value pairs read as a Llama's configuration."""

    def __init__(self, file: GgufFile, source: str) -> None:
        self._values = file.metadata
        self._tensors = file.tensors
        self._source = source

    def config(self) -> LlamaConfig:
        self._check_supported()
        heads = self._require("attention.head_count")
        head_dim = self._get("attention.key_length", self._require("embedding_length") // heads)
        if self._get("rope.dimension_count", head_dim) != head_dim:
            raise self._unsupported("rotary positions on a part of each head")
        values = {
            "hidden_size": self._require("embedding_length"),
            "intermediate_size": self._require("feed_forward_length"),
            "num_hidden_layers": self._require("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": self._get("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "max_position_embeddings": self._require("context_length"),
            "rms_norm_eps": self._require("attention.layer_norm_rms_epsilon"),
            "rope_parameters": self._rope_parameters(),
            "vocab_size": self._vocabulary_size(),
            "tie_word_embeddings": "output.weight" not in self._tensors,
            "attention_bias": "blk.0.attn_q.bias" in self._tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in self._tensors,
        }
        return make_config(values, self._source)

    def _check_supported(self) -> None:
        architecture = self._values.get("general.architecture", None)
        if architecture != "llama":
            raise self._unsupported(f"architecture {architecture!r}", "; supported: 'llama'")
        if self._get("expert_count", 0):
            raise self._unsupported("a mixture of experts")

    def _rope_parameters(self) -> dict[str, Any]:
        parameters = {"rope_type": "default", "rope_theta": self._get("rope.freq_base", 10000.0)}
        scaling = self._get("rope.scaling.type", "none")
        if scaling == "linear":
            return {**parameters, "rope_type": "linear", "factor": self._require("rope.scaling.factor")}
        if scaling != "none":
            raise self._unsupported(f"rope scaling {scaling!r}", "; supported: 'linear'")
        return parameters

    def _vocabulary_size(self) -> int:
        embedding = self._tensors.get("token_embd.weight")
        if embedding is None:
            raise ModelLoadError(f"{self._source}: tensor 'token_embd.weight' is missing")
        return int(embedding.shape[0])

    def _get(self, key: str, default: Any) -> Any:
        return self._values.get(f"llama.{key}", default)

    def _require(self, key: str) -> Any:
        value = self._get(key, None)
        if value is None:
            raise ModelLoadError(f"{self._source}: metadata key 'llama.{key}' is missing")
        return value

    def _unsupported(self, what: str, supported: str = "") -> UnsupportedModelError:
        return UnsupportedModelError(f"{self._source}: {what} is not supported{supported}")


def _translate(stored: str) -> str:
    """transformers' name of a tensor; the stored one where it has none."""
    stem, _, kind = stored.rpartition(".")
    layer = _LAYER_TENSOR.fullmatch(stem)
    if layer and layer[2] in _LAYER_NAMES:
        return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.{kind}"
    return f"{_MODEL_NAMES[stem]}.{kind}" if stem in _MODEL_NAMES else stored


def _split_halves(tensor: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection, from rotary pairs side by side, as GGUF has them, to a head's two halves."""
    rows, *columns = tensor.shape
    return tensor.view(heads, rows // heads // 2, 2, *columns).transpose(1, 2).reshape(rows, *columns)
