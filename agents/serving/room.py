"""What a server serves, and what all of its requests share."""

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from ...core.models.tokens import ChatTokens
from ...core.play.players import PolicyPlayer
from ...core.play.waiting import deadline
from ...core.types import (
    Action,
    Completion,
    Image,
    Observation,
    Prompt,
    Sampling,
)
from .champion import Champion, Trial
from .games import Arena, Game, Opener
from .guarded_policy import GuardedPolicy
from .images import checked_images
from .limits import Limits
from .metrics import Metrics
from .sessions import Keeper, SessionState

SWEEP_S = 30.0
"""So often idle sessions and games are looked for, though nobody asks."""


@dataclass(frozen=True)
class Served:
    """What a server serves."""

    name: str
    """Of the model, in ``/v1/models``."""
    player: PolicyPlayer
    """The agent, its policy, and how it is sampled."""
    weights: Path | None = None
    """What the policy has loaded; None: its base."""
    tokens: ChatTokens | None = None
    """The policy's, if they are known here."""
    worlds: Mapping[str, Opener] = field(default_factory=dict[str, Opener])
    """Of the playground, the first one first."""
    adapters: Path | None = None
    """The folder that new adapters may come from."""
    trial: Trial | None = None


class Room:
    """What all requests of one server share."""

    def __init__(self, served: Served, limits: Limits, clock: Callable[[], float]) -> None:
        self.served = served
        self.limits = limits
        self.metrics = Metrics()
        policy = served.player.policy
        self.champion = Champion(
            policy, served.weights, served.adapters, served.trial, limits, self.metrics
        )
        self.policy = GuardedPolicy(policy, served.tokens, self.champion, limits, self.metrics)
        self.player = replace(served.player, policy=self.policy)
        self.sessions: Keeper[SessionState] = Keeper(
            "session", limits.sessions, limits.idle_s, clock, lambda _: None
        )
        self.games: Keeper[Game] = Keeper("game", limits.games, limits.idle_s, clock, self._leave)
        self.arena = Arena(served.worlds)
        self.created = int(time.time())
        self._leaving: set[asyncio.Task[None]] = set()

    def _leave(self, game: Game) -> None:
        leaving = asyncio.create_task(game.lease.aclose())
        self._leaving.add(leaving)
        leaving.add_done_callback(self._leaving.discard)

    async def sweep(self) -> None:
        """End what is idle for too long, for ever: its worlds are worth more than its id."""
        while True:
            await asyncio.sleep(min(self.limits.idle_s, SWEEP_S))
            self.sessions.sweep()
            self.games.sweep()

    async def close(self) -> None:
        await self.champion.close()
        self.games.clear()
        await asyncio.gather(*self._leaving, return_exceptions=True)
        await self.arena.close()

    async def complete(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
        heard: Callable[[str], None] | None = None,
    ) -> Completion:
        """As ``GuardedPolicy.complete``. Raises: TimeoutError: it took too long."""
        async with deadline(self.player.timeout_s, "the completion"):
            return await self.policy.complete(prompt, sampling, seed, heard)

    async def images(self, given: Sequence[str], param: str) -> tuple[Image, ...]:
        if not given:
            return ()
        # Inflating them takes a while, in which others are answered.
        return await asyncio.to_thread(checked_images, list(given), self.limits, param)


def valid(action: Action, seen: Observation) -> bool:
    return not action.invalid and (not seen.actions or action.text in seen.actions)
