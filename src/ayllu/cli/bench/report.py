"""What a contest says: medians with spread, ratios, shares of the machine's limits; as table and as JSON."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ayllu.cli.bench.ceilings import Ceilings
from ayllu.cli.bench.contest import Contest
from ayllu.cli.bench.cost import TokenCost, token_cost
from ayllu.cli.bench.peers import OURS
from ayllu.cli.bench.quiet import NoiseRule

if TYPE_CHECKING:
    from rich.console import RenderableType

JSON_VERSION = 1


@dataclass(frozen=True)
class Spread:
    """Median, lowest and highest value of the rounds."""

    median: float
    low: float
    high: float


def spread_of(values: Sequence[float]) -> Spread:
    """Raises ValueError for no values."""
    if not values:
        raise ValueError("no values to summarise")
    return Spread(statistics.median(values), min(values), max(values))


def ratio_of(ours: Sequence[float], theirs: Sequence[float], *, higher_is_better: bool) -> Spread:
    """How many times better ours is, round by round (above 1: ours wins), then median and spread."""
    pairs = zip(ours, theirs, strict=True)
    return spread_of([a / b if higher_is_better else b / a for a, b in pairs])


def summary(contest: Contest) -> dict[str, dict[str, Spread]]:
    """Spread by contender and quantity."""
    return {
        name: {key: spread_of(values) for key, values in samples.items()}
        for name, samples in contest.samples.items()
    }


def ratios(contest: Contest) -> dict[str, dict[str, Spread]]:
    """Ayllu against each peer, by peer and quantity, where both have a value for every round."""
    ours = contest.samples.get(OURS, {})
    found: dict[str, dict[str, Spread]] = {}
    for name, theirs in contest.samples.items():
        if name != OURS:
            found[name] = {
                measure.key: ratio_of(
                    ours[measure.key], theirs[measure.key], higher_is_better=measure.higher_is_better
                )
                for measure in contest.plan.measures()
                if measure.key in ours and len(ours[measure.key]) == len(theirs.get(measure.key, ()))
            }
    return found


def achieved(contest: Contest, cost: TokenCost) -> dict[str, dict[str, float]]:
    """Bytes per second of weights read while decoding and operations per second of prefill, by contender."""
    found: dict[str, dict[str, float]] = {}
    for contender in contest.contenders:
        own = cost if contender.model is None else token_cost(contender.model)
        for key, spread in summary(contest).get(contender.name, {}).items():
            if key.startswith("decode_"):
                rate = spread.median * own.bytes_read(contender.precision)
            elif key.startswith("prefill_"):
                rate = spread.median * cost.prefill_flops
            else:
                continue
            found.setdefault(contender.name, {})[key] = rate
    return found


def machine() -> dict[str, Any]:
    """What this was measured on."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def as_json(
    contest: Contest,
    model: dict[str, Any],
    cost: TokenCost,
    ceilings: Ceilings,
    rule: NoiseRule,
    ayllu_version: str,
) -> dict[str, Any]:
    """Everything, so that the figures can be judged and measured again."""
    table, against, used = summary(contest), ratios(contest), achieved(contest, cost)
    return {
        "format": JSON_VERSION,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["ayllu", *sys.argv[1:]]),
        "ayllu": ayllu_version,
        "machine": machine(),
        "model": model | asdict(cost),
        "plan": asdict(contest.plan),
        "noise": {
            "noisy": contest.noise.noisy,
            "limit_cores": rule.limit_cores,
            "forced": rule.force,
            "noisy_runs": contest.noise.noisy_runs,
            "repeated_runs": contest.noise.repeated_runs,
            "other_cores_highest": max(contest.noise.other_cores, default=None),
        },
        "ceilings": asdict(ceilings),
        "absent": [asdict(absent) for absent in contest.absent],
        "contenders": {
            contender.name: {
                "version": contender.version,
                "precision": contender.precision,
                "file": None if contender.model is None else str(contender.model),
                "facts": contest.facts.get(contender.name, {}),
                "samples": contest.samples.get(contender.name, {}),
                "summary": _plain(table.get(contender.name, {})),
                "ayllu_against_it": _plain(against.get(contender.name, {})),
                "achieved_per_s": used.get(contender.name, {}),
            }
            for contender in contest.contenders
        },
    }


def _plain(spreads: dict[str, Spread]) -> dict[str, dict[str, float]]:
    return {key: asdict(spread) for key, spread in spreads.items()}


