"""What a world's class says of itself, and what its instances can do: looked up here, once."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, get_type_hints

from pydantic import TypeAdapter, ValidationError

from ..checked import shown
from ..errors import WorldError
from ..files import canonical_json
from ..types import Tool, WorldSpec
from .far_end import ABILITIES

_FIELDS: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(kind) for name, kind in get_type_hints(WorldSpec).items()
}
_AWAY = frozenset(field.name for field in fields(WorldSpec)) - {"isolation", "task"}
"""What a world that is not here can say of itself."""


def abilities_of(plugin: Any) -> frozenset[str]:
    """Which of the optional methods a world's class has: ``far_end.ABILITIES``."""
    return frozenset(name for name in ABILITIES if callable(getattr(plugin, name, None)))


def has_attempts(abilities: Iterable[str]) -> bool:
    """Whether every action is a whole attempt (``HasAttempts``)."""
    return {"answer", "without_oracle"} <= {*abilities}


def spec_of(plugin: type[Any]) -> WorldSpec:
    """What a world's class says of itself.

    Without a ``spec`` these are read as class attributes: ``isolation``, ``per_process``,
    ``reward_range``.

    Raises:
        WorldError: a field has a value that is none of its.
    """
    says: Any = getattr(plugin, "spec", None)
    if says is None:
        names = ("isolation", "per_process", "reward_range")
        says = WorldSpec(**{n: getattr(plugin, n) for n in names if hasattr(plugin, n)})
    if not isinstance(says, WorldSpec):
        raise WorldError(f"{plugin.__name__}.spec is {shown(says)}; wanted a WorldSpec")
    return _checked(says, f"{plugin.__name__}.spec")


def spec_from(says: Mapping[str, Any], world: str) -> WorldSpec:
    """What a world elsewhere says of itself. Raises: WorldError: as for ``spec_of``."""
    where = f"{world}: spec"
    if strange := sorted(says.keys() - _AWAY):
        raise WorldError(f"{where}.{strange[0]} is no field of it; known: {sorted(_AWAY)}")
    values = {**says}
    if "reward_range" in values:
        values["reward_range"] = tuple(values["reward_range"])
    try:
        values["tools"] = tuple(_tool(one) for one in values.get("tools", ()))
    except (TypeError, KeyError) as error:
        raise WorldError(f"{where}.tools: wanted name, description, parameters: {error}") from None
    return _checked(WorldSpec(**values), where)


def _tool(says: Mapping[str, Any]) -> Tool:
    schema = says["parameters"]
    parsed: Any = json.loads(schema) if isinstance(schema, str) else schema
    return Tool(says["name"], says["description"], canonical_json(parsed), says.get("text", ""))


def _checked(spec: WorldSpec, where: str) -> WorldSpec:
    for name, kind in _FIELDS.items():
        try:
            kind.validate_python(getattr(spec, name), strict=name != "start_timeout_s")
        except ValidationError as error:
            faults = error.errors(include_url=False)
            lines = (".".join([name, *map(str, f["loc"])]) + f": {f['msg']}" for f in faults)
            raise WorldError(f"{where}.{'; '.join(lines)}") from None
    if not spec.start_timeout_s > 0:
        raise WorldError(f"{where}.start_timeout_s is {spec.start_timeout_s}; wanted more than 0")
    if spec.recycle_after is not None and spec.recycle_after < 1:
        raise WorldError(f"{where}.recycle_after is {spec.recycle_after}; wanted at least 1")
    return spec
