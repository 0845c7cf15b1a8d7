"""`ayllu config`: what every setting is, and why. Secrets are masked."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ayllu.cli.accounts import (
    DatabaseOption,
    DataOption,
    JsonOption,
    opened,
    print_json,
    say,
    server_settings,
)

if TYPE_CHECKING:
    from ayllu.settings import Knob, Settings

app = typer.Typer(help="Show settings and where they come from.", no_args_is_help=True, rich_markup_mode=None)

ORDER = (
    "A value comes from the first of: flag > environment (AYLLU_NAME) > file > stored by an admin > default."
)


@app.command("path")
def show_path() -> None:
    """Print the path of the settings file, whether it exists or not."""
    from ayllu.settings import settings_file

    typer.echo(settings_file())


@app.command()
def show(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[NAME]...", help="Settings to show. Default: all.")
    ] = None,
    as_json: JsonOption = False,
    data: DataOption = None,
    database: DatabaseOption = None,
) -> None:
    """Show settings: value, origin, description.

    A value comes from the first of: flag, environment, file, what an admin stored in the server's database,
    default. (pinned): set by one of the first three, so what an admin stores does not count.
    """
    from ayllu.settings import describe, settings_file, with_stored

    given = server_settings(data, database)
    stored = _stored(given)
    knobs = _chosen(describe(with_stored(given, stored)), names or [])
    if as_json:
        print_json([_object(knob, stored) for knob in knobs])
        return
    if not names:
        file = settings_file()
        typer.echo(f"{ORDER}\nFile: {file}{'' if file.exists() else ' (not there)'}\n")
    width = max(len(knob.name) for knob in knobs)
    for knob in knobs:
        origin = f"{knob.origin} (pinned)" if knob.pinned else knob.origin
        typer.echo(f"{knob.name:<{width}}  {_text(knob.value)}  [{origin}]")
        live = " An admin may change it while the server runs." if knob.live and not knob.pinned else ""
        typer.echo(f"{'':<{width}}  {knob.description}{live}")
        if knob.pinned and knob.live and knob.name in stored:
            typer.echo(f"{'':<{width}}  An admin stored {_text(stored[knob.name])}, which does not count.")


def _chosen(knobs: list[Knob], names: list[str]) -> list[Knob]:
    """Those that were asked for, in the order of asking. Raises UsageError."""
    from ayllu.errors import UsageError, did_you_mean

    by_name = {knob.name: knob for knob in knobs}
    for name in names:
        if name not in by_name:
            raise UsageError(
                f"There is no setting {name!r}.{did_you_mean(name, by_name)}",
                "All of them: ayllu config show",
            )
    return [by_name[name] for name in names] if names else knobs


def _stored(settings: Settings) -> Mapping[str, Any]:
    """What admins stored. A database that is not there yet, or does not answer, hides no other setting."""
    from ayllu.errors import AylluError

    if not _may_be_there(settings):
        return {}
    from ayllu.server.state import options

    try:
        with opened(settings, migrate=False) as found:
            return found.now(options.all_of, read=True)
    except AylluError as error:
        say(f"note: stored settings are not shown: {error.problem}")
        return {}


def _may_be_there(settings: Settings) -> bool:
    """To look at a SQLite file that does not exist would make one."""
    from ayllu.server.state.engines import FILE_NAME

    address = settings.database
    if address is None:
        return (settings.data / FILE_NAME).exists()
    if not address.startswith("sqlite"):
        return True
    return Path(address.partition("///")[2].partition("?")[0]).exists()


def _text(value: Any) -> str:
    if value is None:
        return "not set"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple | list):
        return ", ".join(map(str, value)) or "none"
    return str(value)


def _object(knob: Knob, stored: Mapping[str, Any]) -> dict[str, Any]:
    shown = dataclasses.asdict(knob)
    if isinstance(knob.value, Path):
        shown["value"] = str(knob.value)
    return {**shown, "stored": stored.get(knob.name) if knob.live else None}
