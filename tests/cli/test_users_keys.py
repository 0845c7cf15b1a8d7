"""`ayllu users` and `ayllu keys`: changes reach the database and the audit log, and no secret leaks."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from ayllu.cli import keys as keys_command
from ayllu.cli import users as users_command
from ayllu.errors import AylluError, ConflictError, NotFoundError, UsageError
from ayllu.server.state import audit, keys, sign_in, users
from ayllu.server.state.database import Database
from ayllu.server.state.passwords import verify_password

PASSWORD = "correct horse 電池"
Run = Callable[..., Result]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("users", "list")`, on a database of the test's own."""
    monkeypatch.setenv("AYLLU_CONFIG", str(tmp_path / "ayllu.toml"))
    (tmp_path / "ayllu.toml").write_text("", encoding="utf-8")
    monkeypatch.setenv("AYLLU_DATA", str(tmp_path / "server"))
    apps = {"users": users_command.app, "keys": keys_command.app}

    def invoke(group: str, *arguments: str, given: str | None = None) -> Result:
        result = CliRunner().invoke(apps[group], list(arguments), input=given)
        if isinstance(result.exception, AylluError):
            raise result.exception
        return result

    return invoke


def _read(tmp_path: Path, work: Callable[[Any], Any]) -> Any:
    database = Database.open(None, tmp_path / "server")
    try:
        return database.now(work)
    finally:
        database.close()


def _with_admin(run: Run) -> None:
    assert run("users", "add", "ana", "--role", "admin").exit_code == 0


def test_a_new_user_gets_a_link_that_signs_in_once(run: Run, tmp_path: Path) -> None:
    result = run("users", "add", "Ana", "--role", "admin", "--url", "https://ayllu.example/")
    address, token = result.stdout.strip().split("/sign-in?token=")
    assert address == "https://ayllu.example"
    assert token not in result.stderr
    assert _read(tmp_path, lambda db: sign_in.redeem_link(db, token)).name == "Ana"
    assert _read(tmp_path, lambda db: sign_in.redeem_link(db, token)) is None


