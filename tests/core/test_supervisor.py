"""Workers of both isolations under their supervisor: how they start, fail, die, come back and end."""

from __future__ import annotations

import asyncio
import errno
import gc
import json
import os
import select
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from support import DEADLINE_S, null_model, until

from realtime_serve import ModelConfig, StreamManager
from realtime_serve.engine import handles, launch, supervisor
from realtime_serve.engine.limits import EngineLimits
from realtime_serve.engine.load_spec import LoadSpec
from realtime_serve.engine.supervisor import Supervisor, WorkerState
from realtime_serve.errors import ConfigError, ModelLoadError, ModelUnavailableError, WorkerDiedError
from realtime_serve.stream import TokenStream
from realtime_serve.types import InferenceRequest

LIMITS = EngineLimits(max_batch_size=8, max_step_tokens=64, max_queue=8, ageing_ms=1000)
ROOT = Path(__file__).parents[2]

both_isolations = pytest.mark.parametrize("isolation", ["process", "thread"])


class Watched:
    """A supervisor with the channels that it opened."""

    def __init__(self, isolation: str, model: ModelConfig | None = None) -> None:
        self.streams = StreamManager()
        self.generations: list[int] = []
        self.supervisor = Supervisor(
            LoadSpec(model or null_model(max_seq_length=100_000), LIMITS, "ERROR", "null"),
            self._open_channel,
            isolation=isolation,
        )

    def _open_channel(self, generation: int, *, shared: bool, carries_payloads: bool) -> object:
        self.generations.append(generation)
        return self.streams.open_channel(generation, shared=shared)

    async def ready(self) -> Watched:
        self.supervisor.start()
        async with asyncio.timeout(DEADLINE_S):
            await self.supervisor.wait_ready()
        return self

    async def stop(self) -> None:
        async with asyncio.timeout(DEADLINE_S):
            await self.supervisor.stop()

    @property
    def pid(self) -> int:
        return self.supervisor.worker.pid

    def submit(self, max_tokens: int = 4) -> TokenStream:
        request = InferenceRequest("r", "null", "x", max_tokens=max_tokens, ignore_eos=True, timeout=DEADLINE_S)
        return TokenStream(self.supervisor.client.submit(request, [1], model="null", version="1"))

    async def count(self, max_tokens: int) -> int:
        return len([token async for token in self.submit(max_tokens)])


async def exhaust(stream: TokenStream) -> int:
    async with asyncio.timeout(DEADLINE_S):
        return len([token async for token in stream])


def is_running(pid: int) -> bool:
    """Whether there is such a process, a zombie included."""
    return Path(f"/proc/{pid}").exists()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.0,))


@both_isolations
async def test_start_serve_stop(isolation: str) -> None:
    watched = Watched(isolation)
    with pytest.raises(ModelUnavailableError, match="it is stopped"):
        watched.submit()
    await watched.ready()
    assert watched.supervisor.is_ready
    assert watched.supervisor.max_context == 100_000
    assert await watched.count(5) == 5
    assert await asyncio.gather(*(watched.count(50) for _ in range(12))) == [50] * 12
    await watched.stop()
    assert watched.supervisor.state is WorkerState.STOPPED
    with pytest.raises(ModelUnavailableError):
        watched.submit()
    assert watched.supervisor.restarts == 0
    assert watched.streams.open_count() == 0
    await watched.stop()


@both_isolations
async def test_stop_ends_streams_as_cancelled_and_loses_no_token(isolation: str) -> None:
    watched = await Watched(isolation).ready()
    streams = [watched.submit(90_000) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    # Nobody reads now: the rings fill up, and what they hold is read after the worker is gone.
    await watched.stop()
    for stream in streams:
        rest = [token async for token in stream]
        assert stream.finish_reason == "cancelled"
        assert stream.usage.completion_tokens == 1 + len(rest)
    assert watched.streams.open_count() == 0


@both_isolations
@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (null_model(wrong=1), "model 'null' has no option 'wrong'"),
        (ModelConfig("null", device="cpu", metadata={"step_ms": "fast"}), "step_ms must be a number"),
    ],
)
async def test_why_a_load_failed_reaches_the_caller(isolation: str, model: ModelConfig, reason: str) -> None:
    watched = Watched(isolation, model)
    with pytest.raises(ModelLoadError, match=reason):
        await watched.ready()
    assert watched.supervisor.state is WorkerState.FAILED
    assert watched.generations == []
    await watched.stop()


