"""``report.html``: what a run proved, learned and cost, on one page that needs nothing but itself.

All text that a model or a world produced is escaped by the template, and ``charts.visible`` shows
what would hide or reorder it; the page carries no script and its policy forbids any.
"""

import base64
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ..core import evaluation
from ..core.errors import StoreError
from ..core.evaluation import EvaluationResult
from ..core.files import atomic_write_bytes, read_json
from ..core.images import SIGNATURE, STORE
from ..core.statistics import Interval, Introspection, Judgement
from ..core.types import Image, Judged, Observation, Trajectory
from . import charts

EXAMPLES_PER_KIND = 2
TURNS_SHOWN = 12
TEXT_SHOWN = 3_000
"""Characters of one text; the rest is counted."""
IMAGE_BYTES = 8_000_000
"""For all images of the page together."""


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class Rates(_Part):
    tasks: int
    successes: int
    success_rate: float
    interval: Interval


class Compared(_Part):
    difference: float
    interval: Interval
    p_value: float
    verdict: Judgement
    test: str = "exact McNemar test"


class CurvePoint(_Part):
    iteration: int
    success_rate: float
    interval: Interval
    tasks: int


class IterationCosts(BaseModel):
    """Whatever numbers an iteration's costs have, by name."""

    model_config = ConfigDict(frozen=True, extra="allow")
    iteration: int | None = None
    failures: dict[str, int] = {}
    """Broken episodes by the error's name."""

    @property
    def numbers(self) -> dict[str, int | float]:
        extra = self.model_extra or {}
        return {name: n for name, n in extra.items() if isinstance(n, int | float)}


class WarmStart(_Part):
    wall_s: float
    skill: float | None = None
    """The share of validation tasks that it came to solve."""
    wanted: float | None = None


class PhaseResult(_Part):
    """One of several trainers' turn at the weights."""

    trainer: str
    iterations: int
    final: Rates
    comparison: Compared
    """To how the phase before it ended."""


class Result(_Part):
    """``result.json``, as far as the page shows it. Everything may be missing."""

    recipe: str = ""
    seed: int | None = None
    base: Rates | None = None
    final: Rates | None = None
    comparison: Compared | None = None
    introspection: dict[str, Introspection | None] | None = None
    phases: list[PhaseResult] = []
    curve: list[CurvePoint] = []
    costs: list[IterationCosts] = []
    """Of each iteration by itself, not summed up."""
    wall_s: float | None = None
    warm_start: WarmStart | None = None
    environment_steps: int | None = None
    tokens_sampled: int | None = None
    tokens_trained: int | None = None
    stopped: str | None = None
    """Why it ended early."""


@dataclass(frozen=True)
class Example:
    """One task as played before and after training."""

    kind: Literal["improved", "worsened", "unsolved"]
    before: Judged
    after: Judged


@dataclass
class RunRecord:
    """All that a run folder holds for its report."""

    folder: Path
    result: Result
    recipe: Any
    base: EvaluationResult | None
    final: EvaluationResult | None
    metrics: list[dict[str, float]]
    """Per iteration."""
    episodes: dict[str, list[Judged]] = field(default_factory=dict[str, list[Judged]])
    """Of ``base`` and ``final``."""
    trouble: str = ""
    """Why there are no episodes although there should be."""

    @cached_property
    def pairs(self) -> dict[str, int] | None:
        """Tasks by who solved them; None unless both evaluations played the same tasks."""
        if self.base is None or self.final is None:
            return None
        before, after = self.base.outcomes, self.final.outcomes
        if not before or before.keys() != after.keys():
            return None
        names = {(True, True): "both", (True, False): "only_before"}
        names |= {(False, True): "only_after", (False, False): "neither"}
        counts = dict.fromkeys(names.values(), 0)
        for task, solved in before.items():
            counts[names[solved, after[task]]] += 1
        return counts

    @property
    def introspection(self) -> dict[str, Introspection]:
        said = self.result.introspection or {}
        sides = {"base": self.base, "final": self.final}
        tables = {name: (side.introspection if side else None) for name, side in sides.items()}
        return {name: found for name in sides if (found := tables[name] or said.get(name))}


def report(folder: Path) -> Path:
    """Write ``folder/report.html`` for the run in ``folder``; returns its path.

    What a run does not have (no curve, no table, no episodes) is left out of its page.

    Raises:
        StoreError: if ``result.json`` is missing, or a file of the run is damaged.
    """
    path = folder / "report.html"
    atomic_write_bytes(path, _render(_load(folder)).encode())
    return path


