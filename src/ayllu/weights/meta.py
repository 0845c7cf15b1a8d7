"""Meta's consolidated.NN.pth, read and written for `ayllu convert` alone.

The one module that goes near a pickle: torch's restricted loader reads it (weights_only), which builds
tensors and refuses anything that could run. Shards are joined as views of the mapped files, without copies.
"""

from __future__ import annotations

import io
import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np

from ayllu.errors import MissingExtraError, ModelFileError, UnsupportedError, UsageError, clip
from ayllu.folder_files import companions, member_path
from ayllu.model.config import ModelConfig
from ayllu.model.parameters import parameter_shapes
from ayllu.progress import SILENT, Progress
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.meta_params import config_from_params, params_from_config, read_params
from ayllu.weights.names import NameMap, meta_names
from ayllu.weights.new_file import write_failure
from ayllu.weights.rope_layout import permute_rope_rows
from ayllu.weights.tensors import Array, JoinedTensor, PlainTensor, StoredTensor

if TYPE_CHECKING:
    from torch import Tensor

MAX_SHARDS = 64
_SHARD = re.compile(r"consolidated(?:\.(\d\d))?\.pth")
_LEFTOVER = re.compile(r"rope\.freqs\Z|freqs?_cis\Z|_extra_state\Z|_gate_stats_3E\Z|expert_activation_DE\Z")
_LLAMA4_TOKEN_IDS = {
    "bos_token_id": 200_000,
    "eos_token_id": [200_001, 200_007, 200_008],
    "pad_token_id": 200_018,
}

Shard = Mapping[str, Array]


def open_meta(folder: Path, *, context: int | None = None) -> Checkpoint:
    """The checkpoint in a folder of params.json and consolidated.NN.pth: Llama 2, 3 or 4.

    `context` is the length that params.json does not state. Raises ModelFileError for damaged or hostile
    files, UnsupportedError for variants we lack, MissingExtraError without torch.
    """
    fields = read_params(folder)
    shards = [_load(file) for file in _shard_files(folder)]
    for number, shard in enumerate(shards[1:], start=1):
        if shard.keys() != shards[0].keys():
            raise ModelFileError(folder, f"shard {number} holds other tensors than shard 0")
    llama4 = "layers.0.attention.wqkv.weight" in shards[0]
    output = shards[0].get("output.weight")
    if output is None or output.ndim != 2:
        raise ModelFileError(folder, "a tensor is missing", field="output.weight")
    vocab_size = output.shape[0] * len(shards)
    config = config_from_params(fields, llama4=llama4, vocab_size=vocab_size, context=context)
    metadata = {"token_ids": _LLAMA4_TOKEN_IDS} if llama4 else {}
    return Checkpoint(
        path=folder,
        format="meta",
        config=config,
        tensors=_Joined(folder, config, shards).tensors(),
        metadata=metadata,
    )


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise MissingExtraError("Converting Meta's .pth files", "torch") from error
    return torch


def _shard_files(folder: Path) -> list[Path]:
    found = {match[1]: match[0] for item in folder.iterdir() if (match := _SHARD.fullmatch(item.name))}
    if None in found and len(found) == 1:
        return [member_path(folder, found[None])]
    names = [found.get(f"{number:02d}") for number in range(len(found))]
    if not names or len(names) > MAX_SHARDS or None in names:
        raise ModelFileError(
            folder, "shards are missing", expected="consolidated.00.pth and so on", got=sorted(found.values())
        )
    return [member_path(folder, name) for name in names if name is not None]


