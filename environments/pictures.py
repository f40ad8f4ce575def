"""Small drawings and a question about each: a world for models that see.

Drawings are seeded and endless. A drawing's split follows from a hash of all that is in it, so that
no two splits can share one.
"""

import hashlib
import math
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ..core.config import Config
from ..core.files import canonical_json
from ..core.images import encoded
from ..core.splits import EndlessSplit, split_of
from ..core.types import Image, Observation, Task, TimeStep, Tool, WorldSpec

Question = Literal["colour", "count", "position", "digit", "click"]
Mark: TypeAlias = tuple[str, str, int, int, int]
"""A shape or a digit, its colour, its centre x and y, and half its width, in pixels."""

DRAWS = 2000
"""After so many vain draws there seems to be no such drawing."""
COLOURS = {
    "red": (205, 40, 45),
    "green": (35, 150, 60),
    "blue": (45, 80, 215),
    "yellow": (235, 195, 30),
}
SHAPES = ("circle", "square", "triangle")
PLACES = ("left", "right", "top", "bottom")
GREY = 128
SEGMENTS = {
    "0": "abcdef",
    "1": "bc",
    "2": "abged",
    "3": "abgcd",
    "4": "fgbc",
    "5": "afgcd",
    "6": "afgedc",
    "7": "abc",
    "8": "abcdefg",
    "9": "gfabcd",
}
"""A digit's bars on a seven-segment display: a on top, then clockwise, g in the middle."""
BARS = {
    "a": (-1.0, 1.0, -2.0, -1.6),
    "b": (0.6, 1.0, -2.0, 0.0),
    "c": (0.6, 1.0, 0.0, 2.0),
    "d": (-1.0, 1.0, 1.6, 2.0),
    "e": (-1.0, -0.6, 0.0, 2.0),
    "f": (-1.0, -0.6, -2.0, 0.0),
    "g": (-1.0, 1.0, -0.2, 0.2),
}
"""From x, to x, from y, to y, in half widths of the digit, whose height is twice its width."""
TOOLS = (
    Tool(
        "answer",
        "Answer a question about the picture.",
        canonical_json(
            {
                "type": "object",
                "properties": {"word": {"type": "string", "pattern": "^[a-z0-9]{1,8}$"}},
                "required": ["word"],
                "additionalProperties": False,
            }
        ),
        "{word}",
    ),
    Tool(
        "click",
        "Click into the picture.",
        canonical_json(
            {
                "type": "object",
                "properties": {
                    "x": {"type": "integer", "description": "pixels from the left"},
                    "y": {"type": "integer", "description": "pixels from the top"},
                },
                "required": ["x", "y"],
                "additionalProperties": False,
            }
        ),
        "click {x} {y}",
    ),
)
CLICK = re.compile(r"click (-?[0-9]{1,5}) (-?[0-9]{1,5})")


class PicturesConfig(Config):
    questions: tuple[Question, ...] = Field(
        default=("colour", "count", "position", "digit", "click"), min_length=1
    )
    """What is asked, in turn."""
    size: int = Field(default=32, ge=24, le=512)
    """Pixels of a side."""
    most: int = Field(default=4, ge=2, le=9)
    """The most shapes to count."""
    listed: bool = False
    """List the answers as actions, where they are words."""
    grey: bool = False
    """Show nothing but grey in place of every drawing: what can be known without looking."""
    attempts: int = Field(default=1, ge=1, le=16)
    """How many tries a task allows."""


@dataclass(frozen=True)
class PicturesTask(Task):
    question: str
    answer: str
    """The right one; of ``click`` the number of the mark that is meant."""
    marks: tuple[Mark, ...]
    shade: int
    """Of the ground, 0 to 255."""
    size: int


