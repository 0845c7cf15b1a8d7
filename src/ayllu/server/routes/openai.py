"""OpenAI's endpoints that answer at once: chat, completions, embeddings, and what a text is in tokens."""

from __future__ import annotations

import asyncio
from functools import partial

from fastapi import Request, Response

from ayllu.engine.native import NativeEngine
from ayllu.engine.openai.fields import ChatBody, CompletionBody, EmbeddingBody
from ayllu.engine.openai.requests import GenerateCall, chat_call, completion_call, embedding_call
from ayllu.engine.openai.results import embeddings_body
from ayllu.engine.openai.tokenize import DetokenizeBody, TokenizeBody, detokenize_body, tokenize_body
from ayllu.errors import UnsupportedError
from ayllu.server.access import INFERENCE, caller
from ayllu.server.bodies import read_json
from ayllu.server.generation import CHARACTERS_PER_TOKEN, collected, streamed
from ayllu.server.model_slot import in_daemon_thread
from ayllu.server.openai.shape import CompletionShape
from ayllu.server.replies import JsonReply, stream_reply, unless_client_leaves
from ayllu.server.routes.common import counting, documented, new_router, parsed, services_of

router = new_router("OpenAI")


@router.post("/v1/chat/completions", openapi_extra=documented(ChatBody), response_class=Response)
@INFERENCE
async def chat_completions(request: Request) -> Response:
    """Answer a conversation."""
    tenant = caller(request).tenant
    call = await parsed(request, lambda body, image_of: chat_call(body, tenant=tenant, image_of=image_of))
    return await _generated(request, call)


@router.post("/v1/completions", openapi_extra=documented(CompletionBody), response_class=Response)
@INFERENCE
async def completions(request: Request) -> Response:
    """Continue texts."""
    tenant = caller(request).tenant
    call = await parsed(request, lambda body, _: completion_call(body, tenant=tenant))
    return await _generated(request, call)


async def _generated(request: Request, call: GenerateCall) -> Response:
    services = services_of(request)
    identity = caller(request)
    services.note_use(identity)
    name = services.models.resolve(call.model)
    shape = CompletionShape(call, model=name.adapter or name.name)
    if call.stream:
        return await stream_reply(streamed(services.generator, identity, call, shape))
    await unless_client_leaves(request, collected(services.generator, identity, call, shape))
    return JsonReply(shape.result())


@router.post("/v1/embeddings", openapi_extra=documented(EmbeddingBody), response_class=Response)
@INFERENCE
async def embeddings(request: Request) -> Response:
    """Turn texts into vectors."""
    services = services_of(request)
    identity = caller(request)
    call = await parsed(request, lambda body, _: embedding_call(body, tenant=identity.tenant))
    services.note_use(identity)
    name = services.models.resolve(call.model)
    if name.adapter is not None:
        raise UnsupportedError(
            f"{name.adapter} is an adapter, and makes no embeddings.", "Name the model itself."
        )
    tokens = sum(
        len(given) // CHARACTERS_PER_TOKEN + 1 if isinstance(given, str) else len(given)
        for given in call.request.inputs
    )
    services.generator.require_running()
    with services.generator.admitted(identity, tokens) as ticket:
        async with services.models.lease(call.model) as lease:
            # A thread of its own, one for each that was let in: others' requests are prepared meanwhile.
            made = await in_daemon_thread(lease.engine.embed, call.request)
            ticket.settle(made.prompt_tokens)
            body = await asyncio.to_thread(partial(embeddings_body, call, made, model=lease.name))
    return JsonReply(body)


@router.post("/tokenize", openapi_extra=documented(TokenizeBody), response_class=Response)
@router.post("/v1/tokenize", openapi_extra=documented(TokenizeBody), include_in_schema=False)
@INFERENCE
async def tokenize(request: Request) -> Response:
    """A text or a conversation as the model's tokens."""
    services = services_of(request)
    body = await read_json(request)
    with counting(request):
        async with services.models.lease(_model(body)) as lease:
            return JsonReply(await asyncio.to_thread(tokenize_body, body, lease.engine))


@router.post("/detokenize", openapi_extra=documented(DetokenizeBody), response_class=Response)
@router.post("/v1/detokenize", openapi_extra=documented(DetokenizeBody), include_in_schema=False)
@INFERENCE
async def detokenize(request: Request) -> Response:
    """Tokens as text."""
    services = services_of(request)
    body = await read_json(request)
    with counting(request):
        async with services.models.lease(_model(body)) as lease:
            return JsonReply(await asyncio.to_thread(detokenize_body, body, lease.engine))


def _model(body: dict[str, object]) -> str | None:
    model = body.get("model")
    return model if isinstance(model, str) else None


@router.get("/tokenizer_info", response_class=Response)
@INFERENCE
async def tokenizer_info(request: Request, model: str | None = None) -> Response:
    """The model's control tokens by name, as lm-eval asks for them (vLLM's address)."""
    services = services_of(request)
    async with services.models.lease(model) as lease:
        engine = lease.engine
        if not isinstance(engine, NativeEngine):
            raise UnsupportedError(f"{lease.name} runs on another server.", "Ask that server.")
        tokenizer = engine.files.tokenizer
        ends = sorted(engine.files.stop_ids)
        return JsonReply(
            {
                "tokenizer_class": type(tokenizer).__name__,
                "bos_token": None if tokenizer.bos_id is None else engine.text_of([tokenizer.bos_id]),
                "eos_token": engine.text_of(ends[:1]) if ends else None,
                "pad_token": None,
                "chat_template": None,
            }
        )
