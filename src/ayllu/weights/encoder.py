"""A folder with a BERT-type encoder, opened: config.json and its one safetensors file. Needs no torch.

As for decoders, every tensor the config calls for must be there with the right shape before anyone starts to
load, and nothing in the folder can name code to run.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ayllu.errors import AylluError, ModelFileError, UnsupportedError, clip
from ayllu.folder_files import member_path
from ayllu.model.encoder_config import EncoderConfig, encoder_parameter_shapes
from ayllu.weights.checkpoint import bytes_by_encoding, require_tensors
from ayllu.weights.file_kinds import PICKLE_SUFFIXES
from ayllu.weights.hf_config import ENCODER_TYPES, read_config
from ayllu.weights.hf_fields import Fields
from ayllu.weights.names import NameMap
from ayllu.weights.safetensors import SafetensorsFile
from ayllu.weights.tensors import PlainTensor

FLOATS = ("F32", "F16", "BF16", "F64")

_NAMES = NameMap(
    [
        ("embed_tokens.weight", "embeddings.word_embeddings.weight"),
        ("embed_positions.weight", "embeddings.position_embeddings.weight"),
        ("embed_types.weight", "embeddings.token_type_embeddings.weight"),
        ("embed_norm.{p}", "embeddings.LayerNorm.{p}"),
        ("layers.{i}.attention.q_proj.{p}", "encoder.layer.{i}.attention.self.query.{p}"),
        ("layers.{i}.attention.k_proj.{p}", "encoder.layer.{i}.attention.self.key.{p}"),
        ("layers.{i}.attention.v_proj.{p}", "encoder.layer.{i}.attention.self.value.{p}"),
        ("layers.{i}.attention.o_proj.{p}", "encoder.layer.{i}.attention.output.dense.{p}"),
        ("layers.{i}.attention_norm.{p}", "encoder.layer.{i}.attention.output.LayerNorm.{p}"),
        ("layers.{i}.mlp.fc1.{p}", "encoder.layer.{i}.intermediate.dense.{p}"),
        ("layers.{i}.mlp.fc2.{p}", "encoder.layer.{i}.output.dense.{p}"),
        ("layers.{i}.mlp_norm.{p}", "encoder.layer.{i}.output.LayerNorm.{p}"),
    ]
)
_PREFIX = re.compile(r"bert\.")
"""Stands before every name where the file was saved with a head for pretraining."""
_LEFTOVER = re.compile(r"embeddings\.(?:position|token_type)_ids\Z|pooler\.dense\.(?:weight|bias)\Z|cls\.")
"""Buffers, and the heads of BERT's pretraining tasks: no embedding is made of them."""


@dataclass(frozen=True)
class EncoderCheckpoint:
    """`tensors` has exactly the parameters of `config`."""

    path: Path
    config: EncoderConfig
    tensors: Mapping[str, PlainTensor]

    def __post_init__(self) -> None:
        require_tensors(self.path, self.tensors, encoder_parameter_shapes(self.config))

    @property
    def bytes_by_encoding(self) -> dict[str, int]:
        """Bytes stored in each encoding, largest first."""
        return bytes_by_encoding(self.tensors.values())


def is_encoder_folder(path: Path) -> bool:
    """Whether `path` is a folder whose config.json describes an encoder that `open_encoder` opens.

    False for anything else, unreadable configs included: whoever opens the folder next will say why.
    """
    if not path.is_dir():
        return False
    try:
        return read_config(path).get("model_type") in ENCODER_TYPES
    except AylluError:
        return False


def open_encoder(path: Path) -> EncoderCheckpoint:
    """The encoder in the folder `path`.

    Raises ModelFileError for damaged files and for tensors that do not fit the config, UnsupportedError for
    architectures, options, encodings and file formats that ayllu does not open.
    """
    config = encoder_config_from_hugging_face(read_config(path), path / "config.json")
    file = SafetensorsFile(_tensor_file(path))
    tensors: dict[str, PlainTensor] = {}
    for theirs in file:
        name = _PREFIX.sub("", theirs, count=1) if _PREFIX.match(theirs) else theirs
        if _LEFTOVER.match(name):
            continue
        ours = _NAMES.ours(name)
        if ours is None or ours in tensors:
            raise ModelFileError(file.path, "a tensor does not belong to this architecture", field=theirs)
        tensors[ours] = file[theirs]
        if tensors[ours].encoding not in FLOATS:
            raise UnsupportedError(
                f"{file.path}: {clip(theirs)} is stored as {tensors[ours].encoding}.",
                "Use a copy of the model in BF16, F16 or F32.",
            )
    return EncoderCheckpoint(path, config, tensors)


def encoder_config_from_hugging_face(config: Mapping[str, Any], file: Path) -> EncoderConfig:
    """The network that `config`, read from `file`, describes. Absent keys take transformers' own defaults.

    Raises ModelFileError for values that make no sense, UnsupportedError for other architectures and for
    options that change the arithmetic. Keys that do not change it are ignored.
    """
    fields = Fields(config, file)
    model_type = fields.text("model_type")
    if model_type not in ENCODER_TYPES:
        raise UnsupportedError(
            f"{file}: model_type {clip(repr(model_type), 60)} is no encoder that ayllu opens.",
            f"Supported is {', '.join(ENCODER_TYPES)}.",
        )
    for key, implemented in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if (value := fields.text(key, implemented)) != implemented:
            fields.refuse(key, value)
    for key in ("is_decoder", "add_cross_attention"):
        if fields.flag(key, False):
            fields.refuse(key, True)
    return EncoderConfig(
        vocab_size=fields.integer("vocab_size", 30_522),
        hidden_size=fields.integer("hidden_size", 768),
        num_hidden_layers=fields.integer("num_hidden_layers", 12),
        num_attention_heads=fields.integer("num_attention_heads", 12),
        intermediate_size=fields.integer("intermediate_size", 3072),
        max_position_embeddings=fields.integer("max_position_embeddings", 512),
        type_vocab_size=fields.integer("type_vocab_size", 2),
        layer_norm_eps=fields.real("layer_norm_eps", 1e-12),
    )


def _tensor_file(folder: Path) -> Path:
    """The one safetensors file of a folder: encoders are small, nobody splits them."""
    names = sorted(file.name for file in folder.glob("*.safetensors"))
    if len(names) == 1:
        return member_path(folder, names[0])
    if names:
        raise UnsupportedError(
            f"{folder} holds {len(names)} safetensors files; an encoder is read from one.",
            "Keep model.safetensors alone in the folder.",
        )
    pickles = sorted(file.name for file in folder.iterdir() if file.suffix.lower() in PICKLE_SUFFIXES)
    if pickles:
        raise UnsupportedError(
            f"{folder} holds its weights only as {clip(pickles[0], 60)}, a format that can run code.",
            "Fetch the safetensors of this model.",
        )
    raise ModelFileError(folder, "has no *.safetensors beside its config.json")
