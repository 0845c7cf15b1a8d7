"""Compiles the native CPU runner when ayllu is installed from its sources; wheels carry the result.

Each kernel file is compiled once per instruction set, and the program picks one when it starts. In a working
tree: `python hatch_build.py` compiles what has changed.
"""

from __future__ import annotations

import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
NATIVE = ROOT / "src/ayllu/kernels/native"
LIBRARY = NATIVE / {"win32": "ayllu_native.dll", "darwin": "libayllu_native.dylib"}.get(
    sys.platform, "libayllu_native.so"
)
FLAGS = [
    "-std=c++17",
    "-O3",
    "-fPIC",
    "-pthread",
    "-fvisibility=hidden",
    "-fno-strict-aliasing",
    "-fno-math-errno",
    # A product and a sum are fused where the code says so, and nowhere else: all paths give the same bits.
    "-ffp-contract=off",
]
INSTRUCTION_SETS = {"plain": []} | (
    {
        "avx2": ["-mavx2", "-mfma", "-mf16c"],
        "avx512": [
            *("-mavx2", "-mfma", "-mf16c", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"),
            *("-mavx512vnni", "-mavx512bf16", "-mprefer-vector-width=512"),
        ],
    }
    if platform.machine().lower() in ("x86_64", "amd64")
    else {}
)


def compiler() -> list[str]:
    """The C++ compiler. Ends the installation with what to do when there is none."""
    named = os.environ.get("CXX")
    if named:
        return shlex.split(named)
    for name in ("c++", "g++", "clang++"):
        if found := shutil.which(name):
            return [found]
    raise SystemExit(
        "error: ayllu's CPU runner is compiled during installation, and no C++ compiler was found. Install "
        "one (Debian, Ubuntu: apt install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install), "
        "name it in CXX, or set AYLLU_NATIVE=off to install without it (models then run with torch)."
    )


def is_current() -> bool:
    """Whether the library is newer than all it is made from."""
    sources = [*NATIVE.glob("*.cpp"), *NATIVE.glob("*.h"), Path(__file__)]
    return LIBRARY.exists() and LIBRARY.stat().st_mtime >= max(file.stat().st_mtime for file in sources)


def build_library() -> Path:
    """Compile and link; a library that is there stays usable until the new one takes its place."""
    command = compiler()
    with tempfile.TemporaryDirectory() as folder:
        jobs: list[tuple[Path, list[str]]] = []
        for source in sorted(NATIVE.glob("*.cpp")):
            if source.name != "kernels.cpp":
                jobs.append((Path(folder) / f"{source.stem}.o", [*FLAGS, "-c", str(source)]))
                continue
            for name, flags in INSTRUCTION_SETS.items():
                defines = [
                    f"-DAYLLU_ISA={name}",
                    f'-DAYLLU_ISA_NAME="{name}"',
                    f"-DAYLLU_ISA_TABLE=kernels_{name}",
                ]
                jobs.append(
                    (Path(folder) / f"kernels_{name}.o", [*FLAGS, *flags, *defines, "-c", str(source)])
                )

        def run(job: tuple[Path, list[str]]) -> None:
            subprocess.run([*command, *job[1], "-o", str(job[0])], check=True)

        # The longest first, so that none is waited for alone.
        jobs.sort(key=lambda job: "kernels_" not in job[0].name)
        with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
            list(pool.map(run, jobs))
        linked = LIBRARY.with_name(f"{LIBRARY.name}.{os.getpid()}.new")
        objects = [str(output) for output, _ in jobs]
        linux = (
            ["-pthread", "-static-libstdc++", "-static-libgcc"] if sys.platform.startswith("linux") else []
        )
        subprocess.run([*command, "-shared", *linux, *objects, "-o", str(linked)], check=True)
        linked.replace(LIBRARY)
    return LIBRARY


try:
    from hatchling.builders.hooks.plugin.interface import BuildHookInterface
except ImportError:  # run as a script, without hatchling
    pass
else:

    class NativeRunnerHook(BuildHookInterface):  # type: ignore[type-arg]
        """Builds the library before a wheel or an editable installation is made."""

        def initialize(self, version: str, build_data: dict[str, Any]) -> None:
            if self.target_name != "wheel" or os.environ.get("AYLLU_NATIVE", "") == "off":
                return
            if not is_current():
                build_library()
            platform_tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
            build_data["pure_python"] = False
            build_data["tag"] = f"py3-none-{platform_tag}"
            build_data["artifacts"].append(str(LIBRARY.relative_to(ROOT)))


if __name__ == "__main__":
    if is_current():
        print(f"{LIBRARY} is current")
    else:
        print(build_library())
