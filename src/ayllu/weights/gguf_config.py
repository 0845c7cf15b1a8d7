"""GGUF metadata and `ModelConfig`, both ways.

llama.cpp hard-codes parts of Llama 4 (chunk of 8192, temperature, QK norm unless there are 128 experts, spec
9.3), so a file says less than a config does. Whatever the standard keys cannot say, ayllu's own files add
under `ayllu.`; other programs ignore those keys.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ayllu.errors import UnsupportedError
from ayllu.model.config import (
    MAX_CONTEXT,
    MAX_EXPERTS,
    MAX_LAYERS,
    MAX_VOCAB,
    MAX_WIDTH,
    AttentionTemperature,
    ExpertsConfig,
    LayerSpec,
    ModelConfig,
    RopeConfig,
    RopeLayout,
    RopeScaling,
)
from ayllu.model.presets import llama4_layers
from ayllu.model.rope_frequencies import rope_frequencies
from ayllu.text_array import TextArray
from ayllu.weights.gguf_metadata import Metadata, described

Architecture = Literal["llama", "qwen2", "llama4"]
ARCHITECTURES: tuple[Architecture, ...] = ("llama", "qwen2", "llama4")

ROPE_LAYOUT: dict[Architecture, RopeLayout] = {
    "llama": "interleaved",
    "qwen2": "half",
    "llama4": "interleaved",
}
"""The order of rotary dimensions that GGUF prescribes for each architecture."""

ROPE_FACTORS = "rope_freqs.weight"
"""Not a parameter: one number per pair of dimensions, by which its frequency is divided."""

LLAMA4_CHUNK = 8192
EXPERTS_WITHOUT_QK_NORM = 128

# Keys of related architectures that change the arithmetic in ways the decoder does not know.
_UNKNOWN_ARITHMETIC = (
    "attention.scale",
    "attention.clamp_kqv",
    "attention.max_alibi_bias",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "router_logit_softcapping",
    "logit_scale",
    "residual_scale",
    "embedding_scale",
    "use_parallel_residual",
)

_OWN_LAYERS = ("ayllu.layers.rotates", "ayllu.layers.chunk", "ayllu.layers.experts")
_OWN_SCALING = "ayllu.rope.scaling."


def architecture_of(metadata: Metadata) -> Architecture:
    """`general.architecture`, if it is one of ours."""
    name = metadata.text("general.architecture")
    for known in ARCHITECTURES:
        if name == known:
            return known
    raise UnsupportedError(
        f"{metadata.path}: the architecture {name[:60]!r} is not known.",
        f"Known: {', '.join(ARCHITECTURES)}.",
    )


def config_from_metadata(
    path: Path,
    values: Mapping[str, Any],
    *,
    embedding_rows: int,
    tied: bool,
    qkv_bias: bool,
    divisors: tuple[float, ...] | None,
) -> ModelConfig:
    """The config a file's metadata describes, completed by what only its tensors tell.

    `divisors` are the numbers of its `rope_freqs.weight`. Raises ModelFileError or UnsupportedError.
    """
    metadata = Metadata(path, values)
    name = architecture_of(metadata)
    count = metadata.integer(f"{name}.block_count", MAX_LAYERS)
    _refuse_what_is_not_known(metadata, name)
    width = metadata.integer(f"{name}.embedding_length", MAX_WIDTH)
    heads = metadata.integer(f"{name}.attention.head_count", 1 << 14)
    head_dim = _head_dim(metadata, name, width, heads)
    experts = _experts(metadata, name)
    config = ModelConfig(
        architecture=name,
        vocab_size=_vocabulary_size(metadata, name, embedding_rows),
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=metadata.integer(f"{name}.attention.head_count_kv", heads, default=heads),
        head_dim=head_dim,
        intermediate_size=metadata.integer(f"{name}.feed_forward_length", MAX_WIDTH),
        layers=_layers(metadata, name, count, experts),
        max_position_embeddings=metadata.integer(f"{name}.context_length", MAX_CONTEXT),
        rms_norm_eps=metadata.real(f"{name}.attention.layer_norm_rms_epsilon"),
        rope=_rope(metadata, name, divisors, head_dim),
        qkv_bias=qkv_bias,
        qk_norm=metadata.flag("ayllu.attention.qk_norm", _usual_qk_norm(name, experts)),
        experts=experts,
        tie_word_embeddings=tied,
    )
    return replace(config, temperature=_temperature(metadata, config))


def _refuse_what_is_not_known(metadata: Metadata, name: Architecture) -> None:
    for key in _UNKNOWN_ARITHMETIC:
        if f"{name}.{key}" in metadata.values:
            raise UnsupportedError(
                f"{metadata.path}: {name}.{key} changes the arithmetic in a way that is not supported.",
                "Use a model of the plain Llama, Qwen2 or Llama 4 kind.",
            )
    parts = metadata.integer("split.count", 1 << 16, smallest=0, default=0)
    if parts > 1:
        raise UnsupportedError(
            f"{metadata.path}: this is one of {parts} parts of a model.",
            "Join the parts first, for example with llama.cpp's `llama-gguf-split --merge`.",
        )
    window, context = f"{name}.attention.sliding_window", f"{name}.context_length"
    if name != "llama4" and window in metadata.values:
        size = metadata.integer(window, MAX_CONTEXT, smallest=0)
        if 0 < size < metadata.integer(context, MAX_CONTEXT):
            raise UnsupportedError(
                f"{metadata.path}: attention through a sliding window of {size} is not supported.",
                "Use a model with full attention.",
            )


def _head_dim(metadata: Metadata, name: Architecture, width: int, heads: int) -> int:
    key = f"{name}.attention.key_length"
    if key not in metadata.values and width % heads:
        metadata.fail(f"{name}.attention.head_count", f"a divisor of {width}", heads)
    head_dim = metadata.integer(key, 1 << 14, smallest=2, default=max(width // heads, 2))
    for other in (f"{name}.attention.value_length", f"{name}.rope.dimension_count"):
        size = metadata.integer(other, 1 << 14, default=head_dim)
        if size != head_dim:
            raise UnsupportedError(
                f"{metadata.path}: {other} is {size}, but heads are {head_dim} wide.",
                "Models that rotate or weigh only a part of each head are not read.",
            )
    return head_dim


def _vocabulary_size(metadata: Metadata, name: Architecture, embedding_rows: int) -> int:
    """The embedding's rows: files may pad them beyond the tokens that have a name, never the reverse."""
    tokens = metadata.values.get("tokenizer.ggml.tokens")
    if tokens is not None and not isinstance(tokens, TextArray | list):
        metadata.fail("tokenizer.ggml.tokens", "an array of texts", described(tokens))
    if tokens is not None and len(tokens) > embedding_rows:
        metadata.fail(
            "tokenizer.ggml.tokens", f"at most {embedding_rows} embeddings", f"{len(tokens)} tokens"
        )
    metadata.integer(f"{name}.vocab_size", embedding_rows, default=embedding_rows)
    if not 0 < embedding_rows <= MAX_VOCAB:
        metadata.fail("token_embd.weight", f"1 to {MAX_VOCAB} rows", embedding_rows)
    return embedding_rows