@both_isolations
async def test_a_reason_of_any_length_arrives_shortened(isolation: str) -> None:
    watched = Watched(isolation, ModelConfig("null", device="cpu", metadata={"o" * 50_000: 1}))
    with pytest.raises(ModelLoadError, match="has no option 'ooo") as caught:
        await watched.ready()
    assert len(str(caught.value)) <= 2000


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"big": "x" * 70_000}, "the most is 65536"), ({"when": object()}, "not JSON serializable")],
)
async def test_options_that_cannot_be_handed_over_are_refused(options: dict[str, object], reason: str) -> None:
    watched = Watched("process", ModelConfig("null", device="cpu", metadata=options))
    before = open_descriptors()
    with pytest.raises(ModelLoadError, match=rf"options of model 'null' cannot .*{reason}"):
        await watched.ready()
    assert open_descriptors() == before


async def test_a_killed_worker_ends_its_streams_and_another_takes_over(monkeypatch: pytest.MonkeyPatch) -> None:
    no_backoff(monkeypatch)
    watched = await Watched("process").ready()
    streams = [watched.submit(90_000) for _ in range(3)]
    for stream in streams:
        await anext(stream)
    first = watched.pid
    os.kill(first, signal.SIGKILL)
    for stream in streams:
        with pytest.raises(WorkerDiedError):
            await exhaust(stream)
        assert stream.finish_reason == "error"
    await until(lambda: watched.supervisor.is_ready)
    assert watched.pid != first
    assert not is_running(first)
    assert watched.generations == [1, 2]
    assert watched.supervisor.client.channel.generation == 2
    assert watched.supervisor.restarts == 1
    assert await watched.count(5) == 5
    await watched.stop()
    assert watched.streams.open_count() == 0


async def test_tokens_written_before_the_death_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    no_backoff(monkeypatch)
    watched = await Watched("process").ready()
    finished, cut = watched.submit(50), watched.submit(90_000)
    await until(lambda: finished._stream.buffered == 51 and cut._stream.buffered >= 100, "full rings")
    os.kill(watched.pid, signal.SIGKILL)
    await until(lambda: watched.supervisor.restarts == 1)
    assert len([token async for token in finished]) == 50
    assert finished.finish_reason == "length"
    with pytest.raises(WorkerDiedError):
        await exhaust(cut)
    assert cut.usage.completion_tokens >= 100
    await watched.stop()


