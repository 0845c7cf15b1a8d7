"""Pulls by request: one at a time, seen as they go, cancelled without loss, and never from this machine."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ayllu.errors import (
    ConflictError,
    NotFoundError,
    OverloadedError,
    SourceError,
    UnknownModelError,
    UsageError,
)
from ayllu.progress import Progress
from ayllu.server import pulls as module
from ayllu.server.pulls import MOST_KEPT, MOST_QUEUED, Pulls
from ayllu.weights.installed import InstalledModel
from ayllu.weights.sources.base import Limits
from ayllu.weights.store import Store
from tests.weights.loopback import Loopback, loopback
from tests.weights.small_models import catalogue_of, entry_text, gguf_bytes, sha256

SIZE = 4_000_000
DATA = gguf_bytes(SIZE)


class SlowStore(Store):
    """A store whose pulls go on until their gate opens. deaf: they look at nobody meanwhile."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.gate = threading.Event()
        self.pulled: list[str] = []
        self.at_work = 0
        self.most_at_work = 0
        self.deaf = False
        self.failure: Exception | None = None

    def pull(self, source_or_name: str, progress: Progress = None, name: str | None = None) -> InstalledModel:  # type: ignore[assignment]
        self.pulled.append(source_or_name)
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        try:
            with progress.task(f"pull {name}", 100) as task:
                task.advance(40)
                while not self.gate.wait(0.005):
                    if not self.deaf:
                        task.advance(0)
                if self.failure is not None:
                    raise self.failure
                task.advance(60)
        finally:
            self.at_work -= 1
        return InstalledModel(name or "m", self.root, "gguf", (), source_or_name)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SlowStore]:
    made = SlowStore(tmp_path)
    yield made
    made.gate.set()


@pytest.fixture
def server() -> Iterator[Loopback]:
    with loopback() as one:
        yield one


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(work)


async def until(condition: Callable[[], bool]) -> None:
    """For what must come, however slow the machine is."""
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "it did not come"
        await asyncio.sleep(0.005)


def test_pulls_run_one_at_a_time_in_the_order_they_came(store: SlowStore) -> None:
    async def work() -> None:
        come: list[str] = []

        async def note(name: str) -> None:
            come.append(name)

        pulls = Pulls(store, note)
        jobs = [pulls.start(f"hf:org/m{number}", by="u1") for number in range(3)]
        await until(lambda: pulls.get(jobs[0].id).status == "running")
        assert [job.status for job in pulls.listed()] == ["running", "queued", "queued"]
        store.gate.set()
        await until(lambda: all(job.status == "done" for job in pulls.listed()))
        assert store.most_at_work == 1 and come == ["m0", "m1", "m2"]
        done = pulls.get(jobs[0].id)
        assert (done.name, done.done_bytes, done.total_bytes, done.by) == ("m0", 100, 100, "u1")
        assert done.started_at is not None and done.ended_at is not None and done.error is None
        await pulls.close()

    run(work())


def test_the_same_pull_is_joined_and_another_under_its_name_is_refused(store: SlowStore) -> None:
    async def work() -> None:
        pulls = Pulls(store)
        job = pulls.start("hf:org/m")
        assert pulls.start("hf:org/m").id == job.id
        with pytest.raises(ConflictError, match="hf:org/m"):
            pulls.start("hf:other/m")
        assert pulls.start("hf:other/m", "mine").name == "mine"
        await pulls.close()

    run(work())


def test_the_queue_is_bounded_and_ended_pulls_are_forgotten_in_time(store: SlowStore) -> None:
    async def work() -> None:
        pulls = Pulls(store)
        first = pulls.start("hf:org/first")
        await until(lambda: pulls.get(first.id).status == "running")
        for number in range(MOST_QUEUED):
            pulls.start(f"hf:org/m{number}")
        with pytest.raises(OverloadedError) as refusal:
            pulls.start("hf:org/more")
        assert refusal.value.retry_after_s > 0
        store.gate.set()
        await until(lambda: all(job.status == "done" for job in pulls.listed()))
        for number in range(MOST_KEPT + 5):
            job = pulls.start(f"hf:org/again{number}")
            await until(lambda: pulls.get(job.id).status == "done")  # noqa: B023
        assert len(pulls.listed()) <= MOST_KEPT + 1
        with pytest.raises(NotFoundError):
            pulls.get(first.id)
        await pulls.close()

    run(work())


