"""Saves a checkpoint as a folder in Hugging Face's layout, whatever format it came from.

Tensors stream a block at a time: renamed, rotary rows permuted if the layouts differ, experts fused or not,
quantised ones decoded. Tensors that are kept in their encoding keep their bits.
"""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ayllu.errors import UnsupportedError, UsageError, clip
from ayllu.folder_files import COMPANIONS, companions
from ayllu.json_file import read_json_object
from ayllu.model.config import ModelConfig
from ayllu.model.parameters import parameter_shapes
from ayllu.progress import SILENT, Progress
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.file_kinds import is_model_file
from ayllu.weights.hf_config_writer import hugging_face_config, rope_layout_of
from ayllu.weights.names import NameMap, hugging_face_names
from ayllu.weights.new_file import write_failure
from ayllu.weights.rope_layout import permute_rope_rows
from ayllu.weights.safetensors_writer import (
    DEFAULT_SHARD_BYTES,
    OutgoingTensor,
    write_shards,
)
from ayllu.weights.scaled import SCALED_FP8
from ayllu.weights.tensors import PLAIN_ENCODINGS, Array, JoinedTensor, PlainTensor, StoredTensor

BLOCK_BYTES = 8 << 20
TARGETS = ("BF16", "F16", "F32")
_KEPT = ("F64", "F32", "F16", "BF16")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_GGUF_TOKEN_IDS = {
    "bos_token_id": "tokenizer.ggml.bos_token_id",
    "eos_token_id": "tokenizer.ggml.eos_token_id",
    "pad_token_id": "tokenizer.ggml.padding_token_id",
}