def _load(folder: Path) -> RunRecord:
    path = folder / "result.json"
    try:
        result = Result.model_validate(read_json(path))
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()[:5]]
        raise StoreError(f"{path} is not a run's result: {'; '.join(faults)}") from None
    recipe = folder / "recipe.json"
    run = RunRecord(
        folder,
        result,
        read_json(recipe) if recipe.exists() else None,
        _evaluation(folder, "base"),
        _evaluation(folder, "final"),
        _metrics(folder),
    )
    _load_episodes(run)
    return run


def _evaluation(folder: Path, name: str) -> EvaluationResult | None:
    path = folder / "evaluations" / name
    return evaluation.read(path) if (path / evaluation.FILE).exists() else None


def _metrics(folder: Path) -> list[dict[str, float]]:
    paths = [p for p in folder.glob("iterations/*/metrics.json") if p.parent.name.isdecimal()]
    paths.sort(key=lambda path: int(path.parent.name))
    adapter = TypeAdapter(dict[str, float])
    try:
        return [adapter.validate_python(read_json(path)) for path in paths]
    except ValidationError as error:
        raise StoreError(f"{folder}: a metrics.json is not numbers by name: {error}") from None


def _load_episodes(run: RunRecord) -> None:
    # pyarrow is slow to import, and a page without episodes is still a page.
    from ..core.store import read_trajectories

    for name in ("base", "final"):
        path = run.folder / "evaluations" / name
        if path.exists():
            try:
                run.episodes[name] = read_trajectories(path)
            except StoreError as error:
                run.trouble = str(error)


# What the page says


def headline(run: RunRecord) -> tuple[str, str]:
    """The verdict in one sentence, and what it rests on in another."""
    result = run.result
    base, final, compared = result.base, result.final, result.comparison
    if base is None or final is None or compared is None:
        return "No verdict", "This run has not compared itself with where it began."
    before, after = percent(base.success_rate), percent(final.success_rate)
    where = f"of {final.tasks:,} {_kind_of_tasks(run)}"
    if compared.verdict == "better":
        claim = f"Better: solves {after} {where}, up from {before}"
    elif compared.verdict == "worse":
        claim = f"Worse: solves {after} {where}, down from {before}"
    elif before == after:
        claim = f"No measurable change: solves {after} {where}, as before"
    else:
        claim = f"Inconclusive: solves {after} {where}, {before} before"
    low, high = (signed(bound) for bound in compared.interval)
    basis = (
        f"Difference {signed(compared.difference)} points, 95% interval {low} to {high}, "
        f"{p_value(compared.p_value)}."
    )
    if compared.verdict == "inconclusive":
        basis += " This may well be chance; the run proves neither gain nor loss."
    if (warm := result.warm_start) and (warm.skill or 0.0) < (warm.wanted or 0.0):
        shares = f"{percent(warm.skill or 0.0)}, not the {percent(warm.wanted or 0.0)} asked for"
        basis += f" Its warm start came to solve {shares}."
    if result.stopped:
        basis += f" The run was stopped {result.stopped}."
    return claim, basis


def _kind_of_tasks(run: RunRecord) -> str:
    split = run.final.split if run.final else ""
    known = {"test": "test tasks", "validation": "validation tasks"}
    return known.get(split, f"tasks of the {split} split" if split else "tasks")


def examples(run: RunRecord) -> list[Example]:
    """The first tasks, in the evaluation's order, of each kind; broken episodes are no examples."""
    before = _first_by_task(run.episodes.get("base", []))
    after = _first_by_task(run.episodes.get("final", []))
    found: dict[str, list[Example]] = {"improved": [], "worsened": [], "unsolved": []}
    for task, judged in before.items():
        other = after.get(task)
        if other is None or judged.trajectory.error or other.trajectory.error:
            continue
        solved = judged.trajectory.success, other.trajectory.success
        if solved == (False, True):
            found["improved"].append(Example("improved", judged, other))
        elif solved == (True, False):
            found["worsened"].append(Example("worsened", judged, other))
        elif solved == (False, False):
            found["unsolved"].append(Example("unsolved", judged, other))
    return [one for kind in found.values() for one in kind[:EXAMPLES_PER_KIND]]


def _first_by_task(episodes: Iterable[Judged]) -> dict[str, Judged]:
    first = dict[str, Judged]()
    for judged in episodes:
        first.setdefault(judged.trajectory.task.id, judged)
    return first


def phases(run: RunRecord) -> list[tuple[str, float]]:
    """Seconds per phase of the whole run, longest first.

    Those of the iterations are metrics called ``time/NAME_s``.
    """
    totals = dict[str, float]()
    if run.result.warm_start:
        totals["warm start"] = run.result.warm_start.wall_s
    if tests := [one.wall_s for one in (run.base, run.final) if one is not None]:
        totals["tests before and after"] = sum(tests)
    for metrics in run.metrics:
        for name, value in metrics.items():
            if name.startswith("time/") and name.endswith("_s"):
                phase = name.removeprefix("time/").removesuffix("_s")
                totals[phase] = totals.get(phase, 0.0) + value
    return sorted(totals.items(), key=lambda item: -item[1])


