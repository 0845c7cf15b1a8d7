"""`ayllu backup` and `ayllu restore`: everything that the server remembers, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ayllu.cli.accounts import DatabaseOption, DataOption


def backup(
    file: Annotated[
        Path | None,
        typer.Argument(help="Where to write it. Default: `backups` in the folder of the server's data."),
    ] = None,
    data: DataOption = None,
    database_url: DatabaseOption = None,
) -> None:
    """Write a backup of the server's database to one file. The server may go on working."""
    from ayllu.server.state import backup as backups
    from ayllu.server.state.database import Database
    from ayllu.server.state.schema import BACKUPS
    from ayllu.settings import load_settings

    settings = load_settings({"data": data, "database": database_url})
    target = file or backups.new_name(settings.data / BACKUPS, "ayllu")
    database = Database.open(settings.database, settings.data, migrate=False)
    try:
        made = backups.write(database.engines, target)
    finally:
        database.close()
    typer.echo(f"{target}: {made.rows} rows of {len(made.tables)} tables, schema {made.schema}")


def restore(
    file: Annotated[Path, typer.Argument(help="A file of `ayllu backup`.", show_default=False)],
    force: Annotated[
        bool, typer.Option("--force", help="Replace what the database holds; it is backed up first.")
    ] = False,
    data: DataOption = None,
    database_url: DatabaseOption = None,
) -> None:
    """Put a backup into the server's database, in the place of everything in it. Everybody signs in again."""
    from ayllu.server.state import audit
    from ayllu.server.state import backup as backups
    from ayllu.server.state.database import Database
    from ayllu.server.state.schema import BACKUPS
    from ayllu.settings import load_settings

    settings = load_settings({"data": data, "database": database_url})
    database = Database.open(settings.database, settings.data)
    try:
        if force:
            before = backups.new_name(settings.data / BACKUPS, "before-restore")
            backups.write(database.engines, before)
            typer.echo(f"What was there: {before}")
        made = backups.restore(database.engines, file, force=force)
        lines = database.now(audit.verify, read=True)
        database.now(lambda db: audit.record(db, "cli", "database.restore", file.name))
    finally:
        database.close()
    typer.echo(f"Restored {made.rows} rows; the {lines} lines of the audit log are in order.")
