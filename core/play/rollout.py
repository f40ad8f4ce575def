"""Episodes: many at once, every wait under a deadline, every failure data."""

import asyncio
import math
import random
import traceback
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Protocol

from ..checked import checked_completion, mended, no_text
from ..config import Rollout
from ..errors import Late, PolicyError, TooManyFailures, WorkerLost, WorldError
from ..hosting.pool import Worlds
from ..hosting.process import LOSSES
from ..hosting.world import World
from ..protocols import Agent, Policy
from ..seeds import derive, identify
from ..types import (
    Action,
    Completion,
    Observation,
    Prompt,
    Sampling,
    Start,
    Step,
    Stop,
    Task,
    TimeStep,
    Trajectory,
)


class Player(Protocol):
    """Whoever acts."""

    @property
    def name(self) -> str: ...
    def batch_slot(self) -> AbstractContextManager[None]: ...
    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action | None:
        """The next action; None gives up."""
        ...


@dataclass(frozen=True)
class PolicyPlayer:
    """A model, through its agent."""

    agent: Agent
    policy: Policy
    sampling: Sampling
    timeout_s: float = 600.0
    listed: bool = False
    """Restrict completions to the actions a world lists."""
    version: Callable[[], int] = lambda: -1
    """From how many iterations the policy has learned by now; -1: unknown."""

    @property
    def name(self) -> str:
        return self.policy.checkpoint

    def batch_slot(self) -> AbstractContextManager[None]:
        return self.policy.batch_slot()

    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action | None:
        return await self.answer(task, history, observation, seed)

    async def answer(
        self, task: Task, history: Sequence[Step], observation: Observation, seed: int
    ) -> Action:
        """What it does; no world is needed for that.

        Raises:
            PolicyError: what was said, or what the agent made of it, is no text.
        """
        sampling = self.sampling
        if self.listed and observation.actions:
            sampling = Sampling(
                sampling.temperature,
                sampling.top_p,
                sampling.max_tokens,
                sampling.stop,
                observation.actions,
            )
        prompt = sharing(self.agent.prompt(task, history, observation), history)
        version = self.version()
        async with deadline(self.timeout_s, "the policy's completion"):
            completion = await self.policy.complete(prompt, sampling, seed)
        completion = replace(checked_completion(completion, self.name), version=version)
        parsed = self.agent.parse(completion.text, observation)
        for text in (parsed.action, parsed.invalid):
            if fault := no_text(text):
                raise PolicyError(f"{type(self.agent).__name__}.parse gave {fault}; wanted a str")
        return Action(parsed.action, completion, prompt, parsed.invalid)


def sharing(prompt: Prompt, history: Sequence[Step]) -> Prompt:
    """``prompt``, holding the very messages that the one before began with.

    So the prompts of an episode take memory in proportion to its turns, not to their square.
    """
    if not history:
        return prompt
    before, now = history[-1].action.prompt.messages, prompt.messages
    same = next(
        (k for k, (a, b) in enumerate(zip(before, now, strict=False)) if a != b),
        min(len(before), len(now)),
    )
    return replace(prompt, messages=before[:same] + now[same:])


@dataclass(frozen=True)
class ExpertPlayer:
    """The world's own expert; with ``noise``, that share of its actions is random instead.

    Its actions carry the prompts that ``agent`` would have shown a model, to be learned from.
    """

    agent: Agent | None = None
    noise: float = 0.0
    timeout_s: float = 30.0
    """Deadline of one action."""
    name: str = "expert"

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    def errs(self, seed: int) -> bool:
        """Whether the action drawn with this seed is a random one."""
        return self.noise > 0 and random.Random(seed).random() < self.noise

    async def act(
        self,
        world: World,
        task: Task,
        history: Sequence[Step],
        observation: Observation,
        seed: int,
    ) -> Action | None:
        async with deadline(self.timeout_s, "the world's expert"):
            text = (
                await uniform(world, observation, seed) if self.errs(seed) else await world.expert()
            )
        if text is None:
            return None
        return Action(text, Completion(text), unasked(self.agent, task, history, observation))


@dataclass(frozen=True)
class RandomPlayer:
    """Uniform over the listed actions, or over whatever the world calls random.

    Its actions carry prompts as the expert's do.
    """

    agent: Agent | None = None
    timeout_s: float = 30.0
    """Deadline of one action."""
    name: str = "random"

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
        async with deadline(self.timeout_s, "the world's random action"):
            text = await uniform(world, observation, seed)
        return Action(text, Completion(text), unasked(self.agent, task, history, observation))


def unasked(
    agent: Agent | None, task: Task, history: Sequence[Step], observation: Observation
) -> Prompt:
    """What a model would have been shown, where another one acts; empty without an agent."""
    if agent is None:
        return Prompt()
    return sharing(agent.prompt(task, history, observation), history)


async def uniform(world: World, observation: Observation, seed: int) -> str:
    if observation.actions:
        return random.Random(seed).choice(observation.actions)
    return await world.random(seed)


class deadline:
    """``async with deadline(seconds, what)``: a timeout that says what was waited for."""

    def __init__(self, seconds: float, what: str) -> None:
        self._timeout = asyncio.timeout(seconds)
        self._seconds = seconds
        self._what = what

    async def __aenter__(self) -> None:
        await self._timeout.__aenter__()

    async def __aexit__(self, *exc: object) -> bool | None:
        try:
            return await self._timeout.__aexit__(*exc)  # pyright: ignore[reportArgumentType]
        except TimeoutError:
            raise TimeoutError(f"{self._what} took longer than {self._seconds:g} s") from None


