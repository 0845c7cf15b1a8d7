"""Grouped-query attention that asks for its context instead of keeping it.

The layer computes queries, keys and values; the caller's `Attend` answers with the weighted values. Training,
the engine's cache and the tests each pass their own, and the network stays pure mathematics.

Legend: B leading axes (batch and sequence, or tokens alone), S queries, T keys, H query heads, G key-value
heads, D width, d head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ayllu.model.config import AttentionTemperature, LayerSpec, ModelConfig
from ayllu.model.layers import Linear
from ayllu.model.rope import rotate


class Attend(Protocol):
    """What a caller passes to the decoder: it sees all queries and keys, so it can cache, mask and batch."""

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q [*B, H, d], k and v [*B, G, d] of one layer -> softmax(q k / sqrt(d)) v, [*B, H, d]."""


def visible(query_positions: Tensor, key_positions: Tensor, chunk: int | None) -> Tensor:
    """Which keys each query may see, bool [*, S, T], from absolute positions [*, S] and [*, T].

    Earlier or the same position; with `chunk`, also the same block of `chunk` positions (spec 3.1: blocks
    with fixed borders, not a sliding window). Negative positions are padding: seen by nobody.
    """
    query, key = query_positions.unsqueeze(-1), key_positions.unsqueeze(-2)
    seen = (key <= query) & (key >= 0)
    if chunk is not None:
        seen = seen & (query // chunk == key // chunk)
    return seen


def attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor) -> Tensor:
    """q [B, S, H, d], k and v [B, T, G, d], seen [B or 1, S, T] -> [B, S, H, d]."""
    out = F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen.unsqueeze(1), enable_gqa=True
    )
    return out.transpose(1, 2)


class WholeSequence:
    """The obvious `Attend`: every sequence is here in full, nothing is cached. For training and tests.

    positions [batch, sequence]; padding has position -1.
    """

    def __init__(self, layers: Sequence[LayerSpec], positions: Tensor) -> None:
        # A padded query sees everything: its result is thrown away, but it must stay finite.
        padded = (positions < 0).unsqueeze(-1)
        chunks = {layer.chunk for layer in layers}
        masks = {chunk: visible(positions, positions, chunk) | padded for chunk in chunks}
        self._masks = [masks[layer.chunk] for layer in layers]

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(q, k, v, self._masks[layer])


def rms_normalise(x: Tensor, eps: float) -> Tensor:
    """x divided by its root mean square over the last axis; float32 inside, x's dtype outside."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


class RMSNorm(nn.Module):
    """RMS normalisation with a learned weight, applied after the cast back as the reference does (spec 2)."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_normalise(x, self.eps) * self.weight


def attention_temperature(positions: Tensor, temperature: AttentionTemperature) -> Tensor:
    """Query scale at absolute positions [*B], float32 (spec 3.2): 1 + a ln(floor((p + 1) / f) + 1)."""
    steps = torch.floor((positions.float() + 1) / temperature.floor_scale)
    return 1 + temperature.attn_scale * torch.log(steps.clamp(min=0) + 1)


class Attention(nn.Module):
    """One layer's attention. Order of steps: spec 3."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.index = index
        self.spec = config.layers[index]
        self.head_dim = config.head_dim
        self.layout = config.rope.layout
        self.norm_eps = config.rms_norm_eps if config.qk_norm and self.spec.rotates else None
        self.temperature = None if self.spec.rotates else config.temperature
        width, bias = config.hidden_size, config.qkv_bias
        queries = config.num_attention_heads * config.head_dim
        keys = config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(width, queries, bias=bias)
        self.k_proj = Linear(width, keys, bias=bias)
        self.v_proj = Linear(width, keys, bias=bias)
        self.o_proj = Linear(queries, width, bias=False)

    def forward(
        self, x_BD: Tensor, positions_B: Tensor, angles: tuple[Tensor, Tensor], attend: Attend
    ) -> Tensor:
        q_BHd = self.q_proj(x_BD).unflatten(-1, (-1, self.head_dim))
        k_BGd = self.k_proj(x_BD).unflatten(-1, (-1, self.head_dim))
        v_BGd = self.v_proj(x_BD).unflatten(-1, (-1, self.head_dim))
        if self.spec.rotates:
            q_BHd = rotate(q_BHd, *angles, self.layout)
            k_BGd = rotate(k_BGd, *angles, self.layout)
        if self.norm_eps is not None:
            q_BHd = rms_normalise(q_BHd, self.norm_eps)
            k_BGd = rms_normalise(k_BGd, self.norm_eps)
        if self.temperature is not None:
            scale_B = attention_temperature(positions_B, self.temperature)
            q_BHd = (q_BHd * scale_B[..., None, None]).to(q_BHd.dtype)
        out_BHd = attend(self.index, q_BHd, k_BGd, v_BGd)
        return self.o_proj(out_BHd.flatten(-2))
