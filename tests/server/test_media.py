"""Image URLs: nothing but public addresses is ever connected to, whatever is written, resolved or redirected.

A canary listens on the loopback and counts connections. The hostile cases use the fetcher as it is, with a
resolver of their own; the honest ones are allowed one loopback address, as there is no internet to ask.
"""

from __future__ import annotations

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ayllu.engine.openai.body import InvalidBodyError
from ayllu.errors import OverloadedError
from ayllu.server import media
from ayllu.server.media import ImageFetcher, ImagePlace, collect_images, image_places
from ayllu.server.public_url import RefusedUrl, is_public, parse_url

PNG = b"\x89PNG\r\n\x1a\n and so on"


@dataclass(frozen=True)
class Allowing:
    remote_images: bool = True


@dataclass
class Canary:
    """A server on 127.0.0.1 (and ::1): what it was asked, and what it answers."""

    port: int = 0
    connections: int = 0
    requests: list[bytes] = field(default_factory=list)
    answer: Callable[[bytes], bytes | Awaitable[bytes]] = lambda _: image()

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            self.requests.append(request)
            said = self.answer(request)
            writer.write(said if isinstance(said, bytes) else await said)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def canary(
    answer: Callable[[bytes], Any] | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[Canary]:
    """A canary that is running."""
    bird = Canary()
    if answer is not None:
        bird.answer = answer
    server = await asyncio.start_server(bird.serve, ["127.0.0.1", "::1"], 0, ssl=tls)
    ports = [socket.getsockname()[:2] for socket in server.sockets]
    bird.port = next(port for host, port in ports if host == "127.0.0.1")
    try:
        yield bird
    finally:
        server.close()
        await server.wait_closed()


def image(data: bytes = PNG, kind: str = "image/png", more: str = "") -> bytes:
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n{more}\r\n"
    return head.encode() + data


def redirect(location: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Found\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()


def resolver(*answers: list[str]) -> Callable[[str, int], Awaitable[list[str]]]:
    """Gives the answers one after the other, the last for ever."""
    left = list(answers)

    async def resolve(host: str, port: int) -> list[str]:
        return left.pop(0) if len(left) > 1 else left[0]

    return resolve


def local(answers: list[str] | None = None, **settings: Any) -> ImageFetcher:
    """A fetcher that may connect to 127.0.0.1, which every name resolves to."""
    resolve = resolver(answers or ["127.0.0.1"])
    return ImageFetcher(resolve=resolve, allowed=lambda ip: ip == "127.0.0.1", **settings)


async def refusal(fetcher: ImageFetcher, url: str) -> InvalidBodyError:
    with pytest.raises(InvalidBodyError) as caught:
        await fetcher.fetch(url, "messages.0.content.0.image_url.url")
    error = caught.value
    assert error.param == "messages.0.content.0.image_url.url" and error.code == "invalid_image_url"
    require_discreet(str(error))
    return error


def require_discreet(text: str) -> None:
    """Errors tell no address, no path, no number of memory."""
    assert not re.search(r"\d+\.\d+\.\d+\.\d+|::|0x|127|169|[/\\](?!png)", text), text


# What stands in the URL. {port} is the canary's.
HOSTILE_URLS = [
    "http://169.254.169.254/latest/meta-data/",
    "http://127.0.0.1:{port}/",
    "http://[::1]:{port}/",
    "http://[::ffff:127.0.0.1]:{port}/",
    "http://[::ffff:7f00:1]:{port}/",
    "http://[::127.0.0.1]:{port}/",
    "http://[64:ff9b::127.0.0.1]:{port}/",
    "http://[64:ff9b:1::127.0.0.1]:{port}/",
    "http://[2002:7f00:1::]:{port}/",
    "http://[2001:0:7f00:1::]:{port}/",
    "http://[fe80::1%25lo]:{port}/",
    "http://[fe80::1%lo]:{port}/",
    "http://[fd00::1]:{port}/",
    "http://[ff02::1]:{port}/",
    "http://[::]:{port}/",
    "http://0x7f000001:{port}/",
    "http://0x7f.0.0.1:{port}/",
    "http://2130706433:{port}/",
    "http://017700000001:{port}/",
    "http://0177.0.0.1:{port}/",
    "http://127.1:{port}/",
    "http://127.0.0.1.:{port}/",
    "http://0.0.0.0:{port}/",
    "http://0:{port}/",
    "http://10.0.0.1:{port}/",
    "http://100.64.0.1:{port}/",
    "http://192.168.0.1:{port}/",
    "http://224.0.0.1:{port}/",
    "http://255.255.255.255:{port}/",
    "http://127。0。0。1:{port}/",
    "http://１２７.0.0.1:{port}/",
    "http://ⓛocalhost:{port}/",
    "http://localhost:{port}/",
    "http://inside.example:{port}/",
    "http://example.org@127.0.0.1:{port}/",
    "http://127.0.0.1:{port}@example.org/",
    "http://user:pass@example.org:{port}/",
    "http://example.org\\@127.0.0.1:{port}/",
    "http:\\\\127.0.0.1:{port}\\",
    "http://127.0.0.1\t:{port}/",
    "http://127.0.0.1:{port}/\r\nHost: x",
    " http://127.0.0.1:{port}/",
    "http://127.0.0.1%2f:{port}/",
    "http://example.org:{port}:{port}/",
    "http://example.org:0/",
    "http://example.org:99999/",
    "http://:{port}/",
    "http:///127.0.0.1:{port}/",
    "http:127.0.0.1:{port}/",
    "//127.0.0.1:{port}/",
    "file:///etc/passwd",
    "gopher://127.0.0.1:{port}/_x",
    "ftp://127.0.0.1:{port}/",
    "jar:http://127.0.0.1:{port}!/",
    "unix:///var/run/docker.sock",
    "http+unix://%2Fvar%2Frun%2Fdocker.sock/",
    "javascript:fetch('http://127.0.0.1:{port}')",
    "http://" + "a." * 200 + "example:{port}/",
    "http://-a.example:{port}/",
    "http://a..example:{port}/",
    "http://example.org/" + "a" * 5000,
]


def test_no_hostile_url_reaches_the_loopback() -> None:
    async def run() -> int:
        async with canary() as bird:
            # Whatever the name, this resolver leads home: only what is checked can keep the fetcher away.
            fetcher = ImageFetcher(resolve=resolver(["127.0.0.1", "::1"]))
            for url in HOSTILE_URLS:
                await refusal(fetcher, url.replace("{port}", str(bird.port)))
            return bird.connections

    assert len(HOSTILE_URLS) >= 45
    assert asyncio.run(run()) == 0


@pytest.mark.parametrize(
    "answer",
    [
        ["127.0.0.1"],
        ["93.184.215.14", "127.0.0.1"],
        ["::1", "2606:2800:21f:cb07:6820:80da:af6b:8b2c"],
        ["::ffff:127.0.0.1"],
        ["fe80::1%lo"],
        ["0.0.0.0"],
        ["not an address"],
        [],
    ],
)
def test_one_address_that_is_not_public_condemns_the_name(answer: list[str]) -> None:
    async def run() -> int:
        async with canary() as bird:
            error = await refusal(ImageFetcher(resolve=resolver(answer)), f"http://a.example:{bird.port}/")
            assert "public address" in error.problem
            return bird.connections

    assert asyncio.run(run()) == 0


def test_a_name_that_is_unknown_and_one_that_is_private_are_told_in_the_same_words() -> None:
    async def unknown(host: str, port: int) -> list[str]:
        raise OSError("Name or service not known")

    async def run() -> tuple[str, str]:
        first = await refusal(ImageFetcher(resolve=unknown), "http://a.example/")
        second = await refusal(ImageFetcher(resolve=resolver(["10.0.0.7"])), "http://b.example/")
        return str(first), str(second)

    first, second = asyncio.run(run())
    assert first == second


def test_a_name_that_is_resolved_differently_the_second_time_gains_nothing() -> None:
    """The address that was checked is the one connected to: nothing resolves again behind the check."""

    async def run() -> None:
        async with canary() as bird:
            asked: list[str] = []

            async def rebinding(host: str, port: int) -> list[str]:
                asked.append(host)
                return ["127.0.0.1"] if len(asked) == 1 else ["10.9.8.7"]

            fetcher = ImageFetcher(resolve=rebinding, allowed=lambda ip: ip == "127.0.0.1")
            assert await fetcher.fetch(f"http://no-such-name.invalid:{bird.port}/a?b=c", "p") == PNG
            assert asked == ["no-such-name.invalid"]
            head = bird.requests[0].decode()
            assert head.startswith("GET /a?b=c HTTP/1.1\r\n")
            assert f"\r\nhost: no-such-name.invalid:{bird.port}\r\n" in head.lower()
            # A redirect to the same name resolves it again, and the new answer is judged again.
            bird.answer = lambda _: redirect("/again")
            asked.clear()
            assert "public address" in str(await refusal(fetcher, f"http://x.example:{bird.port}/"))
            assert bird.connections == 2

    asyncio.run(run())


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.2:{port}/",
        "http://[::1]:{port}/",
        "//127.0.0.2:{port}/",
        "http://2130706434:{port}/",
        "http://user@public.example:{port}/",
        "file:///etc/passwd",
        "gopher://public.example:{port}/",
        "\\\\127.0.0.2:{port}\\",
        "http://[::ffff:127.0.0.2]:{port}/",
        "",
    ],
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_judged_like_any_url(location: str, status: int) -> None:
    async def run() -> None:
        async with canary() as target, canary() as bird:
            bird.answer = lambda _: redirect(location.replace("{port}", str(target.port)), status)
            await refusal(local(), f"http://public.example:{bird.port}/")
            assert target.connections == 0
            assert bird.connections <= media.MAX_REDIRECTS + 1

    asyncio.run(run())


def test_three_redirects_are_followed_and_a_fourth_is_not() -> None:
    async def run() -> None:
        async with canary() as bird:

            def answer(request: bytes) -> bytes:
                left = int(request.split(b"?")[1].split(b" ")[0])
                cookie = "Set-Cookie: a=b\r\n"
                said = redirect(f"?{left - 1}") if left else image()
                return said.replace(b"\r\n\r\n", f"\r\n{cookie}\r\n".encode(), 1)

            bird.answer = answer
            assert await local().fetch(f"http://a.example:{bird.port}/?3", "p") == PNG
            assert "more than 3 times" in str(await refusal(local(), f"http://a.example:{bird.port}/?4"))
            for request in bird.requests:
                assert b"cookie" not in request.lower() and b"authorization" not in request.lower()

    asyncio.run(run())


def test_a_redirect_does_not_leave_https() -> None:
    assert parse_url("HTTPS://A.example").url == "https://a.example/"

    class Downgrading(ImageFetcher):
        async def _asked(self, *_: Any) -> Any:
            return media._Redirect("http://a.example/")

    async def run() -> None:
        fetcher = Downgrading(resolve=resolver(["127.0.0.1"]), allowed=lambda _: True)
        assert "from https to http" in str(await refusal(fetcher, "https://a.example/"))

    asyncio.run(run())


def test_the_environments_proxies_and_credentials_are_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    async def run() -> None:
        async with canary() as proxy, canary() as bird:
            for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "all_proxy"):
                monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
            netrc = tmp_path / "netrc"
            netrc.write_text("default login me password secret\n", "utf-8")
            netrc.chmod(0o600)
            monkeypatch.setenv("NETRC", str(netrc))
            assert await local().fetch(f"http://a.example:{bird.port}/", "p") == PNG
            assert proxy.connections == 0
            assert b"authorization" not in bird.requests[0].lower()

    asyncio.run(run())


