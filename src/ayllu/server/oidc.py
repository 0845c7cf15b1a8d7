"""Sign-in by an OpenID Connect provider: authorization code with PKCE, and a strict look at what comes back.

What a browser brings back is worth nothing by itself: the cookie names a sign-in that was begun here, once
and for ten minutes; the code is exchanged with the provider itself; the id token must be signed by one of its
keys, for this server, now, for this sign-in. Only public-key algorithms count: HS256 would take a public key
for a secret.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import math
import secrets
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import quote, urlencode, urlsplit

import httpx2

from ayllu.errors import MissingExtraError, SignInError, SourceError, UsageError, clip
from ayllu.settings import Settings

ALGORITHMS = ("RS256", "ES256")
SCOPE = "openid profile email"
SIGN_IN_LIFETIME_S = 600.0
MAX_PENDING = 10_000
"""Sign-ins begun and not ended; beyond, the oldest is forgotten."""
CACHE_S = 3600.0
"""For which what the provider says of itself, and its keys, are believed without asking again."""
CLOCK_SKEW_S = 60.0
REQUEST_TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 256 << 10
MAX_TOKEN_CHARACTERS = 32 << 10
MAX_PARAMETER_CHARACTERS = 4096
MAX_KEYS = 100
MIN_RSA_BITS = 2048
MAX_RSA_BITS = 8192
MAX_NAME = 255

_AGAIN = "Sign in again."
_CHECK = "Check oidc_issuer, and that the provider is reachable from here."


@dataclass(frozen=True, kw_only=True)
class OidcIdentity:
    """Whom the provider vouches for. Issuer and subject say who it is; the rest may change, or be made up."""

    issuer: str
    subject: str
    name: str
    email: str | None
    email_verified: bool
    admin: bool


@dataclass(frozen=True)
class _Pending:
    """A sign-in that was begun here."""

    state: str
    redirect_uri: str
    expires_at: float
    nonce: str = field(repr=False)
    verifier: str = field(repr=False)


@dataclass(frozen=True)
class _Provider:
    """What the provider says of itself."""

    authorization_endpoint: str
    token_endpoint: str
    jwks_uri: str
    secret_in_body: bool
    says_issuer: bool


class Oidc:
    """One provider. Sign-ins under way are kept in this process, so the browser must come back to it."""

    def __init__(
        self,
        settings: Settings,
        client: httpx2.AsyncClient | None = None,
        *,
        now: Callable[[], float] = time.time,
    ) -> None:
        try:
            import joserfc  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("Sign-in by OpenID Connect", "oidc") from error
        if not settings.oidc_issuer or not settings.oidc_client_id:
            raise UsageError(
                "Sign-in by OpenID Connect needs oidc_issuer and oidc_client_id.", "Set both, or neither."
            )
        self._issuer = settings.oidc_issuer
        _require_address(self._issuer, "oidc_issuer", UsageError, query=False)
        self._client_id = settings.oidc_client_id
        self._client_secret = settings.oidc_client_secret
        self._admins = frozenset(settings.oidc_admins)
        self._admin_emails = frozenset(name.casefold() for name in settings.oidc_admins if "@" in name)
        self._client = client
        self._now = now
        self._tls: ssl.SSLContext | None = None
        self._pending: dict[str, _Pending] = {}
        self._lock = asyncio.Lock()
        self._provider: tuple[float, _Provider] | None = None
        self._keys: tuple[float, list[dict[str, Any]]] | None = None

    async def start(self, redirect_uri: str) -> tuple[str, str]:
        """Where to send the browser, and the value of the cookie to give it. Raises SourceError."""
        provider = await self._known_provider()
        verifier = secrets.token_urlsafe(48)
        pending = _Pending(
            state=secrets.token_urlsafe(32),
            redirect_uri=redirect_uri,
            expires_at=self._now() + SIGN_IN_LIFETIME_S,
            nonce=secrets.token_urlsafe(32),
            verifier=verifier,
        )
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=")
        query = urlencode(
            {
                "response_type": "code",
                "client_id": self._client_id,
                "redirect_uri": redirect_uri,
                "scope": SCOPE,
                "state": pending.state,
                "nonce": pending.nonce,
                "code_challenge": challenge.decode(),
                "code_challenge_method": "S256",
            }
        )
        cookie = secrets.token_urlsafe(32)
        self._remember(cookie, pending)
        joint = "&" if "?" in provider.authorization_endpoint else "?"
        return f"{provider.authorization_endpoint}{joint}{query}", cookie

    async def finish(self, params: Mapping[str, str], cookie: str) -> OidcIdentity:
        """Who has come back, by the parameters of the callback and the cookie of `start`; works once.

        Raises SignInError for what is not as it should be, SourceError where the provider does not answer.
        """
        pending = self._pending.pop(_digest(cookie), None)
        if pending is None or pending.expires_at <= self._now():
            raise SignInError("This sign-in was not begun here, or is too old.", _AGAIN)
        if not _same(params.get("state", ""), pending.state):
            raise SignInError("The provider's answer belongs to another sign-in.", _AGAIN)
        provider = await self._known_provider()
        if (provider.says_issuer or "iss" in params) and params.get("iss") != self._issuer:
            raise SignInError("The answer comes from another provider than the one that was asked.", _AGAIN)
        if "error" in params:
            raise SignInError(f"The provider refused: {clip(params['error'], 60)}.", _AGAIN)
        code = params.get("code", "")
        if not 0 < len(code) <= MAX_PARAMETER_CHARACTERS:
            raise SignInError("The provider's answer holds no code.", _AGAIN)
        token = await self._exchange(provider, pending, code)
        return self._identity(_checked_claims(await self._verified(provider, token), self, pending.nonce))

    # What the claims are checked against.
    @property
    def issuer(self) -> str:
        return self._issuer

    @property
    def client_id(self) -> str:
        return self._client_id

    def now(self) -> float:
        return self._now()

    def _remember(self, cookie: str, pending: _Pending) -> None:
        """All live equally long, so the oldest come first."""
        now = self._now()
        while self._pending:
            oldest = next(iter(self._pending))
            if len(self._pending) < MAX_PENDING and self._pending[oldest].expires_at > now:
                break
            del self._pending[oldest]
        self._pending[_digest(cookie)] = pending

    def _identity(self, claims: Mapping[str, Any]) -> OidcIdentity:
        subject, email = claims["sub"], _text(claims, "email")
        verified = email is not None and claims.get("email_verified") is True
        admin = subject in self._admins or (
            verified and email is not None and email.casefold() in self._admin_emails
        )
        name = _text(claims, "name") or _text(claims, "preferred_username") or email or subject
        return OidcIdentity(
            issuer=self._issuer,
            subject=subject,
            name=name,
            email=email,
            email_verified=verified,
            admin=admin,
        )

    async def _known_provider(self) -> _Provider:
        async with self._lock:
            if self._provider is None or self._provider[0] <= self._now():
                self._provider = self._now() + CACHE_S, await self._discover()
            return self._provider[1]

    async def _discover(self) -> _Provider:
        address = f"{self._issuer.rstrip('/')}/.well-known/openid-configuration"
        said = await self._ask("GET", address)
        if said.get("issuer") != self._issuer:
            raise SourceError(
                f"The provider calls itself {clip(said.get('issuer'))}, not {clip(self._issuer)}.",
                "Set oidc_issuer exactly as the provider writes it, a final slash included.",
            )
        endpoints = {}
        for name in ("authorization_endpoint", "token_endpoint", "jwks_uri"):
            endpoint = said.get(name)
            if not isinstance(endpoint, str):
                raise SourceError(f"The provider names no {name}.", _CHECK)
            _require_address(
                endpoint, f"The provider's {name}", SourceError, loopback=_on_loopback(self._issuer)
            )
            endpoints[name] = endpoint
        methods = said.get("token_endpoint_auth_methods_supported")
        known = methods if isinstance(methods, list) else ["client_secret_basic"]
        return _Provider(
            **endpoints,
            secret_in_body="client_secret_basic" not in known and "client_secret_post" in known,
            says_issuer=said.get("authorization_response_iss_parameter_supported") is True,
        )

    async def _exchange(self, provider: _Provider, pending: _Pending, code: str) -> str:
        """The id token for a code."""
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": pending.redirect_uri,
            "code_verifier": pending.verifier,
        }
        headers = {"content-type": "application/x-www-form-urlencoded"}
        if self._client_secret is None or provider.secret_in_body:
            form["client_id"] = self._client_id
        if self._client_secret is not None and provider.secret_in_body:
            form["client_secret"] = self._client_secret
        elif self._client_secret is not None:
            pair = f"{quote(self._client_id, safe='')}:{quote(self._client_secret, safe='')}"
            headers["authorization"] = f"Basic {base64.b64encode(pair.encode()).decode()}"
        answer = await self._ask("POST", provider.token_endpoint, urlencode(form).encode(), headers)
        token = answer.get("id_token")
        if not isinstance(token, str) or not 0 < len(token) <= MAX_TOKEN_CHARACTERS or not token.isascii():
            raise SignInError("The provider's answer holds no id token.", _AGAIN)
        return token

    async def _verified(self, provider: _Provider, token: str) -> dict[str, Any]:
        """The claims of a token that one of the provider's keys signed."""
        algorithm, key_id = _header(token)
        found = _matching(await self._known_keys(provider), algorithm, key_id)
        if not found:  # the provider may have changed its keys since
            found = _matching(await self._known_keys(provider, again=True), algorithm, key_id)
        if len(found) != 1:
            raise SignInError("The id token is signed with a key that the provider does not name.", _AGAIN)
        return _decoded(token, found[0], algorithm)

    async def _known_keys(self, provider: _Provider, *, again: bool = False) -> list[dict[str, Any]]:
        async with self._lock:
            if again or self._keys is None or self._keys[0] <= self._now():
                keys = (await self._ask("GET", provider.jwks_uri)).get("keys")
                if not isinstance(keys, list) or len(keys) > MAX_KEYS:
                    raise SourceError("The provider's list of keys is none, or too long.", _CHECK)
                self._keys = self._now() + CACHE_S, [key for key in keys if isinstance(key, dict)]
            return self._keys[1]

    async def _ask(
        self, method: str, address: str, body: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> dict[str, Any]:
        """A JSON object from the provider, within bounds of size and time."""
        more = {"accept": "application/json", "accept-encoding": "identity", **(headers or {})}
        try:
            async with (
                asyncio.timeout(REQUEST_TIMEOUT_S),
                self._connected() as client,
                client.stream(
                    method, address, content=body, headers=more, follow_redirects=False
                ) as response,
            ):
                if response.status_code in (400, 401) and method == "POST":
                    raise SignInError(
                        "The provider does not accept the code, or this server's secret.", _AGAIN
                    )
                if response.status_code != 200:
                    raise SourceError(f"The provider answered {response.status_code}.", _CHECK)
                if response.headers.get("content-encoding", "identity") != "identity":
                    raise SourceError("The provider's answer is compressed, though it must not be.", _CHECK)
                received = bytearray()
                async for part in response.aiter_raw():
                    received += part
                    if len(received) > MAX_ANSWER_BYTES:
                        raise SourceError("The provider's answer is too large.", _CHECK)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, TimeoutError) as error:
            raise SourceError(f"The provider cannot be reached ({type(error).__name__}).", _CHECK) from error
        try:
            answer = json.loads(received)
        except (ValueError, RecursionError) as error:
            raise SourceError("The provider's answer is no JSON.", _CHECK) from error
        if not isinstance(answer, dict):
            raise SourceError("The provider's answer is no JSON object.", _CHECK)
        return answer

    @asynccontextmanager
    async def _connected(self) -> AsyncIterator[httpx2.AsyncClient]:
        if self._client is not None:
            yield self._client
            return
        if self._tls is None:  # reading the certificates takes tens of milliseconds
            self._tls = await asyncio.to_thread(httpx2.create_ssl_context)
        async with httpx2.AsyncClient(verify=self._tls, timeout=REQUEST_TIMEOUT_S) as client:
            yield client


