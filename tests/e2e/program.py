"""Programs of ours as a user runs them: in a process of their own, by what they print and how they end."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from typing import Any

from support import DEADLINE_S

# A model has to be read from the disk first, on a machine that may be busy.
START_S = 120.0


class Program:
    """A process, whose standard error is collected."""

    def __init__(self, *arguments: str) -> None:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONUNBUFFERED": "1"}
        self.process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,  # so that a test can signal its group, as a terminal does
        )
        self.errors = ""
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._news:
                self.errors += line
                self._news.notify_all()
        with self._news:
            self._news.notify_all()

    def port(self) -> int:
        """Where it listens, once its models are loaded."""
        listens = re.compile(r"listens on http://[\w.]+:(\d+)\n")
        with self._news:
            self._news.wait_for(lambda: listens.search(self.errors) or not self._reader.is_alive(), START_S)
        found = listens.search(self.errors)
        assert found, f"it does not listen; it said: {self.errors!r}"
        return int(found[1])

    def end(self) -> tuple[int, str]:
        """Waits for its end: the status and what it printed."""
        out = self.process.stdout.read()
        status = self.process.wait(START_S)
        self._reader.join(DEADLINE_S)
        return status, out


@contextlib.contextmanager
def program(*arguments: str) -> Iterator[Program]:
    running = Program(*arguments)
    try:
        yield running
    finally:
        running.process.kill()
        running.process.wait(DEADLINE_S)
        running._reader.join(DEADLINE_S)
        running.process.stdout.close()
        running.process.stderr.close()


def serve(model: str, *options: str) -> contextlib.AbstractContextManager[Program]:
    return program("-m", "realtime_serve", "serve", model, "--host", "127.0.0.1", "--port", "0", *options)


def infer(port: int, **body: Any) -> dict[str, Any]:
    """The answer as one object."""
    return post(port, "/infer", {"stream": False, **body})


def post(port: int, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", json.dumps(body).encode(), method="POST")
    with urllib.request.urlopen(request, timeout=START_S) as answer:
        return json.load(answer)
