"""Who may call which route. Every route states its rule where it is written; one without cannot be defined.

A rule says what scope the caller needs and whose objects the ids in the path may name. `identify` finds out
who the caller is: by an API key in a header, or by the cookie of a session.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from fastapi import Request, Response
from fastapi.routing import APIRoute

from ayllu.errors import ForbiddenError, SignInError
from ayllu.server.guard import is_own_origin, public_origin
from ayllu.server.recent_callers import secret_of
from ayllu.server.state import keys, sign_in
from ayllu.server.state.records import Key, Scope, Session, User

if TYPE_CHECKING:
    from ayllu.server.state.database import Database

COOKIE = "ayllu_session"
ALL_SCOPES: frozenset[Scope] = frozenset(("inference", "models", "metrics", "admin"))
USER_SCOPES: frozenset[Scope] = frozenset(("inference",))
MAX_SECRET_CHARACTERS = 200

Owner = Literal["none", "caller", "admin"]
"""Whose objects a path may name. none: it names none. caller: the caller's own, others do not exist for them.
admin: anybody's, as only admins get there."""

Endpoint = TypeVar("Endpoint", bound=Callable[..., Any])
_RULE = "__access__"


@dataclass(frozen=True)
class Rule:
    """scope None: nobody need be signed in. owner: see `Owner`."""

    scope: Scope | Literal["signed-in"] | None
    owner: Owner = "none"


def access(rule: Rule) -> Callable[[Endpoint], Endpoint]:
    """State the rule of an endpoint."""

    def mark(endpoint: Endpoint) -> Endpoint:
        setattr(endpoint, _RULE, rule)
        return endpoint

    return mark


PUBLIC = access(Rule(None))
SIGNED_IN = access(Rule("signed-in"))
OWN = access(Rule("signed-in", "caller"))
INFERENCE = access(Rule("inference"))
OWN_INFERENCE = access(Rule("inference", "caller"))
MODELS = access(Rule("models"))
MODELS_BY_NAME = access(Rule("models", "admin"))
METRICS = access(Rule("metrics"))
ADMIN = access(Rule("admin"))
ADMIN_OF_ANY = access(Rule("admin", "admin"))


def rule_of(endpoint: Callable[..., Any]) -> Rule | None:
    """The rule that an endpoint states."""
    return getattr(endpoint, _RULE, None)


@dataclass(frozen=True)
class Identity:
    """Somebody who is signed in, by a key or a session."""

    user: User
    key: Key | None = None
    session: Session | None = None

    @property
    def user_id(self) -> str:
        return self.user.id

    @property
    def tenant(self) -> str:
        """Whose prompts share cached prefixes and a turn in the queue."""
        return self.user.id

    @property
    def scopes(self) -> frozenset[Scope]:
        """What the role allows, and of that what the key was given."""
        allowed = ALL_SCOPES if self.user.role == "admin" else USER_SCOPES
        return allowed if self.key is None else allowed & frozenset(self.key.scopes)

    @property
    def actor(self) -> str:
        """For the audit log: the user's name, and by which key."""
        return self.user.name if self.key is None else f"{self.user.name} (key {self.key.prefix})"


async def identify(request: Request, database: Database) -> Identity:
    """Who sent the request. Raises SignInError where that is nobody, or nobody any more."""
    secret = secret_of(request.headers)
    if secret is not None:
        found = None
        if len(secret) <= MAX_SECRET_CHARACTERS and secret.isascii():
            shown = secret
            found = await database.run(lambda db: keys.find(db, shown), read=True)
        if found is None:
            raise SignInError(
                "This API key is not valid: unknown, expired or revoked.",
                "Make one: `ayllu keys add`, or on the page of your keys.",
            )
        request.app.state.services.recent_callers.note(secret, found[1].id)
        return Identity(found[1], key=found[0])
    token = request.cookies.get(COOKIE)
    if token is not None and len(token) <= MAX_SECRET_CHARACTERS and token.isascii():
        _require_own_page(request, public_origin(request.app.state.services.settings))
        shown = token
        signed = await database.run(lambda db: sign_in.find_session(db, shown), read=True)
        if signed is not None:
            return Identity(signed[1], session=signed[0])
        raise SignInError("The sign-in has ended.", "Sign in again.")
    raise SignInError(
        "Nobody is signed in.", "Send an API key: Authorization: Bearer ay-… (make one: `ayllu keys add`)."
    )


def _require_own_page(request: Request, public: str | None) -> None:
    """A cookie goes with every request of a browser, whichever page sends it; only ours may act."""
    if request.method in ("GET", "HEAD", "OPTIONS"):
        return
    origin = request.headers.get("origin")
    site = request.headers.get("sec-fetch-site")
    host = request.headers.get("host", "")
    if (origin is not None and not is_own_origin(origin, host, public)) or (
        origin is None and site not in ("same-origin", "none")
    ):
        raise ForbiddenError(
            "A request with a session's cookie came from another page.",
            "Use the app's own page, or an API key.",
        )


class GuardedRoute(APIRoute):
    """A route whose caller is known, and allowed, before anything of the request's body is read."""

    def __init__(self, path: str, endpoint: Callable[..., Any], **more: Any) -> None:
        rule = rule_of(endpoint)
        if rule is None:
            raise TypeError(f"The route {path} states no access rule.")
        if re.search(r"\{", path) and rule.owner == "none":
            raise TypeError(f"The route {path} names objects, and its rule does not say whose.")
        self.rule = rule
        super().__init__(path, endpoint, **more)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()
        rule = rule_of(self.endpoint)

        async def guarded(request: Request) -> Response:
            request.state.route = self.path
            if rule is not None and rule.scope is not None:
                identity = await identify(request, request.app.state.services.database)
                request.state.identity = identity
                if rule.scope != "signed-in" and rule.scope not in identity.scopes:
                    request.app.state.services.metrics.auth_failed("forbidden")
                    raise ForbiddenError(
                        f"This needs the scope {rule.scope!r}, which the caller does not have.",
                        "Use another key, or ask an admin.",
                    )
            return await handle(request)

        return guarded


def caller(request: Request) -> Identity:
    """Who sent the request, in an endpoint that is not public."""
    identity: Identity = request.state.identity
    return identity
