"""What an engine says, in OpenAI's shapes: the events of requests become one response object.

The layouts are those of chat.completion, text_completion and embedding lists, to the field, so that programs
written for the API read them unchanged. Errors have the API's layout too.
"""

from __future__ import annotations

import base64
import codecs
import json
import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from ayllu.chat.messages import ToolCall
from ayllu.engine.events import (
    AnswerFinished,
    Done,
    Event,
    Failed,
    FinishReason,
    PromptScored,
    TextDelta,
    TokenLogprob,
    ToolCallMade,
)
from ayllu.engine.openai.body import InvalidBodyError
from ayllu.engine.openai.requests import EmbedCall, GenerateCall
from ayllu.engine.protocol import Embeddings
from ayllu.engine.requests import GenerateRequest, TextPrompt
from ayllu.errors import (
    AylluError,
    ContextOverflowError,
    EngineCrashedError,
    EngineUnavailableError,
    GrammarError,
    ImageError,
    OverloadedError,
    RequestFailedError,
    UnknownModelError,
    UnsupportedError,
)

NO_CHANCE = -9999.0
"""What the API writes for a log-probability of minus infinity, which JSON has no number for."""

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}
_CODES: dict[type[AylluError], str] = {
    ContextOverflowError: "context_length_exceeded",
    UnknownModelError: "model_not_found",
    UnsupportedError: "unsupported",
    GrammarError: "invalid_grammar",
    ImageError: "invalid_image",
    OverloadedError: "rate_limit_exceeded",
    EngineCrashedError: "engine_crashed",
    EngineUnavailableError: "engine_unavailable",
}


@dataclass
class Answer:
    """One of the n answers, as far as it has been said. `reason` is None while it goes on."""

    text: list[str] = field(default_factory=list)
    calls: list[ToolCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    reason: FinishReason | None = None


class Collected:
    """The events of one request, put together. `finished` once the last has been added."""

    def __init__(self, request: GenerateRequest) -> None:
        self.request = request
        self.answers = [Answer() for _ in range(request.n)]
        self.scored: PromptScored | None = None
        self.done: Done | None = None
        self.error: AylluError | None = None

    @property
    def finished(self) -> bool:
        return self.done is not None or self.error is not None

    def add(self, event: Event) -> None:
        """Take the next event."""
        match event:
            case TextDelta(index, text, _, logprobs):
                self.answers[index].text.append(text)
                self.answers[index].logprobs += logprobs
            case ToolCallMade(index, _, call):
                self.answers[index].calls.append(call)
            case AnswerFinished(index, reason):
                self.answers[index].reason = reason
            case PromptScored():
                self.scored = event
            case Done():
                self.done = event
            case Failed(error):
                self.error = error


def response_body(
    call: GenerateCall, parts: Sequence[Collected], *, model: str, created: int
) -> dict[str, Any]:
    """The response to `call`: a chat.completion or text_completion. parts: of its requests, in order, all
    done; created: seconds since 1970.

    Choices of several prompts stand in the order of the prompts, the n answers of each together, as the API
    has it; usage is the sum. An answer that was cancelled says so in finish_reason, which the API has no word
    for.
    """
    chat = call.kind == "chat"
    body: dict[str, Any] = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{parts[0].request.id}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": model,
        "choices": [
            _chat_choice(part, index, answer) if chat else _completion_choice(call, part, index, answer)
            for part in parts
            for index, answer in enumerate(part.answers)
        ],
        "usage": usage([part.done for part in parts if part.done is not None]),
    }
    for number, choice in enumerate(body["choices"]):
        choice["index"] = number
    if chat and call.shows_prompt_logprobs:
        body["prompt_logprobs"] = _prompt_logprobs(parts[0].scored)
    return body


def usage(done: Sequence[Done]) -> dict[str, Any]:
    """Tokens read and made by requests together; a prompt counts once, however many answers it has."""
    prompt = sum(one.prompt_tokens for one in done)
    new = sum(one.new_tokens for one in done)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in done)},
    }


def embeddings_body(call: EmbedCall, made: Embeddings, *, model: str) -> dict[str, Any]:
    """The response to `call`. base64 is of little-endian 32-bit floats, as the API has it.

    Raises RequestFailedError for a vector that holds no numbers, which JSON could not say either, and
    InvalidBodyError where fewer dimensions are asked for than 1 or more than the model has.
    """
    if not all(math.isfinite(value) for vector in made.vectors for value in vector):
        raise RequestFailedError("An embedding holds a number that is not finite.", "Change the input.")
    vectors = [_shortened(vector, call.dimensions) for vector in made.vectors]
    return {
        "object": "list",
        "data": [
            {
                "object": "embedding",
                "index": index,
                "embedding": _floats_in_base64(vector) if call.as_base64 else list(vector),
            }
            for index, vector in enumerate(vectors)
        ],
        "model": model,
        "usage": {"prompt_tokens": made.prompt_tokens, "total_tokens": made.prompt_tokens},
    }


def _shortened(vector: Sequence[float], dimensions: int | None) -> Sequence[float]:
    """The first numbers of the vector, of unit length again. One that begins with nothing stays nothing."""
    if dimensions is None or dimensions == len(vector):
        return vector
    if not 1 <= dimensions <= len(vector):
        raise InvalidBodyError(
            f"dimensions = {dimensions}, and the model's vectors have {len(vector)}.",
            f"Ask for 1 to {len(vector)}.",
            param="dimensions",
        )
    cut = vector[:dimensions]
    length = math.hypot(*cut)
    return [value / length for value in cut] if length else cut


