"""Builds transformers' model from a checkpoint: no tensor is initialised that is not then used."""

from __future__ import annotations

import re

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from realtime_serve.errors import ModelLoadError
from realtime_serve.runners.torch_lm.attention import ATTENTION
from realtime_serve.runners.torch_lm.checkpoint import Checkpoint

# What checkpoints of earlier versions of transformers call a module.
_FORMER_NAMES = {"lm_head.": "embed_out."}
# Buffers that old checkpoints hold and the model computes.
_COMPUTED = re.compile(r"\.rotary_emb\.inv_freq$")


class ModelBuilder:
    """A model whose tensors fit its checkpoint, none of them loaded yet.

    Raises ModelLoadError that names the tensor where one is missing, of another shape, or without a place.
    """

    def __init__(self, checkpoint: Checkpoint, dtype: torch.dtype) -> None:
        self._checkpoint = checkpoint
        self._dtype = dtype
        self._model = _skeleton(checkpoint, dtype)
        self._stored = _match(checkpoint, self._model)

    @property
    def weight_bytes(self) -> int:
        shapes = (self._checkpoint.shapes[stored] for stored in self._stored.values())
        return sum(torch.Size(shape).numel() for shape in shapes) * self._dtype.itemsize

    def load(self, device: torch.device) -> PreTrainedModel:
        """To be called once."""
        model = self._model
        _compute_buffers(model, device)
        if self._checkpoint.rope_factors is not None:
            model.base_model.rotary_emb.inv_freq /= self._checkpoint.rope_factors.to(device)
        tensors = {name: self._checkpoint.read(stored).to(device, self._dtype) for name, stored in self._stored.items()}
        model.load_state_dict(tensors, strict=False, assign=True)
        if model.config.tie_word_embeddings:
            model.get_output_embeddings().weight = model.get_input_embeddings().weight
        return model.requires_grad_(False).eval()


def _skeleton(checkpoint: Checkpoint, dtype: torch.dtype) -> PreTrainedModel:
    """The model on the meta device."""
    config, tensors = checkpoint.config, len(checkpoint.shapes)
    # Every layer has tensors; a number that is far off would take the memory with modules alone.
    if config.num_hidden_layers > tensors:
        raise ModelLoadError(
            f"{checkpoint.source}: the configuration says {config.num_hidden_layers} layers, and there are {tensors}"
            " tensors"
        )
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=ATTENTION
            )
    except Exception as error:  # whatever a constructor raises for numbers that make no model
        raise ModelLoadError(
            f"{checkpoint.source}: the configuration makes no model: {' '.join(str(error).split())}"
        ) from error
    return model


def _match(checkpoint: Checkpoint, model: PreTrainedModel) -> dict[str, str]:
    """Names in the checkpoint by the model's own; what is tied to another tensor is left out."""
    tied = _output_weight(model) if model.config.tie_word_embeddings else None
    stored = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found = _find(name, checkpoint, model)
        if name == tied:
            continue
        if found is None:
            raise ModelLoadError(f"{checkpoint.source}: tensor {name!r} is missing")
        if checkpoint.shapes[found] != tuple(parameter.shape):
            raise ModelLoadError(
                f"{checkpoint.source}: tensor {found!r} has shape {list(checkpoint.shapes[found])}, the model needs"
                f" {list(parameter.shape)}"
            )
        checkpoint.check_type(found)
        stored[name] = found
    ignored = [_COMPUTED, *map(re.compile, type(model)._keys_to_ignore_on_load_unexpected or ())]
    surplus = checkpoint.shapes.keys() - set(stored.values())
    if tied is not None:
        surplus.discard(_find(tied, checkpoint, model))
    for name in sorted(surplus):
        if not any(pattern.search(name) for pattern in ignored):
            raise ModelLoadError(f"{checkpoint.source}: the model has no place for tensor {name!r}")
    return stored


def _find(name: str, checkpoint: Checkpoint, model: PreTrainedModel) -> str | None:
    """What the checkpoint calls a tensor. Those of a model without its output layer lack a prefix."""
    names = [name, name.removeprefix(f"{model.base_model_prefix}.")]
    names += [former + name.removeprefix(now) for now, former in _FORMER_NAMES.items() if name.startswith(now)]
    return next((candidate for candidate in names if candidate in checkpoint.shapes), None)


def _output_weight(model: PreTrainedModel) -> str:
    output = model.get_output_embeddings()
    return next(f"{name}.weight" for name, module in model.named_modules() if module is output)


def _compute_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Those that no checkpoint holds, such as rotary frequencies, which were built on the meta device."""
    for module in model.modules():
        if module._non_persistent_buffers_set:
            for name in module._non_persistent_buffers_set:
                setattr(module, name, torch.empty_like(getattr(module, name), device=device))
            model._init_weights(module)  # parameters are on the meta device still: they stay as they are
