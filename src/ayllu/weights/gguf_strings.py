"""Where each string of a GGUF array ends: every one stands behind its length, so a reader has to walk.

A vocabulary and its merges are 100,000 to 400,000 steps of such a walk, up to a fifth of a second. Nearly all
strings are shorter than 256 bytes and hold no zero byte; those all can be found at once, and are checked to
be what a walk would have found.
"""

from __future__ import annotations

import struct

import numpy as np
from numpy.typing import NDArray

_U64 = struct.Struct("<Q")


def string_lengths(window: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """Lengths of up to `count` strings from the start of `window`, as many as lie in it whole: the walk."""
    data = window.tobytes()
    unpack, last, end = _U64.unpack_from, len(data) - 8, len(data)
    lengths: list[int] = []
    at = 0
    while len(lengths) < count and at <= last:
        length = unpack(data, at)[0]
        at += 8 + length
        if at > end:
            break
        lengths.append(length)
    return np.array(lengths, dtype=np.int64)


def short_string_lengths(window: NDArray[np.uint8], count: int) -> NDArray[np.int64]:
    """The beginning of what `string_lengths` gives, up to the first string that is empty, longer than 255
    bytes, or holds a zero byte (or ends the window)."""
    # A length below 256 is one byte that is not zero and seven that are: the only such gaps there are.
    occupied = np.flatnonzero(window)
    places = occupied[:-1][np.diff(occupied) == 8][:count]
    if not len(places) or places[0] != 0:
        return np.empty(0, np.int64)
    lengths = window[places].astype(np.int64)
    ends = places + 8 + lengths
    # Each string must end where the next length stands, and the last one inside the window.
    follows = ends[:-1] == places[1:]
    right = len(follows) if follows.all() else int(np.argmin(follows))
    if right == len(follows) and ends[-1] <= len(window):
        right += 1
    found: NDArray[np.int64] = lengths[:right]
    return found
