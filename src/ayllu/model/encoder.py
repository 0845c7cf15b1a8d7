"""The encoder: tokens of whole texts to one hidden state each, every token seeing every other of its text.

BERT's network (Devlin et al. 2018, arXiv:1810.04805, section 3): three embeddings added, then attention and
MLP, each added to its input and normalised after. How hidden states become one vector is the caller's choice.

Legend: N texts, S positions (the shorter texts padded at their end), D width, H heads, d head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ayllu.model.encoder_config import EncoderConfig
from ayllu.model.layers import Embedding, LayerNorm, Linear


def padding_mask(lengths_N: Tensor, positions: int) -> Tensor:
    """True where a text has a token, bool [N, S]: the first `lengths_N` of `positions` places."""
    return torch.arange(positions, device=lengths_N.device) < lengths_N.unsqueeze(1)


class EncoderAttention(nn.Module):
    """Full attention within each text."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.q_proj = Linear(config.hidden_size, config.hidden_size)
        self.k_proj = Linear(config.hidden_size, config.hidden_size)
        self.v_proj = Linear(config.hidden_size, config.hidden_size)
        self.o_proj = Linear(config.hidden_size, config.hidden_size)

    def forward(self, x_NSD: Tensor, seen_NS: Tensor) -> Tensor:
        q_NHSd, k_NHSd, v_NHSd = (
            project(x_NSD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        out_NHSd = F.scaled_dot_product_attention(q_NHSd, k_NHSd, v_NHSd, attn_mask=seen_NS[:, None, None])
        return self.o_proj(out_NHSd.transpose(1, 2).flatten(-2))


class EncoderMLP(nn.Module):
    """Two layers with a GELU between, at every position on its own."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class EncoderLayer(nn.Module):
    """Attention, then the MLP, each added to its input and normalised after (post-LN)."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = EncoderAttention(config)
        self.attention_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = EncoderMLP(config)
        self.mlp_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, x_NSD: Tensor, seen_NS: Tensor) -> Tensor:
        x_NSD = self.attention_norm(x_NSD + self.attention(x_NSD, seen_NS))
        return self.mlp_norm(x_NSD + self.mlp(x_NSD))


class Encoder(nn.Module):
    """The whole network of one `EncoderConfig`."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embed_positions = Embedding(config.max_position_embeddings, config.hidden_size)
        self.embed_types = Embedding(config.type_vocab_size, config.hidden_size)
        self.embed_norm = LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.num_hidden_layers))

    def forward(self, tokens_NS: Tensor, lengths_N: Tensor, types_NS: Tensor | None = None) -> Tensor:
        """Token ids and the length of each text (at least 1) -> hidden states [N, S, D].

        What stands behind a text's length may be any id: nobody sees it, and its own states mean nothing.
        types_NS tells the two texts of a pair apart (0 and 1); a single text is all 0.
        """
        seen_NS = padding_mask(lengths_N, tokens_NS.shape[1])
        positions_S = torch.arange(tokens_NS.shape[1], device=tokens_NS.device)
        types_NS = torch.zeros_like(tokens_NS) if types_NS is None else types_NS
        x_NSD = self.embed_tokens(tokens_NS) + self.embed_types(types_NS) + self.embed_positions(positions_S)
        x_NSD = self.embed_norm(x_NSD)
        for layer in self.layers:
            x_NSD = layer(x_NSD, seen_NS)
        return x_NSD
