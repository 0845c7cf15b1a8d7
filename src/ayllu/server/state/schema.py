"""The schema of a database, brought up to date: one process migrates, all of it or nothing, after a backup.

Alembic is loaded only where something is to be done, so that a start with the newest schema costs one query.
"""

from __future__ import annotations

from pathlib import Path

from sqlalchemy import Connection, inspect, select, table, text
from sqlalchemy import column as column_of

from ayllu.errors import StateError
from ayllu.server.state.engines import Engines
from ayllu.server.state.failures import shown_url
from ayllu.server.state.tables import metadata

REVISIONS = ("0001",)
"""Every schema there has been, oldest first."""
MIGRATIONS = Path(__file__).parent / "migrations"
BACKUPS = "backups"

_VERSION_TABLE = "alembic_version"
_MIGRATION_LOCK = 7_242_010_846
"""PostgreSQL's advisory locks are numbers; this one means: somebody migrates an ayllu database."""


def bring_up_to_date(
    engines: Engines,
    folder: Path,
    *,
    migrate: bool = True,
    scripts: Path = MIGRATIONS,
    revisions: tuple[str, ...] = REVISIONS,
) -> None:
    """Raises StateError for a schema that is newer than this program, foreign, or old and to stay so."""
    with engines.reading.connect() as connection:
        found = revision_of(connection)
        _require_encoding(connection)
    if found == revisions[-1]:
        return
    _require_known(found, revisions, engines)
    if not migrate:
        raise StateError(
            f"The database has no schema yet, or an old one ({shown_url(engines.url)}).",
            "Start the server once: ayllu serve",
        )
    with engines.writing.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _MIGRATION_LOCK})
        found = revision_of(connection)  # another process may have done it while we waited
        _require_known(found, revisions, engines)
        if found == revisions[-1]:
            return
        if found is not None and holds_rows(connection):
            _back_up(engines, folder, found)
        upgrade(connection, revisions[-1], scripts)


def revision_of(connection: Connection) -> str | None:
    """The schema of the database; None for one without any. Raises StateError for somebody else's."""
    names = set(inspect(connection).get_table_names())
    if _VERSION_TABLE in names:
        versions = table(_VERSION_TABLE, column_of("version_num"))
        found: str | None = connection.execute(select(versions.c.version_num)).scalar()
        return found
    taken = sorted(names & set(metadata.tables))
    if taken:
        raise StateError(
            f"The database holds a table {taken[0]!r} that is not ours.", "Give ayllu a database of its own."
        )
    return None


def holds_rows(connection: Connection) -> bool:
    """Whether there is anything in it that would be a loss."""
    present = set(inspect(connection).get_table_names())
    for name in sorted(present & set(metadata.tables) - {"audit_head"}):
        if connection.execute(select(1).select_from(table(name)).limit(1)).first() is not None:
            return True
    return False


def upgrade(connection: Connection, revision: str, scripts: Path = MIGRATIONS) -> None:
    """Migrate inside the transaction that is open on `connection`."""
    from alembic import command
    from alembic.config import Config

    config = Config()
    config.set_main_option("script_location", str(scripts).replace("%", "%%"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    command.upgrade(config, revision)


def _require_known(found: str | None, revisions: tuple[str, ...], engines: Engines) -> None:
    if found is not None and found not in revisions:
        raise StateError(
            f"The database ({shown_url(engines.url)}) has schema {found!r}, newer than this program.",
            "Use the newer ayllu, or restore a backup of before.",
        )


def _require_encoding(connection: Connection) -> None:
    if connection.dialect.name != "postgresql":
        return
    encoding = connection.execute(text("SHOW server_encoding")).scalar()
    if encoding != "UTF8":
        raise StateError(
            f"The database keeps text as {encoding}, which lacks most characters.",
            "Create it as UTF-8: createdb --encoding=UTF8 --template=template0 NAME",
        )


def _back_up(engines: Engines, folder: Path, revision: str) -> None:
    """What is there is copied first. The writer's lock is ours, so nothing is written meanwhile."""
    from ayllu.server.state import backup

    is_file = engines.url.get_backend_name() == "sqlite"
    name = f"before-migration-of-{revision}"
    target = backup.new_name(folder / BACKUPS, name, ".db" if is_file else ".zip")
    if is_file:
        backup.copy_sqlite(engines, target)
    else:
        backup.write(engines, target)
