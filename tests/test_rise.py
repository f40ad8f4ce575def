"""RISE: weights by hand, turn filters, states the policy reached itself, one target a prefix."""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from components import context_of, step

from selfwright.core.protocols import Attempt, Context
from selfwright.core.types import (
    Batch,
    Completion,
    Judged,
    Observation,
    Start,
    Step,
    Stop,
    Task,
    Trajectory,
    Verdict,
)
from selfwright.trainers.methods.rise import RISE, RISEConfig
from selfwright.trainers.parts.lessons import degenerate, kept

TASK = Task("t", "guess", 4)


@dataclass
class Stage:
    """A policy as a table: what each candidate says at each turn, and what that earns."""

    lines: list[list[tuple[str, float]]]
    played: list[Start] = field(default_factory=list[Start])
    blind: bool = False

    async def attempt(self, starts: Sequence[Start]) -> list[Judged]:
        self.played += starts
        return [self.play(start, len(start.prefix), start.attempt) for start in starts]

    async def attempt_blind(self, starts: Sequence[Start]) -> list[Judged]:
        self.blind = True
        return await self.attempt(starts)

    async def play_as(self, name: str) -> Attempt:
        assert name == "expert"

        async def teach(starts: Sequence[Start]) -> list[Judged]:
            self.played += starts
            return [self.judged(start.prefix, "taught", 1.0, start.attempt) for start in starts]

        return teach

    def play(self, start: Start, turn: int, attempt: int) -> Judged:
        said, reward = self.lines[turn][attempt]
        return self.judged(start.prefix, said, reward, attempt)

    def judged(self, prefix: tuple[Step, ...], said: str, reward: float, attempt: int) -> Judged:
        seen = Observation(f"o{len(prefix)}")
        last = step(TASK, prefix, seen, Completion(said, (7,)), reward)
        right = reward >= 1 and not self.blind
        trajectory = Trajectory(
            TASK,
            (*prefix, last),
            Observation("next"),
            Stop.TERMINATED if right else Stop.TRUNCATED,
            "base",
            0,
            attempt,
            len(prefix),
            right,
            id=f"{said} of {len(prefix)}",
        )
        return Judged(trajectory, Verdict(reward, "", "reward"))


def run(stage: Stage, **settings: Any) -> list[Batch]:
    context = context_of(
        attempt=stage.attempt, attempt_blind=stage.attempt_blind, play_as=stage.play_as
    )
    samples = len(stage.lines[1]) if len(stage.lines) > 1 else 1
    trainer = RISE(RISEConfig.model_validate({"samples": samples, **settings}), context)
    first = [stage.play(Start(TASK, 0, k), 0, k) for k in range(len(stage.lines[0]))]
    return asyncio.run(trainer.batches(first))


def learned(batches: list[Batch]) -> list[tuple[str, float]]:
    assert len(batches) == 1
    return [(e.completion.text, e.advantage) for e in batches[0].examples]


MENDED = [[("a", 0.0)], [("b", 0.0), ("c", 0.0)], [("d", 0.0), ("e", 1.0)]]


def test_weights_are_exp_of_reward_over_tau() -> None:
    assert learned(run(Stage(MENDED), turns=3)) == [
        ("a", 1.0),
        ("b", 1.0),
        ("e", pytest.approx(math.exp(2.5))),
    ]


def unread(one: Judged, how: str) -> Judged:
    """The same, with a last turn that holds no action, or no answer."""
    *before, last = one.trajectory.steps
    if how == "action":
        last = replace(last, action=replace(last.action, text="", invalid="that is no action"))
    else:
        last = replace(last, answer="")
    return replace(one, trajectory=replace(one.trajectory, steps=(*before, last)))


@dataclass
class Mumbling(Stage):
    """Whoever says m, or n, has said nothing that could be read."""

    how: str = "action"

    def judged(self, prefix: tuple[Step, ...], said: str, reward: float, attempt: int) -> Judged:
        one = super().judged(prefix, said, reward, attempt)
        return unread(one, self.how) if said in ("m", "n") else one


@pytest.mark.parametrize("how", ["action", "answer"])
def test_what_cannot_be_read_earns_what_the_recipe_says(how: str) -> None:
    lines = [[("m", 0.0)], [("b", 0.0), ("n", 0.0)], [("e", 1.0), ("n", 0.0)]]
    # As the paper's code has it for GSM8K: exp(-1 / 0.4), 1, exp(1 / 0.4).
    paid = [math.exp(-2.5), 1.0, math.exp(2.5)]
    said = learned(run(Mumbling(lines, how=how), turns=3, invalid_reward=-1.0))
    assert said == list(zip("mbe", map(pytest.approx, paid), strict=True))
    # None, and MATH's 0, are the score.
    for keys in ({}, {"invalid_reward": 0.0}):
        told = learned(run(Mumbling(lines, how=how), turns=3, **keys))
        assert told == [("m", 1.0), ("b", 1.0), ("e", pytest.approx(math.exp(2.5)))]