@dataclass
class Failures:
    """Counts what went wrong, until it is too much."""

    of: int
    """How many were tried."""
    allowed: float
    """The share of them that may fail."""
    error: type[Exception]
    what: str
    setting: str
    """The recipe's key that says how many may fail."""
    first: str = ""
    """The first traceback."""
    count: int = 0

    def add(self, cause: BaseException) -> None:
        """Raises: ``error``: it was one too many; holds the first traceback."""
        self.count += 1
        self.first = self.first or "".join(traceback.format_exception(cause)).rstrip()
        if self.count > self.allowed * self.of:
            raise self.error(
                f"{self.count} of {self.of} {self.what}, more than "
                f"{self.setting}={self.allowed:g} allows; the first:\n{self.first}"
            ) from None


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
    limit = task.max_steps if start.turns is None else prefix + start.turns
    while not episode.over and len(steps) < min(limit, task.max_steps):
        turn = turn_seed(seed, start, len(steps))
        seen = episode.observation
        action = await player.act(episode.world, task, steps, seen, turn)
        if action is None:
            break
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


@dataclass
class Group:
    """A task's attempts: closed when enough of them have ended, or when it is time."""

    size: int
    enough: int
    timeout_s: float | None
    ended: int = 0
    due: float | None = None
    """On the event loop's clock, known once the first has begun."""
    playing: set[asyncio.Timeout] = field(default_factory=set[asyncio.Timeout])

    @property
    def closed(self) -> bool:
        late = self.due is not None and asyncio.get_running_loop().time() >= self.due
        return late or self.ended >= self.enough

    @asynccontextmanager
    async def member(self) -> AsyncGenerator[None]:
        """While one is played. Raises: Late: it was not at its end when the group closed."""
        if self.due is None and self.timeout_s is not None:
            self.due = asyncio.get_running_loop().time() + self.timeout_s
        limit = asyncio.timeout_at(self.due)
        try:
            async with limit:
                self.playing.add(limit)
                try:
                    yield
                finally:
                    self.playing.discard(limit)
        except TimeoutError:
            if not limit.expired():
                raise
            why = f"{self.ended} of {self.size} attempts had ended well"
            if self.ended < self.enough:
                why += f" after {self.timeout_s:g} s"
            raise Late(why) from None

    def end(self) -> None:
        """One has ended well."""
        self.ended += 1
        if self.ended == self.enough:
            for limit in self.playing:
                if not limit.expired():
                    limit.reschedule(asyncio.get_running_loop().time())


PATIENT = Rollout.model_validate({})


def grouped(starts: Sequence[Start], patience: Rollout) -> list[Group]:
    """The group of each start: those of one task with one seed share it."""
    keys = [(start.task.id, start.seed) for start in starts]
    made = {
        key: Group(size, math.ceil(patience.enough * size), patience.group_timeout_s)
        for key, size in Counter(keys).items()
    }
    return [made[key] for key in keys]


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
    fleet = worlds.fleet
    results: list[Trajectory | None] = [None] * len(starts)
    groups = grouped(starts, patience)
    queue = iter(enumerate(starts))
    failures = Failures(
        len(starts),
        fleet.max_failures,
        TooManyFailures,
        "episodes failed",
        "environment.max_failures",
    )
    ended = 0

    async def slot(seat: ExitStack | None) -> None:
        nonlocal ended
        if seat is None:
            await worlds.slots.acquire()
            seat = seated()
        # The seat is held across episodes: between two of them a policy still waits for us.
        with seat:
            for index, start in queue:
                if not groups[index].closed:
                    results[index] = await member(index, start)
                ended += 1
                done(ended)

    def seated() -> ExitStack:
        """In a slot that was got; both are given back when it closes."""
        seat = ExitStack()
        seat.callback(worlds.slots.release)
        seat.enter_context(player.batch_slot())
        return seat

    async def member(index: int, start: Start) -> Trajectory:
        group, steps = groups[index], list[Step]()
        id = identify(origin, seed, index, start.task.id, start.seed, start.attempt, start.parent)
        try:
            async with group.member():
                trajectory = await attempt(start, id, steps)
        except Late as late:
            return failed(start, id, steps, player.name, late)
        if trajectory.stop != Stop.FAILED:
            group.end()
        return trajectory

    async def attempt(start: Start, id: str, steps: list[Step]) -> Trajectory:
        chosen: list[tuple[Observation, Action]] = []
        losses = 0
        while True:
            try:
                async with worlds.lease() as world:
                    try:
                        episode = Episode(world, worlds, start, id, steps, chosen)
                        return await play(player, episode, seed, stepped)
                    except Exception:
                        worlds.discard(world)
                        raise
            except Exception as cause:
                again = worlds.spec.repeatable != "no"
                if again and isinstance(cause, WorkerLost) and losses < LOSSES:
                    losses += 1
                    steps.clear()
                    continue
                failures.add(cause)
                return failed(start, id, steps, player.name, cause)

    # All seats are taken before the first slot runs, so that the first batch is a full one. Those
    # that other rounds have still to leave are taken later: a policy would wait for them in vain.
    seats: list[ExitStack | None] = [None] * min(fleet.parallel, len(starts))
    try:
        for k in range(len(seats)):
            if worlds.slots.locked():
                break
            await worlds.slots.acquire()  # At once, so nobody else comes between.
            seats[k] = seated()
        async with asyncio.TaskGroup() as several:
            for seat in seats:
                several.create_task(slot(seat))
    except* TooManyFailures as several:
        raise several.exceptions[0] from None
    finally:
        for seat in seats:
            if seat is not None:
                seat.close()
    return [result for result in results if result is not None]


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


def failures_by_name(trajectories: Sequence[Trajectory]) -> dict[str, int]:
    """How many episodes failed, by the error's name."""
    counts = Counter(t.error.split(":")[0] for t in trajectories if t.stop == Stop.FAILED)
    return dict(sorted(counts.items()))
