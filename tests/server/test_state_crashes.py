"""Kills and failing disks at the points where they hurt: each system call by which the database is written.

A workload (a migration with its backup, then writes that it acknowledges one by one) runs under strace, which
kills it, or lets its disk fail, at the N-th call. Afterwards the file must be whole, everything acknowledged
in it, and everything else absent or whole.
"""

from __future__ import annotations

import collections
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import event

from ayllu.errors import NoSpaceError, StateError
from ayllu.server.state import audit, schema, uploads, users
from ayllu.server.state.database import Database
from ayllu.server.state.engines import open_engines

WRITING_CALLS = ("pwrite64", "fdatasync", "fsync", "ftruncate", "unlink", "rename", "fallocate")
FAULTS = {"killed": "signal=KILL", "full": "error=ENOSPC", "failing": "error=EIO"}
WRITES = 4

WORKLOAD = """
import sys
from pathlib import Path
from ayllu.errors import AylluError
from ayllu.server.state import audit, schema, uploads, users
from ayllu.server.state.database import Database
from ayllu.server.state.engines import open_engines

folder, scripts, writes = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])

def write(number):
    def work(db):
        user = users.create(db, f"w{number}", "user")
        size = 40_000 if number == 2 else 10
        uploads.create(db, user_id=user.id, name="f", purpose="p", media_type="t", chunks=[b"x" * size])
        audit.record(db, "w", "write", user.name)
    return work

engines = None
for attempt in range(3):
    try:
        engines = open_engines(None, folder)
        schema.bring_up_to_date(engines, folder, scripts=scripts, revisions=("0001", "0002"))
        database = Database(engines)
        break
    except AylluError as error:
        print("refused open", type(error).__name__, flush=True)
    except Exception as error:
        from ayllu.server.state.failures import as_state_error
        print("refused open", type(as_state_error(error, engines.url)).__name__, flush=True)
print("acknowledged open", flush=True)
for number in range(writes):
    try:
        database.now(write(number))
        print("acknowledged", number, flush=True)
    except AylluError as error:
        print("refused", number, type(error).__name__, flush=True)
for attempt in range(2):  # the one fault may hit the first try; the database works on after it
    try:
        database.now(write("last"))
        print("acknowledged last", flush=True)
        break
    except AylluError as error:
        print("refused last", type(error).__name__, flush=True)
database.close()
"""

needs_strace = pytest.mark.skipif(shutil.which("strace") is None, reason="needs scripts/install_postgres.sh")


@pytest.fixture
def original(tmp_path: Path) -> Path:
    """A database of the first schema, with something in it, and the migrations of a later program."""
    from tests.server.test_state_schema import NEXT

    scripts = tmp_path / "later"
    shutil.copytree(schema.MIGRATIONS, scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "versions" / "0002_next.py").write_text(NEXT)
    database = Database.open(None, tmp_path / "original")
    database.now(lambda db: users.create(db, "Ann", "admin"))
    database.close()
    return tmp_path / "original"


