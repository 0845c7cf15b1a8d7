"""The bound of a step's memory against what real steps of the torch runner keep alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ayllu.engine import paged_memory, runner, working_memory
from ayllu.engine.layer_groups import layer_groups
from ayllu.engine.paged_memory import PagedAttention, PagedMemory, PagedPiece
from ayllu.engine.working_memory import FIXED_BYTES, working_bytes
from ayllu.model.config import ModelConfig
from ayllu.model.decoder import Decoder, random_decoder
from tests.model.tiny import tiny_llama, tiny_llama4, tiny_qwen2


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that operations made and that still live."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self.now = 0
        self._holders: dict[int, int] = {}

    def __torch_dispatch__(
        self, operation: Any, types: Any, arguments: tuple[Any, ...] = (), options: Any = None
    ) -> Any:
        given = {
            _address(leaf) for leaf in tree_leaves((arguments, options)) if isinstance(leaf, torch.Tensor)
        }
        result = operation(*arguments, **(options or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                address = _address(tensor)
                if address in given and address not in self._holders:
                    continue  # a view of what was there before
                self._hold(tensor, address)
        return result

    def _hold(self, tensor: torch.Tensor, address: int) -> None:
        size = tensor.untyped_storage().nbytes()
        if self._holders.setdefault(address, 0) == 0:
            self.now += size
            self.peak = max(self.peak, self.now)
        self._holders[address] += 1
        weakref.finalize(tensor, self._let_go, address, size)

    def _let_go(self, address: int, size: int) -> None:
        self._holders[address] -= 1
        if self._holders[address] == 0:
            self.now -= size
            del self._holders[address]


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _peak(work: Callable[[], object]) -> int:
    with torch.no_grad(), LiveBytes() as live:
        work()
    return live.peak


def _step(decoder: Decoder, pieces: list[tuple[int, int]], context: int) -> Callable[[], object]:
    """A step over rows [start, stop) of one sequence each, with the logits of one row per sequence."""
    config = decoder.config
    groups = layer_groups(config)
    each = [-(-group.held_tokens(context) // 8) for group in groups]
    memory = PagedMemory(
        config,
        groups,
        [count * len(pieces) for count in each],
        8,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    for pair in memory.layers:
        for tensor in pair:
            tensor.zero_()
    paged = [
        PagedPiece(start, stop, tuple(np.arange(i * count, (i + 1) * count) for count in each))
        for i, (start, stop) in enumerate(pieces)
    ]
    positions = torch.cat([torch.arange(start, stop) for start, stop in pieces])

    def work() -> torch.Tensor:
        hidden = decoder(decoder.embed(torch.ones_like(positions)), positions, PagedAttention(memory, paged))
        return decoder.logits(hidden[: len(pieces)])

    return work


CONFIGS = {
    "llama": tiny_llama(),
    "qwen2": tiny_qwen2(),
    "llama4": tiny_llama4(layers=4, chunk=64, top_k=2),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("pieces", "context"),
    [
        ([(0, 64)], 256),
        ([(192, 256)], 256),
        ([(255, 256)] * 16, 256),
        ([(254, 255)] * 8 + [(192, 248)], 256),
        ([(8128, 8192)], 8192),
        ([(8191, 8192)] * 4, 8192),
    ],
)
def test_a_step_keeps_less_alive_than_the_bound(name, pieces, context) -> None:
    config: ModelConfig = CONFIGS[name]
    decoder = random_decoder(config, 0)
    peak = _peak(_step(decoder, pieces, context))
    rows = sum(stop - start for start, stop in pieces)
    bound = (
        working_bytes(config, context=context, slots=len(pieces), step_tokens=rows, bytes_per_value=4)
        - FIXED_BYTES
    )
    assert peak <= bound
    if context > 256:
        # With a tiny network only attention over a long context is large enough to tell a loose bound.
        assert bound <= 4 * peak


def test_image_tiles_keep_less_alive_than_the_bound() -> None:
    config = tiny_llama4(vision=True)
    decoder = random_decoder(config, 0)
    pixels = torch.rand(working_memory.TILES_TOGETHER, 3, 56, 56)
    peak = _peak(lambda: decoder.image_rows(pixels))
    bound = working_bytes(config, context=2, slots=1, step_tokens=1, bytes_per_value=4) - FIXED_BYTES
    assert peak <= bound


def test_the_runner_works_in_the_portions_that_the_bound_counts_with() -> None:
    assert working_memory.KEYS_TOGETHER == paged_memory.TILE_TOKENS
    assert working_memory.TILES_TOGETHER == runner.TILES_TOGETHER
