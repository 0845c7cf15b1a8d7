"""The local store: which models are on this machine, how one gets in, and how it leaves.

A model is a folder `<root>/<name>/` with its files and a manifest. It is assembled under `<root>/.partial/`
and appears by one rename once every hash is right, so a model is there entirely or not at all.
"""

from __future__ import annotations

import datetime
import json
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from filelock import FileLock, Timeout
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from ayllu.errors import (
    AylluError,
    IntegrityError,
    ModelFileError,
    SourceError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
    did_you_mean,
)
from ayllu.progress import SILENT, Progress
from ayllu.weights.catalogue import Catalogue, Entry, builtin_catalogue
from ayllu.weights.sources import FORMS, Source, base, looks_like_path, parse_source
from ayllu.weights.sources.base import Fetched, Limits, Order, Pinned
from ayllu.weights.sources.files import link_or_copy, local_model_files
from ayllu.weights.sources.safe_names import (
    MODEL_NAME,
    refuse_unless_model_file,
    safe_digest,
    safe_model_name,
)

MANIFEST = "ayllu-model.json"
NOTICE = "NOTICE.txt"
MOST_MANIFEST_BYTES = 4 << 20
Format = Literal["gguf", "safetensors"]


class StoredFile(BaseModel):
    """One file of a model. `sha256` is None only for a path used in place, which nobody hashed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(lambda name: str(refuse_unless_model_file(name)))]
    size_bytes: int = Field(ge=0)
    sha256: Annotated[str, AfterValidator(safe_digest)] | None


class Manifest(BaseModel):
    """What is written beside a model's files: enough to list it, check it and say where it came from."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    manifest_version: Literal[1] = 1
    name: Annotated[str, AfterValidator(safe_model_name)]
    source: str
    licence: str
    notice: str
    pulled_at: str
    files: tuple[StoredFile, ...] = Field(min_length=1)


@dataclass(frozen=True)
class InstalledModel:
    """A model that can be opened. `path` is the GGUF file, or the folder of safetensors and configuration."""

    name: str
    path: Path
    format: Format
    files: tuple[StoredFile, ...]
    source: str
    licence: str = "unknown"
    notice: str = ""
    pulled_at: str = ""

    @property
    def size_bytes(self) -> int:
        """Bytes of all files together."""
        return sum(file.size_bytes for file in self.files)

    @property
    def sha256(self) -> str | None:
        """The hash of a single-file (GGUF) model; None for a folder or a path used in place."""
        return self.files[0].sha256 if self.format == "gguf" else None


