"""A small load generator: streams /infer from a running server and measures what its readers see.

Standard library only. It takes in about 200,000 tokens a second on one core: what comes near that measures itself.
"""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from realtime_serve.errors import ConfigError

# A server that sends nothing for this long is taken to hang.
_SILENCE_S = 60.0
_READ_BYTES = 1 << 16
_now = time.perf_counter
_EVENT_END = b"\n\n"
# Characters of an error that the table shows.
_MAX_SHOWN = 200


@dataclass(frozen=True, slots=True)
class Load:
    """`requests` streams in all, `concurrency` of them at a time, each on a connection that is kept open."""

    url: str = "http://localhost:8000"
    model: str | None = None
    """None: the only model that is served there."""
    concurrency: int = 8
    requests: int = 64
    max_tokens: int = 128
    prompt: str = "Once upon a time"

    def body(self) -> bytes:
        body: dict[str, Any] = {"prompt": self.prompt, "max_tokens": self.max_tokens, "ignore_eos": True}
        if self.model is not None:
            body["model"] = self.model
        return json.dumps(body).encode()


@dataclass(slots=True)
class Measured:
    """What the readers saw; times in seconds."""

    duration: float = 0.0
    tokens: int = 0
    completed: int = 0
    to_first_token: list[float] = field(default_factory=list)
    between_tokens: list[float] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    """Requests without a complete answer, by reason."""


class _Refused(Exception):
    """A request that ended without its tokens; the text is why."""


def percentile(ordered: Sequence[float], percent: float) -> float | None:
    """Of values in ascending order, linearly between the two nearest ranks; None of none."""
    if not ordered:
        return None
    at = (len(ordered) - 1) * percent / 100
    low = math.floor(at)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (at - low)


async def run_load(load: Load) -> Measured:
    """Raises ConfigError for a URL that is none, or where nothing listens at the start."""
    target = _Target.of(load.url)
    try:
        first = await target.connect()
    except (OSError, UnicodeError) as error:
        reason = str(error) or "it does not answer"
        raise ConfigError(f"no server can be reached at {load.url}: {reason}", "url") from None
    request = target.request(load.body())
    measured = Measured()
    left = iter(range(load.requests))
    started_at = _now()
    async with asyncio.TaskGroup() as readers:
        for index in range(min(load.concurrency, load.requests)):
            readers.create_task(_reader(target, None if index else first, request, left, measured))
    measured.duration = _now() - started_at
    return measured


def summary(load: Load, measured: Measured) -> dict[str, Any]:
    """The figures as one JSON object; null where there is nothing to measure."""

    def in_ms(values: list[float]) -> dict[str, float | None]:
        ordered = sorted(values)
        figures = {f"p{percent}": percentile(ordered, percent) for percent in (50, 99)}
        return {name: None if value is None else round(value * 1e3, 3) for name, value in figures.items()}

    duration = measured.duration
    return {
        "url": load.url,
        "model": load.model,
        "concurrency": load.concurrency,
        "requests": load.requests,
        "completed": measured.completed,
        "errors": measured.errors.total(),
        "duration_s": round(duration, 3),
        "tokens": measured.tokens,
        "tokens_per_s": round(measured.tokens / duration, 1) if duration else None,
        "ttft_ms": in_ms(measured.to_first_token),
        "itl_ms": in_ms(measured.between_tokens),
    }


def table(figures: dict[str, Any], errors: Counter[str]) -> str:
    """The summary for a person."""
    rows = [
        ("requests", f"{figures['completed']} of {figures['requests']} complete, {figures['concurrency']} at a time"),
        ("tokens", f"{figures['tokens']} in {figures['duration_s']} s"),
        ("tokens/s", _shown(figures["tokens_per_s"], "")),
    ]
    for name, title in (("ttft_ms", "first token"), ("itl_ms", "between tokens")):
        rows.append((title, "  ".join(f"{key} {_shown(value, ' ms')}" for key, value in figures[name].items())))
    rows += [("errors", f"{count} × {reason}") for reason, count in errors.most_common()]
    return "\n".join(f"{title:<16}{text}" for title, text in rows)


def _shown(value: float | None, unit: str) -> str:
    return "–" if value is None else f"{value}{unit}"


@dataclass(slots=True)
class _Connection:
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


