"""Run inside a network namespace: bring loopback up, serve under strace, use everything, stop.

python isolated_run.py MODEL DATA TRACE
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

PORT = 8420


def loopback_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        flags = struct.pack("16sh", b"lo", 1 | 64)  # IFF_UP, IFF_RUNNING
        fcntl.ioctl(control, 0x8914, flags)  # SIOCSIFFLAGS


def ask(path: str, key: str = "", body: dict[str, Any] | None = None) -> bytes:
    headers = {"content-type": "application/json"}
    if key:
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data=data, headers=headers)
    with urllib.request.urlopen(request, timeout=60) as response:
        answer: bytes = response.read()
        return answer


def main(model: str, data: str, trace: str) -> None:
    loopback_up()
    sys.path.insert(0, str(Path.cwd()))
    from ayllu.server.state import keys, users
    from ayllu.server.state.database import Database

    database = Database.open(None, Path(data))
    key = database.now(
        lambda db: keys.create(
            db, users.create(db, "admin", "admin").id, "test", ("inference", "models", "metrics", "admin")
        )
    )[1]
    database.close()
    command = ["strace", "-f", "-qq", "-o", trace, "-e", "trace=%network"]
    command += [sys.executable, "-m", "ayllu", "serve", model, "--data", data, "--port", str(PORT)]
    server = subprocess.Popen(command)
    try:
        for _ in range(1200):
            try:
                ask("/ready")
                break
            except (OSError, urllib.error.URLError):
                time.sleep(0.1)
        say = {"messages": [{"role": "user", "content": "Hello."}], "max_tokens": 8}
        ask("/v1/chat/completions", key, say)
        ask("/v1/chat/completions", key, {**say, "stream": True})
        ask("/v1/responses", key, {"input": "Hello.", "max_output_tokens": 8})
        for path in (
            "/docs",
            "/openapi.json",
            "/docs/swagger-ui-bundle.js",
            "/metrics",
            "/v1/models",
            "/api/models",
        ):
            ask(path, key)
        remote = [{"type": "image_url", "image_url": {"url": "http://192.0.2.1/x.png"}}]
        try:
            ask("/v1/chat/completions", key, {"messages": [{"role": "user", "content": remote}]})
        except urllib.error.HTTPError as error:
            assert error.code == 400
            print("answered")
    finally:
        # strace itself takes no signals: the server is its child.
        for child in Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text("ascii").split():
            os.kill(int(child), signal.SIGTERM)
        server.wait(60)


if __name__ == "__main__":
    main(*sys.argv[1:])
