"""What an iteration is measured by: every metric's name, unit and meaning.

A run writes those that are defined, and only those: nothing undefined is written down as a number.
Trainers from elsewhere may measure more.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    unit: str
    """``share``: in [0, 1]; ``count``; ``s``; ``nats``; ``1``: a plain number."""
    meaning: str


METRICS = {
    "rollout/episodes": Metric("count", "episodes played for the iteration, those that failed too"),
    "rollout/environment_steps": Metric("count", "steps that worlds made, replayed ones too"),
    "rollout/tokens": Metric("count", "tokens sampled, in episodes and outside of them"),
    "rollout/failed": Metric("count", "episodes that broke: they are data, and nothing is learned"),
    "rollout/invalid": Metric("count", "turns in which nothing could be read as an action"),
    "rollout/success": Metric("share", "episodes that the world says have succeeded"),
    "rollout/reward": Metric("1", "the world's reward per episode, summed over its steps"),
    "rollout/cut_share": Metric("share", "completions that ended at policy.max_tokens"),
    "rollout/left_out": Metric("share", "prompts that left the oldest turns out, to fit the model"),
    "rollout/staleness": Metric("1", "iterations learned from since a completion, on average"),
    "rollout/staleness_max": Metric("count", "the same of the oldest completion"),
    "judge/score": Metric("share", "the judge's mean score, over episodes it decided"),
    "judge/undecided": Metric("count", "episodes without a score"),
    "judge/broken": Metric("count", "episodes whose judge failed"),
    "train/loss": Metric("1", "mean loss over optimiser steps"),
    "train/grad_norm": Metric("1", "mean norm of the gradient, before it is clipped"),
    "train/ratio": Metric("1", "mean probability ratio to the policy that sampled"),
    "train/kl_old": Metric("nats", "estimated divergence from the policy that sampled, a token"),
    "train/learning_rate": Metric("1", "of the last optimiser step"),
    "train/token_accuracy": Metric("share", "tokens that are the likeliest ones (TRL only)"),
    "train/examples": Metric("count", "examples learned from; 0: nothing was learned"),
    "train/rows": Metric("count", "rows of tokens that they were packed into"),
    "train/updates": Metric("count", "optimiser steps"),
    "train/tokens": Metric("count", "tokens that went forward and backward"),
    "train/total_tokens": Metric("count", "the same, of all batches of the iteration"),
    "train/prefix_breaks": Metric("count", "turns whose prompt did not go on from the one before"),
    "validation/success": Metric("share", "validation tasks solved"),
    "validation/tasks": Metric("count", "validation tasks played"),
    "validation/failed": Metric("count", "those that broke"),
    "validation/environment_steps": Metric("count", "steps in them"),
    "validation/tokens": Metric("count", "tokens sampled in them"),
    "time/rollout_s": Metric("s", "playing, judging and choosing what to learn"),
    "time/learn_s": Metric("s", "the learner's updates"),
    "time/store_s": Metric("s", "writing the iteration's episodes and weights"),
    "time/validation_s": Metric("s", "the point of the learning curve"),
    "guard/episodes": Metric("count", "labelled episodes that the judge is compared on"),
    "guard/score": Metric("share", "the judge's mean score of them"),
    "guard/success": Metric("share", "those that have truly succeeded"),
    "guard/precision": Metric("share", "those that have, of those the judge calls solved"),
    "guard/recall": Metric("share", "those the judge calls solved, of those that are"),
    "guard/kappa": Metric("1", "Cohen's: agreement beyond chance, in [-1, 1]"),
    "guard/canaries_paid": Metric(
        "count", "answers worth nothing that the judge pays; should be 0"
    ),
    "discriminator/loss": Metric("nats", "mean loss of telling policy and demonstrations apart"),
    "discriminator/accuracy": Metric("share", "pairs that it tells apart"),
    "discriminator/mean": Metric("share", "how sure it is that answers are the policy's"),
    "discriminator/share": Metric("share", "how much it takes answers for demonstrations"),
    "practice/written": Metric("count", "tasks that the policy was to write"),
    "practice/valid": Metric("count", "those that came out as tasks"),
}
FAMILIES = {"failures/": Metric("count", "episodes that failed with the error of this name")}
"""Metrics whose names end in what was met."""


def described(name: str) -> Metric | None:
    """What the metric of that name is; None if nobody here knows it."""
    family = next((one for start, one in FAMILIES.items() if name.startswith(start)), None)
    return METRICS.get(name, family)


def table() -> str:
    """All of them, as a table in Markdown."""
    rows = {**METRICS, **{f"{start}NAME": one for start, one in FAMILIES.items()}}
    lines = [f"| `{name}` | {one.unit} | {one.meaning} |" for name, one in rows.items()]
    return "\n".join(["| metric | unit | meaning |", "| --- | --- | --- |", *lines])
