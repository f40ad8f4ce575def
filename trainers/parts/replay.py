"""What self-imitation remembers: recent successes, and how groups have been doing lately."""

import json
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path

from ...core.files import read_json
from ...core.store import read_trajectories, write_trajectories
from ...core.types import Judged
from .advantage import followed, own_turns
from .credit import score

LEAST = 1e-6
"""The priority of a step that is no better than expected."""


@dataclass(frozen=True)
class ReplayEntry:
    judged: Judged
    reward: float
    """As it was paid then."""
    step: int
    """The iteration it was played in."""


@dataclass
class Replay:
    """A buffer of episodes, and beside it a queue of groups' mean rewards, whole steps at a time.

    The median of the queue is what an episode must have beaten to be worth repeating: the policy
    has become better since, so advantages of then would be too rosy (SPEAR, arXiv:2509.22601).
    """

    size: int
    """How many episodes are replayed at once, at most."""
    baseline_size: int
    """The queue holds about this many groups."""
    tolerate: int
    """How many iterations an episode stays."""
    memories: list[ReplayEntry] = field(default_factory=list[ReplayEntry])
    mean_rewards: list[tuple[int, list[float]]] = field(
        default_factory=list[tuple[int, list[float]]]
    )
    """Per iteration, oldest first: its number, its groups' means."""

    @property
    def median(self) -> float | None:
        """None if there was no group yet."""
        every = [mean for _, groups in self.mean_rewards for mean in groups]
        return statistics.median(every) if every else None

    def take(self, seed: int) -> list[tuple[ReplayEntry, float]]:
        """Episodes to repeat, with their advantages over the median, all above 0.

        Nothing until half as many again as are replayed at once beat the median. Then a random
        power of two of those, at most ``size``, and the buffer is emptied.
        """
        median = self.median
        if median is None:
            return []
        good = [memory for memory in self.memories if memory.reward > median]
        if len(good) <= 1.5 * self.size:
            return []
        self.memories.clear()
        count = min(1 << (len(good).bit_length() - 1), self.size)
        chosen = random.Random(seed).sample(good, count)
        return [(memory, memory.reward - median) for memory in chosen]

    def expire(self, step: int) -> None:
        """Forget what is more than ``tolerate`` iterations older than ``step``."""
        self.memories = [m for m in self.memories if step - m.step <= self.tolerate]

    def observe(self, step: int, mean_rewards: Sequence[float]) -> None:
        """Append an iteration's groups; before, whole iterations leave until there is room."""
        while sum(len(some) for _, some in self.mean_rewards) > self.baseline_size:
            self.mean_rewards.pop(0)
        self.mean_rewards.append((step, list(mean_rewards)))

    def save(self, folder: Path, images: Path) -> None:
        write_trajectories(folder, [m.judged for m in self.memories], images)
        numbers = {
            "memories": [[m.reward, m.step] for m in self.memories],
            "means": self.mean_rewards,
        }
        (folder / "replay.json").write_text(json.dumps(numbers))

    def restore(self, folder: Path) -> None:
        """Raises: StoreError: the folder is damaged."""
        numbers = read_json(folder / "replay.json")
        played = read_trajectories(folder)
        pairs = zip(played, numbers["memories"], strict=True)
        self.memories = [ReplayEntry(judged, reward, step) for judged, (reward, step) in pairs]
        self.mean_rewards = [(step, paid) for step, paid in numbers["means"]]


def returns(one: Judged, gamma: float) -> list[float]:
    """Of each own turn: the score, discounted by how many turns come after it."""
    after = followed(one.trajectory)
    return [gamma ** after[turn] * score(one) for turn, _ in own_turns(one)]


def recent(sizes: Sequence[int], most: int) -> int:
    """How many of the newest episodes, of so many actions each, make at most ``most`` together.

    At least one, if there is any.
    """
    return max(min(1, len(sizes)), sum(total <= most for total in accumulate(reversed(sizes))))


def prioritised(
    gaps: Sequence[float], size: int, priority: float, correction: float, seed: int
) -> list[tuple[int, float]]:
    """``size`` places, drawn in proportion to max(gap, 1e-6)**priority, with importance weights.

    A weight is (1 / (N p))**correction, over the greatest of those drawn (Schaul et al. 2016,
    arXiv:1511.05952).
    """
    worth = [max(gap, LEAST) ** priority for gap in gaps]
    drawn = random.Random(seed).choices(range(len(worth)), worth, k=size)
    total = sum(worth)
    weights = [(total / (len(worth) * worth[k])) ** correction for k in drawn]
    return [(k, w / max(weights)) for k, w in zip(drawn, weights, strict=True)]
