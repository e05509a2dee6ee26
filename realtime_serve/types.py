"""What a request is and what its answer is."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple

from realtime_serve.errors import InvalidRequestError, PromptTooLongError

if TYPE_CHECKING:
    from realtime_serve._core import PayloadKind

# The core counts tokens in 32 bits.
MAX_TOKEN_COUNT = 2**31 - 1
# A day without a token is no timeout any more.
MAX_SECONDS = 86_400.0
# The core's bounds of stop strings.
_MAX_STOP_STRINGS = 16
_MAX_STOP_BYTES = 256
# And of what a step does for one sequence.
_MAX_BIASED_TOKENS = 1024
_MAX_TOKEN_BIAS = 100
_MAX_STOP_TOKEN_IDS = 64
MAX_TOP_LOGPROBS = 20
MAX_ID_BYTES = 256
_SHOWN_CHARS = 60

_DECIMAL = re.compile(r"-?[0-9]{1,10}")

_INTEGERS = {
    "max_tokens": (1, MAX_TOKEN_COUNT),
    "top_k": (0, MAX_TOKEN_COUNT),
    "min_tokens": (0, MAX_TOKEN_COUNT),
    "top_logprobs": (0, MAX_TOP_LOGPROBS),
}
_NUMBERS: dict[str, tuple[float, float]] = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    # Logits are divided by it: much less would carry them out of float32.
    "repetition_penalty": (0.01, 10),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
}
_FLAGS = ("ignore_eos", "logprobs")


class RequestPriority(Enum):
    LOW = 0
    NORMAL = 1
    HIGH = 2


@dataclass(slots=True)
class InferenceRequest:
    """A validated request. Raises InvalidRequestError, a ValueError, which names the field that is wrong."""

    request_id: str
    model: str | None
    """None: the only model that is served."""
    prompt: str
    max_tokens: int = 100
    temperature: float = 1.0
    top_p: float = 0.95
    priority: RequestPriority = RequestPriority.NORMAL
    timeout: float = 30.0
    """Seconds without a token: in the queue, until the first and between two."""
    client_id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    """Up to 16 strings, or one; kept as a tuple."""
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    ignore_eos: bool = False
    logprobs: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of up to 1024 token ids, from -100 to 100; ids may be given as strings, as JSON has them."""
    min_tokens: int = 0
    """So many first tokens end nothing: neither can they be an end token, nor are stop strings looked for in them."""
    stop_token_ids: Sequence[int] = ()
    """Up to 64 token ids that end the answer, whatever `ignore_eos` says; kept as a tuple."""
    top_logprobs: int = 0
    """How many of the most likely tokens to tell with each one, up to 20; needs `logprobs`."""

    def __post_init__(self) -> None:
        _check_common(self)
        _refuse("prompt", text_problem(self.prompt))
        for name, (least, most) in _INTEGERS.items():
            value = getattr(self, name)
            if type(value) is not int or not least <= value <= most:
                _refuse(name, integer_problem(value, least, most))
        for name, (low, high) in _NUMBERS.items():
            value = getattr(self, name)
            if type(value) is not float or not low <= value <= high:  # 0.08 µs; naming the problem takes 0.26
                _refuse(name, number_problem(value, low, high))
        if self.seed is not None:
            _refuse("seed", integer_problem(self.seed, 0, 2**64 - 1))
        for name in _FLAGS:
            _refuse(name, flag_problem(getattr(self, name)))
        self.stop = _stop_strings(self.stop)
        self.logit_bias = _logit_bias(self.logit_bias)
        self.stop_token_ids = _stop_token_ids(self.stop_token_ids)
        if self.min_tokens > self.max_tokens:
            _refuse("min_tokens", f"must be at most max_tokens, {self.max_tokens}; it is {self.min_tokens}")
        if self.top_logprobs and not self.logprobs:
            _refuse("top_logprobs", f"needs logprobs to be true; it is {self.top_logprobs}")


