"""The other end of ``core.worlds``: a process that hosts instances of one world.

It reads questions as JSON lines and answers them as they are done. When its parent goes, it goes,
with all that it started, even while a world hangs.
"""

import asyncio
import base64
import ctypes
import json
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO

from ..checked import (
    Tasks,
    UnreadableTask,
    checked_action,
    checked_answer,
    checked_expert,
    checked_observation,
    checked_time_step,
)
from ..images import STORE
from ..plugins import load
from ..tasks import task_of
from ..types import Observation, Task, TimeStep
from .local import GRACE_S, told
from .worlds import answered, fields_of, made, offered, spec_of

OPTIONAL = ("expert", "random", "answer", "without_oracle")
PR_SET_PDEATHSIG = 1


class Server:
    """Answers the questions of one parent."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._name = ""
        self._make: Callable[[], Any] = lambda: None
        self._spare: list[Any] = []
        self._instances: dict[int, Any] = {}
        self._running: dict[int, asyncio.Task[Any]] = {}
        self._splits: dict[str, Sequence[Task]] = {}
        self._task_class: type[Task] = Task
        self._played: dict[int, Task] = {}

    async def serve(self, questions: BinaryIO) -> None:
        inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        loop = asyncio.get_running_loop()

        def listen() -> None:
            for line in questions:
                loop.call_soon_threadsafe(inbox.put_nowait, json.loads(line))
            leave()

        threading.Thread(target=listen, daemon=True).start()
        answering: set[asyncio.Task[None]] = set()
        while True:
            task = asyncio.create_task(self._answer(await inbox.get()))
            answering.add(task)
            task.add_done_callback(answering.discard)

    async def _answer(self, question: dict[str, Any]) -> None:
        number, what = question.pop("id"), question.pop("call")
        try:
            method: Callable[..., Awaitable[Any]] = getattr(self, f"on_{what}")
            answer = json.dumps({"id": number, "value": await method(**question)})
        except (Exception, asyncio.CancelledError) as error:
            answer = json.dumps({"id": number, "error": told(error)})
        self._out.write(answer.encode() + b"\n")
        self._out.flush()

    async def on_open(
        self, name: str, config: str, without_oracle: bool, path: list[str]
    ) -> list[str]:
        sys.path += [folder for folder in path if folder not in sys.path]
        plugin = load("environments", name)
        settings = plugin.Config.model_validate_json(config)
        self._name = name
        self._task_class = spec_of(plugin).task
        self._make = lambda: made(name, plugin, settings, without_oracle)
        self._spare.append(self._make())
        return [method for method in OPTIONAL if callable(getattr(self._any(), method, None))]

    async def on_add(self, instance: int) -> None:
        self._instances[instance] = self._spare.pop() if self._spare else self._make()

    async def on_tasks(self, split: str) -> int:
        return len(self._split(split))

    async def on_task(self, split: str, index: int) -> list[Any]:
        task = self._split(split)[index]
        if isinstance(task, UnreadableTask):
            return [task.id, task.instruction, task.max_steps, "{}", task.fault]
        return [*fields_of(task), ""]

    async def on_answer(self, task: Sequence[Any], action: str) -> str | None:
        return checked_answer(self._any().answer(self._made_task(task), action), self._name)

    async def on_reset(self, instance: int, task: Sequence[Any], seed: int) -> Any:
        self._played[instance] = made_task = self._made_task(task)
        reset = self._instances[instance].reset(made_task, seed)
        return encoded(checked_observation(await self._run(instance, reset), self._name))

    async def on_step(self, instance: int, action: str) -> Any:
        world = self._instances[instance]
        done = checked_time_step(await self._run(instance, world.step(action)), self._name)
        return encoded_time_step(answered(world, self._played[instance], action, done, self._name))

    async def on_expert(self, instance: int) -> str | None:
        expert = offered(self._instances[instance], "expert", self._name)
        return checked_expert(await self._run(instance, expert()), self._name)

    async def on_random(self, instance: int, seed: int) -> str:
        draw = offered(self._instances[instance], "random", self._name)
        return checked_action(await self._run(instance, draw(seed)), self._name, "random")

    async def on_drop(self, instance: int) -> None:
        if running := self._running.pop(instance, None):
            running.cancel()
        self._splits.clear()  # they may lean on the instance that gave them
        self._played.pop(instance, None)
        dropped = self._instances.pop(instance, None)
        if dropped is not None:
            with suppress(Exception):
                async with asyncio.timeout(GRACE_S / 2):
                    await dropped.close()

    async def on_close(self) -> None:
        await asyncio.gather(*(self.on_drop(instance) for instance in list(self._instances)))
        while self._spare:
            await self._spare.pop().close()

    async def _run(self, instance: int, call: Awaitable[Any]) -> Any:
        """Await ``call`` as a task of its own, so that ``on_drop`` can cancel it."""
        task = self._running[instance] = asyncio.ensure_future(call)
        try:
            return await task
        finally:
            if self._running.get(instance) is task:
                del self._running[instance]

    def _any(self) -> Any:
        """Some instance, for what does not depend on the episode."""
        if not self._instances and not self._spare:
            self._spare.append(self._make())
        return next(iter([*self._spare, *self._instances.values()]))

    def _split(self, split: str) -> Sequence[Task]:
        if split not in self._splits:
            self._splits[split] = Tasks(self._any().tasks(split), self._name, split)
        return self._splits[split]

    def _made_task(self, fields: Sequence[Any]) -> Task:
        return task_of(self._task_class, *fields)


def encoded(observation: Observation) -> dict[str, Any]:
    images = [base64.b64encode(STORE.read(image)).decode() for image in observation.images]
    return {
        "text": observation.text,
        "images": images,
        "actions": observation.actions,
        "actor": observation.actor,
    }


def encoded_time_step(step: TimeStep) -> dict[str, Any]:
    return {
        "observation": encoded(step.observation),
        "reward": step.reward,
        "terminated": step.terminated,
        "truncated": step.truncated,
        "success": step.success,
        "answer": step.answer,
    }


def leave() -> None:
    """The parent has gone: end this process and its children, whatever they are doing."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Serve on standard input and output, which become out of the world's reach."""
    if sys.platform == "linux":  # the listening thread may never run while a world holds the lock
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    questions = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)  # what the world prints is for people
    asyncio.run(Server(answers).serve(questions))


if __name__ == "__main__":
    main()
