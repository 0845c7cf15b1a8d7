"""The first schema."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Make every table."""
    _people()
    _conversations()
    _runs()
    _uploads()
    _settings()
    _audit()


def _text(name: str, *, null: bool = False, key: bool = False) -> sa.Column[str]:
    return sa.Column(name, sa.Text(), nullable=null, primary_key=key)


def _time(name: str, *, null: bool = False) -> sa.Column[float]:
    return sa.Column(name, sa.Double(), nullable=null)


def _number(name: str, *, key: bool = False, big: bool = False) -> sa.Column[int]:
    kind = sa.BigInteger() if big else sa.Integer()
    return sa.Column(name, kind, nullable=False, primary_key=key, autoincrement=False)


def _belongs_to(parent: str, table: str, column: str) -> sa.ForeignKeyConstraint:
    return sa.ForeignKeyConstraint(
        [column], [f"{parent}.id"], name=f"fk_{table}_{column}", ondelete="CASCADE"
    )


def _people() -> None:
    op.create_table(
        "users",
        _text("id", key=True),
        _text("name"),
        _text("folded_name"),
        _text("role"),
        sa.Column("disabled", sa.Boolean(), nullable=False),
        _text("password_hash", null=True),
        _text("limits"),
        _time("created_at"),
    )
    op.create_index("users_by_name", "users", ["folded_name"], unique=True)
    op.create_table(
        "identities",
        _text("issuer", key=True),
        _text("subject", key=True),
        _text("user_id"),
        _time("created_at"),
        _belongs_to("users", "identities", "user_id"),
    )
    op.create_index("identities_by_user", "identities", ["user_id"])
    op.create_table(
        "links",
        _text("token_hash", key=True),
        _text("user_id"),
        _time("created_at"),
        _time("expires_at"),
        _time("used_at", null=True),
        _belongs_to("users", "links", "user_id"),
    )
    op.create_index("links_by_user", "links", ["user_id"])
    op.create_table(
        "sessions",
        _text("id", key=True),
        _text("token_hash"),
        _text("user_id"),
        _text("about"),
        _time("created_at"),
        _time("expires_at"),
        _time("last_seen_at"),
        _belongs_to("users", "sessions", "user_id"),
    )
    op.create_index("sessions_by_token", "sessions", ["token_hash"], unique=True)
    op.create_index("sessions_by_user", "sessions", ["user_id"])
    op.create_table(
        "keys",
        _text("id", key=True),
        _text("key_hash"),
        _text("user_id"),
        _text("name"),
        _text("prefix"),
        _text("scopes"),
        _text("limits"),
        _time("created_at"),
        _time("expires_at", null=True),
        _time("revoked_at", null=True),
        _time("last_used_at", null=True),
        _belongs_to("users", "keys", "user_id"),
    )
    op.create_index("keys_by_hash", "keys", ["key_hash"], unique=True)
    op.create_index("keys_by_user", "keys", ["user_id"])


def _conversations() -> None:
    op.create_table(
        "conversations",
        _text("id", key=True),
        _text("user_id"),
        _text("title"),
        _text("folded_title"),
        sa.Column("pinned", sa.Boolean(), nullable=False),
        _text("settings"),
        _text("head_id", null=True),
        _time("created_at"),
        _time("updated_at"),
        _belongs_to("users", "conversations", "user_id"),
    )
    op.create_index("conversations_by_user", "conversations", ["user_id", "updated_at"])
    op.create_table(
        "messages",
        _text("id", key=True),
        _text("conversation_id"),
        _number("number"),
        _text("parent_id", null=True),
        _text("role"),
        _text("content"),
        _text("folded_text"),
        _text("run_id", null=True),
        _time("created_at"),
        _belongs_to("conversations", "messages", "conversation_id"),
    )
    op.create_index("messages_by_conversation", "messages", ["conversation_id", "number"], unique=True)


def _runs() -> None:
    op.create_table(
        "runs",
        _text("id", key=True),
        _text("user_id"),
        _text("kind"),
        _text("model"),
        _text("status"),
        _text("request"),
        _text("result", null=True),
        _text("error", null=True),
        _number("events"),
        _time("created_at"),
        _time("ended_at", null=True),
        _time("expires_at", null=True),
        _belongs_to("users", "runs", "user_id"),
    )
    op.create_index("runs_by_user", "runs", ["user_id", "created_at"])
    op.create_index("runs_by_status", "runs", ["status"])
    op.create_index("runs_by_expiry", "runs", ["expires_at"])
    op.create_table(
        "run_events",
        _text("run_id", key=True),
        _number("first_number", key=True),
        _number("count"),
        _text("events"),
        _belongs_to("runs", "run_events", "run_id"),
    )


def _uploads() -> None:
    op.create_table(
        "uploads",
        _text("id", key=True),
        _text("user_id"),
        _text("name"),
        _text("purpose"),
        _text("media_type"),
        _number("size_bytes", big=True),
        _text("sha256"),
        _time("created_at"),
        _time("expires_at", null=True),
        _belongs_to("users", "uploads", "user_id"),
    )
    op.create_index("uploads_by_user", "uploads", ["user_id", "created_at"])
    op.create_index("uploads_by_expiry", "uploads", ["expires_at"])
    op.create_table(
        "upload_chunks",
        _text("upload_id", key=True),
        _number("number", key=True),
        sa.Column("data", sa.LargeBinary(), nullable=False),
        _belongs_to("uploads", "upload_chunks", "upload_id"),
    )


def _settings() -> None:
    op.create_table(
        "options", _text("name", key=True), _text("value"), _text("changed_by"), _time("changed_at")
    )
    op.create_table("adapters", _text("name", key=True), _text("model"), _text("path"), _time("created_at"))


def _audit() -> None:
    op.create_table(
        "audit",
        _number("number", key=True, big=True),
        _time("at"),
        _text("actor"),
        _text("action"),
        _text("target"),
        _text("details"),
        _text("previous_hash"),
        _text("hash"),
    )
    head = op.create_table("audit_head", _number("id", key=True), _number("number", big=True), _text("hash"))
    op.bulk_insert(head, [{"id": 1, "number": 0, "hash": ""}])
