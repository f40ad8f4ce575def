"""Drawings: what is asked can be seen, splits share none, and answers are scored right."""

import asyncio
import io
from collections import Counter
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image as Pillow
from scipy import ndimage  # pyright: ignore[reportMissingTypeStubs]

from selfwright.core.images import STORE
from selfwright.core.types import Image, Observation, Task
from selfwright.environments.pictures import (
    COLOURS,
    Drawings,
    Pictures,
    PicturesConfig,
    PicturesTask,
    Question,
    is_right,
)

QUESTIONS: tuple[Question, ...] = get_args(Question)
SPLITS = ("train", "validation", "test")


def config(*questions: Question, **keys: Any) -> PicturesConfig:
    return PicturesConfig(questions=questions or QUESTIONS, **keys)


def seen(world: Pictures, task: Task) -> Observation:
    return asyncio.run(world.reset(task, 0))


def pixels(image: Image) -> NDArray[np.int64]:
    with Pillow.open(io.BytesIO(STORE.read(image))) as opened:
        return np.asarray(opened.convert("RGB")).astype(np.int64)


def inked(image: Image) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """The pixels, and which of them are no ground."""
    shown = pixels(image)
    return shown, np.ptp(shown, axis=2) > 0


def parts_of(ink: NDArray[np.bool_]) -> tuple[NDArray[np.int64], int]:
    """Which part each pixel belongs to, from 1 on, and how many there are."""
    images: Any = ndimage
    return images.label(ink, np.ones((3, 3)))


def looked(task: PicturesTask, image: Image) -> str:
    """The answer, by looking at nothing but the picture."""
    shown, ink = inked(image)
    ys, xs = np.nonzero(ink)
    x, y = (xs.min() + xs.max()) / 2, (ys.min() + ys.max()) / 2
    match task.question:
        case "colour":
            (colour,) = {tuple(one) for one in shown[ink]}
            return next(name for name, rgb in COLOURS.items() if rgb == colour)
        case "count":
            # Triangles have corners that touch nothing but by their own corners.
            return str(parts_of(ink)[1])
        case "position":
            middle = task.size / 2
            if abs(x - middle) > abs(y - middle):
                return "left" if x < middle else "right"
            return "top" if y < middle else "bottom"
        case "click":
            _, colour, shape = task.instruction.split(":")[0].rsplit(" ", 2)
            mine = (shown == COLOURS[colour]).all(axis=2)
            parts, count = parts_of(mine)
            assert count in (1, 2), "one of that colour, or two of different shapes"
            for k in range(1, count + 1):
                ys, xs = np.nonzero(parts == k)
                full = len(xs) == (np.ptp(xs) + 1) * (np.ptp(ys) + 1)
                widens = (ys == ys.max()).sum() > 2 * (ys == ys.min()).sum()
                if shape == ("square" if full else "triangle" if widens else "circle"):
                    return f"click {round(xs.mean())} {round(ys.mean())}"
            raise AssertionError(f"there is no {colour} {shape}")
        case _:
            # The middles of the seven bars, of which each digit has others.
            wide, high = (xs.max() - xs.min()) or 1, ys.max() - ys.min()
            if wide * 4 < high:
                return "1"
            left, right, top = xs.min(), xs.max(), ys.min()
            spots = {
                "a": (x, top),
                "b": (right, top + high / 4),
                "c": (right, top + 3 * high / 4),
                "d": (x, ys.max()),
                "e": (left, top + 3 * high / 4),
                "f": (left, top + high / 4),
                "g": (x, y),
            }
            lit = "".join(bar for bar, (a, b) in spots.items() if ink[round(b), round(a)])
            return LIT[lit]


LIT = {
    "abcdef": "0",
    "abdeg": "2",
    "abcdg": "3",
    "bcfg": "4",
    "acdfg": "5",
    "acdefg": "6",
    "abc": "7",
    "abcdefg": "8",
    "abcdfg": "9",
}


