"""Adapters at work in torch: equal to PEFT, to merged weights, and to themselves alone.

Names, versions and limits, which both runners share: `test_adapter_set`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ayllu.engine.adapters import AdapterSet
from ayllu.engine.oracle import Oracle
from ayllu.errors import UnknownModelError, UnsupportedError, UsageError
from ayllu.model.attention import WholeSequence
from ayllu.model.config import ModelConfig
from ayllu.model.decoder import Decoder, random_decoder
from ayllu.weights.adapter import Adapter, LowRank, read_adapter
from ayllu.weights.checkpoint import open_checkpoint
from ayllu.weights.gguf_export import save_gguf
from ayllu.weights.load import load_decoder
from ayllu.weights.rope_layout import permute_rope_rows
from tests.engine.small_adapters import merged_decoder, write_adapter
from tests.model.test_parity import CASES, VOCABULARY, _llama4_multimodal
from tests.model.tiny import tiny_llama, tiny_llama4, tiny_qwen2

TOLERANCE = 1e-4
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
# Every expert is chosen: rounding could otherwise send a token of another batch to another expert.
CONFIGS = {
    "llama": tiny_llama,
    "qwen2": tiny_qwen2,
    "llama4": lambda: tiny_llama4(expert_step=2, top_k=4),
}


def random_tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, shape, generator=torch.Generator().manual_seed(seed))


def logits_of(decoder: Decoder, tokens: Tensor, rows: Tensor | None = None) -> Tensor:
    """Logits [*B, vocab_size] of token ids [*B], each sequence seen whole."""
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    attend = WholeSequence(decoder.config.layers, positions)
    with torch.no_grad():
        return decoder.logits(decoder(decoder.embed(tokens, rows), positions, attend))


def hook_count(decoder: Decoder) -> int:
    return sum(len(module._forward_hooks) for module in decoder.modules())


def read_random(tmp_path: Path, config: ModelConfig, seed: int, **options: Any) -> Adapter:
    return read_adapter(write_adapter(tmp_path / f"{seed}", config, seed, **options), config)


def peft_adapter(model: Any, folder: Path, seed: int, **options: Any) -> Any:
    """`model` wrapped by PEFT with random matrices, saved to `folder`."""
    import peft

    wrapped = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **options)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0.0, 0.2, generator=generator)
    wrapped.save_pretrained(folder)
    return wrapped


OPTIONS: dict[str, dict[str, Any]] = {
    "all projections": dict(r=4, lora_alpha=8, target_modules=[*ATTENTION, *FEED_FORWARD]),
    "rank-stabilised": dict(r=6, lora_alpha=3, use_rslora=True, target_modules=ATTENTION),
    "a regular expression": dict(r=3, lora_alpha=5, target_modules=r".*\.layers\.[02]\..*(q|v|up)_proj"),
    "some layers": dict(r=2, target_modules=["q_proj", "o_proj", "down_proj"], layers_to_transform=[1, 2]),
    "patterns": dict(
        r=4,
        lora_alpha=8,
        target_modules=[*ATTENTION, *FEED_FORWARD],
        # In the order in which PEFT sorts them when it saves: the first that matches counts.
        rank_pattern={
            r"layers\.[12]\.self_attn\.(k|q)_proj": 6,
            "model.layers.0.self_attn.k_proj": 5,
            "q_proj": 2,
        },
        alpha_pattern={r"^model.layers.1.self_attn.k_proj": 1, "down_proj": 24, "k_proj": 3},
    ),
    "excluded modules": dict(r=4, target_modules=ATTENTION, exclude_modules=["layers.1.self_attn.q_proj"]),
}


# PEFT 0.21 still asks transformers by a name that transformers 5 has retired.
from_peft = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@from_peft
@pytest.mark.parametrize("options", list(OPTIONS))
@pytest.mark.parametrize("case", ["llama", "llama-tied-head", "qwen2", "llama4-step-2"])
def test_logits_equal_peft(case: str, options: str, tmp_path: Path) -> None:
    model = CASES[case](3).eval().float()
    model.save_pretrained(tmp_path / "base")
    wrapped = peft_adapter(model, tmp_path / "adapter", 5, **OPTIONS[options])
    checkpoint = open_checkpoint(tmp_path / "base")
    decoder = load_decoder(checkpoint, dtype=torch.float32)
    tokens = random_tokens(2, 21)
    with torch.no_grad():
        theirs = wrapped(tokens, use_cache=False).logits
        with wrapped.disable_adapter():
            base = wrapped(tokens, use_cache=False).logits

    adapters = AdapterSet(decoder)
    identity = adapters.load("tuned", read_adapter(tmp_path / "adapter", checkpoint.config))
    with adapters.applied([(0, tokens.numel(), identity)]):
        ours = logits_of(decoder, tokens)
    assert (theirs - base).abs().max() > 0.1
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(logits_of(decoder, tokens), base, atol=TOLERANCE, rtol=0)


@from_peft
def test_logits_of_a_model_that_sees_images_equal_peft(tmp_path: Path) -> None:
    model = _llama4_multimodal(4)
    model.save_pretrained(tmp_path / "base")
    pattern = r"language_model\..*\.(q_proj|k_proj|down_proj)"
    wrapped = peft_adapter(model, tmp_path / "adapter", 6, r=4, lora_alpha=8, target_modules=pattern)
    checkpoint = open_checkpoint(tmp_path / "base")
    decoder = load_decoder(checkpoint, dtype=torch.float32)
    pixels = torch.randn(1, 3, 56, 56)
    per_tile = decoder.config.vision.tokens_per_tile
    tokens = torch.tensor([[5, 6, 88, *[90] * per_tile, 89, 7, 8, 9]])
    with torch.no_grad():
        theirs = wrapped(input_ids=tokens, pixel_values=pixels, use_cache=False).logits
        rows = decoder.image_rows(pixels)

    adapters = AdapterSet(decoder)
    identity = adapters.load("tuned", read_adapter(tmp_path / "adapter", checkpoint.config))
    with adapters.applied([(0, tokens.numel(), identity)]):
        ours = logits_of(decoder, tokens, rows)
    torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("family", list(CONFIGS))
def test_an_adapter_of_all_projections_equals_merged_weights(family: str, tmp_path: Path) -> None:
    config = CONFIGS[family]()
    decoder = random_decoder(config, 1, std=0.15)
    adapter = read_random(tmp_path, config, 7, lora_alpha=6, use_rslora=True)
    adapters = AdapterSet(decoder)
    identity = adapters.load("tuned", adapter)
    tokens = random_tokens(3, 11)
    with adapters.applied([(0, 33, identity)]):
        ours = logits_of(decoder, tokens)
    merged = logits_of(merged_decoder(decoder, adapter), tokens)
    assert (merged - logits_of(decoder, tokens)).abs().max() > 0.1
    torch.testing.assert_close(ours, merged, atol=TOLERANCE, rtol=1e-4)


class Trio:
    """A decoder with three adapters of different targets and ranks. merged: identity -> the decoder with that
    adapter in its weights; None is the decoder itself."""

    def __init__(self, config: ModelConfig, folder: Path) -> None:
        self.decoder = random_decoder(config, 2, std=0.15).requires_grad_(False)
        self.adapters = AdapterSet(self.decoder)
        self.merged: dict[str | None, Decoder] = {None: self.decoder}
        choices: list[dict[str, Any]] = [
            dict(rank=4),
            dict(rank=9, targets=["q_proj", "v_proj"]),
            dict(targets=FEED_FORWARD, layers=[0, 1]),
        ]
        for seed, options in enumerate(choices):
            adapter = read_random(folder, config, seed, std=0.15, **options)
            identity = self.adapters.load(f"a{seed}", adapter)
            self.merged[identity] = merged_decoder(self.decoder, adapter)


@pytest.fixture(scope="module", params=list(CONFIGS))
def trio(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trio:
    return Trio(CONFIGS[request.param](), tmp_path_factory.mktemp("adapters"))


@settings(deadline=None, max_examples=40)
@given(
    choices=st.lists(st.integers(0, 3), min_size=1, max_size=9),
    length=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_rows_of_a_mixed_batch_equal_each_alone_and_merged(
    trio: Trio, choices: list[int], length: int, seed: int
) -> None:
    decoder, adapters, merged = trio.decoder, trio.adapters, trio.merged
    identities = [list(merged)[choice] for choice in choices]
    tokens = random_tokens(len(choices), length, seed=seed)
    segments = [(row * length, (row + 1) * length, identity) for row, identity in enumerate(identities)]
    with adapters.applied(segments):
        together = logits_of(decoder, tokens)
    for row, identity in enumerate(identities):
        with adapters.applied([(0, length, identity)]):
            alone = logits_of(decoder, tokens[row : row + 1])[0]
        reference = logits_of(merged[identity], tokens[row : row + 1])[0]
        torch.testing.assert_close(together[row], alone, atol=TOLERANCE, rtol=1e-4)
        torch.testing.assert_close(together[row], reference, atol=TOLERANCE, rtol=1e-4)


def test_packed_steps_with_a_cache_equal_merged_weights(trio: Trio) -> None:
    # [tokens, D] without a batch axis and one row a step is what an engine computes.
    decoder, adapters, merged = trio.decoder, trio.adapters, trio.merged
    tokens = list(range(3, 20))
    for identity, reference in merged.items():
        oracle, expected = Oracle(decoder), Oracle(reference).prefill(tokens)
        with adapters.applied([(0, len(tokens) - 1, identity)]):
            oracle.prefill(tokens[:-1])
        with adapters.applied([(0, 1, identity)]):
            logits = oracle.step(tokens[-1])
        torch.testing.assert_close(logits, expected, atol=TOLERANCE, rtol=1e-4)


def test_rows_outside_the_segments_are_the_base_models(trio: Trio) -> None:
    decoder, adapters = trio.decoder, trio.adapters
    tokens = random_tokens(3, 5)
    base = logits_of(decoder, tokens)
    with adapters.applied([(5, 10, adapters.identity("a0")), (10, 10, adapters.identity("a1"))]):
        mixed = logits_of(decoder, tokens)
    torch.testing.assert_close(mixed[[0, 2]], base[[0, 2]], atol=TOLERANCE, rtol=1e-4)
    assert (mixed[1] - base[1]).abs().max() > 1e-2


def test_without_adapted_rows_nothing_changes_to_the_bit(trio: Trio) -> None:
    decoder, adapters = trio.decoder, trio.adapters
    tokens = random_tokens(2, 6)
    plain = logits_of(decoder, tokens)
    for segments in ([], [(0, 12, None)], [(0, 6, None), (6, 12, None)], [(3, 3, adapters.identity("a0"))]):
        with adapters.applied(segments):
            assert torch.equal(logits_of(decoder, tokens), plain)


def test_an_error_inside_leaves_no_adapter_active(trio: Trio) -> None:
    decoder, adapters = trio.decoder, trio.adapters
    tokens = random_tokens(1, 4)
    plain = logits_of(decoder, tokens)
    with pytest.raises(RuntimeError, match="stop"), adapters.applied([(0, 4, adapters.identity("a0"))]):
        raise RuntimeError("stop")
    assert torch.equal(logits_of(decoder, tokens), plain)


def test_segments_that_make_no_sense_are_a_bug_of_the_caller(trio: Trio) -> None:
    decoder, adapters = trio.decoder, trio.adapters
    one = adapters.identity("a0")
    for segments in ([(0, 2, one), (1, 3, one)], [(3, 2, one)], [(-1, 2, one)], [(0, 2, "a0")]):
        with pytest.raises(AssertionError), adapters.applied(segments):
            pass
    with pytest.raises(AssertionError, match="5 rows planned"), adapters.applied([(0, 5, one)]):
        logits_of(decoder, torch.tensor([[3, 4]]))
    with adapters.applied([(0, 1, one)]), pytest.raises(AssertionError), adapters.applied([(0, 1, one)]):
        pass


def interleaved_twin(decoder: Decoder) -> Decoder:
    """The same network with its rotary dimensions in the order that GGUF's llama has."""
    config = decoder.config
    state = dict(decoder.state_dict())
    for name, tensor in state.items():
        if ".q_proj." in name or ".k_proj." in name:
            heads = len(tensor) // config.head_dim
            rows = permute_rope_rows(tensor.numpy(), heads, source="half", target="interleaved")
            state[name] = torch.from_numpy(rows)
    twin = Decoder(replace(config, rope=replace(config.rope, layout="interleaved")))
    twin.load_state_dict(state)
    return twin.eval().requires_grad_(False)


