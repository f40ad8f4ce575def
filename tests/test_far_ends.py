"""Worlds where nothing of ours is: in the oldest Python there is, and in Node."""

import ast
import asyncio
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompts import png
from pydantic import ValidationError
from test_worlds import gone

from selfwright.core.config import Fleet
from selfwright.core.errors import PluginError, WorldError
from selfwright.core.hosting import far_end
from selfwright.core.hosting.pool import Worlds, open_worlds
from selfwright.core.hosting.spec import spec_from
from selfwright.core.images import STORE
from selfwright.core.recipe import section
from selfwright.core.types import Tool
from selfwright.environments.contract import check, render
from selfwright.loop.evaluate import evaluate_checkpoint

HERE = Path(__file__).parent
FAR = HERE.parent / ".venv-far" / "bin" / "python"
"""Made by the Makefile."""
SEED = 2**62 + 1
"""More than a float, or JavaScript's number, can hold."""


def node() -> str:
    """Node: the system's, or the one that comes with Playwright."""
    from playwright._impl._driver import compute_driver_executable

    return shutil.which("node") or str(compute_driver_executable()[0])


def settings(kind: str) -> tuple[str, dict[str, Any]]:
    """The world's name, and where it lives."""
    if kind == "node":
        return "lamps", {"command": [node(), str(HERE / "lamps.mjs")]}
    return "far_worlds:Lamps", {"python": str(FAR)}


def fleet(kind: str, **more: Any) -> Fleet:
    where = settings(kind)[1]
    if "command" in where:
        where["command"] = tuple(where["command"])
    return Fleet.model_validate({"parallel": 2, **where, **more})


FAR_KINDS = ["python", pytest.param("node", marks=pytest.mark.node)]