def _load(file: Path) -> dict[str, Array]:
    """The tensors of one shard, as views of the mapped file."""
    torch = _torch()
    try:
        # Meta's own files hold empty byte buffers beside the tensors (`_extra_state`).
        with torch.serialization.safe_globals([io.BytesIO]):
            content = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:
        raise ModelFileError(
            file,
            f"was refused by torch's restricted loader: {clip(str(error).partition('. ')[0], 200)}",
            fix="Only plain tensors are read. Use the file that Meta published, or a safetensors version.",
        ) from error
    if not isinstance(content, dict):
        raise ModelFileError(file, "does not hold tensors by name", got=type(content).__name__)
    arrays: dict[str, Array] = {}
    for name, value in content.items():
        if not isinstance(name, str) or _LEFTOVER.search(name):
            continue
        if not isinstance(value, torch.Tensor):
            raise ModelFileError(file, "holds something other than a tensor", field=clip(name))
        arrays[name] = _as_array(file, name, value)
    return arrays


def _as_array(file: Path, name: str, tensor: Tensor) -> Array:
    torch = _torch()
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UnsupportedError(
            f"{file}: {clip(name)} is not a plain tensor.", "Use a full-precision version."
        )
    # A tensor may claim strides of zero: a few bytes that read as terabytes.
    if not tensor.is_contiguous() or tensor.nbytes > file.stat().st_size:
        raise ModelFileError(
            file, "a tensor is larger than its bytes in the file", field=clip(name), got=tuple(tensor.shape)
        )
    if tensor.dtype == torch.bfloat16:
        return tensor.detach().view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    if tensor.dtype not in (torch.float16, torch.float32, torch.float64):
        raise UnsupportedError(
            f"{file}: {clip(name)} is stored as {tensor.dtype}.", "Use a full-precision version."
        )
    array: Array = tensor.detach().numpy()
    return array


def _shard_axis(ours: str) -> int | None:
    """The axis a parameter is split along between shards; None: every shard has it whole (spec 9.1)."""
    split_inputs = ("o_proj.weight", "down_proj.weight", "fc2.weight")
    if ours.endswith(split_inputs):
        return 1
    whole = (
        "norm.weight",
        "o_proj.bias",
        "fc2.bias",
        "class_embedding",
        "position_embedding",
        "router.weight",
    )
    if ours.endswith(whole) or "norm_before." in ours or "norm_after." in ours or "_norm." in ours:
        return None
    return 0


