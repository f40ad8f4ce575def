"""What goes over the wire, as our types have it. ``docs/wire.md`` has the protocol."""

import traceback as tracebacks
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import replace
from typing import Any, TypeAlias

from ..checked import UnreadableTask, checked_observation, checked_time_step, readable
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


def task_from(sent: Sequence[Any]) -> Task:
    name, instruction, max_steps, data, fault = sent
    if fault:
        return UnreadableTask(name, instruction, max_steps, fault)
    if data == "{}":
        return Task(name, instruction, max_steps)
    return StoredTask(name, instruction, max_steps, data)


def observation_from(header: dict[str, Any], blobs: Sequence[bytes], world: str) -> Observation:
    """Its pictures' bytes go to this process's store.

    Raises:
        WorldError: a picture is no PNG file.
    """
    try:
        images = tuple(STORE.keep(picture(png)) for png in blobs)
    except ValueError as error:
        raise WorldError(f"{world}: Observation.images: {error}") from None
    return Observation(header["text"], images, tuple(header["actions"]), header["actor"])


def time_step_from(header: dict[str, Any], blobs: Sequence[bytes], world: str) -> TimeStep:
    seen = observation_from(header["observation"], blobs, world)
    flags = (header[name] for name in ("terminated", "truncated", "success", "answer"))
    return TimeStep(seen, header["reward"], *flags)


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
