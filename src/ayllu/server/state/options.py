"""Settings that an admin changed while the server ran."""

from __future__ import annotations

import time
from typing import Any

from sqlalchemy import delete, insert, select, update
from sqlalchemy.orm import Session as Db

from ayllu.server.state import tables
from ayllu.server.state.rows import changed_rows

_T = tables.options


def all_of(db: Db) -> dict[str, Any]:
    """Every stored setting by name."""
    found = db.execute(select(_T.c.name, _T.c.value).order_by(_T.c.name))
    return {row[0]: row[1] for row in found}


def put(db: Db, name: str, value: Any, by: str) -> None:
    """Store a setting. None is no value: `remove` it instead."""
    if value is None:
        raise ValueError(f"{name}: None is no value")
    changes = {"value": value, "changed_by": by, "changed_at": time.time()}
    if changed_rows(db, update(_T).where(_T.c.name == name).values(**changes)) == 0:
        db.execute(insert(_T).values(name=name, **changes))


def remove(db: Db, name: str) -> None:
    """The default counts again."""
    db.execute(delete(_T).where(_T.c.name == name))
