"""What `ayllu users` and `ayllu keys` share: the server's database, its audit log, people by name, tables.

They work on the database itself, so also while the server runs, and where nobody can sign in any more.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from sqlalchemy.orm import Session as Db

    from ayllu.server.state.database import Database
    from ayllu.server.state.records import User
    from ayllu.settings import Settings

T = TypeVar("T")
ACTOR = "command line"

DataOption = Annotated[
    Path | None, typer.Option("--data", help="Folder of the server's database, instead of the usual one.")
]
DatabaseOption = Annotated[
    str | None, typer.Option("--database", help="The server's database: postgresql://… or sqlite://…")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
YesOption = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]


def server_settings(data: Path | None, database: str | None) -> Settings:
    """The settings, with these two given on the command line."""
    from ayllu.settings import load_settings

    return load_settings({"data": data, "database": database})


@contextmanager
def opened(settings: Settings, *, migrate: bool = True) -> Iterator[Database]:
    """The server's database."""
    from ayllu.server.state.database import Database

    database = Database.open(settings.database, settings.data, migrate=migrate)
    try:
        yield database
    finally:
        database.close()


def transact(settings: Settings, work: Callable[[Db], T]) -> T:
    """One transaction on the server's database: a change and its line in the audit log, or neither."""
    with opened(settings) as database:
        return database.now(work)


def note(db: Db, action: str, target: str, **details: Any) -> None:
    """A line of the audit log."""
    from ayllu.server.state import audit

    audit.record(db, ACTOR, action, target, details)


def user_named(db: Db, name: str) -> User:
    """Raises NotFoundError, with the nearest name."""
    from ayllu.errors import NotFoundError, did_you_mean
    from ayllu.server.state import users

    user = users.by_name(db, name)
    if user is None:
        nearest = did_you_mean(name, [one.name for one in users.listed(db)])
        raise NotFoundError(f"There is no user {name!r}.{nearest}", "`ayllu users list` shows who there is.")
    return user


def confirm(question: str, command: str, yes: bool) -> None:
    """Ask; where nobody is there to answer, say how to go on."""
    from ayllu.errors import UsageError

    if yes:
        return
    if not sys.stdin.isatty():
        raise UsageError("Nobody is there to confirm.", f"Say so on the command line: {command} --yes")
    typer.confirm(question, abort=True, err=True)


def say(text: str) -> None:
    """For the person: standard output is for what a program reads."""
    typer.echo(text, err=True)


def print_json(value: Any) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False, indent=2))


def print_table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Rows in columns; names may have characters that are two columns wide."""
    from rich.cells import cell_len

    table = [heading, *rows]
    widths = [max(map(cell_len, column)) for column in zip(*table, strict=True)]
    for row in table:
        cells = [cell + " " * (width - cell_len(cell)) for cell, width in zip(row, widths, strict=True)]
        typer.echo("  ".join(cells).rstrip())


def day(when: float | None, otherwise: str = "never") -> str:
    """A time as people here write it, to the minute."""
    return otherwise if when is None else time.strftime("%Y-%m-%d %H:%M", time.localtime(when))


def limits_from(given: Sequence[str]) -> dict[str, int | None]:
    """`NAME=NUMBER` each; `NAME=` takes a limit away. Raises UsageError."""
    from ayllu.errors import UsageError, did_you_mean
    from ayllu.server.limits import LIMIT_NAMES

    limits: dict[str, int | None] = {}
    for text in given:
        name, equals, number = text.partition("=")
        if name not in LIMIT_NAMES or not equals:
            raise UsageError(
                f"{text!r} is no limit.{did_you_mean(name, LIMIT_NAMES)}",
                f"Write NAME=NUMBER, with one of {', '.join(LIMIT_NAMES)}.",
            )
        if number and not (number.isascii() and number.isdecimal() and len(number) < 14 and int(number) > 0):
            raise UsageError(f"{number!r} is no number for {name}.", "Use a whole number from 1 on.")
        limits[name] = int(number) if number else None
    return limits


def changed_limits(before: Mapping[str, int], changes: Mapping[str, int | None]) -> dict[str, int]:
    """The limits after `changes`; None takes one away."""
    return {name: value for name, value in {**before, **changes}.items() if value is not None}
