"""The far end of the wire: hosts instances of one world, in any Python from 3.8, by itself.

It needs nothing but the standard library and no other file, as the interpreter that has the world
may have none of ours. ``docs/wire.md`` has the protocol. A world here is a class whose methods may
be plain or async:

    tasks(split)        a sequence of tasks: dicts or objects with id, instruction, max_steps; what
                        else they have goes along as their data and comes back
    reset(task, seed)   an observation: a text; or a dict or an object with text, images (PNG
                        files as bytes), actions, actor; or that and a dict, as in Gymnasium
    step(action)        observation, reward, terminated, truncated, as Gymnasium has it (a fifth
                        value, a dict, may hold success); or a dict or an object with these names
    close()             and, if it can: expert, random, answer, named, snapshot and restore,
                        without_oracle

It is made with its settings as keywords; or, if it has a ``Config`` of pydantic, with one of those.
"""

# Worlds may give it anything.
# pyright: reportUnknownVariableType=false, reportUnknownMemberType=false, reportUnknownArgumentType=false

from __future__ import annotations

import asyncio
import importlib
import inspect
import json
import math
import os
import signal
import struct
import sys
import traceback
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import BinaryIO, TypeAlias

    Blobs: TypeAlias = list[bytes]
    Reply: TypeAlias = tuple[Any, Blobs]

PROTOCOL = 1
FRAME_MB = 256
"""The largest frame that is read."""
ABILITIES = ("expert", "random", "answer", "named", "snapshot", "restore", "without_oracle")
BASIC = ("id", "instruction", "max_steps")
GRACE_S = 1.0
"""How long an instance that is dropped may take to close."""


class WorldError(ValueError):
    """What has no place on the wire; the message says what and where."""


# Frames: u32 length of the rest, u32 length of the header, header (JSON), blobs one after another.


def pack(header: dict[str, Any], blobs: Sequence[bytes] = ()) -> bytes:
    """A frame. Raises: WorldError: it is too large, or holds what is no Unicode."""
    header = dict(header, blobs=[len(blob) for blob in blobs])
    try:
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(error.object[error.start])
        raise WorldError(f"U+{code:04X} is half of a surrogate pair, no Unicode") from None
    size = 4 + len(text) + sum(header["blobs"])
    if size > FRAME_MB << 20:
        raise WorldError(f"a frame of {size} bytes; wanted at most {FRAME_MB} MiB")
    return b"".join((struct.pack(">II", size, len(text)), text, *blobs))


class Frames:
    """Takes bytes as they come, and gives the frames that they complete."""

    def __init__(self) -> None:
        self._held = bytearray()

    def read(self, data: bytes) -> list[tuple[dict[str, Any], Blobs]]:
        """Headers and blobs. Raises: ValueError: these are no frames."""
        self._held += data
        found = []
        while len(self._held) >= 8:
            size, at = struct.unpack_from(">II", self._held)
            if not 4 + at <= size <= FRAME_MB << 20:
                raise ValueError(f"no frame begins with {bytes(self._held[:8])!r}")
            if len(self._held) < 4 + size:
                break
            body = bytes(self._held[8 : 4 + size])
            del self._held[: 4 + size]
            header, blobs = dict(json.loads(body[:at].decode("utf-8"))), []
            for count in header.pop("blobs", ()):
                blobs.append(body[at : at + count])
                at += count
            if at != len(body):
                raise ValueError(f"a frame of {len(body)} bytes tells of {at}")
            found.append((header, blobs))
        return found


# Values: what JSON would lose or change without a word is refused, with its place.


