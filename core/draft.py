"""A recipe's values on their way to being checked: read, extended, overridden."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

from . import strict_yaml
from .config import Config, Elsewhere, Fleet, PolicyConfig
from .errors import PluginError, RecipeError
from .faults import show, validate
from .hosting.spec import spec_of
from .plugins import load, nearest
from .protocols import replays
from .sections import (
    ALONE,
    BASES,
    DEFAULTS,
    FLEET,
    KEYS,
    OWN,
    SECTIONS,
    Phase,
    Section,
    Spell,
    Top,
    config_class,
    mapping,
)
from .strict_yaml import KeyPath
from .types import WorldSpec

SHIPPED_AT = Path(__file__).parents[1] / "recipes"

C = TypeVar("C", bound=Config)
Place: TypeAlias = tuple[int, str]
"""Sorts as a reader goes: lines of the file, then the command line; and what to print."""


class Draft:
    """A recipe's values on their way to being checked, with the place each came from."""

    def __init__(self, values: dict[str, Any], places: dict[KeyPath, Place]) -> None:
        self.values = values
        self.places = places
        self.faults: list[tuple[Place, str]] = []
        self.spoiled: set[KeyPath] = set()
        """What could not even be read: enough was said of it."""
        self.notes: list[str] = []

    @classmethod
    def parsed(cls, text: str, file: str) -> "Draft":
        document = strict_yaml.parse(text)
        places = {path: (line, f"{file}:{line}") for path, line in document.lines.items()}
        draft = cls({}, {(): (1, f"{file}:1"), **places})
        for path, line, message in document.faults:
            draft.faults.append(((line, f"{file}:{line}"), named(path, message)))
            draft.spoiled.add(path)
        values = mapping(document.value)
        if values is not None:
            draft.values = values
        elif not document.faults:
            got = "nothing" if document.value is None else show(document.value)
            draft.fault((), f"a recipe is a mapping with the keys {', '.join(KEYS)}; got {got}")
        if draft.faults and not draft.values:
            draft.stop_if_faulty()  # What else is missing would only be noise.
        return draft

    def fault(self, path: KeyPath, message: str) -> None:
        if path not in self.spoiled:
            self.faults.append((self._place(path), named(path, message)))

    def fit(self, policy: Section, learner: Section) -> None:
        """What the learner makes, the policy has to be able to load."""
        unfit = getattr(policy.plugin, "unfit", None)
        if unfit and (message := unfit(policy.config, learner.dump())):
            self.fault(("learner",), f"policy.use is {policy.use}: {message}")

    def replayable(self, world: Section, phases: Sequence[Phase]) -> None:
        """A trainer that replays needs a world that can be replayed."""
        if world.plugin is Elsewhere:
            return  # It is asked when it is opened.
        for number, phase in enumerate(phases):
            if message := unreplayable(phase.trainer, spec_of(world.plugin), world.use):
                alone = ("trainer",) if len(phases) == 1 else ("phases", number, "trainer")
                self.fault(alone, message)

    def installed(self, trackers: Sequence[str]) -> None:
        for name in trackers:
            if find_spec(name) is None:
                message = f"{name} is not installed: pip install 'selfwright[{name}]'"
                self.fault(("report_to",), message)

    def stop_if_faulty(self) -> None:
        if self.faults:
            lines = [f"{label}: {message}" for (_, label), message in sorted(self.faults)]
            raise RecipeError("\n".join(dict.fromkeys(lines)))

    def override(self, overrides: Sequence[str]) -> None:
        """Set each ``key.path=value``; whole sections first, then what they use, then the rest."""
        parsed: list[tuple[KeyPath, Any, Place]] = []
        for index, text in enumerate(overrides):
            name, equals, raw = text.partition("=")
            path, place = tuple(name.split(".")), late(index, text)
            document = strict_yaml.parse(raw)
            if not equals or not all(part and part == part.strip() for part in path):
                message = f"wanted key.path=value, such as trainer.use=rise, got {text!r}"
                self.faults.append((place, message))
            elif document.faults:
                self.faults.append((place, f"{name}: {document.faults[0][2]}; try quotes"))
            elif path == ("extends",):
                message = "extends: is for files; name that recipe in place of this one"
                self.faults.append((place, message))
            else:
                parsed.append((path, document.value, place))
        for path, value, place in sorted(parsed, key=lambda one: rank(one[0])):
            if path[-1] == "use" and isinstance(value, str) and (at := self._plugged_at(path[:-1])):
                self._switch(at, value, place)
            self._set(path, value, place)

    def _plugged_at(self, path: KeyPath) -> KeyPath:
        """The path of the section that ``path`` names, with a list's places as numbers; or none."""
        at: KeyPath = path
        if len(path) == 3 and path[0] == "phases" and str(path[1]).isdecimal():
            at = ("phases", int(path[1]), path[2])
        kind = at[-1] if len(at) in (1, 3) else ""
        held = kind in SECTIONS or (len(at) == 2 and at[0] == "policies")
        return at if held and self._found(at) is not None else ()

    def _found(self, path: KeyPath) -> dict[str, Any] | None:
        """The mapping at ``path``; an empty one for a section that is not there."""
        holder: Any = self.values
        for part in path:
            try:
                holder = holder[part]
            except (KeyError, IndexError, TypeError):
                return {} if len(path) == 1 else None
        return mapping(holder)

    def extend(self, base: "Draft") -> None:
        """Add what only ``base`` says. A plug-in's keys go with its name."""
        merged = {**base.values}
        for key, mine in self.values.items():
            theirs, own = mapping(base.values.get(key)), mapping(mine)
            merged[key] = mine
            if theirs is None or own is None:
                continue
            default = DEFAULTS.get(key)
            if own.get("use", theirs.get("use", default)) == theirs.get("use", default):
                merged[key] = {**theirs, **own}
        if "phases" in self.values:
            merged = {k: v for k, v in merged.items() if k in self.values or k not in ALONE}
        elif "trainer" in self.values:
            merged.pop("phases", None)
        self.values = merged
        self.places = {**base.places, **self.places}
        self.faults += base.faults
        self.spoiled |= base.spoiled

    def phases(self, top: Top | None, judge: Section | None) -> tuple[Phase, ...]:
        """The phases, none with what is wrong added to the faults."""
        if "phases" not in self.values:
            trainer = self.section("trainer")
            return (Phase(trainer, judge, top.iterations),) if trainer and judge and top else ()
        for key in ALONE:
            if key in self.values:
                self.fault((key,), f"stands in each of the phases; leave {key} out here")
        given: Any = self.values["phases"]
        if not isinstance(given, list) or not given:
            message = "wanted a list of phases {trainer: {use: NAME, ...}, iterations: N}"
            self.fault(("phases",), f"{message}, got {show(given)}")
            return ()
        items = cast("list[Any]", given)
        phases = [self._phase(k, item, judge) for k, item in enumerate(items)]
        found = tuple(phase for phase in phases if phase)
        return found if len(found) == len(items) else ()

    def _phase(self, index: int, item: Any, judge: Section | None) -> Phase | None:
        at = ("phases", index)
        given = mapping(item)
        if given is None:
            self.fault(
                at, f"wanted {{trainer: {{use: NAME, ...}}, iterations: N}}, got {show(item)}"
            )
            return None
        spell = self.checked(
            Spell, {k: v for k, v in given.items() if k not in ("trainer", "judge")}, at
        )
        trainer = self.section("trainer", at)
        mine = self.section("judge", at) if "judge" in given else judge
        return Phase(trainer, mine, spell.iterations) if spell and trainer and mine else None

    def fleet(self) -> Fleet | None:
        given = mapping(self.values.get("environment")) or {}
        mine = {key: value for key, value in given.items() if key in FLEET}
        fleet = self.checked(Fleet, mine, ("environment",))
        if fleet and fleet.on == "ray":
            at = ("environment", "on")
            if find_spec("ray") is None:
                self.fault(at, "needs Ray, which is not installed: pip install 'selfwright[ray]'")
            if fleet.isolation == "inline":
                self.fault(at, "isolation: inline keeps the worlds in this process; leave it out")
        return fleet

    def section(self, key: str, at: KeyPath = ()) -> Section | None:
        """The section ``key``, of the phase ``at`` or of the recipe.

        None with what is wrong added to the faults.
        """
        values: Any = self.values
        for part in at:
            values = values[part]
        if key not in values and key not in DEFAULTS:
            self.fault(at, f"{key} is missing; give {key}: {{use: NAME, ...}}")
            return None
        return self.plugged(key, values.get(key, {}), (*at, key))

    def policies(self) -> dict[str, Section]:
        """The other policies, without those at fault."""
        came: Any = self.values.get("policies", {})
        given = mapping(came)
        if given is None:
            message = f"wanted a mapping {{NAME: {{use: NAME, ...}}}}, got {show(came)}"
            self.fault(("policies",), message)
            return {}
        found: dict[str, Section] = {}
        for name, value in given.items():
            if name in OWN:
                message = f"{name} has a meaning already; call it something else"
                self.fault(("policies", name), message)
            elif one := self.plugged("policy", value, ("policies", name)):
                found[name] = one
                assert isinstance(one.config, PolicyConfig)
                if one.config.warm_start or one.config.model.startswith(
                    ("scratch:", "scratch-vlm:", "graft:")
                ):
                    message = "only the policy in training is made here; give a model that is there"
                    self.fault(("policies", name), message)
        return found

    def plugged(self, key: str, came: Any, here: KeyPath) -> Section | None:
        """What stands at ``here`` as a section of the kind ``key``."""
        given = mapping(came)
        name = here[-1]
        if given is None:
            message = f"wanted a mapping {{use: NAME, ...}}, got {show(came)}"
            near = f"; did you mean {name}: {{use: {came}}}?" if isinstance(came, str) else ""
            self.fault(here, message + near)
            return None
        use: Any = given.get("use", DEFAULTS.get(key))
        if not isinstance(use, str):
            which = (
                "use is missing; say which" if "use" not in given else f"got {show(use)} for use"
            )
            self.fault(here, f"{which}: {name}: {{use: NAME, ...}}")
            return None
        try:
            away = key == "environment" and elsewhere(given)
            plugin = Elsewhere if away else load(SECTIONS[key], use)
            model = config_class(plugin, BASES.get(key, Config))
        except PluginError as error:
            self.fault((*here, "use") if "use" in given else here, str(error))
            return None
        beside = FLEET if key == "environment" else frozenset[str]()
        own = {k: value for k, value in given.items() if k != "use" and k not in beside}
        config = self.checked(model, own, here, {"use", *beside})
        return Section(use, plugin, config) if config is not None else None

    def checked(
        self,
        model: type[C],
        values: Mapping[str, Any],
        at: KeyPath = (),
        also: set[str] | frozenset[str] = frozenset(),
    ) -> C | None:
        config, faults = validate(model, values, also)
        for path, message in faults:
            self.fault((*at, *path), message)
        return config

    def _place(self, path: KeyPath) -> Place:
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]

    def _set(self, path: KeyPath, value: Any, place: Place) -> None:
        holder: Any = self.values
        for depth in range(1, len(path)):
            part: Any = path[depth - 1]
            inner: Any = holder[part] if isinstance(part, int) else holder.get(part)
            if inner is None:
                inner = holder[part] = {}
                self.places[path[:depth]] = place
            if isinstance(inner, list):
                items, where = cast("list[Any]", inner), str(path[depth])
                if where.isdecimal() and int(where) < len(items) and len(path) > depth + 1:
                    path = (*path[:depth], int(where), *path[depth + 1 :])
                    holder = items
                    continue
            if not isinstance(inner, dict):
                message = f"{'.'.join(map(str, path[:depth]))} is {show(inner)}, not a mapping"
                if depth == 1 and part in SECTIONS:
                    message += " {use: NAME, ...}"
                self.faults.append((place, named(path, message)))
                return
            holder = cast("dict[str, Any]", inner)
        holder[path[-1]] = value
        self.places = {p: old for p, old in self.places.items() if p[: len(path)] != path}
        self.places[path] = place

    def _switch(self, at: KeyPath, use: str, place: Place) -> None:
        """Leave out what only the plug-in used before knows: an override of ``use`` says so."""
        key = "policy" if at[0] == "policies" else str(at[-1])
        given = self._found(at) or {}
        before = given.get("use", DEFAULTS.get(key))
        try:
            known = {"use", *config_class(load(SECTIONS[key], use)).model_fields}
        except PluginError:
            return  # Said when the section is checked.
        extra = set(given) - known - (FLEET if key == "environment" else frozenset())
        if before == use or not extra:
            return
        try:
            old = set(config_class(load(SECTIONS[key], str(before))).model_fields)
        except PluginError:
            old = extra
        for name in sorted(extra & old):
            del given[name]
            where = self._place((*at, name))[1]
            left = ".".join(map(str, (*at, name)))
            self.notes.append(f"{place[1]}: left out {left} ({where}), which {use!r} does not have")


