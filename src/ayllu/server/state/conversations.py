"""Conversations and their messages. A message answers another one (parent_id): edits make brothers."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import delete as delete_from
from sqlalchemy import func, insert, or_, select
from sqlalchemy import update as update_table
from sqlalchemy.orm import Session as Db

from ayllu.errors import ConflictError, NotFoundError
from ayllu.server.state import tables, users
from ayllu.server.state.records import Conversation, StoredMessage
from ayllu.server.state.rows import changed_rows
from ayllu.server.state.secret_text import new_id
from ayllu.server.state.text import folded, like_pattern, searched_text

MAX_PINNED = 50
"""Of one user: the first page of a list has all of them."""
MAX_MESSAGES = 10_000
"""Of one conversation."""

_T = tables.conversations
_M = tables.messages
_COLUMNS = (
    _T.c.id,
    _T.c.user_id,
    _T.c.title,
    _T.c.pinned,
    _T.c.settings,
    _T.c.head_id,
    _T.c.created_at,
    _T.c.updated_at,
)
_MESSAGE_COLUMNS = (
    _M.c.id,
    _M.c.conversation_id,
    _M.c.parent_id,
    _M.c.role,
    _M.c.content,
    _M.c.run_id,
    _M.c.created_at,
)

MessageRole = Literal["system", "user", "assistant", "tool"]


def create(db: Db, user_id: str, *, title: str = "", settings: dict[str, Any] | None = None) -> Conversation:
    """Begin a conversation. Raises NotFoundError."""
    users.get(db, user_id)
    conversation_id, now = new_id("conv"), time.time()
    db.execute(
        insert(_T).values(
            id=conversation_id,
            user_id=user_id,
            title=title,
            folded_title=folded(title),
            pinned=False,
            settings=settings or {},
            created_at=now,
            updated_at=now,
        )
    )
    return get(db, conversation_id, user_id)


def get(db: Db, conversation_id: str, user_id: str) -> Conversation:
    """A conversation of this user. Raises NotFoundError."""
    row = db.execute(
        select(*_COLUMNS).where(_T.c.id == conversation_id, _T.c.user_id == user_id)
    ).one_or_none()
    if row is None:
        raise _missing()
    return _conversation_of(row)


def listed(
    db: Db, user_id: str, *, query: str | None = None, limit: int, before: float | None = None
) -> list[Conversation]:
    """A user's conversations, newest first, and before those the pinned ones, which `limit` does not count.

    query: what the title or a message must hold. before: the next page, of those last changed earlier; it
    has no pinned ones, as the first has them all.
    """
    wanted = select(*_COLUMNS).where(_T.c.user_id == user_id)
    if query is not None and query.strip():
        wanted = wanted.where(_holds(query.strip()))
    newest = wanted.order_by(_T.c.updated_at.desc(), _T.c.id)
    page = newest.where(_T.c.pinned.is_(False)).limit(limit)
    if before is not None:
        return [_conversation_of(row) for row in db.execute(page.where(_T.c.updated_at < before))]
    pinned = newest.where(_T.c.pinned.is_(True)).limit(MAX_PINNED)
    return [_conversation_of(row) for part in (pinned, page) for row in db.execute(part)]


def update(
    db: Db,
    conversation_id: str,
    user_id: str,
    *,
    title: str | None = None,
    pinned: bool | None = None,
    settings: dict[str, Any] | None = None,
    head_id: str | None = None,
) -> Conversation:
    """Change what is given. Raises NotFoundError (also for a head that is not in it), ConflictError."""
    _lock(db, conversation_id, user_id)
    changes: dict[str, Any] = {"updated_at": time.time()}
    if title is not None:
        changes |= {"title": title, "folded_title": folded(title)}
    if pinned is not None:
        if pinned:
            _require_room_for_pin(db, conversation_id, user_id)
        changes["pinned"] = pinned
    if settings is not None:
        changes["settings"] = settings
    if head_id is not None:
        _require_message(db, conversation_id, head_id)
        changes["head_id"] = head_id
    db.execute(update_table(_T).where(_T.c.id == conversation_id).values(**changes))
    return get(db, conversation_id, user_id)


def delete(db: Db, conversation_id: str, user_id: str) -> None:
    """Delete a conversation with its messages. Raises NotFoundError."""
    gone = delete_from(_T).where(_T.c.id == conversation_id, _T.c.user_id == user_id)
    if changed_rows(db, gone) == 0:
        raise _missing()


def add_message(
    db: Db,
    conversation_id: str,
    user_id: str,
    parent_id: str | None,
    role: MessageRole,
    content: Any,
    run_id: str | None = None,
) -> StoredMessage:
    """Add a turn below `parent_id`. Raises NotFoundError (also for a parent elsewhere), ConflictError."""
    _lock(db, conversation_id, user_id)
    if parent_id is not None:
        _require_message(db, conversation_id, parent_id)
    last = db.execute(
        select(func.coalesce(func.max(_M.c.number), 0)).where(_M.c.conversation_id == conversation_id)
    ).scalar_one()
    if last >= MAX_MESSAGES:
        raise ConflictError(f"A conversation has at most {MAX_MESSAGES} messages.", "Begin another one.")
    message = StoredMessage(
        id=new_id("msg"),
        conversation_id=conversation_id,
        parent_id=parent_id,
        role=role,
        content=content,
        run_id=run_id,
        created_at=time.time(),
    )
    values = {column.name: getattr(message, column.name) for column in _MESSAGE_COLUMNS}
    db.execute(insert(_M).values(number=last + 1, folded_text=searched_text(content), **values))
    db.execute(update_table(_T).where(_T.c.id == conversation_id).values(updated_at=message.created_at))
    return message


def messages(db: Db, conversation_id: str, user_id: str) -> list[StoredMessage]:
    """All turns of a conversation, in the order in which they came. Raises NotFoundError."""
    get(db, conversation_id, user_id)
    found = db.execute(
        select(*_MESSAGE_COLUMNS).where(_M.c.conversation_id == conversation_id).order_by(_M.c.number)
    )
    return [_message_of(row) for row in found]


def set_content(db: Db, message_id: str, user_id: str, content: Any) -> StoredMessage:
    """Replace what a message says. Raises NotFoundError."""
    conversation_id = db.execute(
        select(_M.c.conversation_id)
        .join(_T, _T.c.id == _M.c.conversation_id)
        .where(_M.c.id == message_id, _T.c.user_id == user_id)
    ).scalar_one_or_none()
    if conversation_id is None:
        raise NotFoundError("There is no such message.", "Check its id.")
    db.execute(
        update_table(_M)
        .where(_M.c.id == message_id)
        .values(content=content, folded_text=searched_text(content))
    )
    db.execute(update_table(_T).where(_T.c.id == conversation_id).values(updated_at=time.time()))
    return _message_of(db.execute(select(*_MESSAGE_COLUMNS).where(_M.c.id == message_id)).one())


def _holds(query: str) -> Any:
    pattern = like_pattern(query)
    said = (
        select(1).where(_M.c.conversation_id == _T.c.id, _M.c.folded_text.like(pattern, escape="\\")).exists()
    )
    return or_(_T.c.folded_title.like(pattern, escape="\\"), said)


def _lock(db: Db, conversation_id: str, user_id: str) -> None:
    """Writers of one conversation take turns, so that its messages are numbered without gaps or twins."""
    found = db.execute(
        select(_T.c.id).where(_T.c.id == conversation_id, _T.c.user_id == user_id).with_for_update()
    )
    if found.first() is None:
        raise _missing()


def _require_message(db: Db, conversation_id: str, message_id: str) -> None:
    found = db.execute(
        select(_M.c.id).where(_M.c.id == message_id, _M.c.conversation_id == conversation_id)
    ).first()
    if found is None:
        raise NotFoundError("There is no such message in this conversation.", "Check its id.")


def _require_room_for_pin(db: Db, conversation_id: str, user_id: str) -> None:
    pinned = db.execute(
        select(func.count()).where(_T.c.user_id == user_id, _T.c.pinned.is_(True), _T.c.id != conversation_id)
    ).scalar_one()
    if pinned >= MAX_PINNED:
        raise ConflictError(f"{MAX_PINNED} conversations are pinned.", "Unpin one first.")


def _missing() -> NotFoundError:
    return NotFoundError("There is no such conversation.", "Check its id.")


def _conversation_of(values: Sequence[Any]) -> Conversation:
    return Conversation(**dict(zip((column.name for column in _COLUMNS), values, strict=True)))


def _message_of(values: Sequence[Any]) -> StoredMessage:
    return StoredMessage(**dict(zip((column.name for column in _MESSAGE_COLUMNS), values, strict=True)))
