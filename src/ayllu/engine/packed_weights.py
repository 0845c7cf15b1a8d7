"""From a checkpoint to packed weights: what the native runner computes with, in the precision of the file.

Everything is measured before anything is allocated, so that memory can be planned; then it is packed
straight from the mapped file into one region, a layer at a time. Needs no torch.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ayllu.kernels.native.library import (
    FORMAT_CODES,
    FORMATS,
    NativeMemory,
    PackedMatrix,
    PackJob,
    pack,
    packed_bytes,
    stored_row_bytes,
)
from ayllu.model.config import ModelConfig
from ayllu.model.parameters import parameter_shapes
from ayllu.progress import SILENT, Progress
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.gguf_blocks import QuantisedTensor
from ayllu.weights.tensors import JoinedTensor, PlainTensor, StoredTensor

EMBEDDING = "embed_tokens.weight"
HEAD = "lm_head.weight"
_ALIGNMENT = 64
_TOGETHER_BYTES = 32 << 20


@dataclass(frozen=True)
class MappedRows:
    """An embedding that stays in the file: a token needs one of its rows. address: of the first row."""

    encoding: str
    address: int
    stride: int
    owner: object


@dataclass(frozen=True)
class PackedWeights:
    """All of a decoder: matrices by our parameter names (a mixture's stack under one name), norms and biases
    as float32. embedding None: the head's matrix serves for both."""

    matrices: dict[str, PackedMatrix]
    vectors: dict[str, NDArray[np.float32]]
    embedding: MappedRows | None
    memory: NativeMemory


def unpackable(checkpoint: Checkpoint) -> str | None:
    """Why the native runner cannot hold this checkpoint; None when it can."""
    for name, stored in _decoder_tensors(checkpoint):
        if _encoding(stored) not in FORMATS:
            return f"{name} is stored as {stored.encoding}"
        if stored_row_bytes(_encoding(stored), stored.shape[-1]) is None:
            return f"{name} has rows of {stored.shape[-1]} numbers, which fill no whole blocks"
    return None


def packed_weight_bytes(checkpoint: Checkpoint) -> int:
    """Bytes that packing will take, and those of the embedding's rows when they stay in the file."""
    mapped = _mapped_embedding(checkpoint)
    total = 0
    for name, stored in _decoder_tensors(checkpoint):
        if len(stored.shape) == 1:
            total += 4 * stored.elements
        elif not (name == EMBEDDING and mapped):
            total += sum(_padded(packed_bytes(*one)) for one in _matrices(stored))
    return total


@dataclass(frozen=True)
class ExpertBytes:
    """Packed bytes of a mixture's experts: of all of them, and of those that one token reads."""

    total: int
    one_token: int


def expert_bytes(checkpoint: Checkpoint) -> ExpertBytes:
    """Both are 0 for a model without experts."""
    total = one_token = 0
    for _, stored in expert_stacks(checkpoint):
        assert checkpoint.config.experts is not None, "experts without a config"
        sizes = [_padded(packed_bytes(*one)) for one in _matrices(stored)]
        total += sum(sizes)
        one_token += sum(sizes[: checkpoint.config.experts.top_k])
    return ExpertBytes(total, one_token)


def expert_stacks(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """The decoder's parameters that hold one matrix per expert, [experts, rows, cols]."""
    for name, stored in _decoder_tensors(checkpoint):
        if len(stored.shape) == 3:
            yield name, stored


def pack_weights(
    checkpoint: Checkpoint,
    *,
    threads: int,
    packed: Mapping[str, PackedMatrix] | None = None,
    progress: Progress = SILENT,
) -> PackedWeights:
    """Pack a checkpoint that `unpackable` has nothing against. The file's pages are given back as they are
    read. packed: matrices that are there already, such as experts on disk.

    Raises NoSpaceError when the memory is not there.
    """
    mapped = _mapped_embedding(checkpoint)
    packed = packed or {}
    tensors = [
        (name, stored)
        for name, stored in _decoder_tensors(checkpoint)
        if name not in packed and not (name == EMBEDDING and mapped is not None)
    ]
    sizes = [
        sum(_padded(packed_bytes(*one)) for one in _matrices(stored)) if len(stored.shape) > 1 else 0
        for _, stored in tensors
    ]
    memory = NativeMemory(sum(sizes))
    matrices = dict(packed)
    vectors: dict[str, NDArray[np.float32]] = {}
    address = memory.address
    with progress.task(f"Loading {checkpoint.path.name}", sum(sizes)) as task:
        for (name, stored), size in zip(tensors, sizes, strict=True):
            if len(stored.shape) == 1:
                vectors[name] = np.ascontiguousarray(stored.decode(), np.float32)
                continue
            rows, cols = stored.shape[-2:]
            _pack_stack(stored, address, threads)
            matrices[name] = PackedMatrix(_encoding(stored), rows, cols, address, memory)
            address += size
            stored.release()
            task.advance(size)
    return PackedWeights(matrices, vectors, mapped, memory)


def _pack_stack(stored: StoredTensor, address: int, threads: int) -> None:
    """Pack the matrices of a tensor behind each other, a few at a time: those that lie otherwise in the file
    are copied for it."""
    rows, cols = stored.shape[-2:]
    size = _padded(packed_bytes(stored.encoding, rows, cols))
    jobs: list[PackJob] = []
    kept: list[NDArray[np.uint8]] = []
    for source in matrix_sources(stored):
        place = (source.ctypes.data, source.strides[0], address)
        jobs.append(PackJob(FORMAT_CODES[stored.encoding], rows, cols, 0, *place))
        kept.append(source)
        address += size
        if len(jobs) * size >= _TOGETHER_BYTES:
            pack(jobs, threads)
            jobs, kept = [], []
    if jobs:
        pack(jobs, threads)


def _decoder_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, StoredTensor]]:
    """The decoder's parameters, without those of an image tower."""
    for name in parameter_shapes(checkpoint.config):
        if not name.startswith("vision."):
            yield name, checkpoint.tensors[name]


