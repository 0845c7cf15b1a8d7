"""Users, keys, settings and the audit log."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from fastapi import Request, Response
from pydantic import Field

from ayllu.engine.openai.body import InvalidBodyError, Strict, validated
from ayllu.errors import ForbiddenError, UsageError
from ayllu.server.access import ADMIN, ADMIN_OF_ANY, OWN, SIGNED_IN, Identity, caller
from ayllu.server.bodies import read_json
from ayllu.server.limits import LIMIT_NAMES
from ayllu.server.replies import JsonReply
from ayllu.server.routes.common import documented, new_router, services_of
from ayllu.server.routes.sign_in import user_object
from ayllu.server.state import audit, keys, options, passwords, sign_in, users
from ayllu.server.state.records import Key, Role, Scope
from ayllu.settings import describe, with_stored

router = new_router("Administration")

LINK_LIFETIME_S = 24 * 3600.0
MOST_DAYS = 3650


class UserBody(Strict):
    name: str = Field(min_length=1, max_length=64)
    role: Role = "user"
    password: str | None = Field(default=None, min_length=10, max_length=1000)


class UserChange(Strict):
    name: str | None = Field(default=None, min_length=1, max_length=64)
    role: Role | None = None
    disabled: bool | None = None
    password: str | None = Field(default=None, min_length=10, max_length=1000)
    limits: dict[str, int] | None = None


class KeyBody(Strict):
    """expires_in_days None: it does not expire."""

    name: str = Field(min_length=1, max_length=64)
    scopes: list[Scope] = Field(default=["inference"], min_length=1, max_length=4)
    expires_in_days: int | None = Field(default=None, ge=1, le=MOST_DAYS)
    limits: dict[str, int] | None = None


class SettingBody(Strict):
    """value null: no longer stored, so the default counts again."""

    value: Any = None


def _checked_limits(limits: dict[str, int] | None) -> dict[str, int] | None:
    for name, value in (limits or {}).items():
        if name not in LIMIT_NAMES:
            raise InvalidBodyError(
                f"limits.{name[:40]} is no limit.", f"Known: {', '.join(LIMIT_NAMES)}.", param="limits"
            )
        if not 1 <= value <= 1 << 40:
            raise InvalidBodyError(
                f"limits.{name} is out of range.", "Use 1 to 2^40.", param=f"limits.{name}"
            )
    return limits


@router.get("/api/users", response_class=Response)
@ADMIN
async def listed_users(request: Request) -> Response:
    """Everybody who has an account."""
    found = await services_of(request).database.run(users.listed, read=True)
    return JsonReply({"users": [user_object(user) for user in found]})


@router.post("/api/users", openapi_extra=documented(UserBody), response_class=Response)
@ADMIN
async def add_user(request: Request) -> Response:
    """Make an account, and a one-time link for its first sign-in."""
    services = services_of(request)
    body = validated(UserBody, await read_json(request))
    hashed = None
    if body.password is not None:
        hashed = await asyncio.to_thread(passwords.hash_password, body.password)

    def make(db: Any) -> tuple[Any, str]:
        user = users.create(db, body.name, body.role, hashed)
        return user, sign_in.new_link(db, user.id, LINK_LIFETIME_S)

    user, token = await services.database.run(make)
    await services.audit(caller(request).actor, "user.add", user.name, role=user.role)
    return JsonReply({"user": user_object(user), "link": _link(request, token)}, 201)


@router.post("/api/users/{user_id}/link", response_class=Response)
@ADMIN_OF_ANY
async def new_link(request: Request, user_id: str) -> Response:
    """A one-time link that signs this user in."""
    services = services_of(request)

    def make(db: Any) -> str:
        users.get(db, user_id)
        return sign_in.new_link(db, user_id, LINK_LIFETIME_S)

    token = await services.database.run(make)
    await services.audit(caller(request).actor, "user.link", user_id)
    return JsonReply({"link": _link(request, token)}, 201)


def _link(request: Request, token: str) -> str:
    base = services_of(request).settings.public_url or str(request.base_url)
    return f"{base.rstrip('/')}/sign-in?token={token}"


@router.patch("/api/users/{user_id}", openapi_extra=documented(UserChange), response_class=Response)
@ADMIN_OF_ANY
async def change_user(request: Request, user_id: str) -> Response:
    """Change an account. Disabling it ends its sessions and keys at once."""
    services = services_of(request)
    body = validated(UserChange, await read_json(request))
    changes: dict[str, Any] = {
        name: getattr(body, name) for name in ("name", "role", "disabled") if getattr(body, name) is not None
    }
    if body.limits is not None:
        changes["limits"] = _checked_limits(body.limits)
    if body.password is not None:
        changes["password_hash"] = await asyncio.to_thread(passwords.hash_password, body.password)

    def change(db: Any) -> Any:
        user = users.update(db, user_id, **changes)
        if "password_hash" in changes or "role" in changes:
            sign_in.end_sessions(db, user_id)
        return user

    user = await services.database.run(change)
    shown = {name: value for name, value in changes.items() if name != "password_hash"}
    await services.audit(caller(request).actor, "user.change", user.name, changes=shown)
    return JsonReply({"user": user_object(user)})


@router.delete("/api/users/{user_id}", response_class=Response)
@ADMIN_OF_ANY
async def delete_user(request: Request, user_id: str) -> Response:
    """Delete an account with all that belongs to it."""
    services = services_of(request)
    await services.database.run(lambda db: users.delete(db, user_id))
    await services.audit(caller(request).actor, "user.delete", user_id)
    return JsonReply({"id": user_id, "deleted": True})


def key_object(key: Key) -> dict[str, Any]:
    """A key, as the API shows one: never the key itself."""
    return asdict(key)


@router.get("/api/keys", response_class=Response)
@SIGNED_IN
async def listed_keys(request: Request, all_users: bool = False) -> Response:
    """The caller's keys; an admin may ask for everybody's."""
    identity = caller(request)
    if all_users and "admin" not in identity.scopes:
        raise ForbiddenError("Only an admin sees everybody's keys.", "Leave all_users out.")
    whose = None if all_users else identity.user_id
    found = await services_of(request).database.run(lambda db: keys.listed(db, whose), read=True)
    return JsonReply({"keys": [key_object(key) for key in found]})


@router.post("/api/keys", openapi_extra=documented(KeyBody), response_class=Response)
@SIGNED_IN
async def add_key(request: Request) -> Response:
    """Make a key. It is shown this once."""
    services = services_of(request)
    identity = caller(request)
    body = validated(KeyBody, await read_json(request))
    _require_may_give(identity, body)
    limits = _checked_limits(body.limits)
    expires_at = None if body.expires_in_days is None else time.time() + 86400 * body.expires_in_days
    if identity.key is not None and identity.key.expires_at is not None:
        expires_at = min(expires_at or identity.key.expires_at, identity.key.expires_at)
    key, plain = await services.database.run(
        lambda db: keys.create(db, identity.user_id, body.name, tuple(body.scopes), expires_at, limits)
    )
    await services.audit(identity.actor, "key.add", key.prefix, scopes=list(body.scopes))
    return JsonReply({"key": plain, **key_object(key)}, 201)


def _require_may_give(identity: Identity, body: KeyBody) -> None:
    """A key may not make a mightier one."""
    beyond = sorted(set(body.scopes) - identity.scopes)
    if beyond:
        raise ForbiddenError(
            f"The caller cannot give the scope {beyond[0]!r}.", f"Use: {', '.join(sorted(identity.scopes))}."
        )
    if identity.key is not None and "admin" not in identity.scopes:
        raise ForbiddenError(
            "A key makes no other keys, unless it has the scope 'admin'.", "Sign in for that."
        )


@router.delete("/api/keys/{key_id}", response_class=Response)
@OWN
async def revoke_key(request: Request, key_id: str) -> Response:
    """Revoke a key, at once. An admin may revoke anybody's."""
    services = services_of(request)
    identity = caller(request)
    own_key = None if identity.key is None else identity.key.id
    if own_key not in (None, key_id) and "admin" not in identity.scopes:
        raise ForbiddenError("A key revokes no other keys, unless it has the scope 'admin'.", "Sign in.")
    whose = None if "admin" in identity.scopes else identity.user_id
    key = await services.database.run(lambda db: keys.revoke(db, key_id, whose))
    await services.audit(identity.actor, "key.revoke", key.prefix)
    return JsonReply(key_object(key))


