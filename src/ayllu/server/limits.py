"""Who may start how much: requests and tokens per minute, requests at a time, and one queue shared fairly.

A user has two buckets that fill up evenly, and so has a key with limits of its own; everything is charged
before the work and settled after it. The queue bounds what is in flight for all; once it is more than half
full, nobody takes more of it than an equal share among those who want in. For the event loop's thread alone.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from ayllu.errors import OverloadedError, UsageError
from ayllu.settings import Settings

LIMIT_NAMES = ("requests_per_minute", "tokens_per_minute", "concurrent_requests")
"""What a user or a key may have limits of its own for."""

MINUTE_S = 60.0
MOST_ACCOUNTS = 100_000
FORGOTTEN_PER_REQUEST = 4
MOST_WAITING = 10_000
RETURN_GRACE_S = 5.0
"""A refused user counts as wanting in for Retry-After and this long."""

MOST_RETRY_AFTER_S = 60
UNKNOWN_RETRY_AFTER_S = 5.0
REMEMBERED_COMPLETIONS = 64
LARGEST_SHARE = 4
"""A request with many answers takes at most the queue's 1/LARGEST_SHARE, or it would never find room."""


@dataclass(frozen=True)
class Limits:
    """The limits of every user, and those of the queue."""

    requests_per_minute: int
    tokens_per_minute: int
    concurrent_requests: int
    queue_requests: int
    queue_tokens: int

    @classmethod
    def of(cls, settings: Settings) -> Limits:
        """As the settings say."""
        return cls(
            requests_per_minute=settings.requests_per_minute,
            tokens_per_minute=settings.tokens_per_minute,
            concurrent_requests=settings.concurrent_requests,
            queue_requests=settings.queue_requests,
            queue_tokens=settings.queue_tokens,
        )


class _Bucket:
    """What was spent and is not yet forgiven; it drains at `per_minute` a minute.

    A charge larger than the bucket passes when nothing is spent, and leaves a debt.
    """

    __slots__ = ("_at", "_spent", "per_minute")

    def __init__(self, now: float) -> None:
        self.per_minute = 1
        self._spent = 0.0
        self._at = now

    def spent(self, now: float) -> float:
        elapsed = max(0.0, now - self._at)
        self._spent = max(0.0, self._spent - elapsed * self.per_minute / MINUTE_S)
        self._at = max(now, self._at)
        return self._spent

    def limit(self, per_minute: int, now: float) -> None:
        """The limit from now on; what is already spent stays spent."""
        if per_minute != self.per_minute:
            self.spent(now)
            self.per_minute = per_minute

    def wait_s(self, amount: float, now: float) -> float:
        """Seconds until `amount` may be charged; 0: now."""
        excess = self.spent(now) + min(amount, self.per_minute) - self.per_minute
        return max(0.0, excess * MINUTE_S / self.per_minute)

    def charge(self, amount: float, now: float) -> None:
        """Negative to give back; never more than was spent."""
        self._spent = max(0.0, self.spent(now) + amount)

    def remaining(self, now: float) -> int:
        return max(0, math.floor(self.per_minute - self.spent(now) + 1e-9))

    def reset_s(self, now: float) -> float:
        """Seconds until nothing is spent any more."""
        return self.spent(now) * MINUTE_S / self.per_minute


class _Account:
    """What one user, or one key, has spent and holds."""

    __slots__ = ("held", "held_tokens", "requests", "tokens")

    def __init__(self, now: float) -> None:
        self.requests = _Bucket(now)
        self.tokens = _Bucket(now)
        self.held = 0
        self.held_tokens = 0

    def is_idle(self, now: float) -> bool:
        """Whether a new account would be no different."""
        return not self.held and not self.requests.spent(now) and not self.tokens.spent(now)


@dataclass(frozen=True)
class _Charge:
    """A request as one account sees it, and the limits that the account has (None: none of its own)."""

    account: _Account
    owner: str
    requests_per_minute: int | None
    tokens_per_minute: int | None
    concurrent_requests: int | None


