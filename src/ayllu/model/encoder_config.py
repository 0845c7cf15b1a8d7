"""What an encoder of the BERT line looks like, as plain data. Needs no torch.

Encoders read a text whole, every token seeing every other, and serve to turn texts into vectors. BERT itself,
MiniLM, BGE, GTE and E5 (English) are this one network in different sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

from ayllu.model.config import (
    MAX_CONTEXT,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    _require,
    _require_real,
    _require_size,
)
from ayllu.model.parameters import Shapes


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """A BERT-type encoder: learned absolute positions, normalisation after each block, GELU.

    The defaults are BERT's own (Devlin et al. 2018, arXiv:1810.04805). Raises UnsupportedError when the sizes
    contradict each other or are beyond any real model.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12

    def __post_init__(self) -> None:
        _require_size("vocab_size", self.vocab_size, MAX_VOCAB)
        _require_size("hidden_size", self.hidden_size, MAX_WIDTH)
        _require_size("num_hidden_layers", self.num_hidden_layers, MAX_LAYERS)
        _require_size("num_attention_heads", self.num_attention_heads, 1 << 14)
        _require_size("intermediate_size", self.intermediate_size, MAX_WIDTH)
        _require_size("max_position_embeddings", self.max_position_embeddings, MAX_CONTEXT)
        _require_size("type_vocab_size", self.type_vocab_size, MAX_VOCAB)
        _require_real("layer_norm_eps", self.layer_norm_eps, 1.0)
        _require(
            self.hidden_size % self.num_attention_heads == 0,
            f"hidden_size {self.hidden_size} is not a multiple of {self.num_attention_heads} heads",
        )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def parameters(self) -> int:
        """All parameters, as the module counts them: without the pooler, which no embedding is made of."""
        d, f = self.hidden_size, self.intermediate_size
        tables = (self.vocab_size + self.max_position_embeddings + self.type_vocab_size) * d
        layer = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
        return tables + 2 * d + self.num_hidden_layers * layer


def encoder_parameter_shapes(config: EncoderConfig) -> Shapes:
    """Name -> shape of each parameter, in the order of the forward pass. Matrices are [outputs, inputs]."""
    width, hidden = config.hidden_size, config.intermediate_size
    shapes: Shapes = {
        "embed_tokens.weight": (config.vocab_size, width),
        "embed_positions.weight": (config.max_position_embeddings, width),
        "embed_types.weight": (config.type_vocab_size, width),
    }

    def affine(name: str, *shape: int) -> None:
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]

    affine("embed_norm", width)
    for layer in (f"layers.{index}" for index in range(config.num_hidden_layers)):
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            affine(f"{layer}.attention.{name}", width, width)
        affine(f"{layer}.attention_norm", width)
        affine(f"{layer}.mlp.fc1", hidden, width)
        affine(f"{layer}.mlp.fc2", width, hidden)
        affine(f"{layer}.mlp_norm", width)
    return shapes
