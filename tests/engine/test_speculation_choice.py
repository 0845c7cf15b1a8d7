"""How many tokens are drafted is what pays: acceptance and the cost of steps are learnt while serving.

Time passes on a clock of the tests' own. Lookup is held to a scan of the whole text.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine import speculation_lookup
from ayllu.engine.block_cache import BlockCache
from ayllu.engine.channel import Frame
from ayllu.engine.core import EngineCore
from ayllu.engine.messages import Open, to_engine
from ayllu.engine.options import EngineOptions
from ayllu.engine.parameters import Sampling
from ayllu.engine.prepared import PreparedRequest
from ayllu.engine.sequence import BlockKeys
from ayllu.engine.sequence import Sequence as EngineSequence
from ayllu.engine.speculation import PROBE_STEPS, Speculation, _best_counts, speculation_for
from ayllu.engine.speculation_draft import DraftModel, require_same_vocabulary
from ayllu.engine.speculation_estimates import AcceptanceRates, StepCosts, assumed_cost
from ayllu.engine.speculation_lookup import SIZES, LookupIndex, PromptLookup
from ayllu.engine.speculation_proposal import Proposal, Proposer
from ayllu.errors import UsageError
from tests.engine.cores import TOKENIZER, run, tokens_of
from tests.engine.fake_runner import groups_of
from tests.engine.hash_runner import VOCABULARY, Clock, HashRunner, hash_core

GREEDY = Sampling(temperature=0)
GLOBAL = groups_of(None)


# Lookup.


def _scan(tokens: Sequence[int]) -> int | None:
    """The slow twin of `LookupIndex.find`."""
    for size in SIZES:
        ending = tokens[-size:]
        for place in range(len(tokens) - 1, size - 1, -1):
            if len(tokens) > size and tokens[place - size : place] == ending:
                return place
    return None


@given(st.lists(st.integers(0, 3) | st.integers(0, 200_000), max_size=120), st.lists(st.integers(1, 9)))
def test_lookup_finds_what_a_scan_of_the_whole_text_finds(tokens: list[int], steps: list[int]) -> None:
    index = LookupIndex()
    length = 0
    for step in [*steps, len(tokens)]:
        length = min(len(tokens), length + step)
        assert index.find(tokens[:length]) == _scan(tokens[:length])


def test_a_long_text_is_read_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speculation_lookup, "READ_TOGETHER", 100)
    index, tokens = LookupIndex(), [1, 2, 3] * 100
    assert [index.find(tokens) for _ in range(4)] == [None, None, 297, 297]


def test_a_repetition_is_drafted_beyond_the_end_of_the_text() -> None:
    core = _core(Speculation(PromptLookup(), most_drafted=9, clock=Clock()))
    core.submit(PreparedRequest(id="it", token_ids=[7, 8, 9, 7, 8, 9, 7, 8], max_new_tokens=1))
    sequence = core._jobs["it"].sequences[0]
    (proposal,) = PromptLookup().propose([(sequence, 9)])
    assert proposal is not None
    assert proposal.tokens == [9, 7, 8] * 3
    # Five tokens before the place are those at the end, and each drafted token makes it one more.
    assert proposal.classes == [2, 3, 3, 3, 4, 4, 4, 4, 4]


# Choosing.


@given(
    st.lists(st.lists(st.floats(0.02, 0.99), max_size=4), min_size=1, max_size=3),
    st.lists(st.floats(0, 2), min_size=16, max_size=16),
    st.integers(0, 9),
    st.floats(0, 0.5),
)
def test_the_choice_is_the_best_of_all_choices(
    rates: list[list[float]], increments: list[float], most: int, to_propose: float
) -> None:
    worths = [[_product(part[: place + 1]) for place in range(len(part))] for part in rates]

    def seconds(rows: int) -> float:
        return 1 + sum(increments[:rows])

    def rate(counts: Sequence[int]) -> float:
        tokens = len(worths) + sum(sum(worth[:count]) for worth, count in zip(worths, counts, strict=True))
        return tokens / (seconds(len(worths) + sum(counts)) + to_propose * max(counts))

    chosen, found = _best_counts(worths, len(worths), most, seconds, to_propose)
    assert found == pytest.approx(rate(chosen))
    assert sum(chosen) <= most
    possible = (
        counts for counts in product(*(range(len(worth) + 1) for worth in worths)) if sum(counts) <= most
    )
    # With a cost per place the greedy order is no longer exact between sequences: it may lose that cost.
    best = max(map(rate, possible))
    assert rate(chosen) >= (best if to_propose == 0 else best / (1 + 4 * to_propose)) * (1 - 1e-9)


def _product(values: Sequence[float]) -> float:
    found = 1.0
    for value in values:
        found *= value
    return found


def test_rates_follow_what_comes_and_begin_with_what_others_saw() -> None:
    shared = AcceptanceRates()
    first = AcceptanceRates(shared)
    for _ in range(200):
        first.note(3, True)
        first.note(0, False)
    assert first.rate(3) > 0.95
    assert first.rate(0) < 0.05
    assert first.rate(1) == shared.rate(1) == 0.5
    second = AcceptanceRates(shared)
    assert second.rate(3) > 0.9
    for _ in range(100):
        second.note(3, False)
    assert second.rate(3) < 0.1
    assert first.rate(3) > 0.9


@given(st.floats(0.001, 10), st.floats(0, 1.5), st.integers(0, 1 << 30))
def test_costs_are_learnt_through_disturbances(first: float, slope: float, seed: int) -> None:
    source, costs = random.Random(seed), StepCosts()
    for _ in range(400):
        rows = source.choice((1, 2, 4, 9))
        disturbed = 30 if source.random() < 0.02 else 1
        costs.note(rows, first * (1 + slope * (rows - 1)) * disturbed * source.uniform(0.97, 1.03))
    for rows in (2, 4, 6, 9):
        expected = 1 + slope * (rows - 1)
        assert costs.seconds(rows) / costs.seconds(1) == pytest.approx(expected, rel=0.35)


def test_rows_not_computed_for_long_keep_up_when_every_step_gets_slower() -> None:
    costs = StepCosts()
    for _ in range(20):
        costs.note(1, 1.0)
        costs.note(5, 2.0)
    for step in range(400):
        costs.note(5, 2.0 * (1 + step / 200))
    assert costs.seconds(5) == pytest.approx(6.0, rel=0.1)
    assert costs.seconds(1) == pytest.approx(3.0, rel=0.5)


def test_before_anything_was_measured_a_row_costs_little() -> None:
    costs = StepCosts()
    assert not costs.known
    assert costs.seconds(11) == assumed_cost(11) == 2.0


# In an engine, on its own clock.


def _core(speculation: Speculation | None, **options) -> EngineCore:  # type: ignore[no-untyped-def]
    return hash_core(GLOBAL, [200], 8, speculation=speculation, **options)


def _repeating(number: int, tokens: int = 200) -> PreparedRequest:
    return PreparedRequest(
        id=str(number), token_ids=[1 + number, 2, 3], max_new_tokens=tokens, sampling=GREEDY
    )


def _timed(row_cost: float, *, noise: float, speculates: bool, requests: int = 1) -> tuple[float, EngineCore]:
    """Seconds to answer requests one after another, with steps of 1 + row_cost x (rows - 1) seconds."""
    clock = Clock()
    runner = HashRunner(
        GLOBAL, [200], 8, noise=noise, clock=clock, costs=lambda rows: 1 + row_cost * (rows - 1)
    )
    speculation = Speculation(PromptLookup(), most_drafted=16, clock=clock) if speculates else None
    core = _core(speculation, runner=runner)
    for number in range(requests):
        core.submit(_repeating(number))
        run(core)
    return clock.now, core


def test_cheap_rows_and_a_repeating_text_make_answers_much_faster() -> None:
    without, _ = _timed(0.05, noise=0.05, speculates=False, requests=3)
    with_drafts, core = _timed(0.05, noise=0.05, speculates=True, requests=3)
    assert with_drafts < without / 2
    assert core.stats().accepted > 0.6 * core.stats().drafted


@pytest.mark.parametrize(("row_cost", "noise"), [(1.0, 0.05), (1.0, 1.0), (0.4, 3.0), (0.1, 5.0)])
def test_drafts_that_do_not_pay_cost_next_to_nothing(row_cost: float, noise: float) -> None:
    without, _ = _timed(row_cost, noise=noise, speculates=False, requests=3)
    with_drafts, _ = _timed(row_cost, noise=noise, speculates=True, requests=3)
    assert with_drafts <= without * 1.04


def test_it_comes_back_when_rows_get_cheap_again() -> None:
    clock, cost = Clock(), [2.0]
    runner = HashRunner(
        GLOBAL, [200], 8, noise=0.05, clock=clock, costs=lambda rows: 1 + cost[0] * (rows - 1)
    )
    core = _core(Speculation(PromptLookup(), most_drafted=8, clock=clock), runner=runner)
    core.submit(_repeating(0))
    run(core)
    dear = core.stats().drafted
    assert dear < 40
    cost[0] = 0.05
    for number in range(1, 12):
        core.submit(_repeating(number))
        run(core)
    assert core.stats().drafted > 10 * dear
    assert core.stats().new_tokens > 2 * (core.stats().steps - 8 * PROBE_STEPS)


def test_many_sequences_together_share_the_rows_that_pay() -> None:
    clock = Clock()
    # Eight rows cost as much as one, each further one as much as a step: no batch of eight gains by drafts.
    costs = lambda rows: 1.0 if rows <= 8 else 1.0 + (rows - 8)  # noqa: E731
    runner = HashRunner(GLOBAL, [200], 8, noise=0.05, clock=clock, costs=costs)
    core = _core(Speculation(PromptLookup(), most_drafted=8, clock=clock), runner=runner, slots=8)
    for number in range(8):
        core.submit(_repeating(number, 120))
    run(core)
    assert core.stats().drafted < 0.25 * core.stats().new_tokens
    alone = core.stats().drafted
    core.submit(_repeating(9))
    run(core)
    assert core.stats().drafted - alone > 100


# A draft model.


class Nothing:
    """Proposes nothing."""

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> list[Proposal | None]:
        return [Proposal([], []) for _ in wanted]

    def forget(self, sequence: EngineSequence) -> None:
        pass


class _Drafting:
    """A core with a draft model; a step of it takes 1 s and 0.1 s more per row, of the draft model `cost`."""

    def __init__(
        self, *, seed: int = 0, noise: float = 0.6, blocks: int = 200, cost: float = 0.1, slots: int = 4,
        context: int = 256, step_tokens: int = 64, lookup: Proposer | None = None,
        target_noise: float = 0.6, block_tokens: int = 8,
    ) -> None:  # fmt: skip
        self.clock = Clock()
        self.runner = HashRunner(
            GLOBAL, [blocks], block_tokens, noise=noise, seed=seed, clock=self.clock, costs=lambda rows: cost
        )
        self.cache = BlockCache(GLOBAL, [blocks], block_tokens)
        self.model = DraftModel(
            self.runner, self.cache, vocab_size=VOCABULARY, context=context, step_tokens=step_tokens
        )
        target = HashRunner(
            GLOBAL, [200], 8, noise=target_noise, clock=self.clock, costs=lambda rows: 0.9 + 0.1 * rows
        )
        speculation = Speculation(lookup or Nothing(), self.model, most_drafted=5, clock=self.clock)
        self.core = _core(speculation, runner=target, slots=slots)


def _answered(core: EngineCore, requests: int = 1, **options) -> list[list[int]]:  # type: ignore[no-untyped-def]
    for number in range(requests):
        core.submit(
            PreparedRequest(
                id=str(number),
                token_ids=[9, number, *range(20)],
                max_new_tokens=60,
                sampling=GREEDY,
                **options,
            )
        )
    said = run(core)
    return [tokens_of(said, str(number)) for number in range(requests)]


def test_a_draft_model_that_is_the_model_is_always_right_and_reads_every_token_once() -> None:
    drafting = _Drafting()
    assert _answered(drafting.core) == _answered(_core(None))
    stats = drafting.core.stats()
    assert stats.accepted == stats.drafted > 30
    # What was accepted is not read again, only what came after it.
    assert sum(drafting.runner.rows) <= 22 + 60 + stats.steps
    drafting.cache.check()
    assert drafting.cache.free() == (200,)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("blocks", [3, 5, 12, 200])
def test_a_draft_model_gives_its_blocks_back_and_changes_nothing(seed: int, blocks: int) -> None:
    drafting = _Drafting(seed=seed, blocks=blocks, noise=1.0, slots=3)
    assert _answered(drafting.core, 5) == _answered(_core(None), 5)
    assert blocks < 12 or drafting.core.stats().drafted > 0
    drafting.cache.check()
    assert drafting.cache.free() == (blocks,)
    assert not drafting.model._readers
    assert not drafting.model._left_alone


def test_a_draft_model_reads_a_long_prompt_beside_the_steps() -> None:
    drafting = _Drafting(step_tokens=4)
    assert _answered(drafting.core) == _answered(_core(None))
    assert max(drafting.runner.rows) <= 4
    assert drafting.core.stats().accepted > 20


def test_a_prompt_that_both_models_know_is_not_read_again() -> None:
    drafting = _Drafting()
    _answered(drafting.core)
    before = sum(drafting.runner.rows)
    steps = drafting.core.stats().steps
    _answered(drafting.core)
    again = sum(drafting.runner.rows) - before
    assert again <= 22 % 8 + 60 + drafting.core.stats().steps - steps


def test_blocks_of_another_size_than_the_large_models_will_do() -> None:
    drafting = _Drafting(block_tokens=4)
    assert _answered(drafting.core) == _answered(_core(None))
    assert drafting.core.stats().accepted > 20
    assert drafting.cache.free() == (200,)


def test_what_is_longer_than_the_draft_models_context_is_not_drafted() -> None:
    drafting = _Drafting(context=20)
    _answered(drafting.core)
    assert drafting.runner.rows == []


def test_prompts_with_images_are_not_drafted() -> None:
    drafting = _Drafting()
    sequence = EngineSequence([1, 2], 2, 9, BlockKeys(b"", 8, [("digest", 1)], 90), owner=None)  # type: ignore[arg-type]
    assert drafting.model.propose([(sequence, 3)]) == [Proposal([], [])]


def test_a_draft_model_that_fails_is_left_alone() -> None:
    drafting = _Drafting()
    calls = []

    def failing(pieces):  # type: ignore[no-untyped-def]
        calls.append(len(pieces))
        raise MemoryError("none left")

    drafting.runner.forward = failing
    assert _answered(drafting.core) == _answered(_core(None))
    assert len(calls) == 3
    assert drafting.cache.free() == (200,)


def test_a_fatal_error_of_a_draft_model_is_one_of_the_engine() -> None:
    drafting = _Drafting()

    def failing(pieces):  # type: ignore[no-untyped-def]
        raise MemoryError("the device is gone")

    drafting.runner.forward, drafting.runner.is_fatal = failing, lambda error: True
    with pytest.raises(MemoryError):
        _answered(drafting.core)


def test_lookup_and_draft_model_together_are_as_fast_as_the_faster_of_the_two() -> None:
    def seconds(noise: float, target_noise: float, lookup: Proposer | None) -> float:
        drafting = _Drafting(noise=noise, target_noise=target_noise, cost=0.3, lookup=lookup)
        _answered(drafting.core, 3)
        return drafting.clock.now

    # The text repeats itself and the small model errs; then the other way round.
    assert seconds(5.0, 0.05, PromptLookup()) < 0.8 * seconds(5.0, 0.05, None)
    assert seconds(1.0, 1.0, PromptLookup()) < 1.05 * seconds(1.0, 1.0, None)


@pytest.mark.parametrize(("seed", "cost"), [(5, 0.3), (5, 2.0), (0, 2.0)])
def test_a_draft_model_that_does_not_pay_is_asked_less_and_less(seed: int, cost: float) -> None:
    drafting = _Drafting(seed=seed, noise=5.0 if seed else 0.6, cost=cost)
    drafting.core.submit(_repeating(0, 240))
    run(drafting.core)
    assert drafting.clock.now < 240 * 1.1


def test_vocabularies_must_be_equal_but_for_unused_ids() -> None:
    require_same_vocabulary(TOKENIZER, TOKENIZER.with_embedding_rows(128), "small")
    other = _renamed(TOKENIZER)
    with pytest.raises(UsageError, match="token 96"):
        require_same_vocabulary(TOKENIZER, other, "small")


def _renamed(tokenizer: Tokenizer) -> Tokenizer:
    from ayllu.chat.vocabulary import SpecialToken, TokenizerParts
    from tests.engine.cores import STOP_ID, LetterVocabulary

    stop = SpecialToken("<end>", STOP_ID)
    parts = TokenizerParts(LetterVocabulary(), (stop,), None, STOP_ID, frozenset({STOP_ID}), False, "letters")
    return Tokenizer(parts)


# Options.


def test_what_is_drafted_by_default_depends_on_the_runner() -> None:
    runner = HashRunner(GLOBAL, [4], 8)
    draft = _Drafting().model

    class Torch(HashRunner):
        batch_invariant = False

    def kind(options: EngineOptions, runner: HashRunner, model: DraftModel | None = None) -> str:
        found = speculation_for(options, runner, model)
        return "off" if found is None else "lookup" if found._draft is None else "draft"

    other = Torch(GLOBAL, [4], 8)
    assert kind(EngineOptions(), runner) == "lookup"
    assert kind(EngineOptions(), other) == "off"
    assert kind(EngineOptions(speculate="lookup"), other) == "lookup"
    assert kind(EngineOptions(speculate="off"), runner) == "off"
    assert kind(EngineOptions(deterministic=True), runner) == "off"
    assert kind(EngineOptions(draft_model=Path("small")), other, draft) == "draft"


@pytest.mark.parametrize(
    "options",
    [
        {"speculate": "maybe"},
        {"speculate": "draft"},
        {"speculate": "off", "draft_model": Path("small")},
        {"speculate": "lookup", "deterministic": True},
        {"draft_model": Path("small"), "deterministic": True},
        {"most_drafted": 0},
    ],
)
def test_options_that_contradict_each_other_are_refused(options: dict) -> None:  # type: ignore[type-arg]
    with pytest.raises(UsageError):
        EngineOptions(**options)


def test_a_draft_model_travels_with_the_options_whatever_its_name() -> None:
    options = EngineOptions(speculate="draft", draft_model=Path("/models/\udcff odd"), most_drafted=3)
    packed = to_engine().pack(Open.of(Path("/model"), options))
    found = to_engine().unpack(Frame(packed.header, memoryview(b""))).options
    assert found.draft_model == Path("/models/\udcff odd")
    assert found.most_drafted == 3
    assert Open.of(Path("/model"), EngineOptions(speculate="lookup")).options.speculate == "lookup"
