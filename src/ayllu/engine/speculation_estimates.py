"""What speculation has to know to choose a length: how often drafted tokens are right, how long a step takes.

Both are learnt while serving, in a few numbers each, and forget slowly: texts, contexts and machines change.
Needs no torch.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort

CLASSES = 6
"""Classes of drafted tokens, by how sure their proposer is: 0 least."""

START_RATE = 0.5
"""How many drafted tokens are assumed to be right before any was seen: enough to try some."""

OWN_MEMORY, SHARED_MEMORY = 32, 256
"""Drafted tokens, of one sequence and of all, after which an observation weighs 1/e."""

SHARED_WEIGHT = 4.0
"""What all sequences tell counts as so many observations of one."""

ROW_COST = 0.1
"""What one more row is assumed to cost before it was measured, as a share of a step of one row. Too low
is found out by trying, too high would never be."""

LEARNING = 0.1
"""Share of a surprise that each later measurement corrects."""

LARGEST_SURPRISE = math.log(2.0)
"""A step that took longer or shorter than expected by more than twice was disturbed: it counts as twice."""


class AcceptanceRates:
    """How often drafted tokens of each class turn out right, given that all before them did: a mean with
    forgetting, drawn towards that of `shared` (all sequences together) while little is known."""

    def __init__(self, shared: AcceptanceRates | None = None) -> None:
        self._shared = shared
        self._keep = math.exp(-1 / (SHARED_MEMORY if shared is None else OWN_MEMORY))
        self._right = [0.0] * CLASSES
        self._tried = [0.0] * CLASSES

    def rate(self, kind: int) -> float:
        """The probability, strictly between 0 and 1, that the next drafted token of this class is right."""
        before = START_RATE if self._shared is None else self._shared.rate(kind)
        return (self._right[kind] + SHARED_WEIGHT * before) / (self._tried[kind] + SHARED_WEIGHT)

    def mean(self) -> float:
        """The same for a token whose class is not known yet."""
        before = START_RATE if self._shared is None else self._shared.mean()
        return (sum(self._right) + SHARED_WEIGHT * before) / (sum(self._tried) + SHARED_WEIGHT)

    def note(self, kind: int, right: bool) -> None:
        """A drafted token of this class was compared with the one drawn."""
        self._right[kind] = self._right[kind] * self._keep + right
        self._tried[kind] = self._tried[kind] * self._keep + 1.0
        if self._shared is not None:
            self._shared.note(kind, right)


class StepCosts:
    """Seconds of a step by its rows, learnt from measurements.

    A measurement tells of two things: of this number of rows, and of all (a longer context makes every step
    longer). It corrects both, in logarithms, so that what is known of a number of rows keeps up while others
    are computed. Between two numbers of rows that were measured the correction is interpolated; beyond them
    it is that of the nearest.
    """

    def __init__(self) -> None:
        self._scale: float | None = None
        # Logarithm of the measured seconds over scale and assumed shape.
        self._correction: dict[int, float] = {}
        self._measured: list[int] = []
        self._counts: dict[int, int] = {}
        self._known: dict[int, float] = {}

    @property
    def known(self) -> bool:
        """Whether anything was measured."""
        return self._scale is not None

    def note(self, rows: int, seconds: float) -> None:
        """A step of so many rows took so long."""
        log_seconds = math.log(max(seconds, 1e-9))
        self._known.clear()
        if self._scale is None:
            self._scale = log_seconds - math.log(assumed_cost(rows))
        expected = self._log_seconds(rows)
        surprise = max(-LARGEST_SURPRISE, min(LARGEST_SURPRISE, log_seconds - expected))
        if rows not in self._correction:
            self._correction[rows] = self._interpolated(rows)
            insort(self._measured, rows)
        count = self._counts[rows] = self._counts.get(rows, 0) + 1
        self._correction[rows] += surprise * max(LEARNING, 1 / count)
        self._scale += surprise * LEARNING if count > 1 else 0.0

    def seconds(self, rows: int) -> float:
        """The expected seconds of a step of so many rows; before any measurement, in units of one row."""
        known = self._known.get(rows)
        if known is None:
            known = self._known[rows] = math.exp(self._log_seconds(rows))
        return known

    def _log_seconds(self, rows: int) -> float:
        return (self._scale or 0.0) + math.log(assumed_cost(rows)) + self._interpolated(rows)

    def _interpolated(self, rows: int) -> float:
        if rows in self._correction or not self._measured:
            return self._correction.get(rows, 0.0)
        place = bisect_left(self._measured, rows)
        if place in (0, len(self._measured)):
            return self._correction[self._measured[min(place, len(self._measured) - 1)]]
        low, high = self._measured[place - 1], self._measured[place]
        share = (rows - low) / (high - low)
        return (1 - share) * self._correction[low] + share * self._correction[high]


def assumed_cost(rows: int) -> float:
    """A step of so many rows before any was measured, in units of a step of one row."""
    return 1.0 + ROW_COST * (rows - 1)
