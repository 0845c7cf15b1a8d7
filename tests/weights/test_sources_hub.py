"""`hf:` sources against a loopback server that speaks the hub's protocol."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from ayllu.errors import AylluError, IntegrityError, SourceError, UnsupportedError, UsageError
from ayllu.weights.sources.base import Limits
from ayllu.weights.sources.hub_choice import choose_files
from ayllu.weights.store import Store
from tests.weights.loopback import COMMIT, loopback
from tests.weights.small_models import catalogue_of, entry_text, gguf_bytes, sha256
from tests.weights.test_sources_names import HOSTILE_NAMES

QUICK = Limits(connect_s=2, stall_s=2, attempts=3, backoff_s=0.01, longest_backoff_s=0.05)
REPOSITORY = {
    "config.json": b'{"model_type": "llama"}',
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "LICENSE": b"Apache",
    "README.md": b"# hello",
    "model-00001-of-00002.safetensors": b"\1" * 300_000,
    "model-00002-of-00002.safetensors": b"\2" * 200_000,
    "model.safetensors.index.json": json.dumps(
        {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    ).encode(),
    "pytorch_model.bin": b"\x80pickle",
    "modeling_custom.py": b"raise SystemExit",
    "original/params.json": b"{}",
}
TAKEN = set(REPOSITORY) - {"README.md", "pytorch_model.bin", "modeling_custom.py", "original/params.json"}


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with loopback() as running:
        monkeypatch.setenv("HF_ENDPOINT", running.base)
        yield running


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store", catalogue=catalogue_of("model = []"), limits=QUICK)


def test_a_repository_brings_tensors_configuration_and_tokenizer_only(server, store):
    server.serve_repository("org/Name", REPOSITORY)
    model = store.pull("hf:org/Name")
    assert (model.name, model.format, model.source) == ("name", "safetensors", "hf:org/Name")
    assert {file.name: file.sha256 for file in model.files} == {n: sha256(REPOSITORY[n]) for n in TAKEN}
    assert {name: (model.path / name).read_bytes() for name in TAKEN} == {n: REPOSITORY[n] for n in TAKEN}
    assert not [path for path in server.asked if path.endswith((".bin", ".py", "params.json"))]


def test_other_programs_find_the_files_in_the_hub_cache(server, store, tmp_path):
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    server.serve_repository("org/name", REPOSITORY)
    model = store.pull("hf:org/name")
    cache = tmp_path / "hub"
    found = try_to_load_from_cache("org/name", "config.json", cache_dir=cache, revision="main")
    assert found is not None and Path(found).read_bytes() == REPOSITORY["config.json"]
    snapshot = snapshot_download("org/name", cache_dir=cache, local_files_only=True)
    assert snapshot.endswith(COMMIT)
    blob = cache / "models--org--name" / "blobs" / sha256(REPOSITORY["model-00001-of-00002.safetensors"])
    assert blob.samefile(model.path / "model-00001-of-00002.safetensors")


def test_what_the_hub_library_downloaded_is_not_fetched_again(server, store, tmp_path):
    from huggingface_hub import hf_hub_download

    served = server.serve_repository("org/name", {"m.gguf": gguf_bytes(300_000)})["m.gguf"]
    hf_hub_download("org/name", "m.gguf", cache_dir=tmp_path / "hub", endpoint=server.base)
    sent = served.body_bytes_sent
    assert store.pull("hf:org/name/m.gguf").sha256 == sha256(served.data)
    assert served.body_bytes_sent == sent == 300_000


def test_a_damaged_file_in_the_cache_is_replaced_not_used(server, store, tmp_path):
    served = server.serve_repository("org/name", {"m.gguf": gguf_bytes(300_000)})["m.gguf"]
    blob = tmp_path / "hub" / "models--org--name" / "blobs" / sha256(served.data)
    blob.parent.mkdir(parents=True)
    blob.write_bytes(b"\0" * 300_000)
    assert store.pull("hf:org/name/m.gguf").sha256 == sha256(served.data)
    assert blob.read_bytes() == served.data


def test_a_complete_cached_snapshot_serves_without_the_hub(server, store, tmp_path, monkeypatch):
    server.serve_repository("org/name", REPOSITORY)
    store.pull("hf:org/name")
    store.remove("name")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert {file.name for file in store.pull("hf:org/name").files} == TAKEN


def test_an_incomplete_cached_snapshot_does_not(server, store, tmp_path, monkeypatch):
    server.serve_repository("org/name", REPOSITORY)
    store.pull("hf:org/name")
    store.remove("name")
    (tmp_path / "hub/models--org--name/snapshots" / COMMIT / "model-00002-of-00002.safetensors").unlink()
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(SourceError, match="cannot be reached"):
        store.pull("hf:org/name")


def test_a_cache_on_another_disk_is_linked_to_not_copied(server, store, tmp_path, monkeypatch):
    def other_disk(self, target):
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(Path, "hardlink_to", other_disk)
    server.serve_repository("org/name", {"m.gguf": gguf_bytes(3000)})
    model = store.pull("hf:org/name/m.gguf")
    assert model.path.is_symlink()
    assert model.path.resolve().is_relative_to((tmp_path / "hub").resolve())
    model.path.resolve().unlink()
    assert store.list() == [] and store.damaged() == ["m"]


def test_without_digests_in_the_listing_the_files_own_headers_are_asked(server, store):
    server.serve_repository("org/name", REPOSITORY, listed=False)
    assert {f.name: f.sha256 for f in store.pull("hf:org/name").files} == {
        n: sha256(REPOSITORY[n]) for n in TAKEN
    }


@pytest.mark.parametrize("name", ["config.json", "model-00001-of-00002.safetensors"])
def test_a_file_that_is_not_what_the_listing_promises_is_refused(server, store, name):
    served = server.serve_repository("org/name", REPOSITORY)
    served[name].data = bytes(len(REPOSITORY[name]))
    with pytest.raises(IntegrityError, match="wrong bytes"):
        store.pull("hf:org/name")
    assert store.list() == []


def test_the_catalogues_hash_is_compared_before_a_byte_is_fetched(server, tmp_path):
    served = server.serve_repository("org/name", {"m.gguf": gguf_bytes(3000, seed=1)})["m.gguf"]
    entry = entry_text("m", gguf_bytes(3000), "hf:org/name/m.gguf")
    with pytest.raises(IntegrityError, match="Nothing was fetched"):
        Store(tmp_path / "store", catalogue=catalogue_of(entry), limits=QUICK).pull("m")
    assert served.body_bytes_sent == 0


@pytest.mark.parametrize("name", HOSTILE_NAMES, ids=ascii)
def test_a_hostile_name_in_a_listing_never_reaches_the_disk(server, store, tmp_path, name):
    data = b"evil"
    sibling = {"rfilename": name, "size": 4, "blobId": hashlib.sha1(b"blob 4\0evil").hexdigest()}
    server.serve_repository("org/name", {"config.json": b"{}", "model.safetensors": b"\0" * 64})
    listing = server.files["/api/models/org/name/revision/main"]
    parsed = json.loads(listing.data)
    parsed["siblings"] += [sibling, {**sibling, "rfilename": name + ".json"}]
    listing.data = json.dumps(parsed).encode()
    server.serve(f"/org/name/resolve/{COMMIT}/{name.encode('utf-8', 'replace').decode()}", data)
    try:
        model = store.pull("hf:org/name")
    except AylluError as error:
        assert str(error).isprintable()
    else:
        assert {file.name for file in model.files} == {"config.json", "model.safetensors"}
    held = [path for path in tmp_path.rglob("*") if path.is_file() and path.read_bytes() == data]
    assert held == []


@pytest.mark.parametrize(
    ("status", "headers", "words"),
    [
        (401, {"X-Error-Code": "GatedRepo"}, "gated"),
        (403, {"X-Error-Code": "GatedRepo"}, "gated"),
        (401, {"X-Error-Code": "RepoNotFound"}, "does not exist"),
        (404, {"X-Error-Code": "RepoNotFound"}, "does not exist"),
        (404, {"X-Error-Code": "RevisionNotFound"}, "no such revision"),
        (500, {}, "answered with an error"),
    ],
)
def test_the_hubs_refusals_become_one_clear_line(server, store, monkeypatch, status, headers, words):
    def refuse(request, body):
        server._short(request, status, headers)

    monkeypatch.setattr(server, "_answer", refuse)
    with pytest.raises(SourceError, match=words) as caught:
        store.pull("hf:org/name")
    assert str(caught.value).isprintable()


MALFORMED_LISTINGS = [
    b"",
    b"{}",
    b"[]",
    b"<html>",
    b"[" * 100_000,
    b'{"id": 5, "sha": null}',
    b'{"id": "x", "sha": "../..", "siblings": []}',
    b'{"id": "x", "sha": "%s", "siblings": [{"rfilename": 5}]}' % (b"a" * 40),
    b'{"id": "x", "sha": "%s", "siblings": {"a": 1}}' % (b"a" * 40),
    b'{"id": "x", "sha": "%s", "siblings": [{"rfilename": "a.gguf", "size": -1}]}' % (b"a" * 40),
    b'{"id": "x", "sha": "%s", "siblings": [{"rfilename": "a.gguf", "blobId": "../x"}]}' % (b"a" * 40),
]


@pytest.mark.parametrize("body", MALFORMED_LISTINGS, ids=lambda body: ascii(body[:60]))
def test_a_malformed_listing_is_a_typed_error(server, store, body):
    server.serve("/api/models/org/name/revision/main", body)
    with pytest.raises(AylluError):
        store.pull("hf:org/name")


def test_offline_mode_is_respected(server, store, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(SourceError, match="HF_HUB_OFFLINE"):
        store.pull("hf:org/name")
    assert server.asked == []


def test_nothing_is_told_to_the_hub_but_the_program_and_the_token(server, store, monkeypatch):
    monkeypatch.setenv("AI_AGENT", "some-agent")
    server.serve_repository("org/name", {"m.gguf": gguf_bytes(300)})
    store.pull("hf:org/name/m.gguf")
    agents = [r["user-agent"] for served in server.files.values() for r in served.requests]
    assert agents and not any("torch" in agent or "some-agent" in agent for agent in agents)
    assert not any("telemetry" in path or "harness" in path for path in server.asked)


def test_a_revision_is_honoured(server, store):
    server.serve_repository("org/name", {"m.gguf": gguf_bytes(300)}, revision="v2")
    assert store.pull("hf:org/name@v2/m.gguf").source == "hf:org/name@v2/m.gguf"


def test_a_pickle_is_refused_by_name_before_anyone_is_asked(server, store):
    with pytest.raises(UnsupportedError, match="pickle"):
        store.pull("hf:org/name/pytorch_model.bin")
    assert server.asked == []


def test_safetensors_are_preferred_and_duplicates_left_out():
    names = [
        "config.json",
        "consolidated.safetensors",
        "model.safetensors",
        "x.gguf",
        "sub/model.safetensors",
    ]
    assert choose_files("r", names, None) == ["config.json", "model.safetensors"]


def test_of_several_gguf_files_the_usual_precision_is_taken_or_a_choice_asked_for():
    assert choose_files("r", ["a-q4_k_m.gguf", "a-q8_0.gguf"], None) == ["a-q4_k_m.gguf"]
    with pytest.raises(UsageError, match=r"ayllu pull hf:o/r/a-q5\.gguf"):
        choose_files("o/r", ["a-q5.gguf", "a-q8.gguf"], None)


def test_only_pickles_or_a_split_gguf_is_unsupported():
    with pytest.raises(UnsupportedError, match=r"pytorch_model\.bin, a pickle"):
        choose_files("r", ["config.json", "pytorch_model.bin"], None)
    with pytest.raises(UnsupportedError):
        choose_files("r", ["a-00001-of-00002.gguf", "a-00002-of-00002.gguf"], None)
    with pytest.raises(UnsupportedError, match="split"):
        choose_files("r", ["a-00001-of-00002.gguf"], "a-00001-of-00002.gguf")


@pytest.mark.parametrize(
    ("card", "licence"),
    [
        ({"license": "apache-2.0"}, "apache-2.0"),
        ({"license": "other", "license_name": "llama4"}, "llama4"),
        ({"license": ["x"]}, "unknown"),
        ({"license": "  "}, "unknown"),
        ({}, "unknown"),
        (None, "unknown"),
    ],
)
def test_the_licence_is_what_the_models_card_states(server, store, card, licence):
    server.serve_repository("org/name", REPOSITORY)
    listing = server.files["/api/models/org/name/revision/main"]
    listing.data = json.dumps(json.loads(listing.data) | {"cardData": card}).encode()
    assert store.pull("hf:org/name").licence == licence


def test_a_cache_that_cannot_be_written_lets_the_next_source_deliver(server, tmp_path, monkeypatch):
    data = gguf_bytes(3000)
    server.serve_repository("org/name", {"m.gguf": data})
    server.serve("/m.gguf", data)
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    entry = entry_text("m", data, "hf:org/name/m.gguf", server.url("/m.gguf"))
    store = Store(tmp_path / "store", catalogue=catalogue_of(entry), limits=QUICK)
    assert store.pull("m").source == server.url("/m.gguf")
    with pytest.raises(SourceError, match="HF_HUB_CACHE"):
        store.pull("hf:org/name/m.gguf", name="other")


def test_a_cache_that_is_complete_need_not_be_writable(server, store, tmp_path, monkeypatch):
    server.serve_repository("org/name", REPOSITORY)
    store.pull("hf:org/name")
    store.remove("name")
    before = {path: path.lstat().st_mtime_ns for path in (tmp_path / "hub").rglob("*")}
    store.pull("hf:org/name")
    assert {path: path.lstat().st_mtime_ns for path in (tmp_path / "hub").rglob("*")} == before


def test_a_link_in_the_cache_is_replaced_in_one_step(server, store, tmp_path, monkeypatch):
    server.serve_repository("org/name", {"m.gguf": gguf_bytes(300)})
    pointer = tmp_path / "hub/models--org--name/snapshots" / COMMIT / "m.gguf"
    pointer.parent.mkdir(parents=True)
    pointer.write_bytes(b"old")
    unlink = Path.unlink

    def never_gone(self, missing_ok=False):
        assert self != pointer
        unlink(self, missing_ok)

    monkeypatch.setattr(Path, "unlink", never_gone)
    store.pull("hf:org/name/m.gguf")
    assert pointer.is_symlink() and sorted(pointer.parent.iterdir()) == [pointer]
