"""Runs and their events: what the server works on, so that it can be read again, and after a restart too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from sqlalchemy import delete as delete_from
from sqlalchemy import insert, select, update
from sqlalchemy.orm import Session as Db

from ayllu.errors import ConflictError, NotFoundError
from ayllu.server.state import tables, users
from ayllu.server.state.records import Run, RunStatus
from ayllu.server.state.rows import changed_rows
from ayllu.server.state.secret_text import new_id

OPEN: tuple[RunStatus, ...] = ("queued", "running")
MAX_PAGE = 10_000
"""Events of one answer, whatever is asked for."""

_T = tables.runs
_E = tables.run_events
_COLUMNS = (
    _T.c.id,
    _T.c.user_id,
    _T.c.kind,
    _T.c.model,
    _T.c.status,
    _T.c.request,
    _T.c.result,
    _T.c.error,
    _T.c.events,
    _T.c.created_at,
    _T.c.ended_at,
    _T.c.expires_at,
)


def create(
    db: Db,
    *,
    user_id: str,
    kind: str,
    model: str,
    request: dict[str, Any],
    id: str | None = None,
    expires_at: float | None = None,
) -> Run:
    """A run begins. Raises NotFoundError (user), ConflictError (the id is taken)."""
    users.get(db, user_id)
    run_id = id or new_id("run")
    if db.execute(select(_T.c.id).where(_T.c.id == run_id)).first() is not None:
        raise ConflictError("There is a run of that id.", "Use another id.")
    run = Run(
        id=run_id,
        user_id=user_id,
        kind=kind,
        model=model,
        status="running",
        request=request,
        result=None,
        error=None,
        events=0,
        created_at=time.time(),
        ended_at=None,
        expires_at=expires_at,
    )
    db.execute(insert(_T).values({column.name: getattr(run, column.name) for column in _COLUMNS}))
    return run


def get(db: Db, run_id: str, user_id: str) -> Run:
    """A run of this user. Raises NotFoundError."""
    row = db.execute(select(*_COLUMNS).where(_T.c.id == run_id, _T.c.user_id == user_id)).one_or_none()
    if row is None or _expired(row[-1]):
        raise _missing()
    return _run_of(row)


def append(db: Db, run_id: str, first_number: int, events: Sequence[dict[str, Any]]) -> None:
    """Store the next events as one row. The same again changes nothing; a gap raises ConflictError."""
    if not events:
        return
    following = first_number + len(events)
    grown = changed_rows(
        db, update(_T).where(_T.c.id == run_id, _T.c.events == first_number).values(events=following)
    )
    if grown == 1:
        db.execute(
            insert(_E).values(
                run_id=run_id, first_number=first_number, count=len(events), events=list(events)
            )
        )
        return
    stored = db.execute(select(_T.c.events).where(_T.c.id == run_id)).scalar_one_or_none()
    if stored is None:
        raise _missing()
    if stored < following:
        raise ConflictError(
            f"Events of a run are stored in order: {stored} comes next, not {first_number}.",
            "Store it first.",
        )


def events(db: Db, run_id: str, user_id: str, after: int, limit: int) -> list[tuple[int, dict[str, Any]]]:
    """Numbers and events with numbers above `after`, in order. Raises NotFoundError."""
    get(db, run_id, user_id)
    most = max(0, min(limit, MAX_PAGE))
    found: list[tuple[int, dict[str, Any]]] = []
    rows = db.execute(
        select(_E.c.first_number, _E.c.events)
        .where(_E.c.run_id == run_id, _E.c.first_number + _E.c.count > after + 1)
        .order_by(_E.c.first_number)
        .limit(most)
    )
    for first, batch in rows:
        found += [(number, one) for number, one in enumerate(batch, first) if number > after]
        if len(found) >= most:
            break
    return found[:most]


def finish(
    db: Db, run_id: str, status: RunStatus, result: dict[str, Any] | None, error: dict[str, Any] | None
) -> None:
    """A run has ended. Raises NotFoundError, and ConflictError for one that had already."""
    ended = changed_rows(
        db,
        update(_T)
        .where(_T.c.id == run_id, _T.c.status.in_(OPEN))
        .values(status=status, result=result, error=error, ended_at=time.time()),
    )
    if ended == 0:
        _refuse_ended(db, run_id)


def set_status(db: Db, run_id: str, status: RunStatus) -> None:
    """Between queued and running. Raises NotFoundError, ConflictError."""
    if (
        changed_rows(db, update(_T).where(_T.c.id == run_id, _T.c.status.in_(OPEN)).values(status=status))
        == 0
    ):
        _refuse_ended(db, run_id)


def interrupt_all(db: Db, result_of: Callable[[Run], dict[str, Any] | None]) -> list[Run]:
    """At a start: what had not ended has ended now, as interrupted, with what `result_of` makes of it."""
    found = [_run_of(row) for row in db.execute(select(*_COLUMNS).where(_T.c.status.in_(OPEN))).all()]
    for run in found:
        finish(db, run.id, "interrupted", result_of(run), run.error)
    return [get(db, run.id, run.user_id) for run in found if not _expired(run.expires_at)]


def delete(db: Db, run_id: str, user_id: str) -> None:
    """Forget a run and its events. Raises NotFoundError."""
    if changed_rows(db, delete_from(_T).where(_T.c.id == run_id, _T.c.user_id == user_id)) == 0:
        raise _missing()


def expire(db: Db, now: float) -> int:
    """Forget ended runs that are too old; how many."""
    return changed_rows(db, delete_from(_T).where(_T.c.expires_at <= now, _T.c.status.not_in(OPEN)))


def listed(db: Db, user_id: str, limit: int, before: float | None = None) -> list[Run]:
    """A user's runs, newest first; before: made earlier than this time."""
    query = select(*_COLUMNS).where(_T.c.user_id == user_id)
    if before is not None:
        query = query.where(_T.c.created_at < before)
    rows = db.execute(query.order_by(_T.c.created_at.desc(), _T.c.id).limit(limit))
    return [_run_of(row) for row in rows if not _expired(row[-1])]


def _expired(expires_at: float | None) -> bool:
    return expires_at is not None and expires_at <= time.time()


def _missing() -> NotFoundError:
    return NotFoundError("There is no such run.", "Check its id.")


def _refuse_ended(db: Db, run_id: str) -> None:
    if db.execute(select(_T.c.id).where(_T.c.id == run_id)).first() is None:
        raise _missing()
    raise ConflictError("This run has ended.", "Start another one.")


def _run_of(values: Sequence[Any]) -> Run:
    return Run(**dict(zip((column.name for column in _COLUMNS), values, strict=True)))
