"""A recipe: one strict YAML file, one run. Every fault is found at once and said with its place."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .config import Budget, Evaluation, Fleet, Rollout
from .draft import Draft, elsewhere, find, late, opened, shipped
from .plugins import load, nearest
from .sections import KEYS, SECTIONS, SHARED, Phase, Section, Top, Tracker, mapping
from .seeds import identify

__all__ = [
    "Phase",
    "Recipe",
    "Section",
    "differences",
    "read",
    "section",
    "shipped",
]


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
    keep: int | None = None
    """Is not dumped, as little as the next."""
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
    file = find(Path(path))
    draft = opened(file, str(path) if Path(path) == file else file.name)
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
    if sections["environment"] and phases:
        draft.replayable(sections["environment"], phases)
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
        keep=top.keep,
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
    draft = Draft({key: {**(settings or {}), "use": use}}, {(): (0, "settings")})
    mine = [text for text in overrides if text.startswith(f"{key}.")]
    for text in overrides:
        path = text.partition("=")[0]
        if text not in mine or path == f"{key}.use":
            message = f"{path}: only {key}.KEY=VALUE can be set here"
            draft.faults.append((late(len(overrides), text), message))
    draft.override([text for text in mine if not text.startswith(f"{key}.use=")])
    if key != "environment" or not elsewhere(draft.values[key]):
        load(SECTIONS[key], use)
    fleet, found = draft.fleet(), draft.section(key)
    draft.stop_if_faulty()
    assert fleet and found
    return found, fleet


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Where two dumps differ: ``trainer.tau: 0.5 -> 0.7``, one a line, in the order of the keys."""
    lines: list[str] = []
    for key in dict.fromkeys([*a, *b]):
        if key in a and key in b and a[key] == b[key]:
            continue
        inner_a, inner_b = mapping(a.get(key)), mapping(b.get(key))
        if inner_a is not None and inner_b is not None:
            lines += [f"{key}.{line}" for line in differences(inner_a, inner_b)]
        else:
            old, new = (json.dumps(side[key]) if key in side else "absent" for side in (a, b))
            lines.append(f"{key}: {old} -> {new}")
    return lines
