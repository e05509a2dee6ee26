"""The layout's rules: which module may import which, what an import loads, and what stays out of the core."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "realtime_serve"

# Lowest first. A module imports only from lines above its own, or from its own.
LAYERS = (
    ("_version", "_core", "errors", "types"),
    ("checkpoints", "config", "devices", "extras", "machine"),
    ("batch", "hub", "installer", "payload", "randomness", "tokenizer", "runners"),
    ("_pump",),
    ("engine",),
    ("front_tokenizer", "stream"),
    ("models",),
    ("middleware", "telemetry"),
    ("service",),
    ("http",),
    ("server",),
    ("__init__",),
    ("loadtest",),
    ("cli",),
    ("__main__",),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
MODULES = sorted(path for path in PACKAGE.rglob("*.py"))


def _unit(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(path: Path) -> set[str]:
    """The package's own modules that a file imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "realtime_serve":
            parts = node.module.split(".")
            found.update([parts[1]] if len(parts) > 1 else [alias.name for alias in node.names])
        elif isinstance(node, ast.Import):
            found.update(a.name.split(".")[1] for a in node.names if a.name.startswith("realtime_serve."))
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_downward(path: Path) -> None:
    unit = _unit(path)
    upward = {name for name in _imports(path) if name in LEVEL and LEVEL[name] > LEVEL[unit]}
    sideways = {name for name in _imports(path) if name in LEVEL and name != unit and LEVEL[name] == LEVEL[unit]}
    assert not upward, f"{unit} imports {sorted(upward)}, which lie above it"
    assert not sideways or LEVEL[unit] in (0, 1, 2), f"{unit} imports {sorted(sideways)} beside it"


def _packages(requirements: list[str]) -> set[str]:
    """By the names that they are imported by."""
    return {re.split(r"[^\w-]", requirement)[0].replace("-", "_") for requirement in requirements}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_imported_is_installed(path: Path) -> None:
    """Without the extra [torch] too, but for the torch engine."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    installed = _packages(project["dependencies"])
    if path.is_relative_to(PACKAGE / "runners" / "torch_lm"):
        installed |= _packages(project["optional-dependencies"]["torch"])
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            imported.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            imported.update(alias.name.split(".")[0] for alias in node.names)
    assert imported - sys.stdlib_module_names - {"realtime_serve"} <= installed


def test_every_module_has_a_layer() -> None:
    assert {_unit(path) for path in MODULES} <= set(LEVEL)


@pytest.mark.parametrize("module", ["realtime_serve", "realtime_serve.cli", "realtime_serve.server"])
def test_importing_the_package_is_light(module: str) -> None:
    heavy = "torch transformers aiohttp tokenizers uvloop numpy"
    code = f"import sys, {module}; print([m for m in '{heavy}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    "path",
    sorted([*(ROOT / "csrc/include").rglob("*.hpp"), *(ROOT / "csrc/src").rglob("*.cpp")]),
    ids=lambda path: path.name,
)
def test_the_core_knows_neither_python_nor_torch(path: Path) -> None:
    includes = re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text())
    assert not [name for name in includes if re.match(r"(Python|pybind11|torch|ATen|c10)\b", name)]
    assert all(
        name.startswith("rts/")
        for name in includes
        if name.endswith((".hpp", ".h")) and "/" in name and not name.startswith(("sys/", "linux/", "netinet/"))
    )


def test_only_agreed_top_level_entries() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    agreed = {"pyproject.toml", "CMakeLists.txt", "CMakePresets.json", "csrc", "realtime_serve", "tests", "benchmarks"}
    agreed |= {"README.md", "LICENSE", "CHANGELOG.md"}
    entries = {line.split("/")[0] for line in tracked.splitlines()}
    assert {entry for entry in entries if not entry.startswith(".")} <= agreed
