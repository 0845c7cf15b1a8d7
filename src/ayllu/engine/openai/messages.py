"""Messages and tools as OpenAI writes them, to the conversation that chat formats render.

Roles, parts and tools are checked here down to the base64 of an image. Nothing is fetched here: a picture is
in the request, or whoever calls has it already and hands it over by its name.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ayllu.chat.images import MAX_IMAGE_BYTES
from ayllu.chat.messages import ImagePart, Message, Part, Role, TextPart, ToolCall, ToolDefinition
from ayllu.engine.openai.body import InvalidBodyError, Strict, at, read_json_object
from ayllu.engine.requests import MAX_TOOLS, ToolUse
from ayllu.errors import clip

MAX_NAME_CHARACTERS = 256
MAX_MESSAGES = 100_000

ImageOf = Callable[[str, str], bytes]
"""The bytes of an image by its URL or the id of a stored file; the second argument is the name of the field,
for errors. Raises InvalidBodyError."""

_IMAGES_ONLY = "The model reads text and images: send one of those."


def _as_object(value: Any) -> Any:
    return {"url": value} if isinstance(value, str) else value


def _as_parts(value: Any) -> Any:
    """A string is one part of text. What is neither is said here: a list alone would be half the truth."""
    if isinstance(value, str):
        return [{"type": "text", "text": value}]
    if value is not None and not isinstance(value, list):
        raise at("", f"is a {type(value).__name__}.", "Give a string, or a list of parts.")
    return value


class ImageUrl(Strict):
    """An image is always read in the detail its size has: that is what 'auto' and 'high' ask for.

    `file_id` names a stored file; so does a URL that is such an id and nothing else.
    """

    url: str | None = None
    file_id: str | None = Field(default=None, min_length=1, max_length=MAX_NAME_CHARACTERS)
    detail: Literal["auto", "high"] = "auto"

    @model_validator(mode="after")
    def _names_one_image(self) -> Self:
        if self.url is None and self.file_id is None:
            raise at("url", "is missing.", "Give it.", "missing_required_parameter")
        if self.url is not None and self.file_id is not None:
            raise at("file_id", "stands beside a url.", "Give one of the two.")
        return self


class ContentPart(Strict):
    """One part of a message: text, an image, or (in an assistant's message) a refusal it once gave."""

    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("input_audio", "file", "audio_url", "video_url", "input_video", "image_embeds"), _IMAGES_ONLY
    )

    type: Literal["text", "image_url", "refusal"]
    text: str | None = None
    image_url: Annotated[
        ImageUrl | None, BeforeValidator(_as_object, json_schema_input_type=ImageUrl | str | None)
    ] = None
    refusal: str | None = None

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> Self:
        for name in ("text", "image_url", "refusal"):
            if (getattr(self, name) is not None) != (name == self.type):
                problem = "is missing." if name == self.type else f"stands in a part of type {self.type!r}."
                raise at(name, problem, "A part holds the one field that its type names.")
        return self


class FunctionCall(Strict):
    name: str = Field(min_length=1, max_length=MAX_NAME_CHARACTERS)
    arguments: str
    provider_specific_fields: dict[str, Any] | None = None


class MadeCall(Strict):
    """A call that the assistant made earlier in the conversation. provider_specific_fields: where litellm
    keeps what it did not know of our answer, and sends it back; it says nothing new."""

    refused: ClassVar[Mapping[str, str]] = {"custom": "Only functions can be called."}

    id: str = Field(max_length=MAX_NAME_CHARACTERS)
    type: Literal["function"] = "function"
    function: FunctionCall
    provider_specific_fields: dict[str, Any] | None = None


_FIELDS_OF_ROLE: dict[str, tuple[str, ...]] = {
    "system": ("content", "name"),
    "developer": ("content", "name"),
    "user": ("content", "name"),
    "assistant": ("content", "name", "tool_calls", "refusal", "annotations", "provider_specific_fields"),
    "tool": ("content", "name", "tool_call_id"),
}