def test_what_a_pull_fails_with_is_kept_with_it(store: SlowStore, caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        pulls = Pulls(store)
        store.gate.set()
        store.failure = SourceError("The hub is gone.", "Pull again.")
        job = pulls.start("hf:org/m")
        await until(lambda: pulls.get(job.id).status == "failed")
        assert pulls.get(job.id).error == "The hub is gone. Pull again."
        store.failure = ValueError("secret text")
        job = pulls.start("hf:org/m")
        await until(lambda: pulls.get(job.id).status == "failed")
        error = pulls.get(job.id).error or ""
        assert "ValueError" in error and "secret" not in error
        await pulls.close()

    run(work())
    assert "secret text" in caplog.text


def test_whoever_watches_sees_the_progress_and_the_end(store: SlowStore) -> None:
    async def work() -> None:
        pulls = Pulls(store)
        job = pulls.start("hf:org/m")
        seen = []
        async for one in pulls.events(job.id):
            seen.append((one.status, one.done_bytes, one.label))
            if one.done_bytes == 40:
                store.gate.set()
        assert ("running", 40, "pull m") in seen and seen[-1] == ("done", 100, "pull m")
        assert len(seen) == len(set(seen))
        assert [one.status async for one in pulls.events(job.id)] == ["done"]
        with pytest.raises(NotFoundError):
            await anext(pulls.events("pull_none"))
        await pulls.close()

    run(work())


def test_cancelling_ends_a_running_and_a_waiting_pull_and_the_next_one_begins(store: SlowStore) -> None:
    async def work() -> None:
        pulls = Pulls(store)
        one, two, three = (pulls.start(f"hf:org/m{number}") for number in range(3))
        await until(lambda: pulls.get(one.id).done_bytes == 40)
        await pulls.cancel(two.id)
        await pulls.cancel(one.id)
        assert [job.status for job in pulls.listed()][:2] == ["cancelled", "cancelled"]
        store.gate.set()
        await until(lambda: pulls.get(three.id).status == "done")
        assert store.pulled == ["hf:org/m0", "hf:org/m2"]
        await pulls.cancel(three.id)
        assert pulls.get(three.id).status == "done"
        with pytest.raises(NotFoundError):
            await pulls.cancel("pull_none")
        await pulls.close()

    run(work())


def test_a_pull_that_does_not_notice_its_end_holds_nobody_up(
    store: SlowStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CANCEL_WAIT_S", 0.02)

    async def work() -> None:
        store.deaf = True
        pulls = Pulls(store)
        deaf, after = pulls.start("hf:org/deaf"), pulls.start("hf:org/after")
        await until(lambda: pulls.get(deaf.id).status == "running")
        await pulls.cancel(deaf.id)
        assert pulls.get(deaf.id).status == "cancelled"
        store.gate.set()
        await until(lambda: pulls.get(after.id).status == "done")
        await pulls.close()

    run(work())


def test_closing_cancels_what_is_open_and_refuses_what_comes_later(store: SlowStore) -> None:
    async def work() -> None:
        pulls = Pulls(store)
        for number in range(3):
            pulls.start(f"hf:org/m{number}")
        await until(lambda: store.at_work == 1)
        await pulls.close()
        await pulls.close()
        assert [job.status for job in pulls.listed()] == ["cancelled"] * 3 and store.at_work == 0
        with pytest.raises(OverloadedError):
            pulls.start("hf:org/m")

    run(work())


def test_what_follows_a_pull_may_fail_without_failing_it(store: SlowStore) -> None:
    async def work() -> None:
        async def fail(name: str) -> None:
            raise RuntimeError("no")

        pulls = Pulls(store, fail)
        store.gate.set()
        job = pulls.start("hf:org/m")
        await until(lambda: pulls.get(job.id).status == "done")
        await pulls.close()

    run(work())


@pytest.mark.parametrize(
    "text",
    [
        "file:/etc/passwd",
        "/etc/passwd",
        "~/model.gguf",
        "./model",
        "../model",
        "model.gguf",
        "org/name",
        "C:\\model",
        "FILE:/etc/passwd",
        "ftp://host/model",
        "hf:../../etc/passwd",
        "hf:org/name/../../x.gguf",
        "pypi:no-version",
        "https://host/model.gguf",
        "http://169.254.169.254/latest",
        "pypi:--index-url=http://x==1",
    ],
)
def test_files_of_this_machine_and_what_no_source_allows_are_refused(store: SlowStore, text: str) -> None:
    with pytest.raises(UsageError):
        Pulls(store).start(text)
    assert store.pulled == []


def test_an_unknown_name_is_refused_with_the_nearest_one(store: SlowStore) -> None:
    with pytest.raises(UnknownModelError, match=r"Did you mean smollm2-135m-instruct\?"):
        Pulls(store).start("smollm2-135m-instuct")
    for name in ("", "x" * 100_000):
        with pytest.raises(UnknownModelError) as refusal:
            Pulls(store).start(name)
        assert len(str(refusal.value)) < 1000
    with pytest.raises(UsageError, match="cannot name a model"):
        Pulls(store).start("smollm2-135m-instruct", "../x")


def test_the_licence_can_be_read_before_the_pull(store: SlowStore) -> None:
    async def work() -> None:
        pulls = Pulls(store)
        open_one = pulls.describe("smollm2-135m-instruct")
        assert (open_one["licence"], open_one["restricted"]) == ("Apache-2.0", False)
        assert open_one["size_bytes"] == 98362432 and open_one["installed"] is False
        llama = pulls.describe("llama-4-scout-17b-16e-instruct")
        assert llama["licence"] == "Llama 4 Community License" and llama["restricted"] and llama["gated"]
        assert llama["notice"]
        assert pulls.start("llama-4-scout-17b-16e-instruct").licence == "Llama 4 Community License"
        with pytest.raises(UnknownModelError):
            pulls.describe("nothing")
        await pulls.close()

    run(work())


def test_a_cancelled_pull_is_continued_by_the_next_one_without_a_byte_twice(
    server: Loopback, tmp_path: Path
) -> None:
    served = server.serve("/model.gguf", DATA, etag='"v1"', pause_s=0.01)
    store = Store(
        tmp_path / "store",
        catalogue=catalogue_of(entry_text("m", DATA, server.url("/model.gguf"))),
        limits=replace(Limits(), stall_s=20),
    )

    async def work() -> None:
        pulls = Pulls(store)
        job = pulls.start("m")
        await until(lambda: pulls.get(job.id).done_bytes > SIZE // 4)
        await pulls.cancel(job.id)
        stopped = pulls.get(job.id)
        assert stopped.status == "cancelled" and stopped.done_bytes < SIZE and not store.list()
        assert sum(part.stat().st_size for part in (tmp_path / "store").rglob("*.part")) > SIZE // 4
        served.pause_s = 0.0
        again = pulls.start("m")
        last = [one async for one in pulls.events(again.id)][-1]
        assert (last.status, last.done_bytes, last.total_bytes) == ("done", SIZE, SIZE)
        assert "range" in served.requests[-1]
        await pulls.close()

    run(work())
    assert store.find("m").sha256 == sha256(DATA)
