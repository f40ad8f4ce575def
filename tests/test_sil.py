"""Classic self-imitation: who is repeated, with what weight, and where the value goes."""

# pyright: reportPrivateUsage=false

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from components import context_of, episode
from hypothesis import given
from hypothesis import strategies as st
from prompts import prompt_of

from selfwright.core.types import Judged
from selfwright.trainers.learning.loss import NLL, Clip
from selfwright.trainers.methods.sil import SIL, SILConfig
from selfwright.trainers.parts.replay import prioritised, recent, returns
from selfwright.trainers.parts.value import Value, ValueConfig, value_gap

Folder = Callable[[str], Path]


def made(folder: Path, **keys: Any) -> SIL:
    settings = {"device": "cpu", "learning_rate": 1e-2} | keys.pop("value", {})
    config = SILConfig.model_validate(keys | {"value": settings})
    return SIL(config, context_of(base=str(folder)))


class Oracle:
    """Expects the same of every state."""

    def __init__(self, expected: float) -> None:
        self.expected = expected
        self.seen: list[tuple[str, list[float], list[float]]] = []
        self.net = self
        self.updates = 1

    def values(self, prompts: Sequence[Any]) -> list[float]:
        return [self.expected] * len(prompts)

    def learn(
        self, prompts: Sequence[Any], worths: list[float], weights: list[float], side: str
    ) -> float:
        self.seen.append((side, worths, weights))
        return 0.0


def expecting(folder: Path, value: float, **keys: Any) -> tuple[SIL, Oracle]:
    trainer = made(folder, **keys)
    oracle = Oracle(value)
    trainer._value = oracle  # pyright: ignore[reportAttributeAccessIssue]
    return trainer, oracle


def two() -> list[Judged]:
    return [
        episode(1.0, ("o", "a"), ("p", "b"), attempt=0),
        episode(0.0, ("o", "c"), attempt=1),
    ]


def test_advantages_by_hand(model_folder: Folder) -> None:
    trainer, oracle = expecting(model_folder("scratch"), 0.4, gamma=0.5, replays=2)
    own, *again = asyncio.run(trainer.batches(two()))
    assert isinstance(own.loss, Clip)
    # Returns: 0.5 two actions before the end, 1 at it; 0 of the other.
    assert [e.advantage for e in own.examples] == pytest.approx([0.1, 0.6, -0.4])
    assert len(again) == 2
    for batch in again:
        assert isinstance(batch.loss, NLL)
        # Only the episode that was paid is remembered.
        assert {e.completion.text for e in batch.examples} <= {"a", "b"}
        assert all(0 < e.advantage <= 0.6 for e in batch.examples)
    # The first sight of V is learned only as it has learned before; replays draw it up alone.
    assert [side for side, *_ in oracle.seen] == ["above", "above"]
    assert all(weight <= 0.01 for _, _, weights in oracle.seen for weight in weights)


def test_what_is_no_better_than_expected_is_not_repeated(model_folder: Folder) -> None:
    trainer, _ = expecting(model_folder("scratch"), 1.0)
    assert len(asyncio.run(trainer.batches(two()))) == 1
    trainer, _ = expecting(model_folder("scratch"), -5.0, correction=0.0)
    _, again, *_ = asyncio.run(trainer.batches(two()))
    assert {e.advantage for e in again.examples} == {1.0}  # at most
    trainer, _ = expecting(model_folder("scratch"), 0.0)
    lost = [episode(0.0, ("o", "x"))]
    assert len(asyncio.run(trainer.batches(lost))) == 1 and trainer._kept == []
    assert asyncio.run(trainer.batches([])) == []


@given(st.floats(-1, 1), st.floats(-1, 1), st.floats(0, 1))
def test_raising_the_value_can_only_lower_its_loss(worth: float, value: float, up: float) -> None:
    def loss(v: float) -> float:
        return float(value_gap(torch.tensor(worth - v), "above").square())

    assert loss(value + up) <= loss(value) and (worth > value or loss(value) == 0)


def test_the_value_learns_what_states_are_worth(model_folder: Folder) -> None:
    settings = ValueConfig(device="cpu", learning_rate=1e-2, epochs=40)
    value = Value(settings, str(model_folder("scratch")), 0)
    states = [prompt_of(text) for text in ("1 2 3", "9 9 9")]
    assert value.values(states) == [0.0, 0.0]
    first = value.learn(states, [1.0, 0.0], [1.0, 1.0], "both")
    assert value.values(states) == pytest.approx([1.0, 0.0], abs=0.1)
    assert first > value.learn(states, [1.0, 0.0], [1.0, 1.0], "both")
    # From below only: what is worth less than expected leaves it where it is.
    before = value.values(states)
    assert value.learn(states, [-3.0, -3.0], [1.0, 1.0], "above") == 0
    assert value.values(states) == pytest.approx(before, abs=0.05)


def test_priorities_by_hand() -> None:
    drawn = prioritised([3.0, 1.0, 0.0], 4000, 1.0, 1.0, 0)
    counts = Counter(place for place, _ in drawn)
    assert counts[0] / 4000 == pytest.approx(0.75, abs=0.03) and counts[2] < 10
    # 1 / (N p), over the greatest that was drawn: three times as likely, a third of the weight.
    weights = dict(drawn)
    assert weights[0] / weights[1] == pytest.approx(1 / 3)
    assert set(dict(prioritised([3.0, 1.0], 50, 1.0, 0.0, 0)).values()) == {1.0}
    assert prioritised([1.0, 2.0], 9, 0.6, 1.0, 3) == prioritised([1.0, 2.0], 9, 0.6, 1.0, 3)


def test_the_oldest_episodes_go_first() -> None:
    assert [recent([3, 1, 2], most) for most in (1, 3, 5, 6, 9)] == [1, 2, 2, 3, 3]
    assert recent([], 4) == 0
    kept = [episode(1.0, ("o", "x"), ("o", "x"), ("o", "x"))]
    assert returns(kept[0], 0.5) == [0.25, 0.5, 1.0]
