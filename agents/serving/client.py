"""Asks a served agent to act: for a world of one's own, or as the player of a rollout.

async with Client("http://127.0.0.1:8000") as client:
    session = await client.session("Find the coin.", max_steps=20)
    acted = await session.act("You are in a kitchen.", actions=("open door", "look"))
"""

import asyncio
import base64
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx2
from pydantic import BaseModel, ValidationError

from ...core.checked import checked_completion, no_text
from ...core.errors import PolicyError
from ...core.hosting.world import World
from ...core.images import STORE
from ...core.types import Action, Completion, Observation, Step, Task
from . import bodies

Answered = TypeVar("Answered", bound=BaseModel)
LONGEST_WAIT_S = 30.0
"""Between two tries of a server that is busy."""
SHOWN = 200
"""Characters of a server's answer that an error shows."""


class Client:
    """A connection to ``selfwright serve``; usable in ``async with``."""

    def __init__(self, url: str, token: str = "", timeout_s: float = 600.0) -> None:
        """``timeout_s``: of one answer, waiting for a busy server included.

        Raises:
            PolicyError: the token cannot be sent.
        """
        token = token.strip()
        if not token.isprintable():  # An error about the header would show it.
            raise PolicyError("the token holds control characters, which no header can carry")
        headers = {b"Authorization": f"Bearer {token}".encode()} if token else {}
        self._url = url.rstrip("/")
        self._timeout_s = timeout_s
        self._http = httpx2.AsyncClient(
            headers=headers,
            # Its own would be of each part of an answer, not of the whole.
            timeout=None,
            # As many as the server has room for: it is the one that refuses. Given up well before
            # a server gives them up, or it could do so just as the next request is on its way.
            limits=httpx2.Limits(
                max_connections=None, max_keepalive_connections=None, keepalive_expiry=3.0
            ),
        )

    async def session(
        self, instruction: str, max_steps: int | None = None, id: str = "", seed: int = 0
    ) -> "RemoteSession":
        """Begin a task.

        Raises:
            PolicyError: the server refuses, or cannot be reached.
        """
        task = {"instruction": instruction, "max_steps": max_steps, "id": id}
        body = {"task": task, "seed": seed}
        return RemoteSession(
            self, (await self.post(bodies.SessionCreated, "/v1/sessions", body)).id
        )

    async def post(self, kind: type[Answered], path: str, body: Any) -> Answered:
        """What a path answers to what is posted there, read as ``kind``.

        Raises:
            PolicyError: as ``ask``, or it is something else.
        """
        answer = await self.ask("POST", path, body)
        try:
            return kind.model_validate(answer)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the whole"
            raise PolicyError(
                f"{self._url}{path} answered otherwise than our servers do ({where}: "
                f"{first['msg']}): {str(answer)[:SHOWN]}"
            ) from None

    async def ask(self, method: str, path: str, body: Any = None) -> Any:
        """What a path answers. A busy server is asked again, for it has done nothing yet.

        Raises:
            PolicyError: the server refuses, cannot be reached, is too late, or answers no JSON.
        """
        try:
            async with asyncio.timeout(self._timeout_s):
                response = await self._answer(method, path, body)
        except TimeoutError:
            message = f"{self._url}{path} did not answer within {self._timeout_s:g} s"
            raise PolicyError(message) from None
        except httpx2.HTTPError as error:
            message = f"{self._url} cannot be reached: {type(error).__name__}: {error}"
            raise PolicyError(message) from None
        if response.is_success and not response.content:
            return None
        try:
            answer: Any = response.json()
        except ValueError:
            answer = None
        if response.is_success and answer is not None:
            return answer
        match answer:
            case {"error": {"message": str(message)}}:
                pass
            case _:
                message = response.text[:SHOWN]
        how = "answered with no JSON" if response.is_success else "refused"
        raise PolicyError(f"{self._url}{path} {how}: {response.status_code} {message}")

    async def _answer(self, method: str, path: str, body: Any) -> httpx2.Response:
        until = time.monotonic() + self._timeout_s
        while True:
            response = await self._http.request(method, self._url + path, json=body)
            wait = _wait(response.headers.get("retry-after", ""))
            if response.status_code != 429 or time.monotonic() + wait > until:
                return response
            await asyncio.sleep(wait)

    async def close(self) -> None:
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.close()


@dataclass(frozen=True)
class Acted:
    action: Action
    valid: bool
    """The action is among those listed, if any were."""
    checkpoint: str
    """The weights that acted."""
    step: int
    """How many actions the session has had."""


@dataclass(frozen=True)
class RemoteSession:
    """One task; the server keeps what was seen and done."""

    client: Client
    id: str

    async def act(
        self,
        text: str,
        images: Sequence[bytes] = (),
        actions: Sequence[str] = (),
        reward: float = 0.0,
        seed: int | None = None,
    ) -> Acted:
        """What the agent does about what it sees.

        Args:
            images: PNG files.
            actions: those legal now; none: free text.
            reward: what the world paid for the action before.
            seed: of this action; None: it follows from the session's.

        Raises:
            PolicyError: the server refuses, cannot be reached, or answers with no text.
        """
        seen = {
            "text": text,
            "images": [base64.b64encode(image).decode() for image in images],
            "actions": list(actions),
        }
        body = {"observation": seen, "reward": reward, "seed": seed}
        answer = await self.client.post(bodies.Acted, f"/v1/sessions/{self.id}/act", body)
        completion = Completion(
            answer.completion,
            tuple(answer.token_ids),
            tuple(answer.logprobs),
            answer.finish,
            answer.tokenizer,
        )
        checked_completion(completion, "the server")
        if fault := no_text(answer.action):
            raise PolicyError(f"the server's action is {fault}; wanted a str")
        action = Action(answer.action, completion, invalid=answer.invalid, place=answer.place)
        return Acted(action, answer.valid, answer.checkpoint, answer.step)

    async def end(self) -> None:
        await self.client.ask("DELETE", f"/v1/sessions/{self.id}")


class ServedPlayer:
    """A served agent as the player of ``core.rollout.rollouts``."""

    def __init__(self, client: Client, name: str = "served") -> None:
        self.name = name
        self._client = client
        self._sessions: dict[World, RemoteSession] = {}
        """Of the episode that each world is in, or was in last."""

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
        """Raises: PolicyError: the server refuses, or the episode began elsewhere."""
        if not history:
            # Those of worlds that were thrown away would keep others out until they are idle.
            for other in [one for one in self._sessions if one is world or one.gone]:
                await self._leave(other)
            self._sessions[world] = await self._client.session(
                task.instruction, task.max_steps, task.id
            )
        if world not in self._sessions:
            raise PolicyError("a served agent plays episodes from their beginning only")
        reward = history[-1].reward if history else 0.0
        images = [STORE.read(image) for image in observation.images]
        acted = await self._sessions[world].act(
            observation.text, images, observation.actions, reward, seed
        )
        if acted.step != len(history) + 1:
            raise PolicyError("a served agent plays episodes from their beginning only")
        return acted.action

    async def close(self) -> None:
        """End the sessions that are left."""
        for world in list(self._sessions):
            await self._leave(world)

    async def _leave(self, world: World) -> None:
        session = self._sessions.pop(world, None)
        if session is not None:
            with suppress(PolicyError):  # It may have ended by itself.
                await session.end()


def _wait(header: str) -> float:
    return min(float(header), LONGEST_WAIT_S) if header.isdecimal() else 1.0