def elsewhere(world: Mapping[str, Any]) -> bool:
    """Whether these keys of an environment say that its class is not here."""
    return bool(world.get("python") or world.get("command"))


def unreplayable(trainer: Section, spec: WorldSpec, world: str) -> str:
    """Why a trainer cannot learn in a world that says so of itself; empty if it can."""
    if spec.repeatable != "no" or not replays(trainer.plugin):
        return ""
    return f"{trainer.use} replays what was played, and {world} says that it is not repeatable"


def opened(file: Path, name: str, seen: tuple[Path, ...] = ()) -> Draft:
    """The file's values on top of those of the recipe that it ``extends``, if it does."""
    draft = Draft.parsed(text_of(file), name)
    if "extends" not in draft.values:
        return draft
    base: Any = draft.values.pop("extends")
    if not isinstance(base, str):
        draft.fault(("extends",), f"wanted a recipe's name or file, got {show(base)}")
        return draft
    if file.resolve() in seen:
        draft.fault(("extends",), f"{base} extends this recipe again: a circle")
        return draft
    beside = file.parent / base
    try:
        found = beside if beside.is_file() else find(Path(base))
    except RecipeError as error:
        draft.fault(("extends",), str(error))
        return draft
    draft.extend(opened(found, found.name, (*seen, file.resolve())))
    return draft


