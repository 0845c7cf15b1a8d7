"""Hugging Face's config.json to a `ModelConfig`, for Llama 2/3, Qwen2 and Llama 4.

Only values are read: a config cannot name code to run. Absent keys take the defaults of transformers'
own config classes, because files are written against those.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ayllu.errors import ModelFileError, UnsupportedError, clip
from ayllu.folder_files import member_path
from ayllu.json_file import read_json_object
from ayllu.model.config import (
    MAX_LAYERS,
    AttentionTemperature,
    ExpertsConfig,
    LayerSpec,
    ModelConfig,
    RopeConfig,
    RopeLayout,
    RopeScaling,
    VisionConfig,
)
from ayllu.weights.hf_config_writer import hugging_face_config
from ayllu.weights.hf_fields import Fields

__all__ = ["config_from_hugging_face", "config_notes", "hugging_face_config", "read_config"]

MAX_CONFIG_BYTES = 4 << 20
ENCODER_TYPES = ("bert",)
"""Values of model_type that `weights/encoder.py` opens instead."""
LIST_SLACK = 4 * MAX_LAYERS
"""Per-layer lists may be longer than the model; they cannot be longer than this."""
MAX_HEAD_DIM = 1 << 14


def read_config(folder: Path) -> dict[str, Any]:
    """The config.json of a folder, unchecked but bounded. Raises ModelFileError, also for links out of it."""
    if not (folder / "config.json").is_file():
        raise ModelFileError(
            folder, "has no config.json", fix="Name the folder of a model in Hugging Face's layout."
        )
    return read_json_object(member_path(folder, "config.json"), max_bytes=MAX_CONFIG_BYTES)


def config_from_hugging_face(config: Mapping[str, Any], file: Path) -> ModelConfig:
    """The network that `config`, read from `file`, describes.

    Raises ModelFileError for values that make no sense, UnsupportedError for architectures or options that
    ayllu does not implement. Keys that do not change the arithmetic are ignored.
    """
    fields = Fields(config, file)
    model_type = fields.text("model_type")
    if model_type == "llama":
        return _llama(fields)
    if model_type == "qwen2":
        return _qwen2(fields)
    if model_type == "llama4_text":
        return _llama4_text(fields, None)
    if model_type == "llama4":
        return _llama4(fields)
    if model_type in ENCODER_TYPES:
        raise UnsupportedError(
            f"{file.parent} is an embedding model ({model_type}): it makes vectors of texts and cannot talk.",
            "Choose another model; `ayllu list` shows them.",
        )
    raise UnsupportedError(
        f"{file}: model_type {clip(model_type, 60)!r} is not supported.",
        "Supported are llama, qwen2, llama4 and llama4_text.",
    )


def config_notes(config: ModelConfig) -> list[str]:
    """What a person should know about this config though it can be run, one line each."""
    notes = []
    scaling = config.rope.scaling
    scout = (
        config.architecture == "llama4" and config.experts is not None and config.experts.num_experts == 16
    )
    if scout and scaling is not None and (scaling.factor, scaling.high_freq_factor) == (8.0, 4.0):
        notes.append(
            "RoPE scaling is 8/4, the values of Llama 3.1. Llama 4 Scout was corrected to 16/1 "
            "(llama-models pull request 322); long contexts will suffer."
        )
    return notes


def _llama(fields: Fields) -> ModelConfig:
    _require_silu(fields)
    _refuse_flags(fields, "attention_bias", "mlp_bias")
    width = fields.integer("hidden_size", 4096)
    heads = fields.integer("num_attention_heads", 32)
    context = fields.integer("max_position_embeddings", 2048)
    head_dim = _head_dim(fields, width, heads)
    return ModelConfig(
        architecture="llama",
        vocab_size=fields.integer("vocab_size", 32_000),
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 11_008),
        layers=_plain_layers(fields, 32),
        max_position_embeddings=context,
        rms_norm_eps=fields.real("rms_norm_eps", 1e-6),
        rope=_rope(fields, "half", 10_000.0, context, head_dim),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _qwen2(fields: Fields) -> ModelConfig:
    _require_silu(fields)
    if fields.flag("use_sliding_window", False):
        fields.refuse("use_sliding_window", True)
    for kind in fields.texts("layer_types", LIST_SLACK) or []:
        if kind != "full_attention":
            fields.refuse("layer_types", kind)
    width = fields.integer("hidden_size", 4096)
    heads = fields.integer("num_attention_heads", 32)
    context = fields.integer("max_position_embeddings", 32_768)
    head_dim = _head_dim(fields, width, heads)
    # In transformers an absent key means 32, null means as many as there are query heads.
    groups = heads if "num_key_value_heads" in fields.values else 32
    return ModelConfig(
        architecture="qwen2",
        vocab_size=fields.integer("vocab_size", 151_936),
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", groups),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size", 22_016),
        layers=_plain_layers(fields, 32),
        max_position_embeddings=context,
        rms_norm_eps=fields.real("rms_norm_eps", 1e-6),
        rope=_rope(fields, "half", 10_000.0, context, head_dim),
        qkv_bias=True,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
    )


def _llama4(fields: Fields) -> ModelConfig:
    text = fields.nested("text_config")
    if text is None:
        raise ModelFileError(fields.file, "a required value is missing", field="text_config")
    vision = fields.nested("vision_config")
    if vision is None:
        if "Llama4ForCausalLM" not in (fields.texts("architectures", 16) or []):
            raise ModelFileError(fields.file, "a required value is missing", field="vision_config")
        return _llama4_text(text, None)
    return _llama4_text(text, _vision(vision, fields.integer("image_token_index", 200_092)))


def _llama4_text(fields: Fields, vision: VisionConfig | None) -> ModelConfig:
    _require_silu(fields)
    _refuse_flags(fields, "attention_bias")
    width = fields.integer("hidden_size", 5120)
    heads = fields.integer("num_attention_heads", 40)
    context = fields.integer("max_position_embeddings", 131_072)
    # In transformers null means 'derive it', but an absent key takes Scout's own value.
    head_dim = _head_dim(fields, width, heads) if "head_dim" in fields.values else 128
    groups = heads if "num_key_value_heads" in fields.values else 8
    layers = _llama4_layers(fields)
    expert_width = fields.integer("intermediate_size", 8192)
    temperature = None
    if fields.flag("attn_temperature_tuning", True):
        temperature = AttentionTemperature(
            floor_scale=fields.real("floor_scale", 8192), attn_scale=fields.real("attn_scale", 0.1)
        )
    experts = None
    if any(layer.experts for layer in layers):
        experts = ExpertsConfig(
            num_experts=fields.integer("num_local_experts", 16),
            top_k=fields.integer("num_experts_per_tok", 1),
            intermediate_size=expert_width,
            shared_intermediate_size=expert_width,
        )
    return ModelConfig(
        architecture="llama4",
        vocab_size=fields.integer("vocab_size", 202_048),
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("num_key_value_heads", groups),
        head_dim=head_dim,
        intermediate_size=fields.integer("intermediate_size_mlp", 16_384),
        layers=layers,
        max_position_embeddings=context,
        rms_norm_eps=fields.real("rms_norm_eps", 1e-5),
        rope=_rope(fields, "interleaved", 500_000.0, context, head_dim),
        qk_norm=fields.flag("use_qk_norm", True),
        temperature=temperature,
        experts=experts,
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        vision=vision,
    )


def _llama4_layers(fields: Fields) -> tuple[LayerSpec, ...]:
    count = _layer_count(fields, 48)
    # Misnamed upstream: 1 means that the layer does rotate. An empty list means the key is absent (spec 2).
    rotates = fields.integers("no_rope_layers", LIST_SLACK)
    if not rotates:
        interval = fields.integer("no_rope_layer_interval", 4)
        if interval == 0:
            fields.fail("no_rope_layer_interval", "a number other than 0", interval)
        rotates = [int((index + 1) % interval != 0) for index in range(count)]
    kinds = fields.texts("layer_types", LIST_SLACK)
    if kinds is None:
        kinds = ["chunked_attention" if rotate else "full_attention" for rotate in rotates]
    for key, items in (("no_rope_layers", rotates), ("layer_types", kinds)):
        if len(items) < count:
            fields.fail(key, f"{count} entries, one a layer", f"{len(items)} entries")
    mixtures = fields.integers("moe_layers", LIST_SLACK)
    if mixtures is None:
        step = fields.integer("interleave_moe_layer_step", 1)
        if step < 0:
            fields.fail("interleave_moe_layer_step", "0 or more", step)
        mixtures = list(range(step - 1, count, step)) if step else []
    chunk: int | None = fields.integer("attention_chunk_size", 8192)
    if "attention_chunk_size" in fields.values and not fields.given("attention_chunk_size"):
        chunk = None
    mixed = set(mixtures)
    layers = []
    for index in range(count):
        if kinds[index] not in ("chunked_attention", "full_attention"):
            fields.refuse("layer_types", kinds[index])
        seen = chunk if kinds[index] == "chunked_attention" else None
        layers.append(LayerSpec(rotates=bool(rotates[index]), chunk=seen, experts=index in mixed))
    return tuple(layers)


def _vision(fields: Fields, patch_token_id: int) -> VisionConfig:
    """The image tower. The defaults, transformers' own, describe no released model (spec 6.2)."""
    act = fields.text("hidden_act", "gelu")
    if act != "gelu":
        fields.refuse("hidden_act", act)
    _refuse_flags(fields, "multi_modal_projector_bias")
    strategy = fields.text("vision_feature_select_strategy", "default")
    if strategy != "default":
        fields.refuse("vision_feature_select_strategy", strategy)
    ratio = fields.real("pixel_shuffle_ratio", 0.5)
    shuffle = round(1 / ratio) if 0.001 < ratio <= 1 else 0
    if shuffle == 0 or abs(shuffle * ratio - 1) > 1e-6:
        fields.refuse("pixel_shuffle_ratio", ratio, "it must be one over a whole number")
    hidden = fields.integer("hidden_size", 768)
    inner = fields.integer("intermediate_size", 5632)
    adapter = fields.integer("projector_input_dim", 4096)
    output = fields.integer("projector_output_dim", 4096)
    final = fields.integer("vision_output_dim", 7680)
    if inner != hidden * shuffle**2:
        fields.refuse(
            "intermediate_size", inner, f"the adapter reads {hidden * shuffle**2} shuffled channels"
        )
    if not adapter == output == final:
        fields.refuse("vision_output_dim", final, "the widths of the adapter's layers differ")
    rope = _rope(fields, "interleaved", 10_000.0, 0, 2)
    if rope.scaling is not None or rope.divisors is not None:
        fields.refuse("rope_scaling", "given", "the image tower has none")
    return VisionConfig(
        hidden_size=hidden,
        num_hidden_layers=fields.integer("num_hidden_layers", 34),
        num_attention_heads=fields.integer("num_attention_heads", 16),
        intermediate_size=inner,
        image_size=_square(fields, "image_size", 448),
        patch_size=_square(fields, "patch_size", 14),
        num_channels=fields.integer("num_channels", 3),
        shuffle=shuffle,
        adapter_hidden_size=adapter,
        adapter_output_size=output,
        rope_theta=rope.theta,
        norm_eps=fields.real("norm_eps", 1e-5),
        patch_token_id=patch_token_id,
    )


