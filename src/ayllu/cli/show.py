"""`ayllu show`: what a model is, read from its header alone."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ayllu.model.config import ModelConfig
    from ayllu.weights.checkpoint import Checkpoint
    from ayllu.weights.encoder import EncoderCheckpoint
    from ayllu.weights.installed import InstalledModel


def show(
    model: Annotated[str, typer.Argument(help="Name of an installed model, a path, or preset:NAME.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print a model's architecture, parameters, precisions, context, licence and memory needed."""
    facts = (
        _preset_facts(model.removeprefix("preset:")) if model.startswith("preset:") else _model_facts(model)
    )
    if as_json:
        print(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    width = max(map(len, facts))
    for name, value in facts.items():
        print(f"{name.replace('_', ' '):<{width}}  {_readable(value)}")


def _readable(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_readable(item)}" for key, item in value.items())
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _preset_facts(name: str) -> dict[str, Any]:
    import inspect

    from ayllu.model.presets import PRESETS, preset

    config = preset(name)
    about = (inspect.getdoc(PRESETS[name]) or "").replace("\n", " ")
    return {"name": f"preset:{name}", "about": about} | _architecture(config) | _memory(config)


def _model_facts(model: str) -> dict[str, Any]:
    from ayllu.settings import load_settings
    from ayllu.weights.checkpoint import open_checkpoint
    from ayllu.weights.encoder import is_encoder_folder
    from ayllu.weights.hf_config import config_notes
    from ayllu.weights.store import open_store

    installed = open_store(load_settings()).find(model)
    if is_encoder_folder(installed.path):
        return _encoder_facts(installed)
    checkpoint = open_checkpoint(installed.path)
    return {
        "name": installed.name,
        "path": str(installed.path),
        "format": checkpoint.format,
        "size_on_disk": _gigabytes(installed.size_bytes),
        **_architecture(checkpoint.config),
        "precision": _precision(checkpoint),
        "licence": installed.licence,
        "source": installed.source,
        **_memory(checkpoint.config),
        **({"note": " ".join(notes)} if (notes := config_notes(checkpoint.config)) else {}),
    }


def _encoder_facts(installed: InstalledModel) -> dict[str, Any]:
    from ayllu.weights.encoder import open_encoder
    from ayllu.weights.encoder_settings import read_encoder_settings

    checkpoint = open_encoder(installed.path)
    config = checkpoint.config
    settings = read_encoder_settings(installed.path, config)
    return {
        "name": installed.name,
        "path": str(installed.path),
        "format": installed.format,
        "size_on_disk": _gigabytes(installed.size_bytes),
        "architecture": "bert, an encoder: it turns texts into vectors and cannot talk",
        "parameters": config.parameters,
        "layers": config.num_hidden_layers,
        "width": config.hidden_size,
        "heads": config.num_attention_heads,
        "head_width": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": f"{settings.max_tokens} of at most {config.max_position_embeddings} tokens a text",
        "vectors": f"{config.hidden_size} numbers, {_POOLING[settings.pooling]}",
        "precision": _precision(checkpoint),
        "licence": installed.licence,
        "source": installed.source,
        "memory_float32": _gigabytes(config.parameters * 4),
    }


_POOLING = {"mean": "the mean of all tokens' states", "cls": "the state of the first token, [CLS]"}


def _architecture(config: ModelConfig) -> dict[str, Any]:
    facts: dict[str, Any] = {
        "architecture": config.architecture,
        "parameters": config.parameters,
        "active_per_token": config.active_parameters,
        "flops_per_token": f"{config.flops_per_token():.3g} forward, without attention over the context",
        "layers": _layers(config),
        "width": config.hidden_size,
        "heads": f"{config.num_attention_heads} query, {config.num_key_value_heads} key-value",
        "head_width": config.head_dim,
        "vocabulary": config.vocab_size,
        "context": config.max_position_embeddings,
    }
    if config.experts is not None:
        experts = config.experts
        facts["experts"] = f"{experts.num_experts}, {experts.top_k} chosen per token, 1 shared"
    if config.vision is not None:
        vision = config.vision
        facts["images"] = f"tiles of {vision.image_size} pixels, {vision.tokens_per_tile} tokens each"
    return facts


def _layers(config: ModelConfig) -> str:
    text = str(config.num_hidden_layers)
    local = sum(layer.chunk is not None for layer in config.layers)
    if local:
        text += f" ({local} see one chunk, {config.num_hidden_layers - local} see everything)"
    if config.expert_layers and len(config.expert_layers) < config.num_hidden_layers:
        text += f", {len(config.expert_layers)} with experts"
    return text


def _precision(checkpoint: Checkpoint | EncoderCheckpoint) -> dict[str, str]:
    total = sum(checkpoint.bytes_by_encoding.values())
    return {encoding: f"{100 * size / total:.1f}%" for encoding, size in checkpoint.bytes_by_encoding.items()}


def _memory(config: ModelConfig) -> dict[str, Any]:
    from ayllu.engine.parameters import DEFAULT_CONTEXT

    context = min(DEFAULT_CONTEXT, config.max_position_embeddings)
    return {
        "cache_per_token": f"{config.kv_bytes_per_token:,} bytes in bfloat16",
        "memory_bfloat16": _gigabytes(config.parameters * 2 + config.kv_bytes(context))
        + f" with {context:,} tokens",
        "memory_float32": _gigabytes(config.parameters * 4 + config.kv_bytes(context, 4))
        + f" with {context:,} tokens",
    }


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB"
