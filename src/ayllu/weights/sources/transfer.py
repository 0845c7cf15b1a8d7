"""One file over http(s), resumable: what arrived is never asked for again.

Every byte is written to the `.part` file as it comes, so a cut, a stall or a killed process costs only the
bytes in flight. The next request asks for the rest (`Range`), guarded by `If-Range` where the server gave a
strong validator. Length lies and wrong bytes end in typed errors; attempts, waits and sizes are bounded.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx2

from ayllu.errors import IntegrityError, SourceError
from ayllu.weights.sources import base
from ayllu.weights.sources.base import Limits, Order

_CONTENT_RANGE = re.compile(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19}|\*)")
_RETRIED_STATUSES = frozenset((408, 429, 500, 502, 503, 504))
_NETWORK_VARIABLES = frozenset(
    ("SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
)
SLOWEST_BYTES_PER_S = 1024
MOST_REDIRECTS = 5


@dataclass(frozen=True)
class Download:
    """One file to bring: `name` for people, `path` where its bytes grow.

    Exactly one of `sha256` and `git_blob` is what the content is checked against. `size_bytes` is exact.
    `headers` (authorisation, say) go to the address itself, never to another host it redirects to.
    """

    name: str
    url: str
    path: Path
    size_bytes: int
    sha256: str | None = None
    git_blob: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def note(self) -> Path:
        """Where the validator of the partial bytes is kept."""
        return self.path.with_name(self.path.name + ".json")

    @property
    def host(self) -> str:
        """`scheme://host:port`: what is remembered when it does not answer."""
        parts = urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc}"

    def present_bytes(self) -> int:
        """Bytes an earlier attempt left."""
        return self.path.stat().st_size if self.path.exists() else 0

    def missing_bytes(self) -> int:
        """Bytes still to come."""
        return max(0, self.size_bytes - self.present_bytes())


class _Interrupted(Exception):
    """The transfer broke off in a way that another request may mend. `wait_s` is the server's own wish."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


@contextlib.contextmanager
def web_client(limits: Limits) -> Iterator[httpx2.Client]:
    """A client for one or several downloads: follows few redirects, waits as long as `limits` allow.

    Raises SourceError naming the environment variables when the proxy or certificates they name are unusable.
    """
    timeout = httpx2.Timeout(limits.stall_s, connect=limits.connect_s)
    try:
        client = httpx2.Client(timeout=timeout, follow_redirects=True, max_redirects=MOST_REDIRECTS)
    except (OSError, ValueError, httpx2.InvalidURL) as error:
        # Certificates and proxies come from the environment; nothing else here can be wrong.
        named = [name for name in os.environ if name.upper() in _NETWORK_VARIABLES and os.environ[name]]
        settings = " or ".join(named) or "the system's network settings"
        raise SourceError(
            f"No connection can be made with {settings} as set ({_reason(error)}).", f"Correct {settings}."
        ) from error
    with client:
        yield client


def download(wanted: Download, client: httpx2.Client, order: Order, advance: Callable[[int], None]) -> str:
    """Bring the file to `wanted.path` and return its SHA-256, verified against what `wanted` pins.

    Raises SourceError (unreachable, refused, cut too often, lying about length), IntegrityError (wrong bytes,
    which are removed) or NoSpaceError. Partial bytes stay for the next call unless they are known to be bad.
    """
    inherited = wanted.present_bytes()
    transfer = _Transfer(wanted, client, order, advance)
    with base.full_disk_is_typed(wanted.path.parent):
        transfer.complete()
        digest = _verified(wanted)
        if digest is None and inherited:
            # The bad bytes may be the earlier run's (a disk that lost power, a mirror that changed), so this
            # one time the whole file is asked for again before the source is blamed.
            advance(-wanted.size_bytes)
            transfer.start_over()
            transfer.complete()
            digest = _verified(wanted)
    if digest is None:
        promised = wanted.sha256 or wanted.git_blob or ""
        raise IntegrityError(
            f"{wanted.host} delivered wrong bytes for {wanted.name}: their digest is not {promised[:16]}….",
            "The bad bytes were removed. Pull again later, or use another source.",
        )
    wanted.note.unlink(missing_ok=True)
    return digest


