"""Who may call what: every route of the app, by every kind of caller. The routes come from the app itself, so
a new one is tested by being there."""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fastapi import APIRouter

from ayllu.server import attempts
from ayllu.server.access import GuardedRoute, rule_of
from ayllu.server.app import create_app
from ayllu.server.state import conversations, keys, runs, sign_in, uploads, users
from tests.server.running import Running, running

PUBLIC = {
    "/health",
    "/healthz",
    "/ready",
    "/readyz",
    "/version",
    "/openapi.json",
    "/docs",
    "/docs/start.js",
    "/docs/swagger-ui.css",
    "/docs/swagger-ui-bundle.js",
    "/",
    "/sign-in",
    "/api/sign-in",
    "/api/sign-in/link",
    "/api/sign-in/oidc",
    "/api/sign-in/oidc/callback",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("access")) as one:
        yield one


def routes_of(server: Running) -> list[tuple[str, str, GuardedRoute]]:
    """(method, path, route) of everything that can be called."""
    app: Any = create_app(server.services)
    return [
        (method, route.path, route)
        for route in app.routes
        if isinstance(route, GuardedRoute)
        for method in sorted(route.methods or ())
    ]


def _belongings(server: Running, user: Any) -> dict[str, str]:
    """One of everything that `user` can own, by the name of the path parameter that names it."""

    def make(db: Any) -> dict[str, str]:
        conversation = conversations.create(db, user.id, title="private", settings={})
        run = runs.create(
            db, user_id=user.id, kind="response", model="tiny", request={"input_items": [{"id": "x"}]}
        )
        runs.append(db, run.id, 0, [{"type": "response.created", "secret": "private"}])
        runs.finish(db, run.id, "completed", {"id": run.id, "output": ["private"]}, None)
        file = uploads.create(
            db,
            user_id=user.id,
            name="private.txt",
            purpose="user_data",
            media_type="text/plain",
            chunks=[b"private"],
        )
        key, _ = keys.create(db, user.id, "private", ("inference",))
        session, _ = sign_in.new_session(db, user.id, 3600, "private")
        return {
            "conversation_id": conversation.id,
            "run_id": run.id,
            "response_id": run.id,
            "file_id": file.id,
            "key_id": key.id,
            "session_id": session.id,
            "user_id": user.id,
        }

    return server.database.now(make)


def _path(template: str, belongings: dict[str, str]) -> str:
    return re.sub(
        r"\{(\w+)(?::path)?\}", lambda match: belongings.get(match[1], secrets.token_hex(8)), template
    )


def _call(client: httpx2.Client, method: str, path: str) -> httpx2.Response:
    body = {} if method in ("GET", "DELETE", "HEAD") else {"json": {}}
    with client.stream(method, path, **body) as response:
        # Enough of a stream to judge it by; some have no end.
        if response.headers.get("content-type", "").startswith("text/event-stream"):
            return response
        response.read()
        return response


def test_every_route_states_a_rule_and_only_known_ones_are_public(server: Running) -> None:
    seen = routes_of(server)
    assert len(seen) > 60
    for _, path, route in seen:
        rule = rule_of(route.endpoint)
        assert rule is not None
        assert (rule.scope is None) == (path in PUBLIC), path
        assert rule.owner != "none" or "{" not in path, path


def test_a_route_without_a_rule_cannot_be_defined() -> None:
    router = APIRouter(route_class=GuardedRoute)
    with pytest.raises(TypeError, match="no access rule"):
        router.get("/forgotten")(lambda: None)


def test_nobody_gets_in_without_a_valid_key(server: Running) -> None:
    """No key, wrong, expired, revoked, of a disabled user, malformed: 401 from every route, before its body
    is looked at."""
    expired = server.new_key(server.user, expires_at=time.time() - 1)
    revoked = server.new_key(server.user)
    server.database.now(
        lambda db: keys.revoke(
            db, next(k.id for k in keys.listed(db, server.user.id) if revoked.startswith(k.prefix)), None
        )
    )
    gone = server.database.now(lambda db: users.create(db, f"gone-{secrets.token_hex(4)}", "admin"))
    disabled = server.new_key(gone, "inference", "admin")
    server.database.now(lambda db: users.update(db, gone.id, disabled=True))
    shown = {
        "none": "",
        "wrong": "ay-" + "x" * 43,
        "expired": expired,
        "revoked": revoked,
        "disabled": disabled,
        "long": "ay-" + "y" * 5000,
    }
    tried = 0
    for name, key in shown.items():
        with server.client(key) as client:
            for method, path, route in routes_of(server):
                if route.rule.scope is None:
                    continue
                response = _call(client, method, _path(path, {}))
                assert response.status_code == 401, (name, method, path)
                assert "error" in response.json()
                tried += 1
    print(f"{tried} calls refused")


