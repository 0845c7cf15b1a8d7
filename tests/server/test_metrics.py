"""Metrics: vLLM's names and meanings, right values, bounded labels, and little time spent on each event."""

from __future__ import annotations

import json
import re
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from ayllu.chat.messages import ToolCall
from ayllu.engine.events import AnswerFinished, Done, Event, Failed, Started, TextDelta, ToolCallMade
from ayllu.engine.protocol import EngineStats
from ayllu.errors import EngineCrashedError, EngineUnavailableError
from ayllu.server import metrics as module
from ayllu.server.metrics import CONTENT_TYPE, Metrics, Watch

DASHBOARD = Path(__file__).parents[2] / "deploy" / "grafana" / "ayllu.json"
NAMES_OF_VLLM = (
    *("num_requests_running", "num_requests_waiting", "num_preemptions_total", "kv_cache_usage_perc"),
    *("prefix_cache_queries_total", "prefix_cache_hits_total", "prompt_tokens_total"),
    *("generation_tokens_total", "request_success_total", "time_to_first_token_seconds_bucket"),
    *("inter_token_latency_seconds_bucket", "request_time_per_output_token_seconds_bucket"),
    *("e2e_request_latency_seconds_bucket", "request_queue_time_seconds_bucket"),
    *("request_inference_time_seconds_bucket", "request_prefill_time_seconds_bucket"),
    *("request_decode_time_seconds_bucket", "request_prompt_tokens_bucket"),
    *("request_generation_tokens_bucket", "request_params_n_bucket", "request_params_max_tokens_bucket"),
    *("spec_decode_num_draft_tokens_total", "spec_decode_num_accepted_tokens_total"),
)


class Clock:
    def __init__(self) -> None:
        self.now = 50.0

    def __call__(self) -> float:
        return self.now


class Told:
    """An engine that says these counts."""

    status = "ready"

    def __init__(self, stats: EngineStats | Exception) -> None:
        self.said = stats

    def stats(self) -> EngineStats:
        if isinstance(self.said, Exception):
            raise self.said
        return self.said


def values(metrics: Metrics, engines: dict[str, Any] | None = None) -> dict[str, float]:
    """Every sample, by its name and labels as they stand in the text."""
    text = metrics.scrape(engines or {}).decode()
    found = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            found[f"{sample.name.removeprefix('ayllu_')}{{{labels}}}"] = sample.value
    return found


def play(metrics: Metrics, clock: Clock, *steps: tuple[float, Event], answers: int = 1) -> Watch:
    """A request whose events come so many seconds after one another."""
    watch = metrics.started("tiny", params_n=answers, params_max_tokens=100)
    for seconds, event in steps:
        clock.now += seconds
        watch.event(event)
    return watch


def test_names_are_vllms() -> None:
    names = set(Metrics().names())
    assert {f"ayllu_{name}" for name in NAMES_OF_VLLM} <= names
    assert {"ayllu_http_requests_total", "ayllu_http_request_duration_seconds_bucket"} <= names


def test_times_of_a_request_count_from_its_arrival() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    watch = play(
        metrics,
        clock,
        (2.0, Started(10, 4)),
        (1.0, TextDelta(0, "a", (1,))),
        (0.5, TextDelta(0, "b", (2,))),
        (0.5, TextDelta(0, "cde", (3, 4, 5))),
        (0.0, AnswerFinished(0, "stop", 5)),
        (0.0, Done(10, 5, 4)),
    )
    clock.now += 100  # a client that reads slowly is not the engine's latency
    watch.ended("stop")
    seen = values(metrics)
    of = "{model_name=tiny}"
    assert seen[f"request_queue_time_seconds_sum{of}"] == pytest.approx(2)
    assert seen[f"time_to_first_token_seconds_sum{of}"] == pytest.approx(3)
    assert seen[f"e2e_request_latency_seconds_sum{of}"] == pytest.approx(4)
    assert seen[f"request_prefill_time_seconds_sum{of}"] == pytest.approx(1)
    assert seen[f"request_decode_time_seconds_sum{of}"] == pytest.approx(1)
    assert seen[f"request_inference_time_seconds_sum{of}"] == pytest.approx(2)
    assert seen[f"request_time_per_output_token_seconds_sum{of}"] == pytest.approx(0.25)
    assert seen[f"inter_token_latency_seconds_count{of}"] == 4
    assert seen[f"inter_token_latency_seconds_sum{of}"] == pytest.approx(1)
    assert seen["inter_token_latency_seconds_bucket{le=0.2,model_name=tiny}"] == 3
    assert seen["inter_token_latency_seconds_bucket{le=0.5,model_name=tiny}"] == 4
    assert seen["inter_token_latency_seconds_bucket{le=+Inf,model_name=tiny}"] == 4
    assert seen[f"prompt_tokens_total{of}"] == 10
    assert seen[f"generation_tokens_total{of}"] == 5
    assert seen["request_success_total{finished_reason=stop,model_name=tiny}"] == 1
    assert seen["request_params_max_tokens_bucket{le=100.0,model_name=tiny}"] == 1


