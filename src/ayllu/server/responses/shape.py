"""A response in OpenAI's Responses layout: numbered events while it comes, the whole at the end.

Both are built of the same items, so what the events add up to is the result. A response can also be put
together again from the events that were stored, when the server that said them is gone.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from ayllu.engine.events import (
    AnswerFinished,
    Done,
    Event,
    FinishReason,
    TextDelta,
    TokenLogprob,
    ToolCallMade,
)
from ayllu.engine.openai.results import chat_logprobs, tool_call_id, tool_call_object
from ayllu.errors import AylluError, ImageError, OverloadedError
from ayllu.server.responses.bodies import SHARED, ResponsesBody, ResponsesCall
from ayllu.server.shapes import ServerEvent

Status = Literal["queued", "in_progress", "completed", "incomplete", "failed", "cancelled"]
ItemStatus = Literal["in_progress", "completed", "incomplete"]

FINAL = frozenset({"response.completed", "response.incomplete", "response.failed", "response.cancelled"})
"""Events after which nothing comes."""

_UNFINISHED = {"code": "server_error", "message": "The response was not finished. Ask again."}


class _MessageItem:
    """Text under way, or said."""

    def __init__(self, item_id: str) -> None:
        self.id = item_id
        self.pieces: list[str] = []
        self.logprobs: list[dict[str, Any]] = []
        self.status: ItemStatus = "in_progress"

    def part(self) -> dict[str, Any]:
        text = "".join(self.pieces)
        return {"type": "output_text", "annotations": [], "logprobs": list(self.logprobs), "text": text}

    def written(self) -> dict[str, Any]:
        return _message(self.id, self.status, [self.part()])


class _CallItem:
    """A call; calls come whole."""

    def __init__(self, item_id: str, call: dict[str, Any]) -> None:
        self.id = item_id
        self.status: ItemStatus = "in_progress"
        self._call_id = call["id"]
        self._name = call["function"]["name"]
        self.arguments: str = call["function"]["arguments"]

    def written(self) -> dict[str, Any]:
        return self.with_arguments(self.arguments)

    def with_arguments(self, arguments: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "function_call",
            "status": self.status,
            "arguments": arguments,
            "call_id": self._call_id,
            "name": self._name,
        }


def _message(item_id: str, status: ItemStatus, content: list[dict[str, Any]]) -> dict[str, Any]:
    return {"id": item_id, "type": "message", "status": status, "role": "assistant", "content": content}


class ResponseShape:
    """One response. created_at: seconds since 1970."""

    def __init__(self, call: ResponsesCall, *, model: str, response_id: str, created_at: float) -> None:
        (self._request,) = call.generate.requests
        self._call = call
        self._created_at = int(created_at)
        self._head = {"id": response_id, "object": "response", "created_at": self._created_at}
        self._echo = _echo(call, model)
        self._number = 0
        self._items: list[_MessageItem | _CallItem] = []
        self._open: _MessageItem | None = None
        # Tokens whose text is still held back: it is the next text's, unless a call comes of it.
        self._waiting: list[TokenLogprob] = []
        self._opened = False
        self._reason: FinishReason = "stop"
        self._done: Done | None = None
        self._error: dict[str, Any] | None = None
        self._final: dict[str, Any] | None = None

    def opening(self) -> Iterable[ServerEvent]:
        if self._opened:
            return
        self._opened = True
        if self._call.background:
            yield self._event("response.created", response=self.snapshot("queued"))
            yield self._event("response.queued", response=self.snapshot("queued"))
        else:
            yield self._event("response.created", response=self.snapshot("in_progress"))
        yield self._event("response.in_progress", response=self.snapshot("in_progress"))

    def add(self, part: int, event: Event) -> Iterable[ServerEvent]:
        match event:
            case TextDelta(text=text, logprobs=logprobs):
                self._waiting += logprobs
                return self._text(text) if text else ()
            case ToolCallMade():
                return self._tool_call(event)
            case AnswerFinished(reason=reason):
                self._reason = reason
                return self._end_of_answer()
            case Done():
                self._done = event
        return ()

    def closing(self) -> Iterable[ServerEvent]:
        statuses: dict[FinishReason, Status] = {"length": "incomplete", "cancelled": "cancelled"}
        return self._end(statuses.get(self._reason, "completed"))

    def failed(self, error: AylluError) -> Iterable[ServerEvent]:
        self._error = {"code": _code(error), "message": f"{error.problem} {error.fix}".strip()}
        return self._end("failed")

    def cancelled(self) -> Iterable[ServerEvent]:
        """The end of a response that is not to be completed."""
        return self._end("cancelled")

    def result(self) -> dict[str, Any]:
        """Valid once the response has ended, however it did."""
        assert self._final is not None, "the response has not ended"
        return copy.deepcopy(self._final)

    def snapshot(self, status: Status) -> dict[str, Any]:
        """The response as far as it is, in this status."""
        output = [item.written() for item in self._items]
        response = {**self._head, "status": status, **copy.deepcopy(self._echo), "output": output}
        if status not in ("queued", "in_progress") and self._done is not None:
            response["usage"] = _usage(self._done)
        if status == "completed":
            response["completed_at"] = max(int(time.time()), self._created_at)
        if status == "incomplete" and self._reason == "length":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        if status == "failed" and self._error is not None:
            response["error"] = dict(self._error)
        return _ended(response, status)

    def _end(self, status: Status) -> Iterator[ServerEvent]:
        if self._final is not None:
            return
        yield from self.opening()
        yield from self._close("incomplete")
        self._final = self.snapshot(status)
        yield self._event(f"response.{status}", response=self._final)

    def _end_of_answer(self) -> Iterator[ServerEvent]:
        if not self._items and self._reason != "cancelled":
            # An answer of no words is one all the same, and clients look for it.
            yield from self._begin()
        if self._open is not None and self._waiting:
            yield self._delta(self._open, "")
        yield from self._close("completed" if self._reason in ("stop", "tool_calls") else "incomplete")

    def _text(self, text: str) -> Iterator[ServerEvent]:
        if self._open is None:
            yield from self._begin()
        assert self._open is not None
        yield self._delta(self._open, text)

    def _begin(self) -> Iterator[ServerEvent]:
        item = _MessageItem(f"msg_{self._request.id}{len(self._items):04x}")
        self._items.append(item)
        self._open = item
        yield self._item_event("added", _message(item.id, "in_progress", []))
        yield self._part_event("response.content_part.added", item, part=item.part())

    def _delta(self, item: _MessageItem, text: str) -> ServerEvent:
        logprobs = chat_logprobs(self._waiting)
        self._waiting.clear()
        item.pieces.append(text)
        item.logprobs += logprobs
        return self._part_event("response.output_text.delta", item, delta=text, logprobs=logprobs)

    def _close(self, status: ItemStatus) -> Iterator[ServerEvent]:
        item = self._open
        if item is None:
            return
        self._open = None
        item.status = status
        part = item.part()
        yield self._part_event(
            "response.output_text.done", item, text=part["text"], logprobs=part["logprobs"]
        )
        yield self._part_event("response.content_part.done", item, part=part)
        yield self._item_event("done", item.written())

    def _tool_call(self, event: ToolCallMade) -> Iterator[ServerEvent]:
        # What the call is written in is no text, and the API has no place for its log-probabilities.
        self._waiting.clear()
        yield from self._close("completed")
        call_id = tool_call_id(self._request, event.index, event.call_index)
        item = _CallItem(
            f"fc_{self._request.id}{len(self._items):04x}", tool_call_object(event.call, call_id)
        )
        self._items.append(item)
        index = len(self._items) - 1
        place = {"item_id": item.id, "output_index": index}
        yield self._item_event("added", item.with_arguments(""))
        yield self._event("response.function_call_arguments.delta", **place, delta=item.arguments)
        yield self._event("response.function_call_arguments.done", **place, arguments=item.arguments)
        item.status = "completed"
        yield self._item_event("done", item.written())

    def _item_event(self, what: str, item: dict[str, Any]) -> ServerEvent:
        """Of the last item: the one before it is done when the next is added."""
        return self._event(f"response.output_item.{what}", output_index=len(self._items) - 1, item=item)

    def _part_event(self, name: str, item: _MessageItem, **fields: Any) -> ServerEvent:
        index = len(self._items) - 1
        return self._event(name, item_id=item.id, output_index=index, content_index=0, **fields)

    def _event(self, name: str, **fields: Any) -> ServerEvent:
        number = self._number
        self._number += 1
        return ServerEvent.of({"type": name, "sequence_number": number, **fields}, name)


def partial_response(
    created_response: Mapping[str, Any], events: Iterable[Mapping[str, Any]], status: Status
) -> dict[str, Any]:
    """The response that stored events tell of, in this status; or as it ended, if they tell that too.

    created_response: as in the first of them. Items that were not done are 'incomplete'.
    """
    output: dict[int, dict[str, Any]] = {}
    for event in events:
        name = event.get("type")
        if name in FINAL:
            return copy.deepcopy(dict(event["response"]))
        if name in ("response.output_item.added", "response.output_item.done"):
            output[event["output_index"]] = copy.deepcopy(event["item"])
        elif event.get("output_index") in output:
            _retell(output[event["output_index"]], event)
    items = [output[index] for index in sorted(output)]
    return _ended({**copy.deepcopy(dict(created_response)), "status": status, "output": items}, status)


def _retell(item: dict[str, Any], event: Mapping[str, Any]) -> None:
    match event["type"]:
        case "response.content_part.added" | "response.content_part.done":
            item["content"][event["content_index"] :] = [copy.deepcopy(event["part"])]
        case "response.output_text.delta":
            part = item["content"][event["content_index"]]
            part["text"] += event["delta"]
            part["logprobs"] += event["logprobs"]
        case "response.function_call_arguments.delta":
            item["arguments"] += event["delta"]
        case "response.function_call_arguments.done":
            item["arguments"] = event["arguments"]


def _ended(response: dict[str, Any], status: Status) -> dict[str, Any]:
    """What an end means for what was under way: nothing stays in progress, and there is a reason."""
    if status in ("queued", "in_progress"):
        return response
    for item in response["output"]:
        if item["status"] == "in_progress":
            item["status"] = "incomplete"
    if status == "failed" and response["error"] is None:
        response["error"] = dict(_UNFINISHED)
    if status == "incomplete" and response["incomplete_details"] is None:
        # The API knows no server that ends in the middle; a word that it uses for something else would lie.
        response["incomplete_details"] = {"reason": "interrupted"}
    return response


def _usage(done: Done) -> dict[str, Any]:
    return {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": done.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": done.new_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": done.prompt_tokens + done.new_tokens,
    }


def _code(error: AylluError) -> str:
    """The API's word for it: it has few."""
    if isinstance(error, OverloadedError):
        return "rate_limit_exceeded"
    if isinstance(error, ImageError):
        return "invalid_image"
    return "invalid_prompt" if error.http_status < 500 else "server_error"


