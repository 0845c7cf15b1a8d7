"""`ayllu users`: who may sign in to the server. Works on its database, also while it runs.

A password is asked without echo or read from standard input: an argument would be seen by everybody on the
machine, and stay in the shell's history.
"""

from __future__ import annotations

import dataclasses
import sys
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ayllu.cli.accounts import (
    DatabaseOption,
    DataOption,
    JsonOption,
    YesOption,
    changed_limits,
    confirm,
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

    from ayllu.server.state.records import User
    from ayllu.settings import Settings

LINK_HOURS = 24.0
MOST_LINK_HOURS = 24.0 * 30
LEAST_PASSWORD = 10
MOST_PASSWORD = 1000

app = typer.Typer(help="Manage who may sign in to the server.", no_args_is_help=True, rich_markup_mode=None)


class RoleName(StrEnum):
    """As the command line takes a role."""

    admin = "admin"
    user = "user"


NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="A user's name.", show_default=False)]
PasswordStdin = Annotated[
    bool, typer.Option("--password-stdin", help="Read the password from standard input.")
]
UrlOption = Annotated[
    str | None,
    typer.Option("--url", help="Address of the server, where the settings do not say it: https://…"),
]


@app.command("list")
def list_users(as_json: JsonOption = False, data: DataOption = None, database: DatabaseOption = None) -> None:
    """Show everybody who has an account."""
    from ayllu.server.state import users

    found = transact(server_settings(data, database), users.listed)
    if as_json:
        print_json([dataclasses.asdict(user) for user in found])
        return
    if not found:
        say("Nobody has an account yet. The server makes the first one: ayllu serve")
        return
    print_table(
        ("name", "role", "state", "password", "since"),
        [
            (
                user.name,
                user.role,
                "disabled" if user.disabled else "enabled",
                "set" if user.has_password else "none",
                day(user.created_at),
            )
            for user in found
        ],
    )


