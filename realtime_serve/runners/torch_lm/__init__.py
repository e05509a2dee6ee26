"""Decoder models run by torch, with continuous batching over a paged KV cache."""

from realtime_serve.runners.torch_lm.runner import TorchLM

__all__ = ["TorchLM"]
