"""Builds transformers' Llama from a checkpoint: no tensor is initialised that is not then used."""

from __future__ import annotations

import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

from realtime_serve.errors import ModelLoadError
from realtime_serve.runners.torch_lm.attention import ATTENTION
from realtime_serve.runners.torch_lm.checkpoint import Checkpoint
from realtime_serve.runners.torch_lm.device import free_bytes

_EMBEDDING = "model.embed_tokens.weight"
_HEAD = "lm_head.weight"


def build_llama(checkpoint: Checkpoint, *, dtype: torch.dtype, device: torch.device) -> LlamaForCausalLM:
    """Raises ModelLoadError where the tensors do not fit the configuration, or the memory."""
    config = checkpoint.config
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    model.set_attn_implementation(ATTENTION)
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters(remove_duplicate=False)}
    if config.tie_word_embeddings:
        del shapes[_HEAD]
    _check_shapes(checkpoint, shapes)
    _check_memory(checkpoint, shapes, dtype, device)

    tensors = {name: checkpoint.read(name).to(device, dtype) for name in shapes}
    if config.tie_word_embeddings:
        tensors[_HEAD] = tensors[_EMBEDDING]
    model.load_state_dict(tensors, assign=True)
    model.model.rotary_emb = _rotary_embedding(checkpoint).to(device)
    return model.requires_grad_(False).eval()


def _check_shapes(checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]]) -> None:
    for name, shape in shapes.items():
        found = checkpoint.shapes.get(name)
        if found is None:
            raise ModelLoadError(f"{checkpoint.source}: tensor {name!r} is missing")
        if found != shape:
            raise ModelLoadError(
                f"{checkpoint.source}: tensor {name!r} has shape {list(found)}, the model needs {list(shape)}"
            )
    surplus = sorted(checkpoint.shapes.keys() - shapes.keys() - {_HEAD})
    if surplus:
        raise ModelLoadError(f"{checkpoint.source}: the model has no place for tensor {surplus[0]!r}")


def _check_memory(
    checkpoint: Checkpoint, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype, device: torch.device
) -> None:
    needed = sum(torch.Size(shape).numel() for shape in shapes.values()) * dtype.itemsize
    free = free_bytes(device)
    if needed > free:
        raise ModelLoadError(
            f"{checkpoint.source}: the weights take {needed / 1e6:.1f} MB as {str(dtype).removeprefix('torch.')},"
            f" and {device} has {free / 1e6:.1f} MB free"
        )


def _rotary_embedding(checkpoint: Checkpoint) -> LlamaRotaryEmbedding:
    """Its frequencies are computed, not loaded: those of the model just built are on the meta device."""
    rotary = LlamaRotaryEmbedding(checkpoint.config)
    if checkpoint.rope_factors is not None:
        rotary.inv_freq /= checkpoint.rope_factors
    return rotary
