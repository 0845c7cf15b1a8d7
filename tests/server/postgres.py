"""A private PostgreSQL for tests: in a temporary folder, on a Unix socket, gone at the end.

It refuses to run as root, so that as root it runs as the user `postgres` (or `nobody`).
"""

from __future__ import annotations

import atexit
import os
import pwd
import secrets
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

ROOM_BYTES = 2 << 30
HOW_TO_GET_IT = "PostgreSQL is not installed: scripts/install_postgres.sh"


class Postgres:
    """A server that runs. Each test asks it for a database of its own."""

    def __init__(self, programs: Path, folder: Path) -> None:
        self.programs = programs
        self.folder = folder

    def url(self, database: str) -> str:
        return f"postgresql://tester@/{database}?host={self.folder}"

    def new_database(self, *, encoding: str = "UTF8") -> str:
        """The URL of an empty database."""
        import psycopg

        name = f"test_{secrets.token_hex(6)}"
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(
                f"CREATE DATABASE {name} ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C' TEMPLATE template0"
            )
        return self.url(name)

    def drop(self, url: str) -> None:
        """End its connections and forget it."""
        import psycopg

        name = url.split("@/")[1].split("?")[0]
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")


def programs() -> Path | None:
    """The folder of initdb and pg_ctl; None where there is none."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda path: int(path.parts[-3]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    return None if on_path is None else Path(on_path).resolve().parent


@contextmanager
def running() -> Iterator[Postgres]:
    """A new server. As safe against crashes as paper: nothing is synchronised to the disk."""
    where = programs()
    if where is None:
        raise RuntimeError(HOW_TO_GET_IT)
    folder = Path(tempfile.mkdtemp(prefix="ayllu-pg-", dir=_quick_disk()))
    user = _plain_user()
    try:
        if user is not None:
            os.chown(folder, user.pw_uid, user.pw_gid)
        data, log = folder / "data", folder / "log"
        flags = ["-U", "tester", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        _as(user, [where / "initdb", "-D", data, *flags])
        options = f"-k {folder} -c listen_addresses= -c fsync=off -c max_connections=60"
        start = ["-l", log, "-w", "-t", "120", "-o", options, "start"]
        _as(user, [where / "pg_ctl", "-D", data, *start])
        try:
            yield Postgres(where, folder)
        finally:
            _as(user, [where / "pg_ctl", "-D", data, "-m", "immediate", "-w", "stop"])
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def shared() -> Postgres:
    """One server for all tests of this process, started by the first that needs it."""
    stack = ExitStack()
    atexit.register(stack.close)
    return stack.enter_context(running())


def _quick_disk() -> str:
    """Memory, where there is enough of it. A short path in any case: it is a socket's."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > ROOM_BYTES else "/tmp"


def _plain_user() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        with suppress(KeyError):
            return pwd.getpwnam(name)
    raise RuntimeError("PostgreSQL does not run as root, and there is no other user")


def _as(user: pwd.struct_passwd | None, command: list[Path | str]) -> None:
    extra = {} if user is None else {"user": user.pw_uid, "group": user.pw_gid, "extra_groups": []}
    done = subprocess.run(
        [str(part) for part in command],
        **extra,
        cwd="/",
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE if "start" not in command else subprocess.DEVNULL,
        stderr=subprocess.STDOUT if "start" not in command else subprocess.DEVNULL,
        text=True,
    )
    if done.returncode != 0:
        raise RuntimeError(f"{Path(command[0]).name} failed: {done.stdout}")
