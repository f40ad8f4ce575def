"""Countdown: reach a target from given numbers, each used once; every action is a whole attempt.

The number puzzle of the television game, as used to study search and learning in small language
models (Gandhi et al. 2024, arXiv:2404.03683). Puzzles are seeded and endless. A puzzle's
split follows from a hash of the puzzle itself, so that no two splits can share one.
"""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import combinations
from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from ..core.config import Config
from ..core.files import canonical_json
from ..core.splits import SHARES, EndlessSplit, split_of
from ..core.types import Observation, Task, TimeStep, Tool, WorldSpec

PRECEDENCE = {"+": 1, "-": 1, "*": 2, "/": 2}
DRAWS = 20_000
"""After so many vain draws there seems to be no such puzzle."""


NUMBER = r"[0-9]{1,6}"
SUM = rf"{NUMBER}( ?[-+*/] ?{NUMBER}){{0,5}}"
BRACKETED = rf"({NUMBER}|\({SUM}\))"
INSIDE = rf"{BRACKETED}( ?[-+*/] ?{BRACKETED}){{0,5}}"
OPERAND = rf"({BRACKETED}|\({INSIDE}\))"
EXPRESSION = rf"{OPERAND}( ?[-+*/] ?{OPERAND}){{0,5}}"
"""Expressions of brackets at most two deep, which is all that six numbers are likely to want; a
regular expression holds no deeper ones than it spells out."""
TOOL = Tool(
    "answer",
    "Try an expression.",
    canonical_json(
        {
            "type": "object",
            "properties": {
                "expression": {
                    "type": "string",
                    "pattern": f"^{EXPRESSION}$",
                    "description": "It uses each of the given numbers exactly once.",
                }
            },
            "required": ["expression"],
            "additionalProperties": False,
        }
    ),
    "{expression}",
)


class Illegal(ValueError):
    """An attempt that is no legal expression; the message says why."""


def evaluate(text: str, numbers: Sequence[int], operators: str) -> Fraction:
    """The value of ``text``, which must use each of ``numbers`` exactly once.

    A recursive-descent reader: nothing of the text is ever executed.

    Raises:
        Illegal: not an expression, a stranger among the numbers, a division by zero.
    """
    tokens = _tokens(text, operators)
    used: list[int] = []
    value, rest = _sum(tokens, 0, used)
    if rest != len(tokens):
        raise Illegal(f"{tokens[rest]} is out of place")
    if sorted(used) != sorted(numbers):
        raise Illegal("use each number once")
    return value


def _tokens(text: str, operators: str) -> list[str]:
    if len(text) > 120:
        raise Illegal("too long")
    tokens: list[str] = []
    for at, sign in enumerate(text):
        if sign.isascii() and sign.isdigit():
            if at and text[at - 1].isdigit() and tokens:
                tokens[-1] += sign
            else:
                tokens.append(sign)
        elif sign in operators or sign in "()":
            tokens.append(sign)
        elif not sign.isspace():
            raise Illegal("only numbers, operators and brackets")
    return tokens


def _sum(tokens: list[str], at: int, used: list[int]) -> tuple[Fraction, int]:
    value, at = _product(tokens, at, used)
    while at < len(tokens) and tokens[at] in "+-":
        right, after = _product(tokens, at + 1, used)
        value = value + right if tokens[at] == "+" else value - right
        at = after
    return value, at


def _product(tokens: list[str], at: int, used: list[int]) -> tuple[Fraction, int]:
    value, at = _atom(tokens, at, used)
    while at < len(tokens) and tokens[at] in "*/":
        right, after = _atom(tokens, at + 1, used)
        if tokens[at] == "/" and not right:
            raise Illegal("division by zero")
        value = value * right if tokens[at] == "*" else value / right
        at = after
    return value, at


def _atom(tokens: list[str], at: int, used: list[int]) -> tuple[Fraction, int]:
    if at == len(tokens):
        raise Illegal("it breaks off")
    token = tokens[at]
    if token == "(":
        value, at = _sum(tokens, at + 1, used)
        if at == len(tokens) or tokens[at] != ")":
            raise Illegal("a bracket is not closed")
        return value, at + 1
    if not token.isdigit():
        raise Illegal(f"{token} is out of place")
    used.append(int(token))
    return Fraction(int(token)), at + 1


