"""Backups: of one moment, whole or not at all, and the same on either database."""

from __future__ import annotations

import errno
import json
import stat
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import select
from typer.testing import CliRunner

from ayllu.errors import ConflictError, IntegrityError, NoSpaceError, StateError
from ayllu.server.state import audit, backup, conversations, keys, runs, sign_in, tables, uploads, users
from ayllu.server.state.database import Database
from tests.server import postgres

KINDS = ["sqlite", "postgresql"]
KEPT = [table for table in tables.metadata.sorted_tables if table.name not in backup.LEFT_OUT]


@pytest.fixture
def opened(tmp_path: Path) -> Iterator[Any]:
    """Opens new databases of a kind."""
    made: list[Database] = []

    def one(kind: str) -> Database:
        if kind == "postgresql" and postgres.programs() is None:
            pytest.skip(postgres.HOW_TO_GET_IT)
        url = None if kind == "sqlite" else postgres.shared().new_database()
        made.append(Database.open(url, tmp_path / f"data{len(made)}"))
        return made[-1]

    yield one
    for database in made:
        database.close()


def fill(database: Database) -> None:
    def work(db: Any) -> None:
        ann = users.create(db, "Ann", "admin", "$argon2id$hash")
        talk = conversations.create(db, ann.id, title="東京 \x00 \ud800")
        conversations.add_message(db, talk.id, ann.id, None, "user", [{"type": "t", "text": "é😀\u2028"}])
        conversations.update(db, talk.id, ann.id, pinned=True)
        run = runs.create(db, user_id=ann.id, kind="response", model="m", request={"a": None})
        runs.append(db, run.id, 0, [{"n": 0.1}, {"n": 1e300}])
        uploads.create(
            db, user_id=ann.id, name="f", purpose="p", media_type="t", chunks=[bytes(range(256)) * 9000]
        )
        keys.create(db, ann.id, "k", ("inference",), expires_at=1e18)
        users.link_identity(db, ann.id, "iss", "1")
        sign_in.new_session(db, ann.id, 3600, "")
        sign_in.new_link(db, ann.id, 3600)
        for number in range(3):
            audit.record(db, "ann", "act", "日本 \x00", {"n": number / 3})

    database.now(work)


def content_of(database: Database) -> dict[str, list[Any]]:
    def read(db: Any) -> dict[str, list[Any]]:
        return {
            table.name: [tuple(row) for row in db.execute(select(table).order_by(*table.primary_key.columns))]
            for table in KEPT
        }

    return database.now(read, read=True)


@pytest.mark.parametrize("target", KINDS)
@pytest.mark.parametrize("source", KINDS)
def test_a_backup_restores_everything_into_either_database(
    opened: Any, tmp_path: Path, source: str, target: str
) -> None:
    first, second = opened(source), opened(target)
    fill(first)
    file = tmp_path / "b" / "x.zip"
    made = backup.write(first.engines, file)
    assert stat.S_IMODE(file.stat().st_mode) == 0o600 and [*file.parent.iterdir()] == [file]
    backup.restore(second.engines, file)
    before = content_of(first)
    assert content_of(second) == before
    assert second.now(audit.verify, read=True) == 3
    assert made.rows == sum(map(len, before.values()))
    for table in (tables.sessions, tables.links):
        assert second.now(lambda db, table=table: db.execute(select(table)).all()) == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_database_that_holds_something_is_replaced_only_by_force(
    opened: Any, tmp_path: Path, kind: str
) -> None:
    first, second = opened("sqlite"), opened(kind)
    fill(first)
    file = tmp_path / "x.zip"
    backup.write(first.engines, file)
    user = second.now(lambda db: users.create(db, "Other", "admin"))
    _, token = second.now(lambda db: sign_in.new_session(db, user.id, 3600, ""))
    with pytest.raises(ConflictError, match="--force"):
        backup.restore(second.engines, file)
    assert [user.name for user in second.now(users.listed)] == ["Other"]
    backup.restore(second.engines, file, force=True)
    assert content_of(second) == content_of(first)
    assert second.now(lambda db: sign_in.find_session(db, token)) is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_backup_under_writes_is_of_one_moment(opened: Any, tmp_path: Path, kind: str) -> None:
    database = opened(kind)
    fill(database)
    ann = database.now(lambda db: users.by_name(db, "Ann"))
    stop = threading.Event()
    written = []

    def write() -> None:
        while not stop.is_set():

            def work(db: Any) -> None:
                talk = conversations.create(db, ann.id, title="load")
                conversations.add_message(db, talk.id, ann.id, None, "user", "load")
                audit.record(db, "ann", "load", talk.id)

            database.now(work)
            written.append(1)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for writer in writers:
        writer.start()
    try:
        for number in range(3):
            file = tmp_path / f"{number}.zip"
            made = backup.write(database.engines, file)
            talks = made.tables["conversations"].rows
            assert made.tables["messages"].rows == talks and made.tables["audit"].rows == talks + 2
    finally:
        stop.set()
        for writer in writers:
            writer.join()
    assert written
    other = opened("sqlite")
    backup.restore(other.engines, file)
    assert other.now(audit.verify, read=True) == talks + 2


