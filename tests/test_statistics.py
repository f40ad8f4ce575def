"""Intervals, paired tests, pass@k, votes, the introspection table: values worked by hand."""

# pyright: reportUnknownMemberType=false

import math
import random
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest  # pyright: ignore[reportMissingTypeStubs, reportUnknownVariableType]

from selfwright.core.errors import StoreError
from selfwright.core.statistics import (
    Interval,
    bootstrap_mean,
    compare_outcomes,
    introspection_table,
    majority,
    mcnemar_exact,
    pass_at_k,
    sign_flip,
    wilson,
)

counts = st.integers(1, 2000).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


def test_wilson_by_hand() -> None:
    # z = 1.959964: 8 of 10 is the textbook example, 0 of 10 ends at z^2 / (10 + z^2).
    assert wilson(8, 10) == pytest.approx((0.4901625, 0.9433178), abs=1e-7)
    assert wilson(0, 10) == pytest.approx((0.0, 0.2775328), abs=1e-7)
    assert wilson(10, 10) == pytest.approx((0.7224672, 1.0), abs=1e-7)
    assert wilson(0, 0) == (0.0, 1.0)


@given(counts)
def test_wilson_holds_the_rate_and_is_symmetric(count: tuple[int, int]) -> None:
    k, n = count
    low, high = wilson(k, n)
    assert 0 <= low <= k / n <= high <= 1
    assert low < high
    mirrored = wilson(n - k, n)
    assert (1 - mirrored.high, 1 - mirrored.low) == pytest.approx((low, high), abs=1e-12)
    wider = wilson(k, n, confidence=0.99)
    assert wider.low <= low and high <= wider.high


@pytest.mark.parametrize(("k", "n"), [(-1, 3), (4, 3)])
def test_wilson_refuses_impossible_counts(k: int, n: int) -> None:
    with pytest.raises(ValueError, match=r"0\.\.n"):
        wilson(k, n)


def test_mcnemar_by_hand() -> None:
    assert mcnemar_exact(0, 0) == 1.0
    assert mcnemar_exact(0, 5) == 2 / 32
    assert mcnemar_exact(1, 5) == 2 * (1 + 6) / 64
    assert mcnemar_exact(3, 3) == 1.0
    assert mcnemar_exact(0, 3000) == 0.0 or mcnemar_exact(0, 3000) < 1e-300


@given(st.integers(0, 300), st.integers(0, 300))
def test_mcnemar_is_symmetric_and_agrees_with_the_binomial_test(b: int, c: int) -> None:
    p = mcnemar_exact(b, c)
    assert p == mcnemar_exact(c, b)
    assert 0 <= p <= 1
    if b + c:
        assert p == pytest.approx(float(binomtest(b, b + c).pvalue), rel=1e-9)


def test_bootstrap_of_a_coin_is_near_the_normal_interval() -> None:
    values = [0.0, 1.0] * 200
    low, high = bootstrap_mean(values, seed=1)
    assert (low, high) == pytest.approx((0.451, 0.549), abs=0.004)
    assert bootstrap_mean(values, seed=1) == (low, high)
    assert bootstrap_mean([0.25] * 7) == (0.25, 0.25)


def test_bootstrap_covers_the_truth_about_as_often_as_it_says() -> None:
    draw = np.random.default_rng(7)
    hits = 0
    for trial in range(200):
        low, high = bootstrap_mean(draw.normal(3.0, 1.0, size=60), resamples=400, seed=trial)
        hits += low <= 3.0 <= high
    assert 180 <= hits <= 198


@pytest.mark.parametrize("values", [[], [math.nan], [math.inf]])
def test_bootstrap_refuses_what_has_no_mean(values: list[float]) -> None:
    with pytest.raises(ValueError):
        bootstrap_mean(values)


