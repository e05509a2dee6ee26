"""Every error that a caller can see, with its HTTP status, its type and its metric label."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

# When a client that was refused is asked back, in seconds, where that is an estimate: sooner would be a busy loop, and
# what is further off than a minute nobody can foresee.
_RETRY_WITHIN_S = (1.0, 60.0)

# Longer names than this are no typo; comparing them would cost time in proportion to their length.
_MAX_NAME_COMPARED = 64


class ServeError(Exception):
    """An error with an answer: one message for a person, and what a program needs to act on it."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "internal_error"
    label: ClassVar[str] = "internal"
    """What metrics count it under: one of a fixed set, whatever `code` says."""

    code: str = "internal_error"
    param: str | None = None
    """The field of the request or of the configuration that it is about."""
    retry_after: float | None = None
    """Seconds after which the same request may succeed."""

    def to_dict(self) -> dict[str, Any]:
        return {"error": {"message": str(self), "type": self.type, "param": self.param, "code": self.code}}


class InvalidRequestError(ServeError, ValueError):
    status = 400
    type = "invalid_request_error"
    label = "invalid_request"
    code = "invalid_value"

    def __init__(self, message: str, param: str | None = None, code: str = "invalid_value") -> None:
        super().__init__(message)
        self.param = param
        self.code = code


class PromptTooLongError(InvalidRequestError):
    def __init__(self, message: str) -> None:
        super().__init__(message, "prompt", "context_length_exceeded")


class PayloadTooLargeError(ServeError):
    status = 413
    type = "invalid_request_error"
    label = "too_large"
    code = "body_too_large"


class UnsupportedMediaTypeError(ServeError):
    status = 415
    type = "invalid_request_error"
    label = "invalid_request"
    code = "unsupported_media_type"

    def __init__(self, message: str, param: str = "Content-Type") -> None:
        super().__init__(message)
        self.param = param


class ModelNotFoundError(ServeError, LookupError, ValueError):
    status = 404
    type = "not_found_error"
    label = "not_found"
    code = "model_not_found"
    param = "model"


class RequestTimeoutError(ServeError):
    """The client did not send its request in time."""

    status = 408
    type = "timeout_error"
    label = "request_timeout"
    code = "request_timeout"


class TokenTimeoutError(ServeError):
    """The model gave no token in time."""

    status = 504
    type = "timeout_error"
    label = "timeout"
    code = "timeout"


class QueueFullError(ServeError):
    status = 429
    type = "overloaded_error"
    label = "overloaded"
    code = "queue_full"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class RateLimitedError(ServeError):
    """A client has made more requests than its rate allows."""

    status = 429
    type = "rate_limit_error"
    label = "rate_limited"
    code = "rate_limited"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class TooManyConnectionsError(ServeError):
    status = 503
    type = "service_unavailable_error"
    label = "too_many_connections"
    code = "too_many_connections"
    # Any client that leaves makes room, and none says when: soon, then, and the next refusal costs little.
    retry_after = _RETRY_WITHIN_S[0]


class ShuttingDownError(ServeError):
    """This process takes no more requests; whatever takes its place does."""

    status = 503
    type = "service_unavailable_error"
    label = "shutting_down"
    code = "shutting_down"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class ModelUnavailableError(ServeError):
    """The model is served here, and has no worker at the moment."""

    status = 503
    type = "service_unavailable_error"
    label = "unavailable"
    code = "model_unavailable"

    def __init__(self, message: str, retry_after: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class WorkerDiedError(ServeError):
    label = "worker_died"
    code = "worker_died"


class ModelFailedError(ServeError):
    label = "model_failed"
    code = "model_failed"

    def __init__(self, message: str, code: str = "model_failed") -> None:
        super().__init__(message)
        self.code = code


class ConfigError(ServeError, ValueError):
    """A setting that cannot be; `field` names it."""

    status = 400
    type = "invalid_request_error"
    label = "config"
    code = "invalid_config"

    def __init__(self, message: str, field: str | None = None) -> None:
        super().__init__(message)
        self.param = field

    @property
    def field(self) -> str | None:
        return self.param


class PullError(ServeError, RuntimeError):
    status = 503
    type = "service_unavailable_error"
    label = "load_failed"
    code = "model_pull_failed"
    param = "model"
    # What a host refuses or a network loses is seldom back sooner.
    retry_after = _RETRY_WITHIN_S[1]


class ModelLoadError(ServeError, RuntimeError):
    label = "load_failed"
    code = "model_load_failed"
    param = "model"


class UnsupportedModelError(ModelLoadError, ValueError):
    status = 400
    type = "invalid_request_error"
    code = "model_unsupported"


def bounded_retry_after(seconds: float) -> float:
    """An estimate of the wait as clients are told it: from 1 s to 60 s."""
    soonest, latest = _RETRY_WITHIN_S
    return min(max(seconds, soonest), latest)


def stream_error(code: str, detail: str = "") -> ServeError:
    """Why a stream failed, by the code that its worker gave and what it said more."""
    match code:
        case "invalid_logits":
            return ModelFailedError("the model computed logits that are not finite for this request", code)
        case "model_failed":
            return ModelFailedError(detail or "the model failed in a step that this request was part of", code)
        case "worker_died":
            return WorkerDiedError("the worker died while it served this request; the request can be sent again")
        case "invalid_request":
            # A worker's detail begins with the name of what was wrong.
            return InvalidRequestError(
                detail or "the worker refused this request as malformed", detail.partition(":")[0] or None, code
            )
        case "timeout":
            return TokenTimeoutError("the model gave no answer within the request's timeout, or no further token")
    raise ValueError(f"no stream ends with the error {code!r}")


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: the known name most like it, or nothing."""
    import difflib  # it takes 5 ms of a start that has mostly no use for it

    if len(name) > _MAX_NAME_COMPARED:
        return ""
    matches = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {matches[0]!r}?" if matches else ""
