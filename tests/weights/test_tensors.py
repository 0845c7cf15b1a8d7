"""Joined tensors read like the array that numpy would join, in any range of rows."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.errors import ModelFileError
from ayllu.weights.tensors import JoinedTensor, PlainTensor


@given(
    shape=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    axis=st.integers(0, 2),
    lengths=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    cut=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
def test_a_join_along_any_axis_equals_numpy(shape, axis, lengths, cut) -> None:
    axis %= len(shape)
    arrays, count = [], 0
    for length in lengths:
        part = [length if at == axis else size for at, size in enumerate(shape)]
        arrays.append(np.arange(count, count + np.prod(part), dtype=np.float32).reshape(part))
        count += arrays[-1].size
    joined = JoinedTensor([PlainTensor(array) for array in arrays], axis)
    expected = np.concatenate(arrays, axis=axis)
    assert joined.shape == expected.shape
    np.testing.assert_array_equal(joined.decode(), expected)
    start, stop = sorted(int(share * joined.rows) for share in cut)
    if start < stop:
        np.testing.assert_array_equal(
            joined.decode_rows(start, stop), expected.reshape(joined.rows, -1)[start:stop]
        )


@given(count=st.integers(1, 4), rows=st.integers(1, 3))
def test_a_stack_adds_a_first_axis(count: int, rows: int) -> None:
    arrays = [np.full((rows, 2), at, np.float32) for at in range(count)]
    stacked = JoinedTensor([PlainTensor(array) for array in arrays], None)
    np.testing.assert_array_equal(stacked.decode(), np.stack(arrays))


def test_parts_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ModelFileError, match="do not fit together"):
        JoinedTensor(
            [PlainTensor(np.zeros((2, 3), np.float32)), PlainTensor(np.zeros((2, 4), np.float32))], 0
        )
