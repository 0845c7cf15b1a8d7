"""A web server on loopback that can misbehave, and that can speak a model hub's protocol.

It counts every body byte it sends, so that tests can say what an interrupted transfer really cost.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + "0" * 34


@dataclass
class Served:
    """One file and the faults it is served with. Lists are used up, one item per request."""

    data: bytes
    etag: str | None = None
    cuts: list[int | None] = field(default_factory=list)
    stalls: list[int | None] = field(default_factory=list)
    statuses: list[int] = field(default_factory=list)
    length_lie: int = 0
    extra: bytes = b""
    chunked: bool = False
    ignores_range: bool = False
    range_shift: int = 0
    pause_s: float = 0.0
    block: int = 16384
    redirect: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body_bytes_sent: int = 0
    requests: list[dict[str, str]] = field(default_factory=list)


class Loopback:
    """The running server. `url(path)` is where `files[path]` is served."""

    def __init__(self) -> None:
        self.files: dict[str, Served] = {}
        self.asked: list[str] = []
        self.stopping = threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                outer._answer(self, body=True)

            def do_HEAD(self) -> None:
                outer._answer(self, body=False)

            def log_message(self, format: str, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                pass

        self._server = Server(("127.0.0.1", 0), Handler)
        self.port = self._server.server_address[1]
        self.base = f"http://127.0.0.1:{self.port}"
        threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True
        ).start()

    def url(self, path: str) -> str:
        return self.base + path

    def serve(self, path: str, data: bytes, **faults: object) -> Served:
        self.files[path] = Served(data, **faults)
        return self.files[path]

    def serve_repository(
        self, repository: str, files: dict[str, bytes], *, revision: str = "main", listed: bool = True
    ) -> dict[str, Served]:
        """A model repository: its listing, its small files, and its large ones behind a redirect."""
        siblings, served = [], {}
        for name, data in files.items():
            blob_id = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
            sibling: dict[str, object] = {"rfilename": name}
            if listed:
                sibling |= {"size": len(data), "blobId": blob_id}
            resolve = f"/{repository}/resolve/{COMMIT}/{name}"
            by_revision = f"/{repository}/resolve/{revision}/{name}"
            if name.endswith((".safetensors", ".gguf", ".bin")):
                sha256 = hashlib.sha256(data).hexdigest()
                if listed:
                    sibling["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": 130}
                headers = {
                    "X-Repo-Commit": COMMIT,
                    "X-Linked-ETag": f'"{sha256}"',
                    "X-Linked-Size": str(len(data)),
                }
                target = f"http://localhost:{self.port}/cdn/{sha256}"
                for address in (resolve, by_revision):
                    self.serve(address, b"", redirect=target, headers=headers)
                served[name] = self.serve(f"/cdn/{sha256}", data, etag=f'"{sha256}"')
            else:
                headers = {"X-Repo-Commit": COMMIT}
                served[name] = self.serve(resolve, data, etag=f'"{blob_id}"', headers=headers)
            siblings.append(sibling)
        listing = {"id": repository, "sha": COMMIT, "siblings": siblings}
        self.serve(f"/api/models/{repository}/revision/{revision}", json.dumps(listing).encode())
        return served

    def _answer(self, request: BaseHTTPRequestHandler, body: bool) -> None:
        path = unquote(urlsplit(request.path).path)
        self.asked.append(path)
        served = self.files.get(path)
        if served is None:
            self._short(request, 404)
            return
        served.requests.append({name.lower(): value for name, value in request.headers.items()})
        if served.statuses:
            self._short(request, served.statuses.pop(0), {"Retry-After": "0"})
        elif served.redirect:
            self._short(request, 302, {"Location": served.redirect, **served.headers})
        else:
            self._send(request, served, body)

    def _short(
        self, request: BaseHTTPRequestHandler, status: int, headers: dict[str, str] | None = None
    ) -> None:
        request.send_response(status)
        for name, value in (headers or {}).items():
            request.send_header(name, value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, served: Served, body: bool) -> None:
        start = self._start(request, served)
        if start is not None and start >= len(served.data):
            self._short(request, 416, {"Content-Range": f"bytes */{len(served.data)}"})
            return
        data = served.data[start or 0 :] + served.extra
        request.send_response(200 if start is None else 206)
        for name, value in served.headers.items():
            request.send_header(name, value)
        if served.etag:
            request.send_header("ETag", served.etag)
        request.send_header("Accept-Ranges", "bytes")
        if start is not None:
            total = len(served.data) + served.length_lie
            first = start + served.range_shift
            request.send_header("Content-Range", f"bytes {first}-{total - 1}/{total}")
        if served.chunked:
            request.send_header("Transfer-Encoding", "chunked")
        else:
            request.send_header("Content-Length", str(len(data) + served.length_lie))
        request.end_headers()
        if body:
            self._send_body(request, served, data)

    def _start(self, request: BaseHTTPRequestHandler, served: Served) -> int | None:
        match = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
        if not match or served.ignores_range:
            return None
        guard = request.headers.get("If-Range")
        return None if guard is not None and guard != served.etag else int(match[1])

    def _send_body(self, request: BaseHTTPRequestHandler, served: Served, data: bytes) -> None:
        cut = served.cuts.pop(0) if served.cuts else None
        stall = served.stalls.pop(0) if served.stalls else None
        end = min(len(data) if limit is None else limit for limit in (cut, stall))
        for at in range(0, end, served.block):
            block = data[at : min(at + served.block, end)]
            if served.chunked:
                request.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
            else:
                request.wfile.write(block)
            served.body_bytes_sent += len(block)
            if served.pause_s:
                time.sleep(served.pause_s)
        if stall is not None:
            self.stopping.wait(5)
        if cut is not None or stall is not None or served.length_lie:
            request.close_connection = True
        elif served.chunked:
            request.wfile.write(b"0\r\n\r\n")

    def close(self) -> None:
        self.stopping.set()
        self._server.shutdown()
        self._server.server_close()


@contextmanager
def loopback() -> Iterator[Loopback]:
    """A server for the length of a test."""
    server = Loopback()
    try:
        yield server
    finally:
        server.close()