def _experts(metadata: Metadata, name: Architecture) -> ExpertsConfig | None:
    count = metadata.integer(f"{name}.expert_count", MAX_EXPERTS, smallest=0, default=0)
    if count == 0:
        return None
    if name != "llama4":
        raise UnsupportedError(
            f"{metadata.path}: a {name} model with experts is not supported.", "Known with experts: llama4."
        )
    width = metadata.integer(f"{name}.expert_feed_forward_length", MAX_WIDTH)
    return ExpertsConfig(
        num_experts=count,
        top_k=metadata.integer(f"{name}.expert_used_count", count),
        intermediate_size=width,
        shared_intermediate_size=metadata.integer(
            f"{name}.expert_shared_feed_forward_length", MAX_WIDTH, default=width
        ),
    )


def _sees_everything(metadata: Metadata) -> bool:
    """Whether a Llama 4 file switches chunks off, and with them the layers without rotation (MobileLLM)."""
    window = metadata.integer(
        "llama4.attention.sliding_window", MAX_CONTEXT, smallest=0, default=LLAMA4_CHUNK
    )
    if window not in (0, LLAMA4_CHUNK):
        raise UnsupportedError(
            f"{metadata.path}: a Llama 4 attention window of {window} is not supported.",
            f"llama.cpp knows 0 (none) and {LLAMA4_CHUNK}.",
        )
    return window == 0


