"""Limits: what is let in, what is refused and for how long, and that nobody crowds out the others."""

from __future__ import annotations

import heapq
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.errors import OverloadedError, UsageError
from ayllu.server import limits as module
from ayllu.server.limits import Limiter, Limits, duration_text
from ayllu.settings import Settings

WIDE = Limits(
    requests_per_minute=1_000_000,
    tokens_per_minute=1_000_000_000,
    concurrent_requests=100_000,
    queue_requests=100_000,
    queue_tokens=1 << 40,
)


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def limiter(clock: Clock | None = None, **changes: int) -> Limiter:
    return Limiter(Limits(**{**vars(WIDE), **changes}), clock or Clock())


def refused(one: Limiter, user: str = "u", key: str | None = None, **more: object) -> OverloadedError:
    with pytest.raises(OverloadedError) as caught:
        one.admit(user, key, **{"tokens": 1, **more})  # type: ignore[arg-type]
    return caught.value


def test_limits_come_from_the_settings() -> None:
    assert Limits.of(Settings(requests_per_minute=7, queue_tokens=9)) == Limits(7, 1_000_000, 32, 128, 9)


def test_requests_of_a_minute_run_out_and_come_back_evenly() -> None:
    clock = Clock()
    one = limiter(clock, requests_per_minute=6)
    for _ in range(6):
        one.admit("u", None, tokens=1)
    error = refused(one)
    assert "user" in str(error) and "requests_per_minute" in str(error)
    assert error.retry_after_s == 10
    one.admit("other", None, tokens=1)
    clock.now += 10
    one.admit("u", None, tokens=1)
    refused(one)


def test_waiting_for_retry_after_is_always_enough_for_the_same_request() -> None:
    @given(st.integers(1, 50), st.integers(1, 500), st.lists(st.integers(1, 900), min_size=1, max_size=60))
    def hold(requests: int, tokens: int, asked: list[int]) -> None:
        clock = Clock()
        one = limiter(clock, requests_per_minute=requests, tokens_per_minute=tokens)
        for cost in asked:
            try:
                one.admit("u", None, tokens=cost).release()
            except OverloadedError as error:
                assert error.retry_after_s == int(error.retry_after_s) >= 1
                clock.now += error.retry_after_s
                one.admit("u", None, tokens=cost).release()

    hold()


def test_tokens_are_charged_before_the_work_and_given_back_after_it() -> None:
    one = limiter(tokens_per_minute=1000)
    ticket = one.admit("u", None, tokens=900)
    error = refused(one, tokens=200)
    assert "tokens_per_minute" in str(error) and error.retry_after_s == 6
    ticket.settle(100)
    ticket.settle(0)  # once only
    assert ticket.headers()["x-ratelimit-remaining-tokens"] == "900"
    one.admit("u", None, tokens=900)


def test_settling_never_leaves_more_than_the_limit_and_charges_what_was_underestimated() -> None:
    clock = Clock()
    one = limiter(clock, tokens_per_minute=600)
    ticket = one.admit("u", None, tokens=500)
    clock.now += 600
    ticket.settle(0)
    assert ticket.headers()["x-ratelimit-remaining-tokens"] == "600"
    dense = one.admit("u", None, tokens=100)
    dense.settle(300)
    assert dense.headers()["x-ratelimit-remaining-tokens"] == "300"


def test_a_request_larger_than_a_minute_of_tokens_passes_alone_and_leaves_a_debt() -> None:
    clock = Clock()
    one = limiter(clock, tokens_per_minute=100)
    one.admit("u", None, tokens=300)
    assert refused(one).retry_after_s == 121
    clock.now += 121
    one.admit("u", None, tokens=1)


def test_nothing_is_charged_for_what_is_refused() -> None:
    one = limiter(requests_per_minute=2, tokens_per_minute=100, concurrent_requests=1)
    ticket = one.admit("u", None, tokens=50)
    refused(one, tokens=10)
    refused(one, tokens=60)
    assert one.held == 1 and one.held_tokens == 50
    ticket.release()
    one.admit("u", None, tokens=50)


