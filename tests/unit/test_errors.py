"""Errors: what HTTP, metrics and a caller need of each."""

import json
from typing import Any

import pytest

from realtime_serve import errors
from realtime_serve.errors import (
    ConfigError,
    InvalidRequestError,
    ModelFailedError,
    ModelLoadError,
    ModelNotFoundError,
    ModelUnavailableError,
    PayloadTooLargeError,
    PromptTooLongError,
    PullError,
    QueueFullError,
    RateLimitedError,
    RequestTimeoutError,
    ServeError,
    ShuttingDownError,
    TokenTimeoutError,
    TooManyConnectionsError,
    UnsupportedMediaTypeError,
    UnsupportedModelError,
    WorkerDiedError,
    bounded_retry_after,
    did_you_mean,
    stream_error,
)

# class: status, type, metric label, code, param, retry_after
EXPECTED: dict[type[ServeError], tuple[int, str, str, str, str | None, float | None]] = {
    ServeError: (500, "internal_error", "internal", "internal_error", None, None),
    InvalidRequestError: (400, "invalid_request_error", "invalid_request", "invalid_value", None, None),
    PromptTooLongError: (400, "invalid_request_error", "invalid_request", "context_length_exceeded", "prompt", None),
    PayloadTooLargeError: (413, "invalid_request_error", "too_large", "body_too_large", None, None),
    UnsupportedMediaTypeError: (
        415, "invalid_request_error", "invalid_request", "unsupported_media_type", "Content-Type", None
    ),
    ModelNotFoundError: (404, "not_found_error", "not_found", "model_not_found", "model", None),
    RequestTimeoutError: (408, "timeout_error", "request_timeout", "request_timeout", None, None),
    TokenTimeoutError: (504, "timeout_error", "timeout", "timeout", None, None),
    QueueFullError: (429, "overloaded_error", "overloaded", "queue_full", None, 1.0),
    RateLimitedError: (429, "rate_limit_error", "rate_limited", "rate_limited", None, 1.0),
    TooManyConnectionsError: (
        503, "service_unavailable_error", "too_many_connections", "too_many_connections", None, 1.0
    ),
    ShuttingDownError: (503, "service_unavailable_error", "shutting_down", "shutting_down", None, 1.0),
    ModelUnavailableError: (503, "service_unavailable_error", "unavailable", "model_unavailable", None, 1.0),
    WorkerDiedError: (500, "internal_error", "worker_died", "worker_died", None, None),
    ModelFailedError: (500, "internal_error", "model_failed", "model_failed", None, None),
    ConfigError: (400, "invalid_request_error", "config", "invalid_config", None, None),
    PullError: (503, "service_unavailable_error", "load_failed", "model_pull_failed", "model", 60.0),
    ModelLoadError: (500, "internal_error", "load_failed", "model_load_failed", "model", None),
    UnsupportedModelError: (400, "invalid_request_error", "load_failed", "model_unsupported", "model", None),
}  # fmt: skip
TYPE_STATUSES = {
    "invalid_request_error": {400, 413, 415},
    "not_found_error": {404},
    "timeout_error": {408, 504},
    "overloaded_error": {429},
    "rate_limit_error": {429},
    "service_unavailable_error": {503},
    "internal_error": {500},
}


def test_every_error_is_in_the_table() -> None:
    defined = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, ServeError)}
    assert defined == set(EXPECTED)


@pytest.mark.parametrize("kind", EXPECTED)
def test_what_an_error_carries(kind: type[ServeError]) -> None:
    error = kind("what was wrong")
    got = (error.status, error.type, error.label, error.code, error.param, error.retry_after)
    assert got == EXPECTED[kind]
    assert error.status in TYPE_STATUSES[error.type]
    assert str(error) == "what was wrong"
    assert json.loads(json.dumps(error.to_dict())) == {
        "error": {"message": "what was wrong", "type": error.type, "param": error.param, "code": error.code}
    }


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [(InvalidRequestError, ValueError), (PromptTooLongError, ValueError), (ConfigError, ValueError),
     (ModelNotFoundError, LookupError), (ModelNotFoundError, ValueError), (PullError, RuntimeError),
     (ModelLoadError, RuntimeError), (UnsupportedModelError, ValueError)],
)  # fmt: skip
def test_errors_are_what_callers_catch(kind: type[ServeError], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


def test_what_an_error_is_given() -> None:
    error = InvalidRequestError("m", "top_p", "unknown_field")
    assert (error.param, error.code) == ("top_p", "unknown_field")
    assert ConfigError("m", "port").field == ConfigError("m", field="port").param == "port"
    assert ConfigError("m").field is None
    assert QueueFullError("m", 2.5).retry_after == 2.5
    assert ModelUnavailableError("m", retry_after=31.0).retry_after == 31.0
    assert ModelFailedError("m", "invalid_logits").code == "invalid_logits"
    # One error's values are not the class's.
    assert (InvalidRequestError("m").param, QueueFullError("m").retry_after) == (None, 1.0)


@pytest.mark.parametrize(
    ("seconds", "told"), [(0.0, 1.0), (0.99, 1.0), (1.5, 1.5), (60.0, 60.0), (61.0, 60.0), (float("inf"), 60.0)]
)
def test_an_estimate_of_the_wait_is_bounded(seconds: float, told: float) -> None:
    assert bounded_retry_after(seconds) == told


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        ("invalid_logits", ModelFailedError),
        ("model_failed", ModelFailedError),
        ("worker_died", WorkerDiedError),
        ("invalid_request", InvalidRequestError),
        ("timeout", TokenTimeoutError),
    ],
)
def test_why_a_stream_failed(code: str, kind: type[ServeError]) -> None:
    error = stream_error(code)
    assert type(error) is kind
    assert error.code == code
    assert str(error)


@pytest.mark.parametrize("code", ["", "stop", "Timeout"])
def test_a_code_that_no_stream_has(code: str) -> None:
    with pytest.raises(ValueError, match="no stream ends with the error"):
        stream_error(code)


@pytest.mark.parametrize(
    ("name", "known", "says"),
    [
        ("prot", ["host", "port"], "; did you mean 'port'?"),
        ("max_token", {"max_tokens": 1}, "; did you mean 'max_tokens'?"),
        ("port", ["port"], "; did you mean 'port'?"),
        ("colour", ["host", "port"], ""),
        ("", ["port"], ""),
        ("port", [], ""),
        ("port" * 17, ["port" * 17], ""),
    ],
)
def test_did_you_mean(name: str, known: Any, says: str) -> None:
    assert did_you_mean(name, known) == says
