"""Configuration: what each field takes, and how file, environment and flags add up."""

import math
from collections.abc import Callable, Mapping
from dataclasses import FrozenInstanceError, fields, replace
from pathlib import Path
from typing import Any

import pytest

from realtime_serve import config as config_module
from realtime_serve.config import (
    DEFAULT_MODEL,
    BatchConfig,
    ModelConfig,
    ServerConfig,
    load_server_config,
    option_name,
)
from realtime_serve.errors import ConfigError
from realtime_serve.types import RequestPriority

SERVER_DEFAULTS = {
    "host": "0.0.0.0",
    "port": 8000,
    "max_connections": 256,
    "request_timeout": 30.0,
    "max_batch_size": 32,
    "max_batch_wait_ms": 50,
    "enable_metrics": True,
    "log_level": "INFO",
    "rate_limit_per_minute": 10_000,
    "graceful_shutdown_timeout": 30.0,
    "max_queue": 1024,
    "ageing_ms": 5000,
    "stream_buffer_tokens": 100,
    "max_step_tokens": 512,
    "target_step_ms": 0.0,
    "isolation": "process",
    "max_body_bytes": 4 * 1024 * 1024,
    "slow_reader_timeout": 30.0,
    "client_priorities": (),
}
MODEL_DEFAULTS: dict[str, object] = {
    "version": "1.0.0",
    "model_path": "",
    "device": "cuda",
    "dtype": "float32",
    "quantized": None,
    "max_seq_length": 2048,
    "warmup_tokens": 100,
    "metadata": {},
}
BATCH_DEFAULTS = {"max_batch_size": 32, "max_wait_ms": 50, "min_batch_size": 1, "dynamic_batching": True}

# The least and the greatest value that each number may have.
BOUNDS: dict[type, dict[str, tuple[float, float]]] = {
    ServerConfig: {
        "port": (0, 65535),
        "max_connections": (1, 1_000_000),
        "request_timeout": (0.001, 86_400),
        "max_batch_size": (1, 65_536),
        "max_batch_wait_ms": (0, 2**31 - 1),
        "rate_limit_per_minute": (0, 2**31 - 1),
        "graceful_shutdown_timeout": (0, 86_400),
        "max_queue": (1, 65_536),
        "ageing_ms": (1, 2**31 - 1),
        "stream_buffer_tokens": (1, 65_536),
        "max_step_tokens": (1, 1 << 20),
        "target_step_ms": (0, 60_000),
        "max_body_bytes": (1024, 1 << 30),
        "slow_reader_timeout": (0.001, 86_400),
    },
    ModelConfig: {"max_seq_length": (1, 1 << 24), "warmup_tokens": (0, 1 << 24)},
    BatchConfig: {"max_batch_size": (1, 2**31 - 1), "max_wait_ms": (0, 2**31 - 1), "min_batch_size": (1, 2**31 - 1)},
}
BOUNDED = [(kind, name, *bounds) for kind, table in BOUNDS.items() for name, bounds in table.items()]
FLOATS = ("request_timeout", "graceful_shutdown_timeout", "slow_reader_timeout", "target_step_ms")

NOT_NUMBERS: tuple[object, ...] = ("1", None, True, False, [1], math.nan, math.inf, -math.inf)
NOT_TEXT: tuple[object, ...] = (None, 1, b"text", ["text"], "\ud800")
NOT_FLAGS: tuple[object, ...] = (1, 0, "true", None)
WRONG_TYPES: dict[type, dict[str, tuple[object, ...]]] = {
    ServerConfig: {
        "host": (*NOT_TEXT, ""),
        "enable_metrics": NOT_FLAGS,
        "log_level": (*NOT_TEXT, "", "LOUD", 20),
        "isolation": (*NOT_TEXT, "", "fork", "Process"),
        "client_priorities": (
            None,
            1,
            "a=LOW",
            ["a=LOW"],
            ("a",),
            (("a", "LOW", 1),),
            (("a", "low"),),
            (("a", "LOW"), ("a", "HIGH")),
            {"a": "URGENT"},
            {"a": ""},
            {"a": 2},
            {"a": None},
            {"a": ["LOW"]},
            {"": "LOW"},
            {1: "LOW"},
            {"x" * 257: "LOW"},
            {"\ud800": "LOW"},
            {"b": "LOW", 1: "HIGH"},
        ),
    },
    ModelConfig: {
        "name": (*NOT_TEXT, ""),
        "version": (*NOT_TEXT, ""),
        "model_path": NOT_TEXT,
        "device": (*NOT_TEXT, "", "gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:12345", "CPU", "cpu\n", "cuda:١", "xcpu"),
        "dtype": (*NOT_TEXT, "", "int8", "fp16"),
        "quantized": ("", "int2", 1, 0, 1.0, [], "\ud800"),
        "metadata": (None, [], "a=1", {1: 2}),
    },
    BatchConfig: {"dynamic_batching": NOT_FLAGS},
}
WRONG = [
    (kind, name, value) for kind, table in WRONG_TYPES.items() for name, values in table.items() for value in values
]