def run_workload(data: Path, *strace: str) -> tuple[int, list[str]]:
    """Its exit status, and what it acknowledged and refused."""
    command = [sys.executable, "-c", WORKLOAD, str(data), str(data.parent / "later"), str(WRITES)]
    done = subprocess.run(
        ["strace", "-f", "--seccomp-bpf", *strace, *command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith(("acknowledged", "refused"))]
    assert done.returncode in (0, -signal.SIGKILL, 128 + signal.SIGKILL), done.stderr[-2000:]
    return done.returncode, lines


def points(original: Path) -> list[tuple[str, int]]:
    """Every writing call of the workload, by name and number."""
    data = original.parent / "counted"
    shutil.copytree(original, data)
    log = original.parent / "calls"
    status, lines = run_workload(data, "-o", str(log), "-e", f"trace={','.join(WRITING_CALLS)}")
    assert status == 0 and lines[-1] == "acknowledged last"
    counts = collections.Counter(re.findall(r"^\d+ +(\w+)\(", log.read_text(), re.MULTILINE))
    return [(call, number) for call in WRITING_CALLS for number in range(1, counts[call] + 1)]


def check(data: Path, lines: list[str]) -> None:
    """The file is whole; what was acknowledged is there, and nothing is there by half."""
    acknowledged = {line.split()[1] for line in lines if line.startswith("acknowledged")} - {"open"}
    engines = open_engines(None, data)
    schema.bring_up_to_date(engines, data, scripts=data.parent / "later", revisions=("0001", "0002"))
    database = Database(engines)
    names = {user.name for user in database.now(users.listed, read=True)}
    assert {f"w{number}" for number in acknowledged} <= names
    written = sorted(name for name in names if name != "Ann")
    assert database.now(audit.verify, read=True) == len(written)
    assert sorted(line.target for line in database.now(audit.listed, read=True)) == written
    for user in database.now(users.listed):
        kept = database.now(lambda db, user=user: uploads.listed(db, user.id))
        assert len(kept) == (0 if user.name == "Ann" else 1)
        for one in kept:
            data_of = database.now(lambda db, user=user, one=one: [*uploads.content(db, one.id, user.id)])
            assert sum(map(len, data_of)) == one.size_bytes
    database.close()
    with closing(sqlite3.connect(data / "ayllu.db")) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    for backup in (data / "backups").glob("*.db"):  # under its name only when whole
        with closing(sqlite3.connect(backup)) as raw:
            assert raw.execute("PRAGMA integrity_check").fetchone() == ("ok",)
            assert raw.execute("SELECT name FROM users").fetchall() == [("Ann",)]


def try_fault(original: Path, name: str, call: str, number: int) -> None:
    """The workload with one fault in it, and what it leaves."""
    data = original.parent / f"{name}-{call}-{number}"
    shutil.copytree(original, data)
    inject = f"inject={call}:{FAULTS[name]}:when={number}"
    status, lines = run_workload(data, "-o", "/dev/null", "-e", f"trace={call}", "-e", inject)
    # A killed one may have ended before, as the number of calls varies a little.
    assert lines[-1:] == ["acknowledged last"] or (name == "killed" and status != 0), (call, number, lines)
    check(data, lines)
    shutil.rmtree(data)


def try_faults(original: Path, steps: dict[str, int]) -> int:
    """Every so many-th point with each fault; how many were tried."""
    every = points(original)
    chosen = [
        (name, *point)
        for offset, (name, step) in enumerate(steps.items())
        for point in every[offset * step // len(steps) :: step]
    ]
    for fault in chosen:
        try_fault(original, *fault)
    print(f"{len(chosen)} faults tried, {len(chosen)} survived")
    return len(chosen)


@needs_strace
def test_some_kills_and_disk_failures_lose_nothing_acknowledged(original: Path) -> None:
    assert try_faults(original, dict.fromkeys(FAULTS, 80)) >= 9


@needs_strace
@pytest.mark.large
def test_every_kill_and_every_third_disk_failure_loses_nothing_acknowledged(original: Path) -> None:
    assert try_faults(original, {"killed": 1, "full": 3, "failing": 3}) >= 400


def test_a_full_disk_is_told_and_forgotten_once_there_is_space(tmp_path: Path) -> None:
    database = Database.open(None, tmp_path)
    ann = database.now(lambda db: users.create(db, "Ann", "admin"))

    def keep(size: int) -> None:
        database.now(
            lambda db: uploads.create(
                db, user_id=ann.id, name="f", purpose="p", media_type="t", chunks=[b"x" * size]
            )
        )

    with database.engines.writing.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar()
        connection.exec_driver_sql(f"PRAGMA max_page_count = {pages + 2}")
    with pytest.raises(NoSpaceError, match="disk of the database is full"):
        keep(1 << 20)
    assert database.now(lambda db: uploads.listed(db, ann.id), read=True) == []
    keep(1 << 20)
    assert database.now(lambda db: uploads.used_bytes(db, ann.id), read=True) == 1 << 20
    database.close()


def test_a_damaged_page_is_told_by_the_name_of_the_file(tmp_path: Path) -> None:
    database = Database.open(None, tmp_path)
    database.now(lambda db: users.create(db, "Ann", "admin"))
    database.close()
    file = tmp_path / "ayllu.db"
    data = bytearray(file.read_bytes())
    data[4096:] = bytes(len(data) - 4096)
    file.write_bytes(data)
    with pytest.raises(StateError, match=r"is damaged.*ayllu\.db"):
        Database.open(None, tmp_path).now(users.listed)


def test_a_lock_that_another_keeps_is_waited_for(tmp_path: Path) -> None:
    database = Database.open(None, tmp_path)
    blocker = sqlite3.connect(tmp_path / "ayllu.db", isolation_level=None, check_same_thread=False)
    blocker.execute("BEGIN IMMEDIATE")
    begun = []

    def release(*given: object) -> None:
        begun.append(1)
        threading.Timer(0.3, blocker.execute, ("ROLLBACK",)).start()

    event.listen(database.engines.writing, "checkout", release, once=True)
    database.now(lambda db: users.create(db, "Ann", "admin"))
    assert begun and database.now(users.count, read=True) == 1
    database.close()
    blocker.close()