class Drawings(EndlessSplit[PicturesTask]):
    """A split: the i-th drawing follows from the split's name and i. Lazy and endless."""

    def __init__(self, split: str, config: PicturesConfig) -> None:
        super().__init__(split)
        self._config = config

    def drawn(self, index: int) -> PicturesTask:
        questions = self._config.questions
        question = questions[index % len(questions)]
        rng = random.Random(f"pictures/{self._split}/{question}/{index}")
        for _ in range(DRAWS):
            task = drawn(question, self._config, rng)
            if task is not None and split_of(task.id) == self._split:
                return task
        raise ValueError(
            f"pictures finds no drawing of {question} of {self._config.size} pixels with up to "
            f"{self._config.most} shapes; allow a larger size or fewer shapes"
        )


def drawn(question: Question, config: PicturesConfig, rng: random.Random) -> PicturesTask | None:
    """A drawing and what is asked about it; None if there was no room."""
    size, shade = config.size, rng.randint(215, 250)
    wanted, answer, words = "", "", ""
    kinds = [(rng.choice(SHAPES), rng.choice([*COLOURS]))]
    match question:
        case "colour":
            answer = kinds[0][1]
            words = f"What colour is the shape? {choice([*COLOURS])}"
        case "count":
            kinds = [(rng.choice(SHAPES), rng.choice([*COLOURS])) for _ in range(config.most)]
            kinds = kinds[: rng.randint(1, config.most)]
            answer = str(len(kinds))
            words = f"How many shapes are there? {choice(answers(question, config))}"
        case "position":
            answer = rng.choice(PLACES)
            wanted = answer
            words = f"Where is the shape? {choice(PLACES)}"
        case "digit":
            answer = str(rng.randint(0, 9))
            kinds = [(answer, rng.choice([*COLOURS]))]
            words = "Which digit is it?"
        case "click":
            every = [(shape, colour) for shape in SHAPES for colour in COLOURS]
            kinds = rng.sample(every, 2)
            answer = "0"
            words = (
                f"Click the {kinds[0][1]} {kinds[0][0]}: click X Y, in pixels from the top left."
            )
    marks: list[Mark] = []
    for kind, colour in kinds:
        mark = placed(kind, colour, size, wanted, marks, rng)
        if mark is None:
            return None
        marks.append(mark)
    described = canonical_json([shade, size, marks])
    name = f"pictures {question} {hashlib.sha256(described.encode()).hexdigest()[:16]}"
    return PicturesTask(name, words, config.attempts, question, answer, tuple(marks), shade, size)


