"""Writes docs/cli.md from the commands' own help. Run: make docs; a test fails when it is out of date."""

from __future__ import annotations

from pathlib import Path

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
    for name in ("", *root.commands):
        shown = runner.invoke(
            root, [*([name] if name else []), "--help"], prog_name="ayllu", env={"COLUMNS": "100"}
        )
        pages.append(f"## ayllu {name}".rstrip() + f"\n\n```text\n{shown.output.strip()}\n```\n")
    return "\n".join(pages)


if __name__ == "__main__":
    PAGE.write_text(reference(), encoding="utf-8")
