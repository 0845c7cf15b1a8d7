"""One request's trouble is nobody else's: exact accounting in any order of events, faults at every stage."""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest

from ayllu.engine.core import EngineCore, Said
from ayllu.engine.events import AnswerFinished, Done, Failed
from ayllu.engine.jobs import GenerationJob
from ayllu.engine.parameters import Sampling
from ayllu.engine.prepared import GrammarSpec, PreparedEmbedding, PreparedImage, PreparedRequest
from ayllu.errors import (
    AylluError,
    ContextOverflowError,
    OverloadedError,
    RequestFailedError,
    UnknownModelError,
    UsageError,
)
from ayllu.model.decoder import random_decoder
from tests.engine.cores import all_blocks_free, end_of, run, small_core, text_of, tokens_of
from tests.model.tiny import tiny_llama, tiny_llama4

LLAMA = random_decoder(tiny_llama(), 11, std=0.15).requires_grad_(False)
LLAMA4 = random_decoder(tiny_llama4(layers=4), 11, std=0.15).requires_grad_(False)
GREEDY = Sampling(temperature=0)


def _request(name: str, seed: int, **changes: Any) -> PreparedRequest:
    source = random.Random(seed)
    fields = {
        "id": name,
        "token_ids": [source.randrange(90) for _ in range(source.randint(2, 20))],
        "max_new_tokens": source.randint(6, 14),
        "sampling": GREEDY,
    }
    return PreparedRequest(**{**fields, **changes})


@pytest.mark.parametrize("decoder", [LLAMA, LLAMA4], ids=["llama", "llama4"])
def test_a_thousand_random_cycles_end_with_every_block_back(decoder) -> None:
    source = random.Random(0)
    core = small_core(
        decoder, slots=5, step_tokens=24, blocks={"global": 12, "chunk 8": 7}, waiting=20, context=100
    )
    said: Said = []
    opened: list[str] = []
    refused = 0
    for number in range(1000):
        action = source.random()
        if action < 0.5:
            name = f"r{number}"
            try:
                if action < 0.03:
                    core.submit(PreparedEmbedding(id=name, inputs=[[1, 2, 3] * source.randint(1, 12)] * 2))
                else:
                    core.submit(
                        _request(
                            name, number % 9, n=source.choice((1, 1, 3)), priority=source.randint(-4, 4),
                            tenant=source.choice("abc"), stop=source.choice(((), ("a",), ("bb", "cc"))),
                            prompt_logprobs=source.choice((None, None, 1)),
                        )
                    )  # fmt: skip
                opened.append(name)
            except OverloadedError:
                refused += 1
        elif action < 0.6 and opened:
            core.cancel(source.choice(opened[-8:]))
        for _ in range(source.randint(0, 3)):
            said += core.step()
        core.scheduler.cache.check()
    said += run(core)
    assert all_blocks_free(core)
    assert core.open_requests == 0
    counts = core.stats()
    assert counts.preempted > 0
    assert counts.cached_prompt_tokens > 0
    assert refused > 0
    assert counts.cancelled > 0
    assert counts.finished > 200
    assert counts.finished + counts.cancelled == len(opened)
    assert counts.blocks_free == counts.blocks_total
    ended = [name for name, event in said if isinstance(event, Done)]
    assert len(set(ended)) == len(ended)


class Fault(Exception):
    """What nobody expects."""


def _victim(core: EngineCore) -> GenerationJob:
    job = core._jobs["victim"]
    assert isinstance(job, GenerationJob)
    return job


def _break_forward(core: EngineCore, wanted: Callable[[int, GenerationJob], bool]) -> None:
    """The runner fails whenever the victim's piece that is `wanted` is among those it gets."""
    job, forward = _victim(core), core.runner.forward

    def failing(pieces):
        tables = [id(sequence.tables) for sequence in job.answers]
        if any(id(piece.tables) in tables and wanted(piece.start, job) for piece in pieces):
            raise Fault("in the network")
        return forward(pieces)

    core.runner.forward = failing


def _break_prefill(core: EngineCore, source: random.Random) -> None:
    _break_forward(core, lambda start, job: start < len(job.request.token_ids))


def _break_decode(core: EngineCore, source: random.Random) -> None:
    after = source.randint(0, 3)
    _break_forward(core, lambda start, job: start >= len(job.request.token_ids) + after)


def _failing_after(calls: int, whole: Callable[..., Any]) -> Callable[..., Any]:
    left = [calls]

    def failing(*arguments: Any) -> Any:
        left[0] -= 1
        if left[0] < 0:
            raise Fault("in the answer")
        return whole(*arguments)

    return failing


def _break_answer(core: EngineCore, source: random.Random, part: str, method: str) -> None:
    answer = next(iter(_victim(core).answers.values()))
    target = getattr(answer, part)
    setattr(target, method, _failing_after(source.randint(0, 4), getattr(target, method)))


