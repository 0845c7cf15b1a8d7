"""`ayllu pull`, `list` and `remove` as a person meets them."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import typer
from typer.testing import CliRunner

from ayllu.cli import models
from ayllu.errors import UnknownModelError, UsageError
from ayllu.weights.catalogue import builtin_catalogue
from tests.weights.small_models import gguf_bytes, sha256

DATA = gguf_bytes(2_000)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("AYLLU_STORE", str(tmp_path / "store"))
    (tmp_path / "empty.toml").touch()
    monkeypatch.setenv("AYLLU_CONFIG", str(tmp_path / "empty.toml"))
    app = typer.Typer(pretty_exceptions_enable=False)
    app.command("pull")(models.pull)
    app.command("list")(models.list_models)
    app.command("remove")(models.remove)

    def invoke(*arguments: str, columns: int = 100):
        return CliRunner().invoke(app, list(arguments), env={"COLUMNS": str(columns)})

    return invoke


@pytest.fixture
def tiny(tmp_path):
    file = tmp_path / "tiny.gguf"
    file.write_bytes(DATA)
    return f"file:{file}"


def test_pull_says_what_it_is_where_it_is_and_what_comes_next(run, tiny, tmp_path):
    result = run("pull", tiny, "--name", "my-tiny")
    assert result.exit_code == 0
    assert "my-tiny: 0.0 MB, SHA-256 recorded" in result.output
    assert "Licence:" in result.output
    assert str(tmp_path / "store" / "my-tiny" / "tiny.gguf") in result.output
    assert "Next:    ayllu chat my-tiny" in result.output


def test_list_shows_what_is_installed_and_what_could_be(run, tiny):
    assert "No model is installed" in run("list").output
    run("pull", tiny)
    output = run("list").output
    assert "tiny" in output and "qwen2.5-coder-1.5b-instruct" in output


def test_list_speaks_json_to_programs(run, tiny, tmp_path):
    run("pull", tiny)
    listing = json.loads(run("list", "--json").output)
    assert listing["store"] == str(tmp_path / "store")
    assert [(model["name"], model["sha256"]) for model in listing["installed"]] == [("tiny", sha256(DATA))]
    assert {entry["name"] for entry in listing["available"]} >= {"smollm2-135m-instruct"}


def test_a_damaged_model_is_shown_with_the_way_out(run, tiny, tmp_path):
    run("pull", tiny)
    (tmp_path / "store/tiny/tiny.gguf").unlink()
    assert "tiny is damaged: ayllu remove tiny" in run("list").output
    assert run("remove", "tiny", "--yes").exit_code == 0


def test_remove_asks_unless_told(run, tiny, tmp_path):
    run("pull", tiny)
    assert isinstance(run("remove", "tiny").exception, UsageError)
    assert (tmp_path / "store/tiny").exists()
    assert "Removed tiny" in run("remove", "tiny", "--yes").output
    assert not (tmp_path / "store/tiny").exists()
    assert isinstance(run("remove", "tiny", "--yes").exception, UnknownModelError)


def test_another_store_can_be_named(run, tiny, tmp_path):
    run("pull", tiny, "--store", str(tmp_path / "other"))
    assert (tmp_path / "other/tiny/tiny.gguf").exists()
    assert not (tmp_path / "store").exists()


def test_ctrl_c_says_that_the_next_pull_continues(run, tiny, monkeypatch):
    from ayllu.weights.store import Store

    def interrupted(self, source_or_name, progress, name):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "pull", interrupted)
    result = run("pull", tiny)
    assert result.exit_code == 130
    assert "continues where this one stopped" in result.output


def test_errors_reach_the_program_typed(run):
    assert isinstance(run("pull", "qwen9").exception, UnknownModelError)


@pytest.mark.parametrize("command", ["pull", "list", "remove"])
def test_help_is_there(run, command):
    result = run(command, "--help")
    assert result.exit_code == 0 and "--store" in result.output


def test_importing_the_commands_loads_nothing_heavy():
    heavy = ("torch", "huggingface_hub", "httpx2", "pydantic", "rich.table", "numpy", "filelock")
    code = f"import ayllu.cli.models, sys; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_verified_is_said_only_of_a_hash_that_was_promised():
    pinned = SimpleNamespace(sha256="a" * 64, promised={})
    folder = SimpleNamespace(sha256=None, promised={"config.json": "c" * 64})
    unpinned = SimpleNamespace(sha256=None, promised={})
    opened = SimpleNamespace(catalogue=SimpleNamespace(model=[pinned, folder, unpinned]))

    def said(source, digest, **files):
        held = [SimpleNamespace(name=f"{name}.json", sha256=sha256) for name, sha256 in files.items()]
        return models._verification(opened, SimpleNamespace(source=source, sha256=digest, files=held))

    assert said("pypi:x==1", "a" * 64) == "SHA-256 verified"
    assert said("hf:org/name", None) == said("pypi:x==1", None, config="c" * 64) == "SHA-256 verified"
    assert said("pypi:x==1", "b" * 64) == said("file:/x", None) == "SHA-256 recorded"
    assert said("pypi:x==1", None, config="d" * 64) == "SHA-256 recorded"


def test_list_fits_eighty_columns_with_one_line_for_each_row(run, tiny):
    run("pull", tiny, "--name", "m" * 60)
    lines = run("list", columns=80).output.splitlines()
    catalogue = lines[lines.index("Ready to pull: ayllu pull NAME") :]
    assert all(len(line) <= 80 for line in catalogue)
    entries = builtin_catalogue().model
    assert len(catalogue) == 2 + 2 * len(entries) + any(entry.gated for entry in entries)
    assert len([line for line in lines if line.startswith("m" * 60)]) == 1


@pytest.mark.parametrize(
    ("source", "short"),
    [
        ("hf:org/name@ab810cf6/model.Q4_1.gguf", "hf:org/name"),
        ("hf:org/name/model.gguf", "hf:org/name"),
        ("pypi:pack-part{1..22}==0.1", "pypi:pack-part{1..22}"),
        ("file:/a/b.gguf", "file:/a/b.gguf"),
    ],
)
def test_a_source_is_shown_without_its_details(source, short):
    assert models._short_source(source) == short
