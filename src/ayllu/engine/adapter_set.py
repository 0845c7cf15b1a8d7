"""Which LoRA adapters are loaded beside a decoder, under which names, and who still needs them.

Needs no torch. What it means to place one is the runner's affair: `adapters` does it in torch,
`native_adapters` in native code.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

from ayllu.errors import NoSpaceError, UnknownModelError, UsageError, clip, did_you_mean
from ayllu.model.config import ModelConfig
from ayllu.model.parameters import parameter_shapes
from ayllu.weights.adapter import Adapter

MAX_ADAPTERS = 64
MAX_LOADED_BYTES = 4 << 30
"""Memory of all adapters together, as the runner holds them."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,199}")

Placed = TypeVar("Placed")


@dataclass(eq=False)
class Loaded(Generic[Placed]):
    """One version in memory. It goes when no name means it and no request holds it."""

    placed: Placed
    nbytes: int
    holders: int = 0


class LoadedAdapters(ABC, Generic[Placed]):
    """The adapters loaded beside one decoder.

    A name means the version loaded last; an identity (SHA-256 of the content) means one version for ever.
    A request takes the identity of its adapter when it starts (`acquire`), names it in every step and gives
    it back when it ends (`release`): until then that version stays in memory, whatever happens to the name.
    Not for use by two threads at once: all calls belong to the thread that runs the decoder.
    """

    def __init__(
        self, config: ModelConfig, *, max_adapters: int = MAX_ADAPTERS, max_bytes: int = MAX_LOADED_BYTES
    ) -> None:
        self.max_adapters = max_adapters
        self.max_bytes = max_bytes
        self._config = config
        self._by_name: dict[str, str] = {}
        self._loaded: dict[str, Loaded[Placed]] = {}

    @abstractmethod
    def _placed_bytes(self, adapter: Adapter) -> int:
        """Bytes that `_place` will take."""

    @abstractmethod
    def _place(self, adapter: Adapter) -> Placed:
        """Make the decoder able to apply an adapter, which fits the model. A failure changes nothing.

        Raises NoSpaceError, or UnsupportedError if a number does not fit the decoder's precision.
        """

    @abstractmethod
    def _drop(self, placed: Placed) -> None:
        """Forget what `_place` gave; it is no longer among the loaded."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names that requests may ask for, sorted."""
        return tuple(sorted(self._by_name))

    @property
    def nbytes(self) -> int:
        """Memory of all versions, those included that only running requests still use."""
        return sum(loaded.nbytes for loaded in self._loaded.values())

    def load(self, name: str, adapter: Adapter) -> str:
        """Make `adapter` available as `name` and return its identity. A name in use moves to the new version.

        Raises UsageError for names that are not plain and for adapters read for another model, NoSpaceError
        beyond `max_adapters` or `max_bytes`, UnsupportedError if a number does not fit the decoder's
        precision. A failed load changes nothing.
        """
        if not _NAME.fullmatch(name):
            raise UsageError(
                f"{clip(repr(name), 60)} cannot be the name of an adapter.",
                "Use up to 200 letters, digits, '_', '-', '.', ':' or '/'.",
            )
        self._require_fit(adapter)
        identity, nbytes = adapter.digest, self._placed_bytes(adapter)
        self._require_room(self._by_name | {name: identity}, identity, nbytes)
        if identity not in self._loaded:
            self._loaded[identity] = Loaded(self._place(adapter), nbytes)
        self._by_name[name] = identity
        self._drop_unused()
        return identity

    def unload(self, name: str) -> None:
        """Forget `name`. Requests that hold its version keep it until they release it.

        Raises UnknownModelError.
        """
        del self._by_name[self._known(name)]
        self._drop_unused()

    def identity(self, name: str) -> str:
        """SHA-256 of what `name` means now: equal for equal content, so caches of prompts may be keyed by it.

        Raises UnknownModelError.
        """
        return self._by_name[self._known(name)]

    def acquire(self, name: str) -> str:
        """The identity of `name`, whose content now stays until `release`. Raises UnknownModelError."""
        identity = self.identity(name)
        self._loaded[identity].holders += 1
        return identity

    def release(self, identity: str) -> None:
        """Give back one `acquire`."""
        loaded = self._loaded.get(identity)
        assert loaded is not None and loaded.holders > 0, f"adapter {identity} was released too often"
        loaded.holders -= 1
        self._drop_unused()

    def placed(self, identity: str) -> Placed:
        """What the runner made of the version that `acquire` or `identity` named."""
        assert identity in self._loaded, f"no adapter has the identity {clip(identity)}"
        return self._loaded[identity].placed

    def _require_fit(self, adapter: Adapter) -> None:
        """Every module is a projection of this decoder, of the same shape and rotary layout."""
        shapes = parameter_shapes(self._config)
        for path, change in adapter.modules.items():
            is_projection = path.startswith("layers.") and path.endswith("_proj")
            shape = (change.b.shape[0], change.a.shape[1])
            fits = is_projection and shapes.get(f"{path}.weight") == shape
            if not fits or adapter.layout != self._config.rope.layout:
                raise UsageError(
                    f"The adapter does not fit this model (module {clip(path)}).",
                    "Read it with the config of the model it is loaded beside.",
                )

    def _known(self, name: str) -> str:
        if name not in self._by_name:
            loaded = ", ".join(self.names[:10]) or "none"
            raise UnknownModelError(
                f"No adapter {clip(repr(name), 60)} is loaded.{did_you_mean(name, self.names)}",
                f"Load it first, or use one of: {clip(loaded)}.",
            )
        return name

    def _unused(self, by_name: Mapping[str, str]) -> set[str]:
        """Versions that could go if names meant what `by_name` says."""
        wanted = set(by_name.values())
        return {key for key, loaded in self._loaded.items() if key not in wanted and not loaded.holders}

    def _require_room(self, by_name: Mapping[str, str], identity: str, nbytes: int) -> None:
        """Whether names and versions may become `by_name`, with `nbytes` for the version `identity`."""
        kept = self._loaded.keys() - self._unused(by_name) - {identity}
        # Versions that lost their name to a newer one, but not yet their requests, take a place as well.
        if max(len(by_name), len(kept) + 1) > self.max_adapters:
            raise NoSpaceError(
                f"There is room for {self.max_adapters} adapters, and all places are taken.",
                "Unload one that is not needed.",
            )
        used = sum(self._loaded[key].nbytes for key in kept)
        if used + nbytes > self.max_bytes:
            raise NoSpaceError(
                f"The adapter takes {nbytes / 1e6:.1f} MB; of {self.max_bytes / 1e6:.1f} MB for adapters "
                f"{used / 1e6:.1f} MB are in use.",
                "Unload one that is not needed, or use one of lower rank.",
            )

    def _drop_unused(self) -> None:
        for identity in self._unused(self._by_name):
            self._drop(self._loaded.pop(identity).placed)
