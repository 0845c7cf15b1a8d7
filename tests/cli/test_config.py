"""`ayllu config`: each value with its origin, stored settings in their layer, secrets masked."""

from __future__ import annotations

import json
import logging
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from ayllu.cli.config import app
from ayllu.errors import AylluError, UsageError
from ayllu.server.state import options
from ayllu.server.state.database import Database
from ayllu.settings import Settings, describe, load_settings, with_stored


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A settings file and a data folder of the test's own."""
    (tmp_path / "ayllu.toml").write_text("session_hours = 8\n", encoding="utf-8")
    monkeypatch.setenv("AYLLU_CONFIG", str(tmp_path / "ayllu.toml"))
    monkeypatch.setenv("AYLLU_DATA", str(tmp_path / "server"))
    return tmp_path


def _run(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments))
    if isinstance(result.exception, AylluError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def _shown(*names: str) -> dict[str, dict[str, Any]]:
    return {knob["name"]: knob for knob in json.loads(_run("show", "--json", *names))}


def _store(home: Path, **values: Any) -> None:
    database = Database.open(None, home / "server")
    for name, value in values.items():
        database.now(lambda db, name=name, value=value: options.put(db, name, value, "ana"))
    database.close()


def test_every_setting_is_shown_with_its_description(home: Path) -> None:
    text = _run("show")
    for knob in fields(Settings):
        if knob.metadata:
            assert f"\n{knob.name} " in text
            assert knob.metadata["description"] in text
    assert len(_shown()) == sum(bool(knob.metadata) for knob in fields(Settings))


def test_a_stored_setting_comes_after_flag_environment_and_file_but_before_the_default(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _store(home, keep_alive_s=60, session_hours=2, requests_per_minute=7, user_bytes="2G")
    monkeypatch.setenv("AYLLU_REQUESTS_PER_MINUTE", "9")
    shown = _shown()
    found = {
        name: (shown[name]["value"], shown[name]["origin"], shown[name]["pinned"])
        for name in ("keep_alive_s", "session_hours", "requests_per_minute", "user_bytes", "port")
    }
    assert found == {
        "keep_alive_s": (60.0, "stored", False),
        "session_hours": (8.0, str(home / "ayllu.toml"), True),
        "requests_per_minute": (9, "AYLLU_REQUESTS_PER_MINUTE", True),
        "user_bytes": (2 << 30, "stored", False),
        "port": (8420, "default", False),
    }
    assert shown["session_hours"]["stored"] == 2
    text = _run("show", "session_hours", "keep_alive_s")
    assert "An admin stored 2, which does not count." in text
    assert "60.0  [stored]" in text
    flagged = with_stored(load_settings({"keep_alive_s": 5}), {"keep_alive_s": 60})
    assert (flagged.keep_alive_s, flagged.origin("keep_alive_s")) == (5, "flag")


@pytest.mark.parametrize(
    "stored",
    [
        {"keep_alive_s": "often"},
        {"keep_alive_s": -1},
        {"keep_alive_s": None},
        {"requests_per_minute": 1.5},
        {"requests_per_minute": [1]},
        {"port": 80},
        {"oidc_client_secret": "from the database"},
        {"no_such_setting": 1},
    ],
)
def test_a_stored_value_that_cannot_be_is_reported_and_ignored(
    stored: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    given = load_settings({})
    with caplog.at_level(logging.WARNING, "ayllu.settings"):
        assert with_stored(given, stored) == given
    assert next(iter(stored)) in caplog.text
    with pytest.raises(UsageError, match=next(iter(stored))):
        with_stored(given, stored, strict=True)


def test_a_setting_that_is_no_longer_stored_has_its_default_again() -> None:
    given = load_settings({})
    assert with_stored(given, {"keep_alive_s": 5}).keep_alive_s == 5
    assert with_stored(given, {}).keep_alive_s == Settings().keep_alive_s


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql://ayllu:pass-word@db:5432/ayllu", "postgresql://ayllu:***@db:5432/ayllu"),
        ("postgresql://ayllu:pass-word/@#?x@db/ayllu", "postgresql://ayllu:***@db/ayllu"),
        ("postgresql://ayllu@db/ayllu?password=pass-word", "postgresql://ayllu@db/ayllu?***"),
        ("postgresql://ayllu@db/ayllu", "postgresql://ayllu@db/ayllu"),
        ("pass-word", "***"),
        ("https://ayllu:pass-word@db", "***"),
    ],
)
def test_passwords_are_masked_everywhere(monkeypatch: pytest.MonkeyPatch, address: str, shown: str) -> None:
    monkeypatch.setenv("AYLLU_DATABASE", address)
    monkeypatch.setenv("AYLLU_OIDC_CLIENT_SECRET", "pass-word")
    monkeypatch.setenv("AYLLU_OTEL_ENDPOINT", "https://u:pass-word@collector/v1?key=pass-word")
    monkeypatch.setenv("AYLLU_ALLOWED_ORIGINS", "https://a.example, https://u:pass-word@b.example")
    knobs = {knob.name: knob for knob in describe(load_settings({}))}
    assert knobs["database"].value == shown
    assert knobs["oidc_client_secret"].value == "***"
    assert "pass-word" not in repr(knobs)


def test_a_secret_is_not_told_by_an_error_either(home: Path) -> None:
    (home / "ayllu.toml").write_text("oidc_client_secret = 1234567\n", encoding="utf-8")
    with pytest.raises(UsageError, match="oidc_client_secret") as caught:
        load_settings({})
    assert "1234567" not in str(caught.value)


def test_looking_makes_no_database(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run("show")
    assert not (home / "server").exists()
    monkeypatch.setenv("AYLLU_DATABASE", f"sqlite:///{home}/elsewhere.db")
    _run("show")
    assert not (home / "elsewhere.db").exists()


def test_a_database_that_cannot_be_read_hides_no_setting(home: Path) -> None:
    (home / "server").mkdir()
    (home / "server" / "ayllu.db").write_bytes(b"this is no database" * 100)
    text = _run("show", "port")
    assert "note: stored settings are not shown" in text
    assert "8420  [default]" in text


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(UsageError, match="Did you mean keep_alive_s"):
        _run("show", "keep_alive")


def test_the_path_of_the_settings_file_is_printed(home: Path) -> None:
    assert _run("path") == f"{home / 'ayllu.toml'}\n"
