"""What a remote server's refusals and silences mean here: one table from HTTP to the exception tree.

Messages keep the server's own words, clipped, on one line and without secrets, because they name the mistake
better than a status does.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from typing import Any

import httpx2

from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.errors import (
    AccessError,
    AylluError,
    ContextOverflowError,
    OverloadedError,
    RemoteEngineError,
    RequestFailedError,
    UnknownModelError,
    UnsupportedError,
    UsageError,
    clip,
)

RETRIED_STATUSES = frozenset((408, 429, 500, 502, 503, 504))
MAX_MESSAGE_CHARACTERS = 300
_OVERFLOW_CODES = frozenset(("context_length_exceeded", "exceed_context_size_error"))
# vLLM, SGLang and OpenAI say it in words, each in its own.
_OVERFLOW_WORDS = re.compile(
    r"maximum context length|context length|context size|context window|maximum model length", re.IGNORECASE
)


class WorthRetrying(Exception):
    """What another attempt may mend. error: what it is when no attempt is left. pause_s: what the server
    asked to wait for (None: it did not)."""

    def __init__(self, error: AylluError, pause_s: float | None = None) -> None:
        super().__init__()
        self.error = error
        self.pause_s = pause_s


def error_of_answer(
    endpoint: RemoteEndpoint, status: int, headers: Mapping[str, str], body: bytes
) -> AylluError:
    """The error that an HTTP answer other than 200 means."""
    message, codes = told(body)
    said = _said(endpoint, message)
    where = endpoint.address
    if 300 <= status < 400:
        return RemoteEngineError(
            f"{where} answers with a redirect ({status}), which is not followed.",
            "Set base_url to the final address.",
        )
    if status in (401, 403):
        return AccessError(
            f"{where} refuses access ({status}){said}", "Check the API key and what it may do."
        )
    if status == 404:
        return UnknownModelError(
            f"{where} knows no such model or path ({status}, model {clip(endpoint.model)}){said}",
            f"Compare with GET {endpoint.url('models')}.",
        )
    if status == 429:
        return OverloadedError(
            f"{where} takes no more requests now ({status}){said}",
            retry_after_s=retry_after_s(headers) or 1.0,
        )
    if status in (405, 501) or (status == 500 and "not supported" in message):
        # llama.cpp reports images sent to a model without eyes as its own failure.
        return UnsupportedError(f"{where} cannot do this ({status}){said}", "Ask for less, or another model.")
    if status == 400 and _overflows(message, codes):
        return ContextOverflowError(
            f"The request does not fit into the context of {clip(endpoint.model)}{said}", "Shorten it."
        )
    if status != 408 and 400 <= status < 500:
        return UsageError(f"{where} refuses the request ({status}){said}", "Correct the request.")
    return RemoteEngineError(f"{where} failed ({status}){said}", "Try again, or look at its log.")


def error_in_stream(endpoint: RemoteEndpoint, data: str) -> AylluError:
    """The error that a server reports where a piece of the answer should be."""
    message, codes = told(data.encode())
    said = _said(endpoint, message)
    if _overflows(message, codes):
        return ContextOverflowError(
            f"The answer does not fit into the context of {clip(endpoint.model)}{said}",
            "Shorten the prompt, or set max_new_tokens.",
        )
    if codes & {"429", "rate_limit_exceeded"}:
        return OverloadedError(f"{endpoint.address} takes no more requests now{said}")
    return RequestFailedError(
        f"{endpoint.address} broke the answer off{said}", "Try again, or look at its log."
    )


def error_of_transport(endpoint: RemoteEndpoint, error: Exception) -> AylluError | WorthRetrying:
    """The error that a failed connection means; what another attempt may mend is marked so."""
    where = endpoint.address
    reason = endpoint.without_secrets(clip(str(error) or type(error).__name__, MAX_MESSAGE_CHARACTERS))
    reason = reason.rstrip(".")
    check = "Check base_url, the network and that the server runs."
    if isinstance(error, httpx2.ReadTimeout | httpx2.WriteTimeout):
        # Not tried again: the server may be busy with this very request.
        return RemoteEngineError(
            f"{where} said nothing for {endpoint.read_timeout_s:g} s.",
            "Raise read_timeout_s, or ask for less.",
        )
    if isinstance(error, httpx2.ConnectTimeout):
        text = f"{where} cannot be reached: no connection within {endpoint.connect_timeout_s:g} s."
        return WorthRetrying(RemoteEngineError(text, check))
    if isinstance(error, httpx2.ConnectError | httpx2.ProxyError):
        return WorthRetrying(RemoteEngineError(f"{where} cannot be reached ({reason}).", check))
    if isinstance(error, httpx2.TransportError):
        return WorthRetrying(RemoteEngineError(f"{where} broke the connection off ({reason}).", check))
    return RemoteEngineError(f"{where} cannot be spoken to ({reason}).", check)


def not_an_openai_server(endpoint: RemoteEndpoint, detail: str) -> RemoteEngineError:
    """The answer is none that such a server should give."""
    return RemoteEngineError(
        f"{endpoint.address} does not answer like an OpenAI-compatible server: {detail}.",
        f"Check base_url and the dialect ({endpoint.dialect}).",
    )


def bare(error: BaseException) -> BaseException:
    """An expected failure without its history: the HTTP library's exceptions and frames hold the request, and
    with it the key. Anything else is a bug and keeps what explains it."""
    if isinstance(error, AylluError):
        error.__cause__ = error.__context__ = None
        error.with_traceback(None)
    return error


def told(body: bytes) -> tuple[str, set[str]]:
    """A server's own words in an error body, and the codes and types it gives (as text), however it
    arranges them."""
    text = body.decode("utf-8", errors="replace").strip()
    try:
        value: Any = json.loads(text)
    except (ValueError, RecursionError):
        return text, set()
    codes: set[str] = set()
    # OpenAI nests it under "error", FastAPI under "detail", older vLLM not at all.
    for _ in range(3):
        if not isinstance(value, dict):
            break
        codes |= {str(value[key]) for key in ("code", "type") if isinstance(value.get(key), str | int)}
        value = next((value[key] for key in ("error", "message", "detail") if value.get(key)), "")
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False), codes


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, out of `Retry-After` (RFC 9110, 10.2.3: seconds or a date) or Azure's millisecond
    variant of it; None when absent or unreadable."""
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        text = headers.get(name, "").strip()
        try:
            seconds = float(text) * unit
        except ValueError:
            continue
        if math.isfinite(seconds) and seconds >= 0:
            return seconds
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after", "")).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError, IndexError):
        return None


def _said(endpoint: RemoteEndpoint, message: str) -> str:
    message = " ".join(endpoint.without_secrets(message).split())
    return f": {clip(message, MAX_MESSAGE_CHARACTERS).rstrip('.')}." if message else "."


def _overflows(message: str, codes: set[str]) -> bool:
    return bool(codes & _OVERFLOW_CODES or _OVERFLOW_WORDS.search(message))
