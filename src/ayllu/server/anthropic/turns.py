"""Messages of Anthropic's shape, to the conversation that chat formats render.

Neighbours of the same role are one turn. Blocks of text stand on lines of their own, but those of the
assistant, which are pieces of one answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ayllu.chat.messages import ImagePart, Message, Part, TextPart, ToolCall
from ayllu.engine.openai.body import InvalidBodyError
from ayllu.engine.openai.messages import ImageOf, image_bytes
from ayllu.errors import clip
from ayllu.server.anthropic.blocks import (
    AnyBlock,
    Base64Image,
    ContentSource,
    DocumentBlock,
    FileImage,
    ImageBlock,
    MessageTurn,
    SearchResultBlock,
    TextBlock,
    ToolResultBlock,
    ToolUseBlock,
)

_ERROR = "Error: "
"""What a result that is one begins with: chat formats have no other word for it."""

Placed = tuple[str, AnyBlock]
"""A block and the path of it."""


def conversation(
    system: Sequence[TextBlock], turns: Sequence[MessageTurn], image_of: ImageOf | None = None
) -> tuple[Message, ...]:
    """The messages as chat formats take them. image_of: asked for every image that is not in the request.

    Raises InvalidBodyError for an image that is nowhere, a result of no call, and an answer that was begun.
    """
    if turns[-1].role == "assistant":
        raise InvalidBodyError(
            f"messages.{len(turns) - 1} is the assistant's, and no answer that was begun is continued here.",
            "End with a message of the user, or use /v1/completions to continue a text.",
            param=f"messages.{len(turns) - 1}.role",
            code="unsupported_value",
        )
    made = [Message("system", _lines(block.text for block in system))] if system else []
    names: dict[str, str] = {}
    for role, placed in _merged(turns):
        if role == "assistant":
            made.append(_answer(placed, names))
        elif role == "system":
            made.append(Message("system", _lines(b.text for _, b in placed if isinstance(b, TextBlock))))
        else:
            made += _question(placed, names, image_of)
    return tuple(made)


def _merged(turns: Sequence[MessageTurn]) -> list[tuple[str, list[Placed]]]:
    merged: list[tuple[str, list[Placed]]] = []
    for number, turn in enumerate(turns):
        if not merged or merged[-1][0] != turn.role:
            merged.append((turn.role, []))
        merged[-1][1].extend(
            (f"messages.{number}.content.{place}", block) for place, block in enumerate(turn.content)
        )
    return merged


def _answer(placed: Sequence[Placed], names: dict[str, str]) -> Message:
    """Thinking is left out. An answer that holds nothing stays: who spoke when is part of a conversation."""
    calls = tuple(
        ToolCall(block.name, block.input, block.id) for _, block in placed if isinstance(block, ToolUseBlock)
    )
    names |= {call.id: call.name for call in calls}
    text = ""
    before = ""
    for param, block in placed:
        if isinstance(block, TextBlock):
            message = param.split(".")[1]
            text += "\n" if text and message != before else ""
            text += block.text
            before = message
    return Message("assistant", text, calls)


def _question(placed: Sequence[Placed], names: dict[str, str], image_of: ImageOf | None) -> list[Message]:
    """Results first, a message each. Their images begin what follows: a result is text to chat formats."""
    made: list[Message] = []
    parts: list[Part] = []
    for param, block in placed:
        if not isinstance(block, ToolResultBlock):
            continue
        if block.tool_use_id not in names:
            raise InvalidBodyError(
                f"{param}.tool_use_id = {clip(block.tool_use_id, 64)} is none of the calls before it.",
                "Give the id of a tool_use block of an earlier message of the assistant.",
                param=f"{param}.tool_use_id",
            )
        shown = [
            part
            for place, inner in enumerate(block.content or ())
            for part in _shown(f"{param}.content.{place}", inner, image_of)
        ]
        text = _lines(part.text for part in shown if isinstance(part, TextPart))
        parts += [part for part in shown if isinstance(part, ImagePart)]
        text = _ERROR + text if block.is_error else text
        made.append(Message("tool", text, tool_call_id=block.tool_use_id, name=names[block.tool_use_id]))
    for param, block in placed:
        if not isinstance(block, ToolResultBlock):
            parts += _shown(param, block, image_of)
    if parts or not made:
        made.append(Message("user", _content(parts)))
    return made


def _shown(param: str, block: AnyBlock, image_of: ImageOf | None) -> list[Part]:
    match block:
        case TextBlock():
            return [TextPart(block.text)]
        case ImageBlock():
            return [ImagePart(_image(block, f"{param}.source", image_of))]
        case SearchResultBlock():
            return [TextPart(_lines([block.title, block.source, *(one.text for one in block.content)]))]
        case DocumentBlock():
            head = [text for text in (block.title, block.context) if text]
            source = block.source
            if not isinstance(source, ContentSource):
                return [TextPart(_lines([*head, source.data]))]
            inner: list[Part] = [TextPart(_lines(head))] if head else []
            for place, one in enumerate(source.content):
                inner += _shown(f"{param}.source.content.{place}", one, image_of)
            return inner
    raise AssertionError(f"a message of the user holds no {block.type}")


def _image(block: ImageBlock, param: str, image_of: ImageOf | None) -> bytes:
    source = block.source
    if isinstance(source, Base64Image):
        return image_bytes(f"data:{source.media_type};base64,{source.data}", f"{param}.data")
    if not isinstance(source, FileImage):
        return image_bytes(source.url, f"{param}.url", image_of)
    if image_of is None:
        raise InvalidBodyError(
            f"{param}.file_id = {clip(source.file_id, 64)} names a stored file, and none are kept here.",
            "Put the image into the request: a source of type base64.",
            param=f"{param}.file_id",
        )
    return image_of(source.file_id, f"{param}.file_id")


def _content(parts: Sequence[Part]) -> str | tuple[Part, ...]:
    """Neighbouring texts as one; a text alone as a string."""
    joined: list[Part] = []
    for part in parts:
        last = joined[-1] if joined else None
        if isinstance(part, TextPart) and isinstance(last, TextPart):
            joined[-1] = TextPart(f"{last.text}\n{part.text}")
        else:
            joined.append(part)
    if len(joined) == 1 and isinstance(joined[0], TextPart):
        return joined[0].text
    return tuple(joined) or ""


def _lines(texts: Iterable[str]) -> str:
    return "\n".join(texts)
