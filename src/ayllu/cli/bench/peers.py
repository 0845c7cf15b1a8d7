"""Who takes part: ayllu, and every other program installed here. Who is absent is named, with the reason.

A Python package counts as installed where ayllu's own interpreter finds it, or one given with --peer-python:
several of these packages cannot live in one environment. llama.cpp's programs are looked for on PATH, or in
the folder given with --llama-cpp.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ayllu.errors import UsageError, did_you_mean

RUNNERS = Path(__file__).parent / "runners"
OURS = "ayllu"
PROGRAMS = ("llama-bench", "llama-completion", "llama-server")
PROBE = """
import importlib.metadata, importlib.util, json, sys
found = {}
for module, package in json.loads(sys.argv[1]):
    try:
        if importlib.util.find_spec(module):
            found[module] = importlib.metadata.version(package)
    except (ImportError, importlib.metadata.PackageNotFoundError):
        pass
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Contender:
    """One program that takes part. `single` and `clients` start its runner for one request at a time and for
    several (empty: it cannot). model: the file it opens, where that is not everybody's. precision: what it
    computes with, the file's own ('file') or 'bfloat16'."""

    name: str
    version: str
    single: tuple[str, ...]
    clients: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    precision: str = "file"
    model: Path | None = None


@dataclass(frozen=True)
class Absent:
    """A program that does not take part, or one that failed in the middle, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class _Package:
    """A peer that is a Python package. reads_folders: it opens Hugging Face folders; all open GGUF files."""

    module: str
    package: str
    runner: tuple[str, ...]
    serves: bool = False
    reads_folders: bool = False
    precision: str = "file"


PACKAGES = {
    "llama-cpp-python": _Package("llama_cpp", "llama-cpp-python", ("run_llama_cpp_python.py",)),
    "xllamacpp": _Package("xllamacpp", "xllamacpp", ("run_llama_server.py", "xllamacpp"), serves=True),
    "openvino-genai": _Package("openvino_genai", "openvino-genai", ("run_openvino_genai.py",)),
    "transformers": _Package(
        "transformers", "transformers", ("run_transformers.py",), reads_folders=True, precision="bfloat16"
    ),
}
LLAMA_CPP = "llama.cpp"
PEERS = (LLAMA_CPP, *PACKAGES)


def require_known(names: Sequence[str]) -> None:
    """Raises UsageError for a name that is no peer."""
    for name in names:
        if name not in PEERS:
            raise UsageError(
                f"There is no peer {name!r}.{did_you_mean(name, PEERS)}",
                f"Choose from {', '.join(PEERS)}, or 'none'.",
            )


def ourselves(version: str) -> Contender:
    """Ayllu as a contender."""
    command = (sys.executable, str(RUNNERS / "run_ayllu.py"))
    return Contender(OURS, version, command, command)


def find_peers(
    names: Sequence[str],
    model: Path,
    *,
    interpreters: Sequence[Path] = (),
    llama_cpp: Path | None = None,
    other_files: Sequence[Path] = (),
    probe: Callable[[Path], dict[str, str]] | None = None,
) -> tuple[list[Contender], list[Absent]]:
    """The peers of these names that are here and can open this model, and the others with the reason.

    other_files: the same model in other formats, with which llama.cpp takes part once more each.
    Raises UsageError for a name that is no peer or an interpreter that does not run.
    """
    require_known(names)
    probe = probe or packages_of
    found = [(path, probe(path)) for path in (Path(sys.executable), *interpreters)]
    present: list[Contender] = []
    absent: list[Absent] = []
    for name in names:
        if model.is_dir() and not (name in PACKAGES and PACKAGES[name].reads_folders):
            peer: Contender | Absent = Absent(name, "opens GGUF files, not folders")
        elif name in PACKAGES:
            peer = _package_peer(name, PACKAGES[name], found)
        else:
            peer = _programs_peer(name, llama_cpp)
        if isinstance(peer, Contender):
            present.append(peer)
            if name == LLAMA_CPP:
                present += [replace(peer, name=f"{name} {file.stem}", model=file) for file in other_files]
        else:
            absent.append(peer)
    return present, absent


def packages_of(interpreter: Path) -> dict[str, str]:
    """Module -> version of the peers' packages that an interpreter can import.

    Raises UsageError when it does not run.
    """
    wanted = json.dumps([(package.module, package.package) for package in PACKAGES.values()])
    try:
        output = subprocess.run(
            [str(interpreter), "-c", PROBE, wanted],
            capture_output=True, text=True, check=True, stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.CalledProcessError) as error:
        raise UsageError(
            f"{interpreter} does not run as a Python interpreter: {error}.", "Check --peer-python."
        ) from None
    found: dict[str, str] = json.loads(output.stdout)
    return found


def _package_peer(
    name: str, package: _Package, found: Sequence[tuple[Path, dict[str, str]]]
) -> Contender | Absent:
    for interpreter, modules in found:
        if package.module in modules:
            script, *arguments = package.runner
            command = (str(interpreter), str(RUNNERS / script), *arguments)
            return Contender(
                name,
                modules[package.module],
                command,
                command if package.serves else (),
                precision=package.precision,
            )
    return Absent(
        name,
        f"not installed; pip install {package.package}, here or where --peer-python points",
    )


def _programs_peer(name: str, folder: Path | None) -> Contender | Absent:
    if folder is None:
        on_path = shutil.which(PROGRAMS[0])
        if on_path is None:
            return Absent(name, f"no {PROGRAMS[0]} on PATH; name its folder with --llama-cpp")
        folder = Path(on_path).parent
    missing = [program for program in PROGRAMS if not os.access(folder / program, os.X_OK)]
    if missing:
        return Absent(name, f"{folder} has no {', '.join(missing)}")
    return Contender(
        name,
        _llama_version(folder),
        (sys.executable, str(RUNNERS / "run_llama_programs.py")),
        (sys.executable, str(RUNNERS / "run_llama_server.py")),
        {"AYLLU_BENCH_LLAMA_CPP": str(folder)},
    )


def _llama_version(folder: Path) -> str:
    output = subprocess.run(
        [str(folder / "llama-completion"), "--version"],
        capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    lines = (output.stderr + output.stdout).splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("version")), "unknown")