def _echo(call: ResponsesCall, model: str) -> dict[str, Any]:
    """Everything of a response but its beginning and its output, as it is before the end."""
    body = call.body
    sampling = call.generate.requests[0].sampling
    echo: dict[str, Any] = {
        "background": call.background,
        "completed_at": None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": body.max_tool_calls,
        "model": model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": call.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "prompt_cache_retention": None if body.prompt_cache_retention is None else "in_memory",
        "reasoning": {"effort": None if body.reasoning is None else body.reasoning.effort, "summary": None},
        "safety_identifier": body.safety_identifier,
        "service_tier": "default",
        "store": call.store,
        "temperature": sampling.temperature,
        "text": {"format": _text_format(body), "verbosity": "medium"},
        "tool_choice": _choice(body),
        "tools": [_tool(tool) for tool in body.tools or ()],
        "top_logprobs": body.top_logprobs or 0,
        "top_p": sampling.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
        "metadata": dict(body.metadata or {}),
    }
    given = {name: getattr(body, name) for name in SHARED if getattr(body, name) is not None}
    return {**given, **echo}


def _text_format(body: ResponsesBody) -> dict[str, Any]:
    wanted = None if body.text is None else body.text.format
    if wanted is None or wanted.type != "json_schema":
        return {"type": "text" if wanted is None else wanted.type}
    return {
        "type": "json_schema",
        "name": wanted.name,
        "description": wanted.description,
        "schema": wanted.schema_,
        "strict": wanted.strict is not False,
    }


def _choice(body: ResponsesBody) -> Any:
    if body.tool_choice is None:
        return "auto"
    written = body.tool_choice.model_dump()
    return written["type"] if len(written) == 1 else written


def _tool(tool: Any) -> dict[str, Any]:
    return {
        "type": "function",
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict is not False,
    }
