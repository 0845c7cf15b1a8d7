"""`file:` sources: what is taken in, how, and what is refused."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from ayllu.errors import ModelFileError, UnknownModelError, UsageError
from ayllu.weights.sources import FileSource, HubSource, PackageSource, parse_source
from ayllu.weights.store import Store
from tests.weights.small_models import catalogue_of, gguf_bytes, sha256


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", catalogue=catalogue_of("model = []"))


def make_folder(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    (folder / "pytorch_model.bin").write_bytes(b"\x80pickle")
    (folder / "modeling.py").write_text("raise SystemExit")
    return folder


@pytest.mark.parametrize("form", ["file:{}", "{}"])
def test_a_gguf_file_is_hashed_and_linked_not_doubled(store, tmp_path, form):
    original = tmp_path / "Tiny Model.gguf"
    original.write_bytes(data := gguf_bytes(5000))
    model = store.pull(form.format(original))
    assert (model.name, model.format, model.sha256) == ("tiny-model", "gguf", sha256(data))
    assert model.path.samefile(original)
    original.unlink()
    assert store.find("tiny-model").path.read_bytes() == data


def test_a_file_on_another_disk_is_copied(store, tmp_path, monkeypatch):
    original = tmp_path / "m.gguf"
    original.write_bytes(data := gguf_bytes(5000))

    def other_disk(self, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", other_disk)
    model = store.pull(f"file:{original}")
    assert not model.path.samefile(original)
    assert model.path.read_bytes() == data


def test_a_symbolic_link_is_followed_to_its_file(store, tmp_path):
    (tmp_path / "real.gguf").write_bytes(data := gguf_bytes(500))
    (tmp_path / "link.gguf").symlink_to(tmp_path / "real.gguf")
    model = store.pull(f"file:{tmp_path / 'link.gguf'}", name="linked")
    assert not model.path.is_symlink()
    assert model.path.read_bytes() == data


def test_a_folder_brings_tensors_and_companions_but_no_pickle_and_no_code(store, tmp_path):
    model = store.pull(str(make_folder(tmp_path / "My-Model")))
    assert (model.name, model.format) == ("my-model", "safetensors")
    assert {file.name for file in model.files} == {"config.json", "tokenizer.json", "model.safetensors"}
    assert {path.name for path in model.path.iterdir()} == {file.name for file in model.files} | {
        "ayllu-model.json"
    }


def test_a_model_can_be_used_where_it_lies(store, tmp_path):
    folder = make_folder(tmp_path / "here")
    assert store.find(str(folder)).path == folder
    assert store.find(folder).format == "safetensors"
    file = tmp_path / "x.gguf"
    file.write_bytes(gguf_bytes(50))
    assert store.find(f"file:{file}").sha256 is None
    assert store.list() == []


@pytest.mark.parametrize("name", ["weights.pt", "model.bin", "renamed.gguf", "model.gguf.zip"])
def test_a_file_that_is_no_gguf_is_refused_whatever_its_name(store, tmp_path, name):
    (tmp_path / name).write_bytes(b"PK\x03\x04 or a pickle")
    with pytest.raises(ModelFileError, match="not a GGUF"):
        store.pull(f"file:{tmp_path / name}")


def test_a_folder_of_pickles_is_refused_by_name(store, tmp_path):
    folder = make_folder(tmp_path / "old")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"pytorch_model\.bin, a pickle"):
        store.pull(str(folder))


def test_a_missing_path_is_said_plainly(store, tmp_path):
    with pytest.raises(UnknownModelError, match="no file or folder"):
        store.pull(f"file:{tmp_path / 'gone.gguf'}")


def test_a_pipe_is_no_model(store, tmp_path):
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(ModelFileError):
        store.find(str(tmp_path / "pipe.gguf"))


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("hf:org/name", HubSource),
        ("pypi:pack==1.0", PackageSource),
        ("file:x.gguf", FileSource),
        ("./x", FileSource),
        ("x.gguf", FileSource),
        ("qwen2.5-coder-1.5b-instruct", type(None)),
    ],
)
def test_a_source_is_read_by_its_scheme(text, kind):
    assert isinstance(parse_source(text), kind)


@pytest.mark.parametrize(
    "text",
    [
        "hf:",
        "hf:name",
        "hf:org/",
        "hf:org/name@",
        "hf:org/name@../x",
        "hf:../../x",
        "hf:org/..",
        "hf:org/name/../../x.gguf",
        "hf:org/name//x.gguf",
        "pypi:",
        "pypi:name",
        "pypi:name>=1",
        "pypi:name==1 --index-url http://x",
        "pypi:--index-url==1",
        "pypi:name==1;os_name=='x'",
        "pypi:n{5..1}==1",
        "pypi:n{1..9999}==1",
        "pypi:n{a..b}==1",
        "ftp://host/x",
        "https://host/x.gguf",
        "s3:bucket",
    ],
)
def test_a_malformed_source_is_a_usage_error_with_the_right_form(text):
    with pytest.raises(UsageError):
        parse_source(text)


def test_a_forgotten_hub_prefix_is_suggested():
    with pytest.raises(UnknownModelError, match="ayllu pull hf:org/name"):
        parse_source("org/name")


def test_a_link_out_of_a_folder_is_not_followed(store, tmp_path):
    (tmp_path / "secret").write_text("not yours")
    folder = make_folder(tmp_path / "model")
    (folder / "notes.json").symlink_to(tmp_path / "secret")
    for ask in (store.pull, store.find):
        with pytest.raises(ModelFileError, match="link out of the model's folder"):
            ask(str(folder))
    assert store.list() == []
