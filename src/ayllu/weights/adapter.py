"""A LoRA adapter in PEFT's folder format, read and checked: low-rank matrices under our module names.

For an adapted matrix W the network computes W x + scale * B A x (LoRA, arXiv 2106.09685, section 4.1).
Adapters come from strangers and are loaded while serving: names, ranks and shapes are held against the
model's config before anything is allocated. Needs no torch.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NoReturn

import numpy as np

from ayllu.errors import ModelFileError, UnsupportedError, clip
from ayllu.folder_files import member_path
from ayllu.model.config import ModelConfig, RopeLayout
from ayllu.model.parameters import parameter_shapes
from ayllu.weights.adapter_config import AdapterConfig
from ayllu.weights.file_kinds import PICKLE_SUFFIXES
from ayllu.weights.hf_config_writer import rope_layout_of
from ayllu.weights.names import NameMap, hugging_face_names
from ayllu.weights.rope_layout import permute_rope_rows
from ayllu.weights.safetensors import SafetensorsFile
from ayllu.weights.tensors import Array

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
MAX_ADAPTER_BYTES = 4 << 30
"""An adapter of rank 512 on every matrix of Llama 4 Scout's decoder takes 3.6 GB in bfloat16."""

_PREFIX = "base_model.model."
_MATRIX = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")
_FLOATS = ("F64", "F32", "F16", "BF16")
_OTHER_KINDS = (
    (re.compile(r"lora_magnitude_vector|lora_diag"), "a variant of LoRA such as DoRA"),
    (re.compile(r"lora_embedding_[AB]"), "adapted embeddings"),
    (re.compile(r"lora_[AB]\.bias\Z"), "a bias of the adapter's own"),
    (re.compile(r"\.bias\Z"), "changed biases of the base model"),
    (re.compile(r"\A(?!.*lora_).*\.weight\Z"), "a whole module beside the low-rank matrices"),
)
_OTHER_MODULES = (
    (".experts", "routed experts"),
    (".router", "the router"),
    ("vision_", "the image tower"),
    ("multi_modal_projector", "the image tower"),
    ("embed_tokens", "the embeddings"),
    ("lm_head", "the output head"),
)
_FIX = "Train the adapter on attention, dense and shared-expert projections of the decoder, or merge it."


@dataclass(frozen=True, eq=False)
class LowRank:
    """The change of one matrix [outputs, inputs]: scale * b @ a, with a [r, inputs] and b [outputs, r]."""

    a: Array
    b: Array
    scale: float

    @property
    def nbytes(self) -> int:
        return int(self.a.nbytes + self.b.nbytes)


@dataclass(frozen=True, eq=False)
class Adapter:
    """modules: our module path, as `layers.0.attention.q_proj` -> its change. layout: the order of rotary
    dimensions in which the rows of query and key projections stand, the decoder's own."""

    modules: Mapping[str, LowRank]
    layout: RopeLayout

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices as they are held here."""
        return sum(change.nbytes for change in self.modules.values())

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hexadecimal, of everything that changes an answer: names, scales and matrices."""
        state = hashlib.sha256(self.layout.encode())
        for name, change in sorted(self.modules.items()):
            head = (name, change.scale.hex(), change.a.shape, change.a.dtype.name)
            state.update(repr((*head, change.b.shape, change.b.dtype.name)).encode())
            for matrix in (change.a, change.b):
                state.update(np.ascontiguousarray(matrix).view(np.uint8).data)
        return state.hexdigest()


