"""Drafts by a smaller model with the same vocabulary: it goes on greedily, the large one checks.

It reads every sequence in a cache of its own, lazily: what has been accepted since is caught up with when a
draft is asked for. It never decides anything, so whatever goes wrong here costs time alone. Needs no torch.
"""

from __future__ import annotations

import os
from bisect import bisect_right
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.block_cache import BlockCache
from ayllu.engine.sequence import BlockKeys, Sequence
from ayllu.engine.speculation_proposal import Proposal
from ayllu.engine.step_runner import RunnerPiece, StepRunner
from ayllu.errors import UsageError

CLASS_BORDERS = (0.2, 0.4, 0.6, 0.8, 0.95)
"""Probabilities that the small model gives its own tokens, between one class and the next."""

UNLIKELY = 0.2
"""A draft ends where the small model itself believes less than this that all of it is right."""

MOST_FAILURES = 3
"""Calls in a row that may go wrong before the draft model is left alone."""


def require_same_vocabulary(target: Tokenizer, draft: Tokenizer, draft_name: str) -> None:
    """Raises UsageError unless both tokenizers mean the same by every id. Unused ids behind may be more or
    fewer."""
    rows = max(target.embedding_rows, draft.embedding_rows)
    wanted, found = (
        [*map(tokenizer.token_bytes, range(tokenizer.embedding_rows))]
        + [b""] * (rows - tokenizer.embedding_rows)
        for tokenizer in (target, draft)
    )
    if wanted != found:
        token = next(token for token in range(rows) if wanted[token] != found[token])
        raise UsageError(
            f"{draft_name} has another vocabulary than the model it should draft for: "
            f"token {token} is {found[token]!r}, not {wanted[token]!r}.",
            "Draft with a smaller model of the same family, or leave the draft model out.",
        )


@dataclass(eq=False)
class _Reader:
    """A sequence, `target`, as the small model knows it. own: its place in the small model's cache, over the
    same list of tokens. written: what has keys and values of the last draft, from position `place` on."""

    target: Sequence
    own: Sequence
    written: list[int] = field(default_factory=list)
    place: int = 0

    def settle(self, cache: BlockCache) -> None:
        """Keep what came true of the last draft; one token at least is left to compute."""
        right, tokens = 0, self.own.tokens
        most = min(len(self.written), len(tokens) - 1 - self.place)
        while right < most and self.written[right] == tokens[self.place + right]:
            right += 1
        if right:
            cache.commit(self.own, self.place + right)
        cache.trim(self.own)
        self.written = []


@dataclass(eq=False)
class _Draft:
    """A draft being made: the row of hidden states that the next token follows from."""

    reader: _Reader
    most: int
    row: tuple[Any, int]
    tokens: list[int] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    belief: float = 1.0


