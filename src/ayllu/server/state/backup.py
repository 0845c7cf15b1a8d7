"""Backups: one file with every row, from one moment, written while the server works, for either database.

The file is a zip: `manifest.json` (format, schema, and for each table its columns, rows and SHA-256) and
`tables/NAME.jsonl`, a row a line. Sessions and one-time links stay out: nobody is signed in by a restore.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import hashlib
import itertools
import json
import os
import secrets
import shutil
import sqlite3
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from sqlalchemy import Connection, MetaData, Table, delete, insert, select
from sqlalchemy.exc import DBAPIError
from sqlalchemy.types import LargeBinary

from ayllu import __version__
from ayllu.errors import AylluError, ConflictError, IntegrityError, NoSpaceError, StateError
from ayllu.server.state import schema
from ayllu.server.state.engines import Engines, open_engines
from ayllu.server.state.failures import as_state_error
from ayllu.server.state.tables import metadata

FORMAT = 1
KIND = "ayllu-backup"
LEFT_OUT = frozenset(("sessions", "links"))
MAX_LINE_BYTES = 512 << 20
MAX_MANIFEST_BYTES = 1 << 20
ROWS_AT_A_TIME = 100
BYTES_AT_A_TIME = 4 << 20

_MANIFEST = "manifest.json"
_SQLITE_MAGIC = b"SQLite format 3\x00"
_FIX = "Use another backup."


@dataclass(frozen=True)
class TableSummary:
    """One table of a backup."""

    columns: tuple[str, ...]
    rows: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """What a backup says of itself. schema: the revision that its tables have."""

    schema: str
    created_at: float
    tables: dict[str, TableSummary]

    @property
    def rows(self) -> int:
        return sum(table.rows for table in self.tables.values())


@dataclass(frozen=True)
class _Rows:
    """A table's rows on their way from one place to another."""

    table: str
    columns: tuple[str, ...]
    values: Iterable[list[Any]]


def new_name(folder: Path, name: str, suffix: str = ".zip") -> Path:
    """A name for a backup of this moment, that no file has."""
    stem = f"{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}"
    names = itertools.chain([stem], (f"{stem}-{number}" for number in itertools.count(2)))
    return next(path for one in names if not (path := folder / f"{one}{suffix}").exists())


def write(engines: Engines, target: Path) -> Manifest:
    """Write a backup to `target`, whole or not at all, for its owner's eyes alone.

    Raises ConflictError for a file that is there already, NoSpaceError, StateError.
    """
    with (
        _new_file(target) as partial,
        _database_errors(engines),
        engines.reading.connect() as connection,
        zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive,
    ):
        revision = schema.revision_of(connection)
        if revision is None:
            raise StateError("There is no database yet.", "Start the server once: ayllu serve")
        tables = {one.table: _write_table(archive, one) for one in _rows_of(connection)}
        manifest = Manifest(revision, time.time(), tables)
        archive.writestr(_MANIFEST, _manifest_text(manifest, engines))
    return manifest


def restore(
    engines: Engines,
    source: Path,
    *,
    force: bool = False,
    scripts: Path = schema.MIGRATIONS,
    revisions: tuple[str, ...] = schema.REVISIONS,
) -> Manifest:
    """Put a backup in the place of everything that the database holds, in one transaction.

    source: a file of `write` or of `copy_sqlite`. Raises IntegrityError for a damaged one (before anything is
    changed), ConflictError for a database that holds something already unless `force`, StateError.
    """
    try:
        with source.open("rb") as file, _database_errors(engines):
            if file.read(len(_SQLITE_MAGIC)) == _SQLITE_MAGIC:
                return _restore_copy(engines, source, force, scripts, revisions)
            with zipfile.ZipFile(file) as archive:
                manifest = _checked(archive)
                _require_known(manifest.schema, revisions)
                if manifest.schema == revisions[-1]:
                    _load(engines, _rows_in(archive, manifest), force)
                else:
                    with _scratch(source) as scratch:
                        with scratch.writing.begin() as connection:
                            schema.upgrade(connection, manifest.schema, scripts)
                            _insert(connection, _rows_in(archive, manifest))
                            schema.upgrade(connection, revisions[-1], scripts)
                        _load_from(engines, scratch, force)
                return manifest
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _damaged(source, "is no backup, or is cut off") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise _damaged(source, "cannot be read") from error


