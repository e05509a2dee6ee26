"""The command line: flags, precedence, exit statuses, and errors of one line."""

import asyncio
import json
import logging
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from realtime_serve import __version__, cli, hub, loadtest, models, server
from realtime_serve.config import DEFAULT_MODEL, ModelConfig, ServerConfig, option_name
from realtime_serve.errors import ConfigError, ModelLoadError, ModelNotFoundError, PullError

COMMANDS = ("serve", "pull", "models", "bench")

# What each flag is given, and what its field then is.
FLAGS: dict[str, tuple[str, object]] = {
    "--host": ("127.0.0.1", "127.0.0.1"),
    "--port": ("9000", 9000),
    "--max-connections": ("3", 3),
    "--request-timeout": ("2.5", 2.5),
    "--max-batch-size": ("4", 4),
    "--max-batch-wait-ms": ("5", 5),
    "--log-level": ("debug", "DEBUG"),
    "--rate-limit-per-minute": ("0", 0),
    "--graceful-shutdown-timeout": ("1", 1.0),
    "--max-queue": ("7", 7),
    "--ageing-ms": ("8", 8),
    "--stream-buffer-tokens": ("9", 9),
    "--max-step-tokens": ("10", 10),
    "--target-step-ms": ("12.5", 12.5),
    "--isolation": ("thread", "thread"),
    "--max-body-bytes": ("2048", 2048),
    "--slow-reader-timeout": ("1.5", 1.5),
    "--client-priorities": ("vip=high, batch=LOW", (("batch", "LOW"), ("vip", "HIGH"))),
    "--name": ("alias", "alias"),
    "--model-version": ("2.0", "2.0"),
    "--model-path": ("null", "null"),
    "--device": ("mps", "mps"),
    "--dtype": ("bfloat16", "bfloat16"),
    "--quantized": ("int4", "int4"),
    "--max-seq-length": ("128", 128),
    "--warmup-tokens": ("0", 0),
}