@dataclass(frozen=True)
class Term:
    """A value reached by combining numbers, and how to write it."""

    value: int
    text: str
    operator: str = ""
    """The outermost one; empty for a plain number."""

    def inside(self, operator: str, right: bool) -> str:
        """The text as an operand, in brackets only where they are needed."""
        if not self.operator:
            return self.text
        mine, outer = PRECEDENCE[self.operator], PRECEDENCE[operator]
        bare = mine > outer or (mine == outer and not (right and operator in "-/"))
        return self.text if bare else f"({self.text})"


def combine(operator: str, left: Term, right: Term) -> Term | None:
    """``left operator right``; None for a division that leaves a remainder."""
    match operator:
        case "+":
            value = left.value + right.value
        case "-":
            value = left.value - right.value
        case "*":
            value = left.value * right.value
        case _:
            if not right.value or left.value % right.value:
                return None
            value = left.value // right.value
    text = f"{left.inside(operator, False)}{operator}{right.inside(operator, True)}"
    return Term(value, text, operator)


@lru_cache(maxsize=8192)
def solutions(numbers: tuple[int, ...], operators: str) -> dict[int, str]:
    """Every value reachable from all ``numbers``, each with its first shortest expression."""
    found: dict[int, str] = {}
    for term in _terms(tuple(Term(n, str(n)) for n in numbers), operators):
        if term.value not in found or len(term.text) < len(found[term.value]):
            found[term.value] = term.text
    return found


def _terms(terms: tuple[Term, ...], operators: str) -> Iterator[Term]:
    if len(terms) == 1:
        yield terms[0]
        return
    for i, j in combinations(range(len(terms)), 2):
        rest = tuple(t for k, t in enumerate(terms) if k not in (i, j))
        for operator in operators:
            pairs = ((i, j),) if operator in "+*" else ((i, j), (j, i))
            for left, right in pairs:
                term = combine(operator, terms[left], terms[right])
                if term is not None:
                    yield from _terms((*rest, term), operators)


def guess(numbers: Sequence[int], operators: str, rng: random.Random) -> Term:
    """A random expression that uses every number once."""
    terms = [Term(n, str(n)) for n in numbers]
    while len(terms) > 1:
        rng.shuffle(terms)
        term = combine(rng.choice(operators), terms[0], terms[1])
        if term is not None:
            terms[:2] = [term]
    return terms[0]


class CountdownConfig(Config):
    numbers: int = Field(default=3, ge=2, le=6)
    """How many numbers a puzzle gives."""
    largest: int = Field(default=20, ge=2, le=1000)
    """They are drawn from 1 to this."""
    target: int = Field(default=99, ge=9, le=100_000)
    """Targets lie between 1 and this."""
    operators: Literal["+-", "+-*", "+-*/"] = "+-*"
    attempts: int = Field(default=4, ge=1, le=64)
    """How many tries a task allows."""

    @model_validator(mode="after")
    def _playable(self) -> Self:
        for split, _ in SHARES:
            Puzzles(split, self)[0]
        return self


@dataclass(frozen=True)
class CountdownTask(Task):
    numbers: tuple[int, ...]
    """Ascending."""
    target: int
    witness: str
    """The expression the puzzle was made from."""


class Puzzles(EndlessSplit[CountdownTask]):
    """A split: the i-th puzzle is drawn by hashing the split's name and i. Lazy and endless."""

    def __init__(self, split: str, config: CountdownConfig) -> None:
        super().__init__(split)
        self._config = config

    def drawn(self, index: int) -> CountdownTask:
        config = self._config
        rng = random.Random(f"countdown/{self._split}/{index}")
        for _ in range(DRAWS):
            numbers = tuple(sorted(rng.randint(1, config.largest) for _ in range(config.numbers)))
            expression = guess(numbers, config.operators, rng)
            if not 1 <= expression.value <= config.target:
                continue
            target = expression.value
            if split_of(name_of(numbers, target)) == self._split:
                return puzzle(numbers, target, expression.text, config)
        raise ValueError(
            f"countdown finds no puzzle for {self._split} with {config.numbers} numbers up to "
            f"{config.largest} and targets up to {config.target}; allow more or larger ones"
        )


def name_of(numbers: Sequence[int], target: int) -> str:
    return f"countdown {' '.join(map(str, numbers))} = {target}"


