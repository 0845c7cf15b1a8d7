"""A model on the CPU in native code: what it needs, and how it is packed. Needs no torch."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

from ayllu import process
from ayllu.engine.memory_plan import MemoryPlan
from ayllu.engine.native_adapters import NativeAdapters
from ayllu.engine.native_needs import NativeNeeds
from ayllu.engine.native_runner import ImageRows, NativeRunner, native_decoder
from ayllu.engine.opened import OpenedRunner, free_memory, planned
from ayllu.engine.options import EngineOptions
from ayllu.engine.packed_weights import expert_bytes, pack_weights, packed_weight_bytes
from ayllu.engine.runner_choice import torch_is_installed
from ayllu.engine.runner_needs import ModelNeeds
from ayllu.errors import UsageError
from ayllu.kernels.native.library import PackedMatrix, default_threads, kernels_name
from ayllu.progress import Progress
from ayllu.weights.checkpoint import Checkpoint


def open_native(
    checkpoint: Checkpoint, options: EngineOptions, progress: Progress, model_name: str
) -> OpenedRunner:
    """Plan, then pack. Raises NoSpaceError and UsageError before anything is packed; NoSpaceError also for a
    disk that cannot hold the experts."""
    opening = NativeOpening(checkpoint, options, model_name)
    return opening.load(planned(opening, options, model_name), progress)


@dataclass(frozen=True)
class NativeOpening:
    """An `Opening` of a checkpoint that `runner_choice` has nothing against."""

    checkpoint: Checkpoint
    options: EngineOptions
    model_name: str

    @property
    def needs(self) -> tuple[ModelNeeds, ...]:
        """With the experts where the options want them; "auto": on disk if that alone makes it fit.

        Raises UsageError where there are none to keep on disk.
        """
        weights, experts = (
            packed_weight_bytes(self.checkpoint) + self._tower_bytes,
            expert_bytes(self.checkpoint),
        )
        if self.options.experts == "disk" and not experts.total:
            raise UsageError(f"{self.model_name} has no experts to keep on disk.", "Leave --experts out.")
        runner = NativeNeeds(
            self.checkpoint.config,
            threads=self._threads,
            int8=self.options.cache_type == "int8",
            reads_images=self._reads_images,
        )
        in_memory = ModelNeeds(self.checkpoint.config, weights, runner)
        on_disk = replace(
            in_memory,
            weight_bytes=weights - experts.total + experts.one_token,
            disk_bytes=experts.total,
        )
        if self.options.experts == "disk":
            return (on_disk,)
        if self.options.experts == "memory" or not experts.total:
            return (in_memory,)
        return (in_memory, on_disk)

    @property
    def available_bytes(self) -> int:
        return free_memory()

    def load(self, plan: MemoryPlan, progress: Progress) -> OpenedRunner:
        """Pack the weights. Raises NoSpaceError."""
        checkpoint, threads = self.checkpoint, self._threads
        before = process.resident_bytes()
        on_disk: dict[str, PackedMatrix] = {}
        if plan.disk_bytes:
            from ayllu.engine.packed_file import mapped_experts

            on_disk = mapped_experts(checkpoint, threads=threads, progress=progress)
        weights = pack_weights(checkpoint, threads=threads, packed=on_disk, progress=progress)
        load_peak = process.peak_resident_bytes() - before
        decoder = native_decoder(checkpoint.config, weights, plan.groups, threads=threads)
        if on_disk:
            decoder.advise_experts()
        decoder.make_cache(plan.block_counts, plan.block_tokens, int8=self.options.cache_type == "int8")
        adapters = NativeAdapters(decoder, checkpoint.config)

        def open_images() -> ImageRows:
            from ayllu.engine.native_images import TowerRows

            return TowerRows(checkpoint, plan.image_cache_bytes)

        reads_images = self._reads_images
        without = "" if reads_images or checkpoint.config.vision is None else "; images need ayllu[torch]"
        return OpenedRunner(
            NativeRunner(checkpoint.config, decoder, adapters, open_images if reads_images else None),
            adapters,
            plan,
            device=f"cpu ({kernels_name()}, {threads} threads{without})",
            dtype=stored_precision(self.checkpoint),
            load_peak_bytes=load_peak,
            reads_images=reads_images,
        )

    @property
    def _threads(self) -> int:
        return self.options.threads or default_threads()

    @property
    def _reads_images(self) -> bool:
        return self.checkpoint.config.vision is not None and torch_is_installed()

    @property
    def _tower_bytes(self) -> int:
        """What `native_images` will hold: float32, or bfloat16 where the file has no more."""
        if not self._reads_images:
            return 0
        return sum(
            stored.elements * (4 if stored.encoding in ("F32", "F16") else 2)
            for name, stored in self.checkpoint.tensors.items()
            if name.startswith("vision.")
        )


def stored_precision(checkpoint: Checkpoint) -> str:
    """The encodings of the matrices, most bytes first: "Q4_K + Q6_K"."""
    sizes: Counter[str] = Counter()
    for stored in checkpoint.tensors.values():
        if len(stored.shape) > 1:
            sizes[stored.encoding] += stored.nbytes
    return " + ".join(encoding for encoding, _ in sizes.most_common(3))
