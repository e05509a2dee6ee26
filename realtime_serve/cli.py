"""The command line: `realtime-serve`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import MISSING, Field, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar, get_type_hints

from realtime_serve._version import __version__
from realtime_serve.config import DEFAULT_MODEL, ModelConfig, ServerConfig, load_server_config, option_name
from realtime_serve.errors import ConfigError, ServeError, did_you_mean
from realtime_serve.types import shown

if TYPE_CHECKING:
    import asyncio

log = logging.getLogger(__name__)

T = TypeVar("T")

_PROGRAM = "realtime-serve"
_FAILED, _WRONG, _INTERRUPTED, _NO_READER, _TERMINATED = 1, 2, 130, 141, 143
_MAX_COUNT = 10_000_000
_HELP_WIDTH = 80

_SERVE_NOTES = """\
Settings can also stand in a TOML file (--config, with the tables [server] and
[model]) and in the environment (REALTIME_SERVE_PORT=9000). Flags win over the
environment, and the environment over the file.
"""
_BENCH_NOTES = """\
One JSON line goes to standard output, a table to standard error. The status is
1 where a request had no complete answer. It measures up to about 100,000
tokens/s; beyond that, it measures itself.
"""


def main(argv: list[str] | None = None) -> int:
    """Runs a command line and returns its exit status.

    0: done; 2: wrong usage or configuration, or what was asked for cannot be, in one line on stderr; 1: it failed;
    130 and 143: ended by SIGINT or SIGTERM (a server that they end stops gracefully: 0); 141: nobody reads its output.
    """
    arguments = sys.argv[1:] if argv is None else argv
    try:
        try:
            return _run(arguments)
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except ServeError as error:
        return _complain(str(error), _WRONG)
    except SystemExit as done:  # --help, --version, SIGTERM
        return int(done.code or 0)
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return _NO_READER
    except OSError as error:
        _drop_output()
        return _complain(str(error), _FAILED)
    except Exception as error:
        log.debug("unexpected", exc_info=True)
        return _complain(f"internal error: {type(error).__name__}: {error}", _FAILED)


def _run(arguments: list[str]) -> int:
    parser = _build_parser()
    command = arguments[0] if arguments else None
    if command is None:
        parser.print_help()
        return 0
    if not command.startswith("-") and command not in _COMMANDS:
        raise ConfigError(f"unknown command {shown(command)}{did_you_mean(command, _COMMANDS)}")
    options = parser.parse_args(arguments)
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


def _complain(message: str, status: int) -> int:
    print(f"{_PROGRAM}: {' '.join(message.split())}", file=sys.stderr)
    return status


def _drop_output() -> None:
    """What is still buffered has no reader; the interpreter would complain of that at its exit."""
    with contextlib.suppress(OSError, ValueError):  # it may be closed, or no file
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


class _Parser(argparse.ArgumentParser):
    """Its errors are ConfigErrors: one line, without the usage."""

    def __init__(self, **options: Any) -> None:
        layout = partial(argparse.RawDescriptionHelpFormatter, width=_HELP_WIDTH, max_help_position=32)
        super().__init__(allow_abbrev=False, formatter_class=layout, **options)

    def error(self, message: str) -> NoReturn:
        raise ConfigError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Knows them all: what is left over is an error here, where the flags that there are can be named."""
        options, unknown = super().parse_known_args(args, namespace)
        if unknown:
            flag = unknown[0].partition("=")[0]
            if not flag.startswith("-"):
                self.error(f"unexpected argument {shown(unknown[0])}")
            self.error(f"unknown option {shown(flag)}{did_you_mean(flag, self._option_string_actions)}")
        return options, []


def _build_parser() -> _Parser:
    parser = _Parser(prog=_PROGRAM, description="A low-latency streaming inference server for AI models.")
    parser.add_argument("--version", action="version", version=f"{_PROGRAM} {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", parser_class=_Parser)
    for name, (summary, add_arguments, run) in _COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        command = commands.add_parser(name, help=summary, description=description)
        add_arguments(command)
        command.set_defaults(run=run)
    return parser


