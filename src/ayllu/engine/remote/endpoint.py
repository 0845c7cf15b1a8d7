"""Where a remote engine is and how it is spoken to: address, dialect, key, patience and limits.

The key, and whatever else the headers hold, never appears in a repr, an error or a log; it goes to the
address itself and nowhere else, because redirects are not followed.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args
from urllib.parse import quote, urlsplit

from ayllu import __version__
from ayllu.engine.parameters import require_range
from ayllu.errors import UsageError, clip, did_you_mean

Dialect = Literal["openai", "vllm", "sglang", "llama.cpp", "azure", "ayllu"]

_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]{1,100}")
_API_VERSION = re.compile(r"[A-Za-z0-9.-]{1,40}")
_OWN_HEADERS = frozenset(
    ("authorization", "api-key", "host", "content-length", "content-type", "transfer-encoding", "accept")
) | frozenset(("accept-encoding", "user-agent", "connection"))


@dataclass(frozen=True, kw_only=True)
class RemoteEndpoint:
    """One model on one server.

    base_url: with a path it is used as it is ("https://host/openai/v1"); without one, "/v1" is added (azure:
    the resource's address alone). model: its name there, on Azure the deployment's. dialect: what the server
    understands beyond OpenAI's own fields; "openai" promises the least. headers: more of them, for gateways.
    connect_timeout_s, read_timeout_s: patience for a connection, and between two pieces of an answer; the
    latter includes waiting in the server's queue. retries: further attempts while nothing has been said yet,
    after pauses that start at backoff_s and double, or as long as the server asks, but never more than
    longest_pause_s each. max_open: requests that may be open at the same time. allow_plain_http: send
    prompts and key unencrypted to a host that is not this machine.

    Raises UsageError for anything that cannot be.
    """

    base_url: str
    model: str
    api_key: str | None = field(default=None, repr=False)
    dialect: Dialect = "openai"
    api_version: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    connect_timeout_s: float = 10.0
    read_timeout_s: float = 300.0
    retries: int = 2
    backoff_s: float = 0.5
    longest_pause_s: float = 30.0
    max_open: int = 256
    max_event_bytes: int = 16 << 20
    allow_plain_http: bool = False

    def __post_init__(self) -> None:
        if self.dialect not in get_args(Dialect):
            known = get_args(Dialect)
            raise UsageError(
                f"There is no dialect {clip(repr(self.dialect))}.{did_you_mean(str(self.dialect), known)}",
                f"Known: {', '.join(known)}.",
            )
        self._check_address()
        self._check_headers()
        if not self.model or not self.model.isprintable():
            raise UsageError("The remote model has no name.", "Give the name the server lists it under.")
        if self.dialect == "azure":
            if self.api_version is None or not _API_VERSION.fullmatch(self.api_version):
                raise UsageError(
                    "Azure needs an api_version.", "Give one its documentation lists, such as 2024-10-21."
                )
        elif self.api_version is not None:
            raise UsageError("Only Azure takes an api_version.", "Leave it out, or set dialect='azure'.")
        require_range("connect_timeout_s", self.connect_timeout_s, 0.001, 3600.0)
        require_range("read_timeout_s", self.read_timeout_s, 0.001, 86400.0)
        require_range("retries", self.retries, 0, 10)
        require_range("backoff_s", self.backoff_s, 0.0, 60.0)
        require_range("longest_pause_s", self.longest_pause_s, 0.0, 600.0)
        require_range("max_open", self.max_open, 1, 1 << 16)
        require_range("max_event_bytes", self.max_event_bytes, 1024, 1 << 30)

    def _check_address(self) -> None:
        problem = None
        try:
            parts = urlsplit(self.base_url)
            if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
                problem = "is no http(s) address"
            elif parts.username is not None or parts.password is not None:
                problem = "holds a user name or password"
            elif parts.query or parts.fragment:
                problem = "holds a query or fragment"
            elif not self.base_url.isascii() or not self.base_url.isprintable() or " " in self.base_url:
                problem = "holds characters an address cannot have"
        except ValueError:
            problem = "is no http(s) address"
        if problem is not None:
            # The address is not shown: where it is malformed, it may hold a password.
            raise UsageError(
                f"base_url {problem}.", "Give https://host[:port][/path]; keys go into api_key or headers."
            )
        if parts.scheme == "http" and not self.is_loopback and not self.allow_plain_http:
            raise UsageError(
                f"{self.address} is unencrypted and not this machine: all that is sent could be read.",
                "Use https, or set allow_plain_http=True on a network you trust.",
            )

    def _check_headers(self) -> None:
        if self.api_key is not None and not _header_value(self.api_key, " "):
            raise UsageError(
                "The API key is empty or holds spaces, line breaks or non-ASCII characters.",
                "Copy it again.",
            )
        for name, value in self.headers.items():
            if not _HEADER_NAME.fullmatch(name) or not _header_value(value, ""):
                raise UsageError(
                    f"The header {clip(ascii(name))} cannot be sent.", "Use printable ASCII in its value."
                )
            if name.lower() in _OWN_HEADERS:
                raise UsageError(f"The header {name} is the engine's own.", "Give the key as api_key.")

    @property
    def is_loopback(self) -> bool:
        """Whether the server is on this machine."""
        host = urlsplit(self.base_url).hostname or ""
        if host == "localhost" or host.endswith(".localhost"):
            return True
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    @property
    def address(self) -> str:
        """Scheme, host and port, for messages."""
        parts = urlsplit(self.base_url)
        return f"{parts.scheme}://{parts.netloc}"

    def url(self, path: str) -> str:
        """The full address of an API path such as "chat/completions"."""
        base = self.base_url.rstrip("/")
        if self.dialect == "azure":
            # Listing models is a matter of the resource, everything else of the deployment.
            place = "openai" if path == "models" else f"openai/deployments/{quote(self.model, safe='')}"
            return f"{base}/{place}/{path}?api-version={self.api_version}"
        if not urlsplit(base).path:
            base += "/v1"
        return f"{base}/{path}"

    def request_headers(self) -> dict[str, str]:
        """All headers of a request, the key included."""
        headers = {
            **self.headers,
            "User-Agent": f"ayllu/{__version__}",
            "Content-Type": "application/json",
            "Accept": "text/event-stream, application/json",
            # A compressed stream would be held back until a block is full.
            "Accept-Encoding": "identity",
        }
        if self.api_key is not None and self.dialect == "azure":
            headers["api-key"] = self.api_key
        elif self.api_key is not None:
            headers["Authorization"] = f"Bearer {self.api_key}"
        return headers

    def without_secrets(self, text: str) -> str:
        """`text`, which a server wrote, with the key and the values of all own headers taken out."""
        for secret in (self.api_key, *self.headers.values()):
            if secret is not None and len(secret) > 3:
                text = text.replace(secret, "[secret]")
        return text


def _header_value(text: str, refused: str) -> bool:
    return bool(text) and text.isascii() and text.isprintable() and not any(ch in text for ch in refused)
