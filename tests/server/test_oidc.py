"""Sign-in by OpenID Connect against a small provider on loopback: one way in, and every forgery refused."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import hmac
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import httpx2
import pytest
from joserfc import jwt
from joserfc.jwk import ECKey, RSAKey

from ayllu.errors import AylluError, SignInError, SourceError, UsageError
from ayllu.server import oidc as oidc_module
from ayllu.server.oidc import Oidc, OidcIdentity
from ayllu.settings import Settings

CLIENT = "ayllu-client"
SECRET = "a secret: with / signs"
CALLBACK = "http://127.0.0.1:8420/api/sign-in/oidc/callback"
RSA = RSAKey.generate_key(2048, {"kid": "rsa-1"}, auto_kid=False)
OTHER_RSA = RSAKey.generate_key(2048, {"kid": "rsa-1"}, auto_kid=False)
EC = ECKey.generate_key("P-256", {"kid": "ec-1"}, auto_kid=False)


class Provider:
    """An OpenID Connect provider whose every answer a test may bend."""

    def __init__(self) -> None:
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.answer(self, b"")

            def do_POST(self) -> None:
                outer.answer(self, self.rfile.read(int(self.headers["content-length"])))

            def log_message(self, *more: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.issuer = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()
        self.key: RSAKey | ECKey = RSA
        self.algorithm = "RS256"
        self.published: list[dict[str, Any]] = [key.as_dict(private=False) for key in (RSA, EC)]
        self.discovery: dict[str, Any] = {
            "issuer": self.issuer,
            "authorization_endpoint": f"{self.issuer}/authorize",
            "token_endpoint": f"{self.issuer}/token",
            "jwks_uri": f"{self.issuer}/keys",
        }
        self.claims: dict[str, Any] = {}
        self.sign: Callable[[dict[str, Any]], str] = self.signed
        self.bodies: dict[str, bytes] = {}
        self.codes: dict[str, tuple[str, str]] = {}
        self.asked: list[str] = []
        self.forms: list[dict[str, str]] = []
        self.authorizations: list[str | None] = []

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def visit(self, address: str) -> dict[str, str]:
        """The person agrees: what the browser brings back."""
        query = {name: values[0] for name, values in parse_qs(urlsplit(address).query).items()}
        assert query["response_type"] == "code"
        assert query["code_challenge_method"] == "S256"
        code = f"code-{len(self.codes)}"
        self.codes[code] = (query["code_challenge"], query["nonce"])
        return {"code": code, "state": query["state"]}

    def signed(self, claims: dict[str, Any]) -> str:
        header = {"alg": self.algorithm, "kid": self.key.kid}
        return jwt.encode(header, claims, self.key, algorithms=[self.algorithm])

    def answer(self, handler: BaseHTTPRequestHandler, body: bytes) -> None:
        path = urlsplit(handler.path).path
        self.asked.append(path)
        status, reply = 200, self.bodies.get(path)
        if reply is None and path == "/token":
            status, reply = self._token(handler, body)
        elif reply is None:
            said = {"keys": self.published} if path == "/keys" else self.discovery
            reply = json.dumps(said).encode()
        handler.send_response(status)
        handler.send_header("content-length", str(len(reply)))
        handler.end_headers()
        handler.wfile.write(reply)

    def _token(self, handler: BaseHTTPRequestHandler, body: bytes) -> tuple[int, bytes]:
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        self.forms.append(form)
        self.authorizations.append(handler.headers["authorization"])
        challenge, nonce = self.codes.pop(form["code"], ("", ""))
        proof = hashlib.sha256(form["code_verifier"].encode()).digest()
        if base64.urlsafe_b64encode(proof).rstrip(b"=").decode() != challenge:
            return 400, b'{"error": "invalid_grant"}'
        now = int(time.time())
        claims = {
            "iss": self.issuer,
            "sub": "person-7",
            "aud": CLIENT,
            "exp": now + 300,
            "iat": now,
            "nonce": nonce,
            "name": "Ana Quispe",
            "email": "Ana@Example.com",
            "email_verified": True,
            **self.claims,
        }
        claims = {name: value for name, value in claims.items() if value is not None}
        return 200, json.dumps({"id_token": self.sign(claims), "token_type": "Bearer"}).encode()


@pytest.fixture
def provider() -> Iterator[Provider]:
    made = Provider()
    yield made
    made.close()


def _settings(provider: Provider, **more: Any) -> Settings:
    given = {"oidc_issuer": provider.issuer, "oidc_client_id": CLIENT, "oidc_client_secret": SECRET, **more}
    return Settings(**given)


def _sign_in(
    provider: Provider,
    *,
    bend: Callable[[dict[str, str]], dict[str, str]] = dict,
    cookie: str | None = None,
    **settings: Any,
) -> OidcIdentity:
    async def work() -> OidcIdentity:
        async with httpx2.AsyncClient(trust_env=False) as client:
            signing_in = Oidc(_settings(provider, **settings), client)
            address, given = await signing_in.start(CALLBACK)
            back = bend(provider.visit(address))
            return await signing_in.finish(back, given if cookie is None else cookie)

    return asyncio.run(work())


@pytest.mark.parametrize(("key", "algorithm"), [(RSA, "RS256"), (EC, "ES256")])
def test_a_person_whom_the_provider_vouches_for_comes_in(
    provider: Provider, key: RSAKey | ECKey, algorithm: str
) -> None:
    provider.key, provider.algorithm = key, algorithm
    assert _sign_in(provider) == OidcIdentity(
        issuer=provider.issuer,
        subject="person-7",
        name="Ana Quispe",
        email="Ana@Example.com",
        email_verified=True,
        admin=False,
    )
    (form,) = provider.forms
    assert (form["redirect_uri"], form["grant_type"]) == (CALLBACK, "authorization_code")
    assert "client_secret" not in form
    pair = base64.b64encode(f"{CLIENT}:a%20secret%3A%20with%20%2F%20signs".encode()).decode()
    assert provider.authorizations == [f"Basic {pair}"]


def test_the_secret_goes_into_the_body_only_where_the_provider_takes_it_there_alone(
    provider: Provider,
) -> None:
    provider.discovery["token_endpoint_auth_methods_supported"] = ["client_secret_post"]
    _sign_in(provider)
    assert (provider.forms[0]["client_secret"], provider.authorizations) == (SECRET, [None])


def test_a_public_client_sends_its_name_alone(provider: Provider) -> None:
    _sign_in(provider, oidc_client_secret=None)
    assert (provider.forms[0]["client_id"], provider.authorizations) == (CLIENT, [None])
    assert "client_secret" not in provider.forms[0]


@pytest.mark.parametrize(
    ("admins", "claims", "admin"),
    [
        (("person-7",), {}, True),
        (("ana@example.com",), {}, True),
        (("ana@example.com",), {"email_verified": False}, False),
        (("ana@example.com",), {"email_verified": "true"}, False),
        (("ana@example.com",), {"email_verified": None}, False),
        (("PERSON-7", "person-70", "example.com"), {}, False),
        (("Ana Quispe",), {}, False),
    ],
)
def test_admins_are_named_by_subject_or_by_verified_address(
    provider: Provider, admins: tuple[str, ...], claims: dict[str, Any], admin: bool
) -> None:
    provider.claims = claims
    assert _sign_in(provider, oidc_admins=admins).admin is admin


@pytest.mark.parametrize(
    ("claims", "says"),
    [
        ({"iss": "http://127.0.0.1:1"}, "issuer"),
        ({"iss": None}, "issuer"),
        ({"aud": "another-client"}, "audience"),
        ({"aud": None}, "audience"),
        ({"aud": ["another-client"]}, "audience"),
        ({"aud": [CLIENT, "another-client"]}, "authorized party"),
        ({"azp": "another-client"}, "authorized party"),
        ({"exp": 1000}, "lifetime"),
        ({"exp": None}, "lifetime"),
        ({"exp": "9999999999"}, "lifetime"),
        ({"exp": True}, "lifetime"),
        ({"exp": float("inf")}, "lifetime"),
        ({"exp": 10**400}, "lifetime"),
        ({"iat": 9_999_999_999}, "time of issue"),
        ({"iat": None}, "time of issue"),
        ({"nbf": 9_999_999_999}, "time"),
        ({"nbf": "soon"}, "time"),
        ({"nonce": "another"}, "nonce"),
        ({"nonce": None}, "nonce"),
        ({"nonce": 7}, "nonce"),
        ({"sub": None}, "subject"),
        ({"sub": ""}, "subject"),
        ({"sub": 7}, "subject"),
        ({"sub": "s" * 256}, "subject"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_token_with_a_wrong_claim_is_refused(provider: Provider, claims: dict[str, Any], says: str) -> None:
    # Signed without the library's own checks, as a hostile provider would.
    provider.claims, provider.sign = claims, _signed_by_hand
    with pytest.raises(SignInError, match=f"wrong {says}"):
        _sign_in(provider)


def test_a_clock_that_is_a_little_off_refuses_nobody(provider: Provider) -> None:
    now = int(time.time())
    provider.claims = {"exp": now - 20, "iat": now + 30, "nbf": now + 30, "aud": [CLIENT], "azp": CLIENT}
    assert _sign_in(provider).subject == "person-7"


def _part(value: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(value).encode()).rstrip(b"=").decode()


def _signed_by_hand(claims: dict[str, Any]) -> str:
    from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
    from cryptography.hazmat.primitives.hashes import SHA256

    text = f"{_part({'alg': 'RS256', 'kid': 'rsa-1'})}.{_part(claims)}"
    signature = RSA.private_key.sign(text.encode(), PKCS1v15(), SHA256())
    return f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def _unsigned(claims: dict[str, Any]) -> str:
    return f"{_part({'alg': 'none'})}.{_part(claims)}."


def _unsigned_by_another_name(claims: dict[str, Any]) -> str:
    return f"{_part({'alg': 'RS256', 'kid': 'rsa-1'})}.{_part(claims)}."


def _hs256_by_public_key(claims: dict[str, Any]) -> str:
    text = f"{_part({'alg': 'HS256', 'kid': 'rsa-1'})}.{_part(claims)}"
    signature = hmac.digest(RSA.as_pem(private=False), text.encode(), "sha256")
    return f"{text}.{base64.urlsafe_b64encode(signature).rstrip(b'=').decode()}"


def _by_another_key(claims: dict[str, Any]) -> str:
    return jwt.encode({"alg": "RS256", "kid": "rsa-1"}, claims, OTHER_RSA, algorithms=["RS256"])


def _with_its_own_key(claims: dict[str, Any]) -> str:
    header = {"alg": "RS256", "jwk": OTHER_RSA.as_dict(private=False)}
    return jwt.encode(header, claims, OTHER_RSA, algorithms=["RS256"])


def _changed_afterwards(claims: dict[str, Any]) -> str:
    head, _, signature = _signed_by_hand(claims).split(".")
    return f"{head}.{_part(claims | {'sub': 'admin'})}.{signature}"


@pytest.mark.parametrize(
    "sign",
    [
        _unsigned,
        _unsigned_by_another_name,
        _hs256_by_public_key,
        _by_another_key,
        _with_its_own_key,
        _changed_afterwards,
        lambda claims: "",
        lambda claims: "a.b.c",
        lambda claims: _part([1]) + ".x.y",
        lambda claims: _part({"alg": ["RS256"]}) + ".x.y",
        lambda claims: _part({"alg": "RS256", "kid": 7}) + ".x.y",
        lambda claims: "é.é.é",
        lambda claims: "x" * 40_000,
        lambda claims: 7,
    ],
)
def test_a_token_that_no_key_of_the_provider_signed_is_refused(
    provider: Provider, sign: Callable[[dict[str, Any]], str]
) -> None:
    provider.sign = sign
    with pytest.raises(SignInError, match="id token"):
        _sign_in(provider)


def test_hs256_with_the_public_key_is_refused_also_where_the_provider_lists_a_shared_secret(
    provider: Provider,
) -> None:
    shared = base64.urlsafe_b64encode(RSA.as_pem(private=False)).decode()
    provider.published = [{"kty": "oct", "kid": "rsa-1", "alg": "HS256", "k": shared}]
    provider.sign = _hs256_by_public_key
    with pytest.raises(SignInError, match="HS256"):
        _sign_in(provider)


@pytest.mark.parametrize(
    "bend",
    [
        lambda back: {**back, "state": "another"},
        lambda back: {"code": back["code"]},
        lambda back: {"state": back["state"]},
        lambda back: {**back, "code": "x" * 5000},
        lambda back: {**back, "code": "made up"},
        lambda back: {**back, "iss": "https://another.example"},
        lambda back: {"state": back["state"], "error": "access_denied"},
    ],
)
def test_a_callback_that_is_not_the_answer_to_this_sign_in_is_refused(
    provider: Provider, bend: Callable[[dict[str, str]], dict[str, str]]
) -> None:
    with pytest.raises(SignInError):
        _sign_in(provider, bend=bend)


def test_a_provider_that_promises_to_name_itself_must_do_so(provider: Provider) -> None:
    # Otherwise an answer of another provider could be passed off as this one's (RFC 9207).
    provider.discovery["authorization_response_iss_parameter_supported"] = True
    with pytest.raises(SignInError, match="another provider"):
        _sign_in(provider)
    assert _sign_in(provider, bend=lambda back: {**back, "iss": provider.issuer}).subject == "person-7"


@pytest.mark.parametrize("cookie", ["", "another", "\udcff"])
def test_a_browser_that_did_not_begin_the_sign_in_cannot_end_it(provider: Provider, cookie: str) -> None:
    with pytest.raises(SignInError, match="not begun here"):
        _sign_in(provider, cookie=cookie)
    assert provider.forms == []


def _with_oidc(provider: Provider, work: Callable[[Oidc], Any], now: Callable[[], float] = time.time) -> Any:
    async def run() -> Any:
        async with httpx2.AsyncClient(trust_env=False) as client:
            return await work(Oidc(_settings(provider), client, now=now))

    return asyncio.run(run())


def test_an_answer_works_once_whether_it_was_right_or_wrong(provider: Provider) -> None:
    async def work(signing_in: Oidc) -> None:
        address, cookie = await signing_in.start(CALLBACK)
        back = provider.visit(address)
        await signing_in.finish(back, cookie)
        with pytest.raises(SignInError, match="not begun here"):
            await signing_in.finish(back, cookie)
        address, cookie = await signing_in.start(CALLBACK)
        back = provider.visit(address)
        with pytest.raises(SignInError, match="another sign-in"):
            await signing_in.finish(back | {"state": "guess"}, cookie)
        with pytest.raises(SignInError, match="not begun here"):
            await signing_in.finish(back, cookie)

    _with_oidc(provider, work)


def test_a_replayed_code_is_refused_in_another_sign_in(provider: Provider) -> None:
    async def work(signing_in: Oidc) -> None:
        address, _ = await signing_in.start(CALLBACK)
        stolen = provider.visit(address)["code"]
        address, cookie = await signing_in.start(CALLBACK)
        with pytest.raises(SignInError, match="does not accept the code"):
            await signing_in.finish(provider.visit(address) | {"code": stolen}, cookie)

    _with_oidc(provider, work)


def test_a_sign_in_is_forgotten_after_ten_minutes(provider: Provider) -> None:
    clock = [time.time()]

    async def work(signing_in: Oidc) -> None:
        address, cookie = await signing_in.start(CALLBACK)
        clock[0] += oidc_module.SIGN_IN_LIFETIME_S
        with pytest.raises(SignInError, match="too old"):
            await signing_in.finish(provider.visit(address), cookie)

    _with_oidc(provider, work, lambda: clock[0])


def test_sign_ins_that_nobody_ends_do_not_fill_the_memory(
    provider: Provider, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc_module, "MAX_PENDING", 5)

    async def work(signing_in: Oidc) -> None:
        begun = [await signing_in.start(CALLBACK) for _ in range(12)]
        assert len(signing_in._pending) == 5
        with pytest.raises(SignInError, match="not begun here"):
            await signing_in.finish(provider.visit(begun[0][0]), begun[0][1])
        assert (await signing_in.finish(provider.visit(begun[-1][0]), begun[-1][1])).subject == "person-7"

    _with_oidc(provider, work)


def test_what_the_provider_says_of_itself_is_asked_once_and_new_keys_when_one_is_unknown(
    provider: Provider,
) -> None:
    async def sign_in(signing_in: Oidc) -> None:
        address, cookie = await signing_in.start(CALLBACK)
        await signing_in.finish(provider.visit(address), cookie)

    async def work(signing_in: Oidc) -> None:
        await sign_in(signing_in)
        await sign_in(signing_in)
        assert [path for path in provider.asked if path != "/token"] == [
            "/.well-known/openid-configuration",
            "/keys",
        ]
        provider.key = RSAKey.generate_key(2048, {"kid": "rsa-2"}, auto_kid=False)
        with pytest.raises(SignInError, match="does not name"):
            await sign_in(signing_in)
        assert provider.asked.count("/keys") == 2, "asked again once, not more"
        provider.published.append(provider.key.as_dict(private=False))
        await sign_in(signing_in)
        assert provider.asked.count("/keys") == 3

    _with_oidc(provider, work)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"issuer": "http://127.0.0.1:1"}, "calls itself"),
        ({"issuer": None}, "calls itself"),
        ({"token_endpoint": None}, "names no token_endpoint"),
        ({"jwks_uri": "http://keys.example.com/"}, "not an https address"),
        ({"token_endpoint": "http://169.254.169.254/latest"}, "not an https address"),
        ({"authorization_endpoint": "javascript:alert(1)"}, "no plain address"),
        ({"authorization_endpoint": "https://user@example.com/"}, "no plain address"),
    ],
)
def test_a_provider_that_contradicts_its_address_is_refused(
    provider: Provider, change: dict[str, Any], says: str
) -> None:
    provider.discovery |= change
    with pytest.raises(SourceError, match=says):
        _sign_in(provider)


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/.well-known/openid-configuration", b"[]"),
        ("/.well-known/openid-configuration", b"x" * (300 << 10)),
        ("/.well-known/openid-configuration", b"[" * 100_000),
        ("/keys", b'{"keys": {}}'),
        ("/keys", b'{"keys": [%s]}' % b",".join([b"{}"] * 101)),
        ("/keys", b'{"keys": [1, {"kty": "RSA", "kid": "rsa-1"}]}'),
        ("/keys", b'{"keys": [{"kty": "RSA", "kid": "rsa-1", "n": 7, "e": []}]}'),
        ("/keys", b'{"keys": [{"kty": "RSA", "kid": "rsa-1", "n": "AQAB", "e": "AQAB"}]}'),
        ("/token", b"not JSON"),
        ("/token", b"{}"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_broken_answer_of_the_provider_is_an_error_that_says_so(
    provider: Provider, path: str, body: bytes
) -> None:
    provider.bodies[path] = body
    with pytest.raises((SourceError, SignInError)):
        _sign_in(provider)


def test_no_error_tells_a_secret(provider: Provider) -> None:
    provider.sign = _by_another_key
    with pytest.raises(AylluError) as caught:
        _sign_in(provider)
    assert SECRET not in str(caught.value)
    assert "eyJ" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"oidc_issuer": "http://accounts.example.com"},
        {"oidc_issuer": "https://user:word@accounts.example.com"},
        {"oidc_issuer": "https://accounts.example.com/?tenant=1"},
        {"oidc_issuer": "accounts.example.com"},
        {"oidc_issuer": "https://accounts.example.com:port"},
        {"oidc_client_id": None},
    ],
)
def test_settings_that_cannot_be_safe_are_refused_at_once(provider: Provider, settings: Any) -> None:
    with pytest.raises(UsageError):
        Oidc(_settings(provider, **settings))
