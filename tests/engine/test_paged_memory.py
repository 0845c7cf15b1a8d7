"""Paged attention: equal to the plain one, bounded for long prompts, and blind beyond a chunk's border."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ayllu.engine import paged_memory
from ayllu.engine.layer_groups import fitting_block_tokens, layer_groups
from ayllu.engine.paged_memory import tiled_attention
from ayllu.engine.parameters import Sampling
from ayllu.engine.prepared import PreparedRequest
from ayllu.model.attention import attention, visible
from ayllu.model.config import LayerSpec
from ayllu.model.decoder import random_decoder
from ayllu.model.presets import nano
from tests.engine.cores import end_of, run, small_core
from tests.model.tiny import tiny_llama, tiny_llama4


@settings(max_examples=60)
@given(
    rows=st.integers(1, 20), before=st.integers(0, 60), chunk_start=st.integers(0, 60),
    heads=st.sampled_from([(1, 1), (4, 2), (6, 1), (6, 6)]), tile=st.integers(1, 17),
    seed=st.integers(0, 1 << 30),
)  # fmt: skip
def test_tiles_of_keys_give_the_attention_of_all(rows, before, chunk_start, heads, tile, seed) -> None:
    generator = torch.Generator().manual_seed(seed)
    held, (queries, groups) = before + rows, heads
    q = torch.randn(rows, queries, 8, generator=generator) * 3
    keys, values = torch.randn(2, held + 5, groups, 8, generator=generator)
    slots = torch.randperm(held + 5, generator=generator)[:held]
    positions = torch.arange(held) + chunk_start
    seen = visible(positions[before:], positions, None)
    expected = attention(q[None], keys[slots][None], values[slots][None], seen[None])[0]
    whole, paged_memory.TILE_TOKENS = paged_memory.TILE_TOKENS, tile
    try:
        found = tiled_attention(q, chunk_start + before, chunk_start, slots, keys, values)
    finally:
        paged_memory.TILE_TOKENS = whole
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def _prompt_hidden(decoder, tokens: list[int], **sizes) -> torch.Tensor:
    """The hidden state after the last token, as a core computes it."""
    core = small_core(decoder, **sizes)
    hidden = []
    forward = core.runner.forward
    core.runner.forward = lambda pieces: hidden.append(result := forward(pieces)) or result
    core.submit(PreparedRequest(id="x", token_ids=tokens, max_new_tokens=1, sampling=Sampling(temperature=0)))
    run(core)
    return hidden[-1][0][-1]


@pytest.mark.parametrize(("global_layers", "sees"), [(False, False), (True, True)])
def test_a_token_beyond_the_chunk_is_visible_through_global_layers_alone(global_layers, sees) -> None:
    """A needle: one token of an earlier chunk is exchanged. Chunk-local layers cannot notice."""
    config = tiny_llama4(layers=4, chunk=8)
    if not global_layers:
        config = dataclasses.replace(config, layers=(LayerSpec(chunk=8, experts=True),) * 4)
    decoder = random_decoder(config, 3, std=0.15)
    haystack = [int(token) for token in torch.randint(0, 90, (29,))]
    sizes = {"blocks": 32, "step_tokens": 7}
    reference = _prompt_hidden(decoder, haystack, **sizes)
    for place in (0, 5, 15, 23):
        needle = [*haystack[:place], (haystack[place] + 1) % 90, *haystack[place + 1 :]]
        assert torch.equal(_prompt_hidden(decoder, needle, **sizes), reference) != sees
    # Within the chunk every kind of layer sees it.
    inside = [*haystack[:25], (haystack[25] + 1) % 90, *haystack[26:]]
    assert not torch.equal(_prompt_hidden(decoder, inside, **sizes), reference)


def test_a_nano_sequence_of_three_chunks_is_kept_whole_in_global_layers_only() -> None:
    config = nano()
    groups = layer_groups(config)
    assert [group.name for group in groups] == ["global", "chunk 2048"]
    assert [len(group.layers) for group in groups] == [2, 6]
    decoder = random_decoder(config, 1, dtype=torch.bfloat16).requires_grad_(False)
    core = small_core(
        decoder, slots=1, step_tokens=512, blocks={"global": 400, "chunk 2048": 128}, block_tokens=16,
        context=8192,
    )  # fmt: skip
    length = 3 * 2048 + 37
    core.submit(PreparedRequest(id="x", token_ids=[5] * length, max_new_tokens=2))
    held: list[list[int]] = []
    done = core.scheduler.done

    def noted(pieces):
        held.append([len(table) for table in pieces[0].sequence.tables])
        done(pieces)

    core.scheduler.done = noted
    run(core)
    whole, local = zip(*held, strict=True)
    assert whole[-1] == -(-(length + 1) // 16)
    assert max(local) == 2048 // 16  # never more than one chunk
    assert local[-1] == -(-38 // 16)
    per_block = 2 * config.num_key_value_heads * config.head_dim * 2 * 16
    most = per_block * (whole[-1] * 2 + max(local) * 6)
    assert most == pytest.approx(config.kv_bytes(length + 1), rel=0.01)
    sizes = [keys.nbytes + values.nbytes for keys, values in core.runner.memory.layers]
    assert [sizes[layer] for layer in groups[0].layers] == [400 * per_block] * 2
    assert [sizes[layer] for layer in groups[1].layers] == [128 * per_block] * 6


def _cost(tokens: int) -> dict[str, int]:
    result = subprocess.run(
        [sys.executable, "-m", "tests.engine.prefill_memory", str(tokens)],
        capture_output=True, text=True, check=True, env=os.environ | {"MALLOC_ARENA_MAX": "2"},
    )  # fmt: skip
    return json.loads(result.stdout)


def test_a_prompt_of_16k_tokens_is_read_in_little_memory() -> None:
    cost = _cost(16_384)
    assert cost["new_tokens"] == 2
    assert cost["peak_above_weights"] < 0.75e9


@pytest.mark.large
def test_a_prompt_of_128k_tokens_is_read_within_1_5_gb_above_the_weights() -> None:
    cost = _cost(131_068)
    print(cost)
    assert cost["new_tokens"] == 2
    assert cost["peak_above_weights"] < 1.5e9


def test_blocks_divide_every_chunk() -> None:
    assert fitting_block_tokens(layer_groups(tiny_llama()), 16) == 16
    assert fitting_block_tokens(layer_groups(nano()), 16) == 16
    assert fitting_block_tokens(layer_groups(tiny_llama4(chunk=12)), 16) == 12
    assert fitting_block_tokens(layer_groups(tiny_llama4(chunk=12)), 5) == 4
    assert fitting_block_tokens(layer_groups(tiny_llama4(chunk=7)), 4) == 1


def test_end_of_a_long_prompt_decodes_like_a_short_one() -> None:
    """A prompt above TILE_TOKENS takes the tiled path: same answer as the plain one."""
    decoder = random_decoder(dataclasses.replace(tiny_llama(), max_position_embeddings=8192), 2, std=0.15)
    prompt = [int(token) for token in torch.randint(0, 90, (300,))]
    request = PreparedRequest(
        id="x", token_ids=prompt, max_new_tokens=20, sampling=Sampling(temperature=0), logprobs=0
    )
    answers = []
    whole = paged_memory.TILE_TOKENS
    for tile in (whole, 64):
        paged_memory.TILE_TOKENS = tile
        try:
            core = small_core(decoder, blocks=100, step_tokens=50, context=400)
            core.submit(request)
            said = run(core)
        finally:
            paged_memory.TILE_TOKENS = whole
        assert end_of(said, "x").new_tokens == 20
        answers.append([event.token_ids for _, event in said if hasattr(event, "token_ids")])
    assert answers[0] == answers[1]
