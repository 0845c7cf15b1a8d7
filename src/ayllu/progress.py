"""How long work reports itself: a task with a label, a total and steps.

Rooms take a `Progress` and never print. The command line passes `TerminalProgress`; tests and libraries
use the silent default.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Protocol


class Task(Protocol):
    """One piece of work under way."""

    def advance(self, amount: int) -> None:
        """Report `amount` more units done."""


class Progress(Protocol):
    """Something that can show work under way."""

    def task(self, label: str, total: int | None, unit: str = "bytes") -> AbstractContextManager[Task]:
        """A context manager yielding a `Task`; `total` is in `unit`, None when unknown."""


class _SilentTask:
    def advance(self, amount: int) -> None:
        pass


class Silent:
    """Shows nothing."""

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "bytes") -> Iterator[Task]:
        yield _SilentTask()


SILENT: Progress = Silent()


class _DelayedBar:
    """Opens its bar only once the work has outlasted the delay: quick work leaves no flicker."""

    def __init__(self, open_bar: Callable[[], Callable[[int], None]], delay_s: float) -> None:
        self._open_bar = open_bar
        self._due = time.monotonic() + delay_s
        self._set_done: Callable[[int], None] | None = None
        self._done = 0

    def advance(self, amount: int) -> None:
        self._done += amount
        if self._set_done is None:
            if time.monotonic() < self._due:
                return
            self._set_done = self._open_bar()
        self._set_done(self._done)


class TerminalProgress:
    """A progress bar on standard error, for work that outlasts `delay_s` seconds. Silent off a terminal."""

    def __init__(self, delay_s: float = 1.0) -> None:
        self._delay_s = delay_s

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "bytes") -> Iterator[Task]:
        if not sys.stderr.isatty():
            yield _SilentTask()
            return
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )
        from rich.progress import Progress as RichProgress

        amounts = [DownloadColumn(), TransferSpeedColumn()] if unit == "bytes" else [MofNCompleteColumn()]
        bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            *amounts,
            TimeRemainingColumn(compact=True),
            console=Console(stderr=True),
            transient=True,
        )
        task_id = bar.add_task(label, total=total)

        def open_bar() -> Callable[[int], None]:
            bar.start()
            return lambda done: bar.update(task_id, completed=done)

        try:
            yield _DelayedBar(open_bar, self._delay_s)
        finally:
            bar.stop()
