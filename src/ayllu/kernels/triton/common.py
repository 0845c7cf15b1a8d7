"""What the kernels here share: how operands are multiplied, and how many programs fill the device."""

# mypy: disable-error-code="import-untyped,no-untyped-def,untyped-decorator"

from __future__ import annotations

import os

import torch
import triton.language as tl
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"
"""Whether Triton runs kernels in numpy, on the CPU: for tests. Triton reads it when it is imported."""

ASSUMED_MULTIPROCESSORS = 4
"""What the interpreter pretends to have, so that tests of a few rows also split their keys."""

_TYPES = {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """The type in which matrix products take their operands: dtype itself on a GPU. The interpreter cannot
    multiply bfloat16 and gets the same numbers, already rounded, as float32."""
    return tl.float32 if INTERPRETED else _TYPES[dtype]


def multiprocessors(tensor: Tensor) -> int:
    """Multiprocessors of the tensor's device."""
    if not tensor.is_cuda:
        return ASSUMED_MULTIPROCESSORS
    count: int = torch.cuda.get_device_properties(tensor.device).multi_processor_count
    return count


def power_of_two(number: int, least: int, most: int) -> int:
    """The smallest power of two that is at least `number`, within [least, most]."""
    return min(most, max(least, 1 << max(0, number - 1).bit_length()))
