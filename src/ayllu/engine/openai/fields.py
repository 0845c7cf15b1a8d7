"""The fields of OpenAI's request bodies, endpoint by endpoint: what is read, its limits, what is refused.

This file is the list that docs/api.md explains. What a body leaves out has the API's documented default
(temperature 1, top_p 1), not the one of `ayllu chat`: programs written for the API expect it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field

from ayllu.engine.openai.body import InvalidBodyError, Strict, at, read_json_object
from ayllu.engine.openai.messages import MAX_MESSAGES, ChatMessage, Tool, ToolChoiceField
from ayllu.engine.parameters import MAX_LOGIT_BIASES
from ayllu.engine.requests import (
    HIGHEST_PRIORITY,
    LOWEST_PRIORITY,
    MAX_ANSWERS,
    MAX_EMBEDDING_INPUTS,
    MAX_LOGPROBS,
    MAX_PROMPT_TOKENS,
    MAX_STOP_CHARACTERS,
    MAX_STOPS,
    MAX_TOOLS,
)

MAX_PROMPTS = 256
"""Prompts in one body of /v1/completions."""

MAX_DIMENSIONS = 1 << 20
"""More than any vector has, so that what is asked for is a number of a sensible size."""

Count = Annotated[int, Field(ge=0, le=MAX_PROMPT_TOKENS)]
Logprobs = Annotated[int, Field(ge=0, le=MAX_LOGPROBS)]


def _as_list(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


class StreamOptions(Strict):
    refused: ClassVar[Mapping[str, str]] = {"include_obfuscation": "Nothing is obfuscated: leave it out."}

    include_usage: bool | None = None


class JsonSchema(Strict):
    """`name` and `description` are for people: the model is not shown them. `strict: false` is kept too: an
    answer that always fits also fits when it need not."""

    name: str = Field(max_length=64)
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None


def _parsed_schema(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return read_json_object(value.encode(), "schema")
    except InvalidBodyError as error:
        raise at("", f"cannot be read: {error.problem}", "Give a JSON schema.") from error


class StructuredOutputs(Strict):
    """vLLM's extension, in its current spelling: exactly one of these. `json` is a schema, or one as text.

    `syntax` of a grammar is our own addition: without it, a grammar with a rule `name ::= …` is EBNF.
    """

    json_: Annotated[
        dict[str, Any] | None,
        BeforeValidator(_parsed_schema, json_schema_input_type=dict[str, Any] | str | None),
    ] = Field(default=None, alias="json")
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    syntax: Literal["lark", "ebnf"] | None = None
    json_object: bool | None = None


_USE_STRUCTURED = "Use structured_outputs: {{{}: …}}."


class GenerateBody(Strict):
    """What chats and completions have in common. The fields of the last group carry no work here and change
    nothing about the answer."""

    refused: ClassVar[Mapping[str, str]] = {
        **{f"guided_{name}": _USE_STRUCTURED.format(name) for name in ("json", "regex", "choice", "grammar")},
        "stop_token_ids": "Use stop, with the text of the tokens.",
        "include_stop_str_in_output": "The stop string is never part of the answer: add it yourself.",
        "bad_words": "Use logit_bias: -100 bans a token.",
        "allowed_token_ids": "Use structured_outputs.",
        "min_tokens": "Use ignore_eos with max_tokens for an answer of fixed length.",
        "use_beam_search": "Use n, and choose among the answers.",
        "truncate_prompt_tokens": "Nothing is cut silently: shorten the prompt.",
        "typical_p": "Use top_p or min_p.",
    }

    model: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=MAX_LOGIT_BIASES)] | None = None
    max_tokens: Count | None = None
    n: Annotated[int, Field(ge=1, le=MAX_ANSWERS)] | None = None
    stop: Annotated[
        list[Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARACTERS)]] | None,
        Field(max_length=MAX_STOPS),
        BeforeValidator(_as_list, json_schema_input_type=str | list[str] | None),
    ] = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    prompt_logprobs: Logprobs | None = None
    priority: Annotated[int, Field(ge=LOWEST_PRIORITY, le=HIGHEST_PRIORITY)] | None = None
    ignore_eos: bool | None = None

    user: str | None = None
    metadata: dict[str, str] | None = None
    store: Literal[False] | None = None
    service_tier: Literal["auto", "default"] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: Literal["in_memory", "in-memory"] | None = None


class ChatBody(GenerateBody):
    """/v1/chat/completions."""

    refused: ClassVar[Mapping[str, str]] = {
        **GenerateBody.refused,
        "functions": "Use tools.",
        "function_call": "Use tool_choice.",
        "audio": "The model answers in text: leave it out.",
        "prediction": "Leave it out: the answer is the same.",
        "reasoning_effort": "The model answers without reasoning aside: leave it out.",
        "verbosity": "Say in a message how long the answer should be.",
        "web_search_options": "Nothing is fetched: put what the model should know into the messages.",
        "echo": "Use /v1/completions.",
        "best_of": "Use n.",
        "suffix": "Say in a message what should follow.",
        "add_generation_prompt": "The conversation always ends with the opening of an answer: leave it out.",
        "continue_final_message": "Use /v1/completions to continue a text.",
        "chat_template": "The model's own is used: leave it out.",
        "chat_template_kwargs": "The model's own chat template is used as it is: leave it out.",
        "documents": "Put them into the messages.",
    }

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceField = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None


def _prompts(value: Any) -> Any:
    """A text, tokens, or a list of either, as a list of texts and of lists of tokens."""
    if isinstance(value, str):
        return [value]
    if not isinstance(value, list) or not value:
        raise at("", "holds nothing to read.", "Give a text, a list of tokens, or a list of these.")
    if _are_tokens(value):
        return [value]
    for number, item in enumerate(value):
        if not isinstance(item, str) and not (isinstance(item, list) and item and _are_tokens(item)):
            raise at(str(number), "is no text and no list of tokens.", "Use one kind: strings, or token ids.")
    return value


def _are_tokens(value: list[Any]) -> bool:
    return all(type(item) is int and item >= 0 for item in value)


Prompts = Annotated[
    list[Any],
    BeforeValidator(_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]),
]


class CompletionBody(GenerateBody):
    """/v1/completions. suffix: the answer fills the gap between the prompt and it; empty, there is no gap."""

    refused: ClassVar[Mapping[str, str]] = {
        **GenerateBody.refused,
        "messages": "Use /v1/chat/completions.",
        "tools": "Use /v1/chat/completions.",
        "max_completion_tokens": "Use max_tokens.",
        "top_logprobs": "Use logprobs, which is the number of them here.",
    }

    prompt: Annotated[Prompts, Field(max_length=MAX_PROMPTS)]
    suffix: str | None = None
    echo: bool | None = None
    best_of: int | None = None
    logprobs: Logprobs | None = None


class EmbeddingBody(Strict):
    """/v1/embeddings."""

    refused: ClassVar[Mapping[str, str]] = {
        "truncate_prompt_tokens": "Nothing is cut silently: shorten the input.",
    }

    input: Annotated[Prompts, Field(max_length=MAX_EMBEDDING_INPUTS)]
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, le=MAX_DIMENSIONS)] | None = None
    user: str | None = None
