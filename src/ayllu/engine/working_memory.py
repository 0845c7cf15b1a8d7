"""An upper bound of the memory one step takes beside weights and cache, from the architecture alone.

Counts the numbers that are alive at the same time in the widest layer, at 4 bytes each whatever the
precision, since sums and scores are float32. Needs no torch.
"""

from __future__ import annotations

from ayllu.model.config import ModelConfig, VisionConfig

NUMBER_BYTES = 4
MARGIN = (5, 4)
"""A quarter more than counted: allocators round up and keep what was freed."""

FIXED_BYTES = 64 << 20
"""Buffers that do not depend on the model: threads' scratch memory, tables, the interpreter's own growth."""

KEYS_TOGETHER = 4096
"""Keys that a prompt piece is compared with at once (`paged_memory` goes through longer ones in tiles)."""

LOGIT_ROWS = 32
"""Rows of logits in memory at once while a prompt is scored; while decoding, one per slot."""

TILES_TOGETHER = 4
"""Image tiles in the vision tower at once."""


def working_bytes(
    config: ModelConfig,
    *,
    context: int,
    slots: int,
    step_tokens: int,
    bytes_per_value: int,
    expands_heads: bool = False,
) -> int:
    """Bytes of one step: 5/4 x the larger of text and images, and 64 MiB.

    Text: activations of `step_tokens` rows in the widest layer, attention, and logits. bytes_per_value is
    that of the cache. expands_heads: attention copies shared key-value heads for every query head (torch
    does where no fused kernel takes grouped heads and a mask together, as on GPUs; on CPUs it does not).
    """
    rows = max(step_tokens, slots)
    text = (
        rows * _activations_per_row(config)
        + _attention_numbers(config, min(context, KEYS_TOGETHER), rows)
        + _logit_numbers(config, slots)
    ) * NUMBER_BYTES
    text += _gathered_bytes(config, context, slots, bytes_per_value, expands_heads)
    images = 0 if config.vision is None else image_numbers(config.vision, config.hidden_size) * NUMBER_BYTES
    return max(text, images) * MARGIN[0] // MARGIN[1] + FIXED_BYTES


def _activations_per_row(config: ModelConfig) -> int:
    """The residual stream, its normalised copy, the layer's result and their sum; with it either q, k, v,
    their rotated and widened copies and the weighted values, or what the feed-forward holds."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    widest = 4 * (queries + keys)
    if any(not layer.experts for layer in config.layers):
        widest = max(widest, 3 * config.intermediate_size)
    if config.experts is not None and config.expert_layers:
        experts = config.experts
        # Inputs and results of the chosen experts, and gate, up and product of those at work: all rows may
        # have chosen the same one. The shared expert runs beside what they gave.
        routed = experts.top_k * (2 * config.hidden_size + 3 * experts.intermediate_size)
        shared = config.hidden_size + 3 * experts.shared_intermediate_size
        widest = max(widest, routed + config.hidden_size, shared)
        widest = max(widest, experts.num_experts)
    return 4 * config.hidden_size + widest


def _attention_numbers(config: ModelConfig, keys: int, rows: int) -> int:
    """Scores of one prompt piece against `keys`, before and after the softmax, and the keys and values."""
    queries = config.num_attention_heads * config.head_dim
    shared = config.num_key_value_heads * config.head_dim
    return 2 * config.num_attention_heads * rows * keys + 2 * keys * (queries + shared)


def _gathered_bytes(
    config: ModelConfig, context: int, slots: int, bytes_per_value: int, expands_heads: bool
) -> int:
    """Keys and values of all slots, brought together for one layer of a decoding step, and the scores."""
    heads = config.num_key_value_heads + (config.num_attention_heads if expands_heads else 0)
    values = 2 * slots * context * heads * config.head_dim * bytes_per_value
    return values + 2 * slots * context * config.num_attention_heads * NUMBER_BYTES


def _logit_numbers(config: ModelConfig, slots: int) -> int:
    """Logits in the model's precision and widened, and six copies of one row for the sampler."""
    return (2 * max(slots, LOGIT_ROWS) + 6) * config.vocab_size


def image_numbers(vision: VisionConfig, width: int) -> int:
    """One block of the tower and the adapter, for all tiles that run together."""
    patches = vision.grid**2 + 1
    pixels = 2 * vision.num_channels * vision.image_size**2
    block = patches * (3 * vision.hidden_size + max(8 * vision.hidden_size, 2 * vision.intermediate_size))
    scores = 2 * vision.num_attention_heads * patches**2
    shuffled = vision.hidden_size * vision.shuffle**2
    adapter = 2 * (shuffled + vision.adapter_hidden_size + vision.adapter_output_size) + width
    return TILES_TOGETHER * (pixels + block + scores + vision.tokens_per_tile * adapter)