def _header(token: str) -> tuple[str, str | None]:
    """Algorithm and key id of a signed token: what it claims, before anything is known of it."""
    try:
        first = token.split(".")[0]
        header = json.loads(base64.urlsafe_b64decode(first + "=" * (-len(first) % 4)))
        algorithm, key_id = header["alg"], header.get("kid")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise SignInError("The id token cannot be read.", _AGAIN) from error
    if algorithm not in ALGORITHMS or not isinstance(key_id, str | None):
        raise SignInError(
            f"The id token is signed by {clip(algorithm, 20)}, which is not accepted.",
            f"Let the provider sign with {' or '.join(ALGORITHMS)}.",
        )
    return str(algorithm), key_id


def _matching(keys: list[dict[str, Any]], algorithm: str, key_id: str | None) -> list[dict[str, Any]]:
    """The keys that may have signed it. Without a key id that is clear only where one could."""
    kind = {"RS256": "RSA", "ES256": "EC"}[algorithm]
    return [
        key
        for key in keys
        if key.get("kty") == kind
        and key.get("use", "sig") == "sig"
        and key.get("alg", algorithm) == algorithm
        and (kind != "EC" or key.get("crv") == "P-256")
        and (key_id is None or key.get("kid") == key_id)
    ]


_PUBLIC_PARTS = ("kty", "n", "e", "crv", "x", "y")


