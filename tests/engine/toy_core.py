"""A core without a model, as a worker of its own: `python toy_core.py FD`. Wicked on demand.

An answer is the words w0 w1 w2 …, one per step. `toy.json` in the model's folder sets the facts and the pace;
the tenant of a request says what goes wrong with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from ayllu.engine.events import AnswerFinished, Done, Event, Failed, Started, TextDelta
from ayllu.engine.options import EngineOptions
from ayllu.engine.prepared import CoreFacts, EmbeddingsReady, PreparedEmbedding, PreparedRequest
from ayllu.engine.protocol import EngineStats
from ayllu.engine.worker import channel_of, serve
from ayllu.errors import (
    GrammarError,
    ModelFileError,
    NoSpaceError,
    OverloadedError,
    UnknownModelError,
)
from ayllu.progress import Progress


class ToyCore:
    def __init__(self, settings: dict[str, Any], options: EngineOptions) -> None:
        self.settings = settings
        self.facts = CoreFacts(
            context=options.context or 1024,
            slots=options.slots or 8,
            reads_images=bool(settings.get("reads_images")),
            vocab_size=settings["vocab_size"],
            facts={"device": "toy", "precision": "none", "weight_bytes": 1000, "load_peak_bytes": 1100},
        )
        self._open: dict[str, PreparedRequest] = {}
        self._said: dict[str, int] = {}
        self._vectors: list[tuple[str, EmbeddingsReady]] = []
        self._cancelled: list[str] = []
        self._adapters: dict[str, Path] = {}
        self._steps = 0
        self._quiet_steps = 0

    @property
    def has_work(self) -> bool:
        return bool(self._open or self._vectors or self._cancelled)

    def submit(self, request: PreparedRequest | PreparedEmbedding) -> None:
        match request.tenant:
            case "refuse":
                raise OverloadedError("The toy is full.", retry_after_s=7.0)
            case "bug in submit":
                raise ZeroDivisionError("toy")
        if isinstance(request, PreparedEmbedding):
            rows = [[len(tokens), sum(tokens), float(request.normalise)] for tokens in request.inputs]
            self._vectors.append((request.id, EmbeddingsReady(np.array(rows, dtype=np.float32))))
            return
        if request.adapter is not None and request.adapter not in self._adapters:
            raise UnknownModelError(f"There is no adapter {request.adapter}.")
        self._open[request.id] = request
        self._said[request.id] = 0

    def cancel(self, request_id: str) -> None:
        if request_id in self._open:
            self._cancelled.append(request_id)

    def step(self) -> list[tuple[str, Event | EmbeddingsReady]]:
        self._steps += 1
        time.sleep(self.settings.get("step_s", 0.0))
        said: list[tuple[str, Event | EmbeddingsReady]] = [*self._vectors]
        self._vectors.clear()
        for key in self._cancelled:
            if request := self._open.pop(key, None):
                said += [(key, AnswerFinished(i, "cancelled", self._said[key])) for i in range(request.n)]
                said.append((key, Done(len(request.token_ids), self._said[key] * request.n)))
        self._cancelled.clear()
        for request in list(self._open.values())[: self.facts.slots]:
            said += [(request.id, event) for event in self._next(request)]
        return said

    def _next(self, request: PreparedRequest) -> list[Event]:
        number = self._said[request.id]
        self._said[request.id] += 1
        match request.tenant:
            case "bug in step":
                raise ValueError("the toy broke")
            case "hang" if number == 1:
                Path(self.settings["folder"], "hanging").touch()
                time.sleep(1000)
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "exit":
                sys.stderr.write("some line\ntoy: out of marbles\n\n")
                sys.stderr.flush()
                os._exit(3)
            case "garbage":
                os.write(int(sys.argv[1]), b"\xff\xff\xff\xff no frame")
                time.sleep(1000)
            case "fail":
                del self._open[request.id]
                return [Failed(GrammarError("The toy dislikes this.", "Be nice."))]
            case "heir" if number == 1:
                subprocess.Popen(["sleep", "3"], pass_fds=[int(sys.argv[1])])
                Path(self.settings["folder"], "heir").touch()
                time.sleep(1000)
            case "quiet" if self._quiet_steps < 6:
                # Steps that say nothing, as those of a long prompt do.
                self._quiet_steps += 1
                self._said[request.id] = 0
                return []
        events: list[Event] = [] if number else [Started(len(request.token_ids))]
        text = self.settings.get("answer")
        last = number + 1 == request.max_new_tokens
        for index in range(request.n):
            word = f"w{number} " if text is None else text[number : number + 1] if not last else text[number:]
            events.append(TextDelta(index, word, (number,)))
            if last:
                reason = "length" if text is None else "stop"
                events.append(AnswerFinished(index, reason, request.max_new_tokens))
        if last:
            del self._open[request.id]
            events.append(Done(len(request.token_ids), request.max_new_tokens * request.n))
        return events

    def load_adapter(self, name: str, path: Path) -> None:
        if not path.exists():
            raise ModelFileError(path, "there is no such adapter", field="name", got=name)
        self._adapters[name] = path

    def unload_adapter(self, name: str) -> None:
        if name not in self._adapters:
            raise UnknownModelError(f"There is no adapter {name}.")
        del self._adapters[name]

    def stats(self) -> EngineStats:
        return EngineStats(running=len(self._open), steps=self._steps, blocks_free={"global": 9})


def open_toy(path: Path, options: EngineOptions, progress: Progress) -> ToyCore:
    settings = json.loads((path / "toy.json").read_text("utf-8"))
    time.sleep(settings.get("open_s", 0.0))
    match settings.get("open"):
        case "refuse":
            raise NoSpaceError("The toy box is too small.", "Buy a bigger one.")
        case "bug":
            raise KeyError("no toy")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
    with progress.task("Loading toys", 100, "toys") as task:
        for _ in range(10):
            task.advance(10)
    return ToyCore(settings | {"folder": str(path)}, options)


if __name__ == "__main__":
    serve(channel_of(int(sys.argv[1])), open_toy)
