"""The body of /infer: whatever bytes come, a request or one InvalidRequestError that names the field."""

import json
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from realtime_serve.config import ServerConfig
from realtime_serve.errors import InvalidRequestError
from realtime_serve.http.validation import InferBody, parse_infer
from realtime_serve.types import InferenceRequest, RequestPriority

SERVER = ServerConfig(request_timeout=7.0)
FIELDS = {field.name for field in fields(InferenceRequest)} - {"request_id"} | {"stream"}

NOT_NUMBERS = ('"1"', "true", "[]", "{}")
NOT_INTEGERS = (*NOT_NUMBERS, "1.5", "1" * 400)
NOT_TEXT = ("1", "true", "[]", "{}", '""')
WRONG: dict[str, tuple[str, ...]] = {
    "model": (*NOT_TEXT, json.dumps("x" * 257)),
    "prompt": (*NOT_TEXT, '["a"]', "[1, 2]"),
    "max_tokens": (*NOT_INTEGERS, "0", "-1", "2147483648", "1.0"),
    "temperature": (*NOT_NUMBERS, "-0.1", "2.1", "9" * 400),
    "top_p": (*NOT_NUMBERS, "-1", "1.01"),
    "top_k": (*NOT_INTEGERS, "-1", "2147483648"),
    "min_p": (*NOT_NUMBERS, "-1", "1.01"),
    "seed": (*NOT_INTEGERS, "-1", "18446744073709551616"),
    "stop": (
        "1",
        "true",
        "{}",
        '""',
        '[""]',
        "[1]",
        "[null]",
        '[["a"]]',
        json.dumps(["x"] * 17),
        json.dumps("x" * 257),
    ),
    "repetition_penalty": (*NOT_NUMBERS, "0", "10.1"),
    "presence_penalty": (*NOT_NUMBERS, "-2.1", "2.1"),
    "frequency_penalty": (*NOT_NUMBERS, "-2.1", "2.1"),
    "ignore_eos": ("0", "1", '"true"', "[]"),
    "logprobs": ("0", "5", '"true"', "{}"),
    "logit_bias": (
        *NOT_NUMBERS[:3],
        '{"a": 1}',
        '{"-1": 1}',
        '{"1.0": 1}',
        '{"2147483648": 1}',
        '{"1": 101}',
        '{"1": "1"}',
        '{"1": null}',
        '{"1": true}',
        json.dumps(dict.fromkeys(range(1025), 0)),
    ),
    "min_tokens": (*NOT_INTEGERS, "-1", "101", "2147483648", "1.0"),
    "stop_token_ids": ("1", '"1"', "true", "{}", "[-1]", "[1.0]", '["1"]', "[null]", "[2147483648]", str([1] * 65)),
    "top_logprobs": (*NOT_INTEGERS, "-1", "1", "21", "1.0"),
    "stream": ("0", "1", '"true"', "[]"),
    "priority": ("1", "true", '""', '"URGENT"', "[]", '"\\u0131"'),
    "timeout": (*NOT_NUMBERS, "0", "-1", "86401"),
    "client_id": ("1", "true", "[]", json.dumps("x" * 257)),
    "metadata": ("1", '"a"', "[]", "true", json.dumps({"k": "x" * 16_384})),
}


def parse(body: bytes) -> InferBody:
    return parse_infer(body, request_id="r", defaults=SERVER)


def parsed(**values: object) -> InferBody:
    return parse(json.dumps({"prompt": "p"} | values).encode())


def refused(body: bytes) -> InvalidRequestError:
    with pytest.raises(InvalidRequestError) as caught:
        parse(body)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    json.dumps(caught.value.to_dict()).encode()
    return caught.value


def test_the_smallest_body() -> None:
    assert parsed() == InferBody(InferenceRequest("r", None, "p", timeout=7.0), None)