def make(kind: type, **values: object) -> Any:
    return kind(**({"name": "m"} if kind is ModelConfig else {}) | values)


def refused(make_it: Callable[[], object]) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        make_it()
    message = str(caught.value)
    assert isinstance(caught.value, ValueError)
    assert "\n" not in message
    assert len(message) < 300
    return caught.value


def load(
    file: Path | None = None, environ: Mapping[str, str] | None = None, flags: Mapping[str, object] | None = None
) -> tuple[ServerConfig, ModelConfig]:
    return load_server_config(file, environ or {}, flags or {})


@pytest.fixture
def toml(tmp_path: Path) -> Callable[[str], Path]:
    def write(text: str) -> Path:
        path = tmp_path / "serve.toml"
        path.write_text(text)
        return path

    return write


# One field at a time


@pytest.mark.parametrize(
    ("kind", "defaults"),
    [(ServerConfig, SERVER_DEFAULTS), (ModelConfig, MODEL_DEFAULTS | {"name": "m"}), (BatchConfig, BATCH_DEFAULTS)],
)
def test_defaults(kind: type, defaults: dict[str, object]) -> None:
    made = make(kind)
    assert {field.name: getattr(made, field.name) for field in fields(kind)} == defaults


def test_the_tables_here_cover_every_field() -> None:
    for kind in (ServerConfig, ModelConfig, BatchConfig):
        assert {field.name for field in fields(kind)} == BOUNDS[kind].keys() | WRONG_TYPES[kind].keys()


@pytest.mark.parametrize(("kind", "name", "low", "high"), BOUNDED)
def test_a_number_may_be_its_bounds(kind: type, name: str, low: float, high: float) -> None:
    others = {"max_batch_size": high} if name == "min_batch_size" else {}
    for value in (low, high):
        assert getattr(make(kind, **others | {name: value}), name) == value


@pytest.mark.parametrize(("kind", "name", "low", "high"), BOUNDED)
def test_a_number_beyond_its_bounds_is_refused(kind: type, name: str, low: float, high: float) -> None:
    beyond = 1e-6 if name in FLOATS else 1
    for value, says in ((low - beyond, "at least"), (high + max(beyond, 1), "at most"), (10**400, "at most")):
        error = refused(lambda value=value: make(kind, **{name: value}))  # type: ignore[misc]
        assert error.field == error.param == name
        assert str(error).startswith(f"{name} must be {says} ")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name, _, _ in BOUNDED])
def test_what_is_no_number_is_refused(kind: type, name: str) -> None:
    for value in NOT_NUMBERS if name in FLOATS else (*NOT_NUMBERS, 2000.0, 2000.5):
        error = refused(lambda value=value: make(kind, **{name: value}))  # type: ignore[misc]
        assert error.field == name
        assert str(error).startswith(f"{name} must be a")


@pytest.mark.parametrize(("kind", "name", "value"), WRONG)
def test_a_wrong_value_is_refused(kind: type, name: str, value: object) -> None:
    error = refused(lambda: make(kind, **{name: value}))
    assert error.field == name
    assert str(error).startswith(f"{name} must ")


@pytest.mark.parametrize(
    ("kind", "name", "values"),
    [
        (ServerConfig, "log_level", ("DEBUG", "WARNING", "ERROR", "CRITICAL")),
        (ServerConfig, "isolation", ("process", "thread")),
        (ServerConfig, "request_timeout", (1, 0.5)),
        (ModelConfig, "device", ("cpu", "mps", "cuda", "cuda:0", "cuda:1234")),
        (ModelConfig, "dtype", ("float32", "float16", "bfloat16")),
        (ModelConfig, "quantized", (None, False, True, "int8", "int4")),
        (ModelConfig, "name", ("gpt2", "modèle", "a b")),
        (ModelConfig, "metadata", ({}, {"step_ms": 5})),
    ],
)
def test_values_that_are_taken(kind: type, name: str, values: tuple[object, ...]) -> None:
    for value in values:
        kept = getattr(make(kind, **{name: value}), name)
        assert (type(kept), kept) == (type(value), value)


