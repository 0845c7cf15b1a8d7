"""The server's log: one line for each thing that happened, as text or as JSON, on stderr.

Lines carry no bodies, no query strings and nothing that looks like a secret, and nobody can forge one:
control characters are shown, not obeyed. They are written by a thread of their own from a bounded queue, so
that a slow or closed pipe costs lines, which are counted, and never the event loop's time.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import sys
import threading
import time
import traceback
from collections.abc import Iterable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO
from urllib.parse import unquote, urlsplit

from ayllu.errors import one_line
from ayllu.settings import LogFormat, Settings

if TYPE_CHECKING:
    from ayllu.server.access import Identity

QUEUED_LINES = 10_000
MOST_CHARACTERS = 8_192
"""Of a message or a field; the rest is cut off."""

MOST_TRACE_CHARACTERS = 32_768
CLOSING_S = 2.0
SHORTEST_SECRET = 6
REDACTED = "[redacted]"

request_id: ContextVar[str | None] = ContextVar("ayllu_request_id", default=None)
"""Set while a request is served: its lines then carry the id."""

_NAMES_OF_SECRETS = (
    r"api[_-]?key|apikey|password|passwd|passphrase|pwd|secret|secret[_-]?key|access[_-]?key"
    r"|private[_-]?key|token|credentials?|session[_-]?id|csrf"
)
# A string, in which quotes may be escaped as often as it was quoted; one without an end is all value.
_VALUE = r"""[bru]{0,2}(?:(\\{0,8}["'])(?s:(?!(?<!\\)\2).)*(?:\2|\Z)|\S+)"""
_SECRETS: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern, re.IGNORECASE), replacement)
    for pattern, replacement in (
        (r"-----BEGIN [A-Z ]{0,40}PRIVATE KEY-----[\s\S]*?(?:-----END [A-Z ]{0,40}-----|\Z)", REDACTED),
        # The password of an address, which may itself hold '@', ':' and '/'.
        (r"\b([a-z][a-z0-9+.-]{0,30}://[^\s:/@\"'<>]{0,256}):[^\s\"'<>]+@", rf"\1:{REDACTED}@"),
        (r"\b(https?://)[^\s:/@\"'<>]{1,256}@", rf"\1{REDACTED}@"),
        (
            r"\b((?:(?:proxy-)?authorization|(?:set-)?cookie2?)[\"']?\s{0,8}[:=,]\s{0,8})[^\r\n]+",
            rf"\1{REDACTED}",
        ),
        (r"\b(bearer)\s{1,8}[a-z0-9._~+/=:-]{6,}", rf"\1 {REDACTED}"),
        (r"\b(basic)\s{1,8}(?-i:(?=[a-z+/]*[A-Z0-9=])[A-Za-z0-9+/]{6,}={0,2})", rf"\1 {REDACTED}"),
        (
            rf"((?:{_NAMES_OF_SECRETS})\\{{0,8}}[\"']?\s{{0,8}}(?:[:=]|=>|%3d)\s{{0,8}}){_VALUE}",
            rf"\1{REDACTED}",
        ),
        # As headers are often shown: (b'x-api-key', b'...').
        (rf"((?:{_NAMES_OF_SECRETS})\\{{0,8}}[\"'],\s{{0,8}}){_VALUE}", rf"\1{REDACTED}"),
        (
            r"([?&#](?:code|state|key|sig|signature|nonce)=)[^\s&#\"'<>]+",
            rf"\1{REDACTED}",
        ),
        (r"\b([\w-]{0,40}session[\w-]{0,40}=)[^\s;,\"'<>]+", rf"\1{REDACTED}"),
        (r"\beyJ[\w-]{8,}\.[\w-]{4,}(?:\.[\w-]*)?", REDACTED),
        (r"\b(?:ay|sk|pk|rk|xox[a-z]|gl?pat|hf|gh[a-z]|github_pat|nvapi|gsk)[-_][\w-]{16,}", REDACTED),
        (r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b|\bAIza[\w-]{30,}", REDACTED),
    )
)
_SECRET_NAME = re.compile(rf"(?:{_NAMES_OF_SECRETS}|authorization|cookie)$", re.IGNORECASE)
_RANDOM = re.compile(
    r"(?<![\w-])(?=[\w-]{0,200}[0-9])(?=[\w-]{0,200}[a-z])(?=[\w-]{0,200}[A-Z])[\w-]{40,}", re.ASCII
)
"""What an unnamed key or token looks like: long, of digits, small and capital letters. A hash does not."""

_HARMLESS = re.compile(r"[A-Za-z0-9_./{}-]{0,18}|[0-9a-f]{32}|(?:/[a-z0-9_{}]{0,18}){1,16}")
"""Words, addresses, ids and routes, which none of the above would change: most of what is logged."""

_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN = re.compile(r"[\w.:/@+{}-]+")
_log = logging.getLogger("ayllu.server")
_access = logging.getLogger("ayllu.access")


class Redactor:
    """Takes out of text what looks like a secret, and the secrets it was told of wherever they stand."""

    def __init__(self, secrets: Iterable[str] = ()) -> None:
        known = sorted({one for one in secrets if len(one) >= SHORTEST_SECRET}, key=len, reverse=True)
        self._known = re.compile("|".join(map(re.escape, known))) if known else None

    def __call__(self, text: str, limit: int = MOST_CHARACTERS) -> str:
        # Of twice as much, so that no secret is cut in two and its first half left.
        text = text[: 2 * limit]
        if self._known is not None:
            text = self._known.sub(REDACTED, text)
        if _HARMLESS.fullmatch(text):
            return text
        for pattern, replacement in _SECRETS:
            text = pattern.sub(replacement, text)
        text = _RANDOM.sub(REDACTED, text)
        return text if len(text) <= limit else text[:limit] + "…"


@dataclass(frozen=True)
class _Line:
    """A record, taken apart where it was made: what it refers to may change or must not be kept."""

    created: float
    level: str
    logger: str
    event: str
    fields: dict[str, Any]
    trace: str | None


class Lines:
    """Turns what is logged into lines."""

    def __init__(self, form: LogFormat, secrets: Iterable[str] = ()) -> None:
        self._form = form
        self._redacted = Redactor(secrets)

    def encoded(self, line: _Line) -> bytes:
        """As it is written: one line, or for text with a traceback several that begin with '  | '."""
        made = self._json(line) if self._form == "json" else self._text(line)
        return f"{made}\n".encode()

    def _json(self, line: _Line) -> str:
        body: dict[str, Any] = {
            "ts": _timestamp(line.created),
            "level": line.level.lower(),
            "logger": line.logger,
            "event": self._redacted(line.event),
        }
        for name, value in line.fields.items():
            body.setdefault(name, self._value(name, value))
        if line.trace is not None:
            body["traceback"] = self._redacted(line.trace, MOST_TRACE_CHARACTERS)
        return _visible_json(json.dumps(body, ensure_ascii=False, separators=(",", ":"), allow_nan=False))

    def _text(self, line: _Line) -> str:
        words = [
            _timestamp(line.created),
            f"{line.level:<7}",
            one_line(line.logger),
            one_line(self._redacted(line.event)),
        ]
        words += [
            f"{one_line(name)}={_quoted(self._value(name, value))}" for name, value in line.fields.items()
        ]
        made = " ".join(words)
        if line.trace is not None:
            trace = self._redacted(line.trace, MOST_TRACE_CHARACTERS)
            made += "".join(f"\n  | {one_line(one)}" for one in trace.split("\n"))
        return made

    def _value(self, name: str, value: Any) -> str | int | float | bool | None:
        if _SECRET_NAME.search(name):
            return REDACTED
        if value is None or isinstance(value, bool | int):
            return value
        if isinstance(value, float):
            return value if abs(value) < float("inf") else str(value)
        return self._redacted(value if isinstance(value, str) else str(value))


def _timestamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def _quoted(value: str | int | float | bool | None) -> str:
    if value is None:
        return "-"
    text = str(value)
    if _PLAIN.fullmatch(text):
        return text
    return _visible_json(json.dumps(text, ensure_ascii=False))


def _visible_json(text: str) -> str:
    """JSON whose strings hold no character that a terminal obeys, or that ends a line for some reader."""
    if text.isprintable():
        return text
    return "".join(ch if ch.isprintable() else _escape(ord(ch)) for ch in text)


def _escape(code: int) -> str:
    if code < 0x10000:
        return f"\\u{code:04x}"
    code -= 0x10000
    return f"\\u{0xD800 + (code >> 10):04x}\\u{0xDC00 + (code & 0x3FF):04x}"


class LogWriter(logging.Handler):
    """Takes records at once and has them written by a thread. What does not fit into the queue, or cannot be
    written, is dropped and counted. stream: its file descriptor is written to, or itself if it has none."""

    def __init__(self, lines: Lines, stream: TextIO, queued_lines: int = QUEUED_LINES) -> None:
        super().__init__()
        self.dropped = 0
        self._told = 0
        self._lines = lines
        self._stream = stream
        self._queue: queue.Queue[_Line | None] = queue.Queue(queued_lines)
        self._closing = threading.Event()
        # A daemon, as it may be stuck in a full pipe when the program ends.
        self._thread = threading.Thread(target=self._write_all, name="ayllu-log", daemon=True)
        self._thread.start()

    def createLock(self) -> None:
        """None: the queue has its own, and whoever logs must not wait for anybody else who does."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Never raises, never waits."""
        try:
            self._queue.put_nowait(_taken_apart(record))
        except Exception:  # a full queue, or a record that cannot be shown
            self.dropped += 1

    def close(self) -> None:
        """Write what is queued, if that is quick. Idempotent."""
        if not self._closing.is_set():
            self._closing.set()
            with contextlib.suppress(queue.Full):
                self._queue.put_nowait(None)
            self._thread.join(CLOSING_S)
        super().close()

    def _write_all(self) -> None:
        while True:
            line = self._queue.get()
            if line is None:
                return
            self._write(line)
            if self.dropped > self._told and self._queue.qsize() < self._queue.maxsize // 2:
                self._tell_dropped()
            if self._closing.is_set() and self._queue.empty():
                return

    def _tell_dropped(self) -> None:
        dropped = self.dropped
        told = _Line(
            time.time(), "WARNING", _log.name, "log lines were dropped", {"lines": dropped - self._told}, None
        )
        self._told = dropped
        self._write(told)

    def _write(self, line: _Line) -> None:
        try:
            self._put(self._lines.encoded(line))
        except Exception:  # a closed pipe, a full disk: the server goes on
            self.dropped += 1
            self._told += 1  # nobody reads: telling would only fail again

    def _put(self, data: bytes) -> None:
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):
            self._stream.write(data.decode())
            self._stream.flush()
            return
        # Past the stream's buffer, whose lock a stuck thread would hold while the program tries to end.
        while data:
            try:
                data = data[os.write(descriptor, data) :]
            except BlockingIOError:
                if self._closing.is_set():
                    raise
                time.sleep(0.01)


