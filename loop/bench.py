"""``selfwright bench-methods``: which method works in this world, at equal base and budget?"""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from ..core import evaluation as files
from ..core.config import Budget
from ..core.errors import RecipeError
from ..core.files import atomic_write_bytes, write_json
from ..core.plugins import nearest
from ..core.recipe import Phase, Recipe, differences, read, section
from ..core.statistics import compare_outcomes
from .events import Listener, Message, ignore
from .run import run

SHARED = ("budget", "environment", "agent", "policy", "evaluation")
"""What may not differ between methods: else it is not they that are compared."""
BASELINE = "imitation"
"""The method that others have to beat, unless another is named: own successes, cloned."""


def planned(
    recipes: Sequence[str], seeds: int, overrides: Sequence[str], against: str = ""
) -> dict[str, list[Recipe]]:
    """Each method's runs, by its recipe's name; the one that others have to beat comes first.

    ``against`` names that one. If it does not, it is imitation, added where it is missing.

    Raises:
        RecipeError: a recipe is wrong, two share a name, they differ in more than trainer, judge
            and learner, or nothing limits what a method may spend.
    """
    plans: dict[str, list[Recipe]] = {}

    def add(name: str, recipe: str, more: Sequence[str] = ()) -> None:
        if name in plans:
            raise RecipeError(f"two methods are called {name!r}; give their files other names")
        plans[name] = [read(recipe, [*overrides, *more, f"seed={k}"]) for k in range(seeds)]

    for recipe in recipes:
        add(Path(recipe).stem, recipe)
    if not against:
        found = (name for name, several in plans.items() if is_baseline(several[0]))
        against = next(found, BASELINE)
        if against not in plans:
            plans[BASELINE] = [cloning(recipe) for recipe in next(iter(plans.values()))]
    elif against not in plans:
        raise RecipeError(f"no recipe is called {against!r}; {nearest(against, plans)}")
    (first, reference), *others = ((name, several[0]) for name, several in plans.items())
    faults: list[str] = []
    for name, other in others:
        a, b = ({key: one.dump()[key] for key in SHARED} for one in (reference, other))
        faults += [f"{first} and {name}: {line}" for line in differences(a, b)]
    if faults:
        raise RecipeError(
            "methods may differ in trainer, judge and learner only:\n" + "\n".join(faults)
        )
    if reference.budget.environment_steps is None and reference.budget.tokens is None:
        raise RecipeError(
            "methods are compared at an equal budget, and none is given; say -o "
            "budget.environment_steps=N, -o budget.tokens=N or both, with iterations enough for it"
        )
    return {against: plans[against], **plans}


def cloning(recipe: Recipe) -> Recipe:
    """The policy's own successes cloned, with as many attempts and epochs as that recipe's."""
    theirs = recipe.phases[0].trainer.dump()
    keys = ("tasks_per_iteration", "attempts_per_task", "epochs")
    kept = [f"trainer.{key}={theirs[key]}" for key in keys if key in theirs]
    trainer, _ = section("trainer", BASELINE, ["trainer.source=self", *kept])
    judge, _ = section("judge", "reward")
    phase = Phase(trainer, judge, recipe.iterations)
    return replace(recipe, name=BASELINE, phases=(phase,), judge=judge)


def is_baseline(recipe: Recipe) -> bool:
    return [phase.trainer.use for phase in recipe.phases] == [BASELINE]