@dataclass(slots=True)
class PredictRequest:
    """Inputs for a model that predicts. Raises InvalidRequestError, a ValueError, which names the field that is wrong.

    An input is anything that JSON can say, bytes, or a NumPy array; each may be batched with other requests' inputs.
    """

    request_id: str
    model: str | None
    """None: the only model that is served."""
    inputs: Sequence[Any]
    priority: RequestPriority = RequestPriority.NORMAL
    timeout: float = 30.0
    """Seconds without an output."""
    client_id: str = ""
    metadata: dict[str, Any] = field(default_factory=dict)
    _: KW_ONLY
    output_kind: PayloadKind | None = None
    """The form that outputs have to have; None: what fits them."""

    def __post_init__(self) -> None:
        _check_common(self)
        if not isinstance(self.inputs, list | tuple) or not self.inputs:
            _refuse("inputs", f"must be a list of at least one input; it is {shown(self.inputs)}")


@dataclass(slots=True)
class PredictResponse:
    request_id: str
    model: str
    outputs: list[Any]
    """In the order of the inputs."""
    latency_ms: float
    version: str
    timings: Timings


Request = InferenceRequest | PredictRequest
"""What goes through the middleware."""


class TopLogprob(NamedTuple):
    """One of the most likely tokens of a position."""

    token: str
    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True)
class StreamToken:
    token: str
    token_id: int
    logprob: float | None = None
    is_special: bool = False
    top_logprobs: tuple[TopLogprob, ...] | None = None
    """The best first; None where none were asked for, or the model has none to tell."""


@dataclass(frozen=True, slots=True)
class Usage:
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Those of the prompt whose keys and values were in the cache already."""

    @property
    def total_tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, slots=True)
class Timings:
    """Where the time went, in milliseconds."""

    queue_ms: float = 0.0
    prefill_ms: float = 0.0
    decode_ms: float = 0.0
    stalled_ms: float = 0.0
    """The part of decode in which the reader had no room."""


@dataclass(slots=True)
class InferenceResponse:
    request_id: str
    model: str
    tokens: list[StreamToken]
    total_tokens: int
    latency_ms: float
    error: str | None = None
    finish_reason: str | None = None
    version: str = ""
    usage: Usage = Usage()
    timings: Timings = Timings()


@dataclass(frozen=True, slots=True)
class Outcome:
    """How a request was answered: what middleware sees once the last token has gone to its reader."""

    model: str
    version: str
    finish_reason: str | None
    usage: Usage
    timings: Timings


def _check_common(request: InferenceRequest | PredictRequest) -> None:
    """Checks what every request has."""
    _refuse("request_id", text_problem(request.request_id, MAX_ID_BYTES))
    if request.model is not None:
        _refuse("model", text_problem(request.model, MAX_ID_BYTES))
    if request.client_id != "":
        _refuse("client_id", text_problem(request.client_id, MAX_ID_BYTES))
    _refuse("timeout", number_problem(request.timeout, 0.001, MAX_SECONDS))
    if not isinstance(request.priority, RequestPriority):
        _refuse("priority", f"must be a RequestPriority; it is {shown(request.priority)}")
    if not isinstance(request.metadata, dict):
        _refuse("metadata", f"must be a dict; it is {shown(request.metadata)}")


def check_context(prompt_tokens: int, max_tokens: int, max_context: int) -> None:
    """Raises PromptTooLongError or InvalidRequestError where a model's context cannot hold prompt and answer."""
    if prompt_tokens < 1:
        raise InvalidRequestError("prompt has no tokens", "prompt")
    room = max_context - prompt_tokens
    if room < 1:
        raise PromptTooLongError(
            f"prompt has {prompt_tokens} tokens; the model's context of {max_context} takes prompts of at most"
            f" {max_context - 1}"
        )
    if max_tokens > room:
        raise InvalidRequestError(
            f"max_tokens must be at most {room} here; it is {max_tokens}, and the prompt takes {prompt_tokens} of the"
            f" model's context of {max_context} tokens",
            "max_tokens",
        )


def check_token_ids(request: InferenceRequest, vocabulary: int) -> None:
    """Raises InvalidRequestError where the request names a token that a vocabulary of that size does not have."""
    for name, ids in (("logit_bias", request.logit_bias), ("stop_token_ids", request.stop_token_ids)):
        if ids and (largest := max(ids)) >= vocabulary:
            raise InvalidRequestError(
                f"{name} has token id {largest}; the model's vocabulary ends with {vocabulary - 1}", name
            )


def check_max_tokens(max_tokens: int, max_context: int) -> None:
    """The same for a model whose prompts are not counted in tokens."""
    if max_tokens > max_context:
        raise InvalidRequestError(
            f"max_tokens must be at most {max_context} here, the model's max_seq_length; it is {max_tokens}",
            "max_tokens",
        )


