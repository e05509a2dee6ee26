"""Loaders by name: which have one, and what becomes of it."""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable
from pathlib import Path

import callable_models
import pytest

from realtime_serve.errors import ModelLoadError, UnsupportedModelError
from realtime_serve.runners.base import Runner
from realtime_serve.runners.loader import as_runner, import_loader, import_name
from realtime_serve.runners.null import NullRunner


@pytest.mark.parametrize(
    ("loader", "name"),
    [
        (callable_models.doubler, "callable_models:doubler"),
        (callable_models.echo, "callable_models:echo"),
        (callable_models.Doubler, "callable_models:Doubler"),
        (callable_models.Family.load, "callable_models:Family.load"),
        (callable_models.Child.load, "callable_models:Child.load"),
        (callable_models.Family.load_static, "callable_models:Family.load_static"),
    ],
)
def test_what_has_a_name_is_found_by_it(loader: Callable[..., object], name: str) -> None:
    assert import_name(loader) == name
    assert import_loader(name) == loader


@pytest.mark.parametrize(
    "loader",
    [
        callable_models.closure(),
        callable_models.anonymous,
        callable_models.Family().load_bound,
        callable_models.Family(),
        functools.partial(callable_models.doubler),
    ],
)
def test_what_has_none(loader: Callable[..., object]) -> None:
    assert import_name(loader) is None


def test_the_main_scripts_have_none(monkeypatch: pytest.MonkeyPatch) -> None:
    main = types.ModuleType("__main__")
    exec("def load(config): ...\nclass Model:\n    @classmethod\n    def load(cls, config): ...", main.__dict__)
    monkeypatch.setitem(sys.modules, "__main__", main)
    assert import_name(main.load) is None
    assert import_name(main.Model.load) is None


def test_a_name_that_stands_for_another_one_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = callable_models.doubler
    monkeypatch.setattr(callable_models, "doubler", lambda config: None)
    assert import_name(loader) is None
    monkeypatch.delattr(callable_models, "doubler")
    assert import_name(loader) is None
    monkeypatch.undo()
    assert import_name(loader) is not None
    monkeypatch.delitem(sys.modules, "callable_models")
    assert import_name(loader) is None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("doubler", "a loader is named as module:function; 'doubler' is not"),
        (":doubler", "named as module:function"),
        ("callable_models:", "named as module:function"),
        ("no_such_module:x", "importing no_such_module failed: ModuleNotFoundError: No module named 'no_such_module'"),
        (".relative:x", "importing .relative failed: TypeError"),
        ("callable_models:nothing", "callable_models has no nothing"),
        ("callable_models:Family.nothing", "callable_models has no Family.nothing"),
        ("callable_models:NOT_CALLABLE", "is a int, which cannot be called"),
    ],
)
def test_names_that_stand_for_nothing(name: str, message: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        import_loader(name)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("code", "message"),
    [("1 / 0", "ZeroDivisionError"), ("import sys; sys.exit(3)", "SystemExit: 3"), ("def", "SyntaxError")],
)
def test_modules_that_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, message: str) -> None:
    (tmp_path / "failing_module.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModelLoadError, match=f"importing failing_module failed: {message}"):
        import_loader("failing_module:load")


def test_runners() -> None:
    runner = NullRunner(max_context=8, max_batch_size=1)
    assert as_runner(runner) is runner
    with pytest.raises(UnsupportedModelError) as caught:
        as_runner(callable_models.with_step(None))
    needed = [name for name in vars(Runner) if not name.startswith("_") and name != "step"]
    assert all(name in str(caught.value) for name in needed)
