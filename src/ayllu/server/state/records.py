"""What the database holds, as plain values. Times are seconds since 1970; ids are random and say nothing."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["admin", "user"]

Scope = Literal["inference", "models", "metrics", "admin"]
"""What a key may do: ask models (and keep files and conversations); load, pull and remove models; read
metrics; manage users, keys and settings. 'admin' is of use only to the key of an admin."""

RunStatus = Literal["queued", "running", "completed", "incomplete", "failed", "cancelled", "interrupted"]
"""'interrupted': the server ended while it ran. The last five are final."""


@dataclass(frozen=True, kw_only=True)
class User:
    """limits: what differs from the server's own limits, by name (see `limits.Limits`)."""

    id: str
    name: str
    role: Role
    disabled: bool
    has_password: bool
    created_at: float
    limits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Key:
    """An API key; the key itself is told once, when made. prefix: its first characters, to tell it by."""

    id: str
    user_id: str
    name: str
    prefix: str
    scopes: tuple[Scope, ...]
    created_at: float
    expires_at: float | None
    revoked_at: float | None
    last_used_at: float | None
    limits: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Session:
    """A browser that is signed in. about: its User-Agent, to know it by."""

    id: str
    user_id: str
    about: str
    created_at: float
    expires_at: float
    last_seen_at: float


@dataclass(frozen=True, kw_only=True)
class Conversation:
    """settings: model, system prompt, sampling, as the app keeps them. head_id: the message shown last."""

    id: str
    user_id: str
    title: str
    pinned: bool
    settings: dict[str, Any]
    head_id: str | None
    created_at: float
    updated_at: float


@dataclass(frozen=True, kw_only=True)
class StoredMessage:
    """A turn of a conversation. Turns form a tree by parent_id: editing one makes a brother. content: parts
    in OpenAI's shape. run_id: what made it."""

    id: str
    conversation_id: str
    parent_id: str | None
    role: Literal["system", "user", "assistant", "tool"]
    content: Any
    run_id: str | None
    created_at: float


@dataclass(frozen=True, kw_only=True)
class Run:
    """Work that belongs to the server, not to a connection. kind: 'response' or 'message'. request: what was
    asked; result: what it came to, so far or at last. events: how many are stored."""

    id: str
    user_id: str
    kind: str
    model: str
    status: RunStatus
    request: dict[str, Any]
    result: dict[str, Any] | None
    error: dict[str, Any] | None
    events: int
    created_at: float
    ended_at: float | None
    expires_at: float | None


@dataclass(frozen=True, kw_only=True)
class StoredUpload:
    """A file that a user keeps here."""

    id: str
    user_id: str
    name: str
    purpose: str
    media_type: str
    size_bytes: int
    sha256: str
    created_at: float
    expires_at: float | None


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A LoRA adapter that requests may name: the model it belongs to, and its folder."""

    name: str
    model: str
    path: str
    created_at: float


@dataclass(frozen=True, kw_only=True)
class AuditEntry:
    """One line of the audit log; hash covers it and the hash before it."""

    number: int
    at: float
    actor: str
    action: str
    target: str
    details: dict[str, Any]
    previous_hash: str
    hash: str
