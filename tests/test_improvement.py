"""Every method makes a tiny model better at what it was not trained on, beyond chance."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from importlib.metadata import entry_points
from math import log
from pathlib import Path
from typing import NamedTuple

import pytest
from components import played

from selfwright.core.config import Config, PolicyConfig
from selfwright.core.errors import PolicyError
from selfwright.core.seeds import derive
from selfwright.core.statistics import Comparison, compare_outcomes
from selfwright.core.store import TRAJECTORIES, read_trajectories
from selfwright.core.types import Completion, Observation, Prompt, Sampling, Task, TimeStep

WORDS = ("red", "blue", "green", "black", "white")
HERE = Path(__file__).stem


class WordsConfig(Config):
    attempts: int = 1
    shift: int = 0
    """By so many places in the list the right word comes after the one that is named."""
    expert: tuple[float, float] = (1.0, 0.0)
    """How often the expert says what is right, and the word that is named; else it says any."""


class Words:
    """A word is named; it, or the next one in a list, is to be said.

    Tasks with the same word are told apart by a number that does not matter.
    """

    Config = WordsConfig
    isolation = "inline"

    def __init__(self, config: WordsConfig) -> None:
        self._config = config

    def tasks(self, split: str) -> list[Task]:
        first = {"train": 100, "validation": 400, "test": 500}[split]
        return [
            Task(f"{split}-{number}-{word}", f"{number} {word}", self._config.attempts)
            for number in range(first, first + 100)
            for word in WORDS
        ]

    async def reset(self, task: Task, seed: int) -> Observation:
        self._task, self._seed, self._step = task, seed, 0
        return Observation("go")

    async def step(self, action: str) -> TimeStep:
        right = action == right_for(self._task.instruction, self._config.shift)
        self._step += 1
        seen = Observation("right" if right else "no")
        return TimeStep(seen, float(right), terminated=right, success=right)

    async def expert(self) -> str:
        config, seed = self._config, derive(self._seed, self._task.id, self._step)
        luck, (right, named) = seed / 2**63, config.expert
        if luck < right + named:
            return right_for(self._task.instruction, config.shift if luck < right else 0)
        return await self.random(seed)

    async def random(self, seed: int) -> str:
        return WORDS[seed % len(WORDS)]

    async def close(self) -> None:
        pass


def right_for(instruction: str, shift: int) -> str:
    return WORDS[(WORDS.index(instruction.rpartition(" ")[2]) + shift) % len(WORDS)]


class Friend:
    """A policy that scores answers by whether they are right, alone or one beside another."""

    Config = PolicyConfig
    checkpoint = "friend"

    def __init__(self, config: PolicyConfig, model: str, seed: int) -> None:
        pass

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        raise PolicyError("it only scores")

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        lines = prompt.messages[-1].text.splitlines()
        wanted = next(right_for(line, 1) for line in lines if line.startswith("Task: "))
        right = [lines[k + 1] == wanted for k, line in enumerate(lines) if line == "<<<"]
        # Alone, how likely yes is; of two, how likely A.
        chance = (0.1 + 0.8 * right[0]) if len(right) == 1 else (1 + right[0] - right[1]) / 2
        chance = min(max(chance, 0.1), 0.9)
        return replace(
            completion, logprobs=(log(chance if completion.text in ("yes", "A") else 1 - chance),)
        )

    async def load(self, checkpoint: Path | None) -> None:
        raise PolicyError("nobody trains it")

    async def close(self) -> None:
        pass


RECIPE = f"""
seed: 5
iterations: 4
environment: {{use: '{HERE}:Words', shift: 1, parallel: 512}}
policy: {{model: MODEL, max_tokens: 3, batch_size: 512}}
policies: {{friend: {{use: '{HERE}:Friend', model: friend}}}}
trainer: {{use: imitation, tasks_per_iteration: 24}}
learner: {{rank: 8, alpha: 16, learning_rate: 1e-2, batch_size: 64}}
evaluation: {{tasks: 200, temperature: 1.0, every: 0, validation_tasks: 1, turns: 0}}
"""
STILL = ["iterations=1", "trainer.tasks_per_iteration=1", "evaluation.tasks=1"]
"""Of a run that is there for its warm start."""
GROUPS = ["trainer.attempts_per_task=8"]
MORE = ["trainer.tasks_per_iteration=48"]
METHODS: dict[str, list[str]] = {
    "imitation": ["trainer.use=imitation", *MORE],
    "grpo": ["trainer.use=grpo", *GROUPS],
    "rloo": ["trainer.use=rloo", *GROUPS],
    "dr_grpo": ["trainer.use=dr_grpo", "trainer.length=2", *GROUPS],
    "spear": [
        "trainer.use=self_imitation",
        "trainer.length=2",
        "trainer.buffer_size=32",
        "trainer.imitation_warmup=0",
        "trainer.tool_decay=0",
        *GROUPS,
    ],
    "sil": [
        "trainer.use=sil",
        "trainer.length=2",
        "trainer.replay_size=128",
        "trainer.value.learning_rate=1e-3",
        *GROUPS,
    ],
    "ilf": [
        "trainer.use=ilf",
        "trainer.pool=failed",
        "trainer.attempts_per_task=2",
        "trainer.refinements=8",
        "trainer.epochs=3",
        *MORE,
    ],
    "ilf, refiner and policy in one": [
        "trainer.use=ilf",
        "trainer.learns=both",
        "trainer.pool=failed",
        "trainer.attempts_per_task=2",
        "trainer.refinements=8",
        "trainer.epochs=3",
        *MORE,
    ],
    "rise": [
        "environment.attempts=2",
        "trainer.use=rise",
        "trainer.turns=2",
        "trainer.filter=success",
        "trainer.attempts_per_task=4",
        "trainer.samples=4",
        *MORE,
    ],
    "rlsr": ["trainer.use=self_judge", "judge.use=model", "judge.model=friend", *GROUPS],
    # Agreement has to be right more often than not: here the word that is named is.
    "srt": ["environment.shift=0", "trainer.use=self_judge", "judge.use=majority", *GROUPS],
    "spo": [
        "trainer.use=self_judge",
        "trainer.baseline=dr_grpo",
        "judge.use=pairwise",
        "judge.model=friend",
        *GROUPS,
    ],
    "self-rewarding": [
        "trainer.use=self_rewarding",
        "judge.use=model",
        "judge.model=friend",
        *GROUPS,
        *MORE,
    ],
    "ril": ["trainer.use=adversarial", "trainer.length=2", *GROUPS],
    "text_gail": ["trainer.use=text_gail", *GROUPS],
    # Its critics have to be quicker than the policy, or it chases what they have not learned yet.
    "moments": [
        "environment.shift=0",
        "iterations=6",
        "trainer.use=moment_matching",
        "trainer.teacher=TEACHER",
        "trainer.attempts_per_task=4",
        "trainer.critic.learning_rate=1e-2",
        "learner.learning_rate=5e-4",
        "learner.batch_size=32",
        *MORE,
    ],
    "exact moments": [
        "environment.shift=0",
        "trainer.use=moment_matching",
        "trainer.teacher=TEACHER",
        "trainer.mode=exact",
        *MORE,
    ],
}


class Speakers(NamedTuple):
    teacher: Path
    """Says the word that is named."""
    base: Path
    """Says it about every second time, and the next one in the list, or any, else."""


@pytest.fixture(scope="module")
def speakers(tmp_path_factory: pytest.TempPathFactory) -> Speakers:
    import torch

    torch.set_num_threads(1)
    room = tmp_path_factory.mktemp("speakers")

    def warmed(name: str, model: str, warm: str, keys: list[str]) -> Path:
        text = f"{model}, warm_start: {{batch_size: 64, demonstrations: 500, {warm}}}"
        (room / "recipe.yaml").write_text(RECIPE.replace("MODEL", text))
        played(room / "recipe.yaml", [*keys, *STILL], room / name)
        return room / name / "base"

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SELFWRIGHT_CACHE", str(room / "cache"))
        listens = "updates: 200, learning_rate: 5e-3"
        teacher = warmed("teacher", "scratch:32x1", listens, ["environment.shift=0"])
        doubts = ["environment.attempts=2", "environment.expert=[0.15, 0.35]"]
        base = warmed("base", str(teacher), "updates: 80, learning_rate: 3e-3", doubts)
    return Speakers(teacher, base)


def compared(speakers: Speakers, method: str, room: Path, *more: str) -> Comparison:
    """What a method makes of the base, against the base, on tasks that it has not seen."""
    (room / "recipe.yaml").write_text(RECIPE.replace("MODEL", str(speakers.base)))
    keys = [key.replace("TEACHER", str(speakers.teacher)) for key in METHODS[method]]
    result = played(room / "recipe.yaml", [*keys, *more], room / "run")
    assert result["stopped"] is None and result["tokens_trained"] > 0
    base, final = (outcomes(room / "run" / "evaluations" / name) for name in ("base", "final"))
    assert 0.15 < sum(base.values()) / len(base) < 0.6, "there is something to learn, and from"
    return compare_outcomes(base, final)


def outcomes(folder: Path) -> dict[str, bool]:
    played = [one.trajectory for one in read_trajectories(folder / TRAJECTORIES)]
    assert all(one.task.id.startswith("test-") for one in played)
    return {one.task.id: one.success for one in played}


@pytest.mark.method
@pytest.mark.parametrize("method", METHODS)
def test_it_makes_a_tiny_model_better(speakers: Speakers, method: str, tmp_path: Path) -> None:
    found = compared(speakers, method, tmp_path)
    assert found.test.startswith("exact McNemar")
    assert found.difference > 0 and found.p_value < 0.01


@pytest.mark.method
def test_who_does_not_learn_is_not_better(speakers: Speakers, tmp_path: Path) -> None:
    """So the others can fail. The rate is as good as none."""
    found = compared(speakers, "grpo", tmp_path, "learner.learning_rate=1e-12")
    assert found.p_value > 0.01


def test_every_trainer_is_tried() -> None:
    tried = {
        key.partition("=")[2] for keys in METHODS.values() for key in keys if "trainer.use=" in key
    }
    assert tried == {one.name for one in entry_points(group="selfwright.trainers")}
