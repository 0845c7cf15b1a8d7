"""Speculation, lossless: tokens are drafted cheaply and computed together, and only those that would have
been drawn anyway are kept.

A step that has to read all weights for one token can check several for little more. Whatever is drafted, the
answer is the same: each row's token is drawn exactly as without (sampler, grammar, stop strings), and the
first that differs from the draft ends the use of it. So only the number drafted has to be chosen, and it is
chosen by what it earns: expected tokens per second. Needs no torch.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as AbstractSequence
from itertools import accumulate
from operator import mul
from typing import TYPE_CHECKING

from ayllu.engine.options import EngineOptions
from ayllu.engine.sequence import Sequence
from ayllu.engine.speculation_estimates import AcceptanceRates, StepCosts, assumed_cost
from ayllu.engine.speculation_lookup import PromptLookup
from ayllu.engine.speculation_proposal import Proposal, Proposer
from ayllu.engine.step_runner import StepRunner

if TYPE_CHECKING:
    from ayllu.engine.speculation_draft import DraftModel

PROBE_STEPS = 64
"""Steps without drafts after which some are made although it does not seem to pay."""

MOST_PROBE_STEPS = 1024
"""Each probe doubles the steps to the next until drafts pay again, up to so many."""

PROBE_TOKENS = 4

WORTHLESS = 0.02
"""Drafted tokens less likely to be kept than this are not considered: no row is that cheap."""


def speculation_for(
    options: EngineOptions, runner: StepRunner, draft_model: DraftModel | None
) -> Speculation | None:
    """How an engine with these options drafts; None: not at all. draft_model: that of the options, open."""
    by_default = "lookup" if getattr(runner, "batch_invariant", False) else "off"
    kind = options.speculate or ("draft" if draft_model is not None else by_default)
    if kind == "off" or options.deterministic:
        return None
    assert kind == "lookup" or draft_model is not None, "the options name a draft model"
    return Speculation(PromptLookup(), draft_model, most_drafted=options.most_drafted)


class _Patience:
    """When a probe is due: after more and more steps that were not worth a draft."""

    def __init__(self) -> None:
        self._idle, self._wait = 0, PROBE_STEPS

    def pays(self) -> None:
        self._idle, self._wait = 0, PROBE_STEPS

    def wants_probe(self) -> bool:
        """One more step without a draft; whether that is enough."""
        self._idle += 1
        if self._idle < self._wait:
            return False
        self._idle, self._wait = 0, min(2 * self._wait, MOST_PROBE_STEPS)
        return True


class _Track:
    """What a source knows of one sequence: how often its drafts are right, and its last proposal with the
    place it was made for."""

    def __init__(self, shared: AcceptanceRates) -> None:
        self.rates = AcceptanceRates(shared)
        self.patience = _Patience()
        self._proposal: Proposal | None = None
        self._place = 0

    def note(self, proposal: Proposal, place: int) -> None:
        self._proposal, self._place = proposal, place

    def judge(self, tokens: AbstractSequence[int]) -> None:
        """Compare the last proposal with what has come since, up to the first difference."""
        proposal, self._proposal = self._proposal, None
        if proposal is not None:
            come = range(self._place, min(len(tokens), self._place + len(proposal.tokens)))
            for place, token, kind in zip(come, proposal.tokens, proposal.classes, strict=False):
                right = token == tokens[place]
                self.rates.note(kind, right)
                if not right:
                    return

    def worths(self, proposal: Proposal | None) -> list[float]:
        """The probability of each proposed token to be kept."""
        return [] if proposal is None else _worths(map(self.rates.rate, proposal.classes))


class _Source:
    """A proposer with what was learnt of it."""

    def __init__(self, proposer: Proposer) -> None:
        self._proposer = proposer
        self._rates = AcceptanceRates()
        self._tracks: dict[Sequence, _Track] = {}

    def track(self, sequence: Sequence) -> _Track:
        """What is known of a sequence by now."""
        track = self._tracks.get(sequence)
        if track is None:
            track = self._tracks[sequence] = _Track(self._rates)
        track.judge(sequence.tokens)
        return track

    def propose(
        self, sequences: AbstractSequence[Sequence], lengths: AbstractSequence[int]
    ) -> list[Proposal | None]:
        """Proposals of at most these lengths, in this order; empty ones where there was nothing to propose,
        None where none was asked for or none can be made now."""
        found: list[Proposal | None] = [None] * len(sequences)
        asked = [index for index, length in enumerate(lengths) if length > 0]
        made = (
            self._proposer.propose([(sequences[index], lengths[index]) for index in asked]) if asked else []
        )
        for index, proposal in zip(asked, made, strict=True):
            found[index] = proposal
            if proposal is not None:
                self._tracks[sequences[index]].note(proposal, len(sequences[index].tokens))
        return found

    def forget(self, sequence: Sequence) -> None:
        self._tracks.pop(sequence, None)
        self._proposer.forget(sequence)


class Speculation:
    """Chooses drafts for the sequences of a step. In every step: `begin`, `drafts`, `computed`.

    lookup: proposes in no time, so it is asked in every step and judged by what comes even when its proposal
    is not computed. draft: takes time, and is asked where it is likely to be surer and to pay. most_drafted:
    most tokens drafted for one sequence. clock: seconds, for measuring steps.
    """

    def __init__(
        self,
        lookup: Proposer,
        draft: Proposer | None = None,
        *,
        most_drafted: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert most_drafted >= 1, most_drafted
        self._lookup = _Source(lookup)
        self._draft = None if draft is None else _Source(draft)
        self._most_drafted = most_drafted
        self._clock = clock
        self._costs = StepCosts()
        # Seconds of a place in the draft model's drafts, by the number of sequences it drafts for.
        self._draft_costs = StepCosts()
        self._patience = _Patience()
        self._begun = 0.0
        self._proposing = 0.0

    def begin(self) -> None:
        """A step begins; its time is measured from here."""
        self._begun, self._proposing = self._clock(), 0.0

    def drafts(
        self, decoding: AbstractSequence[tuple[Sequence, int]], *, rows: int, most: int
    ) -> list[list[int]]:
        """Tokens to draft for each sequence that decodes in this step, at most as many as it has room for.

        rows: of the whole step without drafts. most: of all drafts together.
        """
        if not decoding:
            return []
        sequences = [sequence for sequence, _ in decoding]
        lengths = [min(room, self._most_drafted, most) for _, room in decoding]
        tracks = [self._lookup.track(sequence) for sequence in sequences]
        proposals = self._lookup.propose(sequences, lengths)
        worths = [track.worths(proposal) for track, proposal in zip(tracks, proposals, strict=True)]
        if self._draft is not None:
            self._ask_draft(self._draft, sequences, lengths, proposals, worths, rows, most)
        counts, _ = _best_counts(worths, rows, most, self._costs.seconds)
        if any(counts):
            self._patience.pays()
        else:
            counts = self._probe(worths, rows, most)
        return [
            [] if proposal is None else proposal.tokens[:count]
            for proposal, count in zip(proposals, counts, strict=True)
        ]

    def computed(self, rows: int | None) -> None:
        """All of this step is done but drawing. rows: how many it had with drafts; None: its time tells
        nothing of decoding, because it read prompts too or went wrong."""
        if rows is not None:
            self._costs.note(rows, self._clock() - self._begun - self._proposing)

    def forget(self, sequence: Sequence) -> None:
        """A sequence has ended. Nothing if it is unknown."""
        self._lookup.forget(sequence)
        if self._draft is not None:
            self._draft.forget(sequence)

    def _ask_draft(
        self,
        source: _Source,
        sequences: list[Sequence],
        lengths: list[int],
        proposals: list[Proposal | None],
        worths: list[list[float]],
        rows: int,
        most: int,
    ) -> None:
        """Put the draft model's proposals in place of those that are less sure, where its time pays."""
        tracks = [source.track(sequence) for sequence in sequences]
        asked = self._lengths_worth_asking(tracks, lengths, worths, rows, most)
        begun = self._clock()
        made = source.propose(sequences, asked)
        self._proposing = self._clock() - begun
        ready = all(made[index] is not None for index, length in enumerate(asked) if length > 0)
        places = max(len(proposal.tokens) if proposal else 0 for proposal in made)
        if ready and places:
            self._draft_costs.note(sum(length > 0 for length in asked), self._proposing / places)
        for index, proposal in enumerate(made):
            if proposal is not None and proposal.tokens:
                proposals[index], worths[index] = proposal, tracks[index].worths(proposal)

    def _lengths_worth_asking(
        self, tracks: list[_Track], lengths: list[int], worths: list[list[float]], rows: int, most: int
    ) -> list[int]:
        """How many tokens to ask the draft model for, not knowing yet how sure they will be.

        worths: of what costs nothing. A sequence does with that if it gains as much.
        """
        costs, seconds = self._draft_costs, self._costs.seconds
        # Before both were measured they cannot be compared: then some proposals are made to measure them.
        each = costs.seconds(len(tracks)) if costs.known and self._costs.known else 0.0
        _, rate = _best_counts(worths, rows, most, seconds)
        hopes = []
        for track, length, worth in zip(tracks, lengths, worths, strict=True):
            hope = _worths([track.rates.mean()] * length)
            better = _gain(hope, rate, rows, seconds, each) >= _gain(worth, rate, rows, seconds)
            hopes.append(hope if better else [])
        counts, _ = _best_counts(hopes, rows, most, seconds, each)
        for index, (track, hope) in enumerate(zip(tracks, hopes, strict=True)):
            if counts[index]:
                track.patience.pays()
            elif hope and track.patience.wants_probe():
                counts[index] = min(PROBE_TOKENS, len(hope))
        return counts

    def _probe(self, worths: AbstractSequence[list[float]], rows: int, most: int) -> list[int]:
        """Now and then, drafts that would pay if rows cost what was assumed before they were measured: what
        was measured may have been disturbed, or be long ago."""
        few = [worth[:PROBE_TOKENS] for worth in worths]
        counts, _ = _best_counts(few, rows, most, assumed_cost)
        return counts if any(counts) and self._patience.wants_probe() else [0] * len(worths)


