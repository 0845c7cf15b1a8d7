"""What a network of this family looks like, as plain data. Needs no torch.

One `ModelConfig` describes Llama 2/3, SmolLM2, Qwen2 and Llama 4: it says for every layer whether it
rotates, how far it sees and whether it has experts. The counts (parameters, FLOPs, cache bytes) stand
beside the architecture they count, so that planning never needs the weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ayllu.errors import UnsupportedError

RopeLayout = Literal["interleaved", "half"]
"""Which two dimensions of a head turn together: (2j, 2j+1), as Meta and GGUF's llama store them, or
(j, j + head_dim/2), as Hugging Face stores Llama 2/3 and everybody stores Qwen2."""

MAX_LAYERS = 1024
MAX_WIDTH = 1 << 20
MAX_VOCAB = 1 << 24
MAX_EXPERTS = 4096
MAX_CONTEXT = 1 << 31


def _require(condition: bool, problem: str) -> None:
    if not condition:
        raise UnsupportedError(f"Model config: {problem}.", "Check the model's config; it may be damaged.")


def _require_size(name: str, value: object, largest: int, smallest: int = 1) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest
    _require(ok, f"{name} must be a whole number from {smallest} to {largest}, not {str(value)[:40]}")


def _require_real(name: str, value: object, largest: float) -> None:
    ok = isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= largest
    _require(ok, f"{name} must be a positive number up to {largest:g}, not {str(value)[:40]}")


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's frequency scaling: long wavelengths are divided by `factor`, short ones kept, a band between
    the two is blended. Llama 4 Scout sets both frequency factors to 1: no band at all (spec 4.1)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    def __post_init__(self) -> None:
        _require_real("rope factor", self.factor, 1e6)
        _require_real("rope low_freq_factor", self.low_freq_factor, 1e6)
        _require_real("rope high_freq_factor", self.high_freq_factor, 1e6)
        _require_size(
            "rope original_max_position_embeddings", self.original_max_position_embeddings, MAX_CONTEXT
        )
        _require(
            self.low_freq_factor <= self.high_freq_factor,
            f"rope low_freq_factor {self.low_freq_factor} exceeds high_freq_factor {self.high_freq_factor}",
        )


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """Rotary embedding. `divisors`, one per pair, stand for a scaling that a file stores as plain numbers."""

    theta: float = 10_000.0
    layout: RopeLayout = "half"
    scaling: RopeScaling | None = None
    divisors: tuple[float, ...] | None = None

    def __post_init__(self) -> None:
        _require_real("rope theta", self.theta, 1e15)
        _require(self.layout in ("interleaved", "half"), f"rope layout {str(self.layout)[:40]!r} is unknown")
        _require(self.scaling is None or self.divisors is None, "rope has both a scaling rule and divisors")
        for divisor in self.divisors or ():
            _require_real("rope divisor", divisor, 1e6)


@dataclass(frozen=True, kw_only=True)
class AttentionTemperature:
    """Llama 4's sharpening of queries on layers without rotation (spec 3.2)."""

    floor_scale: float = 8192.0
    attn_scale: float = 0.1

    def __post_init__(self) -> None:
        _require_real("attention floor_scale", self.floor_scale, MAX_CONTEXT)
        _require_real("attention attn_scale", self.attn_scale, 1e3)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """A mixture-of-experts feed-forward: `top_k` of `num_experts` routed SwiGLUs, plus one shared."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int

    def __post_init__(self) -> None:
        _require_size("num_experts", self.num_experts, MAX_EXPERTS)
        _require_size("experts per token", self.top_k, self.num_experts)
        _require_size("expert intermediate_size", self.intermediate_size, MAX_WIDTH)
        _require_size("shared expert intermediate_size", self.shared_intermediate_size, MAX_WIDTH)


@dataclass(frozen=True, kw_only=True)
class LayerSpec:
    """What one decoder layer does.

    rotates: queries and keys get rotary positions. chunk: the layer sees only keys of the same block of
    `chunk` positions (None: all earlier ones). experts: the feed-forward is a mixture.
    """

    rotates: bool = True
    chunk: int | None = None
    experts: bool = False


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """The image tower, its adapter and the projection into the decoder (spec 6).

    One image tile of `image_size` squared gives `tokens_per_tile` rows of the decoder's width.
    """

    hidden_size: int = 1408
    num_hidden_layers: int = 34
    num_attention_heads: int = 16
    intermediate_size: int = 5632
    image_size: int = 336
    patch_size: int = 14
    num_channels: int = 3
    shuffle: int = 2
    adapter_hidden_size: int = 4096
    adapter_output_size: int = 4096
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5
    patch_token_id: int = 200_092

    def __post_init__(self) -> None:
        _require_size("vision hidden_size", self.hidden_size, MAX_WIDTH)
        _require_size("vision num_hidden_layers", self.num_hidden_layers, MAX_LAYERS)
        _require_size("vision num_attention_heads", self.num_attention_heads, self.hidden_size)
        _require_size("vision intermediate_size", self.intermediate_size, MAX_WIDTH)
        _require_size("vision image_size", self.image_size, 1 << 14)
        _require_size("vision patch_size", self.patch_size, self.image_size)
        _require_size("vision num_channels", self.num_channels, 64)
        _require_size("vision adapter width", self.adapter_hidden_size, MAX_WIDTH)
        _require_size("vision adapter output width", self.adapter_output_size, MAX_WIDTH)
        _require_size("vision patch token id", self.patch_token_id, MAX_VOCAB, smallest=0)
        _require_real("vision rope theta", self.rope_theta, 1e15)
        _require_real("vision norm eps", self.norm_eps, 1.0)
        _require_size("vision shuffle", self.shuffle, self.image_size)
        _require(
            self.hidden_size % (4 * self.num_attention_heads) == 0, "vision head width is not a multiple of 4"
        )
        _require(self.image_size % self.patch_size == 0, "vision image_size is not a multiple of patch_size")
        _require(self.grid % self.shuffle == 0, "vision patch grid is not a multiple of the shuffle block")

    @property
    def grid(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def tokens_per_tile(self) -> int:
        """Rows one tile contributes to the decoder's input."""
        return (self.grid // self.shuffle) ** 2

    @property
    def tower_parameters(self) -> int:
        d, f = self.hidden_size, self.intermediate_size
        embeddings = self.num_channels * self.patch_size**2 * d + d + (self.grid**2 + 1) * d
        block = 4 * (d * d + d) + (d * f + f) + (f * d + d) + 4 * d
        return embeddings + self.num_hidden_layers * block + 4 * d

    @property
    def adapter_parameters(self) -> int:
        shuffled = self.hidden_size * self.shuffle**2
        return shuffled * self.adapter_hidden_size + self.adapter_hidden_size * self.adapter_output_size


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """A decoder of the Llama family, with or without experts, with or without an image tower.

    Raises UnsupportedError when the sizes contradict each other or are beyond any real model.
    """

    architecture: Literal["llama", "qwen2", "llama4"]
    vocab_size: int
    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int
    layers: tuple[LayerSpec, ...]
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope: RopeConfig = RopeConfig()
    qkv_bias: bool = False
    qk_norm: bool = False
    temperature: AttentionTemperature | None = None
    experts: ExpertsConfig | None = None
    tie_word_embeddings: bool = False
    vision: VisionConfig | None = None

    def __post_init__(self) -> None:
        _require(
            self.architecture in ("llama", "qwen2", "llama4"),
            f"architecture {str(self.architecture)[:40]!r} is unknown",
        )
        _require_size("vocab_size", self.vocab_size, MAX_VOCAB)
        _require_size("hidden_size", self.hidden_size, MAX_WIDTH)
        _require_size("num_attention_heads", self.num_attention_heads, 1 << 14)
        _require_size("num_key_value_heads", self.num_key_value_heads, self.num_attention_heads)
        _require_size("head_dim", self.head_dim, 1 << 14, smallest=2)
        _require_size("intermediate_size", self.intermediate_size, MAX_WIDTH)
        _require_size("max_position_embeddings", self.max_position_embeddings, MAX_CONTEXT)
        _require_size("number of layers", len(self.layers), MAX_LAYERS)
        _require_real("rms_norm_eps", self.rms_norm_eps, 1.0)
        _require(self.head_dim % 2 == 0, f"head_dim {self.head_dim} is odd")
        _require(
            self.num_attention_heads % self.num_key_value_heads == 0,
            f"{self.num_attention_heads} heads cannot share {self.num_key_value_heads} key-value heads",
        )
        for layer in self.layers:
            if layer.chunk is not None:
                _require_size("attention chunk size", layer.chunk, MAX_CONTEXT)
            _require(
                not layer.experts or self.experts is not None, "a layer has experts but none are described"
            )
        divisors = self.rope.divisors
        _require(
            divisors is None or len(divisors) == self.head_dim // 2,
            f"{len(divisors or ())} rope divisors for {self.head_dim // 2} pairs",
        )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def expert_layers(self) -> tuple[int, ...]:
        """Indexes of the layers whose feed-forward is a mixture."""
        return tuple(index for index, layer in enumerate(self.layers) if layer.experts)

    @property
    def attention_parameters(self) -> int:
        """Parameters of one layer's attention."""
        heads, groups = self.num_attention_heads * self.head_dim, self.num_key_value_heads * self.head_dim
        return 2 * self.hidden_size * (heads + groups) + self._attention_biases

    @property
    def _attention_biases(self) -> int:
        if not self.qkv_bias:
            return 0
        return (self.num_attention_heads + 2 * self.num_key_value_heads) * self.head_dim

    @property
    def expert_parameters(self) -> int:
        """Parameters of one routed expert (0 without experts)."""
        return 3 * self.hidden_size * self.experts.intermediate_size if self.experts else 0

    def _feed_forward_parameters(self, layer: LayerSpec, routed: int) -> int:
        if not layer.experts or self.experts is None:
            return 3 * self.hidden_size * self.intermediate_size
        shared = 3 * self.hidden_size * self.experts.shared_intermediate_size
        return routed * self.expert_parameters + shared + self.hidden_size * self.experts.num_experts

    def _text_parameters(self, routed: int) -> int:
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        blocks = sum(
            self.attention_parameters + 2 * self.hidden_size + self._feed_forward_parameters(layer, routed)
            for layer in self.layers
        )
        return embeddings + blocks + self.hidden_size

    @cached_property
    def text_parameters(self) -> int:
        """Parameters of the decoder with its embeddings, without the image tower."""
        return self._text_parameters(self.experts.num_experts if self.experts else 0)

    @property
    def vision_parameters(self) -> int:
        """Parameters of image tower, adapter and projector (0 without images)."""
        if self.vision is None:
            return 0
        projector = self.vision.adapter_output_size * self.hidden_size
        return self.vision.tower_parameters + self.vision.adapter_parameters + projector

    @property
    def parameters(self) -> int:
        """All parameters, as the modules on the meta device count them."""
        return self.text_parameters + self.vision_parameters

    @cached_property
    def active_parameters(self) -> int:
        """Parameters a text token meets: `top_k` experts per mixture, both embedding tables counted."""
        return self._text_parameters(self.experts.top_k if self.experts else 0)

    def kv_bytes(self, tokens: int, bytes_per_value: int = 2) -> int:
        """Cache bytes of one sequence of `tokens`: chunked layers never hold more than one chunk."""
        per_token = 2 * self.num_key_value_heads * self.head_dim * bytes_per_value
        held = sum(tokens if layer.chunk is None else min(tokens, layer.chunk) for layer in self.layers)
        return per_token * held

    @property
    def kv_bytes_per_token(self) -> int:
        """bf16 cache bytes that one more token costs for good: the layers that see everything."""
        return (
            2
            * self.num_key_value_heads
            * self.head_dim
            * 2
            * sum(layer.chunk is None for layer in self.layers)
        )

    def flops_per_token(self, context: int = 0) -> int:
        """Forward FLOPs of one token at position `context`: 2 per multiply-add of every matrix the token
        meets (the embedding is a lookup) and of its attention over the keys each layer sees."""
        lookup = 0 if self.tie_word_embeddings else self.vocab_size * self.hidden_size
        norms = (2 * self.num_hidden_layers + 1) * self.hidden_size
        biases = self.num_hidden_layers * self._attention_biases
        matrices = 2 * (self.active_parameters - lookup - norms - biases)
        seen = sum(context + 1 if layer.chunk is None else context % layer.chunk + 1 for layer in self.layers)
        return matrices + 4 * self.num_attention_heads * self.head_dim * seen
