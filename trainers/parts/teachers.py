"""Whom a policy learns from: the world's expert, other models, stored trajectories, several."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, TypeAlias

from pydantic import AfterValidator, Field

from ...core.play.asking import score_all
from ...core.protocols import Context
from ...core.store import holds_episodes
from ...core.types import Judged, Start
from ..learning.examples import asked
from .credit import by_task, stored

PARQUET = ".parquet"
"""What a path to stored episodes ends in; a folder would be taken for a model's."""


def known(names: list[str]) -> list[str]:
    """Raises: ValueError: there are no episodes where some of the names say so."""
    for name in names:
        if name.endswith(PARQUET) and not holds_episodes(Path(name)):
            raise ValueError(f"there are no episodes of a teacher at {name!r}")
    return names


TeacherNames: TypeAlias = Annotated[list[str], Field(min_length=1), AfterValidator(known)]
"""Whom to be like: ``expert``, the world's; others by their names, models' folders, hub ids;
stored episodes (runs/NAME/iterations/0003/episodes.parquet). Each gives its share of the
responses."""


class Teachers:
    """``names``: ``expert``, model folders, hub ids, or stored episodes (``episodes.parquet``)."""

    def __init__(self, names: Sequence[str], context: Context) -> None:
        """Raises: StoreError: a file is missing or damaged."""
        self._names = names
        self._context = context
        self._stored: dict[str, dict[str, list[Judged]]] = {}
        for name in names:
            if name.endswith(PARQUET):
                known = self._stored.setdefault(name, {})
                for group in by_task(stored(Path(name), context.agent)):
                    known.setdefault(group[0].trajectory.task.id, []).extend(group)

    async def respond(
        self, groups: Sequence[Sequence[Judged]], count: int | None
    ) -> list[list[Judged]]:
        """Per group, ``count`` responses to its task by all teachers together, in turn.

        None: as many as the group has. Fewer where a stored teacher has not met the task, or a
        response was empty or could not be judged or scored. They carry the policy's own
        log-probabilities.

        Raises:
            PolicyError: the policy can score less than half of what was said.
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
        scored = await self._scored([one for one in found if one.trajectory.steps])
        by_id = {group[0].trajectory.task.id: group for group in by_task(scored)}
        return [by_id.get(group[0].trajectory.task.id, []) for group in groups]

    def _read(self, name: str, starts: Sequence[Start]) -> list[Judged]:
        return [
            replace(one, trajectory=replace(one.trajectory, seed=start.seed))
            for start in starts
            if (those := self._stored[name].get(start.task.id))
            for one in [those[start.attempt // len(self._names) % len(those)]]
        ]

    async def _scored(self, many: Sequence[Judged]) -> list[Judged]:
        """With the policy's log-probabilities; without those that it cannot score whole."""
        questions = [
            (asked(t, turn), step.action.completion)
            for t in (one.trajectory for one in many)
            for turn in t.answers
            for step in [t.steps[turn]]
        ]
        answers = iter(await score_all(self._context.policy, questions))
        scored: list[Judged] = []
        for one in many:
            steps = [*one.trajectory.steps]
            own = {turn: next(answers) for turn in one.trajectory.answers}
            for turn, text in own.items():
                if text is not None:
                    action = replace(steps[turn].action, completion=text)
                    steps[turn] = replace(steps[turn], action=action)
            if None not in own.values():
                scored.append(replace(one, trajectory=replace(one.trajectory, steps=tuple(steps))))
        return scored
