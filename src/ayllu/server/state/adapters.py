"""Adapters that requests may name."""

from __future__ import annotations

import time

from sqlalchemy import delete as delete_from
from sqlalchemy import insert, select
from sqlalchemy.orm import Session as Db

from ayllu.errors import ConflictError, NotFoundError, UsageError
from ayllu.server.state import tables
from ayllu.server.state.records import Adapter
from ayllu.server.state.rows import changed_rows

MAX_NAME = 200

_T = tables.adapters
_COLUMNS = (_T.c.name, _T.c.model, _T.c.path, _T.c.created_at)


def create(db: Db, name: str, model: str, path: str) -> Adapter:
    """Register an adapter. Raises UsageError, ConflictError."""
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise UsageError(
            f"An adapter's name has 1 to {MAX_NAME} printable characters.", "Choose another one."
        )
    if db.execute(select(_T.c.name).where(_T.c.name == name)).first() is not None:
        raise ConflictError("An adapter of that name is there already.", "Choose another name.")
    db.execute(insert(_T).values(name=name, model=model, path=path, created_at=time.time()))
    return get(db, name)


def listed(db: Db) -> list[Adapter]:
    """All of them, by name."""
    return [
        Adapter(name=row[0], model=row[1], path=row[2], created_at=row[3])
        for row in db.execute(select(*_COLUMNS).order_by(_T.c.name))
    ]


def get(db: Db, name: str) -> Adapter:
    """Raises NotFoundError."""
    row = db.execute(select(*_COLUMNS).where(_T.c.name == name)).one_or_none()
    if row is None:
        raise NotFoundError("There is no such adapter.", "GET /api/adapters lists them.")
    return Adapter(name=row[0], model=row[1], path=row[2], created_at=row[3])


def delete(db: Db, name: str) -> None:
    """Forget an adapter; its files stay. Raises NotFoundError."""
    if changed_rows(db, delete_from(_T).where(_T.c.name == name)) == 0:
        raise NotFoundError("There is no such adapter.", "GET /api/adapters lists them.")