def test_a_damaged_backup_changes_nothing(opened: Any, tmp_path: Path) -> None:
    database = opened("sqlite")
    fill(database)
    file = tmp_path / "x.zip"
    backup.write(database.engines, file)
    whole = file.read_bytes()
    before = content_of(database)
    damaged = [whole[: len(whole) // 2], b"", b"PK" + whole[2:-2]]
    damaged += [whole[:at] + bytes([whole[at] ^ 0x20]) + whole[at + 1 :] for at in range(50, len(whole), 997)]
    harmless = 0
    for data in damaged:
        file.write_bytes(data)
        try:
            backup.restore(database.engines, file, force=True)
            harmless += 1  # a byte that means nothing, such as a time in the zip
        except (IntegrityError, StateError):
            pass
        assert content_of(database) == before
    assert harmless <= len(damaged) // 4


def changed(file: Path, change: Any) -> None:
    """Write a backup again with other contents, hashes as they were."""
    with zipfile.ZipFile(file) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(entries["manifest.json"])
    change(manifest, entries)
    entries["manifest.json"] = json.dumps(manifest).encode()
    with zipfile.ZipFile(file, "w") as archive:
        for name, data in entries.items():
            archive.writestr(name, data)


def _other_row(manifest: Any, entries: Any) -> None:
    entries["tables/users.jsonl"] = entries["tables/users.jsonl"].replace(b"Ann", b"Eve")


def _no_table(manifest: Any, entries: Any) -> None:
    del entries["tables/keys.jsonl"]


def _strange_table(manifest: Any, entries: Any) -> None:
    manifest["tables"]["alembic_version"] = manifest["tables"].pop("options")
    entries["tables/alembic_version.jsonl"] = entries.pop("tables/options.jsonl")


def _strange_columns(manifest: Any, entries: Any) -> None:
    manifest["tables"]["users"]["columns"][0] = "id; DROP TABLE users"


def _newer_schema(manifest: Any, entries: Any) -> None:
    manifest["schema"] = "9999"


def _newer_format(manifest: Any, entries: Any) -> None:
    manifest["format"] = 2


def _no_manifest(manifest: Any, entries: Any) -> None:
    manifest.clear()


@pytest.mark.parametrize(
    "change",
    [_other_row, _no_table, _strange_table, _strange_columns, _newer_schema, _newer_format, _no_manifest],
)
def test_a_backup_that_was_changed_is_refused(opened: Any, tmp_path: Path, change: Any) -> None:
    database = opened("sqlite")
    fill(database)
    before = content_of(database)
    file = tmp_path / "x.zip"
    backup.write(database.engines, file)
    changed(file, change)
    with pytest.raises((IntegrityError, StateError)):
        backup.restore(database.engines, file, force=True)
    assert content_of(database) == before


def test_a_full_disk_leaves_no_half_backup(
    opened: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = opened("sqlite")
    fill(database)

    def full(*given: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(backup, "_sync", full)
    with pytest.raises(NoSpaceError):
        backup.write(database.engines, tmp_path / "b" / "x.zip")
    assert [*(tmp_path / "b").iterdir()] == []


def test_a_backup_never_replaces_another(opened: Any, tmp_path: Path) -> None:
    database = opened("sqlite")
    file = tmp_path / "x.zip"
    file.write_text("mine")
    with pytest.raises(ConflictError, match="there already"):
        backup.write(database.engines, file)
    assert file.read_text() == "mine"
    names = set()
    for _ in range(3):
        names.add(backup.new_name(tmp_path, "a"))
        backup.new_name(tmp_path, "a").touch()
    assert len(names) == 3


def test_the_commands_save_and_bring_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    from ayllu.cli import backup as command

    app = typer.Typer()
    app.command("backup")(command.backup)
    app.command("restore")(command.restore)
    monkeypatch.setenv("AYLLU_DATA", str(tmp_path / "data"))
    monkeypatch.delenv("AYLLU_DATABASE", raising=False)
    file = tmp_path / "x.zip"
    assert isinstance(CliRunner().invoke(app, ["backup", str(file)]).exception, StateError)
    database = Database.open(None, tmp_path / "data")
    fill(database)
    before = content_of(database)
    assert CliRunner().invoke(app, ["backup", str(file)], catch_exceptions=False).exit_code == 0
    database.now(lambda db: users.create(db, "Later", "user"))
    assert isinstance(CliRunner().invoke(app, ["restore", str(file)]).exception, ConflictError)
    arguments = ["restore", str(file), "--force", "--data", str(tmp_path / "data")]
    done = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0 and "3 lines" in done.output
    after = content_of(database)
    assert after["users"] == before["users"] and len(after["audit"]) == 4
    assert len([*(tmp_path / "data" / "backups").glob("before-restore-*.zip")]) == 1
    database.close()
