"""The base of every configuration, and the recipe's own."""

from typing import Any, Literal, Self, TypeAlias, cast

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from .checked import all_unicode


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused, nothing coerced from the wrong type."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)
    _unicode = field_validator("*")(all_unicode)


class Use(BaseModel):
    """A plug-in by name; the other keys are the plug-in's own config."""

    model_config = ConfigDict(frozen=True, extra="allow")
    use: str

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.model_extra or {})


Variables: TypeAlias = dict[str, bool | int | float | str]
"""Of a chat template, fixed for a run."""


class Function(Config):
    """What a model may call."""

    name: str
    description: str
    parameters: str
    """A JSON schema of its arguments."""
    text: str = ""
    """How the world wants a call written, as in ``core.types.Tool``."""


class Turn(Config):
    """What was seen, and what was done then."""

    text: str
    actions: tuple[str, ...] = ()
    """Every action that was listed."""
    action: str


class Shot(Config):
    """A task that was done, to be shown to a model before its own."""

    task: str
    """Its id: it is not shown before itself."""
    instruction: str
    turns: tuple[Turn, ...]


class Fleet(Config):
    """How the worlds of a run are hosted. These keys stand beside the world's own in a recipe."""

    parallel: int = Field(default=256, ge=1)
    """Episodes in play at once."""
    isolation: Literal["inline", "process", "auto"] = "auto"
    """``auto``: as the world's class says."""
    on: Literal["local", "ray"] = "local"
    """``ray``: in processes of their own on the machines of a Ray cluster, the one at RAY_ADDRESS
    or a small one started here."""
    python: str = ""
    """The interpreter that has the world, 3.8 or newer; nothing of ours is needed there. ``use`` is
    then ``module:Class``. Empty: this one."""
    command: tuple[str, ...] = ()
    """A program that is the world: it speaks the wire of docs/wire.md on its standard streams.
    ``use`` is then only its name."""
    start_timeout_s: float | None = Field(default=None, gt=0)
    """How long a process may take to start and make an instance; None: as the world says."""
    reset_timeout_s: float = Field(default=60.0, gt=0)
    step_timeout_s: float = Field(default=30.0, gt=0)
    max_failures: float = Field(default=0.5, ge=0, le=1)
    """The share of failed episodes, in one round of rollouts, above which the run stops."""

    @property
    def elsewhere(self) -> bool:
        """Whether the world lives where its class cannot be looked at."""
        return bool(self.python or self.command)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if self.python and self.command:
            raise ValueError("python and command both say where the world is; give one of them")
        if self.elsewhere and self.isolation == "inline":
            raise ValueError("isolation: inline: a world elsewhere has a process of its own")
        if self.elsewhere and self.on == "ray":
            raise ValueError("on: ray: a world elsewhere is hosted on this machine only")
        return self


class Elsewhere:
    """Stands for a world whose class is not here: its settings are checked where it lives."""

    class Config(Config):
        model_config = ConfigDict(extra="allow")


class JudgeConfig(Config):
    """What every judge's config has."""

    timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of the verdicts on one task's attempts."""
    parallel: int = Field(default=64, ge=1)
    """Groups of attempts judged at once."""
    max_failures: float = Field(default=0.5, ge=0, le=1)
    """The share of groups that the judge may fail on, in one round, before the run stops."""


class Rollout(Config):
    """How the episodes of training are waited for."""

    enough: float = Field(default=1.0, gt=0, le=1)
    """A task's attempts are closed once this share of them has ended well; those still in play are
    stored as far as they came, as failed, and not learned from. Below 1 it favours short ones."""
    group_timeout_s: float | None = Field(default=None, gt=0)
    """They are also closed so long after the first of them began."""
    max_staleness: int = Field(default=0, ge=0)
    """Up to so many iterations are played ahead, while the one before is learned from: what is
    learned was sampled by weights at most so many iterations old. Above 0 runs do not repeat
    exactly, and wall-clock time decides who samples what."""


class Evaluation(Config):
    """How checkpoints are compared: the same tasks for all, never trained on."""

    tasks: int = Field(default=400, ge=1)
    split: Literal["train", "validation", "test"] = "test"
    temperature: float = Field(default=0.0, ge=0)
    every: int = Field(default=1, ge=0)
    """Iterations between two points of the learning curve on validation tasks; 0: none."""
    validation_tasks: int = Field(default=128, ge=1)
    turns: int = Field(default=5, ge=0)
    """Turns of the introspection table, for worlds of attempts; 0: no table."""


class Budget(Config):
    """What training may cost. Of the last iteration only as many episodes are played as it covers,
    by what earlier ones have cost: at the end it is spent but for a few per cent more or less."""

    environment_steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)
    """Sampled ones."""

    def share(self, environment_steps: float, tokens: float) -> float:
        """How much of it is spent, 1 or more when it is over; 0 if nothing is limited."""
        return max(
            environment_steps / self.environment_steps if self.environment_steps else 0.0,
            tokens / self.tokens if self.tokens else 0.0,
        )


class WarmStart(Config):
    """Clone the world's own expert before the run, for models that cannot play at all yet."""

    method: Literal["full", "lora"] | None = None
    """Which weights it changes: all, or those of an adapter that is then merged. None: all of a
    model made here, an adapter of any other."""
    rank: int = Field(default=16, ge=1)
    """Of the adapter; its alpha is twice that."""
    skill: float | None = Field(default=None, gt=0, le=1)
    """Stop once this share of validation tasks is solved greedily; None: do all ``updates``."""
    updates: int = Field(default=2000, ge=1)
    """The most optimiser steps. Short of ``skill`` it ends here all the same, with a warning."""
    seconds: float | None = Field(default=None, exclude=True)
    """Ends nothing any more, for what came out hung on the machine; older recipes and runs say it.
    ``updates`` is the bound."""
    demonstrations: int = Field(default=20_000, ge=1)
    """Expert episodes to clone, one per training task."""
    batch_size: int = Field(default=256, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    check_every: int = Field(default=100, ge=1)
    """Updates between two looks at ``skill``."""
    noise: float = Field(default=0.0, ge=0, lt=1)
    """The share of steps where a random action is played instead and not imitated, so that the
    clone has seen what follows a mistake. Needs a world whose expert can go on from anywhere."""


class PolicyConfig(Config):
    """What every engine's config has: which model, and how it is sampled in training."""

    model: str
    """A folder, a hub id, a ``.gguf`` file, ``package:NAME`` for the one in an installed package,
    or ``scratch:WIDTHxLAYERS`` for a small one made here, ``scratch-vlm:`` for one that sees;
    ``graft:`` before any but these two puts an eye on a language model."""
    temperature: float = Field(default=1.0, gt=0)
    top_p: float = Field(default=1.0, gt=0, le=1)
    max_tokens: int = Field(default=64, ge=1)
    """Per completion."""
    max_thought: int | None = Field(default=None, ge=1)
    """Tokens of a thought in ``<think>`` tags: one that has not ended by then is cut, and is no
    action. None: ``max_tokens`` bounds it with all else."""
    stop: list[str] = []
    constrain: bool = False
    """Only what the agent reads as an action may be sampled: one of those that the world lists, or
    a text of the grammar that the agent makes of its tools."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Deadline of one completion, waiting for its batch included."""
    warm_start: WarmStart | None = None

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, given: Any) -> Any:
        """``listed`` is what older recipes and runs call ``constrain``."""
        if isinstance(given, dict) and "listed" in given and "constrain" not in given:
            keys = cast(dict[str, Any], given)
            return {("constrain" if key == "listed" else key): keys[key] for key in keys}
        return cast(Any, given)
