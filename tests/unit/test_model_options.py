from typing import Any

import pytest

from realtime_serve.config import ModelConfig
from realtime_serve.engine.language_model import ModelOptions
from realtime_serve.errors import ConfigError


def options(**metadata: Any) -> ModelOptions:
    return ModelOptions(ModelConfig("a", device="cpu", metadata=metadata))


@pytest.mark.parametrize("value", ["4", "4.0", 4, 4.0])
def test_a_number(value: object) -> None:
    assert options(threads=value).number("threads", 1.0) == 4.0
    assert options(threads=value).whole("threads", most=4) == 4
    assert options(threads=value).optional("threads") == 4


def test_what_is_not_given() -> None:
    assert options().number("step_ms", 2.5) == 2.5
    assert options().whole("threads") == 0
    assert options().optional("prefix_cache_mb") is None
    assert options(prefix_cache_mb=0).optional("prefix_cache_mb") == 0
    assert options().choice("engine", ("auto", "native")) == "auto"


@pytest.mark.parametrize(
    ("value", "wrong"),
    [
        ("2.5", "a whole number; it is 2.5"),
        (9, "at most 8; it is 9"),
        ("1e300", "at most 8; it is 1e+300"),
        (-1, "a number, 0 or more; it is -1"),
        ("many", "a number, 0 or more; it is 'many'"),
        ("nan", "a number, 0 or more; it is 'nan'"),
        ("inf", "a number, 0 or more; it is 'inf'"),
        (None, "a number, 0 or more; it is None"),
    ],
)
def test_no_whole_number(value: object, wrong: str) -> None:
    with pytest.raises(ConfigError) as refused:
        options(threads=value).whole("threads", most=8)
    assert str(refused.value) == f"model option threads must be {wrong}"


def test_no_choice() -> None:
    with pytest.raises(ConfigError, match="engine must be one of auto, native; it is 'fast'"):
        options(engine="fast").choice("engine", ("auto", "native"))


def test_others_are_refused() -> None:
    given = options(threads=2, wrong=1)
    given.whole("threads")
    with pytest.raises(ConfigError, match="model 'a' has no option 'wrong'"):
        given.refuse_others()
