"""What worlds, policies and judges give, looked at where it comes in, before anyone relies on it.

Text counts as text only if it is Unicode: half of a surrogate pair, as JSON of other programs may
hold it, can be neither stored nor tokenised.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

from .errors import PolicyError, WorldError
from .images import picture
from .types import Completion, Image, Observation, Task, TimeStep, Verdict
from .unicode import no_unicode

T = TypeVar("T")

MOST_STEPS = 2**31 - 1
"""What a task's ``max_steps`` may be at most, for it is stored in 32 bits."""


@dataclass(frozen=True)
class UnreadableTask(Task):
    """Stands for a task whose id or instruction is no Unicode; its episodes fail."""

    fault: str
    """What is wrong with it."""


def checked_task(value: object, where: str) -> Task:
    """``value``, if it is a task; an ``UnreadableTask`` if all that is wrong is no Unicode.

    Raises:
        WorldError: it is not; the message says what came and what is right.
    """
    if not isinstance(value, Task):
        raise WorldError(f"{where} is {shown(value)}; wanted a Task")
    faults: list[str] = []
    for field in ("id", "instruction"):
        text = getattr(value, field)
        if not isinstance(text, str) or not text:
            raise WorldError(f"{where}.{field} is {_short(text)}; wanted a text")
        if fault := no_unicode(text):
            faults.append(f"{where}.{field} is no Unicode: {fault}")
    steps = _loose(value.max_steps)
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= MOST_STEPS:
        raise WorldError(
            f"{where}.max_steps is {_short(steps)}; wanted an int of at least 1, below 2**31"
        )
    if faults:
        arguments = (mended(value.id), mended(value.instruction), steps)
        return UnreadableTask(*arguments, fault="; ".join(faults))
    return value


def readable(task: Task) -> Task:
    """Raises: WorldError: the task cannot be played."""
    if isinstance(task, UnreadableTask):
        raise WorldError(task.fault)
    return task


def alike(one: Task, other: Task) -> bool:
    """Whether two tasks of one id are the same, as far as everyone can see.

    What else a world keeps in them may be equal and not compare so.
    """
    return (one.instruction, one.max_steps) == (other.instruction, other.max_steps)


def same(one: Task, other: Task) -> Task:
    """``one``. Raises: WorldError: the other is another task with the same id."""
    if not alike(one, other):
        both = " and ".join(f"{t.instruction!r:.200} ({t.max_steps} steps)" for t in (one, other))
        raise WorldError(f"two tasks are called {one.id!r}: {both}; an id stands for one task")
    return one


def checked_observation(value: object, world: str) -> Observation:
    """``value``, if it is what ``reset`` should give.

    Raises:
        WorldError: it is not; the message says what came and what is right.
    """
    if not isinstance(value, Observation):
        raise WorldError(f"{world} gave {shown(value)}; wanted an Observation")
    text, images, actions = _loose(value.text), _loose(value.images), _loose(value.actions)
    _check_text(text, f"{world}: Observation.text", "a str")
    if not _all(images, _pictured):
        raise WorldError(
            f"{world}: Observation.images is {shown(images)}; wanted a tuple of pictures, as "
            "core.images.picture makes them of PNG files"
        )
    if not _all(actions, lambda action: isinstance(action, str)):
        raise WorldError(f"{world}: Observation.actions is {shown(actions)}; wanted a tuple of str")
    for place, action in enumerate(value.actions):
        _check_text(action, f"{world}: Observation.actions[{place}]", "a str")
    _check_text(value.actor, f"{world}: Observation.actor", "a str")
    return value