def placed(
    kind: str, colour: str, size: int, place: str, others: Sequence[Mark], rng: random.Random
) -> Mark | None:
    """A mark at ``place``, or anywhere, that touches no other one; None if there was no room."""
    digit = kind in SEGMENTS
    least, most = (size // 8, size // 5) if digit else (size // 12 + 1, size // 7)
    for _ in range(50):
        half = rng.randint(least, max(least, most))
        tall = 2 * half if digit else half
        x, y = rng.randint(half, size - 1 - half), rng.randint(tall, size - 1 - tall)
        if place and place != where(x, y, size):
            continue
        apart = all(
            max(abs(x - ox), abs(y - oy)) > half + other + 1 for _, _, ox, oy, other in others
        )
        if apart:
            return (kind, colour, x, y, half)
    return None


def where(x: int, y: int, size: int) -> str:
    """The side that a point is clearly on; empty if on none."""
    dx, dy = x - size / 2, y - size / 2
    if max(abs(dx), abs(dy)) < size / 6 or min(abs(dx), abs(dy)) > max(abs(dx), abs(dy)) / 2:
        return ""
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "top" if dy < 0 else "bottom"


def choice(words: Sequence[str]) -> str:
    return f"Answer {', '.join(words[:-1])} or {words[-1]}."


def answers(question: str, config: PicturesConfig) -> list[str]:
    """The words that may be right; none where it is no word."""
    match question:
        case "colour":
            return [*COLOURS]
        case "count":
            return [str(k + 1) for k in range(config.most)]
        case "position":
            return [*PLACES]
        case "digit":
            return [*SEGMENTS]
        case _:
            return []


def covered(mark: Mark, size: int) -> NDArray[np.bool_]:
    """(size, size): the pixels that a mark is drawn on."""
    kind, _, x, y, half = mark
    ys, xs = np.mgrid[0:size, 0:size] - np.array([y, x])[:, None, None]
    if kind == "circle":
        return xs**2 + ys**2 <= half**2
    if kind == "square":
        return np.maximum(abs(xs), abs(ys)) <= half
    if kind == "triangle":
        return (abs(ys) <= half) & (2 * abs(xs) <= ys + half)
    on = np.zeros((size, size), np.bool_)
    for bar in SEGMENTS[kind]:
        left, right, top, bottom = (edge * half for edge in BARS[bar])
        on |= (xs >= left) & (xs <= right) & (ys >= top) & (ys <= bottom)
    return on


def painted(task: PicturesTask) -> Image:
    pixels = np.full((task.size, task.size, 3), task.shade, np.uint8)
    for mark in task.marks:
        pixels[covered(mark, task.size)] = COLOURS[mark[1]]
    return encoded(pixels)


class Pictures:
    """One drawing and one question at a time."""

    Config = PicturesConfig
    spec: ClassVar[WorldSpec] = WorldSpec(isolation="inline", task=PicturesTask, tools=TOOLS)

    def __init__(self, config: PicturesConfig, oracle: bool = True) -> None:
        """``oracle``: whether it says that an answer was right, and ends then."""
        self._config = config
        self._oracle = oracle
        self._task: PicturesTask | None = None
        self._left = 0

    def tasks(self, split: str) -> Sequence[PicturesTask]:
        return Drawings(split, self._config)

    async def reset(self, task: Task, seed: int) -> Observation:
        if not isinstance(task, PicturesTask):
            raise TypeError(f"pictures plays PicturesTask, got {type(task).__name__}")
        self._task, self._left = task, task.max_steps
        blank = np.full((task.size, task.size, 3), GREY, np.uint8)
        shown = encoded(blank) if self._config.grey else painted(task)
        return Observation("", (shown,), self._listed(task))

    async def step(self, action: str) -> TimeStep:
        task = self._playing()
        self._left -= 1
        right = is_right(task, action)
        over = right and self._oracle
        words = "Right." if over else "That is not so." if self._oracle else "Look once more."
        return TimeStep(
            Observation(words, (), self._listed(task)),
            reward=float(right),
            terminated=over,
            truncated=not over and self._left == 0,
            success=over,
        )

    async def close(self) -> None:
        self._task = None

    async def expert(self) -> str | None:
        task = self._playing()
        if task.question != "click":
            return task.answer
        _, _, x, y, _ = task.marks[int(task.answer)]
        return f"click {x} {y}"

    async def random(self, seed: int) -> str:
        task, rng = self._playing(), random.Random(seed)
        words = answers(task.question, self._config)
        if words:
            return rng.choice(words)
        return f"click {rng.randrange(task.size)} {rng.randrange(task.size)}"

    def answer(self, task: Task, action: str) -> str | None:
        """The word that is answered, or the place that is clicked."""
        if not isinstance(task, PicturesTask):
            raise TypeError(f"pictures plays PicturesTask, got {type(task).__name__}")
        words = action.strip().lower()
        if task.question == "click":
            found = CLICK.fullmatch(words)
            return f"{int(found[1])} {int(found[2])}" if found else None
        return words if words in answers(task.question, self._config) else None

    def without_oracle(self) -> "Pictures":
        return Pictures(self._config, oracle=False)

    def _listed(self, task: PicturesTask) -> tuple[str, ...]:
        return tuple(answers(task.question, self._config)) if self._config.listed else ()

    def _playing(self) -> PicturesTask:
        if self._task is None:
            raise RuntimeError("reset the world before acting in it")
        return self._task


def is_right(task: PicturesTask, action: str) -> bool:
    words = action.strip().lower()
    if task.question != "click":
        return words == task.answer
    found = CLICK.fullmatch(words)
    if found is None:
        return False
    kind, _, x, y, half = task.marks[int(task.answer)]
    at = int(found[1]) - x, int(found[2]) - y
    if kind == "circle":
        return math.hypot(*at) <= half
    return max(map(abs, at)) <= half
