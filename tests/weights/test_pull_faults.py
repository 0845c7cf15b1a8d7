"""Pulls from a server that cuts, stalls, lies, sends wrong bytes: right hash or typed error, little waste."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ayllu.errors import IntegrityError, NoSpaceError, SourceError
from ayllu.progress import SILENT
from ayllu.weights.sources.base import Limits, Order
from ayllu.weights.store import Store
from tests.weights.loopback import Loopback, Served, loopback
from tests.weights.small_models import catalogue_of, entry_text, gguf_bytes, sha256

SIZE = 3_000_000
DATA = gguf_bytes(SIZE)
QUICK = Limits(connect_s=2, stall_s=2, attempts=5, backoff_s=0.01, longest_backoff_s=0.05)
MOST_WASTE = 1.05


@pytest.fixture
def server():
    with loopback() as running:
        yield running


class Kind:
    """One way to name the same bytes: a plain address in a catalogue, or a hub repository."""

    def __init__(self, kind: str, server: Loopback, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.kind, self.server = kind, server
        monkeypatch.setenv("HF_ENDPOINT", server.base)
        monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        self.root = tmp_path / "store"

    def serve(self, data: bytes = DATA, **faults: object) -> Served:
        if self.kind == "web":
            return self.server.serve("/model.gguf", data, etag='"v1"', **faults)
        served = self.server.serve_repository("org/name", {"model.gguf": data})["model.gguf"]
        for name, value in faults.items():
            setattr(served, name, value)
        return served

    def store(self, data: bytes = DATA, stall_s: float = 2) -> Store:
        at = self.server.url("/model.gguf") if self.kind == "web" else "hf:org/name/model.gguf"
        limits = dataclasses.replace(QUICK, stall_s=stall_s)
        return Store(self.root, catalogue=catalogue_of(entry_text("m", data, at)), limits=limits)


@pytest.fixture(params=["web", "hub"])
def kind(request, server, tmp_path, monkeypatch):
    return Kind(request.param, server, tmp_path, monkeypatch)


def nothing_is_listed(store: Store) -> bool:
    return not store.list() and not store.damaged() and not (store.root / "m").exists()


def test_a_connection_cut_again_and_again_costs_no_byte_twice(kind):
    served = kind.serve(cuts=[100_000, 700_000, 1, 600_001, 500_000])
    model = kind.store().pull("m")
    assert model.sha256 == sha256(DATA) == sha256(model.path.read_bytes())
    assert served.body_bytes_sent <= MOST_WASTE * SIZE
    assert len([r for r in served.requests if "range" in r]) == 5


def test_a_stalled_connection_is_left_and_resumed(kind):
    served = kind.serve(stalls=[1_000_000, 500_000])
    assert kind.store(stall_s=0.3).pull("m").sha256 == sha256(DATA)
    assert served.body_bytes_sent <= MOST_WASTE * SIZE


def test_a_failed_pull_lists_nothing_and_the_next_one_continues(kind):
    served = kind.serve(cuts=[2_000_000, 0, 0, 0, 0, 0, 0, 0])
    store = kind.store()
    with pytest.raises(SourceError, match="broke off 5 times"):
        store.pull("m")
    assert nothing_is_listed(store)
    served.cuts.clear()
    assert kind.store().pull("m").sha256 == sha256(DATA)
    assert served.body_bytes_sent <= MOST_WASTE * SIZE


def test_a_server_that_answers_errors_first_is_asked_again(kind):
    served = kind.serve(statuses=[503, 429, 500])
    assert kind.store().pull("m").sha256 == sha256(DATA)
    assert served.body_bytes_sent == SIZE


@pytest.mark.parametrize("lie", [-1000, 1000, 10**15])
def test_a_lie_about_the_length_is_a_typed_error_before_any_download(kind, lie):
    kind.serve(length_lie=lie)
    store = kind.store()
    with pytest.raises(SourceError, match="are promised"):
        store.pull("m")
    assert nothing_is_listed(store)


def test_a_server_whose_file_is_shorter_than_promised_is_a_typed_error(kind):
    kind.serve(cuts=[None])
    served = next(iter(s for s in kind.server.files.values() if s.data == DATA))
    store = kind.store()
    served.data, served.chunked = DATA[:1_000_000], True
    with pytest.raises(SourceError, match=r"shorter than promised|no bytes after"):
        store.pull("m")
    assert nothing_is_listed(store)


def test_a_server_that_sends_more_than_promised_is_stopped(kind):
    kind.serve(extra=b"x" * 500_000, chunked=True)
    store = kind.store()
    with pytest.raises(SourceError, match="more than the promised"):
        store.pull("m")
    assert nothing_is_listed(store)
    assert all(file.stat().st_size <= SIZE for file in store.root.rglob("*.part"))


def test_wrong_bytes_of_the_right_length_are_refused_and_removed(kind):
    served = kind.serve()
    served.data = DATA[:-1] + bytes([DATA[-1] ^ 1])
    store = kind.store()
    with pytest.raises(IntegrityError, match="wrong bytes"):
        store.pull("m")
    assert nothing_is_listed(store)
    assert not list(store.root.rglob("*.part"))
    served.data = DATA
    assert store.pull("m").sha256 == sha256(DATA)


def test_a_damaged_partial_file_is_found_out_and_fetched_afresh(kind):
    served = kind.serve(cuts=[1_000_000, 0, 0, 0, 0, 0])
    store = kind.store()
    with pytest.raises(SourceError):
        store.pull("m")
    part = next(store.root.rglob("*.part"))
    part.write_bytes(b"\0" * part.stat().st_size)
    served.cuts.clear()
    assert store.pull("m").sha256 == sha256(DATA)


def test_a_server_without_ranges_still_ends_well_when_it_sends_the_whole(kind):
    kind.serve(cuts=[500_000], ignores_range=True)
    assert kind.store().pull("m").sha256 == sha256(DATA)


def test_a_server_without_ranges_that_always_cuts_ends_in_an_error(kind):
    served = kind.serve(cuts=[400_000] * 50, ignores_range=True)
    with pytest.raises(SourceError, match="broke off"):
        kind.store().pull("m")
    assert len(served.requests) <= 6


def test_a_file_that_changed_between_two_requests_is_not_patched_together(server, tmp_path):
    served = server.serve(
        "/model.gguf", gguf_bytes(SIZE, seed=1), etag='"old"', cuts=[1_000_000, 0, 0, 0, 0, 0]
    )
    store = Store(
        tmp_path, catalogue=catalogue_of(entry_text("m", DATA, server.url("/model.gguf"))), limits=QUICK
    )
    with pytest.raises(SourceError):
        store.pull("m")
    served.data, served.etag, served.cuts = DATA, '"new"', []
    sent = served.body_bytes_sent
    assert store.pull("m").sha256 == sha256(DATA)
    assert served.body_bytes_sent - sent == SIZE


def test_a_range_that_was_not_asked_for_is_refused(kind):
    kind.serve(cuts=[500_000], range_shift=7)
    with pytest.raises(SourceError, match="not asked for"):
        kind.store().pull("m")


def test_a_drip_of_bytes_counts_as_a_stall(kind, monkeypatch):
    from ayllu.weights.sources import transfer

    monkeypatch.setattr(transfer, "SLOWEST_BYTES_PER_S", 10**6)
    kind.serve(pause_s=0.02, block=100)
    with pytest.raises(SourceError, match=r"only .* bytes arrived"):
        kind.store(stall_s=0.1).pull("m")


def test_each_drop_that_brings_almost_nothing_uses_up_an_attempt(kind):
    served = kind.serve(cuts=[10] * 100)
    with pytest.raises(SourceError):
        kind.store().pull("m")
    assert len(served.requests) <= 6


def test_the_next_mirror_continues_where_the_first_one_died(server, tmp_path):
    first = server.serve("/a.gguf", DATA, etag='"a"', cuts=[2_000_000, 0, 0, 0, 0, 0, 0])
    second = server.serve("/b.gguf", DATA, etag='"b"')
    entry = entry_text("m", DATA, server.url("/a.gguf"), server.url("/b.gguf"))
    assert Store(tmp_path, catalogue=catalogue_of(entry), limits=QUICK).pull("m").sha256 == sha256(DATA)
    assert first.body_bytes_sent + second.body_bytes_sent <= MOST_WASTE * SIZE


def test_when_every_source_fails_each_reason_is_given_in_one_line(server, tmp_path):
    server.serve("/lies.gguf", DATA, length_lie=5)
    entry = entry_text(
        "m", DATA, server.url("/gone.gguf"), server.url("/lies.gguf"), "http://127.0.0.1:9/x.gguf"
    )
    with pytest.raises(SourceError) as caught:
        Store(tmp_path, catalogue=catalogue_of(entry), limits=QUICK).pull("m")
    text = str(caught.value)
    assert "\n" not in text
    assert all(part in text for part in ("answered 404", "are promised", "cannot be reached"))


def test_only_wrong_bytes_everywhere_is_an_integrity_error(server, tmp_path):
    bad = gguf_bytes(SIZE, seed=9)
    server.serve("/a.gguf", bad)
    server.serve("/b.gguf", bad)
    entry = entry_text("m", DATA, server.url("/a.gguf"), server.url("/b.gguf"))
    with pytest.raises(IntegrityError):
        Store(tmp_path, catalogue=catalogue_of(entry), limits=QUICK).pull("m")


def test_a_dead_host_is_waited_for_once_per_command(tmp_path):
    dead = "http://127.0.0.1:9"
    small = entry_text("small", DATA[:1000], f"{dead}/s.gguf")
    entry = entry_text("m", DATA, f"{dead}/a.gguf", f"{dead}/b.gguf")
    store = Store(tmp_path, catalogue=catalogue_of(entry, small), limits=QUICK)
    with pytest.raises(SourceError, match="cannot be reached"):
        store.pull("m")
    assert list(store._unreachable) == [dead]


def test_an_encrypted_address_may_not_redirect_to_an_open_one():
    import httpx2

    from ayllu.weights.sources.transfer import Download, _Transfer

    wanted = Download("f", "https://mirror.invalid/f", Path("f.part"), 10, sha256="0" * 64)
    transfer = _Transfer(wanted, httpx2.Client(), Order(Path()), lambda amount: None)
    request = httpx2.Request("GET", "http://elsewhere.invalid/f")
    with pytest.raises(SourceError, match="unencrypted"):
        transfer._check_redirects(httpx2.Response(200, request=request))


def test_the_access_token_does_not_follow_a_redirect_to_another_host(server, tmp_path, monkeypatch):
    hub = Kind("hub", server, tmp_path, monkeypatch)
    served = hub.serve()
    hub.store().pull("m")
    asked = server.files[next(path for path in server.files if "/resolve/" in path)].requests
    assert asked[0]["authorization"] == "Bearer hf_secret"
    assert all("authorization" not in request for request in served.requests)


def test_no_space_is_said_with_figures_before_a_byte_is_fetched(kind, monkeypatch):
    import shutil
    from collections import namedtuple

    served = kind.serve()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 5, 1_000_000))
    with pytest.raises(NoSpaceError, match=r"needs 70\.1 MB, but only 1\.0 MB are free"):
        kind.store().pull("m")
    assert served.body_bytes_sent == 0


class _InterruptingProgress:
    """Presses Ctrl-C once `limit` bytes have come."""

    def __init__(self, limit: int) -> None:
        self.left = limit

    def task(self, label, total, unit="bytes"):
        return self

    def __enter__(self):
        return self

    def __exit__(self, *details):
        return None

    def advance(self, amount):
        self.left -= amount
        if self.left < 0:
            raise KeyboardInterrupt


def test_ctrl_c_keeps_what_arrived(kind):
    served = kind.serve(pause_s=0.0005)
    store = kind.store()
    with pytest.raises(KeyboardInterrupt):
        store.pull("m", _InterruptingProgress(1_500_000))
    assert nothing_is_listed(store)
    kept = next(store.root.rglob("*.part")).stat().st_size
    assert kept >= 1_500_000
    assert store.pull("m", SILENT).sha256 == sha256(DATA)
    assert int(served.requests[-1]["range"].removeprefix("bytes=").removesuffix("-")) == kept


PULL_SCRIPT = """
import sys
from pathlib import Path
from ayllu.weights.catalogue import parse_catalogue
from ayllu.weights.store import Store
catalogue = parse_catalogue(Path(sys.argv[2]).read_text())
print(Store(Path(sys.argv[1]), catalogue=catalogue).pull("m").sha256)
"""


def _pull_in_process(root: Path, catalogue: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PULL_SCRIPT, str(root), str(catalogue)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ.copy())


def test_a_killed_process_leaves_nothing_listed_and_is_continued(server, tmp_path):
    served = server.serve("/m.gguf", DATA, etag='"v"', pause_s=0.004)
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text(entry_text("m", DATA, server.url("/m.gguf")))
    process = _pull_in_process(tmp_path / "store", catalogue)
    while served.body_bytes_sent < SIZE // 2:
        time.sleep(0.005)
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.communicate()
    store = Store(tmp_path / "store", catalogue=catalogue_of(catalogue.read_text()), limits=QUICK)
    assert nothing_is_listed(store)
    served.pause_s = 0
    assert store.pull("m").sha256 == sha256(DATA)
    assert served.body_bytes_sent <= 1.2 * SIZE  # the kernel's buffers at the moment of the kill are lost


def test_two_processes_pulling_the_same_model_fetch_it_once(server, tmp_path):
    served = server.serve("/m.gguf", DATA, etag='"v"', pause_s=0.004)
    catalogue = tmp_path / "catalogue.toml"
    catalogue.write_text(entry_text("m", DATA, server.url("/m.gguf")))
    processes = [_pull_in_process(tmp_path / "store", catalogue) for _ in range(2)]
    answers = [process.communicate()[0].strip() for process in processes]
    assert answers == [sha256(DATA)] * 2
    assert served.body_bytes_sent == SIZE


def test_waiting_for_another_pull_ends_in_a_clear_error(server, tmp_path):
    from filelock import FileLock

    entry = entry_text("m", DATA, server.url("/m.gguf"))
    store = Store(tmp_path, catalogue=catalogue_of(entry), limits=QUICK, lock_wait_s=0.05)
    (tmp_path / ".locks").mkdir()
    with FileLock(tmp_path / ".locks" / "m.lock"), pytest.raises(SourceError, match="Another process"):
        store.pull("m")


def test_the_note_beside_partial_bytes_is_not_trusted_blindly(kind):
    served = kind.serve(cuts=[1_000_000, 0, 0, 0, 0, 0])
    store = kind.store()
    with pytest.raises(SourceError):
        store.pull("m")
    note = next(store.root.rglob("*.part.json"))
    for text in ("{", "[]", json.dumps({"url": 5, "validator": ["x"]}), ""):
        note.write_text(text)
    served.cuts.clear()
    assert store.pull("m").sha256 == sha256(DATA)


def test_a_lying_answer_does_not_cost_the_bytes_that_are_there(kind):
    served = kind.serve(cuts=[2_000_000, 0, 0, 0, 0, 0])
    store = kind.store()
    with pytest.raises(SourceError):
        store.pull("m")
    served.cuts, served.ignores_range, served.length_lie = [], True, -1000
    with pytest.raises(SourceError, match="are promised"):
        store.pull("m")
    assert next(store.root.rglob("*.part")).stat().st_size == 2_000_000
    served.ignores_range, served.length_lie = False, 0
    assert store.pull("m").sha256 == sha256(DATA)
    assert served.requests[-1]["range"] == "bytes=2000000-"


@pytest.mark.parametrize(
    ("variable", "value"), [("SSL_CERT_FILE", "/nonexistent/ca.pem"), ("HTTPS_PROXY", "foo://x")]
)
def test_an_unusable_network_setting_is_named(kind, monkeypatch, variable, value):
    kind.serve()
    monkeypatch.setenv(variable, value)
    with pytest.raises(SourceError, match=variable):
        kind.store().pull("m")