def _layers(
    metadata: Metadata, name: Architecture, count: int, experts: ExpertsConfig | None
) -> tuple[LayerSpec, ...]:
    if any(key in metadata.values for key in _OWN_LAYERS):
        rotates, chunks, mixtures = (
            metadata.numbers(key, count, kinds)
            for key, kinds in zip(_OWN_LAYERS, ("b", "u", "b"), strict=True)
        )
        return tuple(
            LayerSpec(rotates=turns, chunk=chunk or None, experts=mixture)
            for turns, chunk, mixture in zip(rotates, chunks, mixtures, strict=True)
        )
    if name != "llama4":
        return (LayerSpec(),) * count
    step = metadata.integer(
        "llama4.interleave_moe_layer_step", MAX_LAYERS, smallest=0, default=1 if experts else 0
    )
    layers = llama4_layers(count, chunk=LLAMA4_CHUNK, expert_step=step if experts else 0)
    if _sees_everything(metadata):
        return tuple(replace(layer, rotates=True, chunk=None) for layer in layers)
    return layers


def _usual_qk_norm(name: Architecture, experts: ExpertsConfig | None) -> bool:
    return name == "llama4" and (experts is None or experts.num_experts != EXPERTS_WITHOUT_QK_NORM)


def _temperature(metadata: Metadata, config: ModelConfig) -> AttentionTemperature | None:
    usual = config.architecture == "llama4" and not all(layer.rotates for layer in config.layers)
    if not metadata.flag("ayllu.attention.temperature", usual):
        return None
    standard = AttentionTemperature()
    return AttentionTemperature(
        floor_scale=metadata.real("ayllu.attention.temperature_floor", standard.floor_scale),
        attn_scale=metadata.real("ayllu.attention.temperature_scale", standard.attn_scale),
    )