async def _never(_: bytes) -> bytes:
    await asyncio.sleep(3600)
    return b""


BAD_ANSWERS: dict[str, tuple[Callable[[bytes], Any], str]] = {
    "not an image": (lambda _: image(kind="text/html"), "content type"),
    "no type": (lambda _: b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\nx", "content type"),
    "an image of svg in disguise": (lambda _: image(kind="application/image/png"), "content type"),
    "an error": (lambda _: b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n", "status 500"),
    "nothing new": (lambda _: b"HTTP/1.1 304 Same\r\n\r\n", "status 304"),
    "a part": (lambda _: image().replace(b"200 OK", b"206 Part"), "status 206"),
    "compressed": (lambda _: image(more="Content-Encoding: gzip\r\n"), "compressed"),
    "too long by its own word": (
        lambda _: b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nContent-Length: 1000000\r\n\r\n",
        "more than 1,000 bytes",
    ),
    "longer than it says it can be": (
        lambda _: b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\n\r\n" + b"x" * 100_000,
        "more than 1,000 bytes",
    ),
    "too long in chunks": (
        lambda _: (
            b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"3e8\r\n" + b"x" * 1000 + b"\r\n" + b"1\r\nx\r\n0\r\n\r\n"
        ),
        "more than 1,000 bytes",
    ),
    "shorter than it says": (lambda _: image().replace(b"Length: ", b"Length: 9"), "web server"),
    "no HTTP": (lambda _: b"220 mail.example ESMTP\r\n", "web server"),
    "nothing": (lambda _: b"", "web server"),
    "a head without an end": (lambda _: b"HTTP/1.1 200 OK\r\n" + b"X: y\r\n" * 50_000, "web server"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_an_answer_that_is_no_image_is_an_error_that_says_so(name: str) -> None:
    answer, says = BAD_ANSWERS[name]

    async def run() -> None:
        async with canary(answer) as bird:
            error = await refusal(local(max_bytes=1000), f"http://a.example:{bird.port}/")
            assert says in str(error)

    asyncio.run(run())


def test_a_server_that_never_answers_is_given_up() -> None:
    async def run() -> None:
        async with canary(_never) as bird:
            fetcher = local(total_seconds=0.3)
            assert "no whole image within 0.3" in str(
                await refusal(fetcher, f"http://a.example:{bird.port}/")
            )

    asyncio.run(run())


def test_a_closed_port_is_told_like_any_server_that_does_not_answer() -> None:
    async def run() -> None:
        async with canary() as bird:
            port = bird.port
        assert "web server" in str(await refusal(local(), f"http://a.example:{port}/"))

    asyncio.run(run())


def test_the_next_checked_address_is_tried_where_one_takes_no_connection() -> None:
    async def run() -> None:
        async with canary() as bird:
            fetcher = ImageFetcher(
                resolve=resolver(["127.0.0.9", "127.0.0.1"]), allowed=lambda ip: ip.startswith("127.0.0.")
            )
            assert await fetcher.fetch(f"http://a.example:{bird.port}/", "p") == PNG

    asyncio.run(run())


def test_few_are_fetched_at_a_time_and_the_rest_waits_or_is_told_to() -> None:
    async def run() -> None:
        together = most = 0

        async def slow(_: bytes) -> bytes:
            nonlocal together, most
            together += 1
            most = max(most, together)
            await asyncio.sleep(0.02)
            together -= 1
            return image()

        async with canary(slow) as bird:
            urls = {f"http://a.example:{bird.port}/{n}": f"p{n}" for n in range(12)}
            found = await local(max_fetches=3).fetch_all(urls)
            assert list(found) == list(urls) and set(found.values()) == {PNG}
            assert most <= 3
            with pytest.raises(OverloadedError):
                await local(max_fetches=0, total_seconds=0.1).fetch(f"http://a.example:{bird.port}/", "p")

    asyncio.run(run())


def test_the_first_image_that_fails_ends_the_others() -> None:
    async def run() -> None:
        async with canary() as bird, canary(_never) as stuck:
            urls = {f"http://a.example:{stuck.port}/": "p0", f"ftp://a.example:{bird.port}/": "p1"}
            with pytest.raises(InvalidBodyError) as caught:
                await local(total_seconds=60).fetch_all(urls)
            assert caught.value.param == "p1"

    asyncio.run(run())


def test_the_images_of_one_request_are_bounded_together(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(media, "MAX_REMOTE_BYTES", 3 * len(PNG))
        async with canary() as bird:
            urls = [f"http://a.example:{bird.port}/{n}" for n in range(4)]
            assert len(await local().fetch_all(dict.fromkeys(urls[:3], "p"))) == 3
            with pytest.raises(InvalidBodyError, match="too large together"):
                await local().fetch_all(dict.fromkeys(urls, "p"))

    asyncio.run(run())


# Addresses and URLs by themselves.


@pytest.mark.parametrize(
    "address",
    ["8.8.8.8", "93.184.215.14", "2606:4700::1111", "64:ff9b::8.8.8.8", "::ffff:8.8.8.8", "223.255.255.254"],
)
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(address)


NOT_PUBLIC = """
0.0.0.0 0.1.2.3 10.1.2.3 100.64.0.1 100.127.255.254 127.0.0.1 127.255.255.254 169.254.169.254
172.16.0.1 172.31.255.254 192.0.0.8 192.0.2.1 192.88.99.1 192.168.1.1 198.18.0.1 198.19.255.254
198.51.100.1 203.0.113.1 224.0.0.1 239.255.255.250 240.0.0.1 255.255.255.255 :: ::1 ::7f00:1
::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:0:127.0.0.1 64:ff9b::7f00:1 64:ff9b::a00:1
64:ff9b:1::808:808 100::1 2001::1 2001:0:808:808::1 2001:10::1 2001:20::1 2001:db8::1 2002:7f00:1::1
2002:808:808::1 3fff::1 4000::1 5f00::1 fc00::1 fd12::1 fe80::1 fe80::1%1 2606:4700::1111%1 fec0::1
ff02::1 ff0e::1 1.2.3 0x7f000001 localhost 127.1
"""


@pytest.mark.parametrize("address", NOT_PUBLIC.split())
def test_every_other_address_is_not(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    ("url", "host", "port", "target"),
    [
        ("http://a.example", "a.example", 80, "/"),
        ("HTTP://A.Example:8080?x=1", "a.example", 8080, "/?x=1"),
        ("https://a.example/p%20q/?x=%2F&y=[1]#part", "a.example", 443, "/p%20q/?x=%2F&y=[1]"),
        ("https://[2606:4700::1111]:8443/", "2606:4700::1111", 8443, "/"),
        ("http://xn--bcher-kva.example/", "xn--bcher-kva.example", 80, "/"),
        ("http://8.8.8.8/a@b", "8.8.8.8", 80, "/a@b"),
        ("http://a_b.example/", "a_b.example", 80, "/"),
    ],
)
def test_plain_urls_are_read_as_they_are_written(url: str, host: str, port: int, target: str) -> None:
    read = parse_url(url)
    assert (read.host, read.port, read.target) == (host, port, target)
    assert parse_url(read.url) == read


@given(
    st.lists(st.sampled_from([*"ahtp:/\\@[]%.#?0127x\t \r\n", "http://", "127.0.0.1", "::1"])).map("".join)
)
def test_whatever_is_read_is_a_plain_host_and_reads_the_same_again(url: str) -> None:
    try:
        read = parse_url(url)
    except RefusedUrl as refused:
        require_discreet(str(refused))
        return
    assert re.fullmatch(r"[a-z0-9._-]+|[0-9a-f:.]+", read.host)
    assert read.target.startswith("/") and read.target.isascii() and not re.search(r"[\s\\#]", read.target)
    assert parse_url(read.url) == read


# Which images a body names, in each dialect.

BODIES: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    (
        {
            "messages": [
                {"role": "user", "content": "http://a/in-text"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "http://a/in-text"},
                        {"type": "image_url", "image_url": {"url": "http://a/1"}},
                        {"type": "image_url", "image_url": "http://a/2"},
                        {"type": "image_url", "image_url": {"url": "DATA:image/png;base64,AAAA"}},
                        {"type": "image_url", "image_url": {"file_id": "file-1"}},
                    ],
                },
            ],
            "tools": [{"type": "image_url", "image_url": "http://a/no"}],
        },
        [
            ("http://a/1", "messages.1.content.1.image_url.url"),
            ("http://a/2", "messages.1.content.2.image_url"),
            ("file-1", "messages.1.content.4.image_url.file_id"),
        ],
    ),
    (
        {
            "input": [
                {
                    "role": "user",
                    "content": [
                        {"type": "input_image", "image_url": "http://a/1"},
                        {"type": "input_image", "file_id": "file-2"},
                        {"type": "input_image", "image_url": None, "file_id": "file-3"},
                    ],
                },
                {
                    "type": "function_call_output",
                    "output": [{"type": "input_image", "image_url": "http://a/4"}],
                },
            ]
        },
        [
            ("http://a/1", "input.0.content.0.image_url"),
            ("file-2", "input.0.content.1.file_id"),
            ("file-3", "input.0.content.2.file_id"),
            ("http://a/4", "input.1.output.0.image_url"),
        ],
    ),
    (
        {
            "system": [{"type": "text", "text": "x"}],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image", "source": {"type": "url", "url": "http://a/1"}},
                        {"type": "image", "source": {"type": "base64", "data": "AAAA"}},
                        {"type": "image", "source": {"type": "file", "file_id": "file-2"}},
                        {
                            "type": "tool_result",
                            "content": [{"type": "image", "source": {"type": "url", "url": "http://a/3"}}],
                        },
                    ],
                },
                {
                    "role": "assistant",
                    "content": [
                        {
                            "type": "tool_use",
                            "input": [{"type": "image", "source": {"type": "url", "url": "http://a/no"}}],
                        }
                    ],
                },
            ],
        },
        [
            ("http://a/1", "messages.0.content.0.source.url"),
            ("file-2", "messages.0.content.2.source.file_id"),
            ("http://a/3", "messages.0.content.3.content.0.source.url"),
        ],
    ),
]


