"""What a request may be, and what an answer is made of."""

import math
from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest

from realtime_serve.errors import InvalidRequestError, PromptTooLongError
from realtime_serve.types import (
    InferenceRequest,
    InferenceResponse,
    RequestPriority,
    StreamToken,
    Timings,
    Usage,
    check_context,
    check_token_ids,
    shown,
)

DEFAULTS: dict[str, object] = {
    "max_tokens": 100,
    "temperature": 1.0,
    "top_p": 0.95,
    "priority": RequestPriority.NORMAL,
    "timeout": 30.0,
    "client_id": "",
    "metadata": {},
    "top_k": 0,
    "min_p": 0.0,
    "seed": None,
    "stop": (),
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "ignore_eos": False,
    "logprobs": False,
    "logit_bias": {},
    "min_tokens": 0,
    "stop_token_ids": (),
    "top_logprobs": 0,
}
INTEGERS = {"max_tokens": (1, 2**31 - 1), "top_k": (0, 2**31 - 1), "seed": (0, 2**64 - 1)}
# Their upper bounds are other fields' as well.
DEPENDENT = {"min_tokens": ({"max_tokens": 2**31 - 1}, 2**31 - 1), "top_logprobs": ({"logprobs": True}, 20)}
NUMBERS = {
    "temperature": (0, 2),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 10),
    "presence_penalty": (-2, 2),
    "frequency_penalty": (-2, 2),
    "timeout": (0.001, 86_400),
}
NOT_NUMBERS: tuple[object, ...] = ("1", True, False, [1], {}, 1j, math.nan, math.inf, -math.inf)
SURROGATE = "half \ud83d of a pair"
# 256 bytes are allowed, in UTF-8.
LONG = ("x" * 257, "é" * 129)


def request(**values: object) -> InferenceRequest:
    return InferenceRequest(**{"request_id": "r", "model": "m", "prompt": "p"} | values)  # type: ignore[arg-type]


def refused(**values: object) -> str:
    """The message, for exactly one wrong field."""
    (name,) = values
    with pytest.raises(InvalidRequestError) as caught:
        request(**values)
    assert isinstance(caught.value, ValueError)
    assert caught.value.param == name
    message = str(caught.value)
    assert name in message
    assert "\n" not in message
    assert len(message) < 200
    return message


def test_priorities() -> None:
    assert [(p.name, p.value) for p in RequestPriority] == [("LOW", 0), ("NORMAL", 1), ("HIGH", 2)]


def test_a_request_has_its_defaults() -> None:
    made = request()
    assert {field.name: getattr(made, field.name) for field in fields(made)} == DEFAULTS | {
        "request_id": "r",
        "model": "m",
        "prompt": "p",
    }
    assert request().metadata is not made.metadata


def test_the_published_fields_go_by_position() -> None:
    made = InferenceRequest("r", "m", "p", 5, 0.5, 0.25, RequestPriority.HIGH, 2.0, "c", {"k": 1})
    assert (made.max_tokens, made.temperature, made.top_p, made.priority) == (5, 0.5, 0.25, RequestPriority.HIGH)
    assert (made.timeout, made.client_id, made.metadata) == (2.0, "c", {"k": 1})
    with pytest.raises(TypeError):
        InferenceRequest("r", "m", "p", 5, 0.5, 0.25, RequestPriority.HIGH, 2.0, "c", {}, 7)  # type: ignore[call-arg]


@pytest.mark.parametrize(("name", "bounds"), [*INTEGERS.items(), *NUMBERS.items()])
def test_a_number_may_be_its_bounds(name: str, bounds: tuple[float, float]) -> None:
    for value in bounds:
        assert getattr(request(**{name: value}), name) == value


@pytest.mark.parametrize(("name", "bounds"), [*INTEGERS.items(), *NUMBERS.items()])
def test_a_number_beyond_its_bounds_is_refused(name: str, bounds: tuple[float, float]) -> None:
    beyond: Any = 1 if name in INTEGERS else 1e-9
    assert "at least" in refused(**{name: bounds[0] - beyond})
    assert "at most" in refused(**{name: bounds[1] + max(beyond, bounds[1] * 1e-9 if name in NUMBERS else 0)})
    assert "at most" in refused(**{name: 10**400})
    assert "at least" in refused(**{name: -(10**400)})


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_number_bounded_by_another_field(name: str) -> None:
    others, most = DEPENDENT[name]
    for value in (0, most):
        assert getattr(request(**{name: value}, **others), name) == value
    for wrong, says in ((-1, "at least"), (most + 1, "at most"), (10**400, "at most"), (1.0, "must be an integer")):
        with pytest.raises(InvalidRequestError, match=f"^{name} .*{says}") as caught:
            request(**{name: wrong}, **others)
        assert caught.value.param == name


