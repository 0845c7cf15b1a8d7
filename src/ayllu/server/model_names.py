"""Which names requests may use: models of the store, models that the operator pinned, and adapters.

A name is only ever looked up, never taken for a path.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ayllu.errors import ModelFileError, UnknownModelError, UsageError, clip, did_you_mean
from ayllu.server.model_memory import stored_bytes
from ayllu.weights.catalogue import Entry
from ayllu.weights.installed import MANIFEST, UNKNOWN_LICENCE, InstalledModel, read_installed
from ayllu.weights.sources.safe_names import MODEL_NAME
from ayllu.weights.store import Store

MOST_NAME = 200


@dataclass(frozen=True)
class ResolvedModel:
    """What a name means. adapter: the adapter that it names, if it is one of this model."""

    name: str
    adapter: str | None = None


@dataclass(frozen=True)
class KnownModel:
    """A model that is here. created: when it came, in seconds since 1970. entry: the catalogue's word."""

    name: str
    path: Path
    size_bytes: int
    licence: str
    created: float | None
    entry: Entry | None = None


class ModelNames:
    """Looks names up. Cheap enough for an event loop: a manifest is read again only when it has changed."""

    def __init__(self, store: Store, default: str | None, pinned: Sequence[tuple[str, Path]]) -> None:
        self.default = default
        self.adapters: dict[str, tuple[str, Path]] = {}
        self._store = store
        self._pinned = {name: _pinned(name, path) for name, path in pinned}
        self._read: dict[str, tuple[int, KnownModel | None]] = {}

    def set_adapters(self, adapters: Mapping[str, tuple[str, Path]]) -> None:
        """From now on, these adapters (name -> model and folder) and no others."""
        self.adapters = dict(adapters)

    def adapters_of(self, model: str) -> tuple[str, ...]:
        """Names of the model's adapters that requests can use."""
        return tuple(
            name for name, (target, _) in self.adapters.items() if target == model and self.find(name) is None
        )

    def known(self) -> list[KnownModel]:
        """Every model that is here, by name; what is damaged is left out."""
        names = set(self._folders()) - set(self._pinned)
        stored = [model for name in names if (model := self._stored(name)) is not None]
        return sorted([*self._pinned.values(), *stored], key=lambda model: model.name)

    def find(self, name: str) -> KnownModel | None:
        """The model of that very name, if it is here."""
        return self._pinned.get(name) or self._stored(name)

    def resolve(self, name: str | None) -> ResolvedModel:
        """What a request means; None is the default model, or else the only one.

        Raises UnknownModelError saying what is near or what to fetch, UsageError where a name is needed.
        """
        if name is None:
            return ResolvedModel(self._default())
        if len(name) <= MOST_NAME:
            if self.find(name) is not None:
                return ResolvedModel(name)
            if name in self.adapters:
                target = self.adapters[name][0]
                if self.find(target) is None:
                    raise self._unknown(target, f"{name} is an adapter of {target}. ")
                return ResolvedModel(target, name)
        raise self._unknown(name)

    def _default(self) -> str:
        if self.default is not None and self.find(self.default) is not None:
            return self.default
        known = self.known()
        if len(known) == 1:
            return known[0].name
        if self.default is not None:
            raise self._unknown(self.default, "The request names no model. ")
        raise UsageError("The request names no model, and there is no default.", self._way_out())

    def _unknown(self, name: str, before: str = "") -> UnknownModelError:
        if self._store.catalogue.get(name) is not None:
            return UnknownModelError(
                f"{before}{name} is not on this machine yet.", f"Fetch it: ayllu pull {name}"
            )
        near = did_you_mean(name[:MOST_NAME], [*self._names(), *self._store.catalogue.names()])
        return UnknownModelError(f"{before}No model is called {clip(repr(name))}.{near}", self._way_out())

    def _names(self) -> list[str]:
        return [*(model.name for model in self.known()), *self.adapters]

    def _way_out(self) -> str:
        if names := self._names():
            return f"Name one of: {clip(', '.join(names), 300)}."
        return "No model is on this machine yet; `ayllu list` shows what can be pulled."

    def _folders(self) -> list[str]:
        try:
            return [item.name for item in self._store.root.iterdir() if MODEL_NAME.fullmatch(item.name)]
        except OSError:
            return []

    def _stored(self, name: str) -> KnownModel | None:
        if not MODEL_NAME.fullmatch(name):
            return None
        folder = self._store.root / name
        try:
            changed = (folder / MANIFEST).stat().st_mtime_ns
        except OSError:
            self._read.pop(name, None)
            return None
        before = self._read.get(name)
        if before is None or before[0] != changed:
            try:
                model = _of_store(read_installed(folder), self._store.catalogue.get(name))
            except ModelFileError:
                model = None
            before = self._read[name] = (changed, model)
        return before[1]


def _of_store(model: InstalledModel, entry: Entry | None) -> KnownModel:
    try:
        created = datetime.datetime.fromisoformat(model.pulled_at).timestamp()
    except ValueError:
        created = None
    return KnownModel(model.name, model.path, model.size_bytes, model.recorded_licence, created, entry)


def _pinned(name: str, path: Path) -> KnownModel:
    try:
        created = path.stat().st_mtime
    except OSError:
        created = None
    return KnownModel(name, path, stored_bytes(path), UNKNOWN_LICENCE, created)
