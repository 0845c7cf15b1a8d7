"""Names and digests from outside: the hostile ones are refused, the usual ones pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.errors import AylluError, UnsupportedError, UsageError
from ayllu.weights.file_kinds import is_pickle
from ayllu.weights.sources.safe_names import (
    model_name_from,
    refuse_unless_model_file,
    safe_digest,
    safe_model_name,
    safe_name,
)

HOSTILE_NAMES = [
    "",
    ".",
    "..",
    "../config.json",
    "../../etc/passwd",
    "a/../../b.json",
    "a/..",
    "./config.json",
    "a//b.json",
    "/etc/passwd",
    "//host/share.json",
    "~/x.json",
    "~root/x.json",
    "\\windows\\x.json",
    "..\\x.json",
    "a\\..\\..\\x.json",
    "C:\\x.json",
    "C:x.json",
    "c:/x.json",
    "file:///x.json",
    "config.json\0.gguf",
    "\0",
    "a\nb.json",
    "a\rb.json",
    "a\tb.json",
    "a\x1b[2Jb.json",
    "a\x7fb.json",
    "a\u202egpj.json",
    "a\u200bb.json",
    "\ud800.json",
    "config\uff0fjson",
    "\uff0e\uff0e/x.json",
    "\u2025/x.json",
    "CON",
    "con.json",
    "NUL.gguf",
    "a/aux.json",
    "COM1.json",
    "lpt9",
    "CONIN$",
    "nul .json",
    "trailing.json.",
    "trailing.json ",
    " leading.json",
    "folder./x.json",
    ".hidden.json",
    ".git/config.json",
    "a/.ssh/x.json",
    'quote".json',
    "star*.json",
    "what?.json",
    "a|b.json",
    "a<b>.json",
    "x" * 201 + ".json",
    "a/" * 300 + "b.json",
    "1/2/3/4/5/6/7/8/9.json",
    "stream.json::$DATA",
    "é" * 150,
]


def test_there_are_at_least_forty_hostile_names():
    assert len(set(HOSTILE_NAMES)) >= 40


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_hostile_file_name_is_refused_in_one_line(name):
    with pytest.raises(UsageError, match="refused") as caught:
        safe_name(name)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model-00001-of-00050.safetensors",
        "qwen2.5-coder-1.5b-instruct-q4_k_m.gguf",
        "onnx/model (1).json",
        "日本語.gguf",
        "contact.json",
        "auxiliary.json",
    ],
)
def test_a_usual_name_passes(name):
    assert str(refuse_unless_model_file(name)) == name


@given(st.text(max_size=60))
def test_whatever_passes_stays_inside_its_folder(tmp_path_factory, name):
    folder = tmp_path_factory.getbasetemp() / "store"
    try:
        path = safe_name(name)
    except UsageError:
        return
    joined = (folder / path).resolve()
    assert joined.is_relative_to(folder.resolve()) and joined != folder.resolve()


PICKLES = [
    "pytorch_model.bin",
    "model.pt",
    "consolidated.00.pth",
    "weights.pkl",
    "last.ckpt",
    "tf_model.h5",
    "model.keras",
    "a.npy",
    "b.npz",
    "c.pickle",
    "d.joblib",
    "model.safetensors.zip",
    "model.tar.gz",
    "model.PT",
    "pytorch_model.bin.gguf",
    "model.7z",
    "flax_model.msgpack",
    "x.dill",
]


@pytest.mark.parametrize("name", PICKLES)
def test_a_pickle_or_an_archive_is_refused_by_name(name):
    assert is_pickle(name)
    with pytest.raises(UnsupportedError, match="run code"):
        refuse_unless_model_file(name)


@pytest.mark.parametrize("name", ["modeling.py", "setup.py", "run.sh", "README.md", "image.png", "lib.so"])
def test_a_file_that_is_no_part_of_a_model_is_refused(name):
    with pytest.raises(UnsupportedError, match="not a model file"):
        refuse_unless_model_file(name)


@pytest.mark.parametrize(
    "digest",
    [
        "",
        "0" * 63,
        "0" * 65,
        "A" * 64,
        "g" * 64,
        "sha256:" + "0" * 64,
        "../" + "0" * 61,
        "0" * 63 + "\n",
        "０" * 64,
    ],
    ids=ascii,
)
def test_a_malformed_digest_is_refused(digest):
    with pytest.raises(UsageError, match="not a SHA-256"):
        safe_digest(digest)


@pytest.mark.parametrize(
    "name", ["", "A", ".partial", "-x", "a/b", "a..b", "con", "nul.gguf", "x" * 97, "é", "a "]
)
def test_a_name_that_cannot_be_a_folder_everywhere_cannot_name_a_model(name):
    with pytest.raises(UsageError, match="cannot name a model"):
        safe_model_name(name)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Llama-4-Scout-17B-16E-Instruct", "llama-4-scout-17b-16e-instruct"),
        ("SmolLM2-135M-Instruct.Q4_1", "smollm2-135m-instruct.q4_1"),
        ("My Model (final)", "my-model-final"),
        ("..odd..", "odd"),
    ],
)
def test_a_model_name_is_made_from_a_repository_or_file_name(text, name):
    assert model_name_from(text) == name


@given(st.text(max_size=200))
def test_a_made_model_name_is_valid_or_refused(text):
    try:
        name = model_name_from(text)
    except AylluError:
        return
    assert safe_model_name(name) == name
