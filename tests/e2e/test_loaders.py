"""Scripts whose models come from loaders of their own."""

from __future__ import annotations

import json
import signal
import urllib.request
from pathlib import Path

import pytest
from program import program

SCRIPT = """\
import asyncio, logging, os, sys
from realtime_serve import InferenceServer, ModelConfig, ServerConfig

print("here", flush=True)
logging.basicConfig(level="INFO", format="LOG %(message)s")

class Model:
    def predict(self, inputs):
        return [[os.getpid(), value] for value in inputs]

def load(config):
    return Model()

server = InferenceServer(ServerConfig(log_level="WARNING"))
server.register_model(ModelConfig("mine", device="cpu"), loader=LOADER)
asyncio.run(server.start(host="127.0.0.1", port=0))
"""
MODULE = """\
import os

class Model:
    def predict(self, inputs):
        return [[os.getpid(), value] for value in inputs]

    @classmethod
    def load(cls, config):
        return cls()
"""


def predict(port: int, value: object) -> object:
    request = urllib.request.Request(f"http://127.0.0.1:{port}/predict", json.dumps({"input": value}).encode())
    with urllib.request.urlopen(request) as answer:
        return json.load(answer)["output"]


@pytest.mark.parametrize("loader", ["load", "lambda config: Model()"])
def test_a_loader_of_the_script_itself(tmp_path: Path, loader: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("LOADER", loader))
    with program(str(tmp_path / "script.py")) as server:
        assert predict(server.port(), "x") == [server.process.pid, "x"]
        lines = [line for line in server.errors.splitlines() if line.startswith("LOG ")]
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == (0, "here\n")
    assert lines == [
        "LOG model mine runs in a thread of this process: its loader cannot be imported by name from another one"
    ]


def test_a_loader_of_a_module_beside_the_script(tmp_path: Path) -> None:
    (tmp_path / "my_models.py").write_text(MODULE)
    script = SCRIPT.replace("print(", "import my_models\nprint(").replace("LOADER", "my_models.Model.load")
    (tmp_path / "script.py").write_text(script)
    with program(str(tmp_path / "script.py")) as server:
        pid, value = predict(server.port(), "x")
        assert (pid != server.process.pid, value) == (True, "x")
        assert "LOG " not in server.errors
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == (0, "here\n")
