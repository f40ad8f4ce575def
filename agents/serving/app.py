"""An agent behind HTTP: to talk to, to act for somebody's world, and to be watched."""

import asyncio
import base64
import hashlib
import json
import logging
import re
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Collection, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from ... import __version__
from ...core.errors import PolicyError, PromptError, WorldError
from ...core.images import STORE
from ...core.models.tokens import ChatTokens
from ...core.play.rollout import PolicyPlayer, deadline
from ...core.seeds import derive
from ...core.types import (
    Action,
    Completion,
    Image,
    Message,
    Observation,
    Prompt,
    Sampling,
    Step,
    Task,
)
from . import bodies
from .admission import Admission
from .champion import Champion, Offer, Trial
from .games import Arena, Game, Opener
from .guarded_policy import GuardedPolicy
from .images import DATA_URL, checked_images
from .limits import Limits, Refusal
from .metrics import Metrics
from .sessions import Keeper, SessionState

log = logging.getLogger(__name__)

ROLES: Mapping[str, Any] = {"developer": "system"}
"""Roles of the wire that are called otherwise here."""
SHOWN = 100
"""Tasks that the playground lists at once."""
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


def make_app(
    served: Served,
    limits: Limits,
    *,
    token: str = "",
    hosts: Collection[str] = (),
    clock: Callable[[], float] = time.monotonic,
) -> FastAPI:
    """The application; whoever made the policy closes it.

    ``token``: what every request must bear; empty: nothing. ``hosts``: as ``Admission`` has it.
    """
    room = Room(served, limits, clock)

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncGenerator[None]:
        sweeping = asyncio.create_task(room.sweep())
        yield
        sweeping.cancel()
        await room.close()

    app = FastAPI(
        title="selfwright",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        lifespan=life,
        responses={"4XX": {"model": bodies.Error}, "5XX": {"model": bodies.Error}},
    )
    app.add_middleware(
        Admission, limits=limits, metrics=room.metrics, token=token, hosts=frozenset(hosts)
    )
    _tell_errors(app, room.metrics)
    _add_talk(app, room)
    _add_sessions(app, room)
    _add_adapters(app, room)
    _add_playground(app, room)
    return app


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
        self.made = int(time.time())
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


