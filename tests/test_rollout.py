"""Episodes: every wait under a deadline, whatever goes wrong is data."""

import asyncio
import sys
from pathlib import Path
from typing import Any

import pytest

from selfwright.core.config import Fleet
from selfwright.core.draw import draw, starts
from selfwright.core.errors import TooManyFailures
from selfwright.core.rollout import ExpertPlayer, Player, RandomPlayer, failures_by_name, rollouts
from selfwright.core.types import Stop, Trajectory
from selfwright.core.worlds import open_worlds


@pytest.fixture(autouse=True)
def _fixtures_importable(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


def played(kind: str, fault: str, player: Player, count: int = 4, **fleet: Any) -> list[Trajectory]:
    settings = Fleet.model_validate({"parallel": 2, "max_failures": 1.0, **fleet})

    async def run() -> list[Trajectory]:
        opened = await open_worlds(f"faulty_worlds:{kind}", {"fault": fault}, settings)
        async with opened as worlds:
            return await rollouts(
                player, worlds, starts(draw(worlds.tasks("train"), count, 0), 1, 0), 0
            )

    return asyncio.run(run())


@pytest.mark.parametrize("player", [ExpertPlayer(timeout_s=0.2), RandomPlayer(timeout_s=0.2)])
@pytest.mark.parametrize("kind", ["Faulty", "Together"])
def test_an_expert_that_thinks_for_ever_is_a_failed_episode(kind: str, player: Player) -> None:
    trajectories = played(kind, "pensive", player)
    assert failures_by_name(trajectories) == {"TimeoutError": 4}
    assert all("took longer than 0.2 s" in t.error for t in trajectories)
    assert all(t.stop == Stop.FAILED and not t.steps for t in trajectories)


def test_an_instance_that_cannot_be_made_is_a_failed_episode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from faulty_worlds import Faulty  # pyright: ignore

    untyped: Any = Faulty
    monkeypatch.setattr(untyped, "made", 0)
    # The one that could be made plays on; whoever wanted another gets none.
    trajectories = played("Faulty", "one only", ExpertPlayer(), count=6)
    failed = [t for t in trajectories if t.stop == Stop.FAILED]
    assert 1 <= len(failed) < 6
    assert {t.error for t in failed} == {"RuntimeError: there was only one"}
    assert all(t.success for t in trajectories if t not in failed)


def test_too_many_failures_say_the_first() -> None:
    with pytest.raises(TooManyFailures, match=r"max_failures=0.2 .*") as caught:
        played("Faulty", "pensive", ExpertPlayer(timeout_s=0.1), max_failures=0.2)
    assert "the world's expert took longer than 0.1 s" in str(caught.value)
