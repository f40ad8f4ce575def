"""How it goes, for people: live lines on a terminal, plain ones elsewhere."""

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..core.types import Metrics
from ..loop.events import (
    AlarmRaised,
    Evaluated,
    Event,
    IterationEnded,
    Message,
    Note,
    StageAdvanced,
    StageBegan,
    StageEnded,
    Stepped,
)
from ..loop.result import points, seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.status import Status

HEARTBEAT_S = 30.0
"""Where lines are plain, a stage that lasts says so this often."""


@dataclass
class Shown:
    """A stage as people see it."""

    began: StageBegan
    done: int = 0
    steps: int = 0
    tokens: int = 0

    @property
    def line(self) -> str:
        began, parts = self.began, list[str]()
        if began.total:
            parts.append(f"{self.done}/{began.total} {began.unit}")
        if self.steps:
            parts += [f"{self.steps:,} steps", f"{self.tokens:,} tokens"]
        return f"{began.name}: {', '.join(parts)}" if parts else began.name


class Display:
    """A listener that shows everything on a console."""

    def __init__(self, console: "Console", heartbeat_s: float = HEARTBEAT_S) -> None:
        self._console = console
        self._heartbeat_s = heartbeat_s
        self._stages: dict[str, Shown] = {}
        """Those that are open; two are while one iteration is learned from, the next played."""
        self._status: Status | None = None
        self._quiet = threading.Event()
        """Set when no stage is open any more."""

    def __call__(self, event: Event) -> None:
        match event:
            case StageBegan():
                self._begin(event)
            case StageEnded():
                self._end(event.name)
            case StageAdvanced() | Stepped():
                self._advance(event)
            case _:
                if text := words(event):
                    self.say(text, bold=isinstance(event, Message) and event.title)

    def say(self, text: str, bold: bool = False) -> None:
        """One line that stays. The text is shown as it is, never as markup."""
        style = "bold" if bold else None
        self._console.print(text, style=style, markup=False, emoji=False, highlight=False)

    def _begin(self, event: StageBegan) -> None:
        first = not self._stages
        self._stages[event.name] = Shown(event)
        if self._console.is_terminal:
            if self._status is None:
                self._status = self._console.status("")
                self._status.start()
            self._redraw()
        elif first:
            self._quiet = threading.Event()
            threading.Thread(target=self._beat, args=(self._quiet,), daemon=True).start()

    def _end(self, name: str) -> None:
        self._stages.pop(name, None)
        if self._stages:
            self._redraw()
            return
        self._quiet.set()
        if self._status is not None:
            self._status.stop()
            self._status = None

    def _advance(self, event: StageAdvanced | Stepped) -> None:
        stage = self._stages.get(event.name)
        if stage is None:
            return
        if isinstance(event, Stepped):
            stage.steps, stage.tokens = event.steps, event.tokens
        else:
            stage.done = event.done
        self._redraw()

    def _redraw(self) -> None:
        if self._status is not None:
            from rich.text import Text

            self._status.update(Text("\n".join(one.line for one in self._stages.values())))

    def _beat(self, quiet: threading.Event) -> None:
        """A line for every stage that counts something, now and then, until all are over."""
        while not quiet.wait(self._heartbeat_s):
            for stage in list(self._stages.values()):
                if stage.line != stage.began.name:
                    self.say(stage.line)


def words(event: Event) -> str:
    """The line that stays of an event; empty if none does."""
    match event:
        case Message():
            return event.text
        case Note():
            return f"note: {event.text}"
        case AlarmRaised():
            return f"stopped {event.text}"
        case IterationEnded():
            return iteration_words(event.index, event.iterations, event.metrics)
        case Evaluated(name, _, result):
            low, high = result.interval
            return (
                f"{name}: {result.successes} of {result.tasks} {result.split} tasks solved, "
                f"{result.success_rate:.1%} [{low:.1%}, {high:.1%}]"
            )
        case _:
            return ""


def iteration_words(index: int, iterations: int, metrics: Metrics) -> str:
    """One iteration for people."""
    parts = [f"iteration {index + 1}/{iterations}"]
    if points(metrics):
        parts.append(f"validation {metrics['validation/success']:.1%}")
    if "judge/score" in metrics:
        parts.append(f"score {metrics['judge/score']:.3f}")
    if "train/loss" in metrics:
        parts.append(f"loss {metrics['train/loss']:.3f}")
    parts.append(f"{metrics.get('train/examples', 0):.0f} examples")
    if metrics["rollout/failed"]:
        parts.append(f"{metrics['rollout/failed']:.0f} failed")
    return ", ".join([*parts, f"{sum(seconds(metrics).values()):.1f} s"])
