"""Images that a request names by URL, fetched for it where the operator allows that.

A server that fetches what strangers name can be sent to what only it can reach. So a URL is read by one
strict parser, its name is resolved once, every address found must be public, and the connection goes to an
address that was checked; each redirect is a new URL under the same rules. Errors tell none of what was found.
"""

from __future__ import annotations

import asyncio
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn, Protocol
from urllib.parse import urljoin
from weakref import WeakKeyDictionary

import httpx2

from ayllu.chat.images import MAX_IMAGE_BYTES
from ayllu.engine.openai.body import InvalidBodyError
from ayllu.errors import OverloadedError
from ayllu.server.public_url import Address, RefusedUrl, is_public, parse_url

MAX_REMOTE_IMAGES = 16
"""Images by URL in one request."""

MAX_REMOTE_BYTES = 64_000_000
"""Bytes of all of them together."""

MAX_REDIRECTS = 3
MAX_FETCHES = 8
"""Fetches at a time, of all requests together."""

CONNECT_SECONDS = 5.0
TOTAL_SECONDS = 10.0
MAX_ADDRESSES_TRIED = 3
ITEMS_BETWEEN_PAUSES = 5_000
MAX_CONTENT_DEPTH = 20

_REMOTE = re.compile(r"[a-z][a-z0-9+.-]*:", re.IGNORECASE)
_REDIRECTS = (301, 302, 303, 307, 308)


class RemoteImages(Protocol):
    """The part of the settings that is read here."""

    @property
    def remote_images(self) -> bool: ...


Resolve = Callable[[str, int], Awaitable[list[str]]]
"""Every address of a host name, in the order to try them. Raises OSError where there is none."""

StoredFile = Callable[[str, str], Awaitable[bytes]]
"""The bytes of a stored file by its id; the second argument names the field, for errors."""


@dataclass(frozen=True)
class ImagePlace:
    """Where a body names an image that is not in it: the URL or file id, and the path of the field."""

    name: str
    param: str

    @property
    def is_remote(self) -> bool:
        return bool(_REMOTE.match(self.name) or self.name.startswith("//"))


async def collect_images(
    body: Mapping[str, Any],
    settings: RemoteImages,
    files: StoredFile | None = None,
    *,
    fetcher: ImageFetcher | None = None,
) -> dict[str, bytes]:
    """The bytes of every image that `body`, of any of the dialects, names by a URL, by that URL.

    With `files`, of every stored file it names, too. fetcher: the event loop's own where none is given.
    Raises InvalidBodyError naming the field, for a URL above all where settings.remote_images is off, and
    OverloadedError when too many images are being fetched.
    """
    remote: dict[str, str] = {}
    stored: dict[str, str] = {}
    async for place in image_places(body):
        (remote if place.is_remote else stored).setdefault(place.name, place.param)
        if len(remote) > MAX_REMOTE_IMAGES:
            _blame(place.param, f"is one of more than {MAX_REMOTE_IMAGES} images to fetch.", "Send fewer.")
    if remote and not settings.remote_images:
        _blame(
            next(iter(remote.values())),
            "would have to be fetched, and this server fetches no images.",
            "Put the image into the request (data:image/png;base64,…), or upload it and give its file id.",
        )
    found: dict[str, bytes] = {}
    if remote:
        found = await (fetcher or _fetcher_of_loop()).fetch_all(remote)
    if files is not None:
        for name, param in stored.items():
            found[name] = await files(name, param)
    return found


async def image_places(body: Mapping[str, Any]) -> AsyncIterator[ImagePlace]:
    """Every image that a body of OpenAI's, the Responses' or Anthropic's shape names without holding it.

    Only messages, their contents and the outputs of calls are looked at: what tools take is no image. Nothing
    is checked here but what an image is named by. Long bodies give others their turn.
    """
    left = [_items(body.get(name), name) for name in ("system", "input", "messages")]
    seen = 0
    while left:
        item = next(left[-1], None)
        if item is None:
            left.pop()
            continue
        seen += 1
        if seen % ITEMS_BETWEEN_PAUSES == 0:
            await asyncio.sleep(0)
        part, path = item
        place = _place(part, path)
        if place is not None:
            yield place
        elif len(left) <= MAX_CONTENT_DEPTH:
            left += [_items(part.get(name), f"{path}.{name}") for name in ("output", "content")]


