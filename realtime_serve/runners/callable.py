"""A user's own model object, whatever it has: `generate` or `predict`, sync or async."""

from __future__ import annotations

import inspect
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any

from realtime_serve.errors import UnsupportedModelError
from realtime_serve.types import StreamToken

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

    @property
    def has_warmup(self) -> bool:
        return callable(getattr(self._model, "warmup", None))

    async def warmup(self) -> None:
        await self._call("warmup")

    async def is_well(self) -> bool:
        return await self._call("health_check", default=True) is not False

    async def cleanup(self) -> None:
        await self._call("cleanup")

    async def _call(self, name: str, default: Any = None) -> Any:
        method = getattr(self._model, name, None)
        return await _awaited(method()) if callable(method) else default

    async def predict(self, inputs: list[Any]) -> Sequence[Any]:
        """As many outputs as inputs, in their order. Raises NonsenseError where the model gave something else, and
        whatever the model raises."""
        outputs = await _awaited(self._model.predict(inputs))
        try:
            count = len(outputs)
        except TypeError:
            raise NonsenseError(f"predict returned a {type(outputs).__name__}, and not a list") from None
        if isinstance(outputs, str | bytes | dict):
            raise NonsenseError(f"predict returned a {type(outputs).__name__}, and not a list")
        if count != len(inputs):
            raise NonsenseError(f"predict returned {count} outputs for a batch of {len(inputs)} inputs")
        return outputs  # type: ignore[no-any-return]

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
        items = (answer,) if _is_one_token(answer) else answer
        if not isinstance(items, Iterable) or isinstance(items, dict | bytes):
            raise NonsenseError(f"generate returned a {type(answer).__name__}, which is no token, text or iterator")
        try:
            for item in items:
                yield self._token(item)
        finally:
            if hasattr(items, "close"):
                items.close()

    def _token(self, item: Any) -> StreamToken:
        if isinstance(item, StreamToken) and isinstance(item.token, str) and _is_token_id(item.token_id):
            return item
        if isinstance(item, str):
            return StreamToken(item, NO_TOKEN_ID)
        if _is_token_id(item):
            return StreamToken(self._decode(int(item)), int(item))
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


def _is_token_id(item: Any) -> bool:
    return hasattr(item, "__index__") and not isinstance(item, bool) and -(2**31) <= int(item) < 2**31


def _is_one_token(answer: Any) -> bool:
    return isinstance(answer, str | StreamToken) or (_is_token_id(answer) and not hasattr(answer, "__iter__"))


async def _awaited(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value