def puzzle(
    numbers: tuple[int, ...], target: int, witness: str, config: CountdownConfig
) -> CountdownTask:
    signs = " ".join(config.operators)
    given = " ".join(map(str, numbers))
    instruction = f"Make {target} from {given} with {signs}, each number once."
    name = name_of(numbers, target)
    return CountdownTask(name, instruction, config.attempts, numbers, target, witness)


class Countdown:
    """One puzzle at a time. A wrong attempt is answered with what it evaluates to.

    The answer names the target again but no verdict, so that it reads the same without an oracle.
    """

    Config = CountdownConfig
    spec: ClassVar[WorldSpec] = WorldSpec(isolation="inline", task=CountdownTask, tools=(TOOL,))

    def __init__(self, config: CountdownConfig, oracle: bool = True) -> None:
        self._config = config
        self._oracle = oracle
        self._task: CountdownTask | None = None
        self._left = 0
        self._seen = ""

    def tasks(self, split: str) -> Sequence[CountdownTask]:
        return Puzzles(split, self._config)

    async def reset(self, task: Task, seed: int) -> Observation:
        if not isinstance(task, CountdownTask):
            raise TypeError(f"countdown plays CountdownTask, got {type(task).__name__}")
        self._task, self._left, self._seen = task, task.max_steps, ""
        return Observation("")

    async def step(self, action: str) -> TimeStep:
        task = self._playing()
        self._left -= 1
        try:
            value = evaluate(action, task.numbers, self._config.operators)
            solved = value == task.target
            text = f"That makes {value}, wanted {task.target}. Try again."
        except Illegal as fault:
            solved, text = False, f"Not legal: {fault}. Try again."
        over = solved and self._oracle
        self._seen = "Solved." if over else text
        return TimeStep(
            Observation(self._seen),
            reward=float(solved),
            terminated=over,
            truncated=not over and self._left == 0,
            success=over,
        )

    async def close(self) -> None:
        self._task = None

    async def expert(self) -> str | None:
        task = self._playing()
        if len(task.numbers) > 4:  # the full table grows too fast
            return task.witness
        return solutions(task.numbers, self._config.operators)[task.target]

    async def random(self, seed: int) -> str:
        return guess(self._playing().numbers, self._config.operators, random.Random(seed)).text

    async def snapshot(self) -> str:
        return f"{self._left} {self._seen}"

    async def restore(self, task: Task, snapshot: str) -> Observation:
        await self.reset(task, 0)
        left, _, self._seen = snapshot.partition(" ")
        self._left = int(left)
        return Observation(self._seen)

    def answer(self, task: Task, action: str) -> str | None:
        """The value reached, which is what the task asks about."""
        if not isinstance(task, CountdownTask):
            raise TypeError(f"countdown plays CountdownTask, got {type(task).__name__}")
        try:
            return str(evaluate(action, task.numbers, self._config.operators))
        except Illegal:
            return None

    def named(self, id: str) -> CountdownTask:
        """Of at most four numbers, for it must be known to have a solution.

        Raises:
            ValueError: it is no puzzle of these settings, or not for training.
        """
        config = self._config
        if config.numbers > 4:
            raise ValueError("puzzles of more than 4 numbers are not known by name")
        found = re.fullmatch(r"countdown((?: [0-9]{1,6})+) = ([0-9]{1,6})", id)
        numbers = tuple(map(int, found[1].split())) if found else ()
        target = int(found[2]) if found else 0
        inside = all(1 <= number <= config.largest for number in numbers)
        sound = len(numbers) == config.numbers and list(numbers) == sorted(numbers) and inside
        # As it is written here, and not otherwise: the split follows from the name.
        if not sound or id != name_of(numbers, target):
            raise ValueError(
                f"{id!r} is no puzzle here; wanted 'countdown A B C = D' with {config.numbers} "
                f"ascending numbers from 1 to {config.largest}"
            )
        if split_of(id) != "train":
            raise ValueError(f"{id!r} is held out for {split_of(id)}")
        witness = solutions(numbers, config.operators).get(target)
        if witness is None or not 1 <= target <= config.target:
            raise ValueError(f"{id!r} has no solution, or a target above {config.target}")
        return puzzle(numbers, target, witness, config)

    def without_oracle(self) -> "Countdown":
        return Countdown(self._config, oracle=False)

    def _playing(self) -> CountdownTask:
        if self._task is None:
            raise RuntimeError("reset the world before acting in it")
        return self._task