def _taken_apart(record: logging.LogRecord) -> _Line:
    try:
        event = record.getMessage()
    except Exception:  # the arguments do not fit the text: say what there is
        event = f"{record.msg} {record.args!r}"
    trace = None
    if record.exc_info and record.exc_info[0] is not None:
        trace = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
    extra = {name: value for name, value in vars(record).items() if name not in _STANDARD}
    if (current := request_id.get()) is not None:
        extra.setdefault("request_id", current)
    shown = {name: _fixed(value) for name, value in extra.items()}
    return _Line(record.created, record.levelname, record.name, event, shown, trace)


def _fixed(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else str(value)


class ServerLog:
    """What the server writes down of every request."""

    def access(
        self,
        *,
        request_id: str,
        method: str,
        route: str,
        status: int,
        seconds: float,
        identity: Identity | None = None,
        client: str = "",
        **more: str | int | float | None,
    ) -> None:
        """One line for a request that has ended. route: the template, which names no object."""
        key = None if identity is None else identity.key
        told: dict[str, Any] = {
            "request_id": request_id,
            "method": method,
            "route": route,
            "status": status,
            "ms": round(seconds * 1000, 1),
            "user": None if identity is None else identity.user_id,
            "key": None if key is None else key.prefix,
            "client": client,
            **more,
        }
        level = logging.ERROR if status >= 500 else logging.INFO
        _access.log(
            level, "request", extra={name: value for name, value in told.items() if value is not None}
        )


def secrets_of(settings: Settings) -> list[str]:
    """Values of secret settings, and passwords in addresses, as they are written and as they are meant."""
    found = [str(getattr(settings, one.name) or "") for one in fields(settings) if one.metadata.get("secret")]
    for value in [*found]:
        with contextlib.suppress(ValueError):
            written = urlsplit(value).password or ""
            found += [written, unquote(written)]
    return [value for value in found if value]


def lines_dropped() -> int:
    """Lines that could not be written since the log was set up."""
    return sum(one.dropped for one in logging.getLogger().handlers if isinstance(one, LogWriter))


def set_up_logging(
    form: LogFormat = "text", *, secrets: Iterable[str] = (), stream: TextIO | None = None
) -> LogWriter:
    """Send everything that is logged in this process, by uvicorn and other libraries too, through one writer.
    secrets: values that must not appear, wherever they come from. Close the writer at the end."""
    root = logging.getLogger()
    for handler in [*root.handlers]:
        if isinstance(handler, LogWriter):
            root.removeHandler(handler)
            handler.close()
    writer = LogWriter(Lines(form, secrets), stream or sys.stderr)
    root.addHandler(writer)
    root.setLevel(logging.WARNING)
    logging.getLogger("ayllu").setLevel(logging.INFO)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access", "uvicorn.asgi"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = name != "uvicorn.access"  # it would write query strings, and we write that line
        logger.setLevel(logging.WARNING)
    threading.excepthook = _log_thread_failure
    return writer


def _log_thread_failure(failure: threading.ExceptHookArgs) -> None:
    """Instead of a traceback straight to stderr, which nothing would have looked through for secrets."""
    if failure.exc_type is SystemExit or failure.exc_value is None:
        return
    name = "" if failure.thread is None else failure.thread.name
    _log.error("a thread failed: %s", name, exc_info=failure.exc_value)


@contextlib.contextmanager
def request_context(current: str) -> Iterator[None]:
    """Lines that are logged inside carry this request's id."""
    token = request_id.set(current)
    try:
        yield
    finally:
        request_id.reset(token)
