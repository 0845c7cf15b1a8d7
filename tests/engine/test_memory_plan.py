"""The memory plan: exact bytes, nothing beyond what is free, and refusals that name what does fit."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ayllu.engine.memory_plan import MIN_CONTEXT, MemoryPlan, plan_memory, size_text
from ayllu.engine.options import DEFAULT_SLOTS, EngineOptions
from ayllu.engine.runner_needs import ModelNeeds, TorchNeeds
from ayllu.engine.working_memory import working_bytes
from ayllu.errors import NoSpaceError, UsageError
from ayllu.model.config import LayerSpec, ModelConfig
from ayllu.model.presets import preset
from tests.model.tiny import tiny_llama4

SMOLLM2 = ModelConfig(
    architecture="llama",
    vocab_size=49_152,
    hidden_size=576,
    num_attention_heads=9,
    num_key_value_heads=3,
    head_dim=64,
    intermediate_size=1536,
    layers=(LayerSpec(),) * 30,
    max_position_embeddings=8192,
    tie_word_embeddings=True,
)
CONFIGS = {
    "smollm2": SMOLLM2,
    "nano": preset("nano"),
    "mini": preset("mini"),
    "scout": preset("scout"),
    "guard": preset("guard-4-12b"),
    "tiny": tiny_llama4(vision=True),
    "two chunks": replace(
        tiny_llama4(), layers=(LayerSpec(chunk=48), LayerSpec(chunk=32), LayerSpec(), LayerSpec(chunk=32))
    ),
}
PLENTY = 1 << 60


def _needs(config: ModelConfig, bytes_per_value: int = 2) -> ModelNeeds:
    return ModelNeeds(
        config, config.parameters * bytes_per_value, TorchNeeds(config, bytes_per_value=bytes_per_value)
    )


def _plan(
    config: ModelConfig,
    available: int = PLENTY,
    bytes_per_value: int = 2,
    draft: ModelConfig | None = None,
    **options,
) -> MemoryPlan:
    return plan_memory(
        _needs(config, bytes_per_value),
        available_bytes=available,
        options=EngineOptions(**options),
        model_name="some-model",
        draft=None if draft is None else _needs(draft, bytes_per_value),
    )


names = st.sampled_from(list(CONFIGS))
Wish = dict[str, object]


@st.composite
def wishes(draw: st.DrawFn) -> tuple[str, Wish]:
    """The name of a config, and options as a caller may give them, each asked for or not."""
    name = draw(names)
    longest = CONFIGS[name].max_position_embeddings
    wish: Wish = {"prefix_cache": draw(st.booleans())}
    if draw(st.booleans()):
        wish["context"] = draw(st.integers(2, 256) | st.integers(2, min(longest, 200_000)))
    if draw(st.booleans()):
        wish["slots"] = draw(st.integers(1, 64))
    if draw(st.booleans()):
        wish["block_tokens"] = draw(st.integers(1, 100))
    if draw(st.integers(0, 3)) == 0:
        wish["kv_bytes"] = draw(st.integers(0, 1 << draw(st.integers(10, 36))))
    if draw(st.booleans()):
        wish["image_cache_bytes"] = draw(st.integers(0, 1 << 28))
    return name, wish


@given(
    name=names,
    context=st.integers(2, 256) | st.integers(2, 8192),
    slots=st.integers(1, 9),
    block_tokens=st.integers(1, 70),
    bytes_per_value=st.sampled_from([1, 2, 4]),
)
def test_cache_bytes_are_exactly_those_of_the_architecture(
    name, context, slots, block_tokens, bytes_per_value
) -> None:
    config = CONFIGS[name]
    context = min(context, config.max_position_embeddings)
    plan = _plan(
        config,
        bytes_per_value=bytes_per_value,
        context=context,
        slots=slots,
        block_tokens=block_tokens,
        prefix_cache=False,
    )
    whole_blocks = -(-context // plan.block_tokens) * plan.block_tokens
    assert plan.kv_bytes == slots * config.kv_bytes(whole_blocks, bytes_per_value)
    assert (plan.context, plan.slots) == (context, slots)
    assert plan.block_tokens <= block_tokens
    assert all(group.chunk is None or group.chunk % plan.block_tokens == 0 for group in plan.groups)
    held = [slots * -(-group.held_tokens(context) // plan.block_tokens) for group in plan.groups]
    assert list(plan.block_counts) == held


def test_scout_in_numbers() -> None:
    # 12 layers keep everything, 36 keep one chunk of 8,192: 2 x 8 x 128 x 2 bytes per token and layer.
    plan = _plan(preset("scout"), context=1 << 20, slots=4)
    assert plan.blocks == {"global": 4 * 65_536, "chunk 8192": 2 * 4 * 512}
    assert plan.kv_bytes == 4096 * 16 * (12 * 4 * 65_536 + 36 * 2 * 4 * 512)
    assert plan.context_bytes == preset("scout").kv_bytes(1 << 20)


def test_chunked_layers_get_twice_the_blocks_only_where_chunks_are_left() -> None:
    assert _plan(preset("nano"), context=2048, slots=1).blocks == {"global": 128, "chunk 2048": 128}
    assert _plan(preset("nano"), context=4096, slots=1).blocks == {"global": 256, "chunk 2048": 256}
    without = _plan(preset("nano"), context=4096, slots=1, prefix_cache=False)
    assert without.blocks == {"global": 256, "chunk 2048": 128}


@settings(max_examples=300)
@given(case=wishes(), part=st.fractions(0, 3), bytes_per_value=st.sampled_from([2, 4]))
def test_a_plan_fits_and_keeps_every_wish(case, part, bytes_per_value) -> None:
    name, wish = case
    config = CONFIGS[name]
    available = int(part * (config.parameters * bytes_per_value + (2 << 30)))
    try:
        plan = _plan(config, available, bytes_per_value, **wish)
    except NoSpaceError:
        return
    assert plan.total_bytes <= plan.available_bytes == available
    assert plan.slots == wish.get("slots", plan.slots)
    assert plan.context == wish.get("context", plan.context) <= config.max_position_embeddings
    assert plan.context >= min(MIN_CONTEXT, config.max_position_embeddings) or "context" in wish
    assert 1 <= plan.slots <= max(DEFAULT_SLOTS, wish.get("slots", 0))
    # A sequence of a whole context can always run; with no size given, one in every slot.
    slots = 1 if "kv_bytes" in wish and "slots" in wish else plan.slots
    for group, blocks in zip(plan.groups, plan.block_counts, strict=True):
        assert blocks >= slots * -(-group.held_tokens(plan.context) // plan.block_tokens)
    if "kv_bytes" in wish:
        assert plan.kv_bytes <= wish["kv_bytes"]
    elif "slots" not in wish and plan.slots > 1:
        left = available - plan.weight_bytes - plan.working_bytes - plan.image_cache_bytes
        assert 2 * plan.kv_bytes <= left


def _ways(error: NoSpaceError) -> list[Wish]:
    commands = re.findall(
        r"`ayllu chat some-model --context (\d+)(?: --slots (\d+))?( --dtype bfloat16)?`", error.fix
    )
    ways = [
        {"context": int(context), "slots": int(slots or 1), "bfloat16": bool(dtype)}
        for context, slots, dtype in commands
    ]
    for numbers in re.findall(r"kv_bytes from ([\d,]+) to ([\d,]+)", error.fix):
        ways += [{"kv_bytes": int(number.replace(",", "")), "bfloat16": False} for number in numbers]
    return ways


@settings(max_examples=400)
@given(case=wishes(), part=st.floats(0, 2), bytes_per_value=st.sampled_from([1, 2, 4]))
@example(case=("smollm2", {"slots": 8}), part=0.9, bytes_per_value=4)
@example(case=("smollm2", {"kv_bytes": 10**10}), part=1.0, bytes_per_value=4)
@example(case=("smollm2", {"kv_bytes": 10**4}), part=2.0, bytes_per_value=4)
@example(case=("nano", {"context": 131_072, "slots": 32}), part=1.0, bytes_per_value=4)
@example(case=("scout", {}), part=0.1, bytes_per_value=2)
def test_a_refusal_names_only_what_fits(case, part, bytes_per_value) -> None:
    name, wish = case
    config = CONFIGS[name]
    available = int(part * config.parameters * bytes_per_value) + (256 << 20)
    try:
        _plan(config, available, bytes_per_value, **wish)
    except NoSpaceError as error:
        ways = _ways(error)
        assert ways or "smaller model" in error.fix
        for way in ways:
            value = 2 if way.pop("bfloat16") else bytes_per_value
            plan = _plan(config, available, value, **{**wish, **way})
            assert plan.total_bytes <= available
        if not ways and "kv_bytes" not in wish:
            with pytest.raises(NoSpaceError):
                _plan(config, available, bytes_per_value, **{**wish, "context": None, "slots": 1})


@given(case=wishes(), available=st.integers(1 << 28, 1 << 40), more=st.integers(0, 1 << 36))
def test_more_memory_never_gives_less(case, available, more) -> None:
    name, wish = case
    try:
        small = _plan(CONFIGS[name], available, **wish)
    except NoSpaceError:
        return
    large = _plan(CONFIGS[name], available + more, **wish)
    assert (large.context, large.slots) >= (small.context, small.slots)
    assert large.kv_bytes >= small.kv_bytes or large.context > small.context


@given(
    name=names,
    context=st.integers(2, 1 << 20),
    slots=st.integers(1, 1024),
    step_tokens=st.integers(1, 1 << 16),
    grows=st.sampled_from(["context", "slots", "step_tokens", "bytes_per_value"]),
    by=st.integers(1, 1000),
)
def test_working_memory_grows_with_everything(name, context, slots, step_tokens, grows, by) -> None:
    sizes = {"context": context, "slots": slots, "step_tokens": step_tokens, "bytes_per_value": 2}
    before = working_bytes(CONFIGS[name], **sizes)
    sizes[grows] += by
    assert working_bytes(CONFIGS[name], **sizes) >= before
    assert working_bytes(CONFIGS[name], **sizes, expands_heads=True) >= working_bytes(CONFIGS[name], **sizes)


def test_unasked_slots_leave_half_of_the_memory_to_others() -> None:
    one = _plan(SMOLLM2, context=8192, slots=1)
    fixed = one.weight_bytes + one.working_bytes
    # Room for six contexts: three are taken. Room for one and a half: one is.
    assert _plan(SMOLLM2, fixed + 6 * one.kv_bytes + (150 << 20)).slots == 3
    assert _plan(SMOLLM2, fixed + 3 * one.kv_bytes // 2).slots == 1
    assert _plan(SMOLLM2).slots == DEFAULT_SLOTS
    assert _plan(SMOLLM2, slots=20).slots == 20
    assert _plan(SMOLLM2, step_tokens=3).slots == 3


def test_a_context_nobody_asked_for_shrinks_before_the_model_is_refused() -> None:
    whole = _plan(SMOLLM2, slots=1)
    plan = _plan(SMOLLM2, whole.total_bytes - 1)
    assert MIN_CONTEXT <= plan.context < 8192
    assert plan.slots == 1
    assert plan.lines()[-1] == f"context {plan.context:,} instead of 8,192 tokens: more does not fit"
    smallest = _plan(SMOLLM2, context=MIN_CONTEXT, slots=1)
    assert _plan(SMOLLM2, smallest.total_bytes).context == MIN_CONTEXT
    odd = _plan(SMOLLM2, context=MIN_CONTEXT, slots=1, block_tokens=100)
    assert _plan(SMOLLM2, odd.total_bytes, block_tokens=100).context == MIN_CONTEXT
    with pytest.raises(NoSpaceError, match="for 1 x 512 tokens"):
        _plan(SMOLLM2, smallest.total_bytes - 1)
    with pytest.raises(NoSpaceError, match="for 1 x 8,192 tokens"):
        _plan(SMOLLM2, whole.total_bytes - 1, context=8192)


def test_a_given_cache_size_is_filled_in_proportion_and_shared_by_the_slots_asked_for() -> None:
    config = preset("nano")
    one = config.kv_bytes(8192)
    plan = _plan(config, context=8192, slots=16, kv_bytes=3 * one)
    assert plan.slots == 16
    assert plan.blocks == {"global": 3 * 512, "chunk 2048": 3 * 128}
    assert plan.kv_bytes == 3 * one
    assert _plan(config, context=8192, kv_bytes=3 * one + 5).slots == 3
    with pytest.raises(NoSpaceError, match=r"too small for some-model: one context of 8,192 tokens"):
        _plan(config, context=8192, kv_bytes=one - 1)


def test_a_cache_that_remembers_nothing_takes_no_more_than_the_slots_can_use() -> None:
    plan = _plan(SMOLLM2, context=1024, slots=2, kv_bytes=1 << 40, prefix_cache=False)
    assert plan.kv_bytes == 2 * SMOLLM2.kv_bytes(1024)


def test_only_a_model_that_reads_images_keeps_memory_for_them() -> None:
    assert _plan(SMOLLM2).image_cache_bytes == 0
    assert _plan(preset("nano")).image_cache_bytes == 256 << 20


def test_a_context_beyond_the_model_is_refused() -> None:
    with pytest.raises(UsageError, match=r"This model takes 1 to 8192 tokens"):
        _plan(SMOLLM2, context=8193)


def test_numbers_that_look_equal_are_shown_in_bytes() -> None:
    total = _plan(SMOLLM2, context=8192, slots=1).total_bytes
    with pytest.raises(NoSpaceError, match=f"needs {total:,} bytes .* {total - 1:,} bytes is free"):
        _plan(SMOLLM2, total - 1, context=8192, slots=1)


def test_the_refusal_offers_bfloat16_where_it_helps() -> None:
    need = _plan(SMOLLM2, bytes_per_value=2, context=8192, slots=2).total_bytes
    with pytest.raises(NoSpaceError) as caught:
        _plan(SMOLLM2, need, 4, context=8192, slots=2)
    assert "`ayllu chat some-model --context 8192 --slots 2 --dtype bfloat16`" in caught.value.fix


def test_the_offer_in_bfloat16_is_what_would_be_planned_there() -> None:
    config = replace(SMOLLM2, intermediate_size=1 << 14)
    smallest = _plan(config, bytes_per_value=4, context=MIN_CONTEXT, slots=1)
    plan = _plan(config, smallest.total_bytes - 1, 2)
    assert 1 < plan.slots < DEFAULT_SLOTS
    with pytest.raises(NoSpaceError, match=f"--context {plan.context} --slots {plan.slots} --dtype bfloat16"):
        _plan(config, smallest.total_bytes - 1, 4)


def test_a_conversation_is_offered_without_slots_and_under_its_own_command() -> None:
    with pytest.raises(NoSpaceError, match=r"`ayllu chat smol --context \d+`"):
        _plan(SMOLLM2, 500 << 20, 2, context=8192, slots=1, command="ayllu chat smol")


def test_a_name_with_spaces_can_be_pasted_into_a_shell() -> None:
    with pytest.raises(NoSpaceError, match=r"ayllu chat '/my models/x.gguf' --context"):
        plan_memory(
            replace(_needs(SMOLLM2), weight_bytes=10),
            available_bytes=600 << 20,
            options=EngineOptions(slots=64),
            model_name="/my models/x.gguf",
        )


@pytest.mark.parametrize("name", ["behemoth-2t", "herd-1t", "maverick"])
def test_the_largest_wishes_are_counted_exactly(name: str) -> None:
    config = preset(name)
    context = config.max_position_embeddings
    plan = _plan(config, 1 << 80, context=context, slots=1024, prefix_cache=False)
    assert plan.kv_bytes == 1024 * config.kv_bytes(context)
    assert all(type(value) is int for value in plan.facts().values())
    with pytest.raises(NoSpaceError, match="smaller model"):
        _plan(config, 0)


def test_the_plan_as_a_person_reads_it() -> None:
    plan = replace(
        _plan(SMOLLM2, context=8192, slots=4),
        weight_bytes=3_100_000_000,
        working_bytes=200_000_000,
        available_bytes=20 * 10**9,
    )
    assert plan.lines() == (
        "weights 3.1 GB + cache 755 MB (4 x 8,192 tokens, 23.0 KB a token) + working 200 MB "
        "= 4.1 GB of 20.0 GB free",
        "cache blocks of 16 tokens: global 2,048",
    )
    assert plan.facts()["blocks global"] == 2048
    assert plan.facts()["total_bytes"] == plan.total_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 KB"),
        (23_040, "23.0 KB"),
        (99_949, "99.9 KB"),
        (99_950, "100 KB"),
        (3_149_999_999, "3.1 GB"),
        (999_999_999, "1,000 MB"),
        (10**16, "10,000 TB"),
    ],
)
def test_sizes_for_people(count: int, text: str) -> None:
    assert size_text(count) == text


@settings(max_examples=200)
@given(case=wishes(), draft=names, part=st.fractions(0, 3))
def test_a_draft_model_fits_beside_the_model_with_as_many_slots(case, draft, part) -> None:
    name, wish = case
    config, small = CONFIGS[name], CONFIGS[draft]
    available = int(part * (2 * (config.parameters + small.parameters) + (2 << 30)))
    try:
        plan = _plan(config, available, draft=small, **wish)
    except NoSpaceError as error:
        for way in _ways(error):
            way.pop("bfloat16")
            assert _plan(config, available, draft=small, **{**wish, **way}).total_bytes <= available
        return
    assert plan.total_bytes <= available
    assert plan.draft is not None
    assert plan.draft.slots == plan.slots
    assert plan.draft.context == min(plan.context, small.max_position_embeddings)
    for group, blocks in zip(plan.draft.groups, plan.draft.block_counts, strict=True):
        assert blocks == plan.slots * -(-group.held_tokens(plan.draft.context) // plan.draft.block_tokens)
    own = plan.weight_bytes + plan.kv_bytes + plan.working_bytes + plan.image_cache_bytes
    assert plan.total_bytes == own + plan.draft.total_bytes
    assert plan.facts()["draft_bytes"] == plan.draft.total_bytes
    assert f"+ draft model {size_text(plan.draft.total_bytes)} = " in plan.lines()[0]


def test_a_cache_of_given_size_is_the_models_alone() -> None:
    given_bytes = 2 * SMOLLM2.kv_bytes(8192)
    plan = _plan(SMOLLM2, draft=SMOLLM2, context=8192, kv_bytes=given_bytes)
    assert plan.kv_bytes == given_bytes
    assert plan.draft is not None and plan.draft.kv_bytes == given_bytes
    beside = _plan(SMOLLM2, plan.total_bytes, draft=SMOLLM2, context=8192, kv_bytes=given_bytes)
    assert beside.total_bytes == plan.total_bytes
    with pytest.raises(NoSpaceError, match="draft model"):
        _plan(SMOLLM2, plan.total_bytes - 1, draft=SMOLLM2, context=8192, slots=2, kv_bytes=given_bytes)