def test_limits_of_a_key_bind_that_key_alone_and_those_of_a_user_all_of_its_keys() -> None:
    one = limiter(requests_per_minute=3)
    one.admit("u", "k1", tokens=1, key_own={"requests_per_minute": 1})
    error = refused(one, key="k1", key_own={"requests_per_minute": 1})
    assert "key" in str(error) and "user" not in str(error)
    one.admit("u", "k2", tokens=1)
    one.admit("u", None, tokens=1)
    assert "user" in str(refused(one, key="k3"))
    one.admit("v", "k4", tokens=1, own={"requests_per_minute": 100})


def test_a_users_own_limits_go_before_the_servers() -> None:
    one = limiter(requests_per_minute=1, concurrent_requests=1)
    own = {"requests_per_minute": 3, "concurrent_requests": 2}
    one.admit("u", None, tokens=1, own=own)
    one.admit("u", None, tokens=1, own=own)
    assert "concurrent_requests) is 2" in str(refused(one, own=own))


def test_limits_can_be_replaced_while_requests_run() -> None:
    one = limiter(requests_per_minute=1)
    held = one.admit("u", None, tokens=1)
    refused(one)
    one.limits = WIDE
    one.admit("u", None, tokens=1).release()
    held.release()
    assert one.held == one.held_tokens == 0


def test_concurrency_ends_with_release_and_release_counts_once() -> None:
    one = limiter(concurrent_requests=2)
    first, second = (one.admit("u", None, tokens=5) for _ in range(2))
    assert "2 requests under way" in str(refused(one))
    first.release()
    first.release()
    one.admit("u", None, tokens=5)
    refused(one)
    second.release()
    assert one.held == 1


def test_a_request_for_more_answers_than_the_limit_passes_when_nothing_else_runs() -> None:
    one = limiter(concurrent_requests=4)
    ticket = one.admit("u", None, tokens=1, answers=16)
    refused(one)
    ticket.release()
    one.admit("u", None, tokens=1)


def test_the_queue_is_bounded_by_requests_and_by_tokens() -> None:
    one = limiter(queue_requests=4, queue_tokens=1000)
    tickets = [one.admit(f"u{number}", None, tokens=10) for number in range(4)]
    assert "queue is full" in str(refused(one, "u9"))
    tickets[0].release()
    one.admit("u9", None, tokens=970)
    tickets[1].release()
    assert "queue is full" in str(refused(one, "u8", tokens=11))
    one.admit("u8", None, tokens=10)


def test_a_request_that_can_never_fit_is_no_overload() -> None:
    with pytest.raises(UsageError, match="max_tokens"):
        limiter(queue_tokens=100).admit("u", None, tokens=101)


def test_retry_after_of_a_full_queue_follows_the_pace_of_completions() -> None:
    clock = Clock()
    one = limiter(clock, queue_requests=40)
    tickets = [one.admit(f"u{number}", None, tokens=1) for number in range(40)]
    unknown = refused(one, "late").retry_after_s
    assert 1 <= unknown <= 60
    for ticket in tickets[:20]:
        clock.now += 3
        ticket.release()
        tickets.append(one.admit(f"v{clock.now}", None, tokens=1))
    assert refused(one, "late").retry_after_s == 3
    clock.now += 10_000
    assert refused(one, "late").retry_after_s == 60


def test_headers_are_openais() -> None:
    clock = Clock()
    one = limiter(clock, requests_per_minute=60, tokens_per_minute=6000)
    assert one.admit("u", None, tokens=650).headers() == {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": "1s",
        "x-ratelimit-limit-tokens": "6000",
        "x-ratelimit-remaining-tokens": "5350",
        "x-ratelimit-reset-tokens": "6.5s",
    }
    tight = one.admit("u", "k", tokens=1, key_own={"requests_per_minute": 2}).headers()
    assert tight["x-ratelimit-limit-requests"] == "2" and tight["x-ratelimit-limit-tokens"] == "6000"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.12, "120ms"), (1, "1s"), (6.5, "6.5s"), (360, "6m0s"), (3723.25, "1h2m3.25s")],
)
def test_durations_read_as_in_openais_headers(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_a_clock_that_stands_still_or_steps_back_gives_nothing_away() -> None:
    clock = Clock()
    one = limiter(clock, requests_per_minute=1)
    one.admit("u", None, tokens=1)
    clock.now -= 500
    refused(one)
    clock.now += 500
    refused(one)


def test_users_without_number_leave_a_bounded_table() -> None:
    clock = Clock()
    one = limiter(clock)
    most = 0
    for number in range(150_000):
        clock.now += 0.01
        one.admit(f"u{number}", None, tokens=1).release()
        most = max(most, len(one))
    assert most <= 200, "idle accounts are forgotten as they become full again"


def test_a_crowd_within_a_minute_is_bounded_too_and_running_requests_are_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "MOST_ACCOUNTS", 100)
    one = limiter(Clock(), requests_per_minute=1)
    kept = one.admit("first", None, tokens=1)
    for number in range(5000):
        one.admit(f"u{number}", None, tokens=1).release()
    assert len(one) <= 102
    refused(one, "first")
    kept.release()
    assert one.held == 0


