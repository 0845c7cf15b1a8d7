"""A streamed answer as events: what an OpenAI-compatible server says, chunk by chunk, in our vocabulary.

Nothing a server sends is taken on trust: types, indexes and the order of things are checked, tool calls must
be JSON objects, and an answer that ended in a way nobody asked for is an error rather than a shorter answer.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from ayllu.engine.events import (
    AnswerFinished,
    Done,
    Event,
    FinishReason,
    Started,
    TextDelta,
    TokenLogprob,
    ToolCallMade,
)
from ayllu.engine.remote.calls import CallPieces
from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.engine.remote.errors import error_in_stream, not_an_openai_server
from ayllu.engine.remote.logprobs import logprobs_of, token_ids_of
from ayllu.engine.requests import ChoiceStructure, GenerateRequest, JsonStructure, TokenPrompt
from ayllu.errors import RemoteEngineError, RequestFailedError, clip

END = "[DONE]"

_REASONS: dict[str, FinishReason] = {
    "stop": "stop",
    "length": "length",
    "tool_calls": "tool_calls",
    "function_call": "tool_calls",
}


@dataclass
class _Answer:
    """One of the n answers while it grows.

    counted: its tokens as far as the pieces show them, exact where they carry token ids or log-probabilities
    and else at least that many. reported: the server's own count.
    """

    index: int
    counted: int = 0
    reported: int | None = None
    reason: FinishReason | None = None
    stop: str | None = None
    told: bool = False
    text: list[str] = field(default_factory=list)
    has_text: bool = False
    has_logprobs: bool = False
    refusal: str = ""
    calls: dict[int, CallPieces] = field(default_factory=dict)

    @property
    def new_tokens(self) -> int:
        return self.counted if self.reported is None else self.reported


class AnswerReader:
    """Reads the chunks of one request and hands its events to `put`.

    Servers tell the prompt's length at the end, if at all; `Started` has it where it is known before (token
    prompts, llama.cpp, vLLM, SGLang) and 0 elsewhere, `Done` as the server says it. `AnswerFinished` waits
    for the server's count of the answer's tokens, or for the end.
    """

    def __init__(
        self, request: GenerateRequest, endpoint: RemoteEndpoint, put: Callable[[Event], None]
    ) -> None:
        self._request = request
        self._endpoint = endpoint
        self._put = put
        self._answers = [_Answer(index) for index in range(request.n)]
        self._prompt_tokens = len(request.prompt.token_ids) if isinstance(request.prompt, TokenPrompt) else 0
        self._cached_tokens = 0
        self._total: int | None = None
        self._last_finished: _Answer | None = None
        self.started = False
        self.ended = False
        self.was_cancelled = False

    def take(self, data: str) -> None:
        """One event's data. Raises the error that ends the request."""
        if data.strip() == END:
            self._complete()
            return
        try:
            chunk = json.loads(data)
        except (ValueError, RecursionError):
            chunk = None
        if not isinstance(chunk, dict):
            raise self._strange(f"a piece of the answer is no JSON object: {clip(data, 80)}")
        if chunk.get("error") or chunk.get("object") == "error":
            raise error_in_stream(self._endpoint, data)
        choices = chunk.get("choices")
        if not isinstance(choices, list):
            raise self._strange("a piece of the answer has no choices")
        self._note_counts(chunk, choices)
        if not self.started:
            self._start()
        for choice in choices:
            self._choice(choice, chunk)
        self._tell_finished()

    def end(self) -> None:
        """The stream is over without a word. Raises RemoteEngineError when an answer was not."""
        if not self.ended:
            self._complete()

    def cancelled(self) -> None:
        """The caller wants no more: open answers are cancelled, and the request is done."""
        if self.ended:
            return
        self.was_cancelled = True
        if not self.started:
            self._start()
        for answer in self._answers:
            if answer.reason is None:
                answer.reason = "cancelled"
        self._finish_all()

    @property
    def is_complete(self) -> bool:
        """Whether every answer has ended, even if the server has not said that this was all."""
        return all(answer.reason is not None for answer in self._answers)

    def _start(self) -> None:
        self.started = True
        self._put(Started(self._prompt_tokens, self._cached_tokens))

    def _complete(self) -> None:
        if not self.is_complete:
            raise RemoteEngineError(
                f"{self._endpoint.address} ended the stream before the answer was complete.",
                "Try again, or look at its log.",
            )
        self._finish_all()

    def _finish_all(self) -> None:
        self._tell_finished(all_of_them=True)
        self.ended = True
        total = sum(answer.new_tokens for answer in self._answers) if self._total is None else self._total
        self._put(Done(self._prompt_tokens, total, self._cached_tokens))

    def _tell_finished(self, *, all_of_them: bool = False) -> None:
        for answer in self._answers:
            if answer.reason is None or answer.told or (answer.reported is None and not all_of_them):
                continue
            answer.told = True
            self._put(AnswerFinished(answer.index, answer.reason, answer.new_tokens, answer.stop))

    def _note_counts(self, chunk: dict[str, Any], choices: list[Any]) -> None:
        """Token counts, from wherever this server gives them."""
        progress = chunk.get("prompt_progress")
        if isinstance(progress, dict):
            self._prompt_tokens = self._count(progress, "total")
            self._cached_tokens = self._count(progress, "cache")
        usage = chunk.get("usage")
        if not isinstance(usage, dict):
            return
        self._prompt_tokens = self._count(usage, "prompt_tokens") or self._prompt_tokens
        details = usage.get("prompt_tokens_details")
        if isinstance(details, dict):
            self._cached_tokens = self._count(details, "cached_tokens")
        new_tokens = self._count(usage, "completion_tokens")
        if len(choices) == 1:
            # With every piece (continuous_usage_stats), or with an answer's last: it is about that answer.
            self._answer_of(choices[0]).reported = new_tokens
        elif self._endpoint.dialect == "llama.cpp" and self._last_finished is not None:
            # It counts each answer by itself, right after the answer's end.
            self._last_finished.reported = new_tokens
        elif not choices:
            self._total = new_tokens
            if len(self._answers) == 1:
                self._answers[0].reported = new_tokens

    def _count(self, counts: dict[str, Any], name: str) -> int:
        value = counts.get(name)
        if value is None:
            return 0
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 53:
            raise self._strange(f"{name} is {clip(repr(value), 40)}")
        return value

    def _answer_of(self, choice: Any) -> _Answer:
        index = choice.get("index") if isinstance(choice, dict) else None
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < len(self._answers):
            raise self._strange(f"answer {clip(repr(index), 40)} of {len(self._answers)} was not asked for")
        return self._answers[index]

    def _choice(self, choice: Any, chunk: dict[str, Any]) -> None:
        answer = self._answer_of(choice)
        delta = choice.get("delta") or {}
        if not isinstance(delta, dict):
            raise self._strange("a delta is no object")
        text = self._text(delta.get("content")) + self._text(choice.get("text"))
        answer.refusal += self._text(delta.get("refusal"))
        self._note_calls(answer, delta)
        self._note_stop(answer, choice, chunk)
        self._text_delta(answer, choice, text)
        finish = choice.get("finish_reason")
        if finish is not None and answer.reason is None:
            self._finish(answer, finish)

    def _text(self, value: Any) -> str:
        if value is None:
            return ""
        if not isinstance(value, str):
            raise self._strange("a text is no string")
        return value

    def _text_delta(self, answer: _Answer, choice: dict[str, Any], text: str) -> None:
        logprobs: tuple[TokenLogprob, ...] = ()
        if self._request.logprobs is not None and choice.get("logprobs") is not None:
            try:
                logprobs = logprobs_of(choice["logprobs"], self._request.logprobs)
            except ValueError as error:
                raise self._strange(str(error)) from None
        token_ids = token_ids_of(choice.get("token_ids"), logprobs)
        if not (text or token_ids or logprobs):
            return
        if answer.reason is not None:
            raise RequestFailedError(
                f"{self._endpoint.address} goes on with an answer that it has ended.", "Look at its log."
            )
        answer.has_text = answer.has_text or bool(text)
        if isinstance(self._request.structure, JsonStructure | ChoiceStructure):
            answer.text.append(text)
        answer.has_logprobs = answer.has_logprobs or bool(logprobs)
        answer.counted += max(1, len(token_ids), len(logprobs))
        self._put(TextDelta(answer.index, text, token_ids, logprobs))

    def _note_calls(self, answer: _Answer, delta: dict[str, Any]) -> None:
        pieces = delta.get("tool_calls") or []
        old_style = delta.get("function_call")
        if isinstance(old_style, dict):
            pieces = [{"index": 0, "function": old_style}]
        if not isinstance(pieces, list):
            raise self._strange("tool_calls is no list")
        for piece in pieces:
            try:
                CallPieces.add(answer.calls, piece)
            except ValueError as error:
                raise self._strange(str(error)) from None

    def _note_stop(self, answer: _Answer, choice: dict[str, Any], chunk: dict[str, Any]) -> None:
        """Which stop string ended the answer, from those servers that tell it."""
        verbose = chunk.get("__verbose")
        told = [choice.get("stop_reason"), choice.get("matched_stop")]
        if isinstance(verbose, dict):
            told.append(verbose.get("stopping_word"))
        answer.stop = next((word for word in told if word in self._request.stop), answer.stop)

    def _finish(self, answer: _Answer, finish: Any) -> None:
        if finish == "content_filter":
            # Half an answer that looks whole would be worse than none.
            raise RequestFailedError(
                f"The content filter of {self._endpoint.address} cut the answer off.", "Ask differently."
            )
        reason = _REASONS.get(finish) if isinstance(finish, str) else None
        if reason is None:
            raise RequestFailedError(
                f"{self._endpoint.address} ended the answer for the reason {clip(repr(finish), 40)}.",
                "Try again, or look at its log.",
            )
        if answer.refusal:
            refusal = self._endpoint.without_secrets(clip(answer.refusal, 200))
            raise RequestFailedError(f"The model refused to answer: {refusal}", "Ask differently.")
        made = self._make_calls(answer, cut=reason == "length")
        self._check_kept(answer, reason, made)
        if reason != "length":
            # vLLM says "stop" after a call it was told to make.
            reason = "tool_calls" if made else "stop"
        answer.reason = reason
        self._last_finished = answer

    def _make_calls(self, answer: _Answer, *, cut: bool) -> int:
        """Hand over the calls of a finished answer; their number. cut: the last one may not be whole, and is
        then none."""
        use = self._request.tool_use
        pieces = [answer.calls[index] for index in sorted(answer.calls)]
        if use is not None and not use.parallel:
            # Not every server holds to parallel_tool_calls; those that do keep the first call as well.
            pieces = pieces[:1]
        if cut and pieces and not pieces[-1].is_whole:
            pieces = pieces[:-1]
        for call_index, piece in enumerate(pieces):
            call = piece.call(f"call_{answer.index}_{call_index}")
            self._put(ToolCallMade(answer.index, call_index, call))
        return len(pieces)

    def _check_kept(self, answer: _Answer, reason: FinishReason, calls: int) -> None:
        """What was demanded of a whole answer must be there: servers drop silently what they do not know."""
        use, where = self._request.tool_use, self._endpoint.address
        if use is not None and use.choice not in ("auto", "none") and not calls and reason != "length":
            raise RequestFailedError(
                f"{where} answered without the tool call that was demanded.",
                "Use a model and server that can call tools, or tool_choice 'auto'.",
            )
        if self._request.logprobs is not None and answer.has_text and not answer.has_logprobs and not calls:
            raise RequestFailedError(f"{where} gave no log-probabilities.", "Leave logprobs out.")
        structure = self._request.structure
        if reason == "length" or self._request.stop:
            return  # cut, or perhaps cut: not every server tells whether a stop string did it
        if isinstance(structure, JsonStructure):
            # Imported here: most requests need no schema, and the library behind takes time to load.
            from ayllu.engine.json_schema import validate_json

            validate_json(structure.schema, "".join(answer.text))
        if isinstance(structure, ChoiceStructure) and "".join(answer.text) not in structure.choices:
            raise RequestFailedError(
                f"{where} answered with none of the choices.", "Use a server that can be held to choices."
            )

    def _strange(self, detail: str) -> RemoteEngineError:
        return not_an_openai_server(self._endpoint, self._endpoint.without_secrets(detail))
