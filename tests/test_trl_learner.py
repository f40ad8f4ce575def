"""Learning through TRL: the plain learner's step on the same tokens, and data to take along."""

# datasets and torch have no complete types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import math
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from components import step
from prompts import grey
from safetensors.torch import load_file
from seeing import make, noise

from selfwright.agents import scratch
from selfwright.commands.cli import call
from selfwright.core.errors import LearnerError, StoreError
from selfwright.core.models.open import open_model
from selfwright.core.store import write_trajectories
from selfwright.core.types import (
    Batch,
    Completion,
    Example,
    Judged,
    Message,
    Observation,
    Pair,
    Prompt,
    Step,
    Stop,
    Task,
    Tool,
    Trajectory,
    Verdict,
)
from selfwright.trainers.learning.export import read_sft, to_messages, to_preferences, to_sft
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import DPO, NLL, Clip, MomentGap
from selfwright.trainers.learning.trl import (
    TRLConfig,
    TRLLearner,
    fit_dpo,
    fit_reward,
    weighed,
)

pytestmark = pytest.mark.method

SETTINGS = {"rank": 4, "alpha": 8, "learning_rate": 1e-2, "batch_size": 16, "device": "cpu"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    texts = [f"make {k} of {k + 1} and 1: {k + 1} - 1" for k in range(40)]
    scratch.make("scratch:32x2", texts, folder, seed=0)
    return str(folder)


def plain(model: str, **changes: Any) -> PlainLearner:
    return PlainLearner(LearnerConfig.model_validate(SETTINGS | changes), model, 0)


def through_trl(model: str, **changes: Any) -> TRLLearner:
    return TRLLearner(TRLConfig.model_validate(SETTINGS | changes), model, 0)


def weights(learner: PlainLearner, folder: Path) -> dict[str, Any]:
    learner.save(folder)
    state = load_file(folder / "learner.safetensors")
    return {key: value for key, value in state.items() if key not in ("rng", "tight")}


def farthest(a: dict[str, Any], b: dict[str, Any]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[key].double() - b[key].double()).abs().max()) for key in a)


def asked(text: str) -> Prompt:
    return Prompt((Message("user", (text,)),))


EXAMPLES = tuple(
    Example(asked(f"make {k} of {k + 1} and 1"), Completion(f"{k + 1} - 1")) for k in range(16)
)


def oddly_sampled(model: str) -> tuple[Example, ...]:
    """Completions and an earlier turn whose ids are not those the tokenizer makes of the text."""
    tokens = open_model(model, "cpu", "float32", False)[1]
    first = (*(i for sign in "7 - 1" for i in tokens.completion(sign)[:-1]), tokens.end)
    assert first != tokens.completion("7 - 1")
    turns = (
        *asked("make 6 of 7 and 1").messages,
        Message("assistant", ("7 - 1",), token_ids=first),
    )
    return (
        Example(asked("make 6 of 7 and 1"), Completion("7 - 1", first)),
        Example(
            Prompt((*turns, Message("user", ("right; once more",)))), Completion("7 - 1", first)
        ),
    )


