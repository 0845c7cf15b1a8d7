"""The image tower's own rules (T8): the order of channels after the shuffle, and where patches point."""

from __future__ import annotations

import torch

from ayllu.model.config import VisionConfig
from ayllu.model.vision import pixel_shuffle, vision_angles


def test_t8_pixel_shuffle_orders_channels_by_row_then_column_of_the_block() -> None:
    x = torch.arange(24 * 24 * 4, dtype=torch.float32).view(1, 576, 4)
    shuffled = pixel_shuffle(x, 24, 2)
    grid = x.view(24, 24, 4)
    assert shuffled.shape == (1, 144, 16)
    for row in range(12):
        for column in range(12):
            block = [grid[2 * row + dy, 2 * column + dx] for dy in (0, 1) for dx in (0, 1)]
            assert torch.equal(shuffled[0, row * 12 + column], torch.cat(block))


def test_angles_count_columns_then_rows_from_one_and_leave_the_class_token_still() -> None:
    cos, sin = vision_angles(VisionConfig(), torch.device("cpu"))
    assert cos.shape == sin.shape == (577, 1, 44)
    frequencies = 10_000.0 ** (-2 * torch.arange(22, dtype=torch.float64) / 44)
    expected = torch.cat([(7 + 1) * frequencies, (5 + 1) * frequencies])
    patch = 24 * 5 + 7
    torch.testing.assert_close(cos[patch, 0].double(), expected.cos(), atol=1e-5, rtol=0)
    torch.testing.assert_close(sin[patch, 0].double(), expected.sin(), atol=1e-5, rtol=0)
    assert torch.equal(cos[576], torch.ones(1, 44))
    assert torch.equal(sin[576], torch.zeros(1, 44))