def test_what_cannot_be_read_is_the_worst_of_its_state() -> None:
    lines = [[("n", 0.0), ("b", 0.0)], [("m", 0.0), ("n", 0.0)], [("e", 1.0)] * 2]
    keys: dict[str, Any] = {"turns": 3, "invalid_reward": -1.0}
    # It comes first, and of equals the first would be the best; two of a kind are not one.
    assert learned(run(Mumbling(lines), **keys))[:2] == [
        ("b", 1.0),
        ("m", pytest.approx(math.exp(-2.5))),
    ]
    kept_all = learned(run(Mumbling(lines), keep="all", **keys))
    assert [text for text, _ in kept_all] == ["b", "n", "m", "n", "e"]
    # Against the mean of its state, and with what the next turn earns beside its own.
    means = learned(run(Mumbling(lines), baseline="state_mean", gamma=0.5, **keys))
    assert means[0] == ("b", pytest.approx(math.exp((0 - 0.5 + 0.25 + 0.5) / 0.4)))
    assert means[1] == ("m", pytest.approx(math.exp((-1 + 0.5 + 1) / 0.4)))


def test_the_prompt_is_the_policys_own_history_and_only_the_last_turn_is_a_target() -> None:
    (batch,) = run(Stage(MENDED), turns=3)
    last = batch.examples[-1]
    assert [(m.role, m.text) for m in last.prompt.messages] == [
        ("user", "guess\no0"),
        ("assistant", "a"),
        ("user", "o1"),
        ("assistant", "b"),
        ("user", "o2"),
    ]
    assert last.prompt.messages[1].token_ids == (7,) and last.completion.token_ids == (7,)


def test_a_retry_says_which_attempt_it_goes_on_from() -> None:
    stage = Stage(MENDED)
    run(stage, turns=3)
    assert [start.parent for start in stage.played] == ["a of 0"] * 2 + ["b of 1"] * 2
    for start in stage.played:
        assert start.parent.startswith(start.prefix[-1].action.text)


def test_nothing_is_played_or_learned_after_the_first_success() -> None:
    stage = Stage([[("a", 0.0)], [("b", 1.0), ("c", 0.0)], [("d", 1.0), ("e", 1.0)]])
    assert [text for text, _ in learned(run(stage, turns=3))] == ["a", "b"]
    assert {len(start.prefix) for start in stage.played} == {1}


def test_a_conversation_ends_at_the_tasks_own_limit() -> None:
    stage = Stage([[(f"{k}", 0.0)] for k in range(4)])
    assert len(learned(run(stage, turns=9))) == 4


@pytest.mark.parametrize(
    ("rule", "rewards", "expected"),
    [
        ("all", [0.0, 0.5, 0.2, 1.0], [True, True, True, True]),
        ("better", [0.0, 0.5, 0.2, 1.0], [True, True, False, True]),
        ("best", [0.0, 0.5, 0.2, 0.5], [True, True, False, True]),
        ("success", [0.0, 0.5, 0.2, 1.0], [False, False, False, True]),
    ],
)
def test_turn_filters(rule: Any, rewards: list[float], expected: list[bool]) -> None:
    assert [kept(rule, r, rewards[:k]) for k, r in enumerate(rewards)] == expected


def test_success_gives_one_example_if_solved_and_none_if_not() -> None:
    assert [t for t, _ in learned(run(Stage(MENDED), turns=3, filter="success"))] == ["e"]
    unsolved = Stage([[("a", 0.0)], [("b", 0.0)]])
    assert run(unsolved, turns=2, filter="success") == []


CANDIDATES = [[("a", 0.0), ("b", 0.5), ("c", 1.0)]]


def weights(**settings: Any) -> dict[str, float]:
    return dict(learned(run(Stage(CANDIDATES), turns=1, keep="all", **settings)))


def test_baselines_by_hand() -> None:
    tau = {"tau": 0.5}
    assert weights(**tau, baseline="constant", constant=0.5) == {
        "a": pytest.approx(math.exp(-1)),
        "b": 1.0,
        "c": pytest.approx(math.exp(1)),
    }
    assert weights(**tau, baseline="state_mean")["b"] == 1.0
    assert weights(**tau, baseline="state_max")["c"] == 1.0


def test_tau_to_zero_is_best_of_n_cloning_and_tau_to_infinity_is_uniform() -> None:
    assert weights(tau=1e-3, baseline="state_max") == pytest.approx(
        {"a": 0.0, "b": 0.0, "c": 1.0}, abs=1e-9
    )
    assert weights(tau=1e9) == pytest.approx({"a": 1.0, "b": 1.0, "c": 1.0}, abs=1e-6)


def test_a_constant_added_to_every_reward_changes_nothing_once_normalised() -> None:
    shifted = Stage([[(text, reward + 0.25) for text, reward in CANDIDATES[0]]])
    plain = Stage(CANDIDATES)
    settings: dict[str, Any] = {"turns": 1, "keep": "all", "tau": 0.4}
    raw, moved = learned(run(plain, **settings)), learned(run(shifted, **settings))
    for (_, before), (_, after) in zip(sorted(raw), sorted(moved), strict=True):
        assert after / before == pytest.approx(math.exp(0.25 / 0.4))
    settings["normalize"] = True
    assert sorted(learned(run(shifted, **settings))) == [
        (text, pytest.approx(weight)) for text, weight in sorted(learned(run(plain, **settings)))
    ]


