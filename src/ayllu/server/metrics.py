"""What Prometheus reads: vLLM's names after `ayllu_`, with its labels and buckets: dashboards port over.

Times are measured here, beside the client, with the monotonic clock from a request's arrival; counts of what
the engines hold are asked of them at each scrape. Every label has a bounded set of values.
"""

from __future__ import annotations

import threading
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from ayllu import errors
from ayllu.engine.events import AnswerFinished, Done, Event, Failed, PromptScored, Started, TextDelta
from ayllu.engine.protocol import Engine, EngineStats
from ayllu.errors import AylluError
from ayllu.server.logs import lines_dropped

CONTENT_TYPE = CONTENT_TYPE_LATEST
PREFIX = "ayllu_"
MOST_MODELS = 256
MOST_HANDLERS = 512
STATS_TIMEOUT_S = 5.0
FLUSHED_TOKENS = 32
OTHER = "other"

FINISHED_REASONS = ("stop", "length", "abort")
_VLLM_REASONS = {"stop": "stop", "tool_calls": "stop", "length": "length", "cancelled": "abort"}
HTTP_METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")
REFUSALS = ("limit", "engine", "queue", OTHER)
AUTH_FAILURES = ("key", "session", "password", "link", "oidc", "forbidden", OTHER)
OUTCOMES = ("ok", "failed", "cancelled")
ERRORS = frozenset(
    name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, AylluError)
)

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_BUCKETS = (
    *(0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75),
    *(1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0),
    *(40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0, 1920.0, 7680.0),
)
ANSWER_BUCKETS = (1, 2, 5, 10, 20)
LENGTH_BUCKETS = tuple(m * 10**e for e in range(7) for m in (1, 2, 5))
HTTP_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)

_BY_REQUEST: dict[str, tuple[str, Sequence[float]]] = {
    "time_to_first_token_seconds": ("Arrival to first token.", FIRST_TOKEN_BUCKETS),
    "request_time_per_output_token_seconds": ("Time of each token after the first.", TOKEN_BUCKETS),
    "e2e_request_latency_seconds": ("Arrival to end.", REQUEST_BUCKETS),
    "request_queue_time_seconds": ("Arrival to the start of computing.", REQUEST_BUCKETS),
    "request_inference_time_seconds": ("Start of computing to end.", REQUEST_BUCKETS),
    "request_prefill_time_seconds": ("Start of computing to first token.", REQUEST_BUCKETS),
    "request_decode_time_seconds": ("First token to end.", REQUEST_BUCKETS),
    "request_prompt_tokens": ("Tokens of the prompt.", LENGTH_BUCKETS),
    "request_generation_tokens": ("Tokens of an answer.", LENGTH_BUCKETS),
    "request_params_n": ("Answers asked for.", ANSWER_BUCKETS),
    "request_params_max_tokens": ("Most tokens asked for.", LENGTH_BUCKETS),
}
_TOTALS: dict[str, tuple[str, Callable[[EngineStats], int]]] = {
    "num_preemptions": ("Sequences that gave their cache back.", lambda stats: stats.preempted),
    "prefix_cache_queries": (
        "Tokens of prompts that were looked for in the prefix cache.",
        lambda stats: stats.prompt_tokens,
    ),
    "prefix_cache_hits": (
        "Tokens of prompts that were found in the prefix cache.",
        lambda stats: stats.cached_prompt_tokens,
    ),
    "spec_decode_num_draft_tokens": ("Tokens drafted ahead.", lambda stats: stats.drafted),
    "spec_decode_num_accepted_tokens": ("Drafted tokens that were kept.", lambda stats: stats.accepted),
    "engine_steps": ("Steps the engine computed.", lambda stats: stats.steps),
    "engine_retried_steps": ("Steps that failed and were computed again.", lambda stats: stats.retried_steps),
    "engine_failed_requests": ("Requests that failed inside the engine.", lambda stats: stats.failed),
    "engine_restarts": ("Times the engine's process was started again.", lambda stats: stats.restarts),
}
_MOMENTS: dict[str, tuple[str, Callable[[EngineStats], float]]] = {
    "num_requests_running": ("Sequences being computed.", lambda stats: stats.running),
    "num_requests_waiting": ("Sequences waiting to be computed.", lambda stats: stats.waiting),
    "kv_cache_usage_perc": (
        "Share of the cache's blocks in use, 0 to 1; of the fullest kind of layer.",
        lambda stats: max(
            (
                1 - stats.blocks_free.get(kind, 0) / total
                for kind, total in stats.blocks_total.items()
                if total
            ),
            default=0.0,
        ),
    ),
}


