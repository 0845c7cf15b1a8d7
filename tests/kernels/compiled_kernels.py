"""Compiles every Triton kernel for real GPUs without one, and prints what the assembler says of each as JSON.

Run in a process of its own, where Triton is not interpreted: python -m tests.kernels.compiled_kernels 80 90.
The wrappers run on meta tensors of real sizes; what they would have launched is compiled instead.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ayllu.kernels.reference.packed import PackedMatrix
from ayllu.kernels.reference.paged_attention import Pieces
from ayllu.kernels.triton import grouped_experts, heads, linear, paged_attention, rms_norm

TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64",
    torch.uint8: "*u8", torch.int8: "*i8",
}  # fmt: skip
LAUNCH_OPTIONS = ("num_warps", "num_stages")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Recorder:
    """Stands where a kernel stands and notes what would be launched."""

    def __init__(self, kernel: Any, launches: list[tuple[Any, tuple, dict[str, Any]]]) -> None:
        self.kernel, self.launches = kernel, launches

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args, **options: self.launches.append((self.kernel, args, options))


def compiled(kernel: Any, args: tuple, options: dict[str, Any], capability: int) -> dict[str, Any]:
    """Registers, stack and shared memory of one launch on one kind of GPU."""
    launch = {key: options[key] for key in LAUNCH_OPTIONS if key in options}
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = args[place] if place < len(args) else options[name]
        if place >= len(args):
            signature[name], constants[(place,)] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            # PyTorch's allocations are aligned: Triton counts on 16 bytes.
            signature[name], attributes[(place,)] = TYPES[value.dtype], [["tt.divisibility", 16]]
        elif value == 1 and isinstance(value, int):
            # As at a launch: a whole number that is 1 becomes part of the kernel.
            signature[name], constants[(place,)] = "constexpr", value
        else:
            signature[name] = "fp32" if isinstance(value, float) else "i32"
    source = ASTSource(kernel, signature=signature, constexprs=constants, attrs=attributes)
    result = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(result.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", file.name], check=True, capture_output=True, text=True
        ).stdout
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "registers": int(re.search(r"REG:(\d+)", said)[1]),
        "stack_bytes": int(re.search(r"STACK:(\d+)", said)[1]),
        "shared_bytes": result.metadata.shared,
    }


def packed(kind: str, *shape: int, group: int, minimum: bool = False) -> PackedMatrix:
    """A packed matrix of that shape, without memory."""
    *leading, columns = shape
    values = torch.empty(
        *leading, columns // 2 if kind == "int4" else columns, device="meta",
        dtype=torch.int8 if kind == "int8" else torch.uint8,
    )  # fmt: skip
    dtype = torch.bfloat16 if kind == "int4" else torch.float32
    scale = torch.empty(*leading, columns // group, dtype=dtype, device="meta")
    return PackedMatrix(kind, values, scale, scale if minimum else None, group)


def launches() -> list[tuple[Any, tuple, dict[str, Any]]]:
    """Launches at the sizes of Llama 3 8B and Scout: decoding one and eight rows, and a prompt piece."""
    noted: list[tuple[Any, tuple, dict[str, Any]]] = []
    for module in (paged_attention, linear, grouped_experts, rms_norm, heads):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            setattr(module, name, Recorder(getattr(module, name), noted))
    kinds = [
        ("int4", 32, False),
        ("int4", 32, True),
        ("int4", 128, False),
        ("int8", 0, False),
        ("fp8", 0, False),
    ]
    for rows in (1, 512):
        x = torch.empty(rows, 4096, dtype=torch.bfloat16, device="meta")
        for kind, group, minimum in kinds:
            linear.packed_linear(x, packed(kind, 4096, 4096, group=group or 4096, minimum=minimum))
        rms_norm.rms_norm(x, x[0], 1e-5)
        heads.silu_product(x, x)
        angles = torch.empty(rows, 64, device="meta")
        heads.rotate_heads(x.view(rows, 32, 128), angles, angles, True, 1e-5)
        _attend(rows)
        _mix(rows)
    return noted


def _attend(rows: int) -> None:
    cache = torch.empty(1 << 15, 8, 128, dtype=torch.bfloat16, device="meta")
    number = torch.empty(1, dtype=torch.int64, device="meta")
    tables = torch.empty(1, 512, dtype=torch.int64, device="meta")
    q = torch.empty(rows, 40, 128, dtype=torch.bfloat16, device="meta")
    pieces = Pieces(number, number, number, tables, rows, 8192)
    splits = 8 if rows == 1 else 1
    paged_attention.paged_attention(q, cache, cache, pieces, 16, torch.empty_like(q), splits=splits)


def _mix(rows: int) -> None:
    x = torch.empty(rows, 5120, dtype=torch.bfloat16, device="meta")
    chosen = torch.empty(rows, 1, dtype=torch.int64, device="meta")
    plain = torch.empty(16, 8192, 5120, dtype=torch.bfloat16, device="meta")
    grouped_experts.grouped_swiglu(x, x[:, :1], chosen, plain, plain, plain.view(16, 5120, 8192))
    up, down = packed("int4", 16, 8192, 5120, group=32), packed("int4", 16, 5120, 8192, group=32)
    grouped_experts.grouped_swiglu(x, x[:, :1], chosen, up, up, down)


def main() -> None:
    noted = launches()
    reports = []
    for capability in map(int, sys.argv[1:]):
        reports += [compiled(*launch, capability) | {"launch": number} for number, launch in enumerate(noted)]
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
