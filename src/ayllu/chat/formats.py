"""Conversations to prompts: what a chat format is, and which one a model speaks.

A format writes its own control tokens; everything that came from outside (users, tools, documents, images)
goes through `PromptBuilder.text`, which cannot produce one. Llama 4 is spoken natively, other models through
their own template, and two well-known layouts serve models that bring none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from ayllu.chat.images import ImageConfig, TiledImage
from ayllu.chat.messages import ImagePart, Message, ToolDefinition
from ayllu.errors import UnsupportedError

if TYPE_CHECKING:
    from ayllu.chat.toolcalls import ToolCallParser


class TextEncoder(Protocol):
    """The part of a tokenizer that formats need (`ayllu.chat.tokenizer.Tokenizer` is one)."""

    @property
    def specials(self) -> Mapping[str, int]: ...
    @property
    def bos_id(self) -> int | None: ...
    @property
    def eos_id(self) -> int | None: ...
    @property
    def stop_ids(self) -> frozenset[int]: ...

    def encode_segments(self, segments: Iterable[tuple[str, bool]]) -> list[int]:
        """Ids of (text, trusted) parts; specials are recognised in trusted parts only."""


@dataclass(frozen=True)
class Prompt:
    """What the engine starts from: token ids, and the images whose patches stand among them, in order."""

    token_ids: list[int]
    images: tuple[TiledImage, ...] = ()


@dataclass(frozen=True)
class CallLayout:
    """How the models of a format write tool calls, for whoever wants to hold them to it.

    style: JSON objects `{"name": ..., arguments_key: {...}}`, or one list of Python calls. opening, closing:
    what stands before and after each call, and between: what stands between two. region: special tokens that
    may stand before and after all calls; they mean nothing where the vocabulary does not have them.
    """

    style: Literal["json", "pythonic"] = "json"
    arguments_key: str = "parameters"
    opening: str = ""
    closing: str = ""
    between: str = "\n"
    region: tuple[str, str] | None = None


class ChatFormat(Protocol):
    """How one family of models writes a conversation."""

    @property
    def name(self) -> str:
        """The format in one word, for `ayllu show` and error messages."""

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end the model's turn."""

    @property
    def call_layout(self) -> CallLayout:
        """How tool calls are written. What is written so, `tool_call_parser` reads."""

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolDefinition] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The whole conversation as tokens, ending with the opening of the assistant's turn if asked for."""

    def tool_call_parser(self, tools: Sequence[ToolDefinition] | None = None) -> ToolCallParser:
        """A fresh incremental parser for one answer; see `ToolCallParser` for the meaning of `tools`."""


class PromptBuilder:
    """Collects a prompt piece by piece. Only `special` can add a control token.

    Plain pieces that touch are encoded as one run, so the ids are those of the text as a whole.
    """

    def __init__(self, encoder: TextEncoder) -> None:
        self._encoder = encoder
        self._segments: list[tuple[str, bool]] = []
        self._images: list[TiledImage] = []

    def special(self, *names: str) -> PromptBuilder:
        """Add the named special tokens. Raises UnsupportedError where the vocabulary lacks one."""
        for name in names:
            if name not in self._encoder.specials:
                raise UnsupportedError(
                    f"The vocabulary has no special token {name}, which this chat format needs.",
                    "Use the tokenizer that belongs to the model.",
                )
            self._segments.append((name, True))
        return self

    def text(self, text: str) -> PromptBuilder:
        """Add text; whatever it spells, it stays text."""
        self._segments.append((text, False))
        return self

    def image(self, tiled: TiledImage, layout: Sequence[str]) -> PromptBuilder:
        """Add an image whose place in the prompt is the special tokens of `layout`."""
        self._images.append(tiled)
        return self.special(*layout)

    def build(self) -> Prompt:
        """The prompt of everything added so far."""
        return Prompt(self._encoder.encode_segments(self._segments), tuple(self._images))


