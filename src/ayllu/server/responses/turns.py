"""Items of Responses as the turns of a conversation, which is what a model reads.

A call joins the assistant's turn that it was made in, and words behind calls that have no result yet join it
too: one turn is one answer, just as the chat endpoint has it.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ayllu.chat.messages import ImagePart, Message, Part, Role, TextPart, ToolCall
from ayllu.engine.openai.body import InvalidBodyError, Strict, read_json_object
from ayllu.engine.openai.messages import ImageOf, image_bytes
from ayllu.errors import clip
from ayllu.server.responses.items import (
    FunctionCallItem,
    FunctionCallOutputItem,
    InputFile,
    InputImage,
    InputText,
    Item,
    ItemReference,
    MessageItem,
    OutputText,
    ReasoningItem,
    Refusal,
    item_of_dict,
)

MAX_FILE_BYTES = 8 << 20
"""Of one file of text."""

_TEXT_TYPES = ("text/", "application/json", "application/xml", "application/x-yaml", "application/yaml")


class Turns:
    """Items, one after the other, as the turns of a conversation."""

    def __init__(self, image_of: ImageOf | None) -> None:
        self.messages: list[Message] = []
        self._image_of = image_of
        self._names: dict[str, str] = {}

    def add(self, item: Item, param: str) -> None:
        """Take the next item. Raises InvalidBodyError for what cannot be read, at a path below `param`."""
        match item:
            case MessageItem():
                self._message(item, param)
            case FunctionCallItem():
                self._call(item, param)
            case FunctionCallOutputItem():
                self._result(item, param)

    def add_kept(self, items: Iterable[Mapping[str, Any]], param: str) -> None:
        """Take items of earlier responses; of one that was cut short, what it had said."""
        for value in items:
            item = item_of_dict(value, param)
            if not _is_cut(item):
                self.add(item, param)

    def _message(self, item: MessageItem, param: str) -> None:
        content = self._content(item.content, f"{param}.content")
        last = self.messages[-1] if self.messages else None
        if item.role == "assistant" and last is not None and last.tool_calls:
            # Words behind calls that have no result yet belong to the same turn.
            self._join(last, Message("assistant", content).text, ())
            return
        role: Role = "system" if item.role == "developer" else item.role
        self.messages.append(Message(role, content))

    def _call(self, item: FunctionCallItem, param: str) -> None:
        what = f"{param}.arguments"
        try:
            arguments = read_json_object(item.arguments.encode(), what)
        except InvalidBodyError as error:
            raise InvalidBodyError(
                error.problem, "Give the arguments as one JSON object, written as a string.", param=what
            ) from error
        self._names[item.call_id] = item.name
        calls = (ToolCall(item.name, arguments, item.call_id),)
        last = self.messages[-1] if self.messages else None
        if last is not None and last.role == "assistant":
            self._join(last, "", calls)
        else:
            self.messages.append(Message("assistant", "", calls))

    def _result(self, item: FunctionCallOutputItem, param: str) -> None:
        if item.call_id not in self._names:
            raise InvalidBodyError(
                f"{param}.call_id = {clip(item.call_id, 64)} is no call of this conversation.",
                "Send the function_call before its output, or previous_response_id.",
                param=f"{param}.call_id",
            )
        name = item.name or self._names[item.call_id]
        content = self._content(item.output, f"{param}.output")
        self.messages.append(Message("tool", content, (), item.call_id, name))

    def _join(self, last: Message, text: str, calls: Sequence[ToolCall]) -> None:
        content = last.text + text if text else last.content
        self.messages[-1] = Message("assistant", content, (*last.tool_calls, *calls))

    def _content(self, parts: Sequence[Strict], param: str) -> str | tuple[Part, ...]:
        return _shortest(tuple(self._part(part, f"{param}.{number}") for number, part in enumerate(parts)))

    def _part(self, part: Strict, param: str) -> Part:
        match part:
            case InputText() | OutputText():
                return TextPart(part.text)
            case Refusal():
                return TextPart(part.refusal)
            case InputImage(image_url=str() as url):
                return ImagePart(image_bytes(url, f"{param}.image_url", self._image_of))
            case InputImage(file_id=str() as file_id):
                return ImagePart(self._stored(file_id, f"{param}.file_id"))
            case InputFile():
                return TextPart(self._text_of(part, param))
        raise AssertionError(f"no part is a {type(part).__name__}")

    def _stored(self, file_id: str, param: str) -> bytes:
        if self._image_of is None:
            raise InvalidBodyError(
                f"{param} names a stored file, and none are kept here.",
                "Put the content into the request.",
                param=param,
            )
        return self._image_of(file_id, param)

    def _text_of(self, part: InputFile, param: str) -> str:
        field = f"{param}.file_data" if part.file_id is None else f"{param}.file_id"
        data = _file_bytes(part.file_data or "", field)
        if part.file_id is not None:
            data = self._stored(part.file_id, field)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidBodyError(
                f"{field} holds more than {MAX_FILE_BYTES:,} bytes.", "Send less of it.", param=field
            )
        try:
            text = data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise _no_text(field) from error
        if "\0" in text:
            raise _no_text(field)
        return f"{part.filename}\n\n{text}" if part.filename else text


def _shortest(parts: tuple[Part, ...]) -> str | tuple[Part, ...]:
    """As the chat endpoint has it: one part of text is that text, and none is ''."""
    if len(parts) == 1 and isinstance(parts[0], TextPart):
        return parts[0].text
    return parts or ""


def _is_cut(item: Item) -> bool:
    """Whether an item was broken off before there was anything whole in it."""
    if isinstance(item, ItemReference | ReasoningItem) or item.status in (None, "completed"):
        return False
    if isinstance(item, FunctionCallItem):
        return True
    return isinstance(item, MessageItem) and not any(getattr(part, "text", "") for part in item.content)


def _file_bytes(data: str, param: str) -> bytes:
    """The bytes of `data:<a type of text>;base64,…`. Raises InvalidBodyError for every other type."""
    if not data:
        return b""
    header, comma, encoded = data.partition(",")
    kind, *flags = header.lower().split(";")
    if not kind.startswith("data:") or not comma or flags[-1:] != ["base64"]:
        raise InvalidBodyError(
            f"{param} = {clip(data, 40)} is no data URL in base64.",
            "Write data:text/plain;base64,…",
            param=param,
        )
    if not kind[5:].startswith(_TEXT_TYPES):
        raise _no_text(param)
    if len(encoded) > (MAX_FILE_BYTES + 2) // 3 * 4:
        raise InvalidBodyError(
            f"{param} holds more than {MAX_FILE_BYTES:,} bytes.", "Send less of it.", param=param
        )
    try:
        return base64.b64decode(encoded, validate=True)
    except ValueError as error:
        raise InvalidBodyError(
            f"{param} holds base64 that is damaged: {clip(error)}.", "Encode the file again.", param=param
        ) from error


def _no_text(param: str) -> InvalidBodyError:
    return InvalidBodyError(
        f"{param} is no file of text, and only those are read.",
        "Extract its text, or send its pages as input_image.",
        param=param,
        code="unsupported_parameter",
    )
