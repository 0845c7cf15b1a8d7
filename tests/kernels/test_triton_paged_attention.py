"""Attention over cache blocks: Triton's kernel gives what the formula gives, for pieces of every shape.

Tolerance in float32: 1e-5 absolute, since both add up the same few hundred terms of order one in another
order (float32 carries 6e-8 of each). In half precision: two units in the last place of results of order one.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.kernels.reference.paged_attention import Pieces
from ayllu.kernels.reference.paged_attention import paged_attention as reference
from ayllu.kernels.triton.paged_attention import paged_attention
from tests.kernels import DEVICE

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


class Case:
    """A random step: (rows, held) of each piece; one row of the step between pieces belongs to nobody."""

    def __init__(
        self, sizes, *, heads=(6, 2), width=16, block_tokens=4, dtype=torch.float32, seed=0, unread=0.0
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        counts = [-(-held // block_tokens) for _, held in sizes]
        blocks = torch.randperm(sum(counts) + 3, generator=generator)
        tables = torch.full((len(sizes), max([1, *counts])), 10**6)
        used = 0
        for piece, count in enumerate(counts):
            tables[piece, :count] = blocks[used : used + count]
            used += count
        first, row = [], 0
        for rows, _ in sizes:
            first.append(row)
            row += rows + 1
        self.block_tokens, self.sizes, self.tables = block_tokens, sizes, tables
        slots = len(blocks) * block_tokens
        self.q = (torch.randn(row, heads[0], width, generator=generator) * 2).to(dtype)
        self.keys, self.values = torch.randn(2, slots, heads[1], width, generator=generator).to(dtype)
        for cache in (self.keys, self.values):
            kept = cache.clone()
            cache.fill_(unread)
            for piece, (_, held) in enumerate(sizes):
                cache[self.slots(piece, held)] = kept[self.slots(piece, held)]
        self.first = first
        self.pieces = Pieces(
            torch.tensor(first, device=DEVICE),
            torch.tensor([rows for rows, _ in sizes], device=DEVICE, dtype=torch.int64),
            torch.tensor([held for _, held in sizes], device=DEVICE, dtype=torch.int64),
            tables.to(DEVICE),
            max([0, *(rows for rows, _ in sizes)]),
            max([0, *(held for _, held in sizes)]),
        )  # fmt: skip

    def slots(self, piece: int, held: int) -> torch.Tensor:
        places = torch.arange(held)
        return (
            self.tables[piece][places // self.block_tokens] * self.block_tokens + places % self.block_tokens
        )

    def computed(self, kernel, **options) -> torch.Tensor:
        out = torch.full_like(self.q, 7.0).to(DEVICE)
        q, keys, values = (tensor.to(DEVICE) for tensor in (self.q, self.keys, self.values))
        kernel(q, keys, values, self.pieces, self.block_tokens, out, **options)
        return out.cpu()

    def rows_of(self, piece: int, out: torch.Tensor) -> torch.Tensor:
        return out[self.first[piece] : self.first[piece] + self.sizes[piece][0]]


def assert_equal(case: Case, **options) -> None:
    tolerance = TOLERANCE[case.q.dtype]
    torch.testing.assert_close(
        case.computed(paged_attention, **options), case.computed(reference),
        atol=tolerance, rtol=tolerance, equal_nan=True,
    )  # fmt: skip


def pieces_of(most_rows: int, most_before: int):
    sizes = st.tuples(st.integers(1, most_rows), st.integers(0, most_before))
    return st.lists(sizes.map(lambda size: (size[0], size[0] + size[1])), min_size=1, max_size=4)


@settings(max_examples=15)
@given(
    sizes=pieces_of(1, 300), heads=st.sampled_from([(1, 1), (6, 2), (5, 1), (4, 4)]),
    width=st.sampled_from([2, 16, 20]), block_tokens=st.sampled_from([1, 3, 16]),
    splits=st.sampled_from([1, 2, 8, None]), seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_decoding_rows_get_the_attention_of_their_sequences(
    sizes, heads, width, block_tokens, splits, seed
) -> None:
    case = Case(sizes, heads=heads, width=width, block_tokens=block_tokens, seed=seed, unread=torch.nan)
    assert_equal(case, splits=splits)


@settings(max_examples=12)
@given(
    sizes=pieces_of(40, 90), heads=st.sampled_from([(1, 1), (6, 2), (5, 1)]),
    block_tokens=st.sampled_from([1, 4, 16]), splits=st.sampled_from([1, 2, None]),
    seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_prompt_pieces_get_causal_attention(sizes, heads, block_tokens, splits, seed) -> None:
    """What no row sees holds NaN: reading it would show."""
    case = Case(sizes, heads=heads, block_tokens=block_tokens, seed=seed, unread=torch.nan)
    assert_equal(case, splits=splits)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("splits", [1, 4])
def test_half_precision_is_as_close_as_it_can_be(dtype, splits) -> None:
    assert_equal(Case([(1, 150), (1, 9), (7, 70), (1, 1)], dtype=dtype), splits=splits)


@pytest.mark.parametrize("splits", [1, 4])
def test_pieces_without_tokens_get_zeros_and_rows_of_nobody_stay(splits) -> None:
    case = Case([(1, 0), (1, 5), (1, 0)], unread=torch.nan)
    out = case.computed(paged_attention, splits=splits)
    assert not case.rows_of(0, out).any() and not case.rows_of(2, out).any()
    assert (out[1::2] == 7).all()
    assert_equal(case, splits=splits)


def test_no_pieces_and_pieces_without_rows_write_nothing() -> None:
    assert (Case([(1, 3)]).computed(lambda *_: None) == 7).all()
    empty = Case([(0, 0), (0, 8)])
    assert (empty.computed(paged_attention) == 7).all()
    none = Case([(1, 3)])
    nothing = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    none.pieces = Pieces(nothing, nothing, nothing, torch.zeros(0, 1, device=DEVICE), 0, 0)
    assert (none.computed(paged_attention) == 7).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["keys", "values"])
def test_a_bad_number_reaches_its_own_sequence_only(where, bad, splits) -> None:
    case = Case([(1, 140), (1, 140), (3, 90)])
    clean = case.computed(paged_attention, splits=splits)
    getattr(case, where)[case.slots(1, 140)[70]] = bad
    out = case.computed(paged_attention, splits=splits)
    assert not torch.equal(case.rows_of(1, out), case.rows_of(1, clean))
    if bad is torch.nan:
        assert case.rows_of(1, out).isnan().all()
    for other in (0, 2):
        assert torch.equal(case.rows_of(other, out), case.rows_of(other, clean))
    assert_equal(case, splits=splits)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_only_scores_of_minus_infinity_give_nan_as_a_softmax_does() -> None:
    case = Case([(1, 80)])
    case.q.fill_(1.0)
    case.keys.fill_(-torch.inf)
    for splits in (1, 4):
        assert case.rows_of(0, case.computed(paged_attention, splits=splits)).isnan().all()
    assert case.rows_of(0, case.computed(reference)).isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_a_part_of_keys_that_count_for_nothing_spoils_no_other_part() -> None:
    case = Case([(1, 256)], heads=(1, 1))
    case.q.fill_(1.0)
    case.keys[case.slots(0, 64)] = -torch.inf
    assert case.computed(paged_attention, splits=4).isfinite().all()
    assert_equal(case, splits=4)