class _Joined:
    """Ours from the shards of one model."""

    def __init__(self, folder: Path, config: ModelConfig, shards: Sequence[Shard]) -> None:
        self.folder = folder
        self.config = config
        self.shards = shards
        self.used: set[str] = set()

    def tensors(self) -> dict[str, StoredTensor]:
        names = _Names(self.config)
        joined = {ours: self._tensor(ours, names.theirs(ours)) for ours in parameter_shapes(self.config)}
        for name in self.shards[0]:
            if name not in self.used:
                raise ModelFileError(
                    self.folder, "a tensor does not belong to this architecture", field=clip(name)
                )
        return joined

    def _tensor(self, ours: str, theirs: str) -> StoredTensor:
        self.used.add(theirs)
        pieces = []
        for shard in self.shards:
            if theirs not in shard:
                raise ModelFileError(self.folder, "a tensor is missing", field=theirs)
            pieces.append(shard[theirs])
        if ".experts." in ours:
            return self._experts(ours, theirs, pieces)
        axis = _shard_axis(ours)
        if ours.endswith("router.weight"):
            pieces = [self._two_axes(theirs, piece).T for piece in pieces]
        if theirs.endswith("wqkv.weight"):
            pieces = [self._rows_of_qkv(ours, theirs, piece) for piece in pieces]
        if theirs.endswith("fc1_weight"):
            pieces = [self._half(ours, theirs, piece) for piece in pieces]
        if ours == "embed_tokens.weight" and pieces[0].ndim == 2:
            # Llama 2 split the embedding by columns, later models by rows.
            axis = 0 if pieces[0].shape[1] == self.config.hidden_size else 1
        if axis is None:
            return PlainTensor(self._same(theirs, pieces))
        return _join(pieces, axis)

    def _same(self, theirs: str, pieces: Sequence[Array]) -> Array:
        for piece in pieces[1:]:
            if piece.shape != pieces[0].shape or piece.tobytes() != pieces[0].tobytes():
                raise ModelFileError(self.folder, "shards disagree about a shared tensor", field=theirs)
        return pieces[0]

    def _two_axes(self, theirs: str, piece: Array) -> Array:
        if piece.ndim != 2:
            raise ModelFileError(
                self.folder,
                "a tensor has the wrong shape",
                field=theirs,
                expected="two axes",
                got=piece.shape,
            )
        return piece

    def _rows_of_qkv(self, ours: str, theirs: str, piece: Array) -> Array:
        """Each shard has its q rows, then its k rows, then its v rows."""
        queries, rest = divmod(self.config.num_attention_heads * self.config.head_dim, len(self.shards))
        keys, rest_of_keys = divmod(self.config.num_key_value_heads * self.config.head_dim, len(self.shards))
        if self._two_axes(theirs, piece).shape[0] != queries + 2 * keys or rest or rest_of_keys:
            raise ModelFileError(self.folder, "a tensor has the wrong shape", field=theirs, got=piece.shape)
        starts = {"q": 0, "k": queries, "v": queries + keys}
        which = ours.rpartition(".attention.")[2][0]
        return piece[starts[which] : starts[which] + (queries if which == "q" else keys)]

    def _half(self, ours: str, theirs: str, piece: Array) -> Array:
        """fc1 of a shard is its rows of gate, then its rows of up."""
        half, rest = divmod(self._two_axes(theirs, piece).shape[0], 2)
        if rest:
            raise ModelFileError(self.folder, "a tensor has the wrong shape", field=theirs, got=piece.shape)
        return piece[:half] if "gate_proj" in ours else piece[half:]

    def _experts(self, ours: str, theirs: str, pieces: Sequence[Array]) -> StoredTensor:
        """Flat stacks, unflattened per shard before their experts are joined: gate and up are
        [experts * width, hidden / shards], down is [experts * hidden / shards, width]."""
        experts = self.config.experts
        count = experts.num_experts if experts else 0
        for piece in pieces:
            if count == 0 or self._two_axes(theirs, piece).shape[0] % count:
                raise ModelFileError(
                    self.folder, "a tensor has the wrong shape", field=theirs, got=piece.shape
                )
        stacks = [piece.reshape(count, -1, piece.shape[1]).swapaxes(1, 2) for piece in pieces]
        if len(stacks) == 1:
            return PlainTensor(stacks[0])
        axis = 1 if "down_proj" in ours else 0
        return JoinedTensor([_join([stack[index] for stack in stacks], axis) for index in range(count)], None)


