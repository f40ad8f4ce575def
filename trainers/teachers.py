"""Whom a policy learns from: the world's expert, other models, stored trajectories, several."""

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..core.protocols import Context
from ..core.store import read_trajectories
from ..core.types import Judged, Start, Step
from .credit import by_task

PARQUET = ".parquet"


class Teachers:
    """``names``: ``expert``, model folders, hub ids, or parquet files as runs store them."""

    def __init__(self, names: Sequence[str], context: Context) -> None:
        """Raises: StoreError: a file is missing or damaged."""
        self._names = names
        self._context = context
        self._stored = {
            name: {group[0].trajectory.task.id: group for group in by_task(read_trajectories(file))}
            for name in names
            if (file := Path(name)).suffix == PARQUET
        }

    async def respond(
        self, groups: Sequence[Sequence[Judged]], count: int | None
    ) -> list[list[Judged]]:
        """Per group, ``count`` responses to its task by all teachers together, in turn.

        None: as many as the group has. Fewer where a stored teacher has not met the task, or a
        response could not be judged. They carry the policy's own log-probabilities.
        """
        found: list[Judged] = []
        for place, name in enumerate(self._names):
            starts = [
                Start(group[0].trajectory.task, group[0].trajectory.seed, attempt)
                for group in groups
                for attempt in range(
                    place, len(group) if count is None else count, len(self._names)
                )
            ]
            if name in self._stored:
                found += self._read(name, starts)
            elif starts:
                found += await (await self._context.play_as(name))(starts)
        scored = await asyncio.gather(*map(self._scored, found))
        by_id = {group[0].trajectory.task.id: group for group in by_task(scored)}
        return [by_id.get(group[0].trajectory.task.id, []) for group in groups]

    def _read(self, name: str, starts: Sequence[Start]) -> list[Judged]:
        return [
            replace(one, trajectory=replace(one.trajectory, seed=start.seed))
            for start in starts
            if (those := self._stored[name].get(start.task.id))
            for one in [those[start.attempt % len(those)]]
        ]

    async def _scored(self, one: Judged) -> Judged:
        context, steps = self._context, list[Step]()
        for step in one.trajectory.steps:
            prompt = context.agent.prompt(one.trajectory.task, steps, step.observation)
            said = await context.policy.score(prompt, step.action.completion)
            steps.append(replace(step, action=replace(step.action, completion=said)))
        return replace(one, trajectory=replace(one.trajectory, steps=tuple(steps)))


def missing(names: Sequence[str]) -> list[str]:
    """The files among them that are not there."""
    return [name for name in names if name.endswith(PARQUET) and not Path(name).is_file()]
