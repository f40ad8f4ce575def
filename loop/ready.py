"""What is wrong with a recipe here, as far as it can be known before anything is made."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from ..agents import graft, scratch
from ..core.config import PolicyConfig
from ..core.errors import ModelError, RecipeError
from ..core.models.open import bare, config_of
from ..core.recipe import Recipe, Section


def check(recipe: Recipe, model: str) -> None:
    """Look before the warm start and the first episode, which may take long.

    Args:
        model: what the run begins with.

    Raises:
        RecipeError: listing every fault, one a line.
    """
    faults = [*_learner(recipe, model), *_policies(recipe, model)]
    if faults:
        raise RecipeError("\n".join(dict.fromkeys(faults)))


def _learner(recipe: Recipe, model: str) -> Iterator[str]:
    """What the learner's class says."""
    how = recipe.learner
    unfit: Callable[[Any, Callable[[], Any]], list[str]] | None
    unfit = getattr(how.plugin, "unfit", None)
    if unfit:
        trust = bool(getattr(how.config, "trust_remote_code", False))
        try:
            yield from unfit(how.config, partial(_layers, model, trust))
        except ModelError as error:
            yield f"policy.model: {error}"


def _layers(model: str, trust_remote_code: bool) -> Any:
    """The model without values: nothing of it is made or loaded for that."""
    if scratch.is_scratch(model):
        return bare(scratch.config_of(model))
    if graft.is_graft(model):
        return bare(graft.config_of(model))
    return bare(config_of(model, trust_remote_code), trust_remote_code)


def _policies(recipe: Recipe, model: str) -> Iterator[str]:
    """What the classes of those say that the run will open, now or when first asked."""
    named = [("policy", recipe.policy, model)]
    for name, section in recipe.policies.items():
        assert isinstance(section.config, PolicyConfig)
        named.append((f"policies.{name}", section, section.config.model))
    known = ("base", "policy", *recipe.policies)
    for judge in (recipe.judge, *(phase.judge for phase in recipe.phases)):
        asked = getattr(judge.config, "model", None)
        if hasattr(judge.plugin, "ask_through") and asked and asked not in known:
            named.append(("judge.model", recipe.policy, asked))
            if graft.is_graft(asked) or scratch.is_scratch(asked):
                yield (
                    f"judge.model: {asked} is to be made, and only the policy in training is made "
                    "here; give a model that is there, or base"
                )
    for key, section, wanted in named:
        if fault := _unready(section, wanted):
            yield f"{key}: {fault}"


def _unready(section: Section, model: str) -> str:
    """Why that policy cannot be opened; empty if it can, or if nobody knows."""
    if graft.is_graft(model):
        try:
            graft.config_of(model)
        except ModelError as error:
            return str(error)
        model = ""
    unready: Callable[[Any, str], str] | None = getattr(section.plugin, "unready", None)
    if unready is None:
        return ""
    return unready(section.config, "" if scratch.is_scratch(model) else model)