def read_adapter(folder: Path, config: ModelConfig) -> Adapter:
    """The adapter in `folder` (adapter_config.json, adapter_model.safetensors) for the model `config`.

    Raises ModelFileError for files that are missing, damaged, contradictory, or made for a model of other
    names or shapes; UnsupportedError for adapters that are more than low-rank changes of attention, dense
    and shared-expert projections, and for formats that could run code.
    """
    if not folder.is_dir():
        raise ModelFileError(folder, "there is no such folder", fix="Name the folder that PEFT saved.")
    settings = AdapterConfig(member_path(folder, CONFIG_FILE))
    file = _open_weights(folder)
    names = hugging_face_names(
        config.architecture,
        multimodal=any(name.startswith(f"{_PREFIX}language_model.") for name in file),
    )
    shapes = _adaptable_shapes(config)
    pairs = _pairs(file, shapes, names)
    theirs = {ours: _their_module(names, ours) for ours in shapes}
    settings.require_agreement([theirs[ours] for ours in pairs], list(theirs.values()))
    for ours, sides in pairs.items():
        outputs, inputs = shapes[ours]
        rank = settings.rank(theirs[ours])
        _require_shape(file, sides["A"], (rank, inputs))
        _require_shape(file, sides["B"], (outputs, rank))
    modules = {}
    for ours, sides in pairs.items():
        a, b = _numbers(file, sides["A"]), _numbers(file, sides["B"])
        if ours.endswith((".attention.q_proj", ".attention.k_proj")):
            wanted, trained = config.rope.layout, rope_layout_of(config.architecture)
            b = permute_rope_rows(b, len(b) // config.head_dim, source=trained, target=wanted)
        modules[ours] = LowRank(a, b, settings.scale(theirs[ours]))
    return Adapter(modules, config.rope.layout)


def _open_weights(folder: Path) -> SafetensorsFile:
    if not (folder / WEIGHTS_FILE).is_symlink() and not (folder / WEIGHTS_FILE).exists():
        pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
        if pickles:
            raise UnsupportedError(
                f"{folder} holds its weights only as {clip(pickles[0], 60)}, a format that can run code.",
                "Save the adapter as safetensors, which PEFT does by itself since version 0.7.",
            )
    path = member_path(folder, WEIGHTS_FILE)
    size = path.stat().st_size
    if size > MAX_ADAPTER_BYTES:
        raise ModelFileError(
            path, "is too large for an adapter", expected=f"at most {MAX_ADAPTER_BYTES} bytes", got=size
        )
    file = SafetensorsFile(path)
    if not len(file):
        raise ModelFileError(path, "holds no tensors")
    return file


def _adaptable_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Our module -> [outputs, inputs], for every projection of the decoder that is not a routed expert's."""
    return {
        name.removesuffix(".weight"): shape
        for name, shape in parameter_shapes(config).items()
        if name.startswith("layers.") and name.endswith("_proj.weight")
    }


def _pairs(
    file: SafetensorsFile, adaptable: Mapping[str, tuple[int, ...]], names: NameMap
) -> dict[str, dict[str, str]]:
    """Our module -> {"A": name in the file, "B": name in the file}."""
    pairs: dict[str, dict[str, str]] = {}
    for name in file:
        found = _MATRIX.fullmatch(name)
        if found is None:
            _refuse_tensor(file.path, name)
        ours = (names.ours(f"{found['module']}.weight") or "").removesuffix(".weight")
        if ours not in adaptable:
            _refuse_module(file.path, found["module"])
        pairs.setdefault(ours, {})[found["side"]] = name
    for sides in pairs.values():
        if len(sides) < 2:
            held = next(iter(sides.values()))
            other = held.replace("lora_A", "lora_B") if "A" in sides else held.replace("lora_B", "lora_A")
            raise ModelFileError(file.path, "one matrix of a pair is missing", field=other)
    return pairs


def _their_module(names: NameMap, ours: str) -> str:
    theirs = names.theirs(f"{ours}.weight")
    assert theirs is not None, f"{ours} has no name in Hugging Face's format"
    return theirs.removesuffix(".weight")


def _refuse_tensor(path: Path, name: str) -> NoReturn:
    for pattern, meaning in _OTHER_KINDS:
        if name.startswith(_PREFIX) and pattern.search(name):
            raise UnsupportedError(
                f"{path}: tensor {clip(name)} means {meaning}, which ayllu does not apply.", _FIX
            )
    raise ModelFileError(path, "holds a tensor that is not part of a LoRA adapter", field=name)


def _refuse_module(path: Path, module: str) -> NoReturn:
    for part, meaning in _OTHER_MODULES:
        if part in module:
            raise UnsupportedError(
                f"{path}: the adapter changes {meaning} ({clip(module)}), which ayllu does not apply.", _FIX
            )
    raise ModelFileError(
        path,
        "adapts a module that this model does not have, or that is no projection",
        field=module,
        fix="Use the adapter with the base model it was trained on.",
    )


def _require_shape(file: SafetensorsFile, name: str, expected: tuple[int, int]) -> None:
    tensor = file[name]
    if tensor.encoding not in _FLOATS:
        raise UnsupportedError(
            f"{file.path}: {clip(name)} is stored as {tensor.encoding}.",
            "Save the adapter in F32, F16 or BF16.",
        )
    if tensor.shape != expected:
        raise ModelFileError(
            file.path,
            "a matrix has the wrong shape",
            field=name,
            expected=expected,
            got=tensor.shape,
            fix="Use the adapter with the base model it was trained on; r must be as in its config.",
        )


def _numbers(file: SafetensorsFile, name: str) -> Array:
    """A copy of a matrix, so that a file that changes later changes nothing here; F64 becomes F32."""
    tensor = file[name]
    with np.errstate(over="ignore"):
        matrix = tensor.array.astype(np.float32) if tensor.encoding == "F64" else tensor.array.copy()
    tensor.release()
    if not np.isfinite(matrix).all():
        raise ModelFileError(file.path, "holds numbers that are not finite", field=name)
    return matrix
