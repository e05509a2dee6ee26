"""A user's own model object, whatever it has: `generate` or `predict`, sync or async."""

from __future__ import annotations

import inspect
import operator
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Iterable
from typing import Any

from realtime_serve.errors import UnsupportedModelError
from realtime_serve.types import MAX_TOP_LOGPROBS, StreamToken, TopLogprob, shown

# What a `generate` may take, beyond the prompt.
_SAMPLING = (
    "max_tokens",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
    "logprobs",
    "seed",
    "stop",
    "logit_bias",
    "min_tokens",
    "stop_token_ids",
    "top_logprobs",
)
# Of a token that is text alone.
NO_TOKEN_ID = -1


class NonsenseError(Exception):
    """The model gave something that is no answer; the message says what."""


class CallableModel:
    """An object with `generate(prompt, …)` or `predict(list) -> list`, called from one thread and, where it is not
    async, never twice at once.

    Optional methods: `warmup()`, `health_check()`, which says False or raises where the model is not well, and
    `cleanup()`. Any of them may be async.
    """

    def __init__(self, model: Any) -> None:
        """Raises UnsupportedModelError where the object has neither method."""
        self._model = model
        if isinstance(model, type):
            raise UnsupportedModelError(f"a loader must return an object; this one returned the class {model.__name__}")
        if callable(getattr(model, "generate", None)):
            self.kind = "generate"
            self._parameters = _accepted(model.generate)
        elif callable(getattr(model, "predict", None)):
            self.kind = "predict"
        else:
            raise UnsupportedModelError(
                f"a loader must return an object with step(batch), generate(prompt, …) or predict(list);"
                f" this one returned a {type(model).__name__}"
            )

    async def warmup(self) -> None:
        await self._call("warmup")

    async def is_well(self) -> bool:
        return await self._call("health_check", default=True) is not False

    async def cleanup(self) -> None:
        await self._call("cleanup")

    async def _call(self, name: str, default: Any = None) -> Any:
        method = getattr(self._model, name, None)
        return await _awaited(method()) if callable(method) else default

    def predict(self, inputs: list[Any]) -> list[Any] | Coroutine[Any, Any, list[Any]]:
        """As many outputs as inputs, in their order; where the model is async, a coroutine that gives them. Raises
        NonsenseError where the model gave something else, and whatever the model raises."""
        count = len(inputs)  # the list is the model's now
        outputs = self._model.predict(inputs)
        return _outputs_later(outputs, count) if inspect.isawaitable(outputs) else _outputs(outputs, count)

    async def generate(self, prompt: str, sampling: dict[str, Any]) -> AsyncGenerator[StreamToken, None]:
        """The answer's tokens as the model gives them, at least one turn of the event loop between two. Raises
        NonsenseError where it gives something that is no token, and whatever the model raises."""
        given = {name: sampling[name] for name in _SAMPLING if name in self._parameters}
        answer = await _awaited(self._model.generate(prompt, **given))
        if hasattr(answer, "__aiter__"):
            try:
                async for item in answer:
                    yield self._token(item)
            finally:
                if hasattr(answer, "aclose"):
                    await answer.aclose()
            return
        items = (answer,) if isinstance(answer, str | StreamToken) or _integer(answer) is not None else answer
        if not isinstance(items, Iterable) or isinstance(items, bytes | bytearray) or hasattr(items, "keys"):
            raise NonsenseError(f"generate returned a {type(answer).__name__}, which is no token, text or iterator")
        iterator = iter(items)
        try:
            for item in iterator:
                yield self._token(item)
        finally:
            if hasattr(iterator, "close"):
                iterator.close()

    def _token(self, item: Any) -> StreamToken:
        if isinstance(item, StreamToken):
            return _checked(item)
        if isinstance(item, str):
            return _checked(StreamToken(item, NO_TOKEN_ID))
        if (token_id := _integer(item)) is not None:
            return _checked(StreamToken(self._decode(token_id), token_id))
        raise NonsenseError(f"generate gave a {type(item).__name__}, which is no StreamToken, text or token id")

    def _decode(self, token_id: int) -> str:
        """By the object's own `decode`, or its tokenizer's; without one a token id has no text."""
        for owner in (self._model, getattr(self._model, "tokenizer", None)):
            if callable(decode := getattr(owner, "decode", None)):
                return str(decode([token_id]))
        return ""


