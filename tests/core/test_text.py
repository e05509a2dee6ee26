"""The text path against Python's own codecs and JSON."""

import codecs
import json
import math
import re
import struct

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel

from realtime_serve import _core

# What generated text is made of: whole characters, cut ones and plain garbage, more often than random bytes would be.
byte_pieces = st.lists(
    st.one_of(
        st.binary(max_size=6),
        st.text(max_size=4).map(lambda text: text.encode("utf-8", "ignore")),
        st.characters(min_codepoint=0x80, exclude_categories=["Cs"]).flatmap(
            lambda c: st.integers(1, len(c.encode())).map(lambda n: c.encode()[:n])
        ),
        st.sampled_from([b"\xed\xa0\x80", b"\xf4\x90", b"\xe0\x80", b"\xf0\x8f", b"\xc0\x80", b"\xed", b"\xa0"]),
    ),
    max_size=12,
)
texts = st.text(st.characters(exclude_categories=["Cs"]))


@given(st.lists(texts))
def test_byte_level_entries_decode_to_the_text_they_came_from(words: list[str]) -> None:
    encoder = ByteLevel(add_prefix_space=False, use_regex=False)
    entries = ["".join(part for part, _ in encoder.pre_tokenize_str(word)) for word in words]
    assert _core.decode_byte_level(entries) == [word.encode() for word in words]


def test_byte_level_errors_name_the_entry() -> None:
    with pytest.raises(ValueError, match="entry 1: the character at byte 2"):
        _core.decode_byte_level(["a", "Ġ b"])
    with pytest.raises(TypeError):
        _core.decode_byte_level([b"a"])


def test_vocabulary() -> None:
    vocabulary = _core.Vocabulary([b"a", b"<end>", b"\xff\x00"], special_ids=[1], eos_ids=[1])
    assert len(vocabulary) == 3
    assert [vocabulary.bytes(i) for i in range(-1, 4)] == [b"", b"a", b"", b"\xff\x00", b""]
    assert [vocabulary.special(i) for i in range(3)] == [False, True, False]
    assert [vocabulary.eos(i) for i in range(3)] == [False, True, False]
    with pytest.raises(ValueError, match="end-of-sequence token id 3"):
        _core.Vocabulary([b"a"], [], [3])
    with pytest.raises(ValueError, match="token 0 has 1025 bytes"):
        _core.Vocabulary([b"x" * 1025], [], [])


@given(byte_pieces)
def test_detokenizer_is_pythons_incremental_decoder(pieces: list[bytes]) -> None:
    # Of a surrogate's bytes CPython holds the first two back, though nothing can complete them.
    assume(not re.search(rb"\xed[\xa0-\xbf]", b"".join(pieces)))
    detokenizer = _core.Detokenizer()
    decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
    for piece in pieces:
        assert detokenizer.push(piece) == decoder.decode(piece)
    assert detokenizer.flush() == decoder.decode(b"", final=True)


@given(byte_pieces)
def test_detokenized_text_is_the_decoded_whole(pieces: list[bytes]) -> None:
    detokenizer = _core.Detokenizer()
    text = "".join([detokenizer.push(piece) for piece in pieces]) + detokenizer.flush()
    assert text == b"".join(pieces).decode("utf-8", errors="replace")


def first_stop(text: str, stops: list[str]) -> int | None:
    """Where the match that completes first starts; of those, the earliest start."""
    ends = [
        (match.start() + len(stop), match.start())
        for stop in stops
        for match in re.finditer(f"(?={re.escape(stop)})", text)
    ]
    return min(ends)[1] if ends else None


@given(
    st.lists(st.text("abé🎉", min_size=1, max_size=5), min_size=1, max_size=4),
    st.lists(st.text("abé🎉", max_size=6), max_size=8),
)
def test_stop_matcher_cuts_at_the_first_complete_match(stops: list[str], pieces: list[str]) -> None:
    matcher = _core.StopMatcher(stops)
    out = ""
    stopped = False
    for piece in pieces:
        text, stopped = matcher.push(piece)
        out += text
        if stopped:
            break
    out += matcher.flush()
    start = first_stop("".join(pieces), stops)
    assert stopped == (start is not None)
    assert out == "".join(pieces)[:start]


@given(texts)
def test_json_string_reads_back(text: str) -> None:
    encoded = _core.json_string(text)
    assert json.loads(encoded) == text
    assert not re.search(rb"[\x00-\x1f]", encoded)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(-(2**31), 2**31 - 1),
    texts,
    st.none() | st.floats(width=32, allow_nan=False),
)
def test_token_event_reads_back(index: int, token_id: int, text: str, logprob: float | None) -> None:
    event = _core.token_event(index, token_id, text, logprob)
    id_line, data_line, *rest = event.split(b"\n")
    assert rest == [b"", b""]
    assert id_line == b"id: %d" % index
    expected: dict[str, object] = {"token": text, "token_id": token_id, "index": index}
    if logprob is not None:
        expected["logprob"] = logprob if math.isfinite(logprob) else None
    data = json.loads(data_line.removeprefix(b"data: "))
    if data.get("logprob") is not None:
        # It is written as the shortest decimal that is this float, which need not be this double.
        (data["logprob"],) = struct.unpack("f", struct.pack("f", data["logprob"]))
    assert data == expected


@given(texts, texts, texts, st.none() | texts)
def test_error_event_reads_back(message: str, kind: str, code: str, param: str | None) -> None:
    event = _core.error_event(message, kind, code, param)
    assert event.startswith(b"event: error\ndata: ")
    assert event.endswith(b"\n\n")
    assert event.count(b"\n") == 3
    data = json.loads(event.split(b"data: ", 1)[1])
    assert data == {"error": {"message": message, "type": kind, "param": param, "code": code}}