@pytest.mark.parametrize("make_config", [tiny_llama, tiny_qwen2])
def test_an_adapter_follows_the_rotary_layout_of_its_model(
    make_config: Callable[[], ModelConfig], tmp_path: Path
) -> None:
    half = random_decoder(make_config(), 3, std=0.15).requires_grad_(False)
    interleaved = interleaved_twin(half)
    folder = write_adapter(tmp_path / "adapter", half.config, 4)
    tokens = random_tokens(2, 9)
    results = []
    for decoder in (half, interleaved):
        adapters = AdapterSet(decoder)
        identity = adapters.load("tuned", read_adapter(folder, decoder.config))
        with adapters.applied([(0, 18, identity)]):
            results.append(logits_of(decoder, tokens))
    torch.testing.assert_close(results[1], results[0], atol=TOLERANCE, rtol=1e-4)
    base = logits_of(half, tokens)
    torch.testing.assert_close(logits_of(interleaved, tokens), base, atol=TOLERANCE, rtol=1e-4)
    assert (results[0] - base).abs().max() > 0.1


@pytest.mark.parametrize("case", ["llama", "qwen2", "llama4-step-2"])
def test_an_adapter_gives_the_same_beside_a_gguf_as_beside_its_folder(case: str, tmp_path: Path) -> None:
    model = CASES[case](1).eval().float()
    model.save_pretrained(tmp_path / "base")
    folder = open_checkpoint(tmp_path / "base")
    gguf = open_checkpoint(save_gguf(folder, tmp_path / "base.gguf").path)
    written = write_adapter(tmp_path / "adapter", folder.config, 8)
    tokens = random_tokens(1, 13)
    results = []
    for checkpoint in (folder, gguf):
        decoder = load_decoder(checkpoint, dtype=torch.float32)
        adapters = AdapterSet(decoder)
        identity = adapters.load("tuned", read_adapter(written, checkpoint.config))
        with adapters.applied([(0, 13, identity)]):
            results.append(logits_of(decoder, tokens))
    if case == "llama":
        assert (folder.config.rope.layout, gguf.config.rope.layout) == ("half", "interleaved")
    torch.testing.assert_close(results[1], results[0], atol=TOLERANCE, rtol=1e-4)


