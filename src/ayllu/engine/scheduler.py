"""Which tokens are computed in the next step, whose turn it is, and who must give way. Needs no torch.

Order is start-time fair queueing (Goyal et al., 1996), charged as costs become known (Sheng et al., 2024).
Each tenant has a line per priority, and a clock that runs ahead with the tokens computed for it. Who comes
first in a line gets a rank: the tenant's clock, less a head start for the priority. The clock of all, which
no newcomer undercuts, advances with the work done: so nobody is overtaken for ever (see `Scheduler`).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field, replace

from ayllu.engine.block_cache import BlockCache
from ayllu.engine.sequence import Sequence
from ayllu.errors import ContextOverflowError, OverloadedError

PRIORITY_TOKENS = 16_384
"""Head start of one level of priority, in tokens of work: a request of a higher level goes first unless the
other has been first in its line while so much was done for each tenant."""

FEW_TENANTS = 1024
"""Clocks of tenants that are kept without looking which of them are still ahead of the clock of all."""


@dataclass(frozen=True)
class Piece:
    """Tokens [start, stop) of a sequence, to be computed in this step, and behind them those of a draft: they
    may turn out not to be its own."""

    sequence: Sequence
    start: int
    stop: int
    drafted: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Tokens that are computed."""
        return self.stop - self.start + len(self.drafted)

    @property
    def completes(self) -> bool:
        """Whether the next token can be drawn after it."""
        return self.stop == len(self.sequence.tokens)

    @property
    def continues(self) -> bool:
        """Whether it is of an answer under way, and the next token can be drawn after it."""
        return self.start >= self.sequence.prompt_tokens and self.completes


@dataclass
class _Tenant:
    """clock: tokens computed for it, never behind the clock of all when it comes. open: its sequences. lines:
    those that have never run, per priority; only the first of a line has a rank."""

    clock: float
    open: int = 0
    lines: dict[int, OrderedDict[Sequence, None]] = field(default_factory=dict)