def test_history_best_or_a_fair_sample() -> None:
    lines = [[("a", 0.0), ("b", 0.5)], [("c", 0.0)]]
    best, fair = Stage(lines), Stage(lines)
    run(best, turns=2)
    run(fair, turns=2, history="sampled")
    assert best.played[0].prefix[0].action.text == "b"
    assert fair.played[0].prefix[0].action.text == "a"


def test_identical_actions_are_learned_once_and_repeats_of_a_failure_not_at_all() -> None:
    same = Stage([[("a", 0.0), ("a", 0.0)]])
    assert learned(run(same, turns=1, keep="all")) == [("a", 1.0)]
    again = Stage([[("a", 0.0)], [("a", 0.0)]])
    assert learned(run(again, turns=2)) == [("a", 1.0)]


def test_a_teacher_acts_only_in_states_the_policy_reached() -> None:
    stage = Stage(MENDED)
    (batch,) = run(stage, turns=3, teacher="expert")
    assert [e.completion.text for e in batch.examples] == ["a", "taught", "taught"]
    # The second lesson begins where the policy's own, wrong, second attempt ended.
    said = [[m.text for m in e.prompt.messages if m.role == "assistant"] for e in batch.examples]
    assert said == [[], ["a"], ["a", "b"]]


def test_settling_goes_on_after_success_and_learns_to_repeat_it() -> None:
    stage = Stage([[("a", 1.0)], [("b", 0.0), ("a", 1.0)]], blind=True)
    got = learned(run(stage, turns=2, settle=1.0))
    assert [text for text, _ in got] == ["a", "a"]
    with pytest.raises(ValueError, match="settle goes with"):
        RISEConfig.model_validate({"settle": 0.5, "teacher": "expert"})


def test_whole_episodes_share_their_score_and_gamma_discounts_from_the_end() -> None:
    steps: list[Step] = []
    for k in range(3):
        steps.append(step(TASK, steps, Observation(f"o{k}"), Completion(f"s{k}"), float(k == 2)))
    won = Trajectory(TASK, tuple(steps), Observation(""), Stop.TERMINATED, "base", 0, success=True)
    context = context_of()
    for gamma, expected in ((1.0, [1.0, 1.0, 1.0]), (0.5, [0.25, 0.5, 1.0])):
        config = RISEConfig(unit="episode", tau=1.0, gamma=gamma)
        judged = [Judged(won, Verdict(1.0, "", "reward"))]
        (batch,) = asyncio.run(_no_play(config, context).batches(judged))
        assert [e.advantage for e in batch.examples] == pytest.approx(list(map(math.exp, expected)))


def _no_play(config: RISEConfig, context: Context) -> RISE:
    return RISE(config, context)


def test_undecided_attempts_teach_nothing() -> None:
    stage = Stage([[("a", 0.0)]])
    undecided = stage.play(Start(TASK, 0), 0, 0).trajectory
    context = context_of()
    trainer = RISE(RISEConfig(), context)
    assert asyncio.run(trainer.batches([Judged(undecided, Verdict(None, "", "r"))])) == []


def test_degenerate_text_is_discarded() -> None:
    assert degenerate("word " * 151) and not degenerate("word " * 150)
    assert degenerate("x" * 301) and not degenerate("x" * 300)
    for keep in ("all", "best"):
        stage = Stage([[("y" * 301, 1.0), ("a", 0.0)], [("b", 1.0)]])
        assert learned(run(stage, turns=2, keep=keep)) == [
            ("a", 1.0),
            ("b", pytest.approx(math.exp(2.5))),
        ]
        assert stage.played[0].prefix[0].action.text == "a"


def test_gamma_credits_a_turn_with_what_the_conversation_came_to() -> None:
    lines = [[("a", 0.0)], [("b", 0.0), ("c", 0.0)], [("d", 1.0), ("e", 0.0)]]
    got = learned(run(Stage(lines), turns=3, gamma=0.5, tau=1.0, keep="all"))
    # From a on: 0 + 0.5 * 0 + 0.25 * 1. From c nothing followed.
    assert dict(got) == {
        "a": pytest.approx(math.exp(0.25)),
        "b": pytest.approx(math.exp(0.5)),
        "c": 1.0,
        "d": pytest.approx(math.exp(1.0)),
        "e": 1.0,
    }


def test_the_judges_word_not_the_worlds_ends_a_conversation() -> None:
    stage = Stage([[("a", 0.0)], [("b", 0.0)]])
    first = stage.play(Start(TASK, 0), 0, 0)
    context = context_of(attempt=stage.attempt)
    trainer = RISE(RISEConfig(turns=2, samples=1), context)
    asyncio.run(trainer.batches([Judged(first.trajectory, Verdict(1.0, "agreed", "majority"))]))
    assert stage.played == []