def _square(fields: Fields, key: str, default: int) -> int:
    value = fields.values.get(key)
    if isinstance(value, list):
        if len(value) != 2 or value[0] != value[1]:
            fields.refuse(key, value, "it must be square")
        return Fields({key: value[0]}, fields.file, fields.prefix).integer(key)
    return fields.integer(key, default)


def _head_dim(fields: Fields, width: int, heads: int) -> int:
    if fields.given("head_dim"):
        head_dim = fields.integer("head_dim")
    elif heads < 1 or width % heads:
        fields.fail("num_attention_heads", f"a divisor of hidden_size {width}", heads)
    else:
        head_dim = width // heads
    if not 2 <= head_dim <= MAX_HEAD_DIM:
        fields.fail("head_dim", f"2 to {MAX_HEAD_DIM}", head_dim)
    return head_dim


def _layer_count(fields: Fields, default: int) -> int:
    count = fields.integer("num_hidden_layers", default)
    if not 1 <= count <= MAX_LAYERS:
        fields.fail("num_hidden_layers", f"1 to {MAX_LAYERS}", count)
    return count


def _plain_layers(fields: Fields, default: int) -> tuple[LayerSpec, ...]:
    return (LayerSpec(),) * _layer_count(fields, default)


def _refuse_flags(fields: Fields, *keys: str) -> None:
    for key in keys:
        if fields.flag(key, False):
            fields.refuse(key, True)


