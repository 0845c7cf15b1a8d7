"""Cache blocks: exact accounting, the order in which memories are lost, and the longest prefix left."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ayllu.engine.block_cache import BlockCache, BlockPool
from ayllu.engine.layer_groups import fitting_block_tokens, layer_groups
from ayllu.engine.sequence import BlockKeys, Sequence
from ayllu.model.presets import PRESETS
from tests.engine.fake_runner import FakeRequest, begin_of, groups_of

LAYOUTS = [(None,), (None, 8), (8,), (4, 8), (None, 4, 16)]


class _PlainPool:
    """The rules of `BlockPool` in their plainest form: holders, content, and when each block was let go."""

    def __init__(self, total: int) -> None:
        self.holders = [0] * total
        self.key: list[bytes | None] = [None] * total
        self.freed_at = [0] * total
        self.time = 0

    def free(self) -> list[int]:
        return [block for block, holders in enumerate(self.holders) if holders == 0]

    def takable(self) -> list[int]:
        """Which blocks may be taken next: any without content, else the one let go longest ago."""
        empty = [block for block in self.free() if self.key[block] is None]
        return empty or [min(self.free(), key=lambda block: self.freed_at[block])]


class PoolMachine(RuleBasedStateMachine):
    """`BlockPool` against `_PlainPool`."""

    @initialize(total=st.integers(1, 5))
    def start(self, total) -> None:
        self.pool, self.plain, self.held = BlockPool(total), _PlainPool(total), []

    @precondition(lambda self: self.pool.free)
    @rule()
    def take(self) -> None:
        takable = self.plain.takable()
        block = self.pool.take()
        assert block in takable
        self.plain.holders[block] = 1
        self.plain.key[block] = None
        self.held.append(block)

    @rule(data=st.data(), number=st.integers(0, 5))
    def remember(self, data, number) -> None:
        if not self.held:
            return
        block, key = data.draw(st.sampled_from(self.held)), bytes([number])
        self.pool.remember(block, key)
        if self.plain.key[block] is None and key not in self.plain.key:
            self.plain.key[block] = key

    @rule(number=st.integers(0, 5))
    def find_and_refer(self, number) -> None:
        key = bytes([number])
        block = self.pool.find(key)
        assert block == (self.plain.key.index(key) if key in self.plain.key else None)
        if block is not None:
            self.pool.refer(block)
            self.plain.holders[block] += 1
            self.held.append(block)

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data) -> None:
        block = data.draw(st.sampled_from(self.held))
        self.held.remove(block)
        self.pool.release(block)
        self.plain.holders[block] -= 1
        self.plain.time += 1
        self.plain.freed_at[block] = self.plain.time

    @rule()
    def forget_all(self) -> None:
        self.pool.forget_all()
        self.plain.key = [None] * len(self.plain.key)

    @invariant()
    def agrees(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check(self.held)
            assert self.pool.free == len(self.plain.free())
            assert self.pool.remembered == sum(
                self.plain.key[block] is not None for block in self.plain.free()
            )


TestPoolMachine = PoolMachine.TestCase
TestPoolMachine.settings = settings(max_examples=300, stateful_step_count=40, deadline=None)


def test_empty_blocks_are_taken_before_memories_and_those_by_age() -> None:
    pool = BlockPool(4)
    blocks = [pool.take() for _ in range(4)]
    for block in (0, 1, 2):
        pool.remember(block, bytes([block]))
    for block in (1, 0, 3, 2):
        pool.release(block)
    assert sorted(blocks) == [0, 1, 2, 3]
    assert [pool.take() for _ in range(4)] == [3, 1, 0, 2]


def test_a_block_released_once_too_often_is_an_error() -> None:
    pool = BlockPool(1)
    block = pool.take()
    pool.release(block)
    with pytest.raises(AssertionError, match="released once too often"):
        pool.release(block)


@pytest.mark.parametrize("held", [[], [0, 0], [1]])
def test_check_finds_references_that_are_not_in_the_tables(held) -> None:
    pool = BlockPool(2)
    assert pool.take() == 0
    pool.check([0])
    with pytest.raises(AssertionError, match="references differ"):
        pool.check(held)


def _sequence(tokens: list[int], block_tokens: int, *, limit: int | None = None) -> Sequence:
    keys = BlockKeys(b"root", block_tokens)
    return Sequence(tokens, len(tokens), limit or len(tokens), keys, FakeRequest("r", "", 0, "", ()))


def _compute(cache: BlockCache, sequence: Sequence, length: int, piece: int = 5) -> None:
    """Blocks and keys for tokens up to `length`, in pieces that cross no border."""
    while sequence.computed < length:
        borders = [begin_of(group, sequence.computed) + (group.chunk or length) for group in cache.groups]
        stop = min(sequence.computed + piece, length, *borders)
        assert cache.extend(sequence, stop)
        cache.commit(sequence, stop)


def test_the_beginning_of_a_prompt_is_remembered_longest() -> None:
    cache = BlockCache(groups_of(None), [6], 2)
    old, new = _sequence([1] * 6, 2), _sequence([2] * 6, 2)
    for sequence in (old, new):
        cache.open(sequence)
        _compute(cache, sequence, 6)
    cache.close(old)
    cache.close(new)
    lost = []
    name_of = {
        key: f"{name} {index}"
        for name, sequence in (("old", old), ("new", new))
        for index, key in enumerate(sequence.keys.up_to(sequence.tokens, 3))
    }
    for _ in range(6):
        cache.pools[0].take()
        gone = [name for key, name in name_of.items() if cache.pools[0].find(key) is None]
        lost += [name for name in gone if name not in lost]
    assert lost == ["old 2", "old 1", "old 0", "new 2", "new 1", "new 0"]


def test_a_prompt_found_again_is_young_again() -> None:
    cache = BlockCache(groups_of(None), [4], 2)
    for tokens in ([1] * 4, [2] * 4, [1] * 5):
        sequence = _sequence(tokens, 2)
        cache.open(sequence)
        if tokens != [1] * 5:
            _compute(cache, sequence, 4)
        cache.close(sequence)
    taker = _sequence([3] * 4, 2)
    cache.open(taker)
    _compute(cache, taker, 4)
    assert cache.open(_sequence([1] * 5, 2)) == 4
    assert cache.open(_sequence([2] * 5, 2)) == 0


@given(
    layout=st.sampled_from(LAYOUTS),
    size=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 40),
    alignment=st.sampled_from([1, 1, 3, 4, 6, 12]),
    data=st.data(),
)
def test_the_remembered_length_is_the_longest_for_which_all_groups_have_what_they_need(
    layout, size, length, alignment, data
) -> None:
    groups = groups_of(*layout)
    cache = BlockCache(groups, [40] * len(groups), size, alignment=alignment)
    tokens = list(range(length))
    keys = BlockKeys(b"root", size).up_to(tokens, length // size)
    there = [
        data.draw(st.sets(st.integers(0, max(0, len(keys) - 1))) | st.just(set(range(len(keys)))))
        for _ in groups
    ]
    for pool, blocks in zip(cache.pools, there, strict=True):
        for index in blocks & set(range(len(keys))):
            block = pool.take()
            pool.remember(block, keys[index])
            pool.release(block)
    possible = [
        found
        for found in range(0, length, size)
        if found % alignment == 0
        and all(
            set(range(begin_of(group, found) // size, found // size)) <= blocks
            for group, blocks in zip(groups, there, strict=True)
        )
    ]
    sequence = _sequence(tokens, size)
    assert cache.open(sequence) == max(possible)
    cache.check()
    cache.close(sequence)
    assert cache.free() == (40,) * len(groups)


@given(
    layout=st.sampled_from(LAYOUTS),
    size=st.sampled_from([1, 2, 4]),
    length=st.integers(1, 60),
    piece=st.integers(1, 9),
)
def test_peak_is_the_most_that_a_lone_sequence_ever_holds(layout, size, length, piece) -> None:
    groups = groups_of(*layout)
    cache = BlockCache(groups, [64] * len(groups), size, remembers=False)
    sequence = _sequence([0] * length, size)
    cache.open(sequence)
    most = [0] * len(groups)
    while sequence.computed < length:
        borders = [begin_of(group, sequence.computed) + (group.chunk or length) for group in groups]
        stop = min(sequence.computed + piece, length, *borders)
        assert cache.extend(sequence, stop)
        most = [max(have, len(table)) for have, table in zip(most, sequence.tables, strict=True)]
        assert cache.missing(sequence, length) == tuple(
            peak - len(table) for peak, table in zip(cache.peak(length), sequence.tables, strict=True)
        )
        cache.commit(sequence, stop)
    assert tuple(most) == cache.peak(length)


def test_extend_gives_all_blocks_or_none() -> None:
    cache = BlockCache(groups_of(None, 8), [4, 1], 2)
    sequence = _sequence([0] * 8, 2)
    cache.open(sequence)
    assert not cache.extend(sequence, 4)
    assert cache.free() == (4, 1)
    assert cache.extend(sequence, 2)
    assert cache.free() == (3, 0)
    assert cache.extend(sequence, 1), "what is held already needs nothing"
    cache.check()


def test_a_piece_across_a_chunks_border_is_an_error() -> None:
    cache = BlockCache(groups_of(None, 8), [9, 9], 2)
    sequence = _sequence([0] * 10, 2)
    cache.open(sequence)
    with pytest.raises(AssertionError, match="crosses a chunk's border"):
        cache.extend(sequence, 9)


def test_a_finished_chunk_is_let_go_and_can_be_found() -> None:
    cache = BlockCache(groups_of(None, 8), [9, 9], 2)
    sequence = _sequence(list(range(12)), 2)
    cache.open(sequence)
    _compute(cache, sequence, 8)
    assert [len(table) for table in sequence.tables] == [4, 0]
    assert [pool.remembered for pool in cache.pools] == [0, 4]
    later = _sequence(list(range(8)), 2)
    assert cache.open(later) == 6
    cache.check()


def test_only_what_is_certain_is_remembered() -> None:
    cache = BlockCache(groups_of(None), [9], 2)
    sequence = _sequence(list(range(9)), 2)
    cache.open(sequence)
    assert cache.extend(sequence, 8)
    cache.commit(sequence, 8, remember_up_to=5)
    assert cache.open(_sequence(list(range(9)), 2)) == 4


def test_two_that_compute_the_same_at_once_keep_their_own_blocks() -> None:
    cache = BlockCache(groups_of(None), [9], 2)
    one, two = _sequence([1] * 4, 2), _sequence([1] * 4, 2)
    cache.open(one)
    cache.open(two)
    _compute(cache, one, 4)
    _compute(cache, two, 4)
    assert not set(one.tables[0]) & set(two.tables[0])
    cache.close(one)
    cache.close(two)
    cache.check()
    assert cache.pools[0].remembered == 2
    assert cache.open(_sequence([1] * 5, 2)) == 4


def test_forgetting_leaves_running_sequences_their_blocks() -> None:
    cache = BlockCache(groups_of(None, 8), [9, 9], 2)
    sequence = _sequence(list(range(9)), 2)
    cache.open(sequence)
    _compute(cache, sequence, 5)
    cache.forget_all()
    _compute(cache, sequence, 9)
    cache.check()
    later = _sequence(list(range(9)), 2)
    assert cache.open(later) == 0
    cache.close(sequence)
    cache.close(later)
    assert cache.free() == (9, 9)


def test_a_cache_that_remembers_nothing_hashes_nothing(monkeypatch) -> None:
    monkeypatch.setattr(hashlib, "sha256", None)
    cache = BlockCache(groups_of(None, 8), [9, 9], 2, remembers=False)
    sequence = _sequence(list(range(12)), 2)
    assert cache.open(sequence) == 0
    _compute(cache, sequence, 12)
    cache.close(sequence)
    assert [pool.remembered for pool in cache.pools] == [0, 0]


@given(chunks=st.lists(st.integers(1, 60), max_size=3), wanted=st.integers(1, 40))
def test_block_tokens_are_the_largest_that_divide_every_chunk(chunks, wanted) -> None:
    size = fitting_block_tokens(groups_of(None, *chunks), wanted)
    assert size == max(s for s in range(1, wanted + 1) if all(chunk % s == 0 for chunk in chunks))


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_every_layer_is_in_exactly_one_group_and_the_global_one_is_first(preset) -> None:
    config = PRESETS[preset]()
    groups = layer_groups(config)
    assert sorted(layer for group in groups for layer in group.layers) == list(range(len(config.layers)))
    for group in groups:
        assert {config.layers[layer].chunk for layer in group.layers} == {group.chunk}
    chunks = [group.chunk for group in groups]
    assert None not in chunks[1:]
    assert len(set(chunks)) == len(chunks)
