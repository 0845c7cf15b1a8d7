"""An answer in Anthropic's layout: named events while it comes, one message at the end.

Both are made of the same blocks, so what the events add up to is the message. Errors have its layout too.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

from ayllu.engine.events import AnswerFinished, Done, Event, Started, TextDelta, ToolCallMade
from ayllu.engine.openai.requests import GenerateCall
from ayllu.errors import AylluError
from ayllu.server.shapes import ServerEvent

OVERLOADED = 529
"""Anthropic's status for a service that cannot take the request just now; its clients try again."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    409: "invalid_request_error",
    413: "request_too_large",
    429: "rate_limit_error",
    500: "api_error",
    OVERLOADED: "overloaded_error",
}
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use", "cancelled": "cancelled"}
"""The API has no word for an answer that was cancelled, which must not look like a whole one."""


class MessagesShape:
    """One message. message_id: made of the request's id where none is given."""

    def __init__(self, call: GenerateCall, *, model: str, message_id: str | None = None) -> None:
        (self._request,) = call.requests
        self._stream = call.stream
        self._model = model
        self._id = message_id or f"msg_{self._request.id}"
        self._texts: list[str] | None = None
        self._blocks: list[dict[str, Any]] = []
        self._started = False
        self._finished: AnswerFinished | None = None
        self._prompt_tokens = self._cached_tokens = self._new_tokens = 0

    def opening(self) -> Iterable[ServerEvent]:
        """Nothing: the first event tells the number of tokens read, which is not known yet."""
        return ()

    def add(self, part: int, event: Event) -> Iterable[ServerEvent]:
        said: list[ServerEvent] = []
        match event:
            case Started(prompt_tokens, cached_tokens):
                self._prompt_tokens, self._cached_tokens = prompt_tokens, cached_tokens
                self._start(said)
            case TextDelta(text=text):
                if text:
                    self._text(said, text)
            case ToolCallMade():
                self._tool_use(said, event)
            case AnswerFinished(new_tokens=new_tokens):
                self._finished = event
                self._new_tokens = new_tokens
            case Done(prompt_tokens, new_tokens, cached_tokens):
                self._prompt_tokens, self._cached_tokens = prompt_tokens, cached_tokens
                self._new_tokens = new_tokens
        return said

    def closing(self) -> Iterable[ServerEvent]:
        said: list[ServerEvent] = []
        self._start(said)
        self._end_text(said)
        delta = {"stop_reason": self._stop_reason(), "stop_sequence": self._stop_sequence()}
        self._say(said, "message_delta", delta=delta, usage=self._usage())
        self._say(said, "message_stop")
        return said

    def failed(self, error: AylluError) -> Iterable[ServerEvent]:
        return (ServerEvent.of(error_body(error), "error"),)

    def result(self) -> dict[str, Any]:
        content = [*self._blocks]
        if self._texts is not None:
            content.append({"type": "text", "text": "".join(self._texts)})
        return self._message(content, self._stop_reason(), self._stop_sequence())

    def _message(
        self, content: list[dict[str, Any]], stop_reason: str | None, stop_sequence: str | None
    ) -> dict[str, Any]:
        return {
            "id": self._id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": content,
            "stop_reason": stop_reason,
            "stop_sequence": stop_sequence,
            "usage": self._usage(),
        }

    def _usage(self) -> dict[str, int]:
        """The API counts what came from the cache apart from what was read."""
        return {
            "input_tokens": max(0, self._prompt_tokens - self._cached_tokens),
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": self._cached_tokens,
            "output_tokens": self._new_tokens,
        }

    def _stop_sequence(self) -> str | None:
        return None if self._finished is None else self._finished.stop

    def _stop_reason(self) -> str | None:
        finished, limit = self._finished, self._request.max_new_tokens
        if finished is None:
            return None
        if finished.stop is not None:
            return "stop_sequence"
        if finished.reason == "stop" and any(block["type"] == "tool_use" for block in self._blocks):
            return "tool_use"
        # Fewer tokens than were allowed: it was the context that ended.
        if finished.reason == "length" and limit is not None and 0 < finished.new_tokens < limit:
            return "model_context_window_exceeded"
        return _REASONS[finished.reason]

    def _start(self, said: list[ServerEvent]) -> None:
        if self._started:
            return
        self._started = True
        self._say(said, "message_start", message=self._message([], None, None))
        self._say(said, "ping")

    def _text(self, said: list[ServerEvent], text: str) -> None:
        self._start(said)
        index = len(self._blocks)
        if self._texts is None:
            self._texts = []
            self._say(said, "content_block_start", index=index, content_block={"type": "text", "text": ""})
        self._texts.append(text)
        self._say(said, "content_block_delta", index=index, delta={"type": "text_delta", "text": text})

    def _end_text(self, said: list[ServerEvent]) -> None:
        if self._texts is not None:
            self._say(said, "content_block_stop", index=len(self._blocks))
            self._blocks.append({"type": "text", "text": "".join(self._texts)})
            self._texts = None

    def _tool_use(self, said: list[ServerEvent], event: ToolCallMade) -> None:
        """The name first, then the input: clients show the one while they wait for the other."""
        self._start(said)
        self._end_text(said)
        index = len(self._blocks)
        call = event.call
        call_id = call.id or f"toolu_{self._request.id[:24]}{event.call_index:02x}"
        block = {"type": "tool_use", "id": call_id, "name": call.name, "input": call.arguments}
        self._blocks.append(block)
        self._say(said, "content_block_start", index=index, content_block={**block, "input": {}})
        written = json.dumps(call.arguments, ensure_ascii=False)
        delta = {"type": "input_json_delta", "partial_json": written}
        self._say(said, "content_block_delta", index=index, delta=delta)
        self._say(said, "content_block_stop", index=index)

    def _say(self, said: list[ServerEvent], name: str, **body: Any) -> None:
        if self._stream:
            said.append(ServerEvent.of({"type": name, **body}, name))


def status_of(error: AylluError) -> int:
    """The HTTP status that the API has for `error`: fewer than we know, as its clients know those alone."""
    status = error.http_status
    if status == 503:
        return OVERLOADED
    if status >= 500:
        return 500
    return status if status in _TYPES or status == 405 else 400


def error_body(error: AylluError) -> dict[str, Any]:
    """`error` in the API's layout; its status is `status_of(error)`."""
    kind = _TYPES.get(status_of(error), "invalid_request_error")
    return {"type": "error", "error": {"type": kind, "message": f"{error.problem} {error.fix}".strip()}}
