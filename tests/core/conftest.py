"""Asynchronous tests of this folder run on asyncio's own event loop and on uvloop."""

from support import LOOP_FACTORIES


def pytest_asyncio_loop_factories() -> dict[str, object]:
    return LOOP_FACTORIES
