"""What the route files share: where a route's parts are, and how OpenAPI learns of bodies read by hand."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from fastapi import APIRouter, Request
from pydantic import BaseModel

from ayllu.engine.openai.body import InvalidBodyError
from ayllu.errors import AylluError
from ayllu.server.access import GuardedRoute, Identity, caller
from ayllu.server.bodies import read_json
from ayllu.server.generation import CHARACTERS_PER_TOKEN
from ayllu.server.media import collect_images
from ayllu.server.services import Services
from ayllu.server.state import uploads

SHORT_BYTES = 8 << 10
"""A body up to this is checked in the event loop: thousands of wrong fields in a longer one take long."""

Read = TypeVar("Read")
ImageOf = Callable[[str, str], bytes]


def new_router(tag: str) -> APIRouter:
    """A router whose routes all state who may call them."""
    return APIRouter(route_class=GuardedRoute, tags=[tag])


def services_of(request: Request) -> Services:
    """The server's parts."""
    services: Services = request.app.state.services
    return services


def documented(model: type[BaseModel], *, example: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """OpenAPI's words for a body that the endpoint reads itself, within its own bounds."""
    media: dict[str, Any] = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    if example is not None:
        media["example"] = dict(example)
    return {"requestBody": {"required": True, "content": {"application/json": media}}, "x-body": model}


async def parsed(
    request: Request, read: Callable[[dict[str, Any], ImageOf], Read], *, looks_up: bool = False
) -> Read:
    """The request's JSON body, read by `read`, which may ask for the bytes of images by their URL.

    looks_up: `read` asks the database, so it never runs in the event loop.
    """
    services = services_of(request)
    body = await read_json(request)
    identity = caller(request)
    images = await collect_images(body, services.settings, None)

    def image_of(url: str, param: str) -> bytes:
        if url in images:
            return images[url]
        return stored_file(services, identity, url, param)

    # Short conversations are read at once; files and images would hold everybody up.
    if request.state.body_bytes <= SHORT_BYTES and not images and not looks_up and not _names_file(body):
        return read(body, image_of)
    return await asyncio.to_thread(read, body, image_of)


@contextmanager
def counting(request: Request) -> Iterator[None]:
    """A place for a request that counts tokens: a long text holds as much of the queue as one that is
    answered, but only as long as it is counted."""
    tokens = request.state.body_bytes // CHARACTERS_PER_TOKEN
    with services_of(request).generator.admitted(caller(request), tokens) as ticket:
        try:
            yield
        finally:
            ticket.settle(0)


_NAMING = frozenset(("file_id", "image_url", "source"))


def _names_file(value: Any) -> bool:
    """Whether a stored file may be meant somewhere: those lie in the database."""
    if isinstance(value, dict):
        return not _NAMING.isdisjoint(value) or any(map(_names_file, value.values()))
    if isinstance(value, list):
        return any(map(_names_file, value))
    return isinstance(value, str) and value.startswith("file-")


def stored_file(services: Services, identity: Identity, file_id: str, param: str) -> bytes:
    """The bytes of a caller's file. Raises InvalidBodyError where there is none. Not for the event loop."""
    try:
        return services.database.now(
            lambda db: b"".join(uploads.content(db, file_id, identity.user_id)), read=True
        )
    except AylluError as error:
        raise InvalidBodyError(f"{param}: {error.problem}", error.fix, param=param) from error
