"""Random LoRA adapters as PEFT's folders, made without PEFT, and the slow twin of applying one: merging it.

`merged_decoder` adds scale * B A to copies of the weights; whatever applies adapters faster must agree.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ayllu.model.config import ModelConfig
from ayllu.model.decoder import Decoder
from ayllu.model.parameters import parameter_shapes
from ayllu.progress import SILENT
from ayllu.weights.adapter import Adapter
from ayllu.weights.load import tensor_of
from ayllu.weights.names import hugging_face_names
from ayllu.weights.safetensors_writer import OutgoingTensor, write_safetensors
from ayllu.weights.tensors import ENCODING_OF_DTYPE

ALL_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def adapter_settings(**changes: Any) -> dict[str, Any]:
    """An adapter_config.json with the keys that matter, `changes` over it; a change to None drops the key."""
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "bias": "none",
        "r": 4,
        "lora_alpha": 8,
        "target_modules": list(ALL_TARGETS),
        "inference_mode": True,
    } | changes
    return {key: value for key, value in settings.items() if value is not None}


def adapter_tensors(
    config: ModelConfig,
    seed: int = 0,
    *,
    rank: int = 4,
    targets: Iterable[str] = ALL_TARGETS,
    layers: Iterable[int] | None = None,
    multimodal: bool = False,
    std: float = 0.2,
) -> dict[str, NDArray[np.float32]]:
    """Random A [rank, inputs] and B [outputs, rank] under PEFT's names for projections of the decoder."""
    rng = np.random.default_rng(seed)
    names = hugging_face_names(config.architecture, multimodal=multimodal)
    wanted_kinds = tuple(f".{target}.weight" for target in targets)
    wanted_layers = set(range(len(config.layers)) if layers is None else layers)
    tensors = {}
    for ours, shape in parameter_shapes(config).items():
        if not ours.startswith("layers.") or not ours.endswith(wanted_kinds):
            continue
        if int(ours.split(".")[1]) not in wanted_layers:
            continue
        module = f"base_model.model.{names.theirs(ours)}".removesuffix(".weight")
        for side, size in (("A", (rank, shape[1])), ("B", (shape[0], rank))):
            tensors[f"{module}.lora_{side}.weight"] = rng.normal(scale=std, size=size).astype(np.float32)
    return tensors


def save_adapter(folder: Path, tensors: Mapping[str, NDArray[Any]], settings: Mapping[str, Any]) -> Path:
    """`folder`, made, with an adapter of exactly these tensors and settings."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(settings), "utf-8")
    outgoing = [_outgoing(name, array) for name, array in tensors.items()]
    with SILENT.task("adapter", None) as task:
        write_safetensors(
            folder / "adapter_model.safetensors", outgoing, metadata={"format": "pt"}, task=task
        )
    return folder


def write_adapter(
    folder: Path,
    config: ModelConfig,
    seed: int = 0,
    *,
    rank: int = 4,
    targets: Iterable[str] = ALL_TARGETS,
    layers: Iterable[int] | None = None,
    multimodal: bool = False,
    std: float = 0.2,
    dtype: Any = np.float32,
    **settings: Any,
) -> Path:
    """A random adapter for `config` in `folder`; `settings` go into its adapter_config.json."""
    targets = list(targets)
    tensors = adapter_tensors(
        config, seed, rank=rank, targets=targets, layers=layers, multimodal=multimodal, std=std
    )
    changes = {"r": rank, "target_modules": targets} | settings
    stored = {name: array.astype(dtype) for name, array in tensors.items()}
    return save_adapter(folder, stored, adapter_settings(**changes))


def _outgoing(name: str, array: NDArray[Any]) -> OutgoingTensor:
    return OutgoingTensor(name, ENCODING_OF_DTYPE[array.dtype], array.shape, lambda: [array])


@torch.no_grad()
def merged_decoder(decoder: Decoder, adapter: Adapter) -> Decoder:
    """A decoder with W + scale * B A in place of every adapted W; what is not adapted is shared."""
    state = dict(decoder.state_dict())
    for path, change in adapter.modules.items():
        a, b = (tensor_of(matrix).float() for matrix in (change.a, change.b))
        weight = state[f"{path}.weight"]
        delta = (change.scale * (b @ a)).to(weight.device)
        state[f"{path}.weight"] = (weight.float() + delta).to(weight.dtype)
    with torch.device("meta"):
        merged = Decoder(decoder.config)
    if "embed_tokens.weight" not in state:
        merged.embed_tokens = decoder.embed_tokens
    merged.load_state_dict(state, assign=True)
    return merged.eval().requires_grad_(False)
