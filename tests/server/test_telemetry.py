"""Traces: sent to a collector where one is set, nothing without, and never at a request's cost."""

from __future__ import annotations

import asyncio
import http.server
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from ayllu.errors import ContextOverflowError, MissingExtraError, RequestFailedError, UsageError
from ayllu.server import telemetry as module
from ayllu.server.telemetry import Telemetry
from ayllu.settings import Settings

TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = "b7ad6b7169203331"


class Collector:
    """An OTLP collector on loopback that keeps the spans it gets."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.bodies = b""
        collector = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.take(self.path, body, self.headers.get("content-encoding"))
                self.send_response(200)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", "0")
                self.end_headers()

            def log_message(self, *_: object) -> None:
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))
        self._thread.start()
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"

    def take(self, path: str, body: bytes, encoding: str | None) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        assert encoding is None
        self.paths.append(path)
        self.bodies += body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append({one.key: one.value.string_value for one in resource.resource.attributes})
            for scope in resource.scope_spans:
                self.spans += scope.spans

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    made = Collector()
    yield made
    made.close()


def attributes(span: Any) -> dict[str, Any]:
    """A span's attributes as plain values."""
    found = {}
    for one in span.attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        found[one.key] = [each.string_value for each in value.values] if kind == "array_value" else value
    return found


def traces(address: str) -> Telemetry:
    return Telemetry.of(Settings(otel_endpoint=address))


def test_a_request_and_its_call_arrive_as_two_spans_of_the_callers_trace(collector: Collector) -> None:
    telemetry = traces(collector.address)
    headers = {"traceparent": f"00-{TRACE}-{PARENT}-01", "authorization": "Bearer hidden-in-headers"}
    with telemetry.request("POST", headers) as request:
        with telemetry.chat("tiny", max_tokens=64, answers=2) as chat:
            chat.ended(prompt_tokens=9, new_tokens=5, cached_tokens=4, finish_reasons=["stop", "length"])
        request.ended("/v1/chat/completions", 200)
    telemetry.close()

    assert set(collector.paths) == {"/v1/traces"}
    assert collector.resources[0]["service.name"] == "ayllu"
    by_name = {span.name: span for span in collector.spans}
    server, call = by_name["POST /v1/chat/completions"], by_name["chat tiny"]
    assert server.trace_id.hex() == call.trace_id.hex() == TRACE
    assert server.parent_span_id.hex() == PARENT and call.parent_span_id == server.span_id
    assert attributes(server) == {
        "http.request.method": "POST",
        "http.route": "/v1/chat/completions",
        "http.response.status_code": 200,
    }
    assert attributes(call) == {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "ayllu",
        "gen_ai.request.model": "tiny",
        "gen_ai.request.max_tokens": 64,
        "gen_ai.request.choice.count": 2,
        "gen_ai.usage.input_tokens": 9,
        "gen_ai.usage.output_tokens": 5,
        "gen_ai.usage.cache_read.input_tokens": 4,
        "gen_ai.response.finish_reasons": ["stop", "length"],
    }
    assert b"hidden-in-headers" not in collector.bodies


def test_errors_are_told_by_their_class_and_never_by_their_text(collector: Collector) -> None:
    telemetry = traces(collector.address)
    for error in (
        RequestFailedError("quotes the prompt"),
        ContextOverflowError("quotes the prompt"),
        ValueError("quotes the prompt"),
    ):
        with (
            pytest.raises(type(error)),
            telemetry.request("POST", {}) as request,
            telemetry.chat(type(error).__name__),
        ):
            request.ended("/v1/responses", 500)
            raise error
    telemetry.close()
    calls = {span.name: span for span in collector.spans if span.name.startswith("chat ")}
    for name, is_error in (
        ("RequestFailedError", True),
        ("ContextOverflowError", False),
        ("ValueError", True),
    ):
        span = calls[f"chat {name}"]
        assert attributes(span)["error.type"] == name
        assert (span.status.code == 2) is is_error, "the caller's mistake is not the server's failure"
    assert b"quotes the prompt" not in collector.bodies
    assert not any(span.events for span in collector.spans)


def test_spans_nest_by_task_though_streams_interleave(collector: Collector) -> None:
    """A stream is a generator that may be closed in another task than it was begun in."""
    telemetry = traces(collector.address)

    async def stream(number: int) -> Any:
        with telemetry.chat(f"m{number}"):
            for _ in range(3):
                await asyncio.sleep(0)
                yield number

    async def serve(number: int) -> Any:
        with telemetry.request("POST", {}) as request:
            made = stream(number)
            async for _ in made:
                break
            request.ended(f"/r{number}", 200)
        return made

    async def all_of_them() -> None:
        for made in await asyncio.gather(*(serve(number) for number in range(5))):
            await asyncio.create_task(_closed(made))

    asyncio.run(all_of_them())
    telemetry.close()
    by_name = {span.name: span for span in collector.spans}
    assert len(by_name) == 10
    for number in range(5):
        assert by_name[f"chat m{number}"].parent_span_id == by_name[f"POST /r{number}"].span_id


async def _closed(stream: Any) -> None:
    await stream.aclose()


@pytest.mark.parametrize("header", ["", "nonsense", "00-zz-zz-01", f"00-{'0' * 32}-{PARENT}-01", "\x00" * 99])
def test_a_bad_traceparent_starts_a_trace_of_its_own(collector: Collector, header: str) -> None:
    telemetry = traces(collector.address)
    with telemetry.request("BREW", {"traceparent": header}) as request:
        request.ended("", 404)
    telemetry.close()
    (span,) = collector.spans
    assert span.name == "_OTHER" and span.parent_span_id == b""


def test_a_collector_that_is_down_costs_requests_nothing(
    monkeypatch: pytest.MonkeyPatch, collector: Collector
) -> None:
    monkeypatch.setattr(module, "CLOSING_S", 0.2)
    gone = Collector()
    gone.close()
    telemetry = traces(gone.address)
    start = time.process_time()
    for _ in range(3000):
        with telemetry.request("GET", {}) as request, telemetry.chat("tiny") as chat:
            chat.ended(new_tokens=1)
            request.ended("/health", 200)
    assert time.process_time() - start < 10
    telemetry.close()


def test_nothing_is_imported_and_nothing_sent_without_an_endpoint() -> None:
    code = (
        "import sys\n"
        "from ayllu.server.telemetry import Telemetry\n"
        "from ayllu.settings import Settings\n"
        "one = Telemetry.of(Settings())\n"
        "with one.request('GET', {}) as request, one.chat('tiny') as chat:\n"
        "    chat.ended(prompt_tokens=1)\n"
        "    request.ended('/health', 200)\n"
        "one.close()\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_without_the_packages_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.split(".")[0] == "opentelemetry":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'ayllu\[otel\]'"):
        traces("http://127.0.0.1:4318")


@pytest.mark.parametrize("address", ["localhost:4318", "ftp://host", "http://", "http://[", "collector"])
def test_an_address_that_is_none_is_refused(address: str) -> None:
    with pytest.raises(UsageError, match="otel_endpoint"):
        traces(address)
