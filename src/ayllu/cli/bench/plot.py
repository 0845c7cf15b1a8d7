"""The picture of a benchmark: a panel per quantity, a bar per contender, its spread, the machine's limit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ayllu.cli.bench.peers import OURS
from ayllu.errors import MissingExtraError, UsageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = (".png", ".svg", ".pdf")
OUR_COLOUR, THEIR_COLOUR, INK, FAINT = "#c2410c", "#94a3b8", "#1e293b", "#64748b"
HEAD_INCHES, FOOT_INCHES = 0.85, 0.35


def require_drawable(path: Path) -> None:
    """Raises MissingExtraError without matplotlib, UsageError for a format that cannot be drawn."""
    if path.suffix not in FORMATS:
        raise UsageError(f"{path} is no picture that can be drawn.", f"End its name in {', '.join(FORMATS)}.")
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingExtraError("Drawing a benchmark", "bench")


def draw(result: dict[str, Any], path: Path) -> None:
    """Draw what `report.as_json` gave."""
    # The object interface draws without a screen and leaves no global state behind.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    panels = _panels(result)
    columns = 2 if len(panels) > 1 else 1
    rows = -(-len(panels) // columns)
    bars = len(result["contenders"])
    row_inches = 0.34 * bars + 0.85
    figure = Figure(figsize=(6.2 * columns, row_inches * rows + HEAD_INCHES + FOOT_INCHES), dpi=160)
    FigureCanvasAgg(figure)
    height = figure.get_figheight()
    inside = (0.005, FOOT_INCHES / height, 0.99, 1 - (HEAD_INCHES + FOOT_INCHES) / height)
    figure.set_layout_engine(ConstrainedLayoutEngine(rect=inside, hspace=0.06, wspace=0.05))
    for index, (key, title, scale) in enumerate(panels):
        _panel(figure.add_subplot(rows, columns, index + 1), result, key, title, scale)
    _headings(figure, result)
    figure.savefig(path, facecolor="white")


def _headings(figure: Any, result: dict[str, Any]) -> None:
    machine, plan = result["machine"], result["plan"]
    inch = 1 / figure.get_figheight()
    noisy = result["noise"]["noisy"]
    heading = f"{result['model']['name']}" + (" - NOISY RUN, NOT A RESULT" if noisy else "")
    figure.text(
        0.015, 1 - 0.34 * inch, heading, fontsize=15, weight="bold", color="#b91c1c" if noisy else INK
    )
    about = (
        f"{machine['processor']}, {plan['threads']} threads; median of {plan['rounds']} rounds in turn, "
        f"thin line: lowest to highest; {result['date'][:10]}"
    )
    figure.text(0.015, 1 - 0.62 * inch, about, fontsize=9, color=FAINT)
    versions = ", ".join(f"{name} {facts['version']}" for name, facts in result["contenders"].items())
    figure.text(0.015, 0.13 * inch, versions, fontsize=7.5, color=FAINT)


def _panels(result: dict[str, Any]) -> list[tuple[str, str, float]]:
    """(key, title, factor) of every quantity that somebody has a value for."""
    plan = result["plan"]
    wanted = [(f"prefill_{size}", f"prefill of {size:,} tokens, tokens/s", 1.0) for size in plan["prefill"]]
    wanted += [(f"decode_{depth}", f"decode at depth {depth:,}, tokens/s", 1.0) for depth in plan["depths"]]
    for count in plan["clients"]:
        wanted.append((f"clients_{count}", f"clients at once: {count}, tokens/s of all", 1.0))
        wanted.append(
            (
                f"clients_{count}_first_s",
                f"clients at once: {count}, s to first token (shorter is better)",
                1.0,
            )
        )
    wanted.append(("first_token_s", "process start to first token, s (shorter is better)", 1.0))
    wanted.append(("peak_bytes", "peak memory, MB (shorter is better)", 1e-6))
    summaries = [facts["summary"] for facts in result["contenders"].values()]
    return [panel for panel in wanted if any(panel[0] in summary for summary in summaries)]


def _panel(axes: Axes, result: dict[str, Any], key: str, title: str, scale: float) -> None:
    names = [name for name, facts in result["contenders"].items() if key in facts["summary"]]
    spreads = [result["contenders"][name]["summary"][key] for name in names]
    medians = [scale * spread["median"] for spread in spreads]
    colours = [OUR_COLOUR if name == OURS else THEIR_COLOUR for name in names]
    axes.barh(range(len(names)), medians, color=colours, height=0.66)
    reach = max(scale * spread["high"] for spread in spreads)
    limit = _limit(result, key)
    if limit is not None:
        # A limit far away would squeeze the bars: then only its value is told.
        near = limit < 2 * reach
        if near:
            axes.axvline(limit, color=INK, linewidth=1, linestyle=(0, (4, 3)))
            reach = max(reach, limit)
        axes.set_title(
            f"machine's limit {limit:,.0f}{'' if near else ' →'}", loc="right", fontsize=8, color=FAINT
        )
    for row, (name, spread, median) in enumerate(zip(names, spreads, medians, strict=True)):
        low, high = scale * spread["low"], scale * spread["high"]
        axes.plot([low, high], [row, row], color=INK, linewidth=1.2, solid_capstyle="butt")
        axes.text(
            max(high, median) + 0.015 * reach,
            row,
            _label(median),
            va="center",
            fontsize=9,
            color=INK,
            weight="bold" if name == OURS else "normal",
            bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.0},
        )
    axes.set_yticks(range(len(names)), names, fontsize=9, color=INK)
    axes.set_ylim(len(result["contenders"]) - 0.5, -0.5)
    axes.set_xlim(0, reach * 1.16)
    axes.set_title(title, loc="left", fontsize=10, color=INK, weight="bold")
    axes.tick_params(axis="both", length=0, labelcolor=FAINT, labelsize=8)
    axes.tick_params(axis="y", labelcolor=INK, labelsize=9)
    axes.grid(axis="x", color="#e2e8f0", linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left", "bottom"):
        axes.spines[side].set_visible(False)


def _limit(result: dict[str, Any], key: str) -> float | None:
    """What the machine allows at most, in tokens per second; None where no such limit is known."""
    ceilings, model = result["ceilings"], result["model"]
    if key.startswith("decode_") and ceilings["read_weights"] is not None:
        return float(ceilings["read_weights"]["median"] / model["weight_bytes"])
    operations = [rate["median"] for rate in ceilings["operations"].values()]
    if key.startswith("prefill_") and operations:
        return float(max(operations) / model["prefill_flops"])
    return None


def _label(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"