def test_min_tokens_are_at_most_max_tokens() -> None:
    assert request(min_tokens=5, max_tokens=5).min_tokens == 5
    with pytest.raises(InvalidRequestError, match=r"^min_tokens must be at most max_tokens, 5; it is 6$") as caught:
        request(min_tokens=6, max_tokens=5)
    assert caught.value.param == "min_tokens"


def test_top_logprobs_need_logprobs() -> None:
    assert "needs logprobs to be true" in refused(top_logprobs=1)
    assert request(logprobs=True, top_logprobs=20).top_logprobs == 20


@pytest.mark.parametrize("name", [*INTEGERS, *NUMBERS, *DEPENDENT])
def test_what_is_no_number_is_refused(name: str) -> None:
    for value in NOT_NUMBERS if name in NUMBERS else (*NOT_NUMBERS, 1.0, 1.5):
        assert "must be a" in refused(**{name: value})
    if name != "seed":
        refused(**{name: None})


@pytest.mark.parametrize("name", ["ignore_eos", "logprobs"])
def test_a_flag_is_true_or_false(name: str) -> None:
    assert getattr(request(**{name: True}), name) is True
    for value in (1, 0, "true", None):
        assert "must be true or false" in refused(**{name: value})


@pytest.mark.parametrize("name", ["request_id", "model", "prompt", "client_id"])
def test_text_is_text(name: str) -> None:
    for value in (1, b"text", ["text"], SURROGATE):
        refused(**{name: value})
    assert "character 5 is half of a surrogate pair" in refused(**{name: SURROGATE})
    assert getattr(request(**{name: "日本\0\n"}), name) == "日本\0\n"


@pytest.mark.parametrize("name", ["request_id", "model", "client_id"])
def test_names_are_bounded(name: str) -> None:
    for value in LONG:
        assert "at most 256 bytes" in refused(**{name: value})
    for value in ("x" * 256, "é" * 128):
        request(**{name: value})


def test_what_may_be_empty() -> None:
    assert request(model=None).model is None
    assert request(client_id="").client_id == ""
    for name in ("request_id", "model", "prompt"):
        assert "must not be empty" in refused(**{name: ""})
    for name in ("request_id", "prompt", "client_id"):
        refused(**{name: None})


def test_a_long_prompt_is_no_concern_of_the_request() -> None:
    assert len(request(prompt="word " * 100_000).prompt) == 500_000


def test_a_priority_is_one() -> None:
    assert request(priority=RequestPriority.LOW).priority is RequestPriority.LOW
    for value in ("HIGH", 2, None):
        refused(priority=value)


def test_metadata_is_a_dict() -> None:
    assert request(metadata={"k": [1]}).metadata == {"k": [1]}
    wrong: tuple[object, ...] = (None, [], "k")
    for value in wrong:
        refused(metadata=value)


@pytest.mark.parametrize(
    ("given", "kept"),
    [("x", ("x",)), (["a", "b"], ("a", "b")), (("é",), ("é",)), ([], ()), ((), ()), (["x"] * 16, ("x",) * 16)],
)
def test_stop_strings(given: object, kept: tuple[str, ...]) -> None:
    assert request(stop=given).stop == kept


@pytest.mark.parametrize(
    "wrong",
    [
        None,
        1,
        {"a": 1},
        "",
        [""],
        ["a", ""],
        [1],
        [None],
        [["a"]],
        ["x"] * 17,
        SURROGATE,
        [SURROGATE],
        *LONG,
        [LONG[1]],
    ],
)
def test_wrong_stop_strings(wrong: object) -> None:
    refused(stop=wrong)


def test_the_longest_stop_string() -> None:
    assert request(stop="é" * 128).stop == ("é" * 128,)


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ({}, {}),
        ({5: 1.5, 0: -100, 2**31 - 1: 100}, {5: 1.5, 0: -100, 2**31 - 1: 100}),
        ({"5": 1, "0": -2.5}, {5: 1, 0: -2.5}),
        (dict.fromkeys(range(1024), 0), dict.fromkeys(range(1024), 0)),
    ],
)
def test_biases(given: object, kept: dict[int, float]) -> None:
    assert request(logit_bias=given).logit_bias == kept


