"""What an agent is told of its world before it acts: its tools, and how its expert does tasks."""

from collections.abc import Callable
from dataclasses import replace

from ..config import Config, Shot, Turn
from ..errors import RecipeError
from ..hosting.pool import Worlds
from ..protocols import Briefing
from ..sections import Section
from ..seeds import derive
from ..types import Trajectory
from .draw import draw, starts
from .players import ExpertPlayer
from .rollout import rollouts

TRIES = 4
"""So many tasks are tried for each that the expert is to be seen solving."""


def wants_briefing(agent: Section) -> bool:
    return hasattr(agent.plugin, "briefed")


def shots_wanted(agent: Section) -> int:
    """How many shots it is still to be told of."""
    return agent.plugin.shots(agent.config) if wants_briefing(agent) else 0


async def briefed(agent: Section, worlds: Worlds, seed: int) -> Section:
    """The section ``agent``, told of its world; as it is, if its class wants no briefing.

    Raises:
        RecipeError: it wants to be shown more tasks than the world's expert solves.
    """
    if not wants_briefing(agent):
        return agent
    brief: Callable[[Config, Briefing], Config] = agent.plugin.briefed
    count = shots_wanted(agent)
    shots = await _shots(worlds, count, derive(seed, "shots")) if count else ()
    return replace(agent, config=brief(agent.config, Briefing(worlds.spec.tools, shots)))


async def _shots(worlds: Worlds, count: int, seed: int) -> tuple[Shot, ...]:
    """One more than ``count``, as one may be of the task at hand; all of training tasks."""
    if "expert" not in worlds.abilities:
        raise RecipeError(
            f"agent.shots: {count} is for worlds with an expert, which this one lacks; write shots "
            "of your own as agent.examples, or do without"
        )
    limit = worlds.fleet.step_timeout_s
    tasks = await draw(worlds.tasks("train"), TRIES * (count + 1), seed)
    done = await rollouts(ExpertPlayer(timeout_s=limit), worlds, starts(tasks, 1, seed), seed)
    solved = [shot_of(one) for one in done if one.success]
    if len(solved) <= count:
        raise RecipeError(
            f"agent.shots: {count} and one to spare were wanted, but the world's expert solved "
            f"{len(solved)} of {len(tasks)} training tasks; ask for fewer"
        )
    return tuple(solved[: count + 1])


def shot_of(trajectory: Trajectory) -> Shot:
    """An episode as it is shown; of pictures nothing is."""
    turns = tuple(
        Turn(
            text=step.observation.text,
            actions=step.observation.actions,
            action=step.action.text,
        )
        for step in trajectory.steps
    )
    return Shot(task=trajectory.task.id, instruction=trajectory.task.instruction, turns=turns)
