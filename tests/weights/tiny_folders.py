"""Tiny random models of every family, saved by transformers itself: the independent side of our tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_DENSE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 131_072,
}
_LLAMA4 = {
    **_DENSE,
    "intermediate_size": 24,
    "intermediate_size_mlp": 48,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_local_experts": 4,
    "attention_chunk_size": 8,
    "max_position_embeddings": 262_144,
    "bos_token_id": 1,
    "eos_token_id": [2, 3],
    "pad_token_id": 0,
}
_VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "image_size": 28,
    "patch_size": 7,
    "vision_output_dim": 24,
    "projector_input_dim": 24,
    "projector_output_dim": 24,
}
KINDS = ("llama", "llama-tied", "qwen2", "llama4-dense", "llama4-step1", "llama4-step2", "llama4-vision")


def tiny_config(kind: str) -> tuple[str, dict[str, Any]]:
    """The transformers class of a kind, and the keyword arguments of its config."""
    llama4 = {**_LLAMA4, "num_hidden_layers": 4}
    return {
        "llama": ("Llama", {**_DENSE, "rope_parameters": LLAMA3_ROPE}),
        "llama-tied": ("Llama", {**_DENSE, "tie_word_embeddings": True}),
        "qwen2": ("Qwen2", {**_DENSE, "tie_word_embeddings": True}),
        "llama4-dense": ("Llama4Text", {**llama4, "moe_layers": [], "no_rope_layers": [1, 1, 1, 1]}),
        "llama4-step1": ("Llama4Text", {**llama4, "interleave_moe_layer_step": 1}),
        "llama4-step2": ("Llama4Text", {**llama4, "interleave_moe_layer_step": 2, "use_qk_norm": False}),
        "llama4-vision": ("Llama4", {"text_config": {**_LLAMA4}, "vision_config": _VISION}),
    }[kind]


def make_config(kind: str, *, wide: bool = False) -> Any:
    import transformers

    name, values = tiny_config(kind)
    if wide:
        changes = {"hidden_size": 64, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 4}
        target = values.get("text_config", values)
        target |= changes
        if "vision_config" in values:
            values["vision_config"] = values["vision_config"] | {"num_attention_heads": 8}
    return getattr(transformers, f"{name}Config")(**values)


def model_class(kind: str) -> Any:
    import transformers

    return (
        {
            "llama": transformers.LlamaForCausalLM,
            "qwen2": transformers.Qwen2ForCausalLM,
            "llama4": transformers.Llama4ForCausalLM,
        }[kind.partition("-")[0]]
        if kind != "llama4-vision"
        else transformers.Llama4ForConditionalGeneration
    )


def save_tiny(kind: str, folder: Path, *, dtype: str = "float32", wide: bool = False) -> Path:
    """A random model of that kind, as transformers saves it. Each parameter is filled: none stays all ones.

    `wide` ones have 16 heads in 8 groups, so that eight shards can share them.
    """
    import torch

    torch.manual_seed(KINDS.index(kind))
    model = model_class(kind)(make_config(kind, wide=wide))
    with torch.no_grad():
        for parameter in model.parameters():
            # Not model.to(): that would cast the image tower's complex rope table, with a warning.
            parameter.data = torch.randn(parameter.shape).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder


def state_dict(kind: str, folder: Path) -> dict[str, Any]:
    """What transformers loads from a folder."""
    loaded: dict[str, Any] = model_class(kind).from_pretrained(folder, dtype="auto").state_dict()
    return loaded