def test_waiting_before_the_engine_counts_where_the_arrival_is_told() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    arrived = clock.now
    clock.now += 7  # as for a model that is loaded first
    watch = metrics.started("tiny", params_n=1, params_max_tokens=None, arrived=arrived)
    watch.event(TextDelta(0, "a", (1,)))
    assert values(metrics)["time_to_first_token_seconds_sum{model_name=tiny}"] == pytest.approx(7)


def test_tokens_are_exact_where_text_lags_behind_and_where_an_engine_tells_no_token_ids() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    for delta in (TextDelta(0, "a", (1, 2)), TextDelta(0, "a")):
        play(metrics, clock, (0, Started(1)), (0, delta), (0, Done(1, 7))).ended("stop")
    assert values(metrics)["generation_tokens_total{model_name=tiny}"] == 14


def test_tokens_of_a_long_answer_are_seen_while_it_runs() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    play(metrics, clock, *((0.1, TextDelta(0, "x", (number,))) for number in range(100)))
    assert values(metrics)["generation_tokens_total{model_name=tiny}"] >= 64


def test_gaps_are_taken_within_each_of_several_answers() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    play(
        metrics,
        clock,
        *((0.1, TextDelta(number % 2, "x", (1,))) for number in range(6)),
        answers=2,
    )
    seen = values(metrics)
    assert seen["inter_token_latency_seconds_count{model_name=tiny}"] == 4
    assert seen["inter_token_latency_seconds_sum{model_name=tiny}"] == pytest.approx(0.8)
    assert seen["time_to_first_token_seconds_count{model_name=tiny}"] == 1


@pytest.mark.parametrize(
    ("reason", "told"),
    [("stop", "stop"), ("tool_calls", "stop"), ("length", "length"), ("cancelled", "abort")],
)
def test_finished_reasons_are_vllms(reason: Any, told: str) -> None:
    metrics = Metrics()
    watch = metrics.started("tiny", params_n=1, params_max_tokens=None)
    watch.event(ToolCallMade(0, 0, ToolCall("name", {})))
    watch.event(AnswerFinished(0, reason, 3))
    watch.ended("stop")
    seen = values(metrics)
    counted = {key: value for key, value in seen.items() if key.startswith("request_success_total")}
    assert counted.pop(f"request_success_total{{finished_reason={told},model_name=tiny}}") == 1
    assert not any(counted.values())
    assert seen["time_to_first_token_seconds_count{model_name=tiny}"] == 1


def test_an_abandoned_request_counts_its_open_answers_as_aborted_and_a_failed_one_as_one_failure() -> None:
    clock = Clock()
    metrics = Metrics(clock)
    watch = play(metrics, clock, (0, AnswerFinished(0, "stop", 1)), answers=3)
    watch.ended("abort")
    watch.ended("abort")
    error = EngineCrashedError("It ended.")
    play(metrics, clock, (0, Started(5)), (0, Failed(error))).ended(error)
    seen = values(metrics)
    assert seen["request_success_total{finished_reason=abort,model_name=tiny}"] == 2
    assert seen["request_failures_total{error=EngineCrashedError,model_name=tiny}"] == 1
    assert seen["e2e_request_latency_seconds_count{model_name=tiny}"] == 0, "only what was answered"


