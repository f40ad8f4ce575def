"""The puzzle: an exact checker that runs nothing, disjoint splits, an expert that is right."""

import asyncio
import random
from contextlib import suppress
from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfwright.environments.countdown import (
    Countdown,
    CountdownConfig,
    Illegal,
    evaluate,
    guess,
    solutions,
    split_of,
)

NUMBERS = st.lists(st.integers(1, 20), min_size=2, max_size=5)


@pytest.mark.parametrize(
    ("text", "numbers", "value"),
    [
        ("1+2*3", [1, 2, 3], 7),
        ("(1+2)*3", [1, 2, 3], 9),
        ("10-4-3", [3, 4, 10], 3),
        ("10-(4-3)", [3, 4, 10], 9),
        ("8/4/2", [2, 4, 8], 1),
        ("1/3*3", [1, 3, 3], 1),
        (" 5 *\n( 2 ) ", [2, 5], 10),
    ],
)
def test_values_by_hand(text: str, numbers: list[int], value: int) -> None:
    assert evaluate(text, numbers, "+-*/") == value


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "breaks off"),
        ("3+", "breaks off"),
        ("3 4", "out of place"),
        ("3+4)", "out of place"),
        ("(3+4", "not closed"),
        ("-3+4", "out of place"),
        ("3+4+4", "each number once"),
        ("3", "each number once"),
        ("34", "each number once"),
        ("3**4", "out of place"),
        ("3//4", "only numbers"),
        ("__import__('os')", "only numbers"),
        ("³+4", "only numbers"),
        ("3+" * 100, "too long"),
    ],
)
def test_what_is_not_legal(text: str, why: str) -> None:
    with pytest.raises(Illegal, match=why):
        evaluate(text, [3, 4], "+-*")


def test_division_by_zero_is_not_legal() -> None:
    with pytest.raises(Illegal, match="division by zero"):
        evaluate("5/(3-3)", [3, 3, 5], "+-*/")


@given(st.text(alphabet="0123456789+-*/() .^x", max_size=60))
def test_any_text_is_a_value_or_a_fault(text: str) -> None:
    with suppress(Illegal):
        assert isinstance(evaluate(text, [1, 2, 3], "+-*/"), Fraction)


@given(NUMBERS, st.sampled_from(["+-", "+-*", "+-*/"]), st.integers(0, 10**6))
def test_what_is_written_is_worth_what_was_meant(
    numbers: list[int], operators: str, seed: int
) -> None:
    term = guess(numbers, operators, random.Random(seed))
    assert evaluate(term.text, numbers, operators) == term.value


def test_the_table_of_solutions_by_hand() -> None:
    table = solutions((2, 3), "+-*")
    assert table == {5: "2+3", -1: "2-3", 1: "3-2", 6: "2*3"}


@given(st.lists(st.integers(1, 9), min_size=3, max_size=3).map(sorted), st.integers(0, 999))
def test_the_table_misses_nothing_that_can_be_guessed(numbers: list[int], seed: int) -> None:
    made = guess(numbers, "+-*", random.Random(seed))
    assert made.value in solutions(tuple(numbers), "+-*")


@pytest.mark.parametrize("split", ["train", "validation", "test"])
def test_a_split_is_decided_by_the_puzzle_alone(split: str) -> None:
    for settings in ({}, {"numbers": 4, "operators": "+-*/", "largest": 50}):
        tasks = Countdown(CountdownConfig.model_validate(settings)).tasks(split)
        assert all(split_of(tasks[k].id) == split for k in range(40))
        assert tasks[7] == tasks[7]


def test_an_unknown_split_and_a_negative_index_are_refused() -> None:
    world = Countdown(CountdownConfig())
    with pytest.raises(ValueError, match="train, validation or test"):
        world.tasks("dev")
    with pytest.raises(IndexError):
        world.tasks("train")[-1]