def _items(value: Any, path: str) -> Iterator[tuple[dict[str, Any], str]]:
    # A list that begins with something else is a list of texts or of tokens, and may be long.
    if isinstance(value, list) and value and isinstance(value[0], dict):
        for number, item in enumerate(value):
            yield (item if isinstance(item, dict) else {}), f"{path}.{number}"


def _place(part: dict[str, Any], path: str) -> ImagePlace | None:
    """The image that this part of a message is, unless its bytes are in it."""
    kind = part.get("type")
    if kind in ("image_url", "input_image"):
        given, path = part.get("image_url"), f"{path}.image_url"
        if isinstance(given, dict):
            name = "url" if isinstance(given.get("url"), str) else "file_id"
            given, path = given.get(name), f"{path}.{name}"
        elif given is None:
            given, path = part.get("file_id"), f"{path.removesuffix('.image_url')}.file_id"
    elif kind == "image" and isinstance(source := part.get("source"), dict):
        name = "url" if source.get("type") == "url" else "file_id"
        given, path = source.get(name), f"{path}.source.{name}"
    else:
        return None
    if not isinstance(given, str) or given[:5].lower() == "data:":
        return None
    return ImagePlace(given, path)


async def resolved(host: str, port: int) -> list[str]:
    """What the system's resolver says."""
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(host, port, type=socket.SOCK_STREAM, proto=socket.IPPROTO_TCP)
    return list(dict.fromkeys(str(info[4][0]) for info in found))


