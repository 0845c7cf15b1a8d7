"""`ayllu serve` as a person starts it, and as the system ends it."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import httpx2
import psutil

from ayllu.server.state import keys, runs, users
from ayllu.server.state.database import Database
from tests.server.running import wait_until


class Process:
    """A server's process, what it has said, and a key of its admin."""

    def __init__(self, model: Path, folder: Path, *flags: str) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.port = free.getsockname()[1]
        self.folder = folder
        self.said: list[str] = []
        command = [sys.executable, "-m", "ayllu", "serve", str(model), "--data", str(folder)]
        self.process = subprocess.Popen(
            [*command, "--port", str(self.port), "--threads", "1", *flags], stderr=subprocess.PIPE, text=True
        )
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.said.append(line)

    def ready(self) -> Process:
        wait_until(
            lambda: any("is ready" in line for line in self.said) or self.process.poll() is not None, 120
        )
        assert self.process.poll() is None, self.said
        return self

    def client(self, key: str = "") -> httpx2.Client:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        return httpx2.Client(
            base_url=f"http://127.0.0.1:{self.port}", headers=headers, timeout=60, trust_env=False
        )

    def new_key(self) -> str:
        """Made beside the running server, as `ayllu keys add` does."""
        database = Database.open(None, self.folder)
        try:
            return database.now(
                lambda db: keys.create(
                    db, next(u.id for u in users.listed(db)), "test", ("inference", "metrics", "admin")
                )
            )[1]
        finally:
            database.close()

    def kill(self, number: int = signal.SIGKILL) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(10)
        assert self.process.stderr is not None
        self.process.stderr.close()
        return code


def test_the_first_start_gives_one_way_in_and_the_next_none(tmp_path: Path, smollm2_gguf: Path) -> None:
    server = Process(smollm2_gguf, tmp_path).ready()
    link = next(match[0] for line in server.said if (match := re.search(r"http\S+/sign-in\?token=\S+", line)))
    with server.client() as client:
        assert client.get("/v1/models").status_code == 401
        page = client.get(link)
        assert page.status_code == 200
        token = link.partition("token=")[2]
        assert token in page.text
        entered = client.post(
            "/sign-in", data={"token": token}, headers={"origin": f"http://127.0.0.1:{server.port}"}
        )
        assert entered.status_code == 303
        assert client.get("/api/me").json()["user"]["role"] == "admin"
        assert client.post("/sign-in", data={"token": token}).status_code == 401
    mine = psutil.Process(server.process.pid)
    listening = [
        one.laddr
        for process in (mine, *mine.children(recursive=True))
        for one in process.net_connections("inet")
        if one.status == psutil.CONN_LISTEN
    ]
    assert [tuple(one) for one in listening] == [("127.0.0.1", server.port)]
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    assert server.kill(signal.SIGTERM) == 0
    assert not psutil.pid_exists(server.process.pid)
    again = Process(smollm2_gguf, tmp_path).ready()
    assert not any("/sign-in" in line for line in again.said)
    again.kill(signal.SIGTERM)


def test_kill_9_of_the_server_loses_nothing_that_was_acknowledged(tmp_path: Path, smollm2_gguf: Path) -> None:
    """R3 too: the engine ends with it, and the port is free at once."""
    server = Process(smollm2_gguf, tmp_path).ready()
    key = server.new_key()
    with server.client(key) as client:
        kept = client.post("/v1/responses", json={"input": "Say hello.", "max_output_tokens": 4}).json()
        file = client.post(
            "/v1/files", files={"file": ("a.txt", b"hello")}, data={"purpose": "user_data"}
        ).json()
        conversation = client.post("/api/conversations", json={"title": "kept"}).json()
        begun = client.post(
            f"/api/conversations/{conversation['id']}/runs",
            json={"content": "Count to a thousand.", "max_output_tokens": 4000, "temperature": 2.0},
        ).json()
        database = Database.open(None, tmp_path)
        owner = database.now(lambda db: users.listed(db))[0].id
        wait_until(lambda: database.now(lambda db: runs.get(db, begun["run_id"], owner)).events > 10)
        database.close()
        children = psutil.Process(server.process.pid).children(recursive=True)
        assert children
        server.kill(signal.SIGKILL)
    wait_until(lambda: not any(_runs(child) for child in children))
    with socket.create_server(("127.0.0.1", server.port)):
        pass
    again = Process(smollm2_gguf, tmp_path).ready()
    with again.client(key) as client:
        assert client.get(f"/v1/responses/{kept['id']}").json() == kept
        assert client.get(f"/v1/files/{file['id']}/content").content == b"hello"
        messages = client.get(f"/api/conversations/{conversation['id']}").json()["messages"]
        assert messages[0]["content"][0]["text"] == "Count to a thousand."
        run = next(one for one in client.get("/api/runs").json()["runs"] if one["id"] == begun["run_id"])
        assert run["status"] == "interrupted"
        response: dict[str, Any] = client.get(f"/api/runs/{begun['run_id']}").json()
        assert response["status"] == "incomplete"
        assert response["output"][0]["content"][0]["text"]
        assert client.post("/v1/responses", json={"input": "Hi", "max_output_tokens": 2}).status_code == 200
    again.kill(signal.SIGTERM)


def _runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_it_does_not_listen_beyond_this_machine_unprotected(tmp_path: Path, smollm2_gguf: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "ayllu",
        "serve",
        str(smollm2_gguf),
        "--data",
        str(tmp_path),
        "--host",
        "0.0.0.0",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "--tls-certificate" in done.stderr