class _BulkHistogram:
    """A histogram whose values arrive several at a time and many times a second: arrays, no locks.

    Written by the event loop alone; a scrape copies the arrays, and derives the count from the copy.
    """

    def __init__(self, name: str, description: str, bounds: Sequence[float]) -> None:
        self._name, self._description, self._bounds = name, description, tuple(bounds)
        self._by_model: dict[str, tuple[list[int], list[float]]] = {}

    def of(self, model: str) -> tuple[list[int], list[float]]:
        """Counts by bucket (the last: beyond all bounds), and the sum as a list of one."""
        found = self._by_model.get(model)
        if found is None:
            found = self._by_model[model] = ([0] * (len(self._bounds) + 1), [0.0])
        return found

    def describe(self) -> Iterable[Metric]:
        return [HistogramMetricFamily(self._name, self._description, labels=["model_name"])]

    def collect(self) -> Iterable[Metric]:
        family = HistogramMetricFamily(self._name, self._description, labels=["model_name"])
        for model, (counts, total) in list(self._by_model.items()):
            running, buckets = 0, []
            for bound, count in zip((*map(str, self._bounds), "+Inf"), list(counts), strict=True):
                running += count
                buckets.append((bound, float(running)))
            family.add_metric([model], buckets, total[0])
        yield family


class _WithoutBirthdays:
    """A registry without the `_created` samples, which double its size and which nobody asks for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [one for one in family.samples if not one.name.endswith("_created")]
            yield family


class _Engines:
    """What engines say of themselves. Totals go on where an engine starts again from nothing."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last: dict[tuple[str, str], float] = {}
        self._before: dict[tuple[str, str], float] = {}
        self._now: dict[str, EngineStats | None] = {}
        self._asked: dict[str, threading.Thread] = {}

    def update(self, model_of: Callable[[str], str], engines: Mapping[str, Engine]) -> None:
        """Ask all at once; one that does not answer in time counts as down."""
        with self._lock:
            answers: dict[str, EngineStats] = {}
            for name, engine in engines.items():
                asked = self._asked.get(name)
                if asked is None or not asked.is_alive():
                    # A daemon: an engine that never answers must not keep the program from ending.
                    self._asked[name] = asked = threading.Thread(
                        target=_ask, args=(name, engine, answers), daemon=True
                    )
                    asked.start()
            until = time.monotonic() + STATS_TIMEOUT_S
            for name in engines:
                self._asked[name].join(max(0.0, until - time.monotonic()))
            self._asked = {name: one for name, one in self._asked.items() if one.is_alive()}
            self._now = {model_of(name): answers.get(name) for name in engines}
            for model, stats in self._now.items():
                if stats is not None:
                    self._add(model, stats)

    def _add(self, model: str, stats: EngineStats) -> None:
        for name, (_, read) in _TOTALS.items():
            value, place = read(stats), (model, name)
            last = self._last.get(place, 0)
            if value < last:
                self._before[place] = self._before.get(place, 0) + last
            self._last[place] = value

    def describe(self) -> Iterable[Metric]:
        return self._families()

    def collect(self) -> Iterable[Metric]:
        up, *moments = families = self._families()
        for model, stats in self._now.items():
            up.add_metric([model], stats is not None)
            for family, (_, read) in zip(moments, _MOMENTS.values(), strict=False):
                if stats is not None:
                    family.add_metric([model], read(stats))
        by_name = {family.name.removeprefix(PREFIX): family for family in families}
        for (model, name), value in sorted(self._last.items()):
            by_name[name].add_metric([model], value + self._before.get((model, name), 0))
        return families

    @staticmethod
    def _families() -> list[GaugeMetricFamily | CounterMetricFamily]:
        def gauge(name: str, about: str) -> GaugeMetricFamily:
            return GaugeMetricFamily(PREFIX + name, about, labels=["model_name"])

        def counter(name: str, about: str) -> CounterMetricFamily:
            return CounterMetricFamily(PREFIX + name, about, labels=["model_name"])

        return [
            gauge("engine_up", "Whether the engine works."),
            *(gauge(name, about) for name, (about, _) in _MOMENTS.items()),
            *(counter(name, about) for name, (about, _) in _TOTALS.items()),
        ]


