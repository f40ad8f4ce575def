"""Networks of one number: on the tensors that the learner holds, by a LoRA; or whole copies."""

import gc
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from selfwright.agents import scratch
from selfwright.core.errors import ModelError
from selfwright.core.models import frozen
from selfwright.core.models.frozen import open_frozen
from selfwright.core.models.scalar import ScalarConfig, ScalarModel, config_in
from selfwright.core.types import Batch, Completion, Example, Message, Prompt
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import Clip

Folder = Callable[[str], Path]

PROMPT = Prompt((Message("user", ("make 7",)),))
TEXTS = [(PROMPT, Completion(f"{k} + {7 - k}")) for k in range(8)]

MEMORY = """
import gc
import sys

import torch

from selfwright.core.types import Batch, Completion, Example, Message, Prompt
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import Clip
from selfwright.trainers.parts.discriminator import Discriminator, DiscriminatorConfig
from selfwright.trainers.parts.value import Value, ValueConfig


def resident(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith(key)) / 1024


model, method = sys.argv[1:]
prompt = Prompt((Message("user", ("make 7",)),))
texts = [(prompt, Completion(f"{k} + {7 - k}")) for k in range(8)]
examples = tuple(Example(prompt, text[1], k - 3.5) for k, text in enumerate(texts))
before = resident("VmRSS")
learner = PlainLearner(LearnerConfig(device="cpu"), model, 0)
if method == "ril":
    net = Discriminator(DiscriminatorConfig(device="cpu"), model, "binary", 0)
    net.learn(list(zip(texts[:4], texts[4:])), 2)
if method == "sil":
    net = Value(ValueConfig(device="cpu"), model, 0)
    net.learn([prompt] * 8, [1.0] * 8, [1.0] * 8, "both")
learner.update(Batch(Clip(), examples), 0.0)
print(resident("VmHWM") - before)
"""


def net_of(model: Path, **settings: Any) -> ScalarModel:
    config = {"device": "cpu", "learning_rate": 1e-2, **settings}
    return ScalarModel(ScalarConfig.model_validate(config), str(model))


def taught(net: ScalarModel, steps: int) -> None:
    """Odd texts up, even ones down."""
    signs = torch.tensor([1.0, -1.0] * 4)
    for _ in range(steps):
        net.clear()
        (net.forward([net.ids(text) for text in TEXTS]) * -signs).sum().backward()
        net.step()


@pytest.mark.parametrize("bits", ["none", "nf4"])
def test_it_holds_the_tensors_that_the_learner_holds(model_folder: Folder, bits: Any) -> None:
    model = model_folder("qwen3")
    config = LearnerConfig(device="cpu", rank=4, quantization=bits)
    learner = PlainLearner(config, str(model), 0)
    net = net_of(model, quantization=bits)
    own: Any = learner._model  # pyright: ignore[reportPrivateUsage]
    theirs = {weight.data_ptr() for weight in own.parameters()}
    still = [weight for weight in net.body.parameters() if not weight.requires_grad]
    assert len(still) > 10
    assert {weight.data_ptr() for weight in still} <= theirs
    before = [weight.clone() for weight in still]
    assert net.values(TEXTS) == [0.0] * 8
    taught(net, 5)
    values = net.values(TEXTS)
    assert min(values[::2]) > max(values[1::2])
    # What either learns is not the other's: the tensors stay as they are.
    loss = learner.update(Batch(Clip(), (Example(*TEXTS[0], advantage=1.0),)), 0.0)["train/loss"]
    assert loss == loss
    assert all(torch.equal(*pair) for pair in zip(before, still, strict=True))
    assert net.values(TEXTS) == values


def test_networks_share_whoever_came_first_and_let_go_together(model_folder: Folder) -> None:
    held = frozen._held  # pyright: ignore[reportPrivateUsage]
    gc.collect()
    before = len(held)
    first, second = net_of(model_folder("llama")), net_of(model_folder("llama"))
    one, other = (
        {weight.data_ptr() for weight in net.body.parameters() if not weight.requires_grad}
        for net in (first, second)
    )
    assert one == other and len(held) == before + 1
    del first, second
    gc.collect()
    assert len(held) == before


def test_what_nobody_holds_any_more_is_opened_anew(model_folder: Folder, tmp_path: Path) -> None:
    one, _ = open_frozen(str(model_folder("qwen3")), "cpu", "float32", False)
    same, _ = open_frozen(str(model_folder("qwen3")), "cpu", "float32", False)
    half, _ = open_frozen(str(model_folder("qwen3")), "cpu", "bfloat16", False)
    first, second, third = (next(model.parameters()) for model in (one, same, half))
    assert first is second
    assert third.dtype == torch.bfloat16
    assert one.model.layers[0] is not same.model.layers[0]
    # The same folder with other weights in it.
    scratch.make("scratch:32x1", ["make 7"], tmp_path, seed=0)
    old, _ = open_frozen(str(tmp_path), "cpu", "float32", False)
    scratch.make("scratch:32x1", ["make 7"], tmp_path, seed=1)
    new, _ = open_frozen(str(tmp_path), "cpu", "float32", False)
    pairs = zip(old.parameters(), new.parameters(), strict=True)
    assert not all(torch.equal(*pair) for pair in pairs)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_it_goes_on_as_one_that_never_stopped(
    model_folder: Folder, tmp_path: Path, method: str
) -> None:
    model, file = model_folder("qwen3"), tmp_path / "net.safetensors"
    net = net_of(model, method=method, rank=2, alpha=8)
    taught(net, 2)
    net.save(file)
    other = ScalarModel(
        ScalarConfig.model_validate({**config_in(file), "learning_rate": 1e-2, "device": "cpu"}),
        str(model),
        seed=1,
    )
    other.restore(file)
    for one in (net, other):
        taught(one, 2)
    assert other.values(TEXTS) == net.values(TEXTS)
    with pytest.raises(ModelError, match="another model or config"):
        net_of(model, method=method, rank=3).restore(file) if method == "lora" else net_of(
            model
        ).restore(file)


@pytest.mark.multi
def test_no_method_holds_the_model_twice(tmp_path: Path) -> None:
    # 100 MiB of weights.
    scratch.make("scratch:768x4", ["make 3 + 4 - 7"] * 99, tmp_path, seed=0)

    def peak(method: str) -> float:
        done = subprocess.run(
            [sys.executable, "-c", MEMORY, str(tmp_path), method],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not done.returncode, done.stderr
        return float(done.stdout)

    usual = peak("grpo")
    assert usual > 100
    assert max(peak("ril"), peak("sil")) <= 1.2 * usual
