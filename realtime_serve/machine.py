"""What this machine, or the container that this process is in, has to give."""

from __future__ import annotations

import ctypes
import math
import os
from pathlib import Path

_CPUS = Path("/sys/devices/system/cpu")
_CGROUP = Path("/sys/fs/cgroup")


def free_memory() -> int:
    """Bytes that can be had now."""
    available = _meminfo()["MemAvailable"]
    limit, used = _cgroup_number("memory.max"), _cgroup_number("memory.current")
    if limit is None or used is None:
        return available
    # What is cached of files counts as used there, and is given back.
    cached = _cgroup_table("memory.stat").get("file", 0)
    return min(available, max(0, limit - used + cached))


def return_freed_memory() -> None:
    """Gives back what the allocator keeps for later, where it has a way to: a few megabytes after a large file was
    read."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def physical_cores() -> int:
    """Cores that this process may use: a core's hardware threads count once, a container's share is rounded up."""
    cores = {_siblings(cpu) for cpu in os.sched_getaffinity(0)}
    return max(1, min(len(cores), _cgroup_cpus()))


def _siblings(cpu: int) -> str:
    try:
        return (_CPUS / f"cpu{cpu}/topology/thread_siblings_list").read_text()
    except OSError:
        return str(cpu)


def _cgroup_cpus() -> int:
    try:
        quota, period = (_CGROUP / "cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # ValueError: the quota is "max"
        return os.cpu_count() or 1


def _cgroup_number(name: str) -> int | None:
    try:
        return int((_CGROUP / name).read_text())
    except (OSError, ValueError):  # ValueError: it is "max"
        return None


def _cgroup_table(name: str) -> dict[str, int]:
    try:
        lines = (_CGROUP / name).read_text().splitlines()
    except OSError:
        return {}
    return {key: int(value) for key, _, value in (line.partition(" ") for line in lines)}


def _meminfo() -> dict[str, int]:
    """In bytes."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    return {key: int(value.split()[0]) * 1024 for key, _, value in (line.partition(":") for line in lines)}
