"""The flags of every command that opens an engine here, and the options that they and the settings make.

Everything heavy is imported inside the functions.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ayllu.engine.options import EngineOptions
    from ayllu.settings import Settings
    from ayllu.settings import Speculate as SpeculateName

Device = Annotated[str | None, typer.Option("--device", help="auto, cpu, cuda, cuda:N or mps.")]
Dtype = Annotated[str | None, typer.Option("--dtype", help="auto, float32, bfloat16 or float16.")]
Runner = Annotated[
    str | None,
    typer.Option(
        "--runner", help="What computes: native (code for this CPU), torch, or auto, the first that can."
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        "--threads", min=1, max=1024, help="Threads of the native runner. Default: one per processor."
    ),
]
CacheType = Annotated[
    str | None,
    typer.Option("--cache-type", help="Keys and values: auto, or int8 for half the memory (native runner)."),
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", help="Pack weights on an NVIDIA GPU: int4, int4-128, int8 or fp8."),
]
Experts = Annotated[
    str | None,
    typer.Option("--experts", help="A mixture's experts: memory, disk, or auto, disk if they do not fit."),
]
Speculate = Annotated[
    str | None,
    typer.Option(
        "--speculate", help="Draft tokens ahead, same answers: off, lookup (from the text) or draft."
    ),
]
Draft = Annotated[
    str | None,
    typer.Option("--draft", metavar="MODEL", help="Smaller model of the same family that drafts."),
]

KEPT_FLAGS = ("device", "runner", "threads", "cache_type", "weights", "experts", "speculate", "draft")
"""Settings that a refusal repeats in the commands it names, where they were typed."""


def flag_of(name: str) -> str:
    """How a setting is typed: cache_type is --cache-type."""
    return f"--{name.replace('_', '-')}"


def engine_options(settings: Settings, *, command: str, pull: bool, **sizes: Any) -> EngineOptions:
    """Options from settings, and whatever else a command has. pull: whether the draft model may be fetched.

    Raises UsageError and UnknownModelError.
    """
    from ayllu.cli.opening import find_or_pull
    from ayllu.engine.options import EngineOptions

    speculate, draft = _drafting(settings, deterministic=bool(sizes.get("deterministic")))
    typed = {name: getattr(settings, name) for name in KEPT_FLAGS if settings.origin(name) == "flag"}
    return EngineOptions(
        device=settings.device,
        dtype=settings.dtype,
        runner=settings.runner,
        threads=settings.threads,
        cache_type=settings.cache_type,
        weights=settings.weights,
        experts=settings.experts,
        speculate=speculate,
        draft_model=None if draft is None else find_or_pull(draft, pull, settings).path,
        command=_with_flags(command, typed),
        **sizes,
    )


def _drafting(settings: Settings, *, deterministic: bool) -> tuple[SpeculateName | None, str | None]:
    """How tokens are drafted, and by which model. What was typed outweighs what a file or the environment
    says against it; two flags that contradict each other are for the options to refuse."""
    speculate, draft = settings.speculate, settings.draft
    speculate_typed, draft_typed = (settings.origin(name) == "flag" for name in ("speculate", "draft"))
    if (deterministic or (speculate_typed and speculate != "draft")) and not draft_typed:
        draft = None
    if (deterministic or (draft_typed and speculate != "draft")) and not speculate_typed:
        speculate = None
    return speculate, draft


def _with_flags(command: str, typed: Mapping[str, object]) -> str:
    words = [f"{flag_of(name)} {shlex.quote(str(value))}" for name, value in typed.items()]
    return " ".join([command, *words])
