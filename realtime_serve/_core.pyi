"""The C++ core of realtime_serve (csrc/bindings)."""

import enum
import os
from collections.abc import Mapping, Sequence
from typing import Any, final

import numpy as np
import numpy.typing as npt

@final
class Channel:
    """What one front end and one worker share."""

    @staticmethod
    def create(
        *,
        slots: int,
        ring_records: int,
        lane_bytes: int,
        generation: int,
        shared: bool,
        least_ring_bytes: int = 0,
    ) -> Channel:
        """Makes one in shared memory, for a worker process, or in private memory, for a thread."""
    @staticmethod
    def attach(memory_fd: int, worker_bell_fd: int, front_bell_fd: int) -> Channel:
        """Maps one that another process made, and takes over the descriptors, in the order of fds()."""
    def fds(self) -> tuple[int, int, int]: ...
    def capsule(self) -> object:
        """The object for the pump, which shares it."""
    @property
    def generation(self) -> int: ...
    @property
    def slots(self) -> int: ...
    @property
    def steps(self) -> int:
        """Steps that the worker has committed while it was attached."""
    def stats(self) -> dict[str, Any]:
        """What the worker counts: histograms as (counts by significant bits, sum), and numbers."""

class PayloadKind(enum.IntEnum):
    """What a payload's bytes are."""

    NONE = 0
    TEXT = 1
    JSON = 2
    BYTES = 3
    NUMPY = 4

class BatchRelease(enum.IntEnum):
    """Why a batch was released."""

    FULL = 0
    TIMEOUT = 1
    IDLE = 2
    DEADLINE = 3

class FinishReason(enum.IntEnum):
    STOP = 1
    LENGTH = 2
    CANCELLED = 3
    ERROR = 5

class StreamError(enum.IntEnum):
    NONE = 0
    MODEL_FAILED = 2
    INVALID_REQUEST = 4

@final
class Submission:
    """A request as a worker takes it."""

    slot: int
    priority: int
    arrival_ns: int
    deadline_ns: int
    payload_kind: int
    answer_kind: int
    request_id: str
    stops: list[str]
    stop_token_ids: list[int]
    payload: bytes
    max_tokens: int
    min_tokens: int
    def sampling(self) -> dict[str, Any]:
        """Its sampling parameters by name."""

@final
class ChannelServer:
    """A worker's side of a channel, for models that are called."""

    max_piece_bytes: int
    def __init__(self, channel: Channel) -> None: ...
    @property
    def bell_fd(self) -> int: ...
    @property
    def open_slots(self) -> int: ...
    def take(self) -> list[Submission]:
        """The requests that have come, high priority first."""
    def cancelled(self) -> list[int]:
        """Slots given up by their readers since the last call. They are still to be ended."""
    def with_room(self) -> list[int]:
        """Slots that had no room for a piece and have it now."""
    def start(self, slot: int) -> None:
        """The model begins to work on it."""
    def write_token(
        self,
        slot: int,
        text: str,
        token_id: int,
        logprob: float | None,
        special: bool,
        top_logprobs: Sequence[tuple[str, int, float]] | None = None,
    ) -> bool:
        """False: there is no room at the moment."""
    def write_payload(self, slot: int, kind: int, piece: bytes) -> bool:
        """False: there is no room at the moment."""
    def end(self, slot: int, reason: int, error: int = 0, detail: str = "") -> None: ...
    def flush(self) -> None:
        """Wakes the front end where need be."""
    def count_step(self, took_ns: int) -> None: ...
    def count_batch(self, size: int, release: BatchRelease) -> None: ...
    def show_load(self, running: int, waiting: int) -> None: ...
    def arm(self) -> bool:
        """Lets the front end ring. False: there is news already."""
    def wake(self) -> None:
        """Ends a sleep."""