def chat_format_for(
    tokenizer: TextEncoder,
    template: str | None,
    architecture: str,
    image_config: ImageConfig | None = None,
) -> ChatFormat:
    """The format a model speaks.

    Llama 4 (architecture and header tokens agree) natively; else the model's own `template`; else ChatML or
    Llama 3 where the vocabulary has their tokens. Raises UnsupportedError when nothing is known, and
    TemplateError for a template that cannot be compiled.
    """
    # Imported here: the formats import this module, and a model without a template never needs jinja.
    if architecture.startswith("llama4") and "<|header_start|>" in tokenizer.specials:
        from ayllu.chat.llama4_format import Llama4Format

        return Llama4Format(tokenizer, image_config=image_config)
    if template:
        from ayllu.chat.template import TemplateFormat

        return TemplateFormat(tokenizer, template)
    for layout in (CHATML, LLAMA3):
        if layout.opening in tokenizer.specials and layout.ending in tokenizer.specials:
            return PlainFormat(tokenizer, layout)
    raise UnsupportedError(
        "This model brings no chat template, and its vocabulary has no known chat format's turn markers.",
        "It is probably a base model: use the instruction-tuned one, or give it plain text to continue.",
    )


@dataclass(frozen=True)
class TurnLayout:
    """Turns written as opening, role, `after_role` (a special or nothing), `gap`, text, ending, `between`."""

    name: str
    opening: str
    after_role: str
    gap: str
    ending: str
    between: str
    writes_bos: bool


CHATML = TurnLayout("chatml", "<|im_start|>", "", "\n", "<|im_end|>", "\n", writes_bos=False)
LLAMA3 = TurnLayout(
    "llama3", "<|start_header_id|>", "<|end_header_id|>", "\n\n", "<|eot_id|>", "", writes_bos=True
)


class PlainFormat:
    """The fallback for instruction models without a template: bare turns, tools as text in a system turn."""

    def __init__(self, tokenizer: TextEncoder, layout: TurnLayout) -> None:
        self._tokenizer = tokenizer
        self._layout = layout
        self.name = layout.name
        self.call_layout = CallLayout()
        self.stop_ids = tokenizer.stop_ids | {tokenizer.specials[layout.ending]}

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolDefinition] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """See `ChatFormat.render`. Raises UnsupportedError for images."""
        refuse_images(messages, self.name)
        layout, builder = self._layout, PromptBuilder(self._tokenizer)
        bos = special_name(self._tokenizer, self._tokenizer.bos_id)
        if layout.writes_bos and bos:
            builder.special(bos)
        turns = [(message.role, _plain_text(message)) for message in messages]
        if tools:
            listed = "\n".join(to_json(openai_tool(tool)) for tool in tools)
            turns.insert(0, ("system", f"{_TOOL_INSTRUCTIONS}\n{listed}"))
        for role, text in turns:
            self._open(builder, role)
            builder.text(text).special(layout.ending).text(layout.between)
        if add_generation_prompt:
            self._open(builder, "assistant")
        return builder.build()

    def tool_call_parser(self, tools: Sequence[ToolDefinition] | None = None) -> ToolCallParser:
        """See `ChatFormat.tool_call_parser`."""
        from ayllu.chat.toolcalls import ToolCallParser

        return ToolCallParser(tools)

    def _open(self, builder: PromptBuilder, role: str) -> None:
        builder.special(self._layout.opening).text(role)
        if self._layout.after_role:
            builder.special(self._layout.after_role)
        builder.text(self._layout.gap)


_TOOL_INSTRUCTIONS = (
    "You can call the functions listed below, one per line. To call one, answer with a JSON object alone: "
    '{"name": the function\'s name, "parameters": an object of arguments}.'
)


def _plain_text(message: Message) -> str:
    calls = [to_json({"name": call.name, "parameters": call.arguments}) for call in message.tool_calls]
    return "\n".join([message.text, *calls]) if message.text else "\n".join(calls)


def refuse_images(messages: Sequence[Message], format_name: str) -> None:
    """Raises UnsupportedError if a message carries an image."""
    if any(isinstance(part, ImagePart) for message in messages for part in message.parts):
        raise UnsupportedError(
            f"A message carries an image, which the {format_name} chat format cannot show to the model.",
            "Remove the image or use a model with vision (Llama 4 Scout or Maverick).",
        )


def special_name(encoder: TextEncoder, token: int | None) -> str | None:
    """The name of a special token by its id, None for no id or an id that is no special."""
    return next((name for name, number in encoder.specials.items() if number == token), None)


def openai_tool(tool: ToolDefinition) -> dict[str, Any]:
    """A tool in the shape that chat templates and the OpenAI interface use."""
    function = {"name": tool.name, "description": tool.description, "parameters": tool.parameters}
    return {"type": "function", "function": function}


def to_json(value: object, indent: int | None = None) -> str:
    """JSON for a prompt: characters as they are, no HTML escaping."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
