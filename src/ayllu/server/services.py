"""Everything that routes need, opened together and closed together."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from ayllu.engine.options import EngineOptions
from ayllu.errors import AylluError
from ayllu.machine_memory import available_memory
from ayllu.server.access import Identity
from ayllu.server.generation import Generator
from ayllu.server.limits import Limiter, Limits
from ayllu.server.logs import ServerLog
from ayllu.server.metrics import Metrics
from ayllu.server.models import ModelPool
from ayllu.server.oidc import Oidc
from ayllu.server.pulls import Pulls
from ayllu.server.recent_callers import RecentCallers
from ayllu.server.runs import Runs
from ayllu.server.state import adapters, audit, keys, options, sign_in, uploads, users
from ayllu.server.state import runs as stored_runs
from ayllu.server.state.database import Database
from ayllu.server.telemetry import Telemetry
from ayllu.settings import Settings, with_stored
from ayllu.weights.store import open_store

PREPARING_THREADS = 4
MEMORY_SHARE = 0.8
UNKNOWN_MEMORY = 8 << 30
"""Taken for what is free where the system does not tell."""

HOUSEKEEPING_S = 30.0
_log = logging.getLogger("ayllu.server")


class Services:
    """One server's parts. `open` makes them; nothing of them works before."""

    def __init__(
        self,
        settings: Settings,
        database: Database,
        *,
        engine_options: Callable[[str], EngineOptions],
        models: Sequence[tuple[str, Path]] = (),
        default_model: str | None = None,
        opener: Any = None,
    ) -> None:
        self.given = settings
        self.settings = settings
        self.database = database
        self.started_at = time.time()
        self.stopping = False
        self.store = open_store(settings)
        self.metrics = Metrics()
        self.log = ServerLog()
        self.telemetry = Telemetry.of(settings)
        self.oidc = Oidc(settings) if settings.oidc_issuer else None
        self.limiter = Limiter(Limits.of(settings))
        self.threads = ThreadPoolExecutor(PREPARING_THREADS, thread_name_prefix="ayllu-prepare")
        more = {} if opener is None else {"opener": opener}
        self.models = ModelPool(
            self.store,
            options=engine_options,
            budget_bytes=settings.memory or int((available_memory() or UNKNOWN_MEMORY) * MEMORY_SHARE),
            keep_alive_s=settings.keep_alive_s,
            default_model=default_model or (models[0][0] if models else settings.default_model),
            pinned=models,
            **more,
        )
        self.pulls = Pulls(self.store, self._pulled)
        self.generator = Generator(self.models, self.limiter, self.metrics, self.telemetry, self.threads)
        self.runs = Runs(database, self.generator, self.metrics)
        self.recent_callers = RecentCallers()
        self.used_keys: dict[str, float] = {}
        self._housekeeping: asyncio.Task[None] | None = None

    async def open(self) -> None:
        """Apply what is stored, mark what was interrupted, begin to keep house. Loads no model."""
        await self.apply_stored()
        for run in await self.runs.recover():
            _log.warning("run %s was interrupted when the server ended", run.id)
        await self.refresh_adapters()
        self._housekeeping = asyncio.create_task(self._keep_house())

    async def close(self, within_s: float) -> None:
        """Refuse what is new, let what is open end for so long, then end everything."""
        self.stopping = self.generator.stopping = True
        await self.runs.close(within_s)
        if self._housekeeping is not None:
            self._housekeeping.cancel()
        await self.pulls.close()
        await self.models.close()
        with contextlib.suppress(AylluError):
            await self._write_key_uses()
        self.threads.shutdown(wait=False, cancel_futures=True)
        await asyncio.to_thread(self.telemetry.close)
        self.database.close()

    async def apply_stored(self) -> None:
        """Settings that admins stored, where neither a flag nor the environment nor a file says otherwise."""
        kept: Mapping[str, Any] = await self.database.run(options.all_of, read=True)
        self.settings = with_stored(self.given, kept)
        self.limiter.limits = Limits.of(self.settings)
        self.models.keep_alive_s = self.settings.keep_alive_s

    async def refresh_adapters(self) -> None:
        """Tell the models of the adapters that are registered."""
        listed = await self.database.run(adapters.listed, read=True)
        self.models.set_adapters({one.name: (one.model, Path(one.path)) for one in listed})

    async def _pulled(self, name: str) -> None:
        self.metrics.pulled("ok")
        await self.audit("server", "model.pulled", name)

    async def audit(self, actor: str, action: str, target: str = "", **details: Any) -> None:
        """Write a line of the audit log."""
        await self.database.run(lambda db: audit.record(db, actor, action, target, details))

    def note_use(self, identity: Identity) -> None:
        """Remember when a key was used; written down now and then."""
        if identity.key is not None:
            self.used_keys[identity.key.id] = time.time()

    async def _write_key_uses(self) -> None:
        used, self.used_keys = self.used_keys, {}
        if used:
            await self.database.run(lambda db: keys.touch(db, used))

    async def _keep_house(self) -> None:
        while True:
            await asyncio.sleep(HOUSEKEEPING_S)
            try:
                await self._write_key_uses()
                await self.database.run(_forget_expired)
            except AylluError:
                _log.exception("housekeeping failed; it is tried again")

    async def user_count(self) -> int:
        """How many users there are."""
        return await self.database.run(users.count, read=True)


def _forget_expired(db: Any) -> None:
    now = time.time()
    for kind in (stored_runs, uploads, sign_in):
        kind.expire(db, now)
