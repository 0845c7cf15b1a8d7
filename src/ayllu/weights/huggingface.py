"""A folder in Hugging Face's layout, opened: config.json and safetensors, single or sharded.

Their tensors become ours by renaming; where the layout differs (fused experts, one file entry per expert,
scaled FP8) ours are views into the same mapped bytes. Pickles are never opened.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NoReturn

from ayllu.errors import ModelFileError, UnsupportedError, clip
from ayllu.folder_files import member_path
from ayllu.json_file import read_json_object
from ayllu.model.config import ExpertsConfig, ModelConfig
from ayllu.weights.checkpoint import Checkpoint
from ayllu.weights.file_kinds import PICKLE_SUFFIXES
from ayllu.weights.hf_config import config_from_hugging_face, read_config
from ayllu.weights.hf_save import save_folder
from ayllu.weights.names import hugging_face_names
from ayllu.weights.safetensors import MAX_TENSORS, SafetensorsFile
from ayllu.weights.scaled import ScaledTensor, has_fp8_weights
from ayllu.weights.tensors import JoinedTensor, PlainTensor, StoredTensor

__all__ = ["open_folder", "save_folder"]

INDEX = "model.safetensors.index.json"
MAX_INDEX_BYTES = 32 << 20
MAX_SHARDS = 4096
BLOCK_BYTES = 8 << 20
FLOATS = ("F64", "F32", "F16", "BF16")

_LEFTOVER = re.compile(
    r"rotary_emb\.inv_freq\Z|rotary_embedding\.|_gate_stats_3E\Z|expert_activation_DE\Z|_extra_state\Z"
)
"""Buffers and statistics that some exports carry and no forward pass reads (spec 5, 9.1)."""
_EXPERTS = (
    r"(?P<prefix>(?:language_model\.)?)model\.layers\.(?P<layer>0|[1-9]\d{0,4})\.feed_forward\.experts\."
)
_FUSED = re.compile(_EXPERTS + r"(?P<kind>gate_up|down)_proj\Z")
_UNFUSED = re.compile(_EXPERTS + r"(?P<expert>0|[1-9]\d{0,4})\.(?P<kind>gate|up|down)_proj\.weight\Z")


def open_folder(path: Path) -> Checkpoint:
    """The checkpoint in `path`: config.json beside model.safetensors, an index with shards, or *.safetensors.

    Raises ModelFileError for damaged files and for tensors that do not fit the config, UnsupportedError for
    architectures, encodings and file formats that ayllu does not open.
    """
    raw = read_config(path)
    config_file = path / "config.json"
    config = config_from_hugging_face(raw, config_file)
    files = _tensor_files(path)
    tensors = _Mapping(path, config, files, scaled=has_fp8_weights(raw, config_file)).tensors()
    return Checkpoint(path=path, format="safetensors", config=config, tensors=tensors)


def _tensor_files(folder: Path) -> dict[str, SafetensorsFile]:
    """Each tensor's name -> the opened file that holds it."""
    index = folder / INDEX
    single = folder / "model.safetensors"
    if single.exists() or single.is_symlink():
        return _collect(folder, ["model.safetensors"])
    if index.exists():
        return _from_index(folder, index)
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if names:
        return _collect(folder, names)
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise UnsupportedError(
            f"{folder} holds its weights only as {clip(pickles[0], 60)}, a format that can run code.",
            "Fetch the safetensors of this model; Meta's own .pth files go through `ayllu convert`.",
        )
    raise ModelFileError(folder, "has no *.safetensors beside its config.json")


def _from_index(folder: Path, index: Path) -> dict[str, SafetensorsFile]:
    weight_map = read_json_object(index, max_bytes=MAX_INDEX_BYTES, max_values=MAX_TENSORS).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(index, "has no weight_map", field="weight_map")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise ModelFileError(
                index, "has a shard name that is not text", field=name, got=clip(repr(shard))
            )
    files = _collect(folder, sorted(set(weight_map.values())))
    for name, shard in weight_map.items():
        held = files.get(name)
        if held is None or held.path.name != shard:
            raise ModelFileError(
                index, "names a tensor that its shard does not hold", field=name, expected=shard
            )
    return files


def _collect(folder: Path, names: list[str]) -> dict[str, SafetensorsFile]:
    if len(names) > MAX_SHARDS:
        raise ModelFileError(folder, "has too many shards", expected=f"at most {MAX_SHARDS}", got=len(names))
    files: dict[str, SafetensorsFile] = {}
    for name in names:
        opened = SafetensorsFile(member_path(folder, name))
        for tensor in opened:
            if tensor in files:
                raise ModelFileError(
                    opened.path, f"holds a tensor that {files[tensor].path.name} holds too", field=tensor
                )
            files[tensor] = opened
        if len(files) > MAX_TENSORS:
            raise ModelFileError(folder, "has too many tensors", expected=f"at most {MAX_TENSORS}")
    return files


