"""How endpoints tell of a generation: one protocol for all dialects, so one driver serves them all.

A shape is a plain object for one request. It takes the engine's events and says what goes to the client, as
server-sent events while they come, or as one body at the end; both from one state, so they cannot differ.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from ayllu.engine.events import Event
from ayllu.errors import AylluError


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One server-sent event. name: of its `event:` line (None: it has none). data: one line of text."""

    data: str
    name: str | None = None

    @classmethod
    def of(cls, body: dict[str, Any], name: str | None = None) -> ServerEvent:
        """An event that carries JSON."""
        return cls(compact_json(body), name)

    def encoded(self) -> bytes:
        """As it goes over the wire."""
        head = "" if self.name is None else f"event: {self.name}\n"
        return f"{head}data: {self.data}\n\n".encode()


class Shape(Protocol):
    """Turns the events of one call (which may be several engine requests, `part` numbers them) into what a
    client reads. Nothing is said before `opening` or after `closing` or `failed`."""

    def opening(self) -> Iterable[ServerEvent]:
        """What is said at once, when the request was accepted."""

    def add(self, part: int, event: Event) -> Iterable[ServerEvent]:
        """What the next event of engine request `part` adds. `Failed` never comes here."""

    def closing(self) -> Iterable[ServerEvent]:
        """The last of it, when every part is done."""

    def failed(self, error: AylluError) -> Iterable[ServerEvent]:
        """The end of a stream that cannot be completed: the error, in the dialect's own way."""

    def result(self) -> dict[str, Any]:
        """The body of an answer that is not streamed; valid once every part is done."""


def compact_json(value: Any) -> str:
    """One line of JSON; U+2028 and the like are escaped by no dialect, but line breaks always are."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
