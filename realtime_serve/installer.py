"""Fetches a package with the user's own installer, pip or else uv: their index, proxy and certificates hold here too.

Nothing is built, and none of the package's code is run.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

_POLL_S = 0.1
_TERMINATE_S = 5.0
_MAX_REASON_CHARS = 300
_ADVICE = "check the network and the index settings of pip"


class InstallerError(Exception):
    """Why a package did not come, and what to do, in one line."""


def fetch(package: str, folder: Path, on_bytes: Callable[[int], None]) -> None:
    """Leaves the wheel of `package`, or its files unpacked, in `folder`, perhaps beside other files.

    `on_bytes` gets the number of bytes in `folder` some times a second. Raises InstallerError; OSError where the disk
    is full or no process can be started.
    """
    status, output = _run(_pip_command(package, folder), folder, on_bytes)
    if status != 0 and output.rstrip().endswith("No module named pip"):
        status, output = _run(_uv_command(package, folder), folder, on_bytes)
    if status == 0:
        return
    if os.strerror(errno.ENOSPC) in output:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
    raise InstallerError(f"{_reason(output) or f'the installer ended with status {status}'}; {_ADVICE}")


def _pip_command(package: str, folder: Path) -> list[str]:
    # -P: a folder "pip" where the user happens to be is not pip. No cache: the file would be kept twice.
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-cache-dir"]
    options = ["--no-input", "--no-color", "--disable-pip-version-check", "--progress-bar=off"]
    return [*command, *options, "--dest", str(folder), package]


def _uv_command(package: str, folder: Path) -> list[str]:
    import shutil

    uv = shutil.which("uv")
    if uv is None:
        raise InstallerError(
            f"neither is pip in the environment of {sys.executable} nor is uv on the PATH;"
            " 'python -m ensurepip' installs pip"
        )
    # uv cannot download; to install into a folder comes nearest.
    command = [uv, "pip", "install", "--no-deps", "--only-binary=:all:", "--no-cache", "--no-progress"]
    return [*command, "--color=never", "--python", sys.executable, "--target", str(folder), package]


def _run(command: list[str], folder: Path, on_bytes: Callable[[int], None]) -> tuple[int, str]:
    """Exit status and output. The child never outlives this call."""
    # Its temporary files lie in the folder too: on the disk that has the room, and gone with it. What they grow by is
    # the progress, whatever this version prints.
    temporary = folder / "tmp"
    temporary.mkdir(exist_ok=True)
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "TMPDIR": str(temporary)},
        encoding="utf-8",
        errors="replace",
    )
    with child:
        try:
            while True:
                try:
                    output, _ = child.communicate(timeout=_POLL_S)
                    return child.returncode, output
                except subprocess.TimeoutExpired:
                    on_bytes(_bytes_in(folder))
        except BaseException:
            _end(child)
            raise


def _end(child: subprocess.Popen[str]) -> None:
    child.terminate()
    try:
        child.wait(_TERMINATE_S)
    except subprocess.TimeoutExpired:
        child.kill()


def _bytes_in(folder: Path) -> int:
    total = 0
    for parent, _, files in os.walk(folder):
        for file in files:
            with contextlib.suppress(OSError):  # gone meanwhile
                total += os.lstat(os.path.join(parent, file)).st_size
    return total


def _reason(output: str) -> str:
    """What pip's or uv's output gives as the reason of a failure, in one line; empty where it gives none."""
    broken = re.findall(r"connection broken by .*", output)
    if broken:
        # pip's last errors are then about the versions that it did not get to see.
        cause = re.findall(r"\[Errno -?\d+\] ([^'\")]+)", broken[-1])
        return "the package index cannot be reached" + (f" ({cause[-1]})" if cause else "")
    errors = re.findall(r"^(?:ERROR|error): (?!Exception:)(.+)", output, re.MULTILINE)
    raised = re.findall(r"^\w[\w.]*(?:Error|Exception): .+", output, re.MULTILINE)
    causes = re.findall(r"^\s+(?:cause|Caused by): (.+)", output, re.MULTILINE)
    lines = (errors or raised)[-1:] + causes[-1:]
    return ": ".join(line.strip().removesuffix(".") for line in lines)[:_MAX_REASON_CHARS]
