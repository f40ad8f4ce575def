"""Every method for real, on countdown with a tiny model: it runs, learns, and resumes the same."""

import asyncio
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from casting import SINGLE, played
from rich.console import Console

from selfwright.commands.evaluate import default_output, evaluate, settle
from selfwright.commands.run import together
from selfwright.commands.words import evaluation_words
from selfwright.core.config import JudgeConfig
from selfwright.core.errors import JudgeError, LearnerError
from selfwright.core.evaluation import FILE
from selfwright.core.types import Trajectory, Verdict
from selfwright.judges.reward import RewardJudge
from selfwright.trainers.guards import CANARIES

METHODS: dict[str, list[str]] = {
    "grpo": ["trainer.kl=0.05"],
    "rloo": ["trainer.use=rloo", "trainer.kl=0.05", "trainer.kl_in=reward"],
    "gigpo": ["trainer.use=dr_grpo", "trainer.step_weight=1.0", "trainer.length=8"],
    "spear": [
        "trainer.use=self_imitation",
        "trainer.buffer_size=4",
        "trainer.imitation_warmup=0",
        "trainer.entropy_share=0.1",
        "trainer.entropy_bounds=[0.01, 60.0]",
    ],
    "ilf": ["trainer.use=ilf", "trainer.pool=failed", "trainer.refinements=12"],
    "srt": ["trainer.use=self_judge", "judge.use=majority", "trainer.guards.min_precision=0.0"],
    "rlsr": [
        "trainer.use=self_judge",
        "judge.use=model",
        "trainer.guards.min_precision=0.0",
    ],
    "sil": ["trainer.use=sil", "trainer.length=8", "trainer.replay_size=16"],
    "text_gail": ["trainer.use=text_gail", "trainer.discriminator.pretrain=1"],
    "moments": ["trainer.use=moment_matching", "trainer.teacher=MODEL", "trainer.epochs=2"],
    "exact moments": [
        "trainer.use=moment_matching",
        "trainer.teacher=MODEL",
        "trainer.mode=exact",
    ],
    "self-rewarding": ["trainer.use=self_rewarding", "judge.use=model", "judge.model=policy"],
    "ril": ["trainer.use=adversarial", "trainer.discriminator.pretrain=1"],
}


def metrics(folder: Path) -> list[dict[str, float]]:
    """Of every iteration, without what a clock measured."""
    found = [json.loads(f.read_text()) for f in sorted(folder.glob("iterations/*/metrics.json"))]
    return [{k: v for k, v in one.items() if not k.endswith("_s")} for one in found]


@pytest.mark.parametrize("method", METHODS)
def test_it_runs_and_goes_on_where_it_stopped(player: Path, tmp_path: Path, method: str) -> None:
    (tmp_path / "recipe.yaml").write_text(SINGLE.replace("MODEL", str(player)))
    keys = [key.replace("MODEL", str(player)) for key in METHODS[method]]
    whole = played(tmp_path / "recipe.yaml", keys, tmp_path / "whole")
    assert whole["final"]["tasks"] == 12 and whole["stopped"] is None
    learned = metrics(tmp_path / "whole")
    assert len(learned) == 3 and sum(one.get("train/updates", 0) for one in learned) >= 1
    # As if it had been killed in its last iteration.
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("iterations/0002", "evaluations/final", "checkpoint"):
        shutil.rmtree(tmp_path / "cut" / name)
    for name in ("result.json", "report.html"):
        (tmp_path / "cut" / name).unlink()
    again = played(tmp_path / "recipe.yaml", keys, tmp_path / "cut")
    assert metrics(tmp_path / "cut") == learned
    assert again["final"] == whole["final"]
    for name in ("base", "final"):
        judged = json.loads((tmp_path / "whole" / "evaluations" / name / FILE).read_text())
        # But for majorities, of one attempt there is none.
        assert judged["undecided"] == (12 if method == "srt" else 0)