@app.command()
def add(
    name: NameArgument,
    role: Annotated[RoleName, typer.Option("--role", help="What they may do.")] = RoleName.user,
    password: Annotated[bool, typer.Option("--password", help="Ask for a password.")] = False,
    password_stdin: PasswordStdin = False,
    url: UrlOption = None,
    as_json: JsonOption = False,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Make an account. Without a password, print a link that signs them in once."""
    from ayllu.errors import UsageError
    from ayllu.server.state import sign_in, users

    settings = server_settings(data, database)
    hashed = _hashed(password_stdin) if password or password_stdin else None

    def make(db: Db) -> tuple[User, str | None]:
        if role is not RoleName.admin and users.count(db) == 0:
            # The server makes an admin only where there is nobody yet.
            raise UsageError(
                "The first account has to be an admin's.", f"Use: ayllu users add {name} --role admin"
            )
        user = users.create(db, name, role.value, hashed)
        note(db, "user.add", user.name, role=user.role)
        return user, None if hashed else sign_in.new_link(db, user.id, LINK_HOURS * 3600)

    user, token = transact(settings, make)
    link = None if token is None else _link(settings, url, token)
    if as_json:
        print_json({**dataclasses.asdict(user), "link": link})
        return
    say(f"Added {user.name} ({user.role}).")
    if link is not None:
        _print_link(link, LINK_HOURS)


@app.command("set")
def set_user(
    name: NameArgument,
    new_name: Annotated[str | None, typer.Option("--name", help="Call them this from now on.")] = None,
    role: Annotated[RoleName | None, typer.Option("--role", help="What they may do.")] = None,
    disabled: Annotated[
        bool | None,
        typer.Option(
            "--disable/--enable", help="Disabling ends their sessions and keys.", show_default=False
        ),
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(
            "--limit",
            metavar="NAME=NUMBER",
            help="requests_per_minute, tokens_per_minute or concurrent_requests, unlike the server's; "
            "NAME= takes it away. May be repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Change an account."""
    from ayllu.errors import UsageError
    from ayllu.server.state import sign_in, users

    changes: dict[str, Any] = {
        "name": new_name,
        "role": None if role is None else role.value,
        "disabled": disabled,
    }
    changes = {key: value for key, value in changes.items() if value is not None}
    limits = limits_from(limit or [])
    if not changes and not limits:
        raise UsageError("There is nothing to change.", "See: ayllu users set --help")

    def change(db: Db) -> User:
        before = user_named(db, name)
        if limits:
            changes["limits"] = changed_limits(before.limits, limits)
        user = users.update(db, before.id, **changes)
        if user.role != before.role:
            sign_in.end_sessions(db, user.id)
        note(db, "user.change", before.name, changes=changes)
        return user

    user = transact(server_settings(data, database), change)
    if as_json:
        print_json(dataclasses.asdict(user))
    else:
        say(f"Changed {user.name} ({user.role}{', disabled' if user.disabled else ''}).")


@app.command()
def remove(
    name: NameArgument, yes: YesOption = False, data: DataOption = None, database: DatabaseOption = None
) -> None:
    """Delete an account with its keys, conversations and files."""
    from ayllu.server.state import users

    settings = server_settings(data, database)
    user = transact(settings, lambda db: user_named(db, name))
    question = f"Delete {user.name} with all keys, conversations and files?"
    confirm(question, f"ayllu users remove {name}", yes)

    def delete(db: Db) -> None:
        users.delete(db, user.id)
        note(db, "user.delete", user.name)

    transact(settings, delete)
    say(f"Removed {user.name}.")


@app.command()
def link(
    name: NameArgument,
    hours: Annotated[
        float, typer.Option("--hours", min=0.01, max=MOST_LINK_HOURS, help="How long the link works.")
    ] = LINK_HOURS,
    url: UrlOption = None,
    as_json: JsonOption = False,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Print a link that signs this user in once."""
    from ayllu.errors import ConflictError
    from ayllu.server.state import sign_in

    settings = server_settings(data, database)

    def make(db: Db) -> str:
        user = user_named(db, name)
        if user.disabled:
            raise ConflictError(f"{user.name} is disabled.", f"Use: ayllu users set {name} --enable")
        note(db, "user.link", user.name)
        return sign_in.new_link(db, user.id, hours * 3600)

    address = _link(settings, url, transact(settings, make))
    if as_json:
        print_json({"link": address})
    else:
        _print_link(address, hours)


@app.command()
def password(
    name: NameArgument,
    password_stdin: PasswordStdin = False,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Set a user's password: asked without echo, or read from standard input. Their sessions end."""
    from ayllu.server.state import sign_in, users

    settings = server_settings(data, database)
    user = transact(settings, lambda db: user_named(db, name))
    hashed = _hashed(password_stdin)

    def change(db: Db) -> None:
        users.update(db, user.id, password_hash=hashed)
        sign_in.end_sessions(db, user.id)
        note(db, "password.set", user.name)

    transact(settings, change)
    say(f"Set the password of {user.name}; they are signed out everywhere.")


def _hashed(from_stdin: bool) -> str:
    from ayllu.server.state.passwords import hash_password

    return hash_password(_read_password(from_stdin))


def _read_password(from_stdin: bool) -> str:
    from ayllu.errors import UsageError

    if from_stdin:
        given = sys.stdin.readline(MOST_PASSWORD + 3).rstrip("\r\n")
    elif sys.stdin.isatty():
        given = typer.prompt("Password", hide_input=True, confirmation_prompt=True, err=True)
    else:
        raise UsageError(
            "Nobody is there to type a password.", "Give it on standard input, with --password-stdin."
        )
    if not LEAST_PASSWORD <= len(given) <= MOST_PASSWORD:
        raise UsageError(
            f"A password has {LEAST_PASSWORD} to {MOST_PASSWORD} characters.", "Choose another one."
        )
    return given


def _link(settings: Settings, url: str | None, token: str) -> str:
    from ayllu.errors import UsageError
    from ayllu.server.serve import base_url

    if url is not None and not url.startswith(("http://", "https://")):
        raise UsageError(
            f"{url!r} is no address of a server.", "It should look like https://ayllu.example.com."
        )
    return f"{(url or base_url(settings, settings.port)).rstrip('/')}/sign-in?token={token}"


def _print_link(link: str, hours: float) -> None:
    say(f"This link signs in once, within {hours:g} hours. Whoever has it first comes in:")
    typer.echo(link)