def value_text(value: float, unit: str) -> str:
    """A value as people read it: '1,204', '0.215', '148 MB'."""
    if unit == "bytes":
        return f"{value / 1e6:,.0f} MB"
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if unit == "tokens/s" and value >= 10 else f"{value:.2f}"


def range_text(spread: Spread, unit: str) -> str:
    """'135-146'."""
    return "-".join(value_text(value, unit).removesuffix(" MB") for value in (spread.low, spread.high))


def render(contest: Contest, title: str, cost: TokenCost, ceilings: Ceilings) -> list[RenderableType]:
    """The report for a terminal: the table, versions, limits, who was absent, and whether it was quiet."""
    from rich.text import Text

    lines: list[RenderableType] = [_table(contest, title)]
    lines += [Text(f"version      {one.name}: {one.version}") for one in contest.contenders]
    lines += [Text(line) for line in _limits(contest, cost, ceilings)]
    lines += [Text(f"absent       {absent.name}: {absent.reason}") for absent in contest.absent]
    highest = max(contest.noise.other_cores, default=0.0)
    if contest.noise.noisy:
        noise = (
            f"NOISY: {contest.noise.noisy_runs} runs were disturbed (others used up to {highest:.2f} cores)"
        )
        lines.append(Text(f"{noise}. These figures are no result.", style="bold red"))
    else:
        repeated = (
            f", {contest.noise.repeated_runs} disturbed runs repeated" if contest.noise.repeated_runs else ""
        )
        lines.append(Text(f"quiet        others used at most {highest:.2f} cores{repeated}"))
    return lines


def _table(contest: Contest, title: str) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    values, against = summary(contest), ratios(contest)
    table = Table(title=title, title_justify="left", title_style="bold", box=None, pad_edge=False)
    table.add_column("")
    table.add_column("median", justify="right", no_wrap=True)
    table.add_column("lowest-highest", justify="right", no_wrap=True)
    table.add_column("ratio, above 1: ayllu", justify="right", no_wrap=True)
    for measure in contest.plan.measures():
        names = [name for name in values if measure.key in values[name]]
        if not names:
            continue
        table.add_row(Text(f"{measure.label}, {measure.unit}".removesuffix(", bytes"), style="bold"))
        for name in names:
            spread = values[name][measure.key]
            ratio = against.get(name, {}).get(measure.key)
            table.add_row(
                f"  {name}",
                value_text(spread.median, measure.unit),
                range_text(spread, measure.unit),
                "" if ratio is None else _ratio_text(ratio),
            )
    return table


def _ratio_text(ratio: Spread) -> RenderableType:
    from rich.text import Text

    text = f"{ratio.median:.2f} x  {ratio.low:.2f}-{ratio.high:.2f}"
    # Where the rounds do not agree, nobody has won.
    colour = "green" if ratio.low > 1 else "red" if ratio.high < 1 else "yellow"
    return Text(text, style=colour)


def _limits(contest: Contest, cost: TokenCost, ceilings: Ceilings) -> list[str]:
    """How near each contender comes to what the machine can do."""
    reads = ", ".join(
        f"{rate.median / 1e9:.1f} GB/s with {count} thread{'s' if count > 1 else ''}"
        for count, rate in ceilings.read.items()
    )
    lines = [f"ceilings     memory read {reads} (1 GiB, measured by {ceilings.by})"]
    limit = ceilings.read_weights
    if limit is not None:
        most = limit.median / cost.weight_bytes
        lines.append(
            f"             {limit.median / 1e9:.1f} GB/s of the {cost.weight_bytes / 1e6:.0f} MB of weights "
            f"a token reads: at most {most:,.0f} tokens/s"
        )
    rates = ", ".join(f"{name} {rate.median / 1e9:,.0f}" for name, rate in ceilings.operations.items())
    lines.append(f"             products, GFLOP/s with {ceilings.threads} threads: {rates}")
    for name, rates_of in achieved(contest, cost).items():
        parts = [
            f"{key.replace('_', ' ')}: {rate / 1e9:,.1f} {'GB/s' if key.startswith('decode') else 'GFLOP/s'}"
            + (
                f" ({100 * rate / limit.median:.0f}%)"
                if limit is not None and key.startswith("decode")
                else ""
            )
            for key, rate in rates_of.items()
        ]
        lines.append(f"achieved     {name}: {', '.join(parts)}")
    return lines


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