class _Completions:
    """How fast places and tokens came free of late."""

    def __init__(self) -> None:
        self._ended: deque[tuple[float, int, int]] = deque(maxlen=REMEMBERED_COMPLETIONS)

    def add(self, now: float, places: int, tokens: int) -> None:
        self._ended.append((now, places, tokens))

    def wait_s(self, now: float, places: int, tokens: int) -> float:
        """Seconds until so many places and tokens will have come free, at the pace of the last ones."""
        if len(self._ended) < 2:
            return UNKNOWN_RETRY_AFTER_S
        # Up to now, not up to the last one: where nothing ends any more, the pace falls.
        seconds = max(now - self._ended[0][0], 1e-3)
        freed = list(self._ended)[1:]
        waits = [
            wanted * seconds / max(1, sum(free))
            for wanted, free in (
                (places, (one[1] for one in freed)),
                (tokens, (one[2] for one in freed)),
            )
            if wanted > 0
        ]
        return max(waits, default=0.0)


class Ticket:
    """A request that was let in. `settle` when its tokens are known, `release` when it has ended."""

    def __init__(
        self, limiter: Limiter, user_id: str, charges: tuple[_Charge, ...], places: int, tokens: int
    ) -> None:
        self._limiter = limiter
        self._charges = charges
        self._settled = False
        self._released = False
        self.user_id = user_id
        self.places = places
        self.tokens = tokens

    def settle(self, used_tokens: int) -> None:
        """Give back what was charged too much; what was charged too little is charged now. Once only."""
        if self._settled:
            return
        self._settled = True
        now = self._limiter.clock()
        for charge in self._charges:
            if charge.tokens_per_minute is not None:
                charge.account.tokens.charge(max(0, used_tokens) - self.tokens, now)

    def release(self) -> None:
        """The request no longer runs. Idempotent."""
        if not self._released:
            self._released = True
            self._limiter._release(self, self._charges)

    def headers(self) -> dict[str, str]:
        """OpenAI's rate limit headers: of the limit that leaves less, where user and key have one."""
        now = self._limiter.clock()
        found: dict[str, str] = {}
        for kind in ("requests", "tokens"):
            buckets: list[_Bucket] = [
                getattr(charge.account, kind)
                for charge in self._charges
                if getattr(charge, f"{kind}_per_minute") is not None
            ]
            tightest = min(buckets, key=lambda bucket: bucket.remaining(now))
            found[f"x-ratelimit-limit-{kind}"] = str(tightest.per_minute)
            found[f"x-ratelimit-remaining-{kind}"] = str(tightest.remaining(now))
            found[f"x-ratelimit-reset-{kind}"] = duration_text(tightest.reset_s(now))
        return found


