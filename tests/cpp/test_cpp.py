"""Builds the core's GoogleTest suites and runs them: one test here for each suite."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITES = sorted(path.stem for path in Path(__file__).parent.glob("*_test.cpp"))


def _run(*command: str) -> None:
    # The cmake and ninja that the environment brings go first; the system's serve as well.
    environment = {
        **os.environ,
        "PATH": os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
    }
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-8000:]}{done.stderr[-8000:]}"


@pytest.fixture(scope="session")
def build() -> Path:
    assert shutil.which("c++") or shutil.which("g++"), "the core's tests need a C++ compiler"
    _run("cmake", "--preset", "dev")
    _run("cmake", "--build", "--preset", "dev", "--parallel", str(os.cpu_count() or 1))
    return ROOT / "build" / "dev"


@pytest.mark.parametrize("suite", SUITES)
def test_suite(build: Path, suite: str) -> None:
    _run(str(build / suite), "--gtest_brief=1")
