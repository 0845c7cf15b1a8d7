"""Is it alive, can it answer, how is it doing: for orchestrators, Prometheus and people."""

from __future__ import annotations

import asyncio
from importlib.resources import files

from fastapi import Request, Response
from starlette.responses import HTMLResponse, RedirectResponse

from ayllu import __version__
from ayllu.errors import AylluError
from ayllu.server.access import METRICS, PUBLIC
from ayllu.server.metrics import CONTENT_TYPE
from ayllu.server.replies import JsonReply
from ayllu.server.routes.common import new_router, services_of

router = new_router("Health")


@router.get("/health", response_class=Response)
@router.get("/healthz", include_in_schema=False)
@PUBLIC
async def health(request: Request) -> Response:
    """200 while the server and the engines it has started work; 503 while one is down or it stops."""
    services = services_of(request)
    down = [
        name
        for name, engine in services.models.engines().items()
        if getattr(engine, "status", "ready") not in ("ready",)
    ]
    if services.stopping:
        return JsonReply({"status": "stopping"}, 503, {"retry-after": "5"})
    if down:
        return JsonReply({"status": "engine down"}, 503, {"retry-after": "1"})
    return JsonReply({"status": "ok"})


@router.get("/ready", response_class=Response)
@router.get("/readyz", include_in_schema=False)
@PUBLIC
async def ready(request: Request) -> Response:
    """200 once the first model is loaded and the database answers."""
    services = services_of(request)
    engines = services.models.engines()
    is_ready = not services.stopping and any(
        getattr(engine, "status", "ready") == "ready" for engine in engines.values()
    )
    if is_ready:
        try:
            await services.user_count()
        except AylluError:
            is_ready = False
    return JsonReply({"ready": is_ready}, 200 if is_ready else 503, {} if is_ready else {"retry-after": "2"})


@router.get("/version", response_class=Response)
@PUBLIC
async def version(request: Request) -> Response:
    """The version of ayllu."""
    return JsonReply({"version": __version__})


@router.get("/metrics", response_class=Response)
@METRICS
async def metrics(request: Request) -> Response:
    """Measurements for Prometheus, under vLLM's names."""
    services = services_of(request)
    data = await asyncio.to_thread(services.metrics.scrape, services.models.engines())
    return Response(data, media_type=CONTENT_TYPE)


@router.get("/openapi.json", include_in_schema=False)
@PUBLIC
async def openapi(request: Request) -> Response:
    """The API, described."""
    state = request.app.state
    async with state.describing:  # it takes a while, and changes what it reads
        if state.described is None:
            state.described = await asyncio.to_thread(lambda: JsonReply(request.app.openapi()))
    described: JsonReply = state.described
    return described


_DOCS = """<!doctype html><html lang=en><meta charset=utf-8><title>ayllu API</title>
<link rel=stylesheet href=/docs/swagger-ui.css><div id=ui></div>
<script src=/docs/swagger-ui-bundle.js></script><script src=/docs/start.js></script></html>"""
_START = (
    "SwaggerUIBundle({url: '/openapi.json', dom_id: '#ui', deepLinking: true, persistAuthorization: false})"
)
_ASSETS = {
    "swagger-ui.css": "text/css; charset=utf-8",
    "swagger-ui-bundle.js": "text/javascript; charset=utf-8",
}


@router.get("/docs", include_in_schema=False)
@PUBLIC
async def docs(request: Request) -> Response:
    """The API to read and try, from files that come with the program."""
    return HTMLResponse(_DOCS)


@router.get("/docs/start.js", include_in_schema=False)
@PUBLIC
async def docs_start(request: Request) -> Response:
    """What opens the page, apart from it: the page may run no script of its own."""
    return Response(_START, media_type="text/javascript; charset=utf-8")


@router.get("/docs/swagger-ui.css", include_in_schema=False)
@PUBLIC
async def docs_style(request: Request) -> Response:
    """The page's looks."""
    return await _asset("swagger-ui.css")


@router.get("/docs/swagger-ui-bundle.js", include_in_schema=False)
@PUBLIC
async def docs_script(request: Request) -> Response:
    """The page's program."""
    return await _asset("swagger-ui-bundle.js")


async def _asset(name: str) -> Response:
    data: bytes = await asyncio.to_thread((files("fastapi_offline") / "static" / name).read_bytes)
    return Response(data, media_type=_ASSETS[name], headers={"cache-control": "max-age=86400"})


@router.get("/", include_in_schema=False)
@PUBLIC
async def home(request: Request) -> Response:
    """Until there is an app to show, the API."""
    return RedirectResponse("/docs", 307)