class Store:
    """All models below one folder. Safe to use from several processes at once."""

    def __init__(
        self,
        root: Path,
        *,
        catalogue: Catalogue | None = None,
        limits: Limits = Limits(),
        lock_wait_s: float = 3600.0,
    ) -> None:
        self.root = root.expanduser().absolute()
        self.catalogue = catalogue or builtin_catalogue()
        self.limits = limits
        self._lock_wait_s = lock_wait_s
        self._unreachable: dict[str, str] = {}

    def list(self) -> list[InstalledModel]:
        """Every complete model, by name. Anything damaged or unfinished is left out (see `damaged`)."""
        return [model for name in self._folders() if (model := self._readable(name)) is not None]

    def damaged(self) -> Sequence[str]:
        """Names of model folders whose manifest or files are unreadable or gone: remove or pull them again."""
        return [name for name in self._folders() if self._readable(name) is None]

    def find(self, name_or_path: str | Path) -> InstalledModel:
        """An installed model by name, or a GGUF file or model folder by path, used where it is.

        Raises UnknownModelError naming the command that would fetch it, ModelFileError for a damaged one.
        """
        text = str(name_or_path)
        if MODEL_NAME.fullmatch(text) and (self.root / text).is_dir():
            return self._read(text)
        path = Path(text).expanduser()
        if isinstance(name_or_path, Path) or looks_like_path(text) or path.exists():
            return _in_place(path)
        if self.catalogue.get(text):
            raise UnknownModelError(f"{text} is not on this machine yet.", f"Fetch it: ayllu pull {text}")
        known = [*self.catalogue.names(), *(model.name for model in self.list())]
        raise UnknownModelError(
            f"No model is called {text!r}.{did_you_mean(text, known)}",
            "`ayllu list` shows what is installed and what can be pulled.",
        )

    def ensure(self, name: str, progress: Progress = SILENT) -> InstalledModel:
        """The installed model of that name, pulled first when it is in the catalogue and not yet here."""
        if self.catalogue.get(name) and not (self.root / name).is_dir():
            return self.pull(name, progress)
        return self.find(name)

    def pull(
        self, source_or_name: str, progress: Progress = SILENT, name: str | None = None
    ) -> InstalledModel:
        """Bring a model into the store, from the catalogue by name or from a source as written.

        What is already here is kept; what an interrupted pull left is continued. `name` overrides the name
        it gets. Raises UnknownModelError, SourceError, IntegrityError, NoSpaceError, UnsupportedError.
        """
        source = parse_source(source_or_name)
        if source is not None:
            as_name = safe_model_name(name) if name else source.suggested_name()
            return self._pull([source], as_name, None, progress)
        entry = self.catalogue.get(source_or_name)
        if entry is None:
            if MODEL_NAME.fullmatch(source_or_name) and self._readable(source_or_name):
                return self._read(source_or_name)
            raise UnknownModelError(
                f"No model is called {source_or_name!r}.{did_you_mean(source_or_name, self.catalogue.names())}",
                f"Name one of {', '.join(self.catalogue.names())}; or a source: {FORMS}.",
            )
        return self._pull(entry.sources(), safe_model_name(name) if name else entry.name, entry, progress)

    def remove(self, name: str) -> InstalledModel | None:
        """Delete a model and anything an interrupted pull of it left. Returns what it was, None if unreadable."""
        if not MODEL_NAME.fullmatch(name) or not (
            (self.root / name).is_dir() or self._partial(name).is_dir()
        ):
            known = self._folders()
            raise UnknownModelError(
                f"No model called {name!r} is installed.{did_you_mean(name, known)}",
                "`ayllu list` shows what is installed.",
            )
        with self._locked(name):
            model = self._readable(name)
            self._discard(self.root / name)
            shutil.rmtree(self._partial(name), ignore_errors=True)
        return model

    def _pull(
        self, sources: list[Source], name: str, entry: Entry | None, progress: Progress
    ) -> InstalledModel:
        self._make_folders()
        with self._locked(name):
            present = self._readable(name)
            if present is not None and _is_what_was_asked(present, sources, entry):
                return present
            if present is not None:
                raise UsageError(
                    f"{name} is already installed from {present.source}.",
                    f"Choose another name with --name, or first: ayllu remove {name}",
                )
            source, files = self._fetch_from_first(sources, name, entry, progress)
            return self._publish(name, source, files, entry)

    def _fetch_from_first(
        self, sources: list[Source], name: str, entry: Entry | None, progress: Progress
    ) -> tuple[Source, list[Fetched]]:
        """Try the sources in order; when all fail, one error that gives each one's reason."""
        folder = self._partial(name)
        folder.mkdir(parents=True, exist_ok=True)
        order = Order(
            folder=folder,
            pinned=entry.pinned if entry else Pinned(),
            progress=progress,
            limits=self.limits,
            label=f"pull {name}",
            unreachable=self._unreachable,
        )
        failures: list[tuple[Source, AylluError]] = []
        for source in sources:
            try:
                with base.full_disk_is_typed(folder):
                    return source, source.fetch(order)
            except (SourceError, IntegrityError, UnsupportedError) as error:
                failures.append((source, error))
        if len(failures) == 1:
            raise failures[0][1]
        reasons = "; ".join(f"{source.text}: {error.problem.rstrip('.')}" for source, error in failures)
        kind = (
            IntegrityError if all(isinstance(error, IntegrityError) for _, error in failures) else SourceError
        )
        raise kind(f"No source of {name} delivered. {reasons}.", "Check the network, then pull again.")

    def _publish(
        self, name: str, source: Source, files: list[Fetched], entry: Entry | None
    ) -> InstalledModel:
        """Assemble the folder and make it visible with one rename."""
        partial = self._partial(name)
        ready = partial / "ready"
        shutil.rmtree(ready, ignore_errors=True)
        ready.mkdir()
        stored = []
        for file in files:
            target = ready / refuse_unless_model_file(file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            if file.movable:
                file.path.replace(target)
            else:
                link_or_copy(file.path, target)
            stored.append(StoredFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256))
        manifest = Manifest(
            name=name,
            source=source.text,
            licence=entry.licence if entry else "unknown",
            notice=entry.notice if entry else "",
            pulled_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            files=tuple(sorted(stored, key=lambda file: file.name)),
        )
        if manifest.notice:
            base.write_atomically(ready / NOTICE, f"{manifest.notice}\n".encode())
        base.write_atomically(ready / MANIFEST, manifest.model_dump_json(indent=2).encode())
        self._discard(self.root / name)
        ready.rename(self.root / name)
        shutil.rmtree(partial, ignore_errors=True)
        return self._read(name)

    def _discard(self, folder: Path) -> None:
        """Take a folder out of sight with one rename, then delete it."""
        if folder.is_dir():
            bin_folder = self.root / ".partial" / f".removed-{uuid.uuid4().hex}"
            bin_folder.parent.mkdir(exist_ok=True)
            folder.rename(bin_folder)
            shutil.rmtree(bin_folder, ignore_errors=True)

    def _read(self, name: str) -> InstalledModel:
        """The model in folder `name`. Raises ModelFileError when the manifest is bad or a file is gone or cut."""
        file = self.root / name / MANIFEST
        fix = f"Remove and fetch it again: ayllu remove {name} && ayllu pull {name}"
        try:
            if file.stat().st_size > MOST_MANIFEST_BYTES:
                raise ModelFileError(file, "manifest too large", fix=fix)
            manifest = Manifest.model_validate_json(file.read_bytes())
        except (OSError, ValidationError, json.JSONDecodeError, UsageError, UnsupportedError) as error:
            raise ModelFileError(file, "no readable manifest", fix=fix) from error
        if manifest.name != name:
            raise ModelFileError(file, "manifest of another model", expected=name, got=manifest.name, fix=fix)
        for stored in manifest.files:
            path = self.root / name / stored.name
            size = path.stat().st_size if path.is_file() else None
            if size != stored.size_bytes:
                raise ModelFileError(path, "size differs", expected=stored.size_bytes, got=size, fix=fix)
        return _installed(manifest, self.root / name)

    def _readable(self, name: str) -> InstalledModel | None:
        try:
            return self._read(name)
        except ModelFileError:
            return None

    def _folders(self) -> Sequence[str]:
        if not self.root.is_dir():
            return []
        return sorted(
            item.name for item in self.root.iterdir() if item.is_dir() and MODEL_NAME.fullmatch(item.name)
        )

    def _partial(self, name: str) -> Path:
        return self.root / ".partial" / safe_model_name(name)

    def _make_folders(self) -> None:
        try:
            (self.root / ".partial").mkdir(parents=True, exist_ok=True)
            (self.root / ".locks").mkdir(exist_ok=True)
        except OSError as error:
            raise UsageError(
                f"The store {self.root} cannot be written: {error.strerror}.",
                "Set AYLLU_STORE to a folder of yours.",
            ) from error

    @contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold the model's lock. A second process waits here, then finds the work done."""
        self._make_folders()
        lock = FileLock(self.root / ".locks" / f"{name}.lock")
        try:
            lock.acquire(timeout=self._lock_wait_s)
        except Timeout as error:
            raise SourceError(
                f"Another process has been working on {name} for over {self._lock_wait_s:.0f} s.",
                "Wait for it to finish, then pull again.",
            ) from error
        try:
            yield
        finally:
            lock.release()