def _tell_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error as JSON of one form, and none with a word about the inside."""

    def told(refusal: Refusal) -> JSONResponse:
        metrics.refusals.labels(refusal.code).inc()
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(Refusal)
    async def _(request: Request, error: Refusal) -> JSONResponse:
        return told(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        faults: Sequence[Any] = error.errors()
        places = [".".join(map(str, one["loc"][1:])) or str(one["loc"][0]) for one in faults]
        said = "; ".join(
            f"{where}: {one['msg']}" for where, one in zip(places[:5], faults, strict=False)
        )
        # Their own text may come back in it, and may be half of an emoji.
        said = said.encode("utf-8", "replace").decode()[:1000]
        return told(Refusal(400, said, "invalid_request", places[0][:200] if places else None))

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: "there is nothing here", 405: "not with this method"}
        said = words.get(error.status_code, str(error.detail))
        refusal = Refusal(error.status_code, said, f"http_{error.status_code}")
        refusal.headers.update(error.headers or {})
        return told(refusal)

    @app.exception_handler(PromptError)
    async def _(request: Request, error: PromptError) -> JSONResponse:
        return told(Refusal(400, str(error), "prompt", "messages"))

    @app.exception_handler(TimeoutError)
    async def _(request: Request, error: TimeoutError) -> JSONResponse:
        return told(Refusal(504, str(error) or "it took too long", "too_long"))

    @app.exception_handler(PolicyError)
    async def _(request: Request, error: PolicyError) -> JSONResponse:
        log.error("the policy failed: %s", error)
        return told(Refusal(503, "the policy could not answer", "policy_failed", retry_s=5))


def _add_talk(app: FastAPI, room: Room) -> None:
    name, limits = room.served.name, room.limits

    @app.get("/health")
    async def health() -> dict[str, str]:
        room.champion.check()
        return {"status": "ok", "model": name}

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
    )
    async def metrics() -> Response:
        room.metrics.sessions.set(len(room.sessions))
        room.metrics.games.set(len(room.games))
        return Response(room.metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        one = {"id": name, "object": "model", "created": room.made, "owned_by": "selfwright"}
        return {"object": "list", "data": [one]}

    @app.post("/v1/chat/completions")
    async def chat(asked: bodies.Chat) -> Response:
        _refuse_unsupported(asked)
        if asked.model not in ("", name):
            said = f"there is no model {asked.model[:80]!r} here; there is {name!r}"
            raise Refusal(404, said, "model_not_found", "model")
        sampling = _sampling(asked, room.player.sampling, limits)
        # Before any is looked at: to inflate an image is far more work than to send it.
        pictured = sum(
            isinstance(part, bodies.ImagePart)
            for one in asked.messages
            if not isinstance(one.content, str)
            for part in one.content
        )
        if pictured > limits.images:
            said = f"wanted at most {limits.images} images, got {pictured}"
            raise Refusal(400, said, "too_many_images", "messages")
        messages = [await _message(one, k, room) for k, one in enumerate(asked.messages)]
        prompt = Prompt(tuple(messages))
        seed = secrets.randbits(62) if asked.seed is None else derive(asked.seed)
        head = {
            "id": f"chatcmpl-{secrets.token_urlsafe(16)}",
            "created": int(time.time()),
            "model": name,
        }
        if asked.stream:
            spoken = _spoken(room, prompt, sampling, seed)
            first = await anext(spoken)  # What goes wrong until then is refused as usual.
            counted = asked.stream_options is not None and asked.stream_options.include_usage
            read = room.policy.length(prompt) if counted else None
            events = _events(head, first, spoken, read)
            return StreamingResponse(events, media_type="text/event-stream")
        said = await room.complete(prompt, sampling, seed)
        usage = _usage(room.policy.length(prompt), said)
        message = {"role": "assistant", "content": said.text}
        choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = said.finish or "stop"
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        )


def _refuse_unsupported(asked: bodies.Chat) -> None:
    form = (asked.response_format or {}).get("type", "text")
    for param, there, wanted in (
        ("n", asked.n not in (None, 1), "n=1: ask again for another"),
        ("tools", bool(asked.tools), "no tools: this model acts in words"),
        ("functions", bool(asked.functions), "no functions: this model acts in words"),
        ("logprobs", bool(asked.logprobs), "no logprobs: sessions tell them"),
        ("response_format", form != "text", "text"),
        ("frequency_penalty", bool(asked.frequency_penalty), "no penalty"),
        ("presence_penalty", bool(asked.presence_penalty), "no penalty"),
    ):
        if there:
            said = f"{param} is not supported here; wanted {wanted}"
            raise Refusal(400, said, "unsupported", param)


def _sampling(asked: bodies.Chat, usual: Sampling, limits: Limits) -> Sampling:
    """As the agent is sampled, but for what the request says."""
    heat = usual.temperature if asked.temperature is None else asked.temperature
    top_p = usual.top_p if asked.top_p is None else asked.top_p
    most = asked.max_completion_tokens or asked.max_tokens
    if most is not None and most > limits.tokens:
        said = f"wanted at most {limits.tokens} tokens, got {most}"
        raise Refusal(400, said, "too_many_tokens", "max_tokens")
    stop = usual.stop
    if asked.stop is not None:
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    if "" in stop:
        raise Refusal(400, "an empty stop would end everything at once", "invalid_request", "stop")
    return Sampling(heat, 1.0 if heat == 0 else top_p, most or usual.max_tokens, stop)


async def _message(given: bodies.ChatMessage, index: int, room: Room) -> Message:
    role = ROLES.get(given.role, given.role)
    if isinstance(given.content, str):
        return Message(role, (given.content,))
    param = f"messages[{index}].content"
    pictures = [part for part in given.content if isinstance(part, bodies.ImagePart)]
    if not all(part.image_url.url.startswith(DATA_URL) for part in pictures):
        said = f"wanted an image as {DATA_URL}...; nothing is fetched from elsewhere"
        raise Refusal(400, said, "bad_image", param)
    urls = [part.image_url.url.removeprefix(DATA_URL) for part in pictures]
    images = iter(await room.images(urls, param))
    parts = (p.text if isinstance(p, bodies.TextPart) else next(images) for p in given.content)
    return Message(role, tuple(parts))


def _usage(read: int, said: Completion) -> dict[str, int]:
    wrote = len(said.token_ids)
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


async def _spoken(
    room: Room, prompt: Prompt, sampling: Sampling, seed: int
) -> AsyncGenerator[str | Completion]:
    """The answer's text, piece by piece as it comes, and at the end the whole."""
    heard: asyncio.Queue[str | None] = asyncio.Queue()

    completing = asyncio.create_task(room.complete(prompt, sampling, seed, heard.put_nowait))
    completing.add_done_callback(lambda _: heard.put_nowait(None))
    told = ""
    try:
        while (text := await heard.get()) is not None:
            # An answer that was begun anew, as its server was lost, is at first shorter.
            if text.startswith(told) and text != told:
                yield text[len(told) :]
                told = text
        said = await completing
        if not said.text.startswith(told):
            raise PolicyError("the answer was begun anew, and became another one")
        if said.text != told:
            yield said.text[len(told) :]
        yield said
    finally:
        completing.cancel()