@pytest.mark.parametrize("numbers", [2, 3, 4, 5])
def test_the_expert_solves_from_the_start_and_after_a_mistake(numbers: int) -> None:
    world = Countdown(CountdownConfig(numbers=numbers))

    async def play() -> None:
        for k in range(5):
            task = world.tasks("train")[k]
            await world.reset(task, 0)
            missed = await world.step("1")
            assert (missed.reward, missed.terminated, missed.success) == (0.0, False, False)
            action = await world.expert()
            assert action is not None
            solved = await world.step(action)
            assert (solved.reward, solved.terminated, solved.success) == (1.0, True, True)

    asyncio.run(play())


def test_a_wrong_attempt_is_told_its_value_and_the_last_one_ends_it() -> None:
    world = Countdown(CountdownConfig(attempts=2))
    task = next(
        t for t in (world.tasks("train")[k] for k in range(99)) if t.target != sum(t.numbers)
    )

    async def play() -> None:
        await world.reset(task, 0)
        sum_of_all = "+".join(map(str, task.numbers))
        first = await world.step(sum_of_all)
        wanted = f"That makes {sum(task.numbers)}, wanted {task.target}. Try again."
        assert first.observation.text == wanted and not first.truncated
        second = await world.step("nonsense")
        assert second.observation.text.startswith("Not legal") and second.truncated

    asyncio.run(play())


def test_without_an_oracle_nothing_seen_depends_on_being_right() -> None:
    blind = Countdown(CountdownConfig(attempts=3)).without_oracle()
    task = blind.tasks("train")[0]

    async def play() -> None:
        await blind.reset(task, 0)
        right = await blind.step(task.witness)
        assert right.reward == 1.0 and not right.terminated and not right.success
        text = f"That makes {task.target}, wanted {task.target}. Try again."
        assert right.observation.text == text
        await blind.step("1")
        assert (await blind.step(task.witness)).truncated

    asyncio.run(play())


def test_answers_are_values_and_only_of_legal_attempts() -> None:
    world = Countdown(CountdownConfig())
    task = world.tasks("train")[0]
    a, b, c = task.numbers
    assert (
        world.answer(task, f"{a}+{b}+{c}") == str(a + b + c) == world.answer(task, f"{c}+{a}+{b}")
    )
    assert world.answer(task, f"{a}+{b}") is None


def test_settings_that_leave_no_puzzle_say_so() -> None:
    with pytest.raises(ValueError, match="no puzzle for test with 2 numbers up to 2"):
        CountdownConfig(numbers=2, largest=2)


def test_training_tasks_are_known_by_name() -> None:
    world = Countdown(CountdownConfig())
    for split in ("train", "validation", "test"):
        for task in world.tasks(split)[:40]:
            if split == "train":
                known = world.named(task.id)
                # Another way there may be told, but it is the same puzzle.
                assert replace(known, witness="") == replace(task, witness="")
                assert evaluate(known.witness, known.numbers, "+-*") == known.target
            else:
                with pytest.raises(ValueError, match=f"is held out for {split}"):
                    world.named(task.id)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("countdown 1 2 = 3", "is no puzzle here; wanted 'countdown A B C = D' with 3 ascending"),
        ("countdown 3 2 1 = 6", "is no puzzle here"),
        ("countdown 1 2 30 = 6", "is no puzzle here; .* numbers from 1 to 20"),
        ("countdown 1 2 x = 6", "is no puzzle here"),
        ("countdown 01 2 3 = 6", "is no puzzle here"),
        ("countdown \u0661 2 3 = 6", "is no puzzle here"),
        ("countdown 1 2 3 = 6 ", "is no puzzle here"),
        ("countdown 1 1 1 = 99", "has no solution, or a target above 99"),
        ("countdown 18 19 20 = 722", "has no solution, or a target above 99"),
    ],
)
def test_what_is_no_puzzle_is_refused(name: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Countdown(CountdownConfig()).named(name)


def test_larger_puzzles_have_no_names() -> None:
    with pytest.raises(ValueError, match="more than 4 numbers are not known by name"):
        Countdown(CountdownConfig(numbers=5)).named("countdown 1 2 3 4 5 = 15")
