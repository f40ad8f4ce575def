"""Adversarial imitation: which way D points, what it pays, and what it is without its teachers."""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from components import context_of, episode
from prompts import prompt_of
from pydantic import ValidationError

from selfwright.core.models.scalar import Text
from selfwright.core.store import write_trajectories
from selfwright.core.types import Batch, Completion, Judged, Prompt, Start
from selfwright.trainers.learning.loss import Clip
from selfwright.trainers.methods.adversarial import Adversarial, AdversarialConfig, paired
from selfwright.trainers.methods.group import DrGRPO
from selfwright.trainers.parts.discriminator import Discriminator, DiscriminatorConfig, objective

Folder = Callable[[str], Path]


@dataclass
class Stage:
    """Teachers that say what they are called and a number; a policy that scores all the same."""

    asked: dict[str, list[Start]] = field(default_factory=dict[str, list[Start]])

    async def play_as(self, name: str) -> Any:
        async def teach(starts: Sequence[Start]) -> list[Judged]:
            self.asked.setdefault(name, []).extend(starts)
            return [
                episode(
                    1.0,
                    ("o", f"{name} {start.attempt}"),
                    task=start.task.id,
                    attempt=start.attempt,
                    sampled=False,
                )
                for start in starts
            ]

        return teach

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        return replace(completion, token_ids=(7,), logprobs=(-2.0,))


STILL: dict[str, Any] = {"epochs": 0, "pretrain": 0}


def made(folder: Path, stage: Stage | None = None, **keys: Any) -> tuple[Adversarial, Stage]:
    stage = stage or Stage()
    context = context_of(base=str(folder), play_as=stage.play_as, policy=stage)
    settings = {"device": "cpu", "learning_rate": 1e-3} | keys.pop("discriminator", {})
    config = AdversarialConfig.model_validate(keys | {"discriminator": settings})
    return Adversarial(config, context), stage


def fed(trainer: Adversarial | DrGRPO, judged: Sequence[Judged]) -> list[Batch]:
    return asyncio.run(trainer.batches(judged))


def students(*scores: float, task: str = "t") -> list[Judged]:
    return [
        episode(score, ("o", f"mine {k}"), task=task, attempt=k, sampled=False)
        for k, score in enumerate(scores)
    ]


def learned(batch: Batch) -> dict[str, float]:
    return {e.completion.text: e.advantage for e in batch.examples}


def text(said: str) -> Text:
    return prompt_of("say"), Completion(said)


def test_objectives_by_hand() -> None:
    student, teacher = torch.tensor([0.0, 2.0]), torch.tensor([0.0, -1.0])
    log = torch.tensor(2.0).log().item()
    both = objective(student, teacher, "binary").tolist()
    # -log sigmoid(2) - log(1 - sigmoid(-1)).
    assert both == pytest.approx([2 * log, 0.126928 + 0.313262], abs=1e-5)
    assert objective(student, teacher, "contrastive").tolist() == pytest.approx(
        [log, 0.048587], abs=1e-5
    )


@pytest.mark.parametrize("kind", ["binary", "contrastive"])
def test_it_learns_which_side_a_text_is_from(model_folder: Folder, kind: Any) -> None:
    config = DiscriminatorConfig(device="cpu", learning_rate=3e-3, token_budget=64)
    network = Discriminator(config, str(model_folder("scratch")), kind, 0)
    mine, theirs = [text(f"1 + {k}") for k in range(8)], [text(f"7 - {k}") for k in range(8)]
    assert network.scores([*mine, *theirs]) == pytest.approx([0.5] * 16)
    network.learn(list(zip(mine, theirs, strict=True)), 12)
    scores = network.scores([*mine, *theirs])
    # The policy's text is near 1, whatever else it is.
    assert min(scores[:8]) > max(scores[8:])
    if kind == "binary":
        assert min(scores[:8]) > 0.5 > max(scores[8:])


