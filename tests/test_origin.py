"""What a checkpoint stands on: known by content wherever it lies; and what is refused beside it."""

# torch, transformers and peft are partly untyped.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from components import SINGLE, played
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from test_learner import learner_of, talks
from test_transformers_policy import REFUSED, adapter, broken

from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.commands.cli import call
from selfwright.core.errors import ModelError, PolicyError, StoreError
from selfwright.core.files import read_json
from selfwright.core.models.adapters import fits, merge, restore
from selfwright.core.models.open import bare, config_of, open_model, open_weights, save_merged
from selfwright.core.models.origin import (
    BLOCK,
    BLOCKS,
    NOTE,
    blocks,
    digest,
    found_base,
    layers_of,
    note_base,
)
from selfwright.core.store import TRAJECTORIES, read_trajectories
from selfwright.core.types import Batch
from selfwright.loop.evaluate import evaluate_checkpoint
from selfwright.trainers.learning.learner import PlainLearner
from selfwright.trainers.learning.loss import NLL

Folder = Callable[[str], Path]
TINY = SINGLE.replace("iterations: 3", "iterations: 1").replace("grpo", "imitation")


def weights(model: str | Path) -> dict[str, torch.Tensor]:
    return open_weights(str(model), "cpu", "auto", False).state_dict()


def gap(a: str | Path, b: str | Path) -> float:
    """The largest difference between two weights of what these two names open."""
    left, right = weights(a), weights(b)
    assert left.keys() == right.keys()
    return max(float((left[k].float() - right[k].float()).abs().max()) for k in left)


def said(folder: Path) -> list[str]:
    """What was answered first in each stored episode."""
    found = [one.trajectory for one in read_trajectories(folder / TRAJECTORIES)]
    return [t.steps[0].action.text if t.steps else "" for t in found]


def again(checkpoint: Path, output: Path) -> list[str]:
    """What ``checkpoint`` answers when it is evaluated as its run was."""
    asyncio.run(evaluate_checkpoint(str(checkpoint), None, (), "test", 12, 3, None, output))
    return said(output)


