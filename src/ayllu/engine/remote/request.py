"""A `GenerateRequest` as the JSON of one HTTP call, in the dialect of the server it goes to.

Every field is either translated or refused by name: a server that drops what it does not know would answer a
question nobody asked. Spellings are those of OpenAI's API reference, vLLM 0.12 (`structured_outputs`), SGLang
0.5, llama.cpp's server of 2026, and our own `openai.fields`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any, NoReturn

from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.engine.remote.messages import messages_json, tools_json
from ayllu.engine.requests import (
    ChatPrompt,
    ChoiceStructure,
    EmbedRequest,
    GenerateRequest,
    GrammarStructure,
    InfillPrompt,
    JsonStructure,
    RegexStructure,
    Structure,
    TextPrompt,
)
from ayllu.errors import GrammarError, UnsupportedError, UsageError

_PLAIN = ("openai", "azure")
# How far back llama.cpp's penalties look, in tokens: all of any context (its own default is 64).
_WHOLE_CONTEXT = 1 << 20
# llama.cpp keeps seeds in 32 bits, of which the last value means "any".
_LLAMA_CPP_SEEDS = (1 << 32) - 1


@dataclass(frozen=True)
class Call:
    """A POST: the API path and the body."""

    path: str
    body: bytes


def generate_call(request: GenerateRequest, endpoint: RemoteEndpoint) -> Call:
    """The call that asks for what `request` asks.

    What stays the server's own rule: how a text prompt is cut into tokens (special tokens typed in it may be
    read as such), and that llama.cpp counts the prompt, too, for presence and frequency penalties.

    Raises UnsupportedError naming the field when the endpoint's dialect has no words for it, and UsageError,
    GrammarError or ImageError for what no server could answer.
    """
    chat = isinstance(request.prompt, ChatPrompt)
    body: dict[str, Any] = {
        "model": endpoint.model,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    _prompt(request, endpoint, body)
    _amounts(request, endpoint, chat, body)
    _sampling(request, endpoint, body)
    _logprobs(request, endpoint, chat, body)
    if request.structure is not None:
        body |= _structure(request.structure, endpoint, chat)
    if request.tool_use is not None:
        body |= tools_json(request.tool_use, named_choice=endpoint.dialect != "llama.cpp")
    _serving(request, endpoint, body)
    return Call("chat/completions" if chat else "completions", _encoded(body))


def embed_call(request: EmbedRequest, endpoint: RemoteEndpoint) -> Call:
    """The call that asks for vectors. Raises as `generate_call`."""
    dialect = endpoint.dialect
    body: dict[str, Any] = {
        "model": endpoint.model,
        "input": [text if isinstance(text, str) else list(text) for text in request.inputs],
        "encoding_format": "float",
    }
    if len({isinstance(text, str) for text in request.inputs}) > 1 and dialect not in ("llama.cpp", "ayllu"):
        _refuse("inputs, texts and token ids mixed", endpoint)
    if not request.normalise:
        # Elsewhere the length of the vectors is the server's setting, or always one.
        if dialect != "llama.cpp":
            _refuse("normalise=False", endpoint)
        body["embd_normalize"] = -1
    if request.tenant and dialect in ("openai", "azure", "ayllu"):
        body["user"] = tenant_digest(request.tenant)
    return Call("embeddings", _encoded(body))


def tenant_digest(tenant: str) -> str:
    """What a server is told of a tenant: the same for the same tenant, and no name."""
    return hashlib.sha256(b"ayllu tenant\0" + tenant.encode("utf-8", errors="surrogatepass")).hexdigest()


def _refuse(field: str, endpoint: RemoteEndpoint) -> NoReturn:
    raise UnsupportedError(
        f"{field} cannot be asked of a server that speaks the dialect {endpoint.dialect!r}.",
        "Leave it out, or use an engine that can do it.",
    )


def _encoded(body: dict[str, Any]) -> bytes:
    try:
        return json.dumps(body, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
    except UnicodeEncodeError as error:
        raise UsageError("A text holds half of a surrogate pair.", "Give valid Unicode text.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(
            f"A schema or a tool's arguments are no JSON ({error}).", "Use plain JSON values."
        ) from error


def _prompt(request: GenerateRequest, endpoint: RemoteEndpoint, body: dict[str, Any]) -> None:
    prompt = request.prompt
    if isinstance(prompt, ChatPrompt):
        body["messages"] = messages_json(prompt.messages)
    elif isinstance(prompt, TextPrompt):
        if not prompt.text:
            # llama.cpp answers it with nothing, vLLM refuses it, OpenAI continues a document of its own.
            raise UsageError("The prompt is empty.", "Give some text to continue.")
        body["prompt"] = prompt.text
    elif isinstance(prompt, InfillPrompt):
        # vLLM refuses a suffix; SGLang (without a template for it) and llama.cpp here read past it.
        if endpoint.dialect not in (*_PLAIN, "ayllu"):
            _refuse("a suffix", endpoint)
        body["prompt"] = prompt.prefix
        body["suffix"] = prompt.suffix
    else:
        body["prompt"] = list(prompt.token_ids)


def _amounts(request: GenerateRequest, endpoint: RemoteEndpoint, chat: bool, body: dict[str, Any]) -> None:
    dialect = endpoint.dialect
    if request.prompt_logprobs is not None:
        _refuse("prompt_logprobs", endpoint)
    body["n"] = request.n
    # Not max_completion_tokens: a server that knows only the older name would answer without an end.
    if request.max_new_tokens is not None:
        body["max_tokens"] = request.max_new_tokens
    elif not chat and dialect in ("vllm", "ayllu"):
        body["max_tokens"] = None
    elif not chat and dialect != "llama.cpp":
        # Left out, this path's default is 16 tokens, and there is no word for "up to the end".
        _refuse("max_new_tokens=None with a text or token prompt", endpoint)
    if request.stop:
        body["stop"] = list(request.stop)
        if dialect == "llama.cpp":
            # Nothing less makes it say which stop string ended the answer.
            body["verbose"] = True
    if request.ignore_stop_tokens:
        if dialect in _PLAIN:
            _refuse("ignore_stop_tokens", endpoint)
        body["ignore_eos"] = True


def _sampling(request: GenerateRequest, endpoint: RemoteEndpoint, body: dict[str, Any]) -> None:
    sampling, dialect = request.sampling, endpoint.dialect
    body["temperature"] = sampling.temperature
    body["top_p"] = sampling.top_p
    if sampling.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
    if sampling.seed is not None:
        body["seed"] = sampling.seed % _LLAMA_CPP_SEEDS if dialect == "llama.cpp" else sampling.seed
    for name in ("presence_penalty", "frequency_penalty"):
        if getattr(sampling, name) or dialect not in _PLAIN:
            body[name] = getattr(sampling, name)
    if dialect in _PLAIN:
        for name, nothing in (("top_k", 0), ("min_p", 0.0), ("repetition_penalty", 1.0)):
            if getattr(sampling, name) != nothing:
                _refuse(name, endpoint)
        return
    # Said even at our defaults, as these servers have others: llama.cpp keeps the 40 likeliest tokens, vLLM
    # follows the model's generation_config.
    all_tokens = -1 if dialect in ("vllm", "sglang") else 0
    body["top_k"] = sampling.top_k or all_tokens
    body["min_p"] = sampling.min_p
    if dialect == "llama.cpp":
        body["repeat_penalty"] = sampling.repetition_penalty
        body["repeat_last_n"] = _WHOLE_CONTEXT
    else:
        body["repetition_penalty"] = sampling.repetition_penalty


def _logprobs(request: GenerateRequest, endpoint: RemoteEndpoint, chat: bool, body: dict[str, Any]) -> None:
    if request.logprobs is None:
        return
    # llama.cpp takes 0 for "none at all"; the surplus alternative is cut off when the answer is read.
    count = max(1, request.logprobs) if endpoint.dialect == "llama.cpp" else request.logprobs
    if chat:
        body["logprobs"] = True
        body["top_logprobs"] = count
    else:
        body["logprobs"] = count


def _structure(structure: Structure, endpoint: RemoteEndpoint, chat: bool) -> dict[str, Any]:
    dialect = endpoint.dialect
    if isinstance(structure, JsonStructure):
        return _json_structure(structure, endpoint, chat)
    if isinstance(structure, RegexStructure):
        if dialect in ("vllm", "ayllu"):
            return {"structured_outputs": {"regex": structure.pattern}}
        if dialect == "sglang":
            return {"regex": structure.pattern}
    elif isinstance(structure, ChoiceStructure):
        if dialect in ("vllm", "ayllu"):
            return {"structured_outputs": {"choice": list(structure.choices)}}
        if dialect in ("sglang", "llama.cpp"):
            return {"ebnf" if dialect == "sglang" else "grammar": choice_grammar(structure.choices)}
    else:
        return _grammar(structure, endpoint)
    _refuse(f"structure, {type(structure).__name__}", endpoint)


def _json_structure(structure: JsonStructure, endpoint: RemoteEndpoint, chat: bool) -> dict[str, Any]:
    schema = structure.schema
    if schema is False:
        raise GrammarError("The schema false allows no value.", "Give a schema that some value satisfies.")
    if schema is True:
        schema = {}
    if endpoint.dialect == "llama.cpp":
        return {"json_schema": schema}
    if endpoint.dialect in _PLAIN:
        if not chat:
            _refuse("structure with a text or token prompt", endpoint)
        if schema == {"type": "object"}:
            # Strict schemas must list their properties; "any object" has a name of its own.
            return {"response_format": {"type": "json_object"}}
    return {
        "response_format": {
            "type": "json_schema",
            "json_schema": {"name": "answer", "schema": schema, "strict": True},
        }
    }


def _grammar(structure: GrammarStructure, endpoint: RemoteEndpoint) -> dict[str, Any]:
    if endpoint.dialect == "vllm":
        return {"structured_outputs": {"grammar": structure.source}}
    if endpoint.dialect == "ayllu":
        return {"structured_outputs": {"grammar": structure.source, "syntax": structure.syntax}}
    if structure.syntax == "ebnf" and endpoint.dialect in ("sglang", "llama.cpp"):
        return {"ebnf" if endpoint.dialect == "sglang" else "grammar": structure.source}
    _refuse(f"structure, a grammar in {structure.syntax} syntax", endpoint)


def choice_grammar(choices: tuple[str, ...]) -> str:
    """A GBNF grammar of exactly these strings."""
    return "root ::= " + " | ".join(f'"{_literal(choice)}"' for choice in choices)


def _literal(text: str) -> str:
    """`text` inside a GBNF string: quotes, backslashes and what is not printable as code points."""
    return "".join(ch if ch.isprintable() and ch not in '"\\' else f"\\U{ord(ch):08X}" for ch in text)


def _serving(request: GenerateRequest, endpoint: RemoteEndpoint, body: dict[str, Any]) -> None:
    """What concerns the server rather than the answer: who asks, how urgent it is, what it reports."""
    dialect = endpoint.dialect
    if request.adapter is not None:
        if dialect not in ("vllm", "ayllu"):
            _refuse("adapter", endpoint)
        body["model"] = request.adapter
    if request.priority:
        if dialect not in ("vllm", "sglang", "ayllu"):
            _refuse("priority", endpoint)
        # vLLM serves the lowest number first.
        body["priority"] = -request.priority if dialect == "vllm" else request.priority
    if request.tenant:
        if dialect in ("vllm", "sglang"):
            body["cache_salt"] = tenant_digest(request.tenant)
        elif dialect == "llama.cpp":
            # Its slots are shared by all: not reusing them is the only way to share nothing.
            body["cache_prompt"] = False
        else:
            body["user"] = tenant_digest(request.tenant)
    if dialect in ("vllm", "sglang"):
        # Counts with every piece, so that each of n answers has its own.
        body["stream_options"]["continuous_usage_stats"] = True
    if dialect == "sglang":
        body["separate_reasoning"] = False
    if dialect == "llama.cpp":
        # Tells the prompt's length when work on it begins, and leaves all text in the text.
        body["return_progress"] = True
        body["reasoning_format"] = "none"
