"""What OpenAI's API asks, to what an engine is asked: bodies of three endpoints become requests.

The server and `ayllu batch` read bodies here alone, so both refuse the same ones in the same words. The
fields are those of `openai.fields`; limits are those of `requests`. Bodies come from `read_json_object`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ayllu.engine.openai.body import InvalidBodyError, blaming, validated
from ayllu.engine.openai.fields import ChatBody, CompletionBody, EmbeddingBody, GenerateBody
from ayllu.engine.openai.messages import ImageOf, conversation, tool_use
from ayllu.engine.parameters import Sampling
from ayllu.engine.requests import (
    ChatPrompt,
    ChoiceStructure,
    EmbedRequest,
    GenerateRequest,
    GrammarStructure,
    InfillPrompt,
    JsonStructure,
    PromptInput,
    RegexStructure,
    Structure,
    TextPrompt,
    TokenPrompt,
)
from ayllu.errors import UnknownModelError, UnsupportedError, clip, did_you_mean

API_COMPLETION_TOKENS = 16
"""What the API documents for /v1/completions without max_tokens. A chat goes on to the end of its context."""

_SAMPLING = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty",
             "frequency_penalty", "seed")  # fmt: skip
_EBNF_RULE = re.compile(r"^\s*[A-Za-z_][\w-]*\s*::=", re.MULTILINE)


@dataclass(frozen=True, kw_only=True)
class GenerateCall:
    """A body that asks for text, understood: requests for the engine, and what shapes the answer.

    requests: one per prompt; a chat has one. model: as the body names it. echo: choices begin with their
    prompt. shows_prompt_logprobs: they were asked for by name, not only needed for `echo`.
    """

    kind: Literal["chat", "completion"]
    model: str | None
    requests: tuple[GenerateRequest, ...]
    stream: bool = False
    stream_usage: bool = False
    echo: bool = False
    shows_prompt_logprobs: bool = False


@dataclass(frozen=True, kw_only=True)
class EmbedCall:
    """A body that asks for embeddings, understood. dimensions: the length that vectors are cut to, None for
    the model's own."""

    model: str | None
    request: EmbedRequest
    as_base64: bool = False
    dimensions: int | None = None


Call = GenerateCall | EmbedCall


def chat_call(body: Mapping[str, Any], *, tenant: str = "", image_of: ImageOf | None = None) -> GenerateCall:
    """A body of /v1/chat/completions. image_of: where images are that are not in the request, as in
    `conversation`. Raises InvalidBodyError."""
    read = validated(ChatBody, body)
    limits = {read.max_tokens, read.max_completion_tokens} - {None}
    if len(limits) > 1:
        raise InvalidBodyError(
            "max_tokens and max_completion_tokens differ.",
            "Give one of them.",
            param="max_completion_tokens",
        )
    if read.top_logprobs is not None and not read.logprobs:
        raise InvalidBodyError(
            "top_logprobs without logprobs.", "Set logprobs to true.", param="top_logprobs"
        )
    structure = _structure(read)
    offer = tool_use(read.tools, read.tool_choice, read.parallel_tool_calls)
    with blaming("messages"):
        prompt = ChatPrompt(conversation(read.messages, image_of))
    with blaming("tools"):
        request = GenerateRequest(
            prompt=prompt,
            logprobs=(read.top_logprobs or 0) if read.logprobs else None,
            tool_use=offer,
            structure=structure,
            prompt_logprobs=read.prompt_logprobs,
            **_common(read, limits.pop() if limits else None, tenant),
        )
    return GenerateCall(
        kind="chat",
        model=read.model,
        requests=(request,),
        shows_prompt_logprobs=read.prompt_logprobs is not None,
        **_streaming(read),
    )


