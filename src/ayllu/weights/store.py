"""The local store: which models are on this machine, how one gets in, and how it leaves.

A model is a folder `<root>/<name>/` with its files and a manifest. It is assembled under `<root>/.partial/`
and appears by one rename once every hash is right, so a model is there entirely or not at all.
"""

from __future__ import annotations

import datetime
import os
import shutil
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ayllu.errors import (
    IntegrityError,
    ModelFileError,
    SourceError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
    did_you_mean,
)
from ayllu.paths import expanded
from ayllu.progress import SILENT, Progress
from ayllu.settings import Settings
from ayllu.weights.catalogue import Catalogue, Entry, builtin_catalogue
from ayllu.weights.installed import (
    MANIFEST,
    UNKNOWN_LICENCE,
    InstalledModel,
    Manifest,
    StoredFile,
    in_place,
    read_installed,
    stated_licence,
)
from ayllu.weights.sources import FORMS, Source, base, looks_like_path, parse_source
from ayllu.weights.sources.base import Fetched, Intake, Limits, Order, Pinned
from ayllu.weights.sources.files import take_in
from ayllu.weights.sources.safe_names import MODEL_NAME, refuse_unless_model_file, safe_model_name

__all__ = ["InstalledModel", "Store", "StoredFile", "open_store", "pull_with_fallback"]

NOTICE = "NOTICE.txt"


