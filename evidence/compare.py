"""``selfwright compare A B``: is B better than A on the same tasks, or may it be chance?"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..core import evaluation
from ..core.config import Fleet
from ..core.errors import StoreError
from ..core.evaluation import EvaluationResult
from ..core.statistics import compare_outcomes


def compare(a: Path, b: Path) -> dict[str, Any]:
    """B against A, paired by task. Each is an evaluation folder or file, or a run (its final one).

    Raises:
        StoreError: if one is missing or damaged, or the two did not play the same tasks of the same
            world, split and seed.
    """
    before, after = evaluation.read(_find(a)), evaluation.read(_find(b))
    _pairable(before, after)
    outcome = compare_outcomes(before.outcomes, after.outcomes)
    both = sum(after.outcomes[task] for task, solved in before.outcomes.items() if solved)
    return {
        **asdict(outcome),
        "both": both,
        "neither": outcome.tasks - both - outcome.only_a - outcome.only_b,
        "notes": _notes(before, after),
        "a": {"path": str(a), **_side(before)},
        "b": {"path": str(b), **_side(after)},
    }


def render(result: dict[str, Any]) -> str:
    """``compare``'s result in a few lines for a terminal."""
    low, high = (100 * bound for bound in result["interval"])
    lines = [_line("A", result["a"]), _line("B", result["b"])]
    lines += [
        f"B - A  {100 * result['difference']:+.1f} points  [{low:+.1f}, {high:+.1f}]"
        f"  p = {result['p_value']:.2g}",
        f"solved by both {result['both']}, only A {result['only_a']}, only B {result['only_b']},"
        f" neither {result['neither']}  ({result['test']})",
        *(f"note: {note}" for note in result["notes"]),
        f"verdict: {result['verdict']}",
    ]
    return "\n".join(lines)


def _line(name: str, side: dict[str, Any]) -> str:
    low, high = side["interval"]
    broke = f", {side['failed']} broke" if side["failed"] else ""
    return (
        f"{name}  {side['success_rate']:6.1%}  [{low:.1%}, {high:.1%}]"
        f"  {side['successes']}/{side['tasks']}{broke}  {side['checkpoint']}"
    )


def _find(path: Path) -> Path:
    run = path / "evaluations" / "final"
    if (path / evaluation.FILE).exists() or not run.exists():
        return path
    return run


def _world(result: EvaluationResult) -> dict[str, Any]:
    # How a world is hosted decides nothing about what its tasks are.
    hosting = Fleet.model_fields
    return {key: value for key, value in result.environment.items() if key not in hosting}


def _pairable(a: EvaluationResult, b: EvaluationResult) -> None:
    faults = [
        f"environment.{key} ({_differ(_world(a), _world(b), key)})"
        for key in sorted(_world(a).keys() | _world(b).keys())
        if _world(a).get(key) != _world(b).get(key)
    ]
    faults += [f"split ({a.split!r} and {b.split!r})"] if a.split != b.split else []
    faults += [f"seed ({a.seed} and {b.seed})"] if a.seed != b.seed else []
    if faults:
        raise StoreError(
            f"A and B did not meet the same worlds; they differ in {', '.join(faults)}; "
            "evaluate both with the same settings"
        )


def _differ(a: dict[str, Any], b: dict[str, Any], key: str) -> str:
    sides = [repr(side[key]) if key in side else "not given" for side in (a, b)]
    return " and ".join(sides)


def _notes(a: EvaluationResult, b: EvaluationResult) -> list[str]:
    notes = list[str]()
    if a.temperature != b.temperature:
        notes.append(f"sampled at different temperatures: A {a.temperature:g}, B {b.temperature:g}")
    if a.agent != b.agent:
        notes.append("A and B used different agent settings")
    for name, side in (("A", a), ("B", b)):
        if side.failed:
            notes.append(f"{side.failed} episodes of {name} broke and count as not solved")
    return notes


def _side(result: EvaluationResult) -> dict[str, Any]:
    return {
        "checkpoint": result.checkpoint,
        "tasks": result.tasks,
        "successes": result.successes,
        "success_rate": result.success_rate,
        "interval": result.interval,
        "failed": result.failed,
        "undecided": result.undecided,
    }
