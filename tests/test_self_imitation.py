"""SPEAR: schedules and filters by hand, what is remembered and for how long, replay as it was."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from components import context_of, episode
from hypothesis import given
from hypothesis import strategies as st

from selfwright.core.types import Batch, Judged
from selfwright.trainers.learning.loss import Clip, CovarianceClip
from selfwright.trainers.methods.group import DrGRPO
from selfwright.trainers.methods.self_imitation import (
    SelfImitation,
    SelfImitationConfig,
    falling,
    rising,
)
from selfwright.trainers.parts.replay import Replay, ReplayEntry

PLAIN: dict[str, Any] = {
    "tool_reward": 0.0,
    "imitation_warmup": 0,
    "buffer_size": 2,
    "baseline_size": 100,
}


def made(**keys: Any) -> SelfImitation:
    return SelfImitation(SelfImitationConfig.model_validate(PLAIN | keys), context_of())


def fed(trainer: SelfImitation, judged: Sequence[Judged]) -> list[Batch]:
    return asyncio.run(trainer.batches(judged))


def round_of(scores: Sequence[float], name: str) -> list[Judged]:
    """One task, one attempt for each score, told apart by what it says."""
    return [
        episode(score, ("o", f"{name}{k}"), task=name, attempt=k) for k, score in enumerate(scores)
    ]


def learned(batch: Batch) -> dict[str, float]:
    return {e.completion.text: e.advantage for e in batch.examples}


def test_schedules_by_hand() -> None:
    assert [rising(k, 4) for k in (0, 2, 4, 9)] == pytest.approx([0, 0.5, 1, 1])
    assert rising(1, 4) == pytest.approx((1 - 2**-0.5) / 2)
    assert [falling(k, 4) for k in (0, 2, 4, 9)] == pytest.approx([1, 0.5, 0, 0])
    assert rising(0, 0) == 1 and falling(0, 0) == 0


def test_until_something_is_replayed_it_is_its_base() -> None:
    shared: dict[str, Any] = {"high": 0.28, "dual": 10.0, "entropy_share": 0.02, "epochs": 2}
    judged = round_of([1, 0, 0], "a")
    base = DrGRPO(DrGRPO.Config.model_validate(shared), context_of())
    assert fed(made(epochs=2), judged) == asyncio.run(base.batches(judged))
    # And for good, if self-imitation has no weight.
    idle, full = made(imitation=0.0), made()
    for k in range(6):
        judged = round_of([1, 0, 0], f"t{k}")
        assert len(fed(idle, judged)) == 1
        assert len(fed(full, judged)) == 1 + (k == 4)


def test_what_beat_its_group_and_beats_recent_groups_is_replayed_once() -> None:
    trainer = made()
    for k in range(3):
        assert len(fed(trainer, round_of([1, 0, 0, 0], f"t{k}"))) == 1
    # Four are needed, more than 1.5 * 2, and three are there: not yet.
    assert len(fed(trainer, round_of([1, 0, 0, 0], "u") + round_of([1, 0, 0, 0], "v"))) == 1
    own, again = fed(trainer, round_of([0, 1, 0, 0], "w"))
    assert learned(own) == {"w0": -0.25, "w1": 0.75, "w2": -0.25, "w3": -0.25}
    # Two of t0, t1, t2, u0, v0, each over the median of the groups' means, 1/4.
    assert len(again.examples) == 2
    assert set(learned(again)) < {"t00", "t10", "t20", "u0", "v0"}
    assert set(learned(again).values()) == {0.75}
    assert isinstance(again.loss, CovarianceClip) and again.loss.weight == 1
    assert all(e.completion.logprobs == (-1.0,) for e in again.examples)
    # The buffer was emptied; only what has been played since is in it.
    assert len(fed(trainer, round_of([1, 0], "x"))) == 1


def test_advantages_are_made_anew() -> None:
    """A success among failures is no news once most groups succeed."""
    trainer = made(buffer_size=1)
    fed(trainer, round_of([0.6, 0, 0], "a"))
    # The groups' means are 0.2, 1/6, then 0.7 three times: 0.6 is not above the median.
    more = [one for name in "cde" for one in round_of([0.7, 0.7], name)]
    fed(trainer, [*round_of([0.5, 0, 0], "b"), *more])
    assert fed(trainer, []) == []
    assert len(trainer._replay.memories) == 2  # pyright: ignore[reportPrivateUsage]
    # Better ones come: only they are repeated.
    fed(trainer, [one for name in "fg" for one in round_of([1.0, 0.4], name)])
    (again,) = fed(trainer, [])
    assert set(learned(again)) <= {"f0", "g0"}
    assert list(learned(again).values()) == [pytest.approx(0.3)]


def test_the_weight_warms_up_and_the_tool_reward_goes() -> None:
    trainer = made(imitation_warmup=4, imitation=0.5, tool_reward=0.25, tool_decay=2)
    long = [
        episode(1.0, ("o", "a"), ("o", "b")),
        episode(1.0, *[("o", "c")] * 9, attempt=1),
    ]
    # The second acts nine times, for which there is 1 at most.
    assert learned(fed(trainer, long)[0]) == {"a": -0.25, "b": -0.25, "c": 0.25}
    assert learned(fed(trainer, long)[0])["c"] == pytest.approx(0.125)
    # At step 2 there is nothing left but the score, the same for both.
    assert fed(trainer, long) == []
    fed(trainer, round_of([1, 0, 0, 0, 0, 0], "a") + round_of([1, 0, 0, 0, 0], "b"))
    fed(trainer, round_of([1, 0, 0, 0, 0, 0], "c") + round_of([1, 0, 0, 0, 0], "d"))
    (again,) = fed(trainer, [])
    assert isinstance(again.loss, Clip) and again.loss.weight == 0.5


def test_in_the_middle_of_its_warm_up_it_has_half_its_weight() -> None:
    trainer = made(imitation_warmup=4)
    for k in range(2):
        fed(trainer, [one for j in range(2) for one in round_of([1, 0, 0], f"{k}{j}")])
    (again,) = fed(trainer, [])
    assert isinstance(again.loss, Clip) and again.loss.weight == pytest.approx(0.5)


def test_old_episodes_are_forgotten() -> None:
    trainer = made(tolerate=1, buffer_size=4)
    fed(trainer, round_of([1, 0], "a"))
    fed(trainer, round_of([1, 0], "b"))
    assert [m.step for m in trainer._replay.memories] == [0, 1]  # pyright: ignore
    fed(trainer, round_of([1, 0], "c"))
    assert [m.step for m in trainer._replay.memories] == [1, 2]  # pyright: ignore
    # With 0, what was played before is never replayed.
    never = made(tolerate=0, buffer_size=1)
    for k in range(4):
        judged = [one for n in range(3) for one in round_of([1, 0], f"{k}{n}")]
        assert len(fed(never, judged)) == 1


def test_the_queue_drops_whole_iterations_oldest_first() -> None:
    replay = Replay(size=1, baseline_size=3, tolerate=9)
    replay.observe(0, [0.1, 0.2])
    replay.observe(1, [0.3, 0.4])
    # Over by one: that much it may be.
    assert [step for step, _ in replay.mean_rewards] == [0, 1]
    replay.observe(2, [0.5])
    assert [step for step, _ in replay.mean_rewards] == [1, 2]
    assert replay.median == 0.4


@given(
    st.lists(st.floats(0, 1), max_size=40),
    st.lists(st.floats(0, 1), max_size=9),
    st.integers(1, 8),
)
def test_nothing_is_replayed_that_is_not_above_the_median(
    rewards: list[float], means: list[float], size: int
) -> None:
    replay = Replay(size, 100, 5)
    replay.observe(0, means)
    replay.memories = [ReplayEntry(episode(r, ("o", f"{k}")), r, 0) for k, r in enumerate(rewards)]
    taken = replay.take(0)
    good = [] if replay.median is None else [r for r in rewards if r > replay.median]
    assert all(advantage > 0 for _, advantage in taken)
    assert len({id(memory) for memory, _ in taken}) == len(taken) <= size
    if len(good) > 1.5 * size:
        # A power of two, as large as they allow.
        assert len(taken) == size or len(taken) * 2 > len(good)
        assert replay.memories == []
    else:
        assert taken == [] and len(replay.memories) == len(rewards)


def test_a_group_of_recent_successes_all_equal_teaches_nothing() -> None:
    trainer = made()
    assert fed(trainer, round_of([1, 1, 1], "a")) == []
    assert trainer._replay.memories == []  # pyright: ignore[reportPrivateUsage]


def test_restored_it_goes_on_as_it_would_have(tmp_path: Path) -> None:
    through, first = made(), made()
    for k in range(3):
        for trainer in (through, first):
            fed(trainer, round_of([1, 0, 0, 0, 0.5], f"t{k}"))
    (tmp_path / "trainer").mkdir()
    first.save(tmp_path / "trainer", tmp_path / "images")
    second = made()
    second.restore(tmp_path / "trainer")
    for k in range(3):
        judged = round_of([1, 0, 0, 0], f"u{k}")
        assert fed(second, judged) == fed(through, judged)