@pytest.mark.parametrize(
    "given",
    [
        {"vip": "HIGH", "batch": "LOW"},
        {"vip": "high", "batch": "Low"},
        {"vip": RequestPriority.HIGH, "batch": RequestPriority.LOW},
        (("batch", "LOW"), ("vip", "HIGH")),
    ],
)
def test_clients_priorities_are_kept_as_what_cannot_change(given: object) -> None:
    config = ServerConfig(client_priorities=given)  # type: ignore[arg-type]
    assert config.client_priorities == (("batch", "LOW"), ("vip", "HIGH"))
    assert "client_priorities=(('batch', 'LOW'), ('vip', 'HIGH'))" in repr(config)
    assert replace(config) == config
    assert hash(replace(config)) == hash(config)


def test_a_log_level_may_be_written_small() -> None:
    assert ServerConfig(log_level="warning").log_level == "WARNING"


def test_a_batch_cannot_wait_for_more_than_it_may_hold() -> None:
    assert BatchConfig(max_batch_size=4, min_batch_size=4).min_batch_size == 4
    error = refused(lambda: BatchConfig(max_batch_size=4, min_batch_size=5))
    assert error.field == "min_batch_size"


@pytest.mark.parametrize("config", [ServerConfig(), ModelConfig("m"), BatchConfig()])
def test_configurations_are_frozen(config: ServerConfig | ModelConfig | BatchConfig) -> None:
    for field in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, getattr(config, field.name))


def test_two_models_do_not_share_their_options() -> None:
    assert ModelConfig("a").metadata is not ModelConfig("b").metadata


def test_fields_have_distinct_names_outside_and_something_to_say() -> None:
    settings = [*fields(ServerConfig), *(field for field in fields(ModelConfig) if field.name != "metadata")]
    names = [option_name(field) for field in settings]
    assert len(set(names)) == len(names)
    assert len({field.name for field in settings}) == len(settings)
    assert all(field.metadata["help"] for field in settings)


# Files, environment, flags


def test_nothing_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config_module, "default_device", lambda: "mps")
    server, model = load()
    assert server == ServerConfig()
    assert model == ModelConfig(DEFAULT_MODEL, model_path=DEFAULT_MODEL, device="mps")


def test_each_layer_wins_over_the_one_before(toml: Callable[[str], Path]) -> None:
    file = toml("[server]\nport = 1\nmax_queue = 1\nageing_ms = 1\n[model]\nname = 'file'\nversion = 'file'\n")
    environ = {
        "REALTIME_SERVE_PORT": "2",
        "REALTIME_SERVE_MAX_QUEUE": "2",
        "REALTIME_SERVE_MODEL_VERSION": "environment",
        "PATH": "/bin",
    }
    server, model = load(file, environ, {"port": "3", "name": "flag"})
    assert (server.port, server.max_queue, server.ageing_ms) == (3, 2, 1)
    assert (model.name, model.version) == ("flag", "environment")


def test_a_file_has_every_field(toml: Callable[[str], Path]) -> None:
    file = toml(
        """
        [server]
        host = "::1"
        port = 0
        max_connections = 1
        request_timeout = 1
        max_batch_size = 2
        max_batch_wait_ms = 3
        enable_metrics = false
        log_level = "debug"
        rate_limit_per_minute = 4
        graceful_shutdown_timeout = 0.5
        max_queue = 5
        ageing_ms = 6
        stream_buffer_tokens = 7
        max_step_tokens = 8
        target_step_ms = 12.5
        isolation = "thread"
        max_body_bytes = 2048
        slow_reader_timeout = 1.5
        client_priorities = {vip = "HIGH", "batch jobs, nightly" = "low"}
        [model]
        name = "n"
        version = "2"
        model_path = "m.gguf"
        device = "cpu"
        dtype = "bfloat16"
        quantized = "int4"
        max_seq_length = 9
        warmup_tokens = 0
        [model.metadata]
        step_ms = 5
        deep = { list = [1, 2] }
        """
    )
    server, model = load(file)
    assert server == ServerConfig(
        "::1", 0, 1, 1, 2, 3, False, "DEBUG", 4, 0.5, 5, 6, 7, 8, "thread", 2048, 1.5,
        {"vip": "HIGH", "batch jobs, nightly": "LOW"}, 12.5,
    )  # fmt: skip
    assert model == ModelConfig(
        "n", "2", "m.gguf", "cpu", "bfloat16", "int4", 9, 0, {"step_ms": 5, "deep": {"list": [1, 2]}}
    )


