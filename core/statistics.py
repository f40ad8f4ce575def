"""The arithmetic of evidence: intervals, paired tests, pass@k, votes, RISE's introspection table.

Wilson 1927 for one rate; the exact McNemar test and a bootstrap over tasks for two checkpoints on
the same tasks; pass@k of Chen et al. 2021 (arXiv:2107.03374); m1@t1 to p1@tk of Qu et al. 2024
(arXiv:2407.18219). Only numpy: every result here is the same on every machine for the same seed.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray

from .errors import StoreError

SIGNIFICANCE = 0.05
RESAMPLES = 10_000
CELLS = 2_000_000
"""The most numbers a resampling step holds at once: 16 MB."""
EXACT_FLIPS = 14
"""Up to so many unequal tasks every sign pattern is tried (16,384); beyond, patterns are drawn."""


class Interval(NamedTuple):
    low: float
    high: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Wilson's score interval for a success rate; (0, 1) if nothing was tried.

    Raises:
        ValueError: unless 0 <= successes <= n and 0 < confidence < 1.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"successes must lie in 0..n, not {successes} of {n}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, not {confidence}")
    if n == 0:
        return Interval(0.0, 1.0)
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    p = successes / n
    scale = 1 + z * z / n
    centre = (p + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 and n the formula gives exactly 0 and 1, but for rounding.
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(low, high)


def mcnemar_exact(b: int, c: int) -> float:
    """Two-sided exact p-value that ``b`` against ``c`` discordant pairs are coin flips.

    Computed in whole numbers, so it is exact at any size. 1.0 if there is no discordant pair.

    Raises:
        ValueError: if a count is negative.
    """
    if b < 0 or c < 0:
        raise ValueError(f"counts of pairs cannot be negative: {b}, {c}")
    n = b + c
    term = tail = 1  # C(n, 0), then the sum of C(n, i) up to the smaller count
    for i in range(min(b, c)):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)


def bootstrap_mean(
    values: Sequence[float] | NDArray[np.float64],
    resamples: int = RESAMPLES,
    seed: int = 0,
    confidence: float = 0.95,
) -> Interval:
    """Percentile bootstrap interval of the mean of ``values``, one per task: (tasks,).

    Raises:
        ValueError: if there are no values, or one is not a finite number.
    """
    data = _finite(values)
    random = np.random.default_rng(seed)
    rows = max(1, CELLS // len(data))
    resampled = np.empty(resamples)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        picks = random.integers(0, len(data), size=(count, len(data)))
        resampled[start : start + count] = data[picks].mean(axis=1)
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    return Interval(float(low), float(high))


def sign_flip(
    differences: Sequence[float] | NDArray[np.float64],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> float:
    """Two-sided p-value that per-task differences are symmetric about 0, by flipping their signs.

    Every sign pattern is tried when at most ``EXACT_FLIPS`` differences are not 0; otherwise
    ``resamples`` patterns are drawn and the observed one counts as one more.
    """
    data = _finite(differences)
    data = data[data != 0]
    if len(data) == 0:
        return 1.0
    observed = abs(float(data.sum()))
    least = observed - 1e-9 * float(np.abs(data).sum())  # sums in another order may round below
    if len(data) <= EXACT_FLIPS:
        sums = np.zeros(1)
        for value in data:
            sums = np.concatenate([sums + value, sums - value])
        return float((np.abs(sums) >= least).mean())
    random = np.random.default_rng(seed)
    rows = max(1, CELLS // len(data))
    extreme = 0
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        signs = 1 - 2 * random.integers(0, 2, size=(count, len(data)), dtype=np.int8)
        extreme += int((np.abs(signs @ data) >= least).sum())
    return (1 + extreme) / (1 + resamples)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that at least one of ``k`` samples, drawn from ``n`` of which ``c`` are right, is.

    Raises:
        ValueError: unless 0 <= c <= n and 1 <= k <= n.
    """
    if not (0 <= c <= n and 1 <= k <= n):
        raise ValueError(f"need 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    if n - c < k:
        return 1.0
    return 1.0 - math.prod(1 - k / i for i in range(n - c + 1, n + 1))


Judgement: TypeAlias = Literal["better", "worse", "inconclusive"]


@dataclass(frozen=True)
class Comparison:
    """B against A on the same tasks."""

    difference: float
    """Mean outcome of B minus that of A."""
    interval: Interval
    """95% bootstrap interval of ``difference`` over tasks."""
    p_value: float
    verdict: Judgement
    """``better`` if p < 0.05 and the whole interval lies above 0, ``worse`` if p < 0.05 and all
    of it lies below 0, else ``inconclusive``: no verdict contradicts its interval."""
    tasks: int
    only_a: int
    """Tasks where A did better than B (solved by A only)."""
    only_b: int
    test: str
    """What gave ``p_value``, in words."""


def compare_outcomes(
    a: Mapping[str, float | bool],
    b: Mapping[str, float | bool],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Whether B does better than A. Outcomes by task id: solved or not, or means over samples.

    Outcomes of only 0 and 1 are tested by McNemar's exact test; task means by flipping the signs of
    the differences, which for 0 and 1 would be the same test.

    Raises:
        StoreError: if the two did not play the same tasks, or none.
    """
    _same_tasks(a, b)
    ids = sorted(a)
    before = _finite([float(a[task]) for task in ids])
    after = _finite([float(b[task]) for task in ids])
    gains = after - before
    only_a, only_b = int((gains < 0).sum()), int((gains > 0).sum())
    if bool(np.isin(np.concatenate([before, after]), (0.0, 1.0)).all()):
        p_value = mcnemar_exact(only_a, only_b)
        test = "exact McNemar test on the tasks that only one of them solved"
    else:
        p_value = sign_flip(gains, resamples, seed)
        test = "sign-flip permutation test on the differences of task means"
    interval = bootstrap_mean(gains, resamples, seed)
    verdict: Judgement = "inconclusive"
    if p_value < SIGNIFICANCE and interval.low > 0:
        verdict = "better"
    elif p_value < SIGNIFICANCE and interval.high < 0:
        verdict = "worse"
    return Comparison(
        difference=float(gains.mean()),
        interval=interval,
        p_value=p_value,
        verdict=verdict,
        tasks=len(ids),
        only_a=only_a,
        only_b=only_b,
        test=test,
    )


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer given most often; None casts no vote; of equals, the one given first."""
    votes = Counter(answer for answer in answers if answer is not None)
    return max(votes, key=votes.__getitem__) if votes else None


Sample: TypeAlias = tuple[str | None, bool]
"""An answer in canonical form (None: not a legal one), and whether it was right."""


@dataclass(frozen=True)
class Rate:
    successes: int
    tasks: int
    rate: float
    interval: Interval
    """Wilson, 95%."""


@dataclass(frozen=True)
class Agreement:
    """A judge against the truth, on episodes it decided; positive means "solved"."""

    true_positive: int
    false_positive: int
    false_negative: int
    true_negative: int

    @property
    def n(self) -> int:
        return self.true_positive + self.false_positive + self.false_negative + self.true_negative

    @property
    def accuracy(self) -> float | None:
        return _share(self.true_positive + self.true_negative, self.n)

    @property
    def precision(self) -> float | None:
        """Of those it called solved, the share that were: what imitation lives on."""
        return _share(self.true_positive, self.true_positive + self.false_positive)

    @property
    def recall(self) -> float | None:
        return _share(self.true_positive, self.true_positive + self.false_negative)

    @property
    def kappa(self) -> float | None:
        """Cohen's: agreement beyond what the two rates alone would give; None if they give all."""
        if not self.n:
            return None
        yes = (self.true_positive + self.false_positive) / self.n
        solved = (self.true_positive + self.false_negative) / self.n
        chance = yes * solved + (1 - yes) * (1 - solved)
        observed = (self.true_positive + self.true_negative) / self.n
        return None if chance == 1 else (observed - chance) / (1 - chance)


def agreement(pairs: Sequence[tuple[bool, bool]]) -> Agreement:
    """``pairs``: what the judge said, what was true."""
    counts = Counter(pairs)
    return Agreement(
        counts[True, True], counts[True, False], counts[False, True], counts[False, False]
    )


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


@dataclass(frozen=True)
class Introspection:
    """RISE's table: does a model mend its own answers, or would asking afresh have done as well?"""

    k: int
    tasks: int
    m1_t1: Rate
    """The first turn of the conversation without an oracle."""
    mk_t1: Rate
    """The majority of ``k`` independent first turns."""
    m1_tk: Rate
    """The majority over the ``k`` turns of one conversation that is told "wrong" every time."""
    p1_tk: Rate
    """Right at any of up to ``k`` turns, told when right: an oracle, so not a deployable rate."""
    turn_accuracy: tuple[float, ...]
    """(k,) of the conversation without an oracle."""
    wrong_to_right: tuple[int, ...]
    """(k - 1,) tasks mended from turn t to t + 1, without an oracle."""
    right_to_wrong: tuple[int, ...]
    """(k - 1,) tasks spoilt from turn t to t + 1."""

    @property
    def improves_itself(self) -> bool:
        """RISE's own claim: m1@tk above m1@t1, and no worse than mk@t1 at equal samples."""
        return self.m1_tk.rate > self.m1_t1.rate and self.m1_tk.rate >= self.mk_t1.rate


def introspection_table(
    parallel: Sequence[Sequence[Sample]],
    sequential: Sequence[Sequence[Sample]],
    oracle: Sequence[Sequence[bool]],
    k: int | None = None,
) -> Introspection:
    """RISE's table from three ways of playing the same tasks, each given per task, in one order.

    ``parallel``: k independent first turns; ``sequential``: k turns of one conversation that never
    says whether an answer was right; ``oracle``: the turns of one that ends at the first right one.
    ``k`` is the longest of these unless given. An episode that broke may be shorter: what it did
    not say casts no vote and is not right. A majority is right if its first sample was.

    Raises:
        ValueError: if the three are of unequal numbers of tasks, or one is longer than ``k``.
    """
    if not len(parallel) == len(sequential) == len(oracle):
        raise ValueError(
            "parallel, sequential and oracle must cover the same tasks, "
            f"not {len(parallel)}, {len(sequential)} and {len(oracle)}"
        )
    longest = max(map(len, [*parallel, *sequential, *oracle]), default=0)
    k = longest if k is None else k
    if longest > k:
        raise ValueError(f"a task has {longest} samples, but k is {k}")
    tasks = len(sequential)
    right = [[correct for _, correct in turns] for turns in sequential]
    return Introspection(
        k=k,
        tasks=tasks,
        m1_t1=_rate([any(turns[:1]) for turns in right]),
        mk_t1=_rate([_vote_is_right(samples) for samples in parallel]),
        m1_tk=_rate([_vote_is_right(turns) for turns in sequential]),
        p1_tk=_rate([any(turns) for turns in oracle]),
        turn_accuracy=tuple(
            sum(any(turns[t : t + 1]) for turns in right) / max(1, tasks) for t in range(k)
        ),
        wrong_to_right=tuple(_flips(right, t, [False, True]) for t in range(k - 1)),
        right_to_wrong=tuple(_flips(right, t, [True, False]) for t in range(k - 1)),
    )


def _vote_is_right(samples: Sequence[Sample]) -> bool:
    winner = majority([answer for answer, _ in samples])
    if winner is None:
        return False
    return next(correct for answer, correct in samples if answer == winner)


def _flips(right: Sequence[Sequence[bool]], turn: int, pattern: list[bool]) -> int:
    return sum(list(turns[turn : turn + 2]) == pattern for turns in right)


def _rate(outcomes: Sequence[bool]) -> Rate:
    successes, tasks = sum(outcomes), len(outcomes)
    return Rate(successes, tasks, successes / max(1, tasks), wilson(successes, tasks))


def _finite(values: Any) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    if data.ndim != 1 or len(data) == 0:
        raise ValueError(f"need one number per task, got an array of shape {data.shape}")
    if not np.isfinite(data).all():
        raise ValueError("every value must be a finite number")
    return data


def _same_tasks(a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
    if not a and not b:
        raise StoreError("nothing to compare: neither A nor B has a task")
    if a.keys() == b.keys():
        return
    parts = [f"A has {len(a)} tasks and B {len(b)}, but a paired comparison needs the same tasks"]
    for name, missing in (("A", sorted(b.keys() - a.keys())), ("B", sorted(a.keys() - b.keys()))):
        if missing:
            examples = ", ".join(map(repr, missing[:3])) + (", ..." if len(missing) > 3 else "")
            parts.append(f"{len(missing)} are missing from {name}: {examples}")
    raise StoreError("; ".join(parts))
