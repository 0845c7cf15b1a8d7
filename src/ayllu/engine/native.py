"""The engine that runs a model on this machine, in a process of its own: requests out, events back.

This process needs no torch: it opens what of a model is small, prepares requests, and makes public events of
what the other one says. A crash over there ends what was open with a typed error here, and nothing else.
"""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from numpy.typing import NDArray

from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.events import Event
from ayllu.engine.launch import WORKER_COMMAND, Launched
from ayllu.engine.messages import Embed, GetStats, LoadAdapter, Open, UnloadAdapter
from ayllu.engine.model_files import EncoderFiles, ModelFiles, open_model_files
from ayllu.engine.open_requests import OpenRequests
from ayllu.engine.options import EngineOptions
from ayllu.engine.preparation import EncoderPreparation, Preparation
from ayllu.engine.prepared import CoreFacts
from ayllu.engine.protocol import Embeddings, EngineInfo, EngineStats, Stream
from ayllu.engine.requests import EmbedRequest, GenerateRequest, PromptInput, ToolUse
from ayllu.engine.supervisor import RestartPolicy, Status, Supervisor
from ayllu.errors import UsageError
from ayllu.progress import SILENT, Progress


class NativeEngine:
    """An `Engine` of a model on this machine; see `open_engine`, which makes one. Also a context manager.

    notes: what a person should know. loaded_at: `time.perf_counter()` when it was ready. What is handed to
    `deliver` comes from the engine's reading thread, which serves all requests: it must not block.
    """

    def __init__(
        self,
        model: str,
        files: ModelFiles | EncoderFiles,
        facts: CoreFacts,
        requests: OpenRequests,
        supervisor: Supervisor,
    ) -> None:
        self.loaded_at = time.perf_counter()
        self.info = EngineInfo(
            model=model,
            context=facts.context,
            generates=isinstance(files, ModelFiles),
            reads_images=facts.reads_images,
            facts=dict(facts.facts),
        )
        self._files = files
        self._open = requests
        self._supervisor = supervisor
        self._preparation: Preparation | EncoderPreparation = (
            Preparation(files, facts) if isinstance(files, ModelFiles) else EncoderPreparation(files)
        )
        self._abandoned = weakref.finalize(self, _close_soon, requests, supervisor, self._preparation)
        # When this program ends, its sockets end, and with them the engine's process: nothing to wait for.
        self._abandoned.atexit = False

    @property
    def files(self) -> ModelFiles:
        """The model's files. Raises UsageError for a model that makes vectors and does not answer."""
        if isinstance(self._files, EncoderFiles):
            raise UsageError(
                f"{self.info.model} makes vectors of texts; it does not answer.",
                "Choose a model that generates.",
            )
        return self._files

    @property
    def notes(self) -> tuple[str, ...]:
        """What a person should know of the model, and of what was lost in a restart."""
        return (*(self._files.notes if isinstance(self._files, ModelFiles) else ()), *self._open.notes)

    @property
    def status(self) -> Status:
        """Requests are computed ('ready'), wait ('restarting') or are refused ('stopped', 'closed')."""
        return self._supervisor.status

    @property
    def process_id(self) -> int | None:
        """The engine's process now, None where there is none."""
        return self._supervisor.process_id

    def submit(self, request: GenerateRequest, deliver: Callable[[Event], None] | None = None) -> Stream:
        """See `Engine.submit`. Raises as `Preparation`, and OverloadedError or EngineUnavailableError."""
        self._open.require_room(request.n)
        prepared = self._preparation.prepare(request)
        # The stream holds this engine, so that one is not taken for abandoned while its answers are read.
        stream = Stream(request.id, lambda: self._open.cancel(request.id), deliver)
        self._open.submit(prepared, stream)
        return stream

    def embed(self, request: EmbedRequest) -> Embeddings:
        """See `Engine.embed`."""
        prepared = self._preparation.prepare_embedding(request)
        vectors: NDArray[Any] = self._open.ask(request.id, Embed.of(prepared))
        return Embeddings(tuple(map(tuple, vectors.tolist())), sum(map(len, prepared.inputs)))

    def token_ids(
        self,
        prompt: PromptInput,
        tool_use: ToolUse | None = None,
        *,
        add_special_tokens: bool = True,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """See `TokenCounter.token_ids`."""
        return self._preparation.token_ids(
            prompt,
            tool_use,
            add_special_tokens=add_special_tokens,
            add_generation_prompt=add_generation_prompt,
        )

    def token_bytes(self, token_ids: Sequence[int]) -> list[bytes]:
        """See `TokenCounter.token_bytes`."""
        return [self._tokenizer.token_bytes(token) for token in token_ids]

    def text_of(self, token_ids: Sequence[int]) -> str:
        """See `TokenCounter.text_of`."""
        return self._tokenizer.decode(token_ids)

    @property
    def _tokenizer(self) -> Tokenizer:
        files = self._files
        return files.tokenizer.tokenizer if isinstance(files, EncoderFiles) else files.tokenizer

    def stats(self) -> EngineStats:
        """See `Engine.stats`. During a restart, what is known on this side."""
        waiting = self._open.waiting()
        if waiting is None:
            ticket = self._open.ticket()
            stats: EngineStats = self._open.ask(ticket, GetStats(ticket))
        else:
            stats = EngineStats(waiting=waiting)
        return replace(stats, restarts=self._supervisor.restarts)

    def load_adapter(self, name: str, path: Path) -> None:
        """See `Engine.load_adapter`. It is loaded again after a restart."""
        ticket = self._open.ticket()
        self._open.ask(ticket, LoadAdapter.of(ticket, name, path))
        self._open.note_adapter(name, path)

    def unload_adapter(self, name: str) -> None:
        """See `Engine.unload_adapter`."""
        ticket = self._open.ticket()
        self._open.ask(ticket, UnloadAdapter(ticket, name))
        self._open.note_adapter(name, None)

    def adapters(self) -> tuple[str, ...]:
        """See `Engine.adapters`."""
        return self._open.adapters

    def restart(self) -> None:
        """Start again an engine that stays down after crashes, and wait until it is ready.

        Does nothing while it works or is starting again by itself. Raises EngineUnavailableError.
        """
        self._open.reopen()
        self._supervisor.restart()

    def close(self) -> None:
        """See `Engine.close`. Waits until the process has ended."""
        self._abandoned.detach()
        _close(self._open, self._supervisor, self._preparation)

    def __enter__(self) -> NativeEngine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_engine(
    path: Path,
    options: EngineOptions | None = None,
    progress: Progress = SILENT,
    model_name: str | None = None,
    *,
    worker_command: Sequence[str] = WORKER_COMMAND,
    restart_policy: RestartPolicy | None = None,
    launched: Launched | None = None,
) -> NativeEngine:
    """Open a .gguf file or a model folder, and wait until it is ready. `progress` shows the loading.

    model_name: what to call it (default: the file's or folder's name). worker_command: what starts its
    process. launched: that process, where it is under way already. Raises ModelFileError, UnsupportedError,
    NoSpaceError, UsageError, MissingExtraError (torch, where the model needs it), or EngineCrashedError when
    the process ends while it loads.
    """
    options = options or EngineOptions()
    requests = OpenRequests(options)
    # First of all, as loading over there takes longer than everything that is to be opened here.
    supervisor = Supervisor(
        Open.of(path, options), requests, command=worker_command, policy=restart_policy, launched=launched
    )
    try:
        files = open_model_files(path, context=options.context)
        facts = supervisor.wait_until_ready(progress)
        name = model_name or (path.stem if path.suffix == ".gguf" else path.name)
        return NativeEngine(name, files, facts, requests, supervisor)
    except BaseException:
        supervisor.close()
        raise


def _close(
    requests: OpenRequests, supervisor: Supervisor, preparation: Preparation | EncoderPreparation
) -> None:
    requests.close()
    supervisor.close()
    preparation.close()


def _close_soon(
    requests: OpenRequests, supervisor: Supervisor, preparation: Preparation | EncoderPreparation
) -> None:
    # In a thread of its own: the garbage collector may run in one that holds the very locks this needs.
    threading.Thread(target=_close, args=(requests, supervisor, preparation), daemon=True).start()
