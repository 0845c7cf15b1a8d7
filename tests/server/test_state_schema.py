"""Schemas: what the migrations make, who makes it, and what a kill in the middle leaves."""

from __future__ import annotations

import multiprocessing
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from ayllu.errors import MissingExtraError, StateError
from ayllu.server.state import audit, schema, tables, users
from ayllu.server.state.database import Database
from ayllu.server.state.engines import Engines, open_engines
from tests.server import postgres

NEXT = '''"""A later schema: several statements, and rows that change."""
import sqlalchemy as sa
from alembic import op

revision, down_revision, branch_labels, depends_on = "0002", "0001", None, None


def upgrade():
    op.add_column("users", sa.Column("motto", sa.Text(), nullable=True))
    op.execute("UPDATE users SET motto = name")
    op.create_table("extra", sa.Column("id", sa.Integer(), primary_key=True))
    op.execute("INSERT INTO extra (id) VALUES (1)")
    op.create_index("extra_by_motto", "users", ["motto"])
    op.execute("UPDATE users SET motto = 'new'")
'''
TWO = ("0001", "0002")


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """The migrations of a later program."""
    scripts = tmp_path / "later"
    shutil.copytree(schema.MIGRATIONS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "0002_next.py").write_text(NEXT)
    return scripts


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str | None]:
    if request.param == "sqlite":
        yield None
        return
    if postgres.programs() is None:
        pytest.skip(postgres.HOW_TO_GET_IT)
    made = postgres.shared().new_database()
    yield made
    postgres.shared().drop(made)


def filled(url: str | None, folder: Path) -> None:
    database = Database.open(url, folder)
    for name in ("Ann", "Ben"):
        database.now(lambda db, name=name: users.create(db, name, "admin"))
    database.now(lambda db: audit.record(db, "ann", "act"))
    database.close()


def state_of(engines: Engines) -> tuple[str | None, list[Any]]:
    """The schema, and for the later one what its migration did."""
    with engines.reading.connect() as connection:
        revision = schema.revision_of(connection)
        query = "SELECT name, motto FROM users, extra ORDER BY name" if revision == "0002" else None
        query = query or "SELECT name FROM users ORDER BY name"
        return revision, [tuple(row) for row in connection.execute(text(query))]


OLD = ("0001", [("Ann",), ("Ben",)])
NEW = ("0002", [("Ann", "new"), ("Ben", "new")])


def test_the_migrations_make_exactly_the_tables_of_the_code(url: str | None, tmp_path: Path) -> None:
    database = Database.open(url, tmp_path / "data")
    with database.engines.reading.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, tables.metadata) == []
    database.close()


def test_the_code_knows_every_migration_in_order() -> None:
    scripts = ScriptDirectory(str(schema.MIGRATIONS))
    found = [script.revision for script in scripts.walk_revisions()][::-1]
    assert tuple(found) == schema.REVISIONS


def test_a_migration_keeps_what_is_there_and_backs_it_up_first(
    url: str | None, tmp_path: Path, later: Path
) -> None:
    data = tmp_path / "data"
    filled(url, data)
    engines = open_engines(url, data)
    schema.bring_up_to_date(engines, data, scripts=later, revisions=TWO)
    assert state_of(engines) == NEW
    (backup,) = (data / "backups").iterdir()
    assert stat.S_IMODE(backup.stat().st_mode) == 0o600
    schema.bring_up_to_date(engines, data, scripts=later, revisions=TWO)
    assert len(list((data / "backups").iterdir())) == 1
    engines.dispose()
    from ayllu.server.state.backup import restore

    other = Database.open(None, tmp_path / "other")
    restore(other.engines, backup)
    assert state_of(other.engines) == OLD
    assert other.now(audit.verify, read=True) == 1
    other.close()


