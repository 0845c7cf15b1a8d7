"""What every request passes before a route sees it: its id, the name it came for, the page it came from; and
what every response leaves with: security headers, a line in the log, a count in the metrics."""

from __future__ import annotations

import ipaddress
import re
import secrets
import socket
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from fastapi import Request
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ayllu.engine.openai.results import error_body
from ayllu.errors import AylluError, ForbiddenError, OverloadedError
from ayllu.server.logs import request_context
from ayllu.server.recent_callers import secret_of
from ayllu.server.replies import error_reply
from ayllu.server.shapes import compact_json

if TYPE_CHECKING:
    from ayllu.server.services import Services
    from ayllu.settings import Settings

_REQUEST_ID = re.compile(r"[\w.:-]{1,128}", re.ASCII)

CONTENT_SECURITY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; connect-src 'self'; "
    "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
SECURITY_HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    # Not no-referrer: with that, browsers send the form of our own sign-in page as of no origin at all.
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": CONTENT_SECURITY,
}
CORS_METHODS = "GET, POST, PUT, PATCH, DELETE"
CORS_HEADERS = "authorization, content-type, x-api-key, x-request-id, anthropic-version, anthropic-beta"


GENERATING = frozenset(("/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"))


class Guard:
    """ASGI middleware, the outermost."""

    def __init__(self, app: ASGIApp, services: Services) -> None:
        self._app = app
        self._services = services
        settings = services.settings
        public = urlsplit(settings.public_url or "").hostname
        self._public_origin = public_origin(settings)
        self._hosts = {
            name.lower()
            for name in ("localhost", socket.gethostname(), settings.host, public, *settings.allowed_hosts)
            if name
        }
        self._origins = frozenset(origin.rstrip("/") for origin in settings.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.monotonic()
        headers = _headers(scope["headers"])
        request_id = headers.get("x-request-id", "")
        if not _REQUEST_ID.fullmatch(request_id):
            request_id = secrets.token_hex(16)
        state: dict[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        status = 0
        origin = self._allowed_origin(headers)

        async def sending(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                mutable = MutableHeaders(raw=message.setdefault("headers", []))
                mutable["x-request-id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    mutable.setdefault(name, value)
                mutable.setdefault("cache-control", "no-store")
                if origin is not None:
                    mutable["access-control-allow-origin"] = origin
                    mutable["vary"] = "origin"
            await send(message)

        try:
            if (refusal := self._refusal(headers, scope)) is not None:
                await _refuse(sending, refusal)
            elif scope["method"] == "OPTIONS" and origin is not None:
                await _preflight(sending)
            elif (full := self._full(headers, scope)) is not None:
                state["route"] = scope["path"]
                await error_reply(Request(scope), full)(scope, receive, sending)
            else:
                with (
                    request_context(request_id),
                    self._services.telemetry.request(scope["method"], headers) as span,
                ):
                    await self._app(scope, receive, sending)
                    span.ended(state.get("route", ""), status)
        except Exception:
            # Answered further out, or cut off: not what the client did.
            status = status or 500
            raise
        finally:
            elapsed = time.monotonic() - started
            route = state.get("route", "other")
            self._services.metrics.http(route, scope["method"], status or 499, elapsed)
            self._services.log.access(
                request_id=request_id,
                method=scope["method"],
                route=route,
                status=status or 499,
                seconds=elapsed,
                identity=state.get("identity"),
                client=(scope.get("client") or ("", 0))[0],
            )

    def _full(self, headers: dict[str, str], scope: Scope) -> AylluError | None:
        """Why a request for an answer has no chance now, seen before it costs anything. In a flood most have
        none, and reading each of them would take the processor from those that were let in."""
        if scope["method"] != "POST" or scope["path"] not in GENERATING:
            return None
        user_id = self._services.recent_callers.user_of(secret_of(headers))
        if user_id is None:
            return None
        try:
            self._services.limiter.require_room(user_id)
        except OverloadedError as error:
            self._services.metrics.refused("limit")
            return error
        return None

    def _refusal(self, headers: dict[str, str], scope: Scope) -> AylluError | None:
        host = headers.get("host", "")
        if not self._is_ours(host):
            return ForbiddenError(
                f"This server is not called {host[:80]!r}.", "Set allowed_hosts, if it should be."
            )
        origin = headers.get("origin")
        if (
            origin is None
            or origin.rstrip("/") in self._origins
            or is_own_origin(origin, host, self._public_origin)
        ):
            return None
        if scope["method"] in ("GET", "HEAD") and "authorization" not in headers and "cookie" not in headers:
            return None  # it learns nothing: the browser keeps the answer from the page
        return ForbiddenError(
            f"Pages of {origin[:80]!r} may not use this server.", "Set allowed_origins, if they should."
        )

    def _is_ours(self, host: str) -> bool:
        """Whether the Host header names this server. An address is always a name of it: only a name that
        somebody else controls can be made to point here (DNS rebinding)."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self._hosts:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True

    def _allowed_origin(self, headers: dict[str, str]) -> str | None:
        origin = headers.get("origin")
        return origin if origin is not None and origin.rstrip("/") in self._origins else None


def public_origin(settings: Settings) -> str | None:
    """The origin of the server's own pages, where a proxy may give the server another name."""
    parts = urlsplit(settings.public_url or "")
    return f"{parts.scheme}://{parts.netloc}" if parts.netloc else None


def is_own_origin(origin: str, host: str, public: str | None) -> bool:
    """Whether a page of `origin` came from this server, which was asked as `host`."""
    name = origin.partition("://")[2]
    return origin == public or (bool(name) and name == host)


def _headers(raw: Iterable[tuple[bytes, bytes]]) -> dict[str, str]:
    return {name.decode("latin-1"): value.decode("latin-1") for name, value in raw}


async def _refuse(send: Send, error: AylluError) -> None:
    body = compact_json(error_body(error)).encode()
    await _respond(send, error.http_status, [(b"content-type", b"application/json")], body)


async def _preflight(send: Send) -> None:
    headers = [
        (b"access-control-allow-methods", CORS_METHODS.encode()),
        (b"access-control-allow-headers", CORS_HEADERS.encode()),
        (b"access-control-max-age", b"600"),
    ]
    await _respond(send, 204, headers, b"")


async def _respond(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    headers = [*headers, (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
