"""Matrices in 4 or 8 bits: how they are packed, what they stand for, and a product with one.

Three kinds. int4: groups of 32 or 128 columns share a scale and, if asked for, a minimum. int8: a group or a
whole row shares a scale. fp8: e4m3 numbers, one scale per row. Activations stay in their own precision. Slow
twin of `kernels.triton.linear`.

Legend: E leading axes (a stack of experts, or none), N outputs, K inputs, X activation rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ayllu.errors import UnsupportedError

Kind = Literal["int4", "int8", "fp8"]

UNIT = 32
"""int4 columns packed together: byte j of a unit holds column j (low half) and column j + 16 (high half), as
GGUF's Q4_0 and Q4_1 do. A kernel then multiplies two half tiles and never shuffles."""

E4M3_LARGEST = 448.0
"""Largest number of float8 e4m3 (OCP 8-bit floating point specification, table 1)."""


@dataclass(frozen=True)
class PackedMatrix:
    """A matrix [*E, N, K], or a stack of them, in 4 or 8 bits.

    values: int4 uint8 [*E, N, K / 2]; int8 [*E, N, K]; fp8 as uint8 [*E, N, K]. scale and minimum
    [*E, N, K / group], bfloat16 for int4 and float32 otherwise. A number stands for scale * value + minimum;
    int4 without a minimum for scale * (value - 8).
    """

    kind: Kind
    values: Tensor
    scale: Tensor
    minimum: Tensor | None
    group: int

    @property
    def shape(self) -> tuple[int, ...]:
        """[*E, N, K]"""
        *leading, columns = self.values.shape
        return (*leading, columns * 2 if self.kind == "int4" else columns)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.values, self.scale, self.minimum) if t is not None)

    def to(self, device: torch.device) -> PackedMatrix:
        """The same on another device."""
        minimum = None if self.minimum is None else self.minimum.to(device)
        return replace(self, values=self.values.to(device), scale=self.scale.to(device), minimum=minimum)


def pack(matrix: Tensor, kind: Kind, *, group: int | None = None, with_minimum: bool = False) -> PackedMatrix:
    """Round a float matrix [*E, N, K] to `kind`.

    group: columns that share a scale, a multiple of 32 (int8 and fp8: or the whole row); None is 32 for int4
    and the whole row otherwise. Raises UnsupportedError for numbers that are not finite and for a K that is
    not whole groups.
    """
    columns = matrix.shape[-1]
    size = group or (UNIT if kind == "int4" else columns)
    whole_row = size == columns and kind != "int4"
    if columns % size or not (whole_row or (size % UNIT == 0 and kind != "fp8")):
        raise UnsupportedError(
            f"A matrix of {columns} columns cannot be {kind} in groups of {size}.",
            "Use a multiple of 32 that divides it (int8, fp8: or the whole row), or keep bfloat16.",
        )
    if with_minimum and kind != "int4":
        raise UnsupportedError(f"{kind} takes no minimum.", "Use int4, or none.")
    if not matrix.isfinite().all():
        raise UnsupportedError("A matrix with infinities or NaN cannot be packed.", "Check the weights.")
    grouped = matrix.float().unflatten(-1, (-1, size))
    if kind == "fp8":
        return _pack_fp8(grouped, size)
    if kind == "int8":
        return _pack_int8(grouped, size)
    return _pack_int4_with_minimum(grouped, size) if with_minimum else _pack_int4(grouped, size)


def unpack(packed: PackedMatrix) -> Tensor:
    """The float32 matrix [*E, N, K] that `packed` stands for."""
    if packed.kind == "int4":
        units = packed.values.unflatten(-1, (-1, UNIT // 2))
        numbers = torch.cat((units & 15, units >> 4), -1).flatten(-2).float()
        numbers = numbers if packed.minimum is not None else numbers - 8
    elif packed.kind == "int8":
        numbers = packed.values.float()
    else:
        numbers = packed.values.view(torch.float8_e4m3fn).float()
    grouped: Tensor = numbers.unflatten(-1, (-1, packed.group)) * packed.scale.float().unsqueeze(-1)
    if packed.minimum is not None:
        grouped = grouped + packed.minimum.float().unsqueeze(-1)
    return grouped.flatten(-2)


def packed_linear(x_XK: Tensor, packed: PackedMatrix, bias: Tensor | None = None) -> Tensor:
    """x W' + bias, [*X, N]. The weights are rounded to x's precision before they are multiplied."""
    return F.linear(x_XK, unpack(packed).to(x_XK.dtype), bias)


def _steps(grouped: Tensor, scale: Tensor) -> Tensor:
    """Numbers in units of their group's scale, whole; a group of zeros has scale 0 and gives zeros."""
    steps: Tensor = grouped / scale.masked_fill(scale == 0, 1).unsqueeze(-1)
    return steps.round()


def _pack_int4(grouped: Tensor, size: int) -> PackedMatrix:
    # The number of largest magnitude becomes -8, whatever its sign: all 16 values are used.
    place = grouped.abs().argmax(-1, keepdim=True)
    scale = (grouped.gather(-1, place).squeeze(-1) / -8).bfloat16()
    numbers = (_steps(grouped, scale.float()) + 8).clamp(0, 15).to(torch.uint8)
    return PackedMatrix("int4", _nibbles(numbers), scale, None, size)


def _pack_int4_with_minimum(grouped: Tensor, size: int) -> PackedMatrix:
    minimum = grouped.amin(-1).bfloat16()
    above = grouped - minimum.float().unsqueeze(-1)
    scale = (above.amax(-1).clamp(min=0) / 15).bfloat16()
    numbers = _steps(above, scale.float()).clamp(0, 15).to(torch.uint8)
    return PackedMatrix("int4", _nibbles(numbers), scale, minimum, size)


def _nibbles(numbers: Tensor) -> Tensor:
    """Numbers 0 to 15 [*, K / group, group] -> bytes [*, K / 2] in the order of `UNIT`."""
    low, high = numbers.flatten(-2).unflatten(-1, (-1, 2, UNIT // 2)).unbind(-2)
    packed: Tensor = low | high << 4
    return packed.flatten(-2).contiguous()


def _pack_int8(grouped: Tensor, size: int) -> PackedMatrix:
    scale = grouped.abs().amax(-1) / 127
    numbers = _steps(grouped, scale).clamp(-127, 127).to(torch.int8)
    return PackedMatrix("int8", numbers.flatten(-2).contiguous(), scale, None, size)


def _pack_fp8(grouped: Tensor, size: int) -> PackedMatrix:
    scale = grouped.abs().amax(-1) / E4M3_LARGEST
    shrunk = grouped / scale.masked_fill(scale == 0, 1).unsqueeze(-1)
    numbers = shrunk.clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
    return PackedMatrix("fp8", numbers.flatten(-2).contiguous().view(torch.uint8), scale, None, size)
