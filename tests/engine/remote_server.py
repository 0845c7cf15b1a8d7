"""A scripted OpenAI-compatible server on loopback: every request gets the next answer of the script, which
may stall, break off or talk nonsense. What was asked is kept, and whether a client hung up meanwhile. With
it, remote engines that speak to it."""

from __future__ import annotations

import json
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import Enum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from ayllu.chat.messages import user_message
from ayllu.engine.events import Event, Failed
from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.engine.remote.engine import RemoteEngine
from ayllu.engine.requests import ChatPrompt, GenerateRequest
from ayllu.errors import AylluError

HANG_GUARD_S = 60.0
CHAT = ChatPrompt((user_message("hello"),))
DONE = b"data: [DONE]\n\n"


class Fault(Enum):
    """What may stand in an answer instead of bytes: SILENCE until the client hangs up, or a CUT."""

    SILENCE = "silence"
    CUT = "cut"


@dataclass
class Scripted:
    """One answer: its status, headers and pieces. A CUT as the only piece comes before any header."""

    pieces: tuple[bytes | Fault, ...] = ()
    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/event-stream"})

    @classmethod
    def error(cls, status: int, message: str = "no", **headers: str) -> Scripted:
        body = json.dumps({"error": {"message": message, "type": "error", "code": status}}).encode()
        return cls((body,), status, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass(frozen=True)
class Asked:
    """One request as it arrived."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float


def event(**fields: Any) -> bytes:
    """One event of a stream."""
    return b"data: " + json.dumps(fields).encode() + b"\n\n"


def chunk(text: str | None = None, *, index: int = 0, finish: str | None = None, **more: Any) -> bytes:
    """One piece of a chat answer. `more` goes into the choice, `delta_...` into its delta."""
    delta = {name[6:]: value for name, value in more.items() if name.startswith("delta_")}
    if text is not None:
        delta["content"] = text
    rest = {name: value for name, value in more.items() if not name.startswith("delta_")}
    return event(choices=[{"index": index, "delta": delta, "finish_reason": finish, **rest}])


def usage(prompt: int, new: int, cached: int = 0) -> bytes:
    """The piece that counts the tokens."""
    counts = {"prompt_tokens": prompt, "completion_tokens": new, "total_tokens": prompt + new}
    return event(choices=[], usage={**counts, "prompt_tokens_details": {"cached_tokens": cached}})


def answer(*pieces: bytes | Fault) -> Scripted:
    """A stream of these pieces."""
    return Scripted(pieces)


HELLO = (chunk("Hel"), chunk("lo"), chunk(finish="stop"), usage(7, 2, 3), DONE)


class RemoteServer:
    """The running server. `script` is used up, one answer per request; the last one stays."""

    def __init__(self) -> None:
        self.script: list[Scripted] = []
        self.asked: list[Asked] = []
        self.hung_up = threading.Event()
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self)

            def do_POST(self) -> None:
                outer._answer(self)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False
            request_queue_size = 256

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.base = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        raw = request.rfile.read(int(request.headers.get("Content-Length", 0)))
        headers = {name.lower(): value for name, value in request.headers.items()}
        with self._lock:
            self.asked.append(Asked(request.path, headers, json.loads(raw or b"{}"), time.monotonic()))
            scripted = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        if scripted.pieces == (Fault.CUT,):
            self._cut(request)
            return
        request.send_response(scripted.status)
        for name, value in scripted.headers.items():
            request.send_header(name, value)
        request.send_header("Transfer-Encoding", "chunked")
        request.end_headers()
        for piece in scripted.pieces:
            if piece is Fault.CUT:
                self._cut(request)
                return
            if piece is Fault.SILENCE:
                self._wait_for_hang_up(request)
                return
            request.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        request.wfile.write(b"0\r\n\r\n")

    def _cut(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        request.connection.shutdown(socket.SHUT_RDWR)

    def _wait_for_hang_up(self, request: BaseHTTPRequestHandler) -> None:
        request.close_connection = True
        while not self._stopping.is_set():
            readable, _, _ = select.select([request.connection], [], [], 0.02)
            if readable and not request.connection.recv(1):
                self.hung_up.set()
                return

    def close(self) -> None:
        self._stopping.set()
        self._server.shutdown()
        self._server.server_close()


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for what another thread does, but not for ever."""
    give_up = time.monotonic() + HANG_GUARD_S
    while not condition():
        assert time.monotonic() < give_up, "it never happened"
        time.sleep(0.01)


@contextmanager
def remote_server(*script: Scripted) -> Iterator[RemoteServer]:
    """A server with this script, for the length of a test."""
    server = RemoteServer()
    server.script = list(script)
    try:
        yield server
    finally:
        server.close()


@contextmanager
def remote_engine(base: str, **settings: Any) -> Iterator[RemoteEngine]:
    settings = {"model": "m", "backoff_s": 0.01, "longest_pause_s": 0.05, **settings}
    engine = RemoteEngine(RemoteEndpoint(base_url=base, **settings))
    try:
        yield engine
    finally:
        engine.close()


def ask(engine: RemoteEngine, **request: Any) -> list[Event]:
    return list(engine.submit(GenerateRequest(**{"prompt": CHAT, **request})))


def asked_once(*script: Scripted, request: dict[str, Any] | None = None, **settings: Any) -> list[Event]:
    """The events of one request to a server with this script."""
    with remote_server(*script) as server, remote_engine(server.base, **settings) as engine:
        return ask(engine, **(request or {}))


def error_of(events: list[Event]) -> AylluError:
    assert isinstance(events[-1], Failed), events
    return events[-1].error