def copy_sqlite(engines: Engines, target: Path) -> None:
    """Copy a SQLite database page by page: of any schema, quickly, hot. Raises NoSpaceError, StateError."""
    with (
        _new_file(target) as partial,
        _database_errors(engines),
        contextlib.closing(sqlite3.connect(str(engines.url.database))) as origin,
        contextlib.closing(sqlite3.connect(partial)) as copy,
    ):
        origin.backup(copy)
        copy.execute("PRAGMA journal_mode = DELETE")


def _restore_copy(
    engines: Engines, source: Path, force: bool, scripts: Path, revisions: tuple[str, ...]
) -> Manifest:
    with _scratch(source) as scratch:
        shutil.copyfile(source, str(scratch.url.database))
        try:
            with scratch.writing.begin() as connection:
                if connection.exec_driver_sql("PRAGMA integrity_check").scalar() != "ok":
                    raise _damaged(source, "fails its integrity check")
                found = schema.revision_of(connection)
                _require_known(found, revisions)
                if found != revisions[-1]:
                    schema.upgrade(connection, revisions[-1], scripts)
        except DBAPIError as error:
            raise _damaged(source, "is damaged") from error
        return _load_from(engines, scratch, force)


def _load_from(engines: Engines, scratch: Engines, force: bool) -> Manifest:
    with scratch.reading.connect() as connection:
        counts = _load(engines, _rows_of(connection), force)
        tables = {name: TableSummary((), rows, "") for name, rows in counts.items()}
        return Manifest(schema.revision_of(connection) or "", time.time(), tables)


def _load(engines: Engines, tables: Iterable[_Rows], force: bool) -> dict[str, int]:
    with engines.writing.begin() as connection:
        if not force and schema.holds_rows(connection):
            raise ConflictError(
                "The database holds something already, which a restore would replace.",
                "Make a backup of it first (ayllu backup), then: ayllu restore FILE --force",
            )
        present = _reflected(connection)
        for table in reversed(present.sorted_tables):
            connection.execute(delete(table))
        return _insert(connection, tables)


def _insert(connection: Connection, tables: Iterable[_Rows]) -> dict[str, int]:
    present = _reflected(connection)
    for name in {"audit_head"} & set(present.tables):  # its row is made by the schema
        connection.execute(delete(present.tables[name]))
    counts = {}
    for one in tables:
        table = present.tables.get(one.table)
        if table is None or set(one.columns) != set(table.columns.keys()):
            raise ValueError(f"{one.table} has no such columns")
        counts[one.table] = 0
        for batch in _batches(one.values):
            connection.execute(
                insert(table), [dict(zip(one.columns, values, strict=True)) for values in batch]
            )
            counts[one.table] += len(batch)
    return counts


def _batches(rows: Iterable[list[Any]]) -> Iterator[list[list[Any]]]:
    batch: list[list[Any]] = []
    size = 0
    for values in rows:
        batch.append(values)
        size += sum(len(value) for value in values if isinstance(value, str | bytes))
        if len(batch) >= ROWS_AT_A_TIME or size >= BYTES_AT_A_TIME:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _reflected(connection: Connection) -> MetaData:
    """Our tables as they are, at whatever schema."""
    found = MetaData()
    present = set(connection.dialect.get_table_names(connection))
    found.reflect(connection, only=sorted(present & set(metadata.tables)))
    return found


def _rows_of(connection: Connection) -> Iterator[_Rows]:
    for table in _reflected(connection).sorted_tables:
        if table.name not in LEFT_OUT:
            yield _Rows(table.name, tuple(table.columns.keys()), _values_of(connection, table))


def _values_of(connection: Connection, table: Table) -> Iterator[list[Any]]:
    binary = any(isinstance(column.type, LargeBinary) for column in table.columns)
    query = select(table).order_by(*table.primary_key.columns)
    rows = connection.execute(query, execution_options={"yield_per": 4 if binary else ROWS_AT_A_TIME})
    for row in rows:
        yield list(row)


def _write_table(archive: zipfile.ZipFile, rows: _Rows) -> TableSummary:
    count, sum_of_all = 0, hashlib.sha256()
    with archive.open(_entry(rows.table), "w", force_zip64=True) as entry:
        for values in rows.values:
            line = json.dumps(values, separators=(",", ":"), default=_encoded).encode() + b"\n"
            entry.write(line)
            sum_of_all.update(line)
            count += 1
    return TableSummary(rows.columns, count, sum_of_all.hexdigest())


