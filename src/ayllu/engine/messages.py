"""What the two processes of an engine say to each other: frozen dataclasses, told apart by `kind`.

`codec` writes them as JSON with arrays behind it and checks every field when they arrive. Nothing that
arrives is ever more than data.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Literal, TypeAlias

import numpy as np

from ayllu import errors
from ayllu.engine.codec import Codec, Float32Array, Int32Array
from ayllu.engine.events import AnswerFinished, Done, Event, Failed, PromptScored, Started, TextDelta
from ayllu.engine.options import EngineOptions
from ayllu.engine.prepared import CoreFacts, PreparedEmbedding, PreparedImage, PreparedRequest
from ayllu.engine.protocol import EngineStats
from ayllu.errors import AylluError, ModelFileError, OverloadedError, RequestFailedError, one_line

_DETAILS: dict[type[AylluError], tuple[str, ...]] = {
    ModelFileError: ("file", "field", "offset", "expected", "got"),
    OverloadedError: ("retry_after_s",),
}
_ERRORS: dict[str, type[AylluError]] = {
    name: value
    for name, value in vars(errors).items()
    if isinstance(value, type) and issubclass(value, AylluError)
}


@dataclass(frozen=True)
class ErrorReport:
    """An AylluError on its way: the name of its class, its two sentences, and what else its class holds."""

    name: str
    problem: str
    fix: str
    details: dict[str, str | int | float | None] = field(default_factory=dict)

    @classmethod
    def of(cls, error: AylluError) -> ErrorReport:
        """A class that is not in `errors` travels as the nearest of its bases that is."""
        kind = next(base for base in type(error).__mro__ if _ERRORS.get(base.__name__) is base)
        details = {name: _plain(getattr(error, name)) for name in _DETAILS.get(kind, ())}
        return cls(kind.__name__, error.problem, error.fix, details)

    def error(self) -> AylluError:
        """The error again. A name that no class has becomes RequestFailedError."""
        kind = _ERRORS.get(self.name, RequestFailedError)
        # Not by its constructor: those of some classes build the sentences, which are here already.
        error = kind.__new__(kind)
        AylluError.__init__(error, self.problem, self.fix)
        for name in _DETAILS.get(kind, ()):
            setattr(error, name, self.details.get(name))
        return error


def _plain(value: object) -> str | int | float | None:
    return value if isinstance(value, int | float | None) else one_line(str(value))


@dataclass(frozen=True)
class Open:
    """The first message: the model to open, and how. Make one with `of`, read it with `model_path` and
    `options`."""

    path: bytes
    options_without_paths: EngineOptions
    draft_path: bytes | None = None
    kind: Literal["open"] = "open"

    @classmethod
    def of(cls, path: Path, options: EngineOptions) -> Open:
        # Absolute, so that a restart after a change of folder opens the same; bytes, as names on disk are.
        draft = options.draft_model
        # A draft model alone says that it is to be used.
        return cls(
            os.fsencode(path.absolute()),
            dataclasses.replace(options, speculate=None, draft_model=None) if draft else options,
            None if draft is None else os.fsencode(draft.absolute()),
        )

    @property
    def model_path(self) -> Path:
        return Path(os.fsdecode(self.path))

    @property
    def options(self) -> EngineOptions:
        if self.draft_path is None:
            return self.options_without_paths
        return dataclasses.replace(self.options_without_paths, draft_model=Path(os.fsdecode(self.draft_path)))


@dataclass(frozen=True, eq=False)
class Submit:
    """A request; its tokens and images travel behind it. Make one with `of`, read it with `whole`."""

    request: PreparedRequest
    token_ids: Int32Array
    pixels: tuple[Float32Array, ...] = ()
    digests: tuple[str, ...] = ()
    kind: Literal["submit"] = "submit"

    @classmethod
    def of(cls, request: PreparedRequest) -> Submit:
        return cls(
            dataclasses.replace(request, token_ids=[], images=()),
            np.array(request.token_ids, dtype=np.int32),
            tuple(image.pixels for image in request.images),
            tuple(image.digest for image in request.images),
        )

    @property
    def whole(self) -> PreparedRequest:
        images = map(PreparedImage, self.pixels, self.digests)
        return dataclasses.replace(self.request, token_ids=self.token_ids.tolist(), images=tuple(images))

    def __post_init__(self) -> None:
        if len(self.pixels) != len(self.digests):
            raise ValueError("images and digests differ in number")


@dataclass(frozen=True)
class Cancel:
    """End a request soon. An id that is not open is no error: it may just have ended."""

    request_id: str
    kind: Literal["cancel"] = "cancel"


@dataclass(frozen=True, eq=False)
class Embed:
    """Token lists to become vectors, travelling behind it; `lengths` cuts them apart. See `of` and `whole`.

    Answered by `Embedded` or by a failed event.
    """

    request: PreparedEmbedding
    token_ids: Int32Array
    lengths: tuple[int, ...]
    kind: Literal["embed"] = "embed"

    @classmethod
    def of(cls, request: PreparedEmbedding) -> Embed:
        token_ids = np.array([token for tokens in request.inputs for token in tokens], dtype=np.int32)
        return cls(dataclasses.replace(request, inputs=[]), token_ids, tuple(map(len, request.inputs)))

    @property
    def whole(self) -> PreparedEmbedding:
        pieces = np.split(self.token_ids, np.cumsum(self.lengths)[:-1])
        return dataclasses.replace(self.request, inputs=[piece.tolist() for piece in pieces])

    def __post_init__(self) -> None:
        if min(self.lengths, default=0) < 0 or sum(self.lengths) != self.token_ids.size:
            raise ValueError("the lengths do not add up to the tokens")


@dataclass(frozen=True)
class LoadAdapter:
    """Load a LoRA adapter. Answered by `Answered`."""

    ticket: int
    name: str
    path: bytes
    kind: Literal["load_adapter"] = "load_adapter"

    @classmethod
    def of(cls, ticket: int, name: str, path: Path) -> LoadAdapter:
        return cls(ticket, name, os.fsencode(path.absolute()))

    @property
    def adapter_path(self) -> Path:
        return Path(os.fsdecode(self.path))


@dataclass(frozen=True)
class UnloadAdapter:
    """Forget an adapter. Answered by `Answered`."""

    ticket: int
    name: str
    kind: Literal["unload_adapter"] = "unload_adapter"


@dataclass(frozen=True)
class GetStats:
    """Ask for counts. Answered by `StatsTold`."""

    ticket: int
    kind: Literal["get_stats"] = "get_stats"


@dataclass(frozen=True)
class Shutdown:
    """End the process once the step under way is done."""

    kind: Literal["shutdown"] = "shutdown"


ToEngine: TypeAlias = Open | Submit | Cancel | Embed | LoadAdapter | UnloadAdapter | GetStats | Shutdown


@dataclass(frozen=True)
class TaskStarted:
    """Loading shows itself: `Progress.task` was entered."""

    task: int
    label: str
    total: int | None
    unit: str
    kind: Literal["task_started"] = "task_started"


@dataclass(frozen=True)
class TaskAdvanced:
    """`amount` more units of a task are done."""

    task: int
    amount: int
    kind: Literal["task_advanced"] = "task_advanced"


@dataclass(frozen=True)
class TaskEnded:
    """`Progress.task` was left."""

    task: int
    kind: Literal["task_ended"] = "task_ended"


@dataclass(frozen=True)
class Ready:
    """The model is open; requests are taken."""

    facts: CoreFacts
    kind: Literal["ready"] = "ready"


@dataclass(frozen=True)
class Refused:
    """The model cannot be opened, for a reason a person can act on. The process ends."""

    error: ErrorReport
    kind: Literal["refused"] = "refused"


@dataclass(frozen=True)
class CoreEvent:
    """One event of one request: exactly one of the fields after the id."""

    request_id: str
    started: Started | None = None
    prompt_scored: PromptScored | None = None
    text: TextDelta | None = None
    answer_finished: AnswerFinished | None = None
    done: Done | None = None
    failed: ErrorReport | None = None

    def __post_init__(self) -> None:
        said = (self.started, self.prompt_scored, self.text, self.answer_finished, self.done, self.failed)
        if sum(value is not None for value in said) != 1:
            raise ValueError("an event is one thing at a time")

    @classmethod
    def of(cls, request_id: str, event: Event) -> CoreEvent:
        match event:
            case Started():
                return cls(request_id, started=event)
            case PromptScored():
                return cls(request_id, prompt_scored=event)
            case TextDelta():
                return cls(request_id, text=event)
            case AnswerFinished():
                return cls(request_id, answer_finished=event)
            case Done():
                return cls(request_id, done=event)
            case Failed(error):
                return cls(request_id, failed=ErrorReport.of(error))
        raise AssertionError(f"a core makes no {type(event).__name__}")

    @property
    def event(self) -> Event:
        if self.failed is not None:
            return Failed(self.failed.error())
        said = self.started or self.prompt_scored or self.text or self.answer_finished or self.done
        assert said is not None, "checked when it was made"
        return said


@dataclass(frozen=True)
class Events:
    """What one step said, of all requests. Without events it is a sign of life."""

    events: tuple[CoreEvent, ...] = ()
    kind: Literal["events"] = "events"


@dataclass(frozen=True, eq=False)
class Embedded:
    """The vectors of an `Embed`, one row per input. The request has ended."""

    request_id: str
    vectors: Float32Array
    kind: Literal["embedded"] = "embedded"


@dataclass(frozen=True)
class Answered:
    """What was asked for is done, or went wrong."""

    ticket: int
    error: ErrorReport | None = None
    kind: Literal["answered"] = "answered"


@dataclass(frozen=True)
class StatsTold:
    """Counts of the core."""

    ticket: int
    stats: EngineStats
    kind: Literal["stats_told"] = "stats_told"


@dataclass(frozen=True)
class Crashed:
    """Last words before the process ends by an error nobody expected."""

    reason: str
    kind: Literal["crashed"] = "crashed"


FromEngine: TypeAlias = (
    TaskStarted | TaskAdvanced | TaskEnded | Ready | Refused | Events | Embedded | Answered | StatsTold
    | Crashed
)  # fmt: skip


@cache
def to_engine() -> Codec[ToEngine]:
    """The codec of messages to the engine's process."""
    return Codec(ToEngine)


@cache
def from_engine() -> Codec[FromEngine]:
    """The codec of messages from it."""
    return Codec(FromEngine)