def _encoding(stored: StoredTensor) -> str:
    """What a tensor is packed as: the encoding of the file, for nothing is rounded."""
    return stored.encoding


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGNMENT) * _ALIGNMENT


def _matrices(stored: StoredTensor) -> list[tuple[str, int, int]]:
    """Encoding, rows and columns of each matrix of a tensor: of every expert, where they are stacked."""
    return [(_encoding(stored), stored.shape[-2], stored.shape[-1])] * math.prod(stored.shape[:-2])


def matrix_sources(stored: StoredTensor) -> Iterator[NDArray[np.uint8]]:
    """Stored rows [rows, bytes of a row] of each matrix, views of the file where they lie as needed."""
    rows = stored.shape[-2]
    count = math.prod(stored.shape[:-2])
    for index in range(count):
        if isinstance(stored, QuantisedTensor):
            yield stored.raw[index * rows : (index + 1) * rows]
            continue
        if isinstance(stored, PlainTensor):
            array = stored.array.reshape(-1, *stored.shape[-2:])[index] if count > 1 else stored.array
            array = array.reshape(stored.shape[-2:])
        else:
            decoded = stored.decode_rows(index * rows, (index + 1) * rows)
            array = decoded.astype(_plain_dtype(stored))
        yield np.ascontiguousarray(array).view(np.uint8).reshape(rows, -1)


def _plain_dtype(stored: StoredTensor) -> np.dtype[np.generic]:
    assert isinstance(stored, JoinedTensor)
    part = stored.parts[0]
    while isinstance(part, JoinedTensor):
        part = part.parts[0]
    assert isinstance(part, PlainTensor), f"{stored.encoding} in parts"
    return part.array.dtype


def _mapped_embedding(checkpoint: Checkpoint) -> MappedRows | None:
    """The embedding as rows of the file, unless it is also the head or lies there in another order."""
    stored = checkpoint.tensors[EMBEDDING]
    if checkpoint.config.tie_word_embeddings:
        return None
    if isinstance(stored, QuantisedTensor):
        rows = stored.raw
    elif isinstance(stored, PlainTensor) and stored.array.flags.c_contiguous:
        rows = stored.array.view(np.uint8).reshape(stored.shape[0], -1)
    else:
        return None
    return MappedRows(_encoding(stored), rows.ctypes.data, rows.strides[0], rows)


def head_name(config: ModelConfig) -> str:
    """The parameter that is the output head."""
    return EMBEDDING if config.tie_word_embeddings else HEAD