def _verified(wanted: Download) -> str | None:
    """SHA-256 of the finished file, or None after removing it because it is not what was promised."""
    digest = base.sha256_of(wanted.path)
    right = digest == wanted.sha256 if wanted.sha256 else base.git_blob_id(wanted.path) == wanted.git_blob
    if right:
        return digest
    _discard(wanted)
    return None


def _discard(wanted: Download) -> None:
    wanted.path.unlink(missing_ok=True)
    wanted.note.unlink(missing_ok=True)


class _Transfer:
    """The requests it takes to complete one file."""

    def __init__(
        self, wanted: Download, client: httpx2.Client, order: Order, advance: Callable[[int], None]
    ) -> None:
        self._wanted = wanted
        self._client = client
        self._limits = order.limits
        self._unreachable = order.unreachable
        self._advance = advance
        if wanted.present_bytes() > wanted.size_bytes:
            _discard(wanted)
        self._have = wanted.present_bytes()
        self._validator = self._noted_validator()
        advance(self._have)

    def start_over(self) -> None:
        """Forget what is there."""
        _discard(self._wanted)
        self._have = 0
        self._validator = None

    def complete(self) -> None:
        """Request after request until the file has its full length."""
        wanted, limits = self._wanted, self._limits
        if self._have < wanted.size_bytes and wanted.host in self._unreachable:
            raise SourceError(self._unreachable[wanted.host], "Check the network, then pull again.")
        # A server that drips a few bytes per connection must not earn a fresh set of attempts each time.
        worthwhile = min(1 << 20, max(1, wanted.size_bytes // 100))
        failures, best = 0, self._have
        if wanted.size_bytes == 0:
            wanted.path.touch()
        while self._have < wanted.size_bytes:
            try:
                self._request()
            except _Interrupted as error:
                if self._have - best >= worthwhile:
                    failures, best = 0, self._have
                failures += 1
                if failures >= limits.attempts:
                    raise SourceError(
                        f"{wanted.host} broke off {failures} times in a row: {error}.",
                        "What arrived is kept; the next pull continues there.",
                    ) from error
                pause = min(limits.backoff_s * 2 ** (failures - 1), limits.longest_backoff_s)
                time.sleep(max(pause, min(error.wait_s, limits.longest_backoff_s)))

    def _request(self) -> None:
        """One request, appended to the file. Raises _Interrupted for what a retry may mend."""
        headers = {**self._wanted.headers, "Accept-Encoding": "identity"}
        if self._have:
            headers["Range"] = f"bytes={self._have}-"
            if self._validator:
                headers["If-Range"] = self._validator
        try:
            with self._client.stream("GET", self._wanted.url, headers=headers) as response:
                self._check_redirects(response)
                self._check_status(response)
                self._align(response)
                self._receive(response)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.ProxyError) as error:
            reason = f"{self._wanted.host} cannot be reached ({_reason(error)})"
            if self._have:
                raise _Interrupted(reason) from error
            self._unreachable[self._wanted.host] = reason + "."
            raise SourceError(reason + ".", "Check the network, then pull again.") from error
        except httpx2.TimeoutException as error:
            raise _Interrupted(f"nothing arrived for {self._limits.stall_s:g} s") from error
        except (httpx2.NetworkError, httpx2.RemoteProtocolError) as error:
            raise _Interrupted(_reason(error)) from error
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
            raise SourceError(
                f"{self._wanted.host} failed: {_reason(error)}.", "Use another source."
            ) from error
        if self._have < self._wanted.size_bytes:
            raise _Interrupted(f"it ended after {self._have} of {self._wanted.size_bytes} bytes")

    def _check_redirects(self, response: httpx2.Response) -> None:
        if self._wanted.url.startswith("https:") and response.url.scheme != "https":
            raise SourceError(
                f"{self._wanted.host} redirects to an unencrypted address.", "Use another source."
            )

    def _check_status(self, response: httpx2.Response) -> None:
        status = response.status_code
        if status in (200, 206):
            return
        if status in _RETRIED_STATUSES:
            raise _Interrupted(f"the server answered {status}", _retry_after(response))
        if status == 416:
            raise SourceError(
                f"{self._wanted.host} has no bytes after {self._have}, but the file should have "
                f"{self._wanted.size_bytes}: the server's file is shorter than promised.",
                "Use another source.",
            )
        if status in (401, 403):
            raise SourceError(
                f"{self._wanted.host} refuses {self._wanted.name} ({status}).",
                "The model may be gated: accept its licence on the hub, then set HF_TOKEN.",
            )
        raise SourceError(f"{self._wanted.host} answered {status}.", "Check the source, or use another one.")

    def _align(self, response: httpx2.Response) -> None:
        """Make the file's end the place this response continues at; refuse a length that cannot be right."""
        size = self._wanted.size_bytes
        if response.status_code == 206:
            match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if not match or int(match[1]) != self._have:
                raise SourceError(
                    f"{self._wanted.host} answers a range it was not asked for.", "Use another source."
                )
            total = size if match[3] == "*" else int(match[3])
        else:
            total = _content_length(response, size)
        if total != size:
            raise SourceError(
                f"{self._wanted.host} says the file has {total} bytes, but {size} are promised.",
                "Nothing was fetched. Use another source.",
            )
        if response.status_code == 200 and self._have:
            # The file changed, or the server ignores ranges: these bytes start at zero.
            self._advance(-self._have)
            self.start_over()
        self._validator = _strong_validator(response)
        note = {"url": self._wanted.url, "validator": self._validator}
        base.write_atomically(self._wanted.note, json.dumps(note).encode())

    def _receive(self, response: httpx2.Response) -> None:
        with self._wanted.path.open("ab", buffering=0) as part:
            for block in _not_too_slow(response.iter_raw(), self._limits.stall_s):
                if self._have + len(block) > self._wanted.size_bytes:
                    raise SourceError(
                        f"{self._wanted.host} sends more than the promised {self._wanted.size_bytes} bytes.",
                        "Use another source.",
                    )
                part.write(block)
                self._have += len(block)
                self._advance(len(block))

    def _noted_validator(self) -> str | None:
        """The validator of the partial bytes, if they came from this very address."""
        if not self._have:
            return None
        with contextlib.suppress(OSError, ValueError, AttributeError):
            note = json.loads(self._wanted.note.read_bytes())
            if note.get("url") == self._wanted.url and isinstance(note.get("validator"), str):
                return str(note["validator"])
        return None


def _not_too_slow(blocks: Iterator[bytes], window_s: float) -> Iterator[bytes]:
    """Pass blocks on; give up on less than 1 KiB/s, which no timeout between two bytes notices."""
    started, received = time.monotonic(), 0
    for block in blocks:
        received += len(block)
        yield block
        elapsed = time.monotonic() - started
        if elapsed > 2 * window_s:
            if received < SLOWEST_BYTES_PER_S * elapsed:
                raise _Interrupted(f"only {received} bytes arrived in {elapsed:.0f} s")
            started, received = time.monotonic(), 0


def _content_length(response: httpx2.Response, otherwise: int) -> int:
    text = response.headers.get("Content-Length", "")
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else otherwise


def _strong_validator(response: httpx2.Response) -> str | None:
    """The ETag when it is strong: `If-Range` may not carry a weak one (RFC 9110, section 13.1.5)."""
    etag = str(response.headers.get("ETag", ""))
    return etag if etag.startswith('"') and etag.endswith('"') and len(etag) < 300 else None


def _retry_after(response: httpx2.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isascii() and text.isdigit() and len(text) < 6 else 0.0


def _reason(error: Exception) -> str:
    return (str(error) or type(error).__name__).rstrip(".")
