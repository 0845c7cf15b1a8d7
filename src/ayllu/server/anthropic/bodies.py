"""The bodies of POST /v1/messages and /v1/messages/count_tokens: fields, limits, refusals, the call made.

Hints that change nothing here (cache_control, betas, metadata, effort, tiers) are taken; whatever asks for
what is not done is refused with the reason, so that nothing is dropped silently.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ayllu.chat.messages import ToolDefinition
from ayllu.engine.openai.body import InvalidBodyError, Strict, at, blaming, validated
from ayllu.engine.openai.messages import ImageOf
from ayllu.engine.openai.requests import GenerateCall
from ayllu.engine.parameters import Sampling
from ayllu.engine.requests import (
    MAX_PROMPT_TOKENS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOOLS,
    ChatPrompt,
    GenerateRequest,
    JsonStructure,
    ToolUse,
)
from ayllu.errors import clip
from ayllu.server.anthropic.blocks import CacheControl, Label, MessageTurn, TextContent
from ayllu.server.anthropic.turns import conversation
from ayllu.server.responses.items import of_type

MAX_MESSAGES = 100_000
MAX_TOP_K = 1 << 24
MAX_USER_CHARACTERS = 4096
MAX_BETAS = 100
MAX_EXAMPLES = 100

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

_NOT_RUN = "Nothing is run for the model here: describe a tool with an input_schema, and run it yourself."
_NO_THINKING = "The model answers without thinking aside: leave it out, or use the type disabled."


class Thinking(Strict):
    """`adaptive` leaves it to the model whether to think, and it never does."""

    type: Literal["disabled", "adaptive"]
    display: Literal["summarized", "omitted"] | None = None


def _as_thinking(value: Any) -> Any:
    if value is None:
        return None
    refused = dict.fromkeys(("enabled", "between_tools"), _NO_THINKING)
    return of_type(value, {"disabled": Thinking, "adaptive": Thinking}, refused)


class OutputFormat(Strict):
    """The schema is always enforced."""

    type: Literal["json_schema"]
    schema_: dict[str, Any] = Field(alias="schema")


class OutputConfig(Strict):
    """`effort` is a hint to models that can think more or less; this one cannot."""

    refused: ClassVar[Mapping[str, str]] = {"task_budget": "Use max_tokens, which holds for one answer."}

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: OutputFormat | None = None


class Metadata(Strict):
    user_id: Annotated[str, Field(max_length=MAX_USER_CHARACTERS)] | None = None


class ClearThinking(Strict):
    """Thinking of earlier turns is never shown to the model, whichever of it is to be kept."""

    type: Literal["clear_thinking_20251015"]
    keep: Any = None


_REFUSED_EDITS = {
    "clear_tool_uses_20250919": "Nothing is left out silently: send the messages that are to be read.",
    "compact_20260112": "Nothing is compacted by itself: send a message that sums up the conversation.",
}


class ContextManagement(Strict):
    edits: list[
        Annotated[
            ClearThinking,
            BeforeValidator(
                lambda value: of_type(value, {"clear_thinking_20251015": ClearThinking}, _REFUSED_EDITS)
            ),
        ]
    ] | None = Field(default=None, max_length=MAX_BETAS)  # fmt: skip


class CustomTool(Strict):
    """`strict` is kept with and without being asked for: from where a call begins, its input is held to the
    schema. Examples are shown to the model below the description. Calls are told whole, so
    `eager_input_streaming` has nothing to hasten."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,128}$")
    description: str | None = None
    input_schema: dict[str, Any]
    input_examples: Annotated[list[dict[str, Any]], Field(max_length=MAX_EXAMPLES)] | None = None
    strict: bool | None = None
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    defer_loading: bool | None = None
    allowed_callers: Annotated[list[str], Field(max_length=MAX_EXAMPLES)] | None = None

    @model_validator(mode="after")
    def _can_be_offered(self) -> Self:
        if self.name in ("auto", "none", "required"):
            raise at("name", f"= {self.name} means something else to the engine.", "Rename the tool.")
        if self.input_schema.get("type") != "object":
            raise at("input_schema.type", "is not 'object'.", 'Write {"type": "object", …}.')
        if self.defer_loading:
            problem = "= true is not supported."
            raise at("defer_loading", problem, "All tools are shown to the model.", "unsupported_value")
        if self.allowed_callers is not None and "direct" not in self.allowed_callers:
            problem = "leaves out 'direct', and only the model calls tools."
            raise at("allowed_callers", problem, "Leave it out.", "unsupported_value")
        return self