@settings(deadline=None, max_examples=120)
@given(
    st.sampled_from(QUESTIONS),
    st.sampled_from(SPLITS),
    st.integers(0, 1 << 30),
    st.sampled_from([24, 32, 48, 77, 200]),
)
def test_what_is_asked_can_be_seen(question: Question, split: str, index: int, size: int) -> None:
    settings_ = config(question, size=size, most=3)
    task = Drawings(split, settings_)[index]
    image = seen(Pictures(settings_), task).images[0]
    assert (image.width, image.height) == (size, size)
    answer = looked(task, image)
    assert is_right(task, answer), (task, answer)


def test_splits_share_no_drawing_and_drawings_come_again() -> None:
    names: dict[str, set[str]] = {}
    for split in SPLITS:
        tasks = Drawings(split, config(size=24))[:300]
        assert tasks == Drawings(split, config(size=24))[:300]
        names[split] = {task.id for task in tasks}
        assert len(names[split]) > 290
    assert not names["train"] & names["test"] and not names["train"] & names["validation"]
    assert not names["test"] & names["validation"]
    with pytest.raises(ValueError, match="no split 'dev'"):
        Drawings("dev", config())


def test_no_answer_is_much_more_usual_than_another() -> None:
    sizes: dict[Question, int] = {"colour": 4, "count": 4, "position": 4, "digit": 10}
    for question, kinds in sizes.items():
        counts = Counter(task.answer for task in Drawings("test", config(question))[:1000])
        assert len(counts) == kinds and max(counts.values()) < 1.25 * 1000 / kinds


def test_grey_tells_nothing() -> None:
    world = Pictures(config(grey=True))
    shown = {seen(world, task).images[0].sha256 for task in Drawings("test", config())[:40]}
    assert len(shown) == 1
    world = Pictures(config())
    assert len({seen(world, task).images[0] for task in Drawings("test", config())[:40]}) == 40


def test_tries_and_lists() -> None:
    async def played() -> None:
        world = Pictures(config("colour", attempts=2, listed=True))
        task = Drawings("train", config("colour", attempts=2))[0]
        first = await world.reset(task, 0)
        assert first.actions == tuple(COLOURS)
        wrong = next(word for word in COLOURS if word != task.answer)
        once = await world.step(wrong)
        assert (once.reward, once.terminated, once.truncated) == (0.0, False, False)
        assert once.observation.images == () and once.observation.actions == tuple(COLOURS)
        last = await world.step(f" {task.answer.upper()} ")
        assert last.success and last.terminated and last.reward == 1.0
        await world.reset(task, 0)
        await world.step(wrong)
        assert (await world.step(wrong)).truncated
        await world.close()

    asyncio.run(played())


def test_a_click_counts_where_the_shape_is() -> None:
    marks = (("circle", "red", 10, 12, 4), ("square", "blue", 24, 24, 3))
    task = PicturesTask("t", "Click", 1, "click", "0", marks, 230, 32)
    for x, y, right in ((10, 12, True), (14, 12, True), (13, 15, False), (24, 24, False)):
        assert is_right(task, f"click {x} {y}") is right
    for said in ("click 10", "click 10 12 3", "10 12", "click ten twelve", "red"):
        assert not is_right(task, said)


def test_without_an_oracle_nothing_seen_depends_on_being_right() -> None:
    blind = Pictures(config("colour", attempts=3)).without_oracle()
    task = blind.tasks("train")[0]
    wrong = next(colour for colour in COLOURS if colour != task.answer)

    async def play() -> None:
        await blind.reset(task, 0)
        steps = [await blind.step(word) for word in (task.answer, wrong, task.answer)]
        assert [step.reward for step in steps] == [1.0, 0.0, 1.0]
        assert len({step.observation for step in steps}) == 1
        assert [(step.terminated, step.truncated) for step in steps] == [
            (False, False),
            (False, False),
            (False, True),
        ]

    asyncio.run(play())


@pytest.mark.parametrize(
    ("question", "action", "answer"),
    [
        ("colour", " Red ", "red"),
        ("colour", "left", None),
        ("count", "4", "4"),
        ("count", "5", None),
        ("digit", "0", "0"),
        ("click", "click 07 9", "7 9"),
        ("click", "7 9", None),
    ],
)
def test_an_answer_is_a_word_or_a_place(
    question: Question, action: str, answer: str | None
) -> None:
    world = Pictures(config(question))
    assert world.answer(world.tasks("train")[0], action) == answer
