"""Items of OpenAI's Responses: what may stand in `input`, and what comes back in `output`.

One list holds messages, calls and their results. What ayllu does not do is refused by the item's own path.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from typing import Annotated, Any, ClassVar, Literal, Self, TypeAlias

from pydantic import BeforeValidator, Field, model_validator

from ayllu.engine.openai.body import InvalidBodyError, Strict, at, validated
from ayllu.engine.openai.messages import MAX_NAME_CHARACTERS
from ayllu.errors import clip, did_you_mean

MAX_ITEMS = 10_000
"""Items in one request."""

ItemOf = Callable[[str, str], Mapping[str, Any] | None]
"""An item by its id; the second argument is the name of the field that asks for it."""

Name = Annotated[str, Field(min_length=1, max_length=MAX_NAME_CHARACTERS)]
Status = Literal["in_progress", "completed", "incomplete"]


class CacheBreakpoint(Strict):
    """A hint where to cut a prompt for a cache. Here every beginning of a prompt is remembered by itself."""

    mode: Literal["explicit"]
    ttl: Literal["30m", "12h"] | None = None


class InputText(Strict):
    type: Literal["input_text"] = "input_text"
    text: str
    prompt_cache_breakpoint: CacheBreakpoint | None = None


class InputImage(Strict):
    """An image is always read in the detail its size has: that is what all but 'low' ask for."""

    type: Literal["input_image"] = "input_image"
    image_url: str | None = None
    file_id: Name | None = None
    detail: Literal["auto", "high", "original"] | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None

    @model_validator(mode="after")
    def _is_one_image(self) -> Self:
        if (self.image_url is None) == (self.file_id is None):
            raise at("", "needs either image_url or file_id.", "Give one of them.")
        return self


class InputFile(Strict):
    """A file of text, which stands in the conversation with its name before it."""

    refused: ClassVar[Mapping[str, str]] = {
        "file_url": "Nothing is fetched: give the text as file_data, or upload it and give its file_id.",
        "detail": "Files are read as text: leave it out.",
    }

    type: Literal["input_file"] = "input_file"
    file_data: str | None = None
    file_id: Name | None = None
    filename: Annotated[str, Field(max_length=MAX_NAME_CHARACTERS)] | None = None
    prompt_cache_breakpoint: CacheBreakpoint | None = None

    @model_validator(mode="after")
    def _is_one_file(self) -> Self:
        if (self.file_data is None) == (self.file_id is None):
            raise at("", "needs either file_data or file_id.", "Give one of them.")
        return self


class OutputText(Strict):
    """What an answer said. Its log-probabilities mean nothing to the model."""

    type: Literal["output_text"] = "output_text"
    text: str
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    logprobs: list[Any] | None = None


class Refusal(Strict):
    type: Literal["refusal"] = "refusal"
    refusal: str


_PARTS: dict[str, type[Strict]] = {
    "input_text": InputText,
    "input_image": InputImage,
    "input_file": InputFile,
    "output_text": OutputText,
    "refusal": Refusal,
}
_REFUSED_PARTS = {
    "input_audio": "The model reads text and images: send one of those.",
    "text": "In Responses it is called input_text.",
    "image_url": "In Responses it is called input_image.",
    "file": "In Responses it is called input_file.",
    "reasoning_text": "Earlier reasoning is not shown to the model: leave it out.",
    "summary_text": "Earlier reasoning is not shown to the model: leave it out.",
}


def of_type(
    value: Any, kinds: Mapping[str, type[Strict]], refused: Mapping[str, str], kind: Any = None
) -> Any:
    """For validation: `value` as the model that its type (or `kind`) names, so that a mistake in it is told
    at its own path."""
    if isinstance(value, Strict):
        return value
    if not isinstance(value, dict):
        raise at("", f"is a {type(value).__name__}.", "Give an object.")
    kind = value.get("type") if kind is None else kind
    if kind is None:
        raise at("type", "is missing.", f"Known: {', '.join(kinds)}.", "missing_required_parameter")
    if isinstance(kind, str) and kind in kinds:
        return kinds[kind].model_validate(value)
    shown = clip(kind, 64)
    if isinstance(kind, str) and kind in refused:
        raise at("type", f"= {shown} is not supported.", refused[kind], "unsupported_parameter")
    problem = f"= {shown} is unknown.{did_you_mean(shown, kinds)}"
    raise at("type", problem, f"Known: {', '.join(kinds)}.")


def _as_part(value: Any) -> Any:
    return of_type(value, _PARTS, _REFUSED_PARTS)


def _as_parts(value: Any) -> Any:
    if isinstance(value, str):
        return [{"type": "input_text", "text": value}]
    if not isinstance(value, list):
        raise at("", f"is a {type(value).__name__}.", "Give a string, or a list of parts.")
    return value


ContentPart: TypeAlias = Annotated[
    InputText | InputImage | InputFile | OutputText | Refusal, BeforeValidator(_as_part)
]
Content: TypeAlias = Annotated[
    list[ContentPart], BeforeValidator(_as_parts, json_schema_input_type=str | list[ContentPart])
]


class MessageItem(Strict):
    """A turn, in the short form or the full one. Calls of the assistant are items of their own."""

    refused: ClassVar[Mapping[str, str]] = {
        "tool_calls": "Write each call as an item of type function_call.",
        "tool_call_id": "Write the result as an item of type function_call_output.",
        "name": "Say in the text who speaks.",
    }

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content
    id: Name | None = None
    status: Status | None = None
    phase: Literal["commentary", "final_answer"] | None = None

    @model_validator(mode="after")
    def _fits_its_role(self) -> Self:
        for number, part in enumerate(self.content):
            belongs = "assistant" if isinstance(part, OutputText | Refusal) else self.role
            if isinstance(part, InputImage | InputFile):
                belongs = "user"
            if belongs != self.role:
                problem = f"= {part.type} stands in a message of the role {self.role!r}."
                raise at(f"content.{number}.type", problem, f"It belongs to the role {belongs!r}.")
        return self


_OF_A_PROGRAM = {
    "caller": "Only the model calls functions: leave it out.",
    "namespace": "Functions stand in one list: leave it out.",
    "created_by": "Leave it out.",
    "async": "A call is answered in a later request: leave it out.",
}


class FunctionCallItem(Strict):
    """A call that the assistant made earlier in the conversation."""

    refused: ClassVar[Mapping[str, str]] = _OF_A_PROGRAM

    type: Literal["function_call"]
    call_id: Name
    name: Name
    arguments: str
    id: Name | None = None
    status: Status | None = None


class FunctionCallOutputItem(Strict):
    """What a call came to."""

    refused: ClassVar[Mapping[str, str]] = _OF_A_PROGRAM

    type: Literal["function_call_output"]
    call_id: Name
    output: Content
    id: Name | None = None
    status: Status | None = None
    name: Name | None = None

    @model_validator(mode="after")
    def _is_text(self) -> Self:
        for number, part in enumerate(self.output):
            if not isinstance(part, InputText):
                problem = f"= {part.type} stands in the result of a call, which is read as text."
                raise at(f"output.{number}.type", problem, "Put it into a message of the user.")
        return self


class ReasoningItem(Strict):
    """Reasoning of an earlier answer: taken, and not shown to the model."""

    type: Literal["reasoning"]
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    id: Name | None = None
    status: Status | None = None


class ItemReference(Strict):
    type: Literal["item_reference"] | None = None
    id: Name


_ITEMS: dict[str, type[Strict]] = {
    "message": MessageItem,
    "function_call": FunctionCallItem,
    "function_call_output": FunctionCallOutputItem,
    "reasoning": ReasoningItem,
    "item_reference": ItemReference,
}
_FUNCTIONS_ONLY = "The only tools are functions: describe it as one, and call it yourself."
_REFUSED_ITEMS = {
    **dict.fromkeys(
        (
            "apply_patch_call",
            "apply_patch_call_output",
            "code_interpreter_call",
            "computer_call",
            "computer_call_output",
            "custom_tool_call",
            "custom_tool_call_output",
            "file_search_call",
            "image_generation_call",
            "local_shell_call",
            "local_shell_call_output",
            "mcp_approval_request",
            "mcp_approval_response",
            "mcp_call",
            "mcp_list_tools",
            "program",
            "program_output",
            "shell_call",
            "shell_call_output",
            "tool_search_call",
            "tool_search_output",
            "web_search_call",
        ),
        _FUNCTIONS_ONLY,
    ),
    "additional_tools": "Put all tools into tools.",
    "configuration_update": "Change the fields of the request itself.",
    "compaction": "Send the conversation itself, or a message that sums it up.",
    "compaction_trigger": "Nothing is compacted by itself: send a message that sums up the conversation.",
}


def _as_item(value: Any) -> Any:
    kind = None
    if isinstance(value, dict) and value.get("type") is None:
        kind = "message" if "role" in value else "item_reference" if value.keys() <= {"id", "type"} else None
        value = {name: item for name, item in value.items() if name != "type"}
    return of_type(value, _ITEMS, _REFUSED_ITEMS, kind)


Item: TypeAlias = Annotated[
    MessageItem | FunctionCallItem | FunctionCallOutputItem | ReasoningItem | ItemReference,
    BeforeValidator(_as_item),
]


def as_items(value: Any) -> Any:
    """For validation: a string is one message of the user."""
    if isinstance(value, str):
        return [MessageItem(role="user", content=[InputText(text=value)])]
    if value is not None and not isinstance(value, list):
        raise at("", f"is a {type(value).__name__}.", "Give a string, or a list of items.")
    return value


class _One(Strict):
    item: Item


def item_of_dict(value: Mapping[str, Any], param: str) -> Item:
    """An item from a place other than the body; a mistake in it is one of the field `param`."""
    try:
        return validated(_One, {"item": dict(value)}).item
    except InvalidBodyError as error:
        raise InvalidBodyError(f"{param}: {error.problem}", error.fix, param=param) from error


def resolved(item: Item, param: str, item_of: ItemOf | None) -> Item:
    """`item`, or what it refers to. Raises InvalidBodyError for a reference to nothing."""
    if not isinstance(item, ItemReference):
        return item
    found = None if item_of is None else item_of(item.id, param)
    if found is None:
        raise InvalidBodyError(
            f"{param}.id = {clip(item.id, 64)} refers to no item that is kept here.",
            "Send the item itself, or previous_response_id.",
            param=f"{param}.id",
        )
    whole = item_of_dict(found, param)
    if isinstance(whole, ItemReference):
        raise InvalidBodyError(f"{param} refers to a reference.", "Send the item itself.", param=param)
    return whole


_PREFIXES = {"message": "msg", "function_call": "fc", "function_call_output": "fco", "reasoning": "rs"}


def normalised(item: Item) -> dict[str, Any]:
    """The item in full, as the API lists what a response answered: with an id and a status."""
    written = item.model_dump(exclude_none=True)
    kind = written.pop("type")
    made_id = written.pop("id", None) or f"{_PREFIXES[kind]}_{secrets.token_hex(20)}"
    status = written.pop("status", "completed")
    if isinstance(item, MessageItem) and item.role == "assistant":
        written["content"] = [_as_said(part) for part in written["content"]]
    if isinstance(item, ReasoningItem):
        written.setdefault("summary", [])
    if isinstance(item, FunctionCallOutputItem) and len(item.output) == 1:
        written["output"] = written["output"][0]["text"]
    return {"id": made_id, "type": kind, "status": status, **written}


def _as_said(part: dict[str, Any]) -> dict[str, Any]:
    """What the assistant says is output, even where somebody wrote it as input."""
    if part["type"] == "refusal":
        return part
    logprobs = part.get("logprobs", [])
    return {"type": "output_text", "text": part["text"], "annotations": [], "logprobs": logprobs}
