"""One typed settings object for the whole program.

Each value comes from the first of: command-line flag, environment (`AYLLU_<NAME>`), settings file (TOML),
built-in default. A server has one more layer above the defaults: what an admin stored (`with_stored`).
Where a value came from is kept beside it, so that a surprising one can be explained (`describe`).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import platformdirs

from ayllu.errors import UsageError, did_you_mean
from ayllu.settings_values import number, one_of, path, size, switch, text, texts, whole

ENVIRONMENT_PREFIX = "AYLLU_"
DEFAULT = "default"
STORED = "stored"
MASK = "***"
"""Shown in place of a secret."""

# What `engine.options` says of each; rooms below do not import it, and a test compares them.
RunnerName = Literal["auto", "native", "torch"]
CacheType = Literal["auto", "int8"]
GpuWeights = Literal["int4", "int4-128", "int8", "fp8"]
ExpertPlace = Literal["auto", "memory", "disk"]
Speculate = Literal["off", "lookup", "draft"]
LogFormat = Literal["text", "json"]


def _about(
    read: Callable[[object], Any], description: str, *, live: bool = False, secret: bool = False
) -> dict[str, Any]:
    """What a field's value is made with, from what was given (ValueError for what it cannot be), and told.

    live: the server may change it while it runs. secret: its value is never shown.
    """
    return {"read": read, "description": description, "live": live, "secret": secret}


# Not a pydantic model, which would cost every command 70 ms of start for these few.
@dataclass(frozen=True, kw_only=True)
class Settings:
    """Every knob of ayllu that is not an argument of one command."""

    store: Path = field(
        default_factory=lambda: Path(platformdirs.user_data_dir("ayllu", appauthor=False)) / "models",
        metadata=_about(path, "Folder that holds pulled models."),
    )
    default_model: str = field(
        default="qwen2.5-coder-1.5b-instruct",
        metadata=_about(text, "Model that `ayllu chat` opens when none is named."),
    )
    device: str = field(
        default="auto", metadata=_about(text, "Where the model runs: auto, cpu, cuda, cuda:N or mps.")
    )
    dtype: str = field(
        default="auto",
        metadata=_about(text, "Precision of the weights in memory: auto, float32, bfloat16 or float16."),
    )
    runner: RunnerName = field(
        default="auto",
        metadata=_about(one_of(RunnerName), "What computes: native, torch, or auto."),
    )
    threads: int | None = field(
        default=None,
        metadata=_about(whole(1, 1024), "Threads of the native runner; one per processor if not set."),
    )
    cache_type: CacheType = field(
        default="auto",
        metadata=_about(one_of(CacheType), "How keys and values are kept: auto or int8."),
    )
    weights: GpuWeights | None = field(
        default=None,
        metadata=_about(
            one_of(GpuWeights),
            "How weights are packed on an NVIDIA GPU: int4, int4-128, int8 or fp8.",
        ),
    )
    experts: ExpertPlace = field(
        default="auto",
        metadata=_about(one_of(ExpertPlace), "Where a mixture's experts are: memory, disk, or auto."),
    )
    speculate: Speculate | None = field(
        default=None,
        metadata=_about(one_of(Speculate), "How tokens are drafted ahead: off, lookup or draft."),
    )
    draft: str | None = field(
        default=None, metadata=_about(text, "Smaller model of the same family that drafts.")
    )
    timeout_s: float = field(
        default=30.0,
        metadata=_about(
            number(0, 3600, above=True), "Seconds without a byte after which a source counts as stalled."
        ),
    )
    host: str = field(
        default="127.0.0.1",
        metadata=_about(text, "Address that the server listens on; default: this machine alone."),
    )
    port: int = field(default=8420, metadata=_about(whole(0, 65535), "Port that the server listens on."))
    data: Path = field(
        default_factory=lambda: Path(platformdirs.user_data_dir("ayllu", appauthor=False)) / "server",
        metadata=_about(path, "Folder that holds the server's database, backups and adapters."),
    )
    database: str | None = field(
        default=None,
        metadata=_about(
            text,
            "Database of the server: postgresql://user@host/name. Default: a file in `data`.",
            secret=True,
        ),
    )
    public_url: str | None = field(
        default=None,
        metadata=_about(text, "Address by which people reach the server, if a proxy stands before it."),
    )
    allowed_hosts: tuple[str, ...] = field(
        default=(), metadata=_about(texts, "Names, beside its own, that the server may be asked under.")
    )
    allowed_origins: tuple[str, ...] = field(
        default=(), metadata=_about(texts, "Origins of web pages that may use the API from a browser (CORS).")
    )
    tls_certificate: Path | None = field(
        default=None, metadata=_about(path, "File of the TLS certificate chain (PEM).")
    )
    tls_key: Path | None = field(default=None, metadata=_about(path, "File of the TLS key (PEM)."))
    plain_http: bool = field(
        default=False,
        metadata=_about(switch, "Whether to listen beyond this machine without TLS."),
    )
    memory: int | None = field(
        default=None,
        metadata=_about(
            size, "Memory that all loaded models may take together, such as 12G. Default: 80% of it."
        ),
    )
    keep_alive_s: float = field(
        default=1800.0,
        metadata=_about(number(0, 31_536_000), "Seconds that an unused model stays loaded.", live=True),
    )
    context: int | None = field(
        default=None,
        metadata=_about(whole(2, 1 << 31), "Tokens of prompt and answer that the server plans for."),
    )
    slots: int | None = field(
        default=None, metadata=_about(whole(1, 1024), "Answers that one model works on at a time.")
    )
    requests_per_minute: int = field(
        default=600, metadata=_about(whole(1, 1_000_000), "Requests of one user in a minute.", live=True)
    )
    tokens_per_minute: int = field(
        default=1_000_000,
        metadata=_about(
            whole(1, 1_000_000_000), "Tokens, read and made, of one user in a minute.", live=True
        ),
    )
    concurrent_requests: int = field(
        default=32, metadata=_about(whole(1, 100_000), "Requests of one user at a time.", live=True)
    )
    queue_requests: int = field(
        default=128,
        metadata=_about(whole(1, 100_000), "Requests of all users at a time; more are refused.", live=True),
    )
    queue_tokens: int = field(
        default=4_000_000,
        metadata=_about(whole(1, 1 << 40), "Tokens, of prompts and answers asked for, at a time.", live=True),
    )
    upload_bytes: int = field(
        default=64 << 20, metadata=_about(size, "Size of one uploaded file at most.", live=True)
    )
    user_bytes: int = field(
        default=1 << 30, metadata=_about(size, "Size of all files that one user keeps.", live=True)
    )
    remote_images: bool = field(
        default=False,
        metadata=_about(
            switch, "Whether image URLs in requests are fetched from public addresses.", live=True
        ),
    )
    session_hours: float = field(
        default=24.0, metadata=_about(number(0, 24, above=True), "Hours that a sign-in lasts.", live=True)
    )
    stop_timeout_s: float = field(
        default=30.0, metadata=_about(number(0, 3600), "Seconds that open answers get when the server stops.")
    )
    log_format: LogFormat = field(
        default="text", metadata=_about(one_of(LogFormat), "Lines of the log: text or json.")
    )
    otel_endpoint: str | None = field(
        default=None,
        metadata=_about(text, "Address that traces are sent to (OTLP over HTTP). Default: nowhere."),
    )
    oidc_issuer: str | None = field(
        default=None, metadata=_about(text, "Address of an OpenID Connect provider that people sign in with.")
    )
    oidc_client_id: str | None = field(
        default=None, metadata=_about(text, "Name of this server at that provider.")
    )
    oidc_client_secret: str | None = field(
        default=None, metadata=_about(text, "Its secret there.", secret=True)
    )
    oidc_admins: tuple[str, ...] = field(
        default=(),
        metadata=_about(texts, "Subjects or e-mail addresses that become admins when they sign in."),
    )
    oidc_allowed: tuple[str, ...] = field(
        default=(),
        metadata=_about(
            texts, "Subjects, e-mail addresses or e-mail domains that may sign in. Default: all it knows."
        ),
    )
    origins: Mapping[str, str] = field(default_factory=dict, repr=False, compare=False)

    def origin(self, name: str) -> str:
        """Where `name` has its value from: 'flag', an environment variable, a file, 'stored' or 'default'."""
        return self.origins.get(name, DEFAULT)


_KNOBS = {knob.name: knob.metadata for knob in fields(Settings) if knob.metadata}


def settings_file(environment: Mapping[str, str] = os.environ) -> Path:
    """The settings file that would be read; it need not exist."""
    named = environment.get(ENVIRONMENT_PREFIX + "CONFIG")
    return (
        Path(named) if named else Path(platformdirs.user_config_dir("ayllu", appauthor=False)) / "ayllu.toml"
    )


def load_settings(
    flags: Mapping[str, Any] | None = None, environment: Mapping[str, str] = os.environ
) -> Settings:
    """Settings for this process. `flags` holds the command-line values; None means 'not given'.

    Raises UsageError for an unknown name or an invalid value, naming its origin.
    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    file = settings_file(environment)
    if file.exists() or environment.get(ENVIRONMENT_PREFIX + "CONFIG"):
        try:
            from_file = tomllib.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}.", "Correct AYLLU_CONFIG.") from error
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{file} is not valid TOML: {error}.", "Correct or remove the file.") from error
        for name, value in from_file.items():
            _require_known(name, str(file))
            values[name], origins[name] = value, str(file)
    for variable, value in environment.items():
        if not variable.startswith(ENVIRONMENT_PREFIX) or not value:
            continue
        name = variable.removeprefix(ENVIRONMENT_PREFIX).lower()
        if name in ("config", "api_key"):  # where the file is; and a secret, which is nobody's setting
            continue
        _require_known(name, f"environment variable {variable}")
        values[name], origins[name] = value, variable
    for name, value in (flags or {}).items():
        if value is not None:
            _require_known(name, "flag")
            values[name], origins[name] = value, "flag"
    for name, value in values.items():
        values[name] = _read(name, value, origins[name])
    return Settings(**values, origins=origins)


