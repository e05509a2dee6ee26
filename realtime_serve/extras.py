"""The extra [torch]: the packages that the torch engine is built on, which the plain install leaves out."""

from __future__ import annotations

from realtime_serve.errors import ModelLoadError

_PACKAGES = ("torch", "transformers")


def has_torch() -> bool:
    """Whether they are installed; nothing of them is imported."""
    from importlib.util import find_spec

    return all(find_spec(package) is not None for package in _PACKAGES)


def torch_missing(model: str, why: str, error: ImportError | None = None) -> ModelLoadError:
    """For a model that needs the torch engine, and `why`; `error` is what an attempt to import it ended with."""
    problem = f"cannot be imported ({' '.join(str(error).split())})" if error else "is not installed"
    return ModelLoadError(
        f"model {model!r} needs the torch engine ({why}), which {problem}: pip install 'realtime-ai-serve[torch]'"
    )