def test_what_comes_from_one_source_cannot_be_told_apart(model_folder: Folder) -> None:
    config = DiscriminatorConfig(device="cpu", learning_rate=1e-3)
    network = Discriminator(config, str(model_folder("scratch")), "binary", 0)
    texts = [text(f"{k} + {k}") for k in range(10)]
    for _ in range(20):
        network.learn(list(zip(texts, texts, strict=True)), 1)
    assert network.scores(texts) == pytest.approx([0.5] * 10, abs=0.1)


def test_padding_and_parts_do_not_matter(model_folder: Folder) -> None:
    texts = [text("1 + 2 " * k) for k in (1, 9, 3, 30)]
    found: list[list[float]] = []
    for budget in (10_000, 40):
        config = DiscriminatorConfig(device="cpu", learning_rate=1e-3, token_budget=budget)
        network = Discriminator(config, str(model_folder("qwen3")), "binary", 0)
        network.learn([(texts[0], texts[1]), (texts[2], texts[3])], 3)
        found.append(network.scores(texts))
    assert found[0] == pytest.approx(found[1], abs=1e-4)
    assert found[0] != pytest.approx([0.5] * 4, abs=1e-3)


def test_an_undecided_discriminator_leaves_dr_grpo_on_both_halves(model_folder: Folder) -> None:
    trainer, _ = made(model_folder("scratch"), discriminator=STILL)
    (batch,) = fed(trainer, students(1, 0))
    # D is 1/2 and not below: nobody is paid for likeness. Scores 1 0 | 1 1.
    assert learned(batch) == {"mine 0": 0.25, "mine 1": -0.75, "expert 0": 0.25, "expert 1": 0.25}
    assert sum(learned(batch).values()) == 0
    assert isinstance(batch.loss, Clip) and batch.loss.kl == 0.01 and batch.epochs == 1
    # Their ratio is to the policy's own probability of them.
    assert batch.examples[2].completion.logprobs == (-2.0,)


def test_without_teachers_and_likeness_it_is_dr_grpo(model_folder: Folder) -> None:
    keys: dict[str, Any] = {"teacher_attempts": 0, "similarity": 0.0}
    trainer, stage = made(model_folder("scratch"), **keys)
    judged = students(1, 0, 0) + students(0, 1, task="u")
    base = DrGRPO(DrGRPO.Config.model_validate({"kl": 0.01}), context_of())
    assert fed(trainer, judged) == fed(base, judged)
    assert stage.asked == {}


def test_below_a_half_is_a_teachers_and_is_paid(model_folder: Folder) -> None:
    trainer, _ = made(model_folder("scratch"), discriminator=STILL, answer=0.0)
    network = trainer._discriminator  # pyright: ignore[reportPrivateUsage]
    network.scores = lambda texts: [0.1 if "expert" in t[1].text else 0.9 for t in texts]
    (batch,) = fed(trainer, students(1, 0))
    assert learned(batch) == {"mine 0": -0.5, "mine 1": -0.5, "expert 0": 0.5, "expert 1": 0.5}
    (batch,) = fed(trainer_with(trainer, answer=2.0), students(1, 0))
    # Rewards 2 0 | 3 3.
    assert learned(batch) == {"mine 0": 0.0, "mine 1": -2.0, "expert 0": 1.0, "expert 1": 1.0}


def trainer_with(trainer: Adversarial, **keys: Any) -> Adversarial:
    trainer._own = trainer._own.model_copy(update=keys)  # pyright: ignore[reportPrivateUsage]
    return trainer


def test_it_is_pre_trained_once_and_learns_before_it_pays(model_folder: Folder) -> None:
    settings = {"epochs": 1, "pretrain": 30, "learning_rate": 3e-3}
    trainer, _ = made(model_folder("scratch"), discriminator=settings, answer=0.0)
    judged = [one for k in range(4) for one in students(0, 0, task=f"t{k}")]
    (batch,) = fed(trainer, judged)
    for said, advantage in learned(batch).items():
        assert advantage == (-0.5 if said.startswith("mine") else 0.5)
    assert trainer.findings["discriminator/accuracy"] == 1
    updates = trainer._discriminator.net.updates  # pyright: ignore[reportPrivateUsage]
    assert updates == 31
    fed(trainer, judged)
    assert trainer._discriminator.net.updates == 32  # pyright: ignore[reportPrivateUsage]


