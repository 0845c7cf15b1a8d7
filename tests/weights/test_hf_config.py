"""config.json to our config and back, against transformers' own config classes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.model.config import LayerSpec, ModelConfig, RopeConfig, RopeScaling
from ayllu.model.presets import preset
from ayllu.model.rope_frequencies import rope_frequencies
from ayllu.weights.hf_config import config_from_hugging_face, config_notes, hugging_face_config, read_config
from tests.weights.tiny_folders import KINDS, LLAMA3_ROPE, make_config

FILE = Path("config.json")
LLAMA4 = {"model_type": "llama4_text", "num_hidden_layers": 8, "num_local_experts": 4}


def read(values: dict[str, Any]) -> ModelConfig:
    return config_from_hugging_face(values, FILE)


def written_by_transformers(config: Any) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("llama", "LlamaConfig"), ("qwen2", "Qwen2Config"), ("llama4_text", "Llama4TextConfig")],
)
def test_absent_keys_take_the_defaults_of_transformers(model_type: str, name: str) -> None:
    import transformers

    theirs = written_by_transformers(getattr(transformers, name)())
    assert read({"model_type": model_type}) == read(theirs)


NARROW = {"hidden_size": 64, "num_attention_heads": 8}
DERIVED: list[tuple[str, dict[str, Any]]] = [
    ("LlamaConfig", NARROW),
    ("LlamaConfig", NARROW | {"num_key_value_heads": None, "head_dim": None}),
    ("LlamaConfig", NARROW | {"head_dim": 4}),
    ("Qwen2Config", NARROW | {"num_key_value_heads": None}),
    ("Qwen2Config", NARROW | {"num_key_value_heads": 2, "head_dim": 16}),
    ("Llama4TextConfig", NARROW),
    ("Llama4TextConfig", NARROW | {"num_key_value_heads": 2, "head_dim": 16}),
]


@pytest.mark.parametrize(("name", "values"), DERIVED)
def test_head_counts_and_widths_are_derived_as_transformers_does(name: str, values: dict[str, Any]) -> None:
    import transformers

    config = getattr(transformers, name)(**values)
    ours = read(values | {"model_type": config.model_type})
    assert ours.num_key_value_heads == config.num_key_value_heads
    assert ours.head_dim == getattr(config, "head_dim", config.hidden_size // config.num_attention_heads)
    assert read(written_by_transformers(config)) == ours


@pytest.mark.parametrize("kind", KINDS)
def test_what_transformers_writes_is_read_and_what_we_write_it_reads(kind: str) -> None:
    theirs = make_config(kind)
    ours = read(written_by_transformers(theirs))
    back = type(theirs)(**hugging_face_config(ours))
    assert read(written_by_transformers(back)) == ours
    for key in ("no_rope_layers", "layer_types", "moe_layers", "rope_parameters", "use_qk_norm"):
        text, text_back = getattr(theirs, "text_config", theirs), getattr(back, "text_config", back)
        if hasattr(text, key) and key != "layer_types":
            assert getattr(text, key) == getattr(text_back, key)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_what_we_wrote_gives_the_same_config(kind: str) -> None:
    ours = read(written_by_transformers(make_config(kind)))
    assert read(hugging_face_config(ours)) == ours


@pytest.mark.parametrize("name", ["scout", "maverick"])
def test_presets_survive_the_way_through_config_json(name: str) -> None:
    assert read(hugging_face_config(preset(name))) == preset(name)


def test_no_rope_layers_names_the_layers_that_do_rotate() -> None:
    config = read(LLAMA4 | {"no_rope_layers": [0, 1, 1, 0, 1, 1, 1, 1]})
    assert [layer.rotates for layer in config.layers] == [False, True, True, False, True, True, True, True]
    assert [layer.chunk for layer in config.layers][:4] == [None, 8192, 8192, None]


@pytest.mark.parametrize("values", [{}, {"no_rope_layers": []}, {"no_rope_layers": None}])
def test_without_no_rope_layers_every_fourth_layer_sees_everything_unrotated(values: dict[str, Any]) -> None:
    config = read(LLAMA4 | values)
    assert [index for index, layer in enumerate(config.layers) if not layer.rotates] == [3, 7]
    assert [index for index, layer in enumerate(config.layers) if layer.chunk is None] == [3, 7]


def test_the_interval_of_unrotated_layers_can_be_set() -> None:
    config = read(LLAMA4 | {"no_rope_layer_interval": 3})
    assert [index for index, layer in enumerate(config.layers) if not layer.rotates] == [2, 5]


def test_layer_types_decide_what_a_layer_sees() -> None:
    config = read(LLAMA4 | {"layer_types": ["full_attention"] * 8, "attention_chunk_size": 64})
    assert all(layer.chunk is None for layer in config.layers)
    assert [layer.rotates for layer in config.layers].count(False) == 2


def test_a_chunk_size_of_null_means_that_nothing_is_chunked() -> None:
    assert all(layer.chunk is None for layer in read(LLAMA4 | {"attention_chunk_size": None}).layers)


def test_moe_layers_override_the_step() -> None:
    assert read(LLAMA4 | {"interleave_moe_layer_step": 2}).expert_layers == (1, 3, 5, 7)
    config = read(LLAMA4 | {"interleave_moe_layer_step": 2, "moe_layers": [0, 5]})
    assert config.expert_layers == (0, 5)


@pytest.mark.parametrize("values", [{"moe_layers": []}, {"interleave_moe_layer_step": 0}])
def test_a_llama4_without_mixtures_is_dense(values: dict[str, Any]) -> None:
    config = read(LLAMA4 | values | {"intermediate_size_mlp": 96, "intermediate_size": 48})
    assert config.experts is None
    assert config.expert_layers == ()
    assert config.intermediate_size == 96


def test_intermediate_size_is_the_experts_width_in_llama4() -> None:
    config = read(LLAMA4 | {"intermediate_size": 48, "intermediate_size_mlp": 96})
    assert config.experts is not None
    assert (config.experts.intermediate_size, config.experts.shared_intermediate_size) == (48, 48)
    assert config.intermediate_size == 96


@pytest.mark.parametrize(("value", "on"), [(4, True), (True, True), (0, False), (False, False), (None, True)])
def test_attention_temperature_is_a_switch_even_as_a_number(value: object, on: bool) -> None:
    assert (read(LLAMA4 | {"attn_temperature_tuning": value}).temperature is not None) == on


ROPE_SPELLINGS: list[dict[str, Any]] = [
    {"rope_theta": 500_000.0, "rope_scaling": {k: v for k, v in LLAMA3_ROPE.items() if k != "rope_theta"}},
    {"rope_parameters": LLAMA3_ROPE},
    {"rope_theta": 1.0, "rope_parameters": LLAMA3_ROPE},
    {"rope_theta": 500_000, "rope_scaling": {"type": "llama3", **LLAMA3_ROPE, "rope_type": None}},
]


@pytest.mark.parametrize("spelling", ROPE_SPELLINGS)
def test_both_spellings_of_rope_are_read(spelling: dict[str, Any]) -> None:
    assert read({"model_type": "llama", **spelling}).rope == RopeConfig(
        theta=500_000.0,
        layout="half",
        scaling=RopeScaling(
            factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
        ),
    )


def test_the_original_context_defaults_to_the_context_as_in_transformers() -> None:
    rope = {key: value for key, value in LLAMA3_ROPE.items() if not key.startswith("original")}
    scaling = read(
        {"model_type": "llama", "rope_parameters": rope, "max_position_embeddings": 4096}
    ).rope.scaling
    assert scaling is not None
    assert scaling.original_max_position_embeddings == 4096


def test_linear_scaling_slows_every_pair_and_is_written_again() -> None:
    config = read({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}})
    plain = read({"model_type": "llama"})
    assert rope_frequencies(config.rope, config.head_dim) == tuple(
        frequency / 4 for frequency in rope_frequencies(plain.rope, plain.head_dim)
    )
    assert read(hugging_face_config(config)) == config


@pytest.mark.parametrize(
    ("factor", "high", "theta", "head_dim"),
    [(8.0, 4.0, 5e5, 128), (32.0, 4.0, 5e5, 64), (16.0, 1.0, 5e5, 128), (8.0, 4.0, 5e5, 128)],
)
def test_rope_factors_of_a_gguf_become_the_rule_they_came_from(
    factor: float, high: float, theta: float, head_dim: int
) -> None:
    import numpy as np

    rule = RopeScaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=high, original_max_position_embeddings=8192
    )
    plain = read({"model_type": "llama", "rope_theta": theta, "head_dim": head_dim})
    scaled = replace(plain, rope=replace(plain.rope, scaling=rule))
    pairs = zip(rope_frequencies(plain.rope, head_dim), rope_frequencies(scaled.rope, head_dim), strict=True)
    divisors = tuple(float(np.float32(before / after)) for before, after in pairs)
    stored = replace(plain, rope=replace(plain.rope, divisors=divisors))
    assert read(hugging_face_config(stored)) == scaled


def test_rope_factors_of_no_known_rule_are_refused() -> None:
    plain = read({"model_type": "llama"})
    divisors = tuple(1.0 + index for index in range(plain.head_dim // 2))
    with pytest.raises(UnsupportedError, match="rope factors"):
        hugging_face_config(replace(plain, rope=replace(plain.rope, divisors=divisors)))


def test_scout_with_the_old_rope_values_is_noted() -> None:
    values = hugging_face_config(preset("scout"))
    assert config_notes(read(values)) == []
    values["text_config"]["rope_scaling"] |= {"factor": 8.0, "high_freq_factor": 4.0}
    assert "16/1" in config_notes(read(values))[0]


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"model_type": "mistral"}, "model_type"),
    ({"model_type": "llama", "attention_bias": True}, "attention_bias"),
    ({"model_type": "llama", "mlp_bias": True}, "mlp_bias"),
    ({"model_type": "llama", "hidden_act": "gelu"}, "hidden_act"),
    ({"model_type": "llama", "rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_type"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type"),
    ({"model_type": "llama", "rope_scaling": {"rope_type": "longrope"}}, "rope_type"),
    ({"model_type": "llama", "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"model_type": "llama", "rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ({"model_type": "llama", "rope_parameters": {"full_attention": {}}}, "full_attention"),
    ({"model_type": "qwen2", "use_sliding_window": True}, "use_sliding_window"),
    ({"model_type": "qwen2", "layer_types": ["sliding_attention"]}, "layer_types"),
    (LLAMA4 | {"attention_bias": True}, "attention_bias"),
    (LLAMA4 | {"layer_types": ["linear_attention"] * 8}, "layer_types"),
    (LLAMA4 | {"hidden_act": "relu"}, "hidden_act"),
    ({"model_type": "llama4", "text_config": LLAMA4, "vision_config": {"hidden_act": "relu"}}, "hidden_act"),
    ({"model_type": "llama4", "text_config": LLAMA4, "vision_config": {}}, "vision_config"),
    ({"model_type": "llama4", "text_config": LLAMA4, "vision_config": {"pixel_shuffle_ratio": 0.3}}, "pixel"),
    (
        {
            "model_type": "llama4",
            "text_config": LLAMA4,
            "vision_config": {"multi_modal_projector_bias": True},
        },
        "projector_bias",
    ),
]


@pytest.mark.parametrize(("values", "named"), REFUSED)
def test_what_we_do_not_implement_is_refused_by_name(values: dict[str, Any], named: str) -> None:
    with pytest.raises(UnsupportedError, match=named):
        read(values)


@pytest.mark.parametrize("missing", ["text_config", "vision_config"])
def test_a_multimodal_config_needs_both_halves(missing: str) -> None:
    values = hugging_face_config(preset("scout"))
    del values[missing]
    with pytest.raises(ModelFileError, match=missing):
        read(values)


def test_a_text_only_class_in_a_multimodal_config_has_no_tower() -> None:
    values = {"model_type": "llama4", "architectures": ["Llama4ForCausalLM"], "text_config": LLAMA4}
    assert read(values).vision is None


UNWRITABLE: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"qkv_bias": True}),
    ("qwen2", {"qkv_bias": False}),
    ("llama", {"qk_norm": True}),
    ("llama", {"layers": (LayerSpec(rotates=False),) * 2}),
    ("llama4-step1", {"layers": (LayerSpec(chunk=8), LayerSpec(chunk=16))}),
    ("llama4-step1", {"qkv_bias": True}),
]


@pytest.mark.parametrize(("kind", "changes"), UNWRITABLE)
def test_what_config_json_cannot_say_is_refused_not_dropped(kind: str, changes: dict[str, Any]) -> None:
    config = replace(read(written_by_transformers(make_config(kind))), **changes)
    with pytest.raises(UnsupportedError):
        hugging_face_config(config)


@pytest.mark.parametrize("name", ["scout", "maverick", "herd-1t", "mini", "nano"])
def test_presets_survive_being_written_and_read(name: str) -> None:
    config = preset(name)
    assert config_from_hugging_face(hugging_face_config(config), Path("config.json")) == config


def test_a_config_that_is_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    (tmp_path / "secret").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "config.json").symlink_to("../secret")
    with pytest.raises(ModelFileError, match=r"config\.json: is a link out of"):
        read_config(folder)


def test_a_config_may_be_a_link_into_the_blobs_of_a_hub_cache(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "0a1b", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "c0ffee").write_text('{"model_type": "llama"}', encoding="utf-8")
    (snapshot / "config.json").symlink_to("../../blobs/c0ffee")
    assert read_config(snapshot) == {"model_type": "llama"}
