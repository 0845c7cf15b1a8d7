"""The scheduler with its block cache: nothing is lost, nothing is mixed up, and everybody gets a turn.

Driven by `FakeEngine`, which checks at every step that limits hold and that each sequence reads its own
content. Three kinds of test: a state machine, a soak that holds every request to the bound that `Scheduler`
states, and single promises.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from ayllu.engine import scheduler as scheduler_module
from ayllu.engine.scheduler import PRIORITY_TOKENS
from ayllu.engine.sequence import Sequence
from ayllu.errors import ContextOverflowError, OverloadedError
from tests.engine.fake_runner import PATCH, FakeEngine, FakeRequest, groups_of

LAYOUTS = [(None,), (None, 8), (None, 4, 16), (8,), (4, 8)]
"""Chunks of the layer groups: global layers alone, as in Llama 4, with two reaches, and no global ones."""


class SchedulerMachine(RuleBasedStateMachine):
    """Requests come, run and go in any order; `FakeEngine` asserts what must hold."""

    @initialize(
        layout=st.sampled_from(LAYOUTS),
        block_tokens=st.sampled_from([1, 2, 4]),
        pools=st.lists(st.integers(4, 24), min_size=3, max_size=3),
        slots=st.integers(1, 4),
        spare_tokens=st.integers(0, 12),
        waiting=st.integers(0, 8),
        piece=st.none() | st.integers(1, 13),
        remembers=st.booleans() | st.just(True),
    )
    def start(self, layout, block_tokens, pools, slots, spare_tokens, waiting, piece, remembers) -> None:
        self.engine = FakeEngine(
            groups_of(*layout),
            pools[: len(layout)],
            block_tokens,
            slots=slots,
            step_tokens=slots + spare_tokens,
            waiting=waiting,
            fixed_piece=None if piece is None else min(piece, spare_tokens + 1),
            remembers=remembers,
        )

    @rule(
        shared=st.integers(0, 24),
        own=st.lists(st.integers(0, 2), max_size=8),
        answer=st.integers(0, 10),
        spare=st.integers(0, 8),
        n=st.sampled_from([1, 1, 1, 2, 3]),
        tenant=st.sampled_from("ab"),
        priority=st.integers(-4, 4),
        adapter=st.sampled_from(["", "", "x"]),
        image=st.none() | st.tuples(st.sampled_from(["cat", "dog"]), st.integers(0, 20), st.integers(1, 5)),
        uses_cached_prefix=st.booleans() | st.just(True),
    )
    def submit(self, shared, own, answer, spare, n, tenant, priority, adapter, image, uses_cached_prefix):
        prompt = [(position * position) % 3 for position in range(shared)] + own or [0]
        images = []
        if image is not None:
            name, start, rows = image
            prompt[start : start + rows] = [PATCH] * rows
            rows = prompt.count(PATCH)
            images = [(f"{name}{rows}", rows)]
        limit = answer + (spare if answer else 0)
        engine, cache = self.engine, self.engine.cache
        reach = [group.chunk or 10_000 for group in cache.groups]
        fits = all(
            -(-min(len(prompt) + limit, most) // cache.block_tokens) <= pool.total
            for most, pool in zip(reach, cache.pools, strict=True)
        )
        room = engine.scheduler.most_waiting + engine.scheduler.slots
        try:
            engine.submit(
                prompt,
                answer,
                limit=limit,
                tenant=tenant,
                priority=priority,
                n=n,
                images=images,
                adapter=adapter,
                uses_cached_prefix=uses_cached_prefix,
            )
            assert fits and len(engine.open) <= room
        except ContextOverflowError:
            assert not fits
        except OverloadedError:
            assert fits and len(engine.open) + n > room

    @precondition(lambda self: self.engine.requests)
    @rule(count=st.integers(1, 6))
    def step(self, count) -> None:
        for _ in range(count):
            self.engine.step()

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def cancel(self, data) -> None:
        self.engine.cancel(data.draw(st.sampled_from(self.engine.requests)))

    @precondition(lambda self: self.engine.requests)
    @rule(data=st.data())
    def fail(self, data) -> None:
        self.engine.step(fails=data.draw(st.sampled_from(self.engine.requests)))

    @rule()
    def forget(self) -> None:
        self.engine.cache.forget_all()

    @invariant()
    def everything_agrees(self) -> None:
        self.engine.check()
        self.engine.cache.check()
        self.engine.read_all()

    def teardown(self) -> None:
        if hasattr(self, "engine"):
            self.engine.run()


TestSchedulerMachine = SchedulerMachine.TestCase
TestSchedulerMachine.settings = settings(max_examples=250, stateful_step_count=50, deadline=None)


@dataclass
class _Wait:
    """One sequence that is first in its line: when that was, and when it could no longer be overtaken."""

    clock: float
    fresh: int
    horizon: float
    tenants: int = 0
    ahead: int | None = None


class WaitingBound:
    """Holds every sequence to the bound in the docstring of `Scheduler`, in tokens computed."""

    def __init__(self, engine: FakeEngine, highest_priority: int) -> None:
        self._engine = engine
        self._head_start = highest_priority * scheduler_module.PRIORITY_TOKENS
        self._waits: dict[Sequence, _Wait] = {}
        self.shares: list[float] = []
        """Of each wait: how much of what was allowed it took."""
        self.outwaited = 0
        """Waits that went on until nobody could overtake any more."""

    def step(self) -> None:
        """A step of the engine, and what it means for those who wait."""
        engine = self._engine
        self._begin_waits()
        tenants = len({sequence.owner.tenant for sequence in engine.open})
        fresh_before = engine.fresh
        engine.step()
        open_now = set(engine.open)
        for sequence, wait in list(self._waits.items()):
            if sequence not in open_now or sequence.cached_tokens is not None:
                self._check(wait, fresh_before)
                del self._waits[sequence]
            elif wait.ahead is None:
                wait.tenants = max(tenants, wait.tenants)
                if engine.scheduler._clock >= wait.horizon:
                    self._check(wait, engine.fresh)
                    wait.ahead, wait.fresh = self._ahead(sequence), engine.fresh
                    self.outwaited += 1
        self._begin_waits()

    def _begin_waits(self) -> None:
        clock, fresh = self._engine.scheduler._clock, self._engine.fresh
        for sequence in self._engine.open:
            if sequence.rank is not None and sequence.cached_tokens is None and sequence not in self._waits:
                self._waits[sequence] = _Wait(clock, fresh, sequence.rank + self._head_start)

    def _check(self, wait: _Wait, fresh: int) -> None:
        allowed = wait.ahead
        if allowed is None:
            overtaken = max(0, wait.horizon - wait.clock) * wait.tenants
            allowed = overtaken + self._engine.scheduler.step_tokens
        assert fresh - wait.fresh <= allowed, "overtaken for longer than promised"
        self.shares.append((fresh - wait.fresh) / max(1, allowed))

    def _ahead(self, sequence: Sequence) -> int:
        """What those who may still go before a sequence may still compute."""
        line = (sequence.owner.tenant, sequence.owner.priority)
        ahead = 0
        for other in self._engine.open:
            before = other.rank is None or other.order < sequence.order
            in_line_behind = other.rank is None and (other.owner.tenant, other.owner.priority) == line
            if other is not sequence and (
                other.tables or (before and not (in_line_behind and not other.leader))
            ):
                ahead += other.limit - other.furthest
        return ahead


def _heavy_tailed(chance: random.Random, median: int, most: int) -> int:
    return max(1, min(most, int(median * chance.paretovariate(1.2) / 1.8)))


def _soak(engine: FakeEngine, requests: int, seed: int, longest: int) -> WaitingBound:
    """Submit so many random requests in bursts, cancel some, run the rest, checking everything on the way."""
    chance = random.Random(seed)
    bound = WaitingBound(engine, highest_priority=4)
    texts = [[chance.randrange(200) for _ in range(longest)] for _ in range(8)]
    accepted = refused = 0
    while accepted < requests:
        burst = chance.choice([0, 0, 1, 1, 2, 3]) if chance.random() < 0.98 else chance.randint(10, 60)
        for _ in range(burst):
            length = _heavy_tailed(chance, 16, longest // 2)
            kept = chance.randint(0, length)
            answer = _heavy_tailed(chance, 6, longest // 3)
            try:
                engine.submit(
                    chance.choice(texts)[:kept] + [chance.randrange(200) for _ in range(length - kept)],
                    answer,
                    limit=answer + chance.choice([0, 0, 1, 20]),
                    tenant=f"tenant {int(6 * chance.random() ** 2)}",
                    priority=chance.choice([-4, 0, 0, 0, 0, 1, 2, 4]),
                    n=chance.choice([1] * 9 + [3]),
                )
                accepted += 1
            except OverloadedError:
                refused += 1
        for _ in range(chance.choice([0, 1, 2, 5])):
            if engine.requests and chance.random() < 0.04:
                engine.cancel(chance.choice(engine.requests))
            if engine.scheduler.has_work:
                bound.step()
    while engine.scheduler.has_work:
        bound.step()
    engine.run()
    assert refused > 0, "the queue was meant to be full at times"
    return bound


@pytest.mark.parametrize(
    ("layout", "blocks", "slots", "piece", "head_start"),
    [
        ((None, 32), (45, 36), 6, None, 64),
        ((None, 32), (45, 36), 6, None, PRIORITY_TOKENS),
        ((None,), (45,), 8, None, 256),
        ((32, 64), (24, 36), 6, 12, 16),
    ],
)
def test_ten_thousand_requests_all_end_within_the_promised_bound(
    layout, blocks, slots, piece, head_start, monkeypatch
) -> None:
    monkeypatch.setattr(scheduler_module, "PRIORITY_TOKENS", head_start)
    engine = FakeEngine(
        groups_of(*layout), blocks, 4, slots=slots, step_tokens=40, waiting=100, fixed_piece=piece
    )
    bound = _soak(engine, 2_500, seed=head_start, longest=140)
    assert bound.outwaited > 5, "some were meant to wait until nobody could overtake them"
    assert max(bound.shares) <= 1
    # Work done again after preemptions stays a fraction of the work, though the pools are far too small.
    assert engine.scheduler.preempted > 10
    assert engine.repeated < 0.2 * engine.fresh


def _prompt(length: int) -> list[int]:
    """One that shares nothing with any other."""
    return [next(_NUMBERS), *[1] * (length - 1)]


_NUMBERS = itertools.count(1000)


def _has_run(request: FakeRequest) -> bool:
    return all(sequence.cached_tokens is not None for sequence in request.answers)


def _steps_until_run(engine: FakeEngine, request: FakeRequest, most: int = 10_000) -> int:
    for steps in range(most):
        if _has_run(request):
            return steps
        engine.step()
    raise AssertionError(f"not let in within {most} steps")


def _let_in_before(engine: FakeEngine, request: FakeRequest, since: int) -> list[FakeRequest]:
    """Whose sequences were let in, after the first `since` of all, before those of `request`."""
    owners = [sequence.owner for sequence in engine.admitted[since:]]
    return owners[: owners.index(request)]


# Turns between tenants.


def test_a_flood_of_long_answers_delays_another_tenant_by_one_round_at_most() -> None:
    # Requests were ranked on arrival by their prompts alone. So a backlog with long answers lay, on paper, in
    # the past of the general clock, and a newcomer had to wait for all of it.
    engine = FakeEngine(slots=2, step_tokens=64)
    for _ in range(300):
        engine.submit(_prompt(4), 60, tenant="flood")
    while len(engine.finished) < 30:
        engine.step()
    before = len(engine.admitted)
    other = engine.submit(_prompt(10), 5, tenant="other")
    _steps_until_run(engine, other)
    assert len(_let_in_before(engine, other, before)) <= 2


def test_one_request_at_a_time_takes_no_more_than_its_share() -> None:
    # A tenant's clock was dropped with its last request: whoever sent one large request after the other
    # always began anew, ahead of everybody who had a queue.
    engine = FakeEngine(slots=1, step_tokens=64)
    for _ in range(2000):
        engine.submit(_prompt(10), 2, tenant="many small")
    work: Counter[str] = Counter()
    large = None
    for _ in range(600):
        if large is None or not large.open:
            large = engine.submit(_prompt(300), 2, tenant="few large")
        for piece in engine.step():
            work[piece.sequence.owner.tenant] += piece.stop - piece.start
    assert abs(work["few large"] - work["many small"]) <= 302


def test_what_nobody_else_wanted_is_no_debt() -> None:
    # The general clock advanced by an equal share for each tenant at work, whether or not it could use it. A
    # busy tenant beside one with a single long answer fell behind all who came later, without bound.
    engine = FakeEngine(slots=4, step_tokens=64)
    engine.submit(_prompt(4), 3000, tenant="slow")
    for _ in range(1500):
        if engine.scheduler.waiting < 2:
            engine.submit(_prompt(60), tenant="busy")
        engine.step()
    before = len(engine.admitted)
    busy = engine.submit(_prompt(60), tenant="busy")
    for _ in range(100):
        engine.submit(_prompt(60), tenant="newcomer")
    _steps_until_run(engine, busy)
    owners = _let_in_before(engine, busy, before)
    assert sum(owner.tenant == "newcomer" for owner in owners) <= 4


def test_tenants_with_queues_get_equal_work_whatever_the_size_of_their_requests() -> None:
    engine = FakeEngine(slots=3, step_tokens=48, blocks=(4000,))
    sizes = {"prompts": (200, 1), "answers": (3, 90), "small": (8, 8)}
    work: Counter[str] = Counter()
    for tenant, (length, answer) in sizes.items():
        for _ in range(12_000 // (length + answer)):
            engine.submit(_prompt(length), answer, limit=1000, tenant=tenant)
    while engine.computed < 24_000:
        for piece in engine.step():
            work[piece.sequence.owner.tenant] += piece.stop - piece.start
    assert max(work.values()) - min(work.values()) <= 3 * 200


def test_stopped_and_cached_prompts_are_not_charged() -> None:
    engine = FakeEngine(slots=1, step_tokens=16)
    system_prompt = _prompt(800)
    for tenant in ("a", "b"):
        engine.submit(system_prompt, tenant=tenant)
    engine.run()
    blocker = engine.submit(_prompt(4), 40, tenant="other")
    engine.step()
    for _ in range(20):
        engine.cancel(engine.submit(_prompt(800), tenant="a"))
        engine.submit(system_prompt, tenant="a")
    before = len(engine.admitted)
    engine.submit(_prompt(10), tenant="b")
    for _ in range(20):
        engine.submit(_prompt(100), tenant="b")
    last = engine.submit(system_prompt, tenant="a")
    _steps_until_run(engine, last)
    assert not blocker.open
    # Twenty prompts of which four tokens each had to be computed are less work than one of a hundred.
    assert sum(owner.tenant == "b" for owner in _let_in_before(engine, last, before)) <= 2


def test_a_prompt_stopped_half_way_is_charged_for_what_was_computed() -> None:
    engine = FakeEngine(slots=1, step_tokens=16)
    engine.submit(_prompt(4), 100, tenant="other")
    stopped = engine.submit(_prompt(800), tenant="a")
    kept = engine.submit(_prompt(4), tenant="a")
    _steps_until_run(engine, stopped)
    engine.step()
    clock = engine.scheduler._tenants["a"].clock
    engine.cancel(stopped)
    assert engine.scheduler._tenants["a"].clock == clock - (800 - 2 * 16)
    assert kept.open


def test_clocks_of_past_tenants_are_forgotten() -> None:
    engine = FakeEngine(slots=4, step_tokens=64, blocks=(3000,))
    engine.submit(_prompt(4), 3000, tenant="stays")
    most = 0
    for number in range(3000):
        engine.submit(_prompt(1 + number % 40), tenant=f"passing {number}")
        if engine.scheduler.waiting >= 3:
            engine.step()
        most = max(most, len(engine.scheduler._tenants))
    assert most <= scheduler_module.FEW_TENANTS + 1
    engine.run()
    assert not engine.scheduler._tenants


def test_clocks_ahead_of_all_are_kept_for_a_while_and_then_looked_through(monkeypatch) -> None:
    monkeypatch.setattr(scheduler_module, "FEW_TENANTS", 10)
    engine = FakeEngine(slots=2, step_tokens=64, blocks=(3000,))
    engine.submit(_prompt(4), 3000, tenant="stays")
    most = 0
    for number in range(800):
        # Sixty tenants at work make the clock of all slow: each leaves with its own ahead of it.
        while len(engine.open) < 60:
            engine.submit(_prompt(1 + number % 50), tenant=f"passing {number} {len(engine.open)}")
        engine.step()
        most = max(most, len(engine.scheduler._tenants))
    assert 70 < most < 200


def test_a_tenant_that_asks_for_little_saves_nothing_up() -> None:
    engine = FakeEngine(slots=3, step_tokens=48, blocks=(3000,))
    engine.submit(_prompt(4), 4000, tenant="saver")
    for _ in range(1000):
        if engine.scheduler.waiting < 3:
            engine.submit(_prompt(60), 3, tenant="busy")
        engine.step()
    for tenant in ("saver", "busy"):
        for _ in range(40):
            engine.submit(_prompt(60), 3, tenant=tenant)
    before = len(engine.admitted)
    while len(engine.admitted) < before + 30:
        engine.step()
    savers = sum(sequence.owner.tenant == "saver" for sequence in engine.admitted[before:])
    assert 10 <= savers <= 18


def test_answers_computed_again_after_a_preemption_are_not_charged_again() -> None:
    engine = FakeEngine(slots=3, step_tokens=16, blocks=(20,), remembers=False)
    sequences = [
        *engine.submit(_prompt(8), 40, tenant="a").open,
        *engine.submit(_prompt(8), 40, tenant="b").open,
    ]
    clock = 0.0
    while engine.open:
        clock = max([clock, *(tenant.clock for tenant in engine.scheduler._tenants.values())])
        engine.step()
    assert sequences[1].preemptions > 0
    # Each of them computed all its tokens but the last once.
    assert clock <= 8 + 40


# Priorities.


def test_a_higher_priority_goes_before_the_backlog_of_its_own_tenant() -> None:
    # The head start was counted from the end of the tenant's own queue, so that a question came after all but
    # the last few requests of a batch.
    engine = FakeEngine(slots=2, step_tokens=64)
    for _ in range(300):
        engine.submit(_prompt(400), 20)
    for _ in range(50):
        engine.step()
    before = len(engine.admitted)
    urgent = engine.submit(_prompt(10), 5, priority=1)
    _steps_until_run(engine, urgent)
    assert not _let_in_before(engine, urgent, before)


def test_a_batch_of_low_priority_that_ran_alone_has_not_used_up_the_head_start_of_others() -> None:
    engine = FakeEngine(slots=1, step_tokens=64, blocks=(2000,))
    for _ in range(100):
        engine.submit(_prompt(400), 4, tenant="batch", priority=-1)
    while len(engine.admitted) < 20:
        engine.step()
    before = len(engine.admitted)
    for _ in range(30):
        engine.submit(_prompt(400), 4, tenant="questions")
    while len(engine.admitted) < before + 30:
        engine.step()
    assert {sequence.owner.tenant for sequence in engine.admitted[before:]} == {"questions"}


@pytest.mark.parametrize("tenants", [("a", "a"), ("a", "b")])
def test_low_priority_gets_its_turn_under_a_stream_of_high_priority(tenants) -> None:
    engine = FakeEngine(slots=1, step_tokens=64, blocks=(2000,))
    high, low = tenants
    for _ in range(3):
        engine.submit(_prompt(60), 4, tenant=low, priority=-1)
    started = []
    while len(started) < 3:
        while engine.scheduler.waiting < 5:
            engine.submit(_prompt(60), 4, tenant=high, priority=1)
        engine.step()
        lows = [s for s in engine.admitted if s.owner.priority == -1]
        started += [engine.fresh] * (len(lows) - len(started))
    assert started[0] > PRIORITY_TOKENS, "no head start at all"
    # Two levels of head start, for each of the tenants at work; then one after the other of its line.
    within = 2 * PRIORITY_TOKENS * len(set(tenants)) + 1000
    assert started[0] <= within
    assert started[1] - started[0] <= within
    assert started[2] - started[1] <= within


def test_equal_requests_of_one_tenant_keep_their_order() -> None:
    engine = FakeEngine(slots=3, step_tokens=16)
    chance = random.Random(1)
    sent = []
    for _ in range(200):
        request = engine.submit(_prompt(chance.randint(1, 40)), chance.randint(1, 9), limit=20)
        sent.append(request)
        if chance.random() < 0.2:
            engine.cancel(chance.choice(engine.requests))
        engine.step()
    engine.run()
    order = [sequence.number for sequence in engine.admitted]
    assert order == sorted(order)
    assert len(order) > 150


# Long and short, large and small.


def test_huge_prompts_do_not_keep_short_ones_from_their_first_token() -> None:
    engine = FakeEngine(slots=8, step_tokens=64, blocks=(10_000,))
    for _ in range(3):
        engine.submit(_prompt(9000))
        engine.step()
    short = [engine.submit(_prompt(8)) for _ in range(3)]
    for _ in range(2):
        pieces = engine.step()
        assert sum(piece.stop - piece.start for piece in pieces) == 64, "what a short one leaves is used"
    assert not any(request.open for request in short)
    assert engine.scheduler.running == 3


def test_a_large_request_is_not_starved_by_small_ones() -> None:
    engine = FakeEngine(slots=4, step_tokens=16, blocks=(20,))
    for _ in range(4):
        engine.submit(_prompt(4), 12)
    for _ in range(3):
        engine.step()
    large = engine.submit(_prompt(70), 4)
    before = len(engine.admitted)
    for _ in range(40):
        engine.submit(_prompt(4), 12)
    _steps_until_run(engine, large)
    assert not _let_in_before(engine, large, before)
    engine.run()


def test_one_token_prompts_and_cached_prompts_are_computed_in_the_step_that_lets_them_in() -> None:
    # They are one token short, as running answers are, and the step had been planned for those already: the
    # first step of an idle engine computed nothing.
    engine = FakeEngine()
    engine.submit([5])
    assert len(engine.step()) == 1
    prompt = _prompt(13)
    engine.submit(prompt, 2)
    engine.run()
    engine.submit(prompt)
    assert [(piece.start, piece.stop) for piece in engine.step()] == [(12, 13)]


# Several answers to one prompt.


def test_followers_start_after_the_prompt_and_find_it_in_the_cache() -> None:
    engine = FakeEngine(slots=8, step_tokens=32)
    request = engine.submit(_prompt(100), 3, n=4)
    while not request.open[0].prompt_done:
        assert engine.scheduler.running <= 1
        engine.step()
    engine.run()
    # The prompt once; its last, unfilled block three times more; two more tokens of each answer.
    assert engine.computed == 100 + 3 * 4 + 4 * 2
    assert [sequence.cached_tokens for sequence in engine.admitted] == [0, 96, 96, 96]


def test_waiting_followers_hold_up_nobody() -> None:
    engine = FakeEngine(slots=8, step_tokens=32)
    engine.submit(_prompt(2000), n=3)
    engine.step()
    short = engine.submit(_prompt(5))
    assert _steps_until_run(engine, short) <= 1
    engine.run()


def test_followers_go_first_in_their_line_one_by_one() -> None:
    engine = FakeEngine(slots=1, step_tokens=32)
    several = engine.submit(_prompt(40), 2, n=3, tenant="a")
    rest = [engine.submit(_prompt(40), 2, tenant="a") for _ in range(2)]
    other = [engine.submit(_prompt(40), 2, tenant="b") for _ in range(2)]
    engine.run()
    owners = [sequence.owner for sequence in engine.admitted]
    assert owners[:3].count(several) == 2
    assert owners.index(other[0]) <= 2, "they go before other tenants"
    assert [owner for owner in owners if owner in rest] == rest


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_followers_go_on_without_their_leader(steps) -> None:
    engine = FakeEngine(slots=2, step_tokens=8)
    request = engine.submit(_prompt(40), 2, n=3)
    for _ in range(steps):
        engine.step()
    engine._remove(request.open[0])
    engine.run()
    assert len(engine.finished) == 2


@pytest.mark.parametrize("steps", [0, 1, 3, 8])
def test_cancelling_a_leader_with_its_followers_leaves_nothing(steps) -> None:
    engine = FakeEngine(slots=3, step_tokens=8)
    request = engine.submit(_prompt(40), 8, n=4)
    for _ in range(steps):
        engine.step()
    engine.cancel(request)
    engine.run(most_steps=0)
    later = engine.submit(_prompt(4))
    engine.step()
    assert not later.open


# Limits.


@pytest.mark.parametrize(
    ("layout", "blocks", "longest"),
    [
        ((None,), (10,), 40),
        ((None, 16), (10, 4), 40),
        ((None, 16), (10, 3), 12),
        ((16,), (3,), 12),
        ((16,), (4,), 1_000_000),
        ((8, 16), (2, 4), 1_000_000),
        ((8, 16), (1, 4), 4),
    ],
)
def test_the_longest_request_that_fits_can_run_and_one_token_more_is_refused(layout, blocks, longest) -> None:
    engine = FakeEngine(groups_of(*layout), blocks, 4, slots=2, step_tokens=8)
    engine.scheduler.require_fit(longest)
    if longest < 1000:
        with pytest.raises(ContextOverflowError, match=f"may grow to {longest + 1} tokens"):
            engine.scheduler.require_fit(longest + 1)
    length = min(longest, 100)
    engine.submit([1] * (length // 2), length - length // 2)
    engine.submit([2] * length, 0)
    engine.run()


def test_a_full_queue_refuses_and_says_so() -> None:
    engine = FakeEngine(slots=2, step_tokens=8, waiting=3)
    for _ in range(5):
        engine.submit(_prompt(4), 4)
    with pytest.raises(OverloadedError, match="5 sequences wait, at most 3 may"):
        engine.submit(_prompt(4))
    engine.step()
    assert (engine.scheduler.waiting, engine.scheduler.running) == (3, 2)
    with pytest.raises(OverloadedError):
        engine.submit(_prompt(4))
    engine.cancel(engine.requests[-1])
    with pytest.raises(OverloadedError):
        engine.submit(_prompt(4), n=2)
    engine.submit(_prompt(4))
    engine.run()


def test_more_answers_than_can_ever_be_open_are_told_how_many_can() -> None:
    # "Try again later" would never have helped.
    engine = FakeEngine(slots=2, step_tokens=8, waiting=3)
    engine.scheduler.require_room(5)
    with pytest.raises(OverloadedError, match="Ask for at most 5 answers at once"):
        engine.scheduler.require_room(6)


def test_preempted_sequences_do_not_count_as_refused_room() -> None:
    engine = FakeEngine(slots=4, step_tokens=16, waiting=0, blocks=(12,))
    requests = [engine.submit(_prompt(4), 30) for _ in range(4)]
    while not engine.scheduler.preempted:
        engine.step()
    assert engine.scheduler.waiting == 1
    with pytest.raises(OverloadedError):
        engine.submit(_prompt(4))
    engine.run()
    assert len(engine.finished) == len(requests)


# Giving way.


def test_the_last_in_the_order_gives_way_and_goes_on_where_it_was() -> None:
    engine = FakeEngine(slots=2, step_tokens=16, blocks=(16,))
    first, second = engine.submit(_prompt(8), 40), engine.submit(_prompt(8), 40)
    engine.run()
    (one,), (two,) = first.answers, second.answers
    assert (one.preemptions, two.preemptions) == (0, 1)
    assert engine.finished == [one, two]
    # Its beginning was still remembered where the first had not needed the blocks.
    assert engine.repeated < len(two.tokens)


@pytest.mark.parametrize("remembers", [True, False])
@pytest.mark.parametrize("layout", [(None,), (None, 16), (16,)])
def test_growing_answers_in_far_too_small_pools_do_not_thrash(layout, remembers) -> None:
    engine = FakeEngine(
        groups_of(*layout), [18] * len(layout), 2, slots=6, step_tokens=24, remembers=remembers
    )
    for _ in range(30):
        engine.submit(_prompt(6), 30)
    engine.run()
    assert engine.repeated < engine.fresh
    assert max(sequence.preemptions for sequence in engine.finished) <= 6


def test_nobody_is_let_in_on_blocks_that_are_promised() -> None:
    engine = FakeEngine(slots=2, step_tokens=8, blocks=(12,))
    engine.submit(_prompt(40))
    engine.step()
    # 10 blocks will be needed, 2 are held: 10 are free, and yet there is room for no more than 2.
    late = engine.submit(_prompt(9))
    while engine.scheduler.running == 1 and engine.open[0].remaining > 1:
        assert not _has_run(late)
        engine.step()
    engine.run()
    assert engine.scheduler.preempted == 0


def test_nobody_is_let_in_just_to_give_way_to_an_answer_that_needs_its_next_block() -> None:
    engine = FakeEngine(slots=2, step_tokens=32, blocks=(6,))
    engine.submit(_prompt(7), 6)
    engine.step()
    engine.submit(_prompt(16), 8)
    engine.run()
    assert engine.scheduler.preempted == 0


def test_requests_that_fill_the_cache_exactly_run_together() -> None:
    engine = FakeEngine(slots=2, step_tokens=32, blocks=(4,))
    for _ in range(2):
        engine.submit(_prompt(5), 3)
    engine.step()
    assert engine.scheduler.running == 2
    engine.run()
    assert engine.scheduler.preempted == 0


@pytest.mark.parametrize(
    ("step_tokens", "block_tokens", "blocks", "lengths"),
    # The later prompt has no piece yet in this step, or has one already.
    [(5, 4, 52, (90, 90)), (13, 2, 89, (86, 69))],
)
def test_a_prompt_that_lacks_blocks_takes_those_of_a_later_one_within_the_step(
    step_tokens, block_tokens, blocks, lengths
) -> None:
    engine = FakeEngine(slots=3, step_tokens=step_tokens, blocks=(blocks,), block_tokens=block_tokens)
    # An answer that grows past what was promised to it while two long prompts are read.
    answer = engine.submit(_prompt(8), 90)
    for _ in range(3):
        engine.step()
    first, second = (engine.submit(_prompt(length)) for length in lengths)
    (later,) = second.open
    while not engine.scheduler.preempted:
        pieces = engine.step()
        assert engine.scheduler.has_work
    assert [piece.sequence.owner for piece in pieces] == [answer, first]
    assert later.preemptions == 1
    engine.run()


# Pieces at fixed places.


def test_fixed_pieces_get_on_with_the_smallest_budget() -> None:
    engine = FakeEngine(slots=4, step_tokens=8, fixed_piece=5)
    for _ in range(6):
        engine.submit(_prompt(23), 6)
    engine.run()


def test_fixed_pieces_cut_at_a_border_are_remembered_too() -> None:
    # The blocks between the last multiple of the piece and a chunk's border were never remembered, so that no
    # prompt was found beyond it.
    engine = FakeEngine(groups_of(None, 16), (100, 50), 4, slots=1, step_tokens=12, fixed_piece=12)
    prompt = _prompt(60)
    engine.submit(prompt)
    engine.run()
    engine.submit(prompt)
    engine.run()
    assert engine.admitted[-1].cached_tokens == 48


def test_a_prompts_last_fixed_piece_is_not_remembered() -> None:
    engine = FakeEngine(slots=1, step_tokens=12, fixed_piece=12)
    prompt = _prompt(22)
    engine.submit(prompt, 4)
    engine.run()
    # Tokens 12 to 20 fill two blocks, but a longer prompt would compute them in one piece up to 24.
    engine.submit([*prompt, 7, 7, 7])
    engine.run()
    assert engine.admitted[-1].cached_tokens == 12


# The prefix cache at work.


def test_a_shared_beginning_is_computed_once_and_only_within_tenant_adapter_and_images() -> None:
    engine = FakeEngine()
    image = [("cat", 8)]
    prompt = [7, *[PATCH] * 8, *range(100, 130)]

    def computed(**options) -> int:
        before = engine.computed
        engine.submit(prompt, **({"images": image} | options))
        engine.run()
        return engine.computed - before

    assert computed() == len(prompt)
    assert computed() == len(prompt) - 36
    assert computed(tenant="other") == len(prompt)
    assert computed(adapter="x") == len(prompt)
    assert computed(images=[("dog", 8)]) == len(prompt)
    assert computed(images=[("half a cat", 4), ("half a cat", 4)]) == len(prompt)
    assert computed(uses_cached_prefix=False) == len(prompt)
    engine.cache.forget_all()
    assert computed() == len(prompt)
    silent = FakeEngine(remembers=False)
    silent.submit(prompt, n=2)
    silent.run()
    assert silent.computed == 2 * len(prompt)


def test_a_prefix_is_found_only_while_the_chunk_it_ends_in_is_whole() -> None:
    engine = FakeEngine(groups_of(None, 16), (100, 5), 4, slots=1, step_tokens=16)
    prompt = _prompt(44)
    engine.submit(prompt)
    engine.run()
    # The chunk layers have five blocks and kept the last chunk's two full ones and more of those before.
    engine.submit(prompt)
    engine.run()
    assert engine.admitted[-1].cached_tokens == 40
    # Another prompt takes their blocks. What needs none of them is the border where their chunk begins.
    engine.submit(_prompt(20), 1)
    engine.run()
    engine.submit(prompt)
    engine.run()
    assert engine.admitted[-1].cached_tokens == 32