@pytest.mark.parametrize("method", ["lora", "full"])
def test_one_step_equals_the_plain_learners_on_the_ids_as_sampled(
    model: str, method: str, tmp_path: Path
) -> None:
    # 5 padded rows at once: the same step in one micro-batch and in several.
    changes = {"method": method, "max_grad_norm": 0.1, "weight_decay": 0.1, "batch_size": 18}
    ours, theirs = plain(model, **changes), through_trl(model, **changes, token_budget=100)
    examples = EXAMPLES + oddly_sampled(model)
    batch = Batch(NLL(aggregation="token-mean"), examples)
    ours.update(batch, 0.0)
    theirs.update(batch, 0.0)
    expected, got = ours.update(batch, 0.0), theirs.update(batch, 0.0)
    assert got["train/updates"] == expected["train/updates"] == 1
    assert got["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-4)
    assert got["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], abs=1e-4)
    assert got["train/learning_rate"] == expected["train/learning_rate"]
    a, b = weights(ours, tmp_path / "ours"), weights(theirs, tmp_path / "theirs")
    assert farthest(a, b) < 1e-4


@pytest.mark.parametrize("kind", ["idefics3", "qwen3_vl"])
def test_pictures_are_learned_from_as_the_plain_learner_does(
    kind: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    make(kind, model_folder("scratch"), tmp_path / "model")
    # Rows of one picture, of two, of none; in one micro-batch and in several.
    views = [(noise(20, 30, 0),), (noise(40, 10, 1), noise(16, 16, 2)), ()]
    examples = tuple(
        Example(Prompt((Message("user", (*views[k % 3], f"make {k}")),)), Completion(f"{k} - 1"))
        for k in range(7)
    )
    batch = Batch(NLL(aggregation="token-mean"), examples)
    changes = {"max_grad_norm": 0.1, "learning_rate": 1e-3, "batch_size": 8}
    folder = str(tmp_path / "model")
    ours, theirs = plain(folder, **changes), through_trl(folder, **changes, token_budget=100)
    for _ in range(2):
        expected, got = ours.update(batch, 0.0), theirs.update(batch, 0.0)
        assert got["train/loss"] == pytest.approx(expected["train/loss"], abs=1e-4)
        assert got["train/grad_norm"] == pytest.approx(expected["train/grad_norm"], rel=1e-3)
    a, b = weights(ours, tmp_path / "ours"), weights(theirs, tmp_path / "theirs")
    assert farthest(a, b) < 1e-4
    # Without the pictures it is another loss.
    bare = tuple(replace(e, prompt=asked(f"make {k}")) for k, e in enumerate(examples))
    blind = plain(folder, **changes).update(replace(batch, examples=bare), 0.0)
    seen = plain(folder, **changes).update(batch, 0.0)
    assert abs(blind["train/loss"] - seen["train/loss"]) > 0.01


def test_a_restored_learner_goes_on_identically(model: str, tmp_path: Path) -> None:
    changes = {"batch_size": 4, "warmup": 20, "schedule": "cosine", "dropout": 0.1}
    batch = Batch(NLL(), EXAMPLES, epochs=2)
    whole = through_trl(model, **changes)
    whole.update(batch, 0.0)
    whole.save(tmp_path / "half")
    expected = whole.update(batch, 0.5)
    resumed = through_trl(model, **changes)
    resumed.restore(tmp_path / "half")
    assert resumed.update(batch, 0.5) == expected
    assert expected["train/updates"] == 8
    # 16 of 20 steps of warmup are done, half of the cosine.
    assert expected["train/learning_rate"] == pytest.approx(1e-2 * 16 / 20 / 2)
    a, b = weights(whole, tmp_path / "whole"), weights(resumed, tmp_path / "resumed")
    assert farthest(a, b) == 0
    assert {p.suffix for p in tmp_path.rglob("*.*")} == {".safetensors"}


def random_states() -> tuple[object, ...]:
    return torch.get_rng_state().tolist(), random.getstate(), repr(np.random.get_state())


def test_it_learns_quietly_and_leaves_nothing_behind(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    learner = through_trl(model)
    drawn = random_states()
    losses = [learner.update(Batch(NLL(), EXAMPLES), 0.0)["train/loss"] for _ in range(5)]
    assert losses[-1] < losses[0]
    assert drawn == random_states()
    learner.export(tmp_path / "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    out, err = capfd.readouterr()
    assert out == err == ""


@pytest.mark.parametrize(
    ("batch", "said"),
    [
        (Batch(NLL(), ()), "no examples"),
        (Batch(Clip(), EXAMPLES), "no loss but NLL, and the trainer asks for Clip"),
        (Batch(Clip(kl=0.1), EXAMPLES), "Clip needs reference, and TRLLearner serves no such need"),
        (Batch(DPO(), EXAMPLES), "DPO needs whole step"),
        (Batch(MomentGap("t"), EXAMPLES), "MomentGap needs distribution"),
        (
            Batch(NLL(), (*EXAMPLES, Example(asked("make 1"), Completion("1"), 2.0))),
            "their weights range from 1 to 2; use learner.use: plain, or learner.weights",
        ),
        (
            Batch(NLL(), (*EXAMPLES, Example(asked("make 1"), Completion("1"), -0.5))),
            "can only imitate, but weights range from -0.5 to 1",
        ),
    ],
)
def test_what_it_cannot_learn_is_said(model: str, batch: Batch, said: str) -> None:
    with pytest.raises(LearnerError, match=said):
        through_trl(model).update(batch, 0.0)


def test_unequal_weights_become_counts() -> None:
    texts = {"a": 0.0, "b": 1.0, "c": 2.5, "d": 4.5}
    examples = [Example(asked("say"), Completion(t), w) for t, w in texts.items()]
    ignored = weighed(examples, "ignore", 0)
    assert [e.completion.text for e in ignored] == ["b", "c", "d"]
    seen: Counter[str] = Counter()
    for seed in range(1000):
        counts = Counter(e.completion.text for e in weighed(examples, "repeat", seed))
        for text, weight in texts.items():
            assert abs(counts[text] - weight / 2) < 1, "4 examples, weights that add up to 8"
        assert counts.total() == 4
        seen += counts
    for text, weight in texts.items():
        assert seen[text] / 1000 == pytest.approx(weight / 2, abs=0.05)


def test_a_missing_trl_is_said(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(LearnerError, match=r"pip install 'selfwright\[trl\]'"):
        through_trl(model)
    with pytest.raises(LearnerError, match="pip install"):
        fit_dpo(model, PAIRS, LearnerConfig.model_validate(SETTINGS), Path("unused"))


PAIRS = [
    Pair(asked(f"make {k} of {k + 1} and 1"), Completion(f"{k + 1} - 1"), Completion(f"{k} and 1"))
    for k in range(16)
]


def test_dpo_starts_at_the_reference_and_widens_the_margin(model: str, tmp_path: Path) -> None:
    config = LearnerConfig.model_validate(SETTINGS)
    log = fit_dpo(model, PAIRS, config, tmp_path / "out", beta=0.5, epochs=6)
    assert len(log) == 6
    assert log[0]["loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert log[0]["rewards/margins"] == pytest.approx(0, abs=1e-5)
    margins = [entry["rewards/margins"] for entry in log]
    assert margins == sorted(margins) and margins[-1] > 0.1
    assert log[-1]["rewards/accuracies"] == 1
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()


def test_dpo_sees_the_ids_as_sampled(model: str, tmp_path: Path) -> None:
    example, _ = oddly_sampled(model)
    odd = Pair(example.prompt, example.completion, Completion("7 and 1"))
    usual = Pair(example.prompt, Completion("7 - 1"), Completion("7 and 1"))
    config = LearnerConfig.model_validate(SETTINGS)
    (seen,), (other,) = (fit_dpo(model, [pair], config, tmp_path / "out") for pair in (odd, usual))
    more = len(example.completion.token_ids) - len(
        open_model(model, "cpu", "float32", False)[1].completion("7 - 1")
    )
    assert seen["num_tokens"] - other["num_tokens"] == more > 0


def test_a_reward_model_learns_to_tell_apart(model: str, tmp_path: Path) -> None:
    config = LearnerConfig.model_validate(SETTINGS | {"learning_rate": 3e-3})
    # Untrained, the head happens to favour one side; it must learn the other one too.
    turned = [Pair(pair.prompt, pair.rejected, pair.chosen) for pair in PAIRS]
    logs = [
        fit_reward(model, pairs, config, tmp_path / "out", epochs=12) for pairs in (PAIRS, turned)
    ]
    assert min(log[0]["accuracy"] for log in logs) <= 0.5
    for log in logs:
        assert log[-1]["accuracy"] == 1 and log[-1]["loss"] < log[0]["loss"]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    with pytest.raises(LearnerError, match="no pairs"):
        fit_reward(model, [], config, tmp_path)


def played(texts: list[str], score: float | None = 1.0, replayed: int = 0) -> Judged:
    task, steps = Task("t", "Do it.", 9), list[Step]()
    for k, text in enumerate(texts):
        steps.append(step(task, steps, Observation(f"seen {k}"), Completion(text)))
    end = Observation("end")
    trajectory = Trajectory(task, tuple(steps), end, Stop.TERMINATED, "base", 0, 0, replayed)
    return Judged(trajectory, Verdict(score, "", "reward"))


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def test_exports_go_through_datasets_and_back(tmp_path: Path) -> None:
    rows = to_sft([Example(asked("one"), Completion("1"), 0.5)])
    rows.to_parquet(tmp_path / "sft.parquet")
    back = datasets.Dataset.from_parquet(
        str(tmp_path / "sft.parquet"), cache_dir=str(tmp_path / "cache")
    )
    assert list(back) == list(rows)
    assert rows[0] == {
        "prompt": [turn("user", "one")],
        "completion": [turn("assistant", "1")],
        "weight": 0.5,
    }
    (pair,) = to_preferences([Pair(asked("one"), Completion("1"), Completion("2"))])
    assert pair == {
        "prompt": [turn("user", "one")],
        "chosen": [turn("assistant", "1")],
        "rejected": [turn("assistant", "2")],
    }
    with pytest.raises(LearnerError, match="images"):
        to_sft([Example(Prompt((Message("user", (grey(1), "see")),)), Completion("1"))])
    with pytest.raises(LearnerError, match="tools"):
        to_sft([Example(replace(asked("one"), tools=(Tool("go", "", "{}"),)), Completion("1"))])
    with pytest.raises(LearnerError, match="no examples"):
        to_preferences([])


def test_stored_trajectories_become_a_dataset(tmp_path: Path) -> None:
    stored = [played(["left", "right"]), played(["up"], 0.2), played(["down"], None)]
    stored.append(played(["on", "off"], replayed=1))
    folder = tmp_path / "played"
    folder.mkdir()
    write_trajectories(folder, stored, tmp_path / "images")
    rows: list[Any] = list(read_sft([folder]))
    assert [row["completion"][0]["content"] for row in rows] == ["left", "right", "off"]
    assert rows[1]["prompt"] == [
        turn("user", "Do it.\nseen 0"),
        turn("assistant", "left"),
        turn("user", "seen 1"),
    ]
    assert len(read_sft([folder], threshold=0.1)) == 4
    with pytest.raises(LearnerError, match="none of 4 stored trajectories scored 2"):
        read_sft([folder], threshold=2)
    with pytest.raises(StoreError, match="missing"):
        read_sft([tmp_path / "no"])
    whole: Any = to_messages([judged.trajectory for judged in stored])[0]
    assert whole["messages"] == [*rows[1]["prompt"], turn("assistant", "right")]


def test_a_recipe_can_learn_through_trl(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.yaml").write_text(
        """\
iterations: 2
environment: {use: countdown, numbers: 2, attempts: 2}
policy: {use: transformers, model: scratch:32x1, max_tokens: 8}
trainer: {use: imitation, tasks_per_iteration: 32}
learner: {use: trl, learning_rate: 1e-2, batch_size: 16}
evaluation: {tasks: 8, every: 0}
"""
    )
    assert (
        call(["run", str(tmp_path / "tiny.yaml"), "--output", str(tmp_path / "run"), "--json"]) == 0
    )
    out, _ = capfd.readouterr()
    assert json.loads(out)["tokens_trained"] > 0
    first, second = (
        json.loads(path.read_text()) for path in sorted((tmp_path / "run").rglob("metrics.json"))
    )
    assert second["train/loss"] < first["train/loss"]