class Store:
    """All models below one folder. Safe to use from several processes at once."""

    def __init__(
        self,
        root: Path,
        *,
        catalogue: Catalogue | None = None,
        limits: Limits | None = None,
        lock_wait_s: float = 3600.0,
    ) -> None:
        self.root = expanded(root).absolute()
        self.catalogue = catalogue or builtin_catalogue()
        self.limits = limits or Limits()
        self._lock_wait_s = lock_wait_s
        self._unreachable: dict[str, str] = {}

    def list(self) -> Sequence[InstalledModel]:
        """Every complete model, by name. Anything damaged or unfinished is left out (see `damaged`)."""
        return [model for name in self._folders() if (model := self._readable(name)) is not None]

    def damaged(self) -> Sequence[str]:
        """Names of model folders whose manifest or files are unreadable or gone: remove, then pull them."""
        return [name for name in self._folders() if self._readable(name) is None]

    def find(self, name_or_path: str | Path) -> InstalledModel:
        """An installed model by name, or a GGUF file or model folder by path, used where it is.

        Raises UnknownModelError naming the command that would fetch it, ModelFileError for a damaged one.
        """
        text = str(name_or_path)
        if MODEL_NAME.fullmatch(text) and self._is_ours(text):
            return self._read(text)
        if text.startswith(("hf:", "pypi:")):
            return self._find_by_source(text)
        path = expanded(text.removeprefix("file:"))
        if (
            isinstance(name_or_path, Path)
            or looks_like_path(text)
            or expanded(path / "config.json").is_file()
        ):
            return in_place(path)
        if self.catalogue.get(text):
            raise UnknownModelError(f"{text} is not on this machine yet.", f"Fetch it: ayllu pull {text}")
        known = [*self.catalogue.names(), *(model.name for model in self.list())]
        raise UnknownModelError(
            f"No model is called {text!r}.{did_you_mean(text, known)}",
            "`ayllu list` shows what is installed and what can be pulled.",
        )

    def _find_by_source(self, text: str) -> InstalledModel:
        for model in self.list():
            if model.source == text:
                return model
        raise UnknownModelError(f"{text} is not on this machine yet.", f"Fetch it: ayllu pull {text}")

    def ensure(self, name: str, progress: Progress = SILENT) -> InstalledModel:
        """The installed model of that name, path or source, pulled first when it is not yet here."""
        try:
            return self.find(name)
        except UnknownModelError:
            return self.pull(name, progress)

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
            known = self.catalogue.names()
            raise UnknownModelError(
                f"No model is called {source_or_name!r}.{did_you_mean(source_or_name, known)}",
                f"Name one of {', '.join(known)}; or a source: {FORMS}.",
            )
        return self._pull(entry.sources(), safe_model_name(name) if name else entry.name, entry, progress)

    def require_removable(self, name: str) -> None:
        """Raise UnknownModelError unless there is something of that name to remove."""
        if not MODEL_NAME.fullmatch(name) or not (self._is_ours(name) or self._partial(name).is_dir()):
            known = self._folders()
            raise UnknownModelError(
                f"No model called {name!r} is installed.{did_you_mean(name, known)}",
                "`ayllu list` shows what is installed.",
            )

    def remove(self, name: str) -> InstalledModel | None:
        """Delete a model and what an interrupted pull of it left. Returns what it was, None if damaged."""
        self.require_removable(name)
        with self._locked(name):
            model = self._readable(name)
            if self._is_ours(name):
                self._discard(self.root / name)
            shutil.rmtree(self._partial(name), ignore_errors=True)
        return model

    def _pull(
        self, sources: Sequence[Source], name: str, entry: Entry | None, progress: Progress
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
            if os.path.lexists(self.root / name) and not self._is_ours(name):
                raise UsageError(
                    f"{self.root / name} is in the way, and is not a model that was pulled.",
                    "Choose another name with --name, or move it away.",
                )
            assembled = self._assembled(name)
            if assembled is not None and _is_what_was_asked(assembled, sources, entry):
                return self._reveal(name)
            source, files = self._fetch_from_first(sources, name, entry, progress)
            return self._publish(name, source, files, entry)

    def _fetch_from_first(
        self, sources: Sequence[Source], name: str, entry: Entry | None, progress: Progress
    ) -> tuple[Source, Sequence[Fetched]]:
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
        failures = []
        for source in sources:
            try:
                with base.full_disk_is_typed(folder):
                    fetched = source.fetch(order)
                return source, entry.keep_promised(fetched) if entry else fetched
            except (SourceError, IntegrityError, UnsupportedError) as error:
                failures.append((source, error))
        with suppress(OSError):
            folder.rmdir()  # succeeds only when nothing is left to continue from
        if len(failures) == 1:
            raise failures[0][1]
        reasons = "; ".join(f"{source.text}: {error.problem.rstrip('.')}" for source, error in failures)
        kind = (
            IntegrityError if all(isinstance(error, IntegrityError) for _, error in failures) else SourceError
        )
        raise kind(f"No source of {name} delivered. {reasons}.", "Check the network, then pull again.")

    def _publish(
        self, name: str, source: Source, files: Sequence[Fetched], entry: Entry | None
    ) -> InstalledModel:
        """Assemble the folder, then make it visible with one rename."""
        ready = self._ready(name)
        shutil.rmtree(ready, ignore_errors=True)
        ready.mkdir(parents=True)
        manifest = Manifest(
            name=name,
            source=source.text,
            licence=entry.licence if entry else _licence(files),
            notice=entry.notice if entry else "",
            pulled_at=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            pooling=self.catalogue.pooling_of({file.name: file.sha256 for file in files}),
            files=tuple(
                StoredFile(name=file.name, size_bytes=file.size_bytes, sha256=file.sha256)
                for file in sorted(files, key=lambda file: file.name)
            ),
        )
        if manifest.notice:
            base.write_atomically(ready / NOTICE, f"{manifest.notice}\n".encode())
        base.write_atomically(ready / MANIFEST, manifest.to_json().encode())
        for file in files:
            target = ready / refuse_unless_model_file(file.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            take_in(file, target)
            if file.intake is Intake.MOVE:
                _flush_to_disk(target)
        return self._reveal(name)

    def _reveal(self, name: str) -> InstalledModel:
        """The rename that makes a fully assembled model appear."""
        self._discard(self.root / name)
        self._ready(name).rename(self.root / name)
        shutil.rmtree(self._partial(name), ignore_errors=True)
        return self._read(name)

    def _assembled(self, name: str) -> InstalledModel | None:
        """What a killed pull had put together but for the last rename, if it got that far."""
        try:
            return read_installed(self._ready(name))
        except ModelFileError:
            return None

    def _discard(self, folder: Path) -> None:
        """Take a folder out of sight with one rename, then delete it."""
        if folder.is_dir():
            bin_folder = self.root / ".partial" / f".removed-{uuid.uuid4().hex}"
            bin_folder.parent.mkdir(exist_ok=True)
            folder.rename(bin_folder)
        for leftover in (self.root / ".partial").glob(".removed-*"):
            shutil.rmtree(leftover, ignore_errors=True)

    def _read(self, name: str) -> InstalledModel:
        return read_installed(self.root / name)

    def _readable(self, name: str) -> InstalledModel | None:
        try:
            return self._read(name)
        except ModelFileError:
            return None

    def _folders(self) -> Sequence[str]:
        if not self.root.is_dir():
            return []
        return sorted(
            item.name
            for item in self.root.iterdir()
            if MODEL_NAME.fullmatch(item.name) and self._is_ours(item.name)
        )

    def _is_ours(self, name: str) -> bool:
        """Whether the folder of that name was put here by a pull. Every model appears with its manifest, so a
        folder without one is somebody's own, and is never deleted."""
        return (self.root / name / MANIFEST).is_file()

    def _partial(self, name: str) -> Path:
        return self.root / ".partial" / safe_model_name(name)

    def _ready(self, name: str) -> Path:
        return self._partial(name) / "ready" / name

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


def open_store(settings: Settings) -> Store:
    """The store that `settings` name, as patient with sources as they say."""
    return Store(settings.store, limits=Limits(stall_s=settings.timeout_s))


def pull_with_fallback(
    store: Store, name: str, progress: Progress = SILENT
) -> tuple[InstalledModel, list[str]]:
    """Pull `name`, or, when none of its sources delivers, the nearest smaller catalogue model.

    Returns the model and what to tell the person, one line each (empty when `name` itself was delivered).
    Raises the first error when every fallback fails too.
    """
    messages: list[str] = []
    try:
        return store.ensure(name, progress), messages
    except (SourceError, IntegrityError) as error:
        if store.catalogue.get(name) is None:
            raise
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


def _is_what_was_asked(present: InstalledModel, sources: Sequence[Source], entry: Entry | None) -> bool:
    if entry is not None and entry.sha256 is not None:
        return present.sha256 == entry.sha256
    if entry is not None and entry.promised:
        return entry.promised.items() <= {file.name: file.sha256 for file in present.files}.items()
    return present.source in {source.text for source in sources}


def _licence(files: Sequence[Fetched]) -> str:
    """What the source says of the licence, else what the file itself does."""
    stated = next((file.licence for file in files if file.licence is not None), None)
    ggufs = [file for file in files if file.name.lower().endswith(".gguf")]
    return stated or (stated_licence(ggufs[0].path) if len(ggufs) == 1 else UNKNOWN_LICENCE)


def _flush_to_disk(path: Path) -> None:
    """Have the system write the file out, so that a power cut cannot leave a hole in a listed model."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
