"""Runs the contenders in turn, round after round, and turns the moments their runners tell into quantities.

A run beside which something else was busy is thrown away and repeated; when that does not help there is no
result, unless noisy results were asked for. The first round warms the disk's cache and counts for nothing.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ayllu.cli.bench.peers import OURS, Absent, Contender
from ayllu.cli.bench.plan import BenchPlan, Job
from ayllu.cli.bench.quiet import NoiseRule, NoiseTally, judged
from ayllu.errors import AylluError

LONGEST_RUN_S = 1800.0
"""A runner that takes longer is ended: no program that anyone would wait for does."""


class RunFailedError(AylluError):
    """A contender's program failed or said what no runner should."""


@dataclass
class Contest:
    """What came out: `samples[contender][quantity]` has one value per round, in order."""

    plan: BenchPlan
    contenders: list[Contender]
    absent: list[Absent]
    samples: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    facts: dict[str, dict[str, Any]] = field(default_factory=dict)
    noise: NoiseTally = field(default_factory=NoiseTally)


def run_contest(
    model: Path,
    vocabulary: int,
    plan: BenchPlan,
    contenders: Sequence[Contender],
    absent: Sequence[Absent],
    rule: NoiseRule,
    noise: NoiseTally,
    tell: Callable[[str], None] = lambda _: None,
) -> Contest:
    """Run everything. A peer that fails leaves the contest and is listed as absent, with its last words.

    Raises NoisyMachineError, and RunFailedError when ayllu itself fails.
    """
    contest = Contest(plan, list(contenders), list(absent), noise=noise)
    for number in range(plan.rounds + 1):
        warming = number == 0
        tell("warming up" if warming else f"round {number} of {plan.rounds}")
        for contender in tuple(contest.contenders):
            try:
                found = _run_round(model, vocabulary, contender, contest, rule, number)
            except RunFailedError as error:
                if contender.name == OURS:
                    raise
                contest.contenders.remove(contender)
                contest.samples.pop(contender.name, None)
                contest.absent.append(Absent(contender.name, f"failed: {error.problem}"))
                continue
            if not warming:
                samples = contest.samples.setdefault(contender.name, {})
                for key, value in found.items():
                    samples.setdefault(key, []).append(value)
    return contest


def _run_round(
    model: Path, vocabulary: int, contender: Contender, contest: Contest, rule: NoiseRule, number: int
) -> dict[str, float]:
    """All quantities of one contender in one round."""
    plan = contest.plan

    def run(command: Sequence[str], context: int, jobs: list[Job]) -> dict[str, float]:
        task = {
            "model": str(contender.model or model),
            "threads": plan.threads,
            "context": context,
            "jobs": [asdict(job) for job in jobs],
        }
        environment = os.environ | contender.environment | {"OMP_NUM_THREADS": str(plan.threads)}

        def once() -> tuple[Lines, float]:
            return run_program(command, task, environment, plan.threads)

        # The first round only warms the disk's cache.
        lines, started = once() if number == 0 else judged(once, rule, contest.noise)
        contest.facts.setdefault(contender.name, {}).update(_facts(lines))
        return quantities(lines, started, jobs)

    found = run(contender.single, plan.context, plan.single_jobs(vocabulary, number))
    if plan.clients and contender.clients:
        clients = run(contender.clients, plan.client_context, plan.client_jobs(vocabulary, number))
        found |= {key: value for key, value in clients.items() if key.startswith("clients_")}
    return found


Lines = list[dict[str, Any]]


def run_program(
    command: Sequence[str], task: dict[str, Any], environment: dict[str, str], cores: int
) -> tuple[Lines, float]:
    """Start a runner with its task; the lines it said and the moment it was started (`time.perf_counter()`,
    which all processes of a machine share). It may use `cores` cores, so that a program with threads of its
    own choice has no more than the others.

    Raises RunFailedError with the last line of its standard error.
    """
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
        started = time.perf_counter()
        with subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            env=environment, start_new_session=True, preexec_fn=lambda: _keep_to(cores),
        ) as process:  # fmt: skip
            try:
                output, _ = process.communicate(json.dumps(task), timeout=LONGEST_RUN_S)
            except BaseException as error:
                os.killpg(process.pid, signal.SIGKILL)
                if isinstance(error, subprocess.TimeoutExpired):
                    raise RunFailedError(f"took longer than {LONGEST_RUN_S:.0f} s") from None
                raise
        if process.returncode != 0:
            errors.seek(0)
            words = [line.strip() for line in errors.read().splitlines() if line.strip()]
            last = words[-1] if words else "it said nothing"
            raise RunFailedError(f"ended with {process.returncode}: {last}")
    # Some programs print to standard output as they please; our lines are the JSON objects with an event.
    return [json.loads(line) for line in output.splitlines() if line.startswith('{"event"')], started


def _keep_to(cores: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def _facts(lines: Lines) -> dict[str, Any]:
    return {
        key: value
        for line in lines
        if line["event"] == "facts"
        for key, value in line.items()
        if key != "event"
    }


def quantities(lines: Lines, started: float, jobs: Sequence[Job]) -> dict[str, float]:
    """Seconds, tokens per second and bytes by name, from the moments a runner told.

    Raises RunFailedError for a job whose tokens are not as many as were asked for.
    """
    by_key = {job.key: job for job in jobs}
    found: dict[str, float] = {}
    for line in lines:
        match line["event"]:
            case "ready":
                found["load_s"] = line["at"] - started
            case "memory":
                found["peak_bytes"] = float(line["peak_bytes"])
            case "rate":
                found[line["key"]] = float(line["tokens_per_s"])
            case "job":
                begun = line.get("process_start", started)
                found |= _job_quantities(by_key[line["key"]], line["runs"], begun)
    return found


def _job_quantities(job: Job, runs: list[dict[str, Any]], started: float) -> dict[str, float]:
    for run in runs:
        count = sum(tokens for _, tokens in run["moments"])
        if count != job.new_tokens:
            raise RunFailedError(f"{job.key}: {count} tokens came instead of {job.new_tokens}")
    first = runs[0]["moments"][0][0]
    match job.kind:
        case "first_token":
            return {job.key: first - started}
        case "prefill":
            return {job.key: len(job.prompts[0]) / (first - runs[0]["start"])}
        case "decode":
            return {job.key: decode_rate(runs[0]["moments"])}
    begin = min(run["start"] for run in runs)
    end = max(run["moments"][-1][0] for run in runs)
    waits = [run["moments"][0][0] - run["start"] for run in runs]
    return {
        job.key: len(runs) * job.new_tokens / (end - begin),
        f"{job.key}_first_s": statistics.median(waits),
    }


def decode_rate(moments: Sequence[Sequence[float]]) -> float:
    """Tokens per second after those that came first: what came before their moment is prefill."""
    after_first = sum(int(count) for _, count in moments[1:])
    if after_first == 0:
        raise RunFailedError("all tokens came at once, so no speed can be told")
    return after_first / (moments[-1][0] - moments[0][0])
