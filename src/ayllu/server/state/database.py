"""The database of a server: transactions in threads of their own, never on the event loop.

A transaction is a function that takes a session. It may run more than once (after a lock or a lost race), so
it does nothing else that would show; what it returns is told only once it is on the disk.
"""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Literal, TypeVar

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError
from sqlalchemy.orm import Session as Db

from ayllu.errors import StateError
from ayllu.server.state.engines import READERS, Engines, open_engines
from ayllu.server.state.failures import as_state_error, damages_connection, retryable

T = TypeVar("T")
TRIES = 12
INTEGRITY_TRIES = 3
"""The second sees what the first ran into, and says it better."""
LONGEST_PAUSE_S = 0.25


class Database:
    """`Database.open` makes one; `run` and `now` are for any thread."""

    def __init__(self, engines: Engines) -> None:
        self._engines = engines
        self.url: URL = engines.url
        self.kind: Literal["sqlite", "postgresql"] = (
            "sqlite" if engines.url.get_backend_name() == "sqlite" else "postgresql"
        )
        # SQLite has one writer at a time anyway: queueing here is fairer, and cheaper, than for the file.
        self._turn: AbstractContextManager[object] = _Turn() if self.kind == "sqlite" else nullcontext()
        self._reading = ThreadPoolExecutor(READERS, thread_name_prefix="ayllu-read")
        self._writing = ThreadPoolExecutor(
            1 if self.kind == "sqlite" else READERS, thread_name_prefix="ayllu-write"
        )

    @staticmethod
    def open(url: str | None, folder: Path, *, migrate: bool = True) -> Database:
        """Open it, and bring its schema up to date (after a backup, if there is anything in it).

        url: None for a SQLite file in `folder`. Raises StateError, MissingExtraError, NoSpaceError.
        """
        from ayllu.server.state.schema import bring_up_to_date

        engines = open_engines(url, folder)
        try:
            bring_up_to_date(engines, folder, migrate=migrate)
        except (DBAPIError, TimeoutError, sqlite3.Error) as error:
            engines.dispose()
            raise as_state_error(error, engines.url) from error
        except BaseException:
            engines.dispose()
            raise
        return Database(engines)

    @property
    def engines(self) -> Engines:
        """For backups, which need more than a transaction."""
        return self._engines

    async def run(self, work: Callable[[Db], T], *, read: bool = False) -> T:
        """Run a transaction and commit it. read: it changes nothing, and waits for no writer."""
        threads = self._reading if read else self._writing
        try:
            done = asyncio.get_running_loop().run_in_executor(threads, self._transaction, work, read)
        except RuntimeError as error:
            raise StateError("The database is closed.", "The server is ending; try again later.") from error
        return await done

    def now(self, work: Callable[[Db], T], *, read: bool = False) -> T:
        """As `run`, in this thread."""
        return self._transaction(work, read)

    def close(self) -> None:
        """Let what has begun end, then close every connection."""
        self._reading.shutdown(wait=True)
        self._writing.shutdown(wait=True)
        self._engines.dispose()

    def _transaction(self, work: Callable[[Db], T], read: bool) -> T:
        for attempt in range(1, TRIES + 1):
            try:
                return self._once(work, read)
            except _CommitInDoubtError as error:
                raise StateError(
                    "The connection to the database was lost while a change was stored.",
                    "Look whether it was, then try again.",
                ) from error.__cause__
            except DBAPIError as error:
                lost = error.connection_invalidated
                tries = INTEGRITY_TRIES if isinstance(error, IntegrityError) else TRIES
                if attempt >= tries or not (retryable(error) or (lost and attempt == 1)):
                    raise as_state_error(error, self.url) from error
                if not lost:
                    time.sleep(random.uniform(0, min(LONGEST_PAUSE_S, 0.002 * 2**attempt)))
            except (TimeoutError, sqlite3.Error) as error:
                raise as_state_error(error, self.url) from error
        raise AssertionError("the last try returns or raises")

    def _once(self, work: Callable[[Db], T], read: bool) -> T:
        engine = self._engines.reading if read else self._engines.writing
        with nullcontext() if read else self._turn, Db(engine, autoflush=False) as db:
            try:
                result = work(db)
            except DBAPIError as error:
                self._discard_if_damaged(db, error)
                raise
            try:
                db.commit()
            except DBAPIError as error:
                self._discard_if_damaged(db, error)
                if error.connection_invalidated and not read:
                    raise _CommitInDoubtError from error
                raise
            return result

    def _discard_if_damaged(self, db: Db, error: DBAPIError) -> None:
        if damages_connection(error):
            db.invalidate()


class _CommitInDoubtError(Exception):
    """The connection went while a commit was under way: it may have been made."""


class _Turn(AbstractContextManager[object]):
    """A lock that tells a thread which waits for itself."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._holder: int | None = None

    def __enter__(self) -> object:
        me = threading.get_ident()
        if self._holder == me:
            raise RuntimeError("a transaction is begun inside another one")
        self._lock.acquire()
        self._holder = me
        return self

    def __exit__(self, *error: object) -> None:
        self._holder = None
        self._lock.release()
