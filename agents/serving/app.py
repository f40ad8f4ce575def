"""An agent behind HTTP: to talk to, to act for somebody's world, and to be watched."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from ... import __version__
from ...core.errors import PolicyError, PromptError
from ...core.seeds import derive
from ...core.types import (
    Observation,
    Step,
    Task,
)
from . import bodies
from .admission import Admission
from .champion import Offer
from .chat import add_chat
from .limits import Limits, Refusal
from .metrics import Metrics
from .playground import add_playground
from .room import Room, Served, valid
from .sessions import SessionState

log = logging.getLogger(__name__)


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
    _add_status(app, room)
    add_chat(app, room)
    _add_sessions(app, room)
    _add_adapters(app, room)
    add_playground(app, room)
    return app


def _tell_errors(app: FastAPI, metrics: Metrics) -> None:
    """Every error as JSON of one form, and none with a word about the inside."""

    def response_to(refusal: Refusal) -> JSONResponse:
        metrics.refusals.labels(refusal.code).inc()
        return JSONResponse(refusal.body, refusal.status, refusal.headers)

    @app.exception_handler(Refusal)
    async def _(request: Request, error: Refusal) -> JSONResponse:
        return response_to(error)

    @app.exception_handler(RequestValidationError)
    async def _(request: Request, error: RequestValidationError) -> JSONResponse:
        faults: Sequence[Any] = error.errors()
        places = [".".join(map(str, one["loc"][1:])) or str(one["loc"][0]) for one in faults]
        message = "; ".join(
            f"{where}: {one['msg']}" for where, one in zip(places[:5], faults, strict=False)
        )
        # Their own text may come back in it, and may be half of an emoji.
        message = message.encode("utf-8", "replace").decode()[:1000]
        return response_to(
            Refusal(400, message, "invalid_request", places[0][:200] if places else None)
        )

    @app.exception_handler(HTTPException)
    async def _(request: Request, error: HTTPException) -> JSONResponse:
        words = {404: "there is nothing here", 405: "not with this method"}
        message = words.get(error.status_code, str(error.detail))
        refusal = Refusal(error.status_code, message, f"http_{error.status_code}")
        refusal.headers.update(error.headers or {})
        return response_to(refusal)

    @app.exception_handler(PromptError)
    async def _(request: Request, error: PromptError) -> JSONResponse:
        return response_to(Refusal(400, str(error), "prompt", "messages"))

    @app.exception_handler(TimeoutError)
    async def _(request: Request, error: TimeoutError) -> JSONResponse:
        return response_to(Refusal(504, str(error) or "it took too long", "too_long"))

    @app.exception_handler(PolicyError)
    async def _(request: Request, error: PolicyError) -> JSONResponse:
        log.error("the policy failed: %s", error)
        return response_to(Refusal(503, "the policy could not answer", "policy_failed", retry_s=5))


def _add_status(app: FastAPI, room: Room) -> None:
    name = room.served.name

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
        one = {"id": name, "object": "model", "created": room.created, "owned_by": "selfwright"}
        return {"object": "list", "data": [one]}


def _add_sessions(app: FastAPI, room: Room) -> None:
    limits = room.limits

    @app.post("/v1/sessions", status_code=201)
    async def begin(asked: bodies.NewSession) -> bodies.SessionCreated:
        wanted = asked.task
        if len(wanted.instruction) > limits.prompt_chars:
            message = f"wanted an instruction of at most {limits.prompt_chars:,} characters"
            raise Refusal(400, message, "context_length_exceeded", "task.instruction")
        steps = limits.steps if wanted.max_steps is None else wanted.max_steps
        if steps > limits.steps:
            message = f"wanted at most {limits.steps} steps, got {steps}"
            raise Refusal(400, message, "too_many_steps", "task.max_steps")
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
        completion = action.completion
        return bodies.Acted(
            action=action.text,
            completion=completion.text,
            valid=valid(action, seen),
            invalid=action.invalid,
            step=turn + 1,
            checkpoint=room.served.player.policy.checkpoint,
            finish=completion.finish,
            token_ids=list(completion.token_ids),
            logprobs=list(completion.logprobs),
            tokenizer=completion.tokenizer,
            place=action.place,
        )

    @app.delete("/v1/sessions/{id}", status_code=204)
    async def end(id: str) -> None:
        room.sessions.remove(id)


def _add_adapters(app: FastAPI, room: Room) -> None:
    champion = room.champion

    @app.get("/v1/adapters")
    async def offers() -> dict[str, Any]:
        """What was offered, and what answers now."""
        return {
            "checkpoint": room.served.player.policy.checkpoint,
            "data": [offer.payload() for offer in champion.offers],
        }

    @app.post("/v1/adapters", status_code=202)
    async def challenge(asked: bodies.OfferAdapter) -> Offer:
        """Has an adapter tried; ``GET /v1/adapters/{id}`` tells how it went."""
        return await champion.challenge(asked.path, asked.force)

    @app.get("/v1/adapters/{id}")
    async def offer(id: str) -> Offer:
        return champion.offer(id)
