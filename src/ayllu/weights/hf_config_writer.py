"""A `ModelConfig` as Hugging Face's config.json, in the keys that old and new transformers both read.

The inverse of `hf_config`: reading what is written here gives an equal config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ayllu.errors import UnsupportedError
from ayllu.model.config import LayerSpec, ModelConfig, RopeConfig, RopeLayout, RopeScaling, VisionConfig
from ayllu.model.rope_frequencies import rope_frequencies

TokenIds = Mapping[str, Any]
"""Special token ids by their config keys: bos_token_id, eos_token_id (one or several), pad_token_id."""

_KNOWN_SCALINGS = tuple(
    (high, original) for original in (8192, 4096, 2048, 16_384, 32_768) for high in (4.0, 1.0, 2.0, 8.0)
)


def rope_layout_of(architecture: str) -> RopeLayout:
    """How the format stores rotary heads: only Llama 4 keeps Meta's interleaved pairs (spec 4)."""
    return "interleaved" if architecture == "llama4" else "half"


def hugging_face_config(
    config: ModelConfig, *, encoding: str = "BF16", token_ids: TokenIds | None = None
) -> dict[str, Any]:
    """The config.json of `config`, with tensors stored in `encoding`.

    Raises UnsupportedError for what the format cannot say.
    """
    dtype = {"BF16": "bfloat16", "F16": "float16", "F32": "float32", "F64": "float64"}[encoding]
    ids = {key: value for key, value in (token_ids or {}).items() if value is not None}
    if config.architecture == "llama4":
        return _llama4(config, dtype, ids)
    if config.vision or config.experts or config.qk_norm or config.temperature or _unusual(config):
        raise UnsupportedError(
            f"Hugging Face's {config.architecture} has no vision, experts, query norm or mixed layers.",
            "Save it as llama4.",
        )
    if config.qkv_bias != (config.architecture == "qwen2"):
        raise UnsupportedError(
            f"Hugging Face's {config.architecture} cannot say that qkv_bias is {config.qkv_bias}.",
            "Keep this model in GGUF.",
        )
    written = _common(config, dtype) | ids | {"intermediate_size": config.intermediate_size}
    if config.architecture == "llama":
        return written | {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "attention_bias": False,
            "mlp_bias": False,
        }
    return written | {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "use_sliding_window": False,
        "sliding_window": None,
    }


def _unusual(config: ModelConfig) -> bool:
    return any(layer != LayerSpec() for layer in config.layers)


def _common(config: ModelConfig, dtype: str) -> dict[str, Any]:
    return {
        "attention_dropout": 0.0,
        "dtype": dtype,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "max_position_embeddings": config.max_position_embeddings,
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": _rope_scaling(config.rope, config.head_dim),
        "rope_theta": config.rope.theta,
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "vocab_size": config.vocab_size,
    }


def _llama4(config: ModelConfig, dtype: str, ids: TokenIds) -> dict[str, Any]:
    if config.qkv_bias:
        raise UnsupportedError("Hugging Face's llama4 has no qkv bias alone.", "Keep this model in GGUF.")
    text = _common(config, dtype) | dict(ids) | _llama4_keys(config)
    if config.vision is None:
        return text | {"architectures": ["Llama4ForCausalLM"], "model_type": "llama4_text"}
    return {
        "architectures": ["Llama4ForConditionalGeneration"],
        "boi_token_index": 200_080,
        "dtype": dtype,
        "eoi_token_index": 200_081,
        "image_token_index": config.vision.patch_token_id,
        "model_type": "llama4",
        "text_config": text | {"model_type": "llama4_text"},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": dtype,
        "vision_config": _vision(config.vision),
    }


