"""What a message of Anthropic's shape holds: blocks, each read by its type, unknown fields refused by name.

Blocks that only Anthropic's own machines make (searches, code they ran) are refused with the reason.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from ayllu.engine.openai.body import Strict, at
from ayllu.server.responses.items import of_type

MAX_LABEL_CHARACTERS = 256
"""Of an id or a name."""

MAX_BLOCKS = 100_000
"""Of one content; the size of a body limits them before this does."""

Label = Annotated[str, Field(min_length=1, max_length=MAX_LABEL_CHARACTERS)]

_TEXT_ONLY = "Put its text into a block of type text."
_NOT_RUN = "Nothing is run for the model here: describe a tool with an input_schema, and run it yourself."
_NO_TOOLSETS = "Tools stand for themselves here: leave it out."


class CacheControl(Strict):
    """Without effect: every beginning of a prompt is remembered by itself, as long as there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class Block(Strict):
    cache_control: CacheControl | None = None


class Citations(Strict):
    enabled: bool | None = None

    @model_validator(mode="after")
    def _are_off(self) -> Self:
        if self.enabled:
            raise at(
                "enabled", "= true is not supported.", "Ask for sources in a message.", "unsupported_value"
            )
        return self


class TextBlock(Block):
    type: Literal["text"]
    text: str
    citations: list[Any] | None = None

    @model_validator(mode="after")
    def _cites_nothing(self) -> Self:
        if self.citations:
            problem = "are not shown to the model."
            raise at("citations", problem, "Leave them out.", "unsupported_parameter")
        return self


class Base64Image(Strict):
    type: Literal["base64"]
    media_type: Literal["image/jpeg", "image/png", "image/gif", "image/webp"]
    data: str


class UrlImage(Strict):
    type: Literal["url"]
    url: str


class FileImage(Strict):
    type: Literal["file"]
    file_id: Label


ImageSource: TypeAlias = Base64Image | UrlImage | FileImage


def _as_image_source(value: Any) -> Any:
    return of_type(value, {"base64": Base64Image, "url": UrlImage, "file": FileImage}, {})


class ImageBlock(Block):
    refused: ClassVar[Mapping[str, str]] = {"transformations": "Send the image as it is to be seen."}

    type: Literal["image"]
    source: Annotated[ImageSource, BeforeValidator(_as_image_source)]


def as_blocks(value: Any) -> Any:
    """For validation: a string is one block of text."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is not None and not isinstance(value, list):
        raise at("", f"is a {type(value).__name__}.", "Give a string, or a list of blocks.")
    return value


def _as_text(value: Any) -> Any:
    return of_type(value, {"text": TextBlock}, _REFUSED)


TextContent = Annotated[
    list[Annotated[TextBlock, BeforeValidator(_as_text)]],
    Field(max_length=MAX_BLOCKS),
    BeforeValidator(as_blocks, json_schema_input_type=str | list[TextBlock]),
]
"""A string or blocks of text."""


def _as_seen(value: Any) -> Any:
    return of_type(value, {"text": TextBlock, "image": ImageBlock}, _REFUSED)


class TextSource(Strict):
    type: Literal["text"]
    media_type: Literal["text/plain"]
    data: str


class ContentSource(Strict):
    type: Literal["content"]
    content: Annotated[
        list[Annotated[TextBlock | ImageBlock, BeforeValidator(_as_seen)]],
        Field(max_length=MAX_BLOCKS),
        BeforeValidator(as_blocks, json_schema_input_type=str | list[TextBlock | ImageBlock]),
    ]


_REFUSED_SOURCES = {
    "base64": f"PDFs are not read here. {_TEXT_ONLY}",
    "url": f"Documents are not fetched here. {_TEXT_ONLY}",
    "file": f"Stored documents are not read here. {_TEXT_ONLY}",
}


def _as_document_source(value: Any) -> Any:
    return of_type(value, {"text": TextSource, "content": ContentSource}, _REFUSED_SOURCES)


class DocumentBlock(Block):
    """Shown to the model as text: title and context, each on a line of its own, then what it holds."""

    type: Literal["document"]
    source: Annotated[TextSource | ContentSource, BeforeValidator(_as_document_source)]
    title: str | None = None
    context: str | None = None
    citations: Citations | None = None


class SearchResultBlock(Block):
    """Shown to the model as text: title and source, each on a line of its own, then what it holds."""

    type: Literal["search_result"]
    title: str
    source: str
    content: TextContent
    citations: Citations | None = None


class ThinkingBlock(Strict):
    """Of an earlier turn, perhaps of another model: taken, and not shown to the model."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None


