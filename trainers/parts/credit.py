"""From judged trajectories to groups."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pydantic import Field

from ...core.config import Config
from ...core.protocols import Agent
from ...core.store import read_trajectories
from ...core.types import Aggregation, Judged
from ..learning.examples import prompted
from ..learning.loss import NLL


class TrainerConfig(Config):
    """What every trainer's config has: how much is played before it is called."""

    tasks_per_iteration: int = Field(default=64, ge=1)
    attempts_per_task: int = Field(default=1, ge=1)
    """The size of a group."""
    epochs: int = Field(default=1, ge=1)
    """Passes over an iteration's examples."""
    aggregation: Aggregation = "seq-mean-token-mean"
    """How the token losses of imitation become one number."""
    length: int = Field(default=1, ge=1)
    """The constant, in tokens, of ``aggregation: seq-mean-token-sum-norm``."""

    @property
    def nll(self) -> NLL:
        return NLL(self.aggregation, self.length)


def key(judged: Judged) -> tuple[str, int]:
    """What attempts of one group, or turns of one conversation, have in common."""
    return judged.trajectory.task.id, judged.trajectory.seed


def by_task(batch: Iterable[Judged]) -> list[list[Judged]]:
    """Groups of attempts at one task with one seed, without the undecided; never an empty group."""
    groups: dict[tuple[str, int], list[Judged]] = {}
    for judged in batch:
        if judged.verdict.score is not None:
            groups.setdefault(key(judged), []).append(judged)
    return list(groups.values())


def score(judged: Judged) -> float:
    """The verdict's score, of one that ``by_task`` let through."""
    assert judged.verdict.score is not None, "by_task drops the undecided"
    return judged.verdict.score


def stored(path: Path, agent: Agent) -> list[Judged]:
    """What ``read_trajectories`` finds there.

    Versions that did not keep prompts have left it to their readers to ask the agent for them.

    Raises:
        StoreError: as there.
    """
    return [
        replace(one, trajectory=prompted(one.trajectory, agent)) for one in read_trajectories(path)
    ]
