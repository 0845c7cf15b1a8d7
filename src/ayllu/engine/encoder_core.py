"""The inside of an engine whose model makes vectors alone: one input batch a step, oldest request first.

The same face as `core.EngineCore`, for encoders, which keep no cache and draw no tokens.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ayllu.engine.core import Said
from ayllu.engine.embedding import EmbeddingModel
from ayllu.engine.events import Failed
from ayllu.engine.prepared import CoreFacts, EmbeddingsReady, PreparedEmbedding, PreparedRequest
from ayllu.engine.protocol import EngineStats
from ayllu.errors import AylluError, OverloadedError, RequestFailedError, UnsupportedError, UsageError, clip

INPUTS_PER_STEP = 16
"""Inputs of one request computed in a step: bounds how long a cancellation or a newcomer waits."""


class _Open:
    """A request under way: the vectors so far."""

    def __init__(self, request: PreparedEmbedding) -> None:
        self.request = request
        self.vectors: list[NDArray[np.float32]] = []
        self.done = 0


class EncoderCore:
    """Embeds. All calls from one thread. Requests take turns, step by step, so a long one delays no short one
    by more than a step."""

    def __init__(self, model: EmbeddingModel, *, waiting: int) -> None:
        self._model = model
        self._waiting = waiting
        self._open: OrderedDict[str, _Open] = OrderedDict()
        self._unsaid: Said = []
        self._counts: Counter[str] = Counter()
        self.facts = CoreFacts(
            context=model.context,
            slots=1,
            reads_images=False,
            vocab_size=model.tokenizer.vocab_size,
            facts={**model.facts, "dtype": model.dtype},
        )

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to say."""
        return bool(self._open or self._unsaid)

    def submit(self, request: PreparedRequest | PreparedEmbedding) -> None:
        """Take inputs. Raises AylluError for those that cannot be taken, and for requests to generate."""
        if not isinstance(request, PreparedEmbedding):
            raise UsageError("This model makes vectors; it does not answer.", "Choose one that generates.")
        if request.id in self._open:
            raise UsageError(f"There is a request {clip(request.id)} already.", "Give each its own id.")
        if len(self._open) > self._waiting:
            raise OverloadedError(f"The queue is full: {len(self._open)} requests wait.")
        for token_ids in request.inputs:
            self._model.tokenizer.require_valid(token_ids)
        self._open[request.id] = _Open(request)

    def cancel(self, request_id: str) -> None:
        """End a request now. Nothing if it is over already."""
        if self._open.pop(request_id, None) is not None:
            self._counts["cancelled"] += 1
            self._unsaid.append((request_id, Failed(RequestFailedError("The request was cancelled."))))

    def step(self) -> Said:
        """Compute a few inputs of one request and say what came of it."""
        said, self._unsaid = self._unsaid, []
        if not self._open:
            return said
        request_id, job = self._open.popitem(last=False)
        inputs = job.request.inputs[job.done : job.done + INPUTS_PER_STEP]
        self._counts["steps"] += 1
        try:
            job.vectors.append(self._model.embed(inputs, normalise=job.request.normalise))
        except AylluError as error:
            return self._failed(request_id, error, said)
        except Exception as error:
            reason = f"The request failed (embed): {type(error).__name__}: {clip(error)}."
            return self._failed(request_id, RequestFailedError(reason, "Other requests go on."), said)
        job.done += len(inputs)
        self._counts["prompt_tokens"] += sum(map(len, inputs))
        if job.done < len(job.request.inputs):
            self._open[request_id] = job
            return said
        self._counts["finished"] += 1
        return [*said, (request_id, EmbeddingsReady(np.concatenate(job.vectors)))]

    def _failed(self, request_id: str, error: AylluError, said: Said) -> Said:
        self._counts["failed"] += 1
        return [*said, (request_id, Failed(error))]

    def load_adapter(self, name: str, path: Path) -> None:
        """Raises UnsupportedError."""
        raise UnsupportedError("Adapters are for models that generate.", "Load it beside its own model.")

    def unload_adapter(self, name: str) -> None:
        """Raises UnsupportedError."""
        self.load_adapter(name, Path())

    @property
    def adapters(self) -> tuple[str, ...]:
        return ()

    def stats(self) -> EngineStats:
        """Counts now, and totals so far."""
        counts = self._counts
        return EngineStats(
            waiting=len(self._open),
            prompt_tokens=counts["prompt_tokens"],
            finished=counts["finished"],
            failed=counts["failed"],
            cancelled=counts["cancelled"],
            steps=counts["steps"],
        )
