"""What each layer sees (T4), how sharply it looks (T3), and that padding changes nothing (T13)."""

from __future__ import annotations

import pytest
import torch

from ayllu.model.attention import WholeSequence, attention_temperature, rms_normalise, visible
from ayllu.model.config import AttentionTemperature
from ayllu.model.decoder import random_decoder
from tests.model.tiny import tiny_llama4, tiny_qwen2

CHUNK = 8192


@pytest.mark.parametrize(
    ("position", "scale"),
    [
        (0, 1.0),
        (8190, 1.0),
        (8191, 1.0693147),
        (16383, 1.1098612),
        (32767, 1.1609438),
        (131071, 1.2833213),
        (262143, 1.3496508),
        (1048575, 1.4859812),
        (10485759, 1.7155396),
    ],
)
def test_t3_temperature_table_of_the_spec(position: int, scale: float) -> None:
    value = attention_temperature(torch.tensor([position]), AttentionTemperature())
    assert value.item() == pytest.approx(scale, abs=1e-6)


@pytest.mark.parametrize("position", [0, 8191, 8192, 16384])
def test_t4_chunk_truth_table_for_one_decoded_token(position: int) -> None:
    keys = torch.arange(position + 1)
    local = visible(torch.tensor([position]), keys, CHUNK)[0]
    first = position // CHUNK * CHUNK
    assert local.sum().item() == position % CHUNK + 1
    assert local[first:].all()
    assert not local[:first].any()
    assert visible(torch.tensor([position]), keys, None).all()


def test_t4_token_8192_sees_only_itself_in_a_prefill_that_crosses_the_border() -> None:
    positions = torch.arange(8190, 8195)
    seen = visible(positions, torch.arange(8195), CHUNK)
    assert seen.sum(-1).tolist() == [8191, 8192, 1, 2, 3]
    assert seen[2].nonzero().flatten().tolist() == [8192]


def test_t4_chunked_prefill_sees_what_one_prefill_sees() -> None:
    whole = visible(torch.arange(20_000), torch.arange(20_000), CHUNK)
    for start, stop in ((0, 5), (5, 8192), (8192, 8193), (8193, 16384), (16384, 20_000)):
        piece = visible(torch.arange(start, stop), torch.arange(20_000), CHUNK)
        assert torch.equal(piece, whole[start:stop])


def test_rms_normalisation_divides_by_the_root_mean_square_of_each_head() -> None:
    # Early ports normalised by the L2 norm, or across all heads at once; both changed the model's scores.
    x = torch.randn(3, 4, 16) * 7
    expected = x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(rms_normalise(x, 1e-5), expected)


@pytest.mark.parametrize("config", [tiny_llama4(), tiny_llama4(expert_step=2, qk_norm=False), tiny_qwen2()])
def test_t13_a_left_padded_batch_equals_each_sequence_alone(config) -> None:
    decoder = random_decoder(config, 3, std=0.15)
    short, long = torch.randint(0, 97, (29,)), torch.randint(0, 97, (36,))
    tokens = torch.stack((torch.cat((torch.zeros(7, dtype=torch.long), short)), long))
    positions = torch.stack((torch.arange(36) - 7, torch.arange(36))).clamp(min=-1)
    with torch.no_grad():
        batch = decoder(decoder.embed(tokens), positions, WholeSequence(config.layers, positions))
        for row, alone in ((0, short), (1, long)):
            own = torch.arange(len(alone))[None]
            expected = decoder(decoder.embed(alone[None]), own, WholeSequence(config.layers, own))[0]
            torch.testing.assert_close(batch[row, -len(alone) :], expected, atol=1e-5, rtol=1e-5)


def test_no_token_outside_its_chunk_reaches_a_local_layer_stack() -> None:
    config = tiny_llama4(layers=3)
    decoder = random_decoder(config, 5, std=0.15)
    tokens = torch.randint(0, 97, (1, 16))
    other = tokens.clone()
    other[0, :8] = (tokens[0, :8] + 1) % 97
    positions = torch.arange(16)[None]
    with torch.no_grad():
        a, b = (
            decoder(decoder.embed(ids), positions, WholeSequence(config.layers, positions))
            for ids in (tokens, other)
        )
    torch.testing.assert_close(a[0, 8:], b[0, 8:], atol=1e-5, rtol=1e-5)
    assert (a[0, :8] - b[0, :8]).abs().max() > 0.1
