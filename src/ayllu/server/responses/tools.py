"""Tools of a Responses body: functions, which whoever asks runs; every other kind is refused with the reason.

A choice is read down to the functions that it names, so a wrong name is told at its own place.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import BeforeValidator, Field

from ayllu.engine.openai.body import InvalidBodyError, Strict
from ayllu.engine.openai.messages import (
    AllowedTools,
    FunctionDefinition,
    NamedFunction,
    NamedTool,
    Tool,
    ToolChoice,
    tool_use,
)
from ayllu.engine.requests import MAX_TOOLS, ToolUse
from ayllu.errors import clip
from ayllu.server.responses.items import of_type

_NOT_FETCHED = "Nothing is fetched: put what the model should know into the input."
_NOT_RUN = "Nothing is run for the model: describe it as a function, and call it yourself."


class FunctionTool(FunctionDefinition):
    """`strict` is kept wherever the model may call: from where a call begins, the engine's grammar holds its
    arguments to the schema. So it is taken with `tool_choice: auto` too, where the chat endpoint refuses it;
    the API's own clients send it by default here."""

    refused: ClassVar[Mapping[str, str]] = {
        "function": "In Responses its fields stand beside type.",
        "async": "A call is answered in a later request: leave it out.",
        "allowed_callers": "Only the model calls functions: leave it out.",
        "defer_loading": "All tools are shown to the model: leave it out.",
        "output_schema": "Results are read as they are: leave it out.",
    }

    type: Literal["function"]


REFUSED_TOOLS = {
    **dict.fromkeys(
        ("web_search", "web_search_2025_08_26", "web_search_preview", "web_search_preview_2025_03_11"),
        _NOT_FETCHED,
    ),
    "file_search": "Nothing is searched: put what the model should know into the input.",
    "mcp": "No other server is called: list its tools as functions, and call them yourself.",
    "custom": "Describe it as a function with parameters.",
    "image_generation": "The model answers in text: leave it out.",
    "namespace": "List its functions in tools.",
    "tool_search": "All tools are shown to the model: leave it out.",
    **dict.fromkeys(
        ("code_interpreter", "computer", "computer_use", "computer_use_preview", "local_shell", "shell",
         "apply_patch", "programmatic_tool_calling"),
        _NOT_RUN,
    ),
}  # fmt: skip


def as_tool(value: Any) -> Any:
    """For validation: a tool by its type."""
    return of_type(value, {"function": FunctionTool}, REFUSED_TOOLS)


class OfferedFunction(Strict):
    type: Literal["function"]
    name: str


class AllowedFunctions(Strict):
    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: list[
        Annotated[
            OfferedFunction,
            BeforeValidator(lambda value: of_type(value, {"function": OfferedFunction}, REFUSED_TOOLS)),
        ]
    ] = Field(min_length=1, max_length=MAX_TOOLS)


class ChoiceWord(Strict):
    """A word alone was made `{"type": word}` before it came here."""

    type: Literal["none", "auto", "required"]


_CHOICES: dict[str, type[Strict]] = {
    **dict.fromkeys(("none", "auto", "required"), ChoiceWord),
    "function": OfferedFunction,
    "allowed_tools": AllowedFunctions,
}


def as_choice(value: Any) -> Any:
    """For validation: a choice by its type, or by a word alone."""
    if value is None:
        return None
    return of_type({"type": value} if isinstance(value, str) else value, _CHOICES, REFUSED_TOOLS)


Choice: TypeAlias = ChoiceWord | OfferedFunction | AllowedFunctions
ChoiceInput: TypeAlias = Literal["none", "auto", "required"] | OfferedFunction | AllowedFunctions


def offered(
    tools: Sequence[FunctionTool] | None, choice: Choice | None, parallel: bool | None
) -> ToolUse | None:
    """The tools on offer. Raises InvalidBodyError for a choice among tools that are not there."""
    offers = [
        Tool(
            type="function",
            function=FunctionDefinition(
                name=tool.name, description=tool.description, parameters=tool.parameters
            ),
        )
        for tool in tools or ()
    ]
    names = [tool.function.name for tool in offers]
    chosen: ToolChoice | None = None
    match choice:
        case ChoiceWord(type=word):
            chosen = ToolChoice(type=word)
        case OfferedFunction(name=name):
            _require_known(name, names, "tool_choice.name")
            chosen = ToolChoice(type="function", function=NamedFunction(name=name))
        case AllowedFunctions(mode=mode, tools=allowed):
            for number, one in enumerate(allowed):
                _require_known(one.name, names, f"tool_choice.tools.{number}.name")
            named = [NamedTool(type="function", function=NamedFunction(name=one.name)) for one in allowed]
            chosen = ToolChoice(type="allowed_tools", allowed_tools=AllowedTools(mode=mode, tools=named))
    return tool_use(offers, chosen, parallel)


def _require_known(name: str, names: Sequence[str], param: str) -> None:
    if name not in names:
        known = f"Known: {', '.join(names)}." if names else "Give tools, or leave tool_choice out."
        raise InvalidBodyError(f"{param} = {clip(name, 64)} is none of the tools.", known, param=param)
