"""Models: what can be asked, what is in memory, what is being fetched."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import asdict
from typing import Any

from fastapi import Request, Response
from pydantic import Field

from ayllu.engine.openai.body import Strict, validated
from ayllu.errors import NotFoundError, UnknownModelError
from ayllu.server.access import INFERENCE, MODELS, MODELS_BY_NAME, OWN_INFERENCE, caller
from ayllu.server.bodies import read_json
from ayllu.server.event_stream import EventStream
from ayllu.server.models import ModelStatus
from ayllu.server.replies import JsonReply
from ayllu.server.routes.common import documented, new_router, services_of
from ayllu.server.shapes import ServerEvent
from ayllu.server.state import adapters as stored

router = new_router("Models")


class PullBody(Strict):
    """model: a name of the catalogue, or a source (hf:owner/name, pypi:package)."""

    model: str = Field(min_length=1, max_length=500)
    name: str | None = Field(default=None, max_length=100)


class AdapterBody(Strict):
    """A LoRA adapter: its folder's name below the server's `adapters` folder."""

    name: str = Field(pattern=r"^[A-Za-z0-9][\w.-]{0,99}$")
    model: str = Field(min_length=1, max_length=200)
    folder: str = Field(pattern=r"^[A-Za-z0-9][\w.-]{0,99}$")


def openai_model(one: ModelStatus) -> dict[str, Any]:
    """A model in OpenAI's list, with what other servers add to it."""
    return {
        "id": one.name,
        "object": "model",
        "created": int(one.created or 0),
        "owned_by": "ayllu",
        "max_model_len": one.context,
        "status": one.status,
        "architecture": {
            "input_modalities": ["text", "image"] if one.reads_images else ["text"],
            "output_modalities": ["text"] if one.generates is not False else ["embedding"],
        },
        "meta": {"size": one.size_bytes, "licence": one.licence},
    }


def _all(statuses: Sequence[ModelStatus]) -> list[dict[str, Any]]:
    made = []
    for one in statuses:
        made.append(openai_model(one))
        made += [
            {**openai_model(one), "id": adapter, "parent": one.name, "root": one.name}
            for adapter in one.adapters
        ]
    return made


@router.get("/v1/models", response_class=Response)
@INFERENCE
async def listed(request: Request) -> Response:
    """The models that can be asked."""
    return JsonReply({"object": "list", "data": _all(services_of(request).models.listed())})


@router.get("/v1/models/{model:path}", response_class=Response)
@OWN_INFERENCE
async def retrieved(request: Request, model: str) -> Response:
    """One of them."""
    for one in _all(services_of(request).models.listed()):
        if one["id"] == model:
            return JsonReply(one)
    raise UnknownModelError(f"No model is called {model[:80]!r} here.", "GET /v1/models lists them.")


@router.get("/api/models", response_class=Response)
@INFERENCE
async def statuses(request: Request) -> Response:
    """The models here: what is loaded, what each needs, what went wrong."""
    services = services_of(request)
    return JsonReply(
        {
            "default": services.models.default_model,
            "budget_bytes": services.models.budget_bytes,
            "models": [asdict(one) for one in services.models.listed()],
        }
    )


@router.post("/api/models/{model}/load", response_class=Response)
@MODELS_BY_NAME
async def load(request: Request, model: str) -> Response:
    """Load a model now."""
    services = services_of(request)
    await services.models.load(model)
    await services.audit(caller(request).actor, "model.load", model)
    return JsonReply({"model": model, "status": "loaded"})


@router.post("/api/models/{model}/unload", response_class=Response)
@MODELS_BY_NAME
async def unload(request: Request, model: str, force: bool = False) -> Response:
    """Give a model's memory back."""
    services = services_of(request)
    await services.models.unload(model, force=force)
    await services.audit(caller(request).actor, "model.unload", model)
    return JsonReply({"model": model, "status": "unloaded"})