@pytest.fixture(autouse=True)
def _found(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    # Modules of a world elsewhere are found there, or in the folder that we were started in.
    monkeypatch.chdir(HERE)


def hosted(
    kind: str, use: Callable[[Worlds], Awaitable[None]], config: dict[str, Any] | None = None
) -> None:
    async def run() -> None:
        name, _ = settings(kind)
        async with await open_worlds(name, config or {}, fleet(kind)) as worlds:
            await use(worlds)

    asyncio.run(run())


@pytest.mark.parametrize("kind", FAR_KINDS)
def test_it_keeps_the_contract(kind: str) -> None:
    name, _ = settings(kind)
    report = asyncio.run(check(name, {}, fleet(kind), episodes=4, resets=60))
    assert report.ok, render(report)
    outcomes = {one.name: one.outcome for one in report.checks}
    assert [name for name, one in outcomes.items() if one == "skipped"] == ["no oracle"]


@pytest.mark.parametrize("kind", FAR_KINDS)
def test_all_comes_over_as_it_is(kind: str, tmp_path: Path) -> None:
    (tmp_path / "it.png").write_bytes(png())

    async def use(worlds: Worlds) -> None:
        assert worlds.abilities == {"expert", "snapshot", "restore"}
        (task,) = await worlds.tasks("test").take([39])
        assert (task.id, task.instruction, task.max_steps) == ("test 39", "Find it.", 12)
        async with worlds.lease() as world:
            first = await world.reset(task, SEED)
            goal = "[6, 'söuth']" if kind == "python" else "6,söuth"
            assert first.text == f"{SEED} at lamp 0 after 0; lit is {goal}"
            assert first.actions == ("east", "west")
            assert STORE.read(first.images[0]) == png()
            for turn in range(1, 6):
                step = await world.step("east")
                assert (step.reward, step.terminated, step.success) == (0.0, False, False), turn
            world.snapshots = True
            await world.step("west")
            kept = world.snapshot
            with pytest.raises(WorldError, match=r"half of it: \\ud83d") as oops:
                await world.step("die")
            wanted = "ZeroDivisionError" if kind == "python" else "RangeError"
            assert type(oops.value).__name__ == wanted
        async with worlds.lease() as one, worlds.lease() as other:
            assert (await other.restore(task, kept)).text.startswith(f"{SEED} at lamp 4 after 6;")
            await other.step("east")
            last = await other.step("east")
            assert (last.reward, last.terminated, last.success) == (1.0, True, True)
            await one.reset(task, 0)

    hosted(kind, use, {"picture": str(tmp_path / "it.png")})


@pytest.mark.parametrize(
    ("kind", "fault", "said"),
    [
        ("python", "numpy steps", r"train\[3\]\.max_steps is numpy\.int64 .*wanted an int of at"),
        ("python", "a set", r"train\[3\]\.lit: set, which JSON cannot hold"),
        ("python", "numpy reward", r"TimeStep\.reward is numpy\.float32 .*; wanted a finite float"),
        ("python", "half", r"Observation\.text is no Unicode: U\+D83D at character 6"),
        pytest.param(
            "node", "half a step", r"train\[3\]\.max_steps: 12\.5; wanted", marks=pytest.mark.node
        ),
        pytest.param("node", "a set", r"train\[3\]\.lit: Set", marks=pytest.mark.node),
        pytest.param("node", "half", r"step\.observation.*no Unicode", marks=pytest.mark.node),
    ],
)
def test_what_cannot_be_sent_is_refused_at_once_with_its_place(
    kind: str, fault: str, said: str
) -> None:
    async def use(worlds: Worlds) -> None:
        with pytest.raises(WorldError, match=said):
            (task,) = await worlds.tasks("train").take([3])
            async with worlds.lease() as world:
                await world.reset(task, 1)
                await world.step("east")

    hosted(kind, use, {"fault": fault})


PARENT = """
import asyncio, sys, time
import psutil
from selfwright.core.config import Fleet
from selfwright.core.hosting.pool import open_worlds

async def main():
    fleet = Fleet.model_validate_json(sys.argv[2])
    worlds = await open_worlds(sys.argv[1], {}, fleet)
    async with worlds.lease() as world:
        await world.reset(await worlds.tasks("train").at(0), 0)
        family = psutil.Process().children(recursive=True)
        print(*(child.pid for child in family), flush=True)
        time.sleep(60)

asyncio.run(main())
"""


@pytest.mark.parametrize("kind", FAR_KINDS)
def test_a_killed_parent_leaves_nothing_behind(kind: str) -> None:
    name, _ = settings(kind)
    told = fleet(kind).model_dump_json()
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, name, told], stdout=subprocess.PIPE
    ) as parent:
        assert parent.stdout
        children = [int(word) for word in parent.stdout.readline().split()]
        assert len(children) >= 3  # the guardian, one that plays, one that is asked
        parent.send_signal(signal.SIGKILL)
    asyncio.run(gone(*children))


@pytest.mark.parametrize("kind", FAR_KINDS)
def test_a_killed_child_is_noticed_and_replaced(kind: str) -> None:
    async def use(worlds: Worlds) -> None:
        task = await worlds.tasks("train").at(0)
        async with worlds.lease() as world:
            await world.reset(task, 0)
            os.kill(worlds.processes[0], signal.SIGKILL)
            with pytest.raises(WorldError, match="SIGKILL"):
                await world.step("east")
            assert world.gone
        async with worlds.lease() as world:
            await world.reset(task, 0)
            assert (await world.step("east")).reward == 0
        # And the one that is asked about tasks.
        asked = {child.pid for child in psutil.Process().children()} - {*worlds.processes}
        for pid in asked:
            if "far_end.py" in (words := " ".join(psutil.Process(pid).cmdline())) or (
                "lamps.mjs" in words
            ):
                os.kill(pid, signal.SIGKILL)
        assert await worlds.tasks("validation").size() == 40

    hosted(kind, use)