@both_isolations
async def test_a_loop_that_fails_is_a_death(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    no_backoff(monkeypatch)
    watched = await Watched(isolation).ready()
    stream = watched.submit(90_000)
    await anext(stream)
    if isolation == "thread":

        def fail() -> None:
            raise SystemExit(3)

        watched.supervisor.worker._worker_loop._command(fail)
    else:
        os.kill(watched.pid, signal.SIGKILL)
    with pytest.raises(WorkerDiedError):
        await exhaust(stream)
    await until(lambda: watched.supervisor.is_ready)
    assert await watched.count(3) == 3
    await watched.stop()


async def test_death_while_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = Watched("process")
    watched.supervisor.start()
    os.kill(watched.pid, signal.SIGKILL)
    with pytest.raises(ModelLoadError, match=r"ended with status -9 while it was loading"):
        async with asyncio.timeout(DEADLINE_S):
            await watched.supervisor.wait_ready()
    assert watched.supervisor.restarts == 0


async def test_a_loader_that_exits_does_not_keep_its_supervisor_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(spec: LoadSpec) -> None:
        sys.exit(7)

    monkeypatch.setattr(launch, "load_runner", load)
    with pytest.raises(ModelLoadError, match="SystemExit: 7"):
        await Watched("thread").ready()


@pytest.mark.asyncio(loop_factories=["uvloop"])
async def test_each_early_death_waits_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The schedule is asked for, not waited for."""
    delays = []
    watched = await Watched("process").ready()
    loop = asyncio.get_running_loop()
    call_later = loop.call_later

    class Loop:
        """The loop, but that restarts are at once, and written down."""

        def __getattr__(self, name: str) -> object:
            return getattr(loop, name)

        def call_later(self, delay: float, callback: object) -> object:
            delays.append(delay)
            return call_later(0.0, callback)

    monkeypatch.setattr(supervisor.asyncio, "get_running_loop", Loop)
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (0.0, 11.0, 22.0))
    for deaths in range(1, 5):
        os.kill(watched.pid, signal.SIGKILL)
        await until(lambda deaths=deaths: watched.supervisor.restarts == deaths and watched.supervisor.is_ready)
    assert delays == [0.0, 11.0, 22.0, 22.0]
    # A death after a good while is not one of a series.
    monkeypatch.setattr(supervisor, "_STABLE_AFTER_S", -1.0)
    os.kill(watched.pid, signal.SIGKILL)
    await until(lambda: watched.supervisor.restarts == 5 and watched.supervisor.is_ready)
    assert delays[4:] == [0.0]
    monkeypatch.undo()
    await watched.stop()


@pytest.mark.asyncio(loop_factories=["uvloop"])
async def test_retry_after_says_when_the_next_worker_may_be_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_BACKOFF_S", (500.0, 600.0))
    watched = await Watched("process").ready()
    os.kill(watched.pid, signal.SIGKILL)
    await until(lambda: watched.supervisor.state is WorkerState.RESTARTING)
    with pytest.raises(ModelUnavailableError, match="restarting") as caught:
        watched.submit()
    assert caught.value.retry_after >= 500.0
    await watched.stop()
    assert watched.supervisor.state is WorkerState.STOPPED


async def test_a_worker_that_cannot_be_restarted_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    no_backoff(monkeypatch)
    watched = await Watched("process").ready()
    spawn, left = handles._spawn, [2]

    def fail_twice(fd: int) -> object:
        if left[0]:
            left[0] -= 1
            raise OSError(errno.EAGAIN, "no more processes")
        return spawn(fd)

    monkeypatch.setattr(handles, "_spawn", fail_twice)
    os.kill(watched.pid, signal.SIGKILL)
    await until(lambda: watched.supervisor.restarts == 3 and watched.supervisor.is_ready)
    assert await watched.count(3) == 3
    await watched.stop()


async def test_a_channel_that_cannot_be_made_fails_the_load() -> None:
    watched = Watched("process")

    def refuse(generation: int, *, shared: bool, carries_payloads: bool) -> object:
        raise OSError(errno.EMFILE, "too many open files")

    watched.supervisor._open_channel = refuse
    with pytest.raises(ModelLoadError, match=r"channel could not be made: .*too many open files"):
        await watched.ready()


@both_isolations
async def test_stop_while_loading(isolation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    loading, release = threading.Event(), threading.Event()
    load_runner = launch.load_runner

    def load(spec: LoadSpec) -> object:
        loading.set()
        assert release.wait(DEADLINE_S)
        return load_runner(spec)

    monkeypatch.setattr(launch, "load_runner", load)
    watched = Watched(isolation)
    watched.supervisor.start()
    waiting = asyncio.ensure_future(watched.supervisor.wait_ready())
    pid = 0
    if isolation == "thread":
        await until(loading.is_set)
        release.set()
    else:
        pid = watched.pid
    await watched.stop()
    with pytest.raises(ModelLoadError, match="stopped while it was loading"):
        await waiting
    assert watched.generations == []
    assert not pid or not is_running(pid)


async def test_a_worker_that_does_not_answer_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(supervisor, "_STOP_GRACE_S", 0.05)
    watched = await Watched("process").ready()
    pid = watched.pid
    os.kill(pid, signal.SIGSTOP)
    await watched.stop()
    monkeypatch.undo()
    await until(lambda: watched.supervisor.worker is None)
    assert not is_running(pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_signals_to_the_whole_group_do_not_reach_a_worker(number: signal.Signals) -> None:
    watched = Watched("process")
    watched.supervisor.start()
    os.kill(watched.pid, number)  # while Python starts up in it
    async with asyncio.timeout(DEADLINE_S):
        await watched.supervisor.wait_ready()
    os.kill(watched.pid, number)
    assert await watched.count(5) == 5
    assert watched.supervisor.restarts == 0
    assert number not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
    await watched.stop()


@pytest.mark.asyncio(loop_factories=["uvloop"])
async def test_a_worker_whose_channel_cannot_be_mapped_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    no_backoff(monkeypatch)
    watched = Watched("process")
    attach = handles.ProcessWorker.attach

    def attach_something_else(self: handles.ProcessWorker, channel: object) -> None:
        monkeypatch.setattr(handles.ProcessWorker, "attach", attach)
        self._send(json.dumps({"op": "attach", "channel": 1}).encode())  # without descriptors

    monkeypatch.setattr(handles.ProcessWorker, "attach", attach_something_else)
    await watched.ready()
    await until(lambda: watched.supervisor.restarts == 1 and watched.supervisor.is_ready)
    assert await watched.count(3) == 3
    await watched.stop()


@pytest.mark.asyncio(loop_factories=["uvloop"])
@both_isolations
async def test_nothing_is_left_of_many_workers(isolation: str) -> None:
    pids = []
    await (await Watched(isolation).ready()).stop()
    gc.collect()
    before = open_descriptors(), threading.active_count()
    for _ in range(5):
        watched = await Watched(isolation).ready()
        assert await watched.count(3) == 3
        pids += [watched.pid] if isolation == "process" else []
        await watched.stop()
    del watched
    gc.collect()
    await until(lambda: threading.active_count() <= before[1])
    assert open_descriptors() <= before[0]
    assert not any(map(is_running, pids))


async def test_a_stalled_worker_is_seen_and_a_slow_reader_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    watched = await Watched("process").ready()
    assert watched.supervisor.stalled_for(1e9) == 0.0
    slow = watched.submit(90_000)
    await until(lambda: slow._stream.buffered >= 100, "a full ring")
    assert watched.supervisor.stalled_for(1e9) == 0.0
    assert watched.supervisor.stalled_for(2e9) == 0.0
    os.kill(watched.pid, signal.SIGSTOP)
    waiting = watched.submit(5)
    await until(lambda: watched.supervisor.stalled_for(2e9) > 0.0)
    assert watched.supervisor.stalled_for(2e9) < DEADLINE_S  # counted from the request, whenever we looked before
    os.kill(watched.pid, signal.SIGCONT)
    assert len([token async for token in waiting]) == 5
    assert watched.supervisor.stalled_for(3e9) == 0.0
    await slow.aclose()
    await watched.stop()


def test_a_worker_ends_when_its_supervisors_process_dies(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio, sys\n"
        "from realtime_serve import InferenceServer, ModelConfig\n"
        "async def main():\n"
        "    server = InferenceServer()\n"
        "    server.register_model(ModelConfig('null', device='cpu'))\n"
        "    async with server:\n"
        "        print(server.model_registry.get_model('null').worker.worker.pid, flush=True)\n"
        "        await asyncio.sleep(600)\n"
        "asyncio.run(main())\n"
    )
    process = _python(script)
    pid = int(process.stdout.readline())
    worker = os.pidfd_open(pid)
    process.kill()
    process.wait(DEADLINE_S)
    process.stdout.close()
    assert select.select([worker], [], [], DEADLINE_S)[0], "the worker outlived its supervisor"
    os.close(worker)


def test_a_script_without_a_main_guard_runs_once(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import asyncio\n"
        "from realtime_serve import InferenceRequest, InferenceServer, ModelConfig\n"
        "print('here', flush=True)\n"
        "async def main():\n"
        "    server = InferenceServer()\n"
        "    server.register_model(ModelConfig('null', device='cpu'))\n"
        "    async with server:\n"
        "        answer = await server.infer(InferenceRequest('r', 'null', 'x', max_tokens=3))\n"
        "        print(answer.total_tokens, answer.finish_reason)\n"
        "asyncio.run(main())\n"
    )
    process = _python(script)
    out, _ = process.communicate(timeout=DEADLINE_S)
    assert (out.split(), process.returncode) == (["here", "3", "length"], 0)


def _python(script: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    return subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, env=environment)


def test_a_reason_is_one_line() -> None:
    assert handles.describe(ConfigError("a\n  b")) == "a b"
    assert handles.describe(KeyError("x")) == "KeyError: 'x'"
    assert len(handles.describe(ValueError("x" * 10_000))) < 2100