@pytest.fixture(scope="module")
def lively(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run that began with an adapter, in two phases, and what it began with."""
    room = tmp_path_factory.mktemp("lively")
    shutil.copytree(model_folder("qwen3"), room / "model")
    adapter(room / "model", room / "first", seed=1)
    phase = "  - {iterations: 1, trainer: {use: imitation, tasks_per_iteration: 8}}\n"
    lines = TINY.replace("MODEL", str(room / "first")).splitlines()
    kept = [line for line in lines if not line.startswith(("trainer", "iterations"))]
    (room / "two.yaml").write_text("\n".join([*kept, "phases:", phase + phase]))
    played(room / "two.yaml", [], room / "run")
    return room


@pytest.mark.method
def test_a_run_that_began_with_an_adapter_leaves_what_stands_on_both(
    lively: Path, tmp_path: Path
) -> None:
    run = lively / "run"
    assert gap(run / "base", lively / "first") == 0
    assert gap(run / "base", lively / "model") > 0.1
    # The second phase begins with what the first has come to, and plays it.
    assert gap(run / "bases/phase_2", run / "iterations/0000/checkpoint") == 0
    evaluations = run / "evaluations"
    assert again(run / "iterations/0000/checkpoint", tmp_path / "a") == said(
        evaluations / "phase_1"
    )
    for k, one in enumerate((run, run / "checkpoint", run / "iterations/0001/checkpoint")):
        assert again(one, tmp_path / str(k)) == said(evaluations / "final")
    told = [read_json(run / name / NOTE) for name in ("iterations/0000/checkpoint", "checkpoint")]
    assert [one["path"] for one in told] == ["../../../base", "base"]
    assert told[1]["weights"] == digest(str(run / "bases/phase_2")) != told[0]["weights"]


@pytest.mark.method
def test_a_run_opens_wherever_it_was_moved(lively: Path, tmp_path: Path) -> None:
    """Though what it began with is gone, and another run lies where it lay."""
    moved, old = tmp_path / "elsewhere" / "b", tmp_path / "runs" / "a"
    shutil.copytree(lively / "run", old)
    for name in ("iterations/0000", "iterations/0001", "."):
        file = old / name / "checkpoint" / "adapter_config.json"
        settings = json.loads(file.read_text())
        where = settings["base_model_name_or_path"].replace(str(lively / "run"), str(old))
        file.write_text(json.dumps(settings | {"base_model_name_or_path": where}))
    shutil.copytree(old, moved)
    shutil.rmtree(old / "base")
    shutil.copytree(lively / "model", old / "base")
    for name in ("iterations/0000/checkpoint", "iterations/0001", "checkpoint", "."):
        assert layers_of(str(moved / name))[0].startswith(str(moved))
        assert gap(moved / name, lively / "run" / name) == 0
    final = said(lively / "run/evaluations/final")
    assert again(moved / "iterations/0001/checkpoint", tmp_path / "seen") == final
    # A run goes on from it, and the same command from where that one is killed.
    (tmp_path / "next.yaml").write_text(TINY.replace("MODEL", str(moved)))
    played(tmp_path / "next.yaml", [], tmp_path / "next")
    assert said(tmp_path / "next/evaluations/base") == final
    shutil.rmtree(moved)
    shutil.rmtree(tmp_path / "next/checkpoint")
    for name in ("result.json", "report.html"):
        (tmp_path / "next" / name).unlink()
    shutil.rmtree(tmp_path / "next/evaluations/final")
    played(tmp_path / "next.yaml", [], tmp_path / "next")
    assert gap(tmp_path / "next/base", lively / "run") == 0
    # Where it lay, the base is another one now: refused, not played.
    with pytest.raises(ModelError, match=r"trained on other weights .* than those of"):
        weights(old / "iterations/0000/checkpoint")


def test_what_earlier_versions_stored_opens(lively: Path, tmp_path: Path) -> None:
    """They noted one absolute path, and copied the adapter a run began with as its base."""
    run = tmp_path / "run"
    shutil.copytree(lively / "run", run)
    for note in run.rglob(NOTE):
        note.unlink()
    for name, base in {"iterations/0000": "base", "iterations/0001": "bases/phase_2"}.items():
        there = lively / "run" / name / "checkpoint"
        assert found_base(run / name / "checkpoint") == str(lively / "run" / base)
        file = run / name / "checkpoint/adapter_config.json"
        # The run was made at another place and moved.
        file.write_text(file.read_text().replace(str(lively), "/gone"))
        assert found_base(run / name / "checkpoint") == str(run / base)
        assert gap(run / name / "checkpoint", there) == 0
    shutil.rmtree(run / "checkpoint/base")
    shutil.copytree(lively / "first", run / "checkpoint/base")
    assert layers_of(str(run)) == (
        str(lively / "model"),
        (run / "checkpoint/base", run / "checkpoint"),
    )
    _, tokens = open_model(str(run), "cpu", "auto", False)
    assert tokens.completion("24")


@pytest.mark.parametrize("use", ["plain", "trl"])
def test_an_adapter_on_an_adapter_on_a_run(lively: Path, tmp_path: Path, use: str) -> None:
    """By both learners, beside the loop: what is exported plays as the learner saw it."""
    if use == "trl":
        pytest.importorskip("trl")
        from test_trl_learner import through_trl

        learner: Any = through_trl(str(lively / "run"))
    else:
        learner = learner_of(lively / "run")
    learner.update(lesson(learner, 0), 0.0)
    learner.export(tmp_path / "one")
    upper = learner_of(tmp_path / "one")
    upper.update(lesson(upper, 1), 0.0)
    upper.export(tmp_path / "two")
    base, adapters = layers_of(str(tmp_path / "two"))
    assert base == str(lively / "run/checkpoint/base")
    assert adapters == (lively / "run/checkpoint", tmp_path / "one", tmp_path / "two")
    merged = upper._model.merge_and_unload().state_dict()
    found = weights(tmp_path / "two")
    assert max(float((merged[k] - found[k]).abs().max()) for k in found) < 1e-5
    # The same on a whole model of the two below it: one more name for what it stands on.
    save_merged(str(tmp_path / "one"), tmp_path / "whole")
    with pytest.raises(PolicyError, match="trained on other weights"):
        load(tmp_path / "whole", tmp_path / "two")
    note_base(tmp_path / "two", str(tmp_path / "whole"))
    assert found_base(tmp_path / "two") == str(tmp_path / "whole")
    assert gap(load(tmp_path / "whole", tmp_path / "two"), tmp_path / "two") == 0


def lesson(learner: PlainLearner, seed: int) -> Batch:
    examples = talks(learner._tokens, 8, seed)
    return Batch(NLL(), tuple(replace(one, advantage=1.0) for one in examples))


def load(base: Path, folder: Path) -> Path:
    """A model with what a policy has in its weights, opened on ``base``, with ``folder`` loaded."""
    policy = TransformersPolicy(TransformersConfig(model="", device="cpu"), str(base), 0)
    asyncio.run(policy.load(folder))
    policy.model.save_pretrained(folder.parent / "loaded")
    return folder.parent / "loaded"


def test_what_is_no_adapter_of_it_is_refused_where_it_is_opened_and_where_it_is_loaded(
    model_folder: Folder, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    base = model_folder("qwen3")
    policy = TransformersPolicy(TransformersConfig(model="", device="cpu"), str(base), 0)
    layers = bare(config_of(str(base)))
    fits(adapter(base, tmp_path / "good"), layers)
    for k, (kind, words) in enumerate(REFUSED.items()):
        if kind in ("missing", "other architecture") or kind.startswith("whole"):
            continue
        folder = broken(kind, base, tmp_path / str(k), base)
        refused(folder, policy, layers, words)
    # Values that are no numbers, and LoRA that begins by changing the base.
    file = adapter(base, tmp_path / "nan") / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    save_file(tensors | {name: tensors[name] * float("nan")}, file)
    file = adapter(base, tmp_path / "pissa") / "adapter_config.json"
    file.write_text(json.dumps(read_json(file) | {"init_lora_weights": "pissa"}))
    for folder, words in (("nan", f"{name} holds values"), ("pissa", "'pissa' changes the base's")):
        with pytest.raises(ModelError, match=words):
            weights(tmp_path / folder)
    fits(tmp_path / "good", layers)  # None of them has left anything behind.
    # (The configs of some of them want what peft warns of, before it is refused.)
    assert not [one for one in recwarn if "missing adapter keys" in str(one.message)]


def refused(folder: Path, policy: TransformersPolicy, layers: Any, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        weights(folder)
    with pytest.raises(ModelError, match=words):
        asyncio.run(policy.load(folder))
    with pytest.raises(ModelError, match=words):
        fits(folder, layers)


def test_weights_are_merged_in_float32_and_rounded_once(
    model_folder: Folder, tmp_path: Path
) -> None:
    whole = open_weights(str(model_folder("llama")), "cpu", "bfloat16", False)
    whole.save_pretrained(tmp_path / "half")
    targets = ["q_proj", "down_proj", "embed_tokens"]
    adapter(tmp_path / "half", tmp_path / "lora", target_modules=targets)
    exact = open_weights(str(tmp_path / "lora"), "cpu", "float32", False).state_dict()
    found = open_weights(str(tmp_path / "lora"), "cpu", "auto", False, beside=False).state_dict()
    changed = [name for name in found if not torch.equal(found[name], whole.state_dict()[name])]
    assert len(changed) == 2 * 2 + 1
    for name, value in found.items():
        assert value.dtype == torch.bfloat16 and torch.equal(value, exact[name].bfloat16())
    # In float32 it is what peft makes of it, to the bit.
    untyped: Any = peft.PeftModel
    models: Any = transformers.AutoModelForCausalLM
    base = models.from_pretrained(tmp_path / "half", dtype="float32")
    theirs = untyped.from_pretrained(base, tmp_path / "lora").merge_and_unload().state_dict()
    assert all(torch.equal(theirs[name], value) for name, value in exact.items())


def test_beside_weights_of_16_bits_an_adapter_is_computed(
    model_folder: Folder, tmp_path: Path
) -> None:
    """What it learned is there, though it is less than the last digit of the weights."""
    before = open_weights(str(model_folder("llama")), "cpu", "bfloat16", False)
    before.save_pretrained(tmp_path / "half")
    adapter(tmp_path / "half", tmp_path / "lora", target_modules=["down_proj"])
    file = tmp_path / "lora" / "adapter_model.safetensors"
    layer = before.get_submodule("model.layers.1.mlp.down_proj")
    whole = layer.weight.detach().clone()
    # All weights of the layer are to be larger by a thousandth of their usual size.
    change = float(whole.float().abs().mean()) / 1000
    tensors = {name: torch.zeros_like(value) for name, value in load_file(file).items()}
    for name, value in tensors.items():
        if "layers.1.mlp.down_proj" in name:
            value[(slice(1) if "lora_A" in name else slice(None)), :] = 1 if "lora_A" in name else 0
            value[:, 0] = value[:, 0] if "lora_A" in name else change
    save_file(tensors, file)
    settings = read_json(tmp_path / "lora" / "adapter_config.json")
    change *= settings["lora_alpha"] / settings["r"]
    lost = (whole.float() + change).bfloat16()
    assert float((lost == whole).float().mean()) > 0.5
    states = (1 + torch.randn(200, layer.in_features)).bfloat16()
    with torch.no_grad():
        bare = layer(states)
        changed = merge(before, tmp_path / "lora", str(tmp_path / "half"))
        added = layer(states).float() - bare.float()
        assert torch.equal(layer.weight, whole)
        restore(changed)
        assert torch.equal(layer(states), bare)
    # Each input is seen as it is: their sum says how much is added everywhere.
    wanted = states.float().sum(-1, keepdim=True) * change
    assert float((added / wanted).mean()) == pytest.approx(1, abs=0.05)


def test_what_an_adapter_was_merged_into_can_be_trained_on(
    model_folder: Folder, tmp_path: Path
) -> None:
    adapter(model_folder("qwen3"), tmp_path / "first")
    learner = learner_of(tmp_path / "first", method="full")
    before = weights(tmp_path / "first")
    learner.update(lesson(learner, 0), 0.0)
    learner.export(tmp_path / "after")
    after = weights(tmp_path / "after")
    assert sum(not torch.equal(before[k], after[k]) for k in before) > len(before) / 2


@pytest.mark.method
def test_a_run_of_whole_weights_goes_on_from_a_run(model_folder: Folder, tmp_path: Path) -> None:
    more = ["learner={method: full, learning_rate: 1e-4}", "evaluation.tasks=4"]
    model = model_folder("qwen3")
    for name in ("one", "two"):
        (tmp_path / "r.yaml").write_text(TINY.replace("MODEL", str(model)))
        played(tmp_path / "r.yaml", more, tmp_path / name)
        model = tmp_path / "one"
    assert layers_of(str(tmp_path / "two")) == (str(tmp_path / "two/checkpoint"), ())
    # Of the run before only the model is kept.
    kept = {path.name for path in (tmp_path / "two/checkpoint/base").iterdir()}
    assert "model.safetensors" in kept and not {"base", NOTE, "selfwright.json"} & kept
    assert gap(tmp_path / "two/checkpoint/base", tmp_path / "one") == 0
    assert found_base(tmp_path / "two/iterations/0000/checkpoint") == str(
        tmp_path / "one/checkpoint"
    )


def test_one_digest_for_the_same_weights_however_they_are_stored(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model_folder("qwen3")
    whole = open_weights(str(base), "cpu", "auto", False)
    whole.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 2
    assert digest(str(tmp_path / "parts")) == digest(str(base)) is not None
    assert digest(str(model_folder("llama"))) != digest(str(base))
    assert digest("no/such-model") is None and digest(str(tmp_path)) is None
    # As the hub's client keeps it.
    hub = tmp_path / "hub" / "models--some--model"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text("abc")
    shutil.copytree(tmp_path / "parts", hub / "snapshots" / "abc")
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert digest("some/model") == digest(str(base))
    with torch.no_grad():
        whole.model.norm.weight[0] += 1
    whole.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert digest(str(tmp_path / "parts")) != digest(str(base))
    file = tmp_path / "parts" / "model-00001-of-00003.safetensors"
    file = file if file.exists() else min((tmp_path / "parts").glob("*.safetensors"))
    file.write_bytes(b"\xff" * 100)
    with pytest.raises(ModelError, match=f"{file.name} is damaged"):
        digest(str(tmp_path / "parts"))


@given(st.integers(0, 10 * BLOCKS * BLOCK))
def test_what_is_looked_at_lies_inside_and_reaches_from_end_to_end(size: int) -> None:
    found = list(blocks(size))
    assert found[0][0] == 0 and sum(found[-1]) == size
    assert sum(length for _, length in found) == min(size, BLOCKS * BLOCK)


def test_an_adapter_that_names_itself(model_folder: Folder, tmp_path: Path) -> None:
    one = adapter(model_folder("qwen3"), tmp_path / "one")
    two = adapter(model_folder("qwen3"), tmp_path / "two")
    for folder, base in ((one, two), (two, one)):
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(read_json(file) | {"base_model_name_or_path": str(base)}))
    with pytest.raises(ModelError, match="names itself as its base"):
        weights(one)
    (one / NOTE).write_text("[]")
    with pytest.raises(StoreError, match=r"base\.json is damaged"):
        weights(one)


@pytest.mark.parametrize(
    ("model", "override", "words"),
    [
        ("scratch", "learner.targets=[q_proj, dwn_proj]", "called 'dwn_proj'; did you mean 'down_"),
        ("scratch", "learner.targets=[zzz]", "the model has down_proj, embed_tokens, gate_proj,"),
        ("scratch", "learner.targets=[lm_head]", "'lm_head' shares its weights"),
        ("folder", "learner.targets=[self_attn]", "no layer is called 'self_attn'"),
        ("folder", "learner.targets=['']", "no layer is called ''"),
        ("folder", "learner.targets=[]", "learner.targets: wanted the name of a layer"),
        ("folder", "learner.targets=[all-linear]", "all-linear stands alone"),
        ("adapter", "learner.targets=[qproj]", "did you mean 'q_proj'"),
        ("scratch", "judge={use: model, model: ./nobody}", "judge.model: cannot open the model"),
        ("scratch", "policies={tutor: {model: ./nobody}}", "policies.tutor: cannot open the model"),
        ("nobody", "seed=1", "policy: cannot open the model"),
        ("scratch", "judge={use: model, rubric: LATIN}", "cannot read the rubric file"),
        ("scratch", "judge={use: model, rubric: EMPTY}", "' is empty"),
    ],
)
def test_what_no_run_could_use_is_known_before_anything_is_made(
    model: str,
    override: str,
    words: str,
    model_folder: Folder,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "latin").write_bytes(b"\xe4rger")
    (tmp_path / "empty").write_bytes(b" \n")
    override = override.replace("LATIN", str(tmp_path / "latin"))
    override = override.replace("EMPTY", str(tmp_path / "empty"))
    named = {
        "scratch": "scratch:32x1, warm_start: {updates: 9}",
        "folder": str(model_folder("qwen3")),
        "nobody": "./nobody, warm_start: {updates: 9}",
    }
    if model == "adapter":
        named[model] = str(adapter(model_folder("qwen3"), tmp_path / "adapter"))
    (tmp_path / "r.yaml").write_text(TINY.replace("MODEL", named[model]))
    line = ["run", str(tmp_path / "r.yaml"), "-o", override, "--output", str(tmp_path / "run")]
    assert call(line) == 2
    said = capfd.readouterr().err
    assert words in said and "Traceback" not in said
    assert not (tmp_path / "cache").exists()
    assert not (tmp_path / "run/base").exists() and not (tmp_path / "run/evaluations").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("key", ["learner", "policy"])
def test_a_gpu_that_is_not_there(
    key: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "r.yaml").write_text(TINY.replace("MODEL", "scratch:32x1"))
    line = ["run", str(tmp_path / "r.yaml"), "-o", f"{key}.device=cuda"]
    assert call([*line, "--output", str(tmp_path / "run")]) == 2
    assert "GPU; use auto or cpu" in capfd.readouterr().err
    assert not (tmp_path / "cache").exists()
