"""`ayllu`: one command with many verbs. Everything heavy is imported by the verb that needs it."""

from __future__ import annotations

import io
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from ayllu import __version__
from ayllu.cli import backup, batch, chat, config, convert, keys, models, serve, show, users
from ayllu.cli.bench import command as bench
from ayllu.errors import AylluError, UsageError

if TYPE_CHECKING:
    from ayllu.engine.launch import Launched

# Plain help: with rich's, `ayllu --help` would take twice as long (0.20 s against 0.09 s, 2-core Zen 4).
app = typer.Typer(
    name="ayllu",
    help="The open Llama 4 system: talk to models, serve them, fetch them, look inside, convert them.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Start here: ayllu chat",
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"ayllu {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


app.command("chat")(chat.chat)
app.command("serve", short_help="Serve models to programs and people.")(serve.serve)
app.command("batch")(batch.batch)
app.command("pull", short_help="Fetch a model: verified, resumable.")(models.pull)
app.command("list", short_help="Show installed models and the catalogue.")(models.list_models)
app.command("show", short_help="Show what a model is and what it needs.")(show.show)
app.command("remove")(models.remove)
app.command("convert")(convert.convert)
app.add_typer(users.app, name="users")
app.add_typer(keys.app, name="keys")
app.add_typer(config.app, name="config")
app.command("backup")(backup.backup)
app.command("restore")(backup.restore)
app.command("bench", short_help="Measure speed here, beside other programs.")(bench.bench)


def main(launched: Launched | None = None) -> None:
    """Entry point: an expected failure becomes one line on standard error and its exit code.

    launched: an engine's process that is under way already; the command may take it (`ayllu.cli.start`).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A terminal that lacks a character shows a question mark: no reason to lose an answer.
            stream.reconfigure(errors="replace")
    try:
        app(obj=launched)
    except AylluError as error:
        sys.exit(report(error))
    except OSError as error:
        problem = f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}."
        sys.exit(report(UsageError(problem, "Check the path and its permissions.")))


def report(error: AylluError) -> int:
    """Print the error and return its exit code."""
    problem = f"\x1b[1;31merror:\x1b[0m {error.problem}" if sys.stderr.isatty() else f"error: {error.problem}"
    print(f"{problem} {error.fix}".rstrip(), file=sys.stderr)
    return error.exit_code
