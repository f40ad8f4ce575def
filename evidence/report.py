"""``report.html``: what a run proved, learned and cost, on one page that needs nothing but itself.

All text that a model or a world produced is escaped by the template, and ``charts.visible`` shows
what would hide or reorder it; the page carries no script and its policy forbids any.
"""

import base64
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from ..core.errors import StoreError
from ..core.files import atomic_write_bytes
from ..core.images import SIGNATURE, STORE
from ..core.types import Image, Judged, Observation, Trajectory
from . import charts
from .figures import curve_chart, difference_chart, multiples, turn_chart, whisker_charts
from .numbers import number, p_value, percent, seconds, signed
from .record import RunRecord, load

EXAMPLES_PER_KIND = 2
TURNS_SHOWN = 12
TEXT_SHOWN = 3_000
"""Characters of one text; the rest is counted."""
IMAGE_BYTES = 8_000_000
"""For all images of the page together."""


@dataclass(frozen=True)
class Example:
    """One task as played before and after training."""

    kind: Literal["improved", "worsened", "unsolved"]
    before: Judged
    after: Judged


def report(folder: Path) -> Path:
    """Write ``folder/report.html`` for the run in ``folder``; returns its path.

    What a run does not have (no curve, no table, no episodes) is left out of its page.

    Raises:
        StoreError: if ``result.json`` is missing, or a file of the run is damaged.
    """
    path = folder / "report.html"
    atomic_write_bytes(path, _render(load(folder)).encode())
    return path


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
