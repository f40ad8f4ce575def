"""Verdicts on many groups of attempts: at once, each under a deadline, every failure counted."""

import asyncio
from collections.abc import Sequence
from itertools import groupby

from ..checked import checked_verdicts, mended
from ..config import JudgeConfig
from ..errors import JudgeError
from ..protocols import Judge
from ..types import Judged, Trajectory, Verdict
from .waiting import Failures, deadline

BROKEN = "broken"
"""What stands for the judge's name in a verdict that it failed to give."""


async def judged(
    judge: Judge, trajectories: Sequence[Trajectory], config: JudgeConfig
) -> list[Judged]:
    """One verdict each, in order; neighbours with one task and seed are judged together.

    A judge that raises, is late, or answers rubbish has not decided: that is not a 0.

    Raises:
        JudgeError: this happened with more than ``config.max_failures`` of the groups; holds the
            first traceback.
    """
    groups = [list(group) for _, group in groupby(trajectories, key=lambda t: (t.task.id, t.seed))]
    failures = Failures(
        len(groups),
        config.max_failures,
        JudgeError,
        "groups of attempts could not be judged",
        "judge.max_failures",
    )
    room = asyncio.Semaphore(config.parallel)

    async def one(group: list[Trajectory]) -> list[Verdict]:
        async with room:
            try:
                async with deadline(config.timeout_s, "the judge"):
                    return checked_verdicts(await judge.judge(group), len(group))
            except Exception as cause:
                failures.add(cause)
                words = mended(f"{type(cause).__name__}: {cause}")
                return [Verdict(None, words, BROKEN)] * len(group)

    try:
        async with asyncio.TaskGroup() as several:
            tasks = [several.create_task(one(group)) for group in groups]
    except* JudgeError as errors:
        raise errors.exceptions[0] from None
    return [
        Judged(trajectory, verdict)
        for group, task in zip(groups, tasks, strict=True)
        for trajectory, verdict in zip(group, task.result(), strict=True)
    ]
