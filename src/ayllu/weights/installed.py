"""What the store knows about one model: its files, where it came from, under which licence.

The manifest is written beside the files by the rename that makes a model appear. It is read back as strictly
as anything from outside: its names and digests pass the same checks.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from ayllu.errors import ModelFileError, UnsupportedError, UsageError, clip, one_line
from ayllu.folder_files import STORE_MANIFEST
from ayllu.json_file import read_json_object
from ayllu.paths import expanded
from ayllu.weights.sources.safe_names import (
    MODEL_NAME,
    refuse_unless_model_file,
    safe_digest,
    safe_model_name,
)

MANIFEST = STORE_MANIFEST
UNKNOWN_LICENCE = "unknown"
MOST_MANIFEST_BYTES = 4 << 20
Format = Literal["gguf", "safetensors"]


@dataclass(frozen=True, kw_only=True)
class StoredFile:
    """One file of a model. `sha256` is None only for a path used in place, which nobody hashed."""

    name: str
    size_bytes: int
    sha256: str | None

    def __post_init__(self) -> None:
        _require("name", self.name, str)
        _require("size_bytes", self.size_bytes, int)
        _require("sha256", self.sha256, str, type(None))
        refuse_unless_model_file(self.name)
        if self.sha256 is not None:
            safe_digest(self.sha256)
        if self.size_bytes < 0:
            raise UsageError(f"The file {clip(self.name)} has {self.size_bytes} bytes.", "Give its size.")


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """What is written beside a model's files: enough to list it, check it and say where it came from.

    `pooling` is the catalogue's word on how an encoder's token states become one vector (`encoder_settings`).
    """

    manifest_version: int = 1
    name: str
    source: str
    licence: str
    notice: str
    pulled_at: str
    pooling: Literal["mean", "cls"] | None = None
    files: tuple[StoredFile, ...]

    def __post_init__(self) -> None:
        for name in ("name", "source", "licence", "notice", "pulled_at"):
            _require(name, getattr(self, name), str)
        safe_model_name(self.name)
        if type(self.manifest_version) is not int or self.manifest_version != 1:
            raise UsageError(f"Manifest version {clip(self.manifest_version)} is not known.", "Update ayllu.")
        if self.pooling not in (None, "mean", "cls"):
            raise UsageError(f"The pooling {clip(self.pooling)} is not known.", "Use 'mean' or 'cls'.")
        if not self.files:
            raise UsageError(f"The manifest of {self.name} names no file.", "Name at least one.")

    @classmethod
    def read(cls, file: Path) -> Manifest:
        """The manifest in `file`. Raises ModelFileError or UsageError for anything but a whole one."""
        values = read_json_object(file, max_bytes=MOST_MANIFEST_BYTES)
        try:
            files = tuple(StoredFile(**entry) for entry in values.pop("files"))
            return cls(**values, files=files)
        except (TypeError, KeyError) as error:
            # A field that is missing, unknown, or holds something that has no fields.
            raise UsageError(f"{file} is no manifest: {clip(error)}.", "Fetch the model again.") from error

    def to_json(self) -> str:
        """As the file holds it; what does not apply is left out."""
        values = dataclasses.asdict(self)
        return json.dumps({k: v for k, v in values.items() if v is not None}, ensure_ascii=False, indent=2)


def _require(name: str, value: Any, *kinds: type) -> None:
    if type(value) not in kinds:
        raise UsageError(f"{name} = {clip(repr(value))} is not what a manifest holds.", "Write it anew.")


@dataclass(frozen=True)
class InstalledModel:
    """A model that can be opened. `path` is the GGUF file, or the folder of safetensors and configuration."""

    name: str
    path: Path
    format: Format
    files: tuple[StoredFile, ...]
    source: str
    recorded_licence: str = UNKNOWN_LICENCE
    notice: str = ""
    pulled_at: str = ""

    @cached_property
    def licence(self) -> str:
        """The licence on record, else what the file itself states (its header is read then), or "unknown"."""
        return (
            stated_licence(self.path) if self.recorded_licence == UNKNOWN_LICENCE else self.recorded_licence
        )

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def sha256(self) -> str | None:
        """The hash of a single-file (GGUF) model; None for a folder or a path used in place."""
        return self.files[0].sha256 if self.format == "gguf" else None


def find_installed(store: Path, name: str) -> InstalledModel | None:
    """The model of that name in the folder `store`, None where it has none. Raises ModelFileError.

    Every model appears with its manifest, so a folder without one is somebody's own.
    """
    folder = expanded(store).absolute() / name
    return read_installed(folder) if MODEL_NAME.fullmatch(name) and (folder / MANIFEST).is_file() else None


def read_installed(folder: Path) -> InstalledModel:
    """The model in `folder`, which bears its name.

    Raises ModelFileError when the manifest is unreadable or another's, or when a file is gone or cut.
    """
    file, name = folder / MANIFEST, folder.name
    fix = f"Remove it and fetch it again: ayllu remove {name} && ayllu pull {name}"
    try:
        if file.stat().st_size > MOST_MANIFEST_BYTES:
            raise ModelFileError(file, "manifest too large", fix=fix)
    except OSError as error:
        raise ModelFileError(file, "no readable manifest", fix=fix) from error
    try:
        manifest = Manifest.read(file)
    except (ModelFileError, UsageError, UnsupportedError) as error:
        raise ModelFileError(file, "no readable manifest", fix=fix) from error
    if manifest.name != name:
        raise ModelFileError(file, "manifest of another model", expected=name, got=manifest.name, fix=fix)
    for stored in manifest.files:
        path = folder / stored.name
        size = path.stat().st_size if path.is_file() else None
        if size != stored.size_bytes:
            raise ModelFileError(
                path, "size differs", expected=stored.size_bytes, got=size or "no file", fix=fix
            )
    return installed(manifest, folder)


def installed(manifest: Manifest, folder: Path) -> InstalledModel:
    """The model that `manifest` describes, with its files in `folder`. The files are not looked at."""
    gguf = [file for file in manifest.files if file.name.lower().endswith(".gguf")]
    is_gguf = len(gguf) == 1
    return InstalledModel(
        name=manifest.name,
        path=folder / gguf[0].name if is_gguf else folder,
        format="gguf" if is_gguf else "safetensors",
        files=(*gguf, *(file for file in manifest.files if file not in gguf)),
        source=manifest.source,
        recorded_licence=manifest.licence,
        notice=manifest.notice,
        pulled_at=manifest.pulled_at,
    )


def in_place(path: Path) -> InstalledModel:
    """The model at `path`, not imported. Its files are named and sized, not hashed."""
    from ayllu.weights.sources.files import local_model_files

    wanted = local_model_files(path)
    files = tuple(StoredFile(name=file.name, size_bytes=file.stat().st_size, sha256=None) for file in wanted)
    return InstalledModel(
        name=path.stem if path.is_file() else path.resolve().name,
        path=path.absolute(),
        format="gguf" if path.is_file() else "safetensors",
        files=files,
        source=f"file:{path.absolute()}",
    )


def stated_licence(path: Path) -> str:
    """The licence that a GGUF states of itself (`general.license`); "unknown" for any other file or none."""
    from ayllu.weights.gguf import read_gguf

    if path.suffix.lower() != ".gguf":
        return UNKNOWN_LICENCE
    try:
        stated = read_gguf(path).metadata.get("general.license")
    except (ModelFileError, UnsupportedError):
        return UNKNOWN_LICENCE
    return one_line(clip(stated, 80)) if isinstance(stated, str) and stated.strip() else UNKNOWN_LICENCE
