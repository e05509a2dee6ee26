"""StreamManager's contract, over the same rings and the same pump that workers publish through."""

import asyncio
import gc
import time
from collections.abc import AsyncIterator

import pytest
from support import DEADLINE_S, until

from realtime_serve import StreamManager, StreamToken, TokenStream
from realtime_serve.errors import QueueFullError

# Long enough never to pass in a test that does not wait for it.
NEVER = 600.0


async def read(stream: AsyncIterator[StreamToken]) -> list[str]:
    async with asyncio.timeout(DEADLINE_S):
        return [token.token async for token in stream]


async def push(manager: StreamManager, name: str, *texts: str) -> list[bool]:
    return [await manager.push_token(name, StreamToken(text, index)) for index, text in enumerate(texts)]


async def test_tokens_arrive_in_order_and_whole() -> None:
    manager = StreamManager()
    stream = manager.create_stream("a")
    tokens = [StreamToken("one", 1), StreamToken("two", -7, -0.5), StreamToken("", 2**31 - 1, None, is_special=True)]
    for token in tokens:
        assert await manager.push_token("a", token)
    await manager.close_stream("a")
    assert [token async for token in stream] == tokens
    assert manager.active_streams() == []


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\r\0",
        'a "quoted" \\ word',
        "é",
        "日本語",
        "👩‍👩‍👧‍👦🎉",
        "a\u0301",
        "\ufeff\uffff\U0010ffff",
        "x" * 8000,
        "🎉" * 2000,
    ],
    ids=lambda text: f"{ascii(text[:6])[1:-1]}_{len(text)}",
)
async def test_text_of_every_kind(text: str) -> None:
    manager = StreamManager()
    stream = manager.create_stream("a")
    reading = asyncio.ensure_future(read(stream))
    # Often enough to go around the ring.
    for _ in range(20):
        assert await manager.push_token("a", StreamToken(text, 0))
    await manager.close_stream("a")
    assert await reading == [text] * 20


@pytest.mark.parametrize("text", ["x" * 8001, "🎉" * 2001, "x" * 70_000, "x" * (65_536 + 10)])
async def test_text_longer_than_a_record_is_refused_by_name_and_the_stream_goes_on(text: str) -> None:
    manager = StreamManager()
    stream = manager.create_stream("a")
    with pytest.raises(ValueError, match=rf"at most 8000 bytes; it has {len(text.encode())}"):
        await manager.push_token("a", StreamToken(text, 0))
    assert await push(manager, "a", "still", "open") == [True, True]
    await manager.close_stream("a")
    assert await read(stream) == ["still", "open"]


async def test_text_that_is_no_text_is_refused() -> None:
    manager = StreamManager()
    stream = manager.create_stream("a")
    with pytest.raises(ValueError, match="surrogates"):
        await manager.push_token("a", StreamToken("\ud800", 0))
    await manager.close_stream("a")
    assert await read(stream) == []


async def test_long_texts_fill_the_ring_before_the_count_and_none_is_lost() -> None:
    manager = StreamManager(buffer_size=100)
    stream = manager.create_stream("a", timeout=NEVER)
    texts = [f"{index:02}" * 1000 for index in range(20)]
    pushing = asyncio.ensure_future(push(manager, "a", *texts))
    await until(lambda: manager._streams["a"].backpressure_events)
    assert (await manager.stream_stats("a"))["queue_size"] < len(texts)
    reading = asyncio.ensure_future(read(stream))
    assert await pushing == [True] * len(texts)
    await manager.close_stream("a")
    assert await reading == texts


async def test_a_full_ring_has_room_for_the_end() -> None:
    manager = StreamManager(buffer_size=100)
    stream = manager.create_stream("a", timeout=0.05)
    pushed = 0
    while await manager.push_token("a", StreamToken("x" * 7990, pushed)):
        pushed += 1
    await manager.close_stream("a")
    assert await read(stream) == ["x" * 7990] * pushed
    assert pushed


async def test_a_duplicate_is_refused_and_a_closed_name_may_be_used_again() -> None:
    manager = StreamManager()
    first = manager.create_stream("a")
    with pytest.raises(ValueError, match=r"stream 'a' already exists"):
        manager.create_stream("a")
    await push(manager, "a", "old")
    await manager.close_stream("a")
    second = manager.create_stream("a")
    await push(manager, "a", "new")
    await manager.close_stream("a")
    assert await read(first) == ["old"]
    assert (await manager.stream_stats("a"))["is_closed"]
    assert await read(second) == ["new"]


async def test_silence_ends_the_iteration() -> None:
    manager = StreamManager()
    stream = manager.create_stream("a", timeout=0.05)
    assert await push(manager, "a", "x") == [True]
    assert await read(stream) == ["x"]
    assert await push(manager, "a", "y") == [False]
    assert manager.active_streams() == []


