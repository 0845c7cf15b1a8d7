"""A conversation and its tools as OpenAI's JSON: messages, calls and results, images as data: addresses.

Only shapes are translated here; which other fields a dialect knows is `request`'s matter.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any

from ayllu.chat.messages import ImagePart, Message, TextPart, ToolCall, ToolDefinition
from ayllu.engine.requests import ToolUse
from ayllu.errors import ImageError, UsageError

_SIGNATURES = (
    (b"\x89PNG\r\n\x1a\n", "image/png"),
    (b"\xff\xd8\xff", "image/jpeg"),
    (b"GIF87a", "image/gif"),
    (b"GIF89a", "image/gif"),
    (b"BM", "image/bmp"),
)


def messages_json(messages: Iterable[Message]) -> list[dict[str, Any]]:
    """The conversation. Calls without an id get one, and results without one are matched to the calls before
    them, by name and else by order, because servers match by id.

    Raises UsageError for a result that answers no call, ImageError for bytes that are no known image.
    """
    written: list[dict[str, Any]] = []
    unanswered: list[ToolCall] = []
    for place, message in enumerate(messages):
        entry: dict[str, Any] = {"role": message.role, "content": _content(message)}
        if message.name:
            entry["name"] = message.name
        if message.tool_calls:
            calls = [
                ToolCall(call.name, call.arguments, call.id or f"call_{place}_{index}")
                for index, call in enumerate(message.tool_calls)
            ]
            unanswered += calls
            entry["content"] = entry["content"] or None
            entry["tool_calls"] = [_call_json(call) for call in calls]
        if message.role == "tool":
            entry["tool_call_id"] = message.tool_call_id or _match(message, unanswered)
            unanswered = [call for call in unanswered if call.id != entry["tool_call_id"]]
        written.append(entry)
    return written


def _match(result: Message, unanswered: list[ToolCall]) -> str:
    named = [call for call in unanswered if call.name == result.name]
    for call in named or unanswered:
        return call.id
    raise UsageError(
        "A tool result answers no call.", "Put it after the assistant's message that made the call."
    )


def _content(message: Message) -> str | list[dict[str, Any]]:
    if not any(isinstance(part, ImagePart) for part in message.parts):
        return message.text
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image_url", "image_url": {"url": data_url(part.data)}}
        for part in message.parts
    ]


def data_url(image: bytes) -> str:
    """An encoded image as a `data:` address, its kind told from its first bytes. Raises ImageError."""
    kind = next((kind for signature, kind in _SIGNATURES if image.startswith(signature)), None)
    if kind is None and image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        kind = "image/webp"
    if kind is None:
        raise ImageError(
            "The image is none of the known kinds.", "Give the bytes of a PNG, JPEG, WebP, GIF or BMP file."
        )
    return f"data:{kind};base64,{base64.b64encode(image).decode('ascii')}"


def _call_json(call: ToolCall) -> dict[str, Any]:
    arguments = json.dumps(call.arguments, ensure_ascii=False, allow_nan=False)
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": arguments}}


def tools_json(use: ToolUse, *, named_choice: bool) -> dict[str, Any]:
    """The fields `tools`, `tool_choice` and `parallel_tool_calls`.

    named_choice: whether the server lets a request name the tool to call. Where it does not, the named tool
    is the only one on offer and some call is required, which comes to the same.
    """
    tools, choice = use.tools, use.choice
    forced = choice not in ("auto", "none", "required")
    if forced and not named_choice:
        tools, choice = tuple(tool for tool in tools if tool.name == choice), "required"
        forced = False
    return {
        "tools": [_tool_json(tool) for tool in tools],
        "tool_choice": {"type": "function", "function": {"name": choice}} if forced else choice,
        "parallel_tool_calls": use.parallel,
    }


def _tool_json(tool: ToolDefinition) -> dict[str, Any]:
    function: dict[str, Any] = {"name": tool.name, "parameters": tool.parameters}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}
