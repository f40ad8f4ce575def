"""What people are told while a run goes on."""

import asyncio
import io
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
from components import SINGLE
from rich.console import Console

from selfwright.commands.console import Display
from selfwright.core.recipe import read
from selfwright.core.types import Action, Completion, Observation, Prompt, Step
from selfwright.loop.events import (
    AlarmRaised,
    Evaluated,
    Event,
    IterationEnded,
    Message,
    Note,
    RunBegan,
    RunEnded,
    StageBegan,
    StageEnded,
    Stepped,
)
from selfwright.loop.progress import Progress
from selfwright.loop.run import run


def shown(terminal: bool = False, heartbeat_s: float = 60.0) -> tuple[Display, io.StringIO]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=100, soft_wrap=not terminal)
    return Display(console, heartbeat_s), out


def a_step(tokens: int) -> Step:
    said = Completion("x", tuple(range(tokens)), (0.0,) * tokens)
    return Step(Observation("o"), Action("x", said, Prompt()), 0.0)


def test_plain_lines_tell_now_and_then_how_far_a_stage_is() -> None:
    display, out = shown(heartbeat_s=0.05)
    progress = Progress(display)
    with progress.stage("evaluating base", 500) as stage:
        for _ in range(1840):
            stage.stepped(a_step(3))
        stage.advance(12)
        until = time.monotonic() + 20
        while not out.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
    lines = out.getvalue().splitlines()
    assert set(lines) == {"evaluating base: 12/500 episodes, 1,840 steps, 5,520 tokens"}
    # Once it is over, nobody speaks of it; and of what counts nothing, never.
    with progress.stage("learning"):
        time.sleep(0.3)
    assert len(out.getvalue().splitlines()) == len(lines)


def test_a_terminal_shows_all_stages_that_are_open() -> None:
    display, out = shown(terminal=True)
    progress = Progress(display)
    with progress.stage("playing", 8) as playing, progress.stage("learning"):
        playing.advance(3)
        time.sleep(0.3)
    assert "playing: 3/8 episodes" in out.getvalue() and "learning" in out.getvalue()


def test_stages_of_one_name_are_told_apart() -> None:
    heard: list[Event] = []
    progress = Progress(heard.append)
    with progress.stage("playing on", 2) as first:
        with progress.stage("playing on", 3) as second:
            second.advance(3)
        first.advance(1)
    with progress.stage("playing on", 4):
        pass
    told = [(type(e).__name__, getattr(e, "name", ""), getattr(e, "done", None)) for e in heard]
    assert told == [
        ("StageBegan", "playing on", None),
        ("StageBegan", "playing on (2)", None),
        ("StageAdvanced", "playing on (2)", 3),
        ("StageEnded", "playing on (2)", None),
        ("StageAdvanced", "playing on", 1),
        ("StageEnded", "playing on", None),
        ("StageBegan", "playing on", None),
        ("StageEnded", "playing on", None),
    ]


def test_text_is_shown_as_it_is_and_notes_once() -> None:
    display, out = shown()
    progress = Progress(display)
    progress.say("[bold]runs/x[/bold] :smile:")
    progress.note("few tasks")
    progress.note("few tasks")
    display(AlarmRaised("after iteration 1 of 2: [red]"))
    assert out.getvalue().splitlines() == [
        "[bold]runs/x[/bold] :smile:",
        "note: few tasks",
        "stopped after iteration 1 of 2: [red]",
    ]


def test_a_run_tells_all_of_itself_in_order(player: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    recipe = tmp_path / "one.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    plan, output = read(recipe, ["iterations=1", "evaluation.every=1"]), tmp_path / "run"
    result = asyncio.run(run(plan, output, heard.append))
    first, *_, last = heard
    assert isinstance(first, RunBegan) and (first.name, first.finished) == ("one", 0)
    assert isinstance(last, RunEnded) and last.result == result
    began, ended = (
        [e.name for e in heard if isinstance(e, kind)] for kind in (StageBegan, StageEnded)
    )
    assert sorted(began) == sorted(ended) and len(set(began)) == len(began)
    assert began == [
        "evaluating base",
        "iteration 1: playing",
        "iteration 1: learning",
        "iteration 1: validating",
        "evaluating final",
    ]
    (iteration,) = [e for e in heard if isinstance(e, IterationEnded)]
    evaluated = [(e.name, e.finished) for e in heard if isinstance(e, Evaluated)]
    assert evaluated == [("base", 0), ("final", 1)]
    # What is told while it is played adds up to what is told at its end.
    steps = last_of(heard, "iteration 1: playing")
    assert steps.steps == iteration.metrics["rollout/environment_steps"]
    assert steps.tokens == iteration.metrics["rollout/tokens"]
    assert not [e for e in heard if isinstance(e, Note)]
    # Asked again, it has nothing new to tell.
    heard.clear()
    asyncio.run(run(plan, output, heard.append))
    assert all(isinstance(e, Message) for e in heard)


def last_of(heard: Sequence[Event], stage: str) -> Stepped:
    return [e for e in heard if isinstance(e, Stepped) and e.name == stage][-1]


def test_a_run_that_breaks_says_that_it_has_ended(player: Path, tmp_path: Path) -> None:
    heard: list[Event] = []
    recipe = tmp_path / "one.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))

    def deaf(event: Event) -> None:
        heard.append(event)
        if isinstance(event, IterationEnded):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asyncio.run(run(read(recipe, ["iterations=1"]), tmp_path / "run", deaf))
    assert heard[-1] == RunEnded(None)
