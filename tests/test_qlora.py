"""4-bit weights and 8-bit moments: they learn, go on bit for bit, and are refused where unfit."""

# torch, transformers and bitsandbytes are partly untyped; state is no part of the interface.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportPrivateUsage=false

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import seeing
import torch
import transformers
from bitsandbytes import functional
from bitsandbytes.nn.modules import Linear4bit
from components import SINGLE, played
from test_learner import close, equal, gradient, learner_of, state, talks

from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.core.errors import LearnerError, ModelError, RecipeError
from selfwright.core.models import quantization
from selfwright.core.models.adapters import changes
from selfwright.core.models.canary import canaries_of, distance
from selfwright.core.models.open import open_weights
from selfwright.core.recipe import read
from selfwright.core.types import Batch
from selfwright.trainers.learning.config import LearnerConfig
from selfwright.trainers.learning.learner import PlainLearner
from selfwright.trainers.learning.loss import NLL
from selfwright.trainers.learning.trl import TRLConfig, TRLLearner, fit_dpo

Folder = Callable[[str], Path]
NF4: dict[str, Any] = {"quantization": "nf4"}
EIGHT: dict[str, Any] = {"optimizer": "adamw_8bit", "rank": 64, "alpha": 64}
THIRTY_TWO: dict[str, Any] = EIGHT | {"optimizer": "adamw"}
"""Of a rank at which some tensors have the 4,096 numbers from which moments are in 8 bits."""


def lesson(learner: PlainLearner, seed: int = 0) -> Batch:
    """A few answers to imitate."""
    examples = talks(learner._tokens, 6, seed)
    return Batch(NLL(), tuple(replace(one, advantage=1.0) for one in examples))


def losses(learner: PlainLearner, updates: int) -> list[float]:
    """Of the same batch, learned again and again."""
    batch = lesson(learner)
    return [learner.update(batch, 0.0)["train/loss"] for _ in range(updates)]


def moments(learner: PlainLearner) -> dict[str, torch.Tensor]:
    """All that the optimiser remembers."""
    return {
        f"{name} {slot}": torch.as_tensor(value).clone()
        for name, weight in learner._trained.items()
        for slot, value in learner._optimizer.state[weight].items()
    }


def policy_of(model: Path, **keys: Any) -> TransformersPolicy:
    config = TransformersConfig.model_validate({"model": "", "device": "cpu", **keys})
    return TransformersPolicy(config, str(model), 0)


def off(policy: TransformersPolicy, checkpoint: Path) -> float:
    """How far it is from what the learner wrote beside its weights, nats on average."""
    asyncio.run(policy.load(checkpoint))
    canary = canaries_of(checkpoint)[0]
    found = policy._score(canary.ids[: -len(canary.asked)], canary.asked, ())
    return distance(found, canary.logprobs)


def dequantised(folder: Path, into: Path) -> Path:
    """A plain model with the very weights that the one in ``folder`` has in 4 bits."""
    quantised = open_weights(str(folder), "cpu", "float32", False, quantization="nf4")
    models: Any = transformers.AutoModelForCausalLM
    tokenizers: Any = transformers.AutoTokenizer
    plain = models.from_pretrained(folder, dtype="float32")
    for name, module in quantised.named_modules():
        if isinstance(module, Linear4bit):
            weight: Any = module.weight
            whole: Any = functional.dequantize_4bit(weight.data, weight.quant_state)
            plain.get_submodule(name).weight.data = whole
    plain.save_pretrained(into)
    tokenizers.from_pretrained(folder).save_pretrained(into)
    return into