def _decoded(token: str, key: Mapping[str, Any], algorithm: str) -> dict[str, Any]:
    from joserfc import jwt
    from joserfc.errors import JoseError
    from joserfc.jwk import ECKey, RSAKey

    try:
        public = {name: key[name] for name in _PUBLIC_PARTS if name in key}
        if algorithm == "RS256":
            bits = (len(public["n"]) * 6) // 8 * 8
            if not MIN_RSA_BITS <= bits <= MAX_RSA_BITS:
                raise SignInError("The provider's key is of a size that is not accepted.", _AGAIN)
            return jwt.decode(token, RSAKey.import_key(public), algorithms=[algorithm]).claims
        return jwt.decode(token, ECKey.import_key(public), algorithms=[algorithm]).claims
    except (JoseError, ValueError, TypeError, LookupError, RecursionError) as error:
        raise SignInError("The id token's signature is not the provider's.", _AGAIN) from error


def _checked_claims(claims: dict[str, Any], asked: Oidc, nonce: str) -> dict[str, Any]:
    """The claims, if they are this provider's, for this server, now, and for this sign-in."""
    audience = claims.get("aud")
    audiences = audience if isinstance(audience, list) else [audience]
    party = claims.get("azp")
    subject = claims.get("sub")
    now = asked.now()
    wrong = (
        "issuer" if claims.get("iss") != asked.issuer
        else "audience" if asked.client_id not in audiences
        else "authorized party" if (party is not None or len(audiences) > 1) and party != asked.client_id
        else "lifetime" if not now < _time(claims, "exp") + CLOCK_SKEW_S
        else "time of issue" if not _time(claims, "iat") <= now + CLOCK_SKEW_S
        else "time" if "nbf" in claims and not _time(claims, "nbf") <= now + CLOCK_SKEW_S
        else "nonce" if not _same(claims.get("nonce"), nonce)
        else "subject" if not isinstance(subject, str) or not 0 < len(subject) <= MAX_NAME
        else None
    )  # fmt: skip
    if wrong is not None:
        raise SignInError(f"The id token has the wrong {wrong}.", _AGAIN)
    return claims


