"""A recipe: one strict YAML file, one run. Every fault is found at once and said with its place."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, TypeAlias, TypeVar, cast

from pydantic import Field

from . import strict_yaml
from .config import Budget, Config, Evaluation, Fleet, JudgeConfig, PolicyConfig, Rollout
from .errors import PluginError, RecipeError
from .faults import show, validate
from .plugins import load, nearest
from .seeds import identify
from .strict_yaml import KeyPath

SECTIONS = {
    "environment": "environments",
    "agent": "agents",
    "policy": "policies",
    "judge": "judges",
    "trainer": "trainers",
    "learner": "learners",
}
"""A recipe's plug-in sections, and the kind of plug-in each one uses."""

DEFAULTS = {"agent": "chat", "policy": "transformers", "judge": "reward", "learner": "plain"}
"""What a section uses if it does not say. A world and a trainer must be chosen."""

BASES: dict[str, type[Config]] = {"policy": PolicyConfig, "judge": JudgeConfig}
"""What the configs of these sections derive from, for the loop reads some of their keys."""

ALONE = ("trainer", "iterations")
"""What a recipe without ``phases`` says once, and each of the phases for itself."""
SHARED = tuple(key for key in SECTIONS if key not in ALONE)
"""The sections that all phases share."""

_SHIPPED = Path(__file__).parents[1] / "recipes"
_FLEET = frozenset(Fleet.model_fields)

C = TypeVar("C", bound=Config)
Tracker: TypeAlias = Literal["tensorboard", "wandb", "trackio", "mlflow"]
_Place: TypeAlias = tuple[int, str]
"""Sorts as a reader goes: lines of the file, then the command line; and what to print."""


class Top(Config):
    """The keys of a recipe that belong to no plug-in."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """All randomness of a run is derived from it."""
    iterations: int = Field(default=10, ge=1)
    """Rounds of playing and learning, at most."""
    budget: Budget = Budget()
    rollout: Rollout = Field(default_factory=lambda: Rollout.model_validate({}))
    evaluation: Evaluation = Field(default_factory=lambda: Evaluation.model_validate({}))
    report_to: tuple[Tracker, ...] = ()
    """Trackers that hear of the run, each an extra of this package; it is no part of what the run
    is, so another list may be given to go on with it."""


class Spell(Config):
    """The keys of one of several ``phases`` beside its ``trainer`` and its ``judge``."""

    iterations: int = Field(default=10, ge=1)


OWN = ("policy", "base", "expert")
"""Names of players that no recipe may give to another policy."""
KEYS = (*SECTIONS, *Top.model_fields, "policies", "phases", "extends")
"""All that a recipe may say."""


@dataclass(frozen=True)
class Section:
    """A plug-in as a recipe uses it: its name, its class, its checked config."""

    use: str
    plugin: type[Any]
    config: Config

    def make(self, *arguments: Any) -> Any:
        """The plug-in itself: its class called with the config and the other ``arguments``."""
        return self.plugin(self.config, *arguments)

    def dump(self) -> dict[str, Any]:
        return {"use": self.use, **self.config.model_dump(mode="json")}


@dataclass(frozen=True)
class Phase:
    """Some iterations by one trainer."""

    trainer: Section
    judge: Section
    iterations: int


@dataclass(frozen=True)
class Recipe:
    name: str
    """The file's, without folder and suffix."""
    seed: int
    phases: tuple[Phase, ...]
    """At least one; what each has made is the base of the next."""
    policies: Mapping[str, Section]
    """Others, by the names that trainers and judges call them by: teachers, refiners, judges."""
    budget: Budget
    rollout: Rollout
    environment: Section
    agent: Section
    policy: Section
    judge: Section
    """Of evaluations, and of phases that name none."""
    learner: Section
    evaluation: Evaluation
    fleet: Fleet
    """Stands among the environment's keys."""
    report_to: tuple[Tracker, ...] = ()
    """Is not dumped: it has no say in what comes out."""
    notes: tuple[str, ...] = ()
    """What the reader should know: keys that an override made void."""

    @property
    def iterations(self) -> int:
        """Of all phases together, at most."""
        return sum(phase.iterations for phase in self.phases)

    @cached_property
    def identity(self) -> str:
        """The same for runs that play the same, wherever their worlds are hosted."""
        return identify(json.dumps(self.dump() | {"environment": self.environment.dump()}))

    def dump(self) -> dict[str, Any]:
        """Every key with its value, defaults included, as a recipe would say it."""
        sections: dict[str, Section] = {key: getattr(self, key) for key in SHARED}
        plain: dict[str, Any] = {"seed": self.seed}
        plain |= {key: section.dump() for key, section in sections.items()}
        if len(self.phases) == 1 and self.phases[0].judge is self.judge:
            plain["iterations"] = self.iterations
            plain["trainer"] = self.phases[0].trainer.dump()
        else:
            plain["phases"] = [
                {
                    "trainer": phase.trainer.dump(),
                    "judge": phase.judge.dump(),
                    "iterations": phase.iterations,
                }
                for phase in self.phases
            ]
        plain["environment"] |= self.fleet.model_dump(mode="json")
        if self.policies:
            plain["policies"] = {name: one.dump() for name, one in self.policies.items()}
        plain["budget"] = self.budget.model_dump(mode="json")
        plain["rollout"] = self.rollout.model_dump(mode="json")
        plain["evaluation"] = self.evaluation.model_dump(mode="json")
        return plain


