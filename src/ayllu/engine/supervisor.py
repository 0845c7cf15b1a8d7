"""Keeps an engine's process alive: starts it, watches it, starts it again after a crash, stops a crash loop.

What the process says goes on to a `Listener`; that it ended, and how, is told there within moments.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal, Protocol

from ayllu.engine.engine_process import EngineProcess
from ayllu.engine.launch import WORKER_COMMAND, Launched
from ayllu.engine.messages import (
    Crashed,
    FromEngine,
    Open,
    Ready,
    Refused,
    TaskAdvanced,
    TaskEnded,
    TaskStarted,
    to_engine,
)
from ayllu.engine.prepared import CoreFacts
from ayllu.errors import AylluError, EngineCrashedError, EngineUnavailableError
from ayllu.progress import Progress, Task

TICK_S = 0.5
"""Seconds between looks at a process that says nothing."""

GRACE_S = 2.0
"""Seconds that a process gets to end when asked by a message, and again when asked by SIGTERM."""

Status = Literal["starting", "ready", "restarting", "stopped", "closed"]


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """More than max_crashes within window_s, or as many starts in a row that fail, and the engine stays down.

    The first restart waits first_delay_s, each further one four times as long, at most longest_delay_s.
    step_limit_s: a process that has work and finishes no step for so long is taken for hung, and killed.
    """

    max_crashes: int = 3
    window_s: float = 60.0
    first_delay_s: float = 0.1
    longest_delay_s: float = 10.0
    step_limit_s: float = 600.0


class CrashHistory:
    """Decides after each crash whether another start makes sense."""

    def __init__(self, policy: RestartPolicy) -> None:
        self._policy = policy
        self._moments: deque[float] = deque()
        self._failed_starts = 0

    @property
    def count(self) -> int:
        """Crashes that count now."""
        # Loading may take longer than the window: crashes while loading would never crowd it.
        return max(len(self._moments), self._failed_starts)

    def delay_after_crash(self, now: float, *, was_ready: bool) -> float | None:
        """Seconds to wait before the next start; None: no more of them."""
        policy = self._policy
        self._moments.append(now)
        while now - self._moments[0] > policy.window_s:
            self._moments.popleft()
        self._failed_starts = 0 if was_ready else self._failed_starts + 1
        if self.count > policy.max_crashes:
            return None
        return min(policy.first_delay_s * 4.0 ** (self.count - 1), policy.longest_delay_s)

    def clear(self) -> None:
        """Forget all crashes: a person has decided that things are different now."""
        self._moments.clear()
        self._failed_starts = 0


class Listener(Protocol):
    """Who is told. No method may block or raise."""

    @property
    def has_open_work(self) -> bool:
        """Whether the process owes an answer to anything it was sent."""

    def started(self, process: EngineProcess, facts: CoreFacts) -> None:
        """A process is ready; called before any other of its messages, from its reading thread."""

    def received(self, message: FromEngine) -> None:
        """A message that is not about starting; from the reading thread."""

    def lost(self, error: EngineCrashedError, *, was_ready: bool) -> None:
        """The process ended unasked: what was sent to it will not be answered. Another may follow."""

    def gave_up(self, error: EngineUnavailableError) -> None:
        """There will be no process, until `Supervisor.restart`."""


class Supervisor:
    """One engine's process, through all its lives. Every method may be called from any thread."""

    def __init__(
        self,
        opening: Open,
        listener: Listener,
        *,
        command: Sequence[str] = WORKER_COMMAND,
        policy: RestartPolicy | None = None,
        launched: Launched | None = None,
    ) -> None:
        """Begins to start the process at once, and does not wait for it. launched: the first one, if it is
        under way already."""
        self.status: Status = "starting"
        self.restarts = 0
        self._opening = to_engine().pack(opening)
        self._listener = listener
        self._command = command
        self._launched = launched
        self._policy = policy or RestartPolicy()
        self._history = CrashHistory(self._policy)
        self._process: EngineProcess | None = None
        self._refusal: AylluError | None = None
        self._why_stopped = ""
        self._news: queue.SimpleQueue[FromEngine | AylluError] = queue.SimpleQueue()
        self._changed = threading.Condition()
        # One thread for all lives: on Linux the process is killed when the thread that started it ends.
        self._thread = threading.Thread(target=self._run, name="ayllu-engine-supervisor", daemon=True)
        self._thread.start()

    @property
    def process_id(self) -> int | None:
        """The process now, None where there is none."""
        process = self._process
        return None if process is None else process.process_id

    def wait_until_ready(self, progress: Progress) -> CoreFacts:
        """Wait for the first start, showing how it goes. Raises what it fails with. To be called once."""
        tasks: dict[int, tuple[ExitStack, Task]] = {}
        with ExitStack() as all_tasks:
            while True:
                match self._news.get():
                    case TaskStarted(number, label, total, unit):
                        ending = all_tasks.enter_context(ExitStack())
                        tasks[number] = ending, ending.enter_context(progress.task(label, total, unit))
                    case TaskAdvanced(number, amount):
                        tasks[number][1].advance(amount)
                    case TaskEnded(number):
                        tasks.pop(number)[0].close()
                    case Ready(facts):
                        return facts
                    case AylluError() as error:
                        raise error

    def restart(self) -> None:
        """Start again after the crashes became too many, and wait until it is ready.

        Does nothing while there is a process or one is about to be. Raises EngineUnavailableError.
        """
        with self._changed:
            if self.status == "stopped":
                self._history.clear()
                self.status = "restarting"
                self._changed.notify_all()
            self._changed.wait_for(lambda: self.status in ("ready", "stopped", "closed"))
            if self.status != "ready":
                raise self.unavailable()

    def unavailable(self) -> EngineUnavailableError:
        """Why there is no engine, for status 'stopped' and 'closed'."""
        if self.status == "closed":
            return EngineUnavailableError("The engine is closed.", "Open it again.")
        return EngineUnavailableError(
            f"The engine stays down: {self._why_stopped}.", "Remove the cause, then restart the engine."
        )

    def close(self) -> None:
        """End the process and wait for its end. Idempotent."""
        with self._changed:
            self.status = "closed"
            self._changed.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _run(self) -> None:
        while self._live_once():
            pass

    def _live_once(self) -> bool:
        """From start to end of one process; whether to start another."""
        self._refusal = None
        launched, self._launched = self._launched, None
        try:
            process = EngineProcess(launched or self._command, self._received, self._notify)
        except OSError as error:
            return self._ended(f"its process cannot be started: {error.strerror or error}")
        self._process = process
        process.send(self._opening)
        hung = not self._watch(process)
        if self.status == "closed" and process.was_ready:
            process.stop(GRACE_S)
        elif self.status == "closed":
            # Nothing has been promised yet, and what it does now (importing, loading) hears no message.
            process.kill()
        ending = process.how_it_ended()
        self._process = None
        if hung:
            ending = f"no step finished in {self._policy.step_limit_s:g} s"
        return self._ended(ending if self._refusal is None else self._refusal.problem)

    def _watch(self, process: EngineProcess) -> bool:
        """Wait until the process ends or is to be ended; False if it had to be killed because it hung."""
        silent_s, heard, looked = 0.0, 0, time.monotonic()
        while True:
            with self._changed:
                self._changed.wait_for(lambda: process.ended or self.status == "closed", TICK_S)
            if process.ended or process.exited or self.status == "closed":
                return True
            now = time.monotonic()
            if heard != process.messages_heard or not (process.was_ready and self._listener.has_open_work):
                silent_s, heard = 0.0, process.messages_heard
            else:
                # Not the clock's difference: a suspended machine or terminal job is no hung engine.
                silent_s += min(now - looked, 2 * TICK_S)
            looked = now
            if silent_s > self._policy.step_limit_s:
                process.kill()
                return False

    def _received(self, process: EngineProcess, message: FromEngine) -> None:
        match message:
            case Ready(facts):
                with self._changed:
                    if self.status == "closed":
                        return
                    first, self.status = self.status == "starting", "ready"
                    process.was_ready = True
                    self._changed.notify_all()
                self._listener.started(process, facts)
                if first:
                    self._news.put(message)
            case Refused(report):
                self._refusal = report.error()
            case Crashed(reason):
                process.last_words = reason
            case TaskStarted() | TaskAdvanced() | TaskEnded():
                if self.status == "starting":
                    self._news.put(message)
            case _:
                self._listener.received(message)

    def _ended(self, ending: str) -> bool:
        """After the end of a process; whether to start another, which is to be at once: this waits before."""
        with self._changed:
            status = self.status
            if status in ("starting", "closed"):
                self.status = "closed"
            else:
                self.status = "restarting"
            self._why_stopped = ending
        if status in ("starting", "closed"):
            failed = _crash(" while opening the model", ending, "Try again, or choose another model.")
            self._news.put(self._refusal or failed)
            return False
        was_ready = status == "ready"
        again = "It starts again by itself; send the request again."
        crash = _crash("" if was_ready else " while starting again", ending, again)
        self._listener.lost(crash, was_ready=was_ready)
        delay = self._history.delay_after_crash(time.monotonic(), was_ready=was_ready)
        if delay is None:
            self._stay_down(ending)
        with self._changed:
            # Until then, only `close` and, after too many crashes, `restart` change the status.
            if delay is not None:
                self._changed.wait_for(lambda: self.status == "closed", delay)
            else:
                self._changed.wait_for(lambda: self.status != "stopped")
            self.restarts += 1
            return self.status != "closed"

    def _stay_down(self, ending: str) -> None:
        with self._changed:
            if self.status == "closed":
                return
            self.status = "stopped"
            self._why_stopped = f"{self._history.count} crashes, the last: {ending}"
            error = self.unavailable()
            self._changed.notify_all()
        self._listener.gave_up(error)

    def _notify(self) -> None:
        with self._changed:
            self._changed.notify_all()


def _crash(when: str, ending: str, fix: str) -> EngineCrashedError:
    if "SIGKILL" in ending:
        fix = f"The machine may have run out of memory. {fix}"
    return EngineCrashedError(f"The engine crashed{when} ({ending}).", fix)
