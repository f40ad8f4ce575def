"""Every method for real, on countdown with a tiny model: it runs, learns, and resumes the same."""

import asyncio
import json
import re
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path

import pytest
from components import SINGLE, episode, played

from selfwright.agents import scratch
from selfwright.commands.words import evaluation_words, run_words
from selfwright.core.config import JudgeConfig, PolicyConfig
from selfwright.core.errors import JudgeError, LearnerError, ModelError, RecipeError
from selfwright.core.evaluation import FILE
from selfwright.core.store import read_trajectories
from selfwright.core.types import Completion, Prompt, Sampling, Trajectory, Verdict
from selfwright.environments.countdown import solutions
from selfwright.judges.discriminator import DiscriminatorJudge
from selfwright.judges.reward import RewardJudge
from selfwright.loop.evaluate import default_output, evaluate_checkpoint, settle
from selfwright.loop.events import ignore
from selfwright.loop.measure import together
from selfwright.trainers.methods.self_judge import SelfJudge
from selfwright.trainers.parts.guards import CANARIES

pytestmark = pytest.mark.method

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


def test_a_person_says_what_was_wrong_with_stored_attempts(player: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    played(recipe, ["iterations=1"], tmp_path / "first")
    stored = tmp_path / "first" / "iterations" / "0000"
    rows = [k for k, one in enumerate(read_trajectories(stored)) if one.verdict.score == 0]
    told = [{"trajectory": k, "step": 0, "feedback": "That is not it."} for k in rows]
    (tmp_path / "said.jsonl").write_text("\n".join(map(json.dumps, told)))
    given = ["trainer.use=ilf", "trainer.feedback=file", "trainer.refinements=12"]
    given += [f"trainer.file={tmp_path / 'said.jsonl'}", f"trainer.trajectories={stored}"]
    result = played(recipe, given, tmp_path / "second")
    assert result["tokens_trained"] > 0 and len(rows) > 5
    # What the refiner said was sampled, too: more than what its episodes hold.
    assert result["tokens_sampled"] > 3 * 12 * 5


class Outsider:
    """A policy of somebody else's: it has an endpoint's manners, words without ids, and is right.

    It also scores, by what it would say itself.
    """

    Config = PolicyConfig
    checkpoint = "outsider"

    def __init__(self, config: PolicyConfig, model: str, seed: int) -> None:
        assert model == "somewhere"

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        found = re.search(r"Make (\d+) from ([\d ]+) with", prompt.messages[0].text)
        assert found is not None
        numbers = tuple(map(int, found[2].split()))
        return Completion(solutions(numbers, "+-*")[int(found[1])])

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        task, answer = re.findall(r"Make (\d+) from|<<<\n(.*)\n>>>", prompt.messages[0].text)
        right = task[0] == answer[1]
        return replace(completion, logprobs=(0.0 if right == (completion.text == "yes") else -9.0,))

    async def load(self, checkpoint: Path | None) -> None:
        raise AssertionError("nobody trains it")

    async def close(self) -> None:
        pass


OUTSIDE: dict[str, list[str]] = {
    "rise": ["trainer.use=rise", "trainer.turns=2", "trainer.teacher=friend"],
    "ril": ["trainer.use=adversarial", "trainer.teachers=[friend, expert]"],
    "text_gail": ["trainer.use=text_gail", "trainer.teachers=[friend]"],
    "ilf": ["trainer.use=ilf", "trainer.pool=failed", "trainer.refiner=friend"],
    "rlsr": ["trainer.use=self_judge", "judge.use=model", "judge.model=friend", "judge.cut=0.5"],
}


@pytest.mark.parametrize("method", OUTSIDE)
def test_an_outsider_teaches_and_judges_like_anybody(
    player: Path, tmp_path: Path, method: str
) -> None:
    recipe = tmp_path / "recipe.yaml"
    policies = (
        f"policies: {{friend: {{use: '{Path(__file__).stem}:Outsider', model: somewhere}}}}\n"
    )
    recipe.write_text(SINGLE.replace("MODEL", str(player)) + policies)
    result = played(recipe, [*OUTSIDE[method], "iterations=1"], tmp_path / "run")
    assert result["tokens_trained"] > 0 and result["stopped"] is None
    episodes = read_trajectories(tmp_path / "run" / "iterations" / "0000")
    if method == "rlsr":
        # It is asked about every answer, and is right about it.
        assert all(one.verdict.judge == "model" for one in episodes)
        assert all((one.verdict.score == 1) == one.trajectory.success for one in episodes)
    elif method == "ilf":
        # What it said is replayed as the refined action; it is what is learned.
        mended = [one.trajectory for one in episodes if one.trajectory.replayed]
        assert mended and all(one.success for one in mended)
    else:
        taught = [one.trajectory for one in episodes if one.trajectory.policy == "outsider"]
        assert taught and all(one.success for one in taught)


class FadingConfig(JudgeConfig):
    honest: int = 0


class Fading:
    """Goes by the reward so many times, then says yes to everything."""

    Config = FadingConfig

    def __init__(self, config: FadingConfig) -> None:
        self._left = config.honest
        self._reward = RewardJudge(config)

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
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    guarded = ["trainer.use=self_judge", f"judge.use={Path(__file__).stem}:Fading"]
    never = played(recipe, guarded, tmp_path / "never")
    assert "after iteration 1 of 3: the judge pays 1 for" in never["stopped"]
    # What was played is kept and counted, though nothing was learned from it.
    (only,) = never["costs"]
    assert only["episodes"] == 48 and only["tokens_trained"] == 0
    assert never["comparison"]["difference"] == 0
    # The base's test, then one iteration with its canaries, as many as there are tasks and baits.
    guarded.append(f"judge.honest={12 + 12 + len(CANARIES)}")
    result = played(recipe, guarded, tmp_path / "later")
    assert "after iteration 2 of 3: the judge pays 1 for" in result["stopped"]
    assert result["final"]["tasks"] == 12 and len(result["costs"]) == 2
    assert "was stopped after iteration 2 of 3" in (tmp_path / "later/report.html").read_text()
    # Killed before it had said so, it does not go on, though the judge is honest again.
    for name in ("evaluations/final", "checkpoint"):
        shutil.rmtree(tmp_path / "later" / name)
    (tmp_path / "later" / "result.json").unlink()
    assert played(recipe, guarded, tmp_path / "later")["stopped"] == result["stopped"]
    free = [*guarded[:2], "trainer.guards.on=false"]
    with pytest.raises(LearnerError, match="nothing is being learned: the trainer found no ex"):
        played(recipe, free, tmp_path / "free")


class Nostalgic(SelfJudge):
    """Was best after its first iteration, and knows it after its third."""

    @property
    def alarm(self) -> str:
        return "it was better once" if self._step == 3 else ""

    @property
    def trusted(self) -> int:
        return 1


def test_an_alarm_takes_the_run_back_to_where_it_was_best(player: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    wanted = [f"trainer.use={Path(__file__).stem}:Nostalgic", "iterations=5"]
    wanted += ["trainer.guards.min_precision=0.0", "learner.learning_rate=2e-2"]
    output = tmp_path / "run"
    result = played(recipe, wanted, output)
    assert "after iteration 3 of 5: it was better once; back to what" in result["stopped"]
    assert result["checkpoint_iteration"] == 1

    def weights(name: str) -> bytes:
        return (output / name / "adapter_model.safetensors").read_bytes()

    assert weights("checkpoint") == weights("iterations/0000/checkpoint")
    assert weights("checkpoint") != weights("iterations/0001/checkpoint")

    # What was examined is that checkpoint, too: by itself it says the same.
    def said(folder: Path) -> list[tuple[str, list[str]]]:
        episodes = [j.trajectory for j in read_trajectories(folder)]
        return sorted((t.task.id, [s.action.text for s in t.steps]) for t in episodes)

    def examined(name: str) -> list[tuple[str, list[str]]]:
        asked = (str(output / name), None, (), "test", 12, 3, None)
        to = tmp_path / name.replace("/", "-")
        asyncio.run(evaluate_checkpoint(*asked, to, ignore))
        return said(to)

    final = said(output / "evaluations" / "final")
    assert final == examined("checkpoint") != examined("iterations/0001/checkpoint")
    # Killed before that was written down, it comes to the same.
    for name in ("evaluations/final", "checkpoint"):
        shutil.rmtree(output / name)
    (output / "result.json").unlink()
    assert played(recipe, wanted, output)["checkpoint_iteration"] == 1
    assert said(output / "evaluations" / "final") == final


class Broken(Fading):
    """Never comes to a verdict once it has begun to judge what is learned from."""

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        raise ValueError("no verdict today")


def test_a_judge_that_always_fails_ends_the_run(player: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    broken = [f"judge.use={Path(__file__).stem}:Broken"]
    with pytest.raises(JudgeError, match=r"(?s)7 of 12 .*judge\.max_failures.*no verdict today"):
        played(recipe, broken, tmp_path / "run")
    # Even one that is allowed to fail ever so often is not learned from in silence.
    broken.append("judge.max_failures=1.0")
    with pytest.raises(LearnerError, match=r"nothing is being learned: .* \(mean score undefined"):
        played(recipe, broken, tmp_path / "again")


def test_a_teacher_of_another_vocabulary(player: Path, tmp_path: Path) -> None:
    """Its words are learned; where distributions are compared it is refused before play."""
    scratch.make("scratch:32x1", ["quite other words 1 2 3"] * 3, tmp_path / "other", seed=0)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    learns = ["trainer.use=adversarial", f"trainer.teachers=[{tmp_path / 'other'}]", "iterations=1"]
    assert played(recipe, learns, tmp_path / "ril")["tokens_trained"] > 0
    refused = ["trainer.use=moment_matching", f"trainer.teacher={tmp_path / 'other'}"]
    with pytest.raises(ModelError, match="has another vocabulary"):
        played(recipe, refused, tmp_path / "moments")
    assert not (tmp_path / "moments" / "evaluations").exists()


def test_a_run_teaches_by_its_name(player: Path, tmp_path: Path) -> None:
    """Another checkpoint in this process: the adapter that a run has learned, on its base."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    played(recipe, ["iterations=1", "learner.learning_rate=0.05"], tmp_path / "first")
    name = tmp_path / "first"
    learns = ["trainer.use=moment_matching", f"trainer.teacher={name}", "trainer.mode=exact"]
    metrics_of = tmp_path / "second" / "iterations" / "0000" / "metrics.json"
    played(recipe, [*learns, "iterations=1"], tmp_path / "second")
    # It is not the base, which is nothing away from itself.
    assert json.loads(metrics_of.read_text())["train/grad_norm"] > 1e-4


PHASES = """
phases:
  - {trainer: {use: imitation, source: self, tasks_per_iteration: 12}, iterations: 1}
  - trainer: {use: self_judge, tasks_per_iteration: 12, attempts_per_task: 4, guards: {on: false}}
    judge: {use: majority}
    iterations: 2
  - trainer: {use: self_imitation, tasks_per_iteration: 12, attempts_per_task: 4, buffer_size: 4}
    iterations: 2
"""


def test_phases_go_on_from_one_another(player: Path, tmp_path: Path) -> None:
    """Each by its own trainer and judge, compared to the one before, and resumed in its midst."""
    plain = SINGLE.replace("MODEL", str(player)).splitlines()
    kept = [line for line in plain if not line.startswith(("trainer", "iterations"))]
    (tmp_path / "recipe.yaml").write_text("\n".join(kept) + PHASES)
    whole = played(tmp_path / "recipe.yaml", [], tmp_path / "whole")
    told = whole["phases"]
    assert [(one["trainer"], one["iterations"]) for one in told] == [
        ("imitation", 1),
        ("self_judge", 2),
        ("self_imitation", 2),
    ]
    rates = [whole["base"]["success_rate"], *(one["final"]["success_rate"] for one in told)]
    for one, before, after in zip(told, rates, rates[1:], strict=False):
        assert one["comparison"]["difference"] == pytest.approx(after - before)
    assert rates[-1] == whole["final"]["success_rate"]
    learned = metrics(tmp_path / "whole")
    assert [one["rollout/episodes"] for one in learned] == [12, 48, 48, 48, 48]
    # The judge of the second phase is not that of the others.
    scores = [one["judge/score"] == one["rollout/success"] for one in learned]
    assert scores == [True, False, False, True, True]
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "2. self_judge" in page and "compared to how the one before it ended" in page
    assert "phase 3, self_imitation, 2 iterations: " in run_words(whole)
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    for name in ("iterations/0004", "iterations/0003", "evaluations/final", "checkpoint"):
        shutil.rmtree(tmp_path / "cut" / name)
    for name in ("result.json", "report.html"):
        (tmp_path / "cut" / name).unlink()
    again = played(tmp_path / "recipe.yaml", [], tmp_path / "cut")
    assert metrics(tmp_path / "cut") == learned and again["phases"] == told


def test_a_discriminator_judges_as_its_run_left_it(player: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    more = ["trainer.discriminator.pretrain=20", "trainer.discriminator.learning_rate=1e-3"]
    played(recipe, ["trainer.use=adversarial", "iterations=1", *more], tmp_path / "ril")
    asked = ["policy.max_tokens=8", "environment.numbers=2", f"judge.run={tmp_path / 'ril'}"]
    means: dict[str, float] = {}
    for who in ("expert", "random"):
        told = asyncio.run(
            evaluate_checkpoint(
                who,
                "countdown",
                [key for key in asked if not key.startswith("policy")],
                "test",
                60,
                0,
                None,
                tmp_path / who,
                ignore,
                "discriminator",
            )
        )
        assert told["undecided"] == 0
        means[who] = told["mean_score"]
    # It has never seen chance play, but it has seen the expert.
    assert means["expert"] > means["random"]
    one = episode(1.0, ("o", "1 + 1")).trajectory
    unknown = replace(one.steps[0], action=replace(one.steps[0].action, prompt=Prompt()))
    settings = DiscriminatorJudge.Config.model_validate({"run": str(tmp_path / "ril")})
    judged = DiscriminatorJudge(settings).judge([replace(one, steps=(unknown,)), one])
    mute, read_whole = asyncio.run(judged)
    assert (mute.score, mute.feedback) == (None, "no prompt is known")
    assert read_whole.score is not None
    with pytest.raises(RecipeError, match=r"no iteration of .* holds a discriminator"):
        settle(
            None,
            "expert",
            "countdown",
            [f"judge.run={tmp_path}"],
            "test",
            4,
            0,
            None,
            "discriminator",
        )


def test_evaluate_tells_how_far_a_judge_agrees_with_the_world(player: Path, tmp_path: Path) -> None:
    asked = (str(player), "countdown", ["policy.max_tokens=8", "environment.numbers=2"], "test")
    told = asyncio.run(evaluate_checkpoint(*asked, 40, 0, None, tmp_path / "e", ignore, "majority"))
    # One attempt is no majority: nothing is decided.
    assert (told["judge"], told["undecided"]) == ("majority", 40)
    names: set[Path] = set()
    for judge in (None, "majority"):
        spec, _ = settle(None, "expert", "countdown", [], "test", 4, 0, None, judge)
        names.add(default_output("expert", spec, []))
    assert len(names) == 2
    assert told["agreement"]["true_positive"] == 0
    own = [*asked[2], "judge.model=policy", "judge.cut=0.5"]
    told = asyncio.run(
        evaluate_checkpoint(
            *asked[:2],
            own,
            "test",
            40,
            0,
            None,
            tmp_path / "f",
            ignore,
            "model",
        )
    )
    found = told["agreement"]
    assert sum(found.values()) == 40 - told["undecided"]
    assert found["true_positive"] + found["false_negative"] == told["successes"]
    score = (
        f"judge model: mean score {told['mean_score']:.2f}; against the world's reward, 40 decided"
    )
    assert score in evaluation_words(told)
    with pytest.raises(JudgeError, match=r"no base to ask; .* judge\.model="):
        asyncio.run(evaluate_checkpoint(*asked, 4, 0, None, tmp_path / "g", ignore, "model"))
