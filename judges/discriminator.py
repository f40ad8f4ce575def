"""How far an attempt is taken for a teacher's, by the discriminator of an adversarial run."""

import asyncio
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self, cast

from pydantic import Field, model_validator

from ..core.config import JudgeConfig
from ..core.errors import JudgeError
from ..core.files import read_json
from ..core.models.origin import found_base
from ..core.models.scalar import DISCRIMINATOR, ScalarConfig, ScalarModel, Text, config_in
from ..core.store.folder import iterations
from ..core.types import Stop, Trajectory, Verdict


class DiscriminatorJudgeConfig(JudgeConfig):
    run: str
    """The folder of a run whose trainer has a discriminator."""
    token_budget: int = Field(default=4096, ge=1)
    """Padded tokens computed at once."""

    @model_validator(mode="after")
    def _there(self) -> Self:
        if not _files(Path(self.run)):
            raise ValueError(f"no iteration of {self.run!r} holds a discriminator")
        return self


class DiscriminatorJudge:
    """1 - D(episode), D as it was after the last iteration of that run: 1 is like a teacher's.

    It tells likeness, not success: how far that is the same, ``evaluate --judge`` says.
    An episode is read as its own policy saw it. Undecided about episodes that failed to run, or
    hold no prompt: they were played by who is shown none, or stored by a version that kept none.
    """

    Config = DiscriminatorJudgeConfig

    def __init__(self, config: DiscriminatorJudgeConfig) -> None:
        """Raises: JudgeError, ModelError: the run is damaged, or its base model is not there."""
        run = Path(config.run)
        recipe = cast("dict[str, Any]", read_json(run / "recipe.json"))
        last = _files(run)[-1]
        model = found_base(last.parents[1] / "checkpoint") or recipe["policy"]["model"]
        settings = {**config_in(last), "token_budget": config.token_budget}
        self._net = ScalarModel(ScalarConfig.model_validate(settings), model)
        self._net.restore(last)
        self._turn = asyncio.Lock()

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        faults = [_fault(t) for t in trajectories]
        sound = [t for t, fault in zip(trajectories, faults, strict=True) if not fault]
        loop = asyncio.get_running_loop()
        texts = list(map(self._text, sound))
        async with self._turn:  # One thread at a time: they would share a cache.
            found = await loop.run_in_executor(None, self._net.values, texts) if texts else []
        values = iter(found)
        return [
            Verdict(None, fault, "discriminator") if fault else self._verdict(next(values))
            for fault in faults
        ]

    def _verdict(self, z: float) -> Verdict:
        if not math.isfinite(z):
            raise JudgeError(f"the discriminator says {z}; it has diverged in its training")
        like = 1 / (1 + math.exp(max(-700.0, min(700.0, z))))
        return Verdict(like, f"taken for a teacher's with probability {like:.3f}", "discriminator")

    def _text(self, trajectory: Trajectory) -> Text:
        action = trajectory.steps[trajectory.answers[-1]].action
        return action.prompt, action.completion


def _fault(trajectory: Trajectory) -> str:
    """Why there is nothing to be read; empty if there is."""
    if trajectory.stop == Stop.FAILED or not trajectory.steps:
        return trajectory.error or "nothing was done"
    last = trajectory.steps[trajectory.answers[-1]]
    return "" if last.action.prompt.messages else "no prompt is known"


def _files(run: Path) -> list[Path]:
    """The discriminators of a run's iterations, in order."""
    candidates = [folder / "trainer" / DISCRIMINATOR for folder in iterations(run)]
    return [file for file in candidates if file.is_file()]