async def test_the_default_timeout_ends_it_too() -> None:
    manager = StreamManager(default_timeout=0.05)
    assert await read(manager.create_stream("a")) == []


async def test_a_reader_that_is_behind_is_not_timed_out() -> None:
    manager = StreamManager()
    behind, silent = manager.create_stream("a", timeout=0.05), manager.create_stream("b", timeout=0.05)
    await push(manager, "a", "1", "2", "3")
    assert await read(silent) == []  # so its time is over as well
    assert await push(manager, "a", "4") == [True]
    await manager.close_stream("a")
    assert await read(behind) == ["1", "2", "3", "4"]


async def test_push_to_unknown_and_closed_streams() -> None:
    manager = StreamManager()
    assert await push(manager, "nobody", "x") == [False]
    stream = manager.create_stream("a")
    await manager.close_stream("a")
    await manager.close_stream("a")
    await manager.close_stream("nobody")
    assert await push(manager, "a", "x") == [False]
    assert await read(stream) == []
    assert await push(manager, "a", "x") == [False]


@pytest.mark.parametrize("size", [1, 2, 100, 5000])
async def test_the_buffer_holds_its_size_exactly(size: int) -> None:
    manager = StreamManager(buffer_size=size)
    stream = manager.create_stream("a", timeout=0.05)
    assert all(await push(manager, "a", *["text"] * size))
    assert (await manager.stream_stats("a"))["queue_size"] == size
    assert await push(manager, "a", "too many") == [False]
    stats = await manager.stream_stats("a")
    assert (stats["token_count"], stats["backpressure_events"]) == (size, 1)
    await manager.close_stream("a")
    assert await read(stream) == ["text"] * size


async def test_push_waits_while_the_buffer_is_full() -> None:
    manager = StreamManager(buffer_size=2)
    stream = manager.create_stream("a", timeout=NEVER)
    await push(manager, "a", "0", "1")
    waiting = asyncio.ensure_future(push(manager, "a", "2"))
    await until(lambda: manager._streams["a"].backpressure_events)
    assert not waiting.done()
    assert (await anext(stream)).token == "0"
    assert await waiting == [True]
    await manager.close_stream("a")
    assert await read(stream) == ["1", "2"]


@pytest.mark.parametrize("end", ["close_stream", "aclose", "cleanup", "shutdown"])
async def test_a_waiting_push_ends_with_its_stream(end: str) -> None:
    manager = StreamManager(buffer_size=1)
    stream = manager.create_stream("a", timeout=NEVER)
    await push(manager, "a", "0")
    waiting = asyncio.ensure_future(push(manager, "a", "1"))
    await until(lambda: manager._streams["a"].backpressure_events)
    match end:
        case "close_stream":
            await manager.close_stream("a")
        case "aclose":
            await stream.aclose()
        case "cleanup":
            assert await manager.cleanup_idle_streams(0.0) == 1
        case "shutdown":
            await manager.shutdown()
    async with asyncio.timeout(DEADLINE_S):
        assert await waiting == [False]


async def test_stats() -> None:
    manager = StreamManager()
    before = time.time()
    stream = manager.create_stream("a")
    await push(manager, "a", "x", "y")
    await anext(stream)
    stats = await manager.stream_stats("a")
    assert set(stats) == {
        "stream_id",
        "created_at",
        "elapsed_seconds",
        "token_count",
        "tokens_per_second",
        "backpressure_events",
        "queue_size",
        "is_closed",
    }
    assert stats["stream_id"] == "a"
    assert before <= stats["created_at"] <= time.time()
    assert stats["tokens_per_second"] == pytest.approx(2 / stats["elapsed_seconds"])
    assert (stats["token_count"], stats["queue_size"], stats["is_closed"]) == (2, 1, False)
    await manager.close_stream("a")
    assert (await manager.stream_stats("a"))["is_closed"]
    with pytest.raises(KeyError):
        await manager.stream_stats("nobody")
    await read(stream)
    with pytest.raises(KeyError):
        await manager.stream_stats("a")


async def test_active_streams() -> None:
    manager = StreamManager()
    streams = [manager.create_stream(name) for name in "abc"]
    assert manager.active_streams() == ["a", "b", "c"]
    await manager.close_stream("b")
    assert manager.active_streams() == ["a", "c"]
    await streams[0].aclose()
    assert manager.active_streams() == ["c"]
    del streams[2]
    gc.collect()
    assert manager.active_streams() == []
    assert manager.open_count() == 1  # b's reader may still come