class _Mapping:
    """Their tensors to ours, for one folder."""

    def __init__(
        self, folder: Path, config: ModelConfig, files: Mapping[str, SafetensorsFile], *, scaled: bool
    ) -> None:
        self.folder = folder
        self.config = config
        self.files = files
        self.scaled = scaled
        self.multimodal = any(name.startswith("language_model.") for name in files)
        self.names = hugging_face_names(config.architecture, multimodal=self.multimodal)
        self.ours: dict[str, StoredTensor] = {}
        self.per_expert: dict[str, dict[int, StoredTensor]] = {}

    def tensors(self) -> dict[str, StoredTensor]:
        for name in self.files:
            if not _LEFTOVER.search(name) and not (self.scaled and name.endswith(".weight_scale")):
                self._place(name)
        for ours, parts in self.per_expert.items():
            self._stack(ours, parts)
        if self.config.tie_word_embeddings:
            self._drop_tied_head()
        return self.ours

    def _place(self, name: str) -> None:
        if (fused := _FUSED.match(name)) is not None:
            self._split_fused(name, int(fused["layer"]), fused["kind"])
        elif (unfused := _UNFUSED.match(name)) is not None:
            experts, expert = self._experts(int(unfused["layer"])), int(unfused["expert"])
            if experts is None or expert >= experts.num_experts:
                self._reject(name)
            ours = f"layers.{int(unfused['layer'])}.feed_forward.experts.{unfused['kind']}_proj"
            self.per_expert.setdefault(ours, {})[expert] = self._read(name)
        elif (mine := self.names.ours(name)) is not None:
            self.ours[mine] = self._read(name)
        else:
            self._reject(name)

    def _read(self, name: str) -> StoredTensor:
        tensor: PlainTensor = self.files[name][name]
        scale = f"{name}_scale"
        if self.scaled and tensor.encoding == "F8_E4M3" and scale in self.files:
            return ScaledTensor(tensor, self.files[scale][scale], name, self.files[name].path)
        if tensor.encoding not in FLOATS:
            raise UnsupportedError(
                f"{self.files[name].path}: {name} is stored as {tensor.encoding}, without a known scale.",
                "Use a copy of the model in BF16, F16 or F32, or a GGUF.",
            )
        return tensor

    def _experts(self, layer: int) -> ExpertsConfig | None:
        has_experts = layer < len(self.config.layers) and self.config.layers[layer].experts
        return self.config.experts if has_experts else None

    def _split_fused(self, name: str, layer: int, kind: str) -> None:
        """Fused stacks are input-major: [experts, width, 2 * hidden], [experts, hidden, width] (spec 9.2)."""
        experts = self._experts(layer)
        if experts is None:
            self._reject(name)
        count, hidden, width = experts.num_experts, experts.intermediate_size, self.config.hidden_size
        expected = (count, width, 2 * hidden) if kind == "gate_up" else (count, hidden, width)
        tensor = self._read(name)
        if tensor.shape != expected or not isinstance(tensor, PlainTensor):
            raise ModelFileError(
                self.files[name].path,
                "a tensor has the wrong shape",
                field=name,
                expected=expected,
                got=tensor.shape,
            )
        output_major = tensor.array.swapaxes(1, 2)
        prefix = f"layers.{layer}.feed_forward.experts"
        if kind == "down":
            self.ours[f"{prefix}.down_proj"] = tensor.view(output_major)
        else:
            self.ours[f"{prefix}.gate_proj"] = tensor.view(output_major[:, :hidden])
            self.ours[f"{prefix}.up_proj"] = tensor.view(output_major[:, hidden:])

    def _stack(self, ours: str, parts: Mapping[int, StoredTensor]) -> None:
        experts = self.config.experts
        if experts is None or len(parts) != experts.num_experts or ours in self.ours:
            expected = experts.num_experts if experts else 0
            raise ModelFileError(
                self.folder,
                "experts are missing or stored twice",
                field=ours,
                expected=expected,
                got=len(parts),
            )
        self.ours[ours] = JoinedTensor([parts[index] for index in range(len(parts))], axis=None)

    def _drop_tied_head(self) -> None:
        head, table = self.ours.pop("lm_head.weight", None), self.ours.get("embed_tokens.weight")
        if head is not None and table is not None and not _equal(head, table):
            raise ModelFileError(
                self.folder,
                "lm_head.weight differs from the embeddings, though config.json ties them",
                field="tie_word_embeddings",
                fix="Set tie_word_embeddings to false in config.json if the model has a head of its own.",
            )

    def _reject(self, name: str) -> NoReturn:
        raise ModelFileError(
            self.files[name].path, "a tensor does not belong to this architecture", field=name
        )


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors hold the same bytes, compared a few rows at a time."""
    if one.shape != other.shape or one.encoding != other.encoding:
        return False
    if not isinstance(one, PlainTensor) or not isinstance(other, PlainTensor):
        return False
    step = max(1, BLOCK_BYTES // max(1, one.nbytes // max(1, one.rows)))
    same = all(
        one.array[start : start + step].tobytes() == other.array[start : start + step].tobytes()
        for start in range(0, one.rows, step)
    )
    one.release()
    other.release()
    return same
