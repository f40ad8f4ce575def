"""One episode, from its start to its end, or to what broke it."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..checked import mended
from ..errors import WorldError
from ..hosting.pool import Worlds
from ..hosting.world import World
from ..seeds import derive
from ..types import (
    Action,
    Observation,
    Start,
    Step,
    Stop,
    TimeStep,
    Trajectory,
)
from .players import Player, PolicyPlayer
from .waiting import deadline


def turn_seed(seed: int, start: Start, turn: int) -> int:
    """The seed of one action: of the round's seed, the task, the attempt and the turn."""
    return derive(seed, start.task.id, start.attempt, turn)


@dataclass
class Episode:
    """One in play. ``steps`` and ``chosen`` grow as it goes.

    ``chosen``: what the player has done so far, and what it saw then. An episode whose worker was
    lost is played again with it: nobody is asked twice, so nothing comes out otherwise.
    """

    world: World
    worlds: Worlds
    start: Start
    id: str
    steps: list[Step]
    chosen: list[tuple[Observation, Action]]
    restored: int = 0
    """How many leading steps were not executed again, as the world went on from a snapshot."""
    last: TimeStep | None = None
    _seen: Observation | None = None

    @property
    def observation(self) -> Observation:
        assert self._seen is not None, "it has begun"
        return self._seen

    @property
    def over(self) -> bool:
        return over(self.last)

    async def begin(self) -> None:
        """Bring the world to where the start says.

        Raises:
            WorldError: it did not repeat itself.
        """
        prefix, kept = self.start.prefix, self.worlds.snapshots
        self.world.snapshots = kept is not None
        actions = [_played(step.action) for step in prefix]
        state = ""
        if kept is not None:
            self.restored, state = kept.find(self.start.parent, actions)
            kept.begin(self.id, self.start.parent, actions[: self.restored])
        async with deadline(self.worlds.fleet.reset_timeout_s, "the world's reset"):
            if state:
                self._seen = await self.world.restore(self.start.task, state)
            else:
                self._seen = await self.world.reset(self.start.task, self.start.seed)
        self.steps += prefix[: self.restored]
        for step in prefix[self.restored :]:
            await self.again(step.observation, step.action)
        for before, action in [*self.chosen]:
            await self.again(before, action)

    async def again(self, before: Observation, action: Action) -> None:
        """Raises: WorldError: the world does not show what it showed then."""
        rule = self.worlds.spec.repeatable
        fault = unlike(self.observation, before, rule)
        if fault or self.over:
            raise WorldError(
                f"{self.start.task.id!r} did not repeat itself: replaying action "
                f"{len(self.steps) + 1} met {fault or 'its end, where it went on before'}; "
                "a world must depend on nothing but its task, its seed and its actions, or its "
                "spec must say how far it is repeatable"
            )
        await self.execute(action)

    async def execute(self, action: Action) -> None:
        before = self.observation
        async with deadline(self.worlds.fleet.step_timeout_s, "the world's step"):
            self.last = await executed(self.world, before, action)
        self.steps.append(Step(before, action, self.last.reward, self.last.answer))
        self._seen = self.last.observation
        if (kept := self.worlds.snapshots) is not None:
            kept.put(self.id, _played(action), "" if self.over else self.world.snapshot)


def _played(action: Action) -> str:
    """What tells an action from another one: its text, or why it held none."""
    return f"!{action.invalid}" if action.invalid else f">{action.text}"


async def play(
    player: Player,
    episode: Episode,
    seed: int,
    stepped: Callable[[Step], None] = lambda _: None,
) -> Trajectory:
    """An episode from its start to its end; ``stepped`` is told each of the player's steps.

    Raises whatever the world, or the policy, raised; ``TimeoutError`` past a deadline.
    """
    start, steps = episode.start, episode.steps
    task, prefix = start.task, len(start.prefix)
    await episode.begin()
    answers = sum(not action.place for _, action in episode.chosen)
    while not episode.over and len(steps) < task.max_steps:
        seen, turn = episode.observation, turn_seed(seed, start, len(steps))
        if answers == start.turns:
            # Of what was answered something may be left to do.
            action = player.more(steps, seen) if isinstance(player, PolicyPlayer) else None
        else:
            action = await player.act(episode.world, task, steps, seen, turn)
        if action is None:
            break
        answers += not action.place
        episode.chosen.append((seen, action))
        await episode.execute(action)
        stepped(steps[-1])
    last = episode.last
    return Trajectory(
        task,
        tuple(steps),
        episode.observation,
        Stop.TERMINATED if last is not None and last.terminated else Stop.TRUNCATED,
        player.name,
        start.seed,
        start.attempt,
        prefix,
        last is not None and last.success,
        id=episode.id,
        parent=start.parent,
        restored=episode.restored,
    )


async def executed(world: World, observation: Observation, action: Action) -> TimeStep:
    """What the world answers; what holds no action is answered for it, in words."""
    if action.invalid:
        seen = replace(observation, text=action.invalid)
        return TimeStep(seen, 0.0, terminated=False, answer="" if world.attempts else None)
    return await world.step(action.text)


def unlike(met: Observation, before: Observation, rule: str = "exact") -> str:
    """Where two observations differ in what a world that is so repeatable repeats; empty: nowhere.

    ``rule``: as ``WorldSpec.repeatable``.
    """
    names = {"exact": ("text", "actions", "images", "actor"), "text": ("text", "actor"), "no": ()}
    for name in names[rule]:
        a, b = getattr(met, name), getattr(before, name)
        if a != b:
            return f"the {name} {str(a)[:80]!r} where {str(b)[:80]!r} was before"
    return ""


def over(last: TimeStep | None) -> bool:
    return last is not None and (last.terminated or last.truncated)


def failed(
    start: Start, id: str, steps: Sequence[Step], policy: str, cause: BaseException
) -> Trajectory:
    return Trajectory(
        start.task,
        tuple(steps),
        Observation(""),
        Stop.FAILED,
        policy,
        start.seed,
        start.attempt,
        min(len(start.prefix), len(steps)),
        error=mended(f"{type(cause).__name__}: {cause}"),
        id=id,
        parent=start.parent,
    )
