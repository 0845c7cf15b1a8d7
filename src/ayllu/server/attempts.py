"""How often somebody may be wrong: failed sign-ins are counted by address and by name, and slow both down."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from ayllu.errors import OverloadedError

MOST_FAILURES = 10
WINDOW_S = 60.0
MOST_REMEMBERED = 10_000
AT_A_TIME = 2
"""Passwords being checked."""


class Attempts:
    """For the event loop's thread. After MOST_FAILURES within WINDOW_S, the next waits until they are old."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[str, list[float]] = {}
        # Passwords are slow to check by design: strangers must not take every thread with them.
        self.turn = asyncio.Semaphore(AT_A_TIME)

    def require(self, *who: str) -> None:
        """Raises OverloadedError where one of `who` failed too often."""
        now = self._clock()
        for name in who:
            recent = [moment for moment in self._failures.get(name, ()) if now - moment < WINDOW_S]
            if len(recent) >= MOST_FAILURES:
                raise OverloadedError(
                    "Too many failed sign-ins.", "Wait a minute.", retry_after_s=WINDOW_S - (now - recent[0])
                )

    def succeeded(self, *who: str) -> None:
        """It was right: the last of what was remembered beforehand was no failure."""
        for name in who:
            if moments := self._failures.pop(name, [])[:-1]:
                self._failures[name] = moments

    def failed(self, *who: str) -> None:
        """Remember a failure: before the check where that takes time, or many at once would all be let in."""
        now = self._clock()
        for name in who:
            recent = [moment for moment in self._failures.pop(name, ()) if now - moment < WINDOW_S]
            self._failures[name] = [*recent, now][-MOST_FAILURES:]
        while len(self._failures) > MOST_REMEMBERED:
            del self._failures[next(iter(self._failures))]
