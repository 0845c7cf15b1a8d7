"""Ends an answer at a stop string, wherever tokens cut it: nothing of it is shown, nothing else is held back.

Each stop string has a Knuth-Morris-Pratt automaton that the text runs through once, so that the time is
linear in the text. Needs no torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache


@dataclass(frozen=True)
class _Match:
    """A stop string found at `start`, counted in characters of the held text."""

    start: int
    stop: str


class StopStrings:
    """Watches the text of one answer for the first of `stops`, none of them empty.

    The match that starts earliest wins, of those with the same start the shortest, which is complete first;
    so a stop string that begins with another one never matches itself. A complete match waits while an
    earlier start may still become one. `matched` is the stop string that ended the answer, or None.
    """

    def __init__(self, stops: tuple[str, ...]) -> None:
        assert all(stops), f"an empty stop string among {stops}"
        unique = dict.fromkeys(stops)
        shortest = [
            stop for stop in unique if not any(stop != other and stop.startswith(other) for other in unique)
        ]
        self._automata = [_Automaton(stop) for stop in shortest]
        self._first_characters = {stop[0] for stop in shortest}
        self._held = ""
        self._found: _Match | None = None
        self.matched: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text that became certain with this piece, and the stop string once one has certainly matched.

        From then on nothing is certain any more: later pieces give an empty text and the same match.
        """
        if self.matched is not None:
            return "", self.matched
        if not self._held and not any(first in text for first in self._first_characters):
            return text, None
        before = len(self._held)
        self._held += text
        alive = 0
        for end, character in enumerate(text, before + 1):
            alive = self._advance(character, end)
            if self._found is not None and self._found.start <= alive:
                return self._end_at(self._found), self.matched
        certain, self._held = self._held[:alive], self._held[alive:]
        if self._found is not None:
            self._found = _Match(self._found.start - alive, self._found.stop)
        return certain, None

    def finish(self) -> str:
        """The text that was held back, at the end of the answer. A complete match that was still waiting for
        an earlier one ends the text here: then `matched` tells it."""
        if self._found is not None:
            return self._end_at(self._found)
        rest, self._held = self._held, ""
        return rest

    def _advance(self, character: str, end: int) -> int:
        """Where the earliest start lies that may still become a match, after the character before `end`."""
        longest = 0
        for automaton in self._automata:
            if automaton.advance(character):
                start = end - len(automaton.stop)
                if self._found is None or start < self._found.start:
                    self._found = _Match(start, automaton.stop)
            longest = max(longest, automaton.length)
        return end - longest

    def _end_at(self, match: _Match) -> str:
        certain, self._held = self._held[: match.start], ""
        self._found, self.matched = None, match.stop
        return certain


class _Automaton:
    """How much of one stop string the text ends with."""

    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.length = 0
        self._borders = _borders(stop)

    def advance(self, character: str) -> bool:
        """Whether the stop string is complete with this character. Then it begins anew: a match that overlaps
        the found one starts later and cannot win."""
        length = self.length
        while length and self.stop[length] != character:
            length = self._borders[length - 1]
        if self.stop[length] == character:
            length += 1
        complete = length == len(self.stop)
        self.length = 0 if complete else length
        return complete


@lru_cache(maxsize=256)
def _borders(stop: str) -> tuple[int, ...]:
    """For each beginning of `stop`, the length of its longest proper beginning that it also ends with
    (Knuth, Morris, Pratt, "Fast pattern matching in strings", 1977). Cached: n answers share their stops."""
    borders = [0]
    length = 0
    for character in stop[1:]:
        while length and stop[length] != character:
            length = borders[length - 1]
        if stop[length] == character:
            length += 1
        borders.append(length)
    return tuple(borders)
