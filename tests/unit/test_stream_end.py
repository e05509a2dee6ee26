"""The end of a streamed body, for a stream that is announced again after it was served to its end."""

import asyncio

from realtime_serve.engine.client import ChannelClient, ChannelShape


class Transport(asyncio.Transport):
    """Keeps what is written to it."""

    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.written += bytes(data)

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0


async def test_the_last_chunk_is_written_once() -> None:
    client = ChannelClient(ChannelShape(slots=2, buffer_tokens=8), 1, shared=False)
    transport = Transport()
    stream = client.pump.open("s", 5.0)
    assert stream is not None
    assert stream.push("a", 1, None, False)
    assert stream.push_end()
    # Served here, while the announcement of the same tokens still waits for the loop's turn.
    await stream.write_to(transport, b"HTTP/1.1 200 OK\r\n\r\n", True)
    assert transport.written.endswith(b"\r\n0\r\n\r\n")
    for _ in range(5):
        await asyncio.sleep(0)
    assert transport.written.count(b"0\r\n\r\n") == 1
    assert transport.written.count(b"event: done") == 1
    stream.close()
    client.pump.stop()
