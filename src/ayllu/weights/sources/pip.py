"""Fetching one wheel with the person's own pip, as a subprocess: their index, proxy and certificates apply.

`pip download --no-deps --only-binary=:all:` never runs code of the package: no setup script, no build.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from ayllu.errors import NoSpaceError, SourceError, clip
from ayllu.weights.sources.base import Limits

_POLL_S = 0.1


def download_wheel(requirement: str, staging: Path, limits: Limits, advance: Callable[[int], None]) -> Path:
    """Download exactly `requirement` (`name==version`) as a wheel into `staging`, an empty folder.

    Calls `advance` with bytes as they land. Raises SourceError with pip's own reason in one line.
    """
    if importlib.util.find_spec("pip") is None:
        raise SourceError(
            f"{requirement} comes from a package index, which needs pip, and this Python has none.",
            f"Install it: {sys.executable} -m ensurepip",
        )
    temporary = staging / "tmp"
    temporary.mkdir()
    log = staging / "pip.log"
    command = [sys.executable, "-m", "pip", "download", requirement, "--no-deps", "--only-binary=:all:"]
    command += ["--dest", str(staging), "--no-cache-dir", "--no-input", "--progress-bar", "off"]
    command += ["--disable-pip-version-check", "--no-color"]
    environment = os.environ | {"TMPDIR": str(temporary), "TEMP": str(temporary), "TMP": str(temporary)}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, env=environment
        )
        try:
            stalled, reported = _watch(process, staging, limits.pip_stall_s, advance)
        finally:
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
    if stalled:
        raise SourceError(
            f"pip brought nothing of {requirement} for {limits.pip_stall_s:.0f} s.", "Pull again later."
        )
    wheels = list(staging.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        _raise_reason(requirement, log)
    advance(wheels[0].stat().st_size - reported)
    return wheels[0]


def _watch(
    process: subprocess.Popen[bytes], staging: Path, stall_s: float, advance: Callable[[int], None]
) -> tuple[bool, int]:
    """Wait for pip while reporting growth of `staging`. Returns (stalled, bytes reported)."""
    reported = 0
    last_growth = time.monotonic()
    while True:
        try:
            process.wait(_POLL_S)
        except subprocess.TimeoutExpired:
            size = _size_of_tree(staging)
            if size > reported:
                advance(size - reported)
                reported, last_growth = size, time.monotonic()
            elif time.monotonic() - last_growth > stall_s:
                return True, reported
        else:
            return False, reported


def _size_of_tree(folder: Path) -> int:
    """Bytes of wheels in `folder` now. Files and folders vanish while pip works, which is no error."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with contextlib.suppress(OSError):
                    total += (Path(parent) / name).stat().st_size
    return total


def _raise_reason(requirement: str, log: Path) -> NoReturn:
    text = log.read_bytes()[-20_000:].decode("utf-8", "replace")
    lines = [line.removeprefix("ERROR: ").strip() for line in text.splitlines() if line.startswith("ERROR:")]
    reason = _without_credentials(lines[-1] if lines else (text.strip().splitlines() or ["no output"])[-1])
    if "No space left" in text:
        raise NoSpaceError(
            f"pip ran out of disk space fetching {requirement}.", "Free some space, then pull again."
        )
    raise SourceError(
        f"pip could not download {requirement}: {clip(reason, 200).rstrip('.')}.", "Check pip's index."
    )


def _without_credentials(text: str) -> str:
    return re.sub(r"//[^/@\s]+@", "//***@", text)