def _entry(table: str) -> str:
    return f"tables/{table}.jsonl"


def _encoded(value: object) -> dict[str, str]:
    if isinstance(value, bytes | memoryview):
        return {"base64": base64.b64encode(value).decode()}
    raise TypeError(f"a backup cannot hold {type(value).__name__}")


def _decoded(value: Any) -> Any:
    return base64.b64decode(value["base64"], validate=True) if isinstance(value, dict) else value


def _manifest_text(manifest: Manifest, engines: Engines) -> str:
    return json.dumps(
        {
            "kind": KIND,
            "format": FORMAT,
            "ayllu": __version__,
            "database": engines.url.get_backend_name(),
            "schema": manifest.schema,
            "created_at": manifest.created_at,
            "tables": {
                name: {"columns": list(one.columns), "rows": one.rows, "sha256": one.sha256}
                for name, one in manifest.tables.items()
            },
        },
        indent=2,
    )


def _checked(archive: zipfile.ZipFile) -> Manifest:
    """The manifest, once every table has been read and is what it says."""
    if archive.getinfo(_MANIFEST).file_size > MAX_MANIFEST_BYTES:
        raise ValueError("the manifest is too large")
    told = json.loads(archive.read(_MANIFEST))
    if told["kind"] != KIND or told["format"] != FORMAT:
        raise StateError("The backup has a format that this program does not know.", "Use a newer ayllu.")
    tables = {
        name: TableSummary(tuple(one["columns"]), int(one["rows"]), str(one["sha256"]))
        for name, one in told["tables"].items()
    }
    manifest = Manifest(str(told["schema"]), float(told["created_at"]), tables)
    if sorted(archive.namelist()) != sorted([_MANIFEST, *map(_entry, tables)]):
        raise ValueError("the backup lacks tables, or has too many")
    for name, one in tables.items():
        count, sum_of_all = 0, hashlib.sha256()
        with archive.open(_entry(name)) as entry:
            for line in _lines(entry):
                count += 1
                sum_of_all.update(line)
        if (count, sum_of_all.hexdigest()) != (one.rows, one.sha256):
            raise IntegrityError(f"The table {name!r} of the backup is not what was written.", _FIX)
    return manifest


def _rows_in(archive: zipfile.ZipFile, manifest: Manifest) -> Iterator[_Rows]:
    for name, one in manifest.tables.items():
        with archive.open(_entry(name)) as entry:
            values = ([_decoded(value) for value in json.loads(line)] for line in _lines(entry))
            yield _Rows(name, one.columns, values)


def _lines(entry: IO[bytes]) -> Iterator[bytes]:
    while line := entry.readline(MAX_LINE_BYTES):
        if not line.endswith(b"\n"):
            raise ValueError("a line has no end")
        yield line


def _require_known(revision: str | None, revisions: tuple[str, ...]) -> None:
    if revision not in revisions:
        raise StateError(
            f"The backup has schema {revision!r}, which this program does not know.", "Use a newer ayllu."
        )


def _damaged(source: Path, how: str) -> IntegrityError:
    return IntegrityError(f"{source.name} {how}.", _FIX)


@contextlib.contextmanager
def _scratch(beside: Path) -> Iterator[Engines]:
    """A SQLite database that is gone afterwards, on the disk that has room for the backup."""
    with tempfile.TemporaryDirectory(prefix=".ayllu-restore-", dir=beside.parent) as folder:
        engines = open_engines(None, Path(folder))
        try:
            yield engines
        finally:
            engines.dispose()


@contextlib.contextmanager
def _new_file(target: Path) -> Iterator[Path]:
    """A file, nobody else's to read, that gets its name when it is whole and on the disk."""
    if target.exists():
        raise ConflictError(f"{target} is there already.", "Choose another name.")
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(partial, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600))
        yield partial
        _sync(partial)
        partial.replace(target)
        _sync(target.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise NoSpaceError(f"{target.parent} has no room for the backup.", "Free some space.") from error
        raise StateError(
            f"The backup cannot be written to {target.parent} ({error.strerror}).", "Choose another folder."
        ) from error
    finally:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _database_errors(engines: Engines) -> Iterator[None]:
    try:
        yield
    except AylluError:
        raise
    except (DBAPIError, sqlite3.Error) as error:
        raise as_state_error(error, engines.url) from error
