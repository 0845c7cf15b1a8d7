"""`ayllu keys`: API keys of the server's users. Works on its database, also while it runs.

A new key is the only thing on standard output, so that it can be piped to where it is kept.
"""

from __future__ import annotations

import dataclasses
import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from ayllu.cli.accounts import (
    DatabaseOption,
    DataOption,
    JsonOption,
    changed_limits,
    day,
    limits_from,
    note,
    print_json,
    print_table,
    say,
    server_settings,
    transact,
    user_named,
)

if TYPE_CHECKING:
    from sqlalchemy.orm import Session as Db

    from ayllu.server.state.records import Key, Scope

MOST_DAYS = 3650

app = typer.Typer(
    help="Manage API keys for programs that use the server.", no_args_is_help=True, rich_markup_mode=None
)


class ScopeName(StrEnum):
    """As the command line takes a scope."""

    inference = "inference"
    models = "models"
    metrics = "metrics"
    admin = "admin"


@app.command("list")
def list_keys(
    user: Annotated[str | None, typer.Option("--user", help="Only this user's keys.")] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Show keys: whose they are, what they may do, when they were last used. Never the keys themselves."""
    from ayllu.server.state import keys, users

    def read(db: Db) -> tuple[list[Key], dict[str, str]]:
        owner = None if user is None else user_named(db, user).id
        return keys.listed(db, owner), {one.id: one.name for one in users.listed(db)}

    found, names = transact(server_settings(data, database), read)
    if as_json:
        print_json([_object(key, names[key.user_id]) for key in found])
        return
    if not found:
        say("There are no keys. Make one: ayllu keys add --user NAME --name PROGRAM")
        return
    print_table(
        ("key", "user", "name", "scopes", "state", "last used"),
        [
            (
                f"{key.prefix}…",
                names[key.user_id],
                key.name,
                ",".join(key.scopes),
                _state(key),
                day(key.last_used_at),
            )
            for key in found
        ],
    )


@app.command()
def add(
    user: Annotated[str, typer.Option("--user", help="Whose key it is.", show_default=False)],
    name: Annotated[str, typer.Option("--name", help="What it is for.", show_default=False)],
    scope: Annotated[
        list[ScopeName] | None,
        typer.Option("--scope", help="What it may do; may be repeated. Default: inference."),
    ] = None,
    expires_days: Annotated[
        int | None,
        typer.Option("--expires-days", min=1, max=MOST_DAYS, help="Days until it expires. Default: never."),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="NAME=NUMBER",
            help="requests_per_minute, tokens_per_minute or concurrent_requests. May be repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Make a key and print it, this once."""
    from ayllu.errors import ConflictError, UsageError
    from ayllu.server.state import keys

    scopes = cast("tuple[Scope, ...]", tuple(one.value for one in scope or [ScopeName.inference]))
    limits = changed_limits({}, limits_from(limit or []))
    expires_at = None if expires_days is None else time.time() + 86400 * expires_days

    def make(db: Db) -> tuple[Key, str, str]:
        owner = user_named(db, user)
        if owner.disabled:
            raise ConflictError(f"{owner.name} is disabled.", f"Use: ayllu users set {user} --enable")
        if owner.role != "admin" and set(scopes) != {"inference"}:
            raise UsageError(
                f"{owner.name} is no admin, so a key of theirs can have the scope inference alone.",
                f"Leave --scope out, or use: ayllu users set {user} --role admin",
            )
        key, plain = keys.create(db, owner.id, name, scopes, expires_at, limits)
        note(db, "key.add", key.prefix, user=owner.name, scopes=list(key.scopes))
        return key, plain, owner.name

    key, plain, owner_name = transact(server_settings(data, database), make)
    if as_json:
        print_json({"key": plain, **_object(key, owner_name)})
        return
    until = "" if expires_at is None else f", until {day(expires_at)}"
    say(f"{owner_name}'s key {key.name!r} for {', '.join(key.scopes)}{until}. It is shown this once:")
    typer.echo(plain)


@app.command()
def revoke(
    key: Annotated[
        str,
        typer.Argument(
            metavar="KEY",
            help="Its first characters, as `ayllu keys list` has them, or its id.",
            show_default=False,
        ),
    ],
    as_json: JsonOption = False,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """End a key for good, at once."""
    from ayllu.server.state import keys, users

    def end(db: Db) -> tuple[Key, str]:
        found = _found(keys.listed(db, None), key)
        ended = keys.revoke(db, found.id, None)
        owner = users.get(db, ended.user_id).name
        note(db, "key.revoke", ended.prefix, user=owner)
        return ended, owner

    ended, owner = transact(server_settings(data, database), end)
    if as_json:
        print_json(_object(ended, owner))
    else:
        say(f"Revoked {owner}'s key {ended.name!r} ({ended.prefix}…).")


def _found(known: list[Key], given: str) -> Key:
    """The key that is meant. A whole key is taken too: somebody who has found one wants it to end."""
    from ayllu.errors import ConflictError, NotFoundError

    shown = given.rstrip("…")
    fitting = [one for one in known if shown == one.id or shown[: len(one.prefix)] == one.prefix]
    if not fitting:
        raise NotFoundError("There is no such key.", "`ayllu keys list` shows them.")
    if len(fitting) > 1:
        raise ConflictError(
            "Several keys begin like that.", f"Use an id: {', '.join(one.id for one in fitting)}."
        )
    return fitting[0]


def _state(key: Key) -> str:
    if key.revoked_at is not None:
        return "revoked"
    if key.expires_at is not None and key.expires_at <= time.time():
        return "expired"
    return "valid" if key.expires_at is None else f"until {day(key.expires_at)}"


def _object(key: Key, owner: str) -> dict[str, Any]:
    return {**dataclasses.asdict(key), "user": owner}
