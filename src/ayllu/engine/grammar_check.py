"""Whether a grammar can be compiled, found out where it does no harm: in a child process that may be killed.

A grammar from outside can take any amount of time and memory before the library notices. So it is compiled
here first, with the model's own vocabulary and under a clock; the process beside the model compiles it after.
"""

from __future__ import annotations

import contextlib
import hashlib
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.frames import read_frame, write_frame
from ayllu.engine.grammar_errors import too_complex
from ayllu.engine.grammar_vocabulary import GrammarVocabulary
from ayllu.engine.prepared import GrammarSpec
from ayllu.errors import AylluError, EngineUnavailableError, GrammarError, OverloadedError, UnsupportedError

MAX_SECONDS = 2.0
MAX_MEMORY_BYTES = 512 << 20
MAX_WAITING = 32
MAX_REMEMBERED = 1024
START_SECONDS = 60.0
TOO_COMPLEX_FOR_SECONDS = 30.0
"""How long a grammar that exceeded a limit is refused unseen. Not for ever: the machine may be less busy."""

_CPU_LIMIT_SIGNAL = int(getattr(signal, "SIGXCPU", 0))
_Verdict = tuple[AylluError | None, float | None]


class GrammarChecker:
    """Checks grammars one after the other in one child process, which starts with the first.

    A grammar that takes longer than `seconds` or more than `memory_bytes` ends the child, and the next one
    starts another. Every method may be called from any thread.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_ids: Iterable[int],
        *,
        seconds: float = MAX_SECONDS,
        memory_bytes: int = MAX_MEMORY_BYTES,
    ) -> None:
        self._tokenizer = tokenizer
        self._stop_ids = frozenset(stop_ids)
        self._seconds = seconds
        self._memory_bytes = memory_bytes
        self._verdicts: OrderedDict[str, _Verdict] = OrderedDict()
        self._turn = threading.Lock()
        self._state = threading.Lock()
        self._waiting = 0
        self._closed = False
        self._child: _Child | None = None
        self._vocabulary: dict[str, Any] | None = None

    def check(self, spec: GrammarSpec) -> None:
        """Return if the grammar compiles.

        Raises GrammarError (wrong, or too complex), UnsupportedError, OverloadedError when too many wait, and
        EngineUnavailableError after `close` or when no child process can be started.
        """
        key = hashlib.sha256(spec.source.encode()).hexdigest()
        with self._state:
            if self._closed:
                raise EngineUnavailableError("The grammar checker is closed.", "Start the engine again.")
            if self._raise_remembered(key):
                return
            if self._waiting >= MAX_WAITING:
                raise OverloadedError(f"{MAX_WAITING} grammars are waiting to be compiled.")
            self._waiting += 1
        try:
            with self._turn:
                with self._state:
                    if self._raise_remembered(key):
                        return
                self._remember(key, *self._verdict(spec))
        finally:
            with self._state:
                self._waiting -= 1
        with self._state:
            self._raise_remembered(key)

    def close(self) -> None:
        """End the child process; a check that runs fails. Idempotent."""
        with self._state:
            self._closed = True
            child, self._child = self._child, None
        if child is not None:
            child.end()

    def __enter__(self) -> GrammarChecker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def process_id(self) -> int | None:
        """The child's, None while there is none."""
        child = self._child
        return None if child is None or not child.alive else child.process_id

    @property
    def waiting(self) -> int:
        """Checks that run or wait for their turn."""
        return self._waiting

    def _raise_remembered(self, key: str) -> bool:
        """Whether the grammar is known to be good; raises its error where it is known to be bad."""
        if key not in self._verdicts:
            return False
        error, until = self._verdicts[key]
        if until is not None and time.monotonic() > until:
            del self._verdicts[key]
            return False
        self._verdicts.move_to_end(key)
        if error is not None:
            # Again from its parts: one exception raised by several threads would mix their tracebacks.
            raise type(error)(error.problem, error.fix)
        return True

    def _remember(self, key: str, error: AylluError | None, until: float | None) -> None:
        with self._state:
            self._verdicts[key] = (error, until)
            while len(self._verdicts) > MAX_REMEMBERED:
                self._verdicts.popitem(last=False)

    def _verdict(self, spec: GrammarSpec) -> _Verdict:
        for _ in range(2):
            child = self._running_child()
            answer = child.ask({"source": spec.source}, self._seconds)
            if answer is not None or child.out_of_time or self._closed:
                break
            # Dead without having used its time: of this grammar, or of something else. The second tells.
        if answer is None or answer.get("memory"):
            with self._state:
                if self._closed:
                    raise EngineUnavailableError("The grammar checker was closed.", "Start the engine again.")
            memory = f"{self._memory_bytes >> 20} MiB"
            limit = f"compiling it takes more than {self._seconds:g} s or {memory}, or too deep a recursion"
            return too_complex(limit), time.monotonic() + TOO_COMPLEX_FOR_SECONDS
        if "problem" in answer:
            kind = UnsupportedError if answer["unsupported"] else GrammarError
            return kind(answer["problem"], answer["fix"]), None
        return None, None

    def _running_child(self) -> _Child:
        if self._child is not None and self._child.alive:
            return self._child
        if self._child is not None:
            self._child.end()
        if self._vocabulary is None:
            self._vocabulary = GrammarVocabulary.of(self._tokenizer, self._stop_ids).to_json()
        child = _Child()
        with self._state:
            if self._closed:
                child.end()
                raise EngineUnavailableError("The grammar checker is closed.", "Start the engine again.")
            self._child = child
        start = {
            "vocabulary": self._vocabulary,
            "seconds": self._seconds,
            "memory_bytes": self._memory_bytes,
        }
        if child.ask(start, START_SECONDS) is None:
            child.end()
            raise EngineUnavailableError(
                "The process that compiles grammars does not start.",
                "Run python -m ayllu.engine.grammar_worker to see why.",
            )
        return child


class _Child:
    """A child process with a clock: a question that is not answered in time kills it."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            # -P: modules of the current folder must not stand in for installed ones.
            [sys.executable, "-P", "-m", "ayllu.engine.grammar_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._end = weakref.finalize(self, _end_process, self._process)
        self._killed_by_clock = False

    @property
    def process_id(self) -> int:
        return self._process.pid

    @property
    def alive(self) -> bool:
        return self._end.alive and self._process.poll() is None

    @property
    def out_of_time(self) -> bool:
        """Whether the clock, or the system's own, ended the child."""
        return self._killed_by_clock or self._process.returncode == -_CPU_LIMIT_SIGNAL

    def _run_out(self) -> None:
        self._killed_by_clock = True
        self._process.kill()

    def ask(self, question: dict[str, Any], seconds: float) -> dict[str, Any] | None:
        """The answer, None if the child died or had to be killed."""
        assert self._process.stdin is not None and self._process.stdout is not None
        clock = threading.Timer(seconds, self._run_out)
        clock.daemon = True
        clock.start()
        try:
            write_frame(self._process.stdin, question)
            answer = read_frame(self._process.stdout)
        except (OSError, ValueError):  # a broken pipe, or one that `end` has closed meanwhile
            answer = None
        finally:
            clock.cancel()
        if answer is None:
            self.end()
        return answer

    def end(self) -> None:
        """Kill the process and close its pipes. Idempotent."""
        self._end()


def _end_process(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not sent yet has nobody to read it
                pipe.close()
