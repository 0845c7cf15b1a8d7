"""The engine's process (`launch` starts it): loads a model and answers over a socket.

One thread reads messages into a queue, the other hands them to the core between its steps and sends what
each step said. It ends when it is told to, when the other end is gone, or by a crash, which the process that
started it turns into typed errors. Not for people to run.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import queue
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn, Protocol

from ayllu.engine.channel import Channel, ChannelClosedError, ChannelError, FrameTooLargeError
from ayllu.engine.events import Event, Failed, TextDelta
from ayllu.engine.messages import (
    Answered,
    Cancel,
    CoreEvent,
    Crashed,
    Embed,
    Embedded,
    ErrorReport,
    Events,
    FromEngine,
    GetStats,
    LoadAdapter,
    Open,
    Ready,
    Refused,
    Shutdown,
    StatsTold,
    Submit,
    TaskAdvanced,
    TaskEnded,
    TaskStarted,
    ToEngine,
    UnloadAdapter,
    from_engine,
    to_engine,
)
from ayllu.engine.options import EngineOptions
from ayllu.engine.prepared import CoreFacts, EmbeddingsReady, PreparedEmbedding, PreparedRequest
from ayllu.engine.protocol import EngineStats
from ayllu.errors import AylluError, RequestFailedError, UnsupportedError, clip, one_line
from ayllu.progress import Progress

INBOX_MESSAGES = 256
"""Messages that may wait for the step under way to end; more stay in the socket and with the sender."""

SIGN_OF_LIFE_S = 1.0
"""Seconds of work without a word after which one is sent: a long prompt is no hung engine."""

PROGRESS_EVERY_S = 0.05

GATHER_S = 0.008
"""Seconds for which tokens of short steps wait for each other: nobody sees them, and each frame wakes the
other process, on the processor where the engine's own threads compute."""

_PR_SET_PDEATHSIG = 1


class Core(Protocol):
    """What the worker drives, from one thread (`ayllu.engine.core.EngineCore` is one)."""

    @property
    def facts(self) -> CoreFacts: ...
    @property
    def has_work(self) -> bool: ...

    def submit(self, request: PreparedRequest | PreparedEmbedding) -> None:
        """Take a request. An AylluError refuses it; otherwise events follow."""

    def cancel(self, request_id: str) -> None: ...

    def step(self) -> list[tuple[str, Event | EmbeddingsReady]]:
        """Compute a little, and tell what is new of which request."""

    def load_adapter(self, name: str, path: Path) -> None: ...
    def unload_adapter(self, name: str) -> None: ...
    def stats(self) -> EngineStats: ...


Said = list[tuple[str, Event | EmbeddingsReady]]
OpenCore = Callable[[Path, EngineOptions, Progress], Core]


def serve(channel: Channel, open_core: OpenCore, *, prepare: Callable[[], object] = lambda: None) -> NoReturn:
    """Answer over `channel` until it ends; then end the process. prepare: done before the first message."""
    # Ctrl-C in a terminal reaches every process that was started from it. What it ends, the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    _die_with_parent()
    inbox: queue.Queue[ToEngine] = queue.Queue(INBOX_MESSAGES)
    threading.Thread(target=_read, args=(channel, inbox), name="reader", daemon=True).start()
    code = 0
    try:
        prepare()
        _work(_Outbox(channel), inbox, open_core)
    except ChannelClosedError:
        # Nobody is left to be told.
        pass
    except BaseException as error:
        traceback.print_exc()
        with contextlib.suppress(ChannelError):
            reason = f"{type(error).__name__}: {clip(error, 500)}".removesuffix(": ")
            channel.send(from_engine().pack(Crashed(one_line(reason))))
        code = 1
    sys.stderr.flush()
    # Not sys.exit: taking a large model down piece by piece would keep whoever closes it waiting.
    os._exit(code)


def _work(outbox: _Outbox, inbox: queue.Queue[ToEngine], open_core: OpenCore) -> None:
    opening = inbox.get()
    if not isinstance(opening, Open):
        raise ChannelError("The first message must be Open.")
    try:
        core = open_core(opening.model_path, opening.options, _ChannelProgress(outbox))
    except AylluError as error:
        outbox.send(Refused(ErrorReport.of(error)))
        return
    outbox.send(Ready(core.facts))
    said: Said = []
    while True:
        for message in _waiting(inbox, block=not core.has_work):
            if isinstance(message, Shutdown):
                return
            _handle(core, message, outbox)
        if core.has_work:
            said += core.step()
            if not core.has_work or outbox.is_due(said):
                outbox.send_events(core, said)
                said = []


def _read(channel: Channel, inbox: queue.Queue[ToEngine]) -> None:
    """Messages into the queue; the end of the channel ends the process, whatever it is computing."""
    try:
        while (frame := channel.receive()) is not None:
            inbox.put(to_engine().unpack(frame))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def _waiting(inbox: queue.Queue[ToEngine], *, block: bool) -> Iterator[ToEngine]:
    """What has come; with `block`, at least one message. Bounded, so that work goes on under any load."""
    for count in range(INBOX_MESSAGES):
        try:
            yield inbox.get(block=block and count == 0)
        except queue.Empty:
            return