def test_an_old_backup_is_migrated_on_its_way_into_a_newer_database(
    url: str | None, tmp_path: Path, later: Path
) -> None:
    from ayllu.server.state.backup import copy_sqlite, restore, write

    filled(None, tmp_path / "old")
    old = open_engines(None, tmp_path / "old")
    write(old, tmp_path / "x.zip")
    copy_sqlite(old, tmp_path / "x.db")
    old.dispose()
    engines = open_engines(url, tmp_path / "data")
    schema.bring_up_to_date(engines, tmp_path / "data", scripts=later, revisions=TWO)
    for name in ("x.zip", "x.db"):
        restore(engines, tmp_path / name, force=True, scripts=later, revisions=TWO)
        assert state_of(engines) == NEW
        with engines.writing.begin() as connection:
            connection.execute(text("DELETE FROM users"))
    engines.dispose()
    assert not [*tmp_path.glob(".ayllu-restore-*")]


def test_an_empty_database_needs_no_backup(url: str | None, tmp_path: Path, later: Path) -> None:
    Database.open(url, tmp_path).close()
    engines = open_engines(url, tmp_path)
    schema.bring_up_to_date(engines, tmp_path, scripts=later, revisions=TWO)
    engines.dispose()
    assert not (tmp_path / "backups").exists()


def test_a_newer_schema_is_refused_and_left_alone(url: str | None, tmp_path: Path, later: Path) -> None:
    filled(url, tmp_path)
    engines = open_engines(url, tmp_path)
    schema.bring_up_to_date(engines, tmp_path, scripts=later, revisions=TWO)
    with pytest.raises(StateError, match="newer than this program"):
        Database.open(url, tmp_path)
    assert state_of(engines) == NEW
    engines.dispose()


def test_an_old_schema_is_not_migrated_unasked(url: str | None, tmp_path: Path) -> None:
    with pytest.raises(StateError, match="ayllu serve"):
        Database.open(url, tmp_path, migrate=False)


def test_somebody_elses_database_is_left_alone(url: str | None, tmp_path: Path) -> None:
    engines = open_engines(url, tmp_path)
    with engines.writing.begin() as connection:
        connection.execute(text("CREATE TABLE users (x INTEGER)"))
    with pytest.raises(StateError, match="not ours"):
        Database.open(url, tmp_path)
    engines.dispose()


def _migrate(url: str | None, folder: Path, scripts: Path, start: Any) -> None:
    engines = open_engines(url, folder)
    start.wait()
    schema.bring_up_to_date(engines, folder, scripts=scripts, revisions=TWO)
    assert state_of(engines) == NEW
    engines.dispose()


