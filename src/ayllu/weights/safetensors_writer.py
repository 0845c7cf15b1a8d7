"""Writes safetensors, one file or shards with an index, never holding more than a block of a tensor.

Files are laid out as the reference writes them (same order, same header bytes), so equal tensors give equal
files. A file appears under its name only when it is complete.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ayllu.progress import Task
from ayllu.weights.new_file import new_file
from ayllu.weights.tensors import PLAIN_ENCODINGS, Array

DEFAULT_SHARD_BYTES = 5_000_000_000
# The reference orders tensors by this ranking, widest first, then by name: that keeps each one aligned.
_RANK = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "I16", "F16", "BF16", "I32", "F32", "F64", "I64")


@dataclass(frozen=True)
class OutgoingTensor:
    """A tensor to write: `blocks` yields its numbers, in order, as arrays already in `encoding`."""

    name: str
    encoding: str
    shape: tuple[int, ...]
    blocks: Callable[[], Iterable[Array]]

    @property
    def nbytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * PLAIN_ENCODINGS[self.encoding].itemsize


def write_safetensors(
    path: Path, tensors: Sequence[OutgoingTensor], *, metadata: Mapping[str, str] | None = None, task: Task
) -> None:
    """Write one file. `task` advances by tensor bytes. Raises NoSpaceError when the disk is full."""
    ordered = sorted(tensors, key=lambda tensor: (-_RANK.index(tensor.encoding), tensor.name))
    with new_file(path) as file:
        file.write(_header(ordered, metadata))
        for tensor in ordered:
            written = 0
            for block in tensor.blocks():
                data = block.tobytes()
                file.write(data)
                written += len(data)
                task.advance(len(data))
            if written != tensor.nbytes:
                raise RuntimeError(f"{tensor.name} gave {written} bytes for {tensor.nbytes}")


def _header(ordered: Sequence[OutgoingTensor], metadata: Mapping[str, str] | None) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for tensor in ordered:
        end = offset + tensor.nbytes
        entries[tensor.name] = {
            "dtype": tensor.encoding,
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write_shards(
    folder: Path,
    tensors: Sequence[OutgoingTensor],
    *,
    task: Task,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> None:
    """Write `tensors` into `folder`: model.safetensors if they fit in one shard, else numbered shards and an
    index. A tensor is never split, so a shard may be larger than `max_shard_bytes` if a single tensor is."""
    shards: list[list[OutgoingTensor]] = [[]]
    held = 0
    for tensor in tensors:
        if shards[-1] and held + tensor.nbytes > max_shard_bytes:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += tensor.nbytes
    metadata = {"format": "pt"}
    if len(shards) == 1:
        write_safetensors(folder / "model.safetensors", shards[0], metadata=metadata, task=task)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_safetensors(folder / name, shard, metadata=metadata, task=task)
        weight_map |= {tensor.name: name for tensor in shard}
    total = sum(tensor.nbytes for tensor in tensors)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    with new_file(folder / "model.safetensors.index.json") as file:
        file.write(json.dumps(index, indent=2).encode() + b"\n")
