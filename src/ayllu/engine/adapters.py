"""LoRA adapters at work in torch: several loaded beside one decoder, each applied to its own rows of a step.

The decoder stays as it is. Hooks on the projections that any loaded adapter changes add
scale * (x A') B' to the rows of the requests that asked for it; without such rows they return at once.
The slow twin merges the change into the weights (`tests/engine/small_adapters.py`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ayllu.engine.adapter_set import MAX_ADAPTERS, MAX_LOADED_BYTES, LoadedAdapters
from ayllu.errors import NoSpaceError, UnsupportedError, clip
from ayllu.model.decoder import Decoder
from ayllu.weights.adapter import Adapter
from ayllu.weights.load import tensor_of


@dataclass(frozen=True, eq=False)
class _PlacedLowRank:
    """a [r, inputs] and b [outputs, r] on the device and in the precision of the matrix that they change."""

    a: Tensor
    b: Tensor
    scale: float


_Changes = Mapping[str, _PlacedLowRank]


class AdapterSet(LoadedAdapters[_Changes]):
    """The adapters loaded beside one torch decoder; `applied` says whose rows are whose in a step."""

    def __init__(
        self, decoder: Decoder, *, max_adapters: int = MAX_ADAPTERS, max_bytes: int = MAX_LOADED_BYTES
    ) -> None:
        super().__init__(decoder.config, max_adapters=max_adapters, max_bytes=max_bytes)
        self._decoder = decoder
        self._hooks: dict[str, RemovableHandle] = {}
        self._active: list[tuple[_Changes, slice | Tensor]] = []
        self._rows_needed = 0

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
    ) -> list[tuple[_Changes, slice | Tensor]]:
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
        found: list[tuple[_Changes, slice | Tensor]] = []
        for identity, pieces in ranges.items():
            changes = self.placed(identity)
            if len(pieces) == 1:
                rows: slice | Tensor = slice(pieces[0].start, pieces[0].stop)
            else:
                numbers = [row for piece in pieces for row in piece]
                rows = torch.tensor(numbers, device=self._decoder.norm.weight.device)
            found.append((changes, rows))
        return found

    def _add_change(self, path: str, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Forward hook of the projection at `path`: output += scale * (x A') B' on each adapter's rows."""
        for changes, rows in self._active:
            change = changes.get(path)
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

    def _weight(self, path: str) -> Tensor:
        weight = self._decoder.get_submodule(path).weight
        assert isinstance(weight, Tensor)
        return weight

    def _placed_bytes(self, adapter: Adapter) -> int:
        return sum(
            (change.a.size + change.b.size) * self._weight(path).dtype.itemsize
            for path, change in adapter.modules.items()
        )

    def _place(self, adapter: Adapter) -> _Changes:
        """Copies of the matrices on the device and in the precision of what they change, and their hooks."""
        changes = {}
        try:
            for path, change in adapter.modules.items():
                weight = self._weight(path)
                a, b = (tensor_of(m).to(weight.device, weight.dtype, copy=True) for m in (change.a, change.b))
                if not (a.isfinite().all() and b.isfinite().all()):
                    precision = str(weight.dtype).removeprefix("torch.")
                    raise UnsupportedError(
                        f"The adapter has numbers too large for {precision} (module {clip(path)}).",
                        "Load the model in bfloat16 or float32.",
                    )
                changes[path] = _PlacedLowRank(a, b, change.scale)
        except torch.OutOfMemoryError as error:
            raise NoSpaceError(
                "The device has no memory left for the adapter.", "Unload one, or use one of lower rank."
            ) from error
        for path in changes.keys() - self._hooks.keys():
            hook = partial(self._add_change, path)
            self._hooks[path] = self._decoder.get_submodule(path).register_forward_hook(hook)
        return changes

    def _drop(self, placed: _Changes) -> None:
        """Hooks stay where another adapter changes something, and nowhere else."""
        needed = {path for loaded in self._loaded.values() for path in loaded.placed}
        for path in placed.keys() - needed:
            self._hooks.pop(path).remove()
