"""``/v1/chat/completions``: the model talked to, as OpenAI's clients do."""

import asyncio
import json
import logging
import secrets
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import replace
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response, StreamingResponse

from ...core.errors import PolicyError
from ...core.files import canonical_json
from ...core.seeds import derive
from ...core.types import (
    Completion,
    Constraint,
    Message,
    Prompt,
    Sampling,
    Tool,
)
from ..calls import Form, calls_grammar, read_calls
from ..wire import as_text, calls_in, calls_out
from . import bodies
from .images import DATA_URL
from .limits import Limits, Refusal
from .room import Room

log = logging.getLogger(__name__)

FORM: Form = "hermes"
"""How calls are written that are held to a grammar, or said to have been made."""
CALLED = "tool_calls"
"""Why an answer that is a call finished."""
ROLES: Mapping[str, Any] = {"developer": "system"}
"""Roles of the wire that are called otherwise here."""


def add_chat(app: FastAPI, room: Room) -> None:
    name = room.served.name

    @app.post("/v1/chat/completions")
    async def chat(asked: bodies.Chat) -> Response:
        _refuse_unsupported(asked)
        if asked.model not in ("", name):
            fault = f"there is no model {asked.model[:80]!r} here; there is {name!r}"
            raise Refusal(404, fault, "model_not_found", "model")
        sampling = _sampling(asked, room.player.sampling, room.limits)
        prompt = await _prompt(asked, room)
        held = _required(asked, prompt.tools)
        sampling = replace(sampling, constraint=held)
        seed = secrets.randbits(62) if asked.seed is None else derive(asked.seed)
        head = {
            "id": f"chatcmpl-{secrets.token_urlsafe(16)}",
            "created": int(time.time()),
            "model": name,
        }
        if asked.stream:
            # Only the whole tells whether it is a call, which is no text.
            spoken = _spoken(room, prompt, sampling, seed, whole=bool(prompt.tools))
            first = await anext(spoken)  # What goes wrong until then is refused as usual.
            counted = asked.stream_options is not None and asked.stream_options.include_usage
            read = room.policy.length(prompt) if counted else None
            events = _events(head, first, spoken, read, prompt)
            return StreamingResponse(events, media_type="text/event-stream")
        completion = await room.complete(prompt, sampling, seed)
        usage = _usage(room.policy.length(prompt), completion)
        message = {"role": "assistant", "content": completion.text}
        finish: str = completion.finish or "stop"
        if calls := _calls(prompt, completion):
            message, finish = {"role": "assistant", "content": None, "tool_calls": calls}, CALLED
        choice: dict[str, Any] = {"index": 0, "message": message, "logprobs": None}
        choice["finish_reason"] = finish
        return JSONResponse(
            {**head, "object": "chat.completion", "choices": [choice], "usage": usage}
        )


async def _prompt(asked: bodies.Chat, room: Room) -> Prompt:
    # Before any is looked at: to inflate an image is far more work than to send it.
    pictured = sum(
        isinstance(part, bodies.ImagePart)
        for one in asked.messages
        if not isinstance(one.content, str)
        for part in one.content or ()
    )
    if pictured > room.limits.images:
        fault = f"wanted at most {room.limits.images} images, got {pictured}"
        raise Refusal(400, fault, "too_many_images", "messages")
    before: bodies.ChatMessage | None = None
    for k, one in enumerate(asked.messages):
        if one.role == "tool" and not (before and (before.tool_calls or before.role == "tool")):
            fault = "a tool's message follows that of the assistant who called it, in tool_calls"
            raise Refusal(400, fault, "invalid_request", f"messages[{k}].role")
        before = one
    messages = [await _message(one, k, room) for k, one in enumerate(asked.messages)]
    return Prompt(tuple(messages), _tools(asked))


def _tools(asked: bodies.Chat) -> tuple[Tool, ...]:
    if asked.tool_choice == "none":
        return ()
    return tuple(
        Tool(one.function.name, one.function.description, canonical_json(one.function.parameters))
        for one in asked.tools or ()
    )


def _required(asked: bodies.Chat, tools: Sequence[Tool]) -> Constraint | None:
    """What holds an answer to a call, if one is asked for.

    Raises:
        Refusal: of a function that is none of ``tools``.
    """
    choice = asked.tool_choice
    if choice in (None, "none", "auto"):
        return None
    wanted = choice.function.name if isinstance(choice, bodies.NamedChoice) else None
    some = [tool for tool in tools if wanted in (None, tool.name)]
    if not some:
        fault = f"tool_choice wants a call, but of {wanted or 'a function'} there is none in tools"
        raise Refusal(400, fault, "invalid_request", "tool_choice")
    return Constraint(grammar=calls_grammar(some, FORM))


def _refuse_unsupported(asked: bodies.Chat) -> None:
    form = (asked.response_format or {}).get("type", "text")
    for param, there, wanted in (
        ("n", asked.n not in (None, 1), "n=1: ask again for another"),
        ("functions", bool(asked.functions), "tools in its place"),
        ("logprobs", bool(asked.logprobs), "no logprobs: sessions tell them"),
        ("response_format", form != "text", "text"),
        ("frequency_penalty", bool(asked.frequency_penalty), "no penalty"),
        ("presence_penalty", bool(asked.presence_penalty), "no penalty"),
    ):
        if there:
            message = f"{param} is not supported here; wanted {wanted}"
            raise Refusal(400, message, "unsupported", param)