async def bench(
    plans: Mapping[str, Sequence[Recipe]], output: Path, listener: Listener = ignore
) -> dict[str, Any]:
    """All runs, one after another; what is there already in ``output`` is not made again.

    The first of ``plans`` is what the others are compared with. Writes ``bench.json``, which is
    what this returns, and ``bench.html``.
    """
    results: dict[str, list[dict[str, Any]]] = {}
    seeds = range(len(next(iter(plans.values()))))
    # Seed by seed, so that whoever stops early has whole comparisons.
    for seed in seeds:
        for name, several in plans.items():
            listener(Message(f"{name}, seed {seed}", title=True))
            folder = output / f"{name}-{seed}"
            results.setdefault(name, []).append(await run(several[seed], folder, listener))
    baseline = next(iter(plans))
    found: dict[str, Any] = {"baseline": baseline, "seeds": len(seeds), "methods": {}}
    for name, several in results.items():
        rows = [
            row(
                result,
                output / f"{name}-{seed}",
                output / f"{baseline}-{seed}",
                plans[name][seed].budget,
            )
            for seed, result in enumerate(several)
        ]
        gains = [one["difference"] for one in rows]
        error = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else None
        found["methods"][name] = {
            "recipe": plans[name][0].dump(),
            "mean_difference": statistics.fmean(gains),
            "standard_error": error,
            "better": sum(one["verdict"] == "better" for one in rows),
            "better_than_baseline": sum(one["baseline"]["verdict"] == "better" for one in rows),
            "runs": rows,
        }
    found["pairs"] = pairs(
        {name: [output / f"{name}-{seed}" for seed in seeds] for name in results}
    )
    write_json(output / "bench.json", found)
    atomic_write_bytes(output / "bench.html", page(found).encode())
    listener(Message(f"report: {output / 'bench.html'}"))
    return found


def row(result: Mapping[str, Any], folder: Path, baseline: Path, budget: Budget) -> dict[str, Any]:
    """One run: against its base, and against imitation with the same seed, on the same tasks."""
    mine, theirs = (files.read(f / "evaluations" / "final").outcomes for f in (folder, baseline))
    own: Mapping[str, Any] = result["comparison"]
    return {
        "seed": result["seed"],
        "tasks": result["final"]["tasks"],
        "base": result["base"]["success_rate"],
        "final": result["final"]["success_rate"],
        **{key: own[key] for key in ("difference", "interval", "p_value", "verdict")},
        "baseline": compared(theirs, mine),
        "stopped": result["stopped"],
        "spent": budget.share(result["environment_steps"], result["tokens_sampled"]),
        "iterations": len(result["costs"]),
        **{
            key: result[key]
            for key in ("environment_steps", "tokens_sampled", "tokens_trained", "wall_s")
        },
    }


def pairs(folders: Mapping[str, Sequence[Path]]) -> dict[str, dict[str, Any]]:
    """Every method against every other one, on all tasks of all seeds together."""
    pooled = {
        name: {
            f"{seed} {task}": solved
            for seed, folder in enumerate(several)
            for task, solved in files.read(folder / "evaluations" / "final").outcomes.items()
        }
        for name, several in folders.items()
    }
    found: dict[str, dict[str, Any]] = {}
    for name, mine in pooled.items():
        others = {other: theirs for other, theirs in pooled.items() if other != name}
        found[name] = {}
        for other, theirs in others.items():
            found[name][other] = compared(theirs, mine)
    return found


def compared(a: Mapping[str, bool], b: Mapping[str, bool]) -> dict[str, Any]:
    """Whether ``b`` does better than ``a``, from outcomes by task."""
    one = compare_outcomes(a, b)
    return {
        "difference": one.difference,
        "interval": list(one.interval),
        "p_value": one.p_value,
        "verdict": one.verdict,
    }


def render(found: Mapping[str, Any]) -> str:
    """A table for people: a line per run, and one per method."""
    lines = [titles(found)]
    for name, method in found["methods"].items():
        lines += [cells(name, one) for one in method["runs"]]
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = ["  ".join(c.rjust(w) for c, w in zip(line, widths, strict=True)) for line in lines]
    return "\n".join([*text, "", *summaries(found)])


def titles(found: Mapping[str, Any]) -> tuple[str, ...]:
    compared_with = f"over {found['baseline']}"
    return (
        *("method", "seed", "base", "final", "gain", "p", "verdict", compared_with, "verdict"),
        *("steps", "tokens", "wall s"),
    )