@final
class EngineCore:
    """A worker's engine but for the model."""

    def __init__(
        self,
        *,
        max_batch_size: int,
        max_step_tokens: int,
        block_size: int,
        num_blocks: int,
        cached_blocks: int,
        max_context: int,
        max_queue: int,
        ageing_ms: int,
        target_step_ms: float,
        vocabulary: Vocabulary,
    ) -> None: ...
    def bind_buffers(
        self,
        *,
        tokens: npt.NDArray[np.int32],
        positions: npt.NDArray[np.int32],
        kv_slots: npt.NDArray[np.int64],
        query_start: npt.NDArray[np.int32],
        context_len: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        block_table: npt.NDArray[np.int32],
        logits_at: npt.NDArray[np.int64],
        sampled: npt.NDArray[np.int32],
        logprobs: npt.NDArray[np.float32],
    ) -> None:
        """The arrays that steps are assembled into; runners.base.StepBatch has their shapes."""
    def attach(self, channel: Channel) -> None: ...
    def detach(self, channel: Channel) -> None: ...
    def schedule(self) -> tuple[int, int, int] | None:
        """Assembles the next step: (tokens, sequences, samples), or None where there is nothing to do."""
    def sample(self, logits: npt.NDArray[np.float32]) -> None: ...
    def commit(self) -> None: ...
    def abort(self) -> None: ...
    def wait(self) -> None: ...
    def run(self, model: NativeModel) -> tuple[int, str] | None:
        """Runs steps, without the GIL, until `interrupt`: None. Where the model fails in a step: that step's sequences,
        which have ended with an error, and what the model threw; then it may be called again."""
    def interrupt(self) -> None:
        """Makes `run` return at its next step boundary, or as soon as it is called, and `wait` at once. Any thread."""
    def close(self) -> None: ...

class NativeModel:
    """A model in C++, for `EngineCore.run`. One engine runs it."""

@final
class NullModel(NativeModel):
    """At position p it says `first_token + p % tokens`. Its steps are `step_ns` nanoseconds apart on average; 0: as
    fast as they come. ValueError where `tokens` is not at least 1."""

    def __init__(self, *, first_token: int, tokens: int, step_ns: int) -> None: ...

@final
class CpuTensor:
    """A tensor of `rows` by `columns` as bytes of a type that GGUF names; it keeps `bytes`. Where `pair_heads` is not 0
    the rows are those of so many heads, each as rotary pairs side by side. ValueError for an unknown type."""

    def __init__(
        self, bytes: npt.NDArray[np.uint8], type: str, rows: int, columns: int, *, pair_heads: int = 0
    ) -> None: ...

@final
class CpuWeights:
    """A decoder's weights and the threads that run it: the parts and the spec's keys are those of
    csrc/cpu/decoder_weights.hpp and decoder_spec.hpp. ValueError names what is missing, misshapen or not finite."""

    def __init__(
        self, spec: dict[str, Any], tensors: dict[str, CpuTensor], *, threads: int, value_bits: int = 8
    ) -> None:
        """The layers' matrices that are not packed as they are get `value_bits`, 4 or 8."""
    @property
    def layer_bits(self) -> list[int]:
        """Of the layers' matrices, ascending, each once."""
    @property
    def packed_bytes(self) -> int: ...
    def kv_block_bytes(self, kv_format: str) -> int:
        """What a block of the KV cache takes in all layers, where keys and values are kept as "int8" or "float16"."""
    def open_packed(self, path: os.PathLike[str], description: str) -> bool:
        """Uses the matrices as they lie packed in a file, if it was made for this description and is intact."""
    def create_packed(self, path: os.PathLike[str], description: str) -> None:
        """Packs the matrices into a file, and uses it. OSError where there can be none."""
    def pack(self) -> None:
        """Packs the matrices into memory. One of the three comes before anything is computed; from then on only the
        embeddings are read from the tensors. ValueError where they are packed already."""
    def logits(self, ids: npt.NDArray[np.int32], *, kv_format: str = "int8") -> npt.NDArray[np.float32]:
        """Of each position of a text, [tokens, vocabulary]."""

@final
class CpuModel(NativeModel):
    """Runs a decoder whose weights are packed. The weights serve one model at a time."""

    def __init__(
        self,
        weights: CpuWeights,
        *,
        max_tokens: int,
        max_samples: int,
        max_context: int,
        num_blocks: int,
        kv_format: str = "int8",
    ) -> None: ...
    def forward(self, batch: Any) -> npt.NDArray[np.float32]:
        """Runs a step (a StepBatch). The logits that it wants, [samples, vocabulary]; the next step overwrites them."""

KV_BLOCK_POSITIONS: int
"""Of a block of the KV cache, as the kernels have it."""

def cpu_kernels() -> str:
    """The instruction set that is used: the best, or what RTS_CPU_ISA names; ValueError where that is not there."""

def available_cpu_kernels() -> list[str]:
    """Those that can be had here, the best first: avx512, avx2, portable."""