def _sampling(asked: bodies.Chat, usual: Sampling, limits: Limits) -> Sampling:
    """As the agent is sampled, but for what the request says."""
    heat = usual.temperature if asked.temperature is None else asked.temperature
    top_p = usual.top_p if asked.top_p is None else asked.top_p
    most = asked.max_completion_tokens or asked.max_tokens
    if most is not None and most > limits.tokens:
        message = f"wanted at most {limits.tokens} tokens, got {most}"
        raise Refusal(400, message, "too_many_tokens", "max_tokens")
    stop = usual.stop
    if asked.stop is not None:
        stop = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
    if "" in stop:
        raise Refusal(400, "an empty stop would end everything at once", "invalid_request", "stop")
    return Sampling(heat, 1.0 if heat == 0 else top_p, most or usual.max_tokens, stop)


async def _message(given: bodies.ChatMessage, index: int, room: Room) -> Message:
    role = ROLES.get(given.role, given.role)
    param = f"messages[{index}].content"
    if given.tool_calls:
        try:
            calls = calls_in([one.model_dump() for one in given.tool_calls])
        except ValueError as error:
            raise Refusal(400, str(error), "invalid_request", param) from None
        words = given.content if isinstance(given.content, str) else ""
        return Message(role, (as_text(words, calls, FORM),))
    if given.content is None:
        raise Refusal(400, "a message of no content and no tool_calls", "invalid_request", param)
    if isinstance(given.content, str):
        return Message(role, (given.content,))
    pictures = [part for part in given.content if isinstance(part, bodies.ImagePart)]
    if not all(part.image_url.url.startswith(DATA_URL) for part in pictures):
        fault = f"wanted an image as {DATA_URL}...; nothing is fetched from elsewhere"
        raise Refusal(400, fault, "bad_image", param)
    urls = [part.image_url.url.removeprefix(DATA_URL) for part in pictures]
    images = iter(await room.images(urls, param))
    parts = (p.text if isinstance(p, bodies.TextPart) else next(images) for p in given.content)
    return Message(role, tuple(parts))


def _calls(prompt: Prompt, completion: Completion) -> list[dict[str, Any]]:
    """Those of the functions that were offered."""
    if not prompt.tools:
        return []
    names = {tool.name for tool in prompt.tools}
    calls = [one for one in read_calls(completion.text, [*names]) if one.name in names]
    return calls_out(calls, secrets.randbits(30)) if calls else []


def _usage(read: int, completion: Completion) -> dict[str, int]:
    wrote = len(completion.token_ids)
    return {"prompt_tokens": read, "completion_tokens": wrote, "total_tokens": read + wrote}


async def _spoken(
    room: Room, prompt: Prompt, sampling: Sampling, seed: int, whole: bool
) -> AsyncGenerator[str | Completion]:
    """The answer's text, piece by piece as it comes unless ``whole``, and at the end the whole."""
    if whole:
        yield await room.complete(prompt, sampling, seed)
        return
    heard: asyncio.Queue[str | None] = asyncio.Queue()

    completing = asyncio.create_task(room.complete(prompt, sampling, seed, heard.put_nowait))
    completing.add_done_callback(lambda _: heard.put_nowait(None))
    sent = ""
    try:
        while (text := await heard.get()) is not None:
            # An answer that was begun anew, as its server was lost, is at first shorter.
            if text.startswith(sent) and text != sent:
                yield text[len(sent) :]
                sent = text
        completion = await completing
        if not completion.text.startswith(sent):
            raise PolicyError("the answer was begun anew, and became another one")
        if completion.text != sent:
            yield completion.text[len(sent) :]
        yield completion
    finally:
        completing.cancel()


async def _events(
    head: Mapping[str, Any],
    first: str | Completion,
    spoken: AsyncGenerator[str | Completion],
    read: int | None,
    prompt: Prompt,
) -> AsyncGenerator[str]:
    """The answer as OpenAI streams one; ``read``: the prompt's tokens, if usage is to be told."""

    def event(choices: Sequence[Any], **more: Any) -> str:
        chunk = {**head, "object": "chat.completion.chunk", "choices": choices, **more}
        return f"data: {json.dumps(chunk)}\n\n"

    def delta(finish: str | None = None, **delta: Any) -> str:
        return event([{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}])

    async with aclosing(spoken):
        yield delta(role="assistant", content=None if prompt.tools else "")
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
        calls = _calls(prompt, piece)
        if calls:
            yield delta(tool_calls=[{"index": k, **call} for k, call in enumerate(calls)])
        elif prompt.tools:
            yield delta(content=piece.text)
        yield delta(CALLED if calls else piece.finish or "stop")
        if read is not None:
            yield event([], usage=_usage(read, piece))
        yield "data: [DONE]\n\n"
