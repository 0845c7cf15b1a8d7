"""Sizes: presets against the spec to the unit (T1), counts against the modules, cache bytes (T15)."""

from __future__ import annotations

import pytest
import torch

from ayllu.errors import UnsupportedError, UsageError
from ayllu.model.config import ModelConfig
from ayllu.model.decoder import Decoder
from ayllu.model.parameters import parameter_shapes
from ayllu.model.presets import PRESETS, preset
from tests.model.tiny import tiny_llama, tiny_llama4, tiny_qwen2


def _modules(config: ModelConfig) -> Decoder:
    with torch.device("meta"):
        return Decoder(config)


@pytest.mark.parametrize(
    ("name", "total", "text", "active"),
    [
        ("scout", 108_641_793_536, 107_769_861_120, 17_172_894_720),
        ("maverick", 401_583_781_376, 400_711_848_960, 17_184_691_200),
        ("guard-4-12b", 12_001_097_216, 11_129_164_800, 11_129_164_800),
    ],
)
def test_t1_released_models_count_to_the_unit(name: str, total: int, text: int, active: int) -> None:
    config = preset(name)
    decoder = _modules(config)
    assert sum(parameter.numel() for parameter in decoder.parameters()) == total
    assert (config.parameters, config.text_parameters, config.active_parameters) == (total, text, active)


def test_t1_vision_parts_count_to_the_unit() -> None:
    decoder = _modules(preset("scout"))
    count = {
        name: sum(p.numel() for p in part.parameters()) for name, part in decoder.vision.named_children()
    }
    assert count == {"tower": 811_115_008, "adapter": 39_845_888, "projector": 20_971_520}


@pytest.mark.parametrize("name", list(PRESETS))
def test_counted_parameters_and_listed_shapes_are_those_of_the_modules(name: str) -> None:
    config = preset(name)
    modules = {key: tuple(value.shape) for key, value in _modules(config).state_dict().items()}
    assert parameter_shapes(config) == modules
    assert config.parameters == sum(torch.Size(shape).numel() for shape in modules.values())


@pytest.mark.parametrize(
    "config", [tiny_llama(), tiny_llama(tied=False), tiny_qwen2(), tiny_llama4(expert_step=2, vision=True)]
)
def test_shapes_are_those_of_the_modules_for_every_family(config: ModelConfig) -> None:
    modules = {key: tuple(value.shape) for key, value in _modules(config).state_dict().items()}
    assert parameter_shapes(config) == modules
    assert config.parameters == sum(torch.Size(shape).numel() for shape in modules.values())


def test_our_own_presets_have_the_size_in_their_name() -> None:
    assert preset("herd-1t").parameters == pytest.approx(1.0e12, rel=0.005)
    assert preset("behemoth-2t").parameters == pytest.approx(2.0e12, rel=0.02)
    assert preset("behemoth-2t").active_parameters == pytest.approx(288e9, rel=0.01)
    assert preset("nano").active_parameters == pytest.approx(30e6, rel=0.02)
    assert preset("mini").active_parameters == pytest.approx(150e6, rel=0.02)


def test_nope_layers_are_every_fourth_and_maverick_has_experts_in_odd_layers() -> None:
    layers = preset("maverick").layers
    assert [i for i, layer in enumerate(layers) if not layer.rotates] == list(range(3, 48, 4))
    assert all((layer.chunk is None) == (not layer.rotates) for layer in layers)
    assert preset("maverick").expert_layers == tuple(range(1, 48, 2))
    assert preset("scout").expert_layers == tuple(range(48))


def test_t15_cache_bytes_of_the_spec() -> None:
    scout = preset("scout")
    assert scout.kv_bytes_per_token == 49_152
    assert scout.kv_bytes(8192) == 8192 * 196_608
    gib = 1 << 30
    assert scout.kv_bytes(131_072) / gib == pytest.approx(7.125)
    assert scout.kv_bytes(1 << 20) / gib == pytest.approx(49.125)
    assert scout.kv_bytes(10_485_760) / gib == pytest.approx(481.125)


def test_flops_count_two_per_active_matrix_weight_and_the_attention_over_what_is_seen() -> None:
    config = tiny_llama4()
    attention = 64 * (64 + 2 * 32) + 64 * 64
    mixture = 2 * 3 * 64 * 48 + 64 * 4
    matrices = 8 * (attention + mixture) + 97 * 64
    one_key = 4 * config.num_attention_heads * config.head_dim * config.num_hidden_layers
    assert config.flops_per_token(0) == 2 * matrices + one_key
    # Position 15 with chunks of 8: two global layers see 16 keys, six local ones 8.
    assert config.flops_per_token(15) - 2 * matrices == 4 * 64 * (2 * 16 + 6 * 8)


def test_unknown_preset_suggests_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean maverick"):
        preset("maverik")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("hidden_size", -1),
        ("hidden_size", 10**18),
        ("num_key_value_heads", 3),
        ("head_dim", 15),
        ("rms_norm_eps", float("nan")),
        ("layers", ()),
        ("max_position_embeddings", True),
        ("architecture", "gpt2"),
    ],
)
def test_impossible_sizes_are_refused(field: str, value: object) -> None:
    import dataclasses

    with pytest.raises(UnsupportedError):
        dataclasses.replace(tiny_llama(), **{field: value})
