"""The catalogue: the shipped one is sound, malformed ones are refused, fallbacks go to the next smaller."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ayllu.errors import AylluError, IntegrityError, UnknownModelError, UsageError
from ayllu.weights.catalogue import builtin_catalogue, parse_catalogue
from ayllu.weights.sources import HubSource, PackageSource
from ayllu.weights.sources.base import Fetched
from tests.weights.small_models import entry_text, folder_text

GOOD = entry_text("m", b"x" * 10, "hf:org/name/model.gguf")
FOLDER = folder_text("f", {"config.json": b"{}", "model.safetensors": b"x" * 8}, "hf:org/name")


def test_the_default_models_are_pinned_and_come_from_the_hub_first_and_packages_second():
    for name in ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct", "qwen2.5-coder-1.5b-instruct"):
        entry = builtin_catalogue().require(name)
        assert entry.sha256 and entry.licence == "Apache-2.0" and entry.notice
        assert [type(source) for source in entry.sources()] == [HubSource, PackageSource]


def test_the_default_model_of_the_settings_is_in_the_catalogue():
    from ayllu.settings import Settings

    assert builtin_catalogue().get(Settings().default_model)


def test_llama_4_is_listed_gated_under_its_own_licence_with_the_notice_it_asks_for():
    for name in ("llama-4-scout-17b-16e-instruct", "llama-4-maverick-17b-128e-instruct"):
        entry = builtin_catalogue().require(name)
        assert entry.gated and entry.licence == "Llama 4 Community License"
        assert "Copyright © Meta Platforms, Inc. All Rights Reserved." in entry.notice


def test_every_hub_entry_without_a_hash_is_a_whole_repository():
    for entry in builtin_catalogue().model:
        if entry.sha256 is None and not entry.files:
            assert all(isinstance(source, HubSource) and source.file is None for source in entry.sources())


def test_the_embedding_model_is_pinned_file_by_file_and_comes_from_the_hub_first():
    entry = builtin_catalogue().require("all-minilm-l6-v2")
    assert entry.licence == "Apache-2.0" and entry.notice and entry.pooling == "mean"
    assert {"config.json", "model.safetensors", "tokenizer.json"} < set(entry.promised)
    hub, package = entry.sources()
    assert isinstance(hub, HubSource) and hub.file is None
    assert isinstance(package, PackageSource)
    assert {member.name: member.sha256 for member in package.members} == entry.promised
    assert entry not in builtin_catalogue().fallbacks("qwen2.5-coder-1.5b-instruct")


def test_of_a_folder_only_what_was_promised_is_taken_in(tmp_path):
    entry = parse_catalogue(FOLDER).require("f")
    right = [Fetched(name, tmp_path / name, 1, digest) for name, digest in entry.promised.items()]
    more = Fetched("vocab.txt", tmp_path / "vocab.txt", 1, "0" * 64)
    assert entry.keep_promised([more, *reversed(right)]) == right
    with pytest.raises(IntegrityError, match=r"model\.safetensors is missing"):
        entry.keep_promised([more, right[0]])
    with pytest.raises(IntegrityError, match=r"config\.json has SHA-256 0000"):
        entry.keep_promised([Fetched("config.json", tmp_path / "x", 1, "0" * 64), right[1]])


def test_the_pooling_of_known_bytes_is_known_wherever_they_came_from():
    catalogue = parse_catalogue(FOLDER.replace("context = 128", 'context = 128\npooling = "cls"'))
    promised = catalogue.require("f").promised
    assert catalogue.pooling_of(promised | {"vocab.txt": "0" * 64}) == "cls"
    assert catalogue.pooling_of(promised | {"config.json": "0" * 64}) is None
    assert catalogue.pooling_of({"config.json": promised["config.json"]}) is None


def test_fallbacks_go_to_the_nearest_smaller_pinned_model():
    fallbacks = builtin_catalogue().fallbacks
    assert [entry.name for entry in fallbacks("qwen2.5-coder-1.5b-instruct")] == [
        "qwen2.5-coder-0.5b-instruct",
        "smollm2-135m-instruct",
    ]
    assert fallbacks("smollm2-135m-instruct") == []


def test_an_unknown_name_is_met_with_the_nearest_known_one():
    with pytest.raises(UnknownModelError, match=r"Did you mean qwen2\.5-coder-1\.5b-instruct\?"):
        builtin_catalogue().require("qwen2.5-coder-1.5b-instruc")


@pytest.mark.parametrize(
    "text",
    [
        "model = 5",
        "[[model]]",
        "not toml [",
        "surprise = 1\n" + GOOD,
        GOOD + "\n" + GOOD,
        GOOD.replace('title = "t"', 'title = "t"\nunknown_key = 1'),
        GOOD.replace("hf:org/name/model.gguf", "hf:org"),
        GOOD.replace("hf:org/name/model.gguf", "file:/etc/passwd"),
        GOOD.replace("hf:org/name/model.gguf", "ftp://host/x"),
        GOOD.replace("hf:org/name/model.gguf", "https://user:pw@host/x"),
        GOOD.replace("hf:org/name/model.gguf", "hf:org/name/model.bin"),
        GOOD.replace("hf:org/name/model.gguf", "pypi:x"),
        GOOD.replace("size_bytes = 10", "size_bytes = -1"),
        GOOD.replace("size_bytes = 10", 'size_bytes = "10"'),
        GOOD.replace("size_bytes = 10", "size_bytes = 10.5"),
        GOOD.replace("context = 128", "context = true"),
        GOOD.replace('name = "m"', 'name = "../m"'),
        GOOD.replace('file = "model.gguf"', 'file = "../model.gguf"'),
        GOOD.replace('file = "model.gguf"', 'file = "model.pkl"'),
        GOOD.replace('file = "model.gguf"\n', ""),
        GOOD.replace('sha256 = "', 'sha256 = "X'),
        GOOD.split("[[model.source]]")[0],
        GOOD.replace("[[model.source]]", '[[model.source]]\nmember = "*"'),
        GOOD.replace("[[model.source]]", '[[model.source]]\nfolder = "a"'),
        GOOD.replace("hf:org/name/model.gguf", 'pypi:x==1"\nfolder = "a'),
        FOLDER.replace("size_bytes = 10", "size_bytes = 11"),
        FOLDER.replace("size_bytes = 8", "size_bytes = 0"),
        FOLDER.replace('name = "config.json"', 'name = "model.safetensors"'),
        FOLDER.replace('name = "config.json"', 'name = "1_Pooling/config.json"'),
        FOLDER.replace('name = "config.json"', 'name = "../config.json"'),
        FOLDER.replace('name = "config.json"', 'name = "config.py"'),
        FOLDER.replace('name = "config.json"', 'name = "pytorch_model.bin"'),
        FOLDER.replace('sha256 = "', 'sha256 = "X'),
        FOLDER.replace("context = 128", 'context = 128\npooling = "max"'),
        FOLDER.replace("hf:org/name", "https://host/x"),
        FOLDER.replace("hf:org/name", "pypi:x==1"),
        FOLDER.replace("hf:org/name", 'pypi:x{1..2}==1"\nfolder = "a'),
        FOLDER.replace("hf:org/name", 'pypi:x==1"\nfolder = "a"\nmember = "*'),
    ],
)
def test_a_malformed_catalogue_is_refused_in_one_line(text):
    with pytest.raises(AylluError) as caught:
        parse_catalogue(text)
    assert (
        isinstance(caught.value, UsageError)
        or "model file" in str(caught.value)
        or "pickle" in str(caught.value)
    )
    assert str(caught.value).isprintable()


NO_TORCH = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Block())
from pathlib import Path
from ayllu.weights.store import Store
store = Store(Path(sys.argv[1]))
print(len(store.catalogue.names()), store.pull(f"file:{sys.argv[2]}").name)
assert "torch" not in sys.modules
"""


def test_catalogue_and_pull_work_without_torch(tmp_path):
    (tmp_path / "tiny.gguf").write_bytes(b"GGUF" + bytes(100))
    command = [sys.executable, "-c", NO_TORCH, str(tmp_path / "store"), str(tmp_path / "tiny.gguf")]
    answer = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert answer.split()[1] == "tiny"
