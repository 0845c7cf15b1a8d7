"""Which tokens are computed in the next step, whose turn it is, and who must give way. Needs no torch.

Order is start-time fair queueing (Goyal et al., 1996): each tenant has its own clock, which runs ahead with
the tokens it uses, and a request's rank is its tenant's clock when it came, less a head start for its
priority. The clock of all, which no newcomer may undercut, advances with the work done: so nobody can be
overtaken for ever.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass

from ayllu.engine.block_cache import BlockCache
from ayllu.engine.sequence import Sequence
from ayllu.errors import ContextOverflowError, OverloadedError

PRIORITY_TOKENS = 16_384
"""Head start of one level of priority, in tokens of work: a request of a higher level goes first unless the
other has waited while so much was done for its tenant's share."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a sequence, to be computed in this step."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def completes(self) -> bool:
        """Whether the next token can be drawn after it."""
        return self.stop == len(self.sequence.tokens)


class Scheduler:
    """Moves sequences between waiting and running. Not for use by two threads.

    slots: most sequences that run; step_tokens: most tokens of a step (at least one per slot); waiting: most
    sequences that queue. fixed_piece: compute prompts in pieces that end at multiples of it whatever else is
    running, and answers token by token even after a preemption.
    """

    def __init__(
        self,
        cache: BlockCache,
        *,
        slots: int,
        step_tokens: int,
        waiting: int,
        fixed_piece: int | None = None,
    ) -> None:
        assert 1 <= slots <= step_tokens, (slots, step_tokens)
        assert fixed_piece is None or 1 <= fixed_piece <= step_tokens - slots + 1
        self.cache = cache
        self.slots = slots
        self.step_tokens = step_tokens
        self.most_waiting = waiting
        self.preempted = 0
        self._fixed_piece = fixed_piece
        self._chunks = sorted({group.chunk for group in cache.groups if group.chunk is not None})
        self._waiting: list[Sequence] = []
        self._running: list[Sequence] = []
        self._arrivals = 0
        self._clock = 0.0
        self._tenant_clocks: dict[str, float] = {}
        self._tenant_sequences: dict[str, int] = {}

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that hold cache blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._running)

    def require_room(self, sequences: int) -> None:
        """Raises OverloadedError when the queue cannot take so many more."""
        if self.waiting + sequences > self.most_waiting + self.slots - self.running:
            raise OverloadedError(
                f"The queue is full: {self.waiting} sequences wait, at most {self.most_waiting} may.",
                "Try again later.",
            )

    def require_fit(self, limit: int) -> None:
        """Raises ContextOverflowError when a sequence of `limit` tokens could not run even alone."""
        for group, pool, needed in zip(
            self.cache.groups, self.cache.pools, self.cache.peak(limit), strict=True
        ):
            if needed > pool.total:
                size = self.cache.block_tokens
                raise ContextOverflowError(
                    f"The request may grow to {limit} tokens, which need {needed} cache blocks of {size} "
                    f"tokens ({group.name} layers); the cache has {pool.total}.",
                    "Shorten the prompt, lower max_tokens, or give the engine more memory for its cache.",
                )

    def add(self, sequence: Sequence) -> None:
        """Put a new sequence into the queue."""
        tenant = sequence.owner.tenant
        start = max(self._clock, self._tenant_clocks.get(tenant, 0.0))
        self._tenant_clocks[tenant] = start + sequence.prompt_tokens
        self._tenant_sequences[tenant] = self._tenant_sequences.get(tenant, 0) + 1
        sequence.rank = start - PRIORITY_TOKENS * sequence.owner.priority
        sequence.number = self._arrivals
        self._arrivals += 1
        insort(self._waiting, sequence, key=_order)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished, failed or cancelled sequence out, wherever it is."""
        if sequence in self._running:
            self._running.remove(sequence)
            self.cache.close(sequence)
        else:
            self._waiting.remove(sequence)
        tenant = sequence.owner.tenant
        self._tenant_sequences[tenant] -= 1
        if not self._tenant_sequences[tenant]:
            # A tenant without work keeps no clock ahead of the others': it would be a memory without end.
            del self._tenant_sequences[tenant], self._tenant_clocks[tenant]

    def plan(self) -> list[Piece]:
        """The next step: every running sequence that is one token short, then pieces of prompts, then
        newcomers. Blocks for all of it are held when this returns."""
        pieces: dict[Sequence, Piece] = {}
        budget = self.step_tokens
        preempted_before = self.preempted
        for sequence in list(self._running):
            if sequence.remaining == 1 and self._hold(sequence, len(sequence.tokens), pieces):
                pieces[sequence] = Piece(sequence, sequence.computed, len(sequence.tokens))
        budget -= len(pieces)
        if self.preempted == preempted_before:
            self._admit(budget - sum(sequence.remaining > 1 for sequence in self._running))
        self._add_prompt_pieces(pieces, budget)
        return list(pieces.values())

    def done(self, pieces: AbstractSequence[Piece]) -> None:
        """Note that these pieces have been computed."""
        for piece in pieces:
            remembered = None
            if self._fixed_piece is not None:
                whole = min(piece.stop, piece.sequence.prompt_tokens) // self._fixed_piece
                remembered = whole * self._fixed_piece
            self.cache.commit(piece.sequence, piece.stop, remember_up_to=remembered)
            piece.sequence.prompt_done |= piece.stop >= piece.sequence.prompt_tokens
        self._advance_clocks(pieces)

    def _advance_clocks(self, pieces: AbstractSequence[Piece]) -> None:
        for piece in pieces:
            tenant = piece.sequence.owner.tenant
            # Prompt tokens were charged on arrival.
            if piece.start >= piece.sequence.prompt_tokens and tenant in self._tenant_clocks:
                self._tenant_clocks[tenant] += piece.stop - piece.start
        tokens = sum(piece.stop - piece.start for piece in pieces)
        self._clock += tokens / max(1, len(self._tenant_sequences))

    def _add_prompt_pieces(self, pieces: dict[Sequence, Piece], budget: int) -> None:
        """Share the rest of the step among prompts: equal shares first, so that a long prompt does not keep a
        short one from its first token; then what is left over, in order."""
        prompts = [sequence for sequence in self._running if sequence.remaining > 1]
        shares = [max(1, budget // len(prompts)), budget] if prompts else []
        if self._fixed_piece is not None:
            shares = shares[-1:]
        for share in shares:
            for sequence in prompts:
                planned = pieces.get(sequence)
                stop = self._piece_stop(sequence, min(share, budget + _length(planned)))
                gained = stop - sequence.computed - _length(planned)
                if gained <= 0 or sequence not in self._running:
                    continue
                if self._hold(sequence, stop, pieces):
                    pieces[sequence] = Piece(sequence, sequence.computed, stop)
                    budget = self.step_tokens - sum(map(_length, pieces.values()))

    def _piece_stop(self, sequence: Sequence, most: int) -> int:
        """Where the next piece of a prompt ends: at most `most` tokens on, and at the next border."""
        start, end = sequence.computed, len(sequence.tokens)
        borders = [start // chunk * chunk + chunk for chunk in self._chunks]
        if self._fixed_piece is None:
            return min(end, start + most, *borders)
        if start >= sequence.prompt_tokens:
            return start + min(1, most)
        piece = self._fixed_piece
        stop = min(sequence.prompt_tokens, start // piece * piece + piece, *borders)
        return stop if stop - start <= most else start

    def _admit(self, budget: int) -> None:
        """Let waiting sequences in while there are slots, tokens and blocks for their whole prompts.

        Nobody is let past one that lacks blocks: it would never get them.
        """
        promised = [0] * len(self.cache.groups)
        for sequence in self._running:
            for index, count in enumerate(self.cache.missing(sequence, self._soon(sequence))):
                promised[index] += count
        for sequence in list(self._waiting):
            if len(self._running) >= self.slots or budget <= 0:
                return
            leader = sequence.leader
            if leader is not None and not leader.prompt_done:
                continue
            cached = self.cache.open(sequence)
            missing = self.cache.missing(sequence, self._soon(sequence))
            free = self.cache.free()
            if self._running and any(m + p > f for m, p, f in zip(missing, promised, free, strict=True)):
                self.cache.close(sequence)
                return
            if sequence.cached_tokens is None:
                sequence.cached_tokens = cached
            promised = [p + m for p, m in zip(promised, missing, strict=True)]
            self._waiting.remove(sequence)
            insort(self._running, sequence, key=_order)
            budget -= len(sequence.tokens) - cached

    def _soon(self, sequence: Sequence) -> int:
        """A length it will reach shortly. Promising a block more than is needed now keeps a newcomer from
        being let in and preempted again at once."""
        return min(sequence.limit, len(sequence.tokens) + self.cache.block_tokens)

    def _hold(self, sequence: Sequence, length: int, pieces: dict[Sequence, Piece]) -> bool:
        """Get blocks for `sequence` up to `length`, at the cost of those with a later turn if need be."""
        while sequence in self._running:
            if self.cache.extend(sequence, length):
                return True
            last = self._running[-1]
            pieces.pop(last, None)
            self._preempt(last)
        return False

    def _preempt(self, sequence: Sequence) -> None:
        """Take a running sequence's blocks and put it back into the queue; its tokens are kept."""
        self._running.remove(sequence)
        self.cache.close(sequence)
        sequence.preemptions += 1
        self.preempted += 1
        insort(self._waiting, sequence, key=_order)


def _order(sequence: Sequence) -> tuple[float, int]:
    return sequence.order


def _length(piece: Piece | None) -> int:
    return 0 if piece is None else piece.stop - piece.start