def _ask(name: str, engine: Engine, answers: dict[str, EngineStats]) -> None:
    if getattr(engine, "status", "ready") != "ready":
        return
    try:
        answers[name] = engine.stats()
    except Exception:  # an engine that cannot say how it is, is down; its own log says why
        return


@dataclass(slots=True)
class _Children:
    """The metrics of one model, looked up once."""

    prompt_tokens: Counter
    generation_tokens: Counter
    first_token: Histogram
    per_token: Histogram
    latency: Histogram
    queue: Histogram
    inference: Histogram
    prefill: Histogram
    decode: Histogram
    prompt_length: Histogram
    answer_length: Histogram
    answers: Histogram
    limits: Histogram
    finished: dict[str, Counter]
    gaps: list[int]
    gap_sum: list[float]


@dataclass(slots=True)
class Watch:
    """Measures one request. For the event loop's thread."""

    _of: _Children
    _failures: Counter
    _model: str
    _clock: Callable[[], float]
    _arrived: float
    _answers: int
    _last: dict[int, float] = field(default_factory=dict)
    _started: float | None = None
    _first: float | None = None
    _prompt_tokens: int = 0
    _counted: int = 0
    _unflushed: int = 0
    _finished: int = 0
    _ended: bool = False

    def event(self, event: Event) -> None:
        """Take the next event into account; text costs little."""
        if type(event) is TextDelta:
            now = self._clock()
            index, tokens = event.index, len(event.token_ids)
            last = self._last.get(index)
            self._last[index] = now
            if last is None:
                self._note_first(now)
            else:
                of, each = self._of, tokens or 1
                of.gaps[bisect_left(TOKEN_BUCKETS, (now - last) / each)] += each
                of.gap_sum[0] += now - last
            self._unflushed += tokens
            if self._unflushed >= FLUSHED_TOKENS:
                self._flush()
        else:
            self._note(event, self._clock())

    def _note_first(self, now: float) -> None:
        if self._first is None:
            self._first = now
            self._of.first_token.observe(now - self._arrived)

    def _flush(self) -> None:
        self._of.generation_tokens.inc(self._unflushed)
        self._counted += self._unflushed
        self._unflushed = 0

    def _note(self, event: Event, now: float) -> None:
        match event:
            case Started(prompt_tokens):
                self._started = now
                self._prompt_tokens = prompt_tokens
                self._of.prompt_tokens.inc(prompt_tokens)
                self._of.queue.observe(now - self._arrived)
            case AnswerFinished(_, reason, new_tokens):
                if new_tokens:
                    self._note_first(now)
                self._finished += 1
                self._of.finished[_VLLM_REASONS[reason]].inc()
                self._of.answer_length.observe(new_tokens)
            case Done(prompt_tokens, new_tokens):
                self._flush()
                # Tokens that came with no text of their own, or from an engine that does not tell them.
                self._of.generation_tokens.inc(max(0, new_tokens - self._counted))
                self._counted = max(self._counted, new_tokens)
                self._note_times(now, prompt_tokens, new_tokens)
            case Failed(error):
                self.ended(error)
            case PromptScored():
                pass
            case _:
                self._note_first(now)

    def _note_times(self, now: float, prompt_tokens: int, new_tokens: int) -> None:
        of = self._of
        of.latency.observe(now - self._arrived)
        of.prompt_length.observe(prompt_tokens)
        started = self._arrived if self._started is None else self._started
        of.inference.observe(now - started)
        if self._first is not None:
            of.prefill.observe(self._first - started)
            of.decode.observe(now - self._first)
            after_first = new_tokens // max(1, self._answers) - 1
            if after_first > 0:
                of.per_token.observe((now - self._first) / after_first)

    def ended(self, outcome: str | AylluError) -> None:
        """Nothing more comes: 'stop' where all was said, 'abort' where nobody waits for the rest, or what
        failed. Idempotent."""
        if self._ended:
            return
        self._ended = True
        self._flush()
        if isinstance(outcome, AylluError):
            kind = type(outcome).__name__
            self._failures.labels(self._model, kind if kind in ERRORS else OTHER).inc()
        elif self._finished < self._answers:
            reason = outcome if outcome in FINISHED_REASONS else "abort"
            self._of.finished[reason].inc(self._answers - self._finished)


