"""How often somebody may be wrong: failed sign-ins are counted by address and by name, and slow both down."""

from __future__ import annotations

import time
from collections.abc import Callable

from ayllu.errors import OverloadedError

MOST_FAILURES = 10
WINDOW_S = 60.0
MOST_REMEMBERED = 10_000


class Attempts:
    """For the event loop's thread. After MOST_FAILURES within WINDOW_S, the next waits until they are old."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._failures: dict[str, list[float]] = {}

    def require(self, *who: str) -> None:
        """Raises OverloadedError where one of `who` failed too often."""
        now = self._clock()
        for name in who:
            recent = [moment for moment in self._failures.get(name, ()) if now - moment < WINDOW_S]
            if len(recent) >= MOST_FAILURES:
                raise OverloadedError(
                    "Too many failed sign-ins.", "Wait a minute.", retry_after_s=WINDOW_S - (now - recent[0])
                )

    def failed(self, *who: str) -> None:
        """Remember a failure."""
        now = self._clock()
        for name in who:
            recent = [moment for moment in self._failures.pop(name, ()) if now - moment < WINDOW_S]
            self._failures[name] = [*recent, now][-MOST_FAILURES:]
        while len(self._failures) > MOST_REMEMBERED:
            del self._failures[next(iter(self._failures))]