def test_a_world_that_is_not_there_says_so() -> None:
    async def run(name: str, **where: Any) -> None:
        await open_worlds(name, {}, Fleet.model_validate(where))

    cases: list[tuple[str, dict[str, Any], type[Exception], str]] = [
        ("far_worlds:Lamps", {"python": "/nowhere/python"}, WorldError, "No such file.*wanted a"),
        ("far_worlds:Lamp", {"python": str(FAR)}, WorldError, "no attribute 'Lamp'"),
        ("lamps", {"python": str(FAR)}, PluginError, "elsewhere they are module:Class"),
        ("lamps", {"command": ("/bin/echo", "hello")}, WorldError, "speaking no protocol|died"),
    ]
    for name, where, kind, said in cases:
        with pytest.raises(kind, match=said):
            asyncio.run(run(name, **where))
    with pytest.raises(ValidationError, match="give one of them"):
        Fleet.model_validate({"python": "a", "command": ("b",)})


@pytest.mark.parametrize("kind", FAR_KINDS)
def test_a_recipe_says_where_a_world_lives(kind: str, tmp_path: Path) -> None:
    name, where = settings(kind)
    key = "python" if kind == "python" else "command"
    value = where[key] if kind == "python" else f"[{', '.join(where[key])}]"
    overrides = [f"environment.{key}={value}", "environment.fault=none"]
    found, fleet = section("environment", name, overrides)
    assert found.config.model_dump() == {"fault": "none"} and fleet.elsewhere
    told = asyncio.run(
        evaluate_checkpoint("expert", name, overrides, "test", 6, 0, None, tmp_path / "out")
    )
    assert (told["successes"], told["invalid_share"]) == (6, 0)
    assert told["environment"]["fault"] == "none"


def test_the_far_end_is_plain_python_from_3_8() -> None:
    source = Path(far_end.__file__).read_text()
    ast.parse(source, feature_version=(3, 8))
    modules = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [node.module or ""]
            if isinstance(node, ast.ImportFrom)
            else [one.name for one in node.names]
        )
    }
    assert modules <= sys.stdlib_module_names


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab"), inner, max_size=3),
    max_leaves=8,
)


@given(
    st.lists(st.tuples(values, st.lists(st.binary(max_size=40), max_size=3)), max_size=4),
    st.integers(1, 17),
)
def test_frames_come_out_as_they_went_in_however_they_are_cut(
    sent: list[tuple[Any, list[bytes]]], cut: int
) -> None:
    data = b"".join(far_end.pack({"value": value}, blobs) for value, blobs in sent)
    frames, found = far_end.Frames(), list[Any]()
    for k in range(0, len(data), cut):
        found += [(header["value"], blobs) for header, blobs in frames.read(data[k : k + cut])]
    assert found == sent


@given(st.binary(min_size=8, max_size=40))
def test_what_is_no_frame_is_refused_or_waited_for(data: bytes) -> None:
    size, length = int.from_bytes(data[:4]), int.from_bytes(data[4:8])
    sound = 4 + length <= size <= far_end.FRAME_MB << 20
    try:
        found = far_end.Frames().read(data)
    except ValueError:
        assert not sound or len(data) >= 4 + size  # a header that is no JSON object
    else:
        assert sound and (not found or len(data) >= 4 + size)


def test_what_a_world_elsewhere_says_of_itself_is_checked() -> None:
    schema = {"type": "object", "b": 1, "a": 2}
    tools = [{"name": "click", "description": "Click.", "parameters": schema}]
    found = spec_from({"tools": tools, "repeatable": "text", "recycle_after": 5}, "w")
    assert found.tools == (Tool("click", "Click.", '{"a":2,"b":1,"type":"object"}'),)
    assert (found.repeatable, found.recycle_after) == ("text", 5)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"repeatabel": "no"}, "spec.repeatabel is no field"),
        ({"repeatable": "maybe"}, "spec.repeatable: "),
        ({"recycle_after": 0}, "recycle_after is 0; wanted at least 1"),
        ({"start_timeout_s": -1}, "start_timeout_s is -1; wanted more than 0"),
        ({"tools": [{"name": "click"}]}, "wanted name, description, parameters"),
        ({"per_process": "4"}, "spec.per_process"),
    ]
    for says, said in wrong:
        with pytest.raises(WorldError, match=said):
            spec_from(says, "w")
