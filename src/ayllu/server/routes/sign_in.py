"""Signing in and out: by a one-time link, by a password, by an OpenID Connect provider.

A session's cookie is of no use to scripts or other pages, and ends when its user signs out, is disabled, or
ends it from another browser.
"""

from __future__ import annotations

import asyncio
import ipaddress
from dataclasses import asdict
from html import escape
from typing import Any
from urllib.parse import parse_qs

from fastapi import Request, Response
from pydantic import Field
from starlette.responses import HTMLResponse, RedirectResponse

from ayllu.engine.openai.body import Strict, validated
from ayllu.errors import AylluError, ForbiddenError, NotFoundError, SignInError
from ayllu.server.access import COOKIE, OWN, PUBLIC, SIGNED_IN, Identity, caller
from ayllu.server.attempts import Attempts
from ayllu.server.bodies import read_body, read_json
from ayllu.server.oidc import OidcIdentity
from ayllu.server.replies import JsonReply
from ayllu.server.routes.common import documented, new_router, services_of
from ayllu.server.services import Services
from ayllu.server.state import passwords, sign_in, users
from ayllu.server.state.records import User

router = new_router("Sign-in")

OIDC_COOKIE = "ayllu_oidc"


class PasswordBody(Strict):
    name: str = Field(min_length=1, max_length=64)
    password: str = Field(min_length=1, max_length=1000)


class LinkBody(Strict):
    token: str = Field(min_length=1, max_length=200)


class NewPasswordBody(Strict):
    password: str = Field(min_length=10, max_length=1000)


def user_object(user: User) -> dict[str, Any]:
    """A user, as the API shows one."""
    return asdict(user)


def _attempts(request: Request) -> Attempts:
    attempts: Attempts = request.app.state.attempts
    return attempts


@router.post("/api/sign-in", openapi_extra=documented(PasswordBody), response_class=Response)
@PUBLIC
async def by_password(request: Request) -> Response:
    """Sign in with a name and a password."""
    services = services_of(request)
    body = validated(PasswordBody, await read_json(request, max_bytes=16 << 10))
    who = (_client(request), f"name {body.name.casefold()}")
    _attempts(request).require(*who)
    _attempts(request).failed(*who)
    found = await services.database.run(lambda db: users.password_hash(db, body.name), read=True)
    # The same work for a user who does not exist: how long it takes must not tell.
    async with _attempts(request).turn:
        right = await asyncio.to_thread(passwords.verify_password, found[1] if found else None, body.password)
    if found is None or not right or found[0].disabled:
        services.metrics.auth_failed("password")
        raise SignInError("The name or the password is wrong.", "Try again, or ask an admin for a link.")
    _attempts(request).succeeded(*who)
    return await _signed_in(request, services, found[0], "password")


@router.post("/api/sign-in/link", openapi_extra=documented(LinkBody), response_class=Response)
@PUBLIC
async def by_link(request: Request) -> Response:
    """Sign in with the token of a one-time link."""
    body = validated(LinkBody, await read_json(request, max_bytes=16 << 10))
    user = await _redeemed(request, body.token)
    return await _signed_in(request, services_of(request), user, "link")


@router.get("/sign-in", response_class=HTMLResponse, include_in_schema=False)
@PUBLIC
async def link_page(request: Request, token: str = "") -> Response:
    """Where a one-time link leads. It is used by a click, not by being looked at: mail scanners and chat
    programs look at links too."""
    page = (
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width'>"
        "<title>ayllu</title><style>body{font:16px system-ui;display:grid;place-items:center;"
        "min-height:90vh}"
        "button{font:inherit;padding:.7em 1.6em;border-radius:.5em;border:1px solid #888}</style>"
        f'<form method=post action=/sign-in><input type=hidden name=token value="{escape(token[:200])}">'
        "<button autofocus>Sign in &middot; サインイン</button></form></html>"
    )
    return HTMLResponse(page)


@router.post("/sign-in", include_in_schema=False)
@PUBLIC
async def by_link_form(request: Request) -> Response:
    """The click."""
    fields = parse_qs((await read_body(request, max_bytes=4 << 10)).decode("utf-8", "replace"))
    user = await _redeemed(request, fields.get("token", [""])[0][:200])
    reply = RedirectResponse("/", 303)
    await _set_session(request, services_of(request), user, "link", reply)
    return reply


async def _redeemed(request: Request, token: str) -> User:
    services = services_of(request)
    _attempts(request).require(_client(request))
    user = await services.database.run(lambda db: sign_in.redeem_link(db, token)) if token else None
    if user is None or user.disabled:
        _attempts(request).failed(_client(request))
        services.metrics.auth_failed("link")
        raise SignInError("This link has been used, or is too old.", "Make one: ayllu users link NAME")
    return user


async def _signed_in(request: Request, services: Services, user: User, how: str) -> Response:
    reply = JsonReply({"user": user_object(user)})
    await _set_session(request, services, user, how, reply)
    return reply


async def _set_session(request: Request, services: Services, user: User, how: str, reply: Response) -> None:
    about = request.headers.get("user-agent", "")[:200]
    lifetime_s = services.settings.session_hours * 3600
    _, token = await services.database.run(lambda db: sign_in.new_session(db, user.id, lifetime_s, about))
    await services.audit(user.name, "sign-in", how)
    reply.set_cookie(
        COOKIE,
        token,
        max_age=int(lifetime_s),
        httponly=True,
        samesite="lax",
        secure=_is_secure(request, services),
        path="/",
    )


def _is_secure(request: Request, services: Services) -> bool:
    return request.url.scheme == "https" or (services.settings.public_url or "").startswith("https:")


