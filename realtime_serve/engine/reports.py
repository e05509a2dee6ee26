"""What a worker tells its supervisor of a load."""

from __future__ import annotations

import logging
from typing import Any

from realtime_serve.engine.worker_loop import WorkerLoop
from realtime_serve.errors import ServeError

log = logging.getLogger(__name__)

_MAX_REASON_CHARS = 2000


def ready_report(loop: WorkerLoop) -> dict[str, Any]:
    return {"op": "ready", "kind": loop.kind, "max_context": loop.max_context, "weights": loop.weights}


def failed_report(model: str, error: BaseException, *, is_users: bool) -> dict[str, Any]:
    """Why a model did not load. Where a user's loader raised, its traceback goes to the log."""
    if isinstance(error, ServeError):
        return {"op": "failed", "message": describe(error)}
    log.log(logging.ERROR if is_users else logging.DEBUG, "model %s did not load", model, exc_info=error)
    return {"op": "failed", "message": f"model {model!r} did not load: {describe(error)}"}


def describe(error: BaseException) -> str:
    """One line for a person: our own errors speak for themselves, others are named."""
    try:
        text = " ".join(str(error)[:_MAX_REASON_CHARS].split())
    except Exception:  # of a class whose own text fails
        text = "(its text cannot be had)"
    return text if isinstance(error, ServeError) else f"{type(error).__name__}: {text}"