def places(body: dict[str, Any]) -> list[ImagePlace]:
    async def run() -> list[ImagePlace]:
        return [place async for place in image_places(body)]

    return asyncio.run(run())


@pytest.mark.parametrize(("body", "expected"), BODIES)
def test_images_are_found_where_each_dialect_has_them(
    body: dict[str, Any], expected: list[tuple[str, str]]
) -> None:
    assert [(place.name, place.param) for place in places(body)] == expected


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from(["image", "image_url", "input_image", "url", "x"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "type",
                    "content",
                    "image_url",
                    "url",
                    "source",
                    "input",
                    "messages",
                    "output",
                    "file_id",
                    "system",
                ]
            ),
            inner,
        )
    ),
    max_leaves=15,
)


@given(st.dictionaries(st.sampled_from(["messages", "input", "system"]), JSON))
def test_no_body_does_anything_but_name_images(body: dict[str, Any]) -> None:
    assert all(isinstance(place.name, str) for place in places(body))


def test_content_that_is_nested_without_end_is_not_followed() -> None:
    body: dict[str, Any] = {"type": "image_url", "image_url": "http://a/1"}
    for _ in range(90):
        body = {"content": [body]}
    assert places({"messages": [body]}) == []


def chat(*urls: str) -> dict[str, Any]:
    parts = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    return {"messages": [{"role": "user", "content": parts}]}