def _require_silu(fields: Fields) -> None:
    act = fields.text("hidden_act", "silu")
    if act not in ("silu", "swish"):
        fields.refuse("hidden_act", act)


def _rope(fields: Fields, layout: RopeLayout, theta: float, context: int, head_dim: int) -> RopeConfig:
    """Both spellings: `rope_parameters` (transformers 5) and `rope_theta` with `rope_scaling` (before)."""
    scaling = fields.nested("rope_scaling")
    if scaling is None or not scaling.values:
        scaling = fields.nested("rope_parameters") or Fields({}, fields.file)
    base = scaling.real("rope_theta", fields.real("rope_theta", theta))
    for source in (scaling, fields):
        if source.real("partial_rotary_factor", 1.0) != 1.0:
            source.refuse("partial_rotary_factor", source.values["partial_rotary_factor"])
    for key in scaling.values:
        if key.endswith("_attention"):
            scaling.refuse(key, "a rope of its own", "layers must share one rope")
    kind = scaling.text("rope_type", scaling.text("type", "default"))
    if kind == "default":
        return RopeConfig(theta=base, layout=layout)
    if kind == "linear":
        factor = scaling.real("factor")
        return RopeConfig(theta=base, layout=layout, divisors=(factor,) * (head_dim // 2))
    if kind != "llama3":
        scaling.refuse("rope_type", kind)
    rule = RopeScaling(
        factor=scaling.real("factor"),
        low_freq_factor=scaling.real("low_freq_factor"),
        high_freq_factor=scaling.real("high_freq_factor"),
        original_max_position_embeddings=scaling.integer("original_max_position_embeddings", context),
    )
    return RopeConfig(theta=base, layout=layout, scaling=rule)
