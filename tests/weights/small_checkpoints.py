"""Small models of every architecture as checkpoints of random numbers, without files and without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ayllu.model.config import (
    AttentionTemperature,
    ExpertsConfig,
    LayerSpec,
    ModelConfig,
    RopeConfig,
    RopeScaling,
    VisionConfig,
)
from ayllu.model.parameters import parameter_shapes
from ayllu.model.presets import llama4_layers
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.tensors import PlainTensor

SIZES: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 128,
    "max_position_embeddings": 256,
}
EXPERTS = ExpertsConfig(num_experts=4, top_k=2, intermediate_size=96, shared_intermediate_size=32)

CONFIGS: dict[str, ModelConfig] = {
    "llama": ModelConfig(architecture="llama", layers=(LayerSpec(),) * 2, **SIZES),
    "llama interleaved and tied": ModelConfig(
        architecture="llama",
        layers=(LayerSpec(),) * 2,
        rope=RopeConfig(theta=500_000.0, layout="interleaved"),
        tie_word_embeddings=True,
        **SIZES,
    ),
    "llama with scaled rope": ModelConfig(
        architecture="llama",
        layers=(LayerSpec(),) * 2,
        rope=RopeConfig(
            theta=500_000.0,
            scaling=RopeScaling(
                factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            ),
        ),
        **SIZES,
    ),
    "llama with wide heads and layers that do not rotate": ModelConfig(
        architecture="llama",
        layers=(LayerSpec(), LayerSpec(rotates=False)),
        **(SIZES | {"head_dim": 32}),
    ),
    "qwen2": ModelConfig(
        architecture="qwen2",
        layers=(LayerSpec(),) * 2,
        rope=RopeConfig(theta=1_000_000.0),
        rms_norm_eps=1e-6,
        qkv_bias=True,
        **SIZES,
    ),
    "llama4 as released": ModelConfig(
        architecture="llama4",
        layers=llama4_layers(5, chunk=8192, expert_step=2),
        rope=RopeConfig(theta=500_000.0, layout="interleaved"),
        qk_norm=True,
        temperature=AttentionTemperature(),
        experts=EXPERTS,
        **SIZES,
    ),
    "llama4 small chunks": ModelConfig(
        architecture="llama4",
        layers=llama4_layers(4, chunk=8, expert_step=1),
        rope=RopeConfig(
            layout="interleaved",
            scaling=RopeScaling(
                factor=16.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=64
            ),
        ),
        temperature=AttentionTemperature(floor_scale=8.0, attn_scale=0.3),
        experts=EXPERTS,
        **SIZES,
    ),
    "llama4 without temperature": ModelConfig(
        architecture="llama4",
        layers=llama4_layers(4, chunk=8192, expert_step=1),
        rope=RopeConfig(layout="interleaved"),
        qk_norm=True,
        experts=EXPERTS,
        **SIZES,
    ),
    "llama4 dense, seeing everything": ModelConfig(
        architecture="llama4",
        layers=(LayerSpec(),) * 2,
        rope=RopeConfig(layout="interleaved"),
        qk_norm=True,
        **SIZES,
    ),
}

VISION = VisionConfig(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=64,
    image_size=56,
    patch_size=14,
    adapter_hidden_size=32,
    adapter_output_size=32,
    patch_token_id=5,
)


def random_checkpoint(
    config: ModelConfig, seed: int = 0, dtype: Any = np.float32, metadata: dict[str, Any] | None = None
) -> Checkpoint:
    rng = np.random.default_rng(seed)
    tensors = {
        name: PlainTensor(rng.normal(scale=0.1, size=shape).astype(np.float32).astype(dtype))
        for name, shape in parameter_shapes(config).items()
    }
    return Checkpoint(Path("random"), "safetensors", config, tensors, metadata or {})