def _as_tool(value: Any) -> Any:
    kind = value.get("type") if isinstance(value, dict) else None
    if isinstance(kind, str) and kind != "custom":
        raise at("type", f"= {clip(kind, 64)} is not supported.", _NOT_RUN, "unsupported_parameter")
    return value


class ToolChoice(Strict):
    type: Literal["auto", "any", "tool", "none"]
    name: Label | None = None
    disable_parallel_tool_use: bool | None = None

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> Self:
        if (self.name is not None) != (self.type == "tool"):
            problem = "is missing." if self.name is None else f"does not go with the type {self.type!r}."
            raise at("name", problem, "A choice of the type tool names it, others do not.")
        return self


_NO_SERVERS = "No other server is called: list its tools in tools, and call them yourself."


def _without_servers(value: Any) -> Any:
    if value:
        raise at("", "is not supported.", _NO_SERVERS, "unsupported_parameter")
    return value


class CountTokensBody(Strict):
    """/v1/messages/count_tokens, and what /v1/messages has in common with it. The fields of the last group
    change nothing about the answer."""

    refused: ClassVar[Mapping[str, str]] = {
        "container": "There are no containers here: leave it out.",
        "compaction": "Nothing is compacted by itself: send a message that sums up the conversation.",
        "fallbacks": "One model answers: name it in model.",
        "fallback_credit_token": "It is of Anthropic's own service: leave it out.",
        "billing_policy": "It is of Anthropic's own service: leave it out.",
        "workspace_id": "It is of Anthropic's own service: leave it out.",
        "user_profile_id": "It is of Anthropic's own service: leave it out.",
        "diagnostics": "Leave it out: /metrics tells of the server.",
        "thread": "Nothing is kept between requests: send all messages.",
        "inference_geo": "The model runs where the server is: leave it out.",
        "stop": "Use stop_sequences.",
        "max_completion_tokens": "Use max_tokens.",
        "response_format": "Use output_config.format.",
        "functions": "Use tools.",
        "prompt": "Use messages.",
        "n": "Send several requests.",
    }

    model: Label
    messages: list[MessageTurn] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    system: TextContent | None = None
    tools: Annotated[
        list[Annotated[CustomTool, BeforeValidator(_as_tool)]], Field(max_length=MAX_TOOLS)
    ] | None = None  # fmt: skip
    tool_choice: ToolChoice | None = None
    thinking: Annotated[Thinking | None, BeforeValidator(_as_thinking)] = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    mcp_servers: Annotated[list[Any] | None, BeforeValidator(_without_servers)] = None
    context_management: ContextManagement | None = None

    cache_control: CacheControl | None = None
    speed: Literal["standard"] | None = None
    betas: Annotated[list[Label], Field(max_length=MAX_BETAS)] | None = None


class MessagesBody(CountTokensBody):
    """/v1/messages."""

    max_tokens: int = Field(ge=1, le=MAX_PROMPT_TOKENS)
    stop_sequences: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]], Field(max_length=MAX_STOPS)
    ] | None = None  # fmt: skip
    stream: bool | None = None
    temperature: Share | None = None
    top_p: Share | None = None
    top_k: Annotated[int, Field(ge=0, le=MAX_TOP_K)] | None = None

    metadata: Metadata | None = None
    service_tier: Literal["auto", "standard_only"] | None = None