class DraftModel:
    """Proposes what a small model would say. `Proposer` says what the methods mean.

    runner, cache: of the small model alone; with blocks of as many tokens as the large model's, beginnings of
    prompts are found again. vocab_size: of the large model. context: most tokens of a sequence that the small
    model can read. step_tokens: tokens of prompts that are read in one step beside the large model's.
    """

    def __init__(
        self, runner: StepRunner, cache: BlockCache, *, vocab_size: int, context: int, step_tokens: int
    ) -> None:
        self._runner = runner
        self._cache = cache
        self._vocab_size = vocab_size
        self._context = context
        self._step_tokens = step_tokens
        self._chunks = {group.chunk for group in cache.groups if group.chunk is not None}
        # In the order of their last use: who was not asked for longest gives way first.
        self._readers: dict[Sequence, _Reader] = {}
        self._left_alone: set[Sequence] = set()
        self._failures = 0

    def propose(self, wanted: AbstractSequence[tuple[Sequence, int]]) -> list[Proposal | None]:
        found: list[Proposal | None] = [Proposal([], []) for _ in wanted]
        asked = {
            index: most
            for index, (sequence, most) in enumerate(wanted)
            if sequence not in self._left_alone
            and not sequence.keys.has_images
            and len(sequence.tokens) + most <= self._context
        }
        if self._failures == MOST_FAILURES:
            return found
        try:
            readers = {index: self._reader(wanted[index][0]) for index in asked}
            drafts = self._read(readers, asked)
            self._draft(list(drafts.values()))
            self._failures = 0
        except Exception as error:
            if self._runner.is_fatal(error):
                raise
            self._failures += 1
            for index in asked:
                self._close(wanted[index][0])
            return found
        for index in asked:
            draft = drafts.get(index)
            if draft is not None:
                found[index] = Proposal(draft.tokens, draft.classes)
            elif wanted[index][0] not in self._left_alone:
                found[index] = None
        return found

    def forget(self, sequence: Sequence) -> None:
        self._left_alone.discard(sequence)
        self._close(sequence)

    def _close(self, sequence: Sequence) -> None:
        reader = self._readers.pop(sequence, None)
        if reader is not None:
            self._cache.close(reader.own)

    def _reader(self, target: Sequence) -> _Reader:
        reader = self._readers.pop(target, None)
        if reader is None:
            own = Sequence(
                target.tokens, target.prompt_tokens, target.limit, self._keys(target), target.owner
            )
            self._cache.open(own)
            reader = _Reader(target, own)
        else:
            reader.settle(self._cache)
        self._readers[target] = reader
        return reader

    def _keys(self, target: Sequence) -> BlockKeys:
        """The large model's keys, so that what it shares between requests is shared here; where blocks have
        another size, keys that no other sequence has."""
        if target.keys.block_tokens == self._cache.block_tokens:
            return target.keys
        return BlockKeys(os.urandom(32), self._cache.block_tokens)

    def _read(self, readers: dict[int, _Reader], most: dict[int, int]) -> dict[int, _Draft]:
        """Compute what has come since; drafts of those that are at their end, empty yet."""
        budget = self._step_tokens
        pieces: dict[int, RunnerPiece] = {}
        for index, reader in readers.items():
            own = reader.own
            stop = min([len(own.tokens), own.computed + budget, *self._borders(own.computed)])
            if stop == own.computed:
                continue
            if self._hold(own, stop, readers):
                pieces[index] = RunnerPiece(own.tokens[own.computed : stop], own.computed, own.tables)
                budget -= stop - own.computed
            else:
                # It would take blocks from others again and again, and they from it: it does without drafts.
                self._close(reader.target)
                self._left_alone.add(reader.target)
        if not pieces:
            return {}
        drafts = {}
        hidden = self._runner.forward(list(pieces.values()))
        for (index, piece), states in zip(pieces.items(), hidden, strict=True):
            reader = readers[index]
            reader.place = piece.start + piece.rows
            self._cache.commit(reader.own, reader.place)
            if reader.place == len(reader.own.tokens):
                drafts[index] = _Draft(reader, most[index], (states, piece.rows - 1))
        return drafts

    def _draft(self, drafts: list[_Draft]) -> None:
        """Go on greedily, one token of every draft at a time."""
        while drafts:
            logits = self._runner.logits([draft.row for draft in drafts])[:, : self._vocab_size]
            drafts = [draft for draft, row in zip(drafts, logits, strict=True) if self._goes_on(draft, row)]
            if drafts:
                pieces = [
                    RunnerPiece(draft.tokens[-1:], draft.reader.place + len(draft.tokens) - 1, own.tables)
                    for draft in drafts
                    for own in (draft.reader.own,)
                ]
                for draft, states in zip(drafts, self._runner.forward(pieces), strict=True):
                    draft.reader.written.append(draft.tokens[-1])
                    draft.row = (states, 0)

    def _goes_on(self, draft: _Draft, logits: NDArray[np.float32]) -> bool:
        """Add the likeliest token; whether the one after it is wanted and can be computed."""
        token = int(logits.argmax())
        best = logits[token]
        if not np.isfinite(best):
            return False
        probability = 1.0 / float(np.exp(logits - best).sum(dtype=np.float64))
        draft.tokens.append(token)
        draft.classes.append(bisect_right(CLASS_BORDERS, probability))
        draft.belief *= probability
        if len(draft.tokens) >= draft.most or draft.belief < UNLIKELY:
            return False
        own, length = draft.reader.own, draft.reader.place + len(draft.tokens)
        return length <= min(self._borders(own.computed), default=length) and self._cache.extend(own, length)

    def _borders(self, position: int) -> list[int]:
        return [position // chunk * chunk + chunk for chunk in self._chunks]

    def _hold(self, own: Sequence, length: int, readers: dict[int, _Reader]) -> bool:
        """Get blocks up to `length`, at the cost of sequences that are not asked for now."""
        asked = set(readers.values())
        while not self._cache.extend(own, length):
            oldest = next((reader for reader in self._readers.values() if reader not in asked), None)
            if oldest is None:
                return False
            self._close(oldest.target)
        return True
