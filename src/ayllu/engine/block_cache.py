"""Who owns which cache block: a pool per kind of layer, tables per sequence, and a memory of prompt prefixes.

Global layers keep a block for every token; chunked layers those of the current chunk alone. A block that
nobody refers to is free; if it is full it also keeps its content under a SHA-256 key until it is needed for
something else, oldest first. Counting only: the keys and values lie in `paged_memory`. Needs no torch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence as AbstractSequence

from ayllu.engine.layer_groups import LayerGroup
from ayllu.engine.sequence import Sequence


class BlockPool:
    """The blocks of one kind of layer: references, the free ones in the order they are taken, and keys."""

    def __init__(self, total: int) -> None:
        self.total = total
        self._references = [0] * total
        # Ordered: taken from the front. Empty blocks are put there, remembered ones at the back.
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(total))
        self._key_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody refers to, remembered ones included."""
        return len(self._free)

    @property
    def remembered(self) -> int:
        """Free blocks whose content can be found by its key."""
        return sum(block in self._key_of for block in self._free)

    def take(self) -> int:
        """A block for new content, with one reference. The caller has checked `free`."""
        block, _ = self._free.popitem(last=False)
        self._forget(block)
        self._references[block] = 1
        return block

    def find(self, key: bytes) -> int | None:
        """The block with that content, if there is one."""
        return self._block_of.get(key)

    def refer(self, block: int) -> None:
        """One more reference."""
        if self._references[block] == 0:
            del self._free[block]
        self._references[block] += 1

    def release(self, block: int) -> None:
        """One reference less; without any the block is free."""
        self._references[block] -= 1
        assert self._references[block] >= 0, f"block {block} released once too often"
        if self._references[block] == 0:
            self._free[block] = None
            if block not in self._key_of:
                self._free.move_to_end(block, last=False)

    def remember(self, block: int, key: bytes) -> None:
        """Say what a full block holds. The first block of a content keeps the key."""
        if key not in self._block_of and block not in self._key_of:
            self._block_of[key] = block
            self._key_of[block] = key

    def forget_all(self) -> None:
        """Drop every key; nobody finds old content any more."""
        for block in list(self._key_of):
            self._forget(block)

    def _forget(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is not None:
            del self._block_of[key]

    def check(self, held: AbstractSequence[int]) -> None:
        """Assert that references are exactly those of `held`, and that nothing is lost or doubled."""
        counts = [0] * self.total
        for block in held:
            counts[block] += 1
        assert counts == self._references, "references differ from the tables"
        assert set(self._free) == {block for block, count in enumerate(counts) if count == 0}
        assert {block: key for key, block in self._block_of.items()} == self._key_of


class BlockCache:
    """Blocks of all sequences. `alignment`: prefixes are found in multiples of so many tokens."""

    def __init__(
        self,
        groups: AbstractSequence[LayerGroup],
        blocks: AbstractSequence[int],
        block_tokens: int,
        *,
        remembers: bool = True,
        alignment: int = 1,
    ) -> None:
        assert all(group.chunk is None or group.chunk % block_tokens == 0 for group in groups)
        self.groups = tuple(groups)
        self.block_tokens = block_tokens
        self.pools = tuple(BlockPool(total) for total in blocks)
        self.remembers = remembers
        self._alignment = alignment
        self._open: set[Sequence] = set()

    def free(self) -> tuple[int, ...]:
        """Free blocks of each group."""
        return tuple(pool.free for pool in self.pools)

    def peak(self, length: int) -> tuple[int, ...]:
        """The most blocks of each group that a sequence growing to `length` tokens holds at once."""
        return tuple(-(-group.held_tokens(length) // self.block_tokens) for group in self.groups)

    def missing(self, sequence: Sequence, length: int) -> tuple[int, ...]:
        """Blocks of each group that `sequence` does not hold yet and will need to reach `length` tokens."""
        held = (len(table) for table in sequence.tables)
        return tuple(max(0, peak - have) for peak, have in zip(self.peak(length), held, strict=True))

    def open(self, sequence: Sequence) -> int:
        """Give a sequence its tables, filled with what the cache remembers of its beginning.

        The tokens that need not be computed; at least its last token is left. Only whole blocks count, and
        for chunked layers all blocks since the chunk's beginning must still be there.
        """
        assert sequence not in self._open, "opened twice"
        self._open.add(sequence)
        length = self._remembered_length(sequence) if self.remembers and sequence.uses_cached_prefix else 0
        keys = sequence.keys.up_to(sequence.tokens, length // self.block_tokens)
        sequence.tables = []
        for group, pool in zip(self.groups, self.pools, strict=True):
            first = 0 if group.chunk is None else length // group.chunk * group.chunk // self.block_tokens
            table = []
            for key in keys[first:]:
                block = pool.find(key)
                assert block is not None
                pool.refer(block)
                table.append(block)
            sequence.tables.append(table)
        sequence.computed = length
        return length

    def _remembered_length(self, sequence: Sequence) -> int:
        size = self.block_tokens
        count = (len(sequence.tokens) - 1) // size
        keys = sequence.keys.up_to(sequence.tokens, count)
        usable = [True] * (count + 1)
        for group, pool in zip(self.groups, self.pools, strict=True):
            unbroken = True
            for blocks in range(1, count + 1):
                unbroken = unbroken and pool.find(keys[blocks - 1]) is not None
                if group.chunk is not None and blocks * size % group.chunk == 0:
                    unbroken = True  # a chunk begins here: nothing before it is needed
                elif group.chunk is None and not unbroken:
                    count = blocks - 1
                    break
                usable[blocks] &= unbroken
        for blocks in range(count, 0, -1):
            if usable[blocks] and blocks * size % self._alignment == 0:
                return blocks * size
        return 0

    def extend(self, sequence: Sequence, length: int) -> bool:
        """Give `sequence` blocks for its tokens up to `length`, all or none; False if too few are free.

        Tokens [computed, length) must lie in one chunk of every chunked group.
        """
        wanted = []
        for group, table in zip(self.groups, sequence.tables, strict=True):
            start = 0 if group.chunk is None else sequence.computed // group.chunk * group.chunk
            assert group.chunk is None or length <= start + group.chunk, "a piece crosses a chunk's border"
            wanted.append(-(-(length - start) // self.block_tokens) - len(table))
        if any(count > pool.free for count, pool in zip(wanted, self.pools, strict=True)):
            return False
        for count, pool, table in zip(wanted, self.pools, sequence.tables, strict=True):
            table.extend(pool.take() for _ in range(count))
        return True

    def commit(self, sequence: Sequence, length: int, *, remember_up_to: int | None = None) -> None:
        """Note that tokens up to `length` are computed: full blocks can be found, finished chunks are left.

        remember_up_to: only blocks up to this token are remembered (None: all full ones).
        """
        size = self.block_tokens
        before, sequence.computed = sequence.computed, length
        known = length if remember_up_to is None else min(length, remember_up_to)
        full = known // size if self.remembers else 0
        keys = sequence.keys.up_to(sequence.tokens, full) if full > before // size else []
        for group, pool, table in zip(self.groups, self.pools, sequence.tables, strict=True):
            start = 0 if group.chunk is None else before // group.chunk * group.chunk
            for index in range(before // size, len(keys)):
                pool.remember(table[index - start // size], keys[index])
            if group.chunk is not None and length == start + group.chunk:
                self._release(pool, table)

    def trim(self, sequence: Sequence) -> None:
        """Take back the blocks that hold nothing computed, as those of a draft that was not accepted."""
        for group, pool, table in zip(self.groups, self.pools, sequence.tables, strict=True):
            start = 0 if group.chunk is None else sequence.computed // group.chunk * group.chunk
            needed = -(-(sequence.computed - start) // self.block_tokens)
            while len(table) > needed:
                pool.release(table.pop())

    def close(self, sequence: Sequence) -> None:
        """Take all blocks back. What they hold stays remembered until they are needed."""
        self._open.remove(sequence)
        for pool, table in zip(self.pools, sequence.tables, strict=True):
            self._release(pool, table)
        sequence.tables = []
        sequence.computed = 0

    @staticmethod
    def _release(pool: BlockPool, table: list[int]) -> None:
        # Last block first, so that the beginning of a prompt, which others may share, is kept longest.
        while table:
            pool.release(table.pop())

    def forget_all(self) -> None:
        """Drop what is remembered of prompts; running sequences keep their blocks."""
        for pool in self.pools:
            pool.forget_all()

    def check(self) -> None:
        """Assert exact accounting: every reference belongs to a table of an open sequence."""
        for index, pool in enumerate(self.pools):
            pool.check([block for sequence in self._open for block in sequence.tables[index]])