def _llama4_keys(config: ModelConfig) -> dict[str, Any]:
    chunks = {layer.chunk for layer in config.layers if layer.chunk is not None}
    if len(chunks) > 1:
        raise UnsupportedError(
            f"Hugging Face's llama4 has one chunk size, this model has {sorted(chunks)}.", "Keep it in GGUF."
        )
    experts = config.experts if config.expert_layers else None
    if experts is not None and experts.shared_intermediate_size != experts.intermediate_size:
        raise UnsupportedError(
            f"Hugging Face's llama4 gives shared and routed experts one width, this model has "
            f"{experts.shared_intermediate_size} and {experts.intermediate_size}.",
            "Keep it in GGUF.",
        )
    temperature = config.temperature
    floor = temperature.floor_scale if temperature else 8192.0
    return {
        "attention_bias": False,
        # Without chunked layers the number is not used, but null breaks the mask builder (spec 12.12).
        "attention_chunk_size": chunks.pop() if chunks else 8192,
        "attn_scale": temperature.attn_scale if temperature else 0.1,
        "attn_temperature_tuning": temperature is not None,
        "floor_scale": int(floor) if float(floor).is_integer() else floor,
        "interleave_moe_layer_step": 1,
        "intermediate_size": experts.intermediate_size if experts else config.intermediate_size,
        "intermediate_size_mlp": config.intermediate_size,
        "layer_types": [
            "full_attention" if layer.chunk is None else "chunked_attention" for layer in config.layers
        ],
        "moe_layers": list(config.expert_layers),
        "no_rope_layers": [int(layer.rotates) for layer in config.layers],
        "num_experts_per_tok": experts.top_k if experts else 1,
        "num_local_experts": experts.num_experts if experts else 1,
        "use_qk_norm": config.qk_norm,
    }


def _vision(vision: VisionConfig) -> dict[str, Any]:
    shuffled = vision.hidden_size * vision.shuffle**2
    if vision.adapter_hidden_size != vision.adapter_output_size or vision.intermediate_size != shuffled:
        raise UnsupportedError(
            "Hugging Face's llama4 needs one width for both layers of the image adapter, and an image tower "
            f"whose inner width is that of a shuffled patch ({shuffled}, not {vision.intermediate_size}).",
            "Choose other widths.",
        )
    return {
        "hidden_act": "gelu",
        "hidden_size": vision.hidden_size,
        "image_size": vision.image_size,
        "intermediate_size": vision.intermediate_size,
        "model_type": "llama4_vision_model",
        "multi_modal_projector_bias": False,
        "norm_eps": vision.norm_eps,
        "num_attention_heads": vision.num_attention_heads,
        "num_channels": vision.num_channels,
        "num_hidden_layers": vision.num_hidden_layers,
        "patch_size": vision.patch_size,
        "pixel_shuffle_ratio": 1 / vision.shuffle,
        "projector_input_dim": vision.adapter_hidden_size,
        "projector_output_dim": vision.adapter_output_size,
        "rope_theta": vision.rope_theta,
        "vision_feature_select_strategy": "default",
        "vision_output_dim": vision.adapter_output_size,
    }


def _rope_scaling(rope: RopeConfig, head_dim: int) -> dict[str, Any] | None:
    if rope.divisors is not None:
        if len(set(rope.divisors)) == 1:
            return {"rope_type": "linear", "factor": rope.divisors[0]}
        rope = recovered_scaling(rope, head_dim)
    if rope.scaling is None:
        return None
    return {
        "rope_type": "llama3",
        "factor": rope.scaling.factor,
        "low_freq_factor": rope.scaling.low_freq_factor,
        "high_freq_factor": rope.scaling.high_freq_factor,
        "original_max_position_embeddings": rope.scaling.original_max_position_embeddings,
    }


def recovered_scaling(rope: RopeConfig, head_dim: int) -> RopeConfig:
    """`rope` with its divisors, as a GGUF stores them, replaced by the Llama 3 rule that gives them.

    Raises UnsupportedError when none of the rules in use does, to float32 precision.
    """
    divisors = rope.divisors or ()
    base = rope_frequencies(RopeConfig(theta=rope.theta), head_dim)
    for high, original in _KNOWN_SCALINGS:
        rule = RopeScaling(
            factor=max(divisors, default=1.0),
            low_freq_factor=1.0,
            high_freq_factor=high,
            original_max_position_embeddings=original,
        )
        candidate = RopeConfig(theta=rope.theta, layout=rope.layout, scaling=rule)
        scaled = rope_frequencies(candidate, head_dim)
        pairs = zip(base, scaled, divisors, strict=True)
        if all(abs(plain / slowed / divisor - 1) < 1e-5 for plain, slowed, divisor in pairs):
            return candidate
    raise UnsupportedError(
        "The rope factors of this model follow no rule that config.json can state.",
        "Keep it in GGUF, which stores the factors themselves.",
    )
