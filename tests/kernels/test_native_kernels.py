"""Native matrix kernels against their twin in numpy: every format, every instruction set that runs here."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.errors import UnsupportedError
from ayllu.kernels.native.library import (
    FORMATS,
    Floats,
    PackedMatrix,
    PackJob,
    kernels_name,
    linear,
    linear_swiglu,
    native_library,
    pack,
    pack_matrix,
    packed_bytes,
    unpacked,
)
from ayllu.kernels.reference.quantised import bfloat16_inputs, rounded_inputs, rounding_bound
from tests.kernels.native_blocks import PLAIN, SETS, stored_rows, whole_columns

QUANTISED = [encoding for encoding in FORMATS if encoding not in PLAIN]
ROWS = (0, 1, 15, 17, 33)
each_set = pytest.mark.parametrize("instructions", SETS)
each_format = pytest.mark.parametrize("encoding", FORMATS)


def random_matrix(
    encoding: str, rows: int, columns: int, seed: int = 0, scale: float = 0.1
) -> tuple[PackedMatrix, Floats]:
    """A packed matrix, and its numbers."""
    stored, numbers = stored_rows(encoding, rows, columns, np.random.default_rng(seed), scale)
    return pack_matrix(encoding, stored, columns), numbers


def random_inputs(rows: int, columns: int, seed: int = 1) -> Floats:
    """Inputs of one size, with a block of zeros and one large number among them, as networks have them."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, columns)).astype(np.float32)
    if rows and columns > 64:
        x[-1, :32] = 0
        x[0, 40] = 50
    return x


def seen_inputs(encoding: str, x: Floats) -> np.ndarray:
    """The inputs as a matrix of this format sees them, float64."""
    if encoding in ("F32", "F16"):
        return x.astype(np.float64)
    return bfloat16_inputs(x) if encoding == "BF16" else rounded_inputs(x)


def float_rounding(encoding: str, x: np.ndarray, numbers: Floats) -> np.ndarray:
    """How far a sum in float32 may be from the exact one: half an ulp of the largest for each addition.

    A quantised block adds once (its whole numbers are exact) and its scales take a few products more; its
    factor times its number can be larger than the weight by the minimum, hence the largest of the row.
    """
    steps = x.shape[1] + 8
    largest = np.abs(numbers).max(1, initial=0)[None]
    return steps * 2.0**-24 * (np.abs(x) @ np.abs(numbers.T) + np.abs(x).sum(1)[:, None] * largest) + 1e-30


@each_set
@each_format
@pytest.mark.parametrize("rows", ROWS)
def test_packed_rows_are_the_files_numbers_exactly(instructions: str, encoding: str, rows: int) -> None:
    for columns in (whole_columns(encoding, 1), whole_columns(encoding, 300)):
        matrix, numbers = random_matrix(encoding, rows, columns, rows)
        found = unpacked(matrix, instructions)
        np.testing.assert_array_equal(found, numbers)
        assert (np.signbit(found) == np.signbit(numbers))[found != 0].all()


@each_set
@pytest.mark.parametrize("encoding", PLAIN)
def test_plain_numbers_keep_all_their_values(instructions: str, encoding: str) -> None:
    """Subnormal ones, both zeros and the largest included; NaN and infinity too."""
    values = np.array([0, -0.0, 1e-40, 6e-8, 6.1e-5, 1, -3, 65504, 1e30, np.inf, -np.inf, np.nan], np.float64)
    with np.errstate(over="ignore"):
        stored = np.tile(values.astype(PLAIN[encoding]), (17, 1))
    matrix = pack_matrix(encoding, stored.view(np.uint8).reshape(17, -1), len(values))
    np.testing.assert_array_equal(unpacked(matrix, instructions), stored.astype(np.float32))


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(FORMATS), st.integers(1, 40), st.integers(1, 600), st.integers(1, 3), st.integers(0, 99)
)
def test_packing_is_the_same_whatever_the_threads(
    encoding: str, rows: int, columns: int, threads: int, seed: int
) -> None:
    columns = whole_columns(encoding, columns)
    stored, numbers = stored_rows(encoding, rows, columns, np.random.default_rng(seed))
    matrix = pack_matrix(encoding, stored, columns, threads)
    assert matrix.nbytes == packed_bytes(encoding, rows, columns)
    np.testing.assert_array_equal(unpacked(matrix), numbers)


@each_set
@each_format
@pytest.mark.parametrize("rows", ROWS)
def test_a_product_is_the_twins_within_float_rounding(instructions: str, encoding: str, rows: int) -> None:
    for columns in (whole_columns(encoding, 1), whole_columns(encoding, 333)):
        matrix, numbers = random_matrix(encoding, rows, columns, rows)
        for count in (0, 1, 5, 13):
            x = random_inputs(count, columns, count)
            seen = seen_inputs(encoding, x)
            expected = seen @ numbers.astype(np.float64).T
            found = linear(matrix, x, instructions)
            assert found.shape == (count, rows)
            assert (np.abs(found - expected) <= float_rounding(encoding, seen, numbers)).all()


