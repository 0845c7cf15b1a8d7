"""Writes docs/cli.md from the commands' own help. Run: make docs; a test fails when it is out of date."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import typer
from click.testing import CliRunner

from ayllu.cli.main import app

PAGE = Path(__file__).parent / "cli.md"
INTRODUCTION = """# Commands

Written by `make docs` from the commands' own `--help`.
"""


def reference() -> str:
    """The page as it should be."""
    root = typer.main.get_command(app)
    runner = CliRunner()
    pages = [INTRODUCTION]
    for words in _commands(root):
        shown = runner.invoke(root, [*words, "--help"], prog_name="ayllu", env={"COLUMNS": "100"})
        pages.append(f"## {' '.join(['ayllu', *words])}\n\n```text\n{shown.output.strip()}\n```\n")
    return "\n".join(pages)


def _commands(root: Any, words: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """A command and all below it, as they are typed."""
    below = getattr(root, "commands", {})
    return [words, *(found for name in below for found in _commands(below[name], (*words, name)))]


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
