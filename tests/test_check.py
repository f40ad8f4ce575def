"""The contract as a tool: built-in worlds pass it, each fault fails the check that is for it."""

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest

from selfwright.core.config import Fleet
from selfwright.core.errors import PluginError
from selfwright.environments.contract import CheckReport, check, render

GAMES: list[dict[str, Any]] = [
    {"game": "coin", "parameters": {"numLocations": 4}},
    {"game": "sorting", "listed": False},
    {"game": "cookingworld"},
]
"""Listed actions and not, small and large: each costs three Javas. All games are played in
test_textworld_express."""


@pytest.fixture(autouse=True)
def _fixtures_importable(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


def examined(name: str, config: dict[str, Any], **settings: Any) -> CheckReport:
    fleet = Fleet.model_validate({"reset_timeout_s": 20.0, "step_timeout_s": 5.0, **settings})
    return asyncio.run(check(name, config, fleet, episodes=4, resets=60))


def failed(report: CheckReport) -> dict[str, str]:
    return {one.name: one.detail for one in report.checks if one.outcome == "failed"}


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("countdown", {}),
        ("pictures", {"attempts": 2}),
        *(
            pytest.param(name, config, marks=pytest.mark.multi)
            for name, config in [
                ("countdown", {"numbers": 4, "operators": "+-*/"}),
                ("faulty_worlds:Faulty", {}),
                ("faulty_worlds:Together", {}),
                ("faulty_worlds:Sum", {}),
            ]
        ),
        *(pytest.param("textworld_express", game, marks=pytest.mark.jvm) for game in GAMES),
    ],
)
def test_a_sound_world_keeps_the_contract(name: str, config: dict[str, Any]) -> None:
    report = examined(name, config)
    assert report.ok, render(report)
    told = json.loads(json.dumps(report.to_json()))
    assert told["ok"] is True and told["environment"] == name
    looked = {one["name"]: one["outcome"] for one in told["checks"]}
    assert set(looked.values()) <= {"ok", "skipped"}
    whole = ("countdown", "pictures", "faulty_worlds:Sum")
    attempts = "ok" if name.startswith(whole) else "skipped"
    assert looked["no oracle"] == attempts


@pytest.mark.multi
@pytest.mark.parametrize(
    ("kind", "fault", "name", "said"),
    [
        ("Apart", "no start", "opens", "the licence has run out"),
        ("Faulty", "no steps", "tasks", "max_steps is 0; wanted an int of at least 1"),
        ("Faulty", "numbers", "tasks", "train[0].id is 0; wanted a text"),
        ("Faulty", "namesakes", "splits", "two tasks are called 'train 0': 'Say right, 0.'"),
        ("Faulty", "half id", "tasks", "train[0].id is no Unicode: U+D83D at character 7"),
        ("Faulty", "half reset", "answers", "Observation.text is no Unicode: U+D83D at character"),
        ("Faulty", "narrow", "answers", "ValueError: Seed must be between 0 and 2**32 - 1"),
        ("Sum", "half answer", "answers", "answer() is no Unicode: U+D83D at character 0"),
        ("Faulty", "shared tasks", "splits", "is in train and in validation"),
        ("Faulty", "moody", "same process", "does not repeat itself: after reset once"),
        ("Faulty", "moody", "two processes", "does not repeat itself"),
        ("Faulty", "generous", "rewards", "paid 2; wanted 0 to 1"),
        ("Faulty", "liar", "expert", "acted 4 times on 'train 0' to the end and did not succeed"),
        ("Faulty", "leak", "memory", "over 60 resets, after as many to warm up; wanted at most 32"),
        ("Sum", "tells", "no oracle", "answers a wrong attempt '...? Hm.' and a right one"),
        ("Sum", "stingy", "no oracle", "pays the expert's attempts 0; wanted 1 for a right one"),
        ("Sum", "ends", "no oracle", "ended at attempt 1, which tells that it was right"),
    ],
)
def test_a_fault_fails_the_check_that_is_for_it(
    kind: str, fault: str, name: str, said: str
) -> None:
    report = examined(f"faulty_worlds:{kind}", {"fault": fault})
    assert not report.ok
    assert said in failed(report)[name], render(report)
    assert f"FAILED   {name}" in render(report)


@pytest.mark.multi
@pytest.mark.parametrize("kind", ["Together", "Faulty"])
def test_a_world_that_hangs_fails_on_its_deadline_and_no_more_is_looked_at(kind: str) -> None:
    report = examined(f"faulty_worlds:{kind}", {"fault": "always block"}, step_timeout_s=0.5)
    assert failed(report) == dict.fromkeys(
        ("answers", "deadlines"), "a step took longer than 0.5 s"
    )
    skipped = {one.name: one.detail for one in report.checks if one.outcome == "skipped"}
    assert skipped.pop("wire") == "the far end is our own"
    said = set(skipped.values())
    assert len(skipped) == 8 and said == {"the episodes to look at could not be played"}


def test_an_unknown_world_or_setting_is_not_a_report() -> None:
    with pytest.raises(PluginError, match="did you mean 'countdown'"):
        examined("countdwn", {})
    with pytest.raises(ValueError, match="numbres"):
        examined("countdown", {"numbres": 3})