def _read(name: str, value: object, origin: str) -> Any:
    try:
        return _KNOBS[name]["read"](value)
    except ValueError as error:
        shown = MASK if _KNOBS[name]["secret"] else repr(value)
        raise UsageError(
            f"{name} = {shown} (from {origin}) is not valid: {error}.",
            f"{name} means: {_KNOBS[name]['description']}",
        ) from error


def with_stored(settings: Settings, stored: Mapping[str, Any], *, strict: bool = False) -> Settings:
    """`settings`, with what an admin stored where no flag, variable or file says otherwise.

    settings: as they were given, without an earlier layer. A stored value that cannot be is reported in the
    log and ignored, as a server must start all the same; strict: it raises UsageError.
    """
    changes: dict[str, Any] = {}
    for name, value in stored.items():
        try:
            _require_known(name, STORED)
            if not _KNOBS[name]["live"]:
                raise UsageError(f"{name} cannot change while the server runs.", _NOT_LIVE)
            read = _read(name, value, STORED)
        except UsageError as error:
            if strict:
                raise
            import logging

            logging.getLogger("ayllu.settings").warning("a stored setting is ignored: %s", error.problem)
            continue
        if settings.origin(name) in (DEFAULT, STORED):
            changes[name] = read
    origins = {**settings.origins, **dict.fromkeys(changes, STORED)}
    return replace(settings, **changes, origins=origins)