@pytest.mark.parametrize("before", ["nothing", "old"])
def test_processes_that_start_together_migrate_once(
    url: str | None, tmp_path: Path, later: Path, before: str
) -> None:
    data = tmp_path / "data"
    if before == "old":
        filled(url, data)
    else:
        data.mkdir()
    starts = multiprocessing.get_context("spawn")
    start = starts.Barrier(3)
    target = _migrate if before == "old" else _open
    workers = [starts.Process(target=target, args=(url, data, later, start)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
        assert worker.exitcode == 0
    if before == "old":
        assert len(list((data / "backups").iterdir())) == 1


def _open(url: str | None, folder: Path, scripts: Path, start: Any) -> None:
    start.wait()
    database = Database.open(url, folder)
    assert database.now(audit.verify, read=True) == 0
    database.close()


KILLED = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import event
from ayllu.server.state import schema
from ayllu.server.state.engines import open_engines

url, folder, scripts, left = sys.argv[1] or None, Path(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
engines = open_engines(url, folder)

def count(*given):
    global left
    left -= 1
    if left == 0:
        os.kill(os.getpid(), signal.SIGKILL)

event.listen(engines.writing, "before_cursor_execute", count)
event.listen(engines.writing, "after_cursor_execute", count)
event.listen(engines.writing, "commit", count)
schema.bring_up_to_date(engines, folder, scripts=scripts, revisions=("0001", "0002"))
"""


def _killed_at(url: str | None, data: Path, scripts: Path, point: int) -> int:
    command = [sys.executable, "-c", KILLED, url or "", str(data), str(scripts), str(point)]
    return subprocess.run(command, capture_output=True, check=False).returncode


def _survives(url: str | None, data: Path, later: Path, point: int) -> bool:
    """Kill a migration there; True when it ended before. Old or new, never between, and it can go on."""
    code = _killed_at(url, data, later, point)
    engines = open_engines(url, data)
    assert state_of(engines) in (OLD, NEW), point
    schema.bring_up_to_date(engines, data, scripts=later, revisions=TWO)
    assert state_of(engines) == NEW
    engines.dispose()
    assert code in (0, -signal.SIGKILL)
    return code == 0


def _points(url: str | None, tmp_path: Path, later: Path, step: int) -> int:
    original = tmp_path / "original"
    filled(None, original)
    for survived, point in enumerate(range(1, 500, step)):
        data = tmp_path / f"data{point}"
        one = url
        if url is None:
            shutil.copytree(original, data)
        else:
            one = postgres.shared().new_database()
            filled(one, data)
        ended = _survives(one, data, later, point)
        if one is not None:
            postgres.shared().drop(one)
        if ended:
            print(f"{survived} faults tried, {survived} survived")
            return survived
    raise AssertionError("the migration never ended")


def test_a_migration_killed_at_some_statements_is_old_or_new(
    url: str | None, tmp_path: Path, later: Path
) -> None:
    assert _points(url, tmp_path, later, 9 if url is None else 30) >= 3


@pytest.mark.large
def test_a_migration_killed_at_every_statement_is_old_or_new(
    url: str | None, tmp_path: Path, later: Path
) -> None:
    assert _points(url, tmp_path, later, 1) >= 25


def test_a_file_and_its_folder_are_for_their_owner_alone(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir(mode=0o755)
    database = Database.open(None, data)
    database.now(lambda db: users.create(db, "Ann", "admin"))
    assert stat.S_IMODE(data.stat().st_mode) == 0o700
    modes = {file.name: stat.S_IMODE(file.stat().st_mode) for file in data.iterdir()}
    assert set(modes.values()) == {0o600} and {"ayllu.db", "ayllu.db-wal"} <= set(modes)
    with database.engines.writing.connect() as connection:
        for pragma, value in (("journal_mode", "wal"), ("synchronous", 2), ("foreign_keys", 1)):
            assert connection.exec_driver_sql(f"PRAGMA {pragma}").scalar() == value
    database.close()


def test_what_is_no_database_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "ayllu.db").write_bytes(b"no database at all" * 100)
    with pytest.raises(StateError, match="is damaged, or is none"):
        Database.open(None, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(StateError, match="folder of the database"):
        Database.open(None, tmp_path / "file" / "data")


def test_addresses_that_lead_nowhere_are_refused_without_their_password(tmp_path: Path) -> None:
    for url in (
        "nonsense",
        "mysql://user:hush@host/name",
        "sqlite://",
        f"postgresql://user:hush@/name?host={tmp_path}",
        "postgres://user:hush@127.0.0.1:1/name",
        "postgresql://user:hush@127.0.0.1:notaport/name",
    ):
        with pytest.raises(StateError) as caught:
            Database.open(url, tmp_path)
        assert "hush" not in str(caught.value)


def test_postgresql_without_its_extra_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    with pytest.raises(MissingExtraError, match=r"ayllu\[postgres\]"):
        Database.open("postgresql://user@host/name", tmp_path)


@pytest.mark.skipif(postgres.programs() is None, reason=postgres.HOW_TO_GET_IT)
def test_a_database_that_cannot_keep_every_character_is_refused(tmp_path: Path) -> None:
    url = postgres.shared().new_database(encoding="LATIN1")
    with pytest.raises(StateError, match="LATIN1"):
        Database.open(url, tmp_path)


def test_a_copy_of_an_old_file_is_one_file(tmp_path: Path, later: Path) -> None:
    filled(None, tmp_path)
    engines = open_engines(None, tmp_path)
    schema.bring_up_to_date(engines, tmp_path, scripts=later, revisions=TWO)
    engines.dispose()
    (copy,) = (tmp_path / "backups").iterdir()
    with closing(sqlite3.connect(copy)) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert raw.execute("SELECT version_num FROM alembic_version").fetchall() == [("0001",)]