def test_every_field() -> None:
    body = parsed(
        model="m", max_tokens=5, temperature=0, top_p=0.5, top_k=3, min_p=0.1, seed=2**64 - 1, stop=["a", "b"],
        repetition_penalty=1.1, presence_penalty=-1, frequency_penalty=1, ignore_eos=True, priority="HIGH", timeout=2,
        client_id="c", metadata={"k": [1, None]}, stream=False, logprobs=True, logit_bias={"7": -1.5}, min_tokens=2,
        stop_token_ids=[3, 4], top_logprobs=5,
    )  # fmt: skip
    assert body.stream is False
    assert body.request == InferenceRequest(
        "r", "m", "p", 5, 0, 0.5, RequestPriority.HIGH, 2, "c", {"k": [1, None]}, top_k=3, min_p=0.1, seed=2**64 - 1,
        stop=("a", "b"), repetition_penalty=1.1, presence_penalty=-1, frequency_penalty=1, ignore_eos=True,
        logprobs=True, logit_bias={7: -1.5}, min_tokens=2, stop_token_ids=(3, 4), top_logprobs=5,
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(FIELDS - {"prompt"}))
def test_null_is_the_default(name: str) -> None:
    assert parsed(**{name: None}) == parsed()


def test_the_tables_here_cover_every_field() -> None:
    assert WRONG.keys() == FIELDS


@pytest.mark.parametrize("name", sorted(WRONG))
def test_a_wrong_value_is_refused_naming_its_field(name: str) -> None:
    for value in WRONG[name]:
        others = '"prompt": "p", ' if name != "prompt" else ""
        error = refused(f'{{{others}"{name}": {value}}}'.encode())
        assert (error.param, error.code) == (name, "invalid_value"), value
        assert name in str(error)


@pytest.mark.parametrize("body", [b"{}", b'{"prompt": null}', b'{"model": "m"}'])
def test_a_prompt_is_required(body: bytes) -> None:
    error = refused(body)
    assert (error.param, error.code, str(error)) == ("prompt", "missing_field", "prompt is required")


@pytest.mark.parametrize("number", ["1e400", "-1e400", "1" * 400 + ".5", "9" * 10_000])
def test_a_number_beyond_what_numbers_can_be(number: str) -> None:
    for name in ("max_tokens", "temperature", "metadata"):
        error = refused(f'{{"prompt": "p", "{name}": {number}}}'.encode())
        assert error.code == "invalid_json"
        assert "out of range" in str(error)


@pytest.mark.parametrize("priority", ["LOW", "NORMAL", "HIGH", "low", "High"])
def test_priorities(priority: str) -> None:
    assert parsed(priority=priority).request.priority.name == priority.upper()


def test_a_client_id_may_be_empty() -> None:
    assert parsed(client_id="").request.client_id == ""


def test_a_timeout_of_its_own() -> None:
    assert parsed(timeout=0.5).request.timeout == 0.5


def test_metadata_may_be_16_kb() -> None:
    largest = {"k": "x" * (16_384 - len('{"k":""}'))}
    assert parsed(metadata=largest).request.metadata == largest


@pytest.mark.parametrize(
    ("name", "suggestion"),
    [("max_token", "max_tokens"), ("temprature", "temperature"), ("Prompt", "prompt"), ("n_predict", None),
     ("request_id", None), ("", None), ("_", None), ("x" * 10_000, None), ("\n", None)],
)  # fmt: skip
def test_an_unknown_field(name: str, suggestion: str | None) -> None:
    error = refused(json.dumps({"prompt": "p", name: 1}).encode())
    assert error.code == "unknown_field"
    assert str(error).startswith("unknown field ")
    assert error.param is not None
    assert error.param.startswith(name[:50].replace("\n", "\\n"))
    if suggestion is not None:
        assert str(error) == f"unknown field {name!r}; did you mean {suggestion!r}?"


def test_an_unknown_field_that_is_null_says_nothing() -> None:
    assert parsed(tools=None) == parsed()


def test_of_a_field_given_twice_the_last_counts() -> None:
    assert parse(b'{"prompt": "a", "max_tokens": 1, "prompt": "b", "max_tokens": 2}') == parsed(
        prompt="b", max_tokens=2
    )


