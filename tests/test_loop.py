"""The whole loop for real: run, break, kill, resume, evaluate, compare."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

import pytest

from selfwright.commands.cli import call
from selfwright.core.store import read_trajectories
from selfwright.core.types import Stop

pytestmark = pytest.mark.method

COMMAND = Path(sys.executable).parent / "selfwright"
TINY = """
seed: 3
iterations: 3
environment: {use: countdown, numbers: 2, largest: 40, attempts: 3, parallel: 64}
policy:
  model: scratch:32x1
  max_tokens: 8
  warm_start: {updates: 40, batch_size: 64, demonstrations: 300, learning_rate: 5e-3}
trainer: {use: rise, tasks_per_iteration: 12, attempts_per_task: 3, samples: 3, turns: 3}
learner: {rank: 4, alpha: 8, learning_rate: 1e-3, batch_size: 16}
evaluation: {tasks: 20, validation_tasks: 8, turns: 3}
"""
Selfwright = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def room(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loop")
    (folder / "tiny.yaml").write_text(TINY)
    return folder


@pytest.fixture(scope="module")
def selfwright(room: Path) -> Selfwright:
    """The command, in a folder of its own, with the models it makes kept there.

    In this process: most of a tiny run's time would go into starting another.
    """

    def run(
        *arguments: object, check: bool = True, cache: str = "cache"
    ) -> subprocess.CompletedProcess[str]:
        line = list(map(str, arguments))
        with (
            pytest.MonkeyPatch.context() as patch,
            written(1, room / "out") as out,
            written(2, room / "err") as err,
            redirect_stdout(out),
            redirect_stderr(err),
        ):
            patch.chdir(room)
            for name, value in surroundings(room, cache).items():
                patch.setenv(name, value)
            code = call(line)
        said = (room / "out").read_text(), (room / "err").read_text()
        done = subprocess.CompletedProcess(line, code, *said)
        assert not check or done.returncode == 0, done.stderr
        return done

    return run


@contextmanager
def written(descriptor: int, path: Path) -> Generator[TextIO]:
    """What is written there goes into the file."""
    kept = os.dup(descriptor)
    with path.open("w") as file:
        os.dup2(file.fileno(), descriptor)
        try:
            yield file
        finally:
            os.dup2(kept, descriptor)
            os.close(kept)


def surroundings(room: Path, cache: str = "cache") -> dict[str, str]:
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "SELFWRIGHT_CACHE": str(room / cache), "PYTHONPATH": paths}


@pytest.fixture(scope="module")
def whole(room: Path, selfwright: Selfwright) -> Path:
    """A run that nobody disturbed."""
    done = selfwright("run", "tiny.yaml", "--output", "whole", "--json")
    assert json.loads(done.stdout) == read(room / "whole" / "result.json")
    return room / "whole"


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def lasting(value: Any) -> Any:
    """Without what a clock measured."""
    if isinstance(value, dict):
        return {k: lasting(v) for k, v in value.items() if not k.endswith("_s")}  # pyright: ignore
    if isinstance(value, list):
        return [lasting(one) for one in value]  # pyright: ignore
    return value


def results(folder: Path) -> list[Any]:
    found = [lasting(read(folder / "result.json"))]
    found += [lasting(read(f)) for f in sorted(folder.glob("iterations/*/metrics.json"))]
    return found


def episodes(folder: Path) -> list[Any]:
    """Every stored episode, without the name of the weights that played it (it is a path)."""
    return [
        (t.id, t.parent, t.task, t.attempt, t.replayed, t.steps)
        for iteration in sorted(folder.glob("iterations/0*"))
        for t in (judged.trajectory for judged in read_trajectories(iteration))
    ]


def test_a_run_leaves_its_result_its_report_and_its_checkpoint(whole: Path) -> None:
    result = read(whole / "result.json")
    for name in ("base", "final"):
        assert result[name]["tasks"] == 20
        assert result[name]["success_rate"] == result[name]["successes"] / 20
        low, high = result[name]["interval"]
        assert 0 <= low <= result[name]["success_rate"] <= high <= 1
    assert result["comparison"]["verdict"] in ("better", "worse", "inconclusive")
    assert len(result["curve"]) == 3
    for key in ("wall_s", "environment_steps", "tokens_sampled", "tokens_trained"):
        assert result[key] > 0
    costs = result["costs"]
    assert [cost["iteration"] for cost in costs] == [1, 2, 3]
    for key in ("environment_steps", "tokens_sampled", "tokens_trained"):
        assert sum(cost[key] for cost in costs) == result[key]
    assert result["evaluation"]["tokens_sampled"] > 0
    assert result["warm_start"]["updates"] == 40
    assert result["warm_start"]["environment_steps"] >= 300
    assert result["wall_s"] > sum(cost["wall_s"] for cost in costs) + result["warm_start"]["wall_s"]
    assert (whole / "report.html").stat().st_size > 5_000
    assert (whole / "checkpoint" / "adapter_model.safetensors").is_file()
    assert (whole / "checkpoint" / "base" / "model.safetensors").is_file()
    stored = episodes(whole)
    assert len(stored) == sum(m["rollout/episodes"] for m in results(whole)[1:])


def test_every_episode_has_a_name_of_its_own_and_knows_where_it_began(whole: Path) -> None:
    rounds = [
        [judged.trajectory for judged in read_trajectories(folder)]
        for folder in (*sorted(whole.glob("iterations/0*")), *whole.glob("evaluations/*"))
    ]
    every = {trajectory.id: trajectory for round in rounds for trajectory in round}
    assert len(every) == sum(map(len, rounds)) and "" not in every
    begun = [t for t in every.values() if t.replayed]
    assert begun and all(not t.parent for t in every.values() if not t.replayed)
    for trajectory in begun:
        parent = every[trajectory.parent]
        assert parent.task == trajectory.task and parent.seed == trajectory.seed
        assert parent.steps[: trajectory.replayed] == trajectory.steps[: trajectory.replayed]


def test_the_checkpoint_alone_repeats_the_final_evaluation(
    whole: Path, room: Path, selfwright: Selfwright
) -> None:
    shutil.copytree(whole / "checkpoint", room / "moved")
    arguments = ("--tasks", 20, "--seed", 3, "--output", "again", "--json")
    done = selfwright("evaluate", "moved", "--environment", "countdown", *arguments)
    told, final = json.loads(done.stdout), read(whole / "evaluations" / "final" / "evaluation.json")
    assert told["success_rate"] == final["success_rate"]
    assert told["introspection"]["m1_tk"] == final["introspection"]["m1_tk"]
    assert read(room / "again" / "evaluation.json")["results"] == final["results"]
    same = json.loads(selfwright("compare", "whole", "again", "--json").stdout)
    assert (same["difference"], same["p_value"], same["verdict"]) == (0.0, 1.0, "inconclusive")


def test_the_base_is_an_ordinary_model(whole: Path, selfwright: Selfwright) -> None:
    arguments = ("--environment", "countdown", "--tasks", 20, "--seed", 3, "--json")
    options = [f"environment.{key}" for key in ("numbers=2", "largest=40", "attempts=3")]
    chosen = [part for key in (*options, "policy.max_tokens=8") for part in ("-o", key)]
    told = selfwright("evaluate", whole / "base", *arguments, *chosen, "--output", "bare").stdout
    base = read(whole / "evaluations" / "base" / "evaluation.json")
    assert json.loads(told)["successes"] == base["successes"]


def test_expert_and_random_are_checkpoints_too(selfwright: Selfwright) -> None:
    common = ("--environment", "countdown", "--tasks", 20, "--json", "-o", "environment.numbers=4")
    expert = json.loads(selfwright("evaluate", "expert", *common, "--output", "ex").stdout)
    chance = json.loads(selfwright("evaluate", "random", *common, "--output", "ra").stdout)
    assert expert["successes"] == 20 and chance["successes"] < 10
    better = json.loads(selfwright("compare", "ra", "ex", "--json").stdout)
    assert better["verdict"] == "better"


def test_killed_at_any_moment_and_resumed_is_as_if_never_killed(
    whole: Path, room: Path, selfwright: Selfwright
) -> None:
    folder, kills = room / "killed", 0
    moments = ["evaluations/base", "iterations/0001", "evaluations/final"]
    for moment in moments:
        arguments = [str(COMMAND), "run", "tiny.yaml", "--output", "killed"]
        process = subprocess.Popen(
            arguments,
            cwd=room,
            env=surroundings(room),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        limit = time.monotonic() + 120
        while not (folder / moment).exists() and process.poll() is None:
            assert time.monotonic() < limit
            time.sleep(0.01)
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            kills += 1
        process.wait(timeout=30)
    assert kills >= 2
    # What was made for the run lies with the run: nothing but its folder is needed to go on.
    selfwright("run", "tiny.yaml", "--output", "killed", cache="another cache")
    assert not (room / "another cache").exists()
    assert results(folder) == results(whole)
    assert episodes(folder) == episodes(whole)


def test_a_finished_run_is_not_run_again_and_another_recipe_is_refused(
    whole: Path, selfwright: Selfwright
) -> None:
    before = (whole / "result.json").stat().st_mtime_ns
    (whole / "report.html").unlink()
    assert "finished" in selfwright("run", "tiny.yaml", "--output", "whole").stderr
    assert (whole / "report.html").stat().st_size > 5_000, "as if killed before it was written"
    assert (whole / "result.json").stat().st_mtime_ns == before
    other = selfwright("run", "tiny.yaml", "--output", "whole", "-o", "seed=4", check=False)
    assert other.returncode == 2 and "seed" in other.stderr and "Traceback" not in other.stderr


def flaky(room: Path, model: Path, **environment: object) -> Path:
    """A recipe over the flaky world that imitates whatever it did."""
    settings = {"parallel": 8, "step_timeout_s": 0.7, "max_failures": 0.9, **environment}
    recipe = {
        "seed": 0,
        "iterations": 1,
        "environment": {"use": "flaky_world:Flaky", **settings},
        "policy": {"use": "transformers", "model": str(model), "max_tokens": 4},
        "trainer": {"use": "imitation", "source": "self", "tasks_per_iteration": 16},
        "evaluation": {"tasks": 4, "every": 0},
    }
    path = room / "flaky.yaml"
    path.write_text(json.dumps(recipe))
    return path


@pytest.mark.parametrize("blocking", [False, True])
def test_worlds_that_raise_hang_and_talk_rubbish_are_counted_by_name(
    room: Path, selfwright: Selfwright, model_folder: Callable[[str], Path], blocking: bool
) -> None:
    path = flaky(room, model_folder("scratch"), blocking=blocking)
    output = room / f"flaky-{blocking}"
    selfwright("run", path, "--output", output)
    metrics = read(output / "iterations/0000/metrics.json")
    counted = {k: v for k, v in metrics.items() if k.startswith("failures/")}
    stored = read_trajectories(output / "iterations/0000")
    kinds = [int(j.trajectory.task.id.split()[1]) % 4 for j in stored]
    assert counted == {
        "failures/KeyError": kinds.count(0),
        "failures/TimeoutError": kinds.count(1),
        "failures/WorldError": kinds.count(2),
    }
    assert metrics["judge/undecided"] == metrics["rollout/failed"] == sum(counted.values())
    for judged, kind in zip(stored, kinds, strict=True):
        failed = judged.trajectory.stop == Stop.FAILED
        assert failed == (kind < 3) == (judged.verdict.score is None)
    (cost,) = read(output / "result.json")["costs"]
    assert cost["failures"] == {k.removeprefix("failures/"): v for k, v in counted.items()}
    page = (output / "report.html").read_text()
    assert all(name in page for name in ("KeyError", "TimeoutError", "WorldError"))


def test_a_slip_in_the_recipe_does_not_spoil_the_folder(
    room: Path, selfwright: Selfwright, model_folder: Callable[[str], Path]
) -> None:
    path = flaky(room, model_folder("scratch"), broken=0)
    wrong = selfwright("run", path, "--output", "slip", "-o", "policy.model=./no", check=False)
    assert wrong.returncode == 2 and "Traceback" not in wrong.stderr
    selfwright("run", path, "--output", "slip")


def test_too_many_failures_stop_the_run_with_the_first_traceback(
    room: Path, selfwright: Selfwright, model_folder: Callable[[str], Path]
) -> None:
    path = flaky(room, model_folder("scratch"), broken=1, max_failures=0.1)
    done = selfwright("run", path, "--output", "stopped", check=False)
    assert done.returncode == 1
    assert "max_failures=0.1" in done.stderr and "the door is missing" in done.stderr


def test_learning_nothing_stops_the_run_with_advice(room: Path, selfwright: Selfwright) -> None:
    changes = ("trainer.use=imitation", "trainer.source=self", "iterations=5", "evaluation.every=0")
    hard = ("environment.numbers=6", "environment.target=20", "evaluation.turns=0")
    untrained = ("policy.warm_start=null", "policy.max_tokens=2")
    options = [part for key in (*changes, *hard, *untrained) for part in ("-o", key)]
    done = selfwright("run", "tiny.yaml", "--output", "nothing", *options, check=False)
    assert done.returncode == 1
    assert "nothing is being learned" in done.stderr and "Traceback" not in done.stderr
    assert len(list((room / "nothing/iterations").glob("0*"))) == 3


def test_a_teacher_mends_what_the_policy_got_wrong(room: Path, selfwright: Selfwright) -> None:
    taught = ("trainer.teacher=expert", "iterations=1", "evaluation.turns=0")
    options = [part for key in taught for part in ("-o", key)]
    selfwright("run", "tiny.yaml", "--output", "taught", *options)
    stored = read_trajectories(room / "taught/iterations/0000")
    lessons = [j.trajectory for j in stored if j.trajectory.policy == "expert"]
    assert lessons and all(t.replayed and t.success for t in lessons)
    assert all(not step.reward for t in lessons for step in t.steps[:-1]), (
        "only failures are mended"
    )
    own = {(t.task.id, t.steps) for t in (j.trajectory for j in stored) if t.policy != "expert"}
    assert all((t.task.id, t.steps[:-1]) in own for t in lessons), "and only the policy's own"


def test_cloning_the_expert_with_full_weights(room: Path, selfwright: Selfwright) -> None:
    cloned = ("trainer.use=imitation", "learner.method=full", "iterations=1")
    options = [part for key in cloned for part in ("-o", key)]
    selfwright("run", "tiny.yaml", "--output", "cloned", *options)
    assert (room / "cloned/checkpoint/model.safetensors").is_file()
    stored = read_trajectories(room / "cloned/iterations/0000")
    assert all(j.trajectory.policy == "expert" for j in stored)
    done = selfwright("evaluate", "cloned", "--tasks", 20, "--seed", 3, "--output", "cl", "--json")
    assert (
        json.loads(done.stdout)["successes"]
        == read(room / "cloned/result.json")["final"]["successes"]
    )
