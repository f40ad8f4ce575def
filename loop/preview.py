"""What a model would be asked at the beginning of a task, seen before anything is played."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

from ..core.config import PolicyConfig
from ..core.errors import WorldError
from ..core.hosting.pool import Worlds, open_worlds
from ..core.hosting.world import World
from ..core.models.open import open_tokens
from ..core.play.briefing import briefed
from ..core.play.draw import draw, starts
from ..core.play.players import Player
from ..core.play.rollout import rollouts
from ..core.protocols import Agent, Policy
from ..core.recipe import Recipe
from ..core.seeds import derive
from ..core.types import Action, Observation, Prompt, Step, Stop, Task, Trajectory
from .evaluate import player_of
from .warm_start import made_here


@dataclass
class Onlooker:
    """Looks at what it would be asked, and does nothing."""

    agent: Agent
    prompts: list[Prompt] = field(default_factory=list[Prompt])
    name: str = "onlooker"

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action | None:
        self.prompts.append(self.agent.prompt(task, history, observation))
        return None


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
        onlooker = Onlooker(recipe.agent.make())
        await _begun(onlooker, worlds, task, recipe.seed)
        (prompt,) = onlooker.prompts
        found: dict[str, Any] = {
            "task": task.id,
            "messages": [
                {"role": one.role, "text": one.text, "images": len(one.images)}
                for one in prompt.messages
            ],
            "tools": [tool.name for tool in prompt.tools],
        }
        return found | measured(recipe, prompt) | await _answered(recipe, worlds, task, answer)


def measured(recipe: Recipe, prompt: Prompt) -> dict[str, Any]:
    """The prompt in the model's own words and tokens; none where the run itself makes the model."""
    config = recipe.policy.config
    assert isinstance(config, PolicyConfig)
    if made_here(config) or not config.model:
        return {"text": None, "tokens": None, "max_tokens": config.max_tokens}
    tokens = open_tokens(config.model, bool(getattr(config, "trust_remote_code", False)))
    ids = tokens.prompt(prompt)
    text = tokens.tokenizer.decode(list(ids), clean_up_tokenization_spaces=False)
    return {"text": text, "tokens": len(ids), "max_tokens": config.max_tokens}


async def _answered(recipe: Recipe, worlds: Worlds, task: Task, wanted: bool) -> dict[str, Any]:
    config = recipe.policy.config
    assert isinstance(config, PolicyConfig)
    if not wanted:
        return {"answer": None}
    if made_here(config):
        raise WorldError(
            f"policy.model: {config.model} is made by the run, so there is nobody to ask before"
        )
    policy: Policy = recipe.policy.make(config.model, recipe.seed)
    try:
        player = player_of(config, recipe.agent.make(), policy, config.temperature)
        played = await _begun(player, worlds, task, recipe.seed)
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


async def _begun(player: Player, worlds: Worlds, task: Task, seed: int) -> Trajectory:
    """An episode of one turn. Raises: WorldError: it broke."""
    (played,) = await rollouts(player, worlds, starts([task], 1, seed, turns=1), seed)
    if played.stop == Stop.FAILED:
        raise WorldError(played.error)
    return played
