"""Users: who has an account here. One enabled admin always remains."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from sqlalchemy import bindparam, func, insert, select
from sqlalchemy import delete as delete_from
from sqlalchemy import update as update_table
from sqlalchemy.orm import Session as Db

from ayllu.errors import ConflictError, NotFoundError, UsageError
from ayllu.server.state import tables
from ayllu.server.state.records import Role, User
from ayllu.server.state.secret_text import new_id
from ayllu.server.state.text import folded

MAX_NAME = 64
MAX_IDENTITY = 255
ROLES: tuple[Role, ...] = ("admin", "user")

_T = tables.users
COLUMNS = (
    _T.c.id,
    _T.c.name,
    _T.c.role,
    _T.c.disabled,
    _T.c.password_hash.is_not(None),
    _T.c.created_at,
    _T.c.limits,
)
_BY_ID = select(*COLUMNS).where(_T.c.id == bindparam("id"))
_BY_NAME = select(*COLUMNS, _T.c.password_hash).where(_T.c.folded_name == bindparam("name"))


def user_of(values: Sequence[Any]) -> User:
    """A user out of the values of COLUMNS."""
    user_id, name, role, disabled, has_password, created_at, limits = values
    return User(
        id=user_id,
        name=name,
        role=role,
        disabled=bool(disabled),
        has_password=bool(has_password),
        created_at=created_at,
        limits=limits,
    )


def create(db: Db, name: str, role: Role, password_hash: str | None = None) -> User:
    """Make an account. Raises UsageError for a name or role that cannot be, ConflictError for one taken."""
    _check_name(name)
    _check_role(role)
    _require_free(db, name, None)
    user_id = new_id("user")
    db.execute(
        insert(_T).values(
            id=user_id,
            name=name,
            folded_name=folded(name),
            role=role,
            disabled=False,
            password_hash=password_hash,
            limits={},
            created_at=time.time(),
        )
    )
    return get(db, user_id)


def get(db: Db, user_id: str) -> User:
    """Raises NotFoundError."""
    row = db.execute(_BY_ID, {"id": user_id}).one_or_none()
    if row is None:
        raise NotFoundError("There is no such user.", "`ayllu users list` shows who there is.")
    return user_of(row)


def by_name(db: Db, name: str) -> User | None:
    """The user of that name, whatever its case."""
    row = db.execute(_BY_NAME, {"name": folded(name)}).one_or_none()
    return None if row is None else user_of(row[:-1])


def password_hash(db: Db, name: str) -> tuple[User, str] | None:
    """The user of that name and the hash of the password; None without either."""
    row = db.execute(_BY_NAME, {"name": folded(name)}).one_or_none()
    return None if row is None or row[-1] is None else (user_of(row[:-1]), row[-1])


def listed(db: Db) -> list[User]:
    """Everybody, by name."""
    return [user_of(row) for row in db.execute(select(*COLUMNS).order_by(_T.c.folded_name))]


def count(db: Db) -> int:
    """How many users there are."""
    return db.execute(select(func.count()).select_from(_T)).scalar_one()


def update(
    db: Db,
    user_id: str,
    *,
    name: str | None = None,
    role: Role | None = None,
    disabled: bool | None = None,
    password_hash: str | None = None,
    limits: dict[str, int] | None = None,
) -> User:
    """Change what is given. Disabling ends the user's sessions, keys and links.

    Raises NotFoundError, UsageError, and ConflictError for a name that is taken or the last admin.
    """
    if (role is not None and role != "admin") or disabled:
        _require_other_admin(db, user_id)
    get(db, user_id)
    changes: dict[str, Any] = {}
    if name is not None:
        _check_name(name)
        _require_free(db, name, user_id)
        changes |= {"name": name, "folded_name": folded(name)}
    if role is not None:
        _check_role(role)
        changes["role"] = role
    if disabled is not None:
        changes["disabled"] = disabled
    if password_hash is not None:
        changes["password_hash"] = password_hash
    if limits is not None:
        changes["limits"] = limits
    if changes:
        db.execute(update_table(_T).where(_T.c.id == user_id).values(**changes))
    if disabled:
        _lock_out(db, user_id)
    return get(db, user_id)


def delete(db: Db, user_id: str) -> None:
    """Delete an account with all that is its. Raises NotFoundError, and ConflictError for the last admin."""
    _require_other_admin(db, user_id)
    get(db, user_id)
    db.execute(delete_from(_T).where(_T.c.id == user_id))


def identity(db: Db, issuer: str, subject: str) -> User | None:
    """Whom an OpenID Connect provider means by `subject`."""
    linked = tables.identities
    row = db.execute(
        select(*COLUMNS)
        .join(linked, linked.c.user_id == _T.c.id)
        .where(linked.c.issuer == issuer, linked.c.subject == subject)
    ).one_or_none()
    return None if row is None else user_of(row)


def link_identity(db: Db, user_id: str, issuer: str, subject: str) -> None:
    """Let a provider's `subject` sign in as this user. Raises NotFoundError, ConflictError."""
    if not 0 < len(issuer) <= MAX_IDENTITY or not 0 < len(subject) <= MAX_IDENTITY:
        raise UsageError(f"An identity has more than {MAX_IDENTITY} characters, or none.", "Use another one.")
    get(db, user_id)
    if identity(db, issuer, subject) is not None:
        raise ConflictError("This identity belongs to a user already.", "Delete that user first.")
    db.execute(
        insert(tables.identities).values(
            issuer=issuer, subject=subject, user_id=user_id, created_at=time.time()
        )
    )


