"""Finds worlds, agents, policies and all other plug-ins by name among installed packages."""

import difflib
import importlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import reduce
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from .errors import PluginError

KINDS = ("environments", "agents", "policies", "judges", "trainers", "learners")


@dataclass(frozen=True, slots=True)
class Registered:
    """One name in an entry-point group."""

    target: str
    """``module:Class``."""
    distribution: str
    """The package that registered it; several, joined by "and", if they claim the same name."""


def load(kind: str, name: str) -> type[Any]:
    """The class called ``name``: an entry of the group ``selfwright.<kind>``, or ``module:Class``.

    Nothing else of the group is imported.

    Raises:
        PluginError: no such name, two packages claim it, it is not a class, or a module it needs is
            not installed. Any other fault of the plug-in's own code propagates.
    """
    if ":" in name:
        return _imported(EntryPoint(name, name, _group(kind)))
    group = _group(kind)
    found = list(entry_points(group=group, name=name))
    if not found:
        raise PluginError(f"no entry {name!r} in {group}; {nearest(name, names(kind))}")
    if len(found) > 1:
        raise PluginError(
            f"{name!r} in {group} is claimed by {_owners(found)}; uninstall one of them, "
            f"or name the class itself: {' or '.join(sorted(point.value for point in found))}"
        )
    return _imported(found[0])


def names(kind: str) -> dict[str, Registered]:
    """Every entry of ``selfwright.<kind>`` by its name, sorted; imports none of them."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=_group(kind)):
        found.setdefault(point.name, []).append(point)
    return {
        name: Registered(" or ".join(sorted(point.value for point in points)), _owners(points))
        for name, points in sorted(found.items())
    }


def nearest(word: str, known: Iterable[str]) -> str:
    """What to say about a ``word`` that is none of the ``known``: the likeliest one, or all."""
    by_lower = {one.lower(): one for one in sorted(known)}
    near = difflib.get_close_matches(word.lower(), by_lower, n=1)
    if near:
        return f"did you mean {by_lower[near[0]]!r}?"
    return f"known: {', '.join(by_lower.values())}" if by_lower else "none is known"


def _group(kind: str) -> str:
    if kind not in KINDS:
        raise PluginError(f"no kind of plug-in is called {kind!r}; {nearest(kind, KINDS)}")
    return f"selfwright.{kind}"


def _owners(points: Iterable[EntryPoint]) -> str:
    return " and ".join(sorted(point.dist.name if point.dist else "?" for point in points))


def _imported(point: EntryPoint) -> type[Any]:
    module, _, attribute = point.value.partition(":")
    if not module or not attribute or module.startswith("."):
        raise PluginError(f"wanted module:Class, got {point.value!r}")
    try:
        loaded = importlib.import_module(module)
    except ModuleNotFoundError as error:
        missing = error.name or str(error)
        if module == missing or module.startswith(f"{missing}."):
            raise PluginError(
                f"{point.value!r}: there is no module {missing!r}; is its package installed, "
                "or its folder on PYTHONPATH?"
            ) from None
        raise PluginError(
            f"{point.name!r} of {point.group} needs the module {missing!r}, which is not installed"
        ) from None
    try:
        plugin: Any = reduce(getattr, attribute.split("."), loaded)
    except AttributeError:
        near = nearest(attribute, (one for one in vars(loaded) if one[0].isupper()))
        raise PluginError(f"module {module!r} has no {attribute!r}; {near}") from None
    if not isinstance(plugin, type):
        raise PluginError(f"{point.value!r} is not a class but {type(plugin).__name__}")
    return plugin
