"""A warm start ends by the skill it reaches or by its updates, and says so if by these."""

from pathlib import Path

import pytest
from components import warmed

from selfwright.core.files import read_json
from selfwright.loop.warm_start import STORY

pytestmark = pytest.mark.method


def test_it_ends_by_its_updates_however_long_they_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(tmp_path))
    folder, said = warmed(tmp_path, "updates: 200, skill: 1.0, seconds: 0.001")
    story = read_json(folder / STORY)
    assert story["updates"] == 200 and 0 < story["skill"] < story["wanted"] == 1
    assert "warning: policy.warm_start.skill=1 was not reached in 200 updates" in said
    assert "policy.warm_start.seconds=0.001 ends nothing any more" in said
    # What an older recipe says in vain makes no other model; that it falls short is said again.
    again, said = warmed(tmp_path, "updates: 200, skill: 1.0")
    assert again == folder
    assert "made earlier" in said and "was not reached in 200 updates" in said


def test_it_ends_by_its_skill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(tmp_path))
    folder, said = warmed(tmp_path, "updates: 400, skill: 0.005, check_every: 200")
    assert read_json(folder / STORY)["updates"] == 200 and "warning" not in said
