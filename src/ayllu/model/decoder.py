"""The decoder: Llama 2/3, SmolLM2, Qwen2 and Llama 4 are one network whose config says what each layer does.

It takes tokens (or embedded rows, where images have been fused in) with their absolute positions and an
`Attend` that owns whatever the layers remember. No cache, no files, no devices, no sampling here.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ayllu.errors import UsageError
from ayllu.model.attention import Attend, Attention, RMSNorm
from ayllu.model.config import ModelConfig
from ayllu.model.feed_forward import MixtureFeedForward, SwiGLU
from ayllu.model.layers import Embedding, Linear
from ayllu.model.rope import rope_angles
from ayllu.model.rope_frequencies import rope_frequencies
from ayllu.model.vision import VisionModel


class DecoderLayer(nn.Module):
    """Norm, attention, residual; norm, feed-forward, residual (spec 2)."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.attention = Attention(config, index)
        self.feed_forward_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward: nn.Module
        if config.layers[index].experts and config.experts is not None:
            self.feed_forward = MixtureFeedForward(config.experts, config.hidden_size)
        else:
            self.feed_forward = SwiGLU(config.hidden_size, config.intermediate_size)

    def forward(self, x: Tensor, positions: Tensor, angles: tuple[Tensor, Tensor], attend: Attend) -> Tensor:
        x = x + self.attention(self.attention_norm(x), positions, angles, attend)
        return x + self.feed_forward(self.feed_forward_norm(x))


class Decoder(nn.Module):
    """The whole network of one `ModelConfig`.

    Leading axes are free: [batch, sequence] for training, [tokens] for an engine that packs requests. The
    same axes run through embeddings, positions, and the q, k, v that `attend` receives.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision = VisionModel(config.vision, config.hidden_size) if config.vision else None
        self.embed_tokens: nn.Module = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, bias=False)
        )
        self._frequencies = rope_frequencies(config.rope, config.head_dim)

    def forward(self, embeddings: Tensor, positions: Tensor, attend: Attend) -> Tensor:
        """Embedded rows [*B, D] at absolute positions [*B] -> normalised hidden states [*B, D]."""
        x = embeddings
        frequencies = torch.tensor(self._frequencies, dtype=torch.float32, device=x.device)
        angles = rope_angles(positions, frequencies)
        for layer in self.layers:
            x = layer(x, positions, angles, attend)
        return self.norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits, float32 [*B, vocab_size], of hidden states [*B, D]."""
        if self.lm_head is not None:
            return self.lm_head(hidden).float()
        return F.linear(hidden, cast(Embedding, self.embed_tokens).weight).float()

    def embed(self, tokens: Tensor, image_rows: Tensor | None = None) -> Tensor:
        """Embedded rows [*B, D] of token ids [*B], with image rows [n, D] in place of the patch tokens.

        Early fusion: the k-th patch token, in reading order, becomes the k-th image row (spec 6.3). Raises
        UsageError when their numbers differ.
        """
        embedded = self.embed_tokens(tokens)
        if image_rows is None:
            return embedded
        if self.config.vision is None:
            raise UsageError("This model reads no images.", "Choose a model with a vision tower.")
        patches = tokens == self.config.vision.patch_token_id
        count = int(patches.sum())
        if count != image_rows.shape[0]:
            raise UsageError(
                f"The prompt has {count} image patch tokens but {image_rows.shape[0]} image rows.",
                "Render the prompt and its images together.",
            )
        return embedded.masked_scatter(patches.unsqueeze(-1), image_rows.to(embedded.dtype))

    def image_rows(self, pixels: Tensor) -> Tensor:
        """Rows [tiles * tokens_per_tile, D] for image tiles [tiles, C, size, size] in reading order."""
        if self.vision is None:
            raise UsageError("This model reads no images.", "Choose a model with a vision tower.")
        return self.vision(pixels).flatten(0, 1)


@torch.no_grad()
def random_decoder(
    config: ModelConfig, seed: int, *, std: float = 0.02, dtype: torch.dtype = torch.float32
) -> Decoder:
    """A decoder with reproducible random weights on the CPU: normal matrices, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.device("meta"):
        decoder = Decoder(config)
    decoder.to_empty(device="cpu").to(dtype)
    for name, parameter in decoder.named_parameters():
        if "norm" in name and name.endswith(".weight"):
            parameter.uniform_(0.5, 1.5, generator=generator)
        else:
            parameter.normal_(0.0, std, generator=generator)
    return decoder.eval()
