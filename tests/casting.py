"""What trainers are tested with: a context of which only what a test names is there."""

from collections.abc import Sequence
from typing import Any

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.core.protocols import Context
from selfwright.core.types import (
    Action,
    Completion,
    Judged,
    Observation,
    Sampling,
    Step,
    Stop,
    Task,
    Trajectory,
    Verdict,
)


def context_of(**parts: Any) -> Context:
    """Whatever is not given fails when it is used."""
    names = ("judge", "policy", "attempt", "attempt_blind", "play_as", "open")
    default: dict[str, Any] = {
        "agent": Chat(ChatConfig()),
        "sampling": Sampling(),
        "base": "",
        "seed": 0,
        **dict.fromkeys(names),
    }
    return Context(**(default | parts))


def episode(
    score: float | None,
    *turns: tuple[str, str],
    task: str = "t",
    attempt: int = 0,
    replayed: int = 0,
    max_steps: int = 9,
    sampled: bool = True,
) -> Judged:
    """``turns``: what was seen, and what was said then.

    Said as one token with log-probability -1, or as text only.
    """
    ids: tuple[tuple[int, ...], tuple[float, ...]] = ((7,), (-1.0,)) if sampled else ((), ())
    steps = tuple(
        Step(Observation(seen), Action(said, Completion(said, *ids)), 0.0) for seen, said in turns
    )
    won = score is not None and score >= 1
    trajectory = Trajectory(
        Task(task, f"do {task}", max_steps),
        steps,
        Observation("the end"),
        Stop.TERMINATED if won else Stop.TRUNCATED,
        "base",
        0,
        attempt,
        replayed,
        won,
    )
    return Judged(trajectory, Verdict(score, "", "test"))


def told(judged: Sequence[Judged]) -> list[str]:
    """What was said last in each."""
    return [one.trajectory.steps[-1].action.text for one in judged]
