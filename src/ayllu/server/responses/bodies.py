"""The body of POST /v1/responses: what is read, its limits, what is refused, and the call that it makes.

What Responses and chats have in common (sampling, structure, limits) is read by the chat endpoint itself, so
that a request means the same in both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from ayllu.chat.messages import Message
from ayllu.engine.openai.body import InvalidBodyError, Strict, at, blaming, validated
from ayllu.engine.openai.fields import Logprobs
from ayllu.engine.openai.messages import ImageOf
from ayllu.engine.openai.requests import GenerateCall, chat_call
from ayllu.engine.requests import (
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    MAX_PROMPT_TOKENS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOOLS,
    ChatPrompt,
)
from ayllu.server.responses.items import MAX_ITEMS, Item, ItemOf, as_items, normalised, resolved
from ayllu.server.responses.tools import Choice, ChoiceInput, FunctionTool, as_choice, as_tool, offered
from ayllu.server.responses.turns import Turns

MAX_METADATA = 16
MAX_LABEL_CHARACTERS = 512
"""Of an id, a key or a user's name that is only kept."""

MAX_TOOL_CALLS = 1 << 20
"""It counts calls that a server makes itself, and this one makes none."""

LOGPROBS = "message.output_text.logprobs"

Label = Annotated[str, Field(max_length=MAX_LABEL_CHARACTERS)]
MetadataKey = Annotated[str, Field(max_length=64)]
MetadataValue = Annotated[str, Field(max_length=512)]

_NO_REASONING = "The model answers without reasoning aside: leave it out."


