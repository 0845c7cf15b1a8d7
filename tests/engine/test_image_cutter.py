"""Images decoded in processes apart: the same tiles as here, and what breaks there breaks nothing here."""

from __future__ import annotations

import io
import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
from PIL import Image

from ayllu.chat.images import ImageConfig, tile_image
from ayllu.engine import image_cutter
from ayllu.engine.image_cutter import MAX_CHILDREN, ImageCutter
from ayllu.errors import EngineUnavailableError, ImageError, OverloadedError
from tests.chat.test_images import HOSTILE, encoded, picture
from tests.engine.toy_engine import running, wait_until

SMALL = ImageConfig(tile_size=28, patch_size=14, max_tiles=4)


@pytest.fixture(scope="module")
def cutter() -> Iterator[ImageCutter]:
    with ImageCutter() as made:
        yield made


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("size", [(1, 1), (20, 50), (700, 400)])
def test_the_tiles_are_those_of_this_process(cutter: ImageCutter, kind: str, size: tuple[int, int]) -> None:
    data = encoded(picture(*size), kind)
    for config in (ImageConfig(), SMALL):
        ours, theirs = tile_image(data, config), cutter.tiles(data, config)
        assert (ours.rows, ours.columns) == (theirs.rows, theirs.columns)
        np.testing.assert_array_equal(ours.pixels, theirs.pixels)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bytes_are_the_same_error_and_the_child_lives(cutter: ImageCutter, name: str) -> None:
    cutter.tiles(encoded(picture(2, 2)), SMALL)
    before = cutter.process_ids
    with pytest.raises(ImageError) as here:
        tile_image(HOSTILE[name])
    with pytest.raises(ImageError) as there:
        cutter.tiles(HOSTILE[name], ImageConfig())
    assert str(here.value) == str(there.value)
    assert set(before) <= set(cutter.process_ids)


def large(mode: str) -> bytes:
    data = io.BytesIO()
    Image.new(mode, (8000, 5000)).save(data, "PNG", compress_level=1)
    return data.getvalue()


@pytest.mark.parametrize("mode", ["RGBA", "I;16", "LA"])
def test_the_largest_image_that_is_allowed_stays_within_the_memory(cutter: ImageCutter, mode: str) -> None:
    assert cutter.tiles(large(mode), SMALL).pixels.shape[1:] == (3, 28, 28)


def test_an_image_that_takes_more_memory_is_an_error_and_the_next_is_cut() -> None:
    with ImageCutter(memory_bytes=64 << 20) as cutter:
        with pytest.raises(ImageError, match="64 MiB"):
            cutter.tiles(large("RGBA"), SMALL)
        assert cutter.tiles(encoded(picture(9, 9)), SMALL).rows == 1


def test_an_image_that_takes_more_time_ends_its_child_and_the_next_starts_another() -> None:
    with ImageCutter(seconds=60) as cutter:
        cutter.tiles(encoded(picture(9, 9)), SMALL)
        (first,) = cutter.process_ids
        cutter._seconds = 0.2
        os.kill(first, signal.SIGSTOP)
        with pytest.raises(ImageError, match=r"0\.2 s"):
            cutter.tiles(encoded(picture(9, 9)), SMALL)
        assert not running(first)
        cutter._seconds = 60
        assert cutter.tiles(encoded(picture(9, 9)), SMALL).rows == 1


def test_children_that_are_killed_are_replaced() -> None:
    with ImageCutter() as cutter:
        for _ in range(3):
            cutter.tiles(encoded(picture(9, 9)), SMALL)
            (process_id,) = cutter.process_ids
            os.kill(process_id, signal.SIGKILL)
            wait_until(lambda: not cutter.process_ids)


def test_many_threads_share_few_children() -> None:
    data = [encoded(picture(30 + n, 20)) for n in range(12)]
    with ImageCutter() as cutter, ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda one: cutter.tiles(one, SMALL).pixels, data))
        assert 1 <= len(cutter.process_ids) <= MAX_CHILDREN
    for one, pixels in zip(data, found, strict=True):
        np.testing.assert_array_equal(pixels, tile_image(one, SMALL).pixels)


def test_when_too_many_wait_the_next_is_told_to_come_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_cutter, "MAX_WAITING", 0)
    with ImageCutter() as cutter, pytest.raises(OverloadedError):
        cutter.tiles(encoded(picture(9, 9)), SMALL)


def test_after_closing_no_child_is_left_and_none_is_started() -> None:
    cutter = ImageCutter()
    cutter.tiles(encoded(picture(9, 9)), SMALL)
    (child,) = cutter.process_ids
    cutter.close()
    cutter.close()
    assert not running(child)
    with pytest.raises(EngineUnavailableError):
        cutter.tiles(encoded(picture(9, 9)), SMALL)


@pytest.mark.parametrize(
    "said",
    [
        {"rows": 1, "columns": 1, "shape": [9, 28, 28, 3]},
        {"rows": 1, "columns": 1, "shape": [1, 28, 28, 4]},
        {"rows": 100, "columns": 100, "shape": [10001, 28, 28, 3]},
        {"rows": -1, "columns": -1, "shape": [1, 28, 28, 3]},
        {"rows": "1", "columns": 1, "shape": [1, 28, 28, 3]},
        {"rows": 1},
        {},
        {"problem": "x"},
    ],
)
def test_a_child_that_says_what_was_not_agreed_is_ended(
    said: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A decoder that somebody took over may say anything; it cannot make this process believe it."""
    with ImageCutter() as cutter:
        cutter.tiles(encoded(picture(9, 9)), SMALL)
        asked = image_cutter._Child._asked
        monkeypatch.setattr(
            image_cutter._Child, "_asked", lambda self, q, d=b"": said if d else asked(self, q, d)
        )
        with pytest.raises(ImageError, match="breaks the decoder"):
            cutter.tiles(encoded(picture(9, 9)), SMALL)