class ImageFetcher:
    """Fetches images, a few at a time. For one event loop.

    resolve, allowed: for tests. tls: how servers' certificates are verified.
    """

    def __init__(
        self,
        *,
        resolve: Resolve = resolved,
        allowed: Callable[[str], bool] = is_public,
        tls: ssl.SSLContext | None = None,
        max_fetches: int = MAX_FETCHES,
        connect_seconds: float = CONNECT_SECONDS,
        total_seconds: float = TOTAL_SECONDS,
        max_bytes: int = MAX_IMAGE_BYTES,
    ) -> None:
        self._resolve = resolve
        self._allowed = allowed
        self._tls = tls
        self._slots = asyncio.Semaphore(max_fetches)
        self._total_seconds = total_seconds
        self._timeout = httpx2.Timeout(total_seconds, connect=connect_seconds)
        self._max_bytes = max_bytes

    async def fetch_all(self, params_by_url: Mapping[str, str]) -> dict[str, bytes]:
        """The bytes behind each URL. Raises as `fetch`; the first that fails ends the others."""
        budget = _Budget(MAX_REMOTE_BYTES)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = {
                    url: group.create_task(self.fetch(url, param, budget))
                    for url, param in params_by_url.items()
                }
        except* (InvalidBodyError, OverloadedError) as failed:
            raise _first(failed) from None
        return {url: task.result() for url, task in tasks.items()}

    async def fetch(self, url: str, param: str, budget: _Budget | None = None) -> bytes:
        """The bytes of the image behind `url`; `param` names the field in errors.

        Raises InvalidBodyError for a URL that is not to be fetched and for one that gives no image in time,
        OverloadedError where too many wait for their turn.
        """
        try:
            async with asyncio.timeout(self._total_seconds):
                await self._slots.acquire()
        except TimeoutError:
            raise OverloadedError("Too many images are being fetched.", retry_after_s=5.0) from None
        try:
            async with asyncio.timeout(self._total_seconds):
                return await self._followed(url, budget or _Budget(self._max_bytes))
        except TimeoutError:
            _blame(param, f"gave no whole image within {self._total_seconds:g} seconds.", _FIX)
        except RefusedUrl as refused:
            _blame(param, f"{refused}.", _FIX)
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError, ValueError):
            _blame(param, "could not be fetched: the server did not answer as a web server does.", _FIX)
        finally:
            self._slots.release()

    async def _followed(self, url: str, budget: _Budget) -> bytes:
        address = parse_url(url)
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._hop(address, budget)
            if isinstance(answer, bytes):
                return answer
            # Joined text is parsed like any other: what urljoin makes of it decides nothing.
            after = parse_url(urljoin(address.url, answer.location))
            if (address.scheme, after.scheme) == ("https", "http"):
                raise RefusedUrl("leads from https to http")
            address = after
        raise RefusedUrl(f"was redirected more than {MAX_REDIRECTS} times")

    async def _hop(self, address: Address, budget: _Budget) -> bytes | _Redirect:
        """One request, to the first of the checked IP addresses that takes a connection."""
        pinned = await self._checked(address)
        for number, ip in enumerate(pinned, 1):
            try:
                return await self._asked(address, ip, budget)
            except (httpx2.ConnectError, httpx2.ConnectTimeout):
                if number == len(pinned):
                    raise
        raise AssertionError("no address to try")

    async def _checked(self, address: Address) -> list[str]:
        """IP addresses to connect to. One that is not public condemns the name: honest names have none."""
        try:
            literal = str(ipaddress.ip_address(address.host))
        except ValueError:
            try:
                ips = await self._resolve(address.host, address.port)
            except (OSError, UnicodeError):
                ips = []
        else:
            ips = [literal]
        # The same words for a name that is unknown: which names exist inside is nobody's business.
        if not ips or not all(map(self._allowed, ips)):
            raise RefusedUrl("does not lead to a public address")
        return ips[:MAX_ADDRESSES_TRIED]

    async def _asked(self, address: Address, ip: str, budget: _Budget) -> bytes | _Redirect:
        target = httpx2.URL(
            scheme=address.scheme, host=ip, port=address.port, raw_path=address.target.encode()
        )
        tls: ssl.SSLContext = self._tls if self._tls is not None else await asyncio.to_thread(_tls)
        # A client each: no cookie, and no connection that was opened for another name, is used again.
        async with (
            httpx2.AsyncClient(
                verify=tls, trust_env=False, timeout=self._timeout, follow_redirects=False
            ) as client,
            client.stream(
                "GET",
                target,
                headers={
                    "Host": address.netloc,
                    "User-Agent": "ayllu",
                    "Accept": "image/*",
                    "Accept-Encoding": "identity",
                    "Connection": "close",
                },
                extensions={"sni_hostname": address.host},
            ) as response,
        ):
            if response.status_code in _REDIRECTS:
                return _Redirect(response.headers.get("location", ""))
            self._require_image(response)
            return await self._read(response, budget)

    def _require_image(self, response: httpx2.Response) -> None:
        if response.status_code != 200:
            raise RefusedUrl(f"was answered with status {response.status_code}")
        kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
        if not kind.startswith("image/"):
            raise RefusedUrl("is no image, by its content type")
        # Bytes that unpack to more than was sent would have to be unpacked to be counted.
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise RefusedUrl("was answered compressed, which was not asked for")
        length = response.headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > self._max_bytes:
            raise self._too_large()

    async def _read(self, response: httpx2.Response, budget: _Budget) -> bytes:
        data = bytearray()
        async for piece in response.aiter_raw():
            if len(data) + len(piece) > self._max_bytes:
                raise self._too_large()
            budget.take(len(piece))
            data += piece
        return bytes(data)

    def _too_large(self) -> RefusedUrl:
        return RefusedUrl(f"has more than {self._max_bytes:,} bytes")


@dataclass(frozen=True)
class _Redirect:
    location: str


class _Budget:
    """Bytes that the images of one request may still have."""

    def __init__(self, left: int) -> None:
        self._left = left

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise RefusedUrl("makes the request's images too large together")


_FIX = "Check the URL, or put the image into the request (data:image/png;base64,…)."
_FETCHERS: WeakKeyDictionary[asyncio.AbstractEventLoop, ImageFetcher] = WeakKeyDictionary()


def _fetcher_of_loop() -> ImageFetcher:
    loop = asyncio.get_running_loop()
    if loop not in _FETCHERS:
        _FETCHERS[loop] = ImageFetcher()
    return _FETCHERS[loop]


@functools.cache
def _tls() -> ssl.SSLContext:
    return httpx2.create_ssl_context(trust_env=False)


def _first(failed: BaseExceptionGroup[Any]) -> BaseException:
    error: BaseException = failed
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def _blame(param: str, problem: str, fix: str) -> NoReturn:
    raise InvalidBodyError(f"{param} {problem}", fix, param=param, code="invalid_image_url")
