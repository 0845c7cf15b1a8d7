"""A real server in a thread of the test, on a free port, over engines of the test's choice."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2

from ayllu.engine.options import EngineOptions
from ayllu.server.serve import StoppableServer, new_server
from ayllu.server.services import Services
from ayllu.server.state import keys, users
from ayllu.server.state.database import Database
from ayllu.server.state.records import User
from ayllu.settings import Settings
from tests.engine.scripted_engine import ScriptedEngine, shout


@dataclass
class Running:
    """What a test needs of a server that runs."""

    url: str
    services: Services
    server: StoppableServer
    loop: asyncio.AbstractEventLoop
    database: Database
    admin: User
    admin_key: str
    user: User
    user_key: str
    engines: dict[str, Any] = field(default_factory=dict)

    def client(self, key: str | None = None, **more: Any) -> httpx2.Client:
        """A client of the user, or of whoever has `key` ('' for nobody)."""
        shown = self.user_key if key is None else key
        headers = {"authorization": f"Bearer {shown}"} if shown else {}
        return httpx2.Client(base_url=self.url, headers=headers, timeout=60, trust_env=False, **more)

    def new_key(self, user: User, *scopes: Any, **more: Any) -> str:
        """A key of `user`."""
        return self.database.now(
            lambda db: keys.create(db, user.id, "test", scopes or ("inference",), **more)
        )[1]

    def call(self, work: Any) -> Any:
        """Run a coroutine in the server's loop."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(60)


@contextmanager
def running(
    folder: Path,
    *,
    opener: Callable[..., Any] | None = None,
    models: Sequence[tuple[str, Path]] = (("tiny", Path("tiny")),),
    script: Any = shout,
    slots: int = 8,
    options: Callable[[str], EngineOptions] | None = None,
    database: str | None = None,
    load: bool = True,
    **settings: Any,
) -> Iterator[Running]:
    """A server of `models`, each opened by `opener` (scripted engines that play `script`, if not given)."""
    engines: dict[str, Any] = {}

    def scripted(path: Path, *_: Any, model_name: str | None = None, **__: Any) -> ScriptedEngine:
        name = model_name or path.name
        engines[name] = ScriptedEngine(script, slots=slots, model=name)
        return engines[name]

    chosen = Settings(
        **{"store": folder / "models", "data": folder / "server", "port": 0, "memory": 8 << 30} | settings
    )
    opened = Database.open(database, chosen.data)
    admin, user = opened.now(_accounts)
    ready = threading.Event()
    made: list[Any] = []

    async def serve() -> None:
        services = Services(
            chosen,
            opened,
            engine_options=options or (lambda name: EngineOptions(slots=slots)),
            models=models,
            opener=opener or scripted,
        )
        await services.open()
        server = new_server(services)
        made.extend((services, server, asyncio.get_running_loop()))
        serving = asyncio.create_task(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        ready.set()
        await serving
        await services.close(0)

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    if not ready.wait(60):
        raise AssertionError("the server did not start")
    services, server, loop = made
    port = server.servers[0].sockets[0].getsockname()[1]
    keys_made = opened.now(
        lambda db: [
            keys.create(db, admin.id, "admin", ("inference", "models", "metrics", "admin"))[1],
            keys.create(db, user.id, "user", ("inference",))[1],
        ]
    )
    one = Running(
        f"http://127.0.0.1:{port}",
        services,
        server,
        loop,
        opened,
        admin,
        keys_made[0],
        user,
        keys_made[1],
        engines,
    )
    try:
        if load:
            for name, _ in models:
                one.call(services.models.load(name))
        yield one
    finally:
        server.should_exit = True
        thread.join(60)


def _accounts(db: Any) -> tuple[User, User]:
    admin = users.by_name(db, "admin") or users.create(db, "admin", "admin")
    user = users.by_name(db, "someone") or users.create(db, "someone", "user")
    return admin, user


def events_of(response: httpx2.Response) -> list[dict[str, Any] | str]:
    """The events of a stream: their JSON, and '[DONE]' as it is."""
    said: list[dict[str, Any] | str] = []
    for line in response.iter_lines():
        if line.startswith("data: "):
            data = line.removeprefix("data: ")
            said.append(data if data == "[DONE]" else json.loads(data))
    return said


def wait_until(condition: Callable[[], bool], seconds: float = 60) -> None:
    """For what must come, however slow the machine is."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.005)