def _client(request: Request) -> str:
    """The address that signs in. Behind a proxy it is the last that the proxy names, or one person's mistakes
    would keep everybody out; of IPv6 the network, of which everybody has all addresses."""
    address = request.client.host if request.client is not None else ""
    if services_of(request).settings.public_url:
        named = [address, *request.headers.getlist("x-forwarded-for")]
        address = named[-1].rpartition(",")[2].strip()[:64]
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    return address if ip.version == 4 else str(ipaddress.IPv6Network((int(ip) >> 64 << 64, 64)))


@router.post("/api/sign-out", response_class=Response)
@SIGNED_IN
async def sign_out(request: Request) -> Response:
    """End this session."""
    services = services_of(request)
    identity = caller(request)
    session = identity.session
    if session is not None:
        await services.database.run(lambda db: sign_in.end_session(db, session.id, identity.user_id))
        await services.audit(identity.actor, "sign-out")
    reply = JsonReply({"signed_out": session is not None})
    reply.delete_cookie(COOKIE, path="/")
    return reply


@router.get("/api/me", response_class=Response)
@SIGNED_IN
async def me(request: Request) -> Response:
    """Who the caller is, and what they may do."""
    identity = caller(request)
    return JsonReply({"user": user_object(identity.user), "scopes": sorted(identity.scopes)})


@router.put("/api/me/password", openapi_extra=documented(NewPasswordBody), response_class=Response)
@SIGNED_IN
async def set_password(request: Request) -> Response:
    """Set the caller's own password. Other sessions end."""
    services = services_of(request)
    identity = _in_a_session(caller(request))
    body = validated(NewPasswordBody, await read_json(request, max_bytes=16 << 10))
    hashed = await asyncio.to_thread(passwords.hash_password, body.password)

    def change(db: Any) -> None:
        users.update(db, identity.user_id, password_hash=hashed)
        sign_in.end_sessions(db, identity.user_id)

    await services.database.run(change)
    await services.audit(identity.actor, "password.set")
    return await _signed_in(request, services, identity.user, "new password")


def _in_a_session(identity: Identity) -> Identity:
    """A key alone must not become a way to sign in."""
    if identity.session is None:
        raise SignInError("This needs a signed-in person, not a key.", "Sign in first.")
    return identity


@router.get("/api/sessions", response_class=Response)
@SIGNED_IN
async def sessions(request: Request) -> Response:
    """Where the caller is signed in."""
    identity = caller(request)
    found = await services_of(request).database.run(
        lambda db: sign_in.sessions_of(db, identity.user_id), read=True
    )
    current = None if identity.session is None else identity.session.id
    return JsonReply({"sessions": [{**asdict(one), "current": one.id == current} for one in found]})


@router.delete("/api/sessions/{session_id}", response_class=Response)
@OWN
async def end_session(request: Request, session_id: str) -> Response:
    """Sign out another browser."""
    identity = caller(request)
    services = services_of(request)
    await services.database.run(lambda db: sign_in.end_session(db, session_id, identity.user_id))
    await services.audit(identity.actor, "session.end", session_id)
    return JsonReply({"id": session_id, "deleted": True})


@router.get("/api/sign-in/oidc", include_in_schema=False)
@PUBLIC
async def oidc_start(request: Request) -> Response:
    """Off to the provider."""
    services = services_of(request)
    if services.oidc is None:
        raise NotFoundError("No OpenID Connect provider is set up.", "Set oidc_issuer.")
    _attempts(request).require(_client(request))
    address, cookie = await services.oidc.start(_callback(request, services))
    reply = RedirectResponse(address, 303)
    secure = _is_secure(request, services)
    reply.set_cookie(OIDC_COOKIE, cookie, max_age=600, httponly=True, samesite="lax", secure=secure)
    return reply


@router.get("/api/sign-in/oidc/callback", include_in_schema=False)
@PUBLIC
async def oidc_finish(request: Request) -> Response:
    """Back from the provider: known people come in, new ones get an account."""
    services = services_of(request)
    if services.oidc is None:
        raise NotFoundError("No OpenID Connect provider is set up.", "Set oidc_issuer.")
    try:
        person = await services.oidc.finish(dict(request.query_params), request.cookies.get(OIDC_COOKIE, ""))
    except AylluError:
        _attempts(request).failed(_client(request))
        services.metrics.auth_failed("oidc")
        raise
    # Without a list of admins the provider says nothing of roles: those given here stay.
    admin = person.admin if services.settings.oidc_admins else None
    _require_allowed(services, person)
    user = await services.database.run(
        lambda db: users.signed_in_by_oidc(db, person.issuer, person.subject, person.name, admin=admin)
    )
    if user.disabled:
        raise SignInError("This account is disabled.", "Ask an admin.")
    reply = RedirectResponse("/", 303)
    await _set_session(request, services, user, "oidc", reply)
    reply.delete_cookie(OIDC_COOKIE)
    return reply


def _require_allowed(services: Services, person: OidcIdentity) -> None:
    """Raises ForbiddenError where the operator let in only some of those whom the provider knows."""
    allowed = {one.casefold() for one in services.settings.oidc_allowed}
    email = (person.email or "").casefold() if person.email_verified else ""
    names = {person.subject.casefold(), email, email.partition("@")[2]} - {""}
    if allowed and not (allowed & names or person.admin):
        raise ForbiddenError("This account may not use this server.", "Ask an admin.")


def _callback(request: Request, services: Services) -> str:
    base = services.settings.public_url or f"{request.url.scheme}://{request.headers.get('host', '')}"
    return f"{base.rstrip('/')}/api/sign-in/oidc/callback"