@final
class PagedAttention:
    """The keys and values of all layers in float32, in blocks of 16 positions, and attention over them: one step at a
    time, on `threads` of the calling thread's OpenMP threads. ValueError where heads cannot share the KV heads, or have
    a number of values that is over 256 or no multiple of 8."""

    def __init__(
        self, *, layers: int, heads: int, kv_heads: int, head_dim: int, num_blocks: int, threads: int
    ) -> None: ...
    def begin_step(
        self,
        *,
        query_start: npt.NDArray[np.int32],
        context_len: npt.NDArray[np.int32],
        rows: npt.NDArray[np.int32],
        block_table: npt.NDArray[np.int32],
        kv_slots: npt.NDArray[np.int64],
    ) -> None:
        """A step's arrays, as runners.base.StepBatch has them. They are read until the next call."""
    def attend(
        self,
        layer: int,
        query: npt.NDArray[np.float32],
        key: npt.NDArray[np.float32],
        value: npt.NDArray[np.float32],
        *,
        scale: float,
        window: int | None,
        out: npt.NDArray[np.float32],
    ) -> None:
        """Stores a layer's keys and values, then attends its queries to their contexts; once a step. All arrays are
        [tokens, heads, head_dim]; `out` is contiguous, the others need be so in a head. The GIL is free meanwhile."""

@final
class PriorityQueue:
    """Numbers by priority, deadline and arrival; one that has waited for ageing_ns goes first."""

    def __init__(self, *, capacity: int, ageing_ns: int) -> None: ...
    def push(self, priority: int, arrival_ns: int, deadline_ns: int, number: int) -> bool:
        """False where it is full. A deadline of 0 is none."""
    def pop(self, now_ns: int) -> int | None:
        """None where it is empty."""

@final
class Vocabulary:
    def __init__(self, token_bytes: Sequence[bytes], special_ids: Sequence[int], eos_ids: Sequence[int]) -> None: ...
    def __len__(self) -> int: ...
    def bytes(self, id: int) -> bytes: ...
    def special(self, id: int) -> bool: ...
    def eos(self, id: int) -> bool: ...

@final
class Detokenizer:
    def __init__(self) -> None: ...
    def push(self, token_bytes: bytes) -> str: ...
    def flush(self) -> str: ...

@final
class StopMatcher:
    def __init__(self, stops: Sequence[str]) -> None: ...
    def push(self, text: str) -> tuple[str, bool]: ...
    def flush(self) -> str: ...

@final
class GgufTensor:
    """What a GGUF file says of one tensor. It outlives its file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Slowest dimension first, as numpy has it; () for a scalar."""
    @property
    def type(self) -> str:
        """ggml's name of how the values are stored: "F32", "Q4_1", ..."""
    @property
    def nbytes(self) -> int:
        """As stored."""

@final
class GgufFile:
    """A GGUF file of version 2 or 3, mapped for reading and checked as a whole. Any number of threads may use it.

    Raises RuntimeError, one line that begins with the path, for a file that cannot be opened or is not sound. The
    mapping is there as long as the object, its metadata or an array of `raw`. Replace a file that is in use by rename:
    a file that is cut short while it is mapped kills its readers.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None: ...
    @property
    def metadata(self) -> Mapping[str, Any]:
        """Read-only, in the file's order, each value made when it is asked for: bool, int, float, str and lists of
        these, which may nest.

        Bytes that are not UTF-8 are U+FFFD in a text. In a list of texts (a vocabulary) and in keys, where two that
        differ must not become one, each is a surrogate: `.encode("utf-8", "surrogateescape")` gives the bytes back.
        """
    @property
    def tensors(self) -> Mapping[str, GgufTensor]:
        """By name, read-only, in the file's order."""
    def dequantize(self, name: str) -> npt.NDArray[np.float32]:
        """The tensor's values in a new array of its shape. The GIL is free meanwhile.

        Raises KeyError for an unknown name, RuntimeError for a type that is not decoded, with those that are.
        """
    def release_pages(self) -> None:
        """What has been read no longer counts as this process's memory; it is read again where it is wanted."""
    def raw(self, name: str) -> npt.NDArray[np.uint8]:
        """The tensor's bytes as stored, (nbytes,): a read-only view of the mapping. KeyError for an unknown name."""

def ask_for_long_slices() -> None:
    """This thread, and those that it starts, make way at once for others' that do not: see rts/scheduling_slice.hpp."""

def decode_byte_level(entries: list[str]) -> list[bytes]: ...
def json_string(text: str) -> bytes: ...
def token_event(index: int, token_id: int, text: str, logprob: float | None = None) -> bytes: ...
def error_event(message: str, type: str, code: str, param: str | None = None) -> bytes: ...
