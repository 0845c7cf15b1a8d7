"""Named architectures: the released Llama 4 models, one inferred, and ayllu's own. Needs no torch.

Released ones follow the published checkpoints (their parameter counts are tested to the unit). `behemoth-2t`
is our inference from the few published figures; `herd-1t`, `mini` and `nano` are ours, and
`docs/presets.md` says why they have the shape they have.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ayllu.errors import UsageError, did_you_mean
from ayllu.model.config import (
    AttentionTemperature,
    ExpertsConfig,
    LayerSpec,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    VisionConfig,
)

NOPE_PERIOD = 4
"""Every fourth layer sees everything and does not rotate; the three before it rotate and see one chunk."""


def llama4_layers(count: int, *, chunk: int, expert_step: int) -> tuple[LayerSpec, ...]:
    """Llama 4's pattern (spec 2). Layer i has experts when i + 1 is a multiple of `expert_step` (0: none)."""
    return tuple(
        LayerSpec(
            rotates=(index + 1) % NOPE_PERIOD != 0,
            chunk=chunk if (index + 1) % NOPE_PERIOD else None,
            experts=bool(expert_step) and (index + 1) % expert_step == 0,
        )
        for index in range(count)
    )


_LLAMA4_ROPE = RopeConfig(theta=500_000.0, layout="interleaved")
_SCOUT_ROPE = RopeConfig(
    theta=500_000.0,
    layout="interleaved",
    scaling=RopeScaling(
        factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=8192
    ),
)


def scout() -> ModelConfig:
    """Llama 4 Scout 17B-16E."""
    return ModelConfig(
        architecture="llama4",
        vocab_size=202_048,
        hidden_size=5120,
        num_attention_heads=40,
        num_key_value_heads=8,
        head_dim=128,
        intermediate_size=16_384,
        layers=llama4_layers(48, chunk=8192, expert_step=1),
        max_position_embeddings=10_485_760,
        rope=_SCOUT_ROPE,
        qk_norm=True,
        temperature=AttentionTemperature(),
        experts=ExpertsConfig(num_experts=16, top_k=1, intermediate_size=8192, shared_intermediate_size=8192),
        vision=VisionConfig(),
    )


def maverick() -> ModelConfig:
    """Llama 4 Maverick 17B-128E: Scout's layers with eight times the experts in every second one."""
    return replace(
        scout(),
        layers=llama4_layers(48, chunk=8192, expert_step=2),
        max_position_embeddings=1_048_576,
        rope=_LLAMA4_ROPE,
        qk_norm=False,
        experts=ExpertsConfig(
            num_experts=128, top_k=1, intermediate_size=8192, shared_intermediate_size=8192
        ),
    )


def guard_4_12b() -> ModelConfig:
    """Llama Guard 4: Scout's shared experts as a dense model. That all layers rotate and see everything
    within 8,192 tokens is what its converter implies; the published facts do not say (spec 14)."""
    return replace(
        scout(),
        intermediate_size=8192,
        layers=(LayerSpec(),) * 48,
        max_position_embeddings=8192,
        temperature=None,
        experts=None,
    )


def behemoth_2t() -> ModelConfig:
    """OUR INFERENCE of Llama 4 Behemoth: published are only 288B active, 16 experts and about 2T in total."""
    return replace(
        scout(),
        hidden_size=16_384,
        num_attention_heads=128,
        intermediate_size=53_248,
        layers=llama4_layers(88, chunk=8192, expert_step=1),
        max_position_embeddings=262_144,
        rope=_LLAMA4_ROPE,
        qk_norm=False,
        experts=ExpertsConfig(
            num_experts=16, top_k=1, intermediate_size=26_624, shared_intermediate_size=26_624
        ),
    )


def herd_1t() -> ModelConfig:
    """Ours: one trillion parameters in all, about 41 billion active."""
    return replace(
        scout(),
        hidden_size=7168,
        num_attention_heads=56,
        intermediate_size=22_016,
        layers=llama4_layers(64, chunk=8192, expert_step=2),
        experts=ExpertsConfig(
            num_experts=128, top_k=1, intermediate_size=11_008, shared_intermediate_size=11_008
        ),
    )


def mini() -> ModelConfig:
    """Ours, for training on one accelerator: about 150M active, 1.3B in all, with a small image tower."""
    return ModelConfig(
        architecture="llama4",
        vocab_size=65_536,
        hidden_size=768,
        num_attention_heads=12,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=2048,
        layers=llama4_layers(16, chunk=2048, expert_step=1),
        max_position_embeddings=131_072,
        rope=_LLAMA4_ROPE,
        qk_norm=True,
        temperature=AttentionTemperature(floor_scale=2048),
        experts=ExpertsConfig(num_experts=32, top_k=1, intermediate_size=1024, shared_intermediate_size=1024),
        tie_word_embeddings=True,
        vision=VisionConfig(
            hidden_size=384,
            num_hidden_layers=8,
            num_attention_heads=6,
            intermediate_size=1536,
            image_size=224,
            adapter_hidden_size=1024,
            adapter_output_size=1024,
            patch_token_id=65_536 - 2048 + 92,
        ),
    )


def nano() -> ModelConfig:
    """Ours, for training on a laptop: about 30M active, 139M in all, with a tiny image tower."""
    return ModelConfig(
        architecture="llama4",
        vocab_size=32_768,
        hidden_size=384,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=64,
        intermediate_size=1536,
        layers=llama4_layers(8, chunk=2048, expert_step=1),
        max_position_embeddings=131_072,
        rope=_LLAMA4_ROPE,
        qk_norm=True,
        temperature=AttentionTemperature(floor_scale=2048),
        experts=ExpertsConfig(num_experts=16, top_k=1, intermediate_size=768, shared_intermediate_size=768),
        tie_word_embeddings=True,
        vision=VisionConfig(
            hidden_size=192,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=768,
            image_size=112,
            adapter_hidden_size=512,
            adapter_output_size=512,
            # The vocabulary ends with Llama 4's 2,048 control slots; `<|patch|>` is slot 92 (spec 7).
            patch_token_id=32_768 - 2048 + 92,
        ),
    )


PRESETS: dict[str, Callable[[], ModelConfig]] = {
    "scout": scout,
    "maverick": maverick,
    "guard-4-12b": guard_4_12b,
    "behemoth-2t": behemoth_2t,
    "herd-1t": herd_1t,
    "mini": mini,
    "nano": nano,
}


def preset(name: str) -> ModelConfig:
    """The config of a named preset. Raises UsageError for an unknown name."""
    if name not in PRESETS:
        raise UsageError(
            f"There is no preset {name!r}.{did_you_mean(name, PRESETS)}", f"Presets: {', '.join(PRESETS)}."
        )
    return PRESETS[name]()
