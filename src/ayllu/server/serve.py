"""The server's process: everything opened, the first sign-in made, requests served, and an orderly end.

A first signal to stop refuses what is new, with 503, and lets what is open end; what has not ended in time
gets an error event. A second one ends everything at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import signal
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType

import uvicorn
from sqlalchemy.orm import Session as Db

from ayllu.engine.options import EngineOptions
from ayllu.errors import AylluError, EngineUnavailableError, UsageError
from ayllu.server.app import create_app
from ayllu.server.http_protocol import bounded
from ayllu.server.services import Services
from ayllu.server.state import audit, sign_in, users
from ayllu.server.state.database import Database
from ayllu.settings import Settings

FIRST_ADMIN = "admin"
FIRST_LINK_S = 24 * 3600.0
LAST_WORDS_S = 1.0
"""Seconds for error events to reach the clients whose answers were cut off."""

_log = logging.getLogger("ayllu.server")


def require_safe_address(settings: Settings) -> None:
    """Raises UsageError where keys and passwords would travel readable beyond this machine."""
    if (settings.tls_certificate is None) != (settings.tls_key is None):
        raise UsageError("TLS needs a certificate and its key.", "Set both: --tls-certificate and --tls-key.")
    behind_proxy = (settings.public_url or "").startswith("https:")
    if (
        _is_loopback(settings.host)
        or settings.tls_certificate is not None
        or behind_proxy
        or settings.plain_http
    ):
        return
    raise UsageError(
        f"Listening on {settings.host} without TLS would show keys and passwords to the network.",
        "Set --tls-certificate and --tls-key; or --public-url https://… of a proxy; or --plain-http.",
    )


def listen(settings: Settings) -> socket.socket:
    """The socket to serve on. Raises UsageError where the address cannot be had."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise UsageError(
            f"{settings.host}, port {settings.port}, cannot be listened on: {error.strerror or error}.",
            "Choose another: --port, or --host.",
        ) from error


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def first_sign_in(database: Database, settings: Settings, port: int) -> str | None:
    """Where nobody has an account yet: make an admin, and return the address of a one-time link."""

    def make(db: Db) -> str | None:
        if users.count(db):
            return None
        admin = users.create(db, FIRST_ADMIN, "admin")
        audit.record(db, "server", "user.add", FIRST_ADMIN, {"role": "admin"})
        return sign_in.new_link(db, admin.id, FIRST_LINK_S)

    token = database.now(make)
    return None if token is None else f"{base_url(settings, port)}/sign-in?token={token}"


def base_url(settings: Settings, port: int) -> str:
    """The address by which a person on this machine reaches the server."""
    if settings.public_url:
        return settings.public_url.rstrip("/")
    scheme = "http" if settings.tls_certificate is None else "https"
    host = "127.0.0.1" if settings.host in ("0.0.0.0", "::") else settings.host
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"


class StoppableServer(uvicorn.Server):
    """uvicorn, which would close its doors first and so leave new requests without an answer."""

    def __init__(self, config: uvicorn.Config, services: Services, patience_s: float) -> None:
        super().__init__(config)
        self._services = services
        self._patience_s = patience_s
        self._stop_at: float | None = None
        self._cut_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._stop_at is not None and sig in (signal.SIGINT, signal.SIGTERM):
            self.should_exit = self.force_exit = True
        self.stop()

    def stop(self) -> None:
        """Begin to end. May be called from a signal handler."""
        if self._stop_at is None:
            self._stop_at = time.monotonic() + self._patience_s
            self._services.stopping = self._services.generator.stopping = True

    async def on_tick(self, counter: int) -> bool:
        if await super().on_tick(counter):
            return True
        if self._stop_at is None:
            return False
        generator, now = self._services.generator, time.monotonic()
        # The limiter also knows of embeddings, and of those who wait for a model to load.
        if not generator.open and not self._services.runs.open and not self._services.limiter.held:
            return True
        if now < self._stop_at:
            return False
        if self._cut_at is None:
            self._cut_at = now
            generator.fail_all(EngineUnavailableError("The server was stopped.", "Send the request again."))
        return now - self._cut_at > LAST_WORDS_S


def new_server(services: Services, *, port: int | None = None) -> StoppableServer:
    """A server that is ready to `serve`."""
    settings = services.settings
    certificate = settings.tls_certificate
    config = uvicorn.Config(
        create_app(services),
        **bounded(
            host=settings.host,
            port=settings.port if port is None else port,
            log_config=None,
            access_log=False,
            lifespan="off",
            timeout_graceful_shutdown=2,
            timeout_keep_alive=30,
            ssl_certfile=None if certificate is None else str(certificate),
            ssl_keyfile=None if settings.tls_key is None else str(settings.tls_key),
        ),
    )
    return StoppableServer(config, services, settings.stop_timeout_s)


async def run(
    settings: Settings,
    database: Database,
    listening: socket.socket,
    *,
    engine_options: Callable[[str], EngineOptions],
    models: Sequence[tuple[str, Path]],
    load: Sequence[str],
    say: Callable[[str], None],
) -> None:
    """Serve until told to stop. load: models to have in memory from the start. say: tells the person."""
    services = Services(settings, database, engine_options=engine_options, models=models)
    await services.open()
    server = new_server(services)
    loading = asyncio.create_task(_load(services, load, say))
    announcing = asyncio.create_task(_announce(server, services, say))
    try:
        await server.serve([listening])
    finally:
        loading.cancel()
        announcing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(loading, announcing, return_exceptions=True)
        await services.close(0)


async def _load(services: Services, names: Sequence[str], say: Callable[[str], None]) -> None:
    for name in names:
        try:
            await services.models.load(name)
            say(f"{name} is ready.")
        except AylluError as error:
            say(f"{name} could not be loaded: {error}")


async def _announce(server: StoppableServer, services: Services, say: Callable[[str], None]) -> None:
    while not server.started:
        await asyncio.sleep(0.02)
    port = server.servers[0].sockets[0].getsockname()[1]
    link = await asyncio.to_thread(first_sign_in, services.database, services.settings, port)
    address = base_url(services.settings, port)
    say(f"ayllu serves at {address} (API: {address}/v1, to read: {address}/docs)")
    if link is not None:
        say(f"Sign in once with this link, within a day: {link}")
    say("Keys for programs: ayllu keys add --user NAME --name PROGRAM")
