"""The catalogue: the shipped one is sound, malformed ones are refused, fallbacks go to the next smaller."""

from __future__ import annotations

import subprocess
import sys

import pytest

from ayllu.errors import AylluError, UnknownModelError, UsageError
from ayllu.weights.catalogue import builtin_catalogue, parse_catalogue
from ayllu.weights.sources import HubSource, PackageSource
from tests.weights.small_models import entry_text

GOOD = entry_text("m", b"x" * 10, "hf:org/name/model.gguf")


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
        if entry.sha256 is None:
            assert all(isinstance(source, HubSource) and source.file is None for source in entry.sources())


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
