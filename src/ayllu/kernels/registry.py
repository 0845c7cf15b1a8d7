"""Which implementation of a kernel computes: Triton's on an NVIDIA GPU, the plain one everywhere else.

Callers ask for the set that suits a device and call its members; tests ask for one by name, or put one in
force for a while with `forced`.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Protocol

from ayllu.errors import MissingExtraError, UsageError, did_you_mean

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from ayllu.kernels.reference.grouped_experts import Stack
    from ayllu.kernels.reference.packed import PackedMatrix
    from ayllu.kernels.reference.paged_attention import Pieces

NAMES = ("reference", "triton")


class PagedAttention(Protocol):
    """See `reference.paged_attention.paged_attention`."""

    def __call__(
        self,
        q_RHd: Tensor,
        keys_SGd: Tensor,
        values_SGd: Tensor,
        pieces: Pieces,
        block_tokens: int,
        out_RHd: Tensor,
        /,
    ) -> None: ...


class GroupedSwiGLU(Protocol):
    """See `reference.grouped_experts.grouped_swiglu`."""

    def __call__(
        self,
        x_TD: Tensor,
        scores_TK: Tensor,
        chosen_TK: Tensor,
        gate: Stack,
        up: Stack,
        down: Stack,
        /,
    ) -> Tensor: ...


class PackedLinear(Protocol):
    """See `reference.packed.packed_linear`."""

    def __call__(self, x_XK: Tensor, packed: PackedMatrix, bias: Tensor | None = None, /) -> Tensor: ...


class RMSNorm(Protocol):
    """See `reference.rms_norm.rms_norm`."""

    def __call__(self, x_XD: Tensor, weight_D: Tensor, eps: float, /) -> Tensor: ...


class RotateHeads(Protocol):
    """See `reference.heads.rotate_heads`."""

    def __call__(
        self,
        x_RHd: Tensor,
        cos_RP: Tensor,
        sin_RP: Tensor,
        interleaved: bool,
        norm_eps: float | None,
        /,
    ) -> Tensor: ...


class SiluProduct(Protocol):
    """See `reference.heads.silu_product`."""

    def __call__(self, gate_RF: Tensor, up_RF: Tensor, /) -> Tensor: ...


@dataclass(frozen=True)
class Kernels:
    """One implementation of everything. capturable: it never waits for the device, so that whole steps can be
    recorded in a CUDA graph."""

    name: str
    capturable: bool
    paged_attention: PagedAttention
    grouped_swiglu: GroupedSwiGLU
    packed_linear: PackedLinear
    rms_norm: RMSNorm
    rotate_heads: RotateHeads
    silu_product: SiluProduct


_forced: ContextVar[str | None] = ContextVar("forced kernels", default=None)


def kernels_for(device: torch.device) -> Kernels:
    """What computes best on `device`; Triton's only where Triton is installed."""
    name = _forced.get()
    if name is None:
        name = "triton" if device.type == "cuda" and has_triton() else "reference"
    return kernels_named(name)


@contextmanager
def forced(name: str) -> Iterator[None]:
    """Inside, `kernels_for` gives the set of that name whatever the device."""
    token = _forced.set(kernels_named(name).name)
    try:
        yield
    finally:
        _forced.reset(token)


@cache
def kernels_named(name: str) -> Kernels:
    """The set of a name. Raises UsageError for an unknown one, MissingExtraError where Triton is missing."""
    if name == "reference":
        from ayllu.kernels.reference.grouped_experts import grouped_swiglu
        from ayllu.kernels.reference.heads import rotate_heads, silu_product
        from ayllu.kernels.reference.packed import packed_linear
        from ayllu.kernels.reference.paged_attention import paged_attention
        from ayllu.kernels.reference.rms_norm import rms_norm

        return Kernels(
            name,
            False,
            paged_attention,
            grouped_swiglu,
            packed_linear,
            rms_norm,
            rotate_heads,
            silu_product,
        )
    if name != "triton":
        raise UsageError(
            f"There are no kernels {name!r}.{did_you_mean(name, NAMES)}", f"Use {' or '.join(NAMES)}."
        )
    if not has_triton():
        raise MissingExtraError("Computing with Triton", "gpu")
    from ayllu.kernels.triton import grouped_experts, heads, linear
    from ayllu.kernels.triton import paged_attention as paged
    from ayllu.kernels.triton import rms_norm as norm

    return Kernels(
        name,
        True,
        paged.paged_attention,
        grouped_experts.grouped_swiglu,
        linear.packed_linear,
        norm.rms_norm,
        heads.rotate_heads,
        heads.silu_product,
    )


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None
