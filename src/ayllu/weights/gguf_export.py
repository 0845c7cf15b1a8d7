"""A checkpoint of any format written as a GGUF model that llama.cpp and ayllu open.

Names, the order of rotary dimensions and the metadata follow GGUF's rules for the architecture. Weights
keep their numbers: the only losses are those of the number format asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ayllu.errors import UnsupportedError, did_you_mean
from ayllu.model.config import ModelConfig
from ayllu.progress import SILENT, Progress
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.gguf_blocks import BLOCK_TYPE_NAMED, READABLE_TYPES, WRITABLE_TYPES, QuantisedTensor
from ayllu.weights.gguf_config import ROPE_FACTORS, ROPE_LAYOUT, metadata_from_config, rope_divisors
from ayllu.weights.gguf_writer import TensorToWrite, write_gguf
from ayllu.weights.names import gguf_names
from ayllu.weights.rope_layout import permute_rope_rows
from ayllu.weights.tensors import Array, PlainTensor, StoredTensor

# llama.cpp's numbers for what most of a file's weights are stored as (`llama_ftype`).
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "BF16": 32} | {
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
}
_QUANTIZATION_VERSION = 2
_DERIVED_GENERAL = {"architecture", "file_type", "quantization_version", "alignment"}


@dataclass(frozen=True)
class SavedGguf:
    """What was written. `notes` say, for a person, what the format could not take or took differently."""

    path: Path
    nbytes: int
    notes: tuple[str, ...]


def save_gguf(
    checkpoint: Checkpoint,
    path: Path,
    encoding: str | None = None,
    tokenizer_metadata: Mapping[str, Any] | None = None,
    progress: Progress = SILENT,
) -> SavedGguf:
    """Write `checkpoint` to `path` in one of F32, F16, BF16, Q8_0, Q4_0, Q4_1, or None: each tensor as it is.

    One-dimensional tensors and routers are written in F32, rows that do not fill blocks in F16. Without
    `tokenizer_metadata` the vocabulary of a GGUF checkpoint is passed on. An image tower is left out, as
    GGUF keeps it in a file of its own; the notes say so. Raises UnsupportedError, NoSpaceError.
    """
    if encoding is not None and encoding not in WRITABLE_TYPES:
        raise UnsupportedError(
            f"GGUF files are not written in {encoding}.{did_you_mean(encoding, WRITABLE_TYPES)}",
            f"Use one of {', '.join(WRITABLE_TYPES)}.",
        )
    notes: list[str] = []
    tensors = [*_rope_factors(checkpoint.config), *_tensors(checkpoint, encoding, notes)]
    metadata = metadata_from_config(checkpoint.config)
    metadata |= {key: value for key, value in checkpoint.metadata.items() if _describes(key)}
    metadata["general.file_type"] = _FILE_TYPES[encoding or _prevailing(tensors)]
    metadata["general.quantization_version"] = _QUANTIZATION_VERSION
    if tokenizer_metadata is None:
        tokenizer_metadata = {
            key: value for key, value in checkpoint.metadata.items() if key.startswith("tokenizer.")
        }
    nbytes = write_gguf(path, metadata | dict(tokenizer_metadata), tensors, progress)
    return SavedGguf(path, nbytes, tuple(notes))


def _describes(key: str) -> bool:
    room, _, rest = key.partition(".")
    return room == "general" and rest not in _DERIVED_GENERAL


def _prevailing(tensors: list[TensorToWrite]) -> str:
    """The encoding that holds most numbers."""
    totals: dict[str, int] = {}
    for tensor in tensors:
        totals[tensor.encoding] = totals.get(tensor.encoding, 0) + tensor.source.elements
    return max(totals, key=lambda name: totals[name])


def _tensors(checkpoint: Checkpoint, encoding: str | None, notes: list[str]) -> list[TensorToWrite]:
    names = gguf_names()
    tensors = []
    if checkpoint.config.vision is not None:
        notes.append("The image tower is not part of this file: GGUF keeps it in one of its own.")
    for ours, stored in checkpoint.tensors.items():
        theirs = names.theirs(ours)
        if theirs is None:
            if ours.startswith("vision."):
                continue
            raise UnsupportedError(f"GGUF has no name for the parameter {ours}.", "Keep it as safetensors.")
        kind = _encoding_for(theirs, stored, encoding, notes)
        tensors.append(TensorToWrite(theirs, stored, kind, _rope_order(ours, checkpoint.config)))
    return tensors


def _encoding_for(name: str, source: StoredTensor, wanted: str | None, notes: list[str]) -> str:
    if len(source.shape) == 1 or name.endswith("ffn_gate_inp.weight"):
        return "F32"
    if wanted is None:
        if source.encoding in READABLE_TYPES:
            return source.encoding
        wanted = "BF16"
        notes.append(f"{name} is written as BF16: GGUF has no {source.encoding}.")
    block = BLOCK_TYPE_NAMED[wanted].elements
    if source.shape[-1] % block:
        notes.append(
            f"{name} is written as F16: rows of {source.shape[-1]} do not fill {wanted} blocks of {block}."
        )
        return "F16"
    return wanted


def _rope_factors(config: ModelConfig) -> list[TensorToWrite]:
    if config.rope.scaling is None and config.rope.divisors is None:
        return []
    factors = np.array(rope_divisors(config.rope, config.head_dim), np.float32)
    return [TensorToWrite(ROPE_FACTORS, PlainTensor(factors), "F32")]


def _rope_order(name: str, config: ModelConfig) -> Callable[[StoredTensor], StoredTensor] | None:
    """What puts the rotary dimensions of a query or key projection in GGUF's order; None for all else."""
    source, target = config.rope.layout, ROPE_LAYOUT[config.architecture]
    if source == target or not any(part in name for part in (".attention.q_proj.", ".attention.k_proj.")):
        return None

    def permuted(rows: Array) -> Array:
        return permute_rope_rows(rows, len(rows) // config.head_dim, source=source, target=target)

    def reorder(stored: StoredTensor) -> StoredTensor:
        if isinstance(stored, QuantisedTensor):
            return stored.with_rows(permuted(stored.raw))
        if isinstance(stored, PlainTensor):
            return stored.view(permuted(stored.array))
        return PlainTensor(permuted(stored.decode()))

    return reorder