def served_by_user(
    *, flood: float, others: int, wanted: float, queue: int = 32, service_s: float = 0.5, seconds: float = 80
) -> dict[str, int]:
    """How many requests of each user are served where all compete for `queue` places for 0.5 s each. The
    flooder sends `flood` requests a second whatever it is told; the others send `wanted` a second each, and
    come again when Retry-After says so."""
    rng = random.Random(7)
    clock = Clock()
    one = limiter(clock, queue_requests=queue)
    end = clock.now + seconds
    served: dict[str, int] = {}
    order = 0
    events: list[tuple[float, int, str, object]] = []

    def later(delay: float, kind: str, what: object) -> None:
        nonlocal order
        order += 1
        heapq.heappush(events, (clock.now + delay, order, kind, what))

    later(0, "arrives", "flooder")
    for number in range(others):
        later(5 + rng.random(), "arrives", f"user{number}")
    while events:
        clock.now, _, kind, what = heapq.heappop(events)
        if clock.now > end:
            break
        if kind == "ends":
            what.release()  # type: ignore[attr-defined]
            continue
        user = str(what)
        if kind == "arrives":
            later(rng.uniform(0.5, 1.5) / (flood if user == "flooder" else wanted), "arrives", user)
        try:
            ticket = one.admit(user, None, tokens=10)
        except OverloadedError as error:
            if user != "flooder":
                later(error.retry_after_s * (1 + rng.random() / 4), "again", user)
            continue
        served[user] = served.get(user, 0) + (clock.now > 1020)
        later(rng.uniform(0.5, 1.5) * service_s, "ends", ticket)
    return served


@pytest.mark.parametrize("others", [1, 4, 7])
def test_a_flooding_user_leaves_the_others_four_fifths_of_their_fair_share(others: int) -> None:
    """One user sends 10 times what can be served. Each of the others wants exactly its fair share."""
    capacity = 32 / 0.5
    fair = capacity / (others + 1)
    served = served_by_user(flood=10 * capacity, others=others, wanted=fair)
    assert all(served[f"user{number}"] >= 0.8 * fair * 60 for number in range(others)), served
    assert sum(served.values()) >= 0.9 * capacity * 60, "the places are used all the same"


def test_users_who_want_little_get_all_of_it_beside_a_flood() -> None:
    served = served_by_user(flood=600, others=10, wanted=1)
    assert all(served[f"user{number}"] >= 0.8 * 60 for number in range(10)), served


def test_a_user_alone_may_use_the_whole_queue() -> None:
    one = limiter(queue_requests=8)
    for _ in range(8):
        one.admit("u", None, tokens=1)
    assert "queue is full" in str(refused(one))


def test_the_share_of_tokens_is_fair_too() -> None:
    one = limiter(queue_tokens=1000)
    for _ in range(4):
        one.admit("greedy", None, tokens=100)
    one.admit("modest", None, tokens=10)
    one.admit("greedy", None, tokens=90)
    assert "equal share" in str(refused(one, "greedy", tokens=100))
    one.admit("modest", None, tokens=400)


def test_shares_leave_no_place_unused() -> None:
    one = limiter(queue_requests=128)
    for number in range(128):
        one.admit(f"u{number % 50}", None, tokens=1)
    assert one.held == 128


def test_whoever_was_refused_finds_the_freed_place_still_free() -> None:
    clock = Clock()
    one = limiter(clock, queue_requests=8)
    tickets = [one.admit("greedy", None, tokens=1) for _ in range(8)]
    wait = refused(one, "late").retry_after_s
    tickets.pop().release()
    assert "equal share" in str(refused(one, "greedy"))
    clock.now += wait
    one.admit("late", None, tokens=1)
