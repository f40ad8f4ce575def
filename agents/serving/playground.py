"""The playground: a page on which the agent is watched as it acts in worlds of the server's."""

import base64
import hashlib
import logging
import re
from functools import cache
from importlib.resources import files
from typing import Annotated, Any

from fastapi import FastAPI, Query
from fastapi.responses import HTMLResponse

from ...core.errors import WorldError
from ...core.images import STORE
from ...core.types import (
    Action,
)
from . import bodies
from .games import Game
from .limits import Refusal
from .room import Room, valid

log = logging.getLogger(__name__)

SHOWN = 100
"""Tasks that the playground lists at once."""


def add_playground(app: FastAPI, room: Room) -> None:
    arena = room.arena

    @app.get("/", response_class=HTMLResponse)
    async def page() -> HTMLResponse:
        text, policy = playground()
        return HTMLResponse(text, headers={"Content-Security-Policy": policy})

    @app.get("/playground/worlds")
    async def worlds() -> dict[str, Any]:
        return {"worlds": arena.names, "model": room.served.name}

    @app.get("/playground/worlds/{name}/tasks")
    async def tasks(
        name: str,
        split: bodies.Split = "test",
        begin: Annotated[int, Query(ge=0, lt=2**31)] = 0,
        count: Annotated[int, Query(ge=1, le=SHOWN)] = 20,
    ) -> bodies.WorldTasks:
        try:
            size, found = await arena.tasks(name, split, begin, count)
        except WorldError as error:
            raise _world_failed(name, error) from error
        listed = [
            bodies.WorldTask(index=begin + k, id=task.id, instruction=task.instruction)
            for k, task in enumerate(found)
        ]
        return bodies.WorldTasks(size=size, tasks=listed)

    @app.post("/playground/games", status_code=201)
    async def begin(asked: bodies.NewGame) -> bodies.Stage:
        room.games.check_room()
        try:
            game = await arena.begin(asked.world, asked.split, asked.index, asked.seed)
        except WorldError as error:
            raise _world_failed(asked.world, error) from error
        try:
            id = room.games.add(game)
        except Refusal:
            await game.lease.aclose()
            raise
        return _stage(id, game)

    @app.post("/playground/games/{id}/step")
    async def step(id: str) -> bodies.Stage:
        with room.games.using(id) as game:
            before = game.observation
            try:
                action = await game.step(room.player)
            except WorldError as error:
                room.games.drop(game)
                raise _world_failed("the world", error) from error
            return _stage(id, game, action, valid(action, before))

    @app.delete("/playground/games/{id}", status_code=204)
    async def end(id: str) -> None:
        room.games.remove(id)


def _world_failed(name: str, error: BaseException) -> Refusal:
    log.error("%s failed: %s", name, error)
    message = f"{name} failed; its game is over, begin another"
    return Refusal(502, message, "world_failed")


def _stage(id: str, game: Game, action: Action | None = None, valid: bool = True) -> bodies.Stage:
    seen, last = game.observation, game.last
    return bodies.Stage(
        id=id,
        instruction=game.task.instruction,
        max_steps=game.task.max_steps,
        text=seen.text,
        images=[base64.b64encode(STORE.read(image)).decode() for image in seen.images],
        actions=list(seen.actions),
        steps=len(game.steps),
        completion=None if action is None else action.completion.text,
        action=None if action is None else action.text,
        valid=valid,
        reward=0.0 if last is None else last.reward,
        total=sum(one.reward for one in game.steps),
        over=game.over,
        success=last is not None and last.success,
    )


@cache
def playground() -> tuple[str, str]:
    """The page, and the Content-Security-Policy under which it alone may run."""
    text = files(bodies.__package__ or "").joinpath("playground.html").read_text(encoding="utf-8")

    def hashes(tag: str) -> str:
        parts = re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
        digests = (base64.b64encode(hashlib.sha256(p.encode()).digest()).decode() for p in parts)
        return " ".join(f"'sha256-{digest}'" for digest in digests)

    policy = (
        f"default-src 'none'; script-src {hashes('script')}; style-src {hashes('style')}; "
        "img-src data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return text, policy
