"""The C++ stages of benchmarks/cpp: built with the project's own CMake, called by ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run(*command: str | Path, cwd: Path = ROOT) -> str:
    """Runs a tool, with those that the Python environment brings going first, and returns what it printed.

    Raises RuntimeError with the end of its output where it fails.
    """
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**os.environ, "PATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stdout[-4000:]}")
    return done.stdout


def build(source: Path = ROOT) -> Path:
    """Builds `source`'s stages by its preset "bench"; where the library and the executable are.

    Raises RuntimeError where there is no compiler or the build fails.
    """
    if not (shutil.which("c++") or shutil.which("g++")):
        raise RuntimeError("the benchmarks need a C++ compiler: none was found")
    run("cmake", "--preset", "bench", cwd=source)
    run("cmake", "--build", "--preset", "bench", "--parallel", str(os.cpu_count() or 1), cwd=source)
    return source / "build" / "bench"


class CoreStages:
    """The stages of a build."""

    def __init__(self, folder: Path) -> None:
        library = ctypes.CDLL(str(folder / "librts_stages.so"))
        handle, name, count = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_uint64

        def declare(function: str, result: type | None, *arguments: type) -> Callable[..., object]:
            bound = getattr(library, function)
            bound.restype, bound.argtypes = result, arguments
            return bound

        self._new = declare("rts_stage_new", handle, name)
        self._free = declare("rts_stage_free", None, handle)
        self._operations = declare("rts_stage_operations", count, name)
        self.prepare = declare("rts_stage_prepare", None, handle)
        self.run = declare("rts_stage_run", None, handle)
        names = declare("rts_stage_names", name)()
        self.names: list[str] = names.decode().split()
        seconds = (ctypes.c_double, ctypes.c_uint32, count, ctypes.c_bool)
        self._produce = {
            "ring": declare("rts_produce_to_rings", *seconds),
            "queue": declare("rts_produce_to_queue", *seconds),
        }

    def new(self, stage: str) -> int:
        made = self._new(stage.encode())
        if made is None:
            raise ValueError(f"there is no stage {stage!r}; there are {', '.join(self.names)}")
        return made

    def free(self, made: int) -> None:
        self._free(made)

    def operations(self, stage: str) -> int:
        """How many operations one run has."""
        return self._operations(stage.encode())

    def produce(self, to: str, *, producers: int, items: int, processes: bool) -> float:
        """Seconds that `items` in all, from so many producers, take through rings or a queue to this thread."""
        seconds = self._produce[to](producers, items // producers, processes)
        if seconds < 0:
            raise AssertionError(f"an item was lost, came twice or out of order: {to}, {producers} producers")
        return seconds
