"""The cache of one sequence: pieces and rewinds never change an answer, and chunks bound its memory."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.engine.sequence_cache import SequenceCache
from ayllu.model.attention import WholeSequence
from ayllu.model.config import ModelConfig
from ayllu.model.decoder import Decoder, random_decoder
from tests.model.tiny import tiny_llama4, tiny_qwen2

CONFIGS = {
    "llama4-1": tiny_llama4(),
    "llama4-2": tiny_llama4(expert_step=2, qk_norm=False),
    "qwen2": tiny_qwen2(),
}
DECODERS = {name: random_decoder(config, 7, std=0.15) for name, config in CONFIGS.items()}


def _whole(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(len(tokens))[None]
    return decoder(decoder.embed(tokens[None]), positions, WholeSequence(decoder.config.layers, positions))[0]


def _feed(decoder: Decoder, cache: SequenceCache, tokens: torch.Tensor) -> torch.Tensor:
    hidden = decoder(decoder.embed(tokens), cache.next_positions(len(tokens)), cache)
    cache.advance(len(tokens))
    return hidden


@settings(deadline=None, max_examples=40)
@given(
    name=st.sampled_from(list(CONFIGS)),
    pieces=st.lists(st.integers(1, 19), min_size=1, max_size=6),
    rewinds=st.lists(st.tuples(st.integers(0, 60), st.integers(1, 12)), max_size=3),
    seed=st.integers(0, 2**31),
)
@torch.no_grad()
def test_any_pieces_and_rewinds_equal_the_whole_sequence(name, pieces, rewinds, seed) -> None:
    decoder = DECODERS[name]
    generator = torch.Generator().manual_seed(seed)
    cache, tokens = SequenceCache(decoder.config), torch.empty(0, dtype=torch.long)
    for length in pieces:
        new = torch.randint(0, 97, (length,), generator=generator)
        tokens = torch.cat((tokens, new))
        hidden = _feed(decoder, cache, new)
        torch.testing.assert_close(hidden, _whole(decoder, tokens)[-length:], atol=2e-5, rtol=1e-4)
    for target, length in rewinds:
        kept = cache.rewind(min(target, len(tokens)))
        assert kept <= min(target, len(tokens))
        assert kept == cache.length
        new = torch.randint(0, 97, (length,), generator=generator)
        tokens = torch.cat((tokens[:kept], new))
        hidden = _feed(decoder, cache, new)
        torch.testing.assert_close(hidden, _whole(decoder, tokens)[-length:], atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_rewinding_within_the_chunk_keeps_everything_asked_for() -> None:
    decoder = DECODERS["llama4-1"]
    cache = SequenceCache(decoder.config)
    _feed(decoder, cache, torch.arange(21))
    assert cache.rewind(18) == 18
    # Position 13 lies in a chunk that the local layers have forgotten: they need it from its beginning.
    assert cache.rewind(13) == 8


def _held(config: ModelConfig, length: int) -> list[int]:
    """Positions held per layer, with one key-value head of width 2 standing in for the network."""
    cache = SequenceCache(config)
    row = torch.zeros(1, 1, 2)
    for _ in range(length):
        for layer in range(config.num_hidden_layers):
            cache(layer, row, row, row)
        cache.advance(1)
    return [cache.tokens_held(layer) for layer in range(config.num_hidden_layers)]


def test_t15_three_chunks_hold_12_full_and_36_bounded_layers() -> None:
    config = tiny_llama4(layers=48, chunk=8)
    held = _held(config, 3 * 8 + 5)
    assert held.count(29) == 12
    assert held.count(5) == 36
    assert max(_held(config, 3 * 8 - 1)[0:3]) == 7


@torch.no_grad()
@pytest.mark.parametrize("piece", [1, 5, 64])
def test_t15_bytes_of_local_layers_stop_growing(piece: int) -> None:
    config = tiny_llama4(layers=3)
    decoder = random_decoder(config, 1)
    cache = SequenceCache(config)
    sizes = []
    for _ in range(256 // piece):
        _feed(decoder, cache, torch.randint(0, 97, (piece,)))
        sizes.append(cache.nbytes)
    bound = max(64, piece + config.layers[0].chunk)
    assert max(sizes) <= 3 * 2 * bound * 2 * 16 * 4