def signed_in_by_oidc(db: Db, issuer: str, subject: str, name: str, *, admin: bool | None = None) -> User:
    """Whom a provider vouches for; a new one gets an account, never one that is there under the same name.

    admin: what the provider says of the role, if it says anything. The last admin stays one in any case.
    """
    known = identity(db, issuer, subject)
    if known is None:
        known = create(db, _free_name(db, name), "admin" if admin else "user")
        link_identity(db, known.id, issuer, subject)
    elif admin is not None and not known.disabled:
        role: Role = "admin" if admin else "user"
        if role != known.role and (admin or _enabled_admins(db) - {known.id}):
            known = update(db, known.id, role=role)
    return known


def _free_name(db: Db, wished: str) -> str:
    base = "".join(ch for ch in wished if ch.isprintable()).strip()[: MAX_NAME - 4].strip() or "user"
    if by_name(db, base) is None:
        return base
    for number in range(2, 1000):
        if by_name(db, f"{base}{number}") is None:
            return f"{base}{number}"
    raise ConflictError("A thousand users have that name.", "Rename some.")


def _check_name(name: str) -> None:
    if not 1 <= len(name) <= MAX_NAME or not name.isprintable() or name != name.strip():
        raise UsageError(
            f"This is no name of a user: 1 to {MAX_NAME} printable characters, no space at the ends.",
            "Choose another one.",
        )


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise UsageError("There is no such role.", f"Roles: {', '.join(ROLES)}.")


def _require_free(db: Db, name: str, except_id: str | None) -> None:
    holder = by_name(db, name)
    if holder is not None and holder.id != except_id:
        raise ConflictError("A user of that name is there already.", "Choose another name.")


def _enabled_admins(db: Db) -> set[str]:
    """Their rows stay locked to the end, so that two cannot both go as the last but one."""
    found = db.execute(
        select(_T.c.id)
        .where(_T.c.role == "admin", _T.c.disabled.is_(False))
        .order_by(_T.c.id)
        .with_for_update()
    )
    return set(found.scalars())


def _require_other_admin(db: Db, user_id: str) -> None:
    if _enabled_admins(db) == {user_id}:
        raise ConflictError("This is the last enabled admin.", "Make another user an admin first.")


def _lock_out(db: Db, user_id: str) -> None:
    for table in (tables.sessions, tables.links):
        db.execute(delete_from(table).where(table.c.user_id == user_id))
    keys = tables.keys
    db.execute(
        update_table(keys)
        .where(keys.c.user_id == user_id, keys.c.revoked_at.is_(None))
        .values(revoked_at=time.time())
    )