class Metrics:
    """All of them, in a registry of their own. Write from the event loop's thread; `scrape` in another."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.registry = CollectorRegistry(auto_describe=True)
        self._clock = clock
        self._models: dict[str, _Children] = {}
        self._handlers: set[str] = set()
        self._engines = _Engines()
        self.registry.register(self._engines)
        self._define_requests()
        self._define_server()

    def _define_requests(self) -> None:
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.", "model_name")
        self._generation_tokens = self._counter("generation_tokens", "Tokens made.", "model_name")
        self._success = self._counter(
            "request_success", "Answers that ended, and why.", "model_name", "finished_reason"
        )
        self._failures = self._counter("request_failures", "Requests that failed.", "model_name", "error")
        self._by_request = {
            name: Histogram(PREFIX + name, about, ["model_name"], buckets=bounds, registry=self.registry)
            for name, (about, bounds) in _BY_REQUEST.items()
        }
        self._gaps = _BulkHistogram(
            PREFIX + "inter_token_latency_seconds", "Time between two tokens of an answer.", TOKEN_BUCKETS
        )
        self.registry.register(self._gaps)

    def _define_server(self) -> None:
        self._http = self._counter("http_requests", "HTTP requests.", "handler", "method", "status")
        self._http_seconds = Histogram(
            PREFIX + "http_request_duration_seconds",
            "Time of an HTTP request, to the end of its response.",
            ["handler", "method"],
            buckets=HTTP_BUCKETS,
            registry=self.registry,
        )
        self._refusals = self._counter("overload_refusals", "Requests refused for overload.", "reason")
        self._auth = self._counter("auth_failures", "Callers that were refused.", "reason")
        self._pulls = self._counter("pulls", "Pulls of models that ended.", "outcome")
        self._backups = self._counter("database_backups", "Backups of the database.", "outcome")
        self._open_runs = Gauge(PREFIX + "open_runs", "Runs under way.", registry=self.registry)
        self._dropped = Gauge(
            PREFIX + "log_lines_dropped", "Log lines dropped since the start.", registry=self.registry
        )
        for counter, values in (
            (self._refusals, REFUSALS),
            (self._auth, AUTH_FAILURES),
            (self._pulls, OUTCOMES),
            (self._backups, OUTCOMES),
        ):
            for value in values:
                counter.labels(value)  # from the start, so that the first one is seen as an increase

    def _counter(self, name: str, about: str, *labels: str) -> Counter:
        return Counter(PREFIX + name, about, labels, registry=self.registry)

    def _model_label(self, model: str) -> str:
        return model if model in self._models or len(self._models) < MOST_MODELS else OTHER

    def _of(self, model: str) -> _Children:
        children = self._models.get(model)
        if children is None:
            gaps, gap_sum = self._gaps.of(model)
            of = {name: histogram.labels(model) for name, histogram in self._by_request.items()}
            children = self._models[model] = _Children(
                prompt_tokens=self._prompt_tokens.labels(model),
                generation_tokens=self._generation_tokens.labels(model),
                first_token=of["time_to_first_token_seconds"],
                per_token=of["request_time_per_output_token_seconds"],
                latency=of["e2e_request_latency_seconds"],
                queue=of["request_queue_time_seconds"],
                inference=of["request_inference_time_seconds"],
                prefill=of["request_prefill_time_seconds"],
                decode=of["request_decode_time_seconds"],
                prompt_length=of["request_prompt_tokens"],
                answer_length=of["request_generation_tokens"],
                answers=of["request_params_n"],
                limits=of["request_params_max_tokens"],
                finished={reason: self._success.labels(model, reason) for reason in FINISHED_REASONS},
                gaps=gaps,
                gap_sum=gap_sum,
            )
        return children

    def started(
        self, model: str, *, params_n: int, params_max_tokens: int | None, arrived: float | None = None
    ) -> Watch:
        """A request for `model`, an installed one. arrived: when, by the clock (None: now)."""
        model = self._model_label(model)
        of = self._of(model)
        of.answers.observe(params_n)
        if params_max_tokens is not None:
            of.limits.observe(params_max_tokens)
        arrived = self._clock() if arrived is None else arrived
        return Watch(of, self._failures, model, self._clock, arrived, params_n)

    def http(self, handler: str, method: str, status: int, seconds: float) -> None:
        """A request was answered. handler: the template of its route."""
        if handler not in self._handlers:
            if len(self._handlers) < MOST_HANDLERS:
                self._handlers.add(handler)
            else:
                handler = OTHER
        method = method if method in HTTP_METHODS else OTHER
        self._http.labels(handler, method, str(status) if 100 <= status <= 599 else OTHER).inc()
        self._http_seconds.labels(handler, method).observe(seconds)

    def refused(self, reason: str) -> None:
        """A request was turned away because there is too much. reason: one of REFUSALS."""
        self._refusals.labels(reason if reason in REFUSALS else OTHER).inc()

    def auth_failed(self, reason: str) -> None:
        """Somebody was not let in. reason: one of AUTH_FAILURES."""
        self._auth.labels(reason if reason in AUTH_FAILURES else OTHER).inc()

    def pulled(self, outcome: str) -> None:
        """A pull ended. outcome: one of OUTCOMES."""
        self._pulls.labels(outcome if outcome in OUTCOMES else "failed").inc()

    def backed_up(self, outcome: str = "ok") -> None:
        """A backup of the database ended. outcome: one of OUTCOMES."""
        self._backups.labels(outcome if outcome in OUTCOMES else "failed").inc()

    def runs_open(self, count: int) -> None:
        """So many runs are under way."""
        self._open_runs.set(count)

    def scrape(self, engines: Mapping[str, Engine]) -> bytes:
        """Everything, in Prometheus's text format (CONTENT_TYPE). Asks the engines: call it in a thread."""
        self._engines.update(self._model_label, engines)
        self._dropped.set(lines_dropped())
        return generate_latest(_WithoutBirthdays(self.registry))

    def names(self) -> Iterator[str]:
        """Every name a query may use, whether it has a value yet or not."""
        for family in self.registry.collect():
            match family.type:
                case "counter":
                    yield f"{family.name}_total"
                case "histogram":
                    yield from (f"{family.name}_{end}" for end in ("bucket", "sum", "count"))
                case _:
                    yield family.name
