"""Models that think: played by their action alone, better by their own successes, bounded."""

import asyncio
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from components import played

from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.agents.react import React
from selfwright.core.play.players import PolicyPlayer
from selfwright.core.store import read_trajectories
from selfwright.core.types import Action, Observation, Sampling, Task
from selfwright.environments.countdown import evaluate

HERE = Path(__file__).stem
RECIPE = f"""
seed: 1
iterations: 3
environment: {{use: countdown, numbers: 2, largest: 30, attempts: 1, parallel: 1024}}
agent: {{use: "{HERE}:Thinker"}}
policy:
  model: scratch:64x2
  max_tokens: 64
  max_thought: 40
  warm_start:
    {{updates: 250, demonstrations: 3000, batch_size: 64, learning_rate: 4e-3}}
trainer: {{use: imitation, source: self, tasks_per_iteration: 128, attempts_per_task: 8, epochs: 2}}
learner: {{rank: 16, alpha: 32, learning_rate: 3e-3, batch_size: 64}}
evaluation: {{tasks: 300, validation_tasks: 32, every: 0, turns: 0}}
"""


class Thinker(React):
    """Its demonstrations work out what an expression makes before they say it."""

    def phrase(self, action: str) -> str:
        numbers = [int(one) for one in "".join(c if c.isdigit() else " " for c in action).split()]
        thought = f"{action}={evaluate(action, numbers, '+-*')}"
        return f"<think>\n{thought}\n</think>\n{super().phrase(action)}"


@pytest.mark.method
def test_a_model_that_thinks_improves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "thinker.yaml"
    file.write_text(RECIPE)
    result = played(file, [], tmp_path / "run")
    print(result["base"], result["final"], result["comparison"])
    steps = [
        step
        for one in read_trajectories(tmp_path / "run" / "evaluations" / "final")
        for step in one.trajectory.steps
    ]
    thoughts = [step for step in steps if step.action.completion.text.startswith("<think>\n")]
    assert len(thoughts) > 0.9 * len(steps)
    assert sum(not step.action.invalid for step in thoughts) > 0.8 * len(thoughts)
    assert "think" not in "".join(step.action.text for step in steps)
    assert result["comparison"]["verdict"] == "better"


@pytest.fixture
def endless(model_folder: Callable[[str], Path], tmp_path: Path) -> TransformersPolicy:
    """Asked by a template that begins the thought, and it never ends one."""
    folder = tmp_path / "endless"
    shutil.copytree(model_folder("qwen3"), folder)
    template = folder / "chat_template.jinja"
    ask = "{% if add_generation_prompt %}<think>\n{% endif %}"
    template.write_text(template.read_text() + ask)
    config = TransformersConfig.model_validate({"model": "", "device": "cpu"})
    return TransformersPolicy(config, str(folder), 0)


def test_an_endless_thought_is_cut_at_its_bound(endless: TransformersPolicy) -> None:
    agent = React(React.Config())
    sampling = Sampling(1.0, max_tokens=30, thought=7)
    player = PolicyPlayer(agent, endless, sampling)

    async def answers() -> list[Action]:
        asked = (player.answer(Task("t", "go", 1), (), Observation(""), k) for k in range(12))
        return await asyncio.wait_for(asyncio.gather(*asked), 60)

    for action in asyncio.run(answers()):
        completion = action.completion
        assert completion.text.startswith("<think>\n")
        if completion.token_ids[-1] not in endless.tokens.ends:
            assert (len(completion.token_ids), completion.finish) == (7, "length")
        assert action.invalid == "The thought did not end." and action.text == ""