class _Names:
    """Meta's name of each of our parameters, for one config."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        llama4 = config.architecture == "llama4"
        self._mixture: NameMap = meta_names(llama4=llama4)
        self._dense: NameMap = meta_names(llama4=llama4, dense_layer=True)

    def theirs(self, ours: str) -> str:
        layer = re.match(r"layers\.(\d+)\.", ours)
        dense = layer is not None and not self.config.layers[int(layer[1])].experts
        name = (self._dense if dense else self._mixture).theirs(ours)
        if name is None:
            raise UnsupportedError(f"Meta's layout has no name for {ours}.", "Use safetensors or GGUF.")
        return name


def _join(pieces: Sequence[Array], axis: int) -> StoredTensor:
    if pieces[0].ndim == 1 and len(pieces) > 1:
        # A bias is small, and a joined tensor counts rows, of which a vector has only one.
        return PlainTensor(np.concatenate(pieces))
    parts = [PlainTensor(piece) for piece in pieces]
    return parts[0] if len(parts) == 1 else JoinedTensor(parts, axis)


def save_meta(checkpoint: Checkpoint, folder: Path, *, shards: int = 1, progress: Progress = SILENT) -> None:
    """Write `checkpoint` as `shards` consolidated files with their params.json, in the encodings it has.

    Holds one shard in memory. Raises UnsupportedError for quantised tensors and for what the layout cannot
    say, UsageError if `folder` is in the way or the model does not divide by `shards`.
    """
    torch = _torch()
    params = params_from_config(checkpoint.config)
    if folder.exists() and any(folder.iterdir()):
        raise UsageError(f"{folder} exists already.", "Choose another target.")
    for what, count in (
        ("key-value heads", checkpoint.config.num_key_value_heads),
        ("vocabulary", checkpoint.config.vocab_size),
    ):
        if count % shards:
            raise UsageError(f"{count} {what} cannot be split over {shards} shards.", "Use fewer.")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        (partial / "params.json").write_text(json.dumps(params, indent=2) + "\n", "utf-8")
        for file in companions(checkpoint.path) if checkpoint.path.is_dir() else []:
            shutil.copyfile(file, partial / file.name)
        with progress.task(f"Writing {folder.name}", shards, unit="shards") as task:
            for rank in range(shards):
                content = {
                    name: _as_torch(array)
                    for name, array in _Split(checkpoint, shards, rank).arrays().items()
                }
                torch.save(content, partial / f"consolidated.{rank:02d}.pth")
                task.advance(1)
        if folder.exists():
            folder.rmdir()
        partial.replace(folder)
    except OSError as error:
        raise write_failure(folder, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _as_torch(array: Array) -> Tensor:
    torch = _torch()
    array = np.array(array, order="C")
    is_bfloat16 = array.dtype == ml_dtypes.bfloat16
    tensor: Tensor = torch.from_numpy(array.view(np.uint16) if is_bfloat16 else array)
    return tensor.view(torch.bfloat16) if is_bfloat16 else tensor


class _Split:
    """Their tensors of one shard."""

    def __init__(self, checkpoint: Checkpoint, shards: int, rank: int) -> None:
        self.checkpoint = checkpoint
        self.config = checkpoint.config
        self.shards = shards
        self.rank = rank

    def arrays(self) -> dict[str, Array]:
        names = _Names(self.config)
        gathered: dict[str, list[Array]] = {}
        # Ours come in the order q, k, v and gate, up: the order in which the shared entries hold them.
        for ours in parameter_shapes(self.config):
            gathered.setdefault(names.theirs(ours), []).append(self._slice(ours))
        return {
            name: np.concatenate(parts) if len(parts) > 1 else parts[0] for name, parts in gathered.items()
        }

    def _slice(self, ours: str) -> Array:
        whole = self._whole(ours)
        if ".experts." in ours:
            # [experts, outputs, inputs] to input-major; hidden is what shards divide, then experts flatten.
            part = self._share(whole.swapaxes(1, 2), 1 if "down_proj" in ours else 2)
            return part.reshape(-1, part.shape[2])
        if ours.endswith("router.weight"):
            return whole.T
        axis = _shard_axis(ours)
        return whole if axis is None else self._share(whole, axis)

    def _share(self, whole: Array, axis: int) -> Array:
        size, rest = divmod(whole.shape[axis], self.shards)
        if rest:
            raise UsageError(
                f"A width of {whole.shape[axis]} cannot be split over {self.shards} shards.", "Use fewer."
            )
        return np.take(whole, range(self.rank * size, (self.rank + 1) * size), axis)

    def _whole(self, ours: str) -> Array:
        from ayllu.weights.hf_save import encoded_rows

        tensor = self.checkpoint.tensors[ours]
        if tensor.encoding not in ("BF16", "F16", "F32", "F64"):
            raise UnsupportedError(
                f"{ours} is quantised ({tensor.encoding}), which Meta's layout does not store.",
                "Convert to safetensors instead.",
            )
        rows = encoded_rows(tensor, 0, tensor.rows, tensor.encoding)
        for kind, heads in (
            ("q_proj", self.config.num_attention_heads),
            ("k_proj", self.config.num_key_value_heads),
        ):
            if ours.startswith("layers.") and f".attention.{kind}." in ours:
                rows = permute_rope_rows(rows, heads, source=self.config.rope.layout, target="interleaved")
        return rows.reshape(tensor.shape)