def plain(value: Any, where: str) -> Any:
    """``value`` as JSON has it. Raises: WorldError: naming the place of what it cannot hold."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return text_of(value, where)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        if not math.isfinite(value):
            raise WorldError(f"{where} is {shown(value)}; wanted a finite number")
        return float(value)
    if isinstance(value, (list, tuple)):
        return [plain(one, f"{where}[{k}]") for k, one in enumerate(value)]
    if isinstance(value, dict):
        for key in value:
            text_of(key, f"{where}: a key")
        return {key: plain(one, f"{where}.{key}") for key, one in value.items()}
    raise WorldError(f"{where}: {kind_of(value)}, which JSON cannot hold")


def text_of(value: Any, where: str, wanted: str = "a str") -> str:
    if not isinstance(value, str):
        raise WorldError(f"{where} is {shown(value)}; wanted {wanted}")
    if fault := no_unicode(value):
        raise WorldError(f"{where} is no Unicode: {fault}; wanted {wanted}")
    return str(value)


def no_unicode(value: str) -> str:
    """Where ``value`` is no Unicode; empty if it is."""
    try:
        _ = value.isascii() or value.encode("utf-8")
    except UnicodeEncodeError as error:
        at = error.start
        return f"U+{ord(value[at]):04X} at character {at} is half of a surrogate pair"
    return ""


def escaped(value: str) -> str:
    """``value``, as Unicode."""
    return value.encode("utf-8", "backslashreplace").decode()


def kind_of(value: Any) -> str:
    kind = type(value)
    home = "" if kind.__module__ == "builtins" else kind.__module__ + "."
    return home + kind.__qualname__


def shown(value: Any) -> str:
    text = repr(value)
    return f"{kind_of(value)} {text if len(text) <= 80 else text[:77] + '...'}"


def fields(value: Any) -> dict[str, Any]:
    """What a dict or an object holds, by name; nothing of what is neither."""
    if isinstance(value, dict):
        return value
    names = getattr(type(value), "__dataclass_fields__", None) or getattr(value, "_fields", None)
    return {n: getattr(value, n) for n in names} if names else getattr(value, "__dict__", {})


def observation(value: Any, world: str) -> Reply:
    """An observation's header, and its pictures. Raises: WorldError: it is none."""
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], dict):
        value = value[0]
    has = {"text": value} if isinstance(value, str) else fields(value)
    if "text" not in has:
        raise WorldError(f"{world} gave {shown(value)}; wanted an Observation")
    where, blobs = world + ": Observation", []
    images, actions = has.get("images") or (), has.get("actions") or ()
    for name, many in (("images", images), ("actions", actions)):
        if not isinstance(many, (list, tuple)):
            raise WorldError(f"{where}.{name} is {shown(many)}; wanted a tuple")
    for k, image in enumerate(images):
        png = getattr(image, "png", image)
        if not isinstance(png, (bytes, bytearray)) or not png:
            raise WorldError(f"{where}.images[{k}] is {shown(image)}; wanted a PNG file's bytes")
        blobs.append(bytes(png))
    return {
        "text": text_of(has["text"], where + ".text"),
        "images": len(blobs),
        "actions": [text_of(a, f"{where}.actions[{k}]") for k, a in enumerate(actions)],
        "actor": text_of(has.get("actor") or "", where + ".actor"),
    }, blobs


def time_step(value: Any, world: str) -> Reply:
    """A step's header, and its pictures. Raises: WorldError: it is none."""
    if isinstance(value, tuple) and len(value) in (4, 5) and not hasattr(value, "_fields"):
        names = ("observation", "reward", "terminated", "truncated")
        has: dict[str, Any] = dict(zip(names, value))
        has["success"] = len(value) == 5 and fields(value[4]).get("success", False)
    else:
        has = fields(value)
    if "observation" not in has or "reward" not in has:
        raise WorldError(f"{world} gave {shown(value)}; wanted a TimeStep")
    header: dict[str, Any] = {}
    header["observation"], blobs = observation(has["observation"], world)
    where, reward = world + ": TimeStep", has["reward"]
    number = isinstance(reward, (int, float)) and not isinstance(reward, bool)
    if not number or not math.isfinite(reward):
        raise WorldError(f"{where}.reward is {shown(reward)}; wanted a finite float")
    header["reward"] = float(reward)
    for name in ("terminated", "truncated", "success"):
        flag = has.get(name, False)
        if not isinstance(flag, bool):
            raise WorldError(f"{where}.{name} is {shown(flag)}; wanted a bool")
        header[name] = flag
    if header["success"] and not header["terminated"]:
        raise WorldError(f"{where}.success without terminated; success ends an episode")
    answer = has.get("answer")
    header["answer"] = None if answer is None else text_of(answer, where + ".answer")
    return header, blobs


