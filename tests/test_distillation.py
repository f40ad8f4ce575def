"""AMMD and TextGAIL: who is asked for what, what is paid, what is left when all is alike."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from components import context_of, episode
from hypothesis import given
from hypothesis import strategies as st
from test_adversarial import Stage, students

from selfwright.core.errors import ModelError
from selfwright.core.types import Batch, Judged, Start
from selfwright.trainers.learning.loss import ContestedGap, MomentGap, SequenceClip
from selfwright.trainers.methods.moment_matching import MomentMatching, MomentMatchingConfig
from selfwright.trainers.methods.text_gail import Moments, TextGAIL, TextGAILConfig, mixed
from selfwright.trainers.parts.critic import Critic, CriticConfig

Folder = Callable[[str], Path]


@dataclass
class Played:
    """The policy's own episodes, and what was asked for."""

    asked: list[Start] = field(default_factory=list[Start])

    async def attempt(self, starts: Sequence[Start]) -> list[Judged]:
        self.asked += starts
        return [
            episode(0.0, ("o", f"mine {s.attempt}"), task=s.task.id, attempt=s.attempt)
            for s in starts
        ]


def moments(folder: Path, **keys: Any) -> tuple[MomentMatching, Played]:
    stage = Played()
    config = MomentMatchingConfig.model_validate({"teacher": str(folder)} | keys)
    return MomentMatching(config, context_of(base=str(folder), attempt=stage.attempt)), stage


def taught(count: int) -> list[Judged]:
    return [episode(1.0, ("o", f"taught {k}"), attempt=k) for k in range(count)]


