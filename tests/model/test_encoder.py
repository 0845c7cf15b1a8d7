"""The encoder equals transformers' BertModel, and its config counts and refuses what it should."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ayllu.errors import UnsupportedError
from ayllu.model.encoder import Encoder, padding_mask
from ayllu.model.encoder_config import EncoderConfig, encoder_parameter_shapes

VOCABULARY = 97


def tiny_encoder(**changes: Any) -> EncoderConfig:
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "intermediate_size": 48,
        "max_position_embeddings": 40,
    }
    return EncoderConfig(**(sizes | changes))


CONFIGS = {
    "small": tiny_encoder(),
    "one head, one type": tiny_encoder(num_attention_heads=1, type_vocab_size=1, num_hidden_layers=1),
    "wide": tiny_encoder(hidden_size=72, num_attention_heads=6, intermediate_size=20, layer_norm_eps=1e-5),
}

# Ours -> theirs, written out once more and by hand: the reader's table is not what proves the network.
RENAMED = (
    ("embed_tokens", "embeddings.word_embeddings"),
    ("embed_positions", "embeddings.position_embeddings"),
    ("embed_types", "embeddings.token_type_embeddings"),
    ("embed_norm", "embeddings.LayerNorm"),
    ("layers", "encoder.layer"),
    ("attention.q_proj", "attention.self.query"),
    ("attention.k_proj", "attention.self.key"),
    ("attention.v_proj", "attention.self.value"),
    ("attention.o_proj", "attention.output.dense"),
    ("attention_norm", "attention.output.LayerNorm"),
    ("mlp.fc1", "intermediate.dense"),
    ("mlp.fc2", "output.dense"),
    ("mlp_norm", "output.LayerNorm"),
)


def their_name(name: str) -> str:
    for ours, theirs in RENAMED:
        name = name.replace(ours, theirs)
    return name


def both(config: EncoderConfig, seed: int = 0) -> tuple[Encoder, Any]:
    """Our encoder and transformers' with the same random weights; norms and biases too are not neutral."""
    import transformers

    torch.manual_seed(seed)
    theirs = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            type_vocab_size=config.type_vocab_size,
            layer_norm_eps=config.layer_norm_eps,
            attn_implementation="eager",
        ),
        add_pooling_layer=False,
    ).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.normal_(0.0, 0.3)
    ours = Encoder(config)
    state = theirs.state_dict()
    ours.load_state_dict({name: state[their_name(name)] for name in ours.state_dict()})
    return ours.eval(), theirs


def batch(config: EncoderConfig, lengths: list[int], seed: int = 1) -> tuple[Tensor, Tensor]:
    """Random ids [N, S], noise behind the shorter texts, and their lengths [N]."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, config.vocab_size, (len(lengths), max(lengths)), generator=generator)
    return tokens, torch.tensor(lengths)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("lengths", [[1], [7, 7, 7], [40, 1, 13, 2], [3, 39]])
def test_hidden_states_equal_transformers_bert(name: str, lengths: list[int]) -> None:
    config = CONFIGS[name]
    ours, theirs = both(config)
    tokens, counts = batch(config, lengths)
    mask = padding_mask(counts, tokens.shape[1])
    types = torch.randint(0, config.type_vocab_size, tokens.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        for given_types in (None, types):
            expected = theirs(tokens, attention_mask=mask.long(), token_type_ids=given_types)
            got = ours(tokens, counts, given_types)
            torch.testing.assert_close(got[mask], expected.last_hidden_state[mask], rtol=1e-5, atol=1e-5)


@settings(max_examples=30)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=6), st.integers(0, 2**31))
def test_a_text_in_a_batch_is_as_if_it_were_alone(lengths: list[int], seed: int) -> None:
    config = CONFIGS["small"]
    ours, _ = both(config)
    tokens, counts = batch(config, lengths, seed)
    with torch.no_grad():
        together = ours(tokens, counts)
        for row, length in enumerate(lengths):
            alone = ours(tokens[row : row + 1, :length], counts[row : row + 1])
            torch.testing.assert_close(together[row, :length], alone[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_list_of_shapes_and_the_count_are_the_modules(name: str) -> None:
    config = CONFIGS[name]
    with torch.device("meta"):
        encoder = Encoder(config)
    named = {name: tuple(parameter.shape) for name, parameter in encoder.named_parameters()}
    assert named == encoder_parameter_shapes(config)
    assert sum(parameter.numel() for parameter in encoder.parameters()) == config.parameters


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("vocab_size", 0),
        ("vocab_size", 1 << 40),
        ("hidden_size", -1),
        ("hidden_size", 33),
        ("hidden_size", True),
        ("hidden_size", 32.0),
        ("num_hidden_layers", 100_000),
        ("num_hidden_layers", "3"),
        ("num_attention_heads", 0),
        ("intermediate_size", None),
        ("max_position_embeddings", 0),
        ("type_vocab_size", 0),
        ("layer_norm_eps", 0.0),
        ("layer_norm_eps", float("nan")),
        ("layer_norm_eps", "small"),
    ],
)
def test_an_impossible_config_is_refused_by_the_name_of_what_is_wrong(field: str, value: object) -> None:
    with pytest.raises(UnsupportedError, match=field.removeprefix("num_").split("_")[0]) as caught:
        tiny_encoder(**{field: value})
    assert str(caught.value).isprintable()


def test_the_config_needs_no_torch() -> None:
    code = "import sys; sys.modules['torch'] = None\nimport ayllu.model.encoder_config"
    subprocess.run([sys.executable, "-c", code], check=True)
