"""The tokenizer keys of a GGUF file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, TypeVar

from realtime_serve.errors import ModelLoadError

T = TypeVar("T")


class TokenizerMetadata:
    """A GGUF file's `tokenizer.ggml.*` keys, checked as they are read: the file may hold anything."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.source = source
        self.architecture = values.get("general.architecture")

    def get(self, key: str, kind: type[T]) -> T | None:
        value = self._values.get(f"tokenizer.ggml.{key}")
        if value is None or type(value) is kind:
            return value
        raise self.key_error(key, f"is not of type {kind.__name__}")

    def require(self, key: str, kind: type[T]) -> T:
        value = self.get(key, kind)
        if value is None:
            raise self.key_error(key, "is missing")
        return value

    def array(self, key: str, kind: type[T], default: list[T] | None = None) -> list[T]:
        values = self.require(key, list) if default is None else self.get(key, list)
        if values is None:
            return default or []
        if not all(type(value) is kind for value in values):
            raise self.key_error(key, f"has elements that are not of type {kind.__name__}")
        return values.copy()

    def scores(self) -> list[float]:
        values = self.require("scores", list)
        if not all(type(value) in (float, int) and not math.isnan(value) for value in values):
            raise self.key_error("scores", "has elements that are not numbers")
        return values

    def token(self, key: str, size: int) -> int | None:
        """A token id, if the file has it."""
        token = self.get(key, int)
        if token is not None and not 0 <= token < size:
            raise self.key_error(key, f"is {token}, and there are {size} tokens")
        return token

    def around(self, name: str, size: int, *, default: bool) -> tuple[int, ...]:
        """The token that goes before or after every text, if one does."""
        wanted = self.get(f"add_{name}_token", bool)
        if not (default if wanted is None else wanted):
            return ()
        token = self.token(f"{name}_token_id", size)
        if token is None:
            raise self.key_error(f"{name}_token_id", "is missing, and is to be added to every text")
        return (token,)

    def error(self, what: str) -> ModelLoadError:
        return ModelLoadError(f"{self.source}: {what}")

    def key_error(self, key: str, what: str) -> ModelLoadError:
        return self.error(f"metadata key 'tokenizer.ggml.{key}' {what}")
