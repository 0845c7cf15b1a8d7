"""The line to a remote server: one background thread with an event loop, on which all requests of an engine
are coroutines, and one HTTP client that they share.

One thread serves hundreds of streams, and a request is ended at once by cancelling its coroutine, even while
the server is silent; with a thread per request, a blocked read could only be waited for.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import random
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

import httpx2

from ayllu.engine.remote.endpoint import RemoteEndpoint
from ayllu.engine.remote.errors import (
    RETRIED_STATUSES,
    WorthRetrying,
    bare,
    error_of_answer,
    error_of_transport,
    retry_after_s,
)
from ayllu.errors import AylluError, EngineUnavailableError, RemoteEngineError

Result = TypeVar("Result")

MAX_ERROR_BYTES = 64 << 10
_ERROR_PATIENCE_S = 10.0
_CLOSING_PATIENCE_S = 5.0


class RemoteLine:
    """Runs coroutines that speak to one endpoint. Every public method but `attempts` and `response` may be
    called from any thread."""

    def __init__(self, endpoint: RemoteEndpoint) -> None:
        self._endpoint = endpoint
        self._client = _client(endpoint)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._lock = threading.Lock()
        self._closed = False
        self._closing: asyncio.Task[None] | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="ayllu-remote-engine", daemon=True)
        self._thread.start()

    def start(self, work: Coroutine[Any, Any, None], ended: Callable[[asyncio.Task[None]], None]) -> Running:
        """Run `work` in the background; `ended` is called with its task however it ends. Raises
        EngineUnavailableError when the line is closed."""
        running = Running(self._loop)

        def begin() -> None:
            running.task = self._begin(work)
            running.task.add_done_callback(ended)

        self._schedule(begin, work)
        return running

    def call(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Run `work` and wait for what it returns. Raises what it raises, and EngineUnavailableError when the
        line is closed meanwhile or this is the line's own thread, which must not wait for itself."""
        if self.is_own_thread:
            work.close()
            raise EngineUnavailableError(
                "A remote engine was asked to wait inside its own delivery of an event.",
                "Ask from another thread.",
            )
        future: concurrent.futures.Future[Result] = concurrent.futures.Future()

        def ended(task: asyncio.Task[Result]) -> None:
            failure = closed() if task.cancelled() else task.exception()
            if failure is not None:
                future.set_exception(bare(failure))
            else:
                future.set_result(task.result())

        self._schedule(lambda: self._begin(work).add_done_callback(ended), work)
        return future.result()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller runs on the line's thread."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Cancel all work, close the connections and end the thread. Idempotent."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._loop.call_soon_threadsafe(self._begin_closing)
        if not self.is_own_thread:
            self._thread.join()

    def abandon(self) -> None:
        """As `close`, but without waiting or taking a lock: for the garbage collector, which may run in a
        thread that holds it."""
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._begin_closing)

    async def attempts(
        self, once: Callable[[], Awaitable[Result]], may_retry: Callable[[], bool] = lambda: True
    ) -> Result:
        """What `once` returns, tried again after WorthRetrying, while `may_retry`, as often and as patiently
        as the endpoint says."""
        endpoint = self._endpoint
        for attempt in range(endpoint.retries + 1):
            try:
                return await once()
            except WorthRetrying as failure:
                if attempt == endpoint.retries or not may_retry():
                    raise failure.error from None
                pause = endpoint.backoff_s * 2**attempt * random.uniform(0.5, 1.0)
                if failure.pause_s is not None:
                    pause = max(pause, failure.pause_s)
            await asyncio.sleep(min(pause, endpoint.longest_pause_s))
        raise AssertionError("unreachable: the last attempt returns or raises")

    @contextlib.asynccontextmanager
    async def response(
        self, path: str, body: bytes | None = None
    ) -> AsyncIterator[tuple[httpx2.Response, AsyncIterator[bytes]]]:
        """An open answer of status 200 and its bytes as they come; POST with a body, GET without.

        Raises AylluError or WorthRetrying, also for what breaks while the bytes are read.
        """
        endpoint = self._endpoint
        try:
            async with self._client.stream(
                "GET" if body is None else "POST",
                endpoint.url(path),
                content=body,
                headers=endpoint.request_headers(),
            ) as response:
                if response.status_code != 200:
                    raise await _refusal(endpoint, response)
                async with contextlib.aclosing(response.aiter_bytes()) as pieces:
                    yield response, pieces
        except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError, OSError) as error:
            raise error_of_transport(endpoint, error) from None

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_forever()
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        finally:
            self._loop.close()

    def _schedule(self, begin: Callable[[], object], work: Coroutine[Any, Any, Any]) -> None:
        # Under the lock, what is scheduled comes before the closing, which ends everything begun until then.
        with self._lock:
            if not self._closed:
                self._loop.call_soon_threadsafe(begin)
                return
        work.close()
        raise closed()

    def _begin(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        task = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _begin_closing(self) -> None:
        if self._closing is None:
            self._closing = self._loop.create_task(self._close())

    async def _close(self) -> None:
        try:
            async with asyncio.timeout(_CLOSING_PATIENCE_S):
                for task in self._tasks:
                    task.cancel()
                await asyncio.gather(*self._tasks, return_exceptions=True)
                await self._client.aclose()
        except TimeoutError:
            pass  # a connection that cannot even be closed goes with the process
        finally:
            self._loop.stop()


class Running:
    """A running coroutine, to be cancelled from any thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self.task: asyncio.Task[None] | None = None

    def cancel(self) -> None:
        """End it soon. Does nothing once the line is closed."""
        with contextlib.suppress(RuntimeError):
            # In order: the loop has made the task when it comes to this.
            self._loop.call_soon_threadsafe(self._cancel)

    def _cancel(self) -> None:
        if self.task is not None:
            self.task.cancel()


async def read_all(pieces: AsyncIterator[bytes], limit: int) -> bytes | None:
    """All bytes of an answer, or None when they are more than `limit`."""
    found = bytearray()
    async for piece in pieces:
        found += piece
        if len(found) > limit:
            return None
    return bytes(found)


def closed() -> EngineUnavailableError:
    """What requests get that a closing engine leaves open."""
    return EngineUnavailableError("The engine is closed.", "Open another one.")


async def _refusal(endpoint: RemoteEndpoint, response: httpx2.Response) -> AylluError | WorthRetrying:
    """What an answer of another status than 200 means, in the server's own words as far as they come."""
    body = bytearray()
    with contextlib.suppress(TimeoutError, httpx2.HTTPError):
        async with asyncio.timeout(_ERROR_PATIENCE_S):
            async with contextlib.aclosing(response.aiter_bytes()) as pieces:
                async for piece in pieces:
                    body += piece
                    if len(body) >= MAX_ERROR_BYTES:
                        break
    status = response.status_code
    error = error_of_answer(endpoint, status, response.headers, bytes(body[:MAX_ERROR_BYTES]))
    if status in RETRIED_STATUSES and error.http_status != 400:
        return WorthRetrying(error, retry_after_s(response.headers))
    return error


def _client(endpoint: RemoteEndpoint) -> httpx2.AsyncClient:
    timeout = httpx2.Timeout(endpoint.read_timeout_s, connect=endpoint.connect_timeout_s)
    try:
        # Proxies and certificates come from the environment, as elsewhere in ayllu, but what is meant for
        # this machine does not leave it.
        return httpx2.AsyncClient(timeout=timeout, follow_redirects=False, trust_env=not endpoint.is_loopback)
    except (OSError, ValueError, httpx2.InvalidURL) as error:
        names = ("SSL_CERT_FILE", "SSL_CERT_DIR", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY")
        named = [name for name in os.environ if name.upper() in names and os.environ[name]]
        settings = " or ".join(named) or "the system's network settings"
        raise RemoteEngineError(
            f"No connection can be made with {settings} as set ({type(error).__name__}).",
            f"Correct {settings}.",
        ) from None
