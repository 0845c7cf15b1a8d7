"""The audit log: who did what, each line sealed with a hash over it and over the line before.

A changed, inserted or missing line breaks the chain; a missing end contradicts `audit_head`. Whoever can
write the database can seal a new chain, so keep the last hash elsewhere where that matters.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import LargeBinary, cast, func, insert, select, update
from sqlalchemy.orm import Session as Db

from ayllu.errors import StateError
from ayllu.server.state import tables
from ayllu.server.state.records import AuditEntry
from ayllu.server.state.text import storable

PAGE = 500

_T = tables.audit
_H = tables.audit_head
_TEXTS = (_T.c.actor, _T.c.action, _T.c.target, _T.c.details, _T.c.previous_hash, _T.c.hash)
_FIX = "Compare with a backup; the lines from there on prove nothing."


def record(
    db: Db, actor: str, action: str, target: str = "", details: Mapping[str, Any] | None = None
) -> AuditEntry:
    """Write a line. Writers of all processes take turns: the row of the last line is locked to the end."""
    number, previous = db.execute(select(_H.c.number, _H.c.hash).where(_H.c.id == 1).with_for_update()).one()
    values = {
        "number": number + 1,
        "at": time.time(),
        "actor": storable(actor),
        "action": storable(action),
        "target": storable(target),
        "details": _canonical(details or {}),
    }
    sealed = _seal(previous, values)
    db.execute(insert(_T).values(**values, previous_hash=previous, hash=sealed))
    db.execute(update(_H).where(_H.c.id == 1).values(number=number + 1, hash=sealed))
    return _entry((*values.values(), previous, sealed))


def listed(db: Db, after: int = 0, limit: int = 100) -> list[AuditEntry]:
    """Lines with numbers above `after`, oldest first."""
    query = select(_T.c.number, _T.c.at, *_TEXTS).where(_T.c.number > after).order_by(_T.c.number)
    return [_entry(row) for row in db.execute(query.limit(limit))]


def verify(db: Db) -> int:
    """Check the whole chain; how many lines it has. Raises StateError that names the first broken one."""
    number, previous = 0, ""
    while page := _page(db, number):
        for row in page:
            number += 1
            stored, sealed = _read(row, number)
            if stored["number"] != number:
                raise StateError(f"Line {number} of the audit log is missing.", _FIX)
            if stored.pop("previous_hash") != previous or _seal(previous, stored) != sealed:
                raise StateError(f"Line {number} of the audit log was changed.", _FIX)
            previous = sealed
    if tuple(db.execute(select(_H.c.number, _H.c.hash)).one_or_none() or ()) != (number, previous):
        raise StateError(f"The audit log was cut off after line {number}.", _FIX)
    return number


def _seal(previous: str, values: Mapping[str, Any]) -> str:
    return hashlib.sha256(previous.encode() + _canonical(values).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, ensure_ascii=True, sort_keys=True, separators=(",", ":"))


def _page(db: Db, after: int) -> Sequence[Sequence[Any]]:
    """Raw: SQLite keeps bytes that are no text in a column of texts, and those must be seen, not fail."""
    kinds: list[Any] = []
    texts: list[Any] = list(_TEXTS)
    if db.get_bind().dialect.name == "sqlite":
        columns = (_T.c.number, _T.c.at, *_TEXTS)
        kinds = [func.typeof(column) for column in columns]
        texts = [cast(column, LargeBinary) for column in _TEXTS]
    query = select(_T.c.number, _T.c.at, *texts, *kinds).where(_T.c.number > after)
    return db.execute(query.order_by(_T.c.number).limit(PAGE)).all()


_SQLITE_KINDS = ("integer", "real", *["text"] * len(_TEXTS))


def _read(row: Sequence[Any], number: int) -> tuple[dict[str, Any], str]:
    size = 2 + len(_TEXTS)
    names = ("number", "at", *(column.name for column in _TEXTS))
    try:
        if len(row) > size and tuple(row[size:]) != _SQLITE_KINDS:
            raise ValueError("not of the type that was written")
        texts = [value.decode() if isinstance(value, bytes) else value for value in row[2:size]]
    except (UnicodeDecodeError, ValueError) as error:
        raise StateError(f"Line {number} of the audit log was changed.", _FIX) from error
    values = dict(zip(names, (*row[:2], *texts), strict=True))
    return values, values.pop("hash")


def _entry(values: Sequence[Any]) -> AuditEntry:
    number, at, actor, action, target, details, previous, sealed = values
    return AuditEntry(
        number=number,
        at=at,
        actor=actor,
        action=action,
        target=target,
        details=json.loads(details),
        previous_hash=previous,
        hash=sealed,
    )
