"""API keys: told once, kept as a digest, found by it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from sqlalchemy import bindparam, func, insert, or_, select, update
from sqlalchemy.orm import Session as Db

from ayllu.errors import ConflictError, NotFoundError, UsageError
from ayllu.server.state import tables, users
from ayllu.server.state.records import Key, Scope, User
from ayllu.server.state.secret_text import digest, new_id, new_secret, same

PREFIX = "ay-"
SHOWN_CHARACTERS = 10
MAX_NAME = 64
MAX_KEYS = 1000
"""Of one user, the revoked included."""

_T = tables.keys
_COLUMNS = (
    _T.c.id,
    _T.c.user_id,
    _T.c.name,
    _T.c.prefix,
    _T.c.scopes,
    _T.c.created_at,
    _T.c.expires_at,
    _T.c.revoked_at,
    _T.c.last_used_at,
    _T.c.limits,
)
_BY_HASH = (
    select(*_COLUMNS, _T.c.key_hash, *users.COLUMNS)
    .join(tables.users, tables.users.c.id == _T.c.user_id)
    .where(_T.c.key_hash == bindparam("key_hash"))
)


def create(
    db: Db,
    user_id: str,
    name: str,
    scopes: Iterable[Scope],
    expires_at: float | None = None,
    limits: dict[str, int] | None = None,
) -> tuple[Key, str]:
    """A new key, and the key itself, which nobody can be told again.

    Raises NotFoundError, UsageError, ConflictError (too many keys).
    """
    given = tuple(dict.fromkeys(scopes))
    _check(name, given)
    users.get(db, user_id)
    if db.execute(select(func.count()).where(_T.c.user_id == user_id)).scalar_one() >= MAX_KEYS:
        raise ConflictError(f"This user has {MAX_KEYS} keys.", "Delete the user, or use one of them.")
    plain = new_secret(PREFIX)
    key_id = new_id("key")
    db.execute(
        insert(_T).values(
            id=key_id,
            key_hash=digest(plain),
            user_id=user_id,
            name=name,
            prefix=plain[:SHOWN_CHARACTERS],
            scopes=list(given),
            limits=limits or {},
            created_at=time.time(),
            expires_at=expires_at,
        )
    )
    return get(db, key_id, user_id), plain


def find(db: Db, plain: str) -> tuple[Key, User] | None:
    """Whose key this is. None for one that is unknown, revoked or expired, or of a disabled user."""
    shown = digest(plain)
    row = db.execute(_BY_HASH, {"key_hash": shown}).one_or_none()
    if row is None:
        return None
    size = len(_COLUMNS)
    key, stored, user = _key_of(row[:size]), row[size], users.user_of(row[size + 1 :])
    expired = key.expires_at is not None and key.expires_at <= time.time()
    if not same(stored, shown) or expired or key.revoked_at is not None or user.disabled:
        return None
    return key, user


def listed(db: Db, user_id: str | None) -> list[Key]:
    """A user's keys, or everybody's, newest first."""
    query = select(*_COLUMNS).order_by(_T.c.created_at.desc(), _T.c.id)
    if user_id is not None:
        query = query.where(_T.c.user_id == user_id)
    return [_key_of(row) for row in db.execute(query)]


def get(db: Db, key_id: str, user_id: str | None) -> Key:
    """A key of this user, or of anybody. Raises NotFoundError."""
    query = select(*_COLUMNS).where(_T.c.id == key_id)
    if user_id is not None:
        query = query.where(_T.c.user_id == user_id)
    row = db.execute(query).one_or_none()
    if row is None:
        raise NotFoundError("There is no such key.", "`ayllu keys list` shows them.")
    return _key_of(row)


def revoke(db: Db, key_id: str, user_id: str | None) -> Key:
    """End a key for good. Raises NotFoundError."""
    get(db, key_id, user_id)
    db.execute(update(_T).where(_T.c.id == key_id, _T.c.revoked_at.is_(None)).values(revoked_at=time.time()))
    return get(db, key_id, user_id)


def touch(db: Db, used: Mapping[str, float]) -> None:
    """Note when keys were last used: id and time. Time never goes back."""
    for key_id, when in used.items():
        earlier = or_(_T.c.last_used_at.is_(None), _T.c.last_used_at < when)
        db.execute(update(_T).where(_T.c.id == key_id, earlier).values(last_used_at=when))


def _check(name: str, scopes: tuple[str, ...]) -> None:
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable():
        raise UsageError(f"A key's name has 1 to {MAX_NAME} printable characters.", "Choose another one.")
    known = get_args(Scope)
    if not scopes or not set(scopes) <= set(known):
        raise UsageError("A key needs scopes, and only such as there are.", f"Scopes: {', '.join(known)}.")


def _key_of(values: Sequence[Any]) -> Key:
    key_id, user_id, name, prefix, scopes, created_at, expires_at, revoked_at, last_used_at, limits = values
    return Key(
        id=key_id,
        user_id=user_id,
        name=name,
        prefix=prefix,
        scopes=tuple(scopes),
        created_at=created_at,
        expires_at=expires_at,
        revoked_at=revoked_at,
        last_used_at=last_used_at,
        limits=limits,
    )
