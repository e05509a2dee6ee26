"""What works without the extra [torch]: its packages are hidden from the processes that are started here."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
from program import infer, program, serve

from realtime_serve import __version__

HIDE = """\
import sys
from importlib.machinery import PathFinder

class PlainFinder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "safetensors"):
            return None
        return super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = PlainFinder
"""


@pytest.fixture(autouse=True)
def plain_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(HIDE)
    monkeypatch.syspath_prepend(tmp_path)  # which the programs get, and their workers


def run(*arguments: str) -> tuple[int, str, str]:
    """Status, output and errors."""
    with program(*arguments) as running:
        status, out = running.end()
        return status, out, running.errors


@pytest.mark.parametrize("package", ["torch", "transformers", "safetensors"])
def test_they_are_hidden(package: str) -> None:
    status, _, errors = run("-c", f"import {package}")
    assert (status, errors.splitlines()[-1]) == (1, f"ModuleNotFoundError: No module named {package!r}")


def test_commands_and_the_package_itself() -> None:
    assert run("-m", "realtime_serve", "--version") == (0, f"realtime-serve {__version__}\n", "")
    for arguments in (["models"], ["serve", "--help"], ["pull", "--help"], ["bench", "--help"]):
        status, out, errors = run("-m", "realtime_serve", *arguments)
        assert (status, errors) == (0, "")
        assert out
    everything = "import realtime_serve as r; [getattr(r, name) for name in r.__all__]"
    assert run("-c", everything) == (0, "", "")


def test_the_default_model_is_served(default_model_path: Path) -> None:
    with serve(str(default_model_path)) as server:
        answer = infer(server.port(), prompt="The capital of France is", max_tokens=8, temperature=0)
        assert answer["text"].startswith(" Paris")
        server.process.send_signal(signal.SIGTERM)
        assert server.end()[0] == 0
        assert "smollm2-135m-instruct 1.0.0 on cpu, 4-bit weights, context 2048 tokens\n" in server.errors


def test_a_model_that_needs_torch_is_refused_in_one_line(default_model_path: Path) -> None:
    status, out, errors = run(
        "-m", "realtime_serve", "serve", str(default_model_path), "--port", "0", "--model-option", "engine=torch"
    )
    assert (status, out) == (2, "")
    last = errors.splitlines()[-1]
    assert last.startswith("realtime-serve: model 'smollm2-135m-instruct' needs the torch engine (")
    assert last.endswith("(No module named 'torch'): pip install 'realtime-ai-serve[torch]'")