def test_by_default_nothing_is_fetched() -> None:
    async def run() -> None:
        async with canary() as bird:
            with pytest.raises(InvalidBodyError, match="fetches no images") as caught:
                await collect_images(
                    chat("data:image/png;base64,AAAA", f"http://a.example:{bird.port}/"),
                    Allowing(False),
                    fetcher=local(),
                )
            assert caught.value.param == "messages.0.content.1.image_url.url"
            assert bird.connections == 0
            assert await collect_images(chat("data:image/png;base64,AAAA", "file-1"), Allowing(False)) == {}

    asyncio.run(run())


def test_images_of_a_request_come_by_their_names_each_fetched_once() -> None:
    async def run() -> None:
        async def stored(name: str, param: str) -> bytes:
            return f"{name} for {param}".encode()

        async with canary() as bird:
            url = f"http://a.example:{bird.port}/1"
            found = await collect_images(chat(url, "file-7", url), Allowing(), stored, fetcher=local())
            assert found == {url: PNG, "file-7": b"file-7 for messages.0.content.1.image_url.url"}
            assert bird.connections == 1

    asyncio.run(run())


def test_more_than_sixteen_images_are_not_fetched() -> None:
    async def run() -> None:
        async with canary() as bird:
            urls = [f"http://a.example:{bird.port}/{n}" for n in range(17)]
            with pytest.raises(InvalidBodyError, match="more than 16") as caught:
                await collect_images(chat(*urls), Allowing(), fetcher=local())
            assert caught.value.param == "messages.0.content.16.image_url.url"
            assert bird.connections == 0

    asyncio.run(run())


