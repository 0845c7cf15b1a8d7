"""Who called lately, by what they showed: to refuse a flood before it costs anything, and for nothing else.

Nobody is let in by this: who is not refused is identified anew. So it may lag behind a revoked key.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping

REMEMBERED_S = 10.0
MOST_REMEMBERED = 4096


def secret_of(headers: Mapping[str, str]) -> str | None:
    """The API key that a request shows, in any of the places that clients put it."""
    scheme, _, value = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and value.strip():
        return value.strip()
    return headers.get("x-api-key") or headers.get("api-key")


class RecentCallers:
    """For the event loop's thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._users: OrderedDict[str, tuple[str, float]] = OrderedDict()

    def note(self, secret: str, user_id: str) -> None:
        """`secret` was just found to be a key of this user."""
        self._users[secret] = user_id, self._clock() + REMEMBERED_S
        self._users.move_to_end(secret)
        while len(self._users) > MOST_REMEMBERED:
            self._users.popitem(last=False)

    def user_of(self, secret: str | None) -> str | None:
        """Whose key it was a moment ago; None where that is not known any more."""
        if secret is None or (found := self._users.get(secret)) is None:
            return None
        user_id, until = found
        if until < self._clock():
            del self._users[secret]
            return None
        return user_id
