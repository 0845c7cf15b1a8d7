"""LoRA adapters on the native runner."""

from __future__ import annotations

from ayllu.errors import UnknownModelError, UnsupportedError, clip
from ayllu.kernels.native.decoder import NativeDecoder
from ayllu.weights.adapter import Adapter


class NativeAdapters:
    """Adapters loaded beside a native decoder."""

    def __init__(self, decoder: NativeDecoder) -> None:
        self._decoder = decoder

    @property
    def names(self) -> tuple[str, ...]:
        return ()

    def load(self, name: str, adapter: Adapter) -> str:
        raise UnsupportedError("The native runner takes no adapters yet.", "Use --runner torch.")

    def unload(self, name: str) -> None:
        raise UnknownModelError(f"There is no adapter {clip(name)}.", "Load it first.")

    def acquire(self, name: str) -> str:
        raise UnknownModelError(f"There is no adapter {clip(name)}.", "Load it first.")

    def release(self, identity: str) -> None:
        raise AssertionError(identity)