class Limiter:
    """Lets requests in, or says when to come again. `limits` may be replaced at any time."""

    def __init__(self, limits: Limits, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits
        self.clock = clock
        self.held = 0
        self.held_tokens = 0
        self._accounts: OrderedDict[tuple[str, str], _Account] = OrderedDict()
        self._holders: dict[str, _Account] = {}
        self._wanting: OrderedDict[str, float] = OrderedDict()
        self._pruned_at = -math.inf
        self._completions = _Completions()

    def __len__(self) -> int:
        """How many users and keys are remembered."""
        return len(self._accounts)

    def admit(
        self,
        user_id: str,
        key_id: str | None,
        *,
        tokens: int,
        own: Mapping[str, int] = {},
        key_own: Mapping[str, int] = {},
        answers: int = 1,
    ) -> Ticket:
        """Let a request in and charge it. tokens: what it may read and make at most; answers: how many it
        asks for. own, key_own: limits of this user and of this key, by LIMIT_NAMES.

        Raises OverloadedError, saying which limit it was and when it will pass; UsageError for a request that
        never will. Nothing is charged then.
        """
        now = self.clock()
        tokens = max(0, tokens)
        if tokens > self.limits.queue_tokens:
            raise UsageError(
                f"The request may take {tokens} tokens; queue_tokens is {self.limits.queue_tokens}.",
                "Ask for fewer answers, or set a smaller max_tokens.",
            )
        self._forget_idle(now)
        answers = max(1, answers)
        charges = self._charges(user_id, key_id, own, key_own, now)
        for charge in charges:
            _require_buckets(charge, tokens, now)
        for charge in charges:
            self._require_concurrency(charge, answers, now)
        places = min(answers, max(1, self.limits.queue_requests // LARGEST_SHARE))
        self._require_queue(user_id, charges[0].account, places, tokens, now)
        for charge in charges:
            if charge.requests_per_minute is not None:
                charge.account.requests.charge(1, now)
            if charge.tokens_per_minute is not None:
                charge.account.tokens.charge(tokens, now)
            charge.account.held += places
            charge.account.held_tokens += tokens
        self.held += places
        self.held_tokens += tokens
        self._holders[user_id] = charges[0].account
        self._wanting.pop(user_id, None)
        return Ticket(self, user_id, charges, places, tokens)

    def require_room(self, user_id: str) -> None:
        """Raises what `admit` would for the smallest request of this user, where the queue is the reason.
        Charges nothing, and knows nothing of who that is but the id."""
        now = self.clock()
        account = self._accounts.get(("user", user_id)) or _Account(now)
        self._require_queue(user_id, account, 1, 0, now)

    def _charges(
        self,
        user_id: str,
        key_id: str | None,
        own: Mapping[str, int],
        key_own: Mapping[str, int],
        now: float,
    ) -> tuple[_Charge, ...]:
        limits = [own.get(name, getattr(self.limits, name)) for name in LIMIT_NAMES]
        charges = [_Charge(self._account("user", user_id, now), "user", *limits)]
        if key_id is not None and any(name in key_own for name in LIMIT_NAMES):
            key_limits = [key_own.get(name) for name in LIMIT_NAMES]
            charges.append(_Charge(self._account("key", key_id, now), "key", *key_limits))
        for charge in charges:
            if charge.requests_per_minute is not None:
                charge.account.requests.limit(charge.requests_per_minute, now)
            if charge.tokens_per_minute is not None:
                charge.account.tokens.limit(charge.tokens_per_minute, now)
        return tuple(charges)

    def _account(self, kind: str, name: str, now: float) -> _Account:
        account = self._accounts.get((kind, name))
        if account is None:
            account = self._accounts[kind, name] = _Account(now)
        else:
            self._accounts.move_to_end((kind, name))
        return account

    def _forget_idle(self, now: float) -> None:
        """A few of the longest unused, for each request: the table shrinks faster than it can grow."""
        for _ in range(min(FORGOTTEN_PER_REQUEST, len(self._accounts))):
            oldest, account = next(iter(self._accounts.items()))
            crowded = len(self._accounts) > MOST_ACCOUNTS and not account.held
            if crowded or account.is_idle(now):
                del self._accounts[oldest]
            else:
                self._accounts.move_to_end(oldest)

    def _require_concurrency(self, charge: _Charge, answers: int, now: float) -> None:
        """Whoever holds nothing may start, however many answers the one request asks for."""
        limit, held = charge.concurrent_requests, charge.account.held
        if limit is None or held == 0 or held + answers <= limit:
            return
        wait = self._completions.wait_s(now, 1, 0) * max(1, self.held) / held
        raise OverloadedError(
            f"This {charge.owner} has {held} requests under way; the limit (concurrent_requests) is {limit}.",
            "Wait for one of them to end.",
            retry_after_s=_whole_seconds(wait),
        )

    def _require_queue(self, user_id: str, account: _Account, places: int, tokens: int, now: float) -> None:
        limits = self.limits
        lacking = self.held + places - limits.queue_requests
        lacking_tokens = self.held_tokens + tokens - limits.queue_tokens
        is_full = self.held > 0 and (lacking > 0 or lacking_tokens > 0)
        if not is_full and (
            account.held == 0 or self._is_fair(account, places, tokens, self._active(user_id, now))
        ):
            return
        wait = _whole_seconds(self._completions.wait_s(now, max(1, lacking), max(0, lacking_tokens)))
        self._want(user_id, now + wait + RETURN_GRACE_S)
        if is_full:
            raise OverloadedError(
                f"The queue is full ({self.held} requests, {self.held_tokens} tokens under way).",
                "Try again later.",
                retry_after_s=wait,
            )
        raise OverloadedError(
            "The queue is more than half full, and this user has an equal share of it already.",
            "Try again when one of its requests has ended.",
            retry_after_s=wait,
        )

    def _is_fair(self, account: _Account, places: int, tokens: int, active: int) -> bool:
        """Equal shares bind once the queue is more than half full."""
        limits = self.limits
        is_crowded = self.held + places > limits.queue_requests // 2
        if is_crowded and account.held + places > math.ceil(limits.queue_requests / active):
            return False
        is_crowded = self.held_tokens + tokens > limits.queue_tokens // 2
        return not is_crowded or account.held_tokens + tokens <= math.ceil(limits.queue_tokens / active)

    def _active(self, user_id: str, now: float) -> int:
        """How many users share the queue: who holds some of it, and who was refused and will come again."""
        if now - self._pruned_at >= 1.0:
            self._pruned_at = now
            for name in [name for name, until in self._wanting.items() if until < now]:
                del self._wanting[name]
        wanting = self._wanting
        return len(wanting) + sum(name not in wanting for name in {*self._holders, user_id})

    def _want(self, user_id: str, until: float) -> None:
        self._wanting[user_id] = until
        self._wanting.move_to_end(user_id)
        while len(self._wanting) > MOST_WAITING:
            self._wanting.popitem(last=False)

    def _release(self, ticket: Ticket, charges: tuple[_Charge, ...]) -> None:
        for charge in charges:
            charge.account.held -= ticket.places
            charge.account.held_tokens -= ticket.tokens
        self.held -= ticket.places
        self.held_tokens -= ticket.tokens
        if charges[0].account.held == 0:
            self._holders.pop(ticket.user_id, None)
        self._completions.add(self.clock(), ticket.places, ticket.tokens)


def _require_buckets(charge: _Charge, tokens: int, now: float) -> None:
    account = charge.account
    refusals = [
        (bucket.wait_s(amount, now), kind, limit)
        for kind, limit, bucket, amount in (
            ("requests", charge.requests_per_minute, account.requests, 1),
            ("tokens", charge.tokens_per_minute, account.tokens, tokens),
        )
        if limit is not None
    ]
    wait, kind, limit = max(refusals, default=(0.0, "", 0))
    if wait > 0:
        raise OverloadedError(
            f"This {charge.owner} has used its {kind} for now; the limit ({kind}_per_minute) is {limit}.",
            f"Try again in {duration_text(math.ceil(wait))}.",
            retry_after_s=math.ceil(wait),
        )


def _whole_seconds(wait: float) -> int:
    return min(MOST_RETRY_AFTER_S, max(1, math.ceil(wait)))


def duration_text(seconds: float) -> str:
    """A duration as OpenAI's headers have it: 0s, 120ms, 6.5s, 6m0s, 1h2m3s."""
    milliseconds = math.ceil(seconds * 1000 - 1e-6)
    if milliseconds <= 0:
        return "0s"
    if milliseconds < 1000:
        return f"{milliseconds}ms"
    whole, rest = divmod(milliseconds, 1000)
    minutes, whole = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    fraction = f".{rest:03}".rstrip("0") if rest else ""
    head = (f"{hours}h" if hours else "") + (f"{minutes}m" if hours or minutes else "")
    return f"{head}{whole}{fraction}s"
