"""What goes over the wire, as our types have it. ``docs/wire.md`` has the protocol."""

import traceback as tracebacks
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias, cast

from ..checked import (
    UnreadableTask,
    checked_observation,
    checked_time_step,
    mended,
    readable,
    shown,
)
from ..errors import WorldError
from ..images import STORE, picture
from ..tasks import StoredTask, task_data
from ..types import Observation, Task, TimeStep
from . import far_end

Reply: TypeAlias = tuple[Any, list[bytes]]
"""The value of an answer, and its blobs."""


def task_to(task: Task) -> list[Any]:
    """A task for another process. Raises: WorldError: it cannot be played."""
    task = readable(task)
    return [task.id, task.instruction, task.max_steps, task_data(task)]


def task_from(sent: Any) -> Task:
    """Raises: WorldError: it is none."""
    try:
        name, instruction, max_steps, data, fault = sent
        far_end.text_of(data, f"tasks {name!r}")
    except (TypeError, ValueError) as error:
        raise WorldError(f"a task that was sent is {shown(sent)}: {error}") from None
    if fault:
        return UnreadableTask(name, instruction, max_steps, fault)
    if data == "{}":
        return Task(name, instruction, max_steps)
    return StoredTask(name, instruction, max_steps, data)


def observation_from(header: Any, blobs: Sequence[bytes], world: str) -> Observation:
    """Its pictures' bytes go to this process's store. The far end may be anybody's.

    Raises:
        WorldError: it is none, or a picture is no PNG file.
    """
    bare: Any = header
    if isinstance(header, dict):
        bare = cast("dict[str, Any]", header) | {"images": ()}
    seen, _ = _read(far_end.observation, bare, world)
    return _pictured(seen, blobs, world)


def _pictured(seen: dict[str, Any], blobs: Sequence[bytes], world: str) -> Observation:
    """An observation that was looked at, with its pictures."""
    try:
        images = tuple(STORE.keep(picture(png)) for png in blobs)
    except ValueError as error:
        raise WorldError(f"{world}: Observation.images: {error}") from None
    return Observation(seen["text"], images, tuple(seen["actions"]), seen["actor"])


def time_step_from(header: Any, blobs: Sequence[bytes], world: str) -> TimeStep:
    """As ``observation_from``, of a step."""
    given = far_end.fields(header).get("observation")
    bare: Any = header
    if isinstance(given, dict):
        inner = cast("dict[str, Any]", given) | {"images": ()}
        bare = {**header, "observation": inner}
    step, _ = _read(far_end.time_step, bare, world)
    seen = _pictured(step["observation"], blobs, world)
    flags = (step[name] for name in ("terminated", "truncated", "success", "answer"))
    return TimeStep(seen, step["reward"], *flags)


def read_observation(value: object, world: str) -> Observation:
    """What a world in this process gave, in any form that worlds may give it.

    Raises:
        WorldError: it is none; the message says what came and what is right.
    """
    if not isinstance(value, Observation):
        return observation_from(*_read(far_end.observation, value, world), world)
    seen = checked_observation(value, world)
    return replace(seen, images=tuple(map(STORE.keep, seen.images))) if seen.images else seen


def read_time_step(value: object, world: str) -> TimeStep:
    """As ``read_observation``, of a step."""
    if not isinstance(value, TimeStep):
        return time_step_from(*_read(far_end.time_step, value, world), world)
    step = checked_time_step(value, world)
    if not step.observation.images:
        return step
    return replace(step, observation=read_observation(step.observation, world))


def _read(function: Callable[[Any, str], Reply], value: object, world: str) -> Reply:
    try:
        return function(value, world)
    except far_end.WorldError as error:
        raise WorldError(str(error)) from None


def error_to(error: BaseException) -> dict[str, str]:
    """An error, for ``error_from`` in another process."""
    return {
        "kind": type(error).__name__,
        "text": str(error),
        "traceback": "".join(tracebacks.format_exception(error)),
    }


def error_from(kind: str, text: str, traceback: str = "") -> WorldError:
    """An error of another process, under its own name."""
    text, traceback = mended(text), mended(traceback)
    if kind == WorldError.__name__:
        return WorldError(text)
    error = type(kind, (WorldError,), {})(text)
    error.add_note(traceback)
    return error


async def answered(value: Awaitable[Reply]) -> dict[str, Any]:
    """An answer as a plain value: classes of errors may be known on one side only."""
    try:
        result, blobs = await value
    except Exception as error:
        return {"error": error_to(error)}
    return {"value": result, "blobs": blobs}
