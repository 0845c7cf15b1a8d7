"""Several processes at one database: a server with a command line beside it, or replicas."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import update

from ayllu.server.state import audit, conversations, runs, tables, users
from ayllu.server.state.database import Database
from tests.server import postgres

PROCESSES = 8
KINDS_OF_WRITES = 4
WAL_LIMIT_BYTES = 64 << 20


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: pytest.FixtureRequest) -> Iterator[str | None]:
    if request.param == "sqlite":
        yield None
        return
    if postgres.programs() is None:
        pytest.skip(postgres.HOW_TO_GET_IT)
    made = postgres.shared().new_database()
    yield made
    postgres.shared().drop(made)


def worker(url: str | None, folder: Path, ids: dict[str, str], writes: int, start: Any, told: Any) -> None:
    """Mixed writes, each in a transaction of its own, with reads between."""
    database = Database.open(url, folder)
    run = database.now(
        lambda db: runs.create(db, user_id=ids["user"], kind="response", model="m", request={})
    )
    start.wait()
    waits = []

    def count_up(db: Any, number: int) -> None:
        current = users.get(db, ids["user"]).created_at if database.kind == "sqlite" else None
        new = tables.users.c.created_at + 1 if current is None else current + 1
        db.execute(update(tables.users).where(tables.users.c.id == ids["user"]).values(created_at=new))

    def one(db: Any, number: int) -> None:
        kind, turn = number % KINDS_OF_WRITES, number // KINDS_OF_WRITES
        if kind == 0:
            count_up(db, number)
        elif kind == 1:
            conversations.add_message(db, ids["talk"], ids["user"], None, "user", f"{run.id} {turn}")
        elif kind == 2:
            audit.record(db, "w", "write", run.id)
        else:
            runs.append(db, run.id, turn, [{"n": turn}])

    for number in range(writes):
        database.now(lambda db, n=number: one(db, n))
        began = time.perf_counter()
        database.now(lambda db: users.get(db, ids["user"]), read=True)
        waits.append(time.perf_counter() - began)
    database.close()
    told.put((run.id, sorted(waits)))


def mixed_writes(url: str | None, folder: Path, writes: int) -> None:
    database = Database.open(url, folder)

    def begin(db: Any) -> dict[str, str]:
        user = users.create(db, "Ann", "admin")
        db.execute(update(tables.users).values(created_at=0))
        return {"user": user.id, "talk": conversations.create(db, user.id).id}

    ids = database.now(begin)
    context = multiprocessing.get_context("spawn")
    start, told = context.Barrier(PROCESSES), context.Queue()
    workers = [
        context.Process(target=worker, args=(url, folder, ids, writes, start, told)) for _ in range(PROCESSES)
    ]
    for one in workers:
        one.start()
    results = [told.get(timeout=600) for _ in workers]
    for one in workers:
        one.join(60)
        assert one.exitcode == 0
    each = writes // KINDS_OF_WRITES
    user = ids["user"]
    assert database.now(lambda db: users.get(db, user)).created_at == PROCESSES * each
    assert database.now(audit.verify, read=True) == PROCESSES * each
    messages = database.now(lambda db: conversations.messages(db, ids["talk"], user), read=True)
    assert len({message.content for message in messages}) == len(messages) == PROCESSES * each
    for run_id, _ in results:
        stored = database.now(lambda db, r=run_id: runs.events(db, r, user, -1, writes), read=True)
        assert [number for number, _ in stored] == list(range(each))
    waits = sorted(wait for _, some in results for wait in some)
    p99 = waits[int(0.99 * len(waits))]
    print(f"{PROCESSES} x {writes} writes: read p99 {p99 * 1e3:.1f} ms")
    log = folder / "ayllu.db-wal"
    assert not log.exists() or log.stat().st_size <= WAL_LIMIT_BYTES
    database.close()


def test_mixed_writes_of_eight_processes_lose_no_update_and_meet_no_lock(
    url: str | None, tmp_path: Path
) -> None:
    mixed_writes(url, tmp_path, 60)


@pytest.mark.large
def test_five_hundred_mixed_writes_of_each_of_eight_processes(url: str | None, tmp_path: Path) -> None:
    mixed_writes(url, tmp_path, 500)