# serve


def _add_serve_arguments(parser: _Parser) -> None:
    parser.usage = "%(prog)s [MODEL] [options]"
    parser.epilog = _SERVE_NOTES
    parser.add_argument(
        "MODEL",
        nargs="?",
        default=argparse.SUPPRESS,
        help=f"a name of `{_PROGRAM} models`, a GGUF file, a Hugging Face folder, or null: a model that costs nothing"
        f" (default: {DEFAULT_MODEL})",
    )
    parser.add_argument("--config", metavar="FILE", type=Path, help="TOML file with settings")
    groups = {title: parser.add_argument_group(title) for title in ("server", "model", "limits")}
    for owner in (ServerConfig, ModelConfig):
        for setting in fields(owner):
            if setting.name != "metadata":
                _add_setting(groups[_group_of(owner, setting)], owner, setting)
    groups["model"].add_argument(
        "--model-option",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        type=_model_option,
        help="an option of the model's own, as step_ms=5 of null; may be repeated",
    )


def _group_of(owner: type, setting: Field[Any]) -> str:
    if owner is ModelConfig:
        return "model"
    return "limits" if get_type_hints(owner)[setting.name] in (int, float) and setting.name != "port" else "server"


def _add_setting(group: argparse._ArgumentGroup, owner: type, setting: Field[Any]) -> None:
    """The flag of a field. Its value stays text: load_server_config converts and checks it."""
    flag = f"--{option_name(setting).replace('_', '-')}"
    text = (setting.metadata["help"] + _default_of(setting)).replace("%", "%%")
    kind = get_type_hints(owner)[setting.name]
    if kind is bool:
        group.add_argument(
            flag, dest=setting.name, action=argparse.BooleanOptionalAction, default=argparse.SUPPRESS, help=text
        )
        return
    choices = setting.metadata.get("choices")
    if choices is not None:
        metavar = "{" + ",".join(c if isinstance(c, str) else str(c).lower() for c in choices) + "}"
    else:
        metavar = "N" if kind in (int, float) else setting.name.rpartition("_")[2].upper()
    group.add_argument(flag, dest=setting.name, metavar=metavar, default=argparse.SUPPRESS, help=text)


def _default_of(setting: Field[Any]) -> str:
    if setting.name == "device":
        return " (default: cuda where there is one and torch for it, else cpu)"
    default = setting.default
    if default is MISSING or default in (None, "", ()):
        return ""
    if isinstance(default, bool):
        return f" (default: {'yes' if default else 'no'})"
    return f" (default: {default:g})" if isinstance(default, float) else f" (default: {default})"


def _model_option(text: str) -> tuple[str, object]:
    """KEY=VALUE; a value that is a JSON number, string, true, false or null is that, and any other is text."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise argparse.ArgumentTypeError(f"must be KEY=VALUE; it is {shown(text)}")
    try:
        parsed = json.loads(value, parse_constant=lambda _: value)
    except (ValueError, RecursionError):
        return key, value
    is_scalar = not isinstance(parsed, list | dict) and not (isinstance(parsed, float) and math.isinf(parsed))
    return key, parsed if is_scalar else value


def _serve(options: argparse.Namespace) -> int:
    given = vars(options)
    flags = {s.name: given[s.name] for owner in (ServerConfig, ModelConfig) for s in fields(owner) if s.name in given}
    if "MODEL" in given:
        if "model_path" in flags:
            raise ConfigError("MODEL and --model-path say the same; give one of them", "model_path")
        flags["model_path"] = given["MODEL"]
    if options.model_option:
        flags["metadata"] = dict(options.model_option)
    server, model = load_server_config(options.config, os.environ, flags)
    logging.basicConfig(
        level=server.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr
    )
    _log_requests_as_they_are()

    from realtime_serve.models import check_device, check_engine, resolve_model
    from realtime_serve.server import run_server

    check_device(model)
    check_engine(model)
    with _sigterm_unwinds():
        # A pull belongs here, where signals end it: begun by the server, it is a thread that the loop's end waits for.
        resolve_model(model)
    _run_loop(run_server(server, [model]))
    return 0


def _log_requests_as_they_are() -> None:
    """The request log is JSON, a line each, with nothing in front of it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(message)s"))
    requests = logging.getLogger("realtime_serve.requests")
    requests.addHandler(handler)
    requests.propagate = False


