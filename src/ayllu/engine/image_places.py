"""Where a piece of a prompt has image rows: the same for every runner. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ayllu.engine.prepared import PreparedImage
from ayllu.engine.step_runner import RunnerPiece
from ayllu.model.config import VisionConfig


def image_places(
    piece: RunnerPiece, vision: VisionConfig
) -> Iterator[tuple[PreparedImage, range, Sequence[int]]]:
    """Images of which this piece has rows: which rows, and where in the piece they go.

    The k-th patch token of a prompt is the k-th row of its images, laid one behind the other (spec 6.3).
    """
    places = [place for place, token in enumerate(piece.tokens) if token == vision.patch_token_id]
    first, last = piece.patches_before, piece.patches_before + len(places)
    offset = 0
    for image in piece.images:
        size = image.pixels.shape[0] * vision.tokens_per_tile
        low, high = max(first, offset), min(last, offset + size)
        if low < high:
            yield image, range(low - offset, high - offset), places[low - first : high - first]
        offset += size