class Given(dict):  # pyright: ignore[reportMissingTypeArgument]
    """A task, for worlds that look at its fields by name, as an object's or as a dict's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Tasks:
    """The tasks of one world, as it makes them and as they are sent: id, instruction, max_steps,
    their other fields as canonical JSON, and why they cannot be played (empty if they can)."""

    def __init__(self, plugin: Any, world: str) -> None:
        self._world = world
        self._kind = getattr(getattr(plugin, "spec", None), "task", None)
        """Their class, where the world is written with ours."""
        self._typed = importlib.import_module("selfwright.core.tasks") if self._kind else None

    def sent(self, task: Any, place: str) -> list[Any]:
        """Raises: WorldError: it is no task, or would not come back as it is."""
        where, has = self._world + ": " + place, fields(task)
        if not all(name in has for name in BASIC):
            raise WorldError(f"{where} is {shown(task)}; wanted a Task")
        basic = [_basic(has[name], name, f"{where}.{name}") for name in BASIC]
        faults = [(name, no_unicode(has[name])) for name in BASIC[:2]]
        if any(fault for _, fault in faults):
            words = [f"{where}.{name} is no Unicode: {fault}" for name, fault in faults if fault]
            return [*map(escaped, basic[:2]), basic[2], "{}", "; ".join(words)]
        if self._typed:
            return [*basic, self._typed.task_data(task), ""]
        rest = {key: plain(one, where + "." + key) for key, one in has.items() if key not in BASIC}
        data = json.dumps(rest, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
        return [*basic, data, ""]

    def received(self, sent: Sequence[Any]) -> Any:
        """The task again."""
        if self._typed:
            return self._typed.task_of(self._kind, *sent[:4])
        return Given(zip(BASIC, sent), **json.loads(sent[3]))


def _basic(value: Any, name: str, where: str) -> Any:
    if name != "max_steps":
        right, wanted = isinstance(value, str) and value, "a text"
    else:
        right = isinstance(value, int) and not isinstance(value, bool) and 1 <= value < 2**31
        wanted = "an int of at least 1, below 2**31"
    if not right:
        plainly = type(value) in (int, str)
        raise WorldError(f"{where} is {repr(value) if plainly else shown(value)}; wanted {wanted}")
    return str(value) if isinstance(value, str) else int(value)


def spec(plugin: Any) -> dict[str, Any]:
    """What a world's class says of itself, as far as JSON holds it."""
    says = fields(getattr(plugin, "spec", {})).items()
    has = {name: one for name, one in says if name not in ("task", "isolation")}
    if "tools" in has:
        has["tools"] = [fields(tool) for tool in has["tools"]]
    return plain(has, "spec")