def test_an_event_of_text_costs_at_most_two_microseconds() -> None:
    watch = Metrics().started("tiny", params_n=1, params_max_tokens=None)
    delta = TextDelta(0, "word", (1,))
    count, best = 5_000, float("inf")
    for _ in range(40):  # the best of many, as the machine has other work
        start = time.perf_counter()
        for _ in range(count):
            watch.event(delta)
        best = min(best, (time.perf_counter() - start) / count)
    assert best <= 2e-6, f"{best * 1e6:.2f} us"


def test_what_engines_say_is_asked_at_each_scrape() -> None:
    stats = EngineStats(
        running=3,
        waiting=2,
        prompt_tokens=100,
        cached_prompt_tokens=40,
        drafted=9,
        accepted=6,
        preempted=1,
        restarts=2,
        blocks_total={"full": 10, "chunked": 100},
        blocks_free={"full": 4, "chunked": 90},
    )
    seen = values(Metrics(), {"tiny": Told(stats)})
    told = {key.removesuffix("{model_name=tiny}"): value for key, value in seen.items()}
    assert told["engine_up"] == 1
    assert told["num_requests_running"] == 3 and told["num_requests_waiting"] == 2
    assert told["kv_cache_usage_perc"] == pytest.approx(0.6)
    assert told["prefix_cache_queries_total"] == 100 and told["prefix_cache_hits_total"] == 40
    assert told["spec_decode_num_draft_tokens_total"] == 9
    assert told["spec_decode_num_accepted_tokens_total"] == 6
    assert told["num_preemptions_total"] == 1 and told["engine_restarts_total"] == 2


def test_an_engine_that_is_down_says_so_and_the_others_are_told_all_the_same() -> None:
    restarting = Told(EngineStats())
    restarting.status = "starting"
    seen = values(
        Metrics(),
        {
            "down": Told(EngineUnavailableError("It is down.")),
            "broken": Told(RuntimeError("a bug")),
            "restarting": restarting,
            "up": Told(EngineStats(running=1)),
        },
    )
    assert [seen[f"engine_up{{model_name={name}}}"] for name in ("down", "broken", "restarting", "up")] == [
        *(0, 0, 0),
        1,
    ]
    assert "num_requests_running{model_name=down}" not in seen
    assert seen["num_requests_running{model_name=up}"] == 1


def test_an_engine_that_never_answers_counts_as_down_and_is_not_asked_twice(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "STATS_TIMEOUT_S", 0.05)
    gate, asked = threading.Event(), []

    class Stuck(Told):
        def stats(self) -> EngineStats:
            asked.append(1)
            gate.wait(60)
            return EngineStats()

    metrics = Metrics()
    for _ in range(3):
        assert values(metrics, {"tiny": Stuck(EngineStats())})["engine_up{model_name=tiny}"] == 0
    assert len(asked) == 1
    gate.set()


def test_totals_never_fall_when_an_engine_starts_again_or_is_unloaded() -> None:
    metrics = Metrics()
    total = "engine_steps_total{model_name=tiny}"
    assert values(metrics, {"tiny": Told(EngineStats(steps=100))})[total] == 100
    assert values(metrics, {"tiny": Told(EngineStats(steps=0))})[total] == 100
    assert values(metrics, {"tiny": Told(EngineStats(steps=30))})[total] == 130
    seen = values(metrics)
    assert seen[total] == 130 and "engine_up{model_name=tiny}" not in seen


def test_labels_are_bounded_whatever_comes() -> None:
    metrics = Metrics()
    for number in range(600):
        metrics.http(f"/made/up/{number}", f"METHOD{number}", 10_000 + number, 0.1)
        metrics.refused(f"because {number}")
        metrics.auth_failed(f"because {number}")
        metrics.pulled(f"because {number}")
        metrics.started(f"model {number}", params_n=1, params_max_tokens=1).ended(f"because {number}")
    seen = values(metrics)
    labels = {
        name: {found.group(1) for key in seen if (found := re.search(rf"\b{name}=([^,}}]*)", key))}
        for name in ("handler", "method", "status", "reason", "outcome", "model_name", "finished_reason")
    }
    assert len(labels["handler"]) == module.MOST_HANDLERS + 1
    assert len(labels["model_name"]) == module.MOST_MODELS + 1
    assert labels["method"] == {"other"} and labels["status"] == {"other"}
    assert labels["reason"] == {*module.REFUSALS, *module.AUTH_FAILURES}
    assert labels["outcome"] == set(module.OUTCOMES)
    assert labels["finished_reason"] == set(module.FINISHED_REASONS)


