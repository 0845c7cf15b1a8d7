"""What a server says in one piece: its list of models, and vectors. Read as untrusted as everything else."""

from __future__ import annotations

import json
import math
from typing import Any, TypeGuard

from ayllu.engine.protocol import Embeddings, EngineInfo
from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.engine.remote.errors import not_an_openai_server
from ayllu.engine.requests import EmbedRequest
from ayllu.errors import clip, one_line


def info_of(endpoint: RemoteEndpoint, listing: bytes | None) -> EngineInfo:
    """The engine's card, with what the listing tells of the model: the context (llama.cpp's of one slot,
    vLLM's and SGLang's `max_model_len`) and whether it sees. Untold, it may: a server that cannot refuses."""
    card = _card(endpoint, _cards(listing))
    meta = card.get("meta") if isinstance(card.get("meta"), dict) else {}
    assert isinstance(meta, dict)
    told = (card.get("max_model_len"), meta.get("n_ctx"), meta.get("n_ctx_train"))
    context = next((value for value in told if _is_count(value)), None)
    facts: dict[str, str | int | float] = {"address": endpoint.address, "dialect": endpoint.dialect}
    if isinstance(card.get("owned_by"), str):
        facts["owned by"] = one_line(clip(card["owned_by"], 80))
    architecture = card.get("architecture")
    senses = architecture.get("input_modalities") if isinstance(architecture, dict) else None
    return EngineInfo(
        endpoint.model,
        context,
        reads_images="image" in senses if isinstance(senses, list) else True,
        facts=facts,
    )


def adapters_of(listing: bytes | None) -> tuple[str, ...]:
    """The models of a vLLM listing that are adapters: those with a parent."""
    return tuple(
        card["id"]
        for card in _cards(listing)
        if isinstance(card.get("parent"), str) and isinstance(card.get("id"), str)
    )


def embeddings_of(body: bytes | None, request: EmbedRequest, endpoint: RemoteEndpoint) -> Embeddings:
    """The vectors of an answer, one per input and in order, of unit length if that was asked for.

    Raises RemoteEngineError when they are missing, too many, of different lengths or not finite.
    """
    if body is None:
        raise not_an_openai_server(endpoint, "the vectors have no end")
    value = _object(body)
    data = value.get("data")
    if not isinstance(data, list) or len(data) != len(request.inputs):
        raise not_an_openai_server(endpoint, f"not one vector for each of {len(request.inputs)} inputs")
    vectors: dict[int, tuple[float, ...]] = {}
    for place, entry in enumerate(data):
        entry = entry if isinstance(entry, dict) else {}
        index = entry.get("index", place)
        vector = _vector(entry.get("embedding"), request.normalise)
        if not _is_index(index, len(data)) or index in vectors or vector is None:
            raise not_an_openai_server(endpoint, "a vector is none, or its place is not its own")
        vectors[index] = vector
    if len({len(vector) for vector in vectors.values()}) != 1:
        raise not_an_openai_server(endpoint, "the vectors differ in length")
    usage = value.get("usage")
    prompt_tokens = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return Embeddings(
        tuple(vectors[index] for index in range(len(data))),
        prompt_tokens if _is_count(prompt_tokens) else 0,
    )


def _vector(value: Any, normalise: bool) -> tuple[float, ...] | None:
    if not isinstance(value, list) or not value:
        return None
    if not all(isinstance(number, int | float) and not isinstance(number, bool) for number in value):
        return None
    length = math.hypot(*value)
    if not math.isfinite(length):
        return None
    if not normalise or length == 0.0:
        return tuple(float(number) for number in value)
    return tuple(number / length for number in value)


def _cards(listing: bytes | None) -> list[dict[str, Any]]:
    data = _object(listing or b"").get("data")
    return [card for card in data if isinstance(card, dict)] if isinstance(data, list) else []


def _card(endpoint: RemoteEndpoint, cards: list[dict[str, Any]]) -> dict[str, Any]:
    """The model's own card, or the only one there is: llama.cpp answers to any name."""
    own = [card for card in cards if card.get("id") == endpoint.model]
    return own[0] if own else cards[0] if len(cards) == 1 else {}


def _object(body: bytes) -> dict[str, Any]:
    try:
        value = json.loads(body)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 1 << 53


def _is_index(value: Any, count: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < count
