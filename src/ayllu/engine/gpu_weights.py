"""A decoder made ready for a GPU: weights in 4 or 8 bits if asked for, and modules that call `ayllu.kernels`.

Modules are exchanged one after the other, so a checkpoint that is mapped from its file travels to the GPU
matrix by matrix and is never there twice. Embeddings, norms, routers and the image tower stay as they are; an
int4 model's head gets int8, because errors there reach every token directly. This module says what is packed;
how is `kernels.reference.packed`'s affair.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn

from ayllu.errors import UsageError, did_you_mean
from ayllu.kernels.reference.grouped_experts import Stack
from ayllu.kernels.reference.packed import Kind, PackedMatrix, pack
from ayllu.kernels.registry import kernels_for
from ayllu.model.attention import Attend, Attention, RMSNorm
from ayllu.model.config import ModelConfig
from ayllu.model.decoder import Decoder
from ayllu.model.feed_forward import Experts, SwiGLU
from ayllu.model.layers import Embedding, Linear
from ayllu.model.parameters import parameter_shapes
from ayllu.progress import SILENT, Progress
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.load import load_decoder, tensor_of


@dataclass(frozen=True)
class PackingPlan:
    """How the layers' matrices and the head are packed."""

    layers: Kind
    head: Kind
    group: int | None = None
    with_minimum: bool = False


PLANS = {
    "int4": PackingPlan("int4", "int8", group=32),
    "int4-128": PackingPlan("int4", "int8", group=128, with_minimum=True),
    "int8": PackingPlan("int8", "int8"),
    "fp8": PackingPlan("fp8", "fp8"),
}
"""What may be asked for. int4 takes 4.5 bits a weight, int4-128 with its minimums 4.25."""


def packing_plan(name: str) -> PackingPlan:
    """The plan of a name. Raises UsageError for an unknown one."""
    if name not in PLANS:
        raise UsageError(
            f"There are no weights {name!r}.{did_you_mean(name, PLANS)}", f"Use {', '.join(PLANS)}."
        )
    return PLANS[name]


class PackedLinear(nn.Module):
    """A Linear whose weights are packed."""

    def __init__(self, packed: PackedMatrix, bias: Tensor | None) -> None:
        super().__init__()
        self.packed = packed
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.out_features, self.in_features = packed.shape

    def forward(self, x: Tensor) -> Tensor:
        return kernels_for(x.device).packed_linear(x, self.packed, self.bias)


class KernelExperts(nn.Module):
    """`model.feed_forward.Experts` through the kernels, its stacks as they are or packed."""

    def __init__(self, gate: Stack, up: Stack, down: Stack) -> None:
        super().__init__()
        self.gate, self.up, self.down = gate, up, down

    def grouped(self, x_TD: Tensor, scores_TK: Tensor, chosen_TK: Tensor) -> Tensor:
        """As `Experts.grouped`."""
        kernels = kernels_for(x_TD.device)
        return kernels.grouped_swiglu(x_TD, scores_TK, chosen_TK, self.gate, self.up, self.down)


class KernelNorm(nn.Module):
    """`model.attention.RMSNorm` in one launch."""

    def __init__(self, norm: RMSNorm) -> None:
        super().__init__()
        self.weight, self.eps = norm.weight, norm.eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels_for(x.device).rms_norm(x, self.weight, self.eps)