def completion_call(body: Mapping[str, Any], *, tenant: str = "") -> GenerateCall:
    """A body of /v1/completions: one request per prompt. Raises InvalidBodyError.

    `echo` of tokens, and of log-probabilities, needs the prompt to be scored: the engine alone knows the text
    of its tokens.
    """
    read = validated(CompletionBody, body)
    if read.best_of is not None and read.best_of != (read.n or 1):
        raise InvalidBodyError(
            f"best_of = {read.best_of} differs from n.",
            "Leave it out, ask for more answers with n, and choose among them.",
            param="best_of",
            code="unsupported_parameter",
        )
    _require_fillable(read)
    structure = _structure(read)
    # As vLLM has it: a null that was written down asks for no limit, one that was left out for the default.
    limit = read.max_tokens if "max_tokens" in read.model_fields_set else API_COMPLETION_TOKENS
    common = _common(read, limit, tenant)
    requests = []
    for text in read.prompt:
        scores = read.prompt_logprobs
        if read.echo and (read.logprobs is not None or not isinstance(text, str)):
            scores = max(scores or 0, read.logprobs or 0)
        if limit == 0 and scores is None:
            raise InvalidBodyError(
                "max_tokens = 0 asks for nothing.",
                "Ask for a token, or for echo with logprobs.",
                param="max_tokens",
            )
        with blaming("prompt"):
            prompt: PromptInput = TextPrompt(text) if isinstance(text, str) else TokenPrompt(tuple(text))
            if read.suffix and isinstance(text, str):
                prompt = InfillPrompt(text, read.suffix)
            request = GenerateRequest(
                prompt=prompt,
                logprobs=read.logprobs,
                prompt_logprobs=scores,
                structure=structure,
                **common,
            )
        requests.append(request)
    return GenerateCall(
        kind="completion",
        model=read.model,
        requests=tuple(requests),
        echo=bool(read.echo),
        shows_prompt_logprobs=read.prompt_logprobs is not None,
        **_streaming(read),
    )


def _require_fillable(read: CompletionBody) -> None:
    """A suffix goes with texts, and without echo: prompt, suffix and answer are not one text in a row."""
    if not read.suffix:
        return
    if read.echo:
        raise InvalidBodyError("echo does not go with suffix.", "Leave one of the two out.", param="echo")
    if not all(isinstance(text, str) for text in read.prompt):
        raise InvalidBodyError(
            "suffix does not go with a prompt of tokens.", "Give the prompt as text.", param="suffix"
        )


def embedding_call(body: Mapping[str, Any], *, tenant: str = "") -> EmbedCall:
    """A body of /v1/embeddings. Raises InvalidBodyError."""
    read = validated(EmbeddingBody, body)
    for number, text in enumerate(read.input):
        if not text:
            raise InvalidBodyError(
                f"input.{number} is empty.", "Give each input some text.", param=f"input.{number}"
            )
    with blaming("input"):
        inputs = tuple(text if isinstance(text, str) else tuple(text) for text in read.input)
        request = EmbedRequest(inputs=inputs, tenant=tenant)
    return EmbedCall(
        model=read.model,
        request=request,
        as_base64=read.encoding_format == "base64",
        dimensions=read.dimensions,
    )


ENDPOINTS: dict[str, Callable[[Mapping[str, Any]], Call]] = {
    "/v1/chat/completions": chat_call,
    "/v1/completions": completion_call,
    "/v1/embeddings": embedding_call,
}


def for_model(call: Call, models: Collection[str], adapters: Collection[str]) -> Call:
    """`call` for the model it names: one of `models` (or none) as it is, one of `adapters` through it.

    Raises UnknownModelError for any other name, UnsupportedError for embeddings through an adapter.
    """
    if call.model is None or call.model in models:
        return call
    if call.model not in adapters:
        known = [*models, *adapters]
        raise UnknownModelError(
            f"No model is called {clip(repr(call.model), 80)} here.{did_you_mean(call.model, known)}",
            f"Leave model out, or name one of: {', '.join(known)}.",
        )
    if isinstance(call, EmbedCall):
        raise UnsupportedError(
            f"{clip(call.model)} is an adapter, and embeddings are made by the model alone.",
            "Name the model itself.",
        )
    return replace(call, requests=tuple(replace(one, adapter=call.model) for one in call.requests))


