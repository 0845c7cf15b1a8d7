"""The hub's cache on this disk, in the layout other programs share.

`models--org--name/blobs/<digest>` holds the bytes, `snapshots/<commit>/<file>` links to them, and
`refs/<revision>` says which commit a branch stood for. A blob's name is its digest, so it can be verified
without asking anyone.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from ayllu.errors import AylluError, SourceError, UsageError
from ayllu.paths import expanded
from ayllu.weights.sources import base
from ayllu.weights.sources.hub_choice import choose_files
from ayllu.weights.sources.safe_names import SHA1, SHA256, safe_name

MOST_INDEX_BYTES = 64 << 20


@dataclass(frozen=True)
class HubFile:
    """One file of a repository. `digest`: SHA-256 (64 digits) of a large, git blob id (40) of a small one."""

    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True)
class HubCache:
    """The part of the cache that belongs to one repository."""

    folder: Path

    @classmethod
    def of_environment(cls, repository: str) -> HubCache:
        """The cache where HF_HUB_CACHE or HF_HOME put it now, else where the library does.

        Raises SourceError when those name no usable path.
        """
        from huggingface_hub import constants

        home = os.environ.get("HF_HOME")
        root = os.environ.get("HF_HUB_CACHE") or (str(Path(home) / "hub") if home else constants.HF_HUB_CACHE)
        try:
            return cls(expanded(root) / f"models--{repository.replace('/', '--')}")
        except UsageError as error:
            raise SourceError(error.problem, "Correct HF_HUB_CACHE or HF_HOME.") from error

    def make_folder(self) -> Path:
        """The folder of the blobs, made if it was not there."""
        blobs = self.folder / "blobs"
        with self._writing():
            blobs.mkdir(parents=True, exist_ok=True)
        return blobs

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Say plainly when the cache refuses: another source, which does not need it, may deliver."""
        with base.full_disk_is_typed(self.folder):
            try:
                yield
            except OSError as error:
                if error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise
                raise SourceError(
                    f"The hub cache {self.folder} cannot be written: {error.strerror or error}.",
                    "Set HF_HUB_CACHE to a folder of yours.",
                ) from error

    def blob(self, file: HubFile) -> Path:
        """Where the bytes of `file` lie, or will."""
        return self.folder / "blobs" / file.digest

    def digest_of(self, file: HubFile) -> str | None:
        """SHA-256 of the cached bytes, or None when they are absent or not what their name promises."""
        blob = self.blob(file)
        if not blob.is_file() or blob.stat().st_size != file.size_bytes:
            return None
        digest = base.sha256_of(blob)
        right = (
            digest == file.digest if SHA256.fullmatch(file.digest) else base.git_blob_id(blob) == file.digest
        )
        return digest if right else None

    def admit(self, verified: Path, file: HubFile) -> None:
        """Move a verified file in, appearing whole or not at all."""
        blob = self.make_folder() / file.digest
        try:
            verified.replace(blob)
        except OSError:  # the cache is on another disk
            beside = blob.with_name(f"{file.digest}.{uuid.uuid4().hex}.incomplete")
            with self._writing():
                try:
                    shutil.copyfile(verified, beside)
                    beside.replace(blob)
                finally:
                    beside.unlink(missing_ok=True)
            verified.unlink()

    def point(self, commit: str, file: HubFile) -> None:
        """Give the blob its name in the snapshot: a relative link, or a copy where links are not allowed."""
        pointer = self.folder / "snapshots" / commit / safe_name(file.name)
        if pointer.exists() and pointer.samefile(self.blob(file)):
            return
        beside = pointer.with_name(f"{pointer.name}.{uuid.uuid4().hex}.incomplete")
        with self._writing():
            pointer.parent.mkdir(parents=True, exist_ok=True)
            try:
                try:
                    beside.symlink_to(os.path.relpath(self.blob(file), pointer.parent))
                except OSError:
                    shutil.copyfile(self.blob(file), beside)
                beside.replace(pointer)
            finally:
                beside.unlink(missing_ok=True)

    def note_revision(self, revision: str, commit: str) -> None:
        """Remember which commit `revision` stood for, unless it is the commit itself."""
        if revision != commit:
            reference = self.folder / "refs" / safe_name(revision)
            with contextlib.suppress(OSError):
                if reference.read_bytes() == commit.encode():
                    return
            with self._writing():
                reference.parent.mkdir(parents=True, exist_ok=True)
                base.write_atomically(reference, commit.encode())

    def offline(self, revision: str, wanted: str | None) -> tuple[str, list[HubFile]] | None:
        """Commit and files of a complete cached snapshot; None when something is missing or unverifiable."""
        commit = revision
        if not SHA1.fullmatch(revision):
            with contextlib.suppress(OSError, UnicodeDecodeError):
                commit = (self.folder / "refs" / revision).read_text(encoding="ascii").strip()
        snapshot = self.folder / "snapshots" / commit
        if not SHA1.fullmatch(commit) or not snapshot.is_dir():
            return None
        names = [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]
        try:
            chosen = choose_files(self.folder.name, names, wanted)
        except AylluError:
            return None
        files = [self._cached_file(snapshot / name, name) for name in chosen]
        if not _all_shards_present(snapshot, chosen):
            return None
        known = [file for file in files if file is not None and self.digest_of(file) is not None]
        return (commit, known) if len(known) == len(files) else None

    def _cached_file(self, pointer: Path, name: str) -> HubFile | None:
        blob = pointer.resolve()
        if blob.parent != (self.folder / "blobs").resolve():
            return None
        if not SHA256.fullmatch(blob.name) and not SHA1.fullmatch(blob.name):
            return None
        return HubFile(name, blob.stat().st_size, blob.name)


def _all_shards_present(snapshot: Path, chosen: list[str]) -> bool:
    """Whether every shard that an index names is among the files."""
    for name in chosen:
        if not name.endswith(".safetensors.index.json"):
            continue
        try:
            if (snapshot / name).stat().st_size > MOST_INDEX_BYTES:
                return False
            shards = set(json.loads((snapshot / name).read_bytes())["weight_map"].values())
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False
        if not shards <= {PurePosixPath(other).name for other in chosen}:
            return False
    return True
