"""What databases say when something goes wrong, as errors that a person can act on.

`retryable` is what passes by itself (a lock, a lost race); everything else ends as one AylluError that tells
neither statements nor values, since those may hold what users wrote.
"""

from __future__ import annotations

import sqlite3

from sqlalchemy import URL
from sqlalchemy.exc import DBAPIError, IntegrityError, TimeoutError

from ayllu.errors import AylluError, ConflictError, NoSpaceError, StateError

_SERIALISATION = ("40001", "40P01", "55P03")
"""PostgreSQL: serialization_failure, deadlock_detected, lock_not_available."""
_FULL = ("53100", "53200", "53400")
"""disk_full, out_of_memory, configuration_limit_exceeded."""


def shown_url(url: URL) -> str:
    """The address of a database, without its password."""
    return url.render_as_string(hide_password=True)


def sqlite_code(error: BaseException | None) -> int | None:
    """SQLite's primary result code."""
    code = getattr(error, "sqlite_errorcode", None) if isinstance(error, sqlite3.Error) else None
    return None if code is None else code & 0xFF


def sql_state(error: BaseException | None) -> str | None:
    """PostgreSQL's five characters."""
    state = getattr(error, "sqlstate", None)
    return state if isinstance(state, str) else None


def retryable(error: DBAPIError) -> bool:
    """Whether the same transaction may succeed when it is tried again, and cannot have been committed."""
    if sqlite_code(error.orig) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return True
    # In PostgreSQL two can pass the same check and then insert the same name; the second try sees the first.
    return sql_state(error.orig) in _SERIALISATION or (
        isinstance(error, IntegrityError) and sql_state(error.orig) is not None
    )


def damages_connection(error: DBAPIError) -> bool:
    """Whether nothing more should be asked of the connection that said this."""
    return error.connection_invalidated or sqlite_code(error.orig) in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_NOMEM,
    )


def as_state_error(error: DBAPIError | TimeoutError | sqlite3.Error, url: URL) -> AylluError:
    """`error` as what a user can meet."""
    place = shown_url(url)
    if isinstance(error, TimeoutError):
        return StateError("The database is busy: no connection became free.", "Try again.")
    cause = error.orig if isinstance(error, DBAPIError) else error
    if isinstance(error, IntegrityError):
        return ConflictError("This contradicts what is stored already.", "Look again at what is there.")
    if isinstance(cause, sqlite3.Error):
        return _from_sqlite(cause, place)
    return _from_postgresql(cause, place, lost=isinstance(error, DBAPIError) and error.connection_invalidated)


def _from_sqlite(cause: sqlite3.Error, place: str) -> AylluError:
    code = sqlite_code(cause)
    if code == sqlite3.SQLITE_FULL:
        return NoSpaceError(
            f"The disk of the database is full ({place}).", "Free some space; nothing was lost."
        )
    if code == sqlite3.SQLITE_IOERR:
        name = getattr(cause, "sqlite_errorname", "SQLITE_IOERR")
        return StateError(
            f"The disk of the database failed ({place}, {name}); what was asked was not stored.",
            "Check the disk, then try again.",
        )
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StateError(
            f"Another process keeps the database locked ({place}).", "Wait until it is done, or end it."
        )
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StateError(
            f"The database is damaged, or is none ({place}).",
            "Move the file away, then: ayllu restore FILE",
        )
    if code in (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY, sqlite3.SQLITE_PERM, sqlite3.SQLITE_AUTH):
        return StateError(
            f"The database cannot be opened or written ({place}).", "Check the folder and its permissions."
        )
    name = getattr(cause, "sqlite_errorname", None) or type(cause).__name__
    return StateError(f"The database refused ({place}, {name}).", "This may be an error in ayllu.")


def _from_postgresql(cause: BaseException | None, place: str, *, lost: bool) -> AylluError:
    state = sql_state(cause)
    if state in _FULL:
        return NoSpaceError(f"The database has no space left ({place}).", "Free some on its server.")
    if state in _SERIALISATION:
        return StateError(f"The database is busy with other writers ({place}).", "Try again.")
    if state in ("28P01", "28000"):
        return StateError(
            f"The database refuses this user or password ({place}).", "Check the setting `database`."
        )
    if state == "3D000":
        return StateError(f"There is no such database ({place}).", "Create it: createdb NAME")
    if lost or state is None or state[:2] in ("08", "57"):
        return StateError(
            f"The database cannot be reached, or the connection was lost ({place}).",
            "Check that it runs and the setting `database`; look whether the last change was stored.",
        )
    return StateError(f"The database refused ({place}, SQLSTATE {state}).", "This may be an error in ayllu.")