def test_a_link_leads_to_where_the_settings_say_the_server_is(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    _with_admin(run)
    assert run("users", "link", "ana").stdout.startswith("http://127.0.0.1:8420/sign-in?token=")
    monkeypatch.setenv("AYLLU_PUBLIC_URL", "https://proxy.example/ayllu/")
    assert run("users", "link", "ANA").stdout.startswith("https://proxy.example/ayllu/sign-in?token=")
    assert json.loads(run("users", "link", "ana", "--json").stdout)["link"].startswith("https://proxy")


def test_the_first_account_is_an_admins(run: Run) -> None:
    # Otherwise the server, which makes an admin only where nobody is, would have none for ever.
    with pytest.raises(UsageError, match="--role admin"):
        run("users", "add", "bob")
    _with_admin(run)
    assert run("users", "add", "bob").exit_code == 0


def test_a_password_is_read_from_standard_input_and_is_nowhere_else(run: Run, tmp_path: Path) -> None:
    result = run("users", "add", "ana", "--role", "admin", "--password-stdin", given=PASSWORD + "\n")
    assert (result.exit_code, result.stdout) == (0, "")
    user, stored = _read(tmp_path, lambda db: users.password_hash(db, "ana"))
    assert verify_password(stored, PASSWORD)
    session = _read(tmp_path, lambda db: sign_in.new_session(db, user.id, 60, ""))[1]
    result = run("users", "password", "ana", "--password-stdin", given="another " + PASSWORD)
    assert PASSWORD not in result.output
    assert verify_password(
        _read(tmp_path, lambda db: users.password_hash(db, "ana"))[1], "another " + PASSWORD
    )
    assert _read(tmp_path, lambda db: sign_in.find_session(db, session)) is None
    written = repr(_read(tmp_path, audit.listed))
    assert PASSWORD not in written
    assert "argon2" not in written


@pytest.mark.parametrize("given", ["short", "", "x" * 1001, "x" * 100_000])
def test_a_password_of_the_wrong_length_changes_nothing(run: Run, tmp_path: Path, given: str) -> None:
    _with_admin(run)
    with pytest.raises(UsageError, match="10 to 1000"):
        run("users", "password", "ana", "--password-stdin", given=given)
    assert not _read(tmp_path, users.listed)[0].has_password


def test_a_password_cannot_be_an_argument(run: Run) -> None:
    assert run("users", "password", "ana", "--password", PASSWORD).exit_code == 2
    assert run("users", "password", "ana", PASSWORD).exit_code == 2
    with pytest.raises(NotFoundError):
        run("users", "password", "nobody", "--password-stdin", given=PASSWORD)


def test_without_a_terminal_a_password_is_not_asked(run: Run) -> None:
    _with_admin(run)
    with pytest.raises(UsageError, match="--password-stdin"):
        run("users", "password", "ana", given=PASSWORD)


def test_users_are_changed_listed_and_removed(run: Run) -> None:
    _with_admin(run)
    run("users", "add", "bob")
    run("users", "set", "bob", "--name", "Bob 太郎", "--limit", "requests_per_minute=5", "--role", "admin")
    run("users", "set", "Bob 太郎", "--limit", "concurrent_requests=2", "--limit", "requests_per_minute=")
    (_, bob) = json.loads(run("users", "list", "--json").stdout)
    assert (bob["name"], bob["role"], bob["limits"]) == ("Bob 太郎", "admin", {"concurrent_requests": 2})
    run("users", "set", "Bob 太郎", "--disable")
    table = run("users", "list").stdout.splitlines()
    assert table[0].split() == ["name", "role", "state", "password", "since"]
    assert "disabled" in table[2]
    with pytest.raises(UsageError, match="--yes"):
        run("users", "remove", "Bob 太郎")
    assert run("users", "remove", "Bob 太郎", "--yes").exit_code == 0
    assert "太郎" not in run("users", "list").stdout


def test_the_last_admin_stays(run: Run) -> None:
    _with_admin(run)
    for arguments in (
        ("remove", "ana", "--yes"),
        ("set", "ana", "--disable"),
        ("set", "ana", "--role", "user"),
    ):
        with pytest.raises(ConflictError):
            run("users", *arguments)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (("link", "anna"), NotFoundError),
        (("set", "ana"), UsageError),
        (("set", "ana", "--limit", "requests=5"), UsageError),
        (("set", "ana", "--limit", "requests_per_minute"), UsageError),
        (("set", "ana", "--limit", "requests_per_minute=0"), UsageError),
        (("set", "ana", "--limit", "requests_per_minute=-1"), UsageError),
        (("set", "ana", "--limit", "requests_per_minute=²"), UsageError),
        (("add", "ANA"), ConflictError),
        (("link", "ana", "--url", "ayllu.example"), UsageError),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    run: Run, arguments: tuple[str, ...], error: type[AylluError]
) -> None:
    _with_admin(run)
    with pytest.raises(error) as caught:
        run("users", *arguments)
    assert caught.value.fix


def test_a_new_key_is_all_that_stands_on_standard_output(run: Run, tmp_path: Path) -> None:
    _with_admin(run)
    before = time.time()
    result = run("keys", "add", "--user", "ana", "--name", "ci", "--scope", "models", "--expires-days", "3")
    plain = result.stdout.removesuffix("\n")
    assert plain not in result.stderr
    key, user = _read(tmp_path, lambda db: keys.find(db, plain))
    assert (user.name, key.name, key.scopes) == ("ana", "ci", ("models",))
    assert 3 * 86400 <= key.expires_at - before < 3 * 86400 + 600
    assert plain not in repr(_read(tmp_path, audit.listed))
    assert plain not in run("keys", "list").stdout
    assert plain not in run("keys", "list", "--json").stdout


def test_a_key_for_inference_without_an_end_is_the_default(run: Run, tmp_path: Path) -> None:
    _with_admin(run)
    made = json.loads(run("keys", "add", "--user", "ana", "--name", "ci", "--json").stdout)
    assert (made["scopes"], made["expires_at"], made["user"]) == (["inference"], None, "ana")
    assert _read(tmp_path, lambda db: keys.find(db, made["key"]))[0].id == made["id"]


