"""Tasks with the typed fields of their world, as text and back."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from functools import lru_cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from .errors import WorldError
from .files import canonical_json
from .types import Task

T = TypeVar("T", bound=Task)
_OWN = frozenset(field.name for field in fields(Task))


@dataclass(frozen=True)
class StoredTask(Task):
    """One whose world is not at hand; ``task_of`` makes the world's own of it."""

    data: str
    """What ``task_data`` wrote."""


def task_data(task: Task) -> str:
    """The fields that ``task`` has beyond those of every task, as canonical JSON.

    Raises:
        WorldError: one would not come back as it is; the message has its path.
    """
    if isinstance(task, StoredTask):
        return task.data
    values = {
        field.name: getattr(task, field.name) for field in fields(task) if field.name not in _OWN
    }
    if not values:
        return "{}"
    where = f"tasks {task.id!r}"
    payload = {name: _plain(value, f"{where}.{name}") for name, value in values.items()}
    instance = _instance(type(task), task.id, task.instruction, task.max_steps, payload)
    for name, value in values.items():
        if (back := getattr(instance, name)) != value:
            raise WorldError(
                f"{where}.{name}: {value!r} comes back from JSON as {back!r}; "
                "its type as declared does not say what it is"
            )
    return canonical_json(payload)


def task_of(cls: type[T], id: str, instruction: str, max_steps: int, data: str) -> T:
    """The task of which ``task_data`` gave ``data``.

    Raises:
        WorldError: ``cls`` has other fields; the message has the path.
    """
    where = f"tasks {id!r}"
    payload = _read(where, data)
    instance = _instance(cls, id, instruction, max_steps, payload)
    if lost := _lost(payload, _plain(instance, where), where):
        raise WorldError(f"{lost} is nothing that {cls.__name__} has")
    return instance


def own_task(cls: type[Task], task: Task) -> Task:
    """``task`` as its world made it, whose tasks are of ``cls``. Raises: as ``task_of``."""
    if not isinstance(task, StoredTask):
        return task
    return task_of(cls, task.id, task.instruction, task.max_steps, task.data)


def _instance(
    cls: type[T], id: str, instruction: str, max_steps: int, payload: dict[str, Any]
) -> T:
    where = f"tasks {id!r}"
    if strange := payload.keys() - ({field.name for field in fields(cls)} - _OWN):
        raise WorldError(
            f"{where}.{min(strange)}: {cls.__name__} has no such field of its own; "
            "a world's spec names the class of its tasks: WorldSpec(task=...)"
        )
    whole = payload | {"id": id, "instruction": instruction, "max_steps": max_steps}
    try:
        return cast("T", _adapter(cls).validate_json(json.dumps(whole), strict=True))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        path = ".".join(map(str, first["loc"]))
        raise WorldError(f"{where}.{path}: {first['msg']}, got {first['input']!r}") from None


def _lost(payload: Any, kept: Any, path: str) -> str:
    """Which of the keys in ``payload`` is not in ``kept``; empty if all are."""
    if isinstance(payload, dict) and isinstance(kept, dict):
        pairs, have = cast("dict[str, Any]", payload), cast("dict[str, Any]", kept)
        found = (
            _lost(value, have[key], f"{path}.{key}") if key in have else f"{path}.{key}"
            for key, value in pairs.items()
        )
    elif isinstance(payload, list) and isinstance(kept, list):
        both = zip(cast("list[Any]", payload), cast("list[Any]", kept), strict=False)
        found = (_lost(one, other, f"{path}[{k}]") for k, (one, other) in enumerate(both))
    else:
        return ""
    return next(filter(None, found), "")


def stored_task(id: str, instruction: str, max_steps: int, data: str) -> Task:
    """The same for whoever has not the world's class.

    Raises:
        WorldError: ``data`` is not what ``task_data`` writes.
    """
    if data == "{}":
        return Task(id, instruction, max_steps)
    _read(f"tasks {id!r}", data)
    return StoredTask(id, instruction, max_steps, data)


def _read(where: str, data: str) -> dict[str, Any]:
    try:
        payload: Any = json.loads(data)
    except ValueError as error:
        raise WorldError(f"{where}: its fields are no JSON ({error})") from None
    if not isinstance(payload, dict):
        raise WorldError(f"{where}: its fields are {data[:80]}, wanted a JSON object")
    return cast("dict[str, Any]", payload)


@lru_cache(maxsize=64)
def _adapter(cls: type[Any]) -> TypeAdapter[Any]:
    try:
        return TypeAdapter(cls)
    except (PydanticUserError, NameError) as error:
        text = str(error).splitlines()[0]
        raise WorldError(f"the fields of {cls.__name__} cannot be stored: {text}") from error


def _plain(value: Any, path: str) -> Any:
    """``value`` as JSON has it. Raises: WorldError: it has no word for it; says where."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum) and isinstance(value, str | int):
        return _plain(value.value, path)
    if type(value) is str and not _unicode(value):
        raise WorldError(f"{path}: {value!r} is not Unicode")
    if type(value) is float and not math.isfinite(value):
        raise WorldError(f"{path}: {value}, wanted a finite number")
    if type(value) in (str, int, float):
        return value
    if isinstance(value, tuple | list):
        items = cast("list[Any]", value)
        return [_plain(item, f"{path}[{k}]") for k, item in enumerate(items)]
    if isinstance(value, Mapping):
        pairs = cast("Mapping[Any, Any]", value)
        for key in pairs:
            if type(key) is not str or not _unicode(key):
                raise WorldError(f"{path}: the key {key!r}, wanted text")
        return {key: _plain(item, f"{path}.{key}") for key, item in pairs.items()}
    if is_dataclass(value) and not isinstance(value, type):
        names = [field.name for field in fields(value)]
        return {name: _plain(getattr(value, name), f"{path}.{name}") for name in names}
    kind: type[Any] = type(cast("object", value))
    name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
    raise WorldError(
        f"{path}: {name}, which JSON cannot hold; wanted text, numbers, truth values, None, "
        "or tuples, lists, mappings and dataclasses of them"
    )


def _unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
