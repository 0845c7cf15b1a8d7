"""Connections: SQLite so that several processes may use one file, PostgreSQL by its URL.

SQLite: a write-ahead log, every commit on the disk before it is told, writers that queue for the lock at
their first statement instead of failing at their last.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import stat
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import QueuePool

from ayllu.errors import MissingExtraError, StateError

FILE_NAME = "ayllu.db"
BUSY_TIMEOUT_S = 30.0
CONNECT_TIMEOUT_S = 10
STATEMENT_TIMEOUT_S = 300
WAL_LIMIT_BYTES = 64 << 20
"""To which the write-ahead log is cut back once nobody reads an old state of it."""
READERS = 4
"""Reading transactions at a time; on PostgreSQL as many writing ones besides."""


@dataclass(frozen=True)
class Engines:
    """writing: its transactions may change things. reading: they see one state, and cannot."""

    writing: Engine
    reading: Engine

    @property
    def url(self) -> URL:
        return self.writing.url

    def dispose(self) -> None:
        """Close every connection that is not in use."""
        # The last one to close a SQLite file tidies up its log, which a reader may not.
        self.reading.dispose()
        self.writing.dispose()


def open_engines(url: str | None, folder: Path) -> Engines:
    """Raises StateError for an address that names no database of a known kind, MissingExtraError."""
    if url is None:
        _own_folder(folder)
        return _sqlite(folder / FILE_NAME)
    try:
        parsed = make_url("postgresql" + url[8:] if url.startswith("postgres:") else url)
    except (ArgumentError, ValueError) as error:
        raise StateError("The setting `database` is no URL.", _FIX) from error
    kind = parsed.get_backend_name()
    if kind == "sqlite" and parsed.database not in (None, "", ":memory:"):
        file = Path(str(parsed.database))
        if not file.parent.exists():
            _own_folder(file.parent)
        return _sqlite(file)
    if kind == "postgresql":
        return _postgresql(parsed.set(drivername="postgresql+psycopg"))
    raise StateError("The setting `database` names no kind of database that ayllu can use.", _FIX)


_FIX = "Use postgresql://user@host/name, or leave it out for a file."


def _own_folder(folder: Path) -> None:
    """For nobody else, since users wrote what is in it. A folder that holds other things stays as it is."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        mode = folder.stat().st_mode
        ours = (folder / FILE_NAME).exists() or not any(folder.iterdir())
        if ours and not mode & stat.S_ISVTX and stat.S_IMODE(mode) != 0o700:
            with contextlib.suppress(PermissionError):
                folder.chmod(0o700)
    except OSError as error:
        raise StateError(
            f"The folder of the database cannot be made: {folder} ({error.strerror}).",
            "Check the setting `data`.",
        ) from error


def _sqlite(file: Path) -> Engines:
    try:
        # Made here, as SQLite would let others read it; its log and index files take the same mode.
        os.close(os.open(file, os.O_CREAT | os.O_RDWR | getattr(os, "O_CLOEXEC", 0), 0o600))
        if stat.S_IMODE(file.stat().st_mode) != 0o600:
            with contextlib.suppress(PermissionError):
                file.chmod(0o600)
    except OSError as error:
        raise StateError(
            f"The database cannot be opened: {file} ({error.strerror}).",
            "Check the file and its permissions.",
        ) from error
    url = URL.create("sqlite", database=str(file))
    more: dict[str, Any] = {
        "poolclass": QueuePool,
        "pool_timeout": BUSY_TIMEOUT_S,
        "max_overflow": 0,
        "connect_args": {
            "check_same_thread": False,
            "timeout": BUSY_TIMEOUT_S,
            "isolation_level": None,
            "cached_statements": 256,
        },
    }
    writing = create_engine(url, pool_size=1, **more)
    reading = create_engine(url, pool_size=READERS, **more)
    event.listen(writing, "connect", _prepare_writer)
    event.listen(reading, "connect", _prepare_reader)
    event.listen(writing, "begin", lambda connection: _begin(connection, "BEGIN IMMEDIATE"))
    event.listen(reading, "begin", lambda connection: _begin(connection, "BEGIN"))
    return Engines(writing, reading)


def _begin(connection: Connection, statement: str) -> None:
    connection.exec_driver_sql(statement)


def _prepare_writer(connection: sqlite3.Connection, record: Any) -> None:
    _use_wal(connection)
    for setting in (
        "synchronous = FULL",
        "foreign_keys = ON",
        "secure_delete = FAST",
        f"journal_size_limit = {WAL_LIMIT_BYTES}",
    ):
        connection.execute(f"PRAGMA {setting}")


def _prepare_reader(connection: sqlite3.Connection, record: Any) -> None:
    _use_wal(connection)
    connection.execute("PRAGMA query_only = ON")


def _use_wal(connection: sqlite3.Connection) -> None:
    """Changing the mode asks for the file alone, and SQLite does not wait for that by itself."""
    deadline = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            mode = connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            break
        except sqlite3.OperationalError as error:
            busy = error.sqlite_errorcode & 0xFF in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
            if not busy or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    if mode != "wal":
        raise StateError(
            "The disk of the database cannot keep a write-ahead log.", "Use a local disk for `data`."
        )


def _postgresql(url: URL) -> Engines:
    try:
        import psycopg  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("PostgreSQL", "postgres") from error
    more: dict[str, Any] = {
        "pool_size": READERS,
        "max_overflow": READERS,
        "pool_timeout": BUSY_TIMEOUT_S,
        "connect_args": {"connect_timeout": CONNECT_TIMEOUT_S},
        "isolation_level": "READ COMMITTED",
    }
    writing = create_engine(url, **more)
    event.listen(writing, "connect", _prepare_postgresql)
    reading = writing.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
    return Engines(writing, reading)


def _prepare_postgresql(connection: Any, record: Any) -> None:
    with connection.cursor() as cursor:
        cursor.execute(f"SET lock_timeout = '{int(BUSY_TIMEOUT_S)}s'")
        cursor.execute(f"SET statement_timeout = '{STATEMENT_TIMEOUT_S}s'")
    connection.commit()