@router.get("/api/catalogue", response_class=Response)
@INFERENCE
async def catalogue(request: Request) -> Response:
    """Models that can be pulled by name, with their licences."""
    services = services_of(request)
    return JsonReply({"models": [services.pulls.describe(name) for name in services.store.catalogue.names()]})


@router.post("/api/pulls", openapi_extra=documented(PullBody), response_class=Response)
@MODELS
async def pull(request: Request) -> Response:
    """Begin to fetch a model."""
    services = services_of(request)
    body = validated(PullBody, await read_json(request))
    job = services.pulls.start(body.model, body.name, by=caller(request).user_id)
    await services.audit(caller(request).actor, "model.pull", body.model)
    return JsonReply(asdict(job), 202)


@router.get("/api/pulls", response_class=Response)
@MODELS
async def pulls(request: Request) -> Response:
    """Fetches under way, and the last ones."""
    return JsonReply({"pulls": [asdict(job) for job in services_of(request).pulls.listed()]})


@router.get("/api/pulls/{pull_id}/events", response_class=Response)
@MODELS_BY_NAME
async def pull_events(request: Request, pull_id: str) -> Response:
    """How a fetch goes, as it goes."""
    pulls = services_of(request).pulls
    pulls.get(pull_id)

    async def events() -> AsyncGenerator[Sequence[ServerEvent]]:
        async for job in pulls.events(pull_id):
            yield [ServerEvent.of(asdict(job), "pull")]

    return EventStream(events())


@router.delete("/api/pulls/{pull_id}", response_class=Response)
@MODELS_BY_NAME
async def cancel_pull(request: Request, pull_id: str) -> Response:
    """End a fetch; what is here already is kept for the next one."""
    services = services_of(request)
    await services.pulls.cancel(pull_id)
    await services.audit(caller(request).actor, "model.pull.cancel", pull_id)
    return JsonReply(asdict(services.pulls.get(pull_id)))


@router.delete("/api/models/{model}", response_class=Response)
@MODELS_BY_NAME
async def remove(request: Request, model: str) -> Response:
    """Delete an installed model from this machine."""
    services = services_of(request)
    await services.models.unload(model)
    await asyncio.to_thread(services.store.remove, model)
    await services.audit(caller(request).actor, "model.remove", model)
    return JsonReply({"model": model, "deleted": True})


@router.get("/api/adapters", response_class=Response)
@MODELS
async def adapters(request: Request) -> Response:
    """The adapters that requests may name."""
    listed = await services_of(request).database.run(stored.listed, read=True)
    return JsonReply({"adapters": [asdict(one) for one in listed]})


@router.post("/api/adapters", openapi_extra=documented(AdapterBody), response_class=Response)
@MODELS
async def add_adapter(request: Request) -> Response:
    """Register an adapter that lies in the server's `adapters` folder."""
    services = services_of(request)
    body = validated(AdapterBody, await read_json(request))
    folder = services.settings.data / "adapters" / body.folder
    if not (folder / "adapter_config.json").is_file():
        raise NotFoundError(
            f"The server's adapters folder holds no adapter {body.folder!r}.", "Put it there first."
        )
    services.models.resolve(body.model)
    made = await services.database.run(
        lambda db: stored.create(db, body.name, body.model, str(folder.resolve()))
    )
    await services.refresh_adapters()
    await services.audit(caller(request).actor, "adapter.add", body.name, model=body.model)
    return JsonReply(asdict(made), 201)


@router.delete("/api/adapters/{name}", response_class=Response)
@MODELS_BY_NAME
async def remove_adapter(request: Request, name: str) -> Response:
    """Forget an adapter; its files stay."""
    services = services_of(request)
    await services.database.run(lambda db: stored.delete(db, name))
    await services.refresh_adapters()
    await services.audit(caller(request).actor, "adapter.remove", name)
    return JsonReply({"name": name, "deleted": True})