@each_set
@each_format
@pytest.mark.parametrize("rows", (1, 17, 48))
def test_swiglu_is_the_twins_within_float_rounding(instructions: str, encoding: str, rows: int) -> None:
    columns = whole_columns(encoding, 96)
    gate, gate_numbers = random_matrix(encoding, rows, columns, 3)
    up, up_numbers = random_matrix(encoding, rows, columns, 4)
    for count in (1, 8, 9, 20):
        x = random_inputs(count, columns, count)
        seen = seen_inputs(encoding, x)
        g, u = (seen @ numbers.astype(np.float64).T for numbers in (gate_numbers, up_numbers))
        silu = g / (1 + np.exp(np.minimum(-g, 700)))
        # silu changes by at most 1.1 times what its argument does.
        g_off, u_off = (float_rounding(encoding, seen, numbers) for numbers in (gate_numbers, up_numbers))
        bound = 1.1 * g_off * np.abs(u) + np.abs(silu) * u_off + 1e-6 * np.abs(silu * u) + 1e-30
        assert (np.abs(linear_swiglu(gate, up, x, instructions) - silu * u) <= bound).all()


@each_set
@pytest.mark.parametrize("encoding", QUANTISED)
def test_rounded_inputs_cost_no_more_than_stated(instructions: str, encoding: str) -> None:
    """The stated bound of int8 inputs holds for the exact product; usually the error is far below it."""
    columns = whole_columns(encoding, 512)
    matrix, numbers = random_matrix(encoding, 64, columns, 5)
    x = random_inputs(40, columns, 6)
    exact = x.astype(np.float64) @ numbers.astype(np.float64).T
    error = np.abs(linear(matrix, x, instructions) - exact)
    assert (error <= rounding_bound(x, numbers) + float_rounding(encoding, x, numbers)).all()
    ordinary = slice(1, None)  # the first row has an outlier
    assert np.sqrt((error[ordinary] ** 2).mean() / (exact[ordinary] ** 2).mean()) < 0.01


@each_set
@each_format
def test_a_row_gives_the_same_bits_alone_and_beside_others(instructions: str, encoding: str) -> None:
    columns = whole_columns(encoding, 160)
    matrix, _ = random_matrix(encoding, 49, columns, 7)
    other, _ = random_matrix(encoding, 49, columns, 8)
    x = random_inputs(40, columns, 9)
    alone = np.concatenate([linear(matrix, x[i : i + 1], instructions) for i in range(40)])
    alone_swiglu = np.concatenate(
        [linear_swiglu(matrix, other, x[i : i + 1], instructions) for i in range(40)]
    )
    for count in range(1, 41):
        for first in {0, 40 - count}:
            rows = slice(first, first + count)
            np.testing.assert_array_equal(linear(matrix, x[rows], instructions), alone[rows])
            np.testing.assert_array_equal(
                linear_swiglu(matrix, other, x[rows], instructions), alone_swiglu[rows]
            )


@each_set
@each_format
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("count", [1, 6, 14])
def test_a_number_that_is_none_shows_in_its_row_and_in_no_other(
    instructions: str, encoding: str, poison: float, count: int
) -> None:
    columns = whole_columns(encoding, 64)
    matrix, _ = random_matrix(encoding, 17, columns, 10)
    clean = random_inputs(count, columns, 11)
    expected = linear(matrix, clean, instructions)
    for place in (0, 37, columns - 1):
        row = place % count
        x = clean.copy()
        x[row, place] = poison
        found = linear(matrix, x, instructions)
        assert not np.isfinite(found[row]).any()
        rest = np.arange(count) != row
        np.testing.assert_array_equal(found[rest], expected[rest])


@each_set
def test_large_and_tiny_inputs_stay_finite(instructions: str) -> None:
    matrix, numbers = random_matrix("Q8_0", 16, 64, 12)
    for size in (1e30, 1e-30, 1e-37, 2e-39, 1e-44):
        x = random_inputs(3, 64, 13)
        x *= np.float32(size) / np.abs(x).max()
        found = linear(matrix, x, instructions)
        assert np.isfinite(found).all()
        exact = x.astype(np.float64) @ numbers.astype(np.float64).T
        allowed = rounding_bound(x, numbers) + float_rounding("Q8_0", x, numbers)
        assert (np.abs(found - exact) <= allowed).all()


def test_rows_that_fill_no_whole_blocks_are_refused() -> None:
    for encoding, columns, size in (("Q4_0", 33, 18), ("Q4_K", 128, 72), ("Q4_0", 64, 35), ("F32", 8, 31)):
        with pytest.raises(UnsupportedError):
            pack_matrix(encoding, np.zeros((4, size), np.uint8), columns)


@pytest.mark.parametrize(
    "job",
    [
        PackJob(99, 1, 32, 0, 0, 1024, 0),
        PackJob(-1, 1, 32, 0, 0, 1024, 0),
        PackJob(0, 1, 31, 0, 0, 1024, 0),
        PackJob(7, 1, 32, 0, 0, 1024, 0),
        PackJob(0, -1, 32, 0, 0, 1024, 0),
        PackJob(0, 2, 64, 0, 0, 35, 0),
    ],
)
def test_a_job_that_cannot_be_is_refused_before_anything_is_read(job: PackJob) -> None:
    with pytest.raises(UnsupportedError, match="packing"):
        pack([job], 1)


def test_the_best_instruction_set_is_taken_and_unknown_ones_do_not_run() -> None:
    assert kernels_name() == SETS[-1]
    assert kernels_name("neon") is None
    matrix, _ = random_matrix("Q8_0", 1, 32)
    with pytest.raises(UnsupportedError):
        linear(matrix, np.zeros((1, 32), np.float32), "neon")
    assert native_library() is native_library()
