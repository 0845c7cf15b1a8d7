"""What may be drafted, and the one thing asked of whatever drafts. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass
from typing import Protocol

from ayllu.engine.sequence import Sequence


@dataclass(frozen=True)
class Proposal:
    """Tokens that may follow, and the class of each: how sure it is, given that those before it are right."""

    tokens: list[int]
    classes: list[int]


class Proposer(Protocol):
    """Where drafts come from. What it proposes need not be right, only worth trying."""

    def propose(self, wanted: AbstractSequence[tuple[Sequence, int]]) -> list[Proposal | None]:
        """For each sequence at most so many tokens (one or more are asked for), perhaps none. None: not now,
        as something else has to be done first; the time of such a call tells nothing of later ones."""

    def forget(self, sequence: Sequence) -> None:
        """The sequence has ended. Nothing if it is unknown."""