class ChatMessage(Strict):
    """One message. What an earlier answer held comes back as it was, its empty fields included."""

    refused: ClassVar[Mapping[str, str]] = {
        "function_call": "Use tool_calls, and messages of the role tool.",
        "audio": _IMAGES_ONLY,
        "reasoning": "Earlier reasoning is not shown to the model: leave it out.",
        "reasoning_content": "Earlier reasoning is not shown to the model: leave it out.",
    }

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[
        list[ContentPart] | None,
        BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart] | None),
    ] = None
    name: str | None = Field(default=None, max_length=MAX_NAME_CHARACTERS)
    tool_calls: list[MadeCall] | None = None
    tool_call_id: str | None = Field(default=None, max_length=MAX_NAME_CHARACTERS)
    refusal: str | None = None
    annotations: Annotated[list[Any] | None, Field(max_length=0)] = None
    provider_specific_fields: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        allowed = _FIELDS_OF_ROLE[self.role]
        for name in type(self).model_fields:
            if name != "role" and name not in allowed and getattr(self, name) not in (None, []):
                roles = " and ".join(role for role, fields in _FIELDS_OF_ROLE.items() if name in fields)
                raise at(
                    name, f"stands in a message of the role {self.role!r}.", f"It belongs to {roles} only."
                )
        says_something = self.content is not None or bool(self.tool_calls or self.refusal)
        if not says_something or (self.role != "assistant" and self.content is None):
            raise at("content", "is missing.", "Give a string, or a list of parts.")
        if self.role == "tool" and not self.tool_call_id:
            raise at("tool_call_id", "is missing.", "Give the id of the call that this is the result of.")
        for number, part in enumerate(self.content or ()):
            role = {"image_url": "user", "refusal": "assistant"}.get(part.type, self.role)
            if role != self.role:
                problem = f"stands in a message of the role {self.role!r}."
                raise at(f"content.{number}.{part.type}", problem, f"It belongs to the role {role!r}.")
        return self


def conversation(messages: Sequence[ChatMessage], image_of: ImageOf | None = None) -> tuple[Message, ...]:
    """The messages as chat formats take them. 'developer' is another word for 'system'.

    image_of: asked for every image that is not in the request itself. Raises InvalidBodyError for an image
    that is nowhere, and for arguments that are no JSON.
    """
    names: dict[str, str] = {}
    made = []
    for number, message in enumerate(messages):
        param = f"messages.{number}"
        calls = tuple(
            _tool_call(call, f"{param}.tool_calls.{place}")
            for place, call in enumerate(message.tool_calls or ())
        )
        names |= {call.id: call.name for call in calls}
        role: Role = "system" if message.role == "developer" else message.role
        call_id = message.tool_call_id or ""
        name = message.name or names.get(call_id, "")
        made.append(Message(role, _content(message, param, image_of), calls, call_id, name))
    return tuple(made)


def _content(message: ChatMessage, param: str, image_of: ImageOf | None) -> str | tuple[Part, ...]:
    parts: list[Part] = []
    for number, part in enumerate(message.content or ()):
        if part.image_url is not None:
            name = "url" if part.image_url.file_id is None else "file_id"
            where = part.image_url.file_id or part.image_url.url or ""
            data = image_bytes(where, f"{param}.content.{number}.image_url.{name}", image_of)
            parts.append(ImagePart(data))
        else:
            parts.append(TextPart(part.text if part.text is not None else part.refusal or ""))
    if message.refusal:
        parts.append(TextPart(message.refusal))
    if len(parts) == 1 and isinstance(parts[0], TextPart):
        return parts[0].text
    return tuple(parts) or ""


def image_bytes(url: str, param: str, image_of: ImageOf | None = None) -> bytes:
    """The bytes that a `data:image/...;base64,` URL holds; image_of is asked for every other one, and
    without it that one is refused. Raises InvalidBodyError."""
    if url[:5].lower() != "data:":
        if image_of is not None:
            return image_of(url, param)
        raise InvalidBodyError(
            f"{param} = {clip(url, 60)} would have to be fetched, and a request fetches nothing.",
            "Put the image into the request: data:image/png;base64,…",
            param=param,
        )
    header, comma, data = url[5:].partition(",")
    kind, *flags = header.lower().split(";")
    if not comma or not kind.startswith("image/") or flags[-1:] != ["base64"]:
        raise InvalidBodyError(
            f"{param} = {clip(url, 40)} is no image in base64.",
            "Write data:image/png;base64,… (or jpeg, webp, gif, bmp).",
            param=param,
        )
    if len(data) > (MAX_IMAGE_BYTES + 2) // 3 * 4:
        raise InvalidBodyError(
            f"{param} holds an image of more than {MAX_IMAGE_BYTES:,} bytes.",
            "Save it smaller.",
            param=param,
        )
    try:
        return base64.b64decode(data, validate=True)
    except ValueError as error:
        raise InvalidBodyError(
            f"{param} holds base64 that is damaged: {clip(error)}.", "Encode the image again.", param=param
        ) from error


