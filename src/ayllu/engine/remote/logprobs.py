"""Log-probabilities in the three shapes servers write them: chat's list of tokens (which llama.cpp uses on
both paths), and the older completions' parallel lists."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from ayllu.engine.events import TokenLogprob

_ESCAPED_BYTES = re.compile(r"bytes:((?:\\x[0-9a-fA-F]{2})+)")


def logprobs_of(value: Any, alternatives: int) -> tuple[TokenLogprob, ...]:
    """The tokens of one piece of an answer, each with at most `alternatives` likeliest ones, best first.

    Raises ValueError when it is in none of the known shapes.
    """
    if not isinstance(value, dict):
        raise ValueError("logprobs is no object")
    if "tokens" in value:
        return _parallel_lists(value, alternatives)
    content = value.get("content")
    if content is None:
        return ()
    if not isinstance(content, list):
        raise ValueError("the content of logprobs is no list")
    return tuple(_entry(entry, alternatives) for entry in content)


def token_ids_of(value: Any, logprobs: tuple[TokenLogprob, ...]) -> tuple[int, ...]:
    """The ids of a piece's tokens where the server tells them, in a field of their own or with each token."""
    if isinstance(value, list) and all(isinstance(item, int) for item in value):
        return tuple(value)
    ids = tuple(token.token_id for token in logprobs if token.token_id is not None)
    return ids if len(ids) == len(logprobs) else ()


def _entry(entry: Any, alternatives: int) -> TokenLogprob:
    if not isinstance(entry, dict):
        raise ValueError("a log-probability is no object")
    others = entry.get("top_logprobs") or []
    if not isinstance(others, list):
        raise ValueError("top_logprobs is no list")
    token, token_id = entry.get("token"), entry.get("id")
    raw = entry.get("bytes")
    if not isinstance(token, str):
        raise ValueError("a token is no string")
    if isinstance(raw, list):
        try:
            token_bytes = bytes(raw)
        except (ValueError, TypeError):
            raise ValueError("the bytes of a token are none") from None
    else:
        token_bytes = _bytes_of(token)
    return TokenLogprob(
        token_bytes,
        _number(entry.get("logprob")),
        token_id if isinstance(token_id, int) and not isinstance(token_id, bool) else None,
        _best(tuple(_entry(other, 0) for other in others) if alternatives else (), alternatives),
    )


def _parallel_lists(value: dict[str, Any], alternatives: int) -> tuple[TokenLogprob, ...]:
    tokens, numbers = value.get("tokens"), value.get("token_logprobs")
    tops = value.get("top_logprobs") or [None] * len(tokens or [])
    if not (isinstance(tokens, list) and isinstance(numbers, list) and isinstance(tops, list)):
        raise ValueError("logprobs holds no lists")
    if not len(tokens) == len(numbers) == len(tops):
        raise ValueError("the lists in logprobs differ in length")
    found = []
    for token, number, top in zip(tokens, numbers, tops, strict=True):
        if not isinstance(token, str) or not (top is None or isinstance(top, dict)):
            raise ValueError("a token in logprobs is none")
        others = tuple(TokenLogprob(_bytes_of(text), _number(other)) for text, other in (top or {}).items())
        found.append(TokenLogprob(_bytes_of(token), _number(number), None, _best(others, alternatives)))
    return tuple(found)


def _best(tokens: tuple[TokenLogprob, ...], count: int) -> tuple[TokenLogprob, ...]:
    return tuple(sorted(tokens, key=lambda token: -token.logprob)[:count])


def _bytes_of(token: str) -> bytes:
    """What a token adds to the text. OpenAI's older path writes half a character as `bytes:\\xe2\\x82`."""
    if match := _ESCAPED_BYTES.fullmatch(token):
        return bytes.fromhex(match[1].replace("\\x", ""))
    return token.encode("utf-8", errors="surrogatepass")


def _number(value: Any) -> float:
    """A log-probability. JSON has no minus infinity, so null stands for it; rounding may exceed zero."""
    if value is None:
        return -math.inf
    if not isinstance(value, int | float) or isinstance(value, bool) or math.isnan(value):
        raise ValueError(f"a log-probability is {json.dumps(value)[:40]}")
    return min(float(value), 0.0)