def pull_with_fallback(
    store: Store, name: str, progress: Progress = SILENT
) -> tuple[InstalledModel, list[str]]:
    """Pull `name`, or, when none of its sources delivers, the nearest smaller catalogue model that can be had.

    Returns the model and what to tell the person, one line each (empty when `name` itself was delivered).
    Raises the first error when every fallback fails too.
    """
    messages: list[str] = []
    try:
        return store.ensure(name, progress), messages
    except (SourceError, IntegrityError) as error:
        first = error
    messages.append(f"Every source of {name} is gone. {first.problem}")
    for entry in store.catalogue.fallbacks(name):
        try:
            model = store.ensure(entry.name, progress)
        except (SourceError, IntegrityError) as error:
            messages.append(f"{entry.name} could not be had either. {error.problem}")
        else:
            messages.append(
                f"Taking the next smaller model instead: {entry.name} ({base.gigabytes(model.size_bytes)})."
            )
            return model, messages
    raise first


def _is_what_was_asked(present: InstalledModel, sources: list[Source], entry: Entry | None) -> bool:
    if entry is not None and entry.sha256 is not None:
        return present.sha256 == entry.sha256
    return present.source in {source.text for source in sources}


def _installed(manifest: Manifest, folder: Path) -> InstalledModel:
    gguf = [file for file in manifest.files if file.name.lower().endswith(".gguf")]
    is_gguf = len(gguf) == 1
    return InstalledModel(
        name=manifest.name,
        path=folder / gguf[0].name if is_gguf else folder,
        format="gguf" if is_gguf else "safetensors",
        files=(*gguf, *(file for file in manifest.files if file not in gguf)),
        source=manifest.source,
        licence=manifest.licence,
        notice=manifest.notice,
        pulled_at=manifest.pulled_at,
    )


def _in_place(path: Path) -> InstalledModel:
    """The model at `path`, not imported. Its files are named and sized, not hashed."""
    wanted = local_model_files(path)
    files = tuple(StoredFile(name=file.name, size_bytes=file.stat().st_size, sha256=None) for file in wanted)
    return InstalledModel(
        name=path.stem if path.is_file() else path.resolve().name,
        path=path.absolute(),
        format="gguf" if path.is_file() else "safetensors",
        files=files,
        source=f"file:{path.absolute()}",
    )
