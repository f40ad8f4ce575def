"""A run as its folder tells of it: its result, its evaluations, its metrics, its episodes."""

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from ..core import evaluation
from ..core.errors import StoreError
from ..core.evaluation import EvaluationResult
from ..core.files import read_json
from ..core.statistics import Interval, Introspection, Judgement
from ..core.types import Judged


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
        stored = self.result.introspection or {}
        sides = {"base": self.base, "final": self.final}
        tables = {name: (side.introspection if side else None) for name, side in sides.items()}
        return {name: found for name in sides if (found := tables[name] or stored.get(name))}


def load(folder: Path) -> RunRecord:
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