def _break_sample(core: EngineCore, source: random.Random) -> None:
    _break_answer(core, source, "_sampler", "next_token")


def _break_detokenise(core: EngineCore, source: random.Random) -> None:
    _break_answer(core, source, "_decoder", "push")


def _break_stops(core: EngineCore, source: random.Random) -> None:
    _break_answer(core, source, "_stops", "push")


def _not_finite(core: EngineCore, source: random.Random) -> None:
    """The network computes NaN in the victim's row."""
    logits, place = core.runner.logits, _victim(core)

    def spoiled(rows):
        found = logits(rows)
        for answer in place.answers.values():
            drawing = [piece.sequence for piece in core.scheduler_pieces if piece.completes]
            if answer.sequence in drawing:
                found[drawing.index(answer.sequence)] = np.nan
        return found

    plan = core.scheduler.plan

    def noted():
        core.scheduler_pieces = plan()
        return core.scheduler_pieces

    core.scheduler.plan = noted
    core.runner.logits = spoiled


def _break_grammar(core: EngineCore, source: random.Random) -> None:
    """The victim's grammar gives up in the middle of the answer, or its compilation fails."""
    if source.random() < 0.5:
        broken: Future[Any] = Future()
        broken.set_exception(Fault("in the compiler"))
        core._compiling["victim"] = (_victim(core), broken)
        return
    opened = core._open

    def breaking(job, rows, grammars):
        for grammar in grammars:
            if grammar is not None:
                grammar.accept = _failing_after(source.randint(0, 4), grammar.accept)
        opened(job, rows, grammars)

    core._open = breaking


STAGES = {
    "grammar": _break_grammar,
    "prefill": _break_prefill,
    "decode": _break_decode,
    "sample": _break_sample,
    "detokenise": _break_detokenise,
    "stop strings": _break_stops,
    "not finite": _not_finite,
}


def _others(core: EngineCore, seed: int, said: Said) -> None:
    for number in range(3):
        core.submit(_request(f"other{number}", seed * 10 + number, stop=("dd",), priority=number % 2))
        said += core.step() if seed % 2 else []


@pytest.mark.parametrize("stage", STAGES)
def test_a_fault_fails_its_own_request_alone_100_times_of_100(stage: str) -> None:
    for seed in range(100):
        decoder = LLAMA if seed % 2 else LLAMA4
        source = random.Random(seed)
        quiet: Said = []
        core = small_core(decoder, slots=4, step_tokens=12)
        _others(core, seed, quiet)
        quiet += run(core)

        said: Said = []
        core = small_core(decoder, slots=4, step_tokens=12)
        grammar = GrammarSpec("start: /[a-z]{20,}/") if stage == "grammar" else None
        victim = _request("victim", 1000 + seed, max_new_tokens=12, grammar=grammar)
        if seed % 3:
            core.submit(victim)
            STAGES[stage](core, source)
            _others(core, seed, said)
        else:
            _others(core, seed, said)
            core.submit(victim)
            STAGES[stage](core, source)
        said += run(core)

        failed = end_of(said, "victim")
        assert isinstance(failed, Failed), (stage, seed)
        assert isinstance(failed.error, RequestFailedError)
        assert "Fault" in str(failed.error) or "finite" in str(failed.error)
        assert [name for name, event in said if isinstance(event, Failed)] == ["victim"]
        for number in range(3):
            name = f"other{number}"
            assert tokens_of(said, name) == tokens_of(quiet, name)
            assert text_of(said, name) == text_of(quiet, name)
            assert end_of(said, name) == end_of(quiet, name)
        assert all_blocks_free(core)
        assert core.open_requests == 0


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"token_ids": []}, UsageError, "empty"),
        ({"token_ids": [97]}, UsageError, "not in the vocabulary"),
        ({"token_ids": [-1]}, UsageError, "not in the vocabulary"),
        ({"token_ids": [1] * 95}, ContextOverflowError, "95 tokens; the context holds 100"),
        (
            {"token_ids": [1] * 60, "max_new_tokens": 40},
            ContextOverflowError,
            "100 tokens, which need 25 cache",
        ),
        ({"adapter": "nobody"}, UnknownModelError, "nobody"),
        ({"images": (PreparedImage.of(np.zeros((1, 3, 56, 56), np.float32)),)}, UsageError, "no images"),
        ({"id": "taken"}, UsageError, "already"),
        ({"n": 40}, OverloadedError, "queue is full"),
    ],
)
def test_what_cannot_be_taken_is_refused_with_the_numbers_and_leaves_nothing(changes, error, says) -> None:
    core = small_core(LLAMA, blocks=24, waiting=10, context=100)
    core.submit(_request("taken", 1))
    with pytest.raises(error, match=says):
        core.submit(_request(changes.pop("id", "new"), 2, **changes))
    assert core.open_requests == 1
    said = run(core)
    assert isinstance(end_of(said, "taken"), AnswerFinished)
    assert all_blocks_free(core)