def test_hostile_names_cannot_forge_a_line() -> None:
    metrics = Metrics()
    metrics.http('/x"} 1\nayllu_forged 1\n\\', "GET", 200, 0.1)
    lines = metrics.scrape({}).decode().splitlines()
    assert not any(line.startswith("ayllu_forged") for line in lines)
    assert list(text_string_to_metric_families("\n".join(lines) + "\n"))


def test_counts_of_the_server() -> None:
    metrics = Metrics()
    metrics.http("/v1/models", "GET", 200, 0.2)
    metrics.refused("limit")
    metrics.auth_failed("key")
    metrics.pulled("ok")
    metrics.backed_up()
    metrics.runs_open(4)
    seen = values(metrics)
    assert seen["http_requests_total{handler=/v1/models,method=GET,status=200}"] == 1
    assert seen["http_request_duration_seconds_bucket{handler=/v1/models,le=0.25,method=GET}"] == 1
    assert seen["overload_refusals_total{reason=limit}"] == 1
    assert seen["overload_refusals_total{reason=engine}"] == 0, "there from the start"
    assert seen["auth_failures_total{reason=key}"] == 1
    assert seen["pulls_total{outcome=ok}"] == seen["database_backups_total{outcome=ok}"] == 1
    assert seen["open_runs{}"] == 4


def test_scraping_while_events_come_gives_consistent_histograms() -> None:
    metrics = Metrics()
    watch = metrics.started("tiny", params_n=1, params_max_tokens=None)
    ended = threading.Event()

    def write() -> None:
        while not ended.is_set():
            watch.event(TextDelta(0, "x", (1, 2)))

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(50):
            seen = values(metrics)
            name = "inter_token_latency_seconds"
            assert (
                seen.get(f"{name}_count{{model_name=tiny}}")
                == seen[f"{name}_bucket{{le=+Inf,model_name=tiny}}"]
            )
    finally:
        ended.set()
        writer.join()


def test_the_content_type_is_prometheus_text() -> None:
    assert CONTENT_TYPE.startswith("text/plain; version=")
    assert "_created" not in Metrics().scrape({}).decode()


def dashboard_queries() -> list[str]:
    """Every PromQL expression of the dashboard, of its panels and of its variables."""
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    panels = [one for panel in board["panels"] for one in (panel, *panel.get("panels", ()))]
    queries = [target["expr"] for panel in panels for target in panel.get("targets", ())]
    return queries + [
        variable["query"]["query"] if isinstance(variable["query"], dict) else variable["query"]
        for variable in board["templating"]["list"]
        if variable["type"] == "query"
    ]


def test_every_metric_of_the_dashboard_exists() -> None:
    used = {name for query in dashboard_queries() for name in re.findall(r"ayllu_\w+", query)}
    assert len(used) > 20
    assert used <= set(Metrics().names()), used - set(Metrics().names())


def test_the_dashboard_shows_what_an_operator_needs() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    used = " ".join(dashboard_queries())
    for name in (
        *("num_requests_running", "num_requests_waiting", "time_to_first_token_seconds_bucket"),
        *("inter_token_latency_seconds_bucket", "generation_tokens_total", "kv_cache_usage_perc"),
        *("prefix_cache_hits_total", "request_failures_total", "overload_refusals_total"),
        *("engine_restarts_total", "http_requests_total", "http_request_duration_seconds_bucket"),
    ):
        assert f"ayllu_{name}" in used
    ids = [panel["id"] for panel in board["panels"]]
    assert len(ids) == len(set(ids)) and board["schemaVersion"] >= 39
    for panel in board["panels"]:
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        assert panel["type"] == "row" or all(
            target["datasource"]["uid"] == "${datasource}" for target in panel["targets"]
        )


def test_every_metric_is_described_in_the_docs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "observability.md").read_text(encoding="utf-8")
    told = set(re.findall(r"`(\w+)`", text))
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in Metrics().names()}
    assert {name.removeprefix("ayllu_") for name in families} <= told
