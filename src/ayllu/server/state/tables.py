"""The tables of the database at the newest schema. `migrations/` makes them; a test compares both.

Only types that SQLite and PostgreSQL keep alike: text, whole numbers, doubles, booleans and bytes. Values of
JSON are text, so that what is read back (and hashed) is to the byte what was written.
"""

from __future__ import annotations

import json
from typing import Any

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Dialect,
    Double,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    Table,
    Text,
    TypeDecorator,
)

from ayllu.server.state.text import storable


class PlainText(TypeDecorator[str]):
    """Text of any origin. PostgreSQL takes no NUL and no lone surrogate; neither do we, anywhere."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        return value if value is None else storable(value)


class Json(TypeDecorator[Any]):
    """A value of JSON. None is the database's NULL."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else json_text(value)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else json.loads(value)


def json_text(value: Any) -> str:
    """One line of compact JSON that can be stored."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    try:
        text.encode()
    except UnicodeEncodeError:  # a lone surrogate: escaped, it survives
        return json.dumps(value, separators=(",", ":"))
    return text


metadata = MetaData(naming_convention={"fk": "fk_%(table_name)s_%(column_0_name)s"})


def _owner() -> Column[str]:
    return Column("user_id", PlainText, ForeignKey("users.id", ondelete="CASCADE"), nullable=False)


users = Table(
    "users",
    metadata,
    Column("id", PlainText, primary_key=True),
    Column("name", PlainText, nullable=False),
    Column("folded_name", PlainText, nullable=False),
    Column("role", PlainText, nullable=False),
    Column("disabled", Boolean, nullable=False),
    Column("password_hash", PlainText),
    Column("limits", Json, nullable=False),
    Column("created_at", Double, nullable=False),
    Index("users_by_name", "folded_name", unique=True),
)

identities = Table(
    "identities",
    metadata,
    Column("issuer", PlainText, primary_key=True),
    Column("subject", PlainText, primary_key=True),
    _owner(),
    Column("created_at", Double, nullable=False),
    Index("identities_by_user", "user_id"),
)

links = Table(
    "links",
    metadata,
    Column("token_hash", PlainText, primary_key=True),
    _owner(),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("used_at", Double),
    Index("links_by_user", "user_id"),
)

sessions = Table(
    "sessions",
    metadata,
    Column("id", PlainText, primary_key=True),
    Column("token_hash", PlainText, nullable=False),
    _owner(),
    Column("about", PlainText, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double, nullable=False),
    Column("last_seen_at", Double, nullable=False),
    Index("sessions_by_token", "token_hash", unique=True),
    Index("sessions_by_user", "user_id"),
)

keys = Table(
    "keys",
    metadata,
    Column("id", PlainText, primary_key=True),
    Column("key_hash", PlainText, nullable=False),
    _owner(),
    Column("name", PlainText, nullable=False),
    Column("prefix", PlainText, nullable=False),
    Column("scopes", Json, nullable=False),
    Column("limits", Json, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Column("revoked_at", Double),
    Column("last_used_at", Double),
    Index("keys_by_hash", "key_hash", unique=True),
    Index("keys_by_user", "user_id"),
)

conversations = Table(
    "conversations",
    metadata,
    Column("id", PlainText, primary_key=True),
    _owner(),
    Column("title", PlainText, nullable=False),
    Column("folded_title", PlainText, nullable=False),
    Column("pinned", Boolean, nullable=False),
    Column("settings", Json, nullable=False),
    Column("head_id", PlainText),
    Column("created_at", Double, nullable=False),
    Column("updated_at", Double, nullable=False),
    Index("conversations_by_user", "user_id", "updated_at"),
)

messages = Table(
    "messages",
    metadata,
    Column("id", PlainText, primary_key=True),
    Column("conversation_id", PlainText, ForeignKey("conversations.id", ondelete="CASCADE"), nullable=False),
    Column("number", Integer, nullable=False),
    Column("parent_id", PlainText),
    Column("role", PlainText, nullable=False),
    Column("content", Json, nullable=False),
    Column("folded_text", PlainText, nullable=False),
    Column("run_id", PlainText),
    Column("created_at", Double, nullable=False),
    Index("messages_by_conversation", "conversation_id", "number", unique=True),
)

runs = Table(
    "runs",
    metadata,
    Column("id", PlainText, primary_key=True),
    _owner(),
    Column("kind", PlainText, nullable=False),
    Column("model", PlainText, nullable=False),
    Column("status", PlainText, nullable=False),
    Column("request", Json, nullable=False),
    Column("result", Json),
    Column("error", Json),
    Column("events", Integer, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("ended_at", Double),
    Column("expires_at", Double),
    Index("runs_by_user", "user_id", "created_at"),
    Index("runs_by_status", "status"),
    Index("runs_by_expiry", "expires_at"),
)

run_events = Table(
    "run_events",
    metadata,
    Column("run_id", PlainText, ForeignKey("runs.id", ondelete="CASCADE"), primary_key=True),
    Column("first_number", Integer, primary_key=True, autoincrement=False),
    Column("count", Integer, nullable=False),
    Column("events", Json, nullable=False),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", PlainText, primary_key=True),
    _owner(),
    Column("name", PlainText, nullable=False),
    Column("purpose", PlainText, nullable=False),
    Column("media_type", PlainText, nullable=False),
    Column("size_bytes", BigInteger, nullable=False),
    Column("sha256", PlainText, nullable=False),
    Column("created_at", Double, nullable=False),
    Column("expires_at", Double),
    Index("uploads_by_user", "user_id", "created_at"),
    Index("uploads_by_expiry", "expires_at"),
)

upload_chunks = Table(
    "upload_chunks",
    metadata,
    Column("upload_id", PlainText, ForeignKey("uploads.id", ondelete="CASCADE"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("data", LargeBinary, nullable=False),
)

options = Table(
    "options",
    metadata,
    Column("name", PlainText, primary_key=True),
    Column("value", Json, nullable=False),
    Column("changed_by", PlainText, nullable=False),
    Column("changed_at", Double, nullable=False),
)

adapters = Table(
    "adapters",
    metadata,
    Column("name", PlainText, primary_key=True),
    Column("model", PlainText, nullable=False),
    Column("path", PlainText, nullable=False),
    Column("created_at", Double, nullable=False),
)

audit = Table(
    "audit",
    metadata,
    Column("number", BigInteger, primary_key=True, autoincrement=False),
    Column("at", Double, nullable=False),
    Column("actor", PlainText, nullable=False),
    Column("action", PlainText, nullable=False),
    Column("target", PlainText, nullable=False),
    Column("details", PlainText, nullable=False),
    Column("previous_hash", PlainText, nullable=False),
    Column("hash", PlainText, nullable=False),
)

audit_head = Table(
    "audit_head",
    metadata,
    Column("id", Integer, primary_key=True, autoincrement=False),
    Column("number", BigInteger, nullable=False),
    Column("hash", PlainText, nullable=False),
)
"""One row: the last line of the audit log. Writers take their turn at it, and a missing end shows."""