@router.get("/api/settings", response_class=Response)
@ADMIN
async def settings(request: Request) -> Response:
    """Every setting, its value and where it came from."""
    return JsonReply({"settings": [_knob(knob) for knob in describe(services_of(request).settings)]})


def _knob(knob: Any) -> dict[str, Any]:
    shown = asdict(knob)
    value = shown["value"]
    if isinstance(value, tuple):
        shown["value"] = list(value)
    elif value is not None and not isinstance(value, str | int | float | bool):
        shown["value"] = str(value)
    return shown


@router.put("/api/settings/{name}", openapi_extra=documented(SettingBody), response_class=Response)
@ADMIN_OF_ANY
async def set_setting(request: Request, name: str) -> Response:
    """Store a setting that may change while the server runs. What a flag, the environment or a file sets
    cannot be changed here."""
    services = services_of(request)
    body = validated(SettingBody, await read_json(request))
    knob = next((knob for knob in describe(services.settings) if knob.name == name), None)
    if knob is None or not knob.live:
        raise UsageError(
            f"{name[:60]!r} is no setting that can be changed here.", "GET /api/settings lists them."
        )
    if knob.pinned:
        raise UsageError(f"{name} is set by {knob.origin}.", "Change it there.")
    identity = caller(request)
    if body.value is None:
        await services.database.run(lambda db: options.remove(db, name))
    else:
        with_stored(services.given, {name: body.value}, strict=True)
        await services.database.run(lambda db: options.put(db, name, body.value, identity.user_id))
    await services.apply_stored()
    await services.audit(identity.actor, "setting.set", name, value=body.value)
    return await settings(request)


@router.get("/api/audit", response_class=Response)
@ADMIN
async def audit_log(request: Request, after: int = 0, limit: int = 100) -> Response:
    """What was done by whom, oldest first."""
    most = max(1, min(limit, 1000))
    start = max(0, min(after, 1 << 62))
    found = await services_of(request).database.run(lambda db: audit.listed(db, start, most), read=True)
    return JsonReply({"entries": [asdict(entry) for entry in found]})


@router.post("/api/audit/verify", response_class=Response)
@ADMIN
async def verify_audit(request: Request) -> Response:
    """Check the audit log's chain of hashes."""
    return JsonReply({"verified": await services_of(request).database.run(audit.verify, read=True)})
