"""Several processes learn what one does: the model whole in each, or sharded, with pictures too."""

import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from seeing import make

pytestmark = pytest.mark.multi
Folder = Callable[[str], Path]

SCRIPT = """
import os
import sys
from pathlib import Path

from seeing import noise

from selfwright.core.images import STORE
from selfwright.core.types import Batch, Completion, Example, Message, Prompt
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import (
    DPO, NLL, Clip, ContestedGap, CovarianceClip, SequenceClip
)
from selfwright.trainers.parts.critic import Critic, CriticConfig


def learner_of(model, sharded):
    os.environ["ACCELERATE_USE_FSDP"] = "true" if sharded else "false"
    config = LearnerConfig(device="cpu", rank=4, batch_size=3, learning_rate=1e-3, token_budget=40)
    return PlainLearner(config, model, 0)


def read(model, teacher, out, sharded):
    # One process gets no row at all of the first update, and unlike numbers of the second.
    examples = tuple(
        Example(
            Prompt((Message("user", (f"make {k} " * (k % 3 + 1),)),)),
            Completion(f"{k} + {k}"),
            k - 3.0,
            k // 2,
        )
        for k in range(7)
    )
    learner = learner_of(model, sharded)
    for share in (examples[:1], examples):
        moments = ContestedGap(teacher, True, critic=Critic(CriticConfig(), 0))
        clips = (Clip(kl=0.1), CovarianceClip(share=0.3, above=0.01), SequenceClip())
        for loss in (*clips, DPO(), moments):
            print(learner.update(Batch(loss, share, epochs=2), 0.0)["train/loss"])
    learner.save(Path(out, "read"))


def pictures():
    # Uneven rows: of several pictures, of one, of none; some begin alike.
    shown = [STORE.keep(noise(*size, k)) for k, size in enumerate([(20, 30), (40, 10), (16, 16)])]
    parts = [("make ", shown[0], " from ", shown[1]), ("make ", shown[0], "?"), ("number",)]
    return tuple(
        Example(Prompt((Message("user", parts[k % 3]),)), Completion(f"{k} + {k}"), k - 3.0)
        for k in range(7)
    )


def look(model, out, sharded, before=None):
    learner = learner_of(model, sharded)
    if before:
        learner.restore(Path(before))
    for loss in (Clip(kl=0.1), NLL()):
        print(learner.update(Batch(loss, pictures()), 0.0)["train/loss"])
    learner.save(Path(out))


if __name__ == "__main__":
    model, teacher, seeing, out, before = sys.argv[1:]
    for kind in ("whole", "sharded"):
        if before:
            look(seeing, f"{out}/{kind}/again", kind == "sharded", before)
            continue
        if os.environ["WORLD_SIZE"] != "4":
            read(model, teacher, f"{out}/{kind}", kind == "sharded")
        look(seeing, f"{out}/{kind}/look", kind == "sharded")
"""


@pytest.fixture(scope="module")
def folders(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A model, one of the same vocabulary with other weights, one that sees; the script."""
    root = tmp_path_factory.mktemp("processes")
    shutil.copytree(model_folder("qwen3"), root / "other")
    untyped: Any = transformers.AutoModelForCausalLM
    model = untyped.from_pretrained(root / "other")
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(root / "other")
    make("idefics3", model_folder("scratch"), root / "seeing")
    (root / "learn.py").write_text(SCRIPT)
    return [*map(str, (model_folder("qwen3"), root / "other", root / "seeing", root / "learn.py"))]


def together(folders: list[str], processes: int, out: Path, before: str = "") -> None:
    """The script, by so many processes."""
    *models, script = folders
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes)}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    shared |= {"OMP_NUM_THREADS": "1", "FSDP_VERSION": "2"}
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.getenv("PYTHONPATH")])])
    started = [
        subprocess.Popen(
            [sys.executable, script, *models, str(out), before],
            env=os.environ
            | shared
            # Sets then have another order in each.
            | {"PYTHONHASHSEED": str(rank)}
            | {"PYTHONPATH": path, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(processes)
    ]
    try:
        said = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert {process.returncode for process in started} == {0}, said
    assert len({out for out, _ in said}) == 1


def same(one: Path, other: Path) -> None:
    found, wanted = (load_file(folder / "learner.safetensors") for folder in (one, other))
    for state in (found, wanted):
        state.pop("tight", None)  # Nobody asks where the model is sharded.
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        # What the optimiser remembers has the size of the gradients.
        most = 1e-4 if name.startswith("weight.") else 1e-3 * float(value.abs().max()) + 1e-4
        apart = (found[name] - value).abs()
        # AdamW's first steps go by the sign of a gradient, and one in a thousand may be near zero.
        beyond = float((apart > most).float().mean())
        assert beyond <= 0.005, (name, beyond, float(apart.max()), most)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_learn_as_one(folders: list[str], processes: int, tmp_path: Path) -> None:
    one = tmp_path / "one"
    together(folders, processes, tmp_path)
    together(folders, 1, one)
    for kind in ("whole", "sharded"):
        same(tmp_path / kind / "look", one / "whole/look")
        if processes == 2:
            same(tmp_path / kind / "read", one / "whole/read")
    if processes > 2:
        return
    # What a sharded one wrote goes on in one process, and what that writes in either.
    middle = tmp_path / "middle"
    together(folders, 1, middle, str(tmp_path / "sharded/look"))
    together(folders, processes, tmp_path, str(middle / "whole/again"))
    together(folders, 1, one, str(middle / "whole/again"))
    for kind in ("whole", "sharded"):
        same(tmp_path / kind / "again", one / "whole/again")
