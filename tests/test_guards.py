"""Guards: what raises an alarm, what does not, and what is kept apart from learning."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from components import context_of, episode
from hypothesis import given
from hypothesis import strategies as st

from selfwright.core.recipe import read
from selfwright.core.types import Batch, Completion, Judged, Prompt, Trajectory, Verdict
from selfwright.trainers.methods.group import GRPO
from selfwright.trainers.methods.self_judge import SelfJudge, SelfJudgeConfig, chosen
from selfwright.trainers.parts.guards import CANARIES, Guard, GuardConfig, set_apart


@dataclass
class Paying:
    """Pays for whatever contains one of its words."""

    words: tuple[str, ...] = ()
    seen: list[str] = field(default_factory=list[str])

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        said = [t.steps[-1].action.text for t in trajectories]
        self.seen += said
        return [Verdict(float(any(w in text for w in self.words)), "", "paying") for text in said]


@dataclass
class RelativeYes(Paying):
    relative: bool = True
    words: tuple[str, ...] = ("",)


def claims(called: int, right: int, missed: int = 0, rest: int = 0) -> list[Judged]:
    """Tasks: so many called solved, so many of those solved; then the others."""
    made: list[Judged] = []
    for k in range(called + rest):
        one = episode(float(k < called), ("o", f"a{k}"), task=f"t{k}")
        truth = k < right or called <= k < called + missed
        made.append(replace(one, trajectory=replace(one.trajectory, success=truth)))
    return made


def looked(guard: Guard, *rounds: list[Judged], judge: Any = None) -> Guard:
    async def look() -> None:
        for k, labelled in enumerate(rounds):
            await guard.look(labelled, judge or Paying(), k)

    asyncio.run(look())
    return guard


def test_a_judge_that_is_mostly_wrong_is_found_out() -> None:
    guard = looked(Guard(GuardConfig()), claims(20, 2, missed=1, rest=10))
    assert "on 20 tasks where the judge calls something solved, it is right on 2" in guard.alarm
    assert guard.findings["guard/precision"] == 0.1
    assert guard.findings["guard/recall"] == pytest.approx(2 / 3)
    assert guard.findings["guard/success"] == 0.1
    # Two of five may be bad luck.
    assert looked(Guard(GuardConfig()), claims(5, 2, rest=10)).alarm == ""
    assert looked(Guard(GuardConfig()), claims(20, 18, rest=10)).alarm == ""
    assert looked(Guard(GuardConfig()), claims(0, 0, rest=10)).alarm == ""
    assert looked(Guard(GuardConfig()), []).alarm == ""
    # Ten attempts at one task that err together are one error; over iterations they add up.
    together = [
        replace(one, trajectory=replace(one.trajectory, task=replace(one.trajectory.task, id="t")))
        for one in claims(10, 0)
    ]
    assert looked(Guard(GuardConfig()), together).alarm == ""
    assert looked(Guard(GuardConfig()), *[claims(4, 0, rest=4)] * 2).alarm == ""
    assert "on 12 tasks" in looked(Guard(GuardConfig()), *[claims(4, 0, rest=4)] * 5).alarm


def test_who_only_compares_is_not_measured_by_what_is_solved() -> None:
    judge = RelativeYes(words=("a0",))
    falling = [claims(20, 20, rest=20), claims(25, 5, rest=15), claims(40, 0)]
    assert looked(Guard(GuardConfig()), *falling, judge=judge).alarm == ""
    assert "pays" in looked(Guard(GuardConfig()), claims(1, 1), judge=RelativeYes()).alarm


def test_score_up_and_truth_down_ends_the_run() -> None:
    falling = [claims(20, 20, rest=20), claims(25, 15, rest=15), claims(30, 10, rest=10)]
    config = GuardConfig(min_precision=0.0)
    assert looked(Guard(config), *falling[:2]).alarm == ""
    guard = looked(Guard(config), *falling)
    assert "score rose from 0.50 to 0.75, and true success fell from 50% to 25%" in guard.alarm
    # Once more is not enough where three times are asked for, and a fall must be beyond noise.
    assert looked(Guard(GuardConfig(min_precision=0.0, patience=3)), *falling).alarm == ""
    slight = [claims(20, 20, rest=20), claims(21, 19, rest=19), claims(22, 18, rest=18)]
    assert looked(Guard(config), *slight).alarm == ""
    both_fall = [claims(30, 30, rest=10), claims(20, 20, rest=20), claims(10, 10, rest=30)]
    assert looked(Guard(config), *both_fall).alarm == ""


def test_an_alarm_goes_back_to_the_middle_of_the_best_labelled_window() -> None:
    def back(*right: int) -> int:
        return looked(Guard(GuardConfig()), *[claims(10, k) for k in right]).trusted

    # Windows of five: 5, 6, 7, 6, 6 is the best, and its middle was played after 4 iterations.
    assert back(1, 2, 5, 6, 7, 6, 6, 1, 0, 0) == 4
    # One lucky iteration is not a good window.
    assert back(10, 0, 0, 0, 0, 4, 4, 4, 4, 4, 0) == 7
    assert back(9, 9, 9, 0, 0, 0) == 2
    # Of fewer than five, the middle; never before the first, whose weights are nobody's.
    assert back(3, 5, 1) == 1 and back(3) == 1 and back() == 1

    # More tasks count for more: 7 of 8 are above 1 of 2 four times and 10 of 40.
    async def look() -> Guard:
        guard = Guard(GuardConfig())
        for learned, (called, right) in enumerate([(2, 1)] * 4 + [(40, 10)] + [(8, 7)] * 5):
            await guard.look(claims(called, right), Paying(), learned + 3)
        return guard

    assert asyncio.run(look()).trusted == 3 + 7


def test_no_judge_may_pay_for_what_is_no_answer() -> None:
    honest, taken = Paying(("a0",)), Paying(("correct",))
    guard = looked(Guard(GuardConfig()), claims(1, 1), judge=honest)
    assert guard.alarm == "" and guard.findings["guard/canaries_paid"] == 0
    assert len(honest.seen) == len(CANARIES) and "do t0" in honest.seen
    guard = looked(Guard(GuardConfig()), claims(1, 1), judge=taken)
    assert "pays 1 for the answer 'The answer is correct.'" in guard.alarm
    assert looked(Guard(GuardConfig(canaries=False)), claims(1, 1), judge=taken).alarm == ""


@given(st.integers(0, 30), st.floats(0.01, 0.99), st.integers(0, 9))
def test_what_is_labelled_is_not_learned(count: int, share: float, seed: int) -> None:
    groups = [[episode(1.0, ("o", "a"), task=f"t{k}")] for k in range(count)]
    labelled, rest = set_apart(groups, share, seed)
    assert len(labelled) + len(rest) == count
    assert not {j.trajectory.task.id for j in labelled} & {g[0].trajectory.task.id for g in rest}
    assert len(labelled) >= min(1, count) and len(labelled) <= share * count + 1


def trainer_of(judge: Any = None, **keys: Any) -> SelfJudge:
    return SelfJudge(SelfJudgeConfig.model_validate(keys), context_of(judge=judge or Paying()))


def tasks(*scores: Sequence[float]) -> list[Judged]:
    return [
        episode(score, ("o", f"t{k}a{n}"), task=f"t{k}", attempt=n)
        for k, group in enumerate(scores)
        for n, score in enumerate(group)
    ]


def learned(batches: Sequence[Batch]) -> set[str]:
    return {e.completion.text[:2] for batch in batches for e in batch.examples}


def test_with_an_oracle_and_no_guards_it_is_grpo() -> None:
    judged = tasks([1, 0, 0], [1, 1, 0])
    plain = GRPO(GRPO.Config.model_validate({}), context_of())
    free = trainer_of(guards={"on": False})
    assert asyncio.run(free.batches(judged)) == asyncio.run(plain.batches(judged))
    assert free.findings == {} and free.alarm == ""


@pytest.mark.parametrize("name", ["coin/srt", "countdown/srt"])
def test_the_recipes_of_srt_are_the_papers(name: str) -> None:
    """RLOO, and a KL of 0.001 in the reward (Shafayat et al. 2025)."""
    recipe = read(name)
    config = recipe.phases[0].trainer.config
    assert isinstance(config, SelfJudgeConfig) and recipe.judge.use == "majority"

    class Base:
        """Finds what the first attempt says less likely, by a nat."""

        async def score(self, prompt: Prompt, completion: Completion) -> Completion:
            return replace(completion, logprobs=(-2.0 if completion.text == "t0a0" else -1.0,))

    async def opened(asked: str) -> Any:
        assert asked == "base"
        return Base()

    off = config.model_copy(update={"guards": GuardConfig(on=False)})
    trainer = SelfJudge(off, context_of(judge=Paying(), open=opened))
    (batch,) = asyncio.run(trainer.batches(tasks([1, 1, 0])))
    # k3 of a nat down is e^-1: with d = -1, exp(d) - d - 1. Each against the mean of the others.
    paid = [1 - 0.001 / math.e, 1.0, 0.0]
    wanted = [r - (sum(paid) - r) / 2 for r in paid]
    assert [e.advantage for e in batch.examples] == pytest.approx(wanted)
    assert not batch.loss.needs


def test_guards_are_on_and_keep_their_slice() -> None:
    judged = tasks(*[[1, 0]] * 20)
    trainer = trainer_of()
    got = learned(asyncio.run(trainer.batches(judged)))
    assert trainer.findings["guard/episodes"] == 4
    # t0 and t1 stand for t10 to t19 too.
    examples = asyncio.run(trainer_of().batches(judged))[0].examples
    assert len(examples) == 2 * 18 and got


def test_thresholds_and_the_easiest_share() -> None:
    groups = [tasks(scores) for scores in ([1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0])]
    assert chosen(groups, 0.5, 1.0) == groups[:2]
    assert chosen(groups, 0.0, 0.5) == groups[:2]
    assert chosen(groups, 0.6, 0.5) == groups[:1]
    assert chosen(groups, 0.0, 1.0) == groups
    assert chosen([], 0.5, 0.5) == []


def test_always_yes_and_all_agreeing_teach_nothing() -> None:
    trainer = trainer_of(guards={"on": False})
    assert asyncio.run(trainer.batches(tasks([1, 1, 1], [1, 1, 1]))) == []


def test_restored_it_remembers_what_it_saw(tmp_path: Path) -> None:
    first = trainer_of(guards={"labelled": 0.5, "min_precision": 0.0})
    rounds = [tasks(*[[1.0] * k + [0.0] * (9 - k)] * 6) for k in (3, 5)]
    for judged in rounds:
        asyncio.run(first.batches(judged))
    (tmp_path / "t").mkdir()
    first.save(tmp_path / "t", tmp_path / "images")
    second = trainer_of(guards={"labelled": 0.5, "min_precision": 0.0})
    second.restore(tmp_path / "t")
    last = [
        replace(j, trajectory=replace(j.trajectory, success=False))
        for j in tasks(*[[1.0] * 7 + [0.0] * 2] * 6)
    ]
    seen = [(first, first.batches(last)), (second, second.batches(last))]
    got = [asyncio.run(batches) for _, batches in seen]
    assert got[0] == got[1] and first.alarm == second.alarm
    assert first.findings == second.findings