def _time(claims: Mapping[str, Any], name: str) -> float:
    """A finite time; not a number otherwise, which is neither before nor after anything."""
    value = claims.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        return float(value) if math.isfinite(value) else math.nan
    except OverflowError:
        return math.nan


def _text(claims: Mapping[str, Any], name: str) -> str | None:
    value = claims.get(name)
    return value[:MAX_NAME] if isinstance(value, str) and value.strip() else None


def _same(shown: object, expected: str) -> bool:
    return isinstance(shown, str) and hmac.compare_digest(shown.encode("utf-8", "replace"), expected.encode())


def _digest(cookie: str) -> str:
    """By which a cookie is found: the time of a lookup by the cookie itself could tell something of it."""
    return hashlib.sha256(cookie.encode("utf-8", "replace")).hexdigest()


def _require_address(
    address: str,
    what: str,
    refusal: type[UsageError | SourceError],
    *,
    loopback: bool = True,
    query: bool = True,
) -> None:
    """An https address without user and fragment; on this machine (loopback) http will do."""
    try:
        parts = urlsplit(address)
        plain = parts.hostname and "@" not in parts.netloc and "#" not in address and address.isprintable()
        plain = plain and (query or "?" not in address) and (parts.port is None or parts.port > 0)
    except ValueError:
        plain = False
    if not plain or not address.isascii() or " " in address:
        raise refusal(f"{what} is no plain address.", "It should look like https://accounts.example.com.")
    if parts.scheme != "https" and not (loopback and parts.scheme == "http" and _on_loopback(address)):
        raise refusal(f"{what} is not an https address.", "Use https: tokens must not travel readable.")


def _on_loopback(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
