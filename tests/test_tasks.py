"""Tasks with fields of their own, as text and back."""

import json
from dataclasses import dataclass, field
from datetime import datetime
from enum import Enum, StrEnum
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfwright.core.errors import WorldError
from selfwright.core.tasks import StoredTask, stored_task, task_data, task_of
from selfwright.core.types import Task


class Mode(StrEnum):
    EASY = "easy"
    HARD = "hard"


class Colour(Enum):
    RED = "red"


@dataclass(frozen=True)
class Place:
    name: str
    at: tuple[float, float]


@dataclass(frozen=True)
class Rich(Task):
    numbers: tuple[int, ...]
    places: tuple[Place, ...] = ()
    mode: Mode = Mode.EASY
    side: Literal["left", "right"] = "left"
    limits: dict[str, int] = field(default_factory=dict[str, int])
    hint: str | None = None
    deep: tuple[tuple[str, int], ...] = ()


@dataclass(frozen=True)
class Loose(Task):
    start: Any


finite = st.floats(allow_nan=False, allow_infinity=False)
rich = st.builds(
    Rich,
    st.text(max_size=5),
    st.text(max_size=5),
    st.integers(1, 9),
    st.lists(st.integers(), max_size=3).map(tuple),
    st.lists(st.builds(Place, st.text(max_size=5), st.tuples(finite, finite)), max_size=2).map(
        tuple
    ),
    st.sampled_from(Mode),
    st.sampled_from(["left", "right"]),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
    st.none() | st.text(max_size=5),
    st.lists(st.tuples(st.text(max_size=3), st.integers()), max_size=2).map(tuple),
)


@given(rich)
@settings(deadline=None)
def test_a_task_comes_back_as_it_was(task: Rich) -> None:
    data = task_data(task)
    assert task_of(Rich, task.id, task.instruction, task.max_steps, data) == task
    canonical = json.dumps(
        json.loads(data), sort_keys=True, separators=(",", ":"), ensure_ascii=False
    )
    assert data == canonical
    kept = stored_task(task.id, task.instruction, task.max_steps, data)
    assert kept == StoredTask(task.id, task.instruction, task.max_steps, data)
    assert task_data(kept) == data


def test_a_plain_task_has_no_data() -> None:
    task = Task("t", "go", 3)
    assert task_data(task) == "{}"
    assert stored_task("t", "go", 3, "{}") == task
    assert task_of(Task, "t", "go", 3, "{}") == task


@pytest.mark.parametrize(
    ("start", "words"),
    [
        ({"when": datetime(2020, 1, 1)}, r"tasks 'x'\.start\.when: datetime\.datetime"),
        ([1, {2}], r"tasks 'x'\.start\[1\]: set"),
        (np.float64(1), r"tasks 'x'\.start: numpy\.float64"),
        (Place("a", (float("nan"), 0.0)), r"tasks 'x'\.start\.at\[0\]: nan"),
        ({1: 2}, r"tasks 'x'\.start: the key 1, wanted text"),
        ("\ud83d", r"tasks 'x'\.start: .* is not Unicode"),
        (b"raw", r"tasks 'x'\.start: bytes"),
        (Colour.RED, r"tasks 'x'\.start: .*Colour"),
        ((1, 2), r"tasks 'x'\.start: \(1, 2\) comes back from JSON as \[1, 2\]"),
        (Place("a", (0.0, 0.0)), r"tasks 'x'\.start: Place.* comes back from JSON as \{"),
    ],
)
def test_a_field_that_json_cannot_hold_is_named(start: Any, words: str) -> None:
    with pytest.raises(WorldError, match=words):
        task_data(Loose("x", "go", 3, start))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        ('{"numbers":[1,"2"]}', r"tasks 'x'\.numbers\.1: .*integer.*'2'"),
        ("{}", r"tasks 'x'\.numbers: .*required"),
        ('{"numbers":[],"colour":1}', r"tasks 'x'\.colour: Rich has no such field"),
        ('{"numbers":[],"id":"y"}', r"tasks 'x'\.id: Rich has no such field of its own"),
        (
            '{"numbers":[],"places":[{"name":"a","at":[0,0],"floor":3}]}',
            r"tasks 'x'\.places\[0\]\.floor is nothing that Rich has",
        ),
        ("[1]", "wanted a JSON object"),
        ("{", "no JSON"),
    ],
)
def test_data_of_another_class_is_refused(data: str, words: str) -> None:
    with pytest.raises(WorldError, match=words):
        task_of(Rich, "x", "go", 3, data)


def test_a_class_that_cannot_be_told_is_named() -> None:
    class Opaque:
        pass

    @dataclass(frozen=True)
    class Strange(Task):
        thing: Opaque | None = None

    with pytest.raises(WorldError, match="fields of Strange cannot be stored"):
        task_data(Strange("x", "go", 3))