def save_folder(
    checkpoint: Checkpoint,
    path: Path,
    *,
    encoding: str | None = None,
    unfused: bool = False,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress = SILENT,
) -> None:
    """Write `checkpoint` to the folder `path`, which appears only when it is complete.

    encoding: BF16, F16 or F32 for every tensor; None keeps plain floats as they are and stores quantised
    ones as F16 (scaled FP8 as BF16). unfused: one entry per expert. Tokenizer files of the source come along.

    Raises UsageError if `path` is in the way (see `require_target`), UnsupportedError for what the
    format cannot say, NoSpaceError.
    """
    if encoding is not None and encoding not in TARGETS:
        raise UsageError(
            f"{encoding} is not an encoding for safetensors.", f"Use one of {', '.join(TARGETS)}."
        )
    path = path.resolve()
    require_target(path, checkpoint.path, overwrite=overwrite)
    tensors = _Outgoing(checkpoint, encoding, unfused).tensors()
    stored = Counter[str]()
    for tensor in tensors:
        stored[tensor.encoding] += tensor.nbytes
    config = hugging_face_config(
        checkpoint.config, encoding=stored.most_common(1)[0][0], token_ids=token_ids(checkpoint)
    )
    beside = companions(checkpoint.path) if checkpoint.path.is_dir() else []
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        (partial / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
        for file in beside:
            shutil.copyfile(file, partial / file.name)
        with progress.task(f"Writing {path.name}", sum(tensor.nbytes for tensor in tensors)) as task:
            write_shards(partial, tensors, task=task, max_shard_bytes=max_shard_bytes)
        _publish(partial, path)
    except OSError as error:
        raise write_failure(path, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def require_target(path: Path, source: Path, *, overwrite: bool) -> None:
    """Raise UsageError unless a model folder may be written to `path`, whose old content would be deleted.

    Even with `overwrite` only an empty folder or what is plainly a model may be replaced: config.json among
    plain files of the kinds that models consist of. Never a folder that holds or is `source`.
    """
    path, source = path.resolve(), source.resolve()
    if source.is_relative_to(path):
        raise UsageError(f"The target {path} is or holds the source.", "Choose another target.")
    if not path.exists():
        return
    if not path.is_dir():
        raise UsageError(f"{path} exists already, and is not a folder.", "Choose another target.")
    inside = sorted(path.iterdir())
    if not inside:
        return
    if not overwrite:
        raise UsageError(f"{path} exists already.", "Choose another target, or overwrite it with --force.")
    foreign = [item.name for item in inside if not _belongs_to_a_model(item)]
    if foreign or not (path / "config.json").is_file():
        holds = f"it holds {clip(foreign[0], 60)}" if foreign else "it has no config.json"
        raise UsageError(
            f"{path} exists already and is not only a model: {holds}.",
            "Choose another target: --force replaces nothing but models.",
        )


def _belongs_to_a_model(item: Path) -> bool:
    if item.is_symlink() or not item.is_file():
        return False
    return is_model_file(item.name) or item.name in COMPANIONS or item.name == "README.md"


def _publish(partial: Path, path: Path) -> None:
    """Give the finished folder its name; what stood there is removed only once the new one is in place."""
    if not path.exists():
        partial.replace(path)
        return
    old = path.with_name(f".{path.name}.{os.getpid()}.old")
    path.replace(old)
    try:
        partial.replace(path)
    except OSError:
        old.replace(path)
        raise
    shutil.rmtree(old)


def token_ids(checkpoint: Checkpoint) -> dict[str, Any]:
    """The special token ids that the source states: in its config.json, or in its metadata."""
    if "token_ids" in checkpoint.metadata:
        return dict(checkpoint.metadata["token_ids"])
    file = checkpoint.path / "config.json"
    if checkpoint.path.is_dir() and file.is_file():
        config = read_json_object(file, max_bytes=4 << 20)
        text = config.get("text_config")
        sources = [config, text if isinstance(text, dict) else {}]
        return {key: source[key] for key in _TOKEN_IDS for source in sources if source.get(key) is not None}
    found = {key: checkpoint.metadata.get(theirs) for key, theirs in _GGUF_TOKEN_IDS.items()}
    return {key: int(value) for key, value in found.items() if isinstance(value, int)}


class _Outgoing:
    """Our tensors as theirs, for one checkpoint."""

    def __init__(self, checkpoint: Checkpoint, encoding: str | None, unfused: bool) -> None:
        self.checkpoint = checkpoint
        self.config: ModelConfig = checkpoint.config
        self.encoding = encoding
        self.unfused = unfused
        self.names: NameMap = hugging_face_names(
            self.config.architecture, multimodal=self.config.vision is not None
        )

    def tensors(self) -> list[OutgoingTensor]:
        """In the order of the forward pass, so that shards hold neighbouring layers."""
        outgoing: list[OutgoingTensor] = []
        for ours in parameter_shapes(self.config):
            theirs = self.names.theirs(ours)
            if theirs is None:
                raise UnsupportedError(f"Hugging Face has no name for {ours}.", "Keep this model in GGUF.")
            if ".experts." not in ours:
                outgoing.append(self._plain(ours, theirs))
            elif self.unfused:
                outgoing += self._one_per_expert(ours, theirs)
            elif not ours.endswith("up_proj"):
                outgoing.append(self._fused(ours, theirs))
        return outgoing

    def _target(self, tensor: StoredTensor) -> str:
        if self.encoding is not None:
            return self.encoding
        if tensor.encoding in _KEPT:
            return tensor.encoding
        return "BF16" if tensor.encoding == SCALED_FP8 else "F16"

    def _plain(self, ours: str, theirs: str) -> OutgoingTensor:
        tensor = self.checkpoint.tensors[ours]
        target = self._target(tensor)
        heads = self._heads_to_permute(ours)
        if heads is not None:
            return OutgoingTensor(theirs, target, tensor.shape, self._permuted(ours, tensor, target))
        return OutgoingTensor(theirs, target, tensor.shape, lambda: _blocks(tensor, target))

    def _heads_to_permute(self, ours: str) -> int | None:
        wanted = rope_layout_of(self.config.architecture)
        if self.config.rope.layout == wanted or not ours.startswith("layers."):
            return None
        if ".attention.q_proj." in ours:
            return self.config.num_attention_heads
        return self.config.num_key_value_heads if ".attention.k_proj." in ours else None

    def _permuted(self, ours: str, tensor: StoredTensor, target: str) -> Callable[[], Iterator[Array]]:
        """Rows move only within a head, so heads are taken a few at a time. A bias is one row of heads."""
        head_dim, source = self.config.head_dim, self.config.rope.layout
        wanted = rope_layout_of(self.config.architecture)

        def moved(rows: Array) -> Array:
            return permute_rope_rows(rows, rows.shape[0] // head_dim, source=source, target=wanted)

        def blocks() -> Iterator[Array]:
            if len(tensor.shape) == 1:
                yield moved(encoded_rows(tensor, 0, 1, target).reshape(-1))
                return
            step = head_dim * max(1, _rows_per_block(tensor) // head_dim)
            for start in range(0, tensor.rows, step):
                yield moved(encoded_rows(tensor, start, min(start + step, tensor.rows), target))
            tensor.release()

        return blocks

    def _matrix(self, tensor: StoredTensor, expert: int, target: str) -> Array:
        """One expert of a stack, [outputs, inputs]."""
        outputs = tensor.shape[1]
        return encoded_rows(tensor, expert * outputs, (expert + 1) * outputs, target)

    def _fused(self, ours: str, theirs: str) -> OutgoingTensor:
        """gate and up side by side, or down, transposed to input-major (spec 9.2)."""
        tensor = self.checkpoint.tensors[ours]
        target = self._target(tensor)
        count, outputs, inputs = tensor.shape
        parts = [tensor]
        if ours.endswith("gate_proj"):
            parts.append(self.checkpoint.tensors[ours.replace("gate_proj", "up_proj")])
            theirs = theirs.replace("gate_proj", "gate_up_proj")

        def blocks() -> Iterator[Array]:
            for expert in range(count):
                yield np.concatenate([self._matrix(part, expert, target).T for part in parts], axis=1)
            for part in parts:
                part.release()

        return OutgoingTensor(theirs, target, (count, inputs, outputs * len(parts)), blocks)

    def _one_per_expert(self, ours: str, theirs: str) -> Iterator[OutgoingTensor]:
        tensor = self.checkpoint.tensors[ours]
        target = self._target(tensor)
        stem, _, kind = theirs.rpartition(".")
        for expert in range(tensor.shape[0]):
            yield OutgoingTensor(
                f"{stem}.{expert}.{kind}.weight",
                target,
                tensor.shape[1:],
                functools.partial(self._one_matrix, tensor, expert, target),
            )

    def _one_matrix(self, tensor: StoredTensor, expert: int, target: str) -> list[Array]:
        return [self._matrix(tensor, expert, target)]


def _rows_per_block(tensor: StoredTensor) -> int:
    return max(1, BLOCK_BYTES // (4 * max(1, tensor.shape[-1])))


def _blocks(tensor: StoredTensor, target: str) -> Iterator[Array]:
    if not tensor.shape:
        yield encoded_rows(tensor, 0, 1, target)
        return
    step = _rows_per_block(tensor)
    for start in range(0, tensor.rows, step):
        yield encoded_rows(tensor, start, min(start + step, tensor.rows), target)
    tensor.release()


def encoded_rows(tensor: StoredTensor, start: int, stop: int, encoding: str) -> Array:
    """Rows [start, stop) as numbers of a plain `encoding`, [stop - start, last axis]. Bits are kept if the
    tensor has that encoding already. Raises UnsupportedError if a value does not fit into it."""
    if tensor.encoding == encoding:
        if isinstance(tensor, PlainTensor):
            return _raw_rows(tensor, start, stop)
        if isinstance(tensor, JoinedTensor):
            return tensor.combine_rows(
                start, stop, lambda part, first, last: encoded_rows(part, first, last, encoding)
            )
    values = tensor.decode_rows(start, stop)
    try:
        with np.errstate(over="raise"):
            return values.astype(PLAIN_ENCODINGS[encoding])
    except FloatingPointError as error:
        raise UnsupportedError(
            f"A weight of this model is too large for {encoding}.", "Save it as BF16 or F32."
        ) from error


def _raw_rows(tensor: PlainTensor, start: int, stop: int) -> Array:
    array = tensor.array
    if array.ndim <= 1:
        return array.reshape(1, -1)[start:stop]
    if array.ndim == 2:
        return array[start:stop]
    # A strided stack cannot be flattened without a copy: take whole entries.
    per_entry = tensor.rows // tensor.shape[0]
    first, last = start // per_entry, -(-stop // per_entry)
    entries = np.ascontiguousarray(array[first:last]).reshape(-1, tensor.shape[-1])
    return entries[start - first * per_entry : stop - first * per_entry]