def _floats_in_base64(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode("ascii")


def error_body(error: AylluError) -> dict[str, Any]:
    """`error` in the API's layout; its status is `error.http_status`."""
    status = error.http_status
    known = _TYPES.get(status, "invalid_request_error" if status < 500 else "server_error")
    code = next((code for kind, code in _CODES.items() if isinstance(error, kind)), None)
    param = "model" if isinstance(error, UnknownModelError) else getattr(error, "param", None)
    return {
        "error": {
            "message": f"{error.problem} {error.fix}".strip(),
            "type": known,
            "param": param,
            "code": getattr(error, "code", code),
        }
    }


def tool_call_id(request: GenerateRequest, index: int, call_index: int) -> str:
    """An id no other call has, made of the request's: the same every time it is asked for."""
    return f"call_{request.id[:24]}{index:02x}{call_index:02x}"


def tool_call_object(call: ToolCall, call_id: str) -> dict[str, Any]:
    """A call in the API's layout, with arguments as a string of JSON."""
    arguments = json.dumps(call.arguments, ensure_ascii=False)
    return {
        "id": call.id or call_id,
        "type": "function",
        "function": {"name": call.name, "arguments": arguments},
    }


def _chat_choice(part: Collected, index: int, answer: Answer) -> dict[str, Any]:
    text = "".join(answer.text)
    message: dict[str, Any] = {
        "role": "assistant",
        "content": None if answer.calls and not text else text,
        "refusal": None,
    }
    if answer.calls:
        message["tool_calls"] = [
            tool_call_object(call, tool_call_id(part.request, index, place))
            for place, call in enumerate(answer.calls)
        ]
    wanted = part.request.logprobs is not None
    return {
        "index": index,
        "message": message,
        "logprobs": {"content": chat_logprobs(answer.logprobs), "refusal": None} if wanted else None,
        "finish_reason": answer.reason,
    }


def chat_logprobs(tokens: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    """Tokens in the layout of `logprobs.content`. `bytes` is exact where `token` cannot be: a token may hold
    a part of a character."""
    return [
        {**_chat_token(token), "top_logprobs": [_chat_token(other) for other in token.alternatives]}
        for token in tokens
    ]


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {
        "token": token.token_bytes.decode("utf-8", "replace"),
        "logprob": _finite(token.logprob),
        "bytes": list(token.token_bytes),
    }


def _finite(logprob: float) -> float:
    return logprob if math.isfinite(logprob) else NO_CHANCE


def _completion_choice(call: GenerateCall, part: Collected, index: int, answer: Answer) -> dict[str, Any]:
    text = "".join(answer.text)
    tokens: list[tuple[bytes, TokenLogprob | None]] = [
        (token.token_bytes, token) for token in answer.logprobs
    ]
    if call.echo:
        prompt_text, prompt_tokens = echoed(part)
        text = prompt_text + text
        tokens = prompt_tokens + tokens
    choice: dict[str, Any] = {
        "index": index,
        "text": text,
        "logprobs": None if part.request.logprobs is None else completion_logprobs(tokens),
        "finish_reason": answer.reason,
    }
    if call.shows_prompt_logprobs:
        choice["prompt_logprobs"] = _prompt_logprobs(part.scored)
    return choice


def echoed(part: Collected) -> tuple[str, list[tuple[bytes, TokenLogprob | None]]]:
    """The prompt's text, and where it was scored its tokens' bytes and scores.

    The first token has no score; a control token there, such as BOS, is no text.
    """
    prompt, scored = part.request.prompt, part.scored
    if scored is None:
        return (prompt.text if isinstance(prompt, TextPrompt) else ""), []
    tokens = [token for token in scored.logprobs[1:] if token]
    shown = b"".join([scored.first_bytes, *(token.token_bytes for token in tokens)])
    text = prompt.text if isinstance(prompt, TextPrompt) else shown.decode("utf-8", "replace")
    return text, [(scored.first_bytes, None), *((token.token_bytes, token) for token in tokens)]


def completion_logprobs(
    tokens: Sequence[tuple[bytes, TokenLogprob | None]], offset: int = 0
) -> dict[str, Any]:
    """Tokens in the layout of text completions. Offsets count characters of the choice's text, of which
    `offset` were said before; a token that begins inside a character has the offset of that character."""
    texts: list[str] = []
    offsets: list[int] = []
    logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    for data, token in tokens:
        offsets.append(offset)
        texts.append(_shown(data))
        offset += len(decoder.decode(data))
        if token is None:
            logprobs.append(None)
            tops.append(None)
            continue
        logprobs.append(_finite(token.logprob))
        top: dict[str, float] = {}
        for other in (*token.alternatives, token):
            top.setdefault(_token_text(other), _finite(other.logprob))
        tops.append(top)
    return {"tokens": texts, "token_logprobs": logprobs, "top_logprobs": tops, "text_offset": offsets}


def _token_text(token: TokenLogprob) -> str:
    return _shown(token.token_bytes)


def _shown(data: bytes) -> str:
    """As text; what is no whole character as `bytes:\\xe3\\x81`, the API's own way: so no two are alike."""
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def _prompt_logprobs(scored: PromptScored | None) -> list[dict[str, Any] | None] | None:
    """The prompt's scores in vLLM's layout: per token, what it and the likeliest others have, by id."""
    if scored is None:
        return None
    return [None if token is None else _ranked(token) for token in scored.logprobs]


def _ranked(token: TokenLogprob) -> dict[str, Any]:
    ranks = {(other.token_id, other.token_bytes): rank for rank, other in enumerate(token.alternatives, 1)}
    return {
        str(other.token_id if other.token_id is not None else _token_text(other)): {
            "logprob": _finite(other.logprob),
            "rank": ranks.get((other.token_id, other.token_bytes)),
            "decoded_token": _token_text(other),
        }
        for other in (*token.alternatives, token)
    }
