"""Everything a run works with: who plays, who judges, who learns, and what a trainer may use."""

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from ..core.checked import same
from ..core.config import JudgeConfig, PolicyConfig
from ..core.hosting.pool import Worlds, open_worlds
from ..core.play.asking import with_deadline
from ..core.play.judging import judged
from ..core.play.players import ExpertPlayer, Player
from ..core.play.rollout import rollouts
from ..core.protocols import (
    Agent,
    AsksPolicies,
    Attempt,
    Context,
    Judge,
    Learner,
    LearnerFactory,
    Policy,
    make_learner,
)
from ..core.recipe import Phase, Recipe, Section
from ..core.types import Completion, Judged, Sampling, Start, Task, Trajectory
from .evaluate import EvalSpec, player_of, sampling_of
from .progress import Progress
from .spending import Costs, costs_of, covered

BASE = "base"
"""What the model that a phase began with is called."""
POLICY = "policy"
"""What the policy in training is called."""
EXPERT = "expert"
"""What the world's own is called."""


@dataclass
class Components:
    """What a run works with: some of it throughout, some made anew by every phase (``start``)."""

    recipe: Recipe
    worlds: Worlds
    agent: Agent
    evaluation_judge: Judge
    """Who scores evaluations."""
    progress: Progress
    learner_factory: LearnerFactory = make_learner
    """Makes the learners."""
    phase: Phase = field(init=False)
    base: str = field(init=False)
    """The model that the phase began with."""
    policy: Policy = field(init=False)
    learner: Learner = field(init=False)
    judge: Judge = field(init=False)
    """Who scores what is learned from."""
    context: Context = field(init=False)
    opened: dict[str, Policy] = field(default_factory=dict[str, Policy])
    """All policies of the phase, by name."""
    blind: Worlds | None = None
    """Worlds that never say whether an attempt was right; opened when first asked for."""
    seed: int = 0
    """Of the iteration in hand."""
    version: int = 0
    """How many of the run's iterations the policy has learned from."""
    played: list[Judged] = field(default_factory=list[Judged])
    """Every episode of the iteration in hand."""
    rounds: int = 0
    """How often it was played on."""
    asked: int = 0
    """Tokens that were sampled outside of episodes, and not told of yet."""
    spent: Costs = field(default_factory=Costs)
    """By all iterations before the one in hand."""
    stopped: str = ""
    """Why the run ended before its last iteration."""

    def player(self, temperature: float | None = None) -> Player:
        """The policy in training; sampled as in training unless a temperature is given."""
        config = self.recipe.policy.config
        assert isinstance(config, PolicyConfig)
        heat = config.temperature if temperature is None else temperature
        return player_of(config, self.agent, self.policy, heat, lambda: self.version)

    def player_named(self, name: str) -> Player:
        """Who plays by that name, as ``Context.play_as`` has it, or ``policy``."""
        if name == POLICY:
            return self.player()
        if name == EXPERT:
            return ExpertPlayer(self.agent, timeout_s=self.recipe.fleet.step_timeout_s)
        config = self.config(name)
        return player_of(config, self.agent, self.find(name), config.temperature)

    @property
    def eval_spec(self) -> EvalSpec:
        recipe, settings = self.recipe, self.recipe.evaluation
        return EvalSpec(
            recipe.environment,
            recipe.agent,
            recipe.fleet,
            settings.split,
            settings.tasks,
            recipe.seed,
            settings.temperature,
            settings.turns,
            recipe.judge,
        )

    async def start(self, phase: Phase, base: str) -> None:
        """Begin ``phase`` with that base model.

        Raises:
            ModelError: it, or one that a judge asks, cannot be opened.
        """
        await self.leave()
        recipe = self.recipe
        self.phase, self.base = phase, base
        self.policy = self.opened[POLICY] = recipe.policy.make(base, recipe.seed)
        how = recipe.learner
        self.learner = self.learner_factory(how.plugin, how.config, base, recipe.seed)
        self.judge = self.evaluation_judge
        if phase.judge is not recipe.judge:
            self.judge = phase.judge.make()
        self.context = self._context()
        for judge in (self.evaluation_judge, self.judge):
            if isinstance(judge, AsksPolicies):
                judge.ask_through(self.context.open)
                # What cannot be opened is better known before anything is played.
                await judge.judge([])

    async def leave(self) -> None:
        """Close the phase's policies."""
        while self.opened:
            await self.opened.popitem()[1].close()

    async def close(self) -> None:
        await self.leave()
        if self.blind is not None:
            await self.blind.close()

    def section(self, name: str) -> Section:
        """How the policy of that name is opened and sampled."""
        return self.recipe.policies.get(name, self.recipe.policy)

    def config(self, name: str) -> PolicyConfig:
        config = self.section(name).config
        assert isinstance(config, PolicyConfig)
        return config

    def model_of(self, name: str) -> str:
        if name in (POLICY, BASE):
            return self.base
        return self.config(name).model if name in self.recipe.policies else name

    def find(self, name: str) -> Policy:
        """A policy by its name, opened when first asked for."""
        if name not in self.opened:
            section = self.section(name)
            self.opened[name] = section.make(self.model_of(name), self.recipe.seed)
        return self.opened[name]

    async def round(
        self, player: Player, begin: Sequence[Start], seed: int, what: str
    ) -> list[Judged]:
        """Play what an iteration begins with, and judge it."""
        with self.progress.stage(what, len(begin)) as stage:
            patience = self.recipe.rollout
            origin = self.recipe.identity
            done, stepped = stage.advance, stage.stepped
            played = await rollouts(
                player, self.worlds, begin, seed, done, patience, origin, stepped
            )
        return await self.judged(played)

    async def attempt(
        self, player: Player, begin: Sequence[Start], what: str, worlds: Worlds | None = None
    ) -> list[Judged]:
        """Play more, as far as the budget covers it, and judge it; it joins the iteration's."""
        self.rounds += 1
        spent = self.spent.and_more(costs_of(self.played, self.asked))
        begin = self.afforded(player, begin, spent, self.played, worlds)
        origin = f"{self.recipe.identity} {self.rounds}"
        where = worlds or self.worlds
        with self.progress.stage(what, len(begin)) as stage:
            done, stepped = stage.advance, stage.stepped
            played = await rollouts(
                player, where, begin, self.seed, done, origin=origin, stepped=stepped
            )
        given = await self.judged(played)
        self.played += given
        return given

    def afforded(
        self,
        player: Player,
        begin: Sequence[Start],
        spent: Costs,
        like: Sequence[Judged],
        worlds: Worlds | None = None,
    ) -> Sequence[Start]:
        """Of the episodes those that the budget still covers; ``spent``, ``like``: ``covered``."""
        asks = not isinstance(player, ExpertPlayer)
        # What was played in these worlds was not played in others: there it is replayed first.
        replays = worlds is not None or self.worlds.snapshots is None
        kept = covered(begin, spent, self.recipe.budget, like, asks, replays)
        if len(kept) < len(begin):
            self.progress.say(f"the budget covers {len(kept)} of {len(begin)} more episodes")
        return kept

    async def judged(self, played: Sequence[Trajectory]) -> list[Judged]:
        config = self.phase.judge.config
        assert isinstance(config, JudgeConfig)
        return await judged(self.judge, played, config)

    def _context(self) -> Context:
        """What the phase's trainer may use."""

        async def play(begin: Sequence[Start]) -> list[Judged]:
            return await self.attempt(self.player(), begin, "playing on")

        async def play_blind(begin: Sequence[Start]) -> list[Judged]:
            if self.blind is None:
                world = self.recipe.environment
                settings = world.config.model_dump(mode="json")
                self.blind = await open_worlds(
                    world.use, settings, self.recipe.fleet, without_oracle=True
                )
                if self.worlds.snapshots is not None:
                    self.blind.keep_snapshots()
            return await self.attempt(self.player(), begin, "playing on", self.blind)

        def count(completion: Completion) -> None:
            self.asked += len(completion.token_ids)

        async def find(name: str) -> Policy:
            return with_deadline(self.find(name), self.config(name).timeout_s, count)

        async def play_as(name: str) -> Attempt:
            player = self.player_named(name)

            async def teach(begin: Sequence[Start]) -> list[Judged]:
                return await self.attempt(player, begin, f"{name} playing on")

            return teach

        def sampling(name: str) -> Sampling:
            config = self.config(name)
            return sampling_of(config, config.temperature)

        return Context(
            agent=self.agent,
            judge=self.judge,
            policy=with_deadline(self.policy, self.config(POLICY).timeout_s, count),
            attempt=play,
            attempt_blind=play_blind,
            play_as=play_as,
            open=find,
            model_of=self.model_of,
            sampling_of=sampling,
            named=namer(self.worlds),
            base=self.base,
            seed=self.recipe.seed,
        )


SCANNED = 100_000
"""Training tasks that are looked through for a name, in worlds that cannot look it up."""
BATCH = 4096
"""Tasks asked for at once."""


def namer(worlds: Worlds) -> Callable[[str], Awaitable[Task]]:
    """Finds training tasks by their ids; raises ValueError where there is none.

    And WorldError where it is no task, or two share an id.
    """
    found: dict[str, Task] = {}

    async def named(id: str) -> Task:
        if "named" in worlds.abilities:
            return await worlds.named(id)
        if not found:
            tasks = worlds.tasks("train")
            size = min(await tasks.size(), SCANNED)
            for k in range(0, size, BATCH):
                for task in await tasks.take(range(k, min(k + BATCH, size))):
                    same(found.setdefault(task.id, task), task)
        if id not in found:
            raise ValueError(f"there is no training task {id!r}")
        return found[id]

    return named