def summaries(found: Mapping[str, Any]) -> list[str]:
    methods: Mapping[str, Any] = found["methods"]
    return [summary(name, method, found["baseline"]) for name, method in methods.items()]


def summary(name: str, method: Mapping[str, Any], baseline: str) -> str:
    runs, error = len(method["runs"]), method["standard_error"]
    spread = "" if error is None else f" +- {100 * error:.1f}"
    return (
        f"{name}: {100 * method['mean_difference']:+.1f}{spread} points; better than its base in "
        f"{method['better']} of {runs} runs, than {baseline} in {method['better_than_baseline']}"
    )


def cells(name: str, one: Mapping[str, Any]) -> tuple[str, ...]:
    return (
        name + (" (stopped)" if one["stopped"] else " (spent less)" if one["spent"] < 0.9 else ""),
        str(one["seed"]),
        f"{one['base']:.1%}",
        f"{one['final']:.1%}",
        f"{100 * one['difference']:+.1f}",
        f"{one['p_value']:.1g}",
        one["verdict"],
        f"{100 * one['baseline']['difference']:+.1f}",
        one["baseline"]["verdict"],
        f"{one['environment_steps']:,}",
        f"{one['tokens_sampled']:,}",
        f"{one['wall_s']:.0f}",
    )


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Methods compared</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<style>
body { font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child { text-align: left; }
.better { color: #05651e; font-weight: 600; } .worse { color: #a3160b; font-weight: 600; }
@media (prefers-color-scheme: dark) {
body { background: #15171a; color: #e6e6e6; } th, td { border-color: #3a3d42; }
.better { color: #6fd68a; } .worse { color: #ff9a8d; } }
</style></head><body>
<h1>Methods compared</h1>
<p>Every run began with the same base as the others of its seed, spent the same budget (but for
a few per cent; "spent less" had too few iterations) and was tested on the same
{{ tasks }} held-out tasks. Verdicts are exact McNemar tests at 5 %, not corrected for number.</p>
<ul>{% for line in summaries %}<li>{{ line }}</li>{% endfor %}</ul>
<div class="scroll" tabindex="0" role="region" aria-label="All runs"><table>
<thead><tr>{% for title in head %}<th scope="col">{{ title }}</th>{% endfor %}</tr></thead>
<tbody>{% for line in lines %}<tr>{% for cell in line %}
<td{% if cell in ("better", "worse") %} class="{{ cell }}"{% endif %}>{{ cell }}</td>
{%- endfor %}</tr>{% endfor %}</tbody></table></div>
<h2>Each against each</h2>
<p>Points by which the method of the row solves more than that of the column, over all seeds' tasks;
in colour where the exact McNemar test on them says so at 5 %. It knows nothing of seeds.</p>
<div class="scroll" tabindex="0" role="region" aria-label="Each against each"><table>
<thead><tr><th scope="col">method</th>{% for name in names %}<th scope="col">{{ name }}</th>
{%- endfor %}</tr></thead>
<tbody>{% for name in names %}<tr><th scope="row">{{ name }}</th>{% for other in names %}
{% if other == name %}<td></td>{% else %}{% set one = pairs[name][other] %}
<td{% if one.verdict != "inconclusive" %} class="{{ one.verdict }}"{% endif %}>
{{- "%+.1f"|format(100 * one.difference) }}</td>{% endif %}{% endfor %}</tr>{% endfor %}
</tbody></table></div>
</body></html>
"""


def page(found: Mapping[str, Any]) -> str:
    """``bench.html``: one self-contained page; all names are escaped."""
    methods: Mapping[str, Any] = found["methods"]
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    return template.render(
        head=titles(found),
        lines=[cells(name, one) for name, method in methods.items() for one in method["runs"]],
        summaries=summaries(found),
        names=list(methods),
        pairs=found["pairs"],
        tasks=next(iter(methods.values()))["runs"][0]["tasks"],
    )