@pytest.mark.parametrize("how", ["id", "prefix", "whole", "as listed"])
def test_a_key_is_revoked_by_what_one_has_of_it(run: Run, tmp_path: Path, how: str) -> None:
    _with_admin(run)
    made = json.loads(run("keys", "add", "--user", "ana", "--name", "ci", "--json").stdout)
    kept = run("keys", "add", "--user", "ana", "--name", "other").stdout.strip()
    listed = run("keys", "list").stdout.splitlines()[
        -1 if "ci" in run("keys", "list").stdout.splitlines()[-1] else 1
    ]
    shown = {
        "id": made["id"],
        "prefix": made["prefix"],
        "whole": made["key"],
        "as listed": listed.split()[0],
    }[how]
    assert run("keys", "revoke", shown).exit_code == 0
    assert _read(tmp_path, lambda db: keys.find(db, made["key"])) is None
    assert _read(tmp_path, lambda db: keys.find(db, kept)) is not None
    assert "revoked" in run("keys", "list", "--user", "ana").stdout


@pytest.mark.parametrize("given", ["ay-", "ay-nothing", "", "key_", "…"])
def test_a_part_of_a_key_revokes_none(run: Run, given: str) -> None:
    _with_admin(run)
    run("keys", "add", "--user", "ana", "--name", "ci")
    with pytest.raises(NotFoundError):
        run("keys", "revoke", given)


def test_a_key_may_not_do_more_than_its_user(run: Run) -> None:
    _with_admin(run)
    run("users", "add", "bob")
    with pytest.raises(UsageError, match="no admin"):
        run("keys", "add", "--user", "bob", "--name", "ci", "--scope", "inference", "--scope", "admin")
    run("users", "set", "bob", "--disable")
    with pytest.raises(ConflictError, match="disabled"):
        run("keys", "add", "--user", "bob", "--name", "ci")
    with pytest.raises(ConflictError, match="disabled"):
        run("users", "link", "bob")


def test_every_action_is_in_the_audit_log(run: Run, tmp_path: Path) -> None:
    _with_admin(run)
    run("users", "add", "bob")
    run("users", "set", "bob", "--disable")
    run("users", "set", "bob", "--enable")
    run("users", "link", "bob")
    run("users", "password", "bob", "--password-stdin", given=PASSWORD)
    prefix = run("keys", "add", "--user", "bob", "--name", "ci").stdout[:10]
    run("keys", "revoke", prefix)
    run("users", "remove", "bob", "--yes")
    entries = _read(tmp_path, audit.listed)
    assert [(entry.action, entry.target) for entry in entries] == [
        ("user.add", "ana"),
        ("user.add", "bob"),
        ("user.change", "bob"),
        ("user.change", "bob"),
        ("user.link", "bob"),
        ("password.set", "bob"),
        ("key.add", prefix),
        ("key.revoke", prefix),
        ("user.delete", "bob"),
    ]
    assert {entry.actor for entry in entries} == {"command line"}
    assert _read(tmp_path, audit.verify) == len(entries)


def test_what_fails_leaves_no_line_in_the_audit_log(run: Run, tmp_path: Path) -> None:
    _with_admin(run)
    with pytest.raises(ConflictError):
        run("users", "add", "ana")
    assert len(_read(tmp_path, audit.listed)) == 1


def test_it_works_while_a_server_has_the_database_open(run: Run, tmp_path: Path) -> None:
    server = Database.open(None, tmp_path / "server")
    try:
        assert server.now(users.count) == 0
        _with_admin(run)
        plain = run("keys", "add", "--user", "ana", "--name", "ci").stdout.strip()
        assert server.now(lambda db: keys.find(db, plain), read=True) is not None
        run("keys", "revoke", plain)
        assert server.now(lambda db: keys.find(db, plain), read=True) is None
    finally:
        server.close()