def _tool_call(call: MadeCall, param: str) -> ToolCall:
    what = f"{param}.function.arguments"
    try:
        arguments = read_json_object(call.function.arguments.encode(), what)
    except InvalidBodyError as error:
        raise InvalidBodyError(
            error.problem, "Give the arguments as one JSON object, written as a string.", param=what
        ) from error
    return ToolCall(call.function.name, arguments, call.id)


class FunctionDefinition(Strict):
    """`strict` changes nothing: arguments are held to the schema from where a call begins, always."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @model_validator(mode="after")
    def _is_no_word_of_tool_choice(self) -> Self:
        if self.name in ("auto", "none", "required"):
            raise at("name", f"= {self.name} means something else in tool_choice.", "Rename the function.")
        return self


class Tool(Strict):
    refused: ClassVar[Mapping[str, str]] = {"custom": "Describe it as a function with parameters."}

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    name: str


class NamedTool(Strict):
    refused: ClassVar[Mapping[str, str]] = {"custom": "Only functions can be called."}

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Strict):
    mode: Literal["auto", "required"]
    tools: list[NamedTool] = Field(min_length=1, max_length=MAX_TOOLS)


class ToolChoice(Strict):
    """All forms in one: a word alone was made `{"type": word}` before it came here."""

    refused: ClassVar[Mapping[str, str]] = {"custom": "Only functions can be called."}

    type: Literal["none", "auto", "required", "function", "allowed_tools"]
    function: NamedFunction | None = None
    allowed_tools: AllowedTools | None = None

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> Self:
        for name in ("function", "allowed_tools"):
            if (getattr(self, name) is not None) != (name == self.type):
                problem = "is missing." if name == self.type else f"does not go with the type {self.type!r}."
                raise at(name, problem, 'Write "none", "auto", "required", or an object of one type.')
        return self


def as_tool_choice(value: Any) -> Any:
    """For validation: a word becomes an object."""
    return {"type": value} if isinstance(value, str) else value


ToolChoiceField = Annotated[
    ToolChoice | None,
    BeforeValidator(
        as_tool_choice, json_schema_input_type=Literal["none", "auto", "required"] | ToolChoice | None
    ),
]


def tool_use(
    tools: Sequence[Tool] | None, choice: ToolChoice | None, parallel: bool | None
) -> ToolUse | None:
    """What is on offer and whether it must be used; None without tools.

    `allowed_tools` offers only those it names: the others could not be called anyway. Raises
    InvalidBodyError for a choice without its tools.
    """
    kind: str = choice.type if choice is not None else "auto"
    if not tools:
        if kind not in ("auto", "none"):
            raise InvalidBodyError(
                f"tool_choice = {kind} without tools.",
                "Give tools, or leave tool_choice out.",
                param="tool_choice",
            )
        return None
    offered = {tool.function.name: tool.function for tool in tools}
    if len(offered) < len(tools):
        raise InvalidBodyError("Two tools have the same name.", "Give each its own.", param="tools")
    names = list(offered)
    if choice is not None and choice.function is not None:
        kind = _known(choice.function.name, names, "tool_choice.function.name")
    elif choice is not None and choice.allowed_tools is not None:
        kind = choice.allowed_tools.mode
        names = [
            _known(tool.function.name, names, f"tool_choice.allowed_tools.tools.{number}.function.name")
            for number, tool in enumerate(choice.allowed_tools.tools)
        ]
    definitions = tuple(
        ToolDefinition(name, offered[name].description or "", _parameters(offered[name]))
        for name in dict.fromkeys(names)
    )
    return ToolUse(definitions, kind, parallel is not False)


def _parameters(function: FunctionDefinition) -> dict[str, Any]:
    # What a function without parameters takes is nothing: an empty object.
    return {"type": "object", "properties": {}} if function.parameters is None else function.parameters


def _known(name: str, names: Sequence[str], param: str) -> str:
    if name not in names:
        raise InvalidBodyError(
            f"{param} = {clip(name, 64)} is none of the tools.", f"Known: {', '.join(names)}.", param=param
        )
    return name
