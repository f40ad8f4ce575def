"""What servers are tested with: the real one on a free port, policies that do as they are told."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AbstractContextManager, asynccontextmanager, nullcontext
from pathlib import Path
from typing import Any

import httpx2

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.agents.serving.app import make_app
from selfwright.agents.serving.limits import Limits
from selfwright.agents.serving.room import Served
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.play.players import PolicyPlayer
from selfwright.core.types import Completion, Prompt, Sampling
from selfwright.loop.serve import Server, bound

DEADLINE_S = 60.0
LOCAL = ("localhost", "127.0.0.1", "::1")


class Echo:
    """Says what it was told last, with the number of images and of tokens it may say."""

    def __init__(self) -> None:
        self.checkpoint = "base"
        self.asked: list[Prompt] = []
        self.free = asyncio.Event()
        """Nothing is answered while this is clear."""
        self.free.set()
        self.begun = asyncio.Event()
        self.closed = False

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        self.asked.append(prompt)
        checkpoint = self.checkpoint
        self.begun.set()
        await self.free.wait()
        assert self.checkpoint == checkpoint, "the weights changed under an answer"
        last = prompt.messages[-1]
        return Completion(f"{last.text}|{len(last.images)}|{sampling.max_tokens}", finish="stop")

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        raise NotImplementedError

    async def load(self, checkpoint: Path | None) -> None:
        self.checkpoint = "base" if checkpoint is None else checkpoint.name

    async def close(self) -> None:
        self.closed = True


def served(policy: Any, tokens: ChatTokens | None = None, **more: Any) -> Served:
    player = PolicyPlayer(Chat(ChatConfig()), policy, Sampling(0.0, 1.0, 8), DEADLINE_S)
    return Served("tiny", player, tokens=tokens, **more)


def transformers_policy(folder: Path) -> TransformersPolicy:
    config = TransformersConfig.model_validate({"model": str(folder), "dtype": "float32"})
    return TransformersPolicy(config, str(folder), 0)


def limits(**settings: Any) -> Limits:
    return Limits.model_validate({"drain_s": 5, **settings})


@asynccontextmanager
async def running(
    what: Served, bounds: Limits | None = None, **keys: Any
) -> AsyncGenerator[httpx2.AsyncClient]:
    """A client of the real server, which drains as the real one does and closes its policy."""
    bounds = bounds or limits(drain_s=5)
    app = make_app(what, bounds, hosts=LOCAL, **keys)
    with bound("127.0.0.1", 0) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        server = Server(app, bounds)
        task = asyncio.create_task(server.serve([listening]))
        try:
            await until(lambda: server.started)
            many = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
            async with httpx2.AsyncClient(base_url=url, timeout=DEADLINE_S, limits=many) as client:
                yield client
        finally:
            server.should_exit = True
            await asyncio.wait_for(task, DEADLINE_S)
            await what.player.policy.close()


async def until(true: Callable[[], bool | Awaitable[bool]]) -> None:
    """Waits for what is sure to come."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            now = true()
            if now if isinstance(now, bool) else await now:
                return
            await asyncio.sleep(0.01)
