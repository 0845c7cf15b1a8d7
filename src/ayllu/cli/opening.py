"""How commands come to a model or an engine: found, or fetched if that was asked for, here or on a server.

Everything heavy is imported inside the functions.
"""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING

from ayllu.paths import expanded

if TYPE_CHECKING:
    from ayllu.engine.remote.engine import RemoteEngine
    from ayllu.settings import Settings
    from ayllu.weights.installed import InstalledModel

API_KEY_VARIABLE = "AYLLU_API_KEY"


def find_or_pull(model: str | None, pull: bool, settings: Settings) -> InstalledModel:
    """The model, fetched first only if that was asked for. The default may give way to a smaller one.

    Raises UnknownModelError naming the command that would fetch it.
    """
    from ayllu.weights.installed import find_installed, in_place

    name = model or settings.default_model
    # The two common cases first: the store brings catalogue, sources and an HTTP library with it.
    if (installed := find_installed(settings.store, name)) is not None:
        return installed
    if name.endswith(".gguf") and "/" in name and (path := expanded(name)).is_file():
        return in_place(path)
    return _find_or_pull_by_store(model, pull, settings)


def _find_or_pull_by_store(model: str | None, pull: bool, settings: Settings) -> InstalledModel:
    from ayllu.errors import UnknownModelError
    from ayllu.progress import TerminalProgress
    from ayllu.weights.store import open_store, pull_with_fallback

    store = open_store(settings)
    try:
        return store.find(model or settings.default_model)
    except UnknownModelError:
        if not pull:
            raise
    if model is not None:
        return store.ensure(model, TerminalProgress(0))
    print(f"Fetching {settings.default_model}, this happens once.", file=sys.stderr)
    installed, notes = pull_with_fallback(store, settings.default_model, TerminalProgress(0))
    for note in notes:
        print(note, file=sys.stderr)
    return installed


def open_remote(
    endpoint: str,
    model: str,
    *,
    dialect: str,
    api_version: str | None,
    allow_plain_http: bool,
    most_open: int,
) -> RemoteEngine:
    """A model on a server; its key comes from the environment alone, where other programs cannot read it.

    Raises UsageError for an address or a dialect that cannot be.
    """
    from ayllu.engine.remote.endpoint import RemoteEndpoint
    from ayllu.engine.remote.engine import RemoteEngine

    return RemoteEngine(
        RemoteEndpoint(
            base_url=endpoint,
            model=model,
            api_key=os.environ.get(API_KEY_VARIABLE) or None,
            dialect=dialect,  # type: ignore[arg-type]  # checked there, with a suggestion
            api_version=api_version,
            allow_plain_http=allow_plain_http,
            max_open=most_open,
        )
    )
