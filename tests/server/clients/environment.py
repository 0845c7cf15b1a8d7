"""The clients' own environment: made on first use, by one process at a time, and again when its pins change.

It lies inside the environment that runs the tests, in the folder `clients`. `python -m
tests.server.clients.environment` makes it and says where its interpreter is.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

HERE = Path(__file__).parent
REQUIREMENTS = HERE / "requirements.txt"
FOLDER = Path(sys.prefix) / "clients"
OFFLINE = {
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "LANGSMITH_TRACING": "false",
    "NO_PROXY": "*",
}


def clients_python(folder: Path = FOLDER) -> Path:
    """The interpreter of the environment, which is made if need be (half a minute).

    Raises RuntimeError with pip's words where a client cannot be installed.
    """
    python = folder / "bin" / "python"
    ready = folder / "ready"
    wanted = hashlib.sha256(REQUIREMENTS.read_bytes() + sys.version.encode()).hexdigest()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):
        if ready.is_file() and ready.read_text(encoding="utf-8") == wanted:
            return python
        shutil.rmtree(folder, ignore_errors=True)
        _run(sys.executable, "-m", "venv", "--without-pip", str(folder))
        # No resolver: the pins are what one found. No bytecode: most of these files are never run.
        _run(
            *(sys.executable, "-m", "pip", "--python", str(python), "install", "--requirement"),
            *(str(REQUIREMENTS), "--no-deps", "--no-compile", "--only-binary", ":all:", "--quiet"),
            "--disable-pip-version-check",
        )
        ready.write_text(wanted, encoding="utf-8")
    return python


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")


def run_job(
    name: str, home: Path, environment: dict[str, str], *checks: str, timeout_s: float = 1800
) -> dict[str, Any]:
    """What a job told: its checks that passed, with their seconds, and those that failed, with why.

    home: a folder for what the clients write. Raises AssertionError for a job that told nothing.
    """
    python = clients_python()
    home.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [str(python), str(HERE / f"{name}_job.py"), *checks],
        # Nothing of ours: no proxy, no keys, and bytecode is kept, as the clients are long to compile.
        env={"PATH": os.defpath, "HOME": str(home), "TMPDIR": str(home), **OFFLINE, **environment},
        cwd=home,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout_s,
    )
    start = done.stdout.find('{\n "job"')
    if start < 0:
        raise AssertionError(
            f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
        )
    told: dict[str, Any] = json.loads(done.stdout[start:])
    told["said"] = done.stderr[-4000:]
    return told


if __name__ == "__main__":
    print(clients_python())
