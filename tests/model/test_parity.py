"""Our decoder against transformers, an independent implementation, on random small models in float32 (T12).

Each model is made by transformers, saved by it, opened by our reader and run by our decoder: names, layouts,
config and arithmetic are all on trial. transformers' temperature counts padding (spec, known deviation a), so
padded batches are not compared here; `test_attention.py` compares them with themselves.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ayllu.engine.sequence_cache import SequenceCache
from ayllu.model.attention import WholeSequence
from ayllu.model.decoder import Decoder
from ayllu.weights.checkpoint import open_checkpoint
from ayllu.weights.load import load_decoder

TOLERANCE = 1e-4
VOCABULARY = 97


def _llama(seed: int, **changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=112,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=False,
    )
    return LlamaForCausalLM(LlamaConfig(**options | changes))


def _qwen2(seed: int, **changes):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.15,
        tie_word_embeddings=True,
    )
    model = Qwen2ForCausalLM(Qwen2Config(**options | changes))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.uniform_(-1, 1)
    return model


LLAMA3_ROPE = dict(
    rope_type="llama3",
    factor=16.0,
    low_freq_factor=1.0,
    high_freq_factor=1.0,
    original_max_position_embeddings=32,
    rope_theta=500_000.0,
)


def _llama4_text_config(**changes):
    from transformers import Llama4TextConfig

    options = dict(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=48,
        intermediate_size_mlp=96,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_local_experts=4,
        interleave_moe_layer_step=1,
        use_qk_norm=True,
        attention_chunk_size=8,
        floor_scale=8,
        attn_scale=0.1,
        attn_temperature_tuning=True,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        rope_parameters=LLAMA3_ROPE,
        initializer_range=0.15,
    )
    return Llama4TextConfig(**options | changes)


def _llama4(seed: int, **changes):
    from transformers import Llama4ForCausalLM

    torch.manual_seed(seed)
    return Llama4ForCausalLM(_llama4_text_config(**changes))


CASES = {
    "llama": _llama,
    "llama-tied-head": lambda seed: _llama(seed, tie_word_embeddings=True),
    "llama-3-rope": lambda seed: _llama(
        seed,
        rope_parameters=LLAMA3_ROPE
        | {"factor": 8.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "llama-head-dim-8": lambda seed: _llama(seed, head_dim=8, num_key_value_heads=1),
    "qwen2": _qwen2,
    "qwen2-untied": lambda seed: _qwen2(seed, tie_word_embeddings=False),
    "llama4-step-1": _llama4,
    "llama4-step-1-no-qk-norm": lambda seed: _llama4(seed, use_qk_norm=False),
    "llama4-step-2": lambda seed: _llama4(seed, interleave_moe_layer_step=2),
    "llama4-step-2-no-qk-norm": lambda seed: _llama4(seed, interleave_moe_layer_step=2, use_qk_norm=False),
    "llama4-no-temperature": lambda seed: _llama4(seed, attn_temperature_tuning=False),
    "llama4-top-2": lambda seed: _llama4(seed, num_experts_per_tok=2),
    "llama4-dense": lambda seed: _llama4(seed, moe_layers=[], interleave_moe_layer_step=0),
}


def _perturb_vectors(model: torch.nn.Module) -> None:
    """Norm weights start at one, which hides mistakes in their order."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1 and not name.endswith("bias"):
            parameter.data.uniform_(0.5, 1.5)


def _ours(model, folder: Path) -> Decoder:
    model.save_pretrained(folder)
    return load_decoder(open_checkpoint(folder), dtype=torch.float32)


def _cached_logits(decoder: Decoder, tokens: torch.Tensor, pieces: list[int]) -> torch.Tensor:
    cache = SequenceCache(decoder.config)
    logits = []
    for piece in tokens.split(pieces):
        hidden = decoder(decoder.embed(piece), cache.next_positions(len(piece)), cache)
        cache.advance(len(piece))
        logits.append(decoder.logits(hidden))
    return torch.cat(logits)


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("case", list(CASES))
def test_t12_text_logits_equal_transformers(case: str, seed: int, tmp_path: Path) -> None:
    model = CASES[case](seed).eval().float()
    _perturb_vectors(model)
    decoder = _ours(model, tmp_path)
    tokens = torch.randint(3, VOCABULARY, (2, 21 + 8 * seed))
    theirs = model(tokens, use_cache=False).logits

    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    hidden = decoder(decoder.embed(tokens), positions, WholeSequence(decoder.config.layers, positions))
    torch.testing.assert_close(decoder.logits(hidden), theirs, atol=TOLERANCE, rtol=0)

    length = tokens.shape[1]
    for pieces in ([11] + [1] * (length - 11), [5, 14, length - 19], [8, 8, length - 16]):
        logits = _cached_logits(decoder, tokens[1], pieces)
        torch.testing.assert_close(logits, theirs[1], atol=TOLERANCE, rtol=0)


def _llama4_multimodal(seed: int):
    from transformers import Llama4Config, Llama4ForConditionalGeneration, Llama4VisionConfig

    torch.manual_seed(seed)
    vision = Llama4VisionConfig(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=128,
        image_size=56,
        patch_size=14,
        vision_output_dim=48,
        projector_input_dim=48,
        projector_output_dim=48,
        initializer_range=0.15,
        rope_parameters=dict(rope_type="default", rope_theta=10_000.0),
    )
    config = Llama4Config(
        text_config=_llama4_text_config(),
        vision_config=vision,
        image_token_index=90,
        boi_token_index=88,
        eoi_token_index=89,
    )
    model = Llama4ForConditionalGeneration(config).eval().float()
    torch.nn.init.normal_(model.vision_model.class_embedding)
    torch.nn.init.normal_(model.vision_model.positional_embedding_vlm)
    _perturb_vectors(model.language_model)
    return model


@torch.no_grad()
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_t12_vision_features_and_fused_logits_equal_transformers(seed: int, tmp_path: Path) -> None:
    model = _llama4_multimodal(seed)
    decoder = _ours(model, tmp_path)
    tiles = 1 + seed
    pixels = torch.randn(tiles, 3, 56, 56)

    theirs = model.multi_modal_projector(model.get_image_features(pixel_values=pixels).last_hidden_state)
    rows = decoder.image_rows(pixels)
    torch.testing.assert_close(rows, theirs.reshape(rows.shape), atol=TOLERANCE, rtol=0)

    per_tile = decoder.config.vision.tokens_per_tile
    pieces = [torch.randint(3, 88, (4,))]
    for _ in range(tiles):
        pieces += [
            torch.tensor([88]),
            torch.full((per_tile,), 90),
            torch.tensor([89]),
            torch.randint(3, 88, (3,)),
        ]
    tokens = torch.cat(pieces)[None]
    fused = model(input_ids=tokens, pixel_values=pixels, use_cache=False).logits
    positions = torch.arange(tokens.shape[1])[None]
    hidden = decoder(decoder.embed(tokens, rows), positions, WholeSequence(decoder.config.layers, positions))
    torch.testing.assert_close(decoder.logits(hidden), fused, atol=TOLERANCE, rtol=0)
