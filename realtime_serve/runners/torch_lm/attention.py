"""Attention over a paged KV cache, as an attention function of transformers' models.

A step's tokens come as one flat batch, [1, T]; which sequence and position each belongs to is known to a
`PagedAttention`, which reaches the function as a keyword argument of the model's forward. No mask function is
registered beside it: transformers then builds no mask, and the model's own is there.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from transformers.modeling_utils import AttentionInterface

from realtime_serve.runners.base import StepBatch

ATTENTION = "realtime_serve_paged"


class PagedAttention(Protocol):
    """The keys and values of all layers, and attention over them."""

    def begin_step(self, batch: StepBatch) -> None:
        """What comes until the next call is of this batch, whose arrays must stay as they are."""

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scale: float,
        window: int | None,
        softcap: float | None,
    ) -> torch.Tensor:
        """Stores the step's keys and values, then attends each sequence's queries to its context. With a window, each
        sees as many positions, its own being the last.

        query is [T, heads, head_dim], and so is what comes back; key and value are [T, kv_heads, head_dim].
        """


def attend_in_layer(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    paged_attention: PagedAttention,
    scaling: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """query is [1, heads, T, head_dim], key and value are [1, kv_heads, T, head_dim]; what comes back is [1, T, heads,
    head_dim]."""
    attended = paged_attention.attend(
        cast(int, module.layer_idx),
        query[0].transpose(0, 1),
        key[0].transpose(0, 1),
        value[0].transpose(0, 1),
        scale=scaling,
        window=sliding_window,
        softcap=softcap,
    )
    return attended[None], None


AttentionInterface.register(ATTENTION, attend_in_layer)
