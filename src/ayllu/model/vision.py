"""The image tower: tiles of pixels to rows that the decoder reads like token embeddings (spec 6).

patches + class token -> transformer with 2-D rotary positions -> pixel shuffle -> adapter -> projector.

Legend: N tiles, C channels, P patches per tile, D tower width, d head_dim, R rows per tile after the shuffle.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ayllu.model.config import VisionConfig
from ayllu.model.layers import LayerNorm, Linear
from ayllu.model.rope import rotate


def vision_angles(config: VisionConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin [P + 1, 1, d / 2] in float32: half of the pairs turn with the column, half with the row,
    both counted from 1; the class token, last, does not turn."""
    quarter = config.head_dim // 4
    steps = torch.arange(quarter, device=device, dtype=torch.float32)
    frequencies = config.rope_theta ** (-4 * steps / config.head_dim)
    patch = torch.arange(config.grid**2, device=device)
    column, row = patch % config.grid + 1, patch // config.grid + 1
    angles = torch.cat((column[:, None] * frequencies, row[:, None] * frequencies), dim=-1)
    angles = F.pad(angles, (0, 0, 0, 1))
    return angles.cos().unsqueeze(1), angles.sin().unsqueeze(1)


def pixel_shuffle(x: Tensor, grid: int, block: int) -> Tensor:
    """Fold each square of patches into one row: [N, grid^2, D] -> [N, (grid/block)^2, block^2 D].

    Channel order: row within the block, column within the block, channel.
    """
    tiles, _, width = x.shape
    side = grid // block
    squares = x.view(tiles, side, block, side, block, width).permute(0, 1, 3, 2, 4, 5)
    return squares.reshape(tiles, side * side, block * block * width)


class VisionAttention(nn.Module):
    """Full attention within one tile."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (
            project(x).unflatten(-1, (-1, self.head_dim))
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *angles, "interleaved"), rotate(k, *angles, "interleaved")
        out = F.scaled_dot_product_attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return self.o_proj(out.transpose(1, 2).flatten(-2))


class VisionMLP(nn.Module):
    """Two layers with a GELU between, at every patch [N, P, D] on its own."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class VisionBlock(nn.Module):
    """Attention, then the MLP, each normalised before and added to its input [N, P, D]."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.attention = VisionAttention(config)
        self.mlp_norm = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor]) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles)
        return x + self.mlp(self.mlp_norm(x))


class VisionTower(nn.Module):
    """Pixels [N, C, size, size] -> patch features [N, P, D]. Each tile is a sequence of its own."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        patch_values = config.num_channels * config.patch_size**2
        self.patch_embedding = Linear(patch_values, config.hidden_size, bias=False)
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.position_embedding = nn.Parameter(torch.empty(config.grid**2 + 1, config.hidden_size))
        self.norm_before = LayerNorm(config.hidden_size, eps=config.norm_eps)
        self.blocks = nn.ModuleList(VisionBlock(config) for _ in range(config.num_hidden_layers))
        self.norm_after = LayerNorm(config.hidden_size, eps=config.norm_eps)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        patches = F.unfold(pixels_NCHW, self.config.patch_size, stride=self.config.patch_size).transpose(1, 2)
        x = self.patch_embedding(patches)
        # The class token stands last: its row of the position table is the last one too.
        x = torch.cat((x, self.class_embedding.expand(x.shape[0], 1, -1)), dim=1)
        x = self.norm_before(x + self.position_embedding)
        angles = vision_angles(self.config, x.device)
        for block in self.blocks:
            x = block(x, angles)
        return self.norm_after(x)[:, :-1]


class VisionAdapter(nn.Module):
    """Two layers, an activation after each of them."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size * config.shuffle**2, config.adapter_hidden_size, bias=False)
        self.fc2 = Linear(config.adapter_hidden_size, config.adapter_output_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.fc2(F.gelu(self.fc1(x))))


class VisionModel(nn.Module):
    """Pixels [N, C, size, size], normalised to [-1, 1] -> decoder rows [N, R, decoder width]."""

    def __init__(self, config: VisionConfig, decoder_width: int) -> None:
        super().__init__()
        self.config = config
        self.tower = VisionTower(config)
        self.adapter = VisionAdapter(config)
        self.projector = Linear(config.adapter_output_size, decoder_width, bias=False)

    def forward(self, pixels_NCHW: Tensor) -> Tensor:
        patches = self.tower(pixels_NCHW.to(self.projector.weight.dtype))
        return self.projector(self.adapter(pixel_shuffle(patches, self.config.grid, self.config.shuffle)))