NOT_JSON: list[Any] = [
    b"",
    b" ",
    b"prompt=hello",
    b"{",
    b'{"prompt": "p"',
    b'{"prompt": "p"}}',
    b'{"prompt": "p"} {}',
    b'{"prompt": "p",}',
    b"{'prompt': 'p'}",
    b'{"prompt": NaN}',
    b'{"prompt": "p", "temperature": NaN}',
    b'{"prompt": "p", "temperature": Infinity}',
    b'{"prompt": "p", "temperature": -Infinity}',
    b'{"prompt": "p", "temperature": .5}',
    b'{"prompt": "p", "max_tokens": 010}',
    b'{"prompt": "p", "max_tokens": 0x10}',
    b'{"prompt": "p" /* comment */}',
    b'{"prompt": "a\nb"}',
    b'{"prompt": "\\x41"}',
    b'{"prompt": "\\u12"}',
    b'{1: "p"}',
    b"\xef\xbb\xbf{}",
    b'\x1f\x8b{"prompt": "p"}',
    b'{"prompt": "\xff"}',
    b'{"prompt": "\xc3"}',
    b'{"prompt": "\xed\xa0\x80"}',
    b'{"pr\xffompt": "p"}',
    '{"prompt": "p"}'.encode("utf-16"),
    pytest.param(b"[" * 1_000_000, id="open lists"),
    pytest.param(b"[" * 100_000 + b"]" * 100_000, id="deep lists"),
    pytest.param(b'{"prompt":' * 100_000 + b"1" + b"}" * 100_000, id="deep objects"),
    pytest.param(b'{"prompt": "p", "metadata": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_001, id="deep metadata"),
]


@pytest.mark.parametrize("body", NOT_JSON)
def test_what_is_not_json(body: bytes) -> None:
    error = refused(body)
    assert error.code == "invalid_json"
    assert error.param is None
    assert str(error).startswith("the body is ")


@pytest.mark.parametrize("body", [b"[]", b'["prompt"]', b'"prompt"', b"1", b"true", b"null", b"1e400", b"9" * 400])
def test_what_is_not_an_object(body: bytes) -> None:
    error = refused(body)
    assert error.code == "invalid_json"
    assert str(error).startswith("the body ")


@pytest.mark.parametrize("escape", [r"\ud800", r"\udfff", r"\ud800\ud800", r"\udc00\ud800", r"a\ud83dz"])
def test_half_of_a_surrogate_pair_is_refused_anywhere(escape: str) -> None:
    for body in (
        f'{{"prompt": "{escape}"}}',
        f'{{"prompt": "p", "model": "{escape}"}}',
        f'{{"prompt": "p", "client_id": "{escape}"}}',
        f'{{"prompt": "p", "stop": ["{escape}"]}}',
        f'{{"prompt": "p", "priority": "{escape}"}}',
        f'{{"prompt": "p", "metadata": {{"k": "{escape}"}}}}',
        f'{{"prompt": "p", "metadata": {{"{escape}": 1}}}}',
        f'{{"prompt": "p", "{escape}": 1}}',
    ):
        refused(body.encode())


def test_whole_characters_arrive() -> None:
    assert parse(b'{"prompt": "\\ud83c\\udf89 \xf0\x9f\x8e\x89 \\u0000"}').request.prompt == "🎉 🎉 \0"


# Whatever comes

names = st.sampled_from(sorted(FIELDS)) | st.text(max_size=12)
scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
    max_leaves=8,
)
bodies = st.dictionaries(names, values, max_size=6) | values


def parse_or_refuse(body: bytes) -> None:
    refusal = None
    try:
        made = parse(body)
        assert made.request.prompt
        assert isinstance(made.request.stop, tuple)
    except InvalidRequestError as error:
        refusal = error
    if refusal is not None:
        assert "\n" not in str(refusal)
        assert len(str(refusal)) < 1000
        json.dumps(refusal.to_dict(), ensure_ascii=False).encode()


@given(st.binary())
def test_any_bytes(body: bytes) -> None:
    parse_or_refuse(body)


@given(bodies, st.booleans())
def test_any_json(body: object, ascii_only: bool) -> None:
    parse_or_refuse(json.dumps(body, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass"))


@given(bodies, st.data())
def test_any_damaged_json(body: object, data: st.DataObject) -> None:
    text = bytearray(json.dumps(body).encode())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(len(text) - 1, 0)))
        text[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    parse_or_refuse(bytes(text))
