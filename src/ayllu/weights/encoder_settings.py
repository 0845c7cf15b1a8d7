"""How an encoder's folder wants it used, from the small files that sentence-transformers writes beside it.

`modules.json` lists the steps from text to vector, `1_Pooling/config.json` says how the tokens' states become
one, `sentence_bert_config.json` how many tokens are read. Only values are read; what is not one of the two
usual ways is refused, because it would quietly give other vectors.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

from ayllu.errors import ModelFileError, UnsupportedError, clip
from ayllu.folder_files import STORE_MANIFEST, member_path
from ayllu.json_file import parse_json_object, read_json_object
from ayllu.model.encoder_config import EncoderConfig
from ayllu.weights.hf_fields import Fields

Pooling = Literal["mean", "cls"]
"""The mean of the tokens' hidden states, [CLS] and [SEP] included, or the state of [CLS] alone."""

MAX_SETTINGS_BYTES = 64 << 10
MAX_MANIFEST_BYTES = 4 << 20
_FOLDER_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_]{0,62}")
_MODES = {
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len_tokens",
    "pooling_mode_weightedmean_tokens": "weightedmean",
    "pooling_mode_lasttoken": "lasttoken",
}


@dataclass(frozen=True)
class EncoderSettings:
    """max_tokens: tokens of one text, [CLS] and [SEP] included, at most the network's positions."""

    max_tokens: int
    pooling: Pooling


def read_encoder_settings(folder: Path, config: EncoderConfig) -> EncoderSettings:
    """The settings of a folder; without such files, mean pooling over as many tokens as there are positions.

    Raises ModelFileError for damaged files and where the way of pooling is named in a file that is not there,
    UnsupportedError for steps and ways of pooling that ayllu does not implement.
    """
    return EncoderSettings(_max_tokens(folder, config), _pooling(folder, config))


def _max_tokens(folder: Path, config: EncoderConfig) -> int:
    fields = _fields(folder, "sentence_bert_config.json")
    if fields is None:
        return config.max_position_embeddings
    if fields.flag("do_lower_case", False):
        fields.refuse("do_lower_case", True)
    length = fields.integer("max_seq_length", config.max_position_embeddings)
    if length < 3:
        fields.fail("max_seq_length", "3 or more", length)
    return min(length, config.max_position_embeddings)


def _pooling(folder: Path, config: EncoderConfig) -> Pooling:
    place = _pooling_folder(folder)
    if place is None:
        return "mean"
    inner = folder / place
    if (inner / "config.json").exists():
        return _stated_pooling(Fields(_read(_nested_file(folder, place)), inner / "config.json"), config)
    recorded = _recorded_pooling(folder)
    if recorded is None:
        raise ModelFileError(
            folder,
            "modules.json says that another file tells how tokens become one vector, and it is not here",
            field=f"{place}/config.json",
            fix=f"Put {place}/config.json of the same model into this folder.",
        )
    return recorded


def _pooling_folder(folder: Path) -> str | None:
    """Where modules.json says that the pooling is described; None without that file."""
    file = folder / "modules.json"
    if not file.is_file():
        return None
    with member_path(folder, file.name).open("rb") as opened:
        data = opened.read(MAX_SETTINGS_BYTES + 1)
    if len(data) > MAX_SETTINGS_BYTES:
        raise ModelFileError(file, "is too large", expected=f"at most {MAX_SETTINGS_BYTES} bytes")
    # The file is a list; the reader of JSON objects is the one that refuses what JSON leaves open.
    modules = parse_json_object(b'{"modules":' + data + b"}", file)["modules"]
    if not isinstance(modules, list) or not all(isinstance(module, dict) for module in modules):
        raise ModelFileError(file, "is not a list of modules")
    steps = [Fields(module, file, f"{place}.") for place, module in enumerate(modules)]
    kinds = [step.text("type").rpartition(".")[2] for step in steps]
    if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedError(
            f"{file}: the steps {clip(', '.join(kinds), 80)} are not supported.",
            "Supported are Transformer, Pooling and, after these, Normalize.",
        )
    place = steps[1].text("path")
    if not _FOLDER_NAME.fullmatch(place):
        steps[1].fail("path", "the name of a folder", place)
    return place


def _stated_pooling(fields: Fields, config: EncoderConfig) -> Pooling:
    width = fields.integer("word_embedding_dimension", config.hidden_size)
    if width != config.hidden_size:
        fields.fail("word_embedding_dimension", str(config.hidden_size), width)
    modes = [mode for key, mode in _MODES.items() if fields.flag(key, False)]
    if fields.given("pooling_mode"):
        modes.append(fields.text("pooling_mode"))
    if modes not in (["mean"], ["cls"]):
        fields.refuse("pooling_mode", " + ".join(modes) or "none", "only mean and cls are")
    return cast(Pooling, modes[0])


def _recorded_pooling(folder: Path) -> Pooling | None:
    """What the store noted for a catalogue model, whose pooling file lies in a subfolder and stays behind."""
    if not (folder / STORE_MANIFEST).is_file():
        return None
    manifest = read_json_object(folder / STORE_MANIFEST, max_bytes=MAX_MANIFEST_BYTES)
    recorded = manifest.get("pooling")
    return cast(Pooling, recorded) if recorded in ("mean", "cls") else None


def _nested_file(folder: Path, place: str) -> Path:
    """`place`/config.json by the rules of `member_path`: links stay in the folder or in its hub cache."""
    file = folder / place / "config.json"
    real, home = file.resolve(), folder.resolve()
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else None
    if real.parent not in (home / place, blobs) or not real.is_file():
        raise ModelFileError(file, "is a link out of the model's folder", got=clip(real))
    return file


def _fields(folder: Path, name: str) -> Fields | None:
    if not (folder / name).is_file():
        return None
    return Fields(_read(member_path(folder, name)), folder / name)


def _read(file: Path) -> dict[str, Any]:
    return read_json_object(file, max_bytes=MAX_SETTINGS_BYTES)