def test_an_adapter_read_for_another_layout_is_not_loaded(tmp_path: Path) -> None:
    half = random_decoder(tiny_llama(), 3)
    adapter = read_random(tmp_path, half.config, 0)
    with pytest.raises(UsageError, match="does not fit"):
        AdapterSet(interleaved_twin(half)).load("tuned", adapter)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matrices_take_the_precision_of_the_decoder(dtype: torch.dtype, tmp_path: Path) -> None:
    config = tiny_llama4(expert_step=2)
    decoder = random_decoder(config, 1, std=0.1, dtype=dtype)
    adapter = read_random(tmp_path, config, 1, std=0.1)
    adapters = AdapterSet(decoder)
    identity = adapters.load("tuned", adapter)
    assert adapters.nbytes == adapter.nbytes // 2
    tokens = random_tokens(2, 6)
    with adapters.applied([(0, 3, identity), (6, 9, identity)]):
        ours = logits_of(decoder, tokens)[:, :3]
    wide = random_decoder(config, 1, std=0.1)
    wide.load_state_dict(decoder.state_dict())
    reference = logits_of(merged_decoder(wide, adapter), tokens)[:, :3]
    difference = (ours - reference).norm() / reference.norm()
    assert difference < (0.05 if dtype == torch.bfloat16 else 0.01)


