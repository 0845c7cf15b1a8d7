"""Grammars are tried out in a child process: whatever they do to it, the next one is compiled."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.grammar import GrammarCompiler, grammar_of
from ayllu.engine.grammar_check import MAX_WAITING, GrammarChecker
from ayllu.engine.grammar_vocabulary import GrammarVocabulary
from ayllu.engine.model_files import tokenizer_for
from ayllu.engine.prepared import GrammarSpec
from ayllu.engine.requests import RegexStructure
from ayllu.errors import (
    AylluError,
    EngineUnavailableError,
    GrammarError,
    OverloadedError,
    UnsupportedError,
)
from ayllu.weights.checkpoint import open_checkpoint
from tests.engine.grammar_corpus import GOOD, HOSTILE, Hostile

PLENTY = 60.0
"""Seconds for grammars that must compile however busy the machine is."""

SLOW = GrammarSpec('start: "' + "x" * 2_000_000 + '"')
"""Takes many seconds to compile."""


@pytest.fixture(scope="module")
def tokenizer(smollm2_gguf: Path) -> Tokenizer:
    return tokenizer_for(open_checkpoint(smollm2_gguf))


@pytest.fixture(scope="module")
def checker(tokenizer: Tokenizer) -> Iterator[GrammarChecker]:
    with GrammarChecker(tokenizer, tokenizer.stop_ids, seconds=PLENTY) as checker:
        yield checker


@pytest.fixture(scope="module")
def strict(tokenizer: Tokenizer) -> Iterator[GrammarChecker]:
    with GrammarChecker(tokenizer, tokenizer.stop_ids) as checker:
        yield checker


def spec(pattern: str) -> GrammarSpec:
    return grammar_of(RegexStructure(pattern))


def test_there_are_enough_hostile_grammars() -> None:
    assert len({hostile.name for hostile in HOSTILE}) == len(HOSTILE) >= 60


@pytest.mark.parametrize("hostile", HOSTILE, ids=lambda hostile: hostile.name)
def test_a_hostile_grammar_compiles_or_is_refused_and_the_next_one_compiles(
    checker: GrammarChecker, hostile: Hostile
) -> None:
    outcome = None
    try:
        checker.check(grammar_of(hostile.structure))
    except AylluError as error:
        outcome = type(error)
        assert error.fix
        assert len(error.problem) < 500
    assert outcome in hostile.expected
    checker.check(grammar_of(GOOD))


def test_all_hostile_grammars_in_a_row_end_within_the_limit(strict: GrammarChecker) -> None:
    """The bar is 2 s each; the rest is for starting the child again on a busy machine."""
    strict.check(grammar_of(GOOD))
    for hostile in HOSTILE:
        began = time.monotonic()
        with contextlib.suppress(GrammarError, UnsupportedError):
            strict.check(grammar_of(hostile.structure))
        assert time.monotonic() - began < 30, hostile.name
    strict.check(grammar_of(GOOD))


def test_a_grammar_that_takes_too_long_ends_the_child_and_says_the_limit(tokenizer: Tokenizer) -> None:
    with GrammarChecker(tokenizer, tokenizer.stop_ids, seconds=0.3) as checker:
        with pytest.raises(
            GrammarError, match=r"too complex: compiling it takes more than 0\.3 s or 512 MiB"
        ):
            checker.check(SLOW)
        assert checker.process_id is None


def test_a_grammar_that_takes_too_much_memory_ends_the_child_alone(tokenizer: Tokenizer) -> None:
    with GrammarChecker(tokenizer, tokenizer.stop_ids, seconds=PLENTY, memory_bytes=32 << 20) as checker:
        with pytest.raises(GrammarError, match="or 32 MiB"):
            checker.check(SLOW)
        checker.check(spec("a+"))


def test_a_grammar_that_recurses_too_deeply_ends_the_child_alone(checker: GrammarChecker) -> None:
    chain = "\n".join(f'a{n}: "x" a{n + 1}?' for n in range(20_000))
    with pytest.raises(GrammarError, match="too deep a recursion"):
        checker.check(GrammarSpec(f'start: a0\n{chain}\na20000: "y"'))
    checker.check(spec("b+"))


def test_what_the_child_takes_on_its_small_stack_compiles_on_the_large_one(tokenizer: Tokenizer) -> None:
    """A stack that is too small ends the process, and the one beside the model serves everybody."""
    compiler = GrammarCompiler(tokenizer, tokenizer.stop_ids)
    with GrammarChecker(tokenizer, tokenizer.stop_ids, seconds=PLENTY) as checker:
        taken = 0
        for length in (200, 400, 800, 1200, 1600):
            chain = "\n".join(f'a{n}: "x" a{n + 1}?' for n in range(length))
            grammar = GrammarSpec(f'start: a0\n{chain}\na{length}: "y"')
            try:
                checker.check(grammar)
            except GrammarError:
                continue
            taken += 1
            assert len(compiler.compile(grammar).result()) == 1
        assert taken >= 2
    compiler.close()


def test_a_grammar_that_compiles_but_cannot_be_followed_is_refused(checker: GrammarChecker) -> None:
    options = " | ".join(f'"{n}" "x"' for n in range(600))
    with pytest.raises(GrammarError, match="too many things may come next"):
        checker.check(GrammarSpec(f'start: "a" b\nb: {options}'))


def test_a_killed_child_is_replaced(checker: GrammarChecker) -> None:
    checker.check(spec("before"))
    first = checker.process_id
    assert first is not None
    os.kill(first, signal.SIGKILL)
    for number in range(3):
        checker.check(spec(f"after{number}"))
    assert checker.process_id not in (None, first)


def test_a_known_grammar_asks_nobody(tokenizer: Tokenizer) -> None:
    with GrammarChecker(tokenizer, tokenizer.stop_ids, seconds=PLENTY) as checker:
        checker.check(spec("a"))
        with pytest.raises(GrammarError):
            checker.check(GrammarSpec("start: ("))
        child = checker.process_id
        assert child is not None
        os.kill(child, signal.SIGSTOP)
        try:
            checker.check(spec("a"))
            with pytest.raises(GrammarError):
                checker.check(GrammarSpec("start: ("))
        finally:
            os.kill(child, signal.SIGCONT)


def test_many_threads_get_their_own_answers(checker: GrammarChecker) -> None:
    def ask(number: int) -> str:
        if number % 3 == 0:
            with pytest.raises(GrammarError, match=rf"no{number}"):
                checker.check(GrammarSpec(f"start: no{number}"))
            return "refused"
        checker.check(spec(f"word{number % 5}"))
        return "taken"

    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(ask, range(40)))
    assert answers.count("refused") == 14


def test_too_many_at_once_are_turned_away(tokenizer: Tokenizer) -> None:
    with GrammarChecker(tokenizer, tokenizer.stop_ids, seconds=PLENTY) as checker:
        checker.check(spec("a"))
        child = checker.process_id
        assert child is not None
        os.kill(child, signal.SIGSTOP)
        try:
            with ThreadPoolExecutor(MAX_WAITING) as pool:
                waiting = [pool.submit(checker.check, spec(f"w{n}")) for n in range(MAX_WAITING)]
                while checker.waiting < MAX_WAITING:
                    time.sleep(0.01)
                with pytest.raises(OverloadedError):
                    checker.check(spec("one more"))
                os.kill(child, signal.SIGCONT)
                for one in waiting:
                    one.result()
        finally:
            os.kill(child, signal.SIGCONT)


def test_close_ends_a_check_that_runs_and_every_later_one(tokenizer: Tokenizer) -> None:
    checker = GrammarChecker(tokenizer, tokenizer.stop_ids, seconds=PLENTY)
    checker.check(spec("a"))
    child = checker.process_id
    assert child is not None
    failed: list[AylluError] = []

    def check() -> None:
        try:
            checker.check(SLOW)
        except AylluError as error:
            failed.append(error)

    thread = threading.Thread(target=check)
    thread.start()
    while checker.waiting == 0:
        time.sleep(0.01)
    time.sleep(0.1)
    checker.close()
    checker.close()
    thread.join()
    assert isinstance(failed[0], EngineUnavailableError)
    with pytest.raises(EngineUnavailableError):
        checker.check(spec("b"))
    assert not Path(f"/proc/{child}").exists()


def test_the_child_ends_with_the_process_that_started_it(smollm2_gguf: Path) -> None:
    code = (
        "import os, sys\nfrom pathlib import Path\n"
        "from ayllu.engine.grammar_check import GrammarChecker\n"
        "from ayllu.engine.prepared import GrammarSpec\n"
        "from ayllu.engine.model_files import tokenizer_for\n"
        "from ayllu.weights.checkpoint import open_checkpoint\n"
        "tokenizer = tokenizer_for(open_checkpoint(Path(sys.argv[1])))\n"
        "checker = GrammarChecker(tokenizer, tokenizer.stop_ids, seconds=60)\n"
        "checker.check(GrammarSpec('start: \"a\"'))\n"
        "print(checker.process_id, 'torch' in sys.modules, flush=True)\n"
        "os.kill(os.getpid(), 9) if sys.argv[2] == 'killed' else None\n"
    )
    for way in ("left", "killed"):
        done = subprocess.run(
            [sys.executable, "-c", code, str(smollm2_gguf), way], capture_output=True, text=True, check=False
        )
        assert done.stderr == ""
        child, torch_loaded = done.stdout.split()
        assert torch_loaded == "False"
        for _ in range(1000):
            if not Path(f"/proc/{child}").exists():
                break
            time.sleep(0.01)
        assert not Path(f"/proc/{child}").exists()


def test_a_vocabulary_survives_the_pipe(tokenizer: Tokenizer) -> None:
    vocabulary = GrammarVocabulary.of(tokenizer, tokenizer.stop_ids)
    assert GrammarVocabulary.from_json(vocabulary.to_json()) == vocabulary
