"""Anthropic's Messages endpoints."""

from __future__ import annotations

import asyncio

from fastapi import Request, Response

from ayllu.engine.openai.tokenize import prompt_tokens
from ayllu.server.access import INFERENCE, caller
from ayllu.server.anthropic.bodies import CountTokensBody, MessagesBody, count_tokens_call, messages_call
from ayllu.server.anthropic.shape import MessagesShape
from ayllu.server.generation import collected, streamed
from ayllu.server.replies import JsonReply, stream_reply, unless_client_leaves
from ayllu.server.routes.common import counting, documented, new_router, parsed, services_of

router = new_router("Anthropic")


@router.post("/v1/messages", openapi_extra=documented(MessagesBody), response_class=Response)
@INFERENCE
async def messages(request: Request) -> Response:
    """Answer a conversation, in Anthropic's shape."""
    services = services_of(request)
    identity = caller(request)
    call = await parsed(
        request, lambda body, image_of: messages_call(body, tenant=identity.tenant, image_of=image_of)
    )
    services.note_use(identity)
    name = services.models.resolve(call.model)
    shape = MessagesShape(call, model=name.adapter or name.name)
    headers = {"request-id": request.state.request_id}
    if call.stream:
        return await stream_reply(streamed(services.generator, identity, call, shape), headers)
    await unless_client_leaves(request, collected(services.generator, identity, call, shape))
    return JsonReply(shape.result(), headers=headers)


@router.post("/v1/messages/count_tokens", openapi_extra=documented(CountTokensBody), response_class=Response)
@INFERENCE
async def count_tokens(request: Request) -> Response:
    """How many tokens a conversation has."""
    services = services_of(request)
    identity = caller(request)
    call = await parsed(
        request, lambda body, image_of: count_tokens_call(body, tenant=identity.tenant, image_of=image_of)
    )
    with counting(request):
        async with services.models.lease(call.model) as lease:
            asked = call.requests[0]
            count = await asyncio.to_thread(prompt_tokens, lease.engine, asked.prompt, asked.tool_use)
    return JsonReply({"input_tokens": count})