async def _events(
    head: Mapping[str, Any],
    first: str | Completion,
    spoken: AsyncGenerator[str | Completion],
    read: int | None,
) -> AsyncGenerator[str]:
    """The answer as OpenAI streams one; ``read``: the prompt's tokens, if usage is to be told."""

    def event(choices: Sequence[Any], **more: Any) -> str:
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(chunk)}\n\n"

    def delta(finish: str | None = None, **delta: str) -> str:
        return event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}])

    async with aclosing(spoken):
        yield delta(role="assistant", content="")
        piece = first
        try:
            while isinstance(piece, str):
                yield delta(content=piece)
                piece = await anext(spoken)
        except (PolicyError, TimeoutError) as error:
            # Too late for another status; that no [DONE] follows says that it is not whole.
            log.error("the policy failed while it spoke: %s", error)
            broke = Refusal(503, "the policy could not finish its answer", "policy_failed")
            yield f"data: {json.dumps(broke.body)}\n\n"
            return
        yield delta(piece.finish or "stop")
        if read is not None:
            yield event([], usage=_usage(read, piece))
        yield "data: [DONE]\n\n"


def _add_sessions(app: FastAPI, room: Room) -> None:
    limits = room.limits

    @app.post("/v1/sessions", status_code=201)
    async def begin(asked: bodies.NewSession) -> bodies.SessionCreated:
        wanted = asked.task
        if len(wanted.instruction) > limits.prompt_chars:
            said = f"wanted an instruction of at most {limits.prompt_chars:,} characters"
            raise Refusal(400, said, "context_length_exceeded", "task.instruction")
        steps = limits.steps if wanted.max_steps is None else wanted.max_steps
        if steps > limits.steps:
            said = f"wanted at most {limits.steps} steps, got {steps}"
            raise Refusal(400, said, "too_many_steps", "task.max_steps")
        session = SessionState(Task(wanted.id, wanted.instruction, steps), asked.seed)
        id = room.sessions.add(session)
        return bodies.SessionCreated(
            id=id, max_steps=steps, model=room.served.name, idle_s=limits.idle_s
        )

    @app.post("/v1/sessions/{id}/act")
    async def act(id: str, asked: bodies.Asked) -> bodies.Acted:
        with room.sessions.using(id) as session:
            images = await room.images(asked.observation.images, "observation.images")
            seen = Observation(asked.observation.text, images, tuple(asked.observation.actions))
            size = session.check(seen, limits)
            if session.steps:
                session.steps[-1] = replace(session.steps[-1], reward=asked.reward)
            turn = len(session.steps)
            seed = asked.seed
            if seed is None:
                seed = derive(session.seed, session.task.id, turn)
            action = await room.player.answer(session.task, session.steps, seen, seed)
            session.steps.append(Step(seen, action, 0.0))
            session.size = size
        said = action.completion
        return bodies.Acted(
            action=action.text,
            completion=said.text,
            valid=_valid(action, seen),
            invalid=action.invalid,
            step=turn + 1,
            checkpoint=room.served.player.policy.checkpoint,
            finish=said.finish,
            token_ids=list(said.token_ids),
            logprobs=list(said.logprobs),
            tokenizer=said.tokenizer,
        )

    @app.delete("/v1/sessions/{id}", status_code=204)
    async def end(id: str) -> None:
        room.sessions.remove(id)


def _valid(action: Action, seen: Observation) -> bool:
    return not action.invalid and (not seen.actions or action.text in seen.actions)


def _add_adapters(app: FastAPI, room: Room) -> None:
    champion = room.champion

    @app.get("/v1/adapters")
    async def offers() -> dict[str, Any]:
        """What was offered, and what answers now."""
        return {
            "checkpoint": room.served.player.policy.checkpoint,
            "data": [offer.told() for offer in champion.offers],
        }

    @app.post("/v1/adapters", status_code=202)
    async def challenge(asked: bodies.OfferAdapter) -> Offer:
        """Has an adapter tried; ``GET /v1/adapters/{id}`` tells how it went."""
        return await champion.challenge(asked.path, asked.force)

    @app.get("/v1/adapters/{id}")
    async def offer(id: str) -> Offer:
        return champion.offer(id)


def _add_playground(app: FastAPI, room: Room) -> None:
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
            return _stage(id, game, action, _valid(action, before))

    @app.delete("/playground/games/{id}", status_code=204)
    async def end(id: str) -> None:
        room.games.remove(id)


def _world_failed(name: str, error: BaseException) -> Refusal:
    log.error("%s failed: %s", name, error)
    said = f"{name} failed; its game is over, begin another"
    return Refusal(502, said, "world_failed")


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