async def test_cleanup_of_idle_streams_gives_their_slots_back() -> None:
    manager = StreamManager(max_streams=2)
    streams = [manager.create_stream(name, timeout=NEVER) for name in "ab"]
    with pytest.raises(QueueFullError, match="2 streams are open"):
        manager.create_stream("c")
    assert await manager.cleanup_idle_streams(NEVER) == 0
    assert await manager.cleanup_idle_streams(0.0) == 2
    assert manager.active_streams() == []
    assert manager.open_count() == 0
    assert [await read(stream) for stream in streams] == [[], []]
    again = [manager.create_stream(name) for name in "ab"]
    await push(manager, "a", "x")
    await manager.shutdown()
    assert [await read(stream) for stream in again] == [["x"], []]


async def test_cleanup_wakes_a_reader_that_waits() -> None:
    manager = StreamManager()
    reading = asyncio.ensure_future(read(manager.create_stream("a", timeout=NEVER)))
    await until(lambda: manager._streams["a"].stream.idle_seconds > 0)
    await manager.cleanup_idle_streams(0.0)
    assert await reading == []


async def test_shutdown_ends_readers_behind_what_they_were_given() -> None:
    manager = StreamManager()
    waiting, full, unread = (manager.create_stream(name, timeout=NEVER) for name in "abc")
    reading = asyncio.ensure_future(read(waiting))
    await push(manager, "b", "1", "2")
    await push(manager, "c", "3")
    assert (await anext(full)).token == "1"
    await manager.shutdown()
    assert await reading == []
    assert await read(full) == ["2"]
    assert await push(manager, "c", "x") == [False]
    assert await read(unread) == ["3"]
    assert manager.active_streams() == []
    await manager.shutdown()
    again = manager.create_stream("a")
    assert await push(manager, "a", "x") == [True]
    await manager.close_stream("a")
    assert await read(again) == ["x"]


async def test_many_streams_at_once_mix_nothing_up() -> None:
    manager = StreamManager(buffer_size=3, max_streams=130)
    streams = {f"s{index}": manager.create_stream(f"s{index}", timeout=NEVER) for index in range(130)}

    async def produce(name: str) -> None:
        await push(manager, name, *(f"{name}-{index}" for index in range(20)))
        await manager.close_stream(name)

    results = await asyncio.gather(*map(read, streams.values()), *map(produce, streams))
    assert results[: len(streams)] == [[f"{name}-{index}" for index in range(20)] for name in streams]
    assert manager.open_count() == 0


async def test_slots_are_used_again() -> None:
    manager = StreamManager(max_streams=1)
    for index in range(50):
        stream = manager.create_stream("a")
        await push(manager, "a", *["x"] * (index % 3))
        if index % 2:
            await manager.close_stream("a")
            assert await read(stream) == ["x"] * (index % 3)
        else:
            await stream.aclose()
    assert manager.open_count() == 0


async def test_a_cancelled_reader_leaves_the_stream_open() -> None:
    manager = StreamManager()
    stream = manager.create_stream("a", timeout=NEVER)
    reading = asyncio.ensure_future(anext(stream))
    await asyncio.sleep(0)
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    await push(manager, "a", "x")
    assert (await anext(stream)).token == "x"


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e9, "1", None])
async def test_timeouts_that_cannot_be_are_refused(seconds: object) -> None:
    with pytest.raises(ValueError, match="default_timeout"):
        StreamManager(default_timeout=seconds)
    if seconds is not None:
        with pytest.raises(ValueError, match="timeout"):
            StreamManager().create_stream("a", timeout=seconds)


@pytest.mark.parametrize("size", [0, -1])
async def test_buffers_that_cannot_be_are_refused(size: int) -> None:
    with pytest.raises(ValueError, match="buffer_size"):
        StreamManager(buffer_size=size)


def test_a_loop_that_is_closed_over_open_streams_harms_nobody() -> None:
    manager = StreamManager()
    kept = []

    async def leave_open() -> None:
        stream = manager.create_stream("a", timeout=NEVER)
        kept.append(stream)
        reading = asyncio.ensure_future(anext(stream))
        kept.append(reading)
        await asyncio.sleep(0)

    loop = asyncio.new_event_loop()
    loop.run_until_complete(leave_open())
    loop.run_until_complete(_cancel_all())
    loop.close()
    asyncio.run(manager.shutdown())
    assert manager.active_streams() == []
    kept.clear()
    gc.collect()


async def _cancel_all() -> None:
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.gather(*others, return_exceptions=True)


async def test_a_reader_that_is_never_kept_waiting_leaves_the_loop_its_turn() -> None:
    client = StreamManager(buffer_size=1000).open_channel(1, shared=False)
    stream = client.pump.open("a", NEVER)
    assert all(stream.push("x", index, None, False) for index in range(640))
    stream.push_end()
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    busy = asyncio.ensure_future(others())
    assert len([token async for token in TokenStream(stream)]) == 640
    busy.cancel()
    assert turns >= 9
    client.pump.stop()