def test_a_lora_beside_4_bits_learns_and_leaves_them_as_they_are(model_folder: Folder) -> None:
    learner = learner_of(model_folder("llama"), **NF4)
    layers: list[Any] = [m for m in learner._model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 2 * 7 and all(layer.weight.dtype == torch.uint8 for layer in layers)
    assert all(layer.weight.quant_state.nested for layer in layers)
    plain: Any = learner._model.get_base_model()
    for part in (plain.get_input_embeddings(), plain.get_output_embeddings()):
        assert part.weight.dtype == torch.float32
    assert all("lora_" in n and w.dtype == torch.float32 for n, w in learner._trained.items())
    before = state(learner)
    first, *_, last = losses(learner, 12)
    assert last < first / 3
    after = state(learner)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == learner._trained.keys()


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("again", [False, True])
def test_the_gradient_is_that_of_the_same_weights_in_float32(
    model_folder: Folder, tmp_path: Path, kind: str, again: bool
) -> None:
    learner = learner_of(model_folder(kind), gradient_checkpointing=again, **NF4)
    losses(learner, 2)  # LoRA's A has no gradient before B is something.
    learner.save(tmp_path / "state")
    other = learner_of(dequantised(model_folder(kind), tmp_path / "plain"))
    other.restore(tmp_path / "state")
    one, two = (gradient(which, lesson(which, 1)) for which in (learner, other))
    assert close(one, two, 1e-4)
    assert max(float(value.abs().max()) for value in one.values()) > 1e-2
    rounded = learner_of(model_folder(kind))
    rounded.restore(tmp_path / "state")
    assert not close(one, gradient(rounded, lesson(rounded, 1)), 1e-4)


def test_moments_in_8_bits_learn_as_well_as_in_32(model_folder: Folder) -> None:
    learner = learner_of(model_folder("qwen3"), **EIGHT)
    plain = learner_of(model_folder("qwen3"), **THIRTY_TWO)
    found, usual = losses(learner, 12), losses(plain, 12)
    assert found[-1] < found[0] / 3
    assert abs(found[-1] - usual[-1]) < 0.1 * usual[0]
    kinds = {
        weight.numel() >= 4096: learner._optimizer.state[weight]["state1"].dtype
        for weight in learner._trained.values()
    }
    assert kinds == {True: torch.uint8, False: torch.float32}
    assert found != usual


@pytest.mark.parametrize("keys", [NF4, EIGHT, NF4 | EIGHT | {"dropout": 0.2, "weight_decay": 0.1}])
def test_a_restored_learner_goes_on_bit_for_bit(
    model_folder: Folder, tmp_path: Path, keys: dict[str, Any]
) -> None:
    learner = learner_of(model_folder("qwen3"), **keys)
    losses(learner, 3)
    learner.save(tmp_path)
    before = moments(learner)
    went = losses(learner, 3)
    other = learner_of(model_folder("qwen3"), **keys)
    other.restore(tmp_path)
    assert equal(before, moments(other))
    assert {k: v.dtype for k, v in before.items()} == {
        k: v.dtype for k, v in moments(other).items()
    }
    assert losses(other, 3) == went
    assert equal(state(learner), state(other))
    assert equal(moments(learner), moments(other))


def test_moments_of_another_optimiser_are_refused(model_folder: Folder, tmp_path: Path) -> None:
    learner = learner_of(model_folder("qwen3"), **EIGHT)
    other = learner_of(model_folder("qwen3"), **THIRTY_TWO)
    for one, two in ((learner, other), (other, learner)):
        losses(one, 1)
        one.save(tmp_path)
        before = state(two)
        with pytest.raises(LearnerError, match="another optimiser"):
            two.restore(tmp_path)
        assert equal(before, state(two))


def test_who_samples_with_4_bits_agrees_with_the_learner(
    model_folder: Folder, tmp_path: Path
) -> None:
    base = model_folder("llama")
    learner = learner_of(base, **NF4)
    losses(learner, 3)
    learner.export(tmp_path / "one")
    policy = policy_of(base, **NF4)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    assert off(policy, tmp_path / "one") < 1e-5
    assert off(policy_of(base), tmp_path / "one") > 0.05
    # What is loaded is taken out again, and the adapter may be a base itself.
    asyncio.run(policy.load(None))
    assert equal(before, policy.model.state_dict())
    upper = learner_of(tmp_path / "one", **NF4)
    layers = [m for m in upper._model.modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 2 * 7
    losses(upper, 3)
    upper.export(tmp_path / "two")
    assert off(policy_of(tmp_path / "one", **NF4), tmp_path / "two") < 1e-5


def test_a_whole_model_is_sampled_in_4_bits_as_well(model_folder: Folder, tmp_path: Path) -> None:
    """As a warm start makes one."""
    learner = learner_of(model_folder("qwen3"), method="full")
    losses(learner, 2)
    learner.export(tmp_path / "whole")
    policy = policy_of(model_folder("qwen3"), **NF4)
    found = off(policy, tmp_path / "whole")
    assert any(isinstance(module, Linear4bit) for module in policy.model.modules())
    assert found == off(policy_of(tmp_path / "whole", **NF4), tmp_path / "whole")


def test_in_bf16_too(model_folder: Folder, tmp_path: Path) -> None:
    learner = learner_of(model_folder("llama"), precision="bfloat16", **NF4)
    assert all(weight.dtype == torch.float32 for weight in learner._trained.values())
    first, *_, last = losses(learner, 12)
    assert last < first / 2
    learner.export(tmp_path / "one")
    policy = policy_of(model_folder("llama"), dtype="bfloat16", **NF4)
    assert off(policy, tmp_path / "one") < 0.05


def test_no_cpu_packs_weights_anew(model_folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = str(model_folder("qwen3"))
    ids = torch.arange(8)[None]
    plain = open_weights(folder, "cpu", "float32", False, quantization="nf4").eval()
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    model = open_weights(folder, "cpu", "float32", False, quantization="nf4").eval()
    with torch.no_grad():
        assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("kind", ["qwen3_vl", "idefics3", "gemma3"])
def test_what_looks_at_pictures_stays_as_it_is(
    model_folder: Folder, tmp_path: Path, kind: str
) -> None:
    seeing.make(kind, model_folder("scratch"), tmp_path / "model")
    model = open_weights(str(tmp_path / "model"), "cpu", "float32", False, quantization="nf4")
    body = {id(module) for module in model.get_decoder().modules()}
    linear = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(isinstance(module, Linear4bit) == (id(module) in body) for module in linear)
    learner = learner_of(tmp_path / "model", **NF4)
    first, *_, last = losses(learner, 6)
    assert last < first
    learner.export(tmp_path / "one")
    assert off(policy_of(tmp_path / "model", **NF4), tmp_path / "one") < 1e-5


def test_a_whole_run(player: Path, tmp_path: Path) -> None:
    (tmp_path / "tiny.yaml").write_text(SINGLE.replace("MODEL", str(player)))
    keys = ["policy.quantization=nf4", "learner.quantization=nf4", "learner.optimizer=adamw_8bit"]
    played(tmp_path / "tiny.yaml", [*keys, "iterations=2", "learner.rank=64"], tmp_path / "run")
    checkpoint = tmp_path / "run/checkpoint"
    assert changes(checkpoint)
    assert off(policy_of(player, **NF4), checkpoint) < 1e-5


def test_full_training_is_refused() -> None:
    with pytest.raises(ValueError, match=r"nf4 is for weights that stay .* wanted method: lora"):
        LearnerConfig.model_validate({"method": "full", **NF4})
    LearnerConfig.model_validate({"method": "full", "optimizer": "adamw_8bit"})


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["learner.quantization=nf4"], "policy.quantization is none and learner.quantization nf4"),
        (["policy.quantization=nf4"], "policy.quantization is nf4 and learner.quantization none"),
        (
            ["policy.use=vllm", "learner.quantization=nf4"],
            "policy.use is vllm: vLLM would sample with other weights",
        ),
    ],
)
def test_a_sampler_of_other_weights_is_refused(overrides: list[str], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        read("quickstart", overrides)
    recipe = read("quickstart", ["policy.quantization=nf4", "learner.quantization=nf4"])
    assert recipe.dump()["learner"]["quantization"] == "nf4"


@pytest.mark.parametrize("keys", [NF4, {"optimizer": "adamw_8bit"}])
def test_trl_and_shards_are_refused(
    model_folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keys: dict[str, Any]
) -> None:
    (key, value) = next(iter(keys.items()))
    config = TRLConfig.model_validate({"device": "cpu", **keys})
    words = f"learner.{key}: {value} is for learner.use: plain"
    assert TRLLearner.unfit(config, lambda: None) == [words]
    with pytest.raises(LearnerError, match=words):
        TRLLearner(config, str(model_folder("qwen3")), 0)
    with pytest.raises(LearnerError, match=words):
        fit_dpo(str(model_folder("qwen3")), [Any], config, tmp_path)  # pyright: ignore
    plain = LearnerConfig.model_validate({"device": "cpu", **keys})
    assert PlainLearner.unfit(plain, lambda: None) == []
    for name, setting in (("ACCELERATE_USE_FSDP", "true"), ("FSDP_VERSION", "2")):
        monkeypatch.setenv(name, setting)
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "false")  # What is set there is unset.
    monkeypatch.setenv("WORLD_SIZE", "2")
    (fault,) = PlainLearner.unfit(plain, lambda: None)
    assert fault.startswith(f"learner.{key}: {value} cannot be sharded")


def test_a_missing_library_is_said_before_anything_is_done(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quantization, "find_spec", lambda _: None)  # pyright: ignore
    folder = str(model_folder("qwen3"))
    words = r"needs bitsandbytes, which is not installed: pip install 'selfwright\[qlora\]'"
    config = LearnerConfig.model_validate({"device": "cpu", "optimizer": "adamw_8bit", **NF4})
    faults = PlainLearner.unfit(config, lambda: None)
    assert [one.split(" needs ")[0] for one in faults] == [
        "learner.optimizer: adamw_8bit",
        "learner.quantization: nf4",
    ]
    with pytest.raises(LearnerError, match=words):
        PlainLearner(config, folder, 0)
    mine = TransformersConfig.model_validate({"model": "", **NF4})
    assert TransformersPolicy.unready(mine, folder).startswith("quantization: nf4 needs bits")
    with pytest.raises(ModelError, match=words):
        open_weights(folder, "cpu", "float32", False, quantization="nf4")
    assert PlainLearner.unfit(LearnerConfig(device="cpu"), lambda: None) == []
