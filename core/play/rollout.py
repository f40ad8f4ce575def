"""Episodes: many at once, every wait under a deadline, every failure data."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from ..config import Rollout
from ..errors import Late, TooManyFailures, WorkerLost
from ..hosting.pool import Worlds
from ..hosting.process import LOSSES
from ..seeds import identify
from ..types import (
    Action,
    Observation,
    Start,
    Step,
    Stop,
    Trajectory,
)
from .episode import Episode, failed, play
from .players import Player
from .waiting import PATIENT, Failures, grouped


async def rollouts(
    player: Player,
    worlds: Worlds,
    starts: Sequence[Start],
    seed: int,
    done: Callable[[int], None] = lambda _: None,
    patience: Rollout = PATIENT,
    origin: str = "",
    stepped: Callable[[Step], None] = lambda _: None,
) -> list[Trajectory]:
    """Play every start, at most ``fleet.parallel`` at once; results in the order of ``starts``.

    An episode's id follows from ``origin``, ``seed``, its start and its place among them: whoever
    plays several rounds names each by another ``origin``.

    Several such rounds may be in play: a later one has its turn as an earlier one's last episodes
    are waited for.

    A world that breaks, hangs or returns rubbish gives a trajectory with ``Stop.FAILED`` and the
    error's name and words; that instance is thrown away. An episode whose worker on a cluster was
    lost is played again from its start elsewhere, with the same actions so far; lost once more
    after ``LOSSES`` times, it has failed. ``done`` is told how many have ended, ``stepped``
    of every step that was not replayed. Where ``patience`` closes a group, those still in play
    come back with ``Stop.FAILED`` and ``Late``, which is not counted as a failure, and those that
    had not begun do not come at all.

    Raises:
        TooManyFailures: more than ``fleet.max_failures`` of the starts failed; holds the first
            traceback.
    """
    many = _Round(player, worlds, starts, seed, done, patience, origin, stepped)
    # All slots are taken before the first one runs, so that the first batch is a full one. Those
    # that other rounds have still to leave are taken later: a policy would wait for them in vain.
    slots: list[ExitStack | None] = [None] * min(worlds.fleet.parallel, len(starts))
    try:
        for k in range(len(slots)):
            if worlds.slots.locked():
                break
            await worlds.slots.acquire()  # At once, so nobody else comes between.
            slots[k] = many.slot()
        async with asyncio.TaskGroup() as several:
            for slot in slots:
                several.create_task(many.fill(slot))
    except* TooManyFailures as several:
        raise several.exceptions[0] from None
    finally:
        for slot in slots:
            if slot is not None:
                slot.close()
    return [result for result in many.results if result is not None]


class _Round:
    """Episodes that are played together."""

    def __init__(
        self,
        player: Player,
        worlds: Worlds,
        starts: Sequence[Start],
        seed: int,
        done: Callable[[int], None],
        patience: Rollout,
        origin: str,
        stepped: Callable[[Step], None],
    ) -> None:
        self.results: list[Trajectory | None] = [None] * len(starts)
        self._player = player
        self._worlds = worlds
        self._seed = seed
        self._done = done
        self._origin = origin
        self._stepped = stepped
        self._groups = grouped(starts, patience)
        self._queue = iter(enumerate(starts))
        self._ended = 0
        self._failures = Failures(
            len(starts),
            worlds.fleet.max_failures,
            TooManyFailures,
            "episodes failed",
            "environment.max_failures",
        )

    def slot(self) -> ExitStack:
        """A place among the worlds' that was got, and one of the policy's; closing it gives both
        back."""
        slot = ExitStack()
        slot.callback(self._worlds.slots.release)
        slot.enter_context(self._player.batch_slot())
        return slot

    async def fill(self, slot: ExitStack | None) -> None:
        """Play one episode after another, while there are any."""
        if slot is None:
            await self._worlds.slots.acquire()
            slot = self.slot()
        # It is held across episodes: between two of them a policy still waits for us.
        with slot:
            for index, start in self._queue:
                if not self._groups[index].closed:
                    self.results[index] = await self._member(index, start)
                self._ended += 1
                self._done(self._ended)

    async def _member(self, index: int, start: Start) -> Trajectory:
        group, steps = self._groups[index], list[Step]()
        of = (start.task.id, start.seed, start.attempt, start.parent)
        id = identify(self._origin, self._seed, index, *of)
        try:
            async with group.member():
                trajectory = await self._attempt(start, id, steps)
        except Late as late:
            return failed(start, id, steps, self._player.name, late)
        if trajectory.stop != Stop.FAILED:
            group.end()
        return trajectory

    async def _attempt(self, start: Start, id: str, steps: list[Step]) -> Trajectory:
        chosen: list[tuple[Observation, Action]] = []
        losses, worlds = 0, self._worlds
        while True:
            try:
                async with worlds.lease() as world:
                    try:
                        episode = Episode(world, worlds, start, id, steps, chosen)
                        return await play(self._player, episode, self._seed, self._stepped)
                    except Exception:
                        worlds.discard(world)
                        raise
            except Exception as cause:
                again = worlds.spec.repeatable != "no"
                if again and isinstance(cause, WorkerLost) and losses < LOSSES:
                    losses += 1
                    steps.clear()
                    continue
                self._failures.add(cause)
                return failed(start, id, steps, self._player.name, cause)


def failures_by_name(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """How many episodes failed, by the error's name."""
    counts = Counter(t.error.split(":")[0] for t in trajectories if t.stop == Stop.FAILED)
    return dict(sorted(counts.items()))