def checked_time_step(value: object, world: str) -> TimeStep:
    """``value``, if it is what ``step`` should give; its reward made a float.

    Raises:
        WorldError: it is not; the message says what came and what is right.
    """
    if not isinstance(value, TimeStep):
        raise WorldError(f"{world} gave {shown(value)}; wanted a TimeStep")
    checked_observation(value.observation, world)
    reward = _loose(value.reward)
    if isinstance(reward, bool) or not isinstance(reward, int | float) or not math.isfinite(reward):
        raise WorldError(f"{world}: TimeStep.reward is {shown(reward)}; wanted a finite float")
    for field in ("terminated", "truncated", "success"):
        flag = getattr(value, field)
        if not isinstance(flag, bool):
            raise WorldError(f"{world}: TimeStep.{field} is {shown(flag)}; wanted a bool")
    if value.success and not value.terminated:
        raise WorldError(f"{world}: TimeStep.success without terminated; success ends an episode")
    return replace(value, reward=float(reward))


def checked_action(value: object, world: str, method: str) -> str:
    """``value``, if it is an action. Raises: WorldError: it is not."""
    return _check_text(value, f"{world}.{method}()", "an action, a str")


def checked_expert(value: object, world: str) -> str | None:
    return None if value is None else checked_action(value, world, "expert")


def checked_answer(value: object, world: str) -> str | None:
    """``value``, if it is what ``answer`` should give. Raises: WorldError: it is not."""
    return None if value is None else _check_text(value, f"{world}.answer()", "a str or None")


def checked_completion(completion: Completion, policy: str) -> Completion:
    """``completion``, if what it says is text and its log-probabilities are numbers.

    Raises:
        PolicyError: it is not; the message says where.
    """
    if fault := no_text(completion.text):
        raise PolicyError(f"{policy}: its completion is {fault}; wanted a str")
    if any(map(math.isnan, completion.logprobs)):
        raise PolicyError(f"{policy}: a log-probability is NaN")
    return completion


def checked_verdicts(verdicts: Sequence[Verdict], wanted: int) -> list[Verdict]:
    """The verdicts, if they are what a judge should give. Raises: ValueError: they are not."""
    if len(verdicts) != wanted:
        raise ValueError(f"{len(verdicts)} verdicts for {wanted} trajectories")
    for verdict in verdicts:
        if verdict.score is not None and not 0 <= verdict.score <= 1:
            raise ValueError(
                f"a score of {verdict.score}; wanted one in [0, 1], or None if undecided"
            )
        for field in ("feedback", "judge"):
            if fault := no_text(getattr(verdict, field)):
                raise ValueError(f"Verdict.{field} is {fault}; wanted a str")
    return list(verdicts)


def all_unicode(value: T) -> T:
    """``value``, if every text within its lists and mappings is Unicode.

    Raises:
        ValueError: one is not.
    """
    inside: Any = value
    if isinstance(inside, str) and (fault := no_unicode(inside)):
        raise ValueError(f"no Unicode: {fault}")
    if isinstance(inside, Mapping):
        inside = list(cast("Mapping[Any, Any]", inside).items())
    if isinstance(inside, list | tuple):
        for one in cast("Sequence[Any]", inside):
            all_unicode(one)
    return value


def no_text(value: object) -> str:
    """What ``value`` is if it is no text; empty if it is some."""
    if not isinstance(value, str):
        return shown(value)
    fault = no_unicode(value)
    return fault and f"no Unicode: {fault}"


def mended(text: str) -> str:
    """``text`` with an escape, as Python writes it, for what is no Unicode: for error messages."""
    return text.encode(errors="backslashreplace").decode()


def shown(value: object) -> str:
    return f"{type(value).__name__} {_short(value)}"


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def _check_text(value: object, where: str, wanted: str) -> str:
    if fault := no_text(value):
        raise WorldError(f"{where} is {fault}; wanted {wanted}")
    return cast(str, value)


def _loose(value: object) -> object:
    """Forget what the type should be: that is what is being checked."""
    return value


def _pictured(image: object) -> bool:
    """Whether it is a picture, with its bytes, and all that is said of it is true of them."""
    try:
        return isinstance(image, Image) and picture(image.png) == image
    except ValueError:
        return False


def _all(values: object, right: Callable[[object], bool]) -> bool:
    return isinstance(values, tuple) and all(map(right, cast(tuple[object, ...], values)))
