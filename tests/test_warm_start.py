"""A warm start ends by the skill it reaches or by its updates, and says so if by these."""

from pathlib import Path

import numpy as np
import pytest
import torch
from components import warmed
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

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


def test_a_pretrained_model_gets_an_adapter_that_is_merged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(tmp_path))
    base, _ = warmed(tmp_path, "updates: 20")
    keys = "updates: 60, rank: 4"
    folder, _ = warmed(tmp_path, keys, model=str(base))
    assert read_json(folder / STORY)["updates"] == 60
    assert not (folder / "adapter_config.json").exists()
    before, after = (load_file(one / "model.safetensors") for one in (base, folder))
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    # Of low rank, so of the layers' matrices alone; embeddings and norms are as they were.
    assert changed and all("proj" in name for name in changed)
    for name in changed:
        values = np.linalg.svd((after[name] - before[name]).numpy(), compute_uv=False)
        assert values[4:].max() < 1e-3 * values[0]
    # Another rank, or all weights, is another model.
    whole, _ = warmed(tmp_path, f"{keys}, method: full", model=str(base))
    assert whole != folder
    found = load_file(whole / "model.safetensors")
    assert any("proj" not in name for name in found if not torch.equal(found[name], before[name]))
