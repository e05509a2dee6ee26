"""More connections than a server is used to, and than its process may have."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from program import START_S, Program, infer, program
from support import DEADLINE_S

# For what a process has open besides its connections.
_SPARE = 500


def open_files(server: Program) -> int:
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


def until_open_files(server: Program, condition: str, count: int) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not (open_files(server) >= count if condition == "at least" else open_files(server) <= count):
        assert time.monotonic() < deadline, f"{open_files(server)} files are open, not {condition} {count}"
        time.sleep(0.01)


@contextlib.contextmanager
def all_files_allowed() -> Iterator[int]:
    """Raises this process's soft limit of open files as far as it goes; yields it."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = 1_000_000 if hard == resource.RLIM_INFINITY else hard
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    try:
        yield most
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.slow
@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
def test_ten_thousand_idle_connections(loop: str, record_property: Callable[[str, object], None]) -> None:
    script = Path(__file__).with_name("idle_server.py")
    arguments = ("serve", "null", "--host", "127.0.0.1", "--port", "0", "--max-connections", "20000")
    with contextlib.ExitStack() as stack:
        allowed = stack.enter_context(all_files_allowed())
        count = min(10_000, allowed - _SPARE)
        print(f"{count} connections, of the {allowed} files that a process may have open here")
        record_property("connections", count)
        # It starts with the limit that shells usually set, and has to raise it.
        server = stack.enter_context(program(str(script), loop, str(min(1024, allowed)), *arguments))
        port = server.port()
        infer(port, prompt="x", max_tokens=2)
        before = open_files(server)
        clients = [
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=START_S)) for _ in range(count)
        ]
        until_open_files(server, "at least", count)
        for max_tokens in range(1, 100, 10):
            assert infer(port, prompt="x", max_tokens=max_tokens)["usage"]["completion_tokens"] == max_tokens
        assert open_files(server) >= count
        server.process.send_signal(signal.SIGUSR1)
        for client in clients:
            assert client.recv(1) == b""
        until_open_files(server, "at most", before)
        assert infer(port, prompt="x", max_tokens=5)["finish_reason"] == "length"
        server.process.send_signal(signal.SIGTERM)
        assert server.end() == (0, "")
        assert "Traceback" not in server.errors


LIMITED = """
import resource, sys
from realtime_serve.cli import main
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
sys.exit(main(sys.argv[1:]))
"""


def limited_server() -> contextlib.AbstractContextManager[Program]:
    """A server that may have 64 files open."""
    return program("-c", LIMITED, "serve", "null", "--host", "127.0.0.1", "--port", "0")


def test_more_clients_than_files_are_told_so() -> None:
    with limited_server() as server, contextlib.ExitStack() as stack:
        port = server.port()
        assert (
            "max_connections is 256, but the 64 files that this process may have open (ulimit -n) leave room for 32"
            in server.errors
        )
        before = open_files(server)
        connections = [http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S) for _ in range(100)]
        statuses = []
        for connection in connections:
            stack.callback(connection.close)
            connection.request("GET", "/health")
            answer = connection.getresponse()
            statuses.append(answer.status)
            answer.read()
        assert statuses == [200] * 32 + [503] * 68
        assert open_files(server) < 64
        stack.close()
        until_open_files(server, "at most", before + 1)  # uvloop opens one with its first connection, for good
        assert infer(port, prompt="x", max_tokens=5)["finish_reason"] == "length"
        assert "accepted" not in server.errors


def test_out_of_files_streams_go_on_and_who_waits_is_served() -> None:
    arguments = ("--model-option", "step_ms=1", "--max-seq-length", "100000")
    with program("-m", "realtime_serve", "serve", "null", "--host", "127.0.0.1", "--port", "0", *arguments) as server:
        port = server.port()
        running = http.client.HTTPConnection("127.0.0.1", port, timeout=START_S)
        running.request("POST", "/infer", json.dumps({"prompt": "x", "max_tokens": 1500}))
        stream = running.getresponse()
        assert stream.readline() == b"id: 0\n"
        # No more than three more, from now on: it can't have seen this coming.
        hard = resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE)[1]
        highest = max(int(name) for name in os.listdir(f"/proc/{server.process.pid}/fd"))
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (highest + 1 + 3, hard))
        clients = [http.client.HTTPConnection("127.0.0.1", port, timeout=START_S) for _ in range(100)]
        for client in clients:
            client.connect()
        for client in clients:
            client.request("GET", "/health")
        for client in clients:
            answer = client.getresponse()
            assert (answer.status, json.load(answer)["status"]) == (200, "ok")
            client.close()
        assert stream.read().count(b"id: ") == 1499
        running.close()
        assert server.errors.count("no connection can be accepted") == 1
        assert "Traceback" not in server.errors