def test_what_is_anothers_does_not_exist(server: Running) -> None:
    """Every route that names an object, asked by another user for a real one and for one that never was: the
    same answer, and the object is untouched."""
    owner = server.database.now(lambda db: users.create(db, f"owner-{secrets.token_hex(4)}", "user"))
    belongings = _belongings(server, owner)
    tried = 0
    with server.client() as client:
        for method, path, route in routes_of(server):
            if "{" not in path or route.rule.scope is None:
                continue
            anothers = _call(client, method, _path(path, belongings))
            nothing = _call(client, method, _path(path, {}))
            assert anothers.status_code in (400, 403, 404), (method, path, anothers.status_code)
            assert anothers.status_code == nothing.status_code, (method, path)
            for value in belongings.values():
                text = anothers.text.replace(_path(path, belongings), "")
                assert "private" not in text, (method, path)
                del value
            tried += 1
    assert tried > 20
    key = server.new_key(owner)
    with server.client(key) as client:
        for method, path in [
            ("GET", "/api/conversations/{conversation_id}"),
            ("GET", "/v1/responses/{response_id}"),
            ("GET", "/v1/files/{file_id}"),
            ("GET", "/v1/files/{file_id}/content"),
            ("GET", "/api/runs/{run_id}"),
        ]:
            assert _call(client, method, _path(path, belongings)).status_code == 200, path


def test_scopes_hold_on_every_route(server: Running) -> None:
    """A key of an admin with one scope opens the routes of that scope and no others; a plain user's key that
    somehow has all scopes opens no more than users may."""
    for scope in ("inference", "models", "metrics", "admin"):
        with server.client(server.new_key(server.admin, scope)) as client:
            for method, path, route in routes_of(server):
                if route.rule.scope in (None, "signed-in"):
                    continue
                if route.rule.scope == scope:
                    continue
                response = _call(client, method, _path(path, {}))
                assert response.status_code == 403, (scope, method, path)
    with server.client(server.new_key(server.user, "inference", "models", "metrics", "admin")) as client:
        for method, path, route in routes_of(server):
            if route.rule.scope in ("models", "metrics", "admin"):
                assert _call(client, method, _path(path, {})).status_code == 403, path


def test_a_key_cannot_make_a_mightier_key(server: Running) -> None:
    with server.client() as client:
        assert client.post("/api/keys", json={"name": "x", "scopes": ["admin"]}).status_code == 403
        assert client.post("/api/keys", json={"name": "x", "scopes": ["inference"]}).status_code == 403
    with server.client(server.new_key(server.admin, "admin")) as client:
        assert client.post("/api/keys", json={"name": "x", "scopes": ["inference"]}).status_code == 403
        assert client.post("/api/keys", json={"name": "x", "scopes": ["admin"]}).status_code == 201


def test_a_revoked_key_is_of_no_use_at_once(server: Running) -> None:
    key = server.new_key(server.user)
    with server.client(key) as client, server.client(server.admin_key) as admin:
        assert client.get("/v1/models").status_code == 200
        listed = admin.get("/api/keys", params={"all_users": True}).json()["keys"]
        key_id = next(one["id"] for one in listed if key.startswith(one["prefix"]))
        assert admin.delete(f"/api/keys/{key_id}").status_code == 200
        assert client.get("/v1/models").status_code == 401


def test_sign_out_really_ends_the_session(server: Running) -> None:
    token = server.database.now(lambda db: sign_in.new_link(db, server.user.id, 60))
    with server.client("") as client:
        assert client.post("/api/sign-in/link", json={"token": token}).status_code == 200
        cookie = client.cookies["ayllu_session"]
        assert client.get("/api/me").json()["user"]["name"] == "someone"
        own = {"origin": server.url}
        assert client.post("/api/sign-out", headers=own).status_code == 200
    with server.client("", cookies={"ayllu_session": cookie}) as client:
        assert client.get("/api/me").status_code == 401
    with server.client("") as client:
        assert client.post("/api/sign-in/link", json={"token": token}).status_code == 401


def test_another_page_cannot_use_a_session(server: Running) -> None:
    _, token = server.database.now(lambda db: sign_in.new_session(db, server.user.id, 60, "test"))
    with server.client("", cookies={"ayllu_session": token}) as client:
        body = {"json": {"title": "x"}}
        for headers in (
            {},
            {"origin": "https://evil.example"},
            {"origin": "null"},
            {"sec-fetch-site": "cross-site"},
        ):
            assert client.post("/api/conversations", headers=headers, **body).status_code == 403, headers
        assert client.post("/api/conversations", headers={"origin": server.url}, **body).status_code == 201


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:80",
        "127.0.0.1.evil.example",
        "localhost.evil.example",
        "",
        "user@evil.example",
        "[::1",
        "evil.example#127.0.0.1",
        "xn--e1afmkfd.example",
        "metadata.internal",
        "a" * 300,
        "127.0.0.1@evil.example",
    ],
)
def test_a_name_that_is_not_ours_is_refused(server: Running, host: str) -> None:
    """DNS rebinding: somebody's name points to this machine, and their page asks under that name."""
    with server.client() as client:
        assert client.get("/v1/models", headers={"host": host}).status_code in (400, 403)


def test_passwords_are_tried_only_so_often(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # However slow the machine is, the first failure must not be old when the last comes.
    monkeypatch.setattr(attempts, "WINDOW_S", 3600.0)
    with running(tmp_path, load=False) as server, server.client("") as client:
        said = [
            client.post("/api/sign-in", json={"name": "admin", "password": f"wrong {n}"}).status_code
            for n in range(15)
        ]
        assert said[:10] == [401] * 10
        assert set(said[10:]) == {429}


def test_security_headers_are_on_every_response(server: Running) -> None:
    with server.client() as client:
        for path in ("/health", "/docs", "/v1/models", "/nowhere", "/v1/responses/none"):
            headers = client.get(path).headers
            assert headers["x-content-type-options"] == "nosniff"
            assert "frame-ancestors 'none'" in headers["content-security-policy"]
            assert headers["x-request-id"]
            assert "access-control-allow-origin" not in headers
