"""Links that sign in once, and the sessions of browsers. Of their tokens only digests are kept."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import bindparam, delete, insert, or_, select, update
from sqlalchemy.orm import Session as Db

from ayllu.errors import NotFoundError
from ayllu.server.state import tables, users
from ayllu.server.state.records import Session, User
from ayllu.server.state.rows import changed_rows
from ayllu.server.state.secret_text import digest, new_id, new_secret, same

MAX_SESSIONS = 100
"""Of one user; the oldest ends when another begins."""
MAX_LINKS = 20
MAX_ABOUT = 200

_L = tables.links
_S = tables.sessions
_COLUMNS = (_S.c.id, _S.c.user_id, _S.c.about, _S.c.created_at, _S.c.expires_at, _S.c.last_seen_at)
_BY_TOKEN = (
    select(*_COLUMNS, _S.c.token_hash, *users.COLUMNS)
    .join(tables.users, tables.users.c.id == _S.c.user_id)
    .where(_S.c.token_hash == bindparam("token_hash"))
)


def new_link(db: Db, user_id: str, lifetime_s: float) -> str:
    """The token of a link that signs this user in once. Raises NotFoundError."""
    users.get(db, user_id)
    _drop_oldest(db, _L.c.token_hash, user_id, MAX_LINKS - 1)
    token, now = new_secret(), time.time()
    db.execute(
        insert(_L).values(
            token_hash=digest(token), user_id=user_id, created_at=now, expires_at=now + lifetime_s
        )
    )
    return token


def redeem_link(db: Db, token: str) -> User | None:
    """Whom the link signs in, if it is neither used nor too old. From now on it is used."""
    shown, now = digest(token), time.time()
    used = changed_rows(
        db,
        update(_L)
        .where(_L.c.token_hash == shown, _L.c.used_at.is_(None), _L.c.expires_at > now)
        .values(used_at=now),
    )
    if used != 1:
        return None
    stored, user_id = db.execute(select(_L.c.token_hash, _L.c.user_id).where(_L.c.token_hash == shown)).one()
    user = users.get(db, user_id)
    return user if same(stored, shown) and not user.disabled else None


def new_session(db: Db, user_id: str, lifetime_s: float, about: str) -> tuple[Session, str]:
    """A browser has signed in: its session, and the token of its cookie. Raises NotFoundError."""
    users.get(db, user_id)
    _drop_oldest(db, _S.c.id, user_id, MAX_SESSIONS - 1)
    token, now = new_secret(), time.time()
    session = Session(
        id=new_id("session"),
        user_id=user_id,
        about=about[:MAX_ABOUT],
        created_at=now,
        expires_at=now + lifetime_s,
        last_seen_at=now,
    )
    values = {column.name: getattr(session, column.name) for column in _COLUMNS}
    db.execute(insert(_S).values(token_hash=digest(token), **values))
    return session, token


def find_session(db: Db, token: str) -> tuple[Session, User] | None:
    """Whose cookie this is, while the session lasts and its user is not disabled."""
    shown = digest(token)
    row = db.execute(_BY_TOKEN, {"token_hash": shown}).one_or_none()
    if row is None:
        return None
    size = len(_COLUMNS)
    session, stored, user = _session_of(row[:size]), row[size], users.user_of(row[size + 1 :])
    valid = same(stored, shown) and session.expires_at > time.time() and not user.disabled
    return (session, user) if valid else None


def touch(db: Db, seen: Mapping[str, float]) -> None:
    """Note when sessions were last seen: id and time."""
    for session_id, when in seen.items():
        db.execute(update(_S).where(_S.c.id == session_id).values(last_seen_at=when))


def sessions_of(db: Db, user_id: str) -> list[Session]:
    """Where a user is signed in, newest first."""
    found = db.execute(
        select(*_COLUMNS)
        .where(_S.c.user_id == user_id, _S.c.expires_at > time.time())
        .order_by(_S.c.created_at.desc(), _S.c.id)
    )
    return [_session_of(row) for row in found]


def end_session(db: Db, session_id: str, user_id: str) -> None:
    """Sign one browser out. Raises NotFoundError."""
    if changed_rows(db, delete(_S).where(_S.c.id == session_id, _S.c.user_id == user_id)) == 0:
        raise NotFoundError("There is no such session.", "It may have ended already.")


def end_sessions(db: Db, user_id: str) -> int:
    """Sign a user out everywhere; how many sessions that were."""
    return changed_rows(db, delete(_S).where(_S.c.user_id == user_id))


def expire(db: Db, now: float) -> int:
    """Forget sessions and links that are too old; how many."""
    links = delete(_L).where(or_(_L.c.expires_at <= now, _L.c.used_at.is_not(None)))
    return changed_rows(db, delete(_S).where(_S.c.expires_at <= now)) + changed_rows(db, links)


def _session_of(values: Sequence[Any]) -> Session:
    session_id, user_id, about, created_at, expires_at, last_seen_at = values
    return Session(
        id=session_id,
        user_id=user_id,
        about=about,
        created_at=created_at,
        expires_at=expires_at,
        last_seen_at=last_seen_at,
    )


def _drop_oldest(db: Db, id_column: Any, user_id: str, keep: int) -> None:
    table = id_column.table
    old = (
        select(id_column)
        .where(table.c.user_id == user_id)
        .order_by(table.c.created_at.desc(), id_column)
        .offset(keep)
        .limit(keep)
    )
    db.execute(delete(table).where(id_column.in_(list(db.execute(old).scalars()))))
