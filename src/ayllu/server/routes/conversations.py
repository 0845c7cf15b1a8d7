"""Conversations of the app: kept here, answered by runs that go on when the page is closed."""

from __future__ import annotations

import secrets
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Literal

from fastapi import Request, Response
from pydantic import Field

from ayllu.engine.openai.body import InvalidBodyError, Strict, validated
from ayllu.server.access import INFERENCE, OWN_INFERENCE, Identity, caller
from ayllu.server.bodies import read_json
from ayllu.server.event_stream import EventStream
from ayllu.server.replies import JsonReply
from ayllu.server.responses.bodies import responses_call
from ayllu.server.responses.shape import ResponseShape
from ayllu.server.routes.common import documented, new_router, parsed, services_of
from ayllu.server.shapes import compact_json
from ayllu.server.state import conversations
from ayllu.server.state import runs as stored_runs
from ayllu.server.state.records import StoredMessage

router = new_router("Conversations")

MOST_TITLE = 200
MOST_SETTINGS = 64
GENERATION_FIELDS = ("model", "temperature", "top_p", "max_output_tokens", "seed", "top_k", "min_p")


class ConversationBody(Strict):
    title: str = Field(default="", max_length=MOST_TITLE)
    settings: dict[str, Any] = Field(default_factory=dict, max_length=MOST_SETTINGS)


class ConversationChange(Strict):
    title: str | None = Field(default=None, max_length=MOST_TITLE)
    pinned: bool | None = None
    settings: dict[str, Any] | None = Field(default=None, max_length=MOST_SETTINGS)
    head_id: str | None = Field(default=None, max_length=64)


class MessageBody(Strict):
    """content: a text, or parts as Responses have them (input_text, input_image). parent_id: what it answers
    (None: it is the first)."""

    role: Literal["user", "assistant", "system"] = "user"
    content: str | list[dict[str, Any]]
    parent_id: str | None = Field(default=None, max_length=64)


class RunBody(Strict):
    """Ask for an answer. content: a new message of the user below parent_id; without it, parent_id itself is
    answered (again). The rest is as in Responses; what is left out comes from the conversation's settings.
    """

    parent_id: str | None = Field(default=None, max_length=64)
    content: str | list[dict[str, Any]] | None = None
    model: str | None = Field(default=None, max_length=200)
    instructions: str | None = Field(default=None, max_length=1 << 20)
    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None


@router.get("/api/conversations", response_class=Response)
@INFERENCE
async def listed(
    request: Request, query: str | None = None, limit: int = 50, before: float | None = None
) -> Response:
    """The caller's conversations: pinned first, then newest. query: what a title or a message must hold."""
    user_id = caller(request).user_id
    most = max(1, min(limit, 200))
    if query is not None and len(query) > 200:
        raise InvalidBodyError("query is longer than 200 characters.", "Search for less.", param="query")
    found = await services_of(request).database.run(
        lambda db: conversations.listed(db, user_id, query=query, limit=most, before=before), read=True
    )
    return JsonReply({"conversations": [asdict(one) for one in found]})


@router.post("/api/conversations", openapi_extra=documented(ConversationBody), response_class=Response)
@INFERENCE
async def create(request: Request) -> Response:
    """Begin a conversation."""
    body = validated(ConversationBody, await read_json(request, max_bytes=1 << 20))
    user_id = caller(request).user_id
    made = await services_of(request).database.run(
        lambda db: conversations.create(db, user_id, title=body.title, settings=body.settings)
    )
    return JsonReply(asdict(made), 201)


@router.get("/api/conversations/{conversation_id}", response_class=Response)
@OWN_INFERENCE
async def retrieve(request: Request, conversation_id: str) -> Response:
    """A conversation with all its messages, which form a tree."""
    user_id = caller(request).user_id

    def read(db: Any) -> bytes:
        one = asdict(conversations.get(db, conversation_id, user_id))
        found = conversations.messages(db, conversation_id, user_id)
        # Here, and one after another: a long conversation written at once would hold everybody up.
        messages = ",".join([compact_json(asdict(message)) for message in found])
        return f'{compact_json(one)[:-1]},"messages":[{messages}]}}'.encode()

    data = await services_of(request).database.run(read, read=True)
    return Response(data, media_type="application/json")


@router.patch(
    "/api/conversations/{conversation_id}",
    openapi_extra=documented(ConversationChange),
    response_class=Response,
)
@OWN_INFERENCE
async def change(request: Request, conversation_id: str) -> Response:
    """Rename, pin, set, or show another branch."""
    body = validated(ConversationChange, await read_json(request, max_bytes=1 << 20))
    changes = {name: value for name in body.model_fields_set if (value := getattr(body, name)) is not None}
    user_id = caller(request).user_id
    made = await services_of(request).database.run(
        lambda db: conversations.update(db, conversation_id, user_id, **changes)
    )
    return JsonReply(asdict(made))


@router.delete("/api/conversations/{conversation_id}", response_class=Response)
@OWN_INFERENCE
async def delete(request: Request, conversation_id: str) -> Response:
    """Delete a conversation and its messages."""
    user_id = caller(request).user_id
    await services_of(request).database.run(lambda db: conversations.delete(db, conversation_id, user_id))
    return JsonReply({"id": conversation_id, "deleted": True})


@router.post(
    "/api/conversations/{conversation_id}/messages",
    openapi_extra=documented(MessageBody),
    response_class=Response,
)
@OWN_INFERENCE
async def add_message(request: Request, conversation_id: str) -> Response:
    """Add a message without asking for an answer."""
    body = validated(MessageBody, await read_json(request))
    user_id = caller(request).user_id
    made = await services_of(request).database.run(
        lambda db: conversations.add_message(
            db, conversation_id, user_id, body.parent_id, body.role, _parts(body.content, body.role)
        )
    )
    return JsonReply(asdict(made), 201)