def _handle(core: Core, message: ToEngine, outbox: _Outbox) -> None:
    match message:
        case Submit() | Embed():
            request_id = message.request.id
            if error := _error_of(lambda: core.submit(message.whole)):
                outbox.send(Events((CoreEvent.of(request_id, Failed(error)),)))
        case Cancel(request_id):
            core.cancel(request_id)
        case LoadAdapter(ticket, name):
            outbox.answer(ticket, _error_of(lambda: core.load_adapter(name, message.adapter_path)))
        case UnloadAdapter(ticket, name):
            outbox.answer(ticket, _error_of(lambda: core.unload_adapter(name)))
        case GetStats(ticket):
            outbox.send(StatsTold(ticket, core.stats()))
        case _:
            raise ChannelError(f"Unexpected message {type(message).__name__}.")


def _error_of(action: Callable[[], None]) -> AylluError | None:
    """Why `action` did not work. What nobody expected fails this one request, not the engine."""
    try:
        action()
    except AylluError as error:
        return error
    except Exception as error:
        traceback.print_exc()
        return RequestFailedError(
            f"The engine could not take the request: {type(error).__name__}: {clip(error)}.",
            "This is an error in ayllu: please report it.",
        )
    return None


class _Outbox:
    """What the worker says. Any thread may send."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel
        self._last_word = time.monotonic()

    def send(self, message: FromEngine) -> None:
        """Raises ChannelError when nobody listens any more."""
        self._channel.send(from_engine().pack(message))
        self._last_word = time.monotonic()

    def answer(self, ticket: int, error: AylluError | None) -> None:
        """Tell that what a ticket stands for is done, or why not."""
        self.send(Answered(ticket, None if error is None else ErrorReport.of(error)))

    def is_due(self, said: Said) -> bool:
        """Whether this should be heard now: it ends or fails something, or the last word was a while ago."""
        return time.monotonic() - self._last_word > GATHER_S or not all(
            isinstance(event, TextDelta) for _, event in said
        )

    def send_events(self, core: Core, said: Said) -> None:
        """Everything some steps said, in one frame where that is possible."""
        events = tuple(
            CoreEvent.of(key, event) for key, event in said if not isinstance(event, EmbeddingsReady)
        )
        if events or time.monotonic() - self._last_word > SIGN_OF_LIFE_S:
            try:
                self.send(Events(events))
            except FrameTooLargeError:
                for one in events:
                    self._send_or_fail(core, one.request_id, Events((one,)))
        for key, event in said:
            if isinstance(event, EmbeddingsReady):
                self._send_or_fail(core, key, Embedded(key, event.vectors))

    def _send_or_fail(self, core: Core, request_id: str, message: Events | Embedded) -> None:
        try:
            self.send(message)
        except FrameTooLargeError as error:
            core.cancel(request_id)
            failed = Failed(
                UnsupportedError(str(error), "Ask for fewer inputs or log-probabilities at once.")
            )
            self.send(Events((CoreEvent.of(request_id, failed),)))


class _ChannelProgress:
    """Loading shown at the other end."""

    def __init__(self, outbox: _Outbox) -> None:
        self._outbox = outbox
        self._numbers = itertools.count()

    @contextmanager
    def task(self, label: str, total: int | None, unit: str = "bytes") -> Iterator[_ChannelTask]:
        task = _ChannelTask(self._outbox, next(self._numbers))
        self._outbox.send(TaskStarted(task.number, one_line(label), total, unit))
        try:
            yield task
        finally:
            task.flush()
            self._outbox.send(TaskEnded(task.number))


class _ChannelTask:
    """Sums small advances up, so that thousands of blocks are not thousands of messages."""

    def __init__(self, outbox: _Outbox, number: int) -> None:
        self.number = number
        self._outbox = outbox
        self._unsent = 0
        self._lock = threading.Lock()
        self._sent_at = 0.0

    def advance(self, amount: int) -> None:
        with self._lock:
            self._unsent += amount
            if time.monotonic() - self._sent_at < PROGRESS_EVERY_S:
                return
            self._sent_at = time.monotonic()
        self.flush()

    def flush(self) -> None:
        with self._lock:
            amount, self._unsent = self._unsent, 0
        if amount:
            self._outbox.send(TaskAdvanced(self.number, amount))


def _die_with_parent() -> None:
    """Where the system can (Linux): be killed with the thread that started this process.

    The end of the channel says the same, but needs this process to listen.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def channel_of(descriptor: int) -> Channel:
    """The channel on a descriptor that was passed on. What this process starts does not inherit it: a socket
    held open elsewhere would hide the end of this process."""
    os.set_inheritable(descriptor, False)
    return Channel(socket.socket(fileno=descriptor))


def _import_core() -> None:
    """What most models need. It may be known over there only later which one is to be opened."""
    import ayllu.chat.gguf_vocabulary
    import ayllu.engine.open_core
    import ayllu.engine.open_native
    import ayllu.weights.gguf_model  # noqa: F401


def _open_native(path: Path, options: EngineOptions, progress: Progress) -> Core:
    from ayllu.engine.open_core import open_core

    return open_core(path, options, progress)


def main(descriptor: int) -> NoReturn:
    """Serve models of this machine over the socket with that number."""
    serve(channel_of(descriptor), _open_native, prepare=_import_core)