def integer_problem(value: object, low: int, high: int) -> str | None:
    """What keeps a value from being an integer of that range; None where nothing does."""
    if not isinstance(value, int) or isinstance(value, bool):
        return f"must be an integer; it is {shown(value)}"
    return _range_problem(value, low, high)


def number_problem(value: object, low: float, high: float) -> str | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return f"must be a number; it is {shown(value)}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"must be a finite number; it is {value}"
    return _range_problem(value, low, high)


def flag_problem(value: object) -> str | None:
    return None if isinstance(value, bool) else f"must be true or false; it is {shown(value)}"


def text_problem(value: object, max_bytes: int | None = None) -> str | None:
    if not isinstance(value, str):
        return f"must be a string; it is {shown(value)}"
    if not value:
        return "must not be empty"
    try:
        size = len(value) if value.isascii() else len(value.encode())
    except UnicodeEncodeError as error:
        return f"must be text; character {error.start} is half of a surrogate pair"
    if max_bytes is not None and size > max_bytes:
        return f"must be at most {max_bytes} bytes long; it has {size}"
    return None


def shown(value: object) -> str:
    """A value as messages show it: bounded, whatever it is."""
    if isinstance(value, int) and value.bit_length() > _SHOWN_CHARS * 3:
        return f"an integer of {value.bit_length()} bits"
    if isinstance(value, str | bytes):
        value = value[: _SHOWN_CHARS + 1]
    elif isinstance(value, list | tuple | dict):
        return f"a {type(value).__name__}"
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARS else f"{text[:_SHOWN_CHARS]}…"


def _range_problem(value: float, low: float, high: float) -> str | None:
    if value < low:
        return f"must be at least {_bound(low)}; it is {shown(value)}"
    if value > high:
        return f"must be at most {_bound(high)}; it is {shown(value)}"
    return None


def _bound(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:g}"


def _stop_strings(value: object) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value
    if not isinstance(strings, list | tuple):
        raise InvalidRequestError(f"stop must be a string or a list of strings; it is {shown(value)}", "stop")
    if len(strings) > _MAX_STOP_STRINGS:
        raise InvalidRequestError(f"stop must be at most {_MAX_STOP_STRINGS} strings; it has {len(strings)}", "stop")
    for string in strings:
        problem = text_problem(string, _MAX_STOP_BYTES)
        if problem:
            raise InvalidRequestError(f"each string of stop {problem}", "stop")
    return tuple(strings)


def _logit_bias(value: object) -> dict[int, float]:
    if not isinstance(value, Mapping):
        raise InvalidRequestError(
            f"logit_bias must be an object of token ids with their biases; it is {shown(value)}", "logit_bias"
        )
    if len(value) > _MAX_BIASED_TOKENS:
        raise InvalidRequestError(
            f"logit_bias must be at most {_MAX_BIASED_TOKENS} token ids; it has {len(value)}", "logit_bias"
        )
    biases: dict[int, float] = {}
    for key, bias in value.items():
        token = int(key) if isinstance(key, str) and _DECIMAL.fullmatch(key) else key
        if problem := integer_problem(token, 0, MAX_TOKEN_COUNT):
            raise InvalidRequestError(f"each token id of logit_bias {problem}", "logit_bias")
        if problem := number_problem(bias, -_MAX_TOKEN_BIAS, _MAX_TOKEN_BIAS):
            raise InvalidRequestError(f"each bias of logit_bias {problem}", "logit_bias")
        if token in biases:
            raise InvalidRequestError(f"logit_bias has token id {token} twice", "logit_bias")
        biases[token] = bias
    return biases


def _stop_token_ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list | tuple):
        raise InvalidRequestError(f"stop_token_ids must be a list of token ids; it is {shown(value)}", "stop_token_ids")
    if len(value) > _MAX_STOP_TOKEN_IDS:
        raise InvalidRequestError(
            f"stop_token_ids must be at most {_MAX_STOP_TOKEN_IDS} token ids; it has {len(value)}", "stop_token_ids"
        )
    for token in value:
        if problem := integer_problem(token, 0, MAX_TOKEN_COUNT):
            raise InvalidRequestError(f"each token id of stop_token_ids {problem}", "stop_token_ids")
    return tuple(value)


def _refuse(name: str, problem: str | None) -> None:
    if problem:
        raise InvalidRequestError(f"{name} {problem}", name)
