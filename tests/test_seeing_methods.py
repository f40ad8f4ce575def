"""Every method with a model of Qwen3-VL's architecture, in a world that is only to be seen."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from components import played
from seeing import make
from test_methods import METHODS

from selfwright.core.store import read_trajectories

pytestmark = pytest.mark.method

RECIPE = """
iterations: 1
environment: {use: pictures, questions: [colour, position], size: 24, attempts: 2, listed: true}
policy: {model: MODEL, max_tokens: 8, constrain: true}
trainer: {use: grpo, tasks_per_iteration: 8, attempts_per_task: 4}
learner: {rank: 4, alpha: 8, learning_rate: 1e-3, batch_size: 16}
evaluation: {tasks: 4, every: 0, turns: 0}
"""
SEEN = METHODS | {
    # What a random model writes is no answer; refinements are not held to those that are listed.
    "ilf": ["trainer.use=ilf", "trainer.pool=failed", "trainer.select=random"],
    "imitation": ["trainer.use=imitation", "trainer.source=self"],
    "taught": ["trainer.use=imitation", "trainer.source=expert"],
    "rise": ["trainer.use=rise", "trainer.samples=2", "trainer.turns=2"],
    "the whole": ["learner.method=full"],
    "through the eye": ["learner.targets=vision"],
    "preferences": ["trainer.use=self_rewarding", "judge.use=pairwise", "judge.model=policy"],
}


@pytest.fixture(scope="module")
def model(model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("seeing") / "qwen3_vl"
    make("qwen3_vl", model_folder("scratch"), folder)
    return str(folder)


@pytest.mark.parametrize("method", SEEN)
def test_it_learns_from_what_it_sees(model: str, tmp_path: Path, method: str) -> None:
    (tmp_path / "recipe.yaml").write_text(RECIPE.replace("MODEL", model))
    keys = [key.replace("MODEL", model) for key in SEEN[method]]
    result = played(tmp_path / "recipe.yaml", keys, tmp_path / "run")
    assert result["final"]["tasks"] == 4 and result["final"]["failed"] == 0
    (folder,) = (tmp_path / "run" / "iterations").iterdir()
    learned = json.loads((folder / "metrics.json").read_text())
    assert learned["train/updates"] >= 1, learned
    prompts = [
        step.action.prompt for one in read_trajectories(folder) for step in one.trajectory.steps
    ]
    assert prompts and all(prompt.images for prompt in prompts)
