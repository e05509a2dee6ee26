"""Measures the working tree against another revision: on the same machine, in the same sitting, in turn.

Both sides are built from scratch outside the working tree and run this tree's benchmarks, each in an environment of its
own that has the packages of this one. The ratio is the working tree's time over the revision's.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from core_stages import ROOT, run

_BENCHMARKS = Path(__file__).parent
_INTERRUPTED_GRACE_S = 20


@dataclass(frozen=True, slots=True)
class Side:
    name: str
    folder: Path

    @property
    def build(self) -> Path:
        return self.folder / "build"

    @property
    def python(self) -> Path:
        return self.folder / "environment" / "bin" / "python"

    @property
    def packages(self) -> Path:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        return self.folder / "environment" / "lib" / version / "site-packages"


@contextlib.contextmanager
def checkout(revision: str, folder: Path) -> Iterator[Path]:
    """The revision's files, with this tree's C++ stages."""
    source = folder / "source"
    run("git", "worktree", "add", "--detach", source, revision)
    try:
        if "RTS_BUILD_BENCHMARKS" not in (source / "CMakeLists.txt").read_text():
            raise RuntimeError(f"{revision} cannot be compared: it is from before the benchmarks")
        shutil.copytree(_BENCHMARKS / "cpp", source / "benchmarks" / "cpp", dirs_exist_ok=True)
        yield source
    finally:
        run("git", "worktree", "remove", "--force", source)


def install(side: Side, source: Path) -> None:
    """Builds the stages and the package, into an environment that nothing of this one's can get in front of."""
    print(f"building {side.name}", file=sys.stderr, flush=True)
    pybind11 = run(sys.executable, "-m", "pybind11", "--cmakedir").strip()
    run(
        *("cmake", "-S", source, "-B", side.build, "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"),
        *("-DRTS_BUILD_BENCHMARKS=ON", f"-Dpybind11_DIR={pybind11}", f"-DPython_EXECUTABLE={sys.executable}"),
    )
    run("cmake", "--build", side.build, "--parallel", str(os.cpu_count() or 1))
    venv.create(side.folder / "environment", symlinks=True)
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(source / "realtime_serve", side.packages / "realtime_serve", ignore=ignored)
    run("cmake", "--install", side.build, "--prefix", side.packages)
    # As plain folders: their .pth files, an editable install of this tree among them, are not read.
    others = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (side.packages / "others.pth").write_text("\n".join(others) + "\n")
    found = run(
        side.python, "-P", "-c", "import realtime_serve; print(realtime_serve.__file__)", cwd=side.folder
    ).strip()
    if not Path(found).is_relative_to(side.packages):
        raise RuntimeError(f"{side.name} would be measured with the package in {Path(found).parent}")


def measure(side: Side, expression: str) -> dict[str, float]:
    """One run of the benchmarks: the median nanoseconds of an operation, by name."""
    results = side.folder / "results.json"
    command = [side.python, "-P", "-m", "pytest", _BENCHMARKS, "-c", ROOT / "pyproject.toml", f"--rootdir={ROOT}"]
    command += ["-q", "-p", "no:cacheprovider", f"--benchmark-json={results}", "-k", expression]
    environment = {**os.environ, "RTS_BENCHMARKS_BUILD": str(side.build)}
    environment.pop("PYTHONPATH", None)
    # In a session of its own, so that an interrupt reaches it once, from here, and it can stop what it has started.
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=_INTERRUPTED_GRACE_S)
        process.kill()
        raise
    if process.returncode != 0:
        raise RuntimeError(f"the benchmarks failed on {side.name}:\n{output[-4000:]}")
    benchmarks = json.loads(results.read_text())["benchmarks"]
    return {b["name"]: b["stats"]["median"] * 1e9 / b["extra_info"]["operations"] for b in benchmarks}


def print_table(base: Side, tree: Side, rounds: dict[Side, list[dict[str, float]]]) -> dict[str, float]:
    """The ratios by benchmark, which it returns."""
    names = list(rounds[tree][0])
    width = max(map(len, names))
    print(f"{'median ns an operation':{width}}  {base.name:>12}  {tree.name:>12}  {'ratio':>6}  spread")
    ratios: dict[str, float] = {}
    for name in names:
        before, after = ([values[name] for values in rounds[side]] for side in (base, tree))
        ratios[name] = statistics.median(after) / statistics.median(before)
        spread = [b / a for a, b in zip(before, after, strict=True)]
        medians = f"{statistics.median(before):>12,.1f}  {statistics.median(after):>12,.1f}"
        print(f"{name:{width}}  {medians}  {ratios[name]:>6.3f}  {min(spread):.3f} to {max(spread):.3f}")
    return ratios


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("revision", metavar="REV", help="what the working tree is compared with")
    parser.add_argument("-k", default="", metavar="EXPR", help="which benchmarks, as pytest's -k")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side (default: 5)")
    parser.add_argument("--fail-above", type=float, metavar="RATIO", help="exit with 1 where a ratio is above it")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: what was made is removed

    with tempfile.TemporaryDirectory(prefix="compare-") as scratch:
        base, tree = (
            Side(name, Path(scratch, folder)) for name, folder in ((arguments.revision, "base"), ("tree", "tree"))
        )
        with checkout(arguments.revision, base.folder) as source:
            install(base, source)
        install(tree, ROOT)
        rounds: dict[Side, list[dict[str, float]]] = {base: [], tree: []}
        for round_ in range(arguments.rounds):
            print(f"round {round_ + 1} of {arguments.rounds}", file=sys.stderr, flush=True)
            for side in (base, tree) if round_ % 2 == 0 else (tree, base):
                rounds[side].append(measure(side, arguments.k))
        ratios = print_table(base, tree, rounds)
    over = [name for name, ratio in ratios.items() if arguments.fail_above and ratio > arguments.fail_above]
    if over:
        print(f"above {arguments.fail_above}: {', '.join(over)}")
    return 1 if over else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