def _common(read: GenerateBody, limit: int | None, tenant: str) -> dict[str, Any]:
    if limit == 0 and read.prompt_logprobs is None and isinstance(read, ChatBody):
        raise InvalidBodyError("max_tokens = 0 asks for nothing.", "Ask for a token.", param="max_tokens")
    return {
        "sampling": _sampling(read),
        "max_new_tokens": limit,
        "stop": tuple(read.stop or ()),
        "n": read.n or 1,
        "priority": read.priority or 0,
        "ignore_stop_tokens": bool(read.ignore_eos),
        "tenant": tenant,
    }


def _streaming(read: GenerateBody) -> dict[str, bool]:
    options = read.stream_options
    if options is not None and not read.stream:
        raise InvalidBodyError(
            "stream_options without stream.", "Set stream to true, or leave it out.", param="stream_options"
        )
    return {
        "stream": bool(read.stream),
        "stream_usage": options is not None and bool(options.include_usage),
    }


def _sampling(read: GenerateBody) -> Sampling:
    given = {name: getattr(read, name) for name in _SAMPLING}
    chosen: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0}
    chosen |= {name: value for name, value in given.items() if value is not None}
    if chosen.get("top_k") == -1:
        chosen["top_k"] = 0  # how vLLM and others write 'keep all'
    if read.logit_bias:
        for token in read.logit_bias:
            if not (token.isascii() and token.isdigit() and len(token) < 20):
                name = f"logit_bias.{clip(token, 40)}"
                raise InvalidBodyError(
                    f"{name} is no token id.", "Write ids as digits in quotes.", param=name
                )
        chosen["logit_bias"] = {int(token): bias for token, bias in read.logit_bias.items()}
    for name, value in chosen.items():
        # One by one first: so the caller learns which of them is out of range.
        with blaming(name):
            Sampling(**{name: value})
    return Sampling(**chosen)


def _structure(read: GenerateBody) -> Structure | None:
    """What the answer must be. Raises InvalidBodyError unless there is at most one such wish."""
    wishes: list[Structure] = []
    wanted = read.response_format
    if wanted is not None:
        if (wanted.json_schema is not None) != (wanted.type == "json_schema"):
            raise InvalidBodyError(
                f"response_format.json_schema does not go with the type {wanted.type!r}."
                if wanted.json_schema is not None
                else "response_format.json_schema is missing.",
                'Write {"type": "json_schema", "json_schema": {"name": …, "schema": {…}}}.',
                param="response_format.json_schema",
            )
        if wanted.json_schema is not None:
            wishes.append(JsonStructure(wanted.json_schema.schema_))
        elif wanted.type == "json_object":
            wishes.append(JsonStructure({"type": "object"}))
    asked = read.structured_outputs
    if asked is not None:
        with blaming("structured_outputs"):
            if asked.json_ is not None:
                wishes.append(JsonStructure(asked.json_))
            if asked.json_object:
                wishes.append(JsonStructure({"type": "object"}))
            if asked.regex is not None:
                wishes.append(RegexStructure(asked.regex))
            if asked.choice is not None:
                wishes.append(ChoiceStructure(tuple(asked.choice)))
            if asked.grammar is not None:
                # vLLM's field does not tell the two apart either; a rule of the one is none of the other.
                guess: Literal["ebnf", "lark"] = "ebnf" if _EBNF_RULE.search(asked.grammar) else "lark"
                wishes.append(GrammarStructure(asked.grammar, asked.syntax or guess))
    if asked is not None and asked.syntax is not None and asked.grammar is None:
        raise InvalidBodyError(
            "structured_outputs.syntax without a grammar.",
            "Give grammar, or leave it out.",
            param="structured_outputs.syntax",
        )
    if len(wishes) > 1 or (asked is not None and not wishes):
        raise InvalidBodyError(
            "structured_outputs and response_format ask for "
            + ("several structures." if wishes else "no structure."),
            "Give exactly one: json, regex, choice, grammar or json_object; or a response_format.",
            param="structured_outputs",
        )
    return wishes[0] if wishes else None
