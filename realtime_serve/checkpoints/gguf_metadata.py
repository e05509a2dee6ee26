"""The key-value pairs of a GGUF file that describe its model, checked as they are read: the file may hold anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from realtime_serve.errors import ModelLoadError, UnsupportedModelError

T = TypeVar("T", int, float, str)


class GgufMetadata:
    """Keys are given without the architecture's name, which precedes them in the file."""

    def __init__(self, values: Mapping[str, Any], tensors: Mapping[str, Any], source: str) -> None:
        self._values = values
        self.tensors = tensors
        self.source = source
        self.architecture = values.get("general.architecture")

    def get(self, key: str, default: T) -> T:
        """The value where the file has it; its type is that of `default`. Raises ModelLoadError where it is not."""
        value = self.raw(key)
        if value is None:
            return default
        if type(value) is not type(default) and not (isinstance(default, float) and type(value) is int):
            raise ModelLoadError(
                f"{self.source}: metadata key '{self.architecture}.{key}' is {_brief(value)}, and not"
                f" {_KINDS[type(default)]}"
            )
        return type(default)(value)

    def require(self, key: str, kind: type[T]) -> T:
        """Raises ModelLoadError where the file does not have it, or of another type."""
        if self.raw(key) is None:
            raise ModelLoadError(f"{self.source}: metadata key '{self.architecture}.{key}' is missing")
        return self.get(key, kind())

    def count(self, key: str, default: int | None = None) -> int:
        """A number of things of which a model has one or more; required without a default."""
        value = self.require(key, int) if default is None else self.get(key, default)
        if value < 1:
            raise ModelLoadError(f"{self.source}: metadata key '{self.architecture}.{key}' is {value}, and not above 0")
        return value

    def has(self, key: str) -> bool:
        return self.raw(key) is not None

    def raw(self, key: str) -> Any:
        return self._values.get(f"{self.architecture}.{key}", None)

    def unsupported(self, what: str, supported: str = "") -> UnsupportedModelError:
        return UnsupportedModelError(f"{self.source}: {what} is not supported{supported}")


_KINDS = {int: "a whole number", float: "a number", str: "a text"}


def _brief(value: Any) -> str:
    return f"a list of {len(value)}" if isinstance(value, list) else repr(value)[:40]
