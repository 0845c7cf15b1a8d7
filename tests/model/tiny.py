"""Small configs of every family: borders and patterns of the real ones in a few thousand parameters."""

from __future__ import annotations

from ayllu.model.config import (
    AttentionTemperature,
    ExpertsConfig,
    LayerSpec,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    VisionConfig,
)
from ayllu.model.presets import llama4_layers

VOCABULARY = 97


def tiny_vision() -> VisionConfig:
    return VisionConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=56,
        adapter_hidden_size=48,
        adapter_output_size=48,
        patch_token_id=90,
    )


def tiny_llama4(
    *,
    layers: int = 8,
    expert_step: int = 1,
    qk_norm: bool = True,
    chunk: int = 8,
    top_k: int = 1,
    vision: bool = False,
) -> ModelConfig:
    return ModelConfig(
        architecture="llama4",
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        layers=llama4_layers(layers, chunk=chunk, expert_step=expert_step),
        max_position_embeddings=256,
        rope=RopeConfig(
            theta=500_000.0,
            layout="interleaved",
            scaling=RopeScaling(
                factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=32
            ),
        ),
        qk_norm=qk_norm,
        temperature=AttentionTemperature(floor_scale=8),
        experts=ExpertsConfig(num_experts=4, top_k=top_k, intermediate_size=48, shared_intermediate_size=48),
        vision=tiny_vision() if vision else None,
    )


def tiny_llama(*, tied: bool = True) -> ModelConfig:
    return ModelConfig(
        architecture="llama",
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        layers=(LayerSpec(),) * 3,
        max_position_embeddings=256,
        tie_word_embeddings=tied,
    )


def tiny_qwen2() -> ModelConfig:
    return ModelConfig(
        architecture="qwen2",
        vocab_size=VOCABULARY,
        hidden_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        layers=(LayerSpec(),) * 3,
        max_position_embeddings=256,
        qkv_bias=True,
    )
