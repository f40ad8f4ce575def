"""What a model would be asked at the beginning of a task, seen before anything is played."""

from dataclasses import asdict, replace
from typing import Any

from ..core.errors import WorldError
from ..core.hosting.pool import Worlds, open_worlds
from ..core.models.open import open_tokens
from ..core.play.briefing import briefed
from ..core.play.draw import draw, starts
from ..core.play.players import ExpertPlayer, Player, constraint_of
from ..core.play.rollout import rollouts
from ..core.protocols import Agent, Policy
from ..core.recipe import Recipe
from ..core.seeds import derive
from ..core.types import Observation, Prompt, Stop, Task, Trajectory
from .evaluate import player_of
from .run import policy_of, trusting
from .warm_start import made_here


async def preview(recipe: Recipe, split: str, number: int, answer: bool) -> dict[str, Any]:
    """The prompt of a run's first turn, and how long it is.

    Args:
        number: which of the tasks that the recipe's seed draws from ``split``, from 0 on.
        answer: also ask the model once, as in training, and read what it says.

    Raises:
        RecipeError, ModelError: the agent cannot be told of its world, the model not be opened.
        WorldError: there is no such task, or its world cannot be entered.
    """
    settings = recipe.environment.config.model_dump(mode="json")
    async with await open_worlds(recipe.environment.use, settings, recipe.fleet) as worlds:
        tasks = await draw(worlds.tasks(split), number + 1, derive(recipe.seed, "preview"))
        if number >= len(tasks):
            raise WorldError(f"{split} holds {len(tasks)} tasks; there is no number {number}")
        task = tasks[number]
        recipe = replace(recipe, agent=await briefed(recipe.agent, worlds, recipe.seed))
        # An episode of no turns ends at what is seen first.
        seen = (await _played(ExpertPlayer(), worlds, task, recipe.seed, 0)).final
        agent: Agent = recipe.agent.make()
        prompt = agent.prompt(task, (), seen)
        found: dict[str, Any] = {
            "task": task.id,
            "messages": [
                {"role": one.role, "text": one.text, "images": len(one.images)}
                for one in prompt.messages
            ],
            "tools": [tool.name for tool in prompt.tools],
            "constraint": _held(recipe, agent, seen),
        }
        return found | measured(recipe, prompt) | await _answered(recipe, worlds, task, answer)


def _held(recipe: Recipe, agent: Agent, seen: Observation) -> dict[str, Any] | None:
    """What an answer would be held to, if to anything."""
    held = constraint_of(agent, seen) if policy_of(recipe).constrain else None
    return asdict(held) if held else None


def measured(recipe: Recipe, prompt: Prompt) -> dict[str, Any]:
    """The prompt in the model's own words and tokens; none where the run itself makes the model."""
    config = policy_of(recipe)
    if made_here(config) or not config.model:
        return {"text": None, "tokens": None, "max_tokens": config.max_tokens}
    tokens = open_tokens(config.model, trusting(recipe))
    ids = tokens.prompt(prompt)
    text = tokens.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return {"text": text, "tokens": len(ids), "max_tokens": config.max_tokens}


async def _answered(recipe: Recipe, worlds: Worlds, task: Task, wanted: bool) -> dict[str, Any]:
    if not wanted:
        return {"answer": None}
    config = policy_of(recipe)
    if made_here(config):
        raise WorldError(
            f"policy.model: {config.model} is made by the run, so there is nobody to ask before"
        )
    policy: Policy = recipe.policy.make(config.model, recipe.seed)
    try:
        player = player_of(config, recipe.agent.make(), policy, config.temperature)
        played = await _played(player, worlds, task, recipe.seed, 1)
    finally:
        await policy.close()
    action = played.steps[0].action
    return {
        "answer": {
            "text": action.completion.text,
            "tokens": len(action.completion.token_ids),
            "finish": action.completion.finish,
            "action": action.text,
            "invalid": action.invalid,
        }
    }


async def _played(player: Player, worlds: Worlds, task: Task, seed: int, turns: int) -> Trajectory:
    """An episode of so many turns. Raises: WorldError: it broke."""
    (played,) = await rollouts(player, worlds, starts([task], 1, seed, turns), seed)
    if played.stop == Stop.FAILED:
        raise WorldError(played.error)
    return played