@dataclass(frozen=True, slots=True)
class _Target:
    host: str
    port: int
    path: str
    tls: bool

    @classmethod
    def of(cls, url: str) -> _Target:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise ConfigError(f"url {url!r} is none: {error}", "url") from None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"url must be like http://localhost:8000; it is {url!r}", "url")
        tls = parts.scheme == "https"
        return cls(parts.hostname, port or (443 if tls else 80), parts.path.rstrip("/") + "/infer", tls)

    async def connect(self) -> _Connection:
        async with asyncio.timeout(_SILENCE_S):
            reader, writer = await asyncio.open_connection(self.host, self.port, ssl=self.tls or None)
        return _Connection(reader, writer)

    def request(self, body: bytes) -> bytes:
        host = f"[{self.host}]" if ":" in self.host else self.host
        head = (
            f"POST {self.path} HTTP/1.1\r\nHost: {host}:{self.port}\r\nContent-Type: application/json\r\n"
            f"Accept: text/event-stream\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


async def _reader(
    target: _Target, connection: _Connection | None, request: bytes, left: Iterator[int], measured: Measured
) -> None:
    """One reader: a request after the other, until none is left."""
    try:
        for _ in left:
            keeps = False
            try:
                if connection is None:
                    connection = await target.connect()
                keeps = await _one_request(connection, request, measured)
            except _Refused as error:
                measured.errors[str(error)] += 1
            except TimeoutError:
                measured.errors[f"nothing came for {_SILENCE_S:.0f} s"] += 1
            except (OSError, EOFError, ValueError, asyncio.LimitOverrunError) as error:
                measured.errors[f"the connection broke: {type(error).__name__}"] += 1
            if connection is not None and not keeps:
                connection.writer.close()
                connection = None
    finally:
        if connection is not None:
            connection.writer.close()


async def _one_request(connection: _Connection, request: bytes, measured: Measured) -> bool:
    """Whether the connection can take another one. Raises _Refused and what reading raises."""
    loop = asyncio.get_running_loop()
    reader = connection.reader
    async with asyncio.timeout(_SILENCE_S) as silence:
        sent_at = _now()
        connection.writer.write(request)
        status, headers = await _read_head(reader)
        if status != 200:
            raise _Refused(f"{status} {_message(b''.join([piece async for piece in _body(reader, headers)]))}")
        last_at, is_done, cut = 0.0, False, b""
        async for piece in _body(reader, headers):
            silence.reschedule(loop.time() + _SILENCE_S)
            now = _now()
            *events, cut = (cut + piece).split(_EVENT_END)
            for event in events:
                if event.startswith((b"id:", b"data:")):
                    measured.tokens += 1
                    if last_at:
                        measured.between_tokens.append(now - last_at)
                    else:
                        measured.to_first_token.append(now - sent_at)
                    last_at = now
                elif event.startswith(b"event: error"):
                    raise _Refused(_message(event.partition(b"data:")[2]))
                elif event.startswith(b"event: done"):
                    is_done = True
    if not is_done:
        raise _Refused("the stream ended without saying why")
    measured.completed += 1
    return headers.get(b"connection", b"").lower() != b"close"


async def _read_head(reader: asyncio.StreamReader) -> tuple[int, dict[bytes, bytes]]:
    """Raises EOFError or ValueError where no answer of HTTP/1 comes."""
    version, status, *_ = (await reader.readuntil(b"\n")).split()
    headers = {} if version == b"HTTP/1.1" else {b"connection": b"close"}
    while line := (await reader.readuntil(b"\n")).strip():
        name, _, value = line.partition(b":")
        headers[name.strip().lower()] = value.strip()
    return int(status), headers


async def _body(reader: asyncio.StreamReader, headers: dict[bytes, bytes]) -> AsyncIterator[bytes]:
    """The body in the pieces in which it came."""
    if headers.get(b"transfer-encoding", b"").lower() == b"chunked":
        while size := int(await reader.readuntil(b"\n"), 16):
            yield (await reader.readexactly(size + 2))[:-2]
        await reader.readuntil(b"\n")
    elif (length := headers.get(b"content-length")) is not None:
        yield await reader.readexactly(int(length))
    else:
        while piece := await reader.read(_READ_BYTES):
            yield piece
        headers[b"connection"] = b"close"


def _message(body: bytes) -> str:
    """The message of an error object; the beginning of what is none."""
    try:
        message = json.loads(body)["error"]["message"]
    except (ValueError, TypeError, KeyError, RecursionError):
        message = body[:_MAX_SHOWN].decode(errors="replace")
    return " ".join(str(message).split())[:_MAX_SHOWN]
