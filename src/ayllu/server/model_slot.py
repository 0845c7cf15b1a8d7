"""One model of the pool: its engine through all lives, who uses it, what went wrong and when to try again.

Everything here is touched in the event loop alone, but for `Loading`, whose work is done in a thread.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from ayllu.engine.options import EngineOptions
from ayllu.engine.protocol import Engine, EngineInfo
from ayllu.errors import AylluError, EngineUnavailableError
from ayllu.progress import Progress

FIRST_COOL_DOWN_S = 5.0
LONGEST_COOL_DOWN_S = 300.0
FORGOTTEN_AFTER_S = 900.0
"""Seconds after which a failure makes the next cool-down no longer."""

_log = logging.getLogger("ayllu.server")
SlotStatus = Literal["unloaded", "loading", "loaded", "restarting", "failed"]
"""'restarting': its engine crashed and starts again by itself; requests wait. 'failed': see the error."""

Result = TypeVar("Result")


class Opener(Protocol):
    """Opens an engine and waits until it is ready, as `open_engine` does."""

    def __call__(
        self, path: Path, options: EngineOptions, /, *, progress: Progress, model_name: str
    ) -> Engine: ...


class LoadAbortedError(Exception):
    """Nobody wants the load under way any more. Never leaves the pool."""


class Loading:
    """A load under way in a thread. progress: from 0 to 1, None where it cannot be told."""

    def __init__(self) -> None:
        self.progress: float | None = None
        self._aborted = threading.Event()

    def abort(self) -> None:
        """End it, at the next step that it reports, and with it the process that it started."""
        self._aborted.set()

    def open(self, opener: Opener, path: Path, options: EngineOptions, name: str) -> Engine:
        """The engine. Blocks. Raises LoadAbortedError, or whatever the opener does."""
        self.require_wanted()
        engine = opener(path, options, progress=self, model_name=name)
        if self._aborted.is_set():
            engine.close()
            raise LoadAbortedError
        return engine

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "bytes") -> Iterator[_LoadingTask]:
        """See `Progress.task`."""
        self.require_wanted()
        yield _LoadingTask(self, total)

    def report(self, progress: float | None) -> None:
        """Raises LoadAbortedError, through whatever loads."""
        self.require_wanted()
        self.progress = progress

    def require_wanted(self) -> None:
        """Raises LoadAbortedError once it was aborted."""
        if self._aborted.is_set():
            raise LoadAbortedError


class _LoadingTask:
    def __init__(self, loading: Loading, total: int | None) -> None:
        self._loading = loading
        self._total = total
        self._done = 0

    def advance(self, amount: int) -> None:
        self._done += amount
        self._loading.report(min(1.0, max(0.0, self._done / self._total)) if self._total else None)


@dataclass
class Failures:
    """How often a model failed lately, and until when nobody tries again."""

    error: AylluError | None = None
    _count: int = 0
    _at: float = 0.0
    _until: float = 0.0

    def note(self, error: AylluError) -> None:
        """It failed now."""
        now = time.monotonic()
        if now - self._at > FORGOTTEN_AFTER_S:
            self._count = 0
        cool_down = min(FIRST_COOL_DOWN_S * 2.0**self._count, LONGEST_COOL_DOWN_S)
        self._count += 1
        # Without its traceback, which would keep alive all that the load had in hand.
        self.error, self._at, self._until = twin(error), now, now + cool_down

    def forget(self) -> None:
        """A person has decided that things are different now."""
        self.error, self._count = None, 0

    def require_none(self) -> None:
        """Raises the last error, with the time that remains, while it is too early for another try."""
        left_s = self._until - time.monotonic()
        if self.error is not None and left_s > 0:
            again = twin(self.error)
            again.retry_after_s = left_s
            raise again


@dataclass
class Slot:
    """A model that was asked for. users: leases, and those who wait for one. reserved: bytes of the budget
    that are its own, from before it is loaded until after its process has ended."""

    name: str
    engine: Engine | None = None
    loading: Loading | None = None
    load: asyncio.Task[AylluError | None] | None = None
    closing: asyncio.Task[None] | None = None
    users: int = 0
    reserved: int = 0
    needs_bytes: int | None = None
    info: EngineInfo | None = None
    licence: str | None = None
    loaded_at: float | None = None
    used_at: float | None = None
    idle_since: float = field(default_factory=time.monotonic)
    failures: Failures = field(default_factory=Failures)
    adapters: dict[str, Path] = field(default_factory=dict)
    adapter_change: asyncio.Lock = field(default_factory=asyncio.Lock)

    @property
    def is_idle(self) -> bool:
        """Whether it holds an engine that nobody uses, and that is loaded entirely."""
        return self.engine is not None and self.users == 0 and self.load is None

    @property
    def is_down(self) -> bool:
        """Whether its engine stays down after crashes, or was closed by somebody else."""
        return getattr(self.engine, "status", "ready") in ("stopped", "closed")

    @property
    def status(self) -> SlotStatus:
        """See `ModelStatus`."""
        if self.engine is not None:
            if self.is_down:
                return "failed"
            return "restarting" if getattr(self.engine, "status", "ready") == "restarting" else "loaded"
        if self.load is not None:
            return "loading"
        return "unloaded" if self.failures.error is None else "failed"

    def touch(self) -> None:
        """It was used until now."""
        self.idle_since, self.used_at = time.monotonic(), time.time()


def twin(error: AylluError) -> AylluError:
    """The same error again: one exception raised in several places would mix their tracebacks."""
    again = type(error).__new__(type(error), *error.args)
    again.__dict__.update(error.__dict__)
    return again


def load_error(name: str, error: Exception) -> AylluError:
    """What people are told of a failed load. Anything unexpected is in the log alone."""
    if isinstance(error, AylluError):
        return error
    _log.error("loading %s failed", name, exc_info=error)
    return EngineUnavailableError(
        f"{name} could not be loaded ({type(error).__name__}).", "The server's log says more."
    )


async def in_daemon_thread(work: Callable[..., Result], *given: Any, **named: Any) -> Result:
    """As `asyncio.to_thread`, in a thread that does not keep the program from ending."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Result] = loop.create_future()

    def settle(set_outcome: Callable[[Any], None], outcome: Any) -> None:
        if not done.done():
            set_outcome(outcome)

    def run() -> None:
        try:
            result = work(*given, **named)
        except BaseException as error:  # handed to whoever waits, whatever it is
            _tell(loop, settle, done.set_exception, error)
        else:
            _tell(loop, settle, done.set_result, result)

    threading.Thread(target=run, name="ayllu-models", daemon=True).start()
    return await done


def _tell(loop: asyncio.AbstractEventLoop, *call: Any) -> None:
    try:
        loop.call_soon_threadsafe(*call)
    except RuntimeError:
        # The loop is closed: the program ends, and nobody waits.
        return