class Scheduler:
    """Moves sequences between waiting and running. Not for use by two threads.

    slots: most sequences that run; step_tokens: most tokens of a step (at least one per slot); waiting: most
    sequences that queue. fixed_piece: compute prompts in pieces that end at multiples of it whatever else is
    running (so the first prompts in the order take what there is), and answers token by token even after a
    preemption.

    How long a sequence waits once it is first in its line, with rank r: whoever comes after the clock of all
    has reached r + H, where H is the head start of the highest priority, cannot overtake it. Until then at
    most (r + H - clock) x T + step_tokens tokens are computed, T being the most tenants with work; after then
    at most what those already here may still compute. Tokens computed again after a preemption are not
    counted: only a step that lacks blocks preempts, never the first in the order, and in every step the first
    gets on.
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
        # Both in order. Waiting with a rank: the first of each line, and those that were preempted.
        self._ranked: list[Sequence] = []
        self._running: list[Sequence] = []
        self._followers: dict[Sequence, list[Sequence]] = {}
        self._open = 0
        self._arrivals = 0
        self._clock = 0.0
        self._tenants: dict[str, _Tenant] = {}
        self._tenants_open = 0
        self._most_tenants = FEW_TENANTS

    @property
    def waiting(self) -> int:
        """Sequences in the queue."""
        return self._open - len(self._running)

    @property
    def running(self) -> int:
        """Sequences that hold cache blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return self._open > 0

    def require_room(self, sequences: int) -> None:
        """Raises OverloadedError when the queue cannot take so many more."""
        most = self.most_waiting + self.slots
        if self._open + sequences > most:
            raise OverloadedError(
                f"The queue is full: {self.waiting} sequences wait, at most {self.most_waiting} may.",
                "Try again later." if sequences <= most else f"Ask for at most {most} answers at once.",
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
        tenant = self._tenant(sequence)
        self._tenants_open += tenant.open == 0
        tenant.open += 1
        self._open += 1
        sequence.number = self._arrivals
        self._arrivals += 1
        sequence.arrived = self._clock
        leader = sequence.leader
        if leader is not None and not leader.prompt_done:
            self._followers.setdefault(leader, []).append(sequence)
        else:
            tenant.lines.setdefault(sequence.owner.priority, OrderedDict())[sequence] = None
            self._rank_first(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Take a finished, failed or cancelled sequence out, wherever it is."""
        if _discard(self._running, sequence):
            self.cache.close(sequence)
        elif not _discard(self._ranked, sequence) and sequence.leader in self._followers:
            self._followers[sequence.leader].remove(sequence)
        self._leave_line(sequence)
        self._free_followers(sequence)
        tenant = self._tenant(sequence)
        if sequence.cached_tokens is not None and not sequence.prompt_done:
            tenant.clock -= sequence.prompt_tokens - max(sequence.furthest, sequence.cached_tokens)
        tenant.open -= 1
        self._tenants_open -= tenant.open == 0
        self._open -= 1
        if not self._open:
            self._tenants.clear()
        elif not tenant.open and tenant.clock <= self._clock:
            del self._tenants[sequence.owner.tenant]

    def plan(self) -> list[Piece]:
        """The next step: every running sequence that is one token short, then pieces of prompts, then
        newcomers. Blocks for all of it are held when this returns."""
        pieces: dict[Sequence, Piece] = {}
        preempted_before = self.preempted
        # Whoever is preempted is the last of the list: the loop goes on as if it had always ended there.
        for sequence in self._running:
            if sequence.remaining == 1 and self._hold(sequence, len(sequence.tokens), pieces):
                pieces[sequence] = Piece(sequence, sequence.computed, len(sequence.tokens))
        budget = self.step_tokens - len(pieces)
        if self.preempted == preempted_before:
            self._admit(budget - (len(self._running) - len(pieces)))
        self._add_prompt_pieces(pieces, budget)
        return list(pieces.values())

    def room_for_draft(self, piece: Piece) -> int:
        """The most tokens that may be drafted behind a piece, if there are blocks: up to the border of a
        chunk, and never the last that the sequence may have: one more is drawn than is right of a draft."""
        borders = (piece.start // chunk * chunk + chunk for chunk in self._chunks)
        return min([piece.sequence.limit - 1, *borders]) - piece.stop

    def with_draft(self, piece: Piece, drafted: AbstractSequence[int]) -> Piece:
        """The piece with as much of a draft as free blocks hold: nobody gives way to one. `settle` it."""
        count = len(drafted)
        while count and not self.cache.extend(piece.sequence, piece.stop + count):
            count -= 1
        return replace(piece, drafted=tuple(drafted[:count])) if count else piece

    def settle(self, piece: Piece, accepted: int) -> None:
        """Note how many drafted tokens of a computed piece are the sequence's; blocks of the others go back.

        Only what is accepted was ever work for a tenant, and only that can be found in the cache.
        """
        sequence = piece.sequence
        if accepted:
            self.done([Piece(sequence, piece.stop, piece.stop + accepted)])
        self.cache.trim(sequence)

    def done(self, pieces: AbstractSequence[Piece]) -> None:
        """Note that the tokens of these pieces have been computed; drafted ones are settled later."""
        new_tokens = 0
        for piece in pieces:
            sequence = piece.sequence
            self.cache.commit(sequence, piece.stop, remember_up_to=self._certain(piece))
            new_tokens += self._charge(piece)
            if piece.stop >= sequence.prompt_tokens and not sequence.prompt_done:
                sequence.prompt_done = True
                self._free_followers(sequence)
        self._clock += new_tokens / max(1, self._tenants_open)

    def _certain(self, piece: Piece) -> int | None:
        """Up to where a sequence's keys and values are those that any other with these tokens would compute
        to the bit; None: no matter."""
        if self._fixed_piece is None:
            return None
        stop = min(piece.stop, piece.sequence.prompt_tokens)
        return max(stop // border * border for border in (self._fixed_piece, *self._chunks))

    def _charge(self, piece: Piece) -> int:
        """The tokens of a piece that were never computed before; those of the answer are charged."""
        sequence = piece.sequence
        new = max(piece.start, sequence.furthest)
        # A prompt's tokens were charged when it was let in.
        self._tenant(sequence).clock += max(0, piece.stop - max(new, sequence.prompt_tokens))
        sequence.furthest = max(piece.stop, sequence.furthest)
        return max(0, piece.stop - new)

    def _tenant(self, sequence: Sequence) -> _Tenant:
        """The clock and lines of a sequence's tenant, new ones if it has none."""
        name = sequence.owner.tenant
        tenant = self._tenants.get(name)
        if tenant is None:
            if len(self._tenants) > self._most_tenants:
                # Who went away with a clock ahead of all is forgotten once it is not; the memory is bounded
                # by the work that can be done while the clock of all catches up.
                self._tenants = {k: t for k, t in self._tenants.items() if t.open or t.clock > self._clock}
                self._most_tenants = max(FEW_TENANTS, 2 * len(self._tenants))
            tenant = self._tenants[name] = _Tenant(self._clock)
        return tenant

    def _leave_line(self, sequence: Sequence) -> None:
        line = self._tenant(sequence).lines.get(sequence.owner.priority, OrderedDict())
        if sequence in line:
            del line[sequence]
            self._rank_first(sequence)

    def _rank_first(self, sequence: Sequence) -> None:
        """Give the first of this sequence's line its rank, and the turn that follows from it."""
        tenant, priority = self._tenant(sequence), sequence.owner.priority
        if not tenant.lines[priority]:
            del tenant.lines[priority]
            return
        first = next(iter(tenant.lines[priority]))
        if first.rank is None:
            tenant.clock = max(tenant.clock, first.arrived)
            first.rank = tenant.clock - PRIORITY_TOKENS * priority
            insort(self._ranked, first, key=_order)

    def _free_followers(self, leader: Sequence) -> None:
        """Let those who waited for a leader's prompt queue: next in line, while the prompt is cached."""
        followers = self._followers.pop(leader, [])
        if followers:
            line = self._tenant(leader).lines.setdefault(leader.owner.priority, OrderedDict())
            for follower in reversed(followers):
                line[follower] = None
                line.move_to_end(follower, last=False)
            self._rank_first(leader)

    def _add_prompt_pieces(self, pieces: dict[Sequence, Piece], budget: int) -> None:
        """Share the rest of the step among prompts: equal shares first, so that a long prompt does not keep a
        short one from its first token; then what is left over, in order."""
        prompts = [sequence for sequence in self._running if sequence not in pieces]
        shares = [max(1, budget // len(prompts)), budget] if prompts else []
        if self._fixed_piece is not None:
            shares = shares[-1:]
        for share in shares:
            for sequence in prompts:
                if not sequence.tables:
                    break  # preempted, and all after it
                planned = _length(pieces.get(sequence))
                stop = self._piece_stop(sequence, min(share, budget + planned))
                gained = stop - sequence.computed - planned
                if gained <= 0:
                    continue
                if self._hold(sequence, stop, pieces):
                    pieces[sequence] = Piece(sequence, sequence.computed, stop)
                    budget -= gained

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
        while self._ranked and len(self._running) < self.slots and budget > 0:
            sequence = self._ranked[0]
            cached = self.cache.open(sequence)
            missing = self.cache.missing(sequence, self._soon(sequence))
            free = self.cache.free()
            if self._running and any(m + p > f for m, p, f in zip(missing, promised, free, strict=True)):
                self.cache.close(sequence)
                return
            promised = [p + m for p, m in zip(promised, missing, strict=True)]
            del self._ranked[0]
            insort(self._running, sequence, key=_order)
            budget -= len(sequence.tokens) - cached
            if sequence.cached_tokens is None:
                sequence.cached_tokens = cached
                self._note_first_turn(sequence)

    def _note_first_turn(self, sequence: Sequence) -> None:
        """Charge a prompt, and let the next of its line be ranked after it."""
        assert sequence.rank is not None and sequence.cached_tokens is not None
        # Newcomers begin where those begin who are let in: a tenant that used what nobody else wanted would
        # otherwise be behind everyone who comes, by all that it ever used.
        start = sequence.rank + PRIORITY_TOKENS * min(0, sequence.owner.priority)
        self._clock = max(self._clock, start)
        self._tenant(sequence).clock += sequence.prompt_tokens - sequence.cached_tokens
        self._leave_line(sequence)

    def _soon(self, sequence: Sequence) -> int:
        """A length it will reach shortly. Promising a block more than is needed now keeps a newcomer from
        being let in and preempted again at once."""
        return min(sequence.limit, len(sequence.tokens) + self.cache.block_tokens)

    def _hold(self, sequence: Sequence, length: int, pieces: dict[Sequence, Piece]) -> bool:
        """Get blocks for `sequence` up to `length`, at the cost of those with a later turn if need be."""
        while not self.cache.extend(sequence, length):
            last = self._running[-1]
            pieces.pop(last, None)
            self._preempt(last)
            if last is sequence:
                return False
        return True

    def _preempt(self, last: Sequence) -> None:
        """Take the blocks of the last that runs and put it back into the queue; its tokens are kept."""
        assert len(self._running) > 1, f"too large even alone: {last.limit} tokens"
        self._running.pop()
        self.cache.close(last)
        last.preemptions += 1
        self.preempted += 1
        insort(self._ranked, last, key=_order)


def _order(sequence: Sequence) -> tuple[float, int]:
    return sequence.order


def _discard(ordered: list[Sequence], sequence: Sequence) -> bool:
    """Take a sequence out of a list in order; False if it is not there."""
    if sequence.rank is None:
        return False
    index = bisect_left(ordered, sequence.order, key=_order)
    if index == len(ordered) or ordered[index] is not sequence:
        return False
    del ordered[index]
    return True


def _length(piece: Piece | None) -> int:
    return 0 if piece is None else piece.stop - piece.start
