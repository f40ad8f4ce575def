"""Seeds and draws: the same from the same, unrelated from different, without repetition."""

import asyncio
from collections.abc import Sequence
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfwright.core.errors import WorldError
from selfwright.core.play import draw as drawing
from selfwright.core.play.draw import starts
from selfwright.core.seeds import derive, identify
from selfwright.core.types import Task

part = st.integers() | st.text(alphabet=st.sampled_from("ab:1\x1f"), max_size=4)


@given(st.lists(st.lists(part, max_size=3).map(tuple), min_size=2, max_size=6, unique=True))
def test_different_parts_give_different_seeds(parts: list[tuple[int | str, ...]]) -> None:
    for one, other in combinations(parts, 2):
        assert (derive(*one) == derive(*other)) == (list(map(repr, one)) == list(map(repr, other)))
    assert all(0 <= derive(*one) < 2**63 for one in parts)


@given(st.lists(st.lists(part, max_size=3).map(tuple), min_size=2, max_size=6, unique=True))
def test_different_parts_give_different_names(parts: list[tuple[int | str, ...]]) -> None:
    for one, other in combinations(parts, 2):
        alike = list(map(repr, one)) == list(map(repr, other))
        assert (identify(*one) == identify(*other)) == alike
    assert all(len(identify(*one)) == 20 == len(f"{int(identify(*one), 16):020x}") for one in parts)


def test_seeds_are_pinned() -> None:
    # They enter every run: were they to change, no run could be resumed or repeated.
    assert derive() == 8238016292129134938
    assert derive(0, "world", "train/1") == 4386762615967029904
    assert derive("1") != derive(1)
    assert derive("\ud800") >= 0


def draw(tasks: Sequence[Task], count: int, seed: int) -> list[Task]:
    return asyncio.run(drawing.draw(drawing.Given(tasks), count, seed))


def tasks(count: int, distinct: int = 10**9) -> list[Task]:
    return [Task(f"t{k % distinct}", "", 1) for k in range(count)]


@given(st.integers(1, 60), st.integers(0, 20), st.integers(0, 3))
def test_drawn_without_repetition(size: int, count: int, seed: int) -> None:
    drawn = draw(tasks(size), count, seed)
    assert len({task.id for task in drawn}) == len(drawn) == min(size, count)
    assert drawn == draw(tasks(size), count, seed)


def test_endless_and_repetitive_splits() -> None:
    assert len(draw(range_of_tasks(), 50, 0)) == 50
    assert draw(range_of_tasks(), 5, 0) != draw(range_of_tasks(), 5, 1)
    assert sorted(task.id for task in draw(tasks(1000, 3), 10, 0)) == ["t0", "t1", "t2"]
    with pytest.raises(WorldError, match="no tasks"):
        draw([], 1, 0)


def test_two_tasks_of_one_name_are_refused_with_both() -> None:
    namesakes = [Task("one", f"Do {k}.", 3) for k in range(2)]
    with pytest.raises(WorldError, match=r"two tasks are called 'one': 'Do .\.' .*'Do .\.'"):
        draw(namesakes, 2, 0)
    same_words = [Task("one", "Do it.", steps) for steps in (3, 4)]
    with pytest.raises(WorldError, match=r"\(3 steps\)"):
        draw(same_words, 2, 0)


class Endless(list[Task]):
    """As large as a sequence may be."""

    def __len__(self) -> int:
        return 2**62

    def __getitem__(self, index: object) -> Task:  # pyright: ignore[reportIncompatibleMethodOverride]
        return Task(f"t{index}", "", 1)


def range_of_tasks() -> Endless:
    return Endless()


def test_attempts_of_a_group_meet_the_same_world() -> None:
    one, two, three, four = starts(tasks(2), 2, seed=5, turns=3)
    assert (one.task.id, two.task.id, three.task.id) == ("t0", "t0", "t1")
    assert one.seed == two.seed != three.seed == four.seed
    assert (one.attempt, two.attempt, four.attempt) == (0, 1, 1)
    assert {start.turns for start in (one, two, three, four)} == {3}
    assert starts(tasks(2), 2, seed=6)[0].seed != one.seed
