"""Prompt lookup: what followed the last time the text ended like this is proposed to follow again.

Answers that summarise, edit or quote repeat long stretches of their prompt (Saxena, "Prompt lookup decoding",
2023). Costs a few dictionary entries per token and no computing. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

from ayllu.engine.sequence import Sequence
from ayllu.engine.speculation_proposal import Proposal

SIZES = (4, 3, 2)
"""Lengths of endings that are looked for, in this order."""

READ_TOGETHER = 4096
"""Tokens that are read in one step (6 ms): a long prompt keeps nobody waiting."""

LONGEST_AGREEMENT = 16
"""Tokens before a place that are compared to see how well it fits."""

_TOKEN_BITS = 32


class LookupIndex:
    """Where each run of `SIZES` tokens stood last in a text that grows. A place is the index of the token
    that followed. About 300 bytes per token."""

    def __init__(self) -> None:
        self._places: tuple[dict[int, int], ...] = tuple({} for _ in SIZES)
        self._masks = tuple((1 << _TOKEN_BITS * size) - 1 for size in SIZES)
        self._ending = 0
        self._read = 0

    def find(self, tokens: AbstractSequence[int]) -> int | None:
        """The latest place after the longest of the endings of `tokens` that stood there before. The tokens
        of the last call must be a beginning of these. None, too, while a long text is still being read."""
        self._read_on(tokens, min(len(tokens), self._read + READ_TOGETHER))
        if self._read < len(tokens):
            return None
        for size, places, mask in zip(SIZES, self._places, self._masks, strict=True):
            if len(tokens) > size:
                place = places.get(self._ending & mask)
                if place is not None:
                    return place
        return None

    def _read_on(self, tokens: AbstractSequence[int], stop: int) -> None:
        # An ending is written down once the token after it is known: the last one does not find itself.
        ending, longest = self._ending, self._masks[0]
        for place in range(self._read, stop):
            for size, places, mask in zip(SIZES, self._places, self._masks, strict=True):
                if place >= size:
                    places[ending & mask] = place
            ending = (ending << _TOKEN_BITS | tokens[place]) & longest
        self._ending, self._read = ending, stop


class PromptLookup:
    """Proposes from each sequence's own tokens. `Proposer` says what the methods mean."""

    def __init__(self) -> None:
        self._indexes: dict[Sequence, LookupIndex] = {}

    def propose(self, wanted: AbstractSequence[tuple[Sequence, int]]) -> list[Proposal | None]:
        return [self._proposal(sequence, most) for sequence, most in wanted]

    def forget(self, sequence: Sequence) -> None:
        self._indexes.pop(sequence, None)

    def _proposal(self, sequence: Sequence, most: int) -> Proposal:
        index = self._indexes.get(sequence)
        if index is None:
            index = self._indexes[sequence] = LookupIndex()
        tokens = sequence.tokens
        place = index.find(tokens)
        if place is None:
            return Proposal([], [])
        agreement = _agreement(tokens, place)
        drafted = tokens[place : place + most]
        for back in range(most - len(drafted)):
            # Behind the end the repetition goes on with itself.
            drafted.append(drafted[back])
        return Proposal(drafted, [_class_of(agreement + index) for index in range(most)])


def _agreement(tokens: AbstractSequence[int], place: int) -> int:
    """How many tokens before `place` are those at the end, at most `LONGEST_AGREEMENT`."""
    end, count = len(tokens), 0
    while (
        count < LONGEST_AGREEMENT and count < place and tokens[place - 1 - count] == tokens[end - 1 - count]
    ):
        count += 1
    return count


def _class_of(agreement: int) -> int:
    """2, 3, 4-5, 6-8, 9-15, 16 and more tokens that agree. A drafted token is only reached when those before
    it were right: they count as agreeing."""
    return (agreement >= 3) + (agreement >= 4) + (agreement >= 6) + (agreement >= 9) + (agreement >= 16)
