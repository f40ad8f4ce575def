"""Several processes under `accelerate launch`: they train what one trains, and end together."""

import io
import os
import pickle
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from components import SINGLE, played
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch._C._distributed_c10d import HashStore

from selfwright.commands.cli import call
from selfwright.core.files import read_json
from selfwright.loop import process_group
from selfwright.loop.process_group import ProcessGroup
from selfwright.trainers.parts.critic import Critic, CriticConfig

pytestmark = pytest.mark.multi

SHIPPED = Path(__file__).parents[1] / "recipes/accelerate"
PHASES = SINGLE.replace(
    "trainer: {use: grpo, tasks_per_iteration: 12, attempts_per_task: 4}",
    "phases:\n"
    "- {trainer: {use: grpo, tasks_per_iteration: 12, attempts_per_task: 4}, iterations: 2}\n"
    "- {trainer: {use: moment_matching, teacher: MODEL, tasks_per_iteration: 6}, iterations: 1}",
).replace("iterations: 3\n", "", 1)
"""Ends with critics, networks of a loss's own."""
WAITING = """
import sys, time
from selfwright.core.recipe import read
from selfwright.loop import process_group
process_group.SILENT_S = 10.0
group = process_group.ProcessGroup(read(sys.argv[1]))
print("met", flush=True)
if group.rank:
    group.next_order()
time.sleep(600)
"""
"""A group of which the leader has nothing to ask for."""


