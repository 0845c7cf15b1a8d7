"""What a model will take of memory, told before it is loaded, without torch and without its weights.

Where native code will compute it, this is the engine's own plan, and the engine is then asked for just that
plan. For the rest it is an estimate: weights from the number of parameters, and cache and working memory as
the plan has them; or, where a model's files tell nothing, their size and `FIXED_BYTES`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ayllu.engine.memory_plan import MemoryPlan, plan_memory, size_text
from ayllu.engine.options import EngineOptions
from ayllu.engine.runner_needs import ModelNeeds, TorchNeeds
from ayllu.errors import AylluError, NoSpaceError
from ayllu.weights.checkpoint import Checkpoint, open_checkpoint

FIXED_BYTES = 256 << 20
"""Of a process with its libraries and working memory, where nothing better is known."""

MOST_REMEMBERED = 256
PACKED_BITS = {"int4": 5, "int4-128": 5, "int8": 9, "fp8": 9}
"""Bits of a parameter that is packed for a GPU, its scale and what stays unpacked included."""


@dataclass(frozen=True)
class Needs:
    """What one model will take. options: those to open it with, so that it takes no more. context: tokens of
    one request, where it is known."""

    total_bytes: int
    options: EngineOptions
    context: int | None = None


class Estimate(Protocol):
    """Tells what the model at `path` needs where `available_bytes` are to be had. May take a second."""

    def __call__(self, path: Path, options: EngineOptions, *, available_bytes: int, model_name: str) -> Needs:
        """Raises NoSpaceError for what cannot fit, however little is asked of it."""


@dataclass(frozen=True)
class _Known:
    """What files say: ways in which the model may be kept, a draft model beside it, and whether the engine
    follows a plan made here."""

    ways: tuple[ModelNeeds, ...]
    draft: ModelNeeds | None
    follows: bool


class MemoryEstimate:
    """An `Estimate` that remembers what it read of unchanged files. May be called from any thread."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], _Known | None] = {}

    def __call__(self, path: Path, options: EngineOptions, *, available_bytes: int, model_name: str) -> Needs:
        """See `Estimate`."""
        known = self._read(path, options)
        options = _within(known, options)
        if known is None:
            return Needs(stored_bytes(path) + FIXED_BYTES, options)
        plan = _plan(known, options, available_bytes, model_name)
        if not known.follows:
            return Needs(plan.total_bytes, options, plan.context)
        followed = replace(
            options,
            context=plan.context,
            slots=plan.slots,
            kv_bytes=plan.kv_bytes,
            experts="disk" if plan.disk_bytes else options.experts,
        )
        return Needs(plan.total_bytes, followed, plan.context)

    def _read(self, path: Path, options: EngineOptions) -> _Known | None:
        key = (path, _stamp(path), options, options.draft_model and _stamp(options.draft_model))
        if key not in self._known:
            if len(self._known) >= MOST_REMEMBERED:
                self._known.clear()
            self._known[key] = _known_of(path, options)
        return self._known[key]


def _within(known: _Known | None, options: EngineOptions) -> EngineOptions:
    """A server's context is what its models may take at most: one that takes less gets its own."""
    if options.context is None:
        return options
    longest = None if known is None else known.ways[0].config.max_position_embeddings
    return replace(options, context=None if longest is None else min(options.context, longest))


def stored_bytes(path: Path) -> int:
    """Bytes of a file, or of the files of a folder; 0 where there is nothing."""
    try:
        if path.is_dir():
            return sum(item.stat().st_size for item in path.iterdir() if item.is_file())
        return path.stat().st_size
    except OSError:
        return 0


def _plan(known: _Known, options: EngineOptions, available_bytes: int, model_name: str) -> MemoryPlan:
    """The first way that fits; the error is that of the last one."""
    *preferred, last = known.ways
    for way in preferred:
        try:
            return _plan_of(way, known.draft, options, available_bytes, model_name)
        except NoSpaceError:
            continue
    return _plan_of(last, known.draft, options, available_bytes, model_name)


def _plan_of(
    way: ModelNeeds, draft: ModelNeeds | None, options: EngineOptions, available_bytes: int, model_name: str
) -> MemoryPlan:
    try:
        return plan_memory(
            way, available_bytes=available_bytes, options=options, model_name=model_name, draft=draft
        )
    except NoSpaceError as error:
        needs = error.problem.rpartition("), ")[0]
        problem = f"{needs})" if needs else error.problem.rstrip(".")
        raise NoSpaceError(
            f"{problem}; the server's models may take {size_text(available_bytes)}.",
            "Raise the server's memory or lower its context or slots; or use a smaller model.",
        ) from error


def _stamp(path: Path) -> tuple[int, ...]:
    """Differs when the files do."""
    found: list[int] = []
    for one in (path, path / "config.json"):
        try:
            stat = one.stat()
        except OSError:
            continue
        found += [stat.st_mtime_ns, stat.st_size]
    return tuple(found)


def _known_of(path: Path, options: EngineOptions) -> _Known | None:
    """None where the files do not tell: what is wrong with them is the engine's to say."""
    from ayllu.engine.model_files import is_encoder

    try:
        if not path.exists() or is_encoder(path):
            return None
        ways, follows = _ways(open_checkpoint(path), options, path.name)
        if options.draft_model is None:
            return _Known(ways, None, follows)
        draft_options = replace(options, experts="auto", speculate=None, draft_model=None)
        drafts, _ = _ways(open_checkpoint(options.draft_model), draft_options, options.draft_model.name)
        return _Known(ways, drafts[0], follows)
    except (AylluError, OSError):
        return None


def _ways(checkpoint: Checkpoint, options: EngineOptions, name: str) -> tuple[tuple[ModelNeeds, ...], bool]:
    from ayllu.engine.runner_choice import chooses_native

    if chooses_native(checkpoint, options):
        from ayllu.engine.open_native import NativeOpening

        return NativeOpening(checkpoint, options, name).needs, True
    on_cpu = options.device == "cpu"
    full = options.dtype == "float32" or (options.dtype == "auto" and on_cpu)
    bytes_per_value = 4 if full else 2
    bits = 8 * bytes_per_value if options.weights is None else PACKED_BITS[options.weights]
    weights = checkpoint.config.parameters * bits // 8
    return (ModelNeeds(checkpoint.config, weights, TorchNeeds(checkpoint.config, bytes_per_value)),), on_cpu
