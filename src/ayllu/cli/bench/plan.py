"""What one benchmark measures: the quantities, and the jobs that every contender gets in a round.

All contenders of a round get the same token ids, drawn anew for each round, because several of them remember
the beginnings of prompts.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

SHORT_PROMPT = 16
"""Tokens of the prompt for the first token and of each client's."""

FIRST_TOKEN, PREFILL, DECODE, CLIENTS = "first_token", "prefill", "decode", "clients"


@dataclass(frozen=True)
class Measure:
    """One quantity. `key` is its name in JSON; `better` says in which direction an engine wins."""

    key: str
    label: str
    unit: str
    better: str

    @property
    def higher_is_better(self) -> bool:
        return self.better == "higher"


@dataclass(frozen=True)
class Job:
    """What a runner is asked to do: answer these prompts (token ids) at the same time, `new_tokens` each.

    kind: what it is for, so that a program with a benchmark of its own can use that.
    """

    kind: str
    key: str
    prompts: tuple[tuple[int, ...], ...]
    new_tokens: int
    depth: int = 0


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """Sizes of one benchmark, in tokens. depths: tokens already in the cache when decoding begins (0: one).
    clients: numbers of requests at the same time."""

    threads: int
    prefill: tuple[int, ...] = (512,)
    decode: int = 128
    depths: tuple[int, ...] = (0, 512)
    clients: tuple[int, ...] = ()
    rounds: int = 5

    @property
    def context(self) -> int:
        """Tokens that the longest job of a single request needs."""
        longest = max((*self.prefill, *(depth + self.decode for depth in self.depths)), default=0)
        return max(longest, SHORT_PROMPT) + 16

    @property
    def client_context(self) -> int:
        """Tokens that one client needs."""
        return SHORT_PROMPT + self.decode + 16

    def measures(self) -> tuple[Measure, ...]:
        """Everything that is measured, in the order of a report."""
        return (
            Measure("load_s", "start to loaded", "s", "lower"),
            Measure("first_token_s", "start to first token", "s", "lower"),
            *(Measure(f"prefill_{size}", f"prefill {size}", "tokens/s", "higher") for size in self.prefill),
            *(
                Measure(f"decode_{depth}", f"decode {self.decode} at depth {depth}", "tokens/s", "higher")
                for depth in self.depths
            ),
            *(
                measure
                for count in self.clients
                for measure in (
                    Measure(f"clients_{count}", f"{_clients(count)}, all tokens", "tokens/s", "higher"),
                    Measure(f"clients_{count}_first_s", f"{_clients(count)}, first token", "s", "lower"),
                )
            ),
            Measure("peak_bytes", "peak memory", "bytes", "lower"),
        )

    def single_jobs(self, vocabulary: int, seed: int) -> list[Job]:
        """One request after another: the jobs of the round that `seed` stands for."""
        draw = _Prompts(vocabulary, seed)
        jobs = [Job(FIRST_TOKEN, "first_token_s", (draw(SHORT_PROMPT),), 1)]
        jobs += [Job(PREFILL, f"prefill_{size}", (draw(size),), 1) for size in self.prefill]
        jobs += [
            Job(DECODE, f"decode_{depth}", (draw(max(1, depth)),), self.decode, depth)
            for depth in self.depths
        ]
        return jobs

    def client_jobs(self, vocabulary: int, seed: int) -> list[Job]:
        """Several requests at the same time."""
        draw = _Prompts(vocabulary, seed)
        return [
            Job(CLIENTS, f"clients_{count}", tuple(draw(SHORT_PROMPT) for _ in range(count)), self.decode)
            for count in self.clients
        ]


def _clients(count: int) -> str:
    return "1 client" if count == 1 else f"{count} clients"


class _Prompts:
    """Draws prompts of a wanted length: the same ones for the same seed."""

    def __init__(self, vocabulary: int, seed: int) -> None:
        self._random = random.Random(seed)
        # The lowest ids are control tokens in many vocabularies, the highest ones in the others.
        self._lowest, self._end = min(1000, vocabulary // 4), max(1, vocabulary - vocabulary // 16)

    def __call__(self, length: int) -> tuple[int, ...]:
        return tuple(self._random.randrange(self._lowest, self._end) for _ in range(length))