def test_both_gaps_are_closed_on_their_own_states(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    trainer, stage = moments(folder, beta=0.5, epochs=2, attempts_per_task=3)
    assert (trainer.plan.player, trainer.plan.attempts) == (str(folder), 3)
    batches = asyncio.run(trainer.batches(taught(3)))
    assert [(b.loss.own, b.loss.weight) for b in batches if isinstance(b.loss, ContestedGap)] == [
        (False, 1.0),
        (True, 0.5),
        (False, 1.0),
        (True, 0.5),
    ]
    theirs, mine = batches[:2]
    assert [e.completion.text for e in theirs.examples] == ["taught 0", "taught 1", "taught 2"]
    assert [e.completion.text for e in mine.examples] == ["mine 0", "mine 1", "mine 2"]
    # Nobody's score is looked at.
    assert {e.advantage for e in (*theirs.examples, *mine.examples)} == {1.0}
    assert [start.attempt for start in stage.asked] == [0, 1, 2]
    assert isinstance(theirs.loss, MomentGap) and isinstance(mine.loss, MomentGap)
    assert theirs.loss.critic is not mine.loss.critic


def test_without_beta_the_policy_is_not_asked(model_folder: Folder) -> None:
    trainer, stage = moments(model_folder("qwen3"), beta=0.0, mode="exact")
    (only,) = asyncio.run(trainer.batches(taught(2)))
    assert only.loss == MomentGap(str(model_folder("qwen3"))) and stage.asked == []
    assert asyncio.run(trainer.batches([])) == []


def test_another_vocabulary_is_refused_before_anything_is_played(
    model_folder: Folder, tmp_path: Path
) -> None:
    from selfwright.agents import scratch

    scratch.make("scratch:32x1", ["other words entirely"] * 3, tmp_path / "m", seed=0)
    config = MomentMatchingConfig(teacher=str(tmp_path / "m"))
    with pytest.raises(ModelError, match=r"teacher .* has another vocabulary"):
        MomentMatching(config, context_of(base=str(model_folder("qwen3"))))
    with pytest.raises(ModelError, match="cannot open the model"):
        moments(model_folder("qwen3"), teacher=str(tmp_path / "none"))


def test_a_critic_is_bounded_and_comes_back_as_it_was(tmp_path: Path) -> None:
    torch.manual_seed(0)
    states, wanted = torch.randn(6, 4), torch.randn(6, 3).sign()
    first = Critic(CriticConfig(learning_rate=0.05), 0)
    first.save(tmp_path / "unborn")
    first.meet(4, 3, "cpu")
    assert not first(states).any()

    def climb(critic: Critic) -> torch.Tensor:
        (-(critic(states) * wanted).sum()).backward()
        critic.climb()
        return critic(states).detach()

    for _ in range(200):
        climb(first)
    assert climb(first).abs().max() <= 1 and (first(states) * wanted).mean() > 0.7
    first.save(tmp_path / "critic")
    again, unborn = Critic(CriticConfig(learning_rate=0.05), 9), Critic(CriticConfig(), 0)
    again.restore(tmp_path / "critic")
    unborn.restore(tmp_path / "unborn")
    assert torch.equal(climb(first), climb(again)) and unborn.meet(4, 3, "cpu")[1].abs().max() == 0


def gail(folder: Path, **keys: Any) -> tuple[TextGAIL, Stage]:
    stage = Stage()
    settings = {"device": "cpu", "learning_rate": 1e-3} | keys.pop("discriminator", {})
    config = TextGAILConfig.model_validate(keys | {"discriminator": settings})
    context = context_of(base=str(folder), play_as=stage.play_as, policy=stage)
    return TextGAIL(config, context), stage


def by_text(batch: Batch) -> dict[str, float]:
    return {e.completion.text: e.advantage for e in batch.examples}


def test_equal_texts_share_and_demonstrations_are_paid_all_the_same(model_folder: Folder) -> None:
    still = {"epochs": 0, "pretrain": 0}
    trainer, _ = gail(model_folder("scratch"), demonstrations=0.5, decay=2, discriminator=still)
    mixes: list[int] = []
    for _ in range(3):
        (batch,) = asyncio.run(trainer.batches(students(0.0, 1.0)))
        assert isinstance(batch.loss, SequenceClip)
        paid = by_text(batch)
        # Nothing is told apart yet: every share is 1/2, whatever the judge says.
        assert paid["mine 0"] == paid["mine 1"] == 0.0
        mixes.append(len(paid) - 2)
        assert all(paid[name] == 2.0 for name in paid if name.startswith("expert"))
    # Half at first, a quarter after one iteration, none after two.
    assert mixes == [2, 1, 0]
    # More than there are come again; at a share of 1 nothing else is learned.
    for share, mine in ((0.75, {"mine 0", "mine 1"}), (1.0, set[str]())):
        all_of, _ = gail(model_folder("scratch"), demonstrations=share, discriminator=still)
        (batch,) = asyncio.run(all_of.batches(students(0.0, 1.0)))
        assert set(by_text(batch)) == {"expert 0", "expert 1"} | mine
        told = sum(e.advantage == 2.0 for e in batch.examples)
        assert told / len(batch.examples) == share
    assert [mixed(k, 0.3, 0) for k in (0, 99)] == [0.3, 0.3]


def test_who_sounds_like_the_teacher_earns_more(model_folder: Folder) -> None:
    settings = {"pretrain": 30, "epochs": 1}
    trainer, _ = gail(model_folder("scratch"), demonstrations=0.0, discriminator=settings)
    # One of the policy's says what the expert says.
    judged = [
        episode(0.0, ("o", text), attempt=k, sampled=False)
        for k, text in enumerate(["expert 0", *["mine"] * 5])
    ]
    (batch,) = asyncio.run(trainer.batches(judged))
    paid = by_text(batch)
    assert paid["expert 0"] > 0 > paid["mine"]
    assert 0 <= trainer.findings["discriminator/share"] < 0.5
    network = trainer._discriminator
    pair = [(e.prompt, e.completion) for e in batch.examples[:2]]
    (share,) = network.shares([(pair[0], pair[1])])
    assert network.shares([(pair[1], pair[0])]) == pytest.approx([1 - share])


@given(st.lists(st.lists(st.floats(0, 1), min_size=1, max_size=5), min_size=1, max_size=5))
def test_running_moments_are_those_of_all_that_was_seen(rounds: list[list[float]]) -> None:
    running, got = Moments(), list[float]()
    for values in rounds:
        got = running.normalised(values)
    every = torch.tensor([x for values in rounds for x in values], dtype=torch.float64)
    deviation = max(0.0, float((every**2).mean() - every.mean() ** 2))
    wanted = [(x - float(every.mean())) / (math.sqrt(deviation) + 1e-6) for x in rounds[-1]]
    assert got == pytest.approx(wanted, abs=1e-2)
