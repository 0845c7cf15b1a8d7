"""How many rows a statement changed: the one thing of a result that SQLAlchemy types too widely."""

from __future__ import annotations

from sqlalchemy import CursorResult, Delete, Update
from sqlalchemy.orm import Session as Db


def changed_rows(db: Db, statement: Update | Delete) -> int:
    """Run it; the number of rows that were changed."""
    result = db.execute(statement)
    if not isinstance(result, CursorResult):
        raise TypeError(f"{type(result).__name__} tells no number of rows")
    return result.rowcount
