"""The application: all routes behind the guard, errors in their dialect, OpenAPI for all of it."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from ayllu import __version__
from ayllu.engine.openai.body import InvalidBodyError
from ayllu.errors import AylluError, NotFoundError, RequestFailedError, UsageError
from ayllu.server.access import COOKIE, GuardedRoute
from ayllu.server.attempts import Attempts
from ayllu.server.guard import SECURITY_HEADERS, Guard
from ayllu.server.replies import ClientLeftError, error_reply
from ayllu.server.routes import (
    admin,
    anthropic,
    conversations,
    files,
    health,
    models,
    openai,
    responses,
    sign_in,
)
from ayllu.server.services import Services

_log = logging.getLogger("ayllu.server")

ROUTERS = (openai, responses, anthropic, files, models, conversations, sign_in, admin, health)


class _MethodError(UsageError):
    http_status = 405


def create_app(services: Services) -> FastAPI:
    """The ASGI application over `services`, which are opened and closed by whoever made them."""
    app = FastAPI(
        title="ayllu",
        version=__version__,
        summary="The open Llama 4 system.",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
    )
    app.state.services = services
    app.state.attempts = Attempts()
    app.state.described, app.state.describing = None, asyncio.Lock()
    for module in ROUTERS:
        # The very routes, not copies that FastAPI makes of them when they are asked for: these are checked.
        app.router.routes.extend(module.router.routes)
    _require_guarded(app)
    app.add_exception_handler(AylluError, _expected)
    app.add_exception_handler(ClientLeftError, _left)
    app.add_exception_handler(RequestValidationError, _invalid_parameter)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Exception, _unexpected)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    app.add_middleware(Guard, services=services)
    return app


def _require_guarded(app: FastAPI) -> None:
    """A route that came in another way has no rule, and must not exist."""
    for route in app.routes:
        if not isinstance(route, GuardedRoute):
            raise TypeError(f"The route {route} is not guarded.")


async def _expected(request: Request, error: Exception) -> Response:
    assert isinstance(error, AylluError)
    if error.http_status >= 500:
        _log.warning("%s: %s", type(error).__name__, error)
    if error.http_status == 401:
        failed = "session" if COOKIE in request.cookies else "key"
        request.app.state.services.metrics.auth_failed(failed)
    return error_reply(request, error)


async def _left(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


async def _invalid_parameter(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    param = ".".join(str(step) for step in first["loc"][1:]) or None
    return error_reply(request, InvalidBodyError(f"{param} is not valid.", f"{first['msg']}.", param=param))


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_reply(request, NotFoundError("There is no such address.", "GET /docs lists them."))
    if error.status_code == 405:
        reply = error_reply(
            request, _MethodError("This address takes another method.", "GET /docs lists them.")
        )
        reply.headers.update(error.headers or {})
        return reply
    return error_reply(request, UsageError("The request cannot be read.", "Send valid HTTP."))


async def _unexpected(request: Request, error: Exception) -> Response:
    """The log gets the traceback; the client gets the id to ask for it by."""
    _log.error("unexpected error in %s", request.url.path, exc_info=error)
    problem = f"An error in ayllu (request {request.state.request_id})."
    reply = error_reply(request, RequestFailedError(problem, "Please report it."))
    # Made outside the guard, which adds these to every other one.
    headers = {**SECURITY_HEADERS, "cache-control": "no-store", "x-request-id": request.state.request_id}
    reply.headers.update(headers)
    return reply


def _described(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is not None:
        return app.openapi_schema
    bodies: dict[str, type[BaseModel]] = {}
    for route in app.routes:
        if not isinstance(route, GuardedRoute):
            continue
        extra = route.openapi_extra or {}
        if "x-body" in extra:
            bodies[extra["x-body"].__name__] = extra["x-body"]
            route.openapi_extra = {key: value for key, value in extra.items() if key != "x-body"}
    schema = get_openapi(
        title=app.title, version=app.version, summary=app.summary, routes=app.routes, description=_ABOUT
    )
    components = schema.setdefault("components", {}).setdefault("schemas", {})
    for name, body in bodies.items():
        own = body.model_json_schema(ref_template="#/components/schemas/{model}")
        components.update(own.pop("$defs", {}))
        components[name] = own
    schema["components"]["securitySchemes"] = {
        "key": {"type": "http", "scheme": "bearer", "description": "An API key: ay-…"},
        "session": {"type": "apiKey", "in": "cookie", "name": "ayllu_session"},
    }
    for route in app.routes:
        if isinstance(route, GuardedRoute) and route.path_format in schema["paths"]:
            for method in route.methods or ():
                operation = schema["paths"][route.path_format].get(method.lower())
                if operation is not None:
                    _complete(operation, route)
    app.openapi_schema = schema
    return schema


_ABOUT = (
    "OpenAI's and Anthropic's shapes, and ayllu's own under `/api`. Errors are "
    '`{"error": {"message", "type", "param", "code"}}`; unknown fields are refused, never dropped.'
)


def _complete(operation: dict[str, Any], route: GuardedRoute) -> None:
    operation["security"] = [] if route.rule.scope is None else [{"key": []}, {"session": []}]
    if route.rule.scope not in (None, "signed-in"):
        operation["x-scope"] = route.rule.scope
    responses = operation.setdefault("responses", {})
    responses.pop("422", None)
    statuses = {"default": "An error, in the layout of the address's dialect."}
    for status, text in statuses.items():
        responses.setdefault(status, {"description": text})