def find(path: Path) -> Path:
    if path.is_file():
        return path
    ours = shipped()
    if str(path) in ours:
        return ours[str(path)]
    if path.is_dir():
        raise RecipeError(f"{path}: is a folder; a recipe is a YAML file")
    if path.exists():
        return path
    near = nearest(str(path.with_suffix("")), ours)
    raise RecipeError(f"{path}: no such file, nor a recipe that comes with selfwright; {near}")


def text_of(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = f"0x{error.object[error.start]:02x}"
        raise RecipeError(f"{file}:{line}: not UTF-8 text: byte {byte}; save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from None


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name: ``quickstart``, ``countdown/ilf``."""
    files = [*sorted(SHIPPED_AT.glob("*.yaml")), *sorted(SHIPPED_AT.glob("*/*.yaml"))]
    return {
        str(file.relative_to(SHIPPED_AT).with_suffix("")): file
        for file in files
        if file.parent.name != "accelerate"  # These are for accelerate launch.
    }


def named(path: KeyPath, message: str) -> str:
    return f"{'.'.join(map(str, path))}: {message}" if path else message


def late(index: int, override: str) -> Place:
    return (1 << 40) + index, f"-o {override}"


def rank(path: KeyPath) -> int:
    return 0 if len(path) == 1 else 1 if path[1:] == ("use",) else 2