def messages_call(
    body: Mapping[str, Any], *, tenant: str = "", image_of: ImageOf | None = None
) -> GenerateCall:
    """A body of /v1/messages. image_of: the bytes of an image by its URL or the id of a stored file; the
    second argument is the field's path. Raises InvalidBodyError."""
    read = validated(MessagesBody, body)
    sampling = Sampling(
        temperature=1.0 if read.temperature is None else read.temperature,
        top_p=1.0 if read.top_p is None else read.top_p,
        top_k=read.top_k or 0,
    )
    return _call(
        read,
        image_of,
        stream=bool(read.stream),
        max_new_tokens=read.max_tokens,
        stop=tuple(read.stop_sequences or ()),
        sampling=sampling,
        tenant=tenant,
    )


def count_tokens_call(
    body: Mapping[str, Any], *, tenant: str = "", image_of: ImageOf | None = None
) -> GenerateCall:
    """A body of /v1/messages/count_tokens: the call whose prompt is counted. Raises InvalidBodyError."""
    return _call(validated(CountTokensBody, body), image_of, stream=False, tenant=tenant)


def _call(read: CountTokensBody, image_of: ImageOf | None, *, stream: bool, **more: Any) -> GenerateCall:
    offer = _offer(read)
    structure = _structure(read)
    if structure is not None and offer is not None and offer.choice != "none":
        raise InvalidBodyError(
            f"{structure[0]} and tools exclude each other: one answer cannot be both.",
            "Leave one out, or set tool_choice to the type 'none'.",
            param=structure[0],
            code="unsupported_parameter",
        )
    with blaming("messages"):
        prompt = ChatPrompt(conversation(read.system or (), read.messages, image_of))
    with blaming("messages"):
        request = GenerateRequest(
            prompt=prompt, tool_use=offer, structure=None if structure is None else structure[1], **more
        )
    return GenerateCall(kind="chat", model=read.model, requests=(request,), stream=stream)


def _structure(read: CountTokensBody) -> tuple[str, JsonStructure] | None:
    """What the answer must be, with the name of the field that says so."""
    wanted = None if read.output_config is None else read.output_config.format
    if wanted is not None and read.output_format is not None:
        raise InvalidBodyError(
            "output_format stands beside output_config.format.",
            "Give output_config.format alone.",
            param="output_format",
        )
    if read.output_format is not None:
        return "output_format", JsonStructure(read.output_format.schema_)
    return None if wanted is None else ("output_config.format", JsonStructure(wanted.schema_))


def _offer(read: CountTokensBody) -> ToolUse | None:
    choice = read.tool_choice
    if not read.tools:
        if choice is not None and choice.type in ("any", "tool"):
            raise InvalidBodyError(
                f"tool_choice = {choice.type} without tools.",
                "Give tools, or leave tool_choice out.",
                param="tool_choice",
            )
        return None
    names = [tool.name for tool in read.tools]
    for number, name in enumerate(names):
        if name in names[:number]:
            param = f"tools.{number}.name"
            raise InvalidBodyError(
                f"{param} = {clip(name, 64)} is the name of another tool.", "Rename one.", param=param
            )
    kind = "auto"
    if choice is not None:
        kind = {"any": "required", "tool": choice.name or ""}.get(choice.type, choice.type)
        if choice.type == "tool" and kind not in names:
            raise InvalidBodyError(
                f"tool_choice.name = {clip(kind, 64)} is none of the tools.",
                f"Known: {clip(', '.join(names), 1000)}.",
                param="tool_choice.name",
            )
    parallel = not (choice is not None and choice.disable_parallel_tool_use)
    return ToolUse(tuple(map(_definition, read.tools)), kind, parallel)


def _definition(tool: CustomTool) -> ToolDefinition:
    examples = [json.dumps(example, ensure_ascii=False) for example in tool.input_examples or ()]
    lines = [tool.description or "", *(f"Example of its input: {example}" for example in examples)]
    return ToolDefinition(tool.name, "\n".join(line for line in lines if line), tool.input_schema)
