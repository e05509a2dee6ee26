"""Ids and seeds: none is given out twice, not even by a process and its fork."""

from __future__ import annotations

import os

from realtime_serve.randomness import new_request_id, new_seed


def test_none_is_given_out_twice() -> None:
    ids = [new_request_id() for _ in range(2000)]  # several blocks
    seeds = [new_seed() for _ in range(2000)]
    assert len({*ids}) == len({*seeds}) == 2000
    assert all(len(name) == 32 and int(name, 16) >= 0 for name in ids)
    assert all(0 <= seed < 2**64 for seed in seeds)
    assert max(seeds) >= 2**60


def test_a_fork_gives_out_others() -> None:
    new_request_id()  # the rest of the block is there
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        os.write(writer, new_request_id().encode())
        os._exit(0)
    os.waitpid(child, 0)
    theirs = os.read(reader, 64).decode()
    os.close(reader)
    os.close(writer)
    assert len(theirs) == 32
    assert theirs != new_request_id()
