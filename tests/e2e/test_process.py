"""The server's process: signals and exit statuses."""

from __future__ import annotations

import ctypes
import http.client
import json
import os
import platform
import re
import select
import signal
import socket
import struct
import urllib.request

import pytest
from program import infer, serve
from support import DEADLINE_S


class Streaming:
    """A stream that is being read."""

    def __init__(self, port: int, max_tokens: int) -> None:
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
        self.connection.request("POST", "/infer", json.dumps({"prompt": "x", "max_tokens": max_tokens}))
        self.answer = self.connection.getresponse()
        assert self.answer.status == 200
        assert self.answer.readline() == b"id: 0\n"  # it runs

    def rest(self) -> tuple[int, dict[str, object]]:
        """How many more tokens came, and the last event's data."""
        *before, last = self.answer.read().decode().split("\n\n")[:-1]
        self.connection.close()
        return sum(event.startswith("id: ") for event in before), json.loads(last.split("data: ")[1])


@pytest.mark.parametrize("isolation", ["process", "thread"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_streams_finish(number: signal.Signals, isolation: str) -> None:
    with serve("null", "--model-option", "step_ms=1", "--isolation", isolation) as server:
        streams = [Streaming(server.port(), 300) for _ in range(3)]
        children = [os.pidfd_open(child) for child in _children(server.process.pid)]
        assert len(children) == (isolation == "process")
        # As a terminal's Ctrl-C or a service manager does it: the workers get it too.
        os.killpg(server.process.pid, number)
        for stream in streams:
            count, done = stream.rest()
            assert (count, done["finish_reason"]) == (299, "length")
        status, out = server.end()
        assert (status, out) == (0, "")
        assert "Traceback" not in server.errors
        for child in children:
            assert select.select([child], [], [], 0)[0], "a worker outlived its server"
            os.close(child)


def test_a_worker_runs_in_long_slices_and_the_server_does_not() -> None:
    with serve("null") as server:
        server.port()
        (worker,) = _children(server.process.pid)
        own = _slice_ns(server.process.pid)
        workers = _slice_ns(worker)
    knows_slices = tuple(map(int, re.findall(r"\d+", platform.release())[:2])) >= (6, 12)
    assert workers == (50_000_000 if knows_slices else own)
    assert own != 50_000_000


def _slice_ns(process: int) -> int:
    """Of its main thread, as sched_getattr(2) has it."""
    libc = ctypes.CDLL(None, use_errno=True)
    attributes = ctypes.create_string_buffer(48)
    library_call = {"x86_64": 315, "aarch64": 275}[platform.machine()]
    assert libc.syscall(library_call, process, attributes, len(attributes), 0) == 0, os.strerror(ctypes.get_errno())
    return int(struct.unpack_from("IIQiIQ", attributes.raw)[5])


def test_a_second_signal_ends_it_now() -> None:
    with serve("null", "--model-option", "step_ms=2", "--max-seq-length", "1000000") as server:
        stream = Streaming(server.port(), 900_000)  # half an hour
        server.process.send_signal(signal.SIGTERM)
        _wait_for_drain(server.port())
        server.process.send_signal(signal.SIGTERM)
        count, done = stream.rest()
        assert count < 900_000
        assert done["finish_reason"] == "cancelled"
        assert server.end()[0] == 0
        assert "Traceback" not in server.errors


def _wait_for_drain(port: int) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    while True:
        connection.request("GET", "/ready")
        answer = connection.getresponse()
        answer.read()
        if answer.status == 503:
            connection.request("POST", "/infer", json.dumps({"prompt": "x"}))
            refused = connection.getresponse()
            assert (refused.status, json.load(refused)["error"]["code"]) == (503, "shutting_down")
            assert int(refused.headers["Retry-After"]) >= 1
            assert refused.headers["Connection"] == "close"
            connection.close()
            return


def test_what_its_clients_have_not_read_yet_is_not_lost() -> None:
    with serve("null", "--max-seq-length", "100000") as server:
        port = server.port()
        (worker,) = _children(server.process.pid)
        gone = os.pidfd_open(worker)
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(DEADLINE_S)
        slow.connect(("127.0.0.1", port))
        # 100 KB: more than the kernel takes, and not so much more that the stream is held up: the server has the rest.
        body = json.dumps({"prompt": "x", "max_tokens": 1750})
        slow.sendall(f"POST /infer HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n{body}".encode())
        while infer_count(port) < 1:
            pass
        server.process.send_signal(signal.SIGTERM)
        assert select.select([gone], [], [], DEADLINE_S)[0]  # all else has ended
        os.close(gone)
        answer = b""
        while data := slow.recv(65536):
            answer += data
        slow.close()
        assert answer.endswith(b"\n\n\r\n0\r\n\r\n")
        assert answer.count(b"id: ") == 1750
        assert answer.count(b'"finish_reason":"length"') == 1
        status, out = server.end()
        assert (status, out) == (0, "")
        assert "Traceback" not in server.errors


def infer_count(port: int) -> int:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/models", timeout=DEADLINE_S) as answer:
        return json.load(answer)["models"][0]["inference_count"]


def _children(pid: int) -> list[int]:
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def test_a_worker_leaves_with_its_server() -> None:
    with serve("null") as server:
        port = server.port()
        assert infer(port, prompt="x", max_tokens=3)["text"] == " the of and"
        (worker,) = _children(server.process.pid)
        gone = os.pidfd_open(worker)
        server.process.kill()
        assert select.select([gone], [], [], DEADLINE_S)[0], "the worker outlived its server"
        os.close(gone)


def test_a_port_in_use_is_one_line_and_status_2() -> None:
    with serve("null") as first:
        port = first.port()
        with serve("null", "--port", str(port)) as second:
            status, out = second.end()
        assert (status, out) == (2, "")
        assert second.errors.count("\n") == 1
        assert f"port {port}" in second.errors
        assert "--port" in second.errors
        assert infer(port, prompt="x", max_tokens=2)["finish_reason"] == "length"


def test_a_model_that_does_not_load_is_one_line_and_status_2() -> None:
    with serve("null", "--model-option", "wrong=1") as server:
        status, out = server.end()
        assert (status, out) == (2, "")
        assert server.errors == "realtime-serve: model 'null' has no option 'wrong'\n"