@router.post(
    "/api/conversations/{conversation_id}/runs", openapi_extra=documented(RunBody), response_class=Response
)
@OWN_INFERENCE
async def start_run(request: Request, conversation_id: str) -> Response:
    """Ask for an answer. It is computed and stored whether or not anybody waits for it; its events are those
    of Responses, to be read, and read again, at /api/runs/{id}/events."""
    services = services_of(request)
    identity = caller(request)

    def read(body: dict[str, Any], image_of: Any) -> Any:
        asked = validated(RunBody, body)
        conversation, history = services.database.now(
            lambda db: _turns(db, conversation_id, identity, asked.parent_id), read=True
        )
        if asked.content is None and (not history or history[-1].role != "user"):
            raise InvalidBodyError(
                "parent_id names no message of the user, and there is no content.",
                "Give one of them.",
                param="parent_id",
            )
        content = None if asked.content is None else _parts(asked.content, "user")
        given = _response_body(conversation.settings, asked, history, content)
        return asked, content, responses_call(given, tenant=identity.tenant, image_of=image_of)

    asked, content, call = await parsed(request, read, looks_up=True)
    services.generator.require_running()
    name = services.models.resolve(call.generate.model)
    model = name.adapter or name.name
    run_id = f"resp_{secrets.token_hex(20)}"
    parent: StoredMessage | None = None
    if content is not None:
        parent = await services.database.run(
            lambda db: conversations.add_message(
                db, conversation_id, identity.user_id, asked.parent_id, "user", content
            )
        )
    parent_id = asked.parent_id if parent is None else parent.id
    shape = ResponseShape(call, model=model, response_id=run_id, created_at=time.time())
    await services.runs.start(
        identity,
        call,
        shape,
        run_id=run_id,
        kind="message",
        model=model,
        request={"conversation_id": conversation_id, "parent_id": parent_id, "input_items": []},
        durable=True,
    )
    message = None if parent is None else asdict(parent)
    return JsonReply({"run_id": run_id, "message": message, "parent_id": parent_id, "model": model}, 201)


def _turns(db: Any, conversation_id: str, identity: Identity, parent_id: str | None) -> Any:
    """The conversation, and the turns from its beginning to `parent_id`."""
    conversation = conversations.get(db, conversation_id, identity.user_id)
    by_id = {one.id: one for one in conversations.messages(db, conversation_id, identity.user_id)}
    if parent_id is not None and parent_id not in by_id:
        raise InvalidBodyError(
            "parent_id is no message of this conversation.", "Check it.", param="parent_id"
        )
    history: list[StoredMessage] = []
    current = by_id.get(parent_id or "")
    while current is not None:
        history.append(current)
        current = by_id.get(current.parent_id or "")
    return conversation, history[::-1]


def _parts(content: str | list[dict[str, Any]], role: str) -> list[dict[str, Any]]:
    kind = "output_text" if role == "assistant" else "input_text"
    return [{"type": kind, "text": content}] if isinstance(content, str) else content


def _response_body(
    settings: Mapping[str, Any], asked: RunBody, history: list[StoredMessage], content: Any
) -> dict[str, Any]:
    body: dict[str, Any] = {"store": True, "background": True}
    for name in GENERATION_FIELDS:
        value = getattr(asked, name)
        value = settings.get(name) if value is None else value
        if value is not None:
            body[name] = value
    instructions = asked.instructions if asked.instructions is not None else settings.get("instructions")
    if instructions:
        body["instructions"] = instructions
    turns = [{"type": "message", "role": one.role, "content": one.content} for one in history if one.content]
    if content is not None:
        turns.append({"type": "message", "role": "user", "content": content})
    body["input"] = turns
    return body


@router.get("/api/runs", response_class=Response)
@INFERENCE
async def runs(request: Request, limit: int = 50, before: float | None = None) -> Response:
    """The caller's runs, newest first."""
    user_id = caller(request).user_id
    most = max(1, min(limit, 200))
    found = await services_of(request).database.run(
        lambda db: stored_runs.listed(db, user_id, most, before), read=True
    )
    return JsonReply({"runs": [_run_object(one) for one in found]})


def _run_object(run: Any) -> dict[str, Any]:
    shown = asdict(run)
    del shown["result"]
    shown["request"] = {name: run.request.get(name) for name in ("conversation_id", "parent_id")}
    return shown


@router.get("/api/runs/{run_id}", response_class=Response)
@OWN_INFERENCE
async def run(request: Request, run_id: str) -> Response:
    """A run's response, as far as it is."""
    return JsonReply(await services_of(request).runs.get(run_id, caller(request).user_id))


@router.get("/api/runs/{run_id}/events", response_class=Response)
@OWN_INFERENCE
async def run_events(request: Request, run_id: str, after: int = -1) -> Response:
    """A run's events, from the one after number `after` (or after the Last-Event-ID), to its end."""
    services = services_of(request)
    user_id = caller(request).user_id
    last_seen = request.headers.get("last-event-id", "")
    after = int(last_seen) if last_seen.isdecimal() and len(last_seen) < 12 else after
    events = await services.runs.follow(run_id, user_id, max(-1, min(after, 1 << 31)))
    return EventStream(events)


@router.post("/api/runs/{run_id}/cancel", response_class=Response)
@OWN_INFERENCE
async def cancel_run(request: Request, run_id: str) -> Response:
    """Stop a run. What it said stays."""
    return JsonReply(await services_of(request).runs.cancel(run_id, caller(request).user_id))