def _worths(rates: Iterable[float]) -> list[float]:
    """The probability of each drafted token to be kept: all before it and itself right."""
    return [worth for worth in accumulate(rates, mul) if worth >= WORTHLESS]


def _best_counts(
    worths: AbstractSequence[list[float]],
    rows: int,
    most: int,
    seconds: Callable[[int], float],
    seconds_to_propose: float = 0.0,
) -> tuple[list[int], float]:
    """How many tokens to draft of each sequence for the most expected tokens per second, and those.

    worths: of each sequence's drafted tokens, falling. A step gives one token of each sequence and, on
    average, the sum of the worths drafted; so of any number of drafted tokens those of the greatest worth are
    the best, and only the number is searched. seconds: of a step by its rows. seconds_to_propose: of each
    place in a draft, whatever the number of sequences.
    """
    ranked = sorted(
        (-worth, place, index) for index, falling in enumerate(worths) for place, worth in enumerate(falling)
    )
    tokens, best, best_rate, places = float(len(worths)), 0, len(worths) / seconds(rows), 0
    for count, (worth, place, _) in enumerate(ranked[:most], 1):
        tokens -= worth
        places = max(places, place + 1)
        rate = tokens / (seconds(rows + count) + places * seconds_to_propose)
        if rate > best_rate:
            best, best_rate = count, rate
    counts = [0] * len(worths)
    for _, _, index in ranked[:best]:
        counts[index] += 1
    return counts, best_rate


def _gain(
    worths: list[float],
    rate: float,
    rows: int,
    seconds: Callable[[int], float],
    seconds_to_propose: float = 0.0,
) -> float:
    """Tokens that the best beginning of a draft is expected to give beyond those that a step of this `rate`
    would give in the same time (Dinkelbach's way to compare ratios, 1967): above 0, the rate rises."""
    best, tokens, before = 0.0, 0.0, seconds(rows)
    for count, worth in enumerate(worths, 1):
        tokens += worth
        longer = seconds(rows + count) - before + count * seconds_to_propose
        best = max(best, tokens - rate * longer)
    return best
