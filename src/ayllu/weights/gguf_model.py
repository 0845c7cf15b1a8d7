"""A GGUF file as a checkpoint: its config and its tensors under our names.

Files come from strangers; whatever they leave out, contradict or add is an error that names the file and
the place, before a single weight is decoded. Writing is `gguf_export`.
"""

from __future__ import annotations

from pathlib import Path

from ayllu.errors import ModelFileError, UnsupportedError
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.gguf import GgufFile, read_gguf
from ayllu.weights.gguf_config import ROPE_FACTORS, architecture_of, config_from_metadata
from ayllu.weights.gguf_metadata import Metadata
from ayllu.weights.names import gguf_names
from ayllu.weights.tensors import StoredTensor


def open_gguf(path: Path) -> Checkpoint:
    """Open a GGUF model of the architectures llama, qwen2 or llama4; nothing is decoded yet.

    Raises ModelFileError for damaged or contradictory files, UnsupportedError for number formats,
    architectures and arithmetic that are not known.
    """
    file = read_gguf(path)
    metadata = Metadata(path, file.metadata)
    architecture_of(metadata)
    tensors = _our_tensors(file)
    embedding = file.infos.get("token_embd.weight")
    if embedding is None:
        raise ModelFileError(path, "a tensor is missing", field="token_embd.weight")
    try:
        config = config_from_metadata(
            path,
            file.metadata,
            embedding_rows=embedding.shape[0],
            tied="output.weight" not in file.infos,
            qkv_bias="blk.0.attn_q.bias" in file.infos,
            divisors=_rope_divisors(file),
        )
    except UnsupportedError as error:
        if str(path) in error.problem:
            raise
        raise UnsupportedError(f"{path}: {error.problem}", error.fix) from None
    return Checkpoint(path, "gguf", config, tensors, file.metadata)


def _our_tensors(file: GgufFile) -> dict[str, StoredTensor]:
    names = gguf_names()
    tensors: dict[str, StoredTensor] = {}
    for theirs in file.infos:
        if theirs == ROPE_FACTORS:
            continue
        ours = names.ours(theirs)
        if ours is None:
            raise ModelFileError(
                file.path, "a tensor does not belong to this architecture", field=f"tensor {theirs}"
            )
        if ours in tensors:
            raise ModelFileError(file.path, "two tensors mean the same parameter", field=f"tensor {theirs}")
        tensors[ours] = file.tensor(theirs)
    return tensors


def _rope_divisors(file: GgufFile) -> tuple[float, ...] | None:
    info = file.infos.get(ROPE_FACTORS)
    if info is None:
        return None
    if len(info.shape) != 1 or info.shape[0] > 1 << 13 or info.kind.name != "F32":
        raise ModelFileError(
            file.path,
            "the rope factors are not a short row of F32 numbers",
            field=f"tensor {ROPE_FACTORS}",
            got=f"{info.kind.name} {info.shape}",
        )
    factors = tuple(float(factor) for factor in file.tensor(ROPE_FACTORS).decode())
    return None if all(factor == 1.0 for factor in factors) else factors
