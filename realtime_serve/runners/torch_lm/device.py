"""The device a model runs on."""

from __future__ import annotations

import torch

from realtime_serve.errors import ModelLoadError
from realtime_serve.machine import free_memory


def open_device(name: str) -> torch.device:
    """Raises ModelLoadError where this torch or this machine does not have it."""
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ModelLoadError(
                f"device {name!r} is not available: torch {torch.__version__} sees {count} CUDA devices;"
                " device='cpu' runs without one"
            )
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise ModelLoadError(f"device {name!r} is not available: torch {torch.__version__} has no Metal device here")
    return device


def free_bytes(device: torch.device) -> int:
    """Memory that can be had now."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else free_memory()