def _accepted(generate: Any) -> frozenset[str]:
    """Which sampling parameters it takes by name."""
    try:
        parameters = inspect.signature(generate).parameters.values()
    except (TypeError, ValueError):  # written in C without a signature
        return frozenset(("max_tokens", "temperature"))
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return frozenset(_SAMPLING)
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return frozenset(parameter.name for parameter in parameters if parameter.kind in by_name)


async def _outputs_later(outputs: Awaitable[Any], count: int) -> list[Any]:
    return _outputs(await outputs, count)


def _outputs(outputs: Any, count: int) -> list[Any]:
    if not _is_list(outputs):
        raise NonsenseError(f"predict returned a {type(outputs).__name__}, and not a list")
    outputs = list(outputs)
    if len(outputs) != count:
        raise NonsenseError(f"predict returned {len(outputs)} outputs for a batch of {count} inputs")
    return outputs  # type: ignore[no-any-return]


def _is_list(outputs: Any) -> bool:
    """Whether it is a sequence of outputs: lists, tuples, arrays and tensors are. A set has no order, and what is
    looked up by key, as a dict or a data frame, none of inputs."""
    if isinstance(outputs, str | bytes | bytearray | memoryview) or hasattr(outputs, "keys"):
        return False
    is_scalar = getattr(outputs, "shape", None) == ()
    return hasattr(outputs, "__len__") and hasattr(outputs, "__getitem__") and not is_scalar


def _integer(item: Any) -> int | None:
    """Of Python's, NumPy's or a tensor's; None where it is no such number."""
    if isinstance(item, bool) or not hasattr(item, "__index__"):
        return None
    try:
        return operator.index(item)
    except (TypeError, ValueError, RuntimeError):  # an array of several, or of other numbers
        return None


def _checked(token: StreamToken) -> StreamToken:
    """The token as the core takes it. Raises NonsenseError naming what is wrong with it."""
    text, token_id, logprob = token.token, _integer(token.token_id), token.logprob
    if not isinstance(text, str):
        raise NonsenseError(f"generate gave a token whose text is a {type(text).__name__}")
    if not text.isascii() and _has_surrogates(text):
        raise NonsenseError("generate gave a token whose text has half of a surrogate pair, which is no character")
    if token_id is None or not -(2**31) <= token_id < 2**31:
        raise NonsenseError(f"generate gave a token whose token_id, {shown(token.token_id)}, is no 32-bit integer")
    if logprob is not None:
        try:
            logprob = float(logprob)
        except (TypeError, ValueError, RuntimeError):
            raise NonsenseError(f"generate gave a token whose logprob is {shown(logprob)}, not a number") from None
    top_logprobs = None if token.top_logprobs is None else _checked_top_logprobs(token.top_logprobs)
    return StreamToken(text, token_id, logprob, bool(token.is_special), top_logprobs)


def _checked_top_logprobs(given: Any) -> tuple[TopLogprob, ...]:
    tops = []
    try:
        for text, token_id, logprob in given:
            token = _checked(StreamToken(text, token_id))
            tops.append(TopLogprob(token.token, token.token_id, float(logprob)))
    except (TypeError, ValueError, RuntimeError):
        raise NonsenseError(
            f"generate gave a token whose top_logprobs, {shown(given)}, are not (text, token id, logprob) each"
        ) from None
    if len(tops) > MAX_TOP_LOGPROBS:
        raise NonsenseError(
            f"generate gave a token with {len(tops)} top_logprobs; at most {MAX_TOP_LOGPROBS} can be sent"
        )
    return tuple(tops)


def _has_surrogates(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
