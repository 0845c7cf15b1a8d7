"""The documents tell the truth: examples run, the command reference is current, links lead somewhere."""

from __future__ import annotations

import doctest
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def test_the_readmes_examples_run() -> None:
    failed, tried = doctest.testfile(str(ROOT / "README.md"), module_relative=False)
    assert tried > 0
    assert failed == 0


def test_the_command_reference_is_current() -> None:
    spec = importlib.util.spec_from_file_location("cli_reference", ROOT / "docs" / "cli_reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == module.reference(), "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_the_presets_page_has_the_counts_of_the_code() -> None:
    from ayllu.model.presets import PRESETS

    page = (ROOT / "docs" / "presets.md").read_text(encoding="utf-8")
    for name, make in PRESETS.items():
        assert f"| `{name}` | {make().parameters:,} |" in page


def test_readme_names_every_command_of_make() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(
        r"`?make ([a-z-]+)", "".join(page.read_text(encoding="utf-8") for page in PAGES)
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_every_golden_test_exists_by_name() -> None:
    page = (ROOT / "docs" / "golden_tests.md").read_text(encoding="utf-8")
    code = "".join(file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", page)
    assert len(re.findall(r"^\| T\d+ ", page, re.MULTILINE)) == 15
    assert [name for name in named if f"def {name}(" not in code] == []