def test_model_options_add_up(toml: Callable[[str], Path]) -> None:
    file = toml("[model.metadata]\na = 1\nb = 1\n")
    assert load(file, {}, {"metadata": {"b": 2, "c": 2}})[1].metadata == {"a": 1, "b": 2, "c": 2}


def test_clients_priorities_add_up(toml: Callable[[str], Path]) -> None:
    file = toml("[server]\nclient_priorities = {a = 'LOW', b = 'LOW'}\n")
    server, _ = load(file, {"REALTIME_SERVE_CLIENT_PRIORITIES": "b=NORMAL,c=NORMAL"}, {"client_priorities": "c=HIGH"})
    assert dict(server.client_priorities) == {"a": "LOW", "b": "NORMAL", "c": "HIGH"}


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("null", "null"),
        ("models/tiny.gguf", "tiny"),
        ("/models/gpt2/", "gpt2"),
        ("gpt2", "gpt2"),
        ("a.gguf.gguf", "a.gguf"),
    ],
)
def test_a_model_is_named_after_its_path(path: str, name: str) -> None:
    assert load(flags={"model_path": path})[1].name == name


def test_a_name_alone_is_looked_up() -> None:
    model = load(flags={"name": "alias"})[1]
    assert (model.name, model.model_path) == ("alias", "")


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("port", "9000", 9000),
        ("port", " 9000 ", 9000),
        ("request_timeout", "0.25", 0.25),
        ("request_timeout", "1e1", 10.0),
        *[("enable_metrics", text, True) for text in ("true", "yes", "on", "1", "TRUE", " On ")],
        *[("enable_metrics", text, False) for text in ("false", "no", "off", "0", "False")],
        ("log_level", "error", "ERROR"),
        ("host", " ", " "),
        ("quantized", "none", None),
        ("quantized", "None", None),
        ("quantized", "false", False),
        ("quantized", "true", True),
        ("quantized", "INT8", "int8"),
        ("version", "1", "1"),
        ("name", "true", "true"),
        ("max_seq_length", "1", 1),
        ("client_priorities", "", ()),
        ("client_priorities", " a = low , ", (("a", "LOW"),)),
        ("client_priorities", "k=v=HIGH,::1=LOW,é=NORMAL", (("::1", "LOW"), ("k=v", "HIGH"), ("é", "NORMAL"))),
    ],
)
def test_text_becomes_what_the_field_holds(name: str, text: str, value: object) -> None:
    owner = ServerConfig if name in SERVER_DEFAULTS else ModelConfig
    (field,) = (field for field in fields(owner) if field.name == name)
    for environ, flags in (({f"REALTIME_SERVE_{option_name(field).upper()}": text}, {}), ({}, {name: text})):
        configs = load(environ=environ, flags=flags)
        given = getattr(configs[owner is ModelConfig], name)
        assert (type(given), given) == (type(value), value)


BAD_TEXT: list[Any] = [
    ("port", "http"),
    ("port", ""),
    ("port", "80.5"),
    ("port", "65536"),
    pytest.param("port", "9" * 10_000, id="port-long"),
    ("request_timeout", "soon"),
    ("request_timeout", "nan"),
    ("request_timeout", "inf"),
    ("request_timeout", "1e999"),
    ("enable_metrics", "2"),
    ("enable_metrics", ""),
    ("enable_metrics", "none"),
    ("log_level", "loud"),
    ("host", ""),
    ("host", "\udcff"),
    ("quantized", "int2"),
    ("device", "gpu"),
    ("version", ""),
    ("client_priorities", "a"),
    ("client_priorities", "a=LOW,b"),
    ("client_priorities", "a=LOW,a=LOW"),
    ("client_priorities", "a="),
    ("client_priorities", "=LOW"),
    ("client_priorities", "a=URGENT"),
    ("client_priorities", "\udcff=LOW"),
]


