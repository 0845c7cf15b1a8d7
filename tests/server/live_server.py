"""`ayllu serve` in a process of its own, for tests that need the whole of it (in a thread: `running.py`).

It listens on a free port of loopback, keeps its state in a folder that the test gives, has an admin, and ends
with the block.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from ayllu.server.state import keys, users
from ayllu.server.state.database import Database
from ayllu.server.state.records import Role, Scope

Found = TypeVar("Found")

ALL_SCOPES: tuple[Scope, ...] = ("inference", "models", "metrics", "admin")
PLENTY = {"requests_per_minute": 1_000_000, "tokens_per_minute": 1_000_000_000, "concurrent_requests": 1000}
"""Settings of a server whose limits no test should meet."""

START_S = 180.0
STOP_S = 60.0
_ADDRESS = re.compile(r"serves at (http://\S+)")


@dataclass
class LiveServer:
    """A server that answers. key: of the user `user_id`, an admin, with every scope. folder: its data."""

    process: subprocess.Popen[bytes]
    folder: Path
    log: Path
    user_id: str
    key: str
    url: str = ""

    def with_database(self, work: Callable[[Any], Found]) -> Found:
        """Do something to the server's state, beside the server."""
        return _with_database(self.folder, work)

    def new_key(self, *scopes: Scope, user_id: str | None = None, **more: Any) -> str:
        """Another key, of the admin or of somebody else, for inference unless scopes are given."""
        given = scopes or ("inference",)
        return self.with_database(
            lambda db: keys.create(db, user_id or self.user_id, "test", given, **more)[1]
        )

    def new_user(self, name: str, role: Role = "user") -> str:
        """Another user's id."""
        return self.with_database(lambda db: users.create(db, name, role).id)

    def said(self) -> str:
        """What the process has written so far."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def wait(self, true: Callable[[], bool]) -> None:
        """Wait for something; fail, with what the server said, if it does not come or the server ends."""
        until = time.monotonic() + START_S
        while not true():
            ended = self.process.poll()
            assert ended is None, f"the server ended with {ended}: {self.said()[-4000:]}"
            assert time.monotonic() < until, f"it did not come: {self.said()[-4000:]}"
            time.sleep(0.05)


def _with_database(folder: Path, work: Callable[[Any], Found]) -> Found:
    database = Database.open(None, folder)
    try:
        return database.now(work)
    finally:
        database.close()


def _new_admin(db: Any) -> tuple[str, str]:
    admin = users.create(db, "admin", "admin")
    return admin.id, keys.create(db, admin.id, "test", ALL_SCOPES)[1]


@contextmanager
def served_process(
    folder: Path,
    models: Sequence[str | Path],
    *,
    settings: Mapping[str, object] | None = None,
    arguments: Sequence[str] = (),
    ready: bool = True,
) -> Iterator[LiveServer]:
    """`ayllu serve` with these models, by name or path, one thread for each. settings: as environment
    variables name them, without their prefix. ready: wait until the models are loaded.
    """
    data, log = folder / "data", folder / "server.log"
    user_id, key = _with_database(data, _new_admin)
    environment = {**os.environ, "AYLLU_THREADS": "1"}
    environment |= {f"AYLLU_{name.upper()}": str(value) for name, value in (settings or {}).items()}
    command = [
        *(sys.executable, "-m", "ayllu", "serve", *map(str, models)),
        *("--port", "0", "--data", str(data), *arguments),
    ]
    with log.open("wb") as written:
        process = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=written, stderr=written
        )
    server = LiveServer(process, data, log, user_id, key)
    try:
        server.wait(lambda: _ADDRESS.search(server.said()) is not None)
        server.url = _ADDRESS.findall(server.said())[0]
        if ready:
            server.wait(lambda: _loaded(server.said()) == len(models))
        yield server
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _loaded(said: str) -> int:
    assert "could not be loaded" not in said, said[-4000:]
    return said.count(" is ready.")
