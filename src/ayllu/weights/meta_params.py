"""Meta's params.json to a `ModelConfig` and back (spec 1.1, 9.1).

It states the widths of the feed-forwards only through a rule: multipliers, an optional halving for experts,
and rounding up to a multiple.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ayllu.errors import UnsupportedError
from ayllu.json_file import read_json_object
from ayllu.model.config import (
    MAX_LAYERS,
    AttentionTemperature,
    ExpertsConfig,
    LayerSpec,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    VisionConfig,
)
from ayllu.weights.hf_fields import Fields

MAX_PARAMS_BYTES = 1 << 20
LLAMA4_CONTEXT = 262_144
"""Of the base models; params.json does not state it (spec 1)."""
_FIX = "Convert it to safetensors or GGUF instead."


def read_params(folder: Path) -> Fields:
    """The bounded params.json of a folder; its content may stand under `model`."""
    file = folder / "params.json"
    fields = Fields(read_json_object(file, max_bytes=MAX_PARAMS_BYTES), file)
    return fields.nested("model") or fields


def config_from_params(
    fields: Fields, *, llama4: bool, vocab_size: int, context: int | None = None
) -> ModelConfig:
    """The network of a params.json. `vocab_size` comes from the tensors: the file may say -1.

    Raises ModelFileError for values that make no sense, UnsupportedError for options we lack.
    """
    width = fields.integer("dim")
    heads = fields.integer("n_heads")
    if heads < 1 or width % heads:
        fields.fail("n_heads", f"a divisor of dim {width}", heads)
    if fields.given("quantization_args") or fields.given("lora_args"):
        fields.refuse("quantization_args", "given", "only full-precision checkpoints are converted")
    count = fields.integer("n_layers")
    if not 1 <= count <= MAX_LAYERS:
        fields.fail("n_layers", f"1 to {MAX_LAYERS}", count)
    scaled = fields.flag("use_scaled_rope", False)
    moe = fields.nested("moe_args") if llama4 else None
    vision = fields.nested("vision_args") if llama4 else None
    return ModelConfig(
        architecture="llama4" if llama4 else "llama",
        vocab_size=vocab_size,
        hidden_size=width,
        num_attention_heads=heads,
        num_key_value_heads=fields.integer("n_kv_heads", heads),
        head_dim=fields.integer("head_dim", width // heads),
        intermediate_size=_dense_width(fields, width),
        layers=_layers(fields, moe, count) if llama4 else (LayerSpec(),) * count,
        max_position_embeddings=context or _usual_context(fields, llama4),
        rms_norm_eps=fields.real("norm_eps", 1e-5),
        rope=RopeConfig(
            theta=fields.real("rope_theta", 500_000.0 if llama4 else 10_000.0),
            layout="interleaved",
            scaling=_scaling(fields, llama4) if scaled else None,
        ),
        qk_norm=llama4 and fields.flag("use_qk_norm", False),
        temperature=_temperature(fields) if llama4 else None,
        experts=None if moe is None else _experts(fields, moe, width),
        vision=None if vision is None else _vision(vision),
    )


def _usual_context(fields: Fields, llama4: bool) -> int:
    if llama4:
        return LLAMA4_CONTEXT
    if fields.flag("use_scaled_rope", False):
        return 131_072
    return 8192 if fields.real("rope_theta", 10_000.0) > 10_000.0 else 4096


def _scaling(fields: Fields, llama4: bool) -> RopeScaling:
    """What the shipped files leave out is 16/1 for Scout and 8/4 for Llama 3.1 (spec 4.1)."""
    factor, high = (16.0, 1.0) if llama4 else (8.0, 4.0)
    return RopeScaling(
        factor=fields.real("rope_scaling_factor", factor),
        low_freq_factor=1.0,
        high_freq_factor=fields.real("rope_high_freq_factor", high),
        original_max_position_embeddings=8192,
    )


def _temperature(fields: Fields) -> AttentionTemperature | None:
    """On unless the file says otherwise: the released configs of the same weights switch it on (spec 3.2)."""
    if not fields.flag("attn_temperature_tuning", True):
        return None
    return AttentionTemperature(
        floor_scale=fields.real("floor_scale", 8192.0), attn_scale=fields.real("attn_scale", 0.1)
    )


def _layers(fields: Fields, moe: Fields | None, count: int) -> tuple[LayerSpec, ...]:
    nope = fields.integer("nope_layer_interval", 0)
    chunk = fields.integer("attention_chunk_size", 0)
    step = moe.integer("interleave_moe_layer_step", 1) if moe is not None else 0
    for key, value in (("nope_layer_interval", nope), ("interleave_moe_layer_step", step)):
        if value < 0:
            fields.fail(key, "0 or more", value)
    layers = []
    for number in range(1, count + 1):
        rotates = nope == 0 or number % nope != 0
        layers.append(
            LayerSpec(
                rotates=rotates,
                chunk=chunk if rotates and chunk else None,
                experts=step > 0 and number % step == 0,
            )
        )
    return tuple(layers)


def _scaled_width(fields: Fields, width: float) -> int:
    hidden = int(2 * int(width) / 3)
    if fields.given("ffn_dim_multiplier"):
        hidden = int(fields.real("ffn_dim_multiplier") * hidden)
    return hidden


def _rounded_up(fields: Fields, hidden: int) -> int:
    multiple = fields.integer("multiple_of", 256)
    if multiple < 1:
        fields.fail("multiple_of", "1 or more", multiple)
    return -(-hidden // multiple) * multiple


def _dense_width(fields: Fields, width: int) -> int:
    return _rounded_up(fields, _scaled_width(fields, 4 * width))


def _experts(fields: Fields, moe: Fields, width: int) -> ExpertsConfig:
    hidden = _scaled_width(fields, fields.real("ffn_exp", 4.0) * width)
    if moe.flag("auto_scale_F", True):
        shares = moe.real("capacity_factor", 1.0) + 1
        if shares <= 0:
            moe.fail("capacity_factor", "more than -1", shares - 1)
        hidden = int(hidden / shares)
    size = _rounded_up(fields, hidden)
    return ExpertsConfig(
        num_experts=moe.integer("num_experts"),
        top_k=moe.integer("top_k", 1),
        intermediate_size=size,
        shared_intermediate_size=size,
    )


def _vision(fields: Fields) -> VisionConfig:
    width = fields.integer("dim")
    ratio = fields.real("pixel_shuffle_ratio", 0.5)
    shuffle = round(1 / ratio) if 0.001 < ratio <= 1 else 0
    if shuffle == 0 or abs(shuffle * ratio - 1) > 1e-6:
        fields.refuse("pixel_shuffle_ratio", ratio, "it must be one over a whole number")
    mlp_ratio = fields.real("mlp_ratio", 4.0)
    output = fields.integer("output_dim")
    return VisionConfig(
        hidden_size=width,
        num_hidden_layers=fields.integer("n_layers"),
        num_attention_heads=fields.integer("n_heads"),
        intermediate_size=int(min(mlp_ratio, 1e6) * width),
        image_size=_side(fields, "image_size"),
        patch_size=_side(fields, "patch_size"),
        shuffle=shuffle,
        adapter_hidden_size=output,
        adapter_output_size=output,
    )


def _side(fields: Fields, key: str) -> int:
    size = fields.nested(key)
    if size is None or size.integer("height") != size.integer("width"):
        fields.refuse(key, fields.values.get(key), "it must be square")
    return size.integer("height")


def params_from_config(config: ModelConfig) -> dict[str, Any]:
    """The params.json of `config`. Raises UnsupportedError for what Meta's layout cannot say."""
    llama4 = config.architecture == "llama4"
    if config.architecture not in ("llama", "llama4") or config.qkv_bias or config.tie_word_embeddings:
        raise UnsupportedError("Meta's layout is for llama and llama4 without bias or tied head.", _FIX)
    if config.rope.divisors is not None:
        raise UnsupportedError("Meta's layout has no rope factors.", _FIX)
    params: dict[str, Any] = {
        "dim": config.hidden_size,
        "n_layers": config.num_hidden_layers,
        "n_heads": config.num_attention_heads,
        "n_kv_heads": config.num_key_value_heads,
        "vocab_size": config.vocab_size,
        "norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope.theta,
        "use_scaled_rope": config.rope.scaling is not None,
        **_width_rule(config),
    }
    if config.head_dim * config.num_attention_heads != config.hidden_size:
        params["head_dim"] = config.head_dim
    if config.rope.scaling is not None:
        params["rope_scaling_factor"] = config.rope.scaling.factor
        params["rope_high_freq_factor"] = config.rope.scaling.high_freq_factor
    if llama4:
        params |= _llama4_params(config)
    return params