class Served:
    """What run_server was called with."""

    def __init__(self) -> None:
        self.config = ServerConfig()
        self.model = ModelConfig("none")
        self.count = 0
        self.loop: object = None
        self.error: BaseException | None = None

    async def run_server(self, config: ServerConfig, models: Sequence[ModelConfig] = ()) -> None:
        self.count += 1
        self.config, (self.model,) = config, models
        self.loop = asyncio.get_running_loop()
        if self.error is not None:
            raise self.error


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in os.environ:
        if variable.startswith("REALTIME_SERVE_"):
            monkeypatch.delenv(variable)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Served]:
    served = Served()
    monkeypatch.setattr(server, "run_server", served.run_server)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    before = signal.getsignal(signal.SIGTERM)
    yield served
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.fixture
def complains(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a command line that must fail with one line on stderr; that line without its beginning."""

    def run(*arguments: str, status: int = 2) -> str:
        assert cli.main(list(arguments)) == status
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("realtime-serve: ")
        assert err.endswith("\n")
        assert err.count("\n") == 1
        return err.removeprefix("realtime-serve: ").rstrip("\n")

    return run


def run_program(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "realtime_serve", *arguments]
    return subprocess.run(command, text=True, timeout=60, check=False, **{"capture_output": True} | options)


# Help and version


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr() == (f"realtime-serve {__version__}\n", "")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], *([command, "--help"] for command in COMMANDS)])
def test_help_fits_a_terminal(
    arguments: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(arguments) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.startswith("usage: realtime-serve")
    assert max(map(len, out.splitlines())) <= 80


def test_help_names_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main([])
    out = capsys.readouterr().out
    assert all(f"\n    {command} " in out for command in COMMANDS)


def test_help_of_serve_is_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["serve", "--help"])
    out = capsys.readouterr().out
    parts = re.split(r"^(?:server|model|limits):$", out, flags=re.MULTILINE)
    server_group, model_group, limits_group = (set(re.findall(r"--[a-z-]+", part)) for part in parts[1:])
    assert {"--host", "--port", "--log-level", "--no-enable-metrics", "--isolation"} <= server_group
    assert {"--name", "--model-version", "--device", "--quantized", "--model-option"} <= model_group
    assert {"--max-batch-size", "--request-timeout", "--rate-limit-per-minute"} <= limits_group
    assert server_group | model_group | limits_group >= FLAGS.keys()


def test_version_and_help_load_little() -> None:
    code = "import sys; from realtime_serve.cli import main; main(sys.argv[1:]); print(*sys.modules, file=sys.stderr)"
    for argument in ("--version", "--help"):
        done = subprocess.run([sys.executable, "-c", code, argument], capture_output=True, text=True, check=True)
        assert not {"asyncio", "numpy", "aiohttp", "realtime_serve.hub", "realtime_serve._core"} & set(
            done.stderr.split()
        )


# serve


def test_every_field_has_a_flag(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {option_name(field) for owner in (ServerConfig, ModelConfig) for field in fields(owner)}
    assert {f"--{name.replace('_', '-')}" for name in names} == FLAGS.keys() | {"--enable-metrics", "--metadata"}
    arguments = [part for flag, (text, _) in FLAGS.items() for part in (flag, text)]
    assert cli.main(["serve", *arguments, "--no-enable-metrics", "--model-option", "step_ms=5"]) == 0
    for owner, config in ((ServerConfig, served.config), (ModelConfig, served.model)):
        for field in fields(owner):
            flag = f"--{option_name(field).replace('_', '-')}"
            if flag in FLAGS:
                assert getattr(config, field.name) == FLAGS[flag][1]
    assert served.config.enable_metrics is False
    assert served.model.metadata == {"step_ms": 5}


def test_a_flag_may_be_turned_on(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALTIME_SERVE_ENABLE_METRICS", "no")
    assert cli.main(["serve", "null"]) == 0
    assert served.config.enable_metrics is False
    assert cli.main(["serve", "null", "--enable-metrics"]) == 0
    assert served.config.enable_metrics is True


def test_what_is_not_given_is_the_default(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "check_device", lambda model: None)
    monkeypatch.setattr(hub, "resolve", Path)
    assert cli.main(["serve"]) == 0
    assert served.config == ServerConfig()
    assert (served.model.name, served.model.model_path) == (DEFAULT_MODEL, DEFAULT_MODEL)


def test_flags_win_over_the_environment_and_that_over_the_file(
    served: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("[server]\nport = 1\nmax_queue = 1\nageing_ms = 1\n[model.metadata]\na = 1\nb = 1\n")
    monkeypatch.setenv("REALTIME_SERVE_PORT", "2")
    monkeypatch.setenv("REALTIME_SERVE_MAX_QUEUE", "2")
    assert cli.main(["serve", "null", "--config", str(file), "--port", "3", "--model-option=b=2"]) == 0
    assert (served.config.port, served.config.max_queue, served.config.ageing_ms) == (3, 2, 1)
    assert served.model.metadata == {"a": 1, "b": 2}


@pytest.mark.parametrize(
    ("arguments", "name", "wanted"),
    [
        (["null"], "null", None),
        (["some/tiny.gguf"], "tiny", "some/tiny.gguf"),
        (["some/folder/"], "folder", "some/folder/"),
        (["gpt2", "--name", "alias"], "alias", "gpt2"),
        (["--model-path", "x.gguf"], "x", "x.gguf"),
        (["--name", "gpt2"], "gpt2", "gpt2"),
    ],
)
def test_which_model(
    arguments: list[str], name: str, wanted: str | None, served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def resolve(wanted: str) -> Path:
        asked.append(wanted)
        return Path(wanted)

    monkeypatch.setattr(hub, "resolve", resolve)
    assert cli.main(["serve", *arguments, "--device", "cpu"]) == 0
    assert served.model.name == name
    assert asked == ([] if wanted is None else [wanted])


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5),
        ("-1.5", -1.5),
        ("1e3", 1000.0),
        ("true", True),
        ("null", None),
        ('"5"', "5"),
        ("", ""),
        ("text", "text"),
        ("a=b", "a=b"),
        ("[1]", "[1]"),
        ('{"a":1}', '{"a":1}'),
        ("NaN", "NaN"),
        ("Infinity", "Infinity"),
        ("-Infinity", "-Infinity"),
        ("1e999", "1e999"),
        ("9" * 5000, "9" * 5000),
        ("[" * 100_000, "[" * 100_000),
        ("True", "True"),
        ("010", "010"),
    ],
    ids=lambda value: str(value)[:12],
)
def test_model_options(text: str, value: object, served: Served) -> None:
    assert cli.main(["serve", "null", "--model-option", f"k={text}", "--model-option", "other=1"]) == 0
    got = served.model.metadata["k"]
    assert (type(got), got) == (type(value), value)
    assert served.model.metadata["other"] == 1
    json.dumps(served.model.metadata, allow_nan=False)


def test_the_loop_is_uvloops(served: Served) -> None:
    import uvloop

    assert cli.main(["serve", "null"]) == 0
    assert isinstance(served.loop, uvloop.Loop)


def test_without_uvloop_it_is_asyncios(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "uvloop", None)
    assert cli.main(["serve", "null"]) == 0
    assert isinstance(served.loop, asyncio.SelectorEventLoop)
    assert [record.message for record in caplog.records if record.name == "realtime_serve.cli"] == [
        "uvloop is not installed: asyncio's own event loop serves, more slowly"
    ]


def test_the_log_has_the_configured_level(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    given: dict[str, Any] = {}
    monkeypatch.setattr(logging, "basicConfig", lambda **options: given.update(options))
    assert cli.main(["serve", "null", "--log-level", "error"]) == 0
    assert (given["level"], given["stream"]) == ("ERROR", sys.stderr)
    record = logging.LogRecord("realtime_serve.x", logging.INFO, "", 0, "said", None, None)
    assert logging.Formatter(given["format"]).format(record).endswith("INFO realtime_serve.x: said")


# Errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["srve"], "unknown command 'srve'; did you mean 'serve'?"),
        (["--prot"], "unknown option '--prot'"),
        (["serve", "--prot", "9000"], "unknown option '--prot'; did you mean '--port'?"),
        (["serve", "--prot=9000"], "unknown option '--prot'; did you mean '--port'?"),
        (["serve", "--max-batch"], "unknown option '--max-batch'; did you mean '--max-batch-size'?"),
        (["serve", "-x"], "unknown option '-x'"),
        (["serve", "--por", "1"], "unknown option '--por'; did you mean '--port'?"),
        (["bench", "--concurency", "1"], "unknown option '--concurency'; did you mean '--concurrency'?"),
        (["serve", "null", "gpt2"], "unexpected argument 'gpt2'"),
        (["serve", "--port"], "argument --port: expected one argument"),
        (["serve", "null", "--no-enable-metrics=1"], "argument --enable-metrics/--no-enable-metrics: "),
        (["serve", "--port", "http"], "port must be an integer; it is 'http' (from the command line)"),
        (["serve", "--port", "-1"], "port must be at least 0; it is -1 (from the command line)"),
        (["serve", "--isolation", "fork"], "isolation must be one of process, thread; it is 'fork'"),
        (["serve", "--request-timeout", "nan"], "request_timeout must be a finite number"),
        (["serve", "--model-version", ""], "version must not be empty (from the command line)"),
        (["serve", ""], "name must not be empty (from the command line)"),
        (["serve", "a\nb\tc", "--port", "x\ny"], "port must be an integer"),
        (["serve", "--\n"], "unknown option '--\\n'"),
        (["serve", "null", "--model-path", "x"], "MODEL and --model-path say the same; give one of them"),
        (["serve", "--model-option", "step_ms"], "argument --model-option: must be KEY=VALUE; it is 'step_ms'"),
        (["serve", "--model-option", "=5"], "argument --model-option: must be KEY=VALUE; it is '=5'"),
        (["serve", "--config", "/nowhere/serve.toml"], "/nowhere/serve.toml cannot be read: No such file or directory"),
        (["serve", "null", "--device", "cuda:999"], "device 'cuda:999' of model 'null': "),
        (["serve", "null", "--device", "gpu"], "device must be cpu, mps, cuda or cuda:N; it is 'gpu'"),
        (["serve", "no-such-model", "--device", "cpu"], "no-such-model"),
        (["serve", "no/such/file.gguf", "--device", "cpu"], "no/such/file.gguf"),
        (["pull"], "the following arguments are required: MODEL"),
        (["pull", "no-such-model"], "no-such-model"),
        (["models", "x"], "unexpected argument 'x'"),
        (["bench", "-c", "0"], "argument -c/--concurrency: must be an integer from 1 to 10000000; it is '0'"),
        (["bench", "-n", "many"], "argument -n/--requests: must be an integer"),
        (["bench", "--url", "localhost"], "url must be like http://localhost:8000; it is 'localhost'"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(arguments: list[str], says: str, complains: Callable[..., str]) -> None:
    assert says in complains(*arguments)


def test_a_bad_variable_is_named(complains: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REALTIME_SERVE_PORT", "http")
    assert complains("serve") == "port must be an integer; it is 'http' (from REALTIME_SERVE_PORT)"


def test_a_bad_file_is_named(complains: Callable[..., str], tmp_path: Path) -> None:
    file = tmp_path / "serve.toml"
    file.write_text("[server]\nport = 'http'\n")
    assert complains("serve", "--config", str(file)).endswith(f"(from [server] of {file})")


def test_a_file_that_is_no_model(
    complains: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("broken.gguf").write_bytes(b"not a model")
    assert "broken.gguf" in complains("serve", "broken.gguf", "--device", "cpu")


@pytest.mark.parametrize(
    "error", [ConfigError("port 1 is in use", "port"), ModelLoadError("it\ndid not\nload"), ModelNotFoundError("none")]
)
def test_a_server_that_cannot_start(error: Exception, served: Served, complains: Callable[..., str]) -> None:
    served.error = error
    assert complains("serve", "null") == " ".join(str(error).split())


def test_a_pull_that_fails(complains: Callable[..., str], monkeypatch: pytest.MonkeyPatch, served: Served) -> None:
    def fail(name: str) -> Path:
        raise PullError(f"{name} cannot be pulled")

    monkeypatch.setattr(hub, "pull", fail)
    monkeypatch.setattr(hub, "resolve", fail)
    assert complains("pull", "m") == "m cannot be pulled"
    assert complains("serve", "m", "--device", "cpu") == "m cannot be pulled"
    assert served.count == 0


def test_an_error_of_ours_is_one_line_too(
    complains: Callable[..., str], monkeypatch: pytest.MonkeyPatch, served: Served
) -> None:
    served.error = ZeroDivisionError("division\nby zero")
    assert complains("serve", "null", status=1) == "internal error: ZeroDivisionError: division by zero"


# Signals


def test_an_interrupt_has_its_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, served: Served
) -> None:
    def interrupted(name: str) -> Path:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("unreachable")

    monkeypatch.setattr(hub, "pull", interrupted)
    monkeypatch.setattr(hub, "resolve", interrupted)
    assert cli.main(["pull", "m"]) == 130
    assert cli.main(["serve", "m", "--device", "cpu"]) == 130
    served.error = KeyboardInterrupt()
    assert cli.main(["serve", "null"]) == 130
    assert capsys.readouterr() == ("", "")


def test_a_pull_that_is_terminated_unwinds(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, served: Served
) -> None:
    unwound: list[str] = []

    def terminated(name: str) -> Path:
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
        try:
            signal.raise_signal(signal.SIGTERM)
            raise AssertionError("unreachable")
        finally:
            unwound.append(name)

    monkeypatch.setattr(hub, "pull", terminated)
    monkeypatch.setattr(hub, "resolve", terminated)
    assert cli.main(["pull", "m"]) == 143
    assert cli.main(["serve", "n", "--device", "cpu"]) == 143
    assert unwound == ["m", "n"]
    assert served.count == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_a_server_gracefully(number: signal.Signals) -> None:
    command = [sys.executable, "-m", "realtime_serve", "serve", "null", "--host", "127.0.0.1", "--port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("Ctrl-C"):
                break
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    assert lines[0].startswith("realtime-serve listens on http://localhost:")
    assert (process.returncode, out, err) == (0, "", "")


# pull, models, bench


def test_pull_prints_where_the_model_lies(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "pull", lambda name: Path("/cache") / name)
    assert cli.main(["pull", "m"]) == 0
    assert capsys.readouterr() == ("/cache/m\n", "")


def test_models_are_listed(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REALTIME_SERVE_CACHE", str(tmp_path))
    (known,) = (model for model in hub.known_models() if model.name == DEFAULT_MODEL)
    for cached in ("no", "yes"):
        assert cli.main(["models"]) == 0
        head, *rows = capsys.readouterr().out.splitlines()
        assert head.split() == ["NAME", "SIZE", "LICENCE", "CACHED", "DESCRIPTION"]
        assert len(rows) == len(hub.known_models())
        (row,) = (row for row in rows if row.startswith(DEFAULT_MODEL))
        assert row.split()[:5] == [DEFAULT_MODEL, "98", "MB", "Apache-2.0", cached]
        with open(known.path, "wb") as file:
            file.truncate(known.size)


@pytest.mark.parametrize(("command", "unbuffered"), [("models", ""), ("models", "1"), ("--help", "")])
def test_a_reader_that_leaves_early(command: str, unbuffered: str) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    done = run_program(command, capture_output=False, stdout=write_end, stderr=subprocess.PIPE, env=environment)
    os.close(write_end)
    assert (done.returncode, done.stderr) == (141, "")


def test_output_that_cannot_be_written() -> None:
    with open("/dev/full", "w") as full:
        done = run_program("models", capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert done.returncode == 1
    assert done.stderr.startswith("realtime-serve: ")
    assert done.stderr.count("\n") == 1


def test_the_module_is_the_program() -> None:
    done = run_program("serve", "--port", "http")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "realtime-serve: port must be an integer; it is 'http' (from the command line)\n"


@pytest.mark.parametrize("failed", [0, 1])
def test_bench(failed: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[loadtest.Load] = []

    async def run_load(load: loadtest.Load) -> loadtest.Measured:
        loads.append(load)
        measured = loadtest.Measured(1.0, 10, 1, [0.001], [0.002] * 9)
        measured.errors.update(["503 no"] * failed)
        return measured

    monkeypatch.setattr(loadtest, "run_load", run_load)
    arguments = ["--url", "http://x", "--model", "m", "-c", "2", "-n", "3", "--max-tokens", "4", "--prompt", "p"]
    assert cli.main(["bench", *arguments]) == failed
    assert loads == [loadtest.Load("http://x", "m", 2, 3, 4, "p")]
    out, err = capsys.readouterr()
    assert out.count("\n") == 1
    figures = json.loads(out)
    assert (figures["tokens_per_s"], figures["errors"], figures["itl_ms"]["p99"]) == (10.0, failed, 2.0)
    assert "tokens/s        10.0\n" in err
    assert ("503 no" in err) == bool(failed)


def test_bench_asks_for_what_it_does_unless_told(monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[loadtest.Load] = []

    async def run_load(load: loadtest.Load) -> loadtest.Measured:
        loads.append(load)
        return loadtest.Measured()

    monkeypatch.setattr(loadtest, "run_load", run_load)
    assert cli.main(["bench"]) == 0
    assert loads == [loadtest.Load()]