class TextFormat(Strict):
    """`name` and `description` are for people. The schema is always enforced, whatever `strict` says."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(default=None, max_length=64)
    description: str | None = None
    schema_: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> Self:
        is_schema = self.type == "json_schema"
        for name, value in (("name", self.name), ("schema", self.schema_)):
            if is_schema and value is None:
                raise at(name, "is missing.", "Give it.", "missing_required_parameter")
        for name in ("name", "description", "schema", "strict"):
            if not is_schema and getattr(self, "schema_" if name == "schema" else name) is not None:
                raise at(name, f"does not go with the type {self.type!r}.", "Use the type json_schema.")
        return self


class TextOptions(Strict):
    format: TextFormat | None = None
    verbosity: Literal["low", "medium", "high"] | None = None

    @model_validator(mode="after")
    def _is_as_long_as_it_is(self) -> Self:
        if self.verbosity in ("low", "high"):
            problem = f"= {self.verbosity} is not supported."
            raise at(
                "verbosity", problem, "Say in the input how long the answer should be.", "unsupported_value"
            )
        return self


class ReasoningOptions(Strict):
    refused: ClassVar[Mapping[str, str]] = dict.fromkeys(
        ("summary", "generate_summary", "context", "mode"), _NO_REASONING
    )

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None

    @model_validator(mode="after")
    def _asks_for_none(self) -> Self:
        if self.effort not in (None, "none"):
            raise at("effort", f"= {self.effort} is not supported.", _NO_REASONING, "unsupported_value")
        return self


class ResponsesStreamOptions(Strict):
    include_obfuscation: bool | None = None

    @model_validator(mode="after")
    def _is_plain(self) -> Self:
        if self.include_obfuscation:
            problem = "= true is not supported."
            raise at(
                "include_obfuscation", problem, "Nothing is obfuscated: leave it out.", "unsupported_value"
            )
        return self


class ResponsesBody(Strict):
    """/v1/responses. The fields of the second group are our own; those of the last change nothing about the
    answer."""

    refused: ClassVar[Mapping[str, str]] = {
        "conversation": "Conversations are not kept by the API yet: use previous_response_id.",
        "prompt": "Prompts are not kept here: send instructions and input.",
        "context_management": "Nothing is compacted by itself: send a message that sums up the conversation.",
        "moderation": "Answers are not moderated here: leave it out.",
        "access_programs": "It is of OpenAI's own service: leave it out.",
        "background_options": "A background response starts as soon as it can: leave it out.",
        "image": "Images are read as they are: leave it out.",
        "prompt_cache_options": "Every beginning of a prompt is remembered by itself: leave it out.",
        "messages": "Use input, or /v1/chat/completions.",
        "max_tokens": "Use max_output_tokens.",
        "max_completion_tokens": "Use max_output_tokens.",
        "response_format": "Use text.format.",
        "verbosity": "Say in the input how long the answer should be.",
        "reasoning_effort": _NO_REASONING,
        "logprobs": f"Use include: [{LOGPROBS!r}].",
        "n": "Send several requests.",
        "functions": "Use tools.",
        "function_call": "Use tool_choice.",
        "modalities": "The model answers in text: leave it out.",
    }

    model: str | None = None
    input: Annotated[
        list[Item] | None,
        Field(max_length=MAX_ITEMS),
        BeforeValidator(as_items, json_schema_input_type=str | list[Item] | None),
    ] = None
    instructions: str | None = None
    previous_response_id: Label | None = None
    max_output_tokens: Annotated[int, Field(ge=1, le=MAX_PROMPT_TOKENS)] | None = None
    max_tool_calls: Annotated[int, Field(ge=1, le=MAX_TOOL_CALLS)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: Logprobs | None = None
    include: Annotated[
        list[
            Literal[
                "message.output_text.logprobs",
                "reasoning.encrypted_content",
                "message.input_image.image_url",
                "file_search_call.results",
                "web_search_call.results",
                "web_search_call.action.sources",
                "code_interpreter_call.outputs",
                "computer_call_output.output.image_url",
            ]
        ],
        Field(max_length=MAX_METADATA),
    ] | None = None  # fmt: skip
    text: TextOptions | None = None
    tools: Annotated[
        list[Annotated[FunctionTool, BeforeValidator(as_tool)]], Field(max_length=MAX_TOOLS)
    ] | None = None  # fmt: skip
    tool_choice: Annotated[
        Choice | None, BeforeValidator(as_choice, json_schema_input_type=ChoiceInput | None)
    ] = None
    parallel_tool_calls: bool | None = None
    reasoning: ReasoningOptions | None = None
    stream: bool | None = None
    stream_options: ResponsesStreamOptions | None = None
    store: bool | None = None
    background: bool | None = None
    truncation: Literal["auto", "disabled"] | None = None

    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]] | None,
        Field(max_length=MAX_STOPS),
        BeforeValidator(
            lambda value: [value] if isinstance(value, str) else value,
            json_schema_input_type=str | list[str] | None,
        ),
    ] = None
    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)] | None = None
    ignore_eos: bool | None = None

    metadata: Annotated[dict[MetadataKey, MetadataValue], Field(max_length=MAX_METADATA)] | None = None
    user: Label | None = None
    safety_identifier: Label | None = None
    prompt_cache_key: Label | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory"] | None = None
    service_tier: Literal["auto", "default"] | None = None

    @model_validator(mode="after")
    def _goes_together(self) -> Self:
        if self.truncation == "auto":
            raise at(
                "truncation",
                "= auto is not supported.",
                "Nothing is cut silently: shorten the input.",
                "unsupported_value",
            )
        if self.top_logprobs and LOGPROBS not in (self.include or ()):
            raise at("top_logprobs", "without log-probabilities.", f"Set include to [{LOGPROBS!r}].")
        if self.stream_options is not None and not self.stream:
            raise at("stream_options", "without stream.", "Set stream to true, or leave it out.")
        if self.background and self.store is False:
            raise at("background", "without store.", "A background response is stored: leave store out.")
        return self


SHARED = (
    "model", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
    "frequency_penalty", "logit_bias", "seed", "stop", "priority", "ignore_eos",
)  # fmt: skip
"""Fields that chats have too, under the same names."""


@dataclass(frozen=True, kw_only=True)
class ResponsesCall:
    """A body of /v1/responses, understood.

    generate: one request for the engine, after the instructions, the history and the input. input_items: the
    input alone, each item in full and with an id.
    """

    generate: GenerateCall
    body: ResponsesBody
    store: bool
    background: bool
    stream: bool
    previous_response_id: str | None
    input_items: list[dict[str, Any]]


def responses_call(
    body: Mapping[str, Any],
    *,
    tenant: str = "",
    history: Sequence[Mapping[str, Any]] = (),
    image_of: ImageOf | None = None,
    item_of: ItemOf | None = None,
) -> ResponsesCall:
    """A body of /v1/responses. Raises InvalidBodyError.

    history: items of the previous responses, oldest first, input and output of each; their instructions do
    not count any more, as the API has it. image_of: the bytes of a stored file or of an image elsewhere.
    item_of: the item that a reference means.
    """
    read = validated(ResponsesBody, body)
    items = [resolved(item, f"input.{number}", item_of) for number, item in enumerate(read.input or ())]
    turns = Turns(image_of)
    turns.add_kept(history, "previous_response_id")
    for number, item in enumerate(items):
        turns.add(item, f"input.{number}")
    if not turns.messages:
        raise InvalidBodyError(
            "input is empty." if read.input is not None else "input is missing.",
            "Give a text, or a message of the user.",
            param="input",
            code="missing_required_parameter",
        )
    beginning = [] if read.instructions is None else [Message("system", read.instructions)]
    offer = offered(read.tools, read.tool_choice, read.parallel_tool_calls)
    call = _as_chat(read, tenant)
    (request,) = call.requests
    if offer is not None and offer.choice != "none" and request.structure is not None:
        raise InvalidBodyError(
            "text.format and tools exclude each other: one answer cannot be both.",
            "Leave one out, or set tool_choice to 'none'.",
            param="text.format",
            code="unsupported_parameter",
        )
    with blaming("input"):
        prompt = ChatPrompt((*beginning, *turns.messages))
    request = replace(request, prompt=prompt, tool_use=offer)
    return ResponsesCall(
        generate=replace(call, requests=(request,), stream=bool(read.stream)),
        body=read,
        store=read.store is not False,
        background=bool(read.background),
        stream=bool(read.stream),
        previous_response_id=read.previous_response_id,
        input_items=[normalised(item) for item in items],
    )


def _as_chat(read: ResponsesBody, tenant: str) -> GenerateCall:
    """What the body asks for apart from its conversation and tools, for which there stands a word."""
    chat: dict[str, Any] = {"messages": [{"role": "user", "content": "…"}]}
    chat |= {name: getattr(read, name) for name in SHARED if getattr(read, name) is not None}
    if read.max_output_tokens is not None:
        chat["max_completion_tokens"] = read.max_output_tokens
    if LOGPROBS in (read.include or ()):
        chat |= {"logprobs": True, "top_logprobs": read.top_logprobs or 0}
    wanted = None if read.text is None else read.text.format
    if wanted is not None and wanted.schema_ is not None:
        schema = {"name": wanted.name, "schema": wanted.schema_}
        chat["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif wanted is not None:
        chat["response_format"] = {"type": wanted.type}
    return chat_call(chat, tenant=tenant)