def test_numbers_too_large_for_the_decoders_precision_are_refused() -> None:
    decoder = random_decoder(tiny_llama(), 1, dtype=torch.float16)
    huge = LowRank(np.full((1, 64), 1e5, np.float32), np.ones((64, 1), np.float32), 1.0)
    adapters = AdapterSet(decoder)
    with pytest.raises(UnsupportedError, match="too large for float16"):
        adapters.load("huge", Adapter({"layers.0.attention.q_proj": huge}, "half"))
    assert adapters.names == () and adapters.nbytes == 0 and hook_count(decoder) == 0


def test_hooks_stand_only_where_a_loaded_adapter_changes_something(tmp_path: Path) -> None:
    config = tiny_llama4(expert_step=2)
    decoder = random_decoder(config, 1)
    adapters = AdapterSet(decoder)
    assert hook_count(decoder) == 0
    adapters.load("one", read_random(tmp_path, config, 1, targets=["q_proj"], layers=[0, 1]))
    adapters.load("two", read_random(tmp_path, config, 2, targets=["q_proj"], layers=[1]))
    assert hook_count(decoder) == 2
    adapters.unload("one")
    assert hook_count(decoder) == 1
    adapters.unload("two")
    assert hook_count(decoder) == 0 and adapters.nbytes == 0