class FadingConfig(JudgeConfig):
    honest: int = 0


class Fading:
    """Goes by the reward so many times, then says yes to everything."""

    Config = FadingConfig

    def __init__(self, config: FadingConfig, world: Any) -> None:
        self._left = config.honest
        self._reward = RewardJudge(config, world)

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        self._left -= 1
        if self._left >= 0:
            return await self._reward.judge(trajectories)
        return [Verdict(1.0, "yes", "fading")] * len(trajectories)


def test_metrics_of_several_batches_are_those_of_one() -> None:
    one = {"train/examples": 8.0, "train/updates": 3.0, "train/loss": 2.0, "train/tokens": 9.0}
    other = {"train/examples": 2.0, "train/updates": 1.0, "train/loss": 6.0, "train/tokens": 1.0}
    assert together([one]) == one | {"train/total_tokens": 9.0}
    both = {"train/examples": 10.0, "train/updates": 4.0, "train/loss": 3.0, "train/tokens": 10.0}
    assert together([one, other]) == both | {"train/total_tokens": 10.0}
    assert together([])["train/examples"] == 0


def test_a_judge_that_pays_for_anything_ends_the_run(player: Path, tmp_path: Path) -> None:
    """What was learned before is kept, compared, and said to have been stopped."""
    (tmp_path / "recipe.yaml").write_text(SINGLE.replace("MODEL", str(player)))
    guarded = ["trainer.use=self_judge", f"judge.use={Path(__file__).stem}:Fading"]
    with pytest.raises(LearnerError, match="nothing was learned: the judge pays 1 for"):
        played(tmp_path / "recipe.yaml", guarded, tmp_path / "never")
    # The base's test, then one iteration with its canaries, as many as there are tasks and baits.
    guarded.append(f"judge.honest={12 + 12 + len(CANARIES)}")
    result = played(tmp_path / "recipe.yaml", guarded, tmp_path / "later")
    assert "after iteration 1 of 3: the judge pays 1 for" in result["stopped"]
    assert result["final"]["tasks"] == 12 and len(result["costs"]) == 1
    assert "was stopped after iteration 1 of 3" in (tmp_path / "later/report.html").read_text()
    free = [*guarded[:2], "trainer.guards.on=false"]
    with pytest.raises(LearnerError, match="nothing is being learned: the trainer found no ex"):
        played(tmp_path / "recipe.yaml", free, tmp_path / "free")


def test_evaluate_tells_how_far_a_judge_agrees_with_the_world(player: Path, tmp_path: Path) -> None:
    asked = (str(player), "countdown", ["policy.max_tokens=8", "environment.numbers=2"], "test")
    told = asyncio.run(
        evaluate(*asked, 40, 0, None, tmp_path / "e", Console(file=io.StringIO()), "majority")
    )
    # One attempt is no majority: nothing is decided.
    assert (told["judge"], told["undecided"]) == ("majority", 40)
    names: set[Path] = set()
    for judge in (None, "majority"):
        exam, _ = settle(None, "expert", "countdown", [], "test", 4, 0, None, judge)
        names.add(default_output("expert", exam, []))
    assert len(names) == 2
    assert told["agreement"]["true_positive"] == 0
    own = [*asked[2], "judge.model=policy", "judge.cut=0.5"]
    told = asyncio.run(
        evaluate(
            *asked[:2],
            own,
            "test",
            40,
            0,
            None,
            tmp_path / "f",
            Console(file=io.StringIO()),
            "model",
        )
    )
    found = told["agreement"]
    assert sum(found.values()) == 40 - told["undecided"]
    assert found["true_positive"] + found["false_negative"] == told["successes"]
    assert "judge model against the world's reward, 40 decided: precision" in evaluation_words(told)
    with pytest.raises(JudgeError, match=r"no base to ask; .* judge\.model="):
        asyncio.run(
            evaluate(*asked, 4, 0, None, tmp_path / "g", Console(file=io.StringIO()), "model")
        )
