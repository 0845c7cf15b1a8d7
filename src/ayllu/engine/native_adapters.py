"""LoRA adapters at work in native code: their matrices lie packed beside the decoder's, in float32.

Pieces of a step name their adapter; a row's change is computed from that row alone, so batching changes no
answer. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from ayllu.engine.adapter_set import MAX_ADAPTERS, MAX_LOADED_BYTES, LoadedAdapters
from ayllu.kernels.native.decoder import PROJECTIONS, LowRankChange, NativeDecoder
from ayllu.kernels.native.library import pack_matrix, packed_bytes
from ayllu.model.config import ModelConfig
from ayllu.weights.adapter import Adapter, LowRank
from ayllu.weights.tensors import Floats


@dataclass(frozen=True, eq=False)
class _Placed:
    """What pieces name, and the matrices behind it, which must live as long."""

    number: int
    changes: dict[tuple[int, str], LowRankChange]


class NativeAdapters(LoadedAdapters[_Placed]):
    """The adapters loaded beside one native decoder."""

    def __init__(
        self,
        decoder: NativeDecoder,
        config: ModelConfig,
        *,
        max_adapters: int = MAX_ADAPTERS,
        max_bytes: int = MAX_LOADED_BYTES,
    ) -> None:
        super().__init__(config, max_adapters=max_adapters, max_bytes=max_bytes)
        self._decoder = decoder

    def number(self, identity: str | None) -> int | None:
        """What pieces of a step call the version that `acquire` named."""
        return None if identity is None else self.placed(identity).number

    def _placed_bytes(self, adapter: Adapter) -> int:
        return sum(
            packed_bytes("F32", *matrix.shape)
            for change in adapter.modules.values()
            for matrix in (change.a, change.b)
        )

    def _place(self, adapter: Adapter) -> _Placed:
        changes = dict(_changes(adapter))
        return _Placed(self._decoder.add_adapter(changes), changes)

    def _drop(self, placed: _Placed) -> None:
        self._decoder.remove_adapter(placed.number)


def _changes(adapter: Adapter) -> Iterator[tuple[tuple[int, str], LowRankChange]]:
    """(layer, projection) and what is added there; a shared expert's are named as a dense layer's."""
    for path, change in adapter.modules.items():
        _, layer, *rest = path.split(".")
        name = ".".join(rest) if rest[0] == "attention" else rest[-1]
        assert name in PROJECTIONS, path
        yield (int(layer), name), _packed(change)


def _packed(change: LowRank) -> LowRankChange:
    a = np.ascontiguousarray(change.a, np.float32)
    b: Floats = change.b.astype(np.float32) * np.float32(change.scale)
    rank = len(a)
    return LowRankChange(
        pack_matrix("F32", a.view(np.uint8), a.shape[1]),
        pack_matrix("F32", np.ascontiguousarray(b).view(np.uint8), rank),
    )