@pytest.mark.parametrize(
    "wrong",
    [
        *(None, 1, "5", [], [(5, 1)], {1}),
        *(
            {key: 1}
            for key in (-1, "-1", 2**31, str(2**31), 1.0, "1.0", " 1", "a", "", "9" * 400, True, None, SURROGATE)
        ),
        *({5: bias} for bias in (*NOT_NUMBERS, None, 100.5, -100.5, 10**400)),
        {5: 1, "5": 1},
        dict.fromkeys(range(1025), 0),
    ],
)
def test_wrong_biases(wrong: object) -> None:
    refused(logit_bias=wrong)


@pytest.mark.parametrize("given", [[], (), [0, 2**31 - 1], (5,), [1] * 64])
def test_stop_token_ids(given: list[int]) -> None:
    assert request(stop_token_ids=given).stop_token_ids == tuple(given)


@pytest.mark.parametrize(
    "wrong", [None, 1, "1", {1: 1}, {1}, [-1], [2**31], [1.0], ["1"], [True], [None], [[1]], [1] * 65]
)
def test_wrong_stop_token_ids(wrong: object) -> None:
    refused(stop_token_ids=wrong)


@pytest.mark.parametrize("name", ["logit_bias", "stop_token_ids"])
def test_tokens_of_a_vocabulary(name: str) -> None:
    values = {"logit_bias": {9: 1, 3: 2}, "stop_token_ids": [9, 3]}
    check_token_ids(request(), 1)
    check_token_ids(request(**{name: values[name]}), 10)
    message = f"^{name} has token id 9; the model's vocabulary ends with 8$"
    with pytest.raises(InvalidRequestError, match=message) as caught:
        check_token_ids(request(**{name: values[name]}), 9)
    assert caught.value.param == name


def test_a_token() -> None:
    token = StreamToken(" a", 5)
    assert (token.token, token.token_id, token.logprob, token.is_special) == (" a", 5, None, False)
    assert token.top_logprobs is None
    assert token == StreamToken(token=" a", token_id=5, logprob=None, is_special=False)
    with pytest.raises(FrozenInstanceError):
        token.token = "b"  # type: ignore[misc]


def test_a_response() -> None:
    response = InferenceResponse("r", "m", [StreamToken("a", 1)], 1, 2.5)
    assert (response.request_id, response.model, response.total_tokens, response.latency_ms) == ("r", "m", 1, 2.5)
    assert (response.error, response.finish_reason, response.version) == (None, None, "")
    assert (response.usage, response.timings) == (Usage(), Timings())


def test_usage_adds_up() -> None:
    assert Usage(3, 4, 2).total_tokens == 7


@pytest.mark.parametrize(("prompt", "answer"), [(1, 9), (9, 1), (5, 5), (5, 1)])
def test_a_context_that_holds_both(prompt: int, answer: int) -> None:
    check_context(prompt, answer, 10)


@pytest.mark.parametrize(
    ("prompt", "answer", "kind", "param", "code", "says"),
    [
        (0, 1, InvalidRequestError, "prompt", "invalid_value", "no tokens"),
        (10, 1, PromptTooLongError, "prompt", "context_length_exceeded", "at most 9"),
        (11, 1, PromptTooLongError, "prompt", "context_length_exceeded", "has 11 tokens"),
        (9, 2, InvalidRequestError, "max_tokens", "invalid_value", "at most 1 here; it is 2"),
    ],
)
def test_a_context_that_does_not(
    prompt: int, answer: int, kind: type[InvalidRequestError], param: str, code: str, says: str
) -> None:
    with pytest.raises(kind) as caught:
        check_context(prompt, answer, 10)
    assert (caught.value.param, caught.value.code) == (param, code)
    assert says in str(caught.value)


def test_what_messages_show_is_bounded() -> None:
    values: list[object] = [
        "x" * 10**6,
        b"x" * 10**6,
        10**5000,
        -(10**5000),
        [0] * 10**6,
        {"k": "v" * 10**6},
        "\n" * 100,
    ]
    for value in [*values, object(), "\ud800"]:
        assert len(shown(value)) <= 70
        assert "\n" not in shown(value)