def _llama4_params(config: ModelConfig) -> dict[str, Any]:
    chunks = {layer.chunk for layer in config.layers if layer.rotates}
    params: dict[str, Any] = {
        "use_qk_norm": config.qk_norm,
        "attn_temperature_tuning": config.temperature is not None,
        "nope_layer_interval": _interval([not layer.rotates for layer in config.layers]) or None,
        "attention_chunk_size": chunks.pop() if len(chunks) == 1 else None,
    }
    if config.temperature is not None:
        params["floor_scale"] = config.temperature.floor_scale
        params["attn_scale"] = config.temperature.attn_scale
    if chunks or any(layer.chunk for layer in config.layers if not layer.rotates):
        raise UnsupportedError("Meta's layout has one chunk size, for all rotating layers.", _FIX)
    if config.vision is not None:
        params["vision_args"] = _vision_params(config.vision)
    return params


def _vision_params(vision: VisionConfig) -> dict[str, Any]:
    return {
        "image_size": {"height": vision.image_size, "width": vision.image_size},
        "patch_size": {"height": vision.patch_size, "width": vision.patch_size},
        "dim": vision.hidden_size,
        "n_layers": vision.num_hidden_layers,
        "n_heads": vision.num_attention_heads,
        "mlp_ratio": vision.intermediate_size / vision.hidden_size,
        "output_dim": vision.adapter_output_size,
        "pixel_shuffle_ratio": 1 / vision.shuffle,
    }