class RedactedThinkingBlock(Strict):
    """As ThinkingBlock."""

    type: Literal["redacted_thinking"]
    data: str


class Caller(Strict):
    type: Literal["direct"]


class ToolUseBlock(Block):
    refused: ClassVar[Mapping[str, str]] = {"toolset_name": _NO_TOOLSETS}

    type: Literal["tool_use"]
    id: Label
    name: Label
    input: dict[str, Any]
    caller: Caller | None = None


_RESULT_BLOCKS: dict[str, type[Strict]] = {
    "text": TextBlock,
    "image": ImageBlock,
    "document": DocumentBlock,
    "search_result": SearchResultBlock,
}

ShownBlock: TypeAlias = TextBlock | ImageBlock | DocumentBlock | SearchResultBlock


def _as_result_block(value: Any) -> Any:
    return of_type(value, _RESULT_BLOCKS, _REFUSED)


class ToolResultBlock(Block):
    refused: ClassVar[Mapping[str, str]] = {"toolset_name": _NO_TOOLSETS}

    type: Literal["tool_result"]
    tool_use_id: Label
    content: Annotated[
        list[Annotated[ShownBlock, BeforeValidator(_as_result_block)]] | None,
        Field(max_length=MAX_BLOCKS),
        BeforeValidator(as_blocks, json_schema_input_type=str | list[ShownBlock] | None),
    ] = None
    is_error: bool | None = None


_REFUSED: dict[str, str] = {
    **dict.fromkeys(
        ("server_tool_use", "web_search_tool_result", "web_fetch_tool_result", "code_execution_tool_result",
         "bash_code_execution_tool_result", "text_editor_code_execution_tool_result",
         "tool_search_tool_result", "advisor_tool_result", "mcp_tool_use", "mcp_tool_result"),
        _NOT_RUN,
    ),
    "container_upload": "There are no containers here: put the file's text into the message.",
    "tool_reference": "All tools are shown to the model: leave it out.",
    "compaction": "Send a message that sums up the conversation.",
    "browser_state": "There is no browser here: describe what it shows.",
    "fallback": "One model answers: leave it out.",
    "mcp_tool_listing": "List the tools in tools.",
    **dict.fromkeys(("tool_addition", "tool_removal"), "Send the tools that are on offer now in tools."),
    "input_audio": "The model reads text and images: send one of those.",
}  # fmt: skip
"""Known elsewhere, with what to do instead."""

_BLOCKS_OF_ROLE: dict[str, dict[str, type[Strict]]] = {
    "user": {**_RESULT_BLOCKS, "tool_result": ToolResultBlock},
    "assistant": {
        "text": TextBlock,
        "tool_use": ToolUseBlock,
        "thinking": ThinkingBlock,
        "redacted_thinking": RedactedThinkingBlock,
    },
    "system": {"text": TextBlock},
}

AnyBlock: TypeAlias = ShownBlock | ToolResultBlock | ToolUseBlock | ThinkingBlock | RedactedThinkingBlock


def _as_block(value: Any) -> Any:
    return of_type(value, {kind: block for all_ in _BLOCKS_OF_ROLE.values() for kind, block in all_.items()},
                   _REFUSED)  # fmt: skip


class MessageTurn(Strict):
    """One message. The role system stands for instructions that come in the middle of a conversation."""

    refused: ClassVar[Mapping[str, str]] = {
        "clear_at": "Nothing is left out silently: send the messages that are to be read.",
        "output_config": "Give it beside messages.",
    }

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        list[Annotated[AnyBlock, BeforeValidator(_as_block)]],
        Field(max_length=MAX_BLOCKS),
        BeforeValidator(as_blocks, json_schema_input_type=str | list[AnyBlock]),
    ]

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        allowed = _BLOCKS_OF_ROLE[self.role]
        for number, block in enumerate(self.content):
            if block.type not in allowed:
                roles = " and ".join(role for role, kinds in _BLOCKS_OF_ROLE.items() if block.type in kinds)
                problem = f"= {block.type} stands in a message of the role {self.role!r}."
                raise at(f"content.{number}.type", problem, f"It belongs to {roles} only.")
        if not self.content and self.role != "assistant":
            raise at("content", "is empty.", "Give a string, or a list of blocks.")
        return self