def read(path: Path | str, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    Args:
        path: a file, or the name of a recipe that comes with the package (``countdown/ilf``).
        overrides: ``key.path=value`` each, the value in YAML; the later one wins.

    Raises:
        RecipeError: listing every fault of the file and of the overrides, one a line.
    """
    file = _find(Path(path))
    draft = _opened(file, str(path) if Path(path) == file else file.name)
    draft.override(overrides)
    for key in draft.values:
        if key not in KEYS:
            draft.fault((key,), f"unknown key; {nearest(key, KEYS)}")
    top = draft.checked(Top, {k: v for k, v in draft.values.items() if k in Top.model_fields})
    fleet = draft.fleet()
    sections = {key: draft.section(key) for key in SHARED}
    phases = draft.phases(top, sections["judge"])
    policies = draft.policies()
    if sections["policy"] and sections["learner"]:
        draft.fit(sections["policy"], sections["learner"])
    draft.installed(top.report_to if top else ())
    draft.stop_if_faulty()
    found = {key: section for key, section in sections.items() if section}
    assert top and fleet and phases and len(found) == len(SHARED)
    return Recipe(
        name=file.stem,
        seed=top.seed,
        phases=phases,
        policies=policies,
        budget=top.budget,
        rollout=top.rollout,
        evaluation=top.evaluation,
        fleet=fleet,
        report_to=top.report_to,
        notes=tuple(draft.notes),
        **found,
    )


def section(
    key: str,
    use: str,
    overrides: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
) -> tuple[Section, Fleet]:
    """One section on its own, for commands that need no recipe.

    Args:
        key: the section: ``environment``, ``agent``, ...
        use: the plug-in's name.
        overrides: as for ``read``; only keys of this section are known.
        settings: what to start from, a part of an earlier ``Recipe.dump``.

    Returns:
        The section, and the fleet, which only the environment's keys can change.

    Raises:
        PluginError: no such plug-in.
        RecipeError: listing every fault.
    """
    load(SECTIONS[key], use)
    draft = _Draft({key: {**(settings or {}), "use": use}}, {(): (0, "settings")})
    mine = [text for text in overrides if text.startswith(f"{key}.")]
    for text in overrides:
        path = text.partition("=")[0]
        if text not in mine or path == f"{key}.use":
            said = f"{path}: only {key}.KEY=VALUE can be set here"
            draft.faults.append((_late(len(overrides), text), said))
    draft.override([text for text in mine if not text.startswith(f"{key}.use=")])
    fleet, found = draft.fleet(), draft.section(key)
    draft.stop_if_faulty()
    assert fleet and found
    return found, fleet


def shipped() -> dict[str, Path]:
    """The recipes that come with the package, by name: ``quickstart``, ``countdown/ilf``."""
    files = [*sorted(_SHIPPED.glob("*.yaml")), *sorted(_SHIPPED.glob("*/*.yaml"))]
    return {
        str(file.relative_to(_SHIPPED).with_suffix("")): file
        for file in files
        if file.parent.name != "accelerate"  # These are for accelerate launch.
    }


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Where two dumps differ: ``trainer.tau: 0.5 -> 0.7``, one a line, in the order of the keys."""
    lines: list[str] = []
    for key in dict.fromkeys([*a, *b]):
        if key in a and key in b and a[key] == b[key]:
            continue
        inner_a, inner_b = _mapping(a.get(key)), _mapping(b.get(key))
        if inner_a is not None and inner_b is not None:
            lines += [f"{key}.{line}" for line in differences(inner_a, inner_b)]
        else:
            old, new = (json.dumps(side[key]) if key in side else "absent" for side in (a, b))
            lines.append(f"{key}: {old} -> {new}")
    return lines


class _Draft:
    """A recipe's values on their way to being checked, with the place each came from."""

    def __init__(self, values: dict[str, Any], places: dict[KeyPath, _Place]) -> None:
        self.values = values
        self.places = places
        self.faults: list[tuple[_Place, str]] = []
        self.spoiled: set[KeyPath] = set()
        """What could not even be read: enough was said of it."""
        self.notes: list[str] = []

    @classmethod
    def parsed(cls, text: str, file: str) -> "_Draft":
        document = strict_yaml.parse(text)
        places = {path: (line, f"{file}:{line}") for path, line in document.lines.items()}
        draft = cls({}, {(): (1, f"{file}:1"), **places})
        for path, line, said in document.faults:
            draft.faults.append(((line, f"{file}:{line}"), _named(path, said)))
            draft.spoiled.add(path)
        values = _mapping(document.value)
        if values is not None:
            draft.values = values
        elif not document.faults:
            got = "nothing" if document.value is None else show(document.value)
            draft.fault((), f"a recipe is a mapping with the keys {', '.join(KEYS)}; got {got}")
        if draft.faults and not draft.values:
            draft.stop_if_faulty()  # What else is missing would only be noise.
        return draft

    def fault(self, path: KeyPath, said: str) -> None:
        if path not in self.spoiled:
            self.faults.append((self._place(path), _named(path, said)))

    def fit(self, policy: Section, learner: Section) -> None:
        """What the learner makes, the policy has to be able to load."""
        unfit = getattr(policy.plugin, "unfit", None)
        if unfit and (said := unfit(policy.config, learner.dump())):
            self.fault(("learner",), f"policy.use is {policy.use}: {said}")

    def installed(self, trackers: Sequence[str]) -> None:
        for name in trackers:
            if find_spec(name) is None:
                said = f"{name} is not installed: pip install 'selfwright[{name}]'"
                self.fault(("report_to",), said)

    def stop_if_faulty(self) -> None:
        if self.faults:
            lines = [f"{label}: {said}" for (_, label), said in sorted(self.faults)]
            raise RecipeError("\n".join(dict.fromkeys(lines)))

    def override(self, overrides: Sequence[str]) -> None:
        """Set each ``key.path=value``; whole sections first, then what they use, then the rest."""
        parsed: list[tuple[KeyPath, Any, _Place]] = []
        for index, text in enumerate(overrides):
            name, equals, raw = text.partition("=")
            path, place = tuple(name.split(".")), _late(index, text)
            document = strict_yaml.parse(raw)
            if not equals or not all(part and part == part.strip() for part in path):
                said = f"wanted key.path=value, such as trainer.use=rise, got {text!r}"
                self.faults.append((place, said))
            elif document.faults:
                self.faults.append((place, f"{name}: {document.faults[0][2]}; try quotes"))
            elif path == ("extends",):
                said = "extends: is for files; name that recipe in place of this one"
                self.faults.append((place, said))
            else:
                parsed.append((path, document.value, place))
        for path, value, place in sorted(parsed, key=lambda one: _rank(one[0])):
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
        return _mapping(holder)

    def extend(self, base: "_Draft") -> None:
        """Add what only ``base`` says. A plug-in's keys go with its name."""
        merged = {**base.values}
        for key, mine in self.values.items():
            theirs, own = _mapping(base.values.get(key)), _mapping(mine)
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
            said = "wanted a list of phases {trainer: {use: NAME, ...}, iterations: N}"
            self.fault(("phases",), f"{said}, got {show(given)}")
            return ()
        items = cast("list[Any]", given)
        made = [self._phase(k, item, judge) for k, item in enumerate(items)]
        found = tuple(phase for phase in made if phase)
        return found if len(found) == len(items) else ()

    def _phase(self, index: int, item: Any, judge: Section | None) -> Phase | None:
        at = ("phases", index)
        given = _mapping(item)
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
        given = _mapping(self.values.get("environment")) or {}
        mine = {key: value for key, value in given.items() if key in _FLEET}
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
        given = _mapping(came)
        if given is None:
            said = f"wanted a mapping {{NAME: {{use: NAME, ...}}}}, got {show(came)}"
            self.fault(("policies",), said)
            return {}
        found: dict[str, Section] = {}
        for name, value in given.items():
            if name in OWN:
                said = f"{name} has a meaning already; call it something else"
                self.fault(("policies", name), said)
            elif one := self.plugged("policy", value, ("policies", name)):
                found[name] = one
                assert isinstance(one.config, PolicyConfig)
                if one.config.warm_start or one.config.model.startswith("scratch:"):
                    said = "only the policy in training is made here; give a model that is there"
                    self.fault(("policies", name), said)
        return found

    def plugged(self, key: str, came: Any, here: KeyPath) -> Section | None:
        """What stands at ``here`` as a section of the kind ``key``."""
        given = _mapping(came)
        name = here[-1]
        if given is None:
            said = f"wanted a mapping {{use: NAME, ...}}, got {show(came)}"
            near = f"; did you mean {name}: {{use: {came}}}?" if isinstance(came, str) else ""
            self.fault(here, said + near)
            return None
        use: Any = given.get("use", DEFAULTS.get(key))
        if not isinstance(use, str):
            which = (
                "use is missing; say which" if "use" not in given else f"got {show(use)} for use"
            )
            self.fault(here, f"{which}: {name}: {{use: NAME, ...}}")
            return None
        try:
            plugin = load(SECTIONS[key], use)
            model = config_class(plugin, BASES.get(key, Config))
        except PluginError as error:
            self.fault((*here, "use") if "use" in given else here, str(error))
            return None
        beside = _FLEET if key == "environment" else frozenset[str]()
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
        for path, said in faults:
            self.fault((*at, *path), said)
        return config

    def _place(self, path: KeyPath) -> _Place:
        while path and path not in self.places:
            path = path[:-1]
        return self.places[path]

    def _set(self, path: KeyPath, value: Any, place: _Place) -> None:
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
                said = f"{'.'.join(map(str, path[:depth]))} is {show(inner)}, not a mapping"
                if depth == 1 and part in SECTIONS:
                    said += " {use: NAME, ...}"
                self.faults.append((place, _named(path, said)))
                return
            holder = cast("dict[str, Any]", inner)
        holder[path[-1]] = value
        self.places = {p: old for p, old in self.places.items() if p[: len(path)] != path}
        self.places[path] = place

    def _switch(self, at: KeyPath, use: str, place: _Place) -> None:
        """Leave out what only the plug-in used before knows: an override of ``use`` says so."""
        key = "policy" if at[0] == "policies" else str(at[-1])
        given = self._found(at) or {}
        before = given.get("use", DEFAULTS.get(key))
        try:
            known = {"use", *config_class(load(SECTIONS[key], use)).model_fields}
        except PluginError:
            return  # Said when the section is checked.
        extra = set(given) - known - (_FLEET if key == "environment" else frozenset())
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


def config_class(plugin: type[Any], base: type[Config] = Config) -> type[Config]:
    """The nested ``Config`` of a plug-in, which derives from ``base``.

    Raises:
        PluginError: there is none, or it is another.
    """
    config = getattr(plugin, "Config", None)
    if isinstance(config, type) and issubclass(config, base):
        return config
    name = f"{plugin.__module__}:{plugin.__qualname__}"
    raise PluginError(
        f"{name} lacks a nested class Config that derives from core.config.{base.__name__}"
    )


def _opened(file: Path, name: str, seen: tuple[Path, ...] = ()) -> _Draft:
    """The file's values on top of those of the recipe that it ``extends``, if it does."""
    draft = _Draft.parsed(_text(file), name)
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
        found = beside if beside.is_file() else _find(Path(base))
    except RecipeError as error:
        draft.fault(("extends",), str(error))
        return draft
    draft.extend(_opened(found, found.name, (*seen, file.resolve())))
    return draft


def _find(path: Path) -> Path:
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


def _text(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        byte = f"0x{error.object[error.start]:02x}"
        raise RecipeError(f"{file}:{line}: not UTF-8 text: byte {byte}; save it as UTF-8") from None
    except OSError as error:
        raise RecipeError(f"{file}: cannot be read: {error.strerror}") from None


def _mapping(value: Any) -> dict[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None


def _named(path: KeyPath, said: str) -> str:
    return f"{'.'.join(map(str, path))}: {said}" if path else said


def _late(index: int, override: str) -> _Place:
    return (1 << 40) + index, f"-o {override}"


def _rank(path: KeyPath) -> int:
    return 0 if len(path) == 1 else 1 if path[1:] == ("use",) else 2
