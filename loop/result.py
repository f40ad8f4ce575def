"""What a run has come to: its checkpoint, and the numbers of its report."""

import shutil
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

from ..core import evaluation as files
from ..core.files import hard_link, read_json, write_json
from ..core.models.origin import INSIDE, NOTE, note_base
from ..core.recipe import Recipe
from ..core.statistics import compare_outcomes, wilson
from ..core.store.folder import RunFolder, iteration_name
from ..core.types import Metrics
from .evaluate import CARD, card_of, write_card
from .warm_start import STORY

BASE = INSIDE
"""The folder, in the run's, of a base model that was made or merged here."""


def conclude(
    recipe: Recipe, base_model: str, stopped: str, learned: int, kept: RunFolder
) -> dict[str, Any]:
    """The checkpoint, of what was learned after so many iterations, and ``result.json``."""
    keep_checkpoint(recipe, base_model, learned, kept)
    evaluations = {path.name: files.read(path) for path in kept.path("evaluations").glob("[!.]*")}
    base, final = evaluations["base"], evaluations["final"]
    rounds = [
        read_json(kept.path(iteration_name(k)) / "metrics.json") for k in range(kept.finished)
    ]
    result: dict[str, Any] = {
        "recipe": recipe.name,
        "seed": recipe.seed,
        "base": brief(base),
        "final": brief(final),
        "comparison": comparison(base, final),
        "stopped": stopped or None,
        "checkpoint_iteration": learned,
        "phases": phases(recipe, kept),
        "introspection": None,
        "curve": [point(k, metrics) for k, metrics in enumerate(rounds) if points(metrics)],
        **spent(rounds, list(evaluations.values()), warm_start_of(kept)),
        "costs": [costs(k, metrics) for k, metrics in enumerate(rounds)],
    }
    if base.introspection and final.introspection:
        tables = (read_json(kept.path(f"evaluations/{n}/{files.FILE}")) for n in ("base", "final"))
        result["introspection"] = dict(
            zip(("base", "final"), (t["introspection"] for t in tables), strict=True)
        )
    write_json(kept.path("result.json"), result)
    return result


def keep_checkpoint(recipe: Recipe, base_model: str, learned: int, kept: RunFolder) -> None:
    """``checkpoint``, with its base beside it where that is a folder; unless it is there."""
    if kept.has("checkpoint"):
        return
    number = phase_of(recipe, kept.finished - 1)
    if number:
        base_model = str(kept.path(phase_base(number)).resolve())
    with kept.draft("checkpoint") as folder:
        last = kept.path(iteration_name(learned - 1)) / "checkpoint"
        shutil.copytree(last, folder, dirs_exist_ok=True)
        inside = Path(base_model).is_dir()
        if inside:
            # What is kept with the run is never rewritten; of somebody else's nobody knows.
            put = hard_link if number or kept.has(BASE) else shutil.copy2
            ignore = shutil.ignore_patterns(BASE, CARD, NOTE)  # If it is a run's checkpoint.
            shutil.copytree(base_model, folder / BASE, copy_function=put, ignore=ignore)
        note_base(folder, base_model)
        origin = {"base": BASE if inside else base_model, "base_inside": inside}
        write_card(folder, card_of(recipe.dump()) | origin)


def warm_start_of(kept: RunFolder) -> dict[str, Any] | None:
    """How the base was made; None if it was not made here."""
    if not kept.has(f"{BASE}/{STORY}"):
        return None
    return {k: v for k, v in read_json(kept.path(BASE) / STORY).items() if k != "key"}


def spent(
    rounds: Sequence[Metrics],
    evaluations: Sequence[files.EvaluationResult],
    warm: dict[str, Any] | None,
) -> dict[str, Any]:
    """Time, steps and tokens: of training, and of evaluations by themselves."""

    def total(key: str) -> int:
        return int(sum(metrics.get(key, 0.0) for metrics in rounds))

    training = sum(sum(seconds(metrics).values()) for metrics in rounds)
    validation = sum(seconds(metrics).get("validation", 0.0) for metrics in rounds)
    evaluating = sum(one.wall_s for one in evaluations)
    return {
        "wall_s": (warm["wall_s"] if warm else 0.0) + training + evaluating,
        "environment_steps": total("rollout/environment_steps"),
        "tokens_sampled": total("rollout/tokens"),
        "tokens_trained": total("train/total_tokens"),
        "warm_start": warm,
        "evaluation": {
            "wall_s": validation + evaluating,
            "environment_steps": total("validation/environment_steps")
            + sum(one.environment_steps for one in evaluations),
            "tokens_sampled": total("validation/tokens")
            + sum(one.tokens_sampled for one in evaluations),
        },
    }