_NOT_LIVE = "Set it by a flag, the environment or the settings file, and start again."


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One setting, to be shown; a secret is masked. live: an admin may change it while the server runs.
    pinned: a flag, the environment or the file sets it, so what is stored does not count."""

    name: str
    value: Any
    origin: str
    description: str
    live: bool
    secret: bool
    pinned: bool


def describe(settings: Settings) -> list[Knob]:
    """Every setting, in the order in which `Settings` has them."""
    return [
        Knob(
            name=name,
            value=_shown(getattr(settings, name), secret=about["secret"]),
            origin=settings.origin(name),
            description=about["description"],
            live=about["live"],
            secret=about["secret"],
            pinned=settings.origin(name) not in (DEFAULT, STORED),
        )
        for name, about in _KNOBS.items()
    ]


_DATABASE = ("postgresql:", "postgresql+", "postgres:", "sqlite:")


def _shown(value: Any, *, secret: bool) -> Any:
    """`value` without what must not be seen: a secret, or the password inside an address."""
    if isinstance(value, tuple):
        return tuple(_shown(item, secret=secret) for item in value)
    if secret and value is not None and not str(value).startswith(_DATABASE):
        return MASK
    return _without_password(value) if isinstance(value, str) and "://" in value else value


def _without_password(address: str) -> str:
    """An address keeps what helps to recognise it. All before the last @ may be a password, whatever it
    holds, and so may a query."""
    scheme, _, rest = address.partition("://")
    user, at, place = rest.rpartition("@")
    name, colon, _ = user.partition(":")
    for mark in "?#":
        kept, found, _ = place.partition(mark)
        place = f"{kept}{mark}{MASK}" if found else kept
    return f"{scheme}://{name}{f':{MASK}' if colon else ''}{at}{place}"


def _require_known(name: str, origin: str) -> None:
    if name not in _KNOBS:
        known = sorted(_KNOBS)
        raise UsageError(
            f"{origin} sets an unknown option {name!r}.{did_you_mean(name, known)}",
            f"Known options: {', '.join(known)}.",
        )
