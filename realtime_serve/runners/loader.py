"""A user's loader: the callable that makes a model's object from its ModelConfig."""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Callable
from typing import Any

from realtime_serve.config import ModelConfig
from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.runners.base import Runner

_RUNNER_ATTRIBUTES = tuple(name for name in vars(Runner) if not name.startswith("_"))

Loader = Callable[[ModelConfig], Any]
"""Takes the ModelConfig and returns the model's object, or, where it is async, an awaitable of it."""


def import_name(loader: Loader) -> str | None:
    """`module:name`, by which another process can import it; None for closures, lambdas, methods of objects and what
    the main script defines."""
    module, name = getattr(loader, "__module__", None), getattr(loader, "__qualname__", None)
    if inspect.ismethod(loader) and isinstance(owner := loader.__self__, type):  # a class method, maybe inherited
        module, name = owner.__module__, f"{owner.__qualname__}.{loader.__name__}"
    if not isinstance(module, str) or not isinstance(name, str) or module == "__main__" or "<" in name:
        return None
    found: Any = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    is_same = found is loader or (inspect.ismethod(found) and found == loader)  # each look-up binds a method anew
    return f"{module}:{name}" if is_same else None


def import_loader(name: str) -> Loader:
    """What `module:name` stands for. Raises ModelLoadError, saying what is not there."""
    module, separator, path = name.partition(":")
    if not separator or not module or not path:
        raise ModelLoadError(f"a loader is named as module:function; {name!r} is not")
    try:
        found: Any = importlib.import_module(module)
    except (Exception, SystemExit) as error:
        raise ModelLoadError(f"loader {name!r}: importing {module} failed: {type(error).__name__}: {error}") from error
    for part in path.split("."):
        if not hasattr(found, part):
            raise ModelLoadError(f"loader {name!r}: {module} has no {path}")
        found = getattr(found, part)
    if not callable(found):
        raise ModelLoadError(f"loader {name!r} is a {type(found).__name__}, which cannot be called")
    return found  # type: ignore[no-any-return]


def as_runner(model: Any) -> Runner:
    """An object with `step` as a Runner. Raises UnsupportedModelError naming what it lacks."""
    missing = [name for name in _RUNNER_ATTRIBUTES if not hasattr(model, name)]
    if missing:
        raise UnsupportedModelError(
            f"a model with step(batch) must also have {', '.join(missing)}; see realtime_serve.runners.base.Runner"
        )
    return model  # type: ignore[no-any-return]
