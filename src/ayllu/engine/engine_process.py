"""One life of an engine's process, seen from outside: its channel, what it prints, how it ended.

Three threads serve it: one reads messages, one writes them, so that nobody who sends has to wait, and one
keeps the last lines it printed, which say most when it ends unasked.
"""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import threading
from collections import deque
from collections.abc import Callable, Sequence

from ayllu.engine.channel import Channel, ChannelError, Packed
from ayllu.engine.launch import Launched
from ayllu.engine.messages import FromEngine, Shutdown, from_engine, to_engine
from ayllu.errors import clip

EXIT_S = 0.25
"""Seconds that a process whose channel has ended gets to be gone."""

LINES_KEPT, LINE_BYTES = 40, 400


class EngineProcess:
    """A process under way. was_ready: whether it has opened its model (set by whoever listens).

    `on_message` is called with each message, in order, `on_end` after the last one; both from the reading
    thread, which they must not block.
    """

    def __init__(
        self,
        command: Sequence[str] | Launched,
        on_message: Callable[[EngineProcess, FromEngine], None],
        on_end: Callable[[], None],
    ) -> None:
        """`command` starts it, unless it is under way already. Raises OSError when it cannot be started."""
        launched = (command if isinstance(command, Launched) else Launched(command)).take()
        self._popen = launched.popen
        self.process_id = self._popen.pid
        self.was_ready = False
        self.messages_heard = 0
        self.last_words = ""
        self._channel = Channel(launched.socket)
        self._on_message = on_message
        self._on_end = on_end
        self._ended = threading.Event()
        self._outbox: queue.SimpleQueue[Packed | None] = queue.SimpleQueue()
        self._unsent_bytes = 0
        self._counting = threading.Lock()
        self._lines: deque[str] = deque(maxlen=LINES_KEPT)
        self._printing = self._thread(self._collect, "log")
        self._thread(self._read, "reader")
        self._thread(self._write, "writer")

    def send(self, message: Packed) -> None:
        """Queue a message; never waits. When the process ends it is lost, like all that is on its way."""
        with self._counting:
            self._unsent_bytes += message.nbytes
        self._outbox.put(message)

    @property
    def unsent_bytes(self) -> int:
        """Bytes of messages that the process has not taken yet."""
        return self._unsent_bytes

    @property
    def ended(self) -> bool:
        """Whether its last message has been handed on."""
        return self._ended.is_set()

    @property
    def exited(self) -> bool:
        """Whether the process is gone, even where something it started holds its channel open."""
        return self._popen.poll() is not None

    def kill(self) -> None:
        """End it at once."""
        self._popen.kill()

    def stop(self, grace_s: float) -> None:
        """End it: by a message, then by SIGTERM, then by SIGKILL."""
        self.send(to_engine().pack(Shutdown()))
        for insist in (self._popen.terminate, self._popen.kill):
            try:
                self._popen.wait(grace_s)
                return
            except subprocess.TimeoutExpired:
                insist()

    def how_it_ended(self) -> str:
        """Wait for the end, or bring it about, and tell it: exit code or signal, and the last line said."""
        # What it said before it ended is still to be handed on.
        self._ended.wait(EXIT_S)
        try:
            self._popen.wait(EXIT_S)
        except subprocess.TimeoutExpired:
            self._popen.kill()
        code = self._popen.wait()
        self._channel.hang_up()
        self._outbox.put(None)
        # Something it started may still hold its standard error open: then this is all there is.
        self._printing.join(EXIT_S)
        ending = f"exit code {code}" if code >= 0 else f"signal {_signal_name(-code)}"
        said = self.last_words or next((line for line in reversed(self._lines) if line.strip()), "")
        return f"{ending}: {clip(said.strip(), 300)}" if said else ending

    def _thread(self, target: Callable[[], None], name: str) -> threading.Thread:
        thread = threading.Thread(target=target, name=f"ayllu-engine-{name}", daemon=True)
        thread.start()
        return thread

    def _read(self) -> None:
        codec = from_engine()
        try:
            while (frame := self._channel.receive()) is not None:
                message = codec.unpack(frame)
                self.messages_heard += 1
                self._on_message(self, message)
        except ChannelError as error:
            self.last_words = self.last_words or str(error)
        finally:
            # Whatever ended the reading: a process that nobody hears is of no use, and its end will be noted.
            self._channel.close()
            self._ended.set()
            self._on_end()

    def _write(self) -> None:
        with contextlib.suppress(ChannelError):
            while (message := self._outbox.get()) is not None:
                self._channel.send(message)
                with self._counting:
                    self._unsent_bytes -= message.nbytes

    def _collect(self) -> None:
        output = self._popen.stdout
        assert output is not None
        with output:
            rest = b""
            while data := os.read(output.fileno(), 1 << 16):
                *lines, rest = (rest + data).split(b"\n")
                self._lines.extend(line[:LINE_BYTES].decode("utf-8", "replace") for line in lines)
                rest = rest[:LINE_BYTES]
            if rest:
                self._lines.append(rest.decode("utf-8", "replace"))


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)
