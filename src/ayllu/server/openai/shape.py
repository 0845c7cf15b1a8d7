"""Chat and text completions in OpenAI's layout: chunks while the answer comes, one body at the end.

Both are made of the same events by the same functions (`engine.openai.results`), so what the chunks add up to
is the body.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from ayllu.engine.events import AnswerFinished, Event, PromptScored, TextDelta, ToolCallMade
from ayllu.engine.openai.requests import GenerateCall
from ayllu.engine.openai.results import (
    Collected,
    chat_logprobs,
    completion_logprobs,
    echoed,
    error_body,
    response_body,
    tool_call_id,
    tool_call_object,
    usage,
)
from ayllu.engine.requests import TextPrompt
from ayllu.errors import AylluError
from ayllu.server.shapes import ServerEvent, compact_json

END = ServerEvent("[DONE]")


class CompletionShape:
    """Either kind; which is in the call. created: seconds since 1970."""

    def __init__(self, call: GenerateCall, *, model: str, created: float | None = None) -> None:
        self._call = call
        self._model = model
        self._created = int(time.time() if created is None else created)
        self._parts = [Collected(request) for request in call.requests]
        self._chat = call.kind == "chat"
        kind, prefix = ("chat.completion.chunk", "chatcmpl") if self._chat else ("text_completion", "cmpl")
        head = {
            "id": f"{prefix}-{call.requests[0].id}",
            "object": kind,
            "created": self._created,
            "model": model,
            "system_fingerprint": None,
        }
        self._head = compact_json(head)[:-1]
        self._tail = ',"usage":null}' if call.stream_usage else "}"
        # Where each choice stands among all, and the characters that it has said.
        self._first = [0]
        for request in call.requests:
            self._first.append(self._first[-1] + request.n)
        self._said = [0] * self._first[-1]

    def opening(self) -> Iterable[ServerEvent]:
        if self._chat:
            return [
                self._choice(index, {"role": "assistant", "content": "", "refusal": None})
                for index in range(self._first[-1])
            ]
        if not self._call.echo:
            return ()
        return [
            self._text(self._first[part] + index, request.prompt.text, None)
            for part, request in enumerate(self._call.requests)
            if request.prompt_logprobs is None and isinstance(request.prompt, TextPrompt)
            for index in range(request.n)
        ]

    def add(self, part: int, event: Event) -> Iterable[ServerEvent]:
        collected = self._parts[part]
        collected.add(event)
        if not self._call.stream:
            return ()
        first = self._first[part]
        match event:
            case TextDelta(index, text, _, logprobs):
                if not text and not logprobs:
                    return ()
                wanted = collected.request.logprobs is not None
                if not self._chat:
                    tokens = [(token.token_bytes, token) for token in logprobs]
                    return (self._text(first + index, text, tokens if wanted else None),)
                scores = {"content": chat_logprobs(logprobs), "refusal": None} if wanted else None
                return (self._choice(first + index, {"content": text}, scores),)
            case ToolCallMade():
                return self._tool_call(collected, first, event)
            case PromptScored() if self._call.echo:
                text, scored = echoed(collected)
                wanted = collected.request.logprobs is not None
                return [
                    self._text(first + index, text, scored if wanted else None)
                    for index in range(collected.request.n)
                ]
            case AnswerFinished(index, reason):
                if self._chat:
                    return (self._choice(first + index, {}, None, reason),)
                return (self._text(first + index, "", None, reason),)
        return ()

    def closing(self) -> Iterable[ServerEvent]:
        if self._call.stream_usage:
            total = usage([part.done for part in self._parts if part.done is not None])
            yield ServerEvent(f'{self._head},"choices":[],"usage":{compact_json(total)}}}')
        yield END

    def failed(self, error: AylluError) -> Iterable[ServerEvent]:
        yield ServerEvent.of(error_body(error))
        yield END

    def result(self) -> dict[str, Any]:
        return response_body(self._call, self._parts, model=self._model, created=self._created)

    def _tool_call(self, collected: Collected, first: int, event: ToolCallMade) -> Iterator[ServerEvent]:
        """The name first, then the arguments: clients show the one while they wait for the other."""
        call_id = tool_call_id(collected.request, event.index, event.call_index)
        call = tool_call_object(event.call, call_id)
        arguments = call["function"]["arguments"]
        call["function"]["arguments"] = ""
        yield self._choice(first + event.index, {"tool_calls": [{"index": event.call_index, **call}]})
        more = {"index": event.call_index, "function": {"arguments": arguments}}
        yield self._choice(first + event.index, {"tool_calls": [more]})

    def _choice(
        self, index: int, delta: dict[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> ServerEvent:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return ServerEvent(f'{self._head},"choices":[{compact_json(choice)}]{self._tail}')

    def _text(self, index: int, text: str, tokens: Any, reason: str | None = None) -> ServerEvent:
        scores = None if tokens is None else completion_logprobs(tokens, self._said[index])
        self._said[index] += len(text)
        choice = {"index": index, "text": text, "logprobs": scores, "finish_reason": reason}
        return ServerEvent(f'{self._head},"choices":[{compact_json(choice)}]{self._tail}')
