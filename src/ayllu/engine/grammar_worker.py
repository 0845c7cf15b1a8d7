"""The process in which `GrammarChecker` tries grammars out: python -m ayllu.engine.grammar_worker.

It reads a vocabulary and then grammars from standard input, compiles each under limits of processor time and
memory that the system enforces, and answers on standard output. Whatever a grammar does to it, it does here.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import llguidance
import numpy as np

from ayllu.engine.frames import read_frame, write_frame
from ayllu.engine.grammar import compiled_matcher
from ayllu.engine.grammar_errors import compile_error, too_complex
from ayllu.engine.grammar_vocabulary import TRYING_STACK_BYTES, GrammarVocabulary
from ayllu.engine.prepared import GrammarSpec
from ayllu.errors import AylluError, UnsupportedError

MAX_MASK_SECONDS = 0.1
"""Processor time for one mask. Some grammars compile at once and take long to follow, and a step of the
engine serves others too."""

_WALKS, _STEPS = 2, 16


class Bench:
    """Tries out one grammar after the other with one vocabulary."""

    def __init__(self, vocabulary: GrammarVocabulary) -> None:
        self._library = vocabulary.library_tokenizer()
        self._size = len(vocabulary.tokens)
        self._stops = frozenset(vocabulary.stop_ids)

    def verdict(self, source: str) -> dict[str, Any]:
        """What the checker is told about a grammar: nothing, or what is wrong with it."""
        try:
            matcher = compiled_matcher(self._library, GrammarSpec(source))
            for seed in range(_WALKS):
                self._walk(matcher.deep_copy(), source, random.Random(seed))
        except AylluError as error:
            unsupported = isinstance(error, UnsupportedError)
            return {"unsupported": unsupported, "problem": error.problem, "fix": error.fix}
        except MemoryError:
            return {"memory": True}
        return {}

    def _walk(self, matcher: llguidance.LLMatcher, source: str, random_numbers: random.Random) -> None:
        """Write the beginning of some answer. Raises GrammarError when that fails, or takes too long."""
        for _ in range(_STEPS):
            began = time.thread_time()
            data = matcher.compute_bitmask()
            if matcher.is_error():
                raise compile_error(matcher.get_error(), source)
            if time.thread_time() - began > MAX_MASK_SECONDS:
                raise too_complex(f"finding what may come next takes more than {MAX_MASK_SECONDS:g} s")
            bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
            tokens = [t for t in np.flatnonzero(bits[: self._size]).tolist() if t not in self._stops]
            if not tokens:
                return
            matcher.consume_token(random_numbers.choice(tokens))


class _Limits:
    """Processor time for each grammar and memory beyond the vocabulary, where the system has such limits.

    Where it has not, the checker's clock is the only one.
    """

    def __init__(self, seconds: float, memory_bytes: int) -> None:
        self._seconds = seconds
        try:
            mapped = int(Path("/proc/self/statm").read_text("ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
            import resource
        except (OSError, ImportError):
            self._resource = None
            return
        self._resource = resource
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        self._lower(resource.RLIMIT_AS, mapped + memory_bytes)

    def begin(self) -> None:
        """Allow the next grammar its processor time: the system ends this process when it takes more."""
        if self._resource is not None:
            usage = self._resource.getrusage(self._resource.RUSAGE_SELF)
            self._lower(self._resource.RLIMIT_CPU, int(usage.ru_utime + usage.ru_stime + self._seconds) + 1)

    def _lower(self, limit: int, value: int) -> None:
        assert self._resource is not None
        hard = self._resource.getrlimit(limit)[1]
        if hard != self._resource.RLIM_INFINITY:
            value = min(value, hard)
        self._resource.setrlimit(limit, (value, hard))


def main() -> None:
    """Answer until the other side closes the pipe."""
    # A Ctrl-C in the terminal is for the process that asks; this one ends when its input does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests, answers = sys.stdin.buffer, sys.stdout.buffer
    start = read_frame(requests)
    if start is None:
        return
    bench = Bench(GrammarVocabulary.from_json(start["vocabulary"]))
    limits = _Limits(start["seconds"], start["memory_bytes"])
    write_frame(answers, {"ready": True})

    def answer() -> None:
        while (request := read_frame(requests)) is not None:
            limits.begin()
            write_frame(answers, bench.verdict(request["source"]))

    threading.stack_size(TRYING_STACK_BYTES)
    thread = threading.Thread(target=answer)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
