"""Self-made tasks: written by the policy, accepted by the world, or nothing is practised."""

import asyncio
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from components import context_of, episode

from selfwright.core.types import Completion, Judged, Prompt, Sampling, Start, Task
from selfwright.environments.countdown import Countdown, CountdownConfig
from selfwright.trainers.methods.self_judge import SelfJudge, SelfJudgeConfig
from selfwright.trainers.parts.practice import REQUEST, practised

WORLD = Countdown(CountdownConfig())


@dataclass
class Writer:
    """Says these in turn, and plays everything to a score."""

    words: list[str]
    asked: list[str] = field(default_factory=list[str])
    starts: list[Start] = field(default_factory=list[Start])

    @contextmanager
    def batch_slot(self) -> Generator[None]:
        yield

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        self.asked.append(prompt.messages[-1].text)
        return Completion(self.words[len(self.asked) - 1])

    async def attempt(self, starts: Sequence[Start]) -> list[Judged]:
        self.starts += starts
        return [
            episode(float(s.attempt == 0), ("o", s.task.id), task=s.task.id, attempt=s.attempt)
            for s in starts
        ]


async def named(id: str) -> Task:
    return WORLD.named(id)


def test_only_what_the_world_takes_for_a_new_training_task_is_practised() -> None:
    train = list(WORLD.tasks("train")[:6])
    known, other = train[:5], train[5]
    held_out = WORLD.tasks("test")[0]
    words = [f" {other.id} ", other.id, held_out.id, known[0].id, "", "make 3 from 3"]
    writer = Writer(words)
    context = context_of(policy=writer, attempt=writer.attempt, named=named)
    played, told = asyncio.run(practised(context, known, len(words), 2, 1, 7))
    assert told == {"practice/written": 6.0, "practice/valid": 1.0}
    assert [one.trajectory.task.id for one in played] == [other.id] * 2
    assert [(s.task.id, s.attempt, s.turns) for s in writer.starts] == [
        (other.id, 0, 1),
        (other.id, 1, 1),
    ]
    assert len({s.seed for s in writer.starts}) == 1
    for text in writer.asked:
        first, *shown = text.splitlines()
        assert first == REQUEST and len(shown) == 4 and set(shown) <= {t.id for t in known}
    assert asyncio.run(practised(context, known, 0, 2, 1, 7)) == ([], {})


def test_what_was_practised_is_learned_beside_the_rest() -> None:
    other = WORLD.tasks("train")[5]
    writer = Writer([other.id, "nonsense"])
    context = context_of(policy=writer, attempt=writer.attempt, named=named)
    config = SelfJudgeConfig.model_validate(
        {"practice": 2, "attempts_per_task": 2, "guards": {"on": False}}
    )
    trainer = SelfJudge(config, context)
    mine = [episode(1.0, ("o", "right"), attempt=0), episode(0.0, ("o", "wrong"), attempt=1)]
    (batch,) = asyncio.run(trainer.batches(mine))
    assert [e.completion.text for e in batch.examples] == ["right", "wrong", other.id, other.id]
    assert trainer.findings == {"practice/written": 2.0, "practice/valid": 1.0}
