"""transformers' own models with their linear layers as the native engine computes them: rotated, in 8 bits."""

from __future__ import annotations

import copy
import math

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_ROTATION, _GROUP = 8, 32


def quantized(model: PreTrainedModel) -> PreTrainedModel:
    """A copy of it. Embeddings, norms and attention are as they were."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            weight = module.weight
        elif isinstance(module, Conv1D):
            weight = module.weight.T
        else:
            continue
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, _QuantizedLinear(weight.detach(), module.bias))
    return model.eval()


class _QuantizedLinear(nn.Module):
    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None) -> None:
        super().__init__()
        self.weight = _rounded(_rotated(weight))
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.linear(_rounded(_rotated(x)), self.weight, self.bias)


def _rotated(x: torch.Tensor) -> torch.Tensor:
    """Groups, padded to whole ones: the values of each that are as far apart as they can be, by the Walsh-Hadamard
    matrix."""
    x = nn.functional.pad(x, (0, -x.shape[-1] % _GROUP))
    matrix = torch.ones(1, 1)
    while len(matrix) < _ROTATION:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    groups = x.unflatten(-1, (-1, _ROTATION, _GROUP // _ROTATION))
    return (groups.mT @ (matrix / math.sqrt(_ROTATION))).mT.flatten(-3)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """To 8 bits, a scale for each group."""
    groups = x.unflatten(-1, (-1, _GROUP))
    scales = (groups.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-30)
    return ((groups / scales).round() * scales).flatten(-2)
