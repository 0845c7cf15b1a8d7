"""OpenAI's Responses: answered at once or in the background, stored, resumable by event number."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import Request, Response

from ayllu.engine.openai.body import InvalidBodyError
from ayllu.engine.openai.tokenize import prompt_tokens
from ayllu.errors import ConflictError, NotFoundError
from ayllu.server.access import INFERENCE, OWN_INFERENCE, Identity, caller
from ayllu.server.event_stream import EventStream
from ayllu.server.replies import JsonReply, unless_client_leaves
from ayllu.server.responses.bodies import ResponsesBody, ResponsesCall, responses_call
from ayllu.server.responses.shape import ResponseShape
from ayllu.server.routes.common import documented, new_router, parsed, services_of
from ayllu.server.runs import LiveRun, Runs
from ayllu.server.services import Services
from ayllu.server.shapes import ServerEvent
from ayllu.server.state import runs as stored

router = new_router("Responses")

MOST_TURNS = 1000
"""Responses in a chain of previous ones."""


@router.post("/v1/responses", openapi_extra=documented(ResponsesBody), response_class=Response)
@INFERENCE
async def create(request: Request) -> Response:
    """Answer; keep the answer, unless `store` is false."""
    services = services_of(request)
    identity = caller(request)
    call = await _asked(request)
    services.note_use(identity)
    name = services.models.resolve(call.generate.model)
    response_id = f"resp_{secrets.token_hex(20)}"
    shape = ResponseShape(
        call, model=name.adapter or name.name, response_id=response_id, created_at=time.time()
    )
    live = await services.runs.start(
        identity,
        call,
        shape,
        run_id=response_id,
        kind="response",
        model=name.adapter or name.name,
        request={"input_items": call.input_items, "previous_response_id": call.previous_response_id},
        durable=call.background,
        store=call.store,
    )
    if call.background:
        if call.stream:
            return EventStream(live.follow(-1))
        return JsonReply(shape.snapshot("queued"))
    if call.stream:
        return await _tied_stream(services.runs, live)
    return JsonReply(await unless_client_leaves(request, _tied(services.runs, live)))


async def _tied(runs: Runs, live: LiveRun) -> dict[str, Any]:
    """The result of a run that ends with its connection. A request that was refused is an error, not a
    response."""
    try:
        async for _ in live.follow(-1):
            pass
    finally:
        if not live.ended:
            await runs.stop(live)
    if live.refusal is not None:
        raise live.refusal
    return live.shape.result()


async def _tied_stream(runs: Runs, live: LiveRun) -> Response:
    events = live.follow(-1)
    first = await anext(events)
    if live.refusal is not None:
        raise live.refusal

    async def following() -> AsyncGenerator[Sequence[ServerEvent]]:
        try:
            yield first
            async for batch in events:
                yield batch
        finally:
            if not live.ended:
                await runs.stop(live)

    return EventStream(following())


async def _asked(request: Request) -> ResponsesCall:
    """The body, with what the responses before it said."""
    services = services_of(request)
    identity = caller(request)

    def read(body: dict[str, Any], image_of: Any) -> ResponsesCall:
        previous = body.get("previous_response_id")
        history = _history(services, identity, previous) if isinstance(previous, str) else ()
        return responses_call(body, tenant=identity.tenant, history=history, image_of=image_of)

    return await parsed(request, read, looks_up=True)


def _history(services: Services, identity: Identity, response_id: str) -> list[dict[str, Any]]:
    """The items of a chain of responses, oldest first. Not for the event loop."""

    def read(db: Any) -> list[dict[str, Any]]:
        turns: list[list[dict[str, Any]]] = []
        current: str | None = response_id
        while current is not None and len(turns) < MOST_TURNS:
            run = stored.get(db, current, identity.user_id)
            if run.status in ("queued", "running"):
                raise ConflictError("The previous response has not ended.", "Wait for it.")
            output = (run.result or {}).get("output", [])
            turns.append([*run.request.get("input_items", []), *output])
            current = run.request.get("previous_response_id")
        return [item for turn in reversed(turns) for item in turn]

    try:
        return services.database.now(read, read=True)
    except NotFoundError as error:
        raise InvalidBodyError(
            "previous_response_id names no response of yours.",
            "Give the id of one that was stored.",
            param="previous_response_id",
            code="previous_response_not_found",
        ) from error


@router.post("/v1/responses/input_tokens", openapi_extra=documented(ResponsesBody), response_class=Response)
@INFERENCE
async def input_tokens(request: Request) -> Response:
    """How many tokens an input has."""
    services = services_of(request)
    call = (await _asked(request)).generate
    with services.generator.admitted(caller(request), 0):
        async with services.models.lease(call.model) as lease:
            asked = call.requests[0]
            count = await asyncio.to_thread(prompt_tokens, lease.engine, asked.prompt, asked.tool_use)
    return JsonReply({"object": "response.input_tokens", "input_tokens": count})


@router.get("/v1/responses/{response_id}", response_class=Response)
@OWN_INFERENCE
async def retrieve(
    request: Request, response_id: str, stream: bool = False, starting_after: int | None = None
) -> Response:
    """A response as it is; or its events, from the one after `starting_after`."""
    services = services_of(request)
    user_id = caller(request).user_id
    if stream:
        after = -1 if starting_after is None else max(-1, min(starting_after, 1 << 31))
        return EventStream(await services.runs.follow(response_id, user_id, after))
    return JsonReply(await services.runs.get(response_id, user_id))


@router.post("/v1/responses/{response_id}/cancel", response_class=Response)
@OWN_INFERENCE
async def cancel(request: Request, response_id: str) -> Response:
    """End a response that is under way."""
    return JsonReply(await services_of(request).runs.cancel(response_id, caller(request).user_id))


@router.delete("/v1/responses/{response_id}", response_class=Response)
@OWN_INFERENCE
async def delete(request: Request, response_id: str) -> Response:
    """Forget a response."""
    await services_of(request).runs.delete(response_id, caller(request).user_id)
    return JsonReply({"id": response_id, "object": "response", "deleted": True})


@router.get("/v1/responses/{response_id}/input_items", response_class=Response)
@OWN_INFERENCE
async def input_items(
    request: Request, response_id: str, limit: int = 20, order: str = "desc", after: str | None = None
) -> Response:
    """What a response answered."""
    user_id = caller(request).user_id
    run = await services_of(request).database.run(lambda db: stored.get(db, response_id, user_id), read=True)
    items: list[dict[str, Any]] = list(run.request.get("input_items", []))
    if order != "asc":
        items.reverse()
    if after is not None:
        ids = [item.get("id") for item in items]
        items = items[ids.index(after) + 1 :] if after in ids else []
    page = items[: max(1, min(limit, 100))]
    return JsonReply(
        {
            "object": "list",
            "data": page,
            "first_id": page[0].get("id") if page else None,
            "last_id": page[-1].get("id") if page else None,
            "has_more": len(page) < len(items),
        }
    )