class FarEnd:
    """Answers the questions of whoever started it."""

    def __init__(self, out: BinaryIO) -> None:
        self._out = out
        self._make: Callable[[], Any] = lambda: None
        self._world = ""
        self._tasks: Any = None
        self._spare: list[Any] = []
        """Made, and not in play."""
        self._instances: dict[int, Any] = {}
        self._played: dict[int, Any] = {}
        """The task that each instance plays."""
        self._calls: dict[int, Any] = {}
        """Calls in progress, by their numbers; and of which instance each is."""
        self._splits: dict[str, Any] = {}

    async def serve(self, questions: int) -> None:
        """Answer what comes from that file, until it ends; then this process does, too."""
        frames = Frames()

        def listen() -> None:
            try:
                data = os.read(questions, 1 << 20)
                for question, _ in frames.read(data):
                    self._begin(question)
            except ValueError as error:
                print(f"the wire: {error}", file=sys.stderr)
                data = b""
            if not data:
                leave()

        asyncio.get_running_loop().add_reader(questions, listen)
        await asyncio.Event().wait()

    def _begin(self, question: dict[str, Any]) -> None:
        number = question.pop("id")
        task = asyncio.ensure_future(self._answer(number, question))
        self._calls[number] = task, question.get("instance")
        task.add_done_callback(lambda _: self._calls.pop(number, None))

    async def _answer(self, number: int, question: dict[str, Any]) -> None:
        what = question.pop("call", "")
        try:
            if (method := getattr(self, f"on_{what}", None)) is None:
                raise WorldError(f"no call {what!r}; this end speaks protocol {PROTOCOL}")
            value = await method(**question)
            value, blobs = value if isinstance(value, tuple) else (value, [])
            frame = pack({"id": number, "value": value}, blobs)
        except (Exception, asyncio.CancelledError) as error:
            frame = pack({"id": number, "error": told_error(error)})
        self._out.write(frame)
        self._out.flush()

    async def on_hello(self, protocol: int, **_: Any) -> Any:
        if protocol != PROTOCOL:
            fault = f"protocol {protocol!r} is asked for; this end speaks {PROTOCOL}"
            raise WorldError(fault)
        speaks = "Python " + sys.version.split()[0]
        return {"protocol": PROTOCOL, "frame_mb": FRAME_MB, "speaks": speaks}

    async def on_open(
        self, world: str, target: str, config: str, without_oracle: bool, path: list[str]
    ) -> Any:
        sys.path += [folder for folder in path if folder not in sys.path]
        module, _, name = target.partition(":")
        plugin: Any = importlib.import_module(module)
        for part in name.split("."):
            plugin = getattr(plugin, part)
        self._world, self._tasks = world, Tasks(plugin, world)
        settings = json.loads(config)
        validate = getattr(getattr(plugin, "Config", None), "model_validate_json", None)

        def make() -> Any:
            instance = plugin(validate(config)) if validate else plugin(**settings)
            return offered(instance, "without_oracle", world)() if without_oracle else instance

        self._make = make
        able = [name for name in ABILITIES if callable(getattr(self._any(), name, None))]
        return {"abilities": able, "spec": spec(plugin)}

    async def on_tasks(self, split: str) -> Any:
        return len(await self._split(split))

    async def on_task(self, split: str, indices: list[int]) -> Any:
        tasks = await self._split(split)
        return [self._tasks.sent(tasks[k], f"{split}[{k}]") for k in indices]

    async def on_named(self, name: str) -> Any:
        task = await done(offered(self._any(), "named", self._world)(name))
        return self._tasks.sent(task, f"named({name!r})")

    async def on_answer(self, task: list[Any], action: str) -> Any:
        world = self._any()
        return await self._answer_of(world, self._tasks.received(task), action)

    async def on_add(self, instance: int) -> Any:
        self._instances[instance] = self._spare.pop() if self._spare else self._make()

    async def on_reset(self, instance: int, task: list[Any], seed: int) -> Any:
        world = self._instances[instance]
        self._played[instance] = played = self._tasks.received(task)
        return observation(await done(world.reset(played, seed)), self._world)

    async def on_step(self, instance: int, action: str, snapshot: bool = False) -> Any:
        world = self._instances[instance]
        header, blobs = time_step(await done(world.step(action)), self._world)
        if header["answer"] is None and hasattr(world, "answer"):
            header["answer"] = (await self._answer_of(world, self._played[instance], action)) or ""
        if snapshot and not header["terminated"] and not header["truncated"]:
            header["snapshot"] = await self.on_snapshot(instance)
        return header, blobs

    async def on_expert(self, instance: int) -> Any:
        action = await self._asked(instance, "expert")
        return None if action is None else self._text(action, "expert")

    async def on_random(self, instance: int, seed: int) -> Any:
        return self._text(await self._asked(instance, "random", seed), "random")

    async def on_snapshot(self, instance: int) -> Any:
        return self._text(await self._asked(instance, "snapshot"), "snapshot")

    async def on_restore(self, instance: int, task: list[Any], state: str) -> Any:
        self._played[instance] = played = self._tasks.received(task)
        return observation(await self._asked(instance, "restore", played, state), self._world)

    async def on_cancel(self, number: int) -> Any:
        if number in self._calls:
            self._calls[number][0].cancel()

    async def on_drop(self, instance: int) -> Any:
        for call, of in list(self._calls.values()):
            if of == instance and call is not asyncio.current_task():
                call.cancel()
        self._played.pop(instance, None)
        if (dropped := self._instances.pop(instance, None)) is not None:
            await closed(dropped)

    async def on_close(self) -> Any:
        for instance in list(self._instances):
            await self.on_drop(instance)
        while self._spare:
            await closed(self._spare.pop())

    async def _asked(self, instance: int, method: str, *arguments: Any) -> Any:
        return await done(offered(self._instances[instance], method, self._world)(*arguments))

    def _text(self, value: Any, method: str) -> str:
        return text_of(value, f"{self._world}.{method}()", "an action, a str")

    def _any(self) -> Any:
        """Some instance, for what does not depend on the episode."""
        if not self._spare:
            self._spare.append(self._make())
        return self._spare[0]

    async def _split(self, split: str) -> Any:
        if split not in self._splits:
            tasks = await done(self._any().tasks(split))
            if not hasattr(tasks, "__len__"):
                fault = f"{self._world}: {split} is {shown(tasks)}; wanted a sequence of tasks"
                raise WorldError(fault)
            self._splits[split] = tasks
        return self._splits[split]

    async def _answer_of(self, world: Any, task: Any, action: str) -> str | None:
        answer = await done(offered(world, "answer", self._world)(task, action))
        return None if answer is None else text_of(answer, self._world + ".answer()")


async def done(value: Any) -> Any:
    return await value if inspect.isawaitable(value) else value


def offered(world: Any, method: str, name: str) -> Any:
    """Raises: WorldError: the world does not have that method."""
    if not (found := getattr(world, method, None)):
        raise WorldError(f"{name} has no method {method!r}")
    return found


async def closed(world: Any) -> None:
    try:
        await asyncio.wait_for(done(world.close()), GRACE_S)
    except Exception:
        traceback.print_exc()


def told_error(error: BaseException) -> dict[str, str]:
    """An error, for the other side."""
    lines = map(escaped, traceback.format_exception(type(error), error, error.__traceback__))
    kind, text = type(error).__name__, escaped(str(error))
    return {"kind": kind, "text": text, "traceback": "".join(lines)}


def leave() -> None:
    """Nobody listens any more: end this process, whatever it is doing, and what it started."""
    if os.getpgrp() == os.getpid():
        os.killpg(0, signal.SIGKILL)
    os._exit(1)


def main() -> None:
    """Serve on standard input and output, which become out of the world's reach."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [folder for folder in sys.path if os.path.abspath(folder) != here]
    questions = os.dup(0)
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # what the world prints is for people
    asyncio.run(FarEnd(answers).serve(questions))


if __name__ == "__main__":
    main()
