"""What one token costs: bytes of weights read and operations done, from a model's header alone."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ayllu.model.config import ModelConfig
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint

EMBEDDING = "embed_tokens.weight"
BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class TokenCost:
    """weight_bytes: read to decode one token, in the file's own precision. weights: how many numbers that is.
    decode_flops, prefill_flops: 2 per multiply-add of the matrices; attention, which grows with the depth, is
    left out. In prefill the output head works for the last token alone, so it is not counted there."""

    weight_bytes: int
    weights: int
    vocabulary: int
    decode_flops: int
    prefill_flops: int

    def bytes_read(self, precision: str) -> int:
        """Bytes per token of a program that computes in the file's precision ('file') or 'bfloat16'."""
        return self.weight_bytes if precision == "file" else BFLOAT16_BYTES * self.weights


def token_cost(path: Path) -> TokenCost:
    """Costs of a .gguf file or a folder. Raises as `open_checkpoint`."""
    return cost_of(open_checkpoint(path))


def cost_of(checkpoint: Checkpoint) -> TokenCost:
    """Costs of a model that is open."""
    config = checkpoint.config
    weight_bytes = weights = 0
    for name, tensor in checkpoint.tensors.items():
        share = _share_read(name, config)
        weight_bytes += round(share * tensor.nbytes)
        weights += round(share * _product(tensor.shape))
    head = 2 * config.vocab_size * config.hidden_size
    flops = config.flops_per_token()
    return TokenCost(weight_bytes, weights, config.vocab_size, flops, flops - head)


def _share_read(name: str, config: ModelConfig) -> float:
    """The part of a tensor that decoding one token reads."""
    if name.startswith("vision."):
        return 0.0
    if name == EMBEDDING and not config.tie_word_embeddings:
        return 1 / config.vocab_size
    if config.experts is not None and re.search(r"\.experts\.(gate|up|down)_proj$", name):
        return config.experts.top_k / config.experts.num_experts
    return 1.0


def _product(shape: tuple[int, ...]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product
