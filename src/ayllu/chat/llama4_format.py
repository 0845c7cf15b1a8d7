"""Llama 4's chat format, written natively: no template engine between a conversation and its tokens.

message := header_start role header_end blank-line content terminator, after one BOS. The structure equals
that of the template published with the Hugging Face checkpoints (roles, markers, order, JSON layout); the
words that explain tools to the model are our own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from ayllu.chat.formats import CallLayout, Prompt, PromptBuilder, TextEncoder, openai_tool, to_json
from ayllu.chat.images import ImageConfig, TiledImage, tile_image
from ayllu.chat.llama4_tokens import STOP_NAMES
from ayllu.chat.messages import ImagePart, Message, TextPart, ToolCall, ToolDefinition
from ayllu.chat.toolcalls import ToolCallParser
from ayllu.errors import UnsupportedError, UsageError

CallStyle = Literal["json", "pythonic"]
ToolTurnEnd = Literal["<|eot|>", "<|eom|>"]

_ROLE_NAMES = {"tool": "ipython"}

_INSTRUCTIONS = {
    "json": (
        "You can use the functions below. When one of them helps to answer, reply only with its call: "
        '{"name": name of the function, "parameters": object of its arguments}, every value written out.'
    ),
    "pythonic": (
        "You can use the functions below. When they help to answer, reply only with the list of calls: "
        "[first_function(argument=value), second_function(argument=value)], every value written out."
    ),
}


class Llama4Format:
    """Renders conversations for Llama 4 Scout and Maverick.

    `call_style`: how tools are asked for and past calls are shown. "json" (default) is the form of the
    published template; "pythonic" is the list of calls that the models emit natively.
    `tool_turn_end`: what ends assistant turns with calls and tool results. The published template writes
    `<|eot|>` (default); Meta's own encoder writes `<|eom|>`. Both stop generation either way.
    `image_config`: preprocessing of images.
    """

    name = "llama4"

    def __init__(
        self,
        tokenizer: TextEncoder,
        *,
        call_style: CallStyle = "json",
        tool_turn_end: ToolTurnEnd = "<|eot|>",
        image_config: ImageConfig | None = None,
    ) -> None:
        self._tokenizer = tokenizer
        self._call_style = call_style
        self._tool_turn_end = tool_turn_end
        self._image_config = image_config or ImageConfig()
        self.call_layout = CallLayout(
            style=call_style, between="", region=("<|python_start|>", "<|python_end|>")
        )
        known = (tokenizer.specials[name] for name in STOP_NAMES if name in tokenizer.specials)
        self.stop_ids = tokenizer.stop_ids | frozenset(known)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[ToolDefinition] = (),
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """See `ChatFormat.render`. Later messages never change earlier tokens, so prefixes stay cached.

        System text is trimmed. Tools stand in the first user message, whose text is trimmed then; a system
        message says that tools exist. Raises UsageError for tools without a user message, ImageError for an
        unreadable image.
        """
        tools_at = self._first_user(messages) if tools else None
        builder = PromptBuilder(self._tokenizer).special("<|begin_of_text|>")
        for number, message in enumerate(messages):
            self._open(builder, _ROLE_NAMES.get(message.role, message.role))
            end = "<|eot|>"
            if message.role == "system":
                builder.text(("Environment: ipython\n" if tools else "") + message.text.strip())
            elif message.role == "tool":
                self._tool_result(builder, message)
                end = self._tool_turn_end
            elif message.tool_calls:
                self._tool_calls(builder, message)
                end = self._tool_turn_end
            else:
                if number == tools_at:
                    builder.text(self._describe(tools))
                self._content(builder, message, trim=number == tools_at)
            builder.special(end)
        if add_generation_prompt:
            self._open(builder, "assistant")
        return builder.build()

    def tool_call_parser(self, tools: Sequence[ToolDefinition] | None = None) -> ToolCallParser:
        """See `ChatFormat.tool_call_parser`."""
        return ToolCallParser(tools)

    def _open(self, builder: PromptBuilder, role: str) -> None:
        builder.special("<|header_start|>").text(role).special("<|header_end|>").text("\n\n")

    def _first_user(self, messages: Sequence[Message]) -> int:
        for number, message in enumerate(messages):
            if message.role == "user":
                return number
        raise UsageError(
            "Tools are described in the first user message, and there is none.", "Add a user message."
        )

    def _describe(self, tools: Sequence[ToolDefinition]) -> str:
        schemas = [to_json(openai_tool(tool), indent=4) for tool in tools]
        return "\n\n".join([_INSTRUCTIONS[self._call_style], *schemas, ""])

    def _content(self, builder: PromptBuilder, message: Message, *, trim: bool) -> None:
        parts = message.parts
        for number, part in enumerate(parts):
            if isinstance(part, ImagePart):
                tiled = part.tiled or tile_image(part.data, self._image_config)
                builder.image(tiled, image_layout(tiled, self._image_config.tokens_per_tile))
                continue
            text = part.text
            if trim and number == 0:
                text = text.lstrip()
            if trim and number == len(parts) - 1:
                text = text.rstrip()
            builder.text(text)

    def _tool_calls(self, builder: PromptBuilder, message: Message) -> None:
        builder.special("<|python_start|>")
        self._content(builder, message, trim=False)
        builder.special("<|python_end|>")
        if self._call_style == "pythonic":
            builder.text(f"[{', '.join(_pythonic(call) for call in message.tool_calls)}]")
            return
        for call in message.tool_calls:
            builder.text(to_json({"name": call.name, "parameters": call.arguments}))

    def _tool_result(self, builder: PromptBuilder, message: Message) -> None:
        if not all(isinstance(part, TextPart) for part in message.parts):
            raise UnsupportedError(
                "A tool result carries an image, for which Llama 4 has no form.",
                "Put the image into a user message.",
            )
        builder.text(to_json(message.text))


def image_layout(image: TiledImage, tokens_per_tile: int) -> list[str]:
    """Names of the special tokens that hold one image's place in the prompt.

    With 144 tokens a tile: 147 names for one tile, 145 R C + 147 for R x C (727 for 2 x 2, 2467 for 16).
    One tile has no separators; several have one behind each tile (the row's own behind the last of a row),
    and the global tile after `<|image|>`.
    """
    tile = ["<|patch|>"] * tokens_per_tile
    row = [*tile, *(["<|tile_x_separator|>", *tile] * (image.columns - 1)), "<|tile_y_separator|>"]
    grid = row * image.rows if image.rows * image.columns > 1 else []
    return ["<|image_start|>", *grid, "<|image|>", *tile, "<|image_end|>"]


def _pythonic(call: ToolCall) -> str:
    arguments = ", ".join(f"{name}={value!r}" for name, value in call.arguments.items())
    return f"{call.name}({arguments})"