def test_images_must_fit_the_prompt_and_the_tower() -> None:
    core = small_core(random_decoder(tiny_llama4(layers=4, vision=True), 1))
    image = PreparedImage.of(np.zeros((1, 3, 56, 56), np.float32))
    with pytest.raises(UsageError, match="3 image patch tokens but 4 image rows"):
        core.submit(_request("a", 1, token_ids=[90] * 3, images=(image,)))
    small = PreparedImage.of(np.zeros((1, 3, 28, 28), np.float32))
    with pytest.raises(UsageError, match="tiles"):
        core.submit(_request("a", 1, token_ids=[90] * 4, images=(small,)))
    assert core.open_requests == 0


@pytest.mark.parametrize("steps", range(8))
def test_a_cancelled_request_computes_no_further_step(steps: int) -> None:
    core = small_core(LLAMA4, slots=3, step_tokens=9)
    core.submit(_request("it", 3, token_ids=[3] * 20, max_new_tokens=50, n=2))
    core.submit(_request("other", 4))
    said: Said = []
    for _ in range(steps):
        said += core.step()
    sequences = set(core._jobs["it"].sequences)
    core.cancel("it")
    core.cancel("it")  # twice is no error
    computed: list[Any] = []
    plan = core.scheduler.plan
    core.scheduler.plan = lambda: computed.extend(pieces := plan()) or pieces
    said += run(core)
    assert not sequences & {piece.sequence for piece in computed}
    for index in range(2):
        assert end_of(said, "it", index).reason == "cancelled"
    assert isinstance([event for name, event in said if name == "it"][-1], Done)
    assert isinstance(end_of(said, "other"), AnswerFinished)
    assert all_blocks_free(core)


def test_a_stop_string_ends_the_work_at_once_and_is_not_shown() -> None:
    core = small_core(LLAMA)
    core.submit(_request("free", 5, max_new_tokens=20))
    said = run(core)
    text, tokens = text_of(said, "free"), tokens_of(said, "free")
    stop = text[4:7]
    core.submit(_request("it", 5, max_new_tokens=20, stop=(stop,)))
    before = core.stats().steps
    said = run(core)
    assert text_of(said, "it") == text[: text.index(stop)]
    end = end_of(said, "it")
    assert (end.reason, end.stop) == ("stop", stop)
    assert tokens[: end.new_tokens] == tokens_of(said, "it")
    # One step reads the prompt (it is in the cache) and draws; each further token takes one.
    assert core.stats().steps - before <= end.new_tokens + 1


def test_a_fault_while_a_prompt_is_scored_or_embedded_fails_it_alone() -> None:
    core = small_core(LLAMA)
    core.submit(_request("scored", 1, prompt_logprobs=1))
    core.submit(PreparedEmbedding(id="embedded", inputs=[[1, 2, 3], [4, 5]]))
    core.submit(_request("other", 3))

    def broken(*_: Any) -> None:
        raise Fault("here")

    core._jobs["scored"].scores.add = broken
    core._jobs["embedded"].add = broken
    said = run(core)
    assert {name for name, event in said if isinstance(event, Failed)} == {"scored", "embedded"}
    assert isinstance(end_of(said, "other"), AnswerFinished)
    assert all_blocks_free(core)


def test_memory_that_runs_out_for_one_request_ends_that_one() -> None:
    core = small_core(LLAMA)
    core.submit(_request("large", 1))
    core.submit(_request("small", 2))
    forward, tables = core.runner.forward, core._jobs["large"].sequences[0]

    def failing(pieces):
        if any(piece.tables is tables.tables for piece in pieces):
            raise MemoryError("no memory")
        return forward(pieces)

    core.runner.forward = failing
    said = run(core)
    assert isinstance(end_of(said, "large"), Failed)
    assert isinstance(end_of(said, "small"), AnswerFinished)


def test_an_error_of_the_device_itself_ends_the_engine() -> None:
    core = small_core(LLAMA)
    core.submit(_request("it", 1))
    core.runner.forward = lambda _: (_ for _ in ()).throw(Fault("the device is gone"))
    core.runner.is_fatal = lambda error: isinstance(error, Fault)
    with pytest.raises(Fault):
        run(core)


def test_errors_are_one_class_of_ours() -> None:
    core = small_core(LLAMA)
    core.submit(_request("victim", 1))
    _break_sample(core, random.Random(1))
    error = end_of(run(core), "victim").error
    assert isinstance(error, AylluError)
    assert "sample" in error.problem
