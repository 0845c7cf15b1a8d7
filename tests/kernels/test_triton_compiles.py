"""Every kernel compiles for real GPUs, at real sizes, and fits: no registers on the stack, and shared memory
that the smallest of them (99 KiB on RTX cards; CUDA C++ Programming Guide, table of compute capabilities)
has. Needs no GPU: Triton brings NVIDIA's assembler. How fast they are only a GPU can tell.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

LEAST_SHARED_BYTES = 99 << 10


def test_kernels_fit_gpus_of_capability_80_and_90(tmp_path: Path) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compiled_kernels", "80", "90"],
        env=os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    reports = json.loads(result.stdout)
    assert {report["kernel"] for report in reports} == {
        "attend_kernel", "linear_kernel", "gate_up_kernel", "down_kernel", "rms_norm_kernel", "merge_kernel",
        "rotate_kernel", "silu_product_kernel",
    }  # fmt: skip
    for report in reports:
        assert report["stack_bytes"] == 0, report
        assert report["shared_bytes"] <= LEAST_SHARED_BYTES, report
