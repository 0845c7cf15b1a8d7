"""What the memory plan reckons with for the native runner, against the native code itself."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from ayllu.engine import native_needs
from ayllu.engine.layer_groups import layer_groups
from ayllu.engine.memory_plan import plan_memory
from ayllu.engine.native_needs import NativeNeeds
from ayllu.engine.native_runner import native_decoder
from ayllu.engine.options import EngineOptions
from ayllu.engine.packed_weights import pack_weights
from ayllu.engine.runner_needs import ModelNeeds, TorchNeeds
from ayllu.engine.working_memory import FIXED_BYTES
from ayllu.kernels import native
from ayllu.model.config import ModelConfig
from ayllu.model.presets import preset
from tests.engine.native_models import CONFIGS, saved
from tests.model.tiny import tiny_llama, tiny_llama4

NOISE = 4 << 20
"""Stacks of threads, and what the interpreter takes meanwhile."""

WIDE = replace(
    tiny_llama(tied=False),
    hidden_size=512,
    intermediate_size=2048,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=32,
    max_position_embeddings=1 << 16,
)
MIXTURE = replace(
    tiny_llama4(layers=4, chunk=64, top_k=2),
    hidden_size=512,
    num_attention_heads=16,
    num_key_value_heads=4,
    head_dim=32,
)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("block_tokens", [1, 5, 8, 12, 16, 24, 32, 96])
def test_cache_bytes_are_exactly_those_of_the_native_code(
    name: str, int8: bool, block_tokens: int, tmp_path: Path
) -> None:
    checkpoint = saved(CONFIGS[name], tmp_path / "model")
    config = checkpoint.config
    needs = ModelNeeds(config, 1, NativeNeeds(config, threads=1, int8=int8))
    options = EngineOptions(context=64, slots=2, block_tokens=block_tokens, prefix_cache=False)
    plan = plan_memory(needs, available_bytes=1 << 40, options=options, model_name="it")
    decoder = native_decoder(config, pack_weights(checkpoint, threads=1), plan.groups, threads=1)
    decoder.make_cache(plan.block_counts, plan.block_tokens, int8=int8)
    assert plan.kv_bytes == decoder.cache_bytes


def test_a_cache_in_8_bits_holds_nearly_twice_as_much_in_the_same_memory() -> None:
    config = preset("mini")
    plain, small = (NativeNeeds(config, threads=2, int8=int8).block_bytes(16) for int8 in (False, True))
    assert small * config.head_dim * 32 == plain * (config.head_dim * 16 + 64)
    assert plain == TorchNeeds(config, bytes_per_value=2).block_bytes(16)


def _taken(folder: Path, *numbers: int) -> dict[str, int]:
    command = [sys.executable, "-m", "tests.engine.native_step_memory", str(folder), *map(str, numbers)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize(
    ("config", "slots", "rows", "start"),
    [
        pytest.param(WIDE, 1, 2048, 0, id="a long prompt"),
        pytest.param(WIDE, 1, 1024, 32_000, id="the end of a very long one"),
        pytest.param(WIDE, 32, 8, 8_000, id="drafts of long texts"),
        pytest.param(MIXTURE, 1, 2048, 0, id="a mixture"),
    ],
)
@pytest.mark.parametrize("threads", [1, 4])
def test_a_step_takes_less_than_the_bound_and_not_far_less(
    config: ModelConfig, slots: int, rows: int, start: int, threads: int, tmp_path: Path
) -> None:
    if config is MIXTURE:
        rows = 64  # a piece ends with its chunk
        slots = 32
    found = _taken(saved(config, tmp_path / "model").path, slots, rows, start, threads)
    bound = (
        NativeNeeds(config, threads=threads).working_bytes(
            context=start + rows, slots=slots, step_tokens=slots * rows, block_tokens=16
        )
        - FIXED_BYTES
    )
    assert found["taken"] <= bound + found["written"] + NOISE
    assert bound <= 6 * found["taken"]


def test_the_native_runner_takes_less_than_torch() -> None:
    for name in ("nano", "mini", "scout"):
        config = preset(name)
        sizes = {"context": 8192, "slots": 8, "step_tokens": 512, "block_tokens": 16}
        torch_bytes = TorchNeeds(config, bytes_per_value=2).working_bytes(**sizes)
        assert NativeNeeds(config, threads=8).working_bytes(**sizes) < torch_bytes


def test_the_bound_counts_with_the_sizes_of_the_native_code() -> None:
    folder = Path(native.__file__).parent
    text = "".join((folder / name).read_text(encoding="utf-8") for name in ("kernels.h", "decoder.cpp"))
    for name in ("CHUNK_TILES", "SPLIT_ROWS", "QUERY_ROWS"):
        assert re.search(rf"constexpr int {name} = {getattr(native_needs, name)};", text), name


def test_groups_that_see_a_chunk_hold_no_more_than_that() -> None:
    needs = NativeNeeds(MIXTURE, threads=1)
    assert {group.chunk for group in layer_groups(MIXTURE)} > {64}
    sizes = {"slots": 4, "step_tokens": 64, "block_tokens": 16}
    assert needs.working_bytes(context=64, **sizes) <= needs.working_bytes(context=256, **sizes)
