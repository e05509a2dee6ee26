"""Whose requests go before whose, as the operator has it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from realtime_serve.middleware.chain import Handler
from realtime_serve.types import Outcome, Request, RequestPriority


class ClientPriorities:
    """Gives each request of a bound client that client's priority, whatever it asked for; others keep theirs."""

    def __init__(self, priorities: Mapping[str, RequestPriority]) -> None:
        """`priorities` by client id."""
        self._priorities = dict(priorities)

    async def __call__(self, request: Request, next: Handler) -> Outcome:
        bound = self._priorities.get(request.client_id)
        if bound is not None and bound is not request.priority:
            request = replace(request, priority=bound)
        return await next(request)