def test_an_unloaded_adapter_serves_the_requests_that_hold_it(tmp_path: Path) -> None:
    config = tiny_llama()
    decoder = random_decoder(config, 1, std=0.15)
    adapters = AdapterSet(decoder)
    adapter = read_random(tmp_path, config, 1)
    adapters.load("tuned", adapter)
    first, second = adapters.acquire("tuned"), adapters.acquire("tuned")
    adapters.unload("tuned")
    assert adapters.names == () and adapters.nbytes == adapter.nbytes
    with pytest.raises(UnknownModelError):
        adapters.acquire("tuned")
    tokens = random_tokens(1, 6)
    expected = logits_of(merged_decoder(decoder, adapter), tokens)
    adapters.release(first)
    with adapters.applied([(0, 6, second)]):
        torch.testing.assert_close(logits_of(decoder, tokens), expected, atol=TOLERANCE, rtol=1e-4)
    adapters.release(second)
    assert adapters.nbytes == 0 and hook_count(decoder) == 0
    with pytest.raises(AssertionError, match="released too often"):
        adapters.release(second)


def test_a_new_version_of_a_name_is_another_identity_beside_the_old(tmp_path: Path) -> None:
    config = tiny_llama()
    decoder = random_decoder(config, 1, std=0.15)
    adapters = AdapterSet(decoder)
    versions = [read_random(tmp_path, config, seed) for seed in (1, 2)]
    first = adapters.load("tuned", versions[0])
    assert adapters.load("tuned", versions[0]) == adapters.identity("tuned") == first
    held = adapters.acquire("tuned")
    second = adapters.load("tuned", versions[1])
    assert adapters.names == ("tuned",)
    assert held == first != second == adapters.identity("tuned")
    tokens = random_tokens(2, 5)
    with adapters.applied([(0, 5, held), (5, 10, adapters.acquire("tuned"))]):
        both = logits_of(decoder, tokens)
    for row, version in enumerate(versions):
        expected = logits_of(merged_decoder(decoder, version), tokens[row : row + 1])[0]
        torch.testing.assert_close(both[row], expected, atol=TOLERANCE, rtol=1e-4)
    adapters.release(held)
    assert adapters.nbytes == versions[1].nbytes
