"""What code a plug-in consists of, for the keys of caches of what it made."""

import ast
import hashlib
import sys
import sysconfig
import uuid
from collections.abc import Generator, Iterable
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import packages_distributions, version
from importlib.util import find_spec, resolve_name
from pathlib import Path
from typing import Any


def code_of(*plugins: type[Any]) -> dict[str, str]:
    """What the behaviour of ``plugins`` depends on, as far as imports tell, by module or package.

    Followed are all import statements, those within functions too, from the modules of each class
    and its bases. Of a module of the plug-in's own top-level package, or of one that lies outside
    of the installed packages (a file beside it, another folder of ``PYTHONPATH``), it is the
    file's hash; of any other package the versions of what installed it. Nothing is imported. Code
    that cannot be read is another one every time. Data files and what is imported by a computed
    name are not seen.
    """
    found: dict[str, str] = {}
    own = {_top(plugin.__module__) for plugin in plugins}
    first = {base.__module__ for plugin in plugins for base in plugin.__mro__}
    left = set(first)
    while left:
        name = left.pop()
        if name in found or _top(name) in sys.stdlib_module_names:
            continue
        spec = _spec(name)
        if spec is None and name not in first:
            continue  # What is imported from a module need not be one.
        if _top(name) not in own and spec is not None and _installed(spec):
            found |= _versions(_top(name))
            continue
        data = _read(spec)
        found[name] = uuid.uuid4().hex if data is None else hashlib.sha256(data).hexdigest()
        left.update(_parents(name))
        if spec is not None and data and (spec.origin or "").endswith(".py"):
            left.update(_imports(data, name, spec))
    return dict(sorted(found.items()))


def _top(name: str) -> str:
    return name.partition(".")[0]


def _parents(name: str) -> Iterable[str]:
    parts = name.split(".")
    return (".".join(parts[:k]) for k in range(1, len(parts)))


def _spec(name: str) -> ModuleSpec | None:
    """Where a module lies; None where there is none. Imports nothing."""
    parent, _, _ = name.rpartition(".")
    try:
        if not parent:
            return find_spec(name)
        above = _spec(parent)
        places = above.submodule_search_locations if above else None
        return PathFinder.find_spec(name, list(places)) if places else None
    except (ImportError, ValueError, AttributeError):
        return None


def _installed(spec: ModuleSpec) -> bool:
    places = [spec.origin or "", *(spec.submodule_search_locations or ())]
    return any(Path(place).is_relative_to(site) for place in places for site in _sites())


@cache
def _sites() -> tuple[str, ...]:
    return tuple({sysconfig.get_path(key) for key in ("purelib", "platlib")})


def _versions(top: str) -> dict[str, str]:
    owners = _distributions().get(top, [])
    return {f"{top} of {owner}": version(owner) for owner in owners}


@cache
def _distributions() -> dict[str, list[str]]:
    return {top: sorted(set(owners)) for top, owners in packages_distributions().items()}


def _read(spec: ModuleSpec | None) -> bytes | None:
    """A module's file; empty for a folder without one; None if it cannot be read."""
    if spec is not None and spec.origin is None:
        return b""
    try:
        loader: Any = spec.loader if spec else None
        return loader.get_data(spec.origin if spec else "")
    except (OSError, AttributeError):
        return None


def _imports(data: bytes, name: str, spec: ModuleSpec) -> Generator[str]:
    """The modules that a file imports, and what may be some."""
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError):
        return
    package = name if spec.submodule_search_locations is not None else name.rpartition(".")[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            try:
                whole = resolve_name("." * node.level + (node.module or ""), package)
            except ImportError:
                continue
            yield whole
            yield from (f"{whole}.{alias.name}" for alias in node.names)