def _interval(chosen: list[bool]) -> int:
    """n where every n-th entry is chosen, 0 for none. Raises UnsupportedError for any other pattern."""
    interval = chosen.index(True) + 1 if True in chosen else 0
    regular = [interval > 0 and (index + 1) % interval == 0 for index in range(len(chosen))]
    if regular != chosen:
        raise UnsupportedError("Meta's layout needs experts and NoPE layers at a regular interval.", _FIX)
    return interval


def _width_rule(config: ModelConfig) -> dict[str, Any]:
    """Values that the rule turns into our widths: those published for Llama 4 if they do, else solved for."""
    experts = config.experts if config.expert_layers else None
    published: dict[str, Any] = {"ffn_exp": 4.0, "ffn_dim_multiplier": 1.2, "multiple_of": 2048}
    base = int(8 * config.hidden_size / 3)
    hidden = config.intermediate_size
    solved: dict[str, Any] = {"ffn_exp": 4.0, "ffn_dim_multiplier": (hidden + 0.5) / base, "multiple_of": 1}
    if experts is None:
        return {key: solved[key] for key in ("ffn_dim_multiplier", "multiple_of")}
    moe: dict[str, Any] = {
        "num_experts": experts.num_experts,
        "top_k": experts.top_k,
        "auto_scale_F": True,
        "interleave_moe_layer_step": _interval([layer.experts for layer in config.layers]),
    }
    for rule, capacity in ((published, 1.0), (solved, hidden / (experts.intermediate_size + 0.5) - 1)):
        mixture = moe | {"capacity_factor": capacity}
        params = rule | {"moe_args": mixture}
        fields = Fields(params, Path("params.json"))
        found = _experts(fields, Fields(mixture, fields.file), config.hidden_size)
        if found == experts and _dense_width(fields, config.hidden_size) == hidden:
            return params
    raise UnsupportedError("Meta's layout cannot state the feed-forward widths of this model.", _FIX)