def _rope(
    metadata: Metadata, name: Architecture, divisors: tuple[float, ...] | None, head_dim: int
) -> RopeConfig:
    if divisors is not None and len(divisors) != head_dim // 2:
        metadata.fail(ROPE_FACTORS, f"{head_dim // 2} numbers", len(divisors))
    rope = RopeConfig(
        theta=metadata.real(f"{name}.rope.freq_base", 10_000.0),
        layout=ROPE_LAYOUT[name],
        divisors=divisors,
    )
    linear = _linear_factor(metadata, name)
    if linear != 1.0:
        rope = replace(rope, divisors=tuple(linear * by for by in divisors or (1.0,) * (head_dim // 2)))
    if f"{_OWN_SCALING}factor" not in metadata.values:
        return rope
    scaling = RopeScaling(
        factor=metadata.real(f"{_OWN_SCALING}factor"),
        low_freq_factor=metadata.real(f"{_OWN_SCALING}low_freq_factor"),
        high_freq_factor=metadata.real(f"{_OWN_SCALING}high_freq_factor"),
        original_max_position_embeddings=metadata.integer(f"{_OWN_SCALING}original_context", MAX_CONTEXT),
    )
    if rope.divisors is not None and not np.allclose(
        rope.divisors, rope_divisors(replace(rope, scaling=scaling, divisors=None), head_dim), rtol=1e-3
    ):
        metadata.fail(f"{_OWN_SCALING}factor", "the scaling of rope_freqs.weight", "another one")
    return replace(rope, scaling=scaling, divisors=None)


def rope_divisors(rope: RopeConfig, head_dim: int) -> tuple[float, ...]:
    """What each pair's plain frequency is divided by: the content of `rope_freqs.weight`."""
    plain = rope_frequencies(replace(rope, scaling=None, divisors=None), head_dim)
    used = rope_frequencies(rope, head_dim)
    return tuple(before / after for before, after in zip(plain, used, strict=True))


def _linear_factor(metadata: Metadata, name: Architecture) -> float:
    """What every frequency is divided by: position interpolation, under its present or its first key."""
    kind = metadata.values.get(f"{name}.rope.scaling.type", "none")
    if kind not in ("none", "linear", ""):
        raise UnsupportedError(
            f"{metadata.path}: rope scaling {str(kind)[:40]!r} is not supported.",
            "Supported: linear, and Llama 3's as a tensor of factors.",
        )
    if kind == "linear":
        return metadata.real(f"{name}.rope.scaling.factor")
    return metadata.real(f"{name}.rope.scale_linear", 1.0)


def metadata_from_config(config: ModelConfig) -> dict[str, Any]:
    """The metadata that describes `config`, in standard keys as far as they reach, ayllu's own beyond.

    Images are not part of a language model's GGUF: the tower of `config` is left out.
    """
    name = config.architecture
    values: dict[str, Any] = {
        "general.architecture": name,
        f"{name}.vocab_size": config.vocab_size,
        f"{name}.context_length": config.max_position_embeddings,
        f"{name}.embedding_length": config.hidden_size,
        f"{name}.block_count": config.num_hidden_layers,
        f"{name}.feed_forward_length": config.intermediate_size,
        f"{name}.attention.head_count": config.num_attention_heads,
        f"{name}.attention.head_count_kv": config.num_key_value_heads,
        f"{name}.attention.key_length": config.head_dim,
        f"{name}.attention.value_length": config.head_dim,
        f"{name}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        f"{name}.rope.dimension_count": config.head_dim,
        f"{name}.rope.freq_base": config.rope.theta,
    }
    if name == "llama4":
        values |= _llama4_keys(config)
    return values | _own_keys(config, values)


def _llama4_keys(config: ModelConfig) -> dict[str, Any]:
    values: dict[str, Any] = {"llama4.expert_count": 0, "llama4.interleave_moe_layer_step": 0}
    if config.experts is not None:
        mixtures = config.expert_layers
        values |= {
            "llama4.expert_count": config.experts.num_experts,
            "llama4.expert_used_count": config.experts.top_k,
            "llama4.expert_feed_forward_length": config.experts.intermediate_size,
            "llama4.expert_shared_feed_forward_length": config.experts.shared_intermediate_size,
            "llama4.interleave_moe_layer_step": mixtures[0] + 1 if mixtures else 0,
        }
    if all(layer.rotates and layer.chunk is None for layer in config.layers):
        values["llama4.attention.sliding_window"] = 0
    return values


def _own_keys(config: ModelConfig, values: dict[str, Any]) -> dict[str, Any]:
    """ayllu's keys for whatever reading `values` back would not give again."""
    read_back = config_from_metadata(
        Path("metadata"),
        values,
        embedding_rows=config.vocab_size,
        tied=config.tie_word_embeddings,
        qkv_bias=config.qkv_bias,
        divisors=None,
    )
    own: dict[str, Any] = {}
    if read_back.layers != config.layers:
        own["ayllu.layers.rotates"] = np.array([layer.rotates for layer in config.layers])
        own["ayllu.layers.chunk"] = np.array([layer.chunk or 0 for layer in config.layers], np.uint32)
        own["ayllu.layers.experts"] = np.array([layer.experts for layer in config.layers])
    if read_back.qk_norm != config.qk_norm:
        own["ayllu.attention.qk_norm"] = config.qk_norm
    if read_back.temperature != config.temperature or own:
        own["ayllu.attention.temperature"] = config.temperature is not None
        if config.temperature is not None:
            own["ayllu.attention.temperature_floor"] = np.float64(config.temperature.floor_scale)
            own["ayllu.attention.temperature_scale"] = np.float64(config.temperature.attn_scale)
    if (scaling := config.rope.scaling) is not None:
        own[f"{_OWN_SCALING}factor"] = np.float64(scaling.factor)
        own[f"{_OWN_SCALING}low_freq_factor"] = np.float64(scaling.low_freq_factor)
        own[f"{_OWN_SCALING}high_freq_factor"] = np.float64(scaling.high_freq_factor)
        own[f"{_OWN_SCALING}original_context"] = scaling.original_max_position_embeddings
    return own
