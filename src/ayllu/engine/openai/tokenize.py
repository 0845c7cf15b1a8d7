"""Texts and conversations as token ids, and back: the bodies of /tokenize and /detokenize, as vLLM has them.

A conversation is rendered exactly as it would be to be answered, so that its count is the one that is billed
and that must fit into the context.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import Field

from ayllu.engine.openai.body import InvalidBodyError, Strict, blaming, validated
from ayllu.engine.openai.messages import (
    MAX_MESSAGES,
    ChatMessage,
    ImageOf,
    Tool,
    ToolChoiceField,
    conversation,
    tool_use,
)
from ayllu.engine.protocol import Engine, TokenCounter
from ayllu.engine.requests import MAX_PROMPT_TOKENS, MAX_TOOLS, ChatPrompt, PromptInput, TextPrompt, ToolUse
from ayllu.errors import UnsupportedError

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]


class TokenizeBody(Strict):
    """/tokenize: a text (`prompt`) or a conversation (`messages`).

    add_special_tokens: with what the model wants around a text, such as BOS; a chat format always writes its
    own. token_strs: asked for by `return_token_strs`; a token that is a part of a character shows U+FFFD.
    """

    refused: ClassVar[Mapping[str, str]] = {
        "continue_final_message": "Give the conversation's end as it is: leave it out.",
        "chat_template": "The model's own is used: leave it out.",
        "chat_template_kwargs": "The model's own chat template is used as it is: leave it out.",
        "mm_processor_kwargs": "Images are cut as the model wants them: leave it out.",
    }

    model: str | None = None
    prompt: str | None = None
    messages: (
        Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)] | None
    ) = None
    tools: Annotated[list[Tool], Field(max_length=MAX_TOOLS)] | None = None
    tool_choice: ToolChoiceField = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    return_token_strs: bool | None = None


class DetokenizeBody(Strict):
    """/detokenize: control tokens appear by their names."""

    model: str | None = None
    tokens: Annotated[list[TokenId], Field(max_length=MAX_PROMPT_TOKENS)]


def tokenize_body(
    body: Mapping[str, Any], engine: Engine, *, image_of: ImageOf | None = None
) -> dict[str, Any]:
    """The response to a body of /tokenize. image_of: as in `conversation`.

    Raises InvalidBodyError, UnsupportedError (a remote engine), or what rendering the conversation raises.
    """
    read = validated(TokenizeBody, body)
    prompt, offered = _asked(read, image_of)
    counter = token_counter(engine)
    tokens = counter.token_ids(
        prompt,
        offered,
        add_special_tokens=read.add_special_tokens is not False,
        add_generation_prompt=read.add_generation_prompt is not False,
    )
    return {
        "tokens": tokens,
        "count": len(tokens),
        "max_model_len": engine.info.context,
        "token_strs": _token_texts(counter, tokens) if read.return_token_strs else None,
    }


def detokenize_body(body: Mapping[str, Any], engine: Engine) -> dict[str, Any]:
    """The response to a body of /detokenize. Raises InvalidBodyError, UnsupportedError (a remote engine)."""
    read = validated(DetokenizeBody, body)
    counter = token_counter(engine)
    with blaming("tokens"):
        return {"prompt": counter.text_of(read.tokens)}


def prompt_tokens(engine: Engine, prompt: PromptInput, tools: ToolUse | None = None) -> int:
    """How many tokens the model would read of `prompt`. Raises as `TokenCounter.token_ids`, UnsupportedError
    for a remote engine."""
    return len(token_counter(engine).token_ids(prompt, tools))


def token_counter(engine: Engine) -> TokenCounter:
    """What counts for `engine`. Raises UnsupportedError for an engine without the model's vocabulary."""
    if not isinstance(engine, TokenCounter):
        raise UnsupportedError(
            "This model runs on another server, and its vocabulary is there.",
            "Count tokens on that server, or use a model that runs here.",
        )
    return engine


def _asked(read: TokenizeBody, image_of: ImageOf | None) -> tuple[PromptInput, ToolUse | None]:
    if (read.prompt is None) == (read.messages is None):
        raise InvalidBodyError(
            "prompt and messages exclude each other."
            if read.prompt is not None
            else "prompt is missing, and so is messages.",
            "Give one of the two.",
            param="prompt",
        )
    if read.prompt is not None:
        for name in ("tools", "tool_choice", "add_generation_prompt"):
            if getattr(read, name) is not None:
                raise InvalidBodyError(
                    f"{name} goes with messages.", "Leave it out, or give messages.", param=name
                )
        with blaming("prompt"):
            return TextPrompt(read.prompt), None
    assert read.messages is not None
    offered = tool_use(read.tools, read.tool_choice, None)
    with blaming("messages"):
        return ChatPrompt(conversation(read.messages, image_of)), offered


def _token_texts(counter: TokenCounter, tokens: list[int]) -> list[str]:
    return [data.decode("utf-8", "replace") for data in counter.token_bytes(tokens)]