def failures(run: RunRecord) -> list[tuple[str, dict[str, int]]]:
    """(error's name, {where: count}), most frequent first."""
    counts = dict[str, dict[str, int]]()

    def count(where: str, errors: dict[str, int]) -> None:
        for name, times in errors.items():
            row = counts.setdefault(name, {})
            row[where] = row.get(where, 0) + times

    for cost in run.result.costs:
        count("training", cost.failures)
    count("before", run.base.failures if run.base else {})
    count("after", run.final.failures if run.final else {})
    return sorted(counts.items(), key=lambda item: -sum(item[1].values()))


# How numbers are written


def percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def signed(difference: float) -> str:
    """In percentage points, with a sign (a true minus) unless it rounds to 0."""
    points = round(100 * difference, 1)
    return f"{points:+.1f}".replace("-", "−") if points else "0.0"


def p_value(p: float) -> str:
    if p >= 0.001:
        return f"p = {p:.3f}"
    if p < 1e-15:
        return "p < 10⁻¹⁵"
    digits, power = f"{p:.0e}".split("e-")
    return f"p = {digits} × 10{_raised(-int(power))}"


def _raised(power: int) -> str:
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def number(value: float) -> str:
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{int(value):,}"
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def seconds(value: float) -> str:
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60:,} h {minutes % 60} min"


# How episodes are shown


@dataclass
class Album:
    """Images as data URIs, until the page's allowance is used up."""

    left: int = IMAGE_BYTES

    def uris(self, observation: Observation) -> list[str]:
        """One per image; empty where it cannot be read, is no PNG, or there is no room for it."""
        return [self._uri(image) for image in observation.images]

    def _uri(self, image: Image) -> str:
        try:
            png = STORE.read(image)
        except StoreError:
            return ""
        if not png.startswith(SIGNATURE) or len(png) > self.left:
            return ""
        self.left -= len(png)
        return "data:image/png;base64," + base64.b64encode(png).decode()


def clip(text: str) -> str:
    more = len(text) - TEXT_SHOWN
    return text if more <= 0 else f"{text[:TEXT_SHOWN]} [… {more:,} more characters]"


def turns(trajectory: Trajectory) -> list[int]:
    """The turns to show: all, or the first and the last ones with -1 for those between."""
    count = len(trajectory.steps)
    if count <= TURNS_SHOWN:
        return list(range(count))
    return [*range(TURNS_SHOWN - 4), -1, *range(count - 4, count)]


def outcome(judged: Judged) -> str:
    if judged.trajectory.error:
        return "broke"
    return "solved" if judged.trajectory.success else "not solved"


# Charts


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


def cost_table(run: RunRecord) -> tuple[list[str], list[list[str]]]:
    """Column names and rows of the costs per iteration."""
    columns = dict.fromkeys(name for cost in run.result.costs for name in cost.numbers)
    rows = [
        [
            str(index if cost.iteration is None else cost.iteration),
            *(number(cost.numbers.get(name, 0)) for name in columns),
        ]
        for index, cost in enumerate(run.result.costs)
    ]
    return ["iteration", *(name.replace("_", " ") for name in columns)], rows


def _render(run: RunRecord) -> str:
    # ``finalize`` meets every expression of the template, so no text can be forgotten.
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=_shown,
    )
    template = Path(__file__).with_name("report.html.jinja").read_text("utf-8")
    claim, basis = headline(run)
    functions = (percent, signed, p_value, number, seconds, clip, turns, outcome)
    return environment.from_string(template).render(
        {function.__name__: function for function in functions},
        run=run,
        result=run.result,
        claim=claim,
        basis=basis,
        verdict=run.result.comparison.verdict if run.result.comparison else "none",
        tasks=_kind_of_tasks(run),
        rates=whisker_charts(run),
        difference=difference_chart(run),
        curve=curve_chart(run),
        by_turn=turn_chart(run),
        multiples=multiples(run),
        phases=phases(run),
        bar=charts.bar,
        costs=cost_table(run),
        failures=failures(run),
        examples=examples(run),
        images=Album().uris,
        recipe=json.dumps(run.recipe, indent=2, ensure_ascii=False) if run.recipe else "",
    )


def _shown(value: Any) -> Any:
    if isinstance(value, str) and not isinstance(value, Markup):
        return charts.visible(value)
    return value
