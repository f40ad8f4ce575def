"""Tests a world against its contract, on tasks of its own."""

from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import ValidationError

from ...core.config import Fleet
from ...core.errors import PluginError, WorldError
from ...core.hosting.pool import Worlds, open_worlds
from ...core.hosting.spec import has_attempts
from . import looks, repeats
from .episodes import (
    Broken,
    Stopwatch,
)
from .examination import UNANSWERED, Examination, Skipped


@dataclass(frozen=True)
class Check:
    name: str
    outcome: Literal["ok", "failed", "skipped"]
    detail: str
    """What was seen, what was wrong, or why it was not looked at."""


@dataclass(frozen=True)
class CheckReport:
    environment: str
    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        return not any(check.outcome == "failed" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        checks = [asdict(check) for check in self.checks]
        return {"environment": self.environment, "ok": self.ok, "checks": checks}


async def check(
    name: str,
    config: dict[str, Any],
    fleet: Fleet | None = None,
    *,
    episodes: int = 8,
    resets: int = 200,
) -> CheckReport:
    """Examine the world called ``name``; whatever it does wrong is in the report.

    ``episodes``: how many are played for each of the checks that play. ``resets``: over how many
    memory must be flat; 0: not looked at. Deadlines are the fleet's.

    Raises:
        PluginError: there is no such world.
        pydantic.ValidationError: ``config`` is not the world's.
    """
    # In processes of their own even if it says that it never blocks: whether it does is to be seen.
    hosted = {"parallel": 2, "isolation": "process"}
    fleet = (fleet or Fleet.model_validate({})).model_copy(update=hosted)
    apart = fleet.model_copy(update={"parallel": 1})
    checks: list[Check] = []
    async with AsyncExitStack() as stack:
        try:
            here = await stack.enter_async_context(await open_worlds(name, config, fleet))
            there = await stack.enter_async_context(await open_worlds(name, config, apart))
        except (PluginError, ValidationError):
            raise
        except Exception as error:
            return CheckReport(name, (Check("opens", "failed", _words(error)),))
        checks.append(Check("opens", "ok", _abilities(here)))
        watch = Stopwatch(fleet)
        exam = Examination(name, config, fleet, episodes, resets, here, there, watch)
        for title, look in EXAMINATIONS.items():
            checks.append(await _outcome(title, look, exam))
    return CheckReport(name, tuple(checks))


def render(report: CheckReport) -> str:
    """A line per check."""
    marks = {"ok": "ok     ", "failed": "FAILED ", "skipped": "skipped"}
    width = max(len(check.name) for check in report.checks)
    lines = [f"{marks[c.outcome]}  {c.name:{width}}  {c.detail}" for c in report.checks]
    verdict = "keeps the contract" if report.ok else "does not keep the contract"
    return "\n".join([*lines, f"{report.environment} {verdict}"])


async def _outcome(
    title: str, look: Callable[[Examination], Awaitable[str]], exam: Examination
) -> Check:
    try:
        return Check(title, "ok", await look(exam))
    except Skipped as why:
        return Check(title, "skipped", str(why))
    except Broken as fault:
        return Check(title, "failed", str(fault))
    except Exception as error:
        return Check(title, "failed", _words(error))


def _after_answers(
    look: Callable[[Examination], Awaitable[str]],
) -> Callable[[Examination], Awaitable[str]]:
    async def guarded(exam: Examination) -> str:
        if not exam.answered:
            raise Skipped(UNANSWERED)
        return await look(exam)

    return guarded


EXAMINATIONS: dict[str, Callable[[Examination], Awaitable[str]]] = {
    "tasks": looks.tasks,
    "splits": looks.splits,
    "answers": looks.answers,
    "deadlines": looks.deadlines,
    "same process": _after_answers(repeats.same_process),
    "two processes": _after_answers(repeats.two_processes),
    "snapshots": _after_answers(repeats.snapshots),
    "killed": _after_answers(repeats.killed),
    "wire": repeats.wire,
    "rewards": _after_answers(looks.rewards),
    "expert": _after_answers(looks.experts),
    "no oracle": _after_answers(looks.no_oracle),
    "memory": _after_answers(looks.memory),
}


def _abilities(worlds: Worlds) -> str:
    known = {"expert": "an expert", "random": "random actions", "snapshot": "snapshots"}
    found = [name for ability, name in known.items() if ability in worlds.abilities]
    if has_attempts(worlds.abilities):
        found.append("attempts")
    return f"with {', '.join(found) or 'nothing optional'}"


def _words(error: Exception) -> str:
    # What a world raised in another process is a WorldError by the name that it had there.
    name = "" if type(error) is WorldError and str(error) else f"{type(error).__name__}: "
    return f"{name}{error}"
