"""Which accelerators this machine has, asked of the driver: no torch is imported for it."""

from __future__ import annotations

import ctypes
from functools import cache

from realtime_serve.extras import has_torch


@cache
def cuda_device_count() -> int:
    """CUDA devices that the driver offers; 0 where there is no driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return 0
    return count.value


def default_device() -> str:
    """CUDA where there is a device and the engine that runs on it."""
    return "cuda" if cuda_device_count() and has_torch() else "cpu"
