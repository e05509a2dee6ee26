"""Decoder models run by the native CPU engine: see csrc/cpu."""

from realtime_serve.runners.cpu_lm.families import NeedsTorchEngine
from realtime_serve.runners.cpu_lm.runner import CpuLM

__all__ = ["CpuLM", "NeedsTorchEngine"]