class KernelRotatingAttention(nn.Module):
    """`model.attention.Attention` of a layer that rotates: turning (and normalising) a head is one launch."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        assert attention.spec.rotates and attention.temperature is None
        self.index, self.head_dim = attention.index, attention.head_dim
        self.interleaved = attention.layout == "interleaved"
        self.norm_eps = attention.norm_eps
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.o_proj = attention.v_proj, attention.o_proj

    def forward(self, x: Tensor, positions: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        """As `Attention.forward`."""
        q, k, v = (
            projection(x).unflatten(-1, (-1, self.head_dim))
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        turn = kernels_for(x.device).rotate_heads
        cos, sin = (part.squeeze(-2) for part in angles)
        q = turn(q, cos, sin, self.interleaved, self.norm_eps)
        k = turn(k, cos, sin, self.interleaved, self.norm_eps)
        out: Tensor = self.o_proj(attend(self.index, q, k, v).flatten(-2))
        return out


class KernelSwiGLU(nn.Module):
    """`model.feed_forward.SwiGLU` with its product in one launch."""

    def __init__(self, swiglu: SwiGLU) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = swiglu.gate_proj, swiglu.up_proj
        self.down_proj = swiglu.down_proj

    def forward(self, x: Tensor) -> Tensor:
        product = kernels_for(x.device).silu_product(self.gate_proj(x), self.up_proj(x))
        out: Tensor = self.down_proj(product)
        return out


def load_for_gpu(
    checkpoint: Checkpoint,
    *,
    device: torch.device,
    dtype: torch.dtype,
    weights: str | None,
    progress: Progress = SILENT,
) -> Decoder:
    """The checkpoint's network on a GPU, in evaluation mode. weights: a name of `PLANS`, or None for `dtype`.

    Raises UsageError for an unknown name or another device, UnsupportedError for weights that are not finite.
    """
    plan = None if weights is None else packing_plan(weights)
    if device.type != "cuda":
        raise UsageError(
            "Packed weights need a CUDA device.", "Use --device cuda, or leave the weights as is."
        )
    if device.index is not None:
        # Triton launches on the current device, whatever its arguments are on.
        torch.cuda.set_device(device)
    if plan is None:
        return prepare(load_decoder(checkpoint, device=device, dtype=dtype, progress=progress), device, None)
    decoder = load_decoder(checkpoint, device="cpu", dtype=dtype, progress=progress)
    if not isinstance(decoder.embed_tokens, nn.Embedding):
        # It stayed in the file, which a graph cannot read from.
        rows = tensor_of(checkpoint.tensors["embed_tokens.weight"].decode()).to(device, dtype)
        with torch.device("meta"):
            decoder.embed_tokens = Embedding(*rows.shape)
        decoder.embed_tokens.weight = nn.Parameter(rows, requires_grad=False)
    return prepare(decoder, device, plan)


@torch.no_grad()
def prepare(decoder: Decoder, device: torch.device, plan: PackingPlan | None) -> Decoder:
    """The same decoder on `device`, packed as planned, with modules that use the kernels."""

    def exchanged(name: str, module: nn.Module) -> nn.Module | None:
        if isinstance(module, RMSNorm):
            return KernelNorm(module)
        if isinstance(module, Experts):
            stacks = (module.gate_proj, module.up_proj, module.down_proj)
            return KernelExperts(*(_stack(stack, plan, device) for stack in stacks))
        if not isinstance(module, Linear) or name == "router" or plan is None:
            return None
        packed = _packed(module.weight, plan.head if name == "lm_head" else plan.layers, plan, device)
        bias = None if module.bias is None else module.bias.detach().to(device)
        return None if packed is None else PackedLinear(packed, bias)

    exchange_modules(decoder, exchanged)
    exchange_modules(decoder, with_fused_steps)
    decoder.to(device)
    return decoder


def with_fused_steps(name: str, module: nn.Module) -> nn.Module | None:
    """The form of a module that takes fewer launches, around whatever projections it has."""
    if isinstance(module, Attention) and module.spec.rotates:
        return KernelRotatingAttention(module)
    if isinstance(module, SwiGLU):
        return KernelSwiGLU(module)
    return None


def exchange_modules(parent: nn.Module, exchanged: Callable[[str, nn.Module], nn.Module | None]) -> None:
    """Put in place of every module below `parent` what `exchanged` gives for it; the image tower stays."""
    for name, child in list(parent.named_children()):
        if name == "vision":
            continue
        new = exchanged(name, child)
        if new is None:
            exchange_modules(child, exchanged)
        else:
            setattr(parent, name, new)


def _packed(matrix: Tensor, kind: Kind, plan: PackingPlan, device: torch.device) -> PackedMatrix | None:
    """A matrix packed on the device; None where its columns are not whole groups: it stays as it is."""
    if kind != "int4":
        return pack(matrix.to(device), kind)
    for group in (plan.group, 32):
        if group is not None and matrix.shape[-1] % group == 0:
            return pack(matrix.to(device), kind, group=group, with_minimum=plan.with_minimum)
    return None


def _stack(stack: Tensor, plan: PackingPlan | None, device: torch.device) -> Stack:
    """Experts packed one at a time: in float32 a whole stack would not fit."""
    parts = [] if plan is None else [_packed(matrix, plan.layers, plan, device) for matrix in stack]
    whole = [part for part in parts if part is not None]
    if not whole:
        return stack.detach().to(device).contiguous()
    first = whole[0]
    minimums = [part.minimum for part in whole if part.minimum is not None]
    return PackedMatrix(
        first.kind,
        torch.stack([part.values for part in whole]),
        torch.stack([part.scale for part in whole]),
        torch.stack(minimums) if minimums else None,
        first.group,
    )


def packed_bytes(config: ModelConfig, plan: PackingPlan, bytes_per_value: int) -> int:
    """Bytes of all weights packed as planned, from the config alone: what a memory plan reckons with."""
    total = 0
    for name, shape in parameter_shapes(config).items():
        if name.startswith("vision.") or not _is_packed(name):
            total += prod(shape) * bytes_per_value
        else:
            kind = plan.head if name.startswith("lm_head") else plan.layers
            total += _matrix_bytes(shape, kind, plan, bytes_per_value)
    return total


def _is_packed(name: str) -> bool:
    return name == "lm_head.weight" or name.removesuffix(".weight").endswith("_proj")


def _matrix_bytes(shape: tuple[int, ...], kind: Kind, plan: PackingPlan, bytes_per_value: int) -> int:
    """As `_packed` packs it, or leaves it."""
    columns = shape[-1]
    if kind != "int4":
        return prod(shape) + 4 * prod(shape[:-1])
    group = next((size for size in (plan.group, 32) if size is not None and columns % size == 0), None)
    if group is None:
        return bytes_per_value * prod(shape)
    return prod(shape) // 2 + prod(shape) // group * (4 if plan.with_minimum else 2)
