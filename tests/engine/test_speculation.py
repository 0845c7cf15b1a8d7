"""Speculation changes no answer: whatever is drafted, tokens, text, log-probabilities and ends are the same.

Over a runner whose logits tell of every cache slot a token sees, so that a rejected token's keys and values
could not be read unnoticed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest

from ayllu.engine.block_cache import BlockCache
from ayllu.engine.core import EngineCore, Said
from ayllu.engine.events import AnswerFinished, Failed, TextDelta, TokenLogprob
from ayllu.engine.layer_groups import LayerGroup
from ayllu.engine.parameters import Sampling
from ayllu.engine.prepared import GrammarSpec, PreparedRequest
from ayllu.engine.sequence import Sequence as EngineSequence
from ayllu.engine.speculation import Speculation
from ayllu.engine.speculation_draft import DraftModel
from ayllu.engine.speculation_lookup import PromptLookup
from ayllu.engine.speculation_proposal import Proposal
from ayllu.errors import ContextOverflowError
from ayllu.model.config import ModelConfig
from ayllu.model.decoder import random_decoder
from tests.engine.cores import STOP_ID, all_blocks_free, run, small_core, tokens_of
from tests.engine.fake_runner import groups_of
from tests.engine.hash_runner import VOCABULARY, Clock, HashRunner, hash_core
from tests.model.tiny import tiny_llama, tiny_llama4, tiny_qwen2

MIXES = 40
LAYERS = {"global": groups_of(None), "chunked": groups_of(None, 8), "two chunks": groups_of(None, 8, 16)}
GREEDY = Sampling(temperature=0)


@dataclass(frozen=True)
class Answer:
    """All that was said of one answer, however it was cut into events."""

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    end: AnswerFinished


def answer_of(said: Said, request_id: str, index: int) -> Answer:
    mine = [event for name, event in said if name == request_id]
    assert not any(isinstance(event, Failed) for event in mine), mine
    deltas = [event for event in mine if isinstance(event, TextDelta) and event.index == index]
    (end,) = [event for event in mine if isinstance(event, AnswerFinished) and event.index == index]
    return Answer(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.token_ids),
        tuple(logprob for delta in deltas for logprob in delta.logprobs),
        end,
    )


class Scripted:
    """A proposer that is told what to propose: from a sequence and the most tokens wanted."""

    def __init__(self, propose: Callable[[EngineSequence, int], list[int]]) -> None:
        self._propose = propose
        self.known: set[EngineSequence] = set()

    def propose(self, wanted: Sequence[tuple[EngineSequence, int]]) -> list[Proposal | None]:
        self.known.update(sequence for sequence, _ in wanted)
        drafts = [self._propose(sequence, most) for sequence, most in wanted]
        return [Proposal(draft, [0] * len(draft)) for draft in drafts]

    def forget(self, sequence: EngineSequence) -> None:
        self.known.discard(sequence)


class Always(Speculation):
    """Drafts all that is proposed and has room, whether it pays or not."""

    def drafts(self, decoding, *, rows, most):  # type: ignore[no-untyped-def]
        drafts = []
        for sequence, room in decoding:
            length = min(room, self._most_drafted, most)
            (proposal,) = self._lookup._proposer.propose([(sequence, length)]) if length > 0 else [None]
            drafts.append(proposal.tokens if proposal else [])
            most -= len(drafts[-1])
        return drafts


def _request(source: random.Random, number: int, shared: list[int]) -> PreparedRequest:
    length = source.choice((1, 3, 8, 9, source.randint(1, 40)))
    tokens = shared[: source.randint(0, length)]
    tokens = tokens + [source.randrange(STOP_ID) for _ in range(length - len(tokens))]
    greedy = source.random() < 0.5
    return PreparedRequest(
        id=str(number),
        token_ids=tokens,
        max_new_tokens=source.choice((0, 1, 2, 9, 50, 70, source.randint(1, 70))),
        sampling=Sampling(
            temperature=0 if greedy else source.choice((0.3, 1.0)),
            top_p=source.choice((0.9, 1.0)),
            top_k=source.choice((0, 5)),
            repetition_penalty=source.choice((1.0, 1.0, 1.3)),
            presence_penalty=source.choice((0.0, 0.0, 0.7)),
            frequency_penalty=source.choice((0.0, 0.0, 0.4)),
            seed=source.randrange(1000),
        ),
        stop_ids=frozenset(source.sample(range(VOCABULARY), source.choice((0, 0, 1, 3)))),
        stop=source.choice(((), (), (), ("aa", "bb"), ("abc", "b\n", "cde"))),
        n=source.choice((1, 1, 1, 3)),
        logprobs=source.choice((None, None, 0, 2)),
        prompt_logprobs=source.choice((None, None, None, 1)),
        adapter=source.choice((None, None, "one")),
        priority=source.randint(-2, 2),
        tenant=source.choice(("", "a")),
        grammar=GrammarSpec("start: /[a-f]{3,20}/") if source.random() < 0.03 else None,
    )


def _expected(layers: Sequence[LayerGroup], requests: Sequence[PreparedRequest]) -> dict[str, list[Answer]]:
    """The answers of a core that does not speculate and has room for all."""
    core = hash_core(layers, [400] * len(layers), slots=4)
    for request in requests:
        core.submit(request)
    said = run(core)
    assert core.stats().drafted == 0
    return {
        request.id: [answer_of(said, request.id, index) for index in range(request.n)] for request in requests
    }


def _oracle(expected: dict[str, list[Answer]], change: Callable[[list[int]], list[int]]) -> Scripted:
    """Proposes what will be drawn, changed."""

    def propose(sequence: EngineSequence, most: int) -> list[int]:
        done = len(sequence.tokens) - sequence.prompt_tokens
        answers = expected[sequence.owner.id]
        mine = sequence.owner.answers[sequence].index  # type: ignore[attr-defined]
        return change([*answers[mine].tokens, *range(50)][done : done + most])

    return Scripted(propose)


def _speculation(
    kind: str, source: random.Random, layers: Sequence[LayerGroup], size: int,
    expected: dict[str, list[Answer]],
) -> Speculation:  # fmt: skip
    most = source.choice((1, 2, 5, 16))
    match kind:
        case "right":
            return Always(_oracle(expected, list), most_drafted=most)
        case "wrong":
            wrong = _oracle(expected, lambda tokens: [(token + 1) % STOP_ID for token in tokens])
            return Always(wrong, most_drafted=most)
        case "half right":

            def half(tokens: list[int]) -> list[int]:
                return [t if source.random() < 0.7 else (t + 1) % STOP_ID for t in tokens]

            return Always(_oracle(expected, half), most_drafted=most)
        case "random":
            anything = Scripted(lambda _, count: [source.randrange(VOCABULARY) for _ in range(count)])
            return Always(anything, most_drafted=most)
        case "lookup":
            return Speculation(PromptLookup(), most_drafted=most, clock=Clock())
        case "model":
            blocks = [source.randint(6, 100)] * len(layers)
            clock = Clock()
            runner = HashRunner(layers, blocks, size, noise=source.choice((0.6, 1.0)), clock=clock)
            cache = BlockCache(layers, blocks, size)
            draft = DraftModel(
                runner, cache, vocab_size=VOCABULARY, context=source.choice((20, 200)),
                step_tokens=source.choice((5, 64)),
            )  # fmt: skip
            if source.random() < 0.5:
                return Always(draft, most_drafted=most)
            return Speculation(PromptLookup(), draft, most_drafted=most, clock=clock)
    raise AssertionError(kind)


def _require_tight_tables(core: EngineCore) -> None:
    """Between steps a sequence holds blocks for what is computed, and no block for a draft."""
    cache = core.scheduler.cache
    cache.check()
    for sequence in cache._open:
        for group, table in zip(cache.groups, sequence.tables, strict=True):
            begin = 0 if group.chunk is None else sequence.computed // group.chunk * group.chunk
            assert len(table) == -(-(sequence.computed - begin) // cache.block_tokens)
        assert sequence.computed <= len(sequence.tokens)


@pytest.mark.parametrize("kind", ["right", "wrong", "half right", "random", "lookup", "model"])
@pytest.mark.parametrize("layers", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("mixes", range(0, MIXES, 20))
def test_any_mix_of_requests_gets_the_same_answers_whatever_is_drafted(
    layers: Sequence[LayerGroup], kind: str, mixes: int
) -> None:
    drafted = 0
    for mix in range(mixes, mixes + 20):
        source = random.Random(f"{mix} {kind}")
        shared = [source.randrange(STOP_ID) for _ in range(40)]
        requests = [_request(source, number, shared) for number in range(source.randint(1, 6))]
        expected = _expected(layers, requests)
        slots, size = source.randint(1, 5), source.choice((1, 2, 4, 8))
        core = hash_core(
            layers,
            # Often so few that requests drive each other out.
            [source.randint(120, 200) // size, *(source.randint(16, 40) // size for _ in layers[1:])],
            size,
            slots=slots,
            step_tokens=slots + source.choice((0, 1, 7, 40)),
            prefix_cache=source.random() < 0.8,
            speculation=_speculation(kind, source, layers, size, expected),
        )
        said: Said = []
        taken: list[PreparedRequest] = []
        for request in requests:
            try:
                core.submit(request)
            except ContextOverflowError:
                continue
            taken.append(request)
            for _ in range(source.choice((0, 0, 1, 5))):
                said += core.step()
                _require_tight_tables(core)
        while core.has_work:
            said += core.step()
            _require_tight_tables(core)
        for request in taken:
            found = [answer_of(said, request.id, index) for index in range(request.n)]
            assert found == expected[request.id]
        assert all_blocks_free(core)
        assert not core._speculation._lookup._tracks
        assert max(core.runner.rows, default=0) <= core.scheduler.step_tokens
        drafted += core.stats().drafted
        assert core.stats().accepted <= core.stats().drafted
    assert drafted > 0


@pytest.mark.parametrize(
    "config", [tiny_llama(), tiny_qwen2(), tiny_llama4(layers=4)], ids=lambda c: c.architecture
)
@pytest.mark.parametrize("mix", range(8))
def test_a_network_gives_the_same_tokens_with_drafts(config: ModelConfig, mix: int) -> None:
    """In float32 rows that are computed together differ in their last bits at most."""
    decoder = random_decoder(config, 11, std=0.15).requires_grad_(False)
    source = random.Random(mix)
    requests = [
        PreparedRequest(
            id=str(number),
            token_ids=[source.randrange(30) for _ in range(source.randint(1, 30))],
            max_new_tokens=source.randint(1, 40),
            sampling=source.choice((GREEDY, Sampling(temperature=1.0, seed=number))),
            stop_ids=frozenset({STOP_ID}),
            n=source.choice((1, 2)),
        )
        for number in range(5)
    ]

    def said(speculation: Speculation | None) -> Said:
        core = small_core(decoder, slots=3, blocks={"global": 40, "chunk 8": 10}, speculation=speculation)
        for request in requests:
            core.submit(request)
        found = run(core)
        assert all_blocks_free(core)
        assert (core.stats().drafted > 0) == (speculation is not None)
        return found

    without = said(None)
    answers = {
        request.id: [answer_of(without, request.id, index) for index in range(request.n)]
        for request in requests
    }
    for proposer in (_oracle(answers, list), Scripted(lambda _, most: [source.randrange(96)] * most)):
        found = said(Always(proposer, most_drafted=5))
        for request in requests:
            assert [answer_of(found, request.id, i) for i in range(request.n)] == answers[request.id]


def _drafting(tokens: Sequence[int], most: int = 8) -> Speculation:
    """Drafts what stands in `tokens` at the place of each answer."""

    def propose(sequence: EngineSequence, count: int) -> list[int]:
        done = len(sequence.tokens) - sequence.prompt_tokens
        return list(tokens[done : done + count])

    return Always(Scripted(propose), most_drafted=most)


PROMPT = [5, 6, 7, 8, 9]


def _greedy(name: str = "it", **options) -> PreparedRequest:  # type: ignore[no-untyped-def]
    settings = {"token_ids": PROMPT, "max_new_tokens": 30, "sampling": GREEDY} | options
    return PreparedRequest(id=name, **settings)


def _core(speculation: Speculation | None = None, **options) -> EngineCore:  # type: ignore[no-untyped-def]
    return hash_core(groups_of(None), [100], speculation=speculation, **options)


@pytest.fixture
def plain() -> list[int]:
    """What the model says to `PROMPT`."""
    core = _core()
    core.submit(_greedy())
    return tokens_of(run(core), "it")


def test_a_right_draft_saves_steps(plain: list[int]) -> None:
    core = _core(_drafting(plain))
    core.submit(_greedy())
    assert tokens_of(run(core), "it") == plain
    # The prompt, three drafts of eight with one token more each, and a draft of one with the last.
    assert (core.stats().steps, core.stats().accepted) == (5, 25)


def test_a_step_says_the_text_of_an_answer_in_one_event(plain: list[int]) -> None:
    core = _core(_drafting(plain))
    core.submit(_greedy(logprobs=1))
    while core.has_work:
        deltas = [event for _, event in core.step() if isinstance(event, TextDelta)]
        assert len(deltas) <= 1
        assert all(len(delta.token_ids) == len(delta.logprobs) for delta in deltas)


def test_what_was_drawn_before_a_failure_is_said(plain: list[int]) -> None:
    core = _core(_drafting(plain))
    core.submit(_greedy())
    core.step()
    answer = next(iter(core._jobs["it"].answers.values()))
    draw, drawn = answer.draw, []

    def failing(row):  # type: ignore[no-untyped-def]
        if len(drawn) == 3:
            raise ValueError("no more")
        drawn.append(draw(row))
        return drawn[-1]

    answer.draw = failing
    said = run(core)
    assert isinstance(said[-1][1], Failed)
    assert tokens_of(said, "it") == plain[1:4]
    assert all_blocks_free(core)


def test_a_stop_token_inside_a_draft_ends_the_answer_there(plain: list[int]) -> None:
    place = next(place for place in range(3, 30) if plain[place] not in plain[:place])
    core = _core(_drafting(plain))
    core.submit(_greedy(stop_ids=frozenset({plain[place]})))
    found = answer_of(run(core), "it", 0)
    assert (list(found.tokens), found.end.reason) == (plain[:place], "stop")
    assert all_blocks_free(core)


def test_the_last_token_is_never_drafted_and_nothing_behind_it(plain: list[int]) -> None:
    for most in range(1, 12):
        core = _core(_drafting(plain))
        core.submit(_greedy(max_new_tokens=most))
        found = answer_of(run(core), "it", 0)
        assert (list(found.tokens), found.end.reason) == (plain[:most], "length")
        assert core.stats().drafted == core.stats().accepted == max(0, most - 2 - (most - 2) // 9)


def test_a_cancelled_request_ends_between_two_drafts(plain: list[int]) -> None:
    core = _core(_drafting(plain))
    core.submit(_greedy())
    said = core.step() + core.step()
    core.cancel("it")
    said += run(core)
    found = answer_of(said, "it", 0)
    assert (list(found.tokens), found.end.reason) == (plain[:10], "cancelled")
    assert all_blocks_free(core)


def test_a_rejected_token_is_never_found_in_the_prefix_cache(plain: list[int]) -> None:
    wrong = [(token + 1) % 90 for token in plain]
    core = _core(_drafting(wrong))
    core.submit(_greedy())
    run(core)
    for known, tokens in ((24, [*PROMPT, *plain[:20]]), (4, [*PROMPT, *wrong[:20]])):
        core.submit(_greedy(token_ids=tokens, max_new_tokens=1))
        run(core)
        assert core.stats().cached_prompt_tokens == known
        core._counts["cached_prompt_tokens"] = 0


def test_accepted_tokens_are_found_in_the_prefix_cache(plain: list[int]) -> None:
    core = _core(_drafting(plain))
    core.submit(_greedy())
    run(core)
    core.submit(_greedy(token_ids=[*PROMPT, *plain], max_new_tokens=1))
    run(core)
    assert core.stats().cached_prompt_tokens == 32


def test_a_draft_that_is_always_wrong_changes_neither_steps_nor_preemptions() -> None:
    """Blocks of a draft go back at once, and no sequence gives way to one."""
    for blocks in range(9, 24):
        counts = []
        for speculation in (None, Always(Scripted(lambda _, most: [96] * most), most_drafted=9)):
            core = hash_core(groups_of(None, 8), [blocks, 9], speculation=speculation, prefix_cache=False)
            for number in range(4):
                core.submit(
                    _greedy(
                        str(number),
                        token_ids=[number] * 6,
                        sampling=Sampling(seed=number, logit_bias={96: -100.0}),
                    )
                )
            run(core)
            counts.append((core.stats().steps, core.stats().preempted))
            assert core.stats().accepted == 0
        assert core.stats().drafted > 0
        assert counts[0] == counts[1]
        assert blocks > 20 or counts[0][1] > 0


def test_only_accepted_tokens_are_charged_to_a_tenant(plain: list[int]) -> None:
    for speculation in (None, _drafting(plain), _drafting([96] * 30)):
        core = _core(speculation)
        charge, charged = core.scheduler._charge, []

        def counting(piece, charge=charge, charged=charged):  # type: ignore[no-untyped-def]
            charged.append(charge(piece))
            return charged[-1]

        core.scheduler._charge = counting
        core.submit(_greedy())
        run(core)
        assert sum(charged) == len(PROMPT) + 29


def test_drafts_use_what_a_step_has_left(plain: list[int]) -> None:
    core = _core(_drafting(plain), slots=2, step_tokens=6)
    core.submit(_greedy())
    core.submit(_greedy("long", token_ids=[3] * 60, max_new_tokens=1))
    said = run(core)
    assert tokens_of(said, "it") == plain
    assert max(core.runner.rows) <= 6
    assert core.stats().drafted > 0


def test_a_failure_of_a_step_with_drafts_is_tried_again_without(plain: list[int]) -> None:
    core = _core(_drafting(plain))
    forward = core.runner.forward

    def failing(pieces):  # type: ignore[no-untyped-def]
        if any(piece.start >= len(PROMPT) and piece.rows > 1 for piece in pieces):
            raise MemoryError("too many rows")
        return forward(pieces)

    core.runner.forward = failing
    core.submit(_greedy())
    assert tokens_of(run(core), "it") == plain
    assert core.stats().accepted == 0
    assert core.stats().retried_steps > 20
    assert all_blocks_free(core)


def test_numbers_that_are_not_finite_matter_only_where_a_token_is_drawn(plain: list[int]) -> None:
    core = _core(_drafting([plain[0], 96, 96, 96, *plain[4:]]))
    logits = core.runner.logits

    def broken(rows):  # type: ignore[no-untyped-def]
        found = logits(rows)
        found[2:] = float("nan")  # behind the first wrong token
        return found

    core.runner.logits = broken
    core.submit(_greedy(max_new_tokens=4))
    assert tokens_of(run(core), "it") == plain[:4]


@pytest.mark.parametrize("seed", range(10))
def test_a_grammar_holds_inside_a_draft(seed: int) -> None:
    requests = [
        _greedy(
            grammar=GrammarSpec("start: /(ab|ba|c){2,14}/"),
            sampling=Sampling(temperature=1.0, seed=seed),
            stop_ids=frozenset({STOP_ID}),
        )
    ]
    expected = _expected(groups_of(None), requests)
    core = _core(_oracle_speculation(expected))
    core.submit(requests[0])
    assert answer_of(run(core), "it", 0) == expected["it"][0]
    assert core.stats().accepted > 0


def _oracle_speculation(expected: dict[str, list[Answer]]) -> Speculation:
    return Always(_oracle(expected, list), most_drafted=4)