def test_several_teachers_take_turns_and_files_teach_too(
    model_folder: Folder, tmp_path: Path
) -> None:
    def stored(name: str, *judged: Judged) -> str:
        (tmp_path / name).mkdir()
        write_trajectories(tmp_path / name, judged, tmp_path / "images")
        return str(tmp_path / name / "episodes.parquet")

    path = stored("one", episode(1.0, ("o", "stored"), sampled=False))
    trainer, stage = made(model_folder("scratch"), teachers=["expert", "other", path])
    fed(trainer, students(1, 0, 0, 0) + students(1, 0, 0, 0, task="u"))
    assert [s.attempt for s in stage.asked["expert"]] == [0, 3, 0, 3]
    assert [s.attempt for s in stage.asked["other"]] == [1, 1]
    several = [episode(1.0, ("o", f"s{k}"), attempt=k, sampled=False) for k in range(2)]
    teachers = ["expert", stored("two", *several)]
    both, _ = made(model_folder("scratch"), teachers=teachers, discriminator=STILL)
    (batch,) = fed(both, students(1, 0, 0, 0))
    assert [e.completion.text for e in batch.examples][6:] == ["s0", "s1"]
    only, _ = made(model_folder("scratch"), teachers=[path], discriminator=STILL)
    (batch,) = fed(only, students(1, 0) + students(1, 0, task="u"))
    assert [e.completion.text for e in batch.examples].count("stored") == 2
    with pytest.raises(ValidationError, match=r"no episodes of a teacher at 'gone\.parquet'"):
        AdversarialConfig.model_validate({"teachers": ["gone.parquet"]})
    with pytest.raises(ValidationError, match="at least 1 item"):
        AdversarialConfig.model_validate({"teachers": []})


def test_what_a_teacher_did_not_say_or_the_policy_cannot_score_is_left_out(
    model_folder: Folder,
) -> None:
    @dataclass
    class Hesitant(Stage):
        async def play_as(self, name: str) -> Any:
            async def teach(starts: Sequence[Start]) -> list[Judged]:
                silent = episode(0.0, attempt=0)
                return [silent, *(await (await Stage.play_as(self, name))(starts))[1:]]

            return teach

        async def score(self, prompt: Prompt, completion: Completion) -> Completion:
            if completion.text == "expert 2":
                raise ValueError("too long")
            return await Stage.score(self, prompt, completion)

    trainer, _ = made(model_folder("scratch"), Hesitant(), discriminator=STILL)
    (batch,) = fed(trainer, students(1, 0, 0, 0))
    theirs = [e.completion.text for e in batch.examples if "mine" not in e.completion.text]
    assert theirs == ["expert 1", "expert 3"]


def test_everybody_is_in_a_pair() -> None:
    a, b = students(0, 0, 0), students(1, 1, task="u")
    pairs = paired(a, b)
    assert len(pairs) == 3 and {id(x) for x, _ in pairs} == {id(x) for x in a}
    assert {id(y) for _, y in pairs} == {id(y) for y in b}
    assert paired(a, []) == paired([], b) == []


def test_restored_it_goes_on_as_it_would_have(model_folder: Folder, tmp_path: Path) -> None:
    folder = model_folder("qwen3")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    through, first = made(folder)[0], made(folder)[0]
    for trainer in (through, first):
        fed(trainer, students(1, 0, 0))
    first.save(tmp_path, tmp_path)
    second = made(folder)[0]
    second.restore(tmp_path)
    assert fed(second, students(0, 1, 0, task="u")) == fed(through, students(0, 1, 0, task="u"))
    assert second.findings == through.findings
    # What was copied is as it was.
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