def test_sign_flip_by_hand() -> None:
    # Sums of +-1 +-2 +-3: only +6 and -6 are as far out as 6.
    assert sign_flip([1.0, 2.0, 3.0]) == 2 / 8
    assert sign_flip([0.0, 0.0]) == 1.0
    # 20 equal gains: exactly 2 / 2**20, but drawn patterns report at least 1 / 10,001.
    assert sign_flip([0.5] * 20) == pytest.approx(1 / 10_001)


@given(st.integers(0, 7), st.integers(0, 7))
def test_sign_flip_of_zeros_and_ones_is_mcnemar(b: int, c: int) -> None:
    assert sign_flip([-1.0] * b + [1.0] * c + [0.0]) == pytest.approx(mcnemar_exact(b, c))


def test_drawn_sign_flips_agree_with_the_exact_test() -> None:
    assert sign_flip([-1.0] * 14 + [1.0] * 26) == pytest.approx(mcnemar_exact(14, 26), abs=0.01)


def test_pass_at_k_by_hand() -> None:
    assert pass_at_k(5, 2, 2) == pytest.approx(1 - 3 / 10)
    assert pass_at_k(100, 0, 10) == 0.0
    assert pass_at_k(100_000, 1, 50_000) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="k <= n"):
        pass_at_k(3, 1, 4)


