"""`ayllu serve`: the OpenAI-compatible server with sign-in, limits and stored conversations.

Everything heavy is imported inside the functions.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ayllu.cli.engine_flags import (
    CacheType,
    Device,
    Draft,
    Dtype,
    Experts,
    Runner,
    Speculate,
    Threads,
    Weights,
)

if TYPE_CHECKING:
    from ayllu.engine.options import EngineOptions
    from ayllu.settings import Settings

EPILOG = "Example: ayllu serve smollm2-135m-instruct --pull"


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="Names or paths of models to load; the first answers where a request names none. "
            "Every installed model can be asked for.",
        ),
    ] = None,
    host: Annotated[
        str | None, typer.Option("--host", help="Address to listen on. Default: 127.0.0.1.")
    ] = None,
    port: Annotated[int | None, typer.Option("--port", help="Port to listen on. Default: 8420.")] = None,
    pull: Annotated[bool, typer.Option("--pull", help="Fetch a model that is not here yet.")] = False,
    data: Annotated[
        Path | None, typer.Option("--data", help="Folder of the database, backups and adapters.")
    ] = None,
    database: Annotated[
        str | None, typer.Option("--database", help="postgresql://… Default: a file in the data folder.")
    ] = None,
    memory: Annotated[
        str | None, typer.Option("--memory", help="Memory of all loaded models, such as 12G.")
    ] = None,
    keep_alive: Annotated[
        float | None, typer.Option("--keep-alive", help="Seconds that an unused model stays loaded.")
    ] = None,
    context: Annotated[
        int | None, typer.Option("--context", help="Tokens of prompt and answer together.")
    ] = None,
    slots: Annotated[
        int | None, typer.Option("--slots", help="Answers that a model works on at a time.")
    ] = None,
    tls_certificate: Annotated[
        Path | None, typer.Option("--tls-certificate", help="File of the certificate chain (PEM).")
    ] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="File of its key (PEM).")] = None,
    public_url: Annotated[
        str | None, typer.Option("--public-url", help="Address of a proxy that stands before the server.")
    ] = None,
    plain_http: Annotated[
        bool, typer.Option("--plain-http", help="Listen beyond this machine without TLS.")
    ] = False,
    log_format: Annotated[str | None, typer.Option("--log-format", help="text or json.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    runner: Runner = None,
    threads: Threads = None,
    cache_type: CacheType = None,
    weights: Weights = None,
    experts: Experts = None,
    speculate: Speculate = None,
    draft: Draft = None,
) -> None:
    """Serve models to programs and people: OpenAI's and Anthropic's APIs, with sign-in.

    The first start makes an admin and prints a link that signs them in once.
    """
    from ayllu.settings import load_settings

    settings = load_settings(
        {
            "host": host,
            "port": port,
            "data": data,
            "database": database,
            "memory": memory,
            "keep_alive_s": keep_alive,
            "context": context,
            "slots": slots,
            "tls_certificate": tls_certificate,
            "tls_key": tls_key,
            "public_url": public_url,
            "plain_http": plain_http or None,
            "log_format": log_format,
            "device": device,
            "dtype": dtype,
            "runner": runner,
            "threads": threads,
            "cache_type": cache_type,
            "weights": weights,
            "experts": experts,
            "speculate": speculate,
            "draft": draft,
        }
    )
    _serve(settings, models or [], pull)


def _serve(settings: Settings, names: list[str], pull: bool) -> None:
    import uvloop

    from ayllu.cli.opening import find_or_pull
    from ayllu.server.logs import secrets_of, set_up_logging
    from ayllu.server.serve import listen, require_safe_address, run
    from ayllu.server.state.database import Database

    require_safe_address(settings)
    writer = set_up_logging(settings.log_format, secrets=secrets_of(settings))
    found = [(model.name, model.path) for model in (find_or_pull(name, pull, settings) for name in names)]
    if not names:
        default = find_or_pull(None, pull, settings)
        found = [(default.name, default.path)]
    listening = listen(settings)
    database = Database.open(settings.database, settings.data)
    try:
        uvloop.run(
            run(
                settings,
                database,
                listening,
                engine_options=lambda name: _options(settings, name, pull),
                models=found,
                load=[name for name, _ in found],
                say=lambda text: print(text, file=sys.stderr, flush=True),
            )
        )
    finally:
        writer.close()


def _options(settings: Settings, name: str, pull: bool) -> EngineOptions:
    from ayllu.cli.engine_flags import engine_options

    sizes: dict[str, Any] = {"context": settings.context, "slots": settings.slots}
    return engine_options(settings, command=f"ayllu serve {name}", pull=pull, **sizes)
