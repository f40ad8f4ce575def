"""The figures of a report, each with what it shows in words."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from . import charts
from .numbers import number, percent, signed
from .record import RunRecord


def whisker_charts(run: RunRecord) -> Markup:
    result = run.result
    if result.base is None or result.final is None:
        return Markup("")
    rows = [
        ("before", result.base.success_rate, result.base.interval, "before"),
        ("after", result.final.success_rate, result.final.interval, "after"),
    ]
    label = "Success rates with 95% Wilson intervals. " + "; ".join(
        f"{name} {percent(rate)} ({percent(low)} to {percent(high)})"
        for name, rate, (low, high), _ in rows
    )
    return charts.whiskers(label, rows, _round_percent, limits=(0.0, 1.0))


def difference_chart(run: RunRecord) -> Markup:
    compared = run.result.comparison
    if compared is None:
        return Markup("")
    low, high = compared.interval
    label = (
        f"Difference after minus before: {signed(compared.difference)} points, "
        f"95% interval {signed(low)} to {signed(high)}; 0 means no change"
    )
    row = ("change", compared.difference, compared.interval, "after")
    return charts.whiskers(label, [row], signed_round, zero=True, limits=(-1.0, 1.0))


def signed_round(difference: float) -> str:
    return signed(difference).removesuffix(".0")


def _round_percent(share: float) -> str:
    return percent(share).replace(".0%", "%")


def curve_chart(run: RunRecord) -> Markup:
    curve = sorted(run.result.curve, key=lambda point: point.iteration)
    if not curve:
        return Markup("")
    first, last = curve[0], curve[-1]
    label = (
        f"Learning curve on validation tasks: {percent(first.success_rate)} at iteration "
        f"{first.iteration}, {percent(last.success_rate)} at iteration {last.iteration}"
    )
    series = charts.Series(
        "iteration",
        "after",
        [(point.iteration, point.success_rate) for point in curve],
        [(point.interval.low, point.interval.high) for point in curve],
    )
    return charts.line_chart(label, [series], "iteration", _round_percent, (0.0, 1.0), 0.2)


def turn_chart(run: RunRecord) -> Markup:
    series = [
        charts.Series(
            f"{name}, within", name, [(t + 1, rate) for t, rate in enumerate(side.success_by_turn)]
        )
        for name, side in (("before", run.base), ("after", run.final))
        if side and side.success_by_turn
    ]
    if not series or max(len(one.points) for one in series) < 2:
        return Markup("")
    label = "Share of tasks solved within so many actions. " + "; ".join(
        f"{one.style}: {percent(one.points[0][1])} within 1, "
        f"{percent(one.points[-1][1])} within {len(one.points)}"
        for one in series
    )
    return charts.line_chart(label, series, "actions", _round_percent, (0.0, 1.0), 0.2)


@dataclass(frozen=True)
class Multiple:
    """One metric over the iterations."""

    name: str
    first: float
    last: float
    low: float
    high: float
    chart: Markup


def multiples(run: RunRecord) -> list[Multiple]:
    """One per metric that is no time, the learner's first."""
    areas = {"train": 0, "rollout": 1}
    names = {name for metrics in run.metrics for name in metrics if not name.startswith("time/")}
    order = sorted(names, key=lambda name: (areas.get(name.split("/")[0], 2), name))
    return [_multiple(name, [metrics.get(name) for metrics in run.metrics]) for name in order]


def _multiple(name: str, values: Sequence[float | None]) -> Multiple:
    known = [value for value in values if value is not None]
    first, last, low, high = known[0], known[-1], min(known), max(known)
    label = (
        f"{name} over {len(values)} iterations: first {number(first)}, last {number(last)}, "
        f"least {number(low)}, most {number(high)}"
    )
    return Multiple(name, first, last, low, high, charts.sparkline(label, values))
