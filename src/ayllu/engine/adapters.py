"""LoRA adapters at work: several loaded beside one decoder, each applied to its own rows of a packed step.

The decoder stays as it is. Hooks on the projections that any loaded adapter changes add
scale * (x A') B' to the rows of the requests that asked for it; without such rows they return at once.
The slow twin merges the change into the weights (`tests/engine/small_adapters.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ayllu.errors import (
    NoSpaceError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
    clip,
    did_you_mean,
)
from ayllu.model.decoder import Decoder
from ayllu.weights.adapter import Adapter
from ayllu.weights.load import tensor_of

MAX_ADAPTERS = 64
MAX_LOADED_BYTES = 4 << 30
"""Memory of all adapters together, in the decoder's precision."""

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:/-]{0,199}")


@dataclass(frozen=True, eq=False)
class _PlacedLowRank:
    """a [r, inputs] and b [outputs, r] on the device and in the precision of the matrix that they change."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(eq=False)
class _Loaded:
    """One version in memory. It goes when no name means it and no request holds it."""

    changes: Mapping[str, _PlacedLowRank]
    nbytes: int
    holders: int = 0


class AdapterSet:
    """The adapters loaded beside one decoder.

    A name means the version loaded last; an identity (SHA-256 of the content) means one version for ever.
    A request takes the identity of its adapter when it starts (`acquire`), names it in every step (`applied`)
    and gives it back when it ends (`release`): until then that version stays in memory, whatever happens to
    the name. Not for use by two threads at once: all calls belong to the thread that runs the decoder.
    """

    def __init__(
        self, decoder: Decoder, *, max_adapters: int = MAX_ADAPTERS, max_bytes: int = MAX_LOADED_BYTES
    ) -> None:
        self.max_adapters = max_adapters
        self.max_bytes = max_bytes
        self._decoder = decoder
        self._by_name: dict[str, str] = {}
        self._loaded: dict[str, _Loaded] = {}
        self._hooks: dict[str, RemovableHandle] = {}
        self._active: list[tuple[_Loaded, slice | Tensor]] = []
        self._rows_needed = 0

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
        modules = self._target_modules(adapter)
        identity = adapter.digest
        self._require_room(self._by_name | {name: identity}, identity, _placed_bytes(adapter, modules))
        if identity not in self._loaded:
            try:
                self._loaded[identity] = _place(adapter, modules)
            except torch.OutOfMemoryError as error:
                raise NoSpaceError(
                    "The device has no memory left for the adapter.", "Unload one, or use one of lower rank."
                ) from error
        self._by_name[name] = identity
        self._drop_unused()
        self._hook_targets()
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

    @contextmanager
    def applied(self, segments: Sequence[tuple[int, int, str | None]]) -> Iterator[None]:
        """In forward passes inside, rows [start, stop) of each (start, stop, identity) are the adapter's.

        Rows count over all leading axes laid flat; segments ascend and do not overlap; rows outside, or with
        None, are the base model's. An identity is what `acquire` or `identity` gave, not a name.
        """
        assert not self._active, "adapters are being applied already"
        self._rows_needed = segments[-1][1] if segments else 0
        self._active = self._rows_by_adapter(segments)
        try:
            yield
        finally:
            self._active = []

    def _rows_by_adapter(
        self, segments: Sequence[tuple[int, int, str | None]]
    ) -> list[tuple[_Loaded, slice | Tensor]]:
        """Each adapter once, with its rows: a slice where they follow each other, else their numbers."""
        ranges: dict[str, list[range]] = {}
        last = 0
        for start, stop, identity in segments:
            assert last <= start <= stop, f"rows [{start}, {stop}) do not follow row {last}"
            last = stop
            if identity is None or start == stop:
                continue
            pieces = ranges.setdefault(identity, [])
            if pieces and pieces[-1].stop == start:
                pieces[-1] = range(pieces[-1].start, stop)
            else:
                pieces.append(range(start, stop))
        found: list[tuple[_Loaded, slice | Tensor]] = []
        for identity, pieces in ranges.items():
            assert identity in self._loaded, f"no adapter has the identity {clip(identity)}"
            if len(pieces) == 1:
                rows: slice | Tensor = slice(pieces[0].start, pieces[0].stop)
            else:
                numbers = [row for piece in pieces for row in piece]
                rows = torch.tensor(numbers, device=self._decoder.norm.weight.device)
            found.append((self._loaded[identity], rows))
        return found

    def _add_change(self, path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook of the projection at `path`: output += scale * (x A') B' on each adapter's rows."""
        for loaded, rows in self._active:
            change = loaded.changes.get(path)
            if change is None:
                continue
            x_TI = inputs[0].flatten(0, -2)
            out_TO = output.view(-1, output.shape[-1])
            assert self._rows_needed <= len(x_TI), f"{self._rows_needed} rows planned, {len(x_TI)} computed"
            low_TR = nn.functional.linear(x_TI[rows], change.a)
            if isinstance(rows, slice):
                out_TO[rows].addmm_(low_TR, change.b.T, alpha=change.scale)
            else:
                out_TO.index_add_(0, rows, nn.functional.linear(low_TR, change.b), alpha=change.scale)

    def _target_modules(self, adapter: Adapter) -> dict[str, nn.Linear]:
        """The decoder's modules that `adapter` changes, shapes compared."""
        modules = {}
        for path, change in adapter.modules.items():
            try:
                module = self._decoder.get_submodule(path)
            except AttributeError:
                module = None
            shape = (change.b.shape[0], change.a.shape[1])
            if not isinstance(module, nn.Linear) or module.weight.shape != shape:
                module = None
            if module is None or adapter.layout != self._decoder.config.rope.layout:
                raise UsageError(
                    f"The adapter does not fit this model (module {clip(path)}).",
                    "Read it with the config of the model it is loaded beside.",
                )
            modules[path] = module
        return modules

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
        unused = self._unused(self._by_name)
        for identity in unused:
            del self._loaded[identity]
        if unused:
            self._hook_targets()

    def _hook_targets(self) -> None:
        """One hook on every module that a loaded adapter changes, none elsewhere."""
        targets = {path for loaded in self._loaded.values() for path in loaded.changes}
        for path in targets - self._hooks.keys():
            hook = partial(self._add_change, path)
            self._hooks[path] = self._decoder.get_submodule(path).register_forward_hook(hook)
        for path in self._hooks.keys() - targets:
            self._hooks.pop(path).remove()


def _placed_bytes(adapter: Adapter, modules: Mapping[str, nn.Linear]) -> int:
    return sum(
        (change.a.size + change.b.size) * modules[path].weight.dtype.itemsize
        for path, change in adapter.modules.items()
    )


def _place(adapter: Adapter, modules: Mapping[str, nn.Linear]) -> _Loaded:
    """Copies of the matrices on the device and in the precision of what they change."""
    changes = {}
    for path, change in adapter.modules.items():
        weight = modules[path].weight
        a, b = (tensor_of(m).to(weight.device, weight.dtype, copy=True) for m in (change.a, change.b))
        if not (a.isfinite().all() and b.isfinite().all()):
            precision = str(weight.dtype).removeprefix("torch.")
            raise UnsupportedError(
                f"The adapter has numbers too large for {precision} (module {clip(path)}).",
                "Load the model in bfloat16 or float32.",
            )
        changes[path] = _PlacedLowRank(a, b, change.scale)
    return _Loaded(changes, _placed_bytes(adapter, modules))