@given(counts)
@settings(max_examples=50)
def test_pass_at_k_properties(count: tuple[int, int]) -> None:
    c, n = count
    assert pass_at_k(n, c, 1) == pytest.approx(c / n)
    assert pass_at_k(n, c, n) == (1.0 if c else 0.0)
    ladder = [pass_at_k(n, c, k) for k in sorted({1, max(1, n // 3), max(1, n // 2), n})]
    assert ladder == sorted(ladder)
    k = max(1, n // 3)
    exact = 1 - Fraction(math.comb(n - c, k), math.comb(n, k))
    assert ladder[0] <= 1 and pass_at_k(n, c, k) == pytest.approx(float(exact), abs=1e-9)


def test_majority_by_hand() -> None:
    assert majority([]) is None
    assert majority([None, None]) is None
    assert majority([None, None, "a"]) == "a"
    assert majority(["b", "a", "a", "b"]) == "b"
    assert majority(["c", "a", "b", "a"]) == "a"


@given(st.lists(st.sampled_from(["a", "b", "c", None]), max_size=9), st.randoms())
def test_majority_has_the_most_votes_whatever_the_order(
    answers: list[str | None], order: random.Random
) -> None:
    winner = majority(answers)
    votes = {answer: answers.count(answer) for answer in answers if answer is not None}
    if not votes:
        assert winner is None
        return
    best = {answer for answer, count in votes.items() if count == max(votes.values())}
    assert winner == next(answer for answer in answers if answer in best)
    shuffled = answers[:]
    order.shuffle(shuffled)
    assert majority(shuffled) in best
    assert majority([*answers, None]) == winner


def test_comparison_by_hand() -> None:
    a = {f"t{i}": i < 4 for i in range(20)}
    b = {f"t{i}": i < 3 or i >= 10 for i in range(20)}
    result = compare_outcomes(a, b)
    assert (result.tasks, result.only_a, result.only_b) == (20, 1, 10)
    assert result.difference == pytest.approx(9 / 20)
    assert result.p_value == mcnemar_exact(1, 10) == 24 / 2048
    assert result.verdict == "better" and result.interval.low > 0
    assert "McNemar" in result.test
    same = compare_outcomes(a, a)
    assert (same.verdict, same.p_value, same.interval) == ("inconclusive", 1.0, Interval(0, 0))


def test_few_discordant_pairs_prove_nothing() -> None:
    # The bootstrap alone would call five gains and no loss significant; the exact test does not.
    a = {f"t{i}": 0.0 for i in range(10)}
    result = compare_outcomes(a, {task: float(task < "t5") for task in a})
    assert result.interval.low > 0 and result.p_value == 2 / 32
    assert result.verdict == "inconclusive"


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=60), st.booleans())
@settings(max_examples=40, deadline=None)
def test_comparisons_are_antisymmetric(pairs: list[tuple[bool, bool]], means: bool) -> None:
    scale = 0.5 if means else 1.0
    a = {str(i): scale * first for i, (first, _) in enumerate(pairs)}
    b = {str(i): scale * second for i, (_, second) in enumerate(pairs)}
    there, back = compare_outcomes(a, b, resamples=500), compare_outcomes(b, a, resamples=500)
    assert there.difference == -back.difference
    assert there.p_value == back.p_value
    assert there.interval == pytest.approx((-back.interval.high, -back.interval.low))
    opposite = {"better": "worse", "worse": "better", "inconclusive": "inconclusive"}
    assert there.verdict == opposite[back.verdict]
    assert (there.only_a, there.only_b) == (back.only_b, back.only_a)


def test_task_means_are_compared_by_permutation() -> None:
    a = {str(i): (i % 5) / 5 for i in range(60)}
    b = {task: min(1.0, value + 0.2) for task, value in a.items()}
    result = compare_outcomes(a, b)
    assert result.difference == pytest.approx(0.2)
    assert "permutation" in result.test and result.p_value < 0.001
    assert result.verdict == "better"


def test_unequal_task_sets_are_refused_with_examples() -> None:
    with pytest.raises(StoreError) as caught:
        compare_outcomes({"t1": 1, "t2": 0}, {"t2": 1, "t3": 1, "t4": 0, "t5": 0, "t6": 0})
    text = str(caught.value)
    assert "A has 2 tasks and B 5" in text
    assert "4 are missing from A: 't3', 't4', 't5', ..." in text
    assert "1 are missing from B: 't1'" in text
    with pytest.raises(StoreError, match="nothing to compare"):
        compare_outcomes({}, {})


def test_introspection_table_by_hand() -> None:
    parallel = [
        [("1", False), ("2", True), ("2", True)],  # majority right
        [("1", False), (None, False), ("2", True)],  # a tie goes to the earliest: wrong
    ]
    sequential = [
        [("1", False), ("2", True), ("2", True)],  # mended
        [("2", True), ("3", False), ("4", False)],  # spoilt, but the tie goes to the first
    ]
    table = introspection_table(parallel, sequential, [[False, True], [True]])
    assert (table.k, table.tasks) == (3, 2)
    assert (table.m1_t1.rate, table.mk_t1.rate) == (0.5, 0.5)
    assert (table.m1_tk.rate, table.p1_tk.rate) == (1.0, 1.0)
    assert table.m1_t1.interval == wilson(1, 2)
    assert table.turn_accuracy == (0.5, 0.5, 0.5)
    assert table.wrong_to_right == (1, 0)
    assert table.right_to_wrong == (1, 0)
    assert table.improves_itself


def test_an_answer_counts_as_its_first_sample_was_judged() -> None:
    samples = [("7", False), ("7", True), ("7", True)]
    table = introspection_table([samples], [samples], [[False, False, False]])
    assert table.mk_t1.rate == table.m1_tk.rate == 0.0


def test_broken_and_missing_turns_are_neither_right_nor_flips() -> None:
    table = introspection_table([[("1", True)], []], [[("1", True)], []], [[True], []], k=3)
    assert table.turn_accuracy == (0.5, 0.0, 0.0)
    assert table.right_to_wrong == (0, 0)
    assert table.m1_tk.rate == 0.5
    empty = introspection_table([], [], [])
    assert (empty.k, empty.tasks, empty.m1_t1.rate) == (0, 0, 0.0)


def test_introspection_refuses_unequal_or_overlong_input() -> None:
    with pytest.raises(ValueError, match="same tasks"):
        introspection_table([[]], [], [])
    with pytest.raises(ValueError, match="k is 1"):
        introspection_table([[("1", True)] * 2], [[]], [[]], k=1)