def test_without_a_fetcher_one_serves_the_whole_event_loop() -> None:
    async def run() -> None:
        with pytest.raises(InvalidBodyError, match="public address"):
            await collect_images(chat("http://127.0.0.1:9/"), Allowing())
        first = media._fetcher_of_loop()
        assert media._fetcher_of_loop() is first

    asyncio.run(run())


@contextmanager
def certificate(folder: Path, name: str) -> Iterator[tuple[ssl.SSLContext, ssl.SSLContext]]:
    """TLS for a server called `name`, and for clients that know its certificate."""
    import subprocess

    key, cert = folder / f"{name}.key", folder / f"{name}.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-keyout", key, "-out", cert, "-days", "2", "-subj", f"/CN={name}",
         "-addext", f"subjectAltName=DNS:{name}"],
        check=True, capture_output=True,
    )  # fmt: skip
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(cert, key)
    yield server, ssl.create_default_context(cafile=str(cert))


def test_over_https_the_certificate_must_be_the_names_though_the_address_is_pinned(tmp_path: Path) -> None:
    async def run(server: ssl.SSLContext, client: ssl.SSLContext) -> None:
        async with canary(tls=server) as bird:
            fetcher = local(tls=client)
            assert await fetcher.fetch(f"https://right.example:{bird.port}/", "p") == PNG
            assert "web server" in str(await refusal(fetcher, f"https://wrong.example:{bird.port}/"))
            assert "web server" in str(await refusal(local(), f"https://right.example:{bird.port}/"))

    with certificate(tmp_path, "right.example") as (server, client):
        asyncio.run(run(server, client))
