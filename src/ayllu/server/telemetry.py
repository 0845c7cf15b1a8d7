"""Traces for OpenTelemetry, if an address for them is set: a span for each HTTP request, one for each call.

Without `otel_endpoint` nothing is imported and nothing is sent. Spans hold names, counts and times, never
what was asked or answered. A thread of their own sends them: a collector that is down costs no request.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

from ayllu import __version__
from ayllu.errors import AylluError, MissingExtraError, UsageError
from ayllu.settings import Settings

EXTRA = "otel"
QUEUED_SPANS = 2_048
EXPORT_TIMEOUT_S = 5.0
CLOSING_S = 3.0
MOST_NAME_CHARACTERS = 200

# OpenTelemetry's names for what we tell. Those of GenAI are not final there: this is their one place.
METHOD = "http.request.method"
ROUTE = "http.route"
STATUS = "http.response.status_code"
ERROR = "error.type"
OPERATION = "gen_ai.operation.name"
PROVIDER = "gen_ai.provider.name"
MODEL = "gen_ai.request.model"
ANSWERS = "gen_ai.request.choice.count"
MOST_TOKENS = "gen_ai.request.max_tokens"
REASONS = "gen_ai.response.finish_reasons"
TOKENS_READ = "gen_ai.usage.input_tokens"
TOKENS_MADE = "gen_ai.usage.output_tokens"
TOKENS_CACHED = "gen_ai.usage.cache_read.input_tokens"

METHODS = frozenset(("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "CONNECT", "TRACE"))


class RequestSpan:
    """An HTTP request under way. This one tells nobody; `_RecordedRequest` does."""

    def ended(self, route: str, status: int) -> None:
        """Its response is complete. route: the template."""


class ChatSpan:
    """A call to a model under way. This one tells nobody; `_RecordedChat` does."""

    def ended(
        self,
        *,
        prompt_tokens: int = 0,
        new_tokens: int = 0,
        cached_tokens: int = 0,
        finish_reasons: Sequence[str] = (),
    ) -> None:
        """It is complete."""


class Telemetry:
    """Traces that go nowhere. `of` makes one that sends them where the settings ask for it."""

    @staticmethod
    def of(settings: Settings) -> Telemetry:
        """As the settings say. MissingExtraError: the packages are missing; UsageError: a bad address."""
        return Telemetry() if settings.otel_endpoint is None else _Recorded(settings.otel_endpoint)

    @contextlib.contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[RequestSpan]:
        """A request, as part of the caller's trace if its `traceparent` header (small letters) names one."""
        yield RequestSpan()

    @contextlib.contextmanager
    def chat(
        self,
        model: str,
        *,
        operation: str = "chat",
        max_tokens: int | None = None,
        answers: int = 1,
    ) -> Iterator[ChatSpan]:
        """A call to a model, as part of the request it came with. operation: chat, text_completion or
        embeddings."""
        yield ChatSpan()

    def close(self) -> None:
        """Send what is still here, if that is quick."""


class _RecordedRequest(RequestSpan):
    def __init__(self, span: Any, method: str) -> None:
        self._span, self._method = span, method

    def ended(self, route: str, status: int) -> None:
        if route:
            self._span.update_name(f"{self._method} {route}")
            self._span.set_attribute(ROUTE, route)
        if status:
            self._span.set_attribute(STATUS, status)
        if status >= 500:
            _mark_failed(self._span, str(status))


class _RecordedChat(ChatSpan):
    def __init__(self, span: Any) -> None:
        self._span = span

    def ended(
        self,
        *,
        prompt_tokens: int = 0,
        new_tokens: int = 0,
        cached_tokens: int = 0,
        finish_reasons: Sequence[str] = (),
    ) -> None:
        self._span.set_attributes(
            {TOKENS_READ: prompt_tokens, TOKENS_MADE: new_tokens, TOKENS_CACHED: cached_tokens}
        )
        if finish_reasons:
            self._span.set_attribute(REASONS, list(finish_reasons))


class _Recorded(Telemetry):
    def __init__(self, endpoint: str) -> None:
        address = _traces_address(endpoint)
        try:
            from opentelemetry import trace
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise MissingExtraError("otel_endpoint", EXTRA) from error
        self._trace = trace
        self._propagator = TraceContextTextMapPropagator()
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": "ayllu", "service.version": __version__}),
            shutdown_on_exit=False,  # its exit handler would wait for a collector that is down
        )
        exporter = OTLPSpanExporter(endpoint=address, timeout=EXPORT_TIMEOUT_S)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, max_queue_size=QUEUED_SPANS))
        self._tracer = self._provider.get_tracer("ayllu", __version__)

    @contextlib.contextmanager
    def request(self, method: str, headers: Mapping[str, str]) -> Iterator[RequestSpan]:
        method = method if method in METHODS else "_OTHER"
        span = self._tracer.start_span(
            method,
            context=self._propagator.extract(headers),
            kind=self._trace.SpanKind.SERVER,
            attributes={METHOD: method},
        )
        current = self._trace.use_span(span, record_exception=False, set_status_on_exception=False)
        with current, _ending(span):
            yield _RecordedRequest(span, method)

    @contextlib.contextmanager
    def chat(
        self,
        model: str,
        *,
        operation: str = "chat",
        max_tokens: int | None = None,
        answers: int = 1,
    ) -> Iterator[ChatSpan]:
        model = model[:MOST_NAME_CHARACTERS]
        attributes: dict[str, Any] = {
            OPERATION: operation,
            PROVIDER: "ayllu",
            MODEL: model,
        }
        if max_tokens is not None:
            attributes[MOST_TOKENS] = max_tokens
        if answers != 1:
            attributes[ANSWERS] = answers
        # Not made the current span: a stream may be left in another context than it was entered in.
        span = self._tracer.start_span(
            f"{operation} {model}", kind=self._trace.SpanKind.INTERNAL, attributes=attributes
        )
        with _ending(span):
            yield _RecordedChat(span)

    def close(self) -> None:
        # It may wait for a collector long past its own timeout, and is told to wait no longer than this.
        closing = threading.Thread(target=self._provider.shutdown, name="ayllu-otel-close", daemon=True)
        closing.start()
        closing.join(CLOSING_S)


@contextlib.contextmanager
def _ending(span: Any) -> Iterator[None]:
    """End the span; of an exception it keeps the class alone, as messages may quote what was asked."""
    try:
        yield
    except AylluError as error:
        _mark_failed(span, type(error).__name__, is_ours=error.http_status >= 500)
        raise
    except Exception as error:
        _mark_failed(span, type(error).__name__)
        raise
    finally:
        span.end()


def _mark_failed(span: Any, what: str, *, is_ours: bool = True) -> None:
    from opentelemetry.trace import Status, StatusCode

    span.set_attribute(ERROR, what)
    if is_ours:
        span.set_status(Status(StatusCode.ERROR))


def _traces_address(endpoint: str) -> str:
    """Where spans go: the endpoint, and OTLP's own path where it names none."""
    try:
        parts = urlsplit(endpoint)
    except ValueError:
        parts = urlsplit("")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise UsageError(
            "otel_endpoint is no address of a collector.", "Set it to http(s)://HOST:PORT, such as port 4318."
        )
    return endpoint if parts.path not in ("", "/") else endpoint.rstrip("/") + "/v1/traces"
