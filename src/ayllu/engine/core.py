"""The engine's inside, driven step by step by one thread: scheduler, cache and runner brought together.

A step plans, computes, draws and speaks. Whatever goes wrong for one request is caught where it happens and
ends that request alone; the others go on as if it had never been there. Needs no torch.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Sequence as AbstractSequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ayllu.chat.tokenizer import Tokenizer
from ayllu.engine.admission import image_rows, require_tokens
from ayllu.engine.answer import Answer, Grammar, joined
from ayllu.engine.events import Event, Failed
from ayllu.engine.jobs import EmbeddingJob, GenerationJob, Job
from ayllu.engine.prepared import CoreFacts, EmbeddingsReady, PreparedEmbedding, PreparedRequest
from ayllu.engine.protocol import EngineStats
from ayllu.engine.scheduler import Piece, Scheduler
from ayllu.engine.sequence import Sequence
from ayllu.engine.speculation import Speculation
from ayllu.engine.step_runner import Adapters, RunnerPiece, StepRunner
from ayllu.engine.working_memory import LOGIT_ROWS
from ayllu.errors import AylluError, RequestFailedError, UsageError, clip
from ayllu.model.config import ModelConfig
from ayllu.weights.adapter import read_adapter

if TYPE_CHECKING:
    from ayllu.engine.grammar import GrammarCompiler, TokenGrammar

COMPILE_WAIT_S = 0.01
MOST_COMPILERS = 2

CoreEvent = Event | EmbeddingsReady
Said = list[tuple[str, CoreEvent]]


class EngineCore:
    """Takes prepared requests and says what becomes of them, step by step. All calls from one thread.

    deterministic: every piece is computed alone. speculation: what drafts tokens, if anything does; not
    together with `deterministic`. `facts` says what this core is.
    """

    def __init__(
        self,
        config: ModelConfig,
        tokenizer: Tokenizer,
        runner: StepRunner,
        scheduler: Scheduler,
        adapters: Adapters,
        *,
        facts: CoreFacts,
        model_identity: str,
        deterministic: bool = False,
        speculation: Speculation | None = None,
    ) -> None:
        assert not (deterministic and speculation), "drafted rows are computed together"
        self.facts = facts
        self.scheduler = scheduler
        self.runner = runner
        self._config = config
        self._tokenizer = tokenizer
        self._adapters = adapters
        self._deterministic = deterministic
        self._speculation = speculation
        # Nobody outside can know a key, so nobody can tell by timing which prompts others have sent.
        self._secret = os.urandom(32)
        self._model_identity = model_identity
        self._jobs: dict[str, Job] = {}
        self._compiling: dict[str, tuple[GenerationJob, Future[list[TokenGrammar]]]] = {}
        self._compilers: dict[frozenset[int], GrammarCompiler] = {}
        self._unsaid: Said = []
        self._counts: Counter[str] = Counter()

    @property
    def has_work(self) -> bool:
        """Whether `step` has something to do or to say."""
        return bool(self.scheduler.has_work or self._compiling or self._unsaid)

    @property
    def open_requests(self) -> int:
        """Requests taken and not ended."""
        return len(self._jobs)

    @property
    def adapters(self) -> tuple[str, ...]:
        return self._adapters.names

    def load_adapter(self, name: str, path: Path) -> None:
        """Read a LoRA adapter and make it available. Raises AylluError, and changes nothing then."""
        self._adapters.load(name, read_adapter(path, self._config))

    def unload_adapter(self, name: str) -> None:
        self._adapters.unload(name)

    def submit(self, request: PreparedRequest | PreparedEmbedding) -> None:
        """Take a request. Raises AylluError when it cannot be taken; what happens later is said by `step`."""
        if isinstance(request, PreparedEmbedding):
            self._submit_embedding(request)
            return
        self._require_tokens(request.id, request.token_ids, request.max_new_tokens)
        self.scheduler.require_room(request.n + sum(job.request.n for job, _ in self._compiling.values()))
        rows = image_rows(request, self._config.vision)
        job = GenerationJob(request, self._patch_token)
        if request.adapter is not None:
            job.adapter = self._adapters.acquire(request.adapter)
        self._jobs[job.id] = job
        if request.grammar is None:
            self._open(job, rows, [None] * request.n)
            return
        try:
            compiled = self._compiler(request.stop_ids).compile(request.grammar, request.n)
        except BaseException:
            self._forget(job)
            raise
        self._compiling[job.id] = (job, compiled)

    def cancel(self, request_id: str) -> None:
        """End a request now: its open answers finish as 'cancelled'. Nothing if it is over already."""
        job = self._jobs.get(request_id)
        if job is None:
            return
        said: list[CoreEvent] = []
        if isinstance(job, GenerationJob):
            for sequence in job.sequences:
                said += job.answers[sequence].finish("cancelled")
                self._remove(sequence)
            said += job.closing()
        else:
            said.append(Failed(RequestFailedError("The request was cancelled.")))
        self._forget(job)
        self._counts["cancelled"] += 1
        self._unsaid += [(job.id, event) for event in said]

    def step(self) -> Said:
        """Do one step of work and say what came of it."""
        said, self._unsaid = self._unsaid, []
        self._start_compiled(said)
        if self._speculation is not None:
            self._speculation.begin()
        pieces = self.scheduler.plan()
        if not pieces:
            return said
        self._counts["steps"] += 1
        for piece in pieces:
            job = self._job(piece)
            if isinstance(job, GenerationJob) and not job.started:
                said += [(job.id, event) for event in job.opening(piece.sequence)]
                self._counts["prompt_tokens"] += len(job.request.token_ids)
                self._counts["cached_prompt_tokens"] += piece.sequence.cached_tokens or 0
        computed = self._compute(self._with_drafts(pieces), said)
        self.scheduler.done([piece for piece, _ in computed])
        self._score_prompts(computed, said)
        self._embed(computed, said)
        self._draw(computed, said)
        return said

    def stats(self) -> EngineStats:
        """Counts now, and totals so far."""
        cache = self.scheduler.cache
        names = [group.name for group in cache.groups]
        return EngineStats(
            waiting=self.scheduler.waiting + len(self._compiling),
            running=self.scheduler.running,
            preempted=self.scheduler.preempted,
            blocks_total=dict(zip(names, (pool.total for pool in cache.pools), strict=True)),
            blocks_free=dict(zip(names, cache.free(), strict=True)),
            blocks_cached=dict(zip(names, (pool.remembered for pool in cache.pools), strict=True)),
            **self._counts,
        )

    # What follows is one step, in its order.

    def _start_compiled(self, said: Said) -> None:
        if self._compiling and not self.scheduler.has_work:
            # Nothing else to do: wait a little instead of asking again at once.
            wait([compiled for _, compiled in self._compiling.values()], COMPILE_WAIT_S, FIRST_COMPLETED)
        for job, compiled in [entry for entry in self._compiling.values() if entry[1].done()]:
            del self._compiling[job.id]
            try:
                grammars = compiled.result()
                self._open(job, image_rows(job.request, self._config.vision), grammars)
            except Exception as error:
                self._fail(job, error, "grammar", said)

    def _with_drafts(self, pieces: list[Piece]) -> list[Piece]:
        """The pieces, those of answers with drafts where that pays, within the limits of a step."""
        if self._speculation is None:
            return pieces
        rows = sum(piece.rows for piece in pieces)
        drawn = sum(piece.completes for piece in pieces)
        spare = min(self.scheduler.step_tokens - rows, max(LOGIT_ROWS, self.scheduler.slots) - drawn)
        decoding = [
            (piece.sequence, self.scheduler.room_for_draft(piece)) for piece in pieces if piece.continues
        ]
        drafts = iter(self._speculation.drafts(decoding, rows=rows, most=max(0, spare)))
        return [
            self.scheduler.with_draft(piece, next(drafts)) if piece.continues else piece for piece in pieces
        ]

    def _compute(self, pieces: AbstractSequence[Piece], said: Said) -> list[tuple[Piece, Any]]:
        """Hidden states of the pieces that could be computed; requests whose pieces could not have failed."""
        if (len(pieces) > 1 and not self._deterministic) or any(piece.drafted for piece in pieces):
            try:
                return list(zip(pieces, self.runner.forward(self._runner_pieces(pieces)), strict=True))
            except Exception:
                # Somebody's piece is at fault, and nobody knows whose: each is tried alone, and without its
                # draft. Writing the same keys and values again does no harm.
                self._counts["retried_steps"] += 1
        computed = []
        for piece in (replace(piece, drafted=()) for piece in pieces):
            job = self._job(piece)
            if job.id not in self._jobs:
                continue
            try:
                computed.append((piece, self.runner.forward(self._runner_pieces([piece]))[0]))
            except Exception as error:
                stage = "prefill" if piece.start < piece.sequence.prompt_tokens else "decode"
                self._fail(job, error, stage, said)
        return [(piece, hidden) for piece, hidden in computed if self._job(piece).id in self._jobs]

    def _runner_pieces(self, pieces: AbstractSequence[Piece]) -> list[RunnerPiece]:
        return [
            RunnerPiece(
                [*piece.sequence.tokens[piece.start : piece.stop], *piece.drafted],
                piece.start,
                piece.sequence.tables,
                job.adapter,
                job.images,
                job.patches_before(piece.start),
            )
            for piece in pieces
            for job in (self._job(piece),)
        ]

    def _score_prompts(self, computed: AbstractSequence[tuple[Piece, Any]], said: Said) -> None:
        for piece, hidden in computed:
            job = self._job(piece)
            if (
                not isinstance(job, GenerationJob)
                or job.scores is None
                or job.answers[piece.sequence].index > 0
            ):
                continue
            try:
                rows = job.scores.rows_needed(piece.start, piece.stop)
                for first in range(0, len(rows), LOGIT_ROWS):
                    part = rows[first : first + LOGIT_ROWS]
                    logits = self.runner.logits([(hidden, position - piece.start) for position in part])
                    for position, row in zip(part, logits, strict=True):
                        job.scores.add(position, row)
                if piece.completes:
                    said += [(job.id, event) for event in job.prompt_scored()]
            except Exception as error:
                self._fail(job, error, "sample", said)

    def _embed(self, computed: AbstractSequence[tuple[Piece, Any]], said: Said) -> None:
        for piece, hidden in computed:
            job = self._job(piece)
            if not isinstance(job, EmbeddingJob) or job.id not in self._jobs:
                continue
            try:
                done = job.add(piece.sequence, piece.start, self.runner.summed(hidden), last=piece.completes)
                if piece.completes:
                    self._remove(piece.sequence)
                if done:
                    self._counts["finished"] += 1
                    said.append((job.id, job.ready()))
                    self._forget(job)
            except Exception as error:
                self._fail(job, error, "embed", said)

    def _draw(self, computed: AbstractSequence[tuple[Piece, Any]], said: Said) -> None:
        drawing = [
            (piece, hidden)
            for piece, hidden in computed
            if piece.completes and isinstance(self._job(piece), GenerationJob)
        ]
        rows = [
            (hidden, row)
            for piece, hidden in drawing
            for row in range(piece.stop - piece.start - 1, piece.rows)
        ]
        logits = iter(self._logits(rows))
        if self._speculation is not None:
            decoding = all(piece.continues for piece, _ in computed)
            self._speculation.computed(sum(piece.rows for piece, _ in computed) if decoding else None)
        for piece, _ in drawing:
            self._continue(piece, list(islice(logits, 1 + len(piece.drafted))), said)

    def _logits(self, rows: list[tuple[Any, int]]) -> AbstractSequence[NDArray[np.float32] | Exception]:
        """A row of logits for each; where computing them failed, the error."""
        if rows and not self._deterministic:
            try:
                return list(self.runner.logits(rows))
            except Exception:
                self._counts["retried_steps"] += 1
        found: list[NDArray[np.float32] | Exception] = []
        for row in rows:
            try:
                found.append(self.runner.logits([row])[0])
            except Exception as error:
                found.append(error)
        return found

    def _continue(
        self, piece: Piece, rows: AbstractSequence[NDArray[np.float32] | Exception], said: Said
    ) -> None:
        """Draw the next tokens of one answer, as long as they are those of the draft, and say what follows.

        A row's logits are worth something only if every token before it is the answer's.
        """
        job = self._jobs.get(piece.sequence.owner.id)
        if not isinstance(job, GenerationJob):
            return
        answer = job.answers[piece.sequence]
        accepted, events = 0, list[Event]()
        for row, drafted in zip(rows, (*piece.drafted, None), strict=True):
            token, failure = self._next_token(answer, row, events)
            if failure is not None or answer.finished is not None or token != drafted:
                break
            accepted += 1
        said += [(job.id, event) for event in joined(events)]
        if failure is not None:
            self._fail(job, *failure, said)
            return
        if self._speculation is not None:
            self.scheduler.settle(piece, accepted)
            self._counts["drafted"] += len(piece.drafted)
            self._counts["accepted"] += accepted
        if answer.finished is not None:
            self._remove(piece.sequence)
            closing = job.closing()
            if closing:
                self._counts["finished"] += 1
                self._forget(job)
            said += [(job.id, event) for event in closing]

    def _next_token(
        self, answer: Answer, row: NDArray[np.float32] | Exception, events: list[Event]
    ) -> tuple[int | None, tuple[Exception, str] | None]:
        """Draw a token, if one is wanted, and make it part of the answer. Or what went wrong, and where."""
        token, stage = None, "sample"
        try:
            if isinstance(row, Exception):
                raise row
            if answer.request.max_new_tokens == 0:
                events += answer.finish("length")
            else:
                token = answer.draw(row)
                stage = "detokenise"
                events += answer.take(token)
        except Exception as error:
            return None, (error, stage)
        self._counts["new_tokens"] += 1
        return token, None

    # Opening and ending of requests.

    def _submit_embedding(self, request: PreparedEmbedding) -> None:
        for tokens in request.inputs:
            self._require_tokens(request.id, tokens, 0)
        self.scheduler.require_room(len(request.inputs))
        job = EmbeddingJob(request, self._root(request.tenant, None), self.scheduler.cache.block_tokens)
        self._jobs[job.id] = job
        for sequence in job.sequences:
            self.scheduler.add(sequence)

    @property
    def _patch_token(self) -> int | None:
        return None if self._config.vision is None else self._config.vision.patch_token_id

    def _job(self, piece: Piece) -> Job:
        owner = piece.sequence.owner
        assert isinstance(owner, GenerationJob | EmbeddingJob)
        return owner

    def _compiler(self, stop_ids: frozenset[int]) -> GrammarCompiler:
        """The compiler for answers that end so: on the model's own stop tokens, or on none."""
        if stop_ids not in self._compilers:
            # Most engines never see a grammar, and the library takes a moment to load.
            from ayllu.engine.grammar import GrammarCompiler

            while len(self._compilers) >= MOST_COMPILERS:
                self._compilers.pop(next(iter(self._compilers))).close()
            self._compilers[stop_ids] = GrammarCompiler(self._tokenizer, stop_ids)
        return self._compilers[stop_ids]

    def _require_tokens(self, request_id: str, tokens: AbstractSequence[int], new_tokens: int) -> None:
        if request_id in self._jobs:
            raise UsageError(f"There is a request {clip(request_id)} already.", "Give each its own id.")
        require_tokens(tokens, new_tokens, self.facts.context, self._config.vocab_size)
        self.scheduler.require_fit(len(tokens) + new_tokens)

    def _root(self, tenant: str, adapter: str | None) -> bytes:
        """What else two prompts must have in common to share cache blocks."""
        state = hashlib.sha256(self._secret)
        for part in (tenant, self._model_identity, adapter or ""):
            encoded = part.encode("utf-8", "surrogatepass")
            state.update(len(encoded).to_bytes(8, "big") + encoded)
        return state.digest()

    def _open(self, job: GenerationJob, rows: list[int], grammars: AbstractSequence[Grammar | None]) -> None:
        job.open(
            self._tokenizer,
            self._root(job.tenant, job.adapter),
            self.scheduler.cache.block_tokens,
            self._patch_token,
            rows,
            grammars,
            shares_prefix=self.scheduler.cache.remembers,
        )
        for sequence in job.sequences:
            self.scheduler.add(sequence)

    def _forget(self, job: Job) -> None:
        """Drop a job whose end has been said, with all it still holds."""
        for sequence in job.sequences:
            self._remove(sequence)
        if job.adapter is not None:
            self._adapters.release(job.adapter)
        self._compiling.pop(job.id, None)
        del self._jobs[job.id]

    def _remove(self, sequence: Sequence) -> None:
        """Take a sequence out that has ended."""
        self.scheduler.remove(sequence)
        if self._speculation is not None:
            self._speculation.forget(sequence)

    def _fail(self, job: Job, error: Exception, stage: str, said: Said) -> None:
        """End a request with an error. One of the device itself is nobody's fault: it ends the engine."""
        if self.runner.is_fatal(error):
            raise error
        if job.id not in self._jobs:
            return
        if not isinstance(error, AylluError):
            error = RequestFailedError(
                f"The request failed ({stage}): {type(error).__name__}: {clip(error)}.",
                "Other requests go on. If it happens again, please report it.",
            )
        self._forget(job)
        self._counts["failed"] += 1
        said.append((job.id, Failed(error)))