@pytest.mark.parametrize(("name", "text"), BAD_TEXT)
def test_bad_text_is_refused_naming_where_it_stood(name: str, text: str) -> None:
    variable = "REALTIME_SERVE_" + ("model_version" if name == "version" else name).upper()
    error = refused(lambda: load(environ={variable: text}))
    assert error.field == name
    assert str(error).startswith(f"{name} must ")
    assert str(error).endswith(f"(from {variable})")
    error = refused(lambda: load(flags={name: text}))
    assert error.field == name
    assert str(error).endswith("(from the command line)")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("port = '80'", "port"),
        ("port = 80.0", "port"),
        ("port = true", "port"),
        (f"port = {10**300}", "port"),
        ("request_timeout = nan", "request_timeout"),
        ("request_timeout = inf", "request_timeout"),
        ("enable_metrics = 1", "enable_metrics"),
        ("host = 1979-05-27", "host"),
        ("log_level = ['INFO']", "log_level"),
        ("client_priorities = ['a=LOW']", "client_priorities"),
        ("client_priorities = {a = 1}", "client_priorities"),
        ("client_priorities = {a = 'URGENT'}", "client_priorities"),
    ],
)
def test_a_bad_value_in_a_file_is_refused_naming_the_file(toml: Callable[[str], Path], line: str, name: str) -> None:
    file = toml(f"[server]\n{line}\n")
    error = refused(lambda: load(file))
    assert error.field == name
    assert str(error).startswith(f"{name} must ")
    assert str(error).endswith(f"(from [server] of {file})")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[server]\nprot = 1", "unknown key 'prot' in [server]; did you mean 'port'?"),
        ("[server]\nname = 'x'", "unknown key 'name' in [server]"),
        ("[model]\nversoin = '1'", "unknown key 'versoin' in [model]; did you mean 'version'?"),
        ("[sever]\nport = 1", "unknown key 'sever'; did you mean 'server'?"),
        ("port = 1", "unknown key 'port'"),
        ("server = 1", "server must be a table"),
        ("[[server]]\nport = 1", "server must be a table"),
        ("[server]\nport = ", "is not valid TOML: "),
        ("[server]\nport = 1\nport = 2", "is not valid TOML: "),
        pytest.param("x = " + "[" * 100_000, "is nested too deeply", id="deep"),
        ("[model.metadata]\nday = 1979-05-27", "dates and times of [model.metadata] must be strings"),
        ("[model]\nmetadata = [1]", "metadata must be a dict with string keys"),
    ],
)
def test_a_file_that_is_wrong(toml: Callable[[str], Path], text: str, says: str) -> None:
    file = toml(text)
    error = refused(lambda: load(file))
    assert str(file) in str(error)
    assert says in str(error)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    assert str(refused(lambda: load(tmp_path / "none.toml"))).endswith(
        "none.toml cannot be read: No such file or directory"
    )
    assert str(refused(lambda: load(tmp_path))).endswith("cannot be read: Is a directory")
    latin = tmp_path / "latin.toml"
    latin.write_bytes(b"[server]\nhost = '\xe9'\n")
    assert "latin.toml is not valid TOML: " in str(refused(lambda: load(latin)))


@pytest.mark.parametrize(
    ("variable", "says"),
    [
        ("REALTIME_SERVE_PROT", "did you mean 'REALTIME_SERVE_PORT'?"),
        ("REALTIME_SERVE_VERSION", "did you mean"),
        ("REALTIME_SERVE_METADATA", "unknown variable REALTIME_SERVE_METADATA"),
        ("REALTIME_SERVE_", "unknown variable"),
        ("REALTIME_SERVE_" + "X" * 100, "unknown variable"),
    ],
)
def test_an_unknown_variable(variable: str, says: str) -> None:
    error = refused(lambda: load(environ={variable: "1"}))
    assert says in str(error)
    assert variable in str(error)


def test_variables_that_are_not_settings_are_left_alone() -> None:
    assert load(environ={"REALTIME_SERVE_CACHE": "/x", "REALTIME_SERVER_PORT": "1", "PORT": "1"})[0] == ServerConfig()


def test_what_kubernetes_injects_for_a_service_of_that_name_is_no_setting() -> None:
    environ = {
        "REALTIME_SERVE_SERVICE_HOST": "10.0.0.1",
        "REALTIME_SERVE_SERVICE_PORT": "8000",
        "REALTIME_SERVE_SERVICE_PORT_HTTP": "8000",
        "REALTIME_SERVE_PORT": "tcp://10.0.0.1:8000",
        "REALTIME_SERVE_PORT_8000_TCP": "tcp://10.0.0.1:8000",
        "REALTIME_SERVE_PORT_8000_TCP_ADDR": "10.0.0.1",
    }
    assert load(environ=environ)[0] == ServerConfig()
    assert load(environ={"REALTIME_SERVE_PORT": "9000"})[0].port == 9000
    assert "REALTIME_SERVE_PORT" in str(refused(lambda: load(environ={"REALTIME_SERVE_PORT": "tcp:9000"})))
