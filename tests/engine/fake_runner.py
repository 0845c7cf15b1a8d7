"""An engine without a network: scheduler and block cache, and a runner that only remembers what lies where.

Instead of keys and values it writes into each cache slot which content they would belong to: a hash of the
token, of everything before it, of images, tenant and adapter. What a sequence reads must be its own content,
position by position, however blocks were shared, forgotten and taken again.
"""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Sequence as AbstractSequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ayllu.engine.block_cache import BlockCache
from ayllu.engine.layer_groups import LayerGroup
from ayllu.engine.scheduler import Piece, Scheduler
from ayllu.engine.sequence import BlockKeys, Sequence

PATCH = 9
"""The token that stands for a row of an image."""

VOCABULARY = 3
"""Answers are drawn from so few tokens that some of them agree by chance."""


def groups_of(*chunks: int | None) -> tuple[LayerGroup, ...]:
    """One layer per group; None is the global one."""
    return tuple(LayerGroup(chunk, (index,)) for index, chunk in enumerate(chunks))


@dataclass(eq=False)
class FakeRequest:
    """What the engine's core keeps of a request: here its answers' lengths and what it may read."""

    id: str
    tenant: str
    priority: int
    adapter: str
    images: tuple[tuple[str, int], ...]
    answers: dict[Sequence, int] = field(default_factory=dict)
    open: list[Sequence] = field(default_factory=list)


