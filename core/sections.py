"""The sections of a recipe: plug-ins as it uses them, and the keys that belong to none."""

from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, cast

from pydantic import Field

from .config import Budget, Config, Evaluation, Fleet, JudgeConfig, PolicyConfig, Rollout
from .errors import PluginError

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

FLEET = frozenset(Fleet.model_fields)
"""What stands among the environment's keys, and is not its plug-in's."""

Tracker: TypeAlias = Literal["tensorboard", "wandb", "trackio", "mlflow"]


class Top(Config):
    """The keys of a recipe that belong to no plug-in."""

    seed: int = Field(default=0, ge=0, lt=2**63)
    """All randomness of a run is derived from it."""
    iterations: int = Field(default=10, ge=1)
    """Rounds of playing and learning, at most."""
    budget: Budget = Budget()
    rollout: Rollout = Field(default_factory=lambda: Rollout.model_validate({}))
    evaluation: Evaluation = Field(default_factory=lambda: Evaluation.model_validate({}))
    keep: int | None = Field(default=2, ge=1)
    """Of so many iterations, the last ones, the learner's state is kept, which a run goes on from,
    and of the one that did best on validation tasks; the weights of all are. Null: of all. It has
    no say in what comes out, so another number may be given to go on with a run."""
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


def mapping(value: Any) -> dict[str, Any] | None:
    return cast("dict[str, Any]", value) if isinstance(value, dict) else None
