"""A long list of texts that stays the bytes it came as: a vocabulary has 50,000 to 250,000 of them.

As Python strings such a list costs some 60 bytes and half a microsecond a text, which a process that only
looks a few of them up need not pay. Whoever goes through all of them gets plain strings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray


class TextArray(Sequence[str]):
    """Texts as pieces of one run of UTF-8 bytes, whose validity whoever makes it has checked."""

    def __init__(self, data: NDArray[np.uint8], starts: NDArray[Any], lengths: NDArray[Any]) -> None:
        """`data`: all bytes, other bytes between the texts allowed. starts, lengths: of each, ascending."""
        self._data = data
        self._starts = starts
        self._lengths = lengths

    def __len__(self) -> int:
        return len(self._starts)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[str]: ...
    def __getitem__(self, place: int | slice) -> str | Sequence[str]:
        if isinstance(place, slice):
            return TextArray(self._data, self._starts[place], self._lengths[place])
        start = int(self._starts[place])
        return self._data[start : start + int(self._lengths[place])].tobytes().decode()

    def __iter__(self) -> Iterator[str]:
        if len(self) == 0:
            return iter(())
        first = int(self._starts[0])
        data = self._data[first : int(self._starts[-1] + self._lengths[-1])].tobytes()
        starts = self._starts - first
        pieces = zip(starts.tolist(), (starts + self._lengths).tolist(), strict=True)
        return map(bytes.decode, [data[start:stop] for start, stop in pieces])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, TextArray | list | tuple):
            return NotImplemented
        return len(self) == len(other) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]  # compared by content, like a list

    def __repr__(self) -> str:
        return f"<{len(self)} texts>"

    def places(self, text: str) -> list[int]:
        """Every place that holds `text`, without making strings of the others."""
        wanted = text.encode()
        candidates = np.flatnonzero(self._lengths == len(wanted))
        for offset, byte in enumerate(wanted):
            candidates = candidates[self._data[self._starts[candidates] + offset] == byte]
        return [int(place) for place in candidates]