def brief(evaluation: files.EvaluationResult) -> dict[str, Any]:
    return {
        "tasks": evaluation.tasks,
        "successes": evaluation.successes,
        "success_rate": evaluation.success_rate,
        "interval": list(evaluation.interval),
        "failed": evaluation.failed,
        "failures": evaluation.failures,
    }


def seconds(metrics: Metrics) -> dict[str, float]:
    """Where an iteration's time went, by phase."""
    return {
        key.removeprefix("time/").removesuffix("_s"): value
        for key, value in metrics.items()
        if key.startswith("time/")
    }


def costs(index: int, metrics: Metrics) -> dict[str, Any]:
    """What one iteration's training cost, its evaluation left out."""
    prefix = "failures/"
    return {
        "iteration": index + 1,
        "episodes": int(metrics["rollout/episodes"]),
        "environment_steps": int(metrics["rollout/environment_steps"]),
        "tokens_sampled": int(metrics["rollout/tokens"]),
        "tokens_trained": int(metrics.get("train/total_tokens", 0)),
        "wall_s": sum(v for k, v in seconds(metrics).items() if k != "validation"),
        "failures": {
            key.removeprefix(prefix): int(value)
            for key, value in metrics.items()
            if key.startswith(prefix)
        },
    }


def points(metrics: Metrics) -> bool:
    return "validation/success" in metrics


def point(index: int, metrics: Metrics) -> dict[str, Any]:
    rate, tasks = metrics["validation/success"], int(metrics["validation/tasks"])
    return {
        "iteration": index + 1,
        "success_rate": rate,
        "interval": list(wilson(round(rate * tasks), tasks)),
        "tasks": tasks,
    }


def phase_name(number: int) -> str:
    """Of the evaluation after the phase with that number, from 0."""
    return f"phase_{number + 1}"


def phase_base(number: int) -> str:
    """The folder, in the run's, of the model that a phase after the first begins with."""
    return f"bases/{phase_name(number)}"


def phase_of(recipe: Recipe, index: int) -> int:
    """The number of the phase that an iteration belongs to."""
    ends = accumulate(phase.iterations for phase in recipe.phases)
    return next(number for number, end in enumerate(ends) if index < end)


def phases(recipe: Recipe, kept: RunFolder) -> list[dict[str, Any]]:
    """Each phase that was begun, compared to how the one before it ended; empty if there is one."""
    ends = [0, *accumulate(phase.iterations for phase in recipe.phases)]
    if len(ends) == 2:
        return []
    names = ["base", *(phase_name(number) for number in range(len(recipe.phases) - 1)), "final"]
    summaries: list[dict[str, Any]] = []
    for number, (first, last) in enumerate(pairwise(ends)):
        if kept.finished <= first:
            break
        after = names[number + 1] if kept.has(f"evaluations/{names[number + 1]}") else "final"
        sides = [files.read(kept.path(f"evaluations/{n}")) for n in (names[number], after)]
        summaries.append(
            {
                "trainer": recipe.phases[number].trainer.use,
                "iterations": min(last, kept.finished) - first,
                "final": brief(sides[1]),
                "comparison": comparison(*sides),
            }
        )
    return summaries


def comparison(before: files.EvaluationResult, after: files.EvaluationResult) -> dict[str, Any]:
    compared = compare_outcomes(before.outcomes, after.outcomes)
    return {
        "difference": compared.difference,
        "interval": list(compared.interval),
        "p_value": compared.p_value,
        "verdict": compared.verdict,
        "test": compared.test,
        "only_base": compared.only_a,
        "only_final": compared.only_b,
    }