@contextlib.contextmanager
def _sigterm_unwinds() -> Iterator[None]:
    """SIGTERM meanwhile is an exception, as SIGINT is: a pull then leaves no child and no half of a file behind."""
    previous = signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _run_loop(main: Coroutine[Any, Any, T]) -> T:
    import asyncio  # 35 ms that --version and --help need not spend

    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        return runner.run(main)


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:
        log.warning("uvloop is not installed: asyncio's own event loop serves, more slowly")
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory


# pull, models


def _add_pull_arguments(parser: _Parser) -> None:
    parser.add_argument("MODEL", help=f"a name of `{_PROGRAM} models`")


def _pull(options: argparse.Namespace) -> int:
    from realtime_serve import hub

    with _sigterm_unwinds():
        path = hub.pull(options.MODEL)
    print(path)
    return 0


def _models(_: argparse.Namespace) -> int:
    from realtime_serve import hub

    rows = [("NAME", "SIZE", "LICENCE", "CACHED", "DESCRIPTION")]
    rows += [
        (model.name, _size(model.size), model.licence, "yes" if model.is_cached else "no", model.description)
        for model in hub.known_models()
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0


def _size(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


# bench


def _add_bench_arguments(parser: _Parser) -> None:
    parser.epilog = _BENCH_NOTES
    parser.add_argument("--url", default="http://localhost:8000", help="the server (default: %(default)s)")
    parser.add_argument("--model", metavar="NAME", help="the model (default: the only one that is served)")
    counts = (("-c", "--concurrency", 8, "streams at a time"), ("-n", "--requests", 64, "streams in all"))
    for short, flag, default, text in counts:
        parser.add_argument(short, flag, metavar="N", type=_count, default=default, help=f"{text} (default: {default})")
    parser.add_argument(
        "--max-tokens", metavar="N", type=_count, default=128, help="tokens of a stream (default: %(default)s)"
    )
    parser.add_argument("--prompt", metavar="TEXT", default="Once upon a time", help="(default: %(default)s)")


def _count(text: str) -> int:
    try:
        count = int(text)
    except ValueError:
        count = 0
    if not 1 <= count <= _MAX_COUNT:
        raise argparse.ArgumentTypeError(f"must be an integer from 1 to {_MAX_COUNT}; it is {shown(text)}")
    return count


def _bench(options: argparse.Namespace) -> int:
    from realtime_serve import loadtest

    load = loadtest.Load(
        options.url, options.model, options.concurrency, options.requests, options.max_tokens, options.prompt
    )
    measured = _run_loop(loadtest.run_load(load))
    figures = loadtest.summary(load, measured)
    print(json.dumps(figures), flush=True)
    print(loadtest.table(figures, measured.errors), file=sys.stderr)
    return _FAILED if measured.errors else 0


_Command = tuple[str, Callable[[_Parser], None], Callable[[argparse.Namespace], int]]

_COMMANDS: dict[str, _Command] = {
    "serve": ("serve a model over HTTP", _add_serve_arguments, _serve),
    "pull": ("fetch a model ahead of time, and print where it lies", _add_pull_arguments, _pull),
    "models": ("list the models that are known by name", lambda parser: None, _models),
    "bench": ("measure a running server: tokens/s and latencies", _add_bench_arguments, _bench),
}
