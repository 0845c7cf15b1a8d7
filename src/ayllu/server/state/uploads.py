"""Files that users keep here. Their bytes are rows of 1 MiB, so that backups and replicas have them too."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from sqlalchemy import delete as delete_from
from sqlalchemy import func, insert, or_, select, tuple_, update
from sqlalchemy.orm import Session as Db

from ayllu.errors import NotFoundError
from ayllu.server.state import tables, users
from ayllu.server.state.records import StoredUpload
from ayllu.server.state.rows import changed_rows
from ayllu.server.state.secret_text import new_id

CHUNK_BYTES = 1 << 20

_T = tables.uploads
_C = tables.upload_chunks
_COLUMNS = (
    _T.c.id,
    _T.c.user_id,
    _T.c.name,
    _T.c.purpose,
    _T.c.media_type,
    _T.c.size_bytes,
    _T.c.sha256,
    _T.c.created_at,
    _T.c.expires_at,
)


def create(
    db: Db,
    *,
    user_id: str,
    name: str,
    purpose: str,
    media_type: str,
    chunks: Iterable[bytes],
    expires_at: float | None = None,
) -> StoredUpload:
    """Keep a file; `chunks` may be of any size, and one is in memory at a time. Raises NotFoundError."""
    users.get(db, user_id)
    upload_id = new_id("file").replace("_", "-")
    db.execute(
        insert(_T).values(
            id=upload_id,
            user_id=user_id,
            name=name,
            purpose=purpose,
            media_type=media_type,
            size_bytes=0,
            sha256="",
            created_at=time.time(),
            expires_at=expires_at,
        )
    )
    size, sum_of_all = 0, hashlib.sha256()
    for number, data in enumerate(_in_rows(chunks)):
        db.execute(insert(_C).values(upload_id=upload_id, number=number, data=data))
        size += len(data)
        sum_of_all.update(data)
    db.execute(update(_T).where(_T.c.id == upload_id).values(size_bytes=size, sha256=sum_of_all.hexdigest()))
    return _upload_of(db.execute(select(*_COLUMNS).where(_T.c.id == upload_id)).one())


def get(db: Db, upload_id: str, user_id: str) -> StoredUpload:
    """A file of this user. Raises NotFoundError."""
    row = db.execute(
        select(*_COLUMNS).where(_T.c.id == upload_id, _T.c.user_id == user_id, _unexpired())
    ).one_or_none()
    if row is None:
        raise NotFoundError("There is no such file.", "Check its id.")
    return _upload_of(row)


def listed(
    db: Db, user_id: str, purpose: str | None = None, limit: int = 100, after: str | None = None
) -> list[StoredUpload]:
    """A user's files, newest first; after: those that follow this one (NotFoundError if there is none)."""
    query = select(*_COLUMNS).where(_T.c.user_id == user_id, _unexpired())
    if purpose is not None:
        query = query.where(_T.c.purpose == purpose)
    if after is not None:
        last = get(db, after, user_id)
        query = query.where(tuple_(_T.c.created_at, _T.c.id) < (last.created_at, last.id))
    rows = db.execute(query.order_by(_T.c.created_at.desc(), _T.c.id.desc()).limit(limit))
    return [_upload_of(row) for row in rows]


def content(db: Db, upload_id: str, user_id: str) -> Iterator[bytes]:
    """A file's bytes, piece by piece, while the transaction is open. Raises NotFoundError at once."""
    get(db, upload_id, user_id)
    return _pieces(db, upload_id)


def delete(db: Db, upload_id: str, user_id: str) -> None:
    """Forget a file. Raises NotFoundError."""
    if changed_rows(db, delete_from(_T).where(_T.c.id == upload_id, _T.c.user_id == user_id)) == 0:
        raise NotFoundError("There is no such file.", "Check its id.")


def expire(db: Db, now: float) -> int:
    """Forget files that are too old; how many."""
    return changed_rows(db, delete_from(_T).where(_T.c.expires_at <= now))


def used_bytes(db: Db, user_id: str) -> int:
    """How much a user keeps here."""
    total = select(func.coalesce(func.sum(_T.c.size_bytes), 0)).where(_T.c.user_id == user_id)
    return int(db.execute(total).scalar_one())


def _unexpired() -> Any:
    return or_(_T.c.expires_at.is_(None), _T.c.expires_at > time.time())


def _in_rows(chunks: Iterable[bytes]) -> Iterator[bytes]:
    waiting = bytearray()
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), CHUNK_BYTES):
            waiting += view[start : start + CHUNK_BYTES]
            if len(waiting) >= CHUNK_BYTES:
                yield bytes(waiting[:CHUNK_BYTES])
                del waiting[:CHUNK_BYTES]
    if waiting:
        yield bytes(waiting)


def _pieces(db: Db, upload_id: str) -> Iterator[bytes]:
    number = 0
    while True:
        data = db.execute(
            select(_C.c.data).where(_C.c.upload_id == upload_id, _C.c.number == number)
        ).scalar_one_or_none()
        if data is None:
            return
        yield bytes(data)
        number += 1


def _upload_of(values: Sequence[Any]) -> StoredUpload:
    return StoredUpload(**dict(zip((column.name for column in _COLUMNS), values, strict=True)))