class FakeEngine:
    """Submit, step, cancel: as `EngineCore`, with all invariants checked at every step."""

    def __init__(
        self,
        groups: AbstractSequence[LayerGroup] = groups_of(None),
        blocks: AbstractSequence[int] = (1000,),
        block_tokens: int = 4,
        *,
        slots: int = 4,
        step_tokens: int = 32,
        waiting: int = 100_000,
        fixed_piece: int | None = None,
        remembers: bool = True,
    ) -> None:
        self.cache = BlockCache(groups, blocks, block_tokens, remembers=remembers, alignment=fixed_piece or 1)
        self.scheduler = Scheduler(
            self.cache, slots=slots, step_tokens=step_tokens, waiting=waiting, fixed_piece=fixed_piece
        )
        self.requests: list[FakeRequest] = []
        self.computed = 0
        self.repeated = 0
        self.admitted: list[Sequence] = []
        """Sequences in the order in which they were first let in."""
        self.finished: list[Sequence] = []
        self._fixed_piece = fixed_piece
        self._slots: list[NDArray[np.int64]] = [np.zeros(total * block_tokens, np.int64) for total in blocks]
        self._contents: dict[Sequence, NDArray[np.int64]] = {}
        self._furthest: dict[Sequence, int] = {}
        self._submitted = 0

    @property
    def fresh(self) -> int:
        """Tokens computed for the first time."""
        return self.computed - self.repeated

    @property
    def open(self) -> list[Sequence]:
        return list(self._contents)

    def submit(
        self,
        prompt: AbstractSequence[int],
        answer: int = 1,
        *,
        limit: int | None = None,
        tenant: str = "",
        priority: int = 0,
        n: int = 1,
        images: AbstractSequence[tuple[str, int]] = (),
        adapter: str = "",
        uses_cached_prefix: bool = True,
    ) -> FakeRequest:
        """Queue a request whose answers are `answer` tokens, of at most `limit` (0: only the prompt is
        computed, as for an embedding). Raises AylluError."""
        limit = answer if limit is None else limit
        assert 0 <= answer <= limit
        self.scheduler.require_fit(len(prompt) + limit)
        self.scheduler.require_room(n)
        request = FakeRequest(str(self._submitted), tenant, priority, adapter, tuple(images))
        self._submitted += 1
        root = hashlib.sha256(repr((tenant, adapter)).encode()).digest()
        for index in range(n):
            keys = BlockKeys(root, self.cache.block_tokens, request.images, PATCH)
            sequence = Sequence(
                list(prompt),
                len(prompt),
                len(prompt) + limit,
                keys,
                request,
                leader=request.open[0] if index and self.cache.remembers else None,
                uses_cached_prefix=uses_cached_prefix,
            )
            request.answers[sequence] = answer
            request.open.append(sequence)
            self._contents[sequence] = contents(request, prompt, sequence.limit)
            self._furthest[sequence] = 0
        self.requests.append(request)
        for sequence in request.open:
            self.scheduler.add(sequence)
        return request

    def cancel(self, request: FakeRequest) -> None:
        """Take out what is left of a request, as the core does."""
        for sequence in list(request.open):
            self._remove(sequence)
        self.requests.remove(request)

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        assert isinstance(sequence.owner, FakeRequest)
        sequence.owner.open.remove(sequence)
        del self._contents[sequence], self._furthest[sequence]

    def step(self, fails: FakeRequest | None = None) -> list[Piece]:
        """Plan, write, read, draw; asserts whatever must hold at each point. fails: this request's pieces
        cannot be computed, which ends it."""
        never_ran = [sequence for sequence in self._contents if sequence.cached_tokens is None]
        first = min((s for s in self._contents if s.tables), key=_order, default=None)
        pieces = self.scheduler.plan()
        self.admitted += sorted((s for s in never_ran if s.cached_tokens is not None), key=_order)
        self.check(pieces)
        if first is not None:
            assert first.tables, "the first in the order was preempted"
        if self._contents:
            assert pieces, "nothing is computed though there is work"
            running_first = min((s for s in self._contents if s.tables), key=_order)
            assert any(piece.sequence is running_first for piece in pieces), "the first stands still"
        for piece in pieces:
            self._write(piece)
        if fails is not None and any(piece.sequence.owner is fails for piece in pieces):
            self.cancel(fails)
            pieces = [piece for piece in pieces if piece.sequence.owner is not fails]
        for piece in pieces:
            self._read(piece.sequence, piece.stop)
            furthest = self._furthest[piece.sequence]
            self.computed += piece.stop - piece.start
            self.repeated += max(0, min(piece.stop, furthest) - piece.start)
            self._furthest[piece.sequence] = max(furthest, piece.stop)
        self.scheduler.done(pieces)
        for piece in pieces:
            if piece.completes:
                self._draw(piece.sequence)
        self.cache.check()
        return pieces

    def read_all(self) -> None:
        """Assert that whatever any sequence may read is its own content."""
        for sequence in self._contents:
            if sequence.tables:
                self._read(sequence, sequence.computed)

    def run(self, most_steps: int = 1_000_000) -> None:
        """Step until nothing is open; everything must be free then."""
        for _ in range(most_steps):
            if not self.scheduler.has_work:
                break
            self.step()
        assert not self._contents, f"{len(self._contents)} sequences never ended"
        assert not self.requests
        assert (self.scheduler.waiting, self.scheduler.running) == (0, 0)
        self.cache.check()
        assert self.cache.free() == tuple(pool.total for pool in self.cache.pools)

    def check(self, pieces: AbstractSequence[Piece] = ()) -> None:
        """Counts and limits, and the shape of every table."""
        scheduler, cache = self.scheduler, self.cache
        running = [sequence for sequence in self._contents if sequence.tables]
        assert scheduler.running == len(running) <= scheduler.slots
        assert scheduler.waiting == len(self._contents) - len(running)
        assert scheduler.waiting + scheduler.running <= scheduler.most_waiting + scheduler.slots
        assert scheduler.has_work == bool(self._contents)
        assert sum(piece.stop - piece.start for piece in pieces) <= scheduler.step_tokens
        stops = {piece.sequence: piece.stop for piece in pieces}
        assert len(stops) == len(pieces), "two pieces of one sequence"
        for piece in pieces:
            assert piece.sequence.tables, "a piece of a sequence that does not run"
            assert piece.sequence.computed == piece.start < piece.stop <= len(piece.sequence.tokens)
            self._check_fixed(piece)
        for sequence in running:
            stop = stops.get(sequence, sequence.computed)
            for group, table in zip(cache.groups, sequence.tables, strict=True):
                begin = begin_of(group, sequence.computed)
                assert group.chunk is None or stop <= begin + group.chunk, "a piece crosses a border"
                assert len(table) == -(-(stop - begin) // cache.block_tokens), "a table too long or too short"
                assert len(set(table)) == len(table)

    def _check_fixed(self, piece: Piece) -> None:
        if self._fixed_piece is None:
            return
        prompt = piece.sequence.prompt_tokens
        if piece.start >= prompt:
            assert piece.stop == piece.start + 1
            return
        borders = {prompt, *range(0, prompt, self._fixed_piece)}
        for group in self.cache.groups:
            borders |= set(range(0, prompt, group.chunk or prompt))
        assert {piece.start, piece.stop} <= borders
        assert not borders & set(range(piece.start + 1, piece.stop))

    def _slots_of(self, sequence: Sequence, index: int, stop: int) -> tuple[int, NDArray[np.int64]]:
        """First position held in a group, and the slots from there to `stop`."""
        size = self.cache.block_tokens
        begin = begin_of(self.cache.groups[index], sequence.computed)
        held = np.arange(stop - begin)
        return begin, np.array(sequence.tables[index], np.int64)[held // size] * size + held % size

    def _write(self, piece: Piece) -> None:
        content = self._contents[piece.sequence][piece.start : piece.stop]
        for index, memory in enumerate(self._slots):
            begin, slots = self._slots_of(piece.sequence, index, piece.stop)
            memory[slots[piece.start - begin :]] = content

    def _read(self, sequence: Sequence, stop: int) -> None:
        for index, memory in enumerate(self._slots):
            begin, slots = self._slots_of(sequence, index, stop)
            wanted = self._contents[sequence][begin:stop]
            assert (memory[slots] == wanted).all(), "a sequence reads what is not its own"

    def _draw(self, sequence: Sequence) -> None:
        request = sequence.owner
        assert isinstance(request, FakeRequest)
        if sequence.limit > sequence.prompt_tokens:
            content, end = self._contents[sequence], len(sequence.tokens)
            before = int(content[end - 1])
            token = hash((before, list(request.answers).index(sequence) % 2)) % VOCABULARY
            content[end] = hash((before, token))
            sequence.tokens.append(token)
        if len(sequence.tokens) - sequence.prompt_tokens == request.answers[sequence]:
            self._remove(sequence)
            self.finished.append(sequence)
            if not request.open:
                self.requests.remove(request)


def contents(request: FakeRequest, prompt: AbstractSequence[int], limit: int) -> NDArray[np.int64]:
    """What keys and values at each position depend on, as one number each; room for `limit` of them."""
    found = np.zeros(limit, np.int64)
    patches = iter([(_number(digest), row) for digest, rows in request.images for row in range(rows)])
    before = _number(repr((request.tenant, request.adapter)))
    for position, token in enumerate(prompt):
        seen = (before, token, *next(patches)) if token == PATCH and request.images else (before, token)
        before = found[position] = hash(seen)
    return found


def _number(text: str) -> int:
    # Not `hash`, which is another one in every process.
    return zlib.crc32(text.encode())


def begin_of(group: LayerGroup, position: int) -> int:
    """The first position that `position` sees in a group."""
    return 0 if group.chunk is None else position // group.chunk * group.chunk


def _order(sequence: Sequence) -> tuple[float, int]:
    return sequence.order
