"""Models and loaders that a worker of either isolation can import."""

from __future__ import annotations

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

from realtime_serve import ModelConfig, StreamToken

WORDS = [" one", " two", " three", " four", " five"]


class Doubler:
    """Numbers, arrays and lists of them, doubled. What cannot be multiplied raises."""

    def predict(self, inputs: list[Any]) -> list[Any]:
        return [[2 * x for x in value] if isinstance(value, list) else value * 2 for value in inputs]


class Echo:
    def predict(self, inputs: list[Any]) -> list[Any]:
        return inputs


class Obedient:
    """Does what each input says."""

    def predict(self, inputs: list[Any]) -> Any:
        for value in inputs:
            match value:
                case {"raise": text}:
                    raise LookupError(text)
                case {"exit": status}:
                    sys.exit(status)
                case {"die": status}:
                    os._exit(status)
                case {"hang": _}:
                    time.sleep(3600)
                case {"return": answer}:
                    return answer
        return [os.getpid() if value == "pid" else value for value in inputs]


class Talker:
    """Words without end; what is to happen after some of them is in the prompt, as `raise 2`."""

    def generate(self, prompt: str, max_tokens: int = 5) -> Iterator[str]:
        what, _, after = prompt.partition(" ")
        index = 0
        while True:
            if after.isdigit() and index == int(after):
                if what == "raise":
                    raise LookupError("secret of the model")
                if what == "nonsense":
                    yield object()  # type: ignore[misc]
                if what == "hang":
                    time.sleep(3600)
                if what == "end":
                    return
                if what == "die":
                    os._exit(3)
            yield WORDS[index % len(WORDS)]
            index += 1


class AsyncTalker:
    async def generate(self, prompt: str, max_tokens: int = 5, *, temperature: float) -> AsyncIterator[StreamToken]:
        for index in range(max_tokens):
            await asyncio.sleep(0)
            yield StreamToken(WORDS[index % len(WORDS)], index, logprob=-0.5)


def doubler(config: ModelConfig) -> Doubler:
    return Doubler()


async def echo(config: ModelConfig) -> Echo:
    await asyncio.sleep(0)
    return Echo()


def obedient(config: ModelConfig) -> Obedient:
    return Obedient()


def talker(config: ModelConfig) -> Talker:
    return Talker()


def async_talker(config: ModelConfig) -> AsyncTalker:
    return AsyncTalker()


def raising(config: ModelConfig) -> object:
    raise LookupError("no weights\nin this place")


async def raising_later(config: ModelConfig) -> object:
    await asyncio.sleep(0)
    raise LookupError("no weights")


def exiting(config: ModelConfig) -> object:
    sys.exit("no licence")


def returning_nothing(config: ModelConfig) -> None:
    return None


def returning_a_class(config: ModelConfig) -> type:
    return Doubler


def with_step(config: ModelConfig) -> object:
    class Stepper:
        def step(self, batch: object) -> None: ...

    return Stepper()


def running_a_loop_of_its_own(config: ModelConfig) -> Echo:
    return asyncio.run(echo(config))


class Unwell(Echo):
    def __init__(self, what: str) -> None:
        self.what = what

    def warmup(self) -> None:
        if self.what == "warmup":
            raise LookupError("cold")

    async def health_check(self) -> bool:
        if self.what == "health raises":
            raise LookupError("ill")
        return self.what != "unwell"


def unwell(config: ModelConfig) -> Unwell:
    return Unwell(config.metadata["what"])


class Family:
    @classmethod
    def load(cls, config: ModelConfig) -> Doubler:
        return Doubler()

    @staticmethod
    def load_static(config: ModelConfig) -> Doubler:
        return Doubler()

    def load_bound(self, config: ModelConfig) -> Doubler:
        return Doubler()

    def __call__(self, config: ModelConfig) -> Doubler:
        return Doubler()


class Child(Family):
    pass


def closure() -> Callable[[ModelConfig], Doubler]:
    def load(config: ModelConfig) -> Doubler:
        return Doubler()

    return load


anonymous = lambda config: Doubler()  # noqa: E731
NOT_CALLABLE = 3