@pytest.fixture(scope="module")
def recipe(player: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "phases.yaml"
    file.write_text(PHASES.replace("MODEL", str(player)))
    return file


@pytest.fixture(scope="module")
def alone(recipe: Path) -> Path:
    """What one process makes of the recipe."""
    played(recipe, [], recipe.parent / "alone")
    return recipe.parent / "alone"


class Launched:
    """A run in two processes, and what they say."""

    def __init__(self, command: list[str], **env: str) -> None:
        inherited = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
        self._process = subprocess.Popen(
            command,
            env=inherited | {"OMP_NUM_THREADS": "1", "PYTHONPATH": _path()} | env,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.of: dict[int, psutil.Process] = {}

    def find(self, rank: int) -> psutil.Process:
        """The process of that rank, once it is there."""

        def found() -> bool:
            for child in psutil.Process(self._process.pid).children(recursive=True):
                try:
                    told = child.environ()
                except psutil.Error:
                    continue
                if "RANK" in told:
                    self.of[int(told["RANK"])] = child
            return len(self.of) == 2

        eventually(found)
        return self.of[rank]

    def until(self, line: str) -> None:
        """Wait for it to say that, and no more."""
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == f"{line}\n"

    def end(self, timeout_s: float = 240) -> tuple[int, str]:
        """The exit code and all that was said; nothing that it started is left."""
        said, _ = self._process.communicate(timeout=timeout_s)
        for one in self.of.values():
            eventually(lambda one=one: not one.is_running(), 20)
        return self._process.returncode, said

    def pause(self) -> None:
        self._process.send_signal(signal.SIGSTOP)

    def kill(self) -> None:
        with_children = [self._process.pid]
        if self._process.poll() is None:
            children = psutil.Process(self._process.pid).children(recursive=True)
            with_children += [child.pid for child in children]
        for pid in with_children:
            with suppress(ProcessLookupError):
                os.kill(pid, 9)
        self._process.communicate(timeout=30)


@contextmanager
def launched(*arguments: str, how: str = "ddp") -> Generator[Launched]:
    """``accelerate launch`` of a ``selfwright`` command line, as a shipped file says."""
    launch = ["-m", "accelerate.commands.launch", "--config_file", str(SHIPPED / f"{how}.yaml")]
    run = Launched([sys.executable, "-P", *launch, "-m", "selfwright", *arguments])
    try:
        yield run
    finally:
        run.kill()


def _path() -> str:
    """The folder that holds the package that is tested here."""
    import selfwright

    return str(Path(selfwright.__file__).parents[1])


def eventually(true: Callable[[], bool], timeout_s: float = 240) -> None:
    until = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < until, f"not within {timeout_s} s"
        time.sleep(0.02)


def same_runs(a: Path, b: Path) -> None:
    for index in range(3):
        one, two = (read_json(run / f"iterations/{index:04d}/metrics.json") for run in (a, b))
        assert one.keys() == two.keys()
        for key in one:
            if not key.startswith("time/"):
                assert two[key] == pytest.approx(one[key], abs=1e-4, rel=1e-4), key
    one, two = (load_file(run / "checkpoint/adapter_model.safetensors") for run in (a, b))
    assert one.keys() == two.keys()
    assert any(bool(weight.any()) for name, weight in one.items() if "lora_B" in name)
    for name in one:
        assert torch.allclose(one[name], two[name], atol=1e-4), name


@contextmanager
def by_hand(*command: str) -> Generator[list[Launched]]:
    """Two processes that no launcher looks after."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    runs = [
        Launched(
            [sys.executable, "-P", *command],
            **shared,
            MASTER_PORT=port,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
        )
        for rank in range(2)
    ]
    try:
        yield runs
    finally:
        for run in runs:
            run.kill()


def test_whoever_dies_the_run_ends_and_goes_on_later_as_one_process_would(
    recipe: Path, alone: Path, tmp_path: Path
) -> None:
    """First a follower, then the leader; what was begun by whole models ends with a sharded one."""
    output = tmp_path / "run"
    arguments = ("run", str(recipe), "--output", str(output))
    with launched(*arguments) as run:
        victim = run.find(1)
        eventually((output / "iterations/0000").exists)
        victim.kill()
        began = time.monotonic()
        code, said = run.end()
    assert code != 0 and time.monotonic() - began < 40
    assert f"process 1 of 2 (pid {victim.pid}) has died" in said
    assert not (output / "result.json").exists()
    with by_hand("-m", "selfwright", *arguments) as (leader, follower):
        eventually((output / "iterations/0001").exists)
        leader.kill()
        code, said = follower.end()
    assert code == 1, said
    assert "process 1 of 2: process 0" in said or "process 1 of 2 ends: process 0" in said
    with launched(*arguments, "--json", how="fsdp2") as run:
        code, said = run.end()
    assert code == 0, said
    assert "resuming after iteration" in said
    assert said.count('{"recipe": ') == 1, said
    same_runs(alone, output)


def test_an_error_of_the_leader_ends_all(
    model_folder: Callable[[str], Path], recipe: Path, tmp_path: Path
) -> None:
    # It can learn nothing from a model that solves nothing, and says so after three iterations.
    hopeless = f"policy.model={model_folder('scratch')}"
    file = tmp_path / "tiny.yaml"
    file.write_text(SINGLE)
    with launched("run", str(file), "-o", hopeless, "--output", str(tmp_path / "run")) as run:
        run.find(1)
        code, said = run.end()
    assert code != 0
    assert "\nnothing is being learned: the trainer found no example in 3 iterations" in said


def test_a_follower_does_not_wait_for_a_leader_that_is_silent(recipe: Path) -> None:
    with by_hand("-c", WAITING, str(recipe)) as (leader, follower):
        leader.until("met")
        follower.until("met")
        # It holds the store, which takes questions still, but answers none of them.
        leader.pause()
        code, said = follower.end()
    assert code == 1, said
    assert "process 1 of 2: process 0" in said or "process 1 of 2 ends: process 0" in said


def test_a_process_of_another_machine_is_not_looked_for_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Machines may have the same name, and their first PID namespaces have the same number."""
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait(30)
    store = HashStore()
    leader = ProcessGroup.__new__(ProcessGroup)
    leader.rank, leader.size = 0, 2
    store.set("host/1", "elsewhere")
    (tmp_path / "boot_id").write_text("e8b1d1ee-97fb-4b4c-a3a0-2d2b1c1f6b5e\n")
    found: list[str] = []
    for boot in (process_group.BOOT, tmp_path / "boot_id"):
        with monkeypatch.context() as there:
            there.setattr(process_group, "BOOT", boot)
            place = process_group._place()  # pyright: ignore[reportPrivateUsage]
        store.set("place/1", f"{place} {ended.pid}")
        found.append(leader._found(store, {}))  # pyright: ignore[reportPrivateUsage]
    assert found == [f"process 1 of 2 (pid {ended.pid}) has died", ""]
    heard: dict[int, tuple[bytes, float]] = {
        1: (b"", time.monotonic() - 2 * process_group.SILENT_S)
    }
    silent = leader._found(store, heard)  # pyright: ignore[reportPrivateUsage]
    assert f"(pid {ended.pid} on elsewhere) has given no sign of life" in silent


def test_what_cannot_be_shared_is_refused(
    recipe: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert call(["evaluate", "random", "--environment", "countdown"]) == 2
    assert "evaluate works in one process, not in 3" in capsys.readouterr().err
    trl = ["-o", "learner.use=trl", "--output", str(tmp_path / "run")]
    assert call(["run", str(recipe), *trl]) == 2
    assert "the learner trl works in one process only; start it" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_critic_that_was_sent_goes_on_as_the_one_that_stayed() -> None:
    stayed = Critic(CriticConfig(width=8), 0)
    rows = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))

    def climb(critic: Critic) -> None:
        critic.meet(6, 7, "cpu")
        loss: Any = critic(rows).square().sum() - critic(rows)[:, 0].sum()
        loss.backward()
        critic.climb()

    climb(stayed)
    sent: Critic = pickle.load(io.BytesIO(pickle.dumps(stayed)))
    for _ in range(3):
        climb(stayed)
        climb(sent)
    for one, other in zip(stayed.meet(6, 7, "cpu"), sent.meet(6, 7, "cpu"), strict=True):
        assert one.any() and torch.equal(one, other)
