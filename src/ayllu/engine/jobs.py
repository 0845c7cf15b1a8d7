"""What the core keeps of a request under way: its sequences, and what becomes of each piece computed.

A `GenerationJob` draws answers, an `EmbeddingJob` averages hidden states; both are read through the same
scheduler, so neither can hold up the other. Needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence as AbstractSequence

import numpy as np
from numpy.typing import NDArray

from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.answer import Answer, Grammar, PromptScores
from ayllu.engine.events import Done, Event, Started
from ayllu.engine.prepared import EmbeddingsReady, PreparedEmbedding, PreparedImage, PreparedRequest
from ayllu.engine.sequence import BlockKeys, Sequence


class GenerationJob:
    """One prompt and its answers. The first answer's sequence reads the prompt; the others wait for it and
    find the prompt in the cache."""

    def __init__(self, request: PreparedRequest, patch_token: int | None) -> None:
        self.request = request
        self.id = request.id
        self.priority = request.priority
        self.tenant = request.tenant
        self.adapter = request.adapter
        self.images: tuple[PreparedImage, ...] = request.images
        self.answers: dict[Sequence, Answer] = {}
        self.scores: PromptScores | None = None
        self.started = False
        self.new_tokens = 0
        self._patches = (
            np.concatenate(([0], np.cumsum(np.array(request.token_ids) == patch_token)))
            if request.images
            else None
        )

    def open(
        self,
        tokenizer: Tokenizer,
        root: bytes,
        block_tokens: int,
        patch_token: int | None,
        image_rows: AbstractSequence[int],
        grammars: AbstractSequence[Grammar | None],
        *,
        shares_prefix: bool,
    ) -> None:
        """Make the sequences. root: what cached prefixes must agree in; image_rows: rows of each image."""
        request = self.request
        prompt = request.token_ids
        digests = [(image.digest, rows) for image, rows in zip(request.images, image_rows, strict=True)]
        if request.prompt_logprobs is not None:
            self.scores = PromptScores(request, tokenizer)
        leader: Sequence | None = None
        for index, grammar in enumerate(grammars):
            sequence = Sequence(
                tokens=list(prompt),
                prompt_tokens=len(prompt),
                limit=len(prompt) + request.max_new_tokens,
                keys=BlockKeys(root, block_tokens, digests, patch_token),
                owner=self,
                leader=leader if shares_prefix else None,
                # Scoring needs the logits of every place of the prompt: nothing may be skipped.
                uses_cached_prefix=self.scores is None or index > 0,
            )
            leader = leader or sequence
            self.answers[sequence] = Answer(request, index, sequence, tokenizer, grammar)

    @property
    def sequences(self) -> list[Sequence]:
        """The sequences that are still to be computed."""
        return [sequence for sequence, answer in self.answers.items() if answer.finished is None]

    def patches_before(self, position: int) -> int:
        """Patch tokens of the prompt before `position`."""
        return 0 if self._patches is None else int(self._patches[min(position, len(self._patches) - 1)])

    def opening(self, sequence: Sequence) -> list[Event]:
        """What is said before a sequence's piece is computed."""
        if self.started:
            return []
        self.started = True
        return [Started(sequence.prompt_tokens, sequence.cached_tokens or 0)]

    def prompt_scored(self) -> list[Event]:
        """The prompt's scores, to be said once."""
        if self.scores is None:
            return []
        scores, self.scores = self.scores, None
        return [scores.event()]

    def closing(self) -> list[Event]:
        """The last event, once all answers are finished."""
        if any(answer.finished is None for answer in self.answers.values()):
            return []
        first = next(iter(self.answers), None)
        cached = None if first is None else first.cached_tokens
        new_tokens = sum(len(answer.tokens) for answer in self.answers.values())
        return [Done(len(self.request.token_ids), new_tokens, cached or 0)]


class EmbeddingJob:
    """Inputs to become vectors: the mean of each one's hidden states."""

    def __init__(self, request: PreparedEmbedding, root: bytes, block_tokens: int) -> None:
        self.request = request
        self.id = request.id
        self.priority = request.priority
        self.tenant = request.tenant
        self.adapter: str | None = None
        self.images: tuple[PreparedImage, ...] = ()
        self._sums: dict[Sequence, NDArray[np.float64] | None] = {}
        for tokens in request.inputs:
            keys = BlockKeys(root, block_tokens)
            # Hidden states of cached tokens are not kept: every token has to be computed.
            sequence = Sequence(list(tokens), len(tokens), len(tokens), keys, self, uses_cached_prefix=False)
            self._sums[sequence] = None
        self._unfinished = set(self._sums)

    @property
    def sequences(self) -> list[Sequence]:
        """The inputs that are still to be computed, in order."""
        return [sequence for sequence in self._sums if sequence in self._unfinished]

    def patches_before(self, position: int) -> int:
        """Always 0: inputs are text."""
        return 0

    def add(self, sequence: Sequence, start: int, summed: NDArray[np.float64], *, last: bool) -> bool:
        """Add the summed hidden states [width] of a piece that begins at `start`; True when all is done."""
        before = self._sums[sequence]
        # After a preemption the input is read from its beginning again.
        self._sums[sequence] = summed if start == 0 or before is None else before + summed
        if last:
            self._unfinished.remove(sequence)
        return not self._unfinished

    def ready(self) -> EmbeddingsReady:
        """The vectors, in the order of the inputs."""
        rows = []
        for sequence, summed in self._sums.items():
            assert summed is not None
            mean = summed / len(sequence.tokens)
            if self.request.normalise:
                mean = mean / max(float(np.linalg.norm(mean)), 1e-12)
            rows.append(mean)
        return EmbeddingsReady(np.stack(rows).astype(np.float32))


Job = GenerationJob | EmbeddingJob
