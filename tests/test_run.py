"""The run folder: whatever kills its process, what is committed is whole."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from selfwright.core.errors import StoreError
from selfwright.core.files import read_json, write_json
from selfwright.core.store import read_trajectories
from selfwright.core.store.folder import RunFolder, iteration_name, iterations
from selfwright.loop.run import learner_state, prune

RECIPE = {"seed": 1, "trainer": {"use": "rise", "sizes": (1, 2)}}

PRELUDE = """
import os, resource, sys, time
from pathlib import Path
from prompts import grey, png
from selfwright.core.errors import StoreError
from selfwright.core.files import write_json
from selfwright.core.images import picture
from selfwright.core.store.folder import RunFolder, iteration_name
from selfwright.core.store import write_trajectories
from selfwright.core.types import *

RECIPE = {"seed": 1, "trainer": {"use": "rise", "sizes": (1, 2)}}
folder = Path(sys.argv[1])
run = RunFolder.open(folder, RECIPE, lambda stored, wanted: ["seed"] if stored != wanted else [])

def judged(index, count=5):
    seen = Observation("see", (grey(1, 9), grey(index % 256)))
    step = Step(seen, Action("go", Completion("go")), 1.0)
    return [
        Judged(
            Trajectory(Task(f"{index}", "walk", 3), (step,), seen, Stop.TERMINATED, "base", 1, k),
            Verdict(1.0, "", "reward"),
        )
        for k in range(count)
    ]
print("ready", flush=True)
"""

COMMITTER = """
while True:
    index = run.finished
    with run.draft(iteration_name(index)) as draft:
        write_trajectories(draft, judged(index), folder / "images")
        (draft / "adapter").mkdir()
        (draft / "adapter" / "weights").write_bytes(bytes([index % 256]) * 300_000)
        write_json(draft / "metrics.json", {"index": index})
    print(index, flush=True)
"""


def differences(stored: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    keys = sorted(stored.keys() | wanted.keys())
    pairs = ((key, stored.get(key), wanted.get(key)) for key in keys)
    return [f"{key}: {was!r} there, {now!r} now" for key, was, now in pairs if was != now]


def launch(code: str, folder: Path) -> "subprocess.Popen[str]":
    """A process that has the run of ``folder`` open."""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
    )
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def kill(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGKILL)
    process.communicate(timeout=10)


@pytest.mark.multi
def test_killed_at_any_moment_leaves_whole_iterations(tmp_path: Path) -> None:
    dice = random.Random(0)
    finished = 0
    for _ in range(4):
        process = launch(COMMITTER, tmp_path)
        assert process.stdout and process.stdout.readline() == f"{finished}\n"  # it is warm now
        time.sleep(dice.uniform(0, 0.06))
        assert process.poll() is None
        kill(process)
        with RunFolder.open(tmp_path, RECIPE, differences) as run:
            assert run.finished > finished
            finished = run.finished
        assert not list(tmp_path.rglob(".draft-*"))
        for index, folder in enumerate(iterations(tmp_path)):
            (task,) = {item.trajectory.task.id for item in read_trajectories(folder)}
            assert task == str(index)
            weights = (folder / "adapter/weights").read_bytes()
            assert weights == bytes([index % 256]) * 300_000
            assert read_json(folder / "metrics.json") == {"index": index}


def test_only_one_process_at_a_time(tmp_path: Path) -> None:
    process = launch("time.sleep(60)", tmp_path)
    try:
        with pytest.raises(StoreError, match=rf"is in use by process {process.pid}; wait"):
            RunFolder.open(tmp_path, RECIPE, differences)
    finally:
        kill(process)
    RunFolder.open(tmp_path, RECIPE, differences).close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path: Path) -> None:
    code = """
child = os.fork()
if not child:
    os.close(1)
    time.sleep(60)
print(child, flush=True)
time.sleep(60)
"""
    process = launch(code, tmp_path)
    assert process.stdout
    child = int(process.stdout.readline())
    time.sleep(0.1)
    try:
        kill(process)
        RunFolder.open(tmp_path, RECIPE, differences).close()
    finally:
        os.kill(child, signal.SIGKILL)


def test_another_recipe_is_refused_by_key(tmp_path: Path) -> None:
    for again in range(2):
        with RunFolder.open(tmp_path, RECIPE, differences) as run, run.draft(iteration_name(again)):
            pass
    with pytest.raises(StoreError) as caught:
        RunFolder.open(tmp_path, RECIPE | {"seed": 2}, differences)
    assert "seed: 1 there, 2 now" in str(caught.value)
    assert "another --output" in str(caught.value)
    assert read_json(tmp_path / "recipe.json")["seed"] == 1


def test_a_run_that_committed_nothing_does_not_hold_on_to_its_recipe(tmp_path: Path) -> None:
    for seed in (1, 1, 2):
        with RunFolder.open(tmp_path, RECIPE | {"seed": seed}, differences) as run:
            assert read_json(tmp_path / "recipe.json")["seed"] == seed
            # The model made for the first recipe is not the second one's.
            assert run.has("base") == (tmp_path / "again").exists()
            if seed == 1 and not run.has("base"):
                with run.draft("base"):
                    pass
                (tmp_path / "again").touch()
            elif seed == 1:
                (tmp_path / "again").unlink()


@pytest.mark.parametrize("name", ["thesis.txt", "recipe.json"])
def test_a_foreign_folder_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text('{"eggs": 3}')
    with pytest.raises(StoreError, match="use another --output"):
        RunFolder.open(tmp_path, RECIPE, differences)
    assert [path.name for path in tmp_path.iterdir()] == [name]
    with pytest.raises(StoreError, match="cannot use"):
        RunFolder.open(tmp_path / name, RECIPE, differences)


def test_drafts_become_folders_whole_or_not_at_all(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "deep/run", RECIPE, differences) as run:
        for name in ("iterations/0000", "evaluations/base", "checkpoint"):
            with pytest.raises(KeyError), run.draft(name) as draft:
                (draft / "half").write_text("half")
                raise KeyError
            assert not run.has(name)
            with run.draft(name) as draft:
                (draft / "whole").write_text("whole")
                assert not run.has(name)
            assert (run.path(name) / "whole").read_text() == "whole"
            with pytest.raises(StoreError, match="is there already"), run.draft(name):
                pass
        assert run.finished == 1
        assert not list(run.folder.rglob(".draft-*"))
        with pytest.raises(ValueError, match="is no name"), run.draft("../elsewhere"):
            pass


def test_leftovers_go_when_the_run_is_opened(tmp_path: Path) -> None:
    RunFolder.open(tmp_path, RECIPE, differences).close()
    places = ("iterations/.draft-0000/adapter", ".draft-checkpoint", "images/ab")
    for name in (*places, "iterations/0000/.draft-learner"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "images/ab/.draft-1234").write_text("half")
    with RunFolder.open(tmp_path, RECIPE, differences) as run:
        assert run.finished == 1
    assert not list(tmp_path.rglob(".draft-*"))


@pytest.mark.parametrize(
    ("keep", "scores", "left"),
    [
        (2, [0.1, 0.9, 0.2, 0.3, 0.4], {1, 3, 4}),
        (1, [0.9, 0.1, 0.9, 0.3], {2, 3}),  # The later of two that did as well.
        (2, [None, 0.5, None, None, None], {1, 3, 4}),  # Some were not measured.
        (1, [None, None, None], {2}),
        (3, [0.5], {0}),
        (None, [0.1, 0.9, 0.2, 0.3], {0, 1, 2, 3}),
    ],
)
def test_a_learners_state_is_kept_of_the_last_and_the_best(
    tmp_path: Path, keep: int | None, scores: list[float | None], left: set[int]
) -> None:
    with RunFolder.open(tmp_path / "run", RECIPE, lambda a, b: []) as run:
        for index, score in enumerate(scores):
            with run.draft(iteration_name(index)) as draft:
                for name in ("learner", "checkpoint"):
                    (draft / name).mkdir()
                measured = {} if score is None else {"validation/success": score}
                write_json(draft / "metrics.json", measured)
            prune(run, keep)
    folders = iterations(tmp_path / "run")
    assert {k for k, folder in enumerate(folders) if (folder / "learner").is_dir()} == left
    assert all((folder / "checkpoint").is_dir() for folder in folders)


def test_going_on_from_where_nothing_was_kept_says_where_it_can(tmp_path: Path) -> None:
    with RunFolder.open(tmp_path / "run", RECIPE, lambda a, b: []) as run:
        for index in range(4):
            with run.draft(iteration_name(index)) as draft:
                (draft / "learner").mkdir()
                write_json(draft / "metrics.json", {"validation/success": [1, 0, 0, 0][index]})
            prune(run, 1)
        found = [learner_state(run, run.path(iteration_name(index))).name for index in (0, 3)]
        assert found == ["learner"] * 2
        with pytest.raises(StoreError, match=r"keep.* from 0000, 0003: remove those after it"):
            learner_state(run, run.path(iteration_name(2)))


def test_a_gap_is_an_error(tmp_path: Path) -> None:
    for index in (0, 2):
        (tmp_path / iteration_name(index)).mkdir(parents=True)
    with pytest.raises(StoreError, match=r"0001 is missing, though 0002 is there"):
        iterations(tmp_path)


def test_a_full_disk_is_named_and_commits_nothing(tmp_path: Path) -> None:
    code = """
def attempt(write):
    try:
        with run.draft(iteration_name(0)) as draft:
            write(draft)
    except StoreError as error:
        print(error, flush=True)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
attempt(lambda draft: write_json(draft / "metrics.json", {"text": "x" * 50_000}))
noise = [replace(one, verdict=Verdict(None, os.urandom(30_000).hex(), "")) for one in judged(0)]
attempt(lambda draft: write_trajectories(draft, noise, folder / "images"))
large = picture(png(100, 100, rows=os.urandom(100 * 301)))
seen = replace(judged(0)[0].trajectory, final=Observation("", (large,)))
attempt(lambda d: write_trajectories(d, [Judged(seen, Verdict(1.0, "", ""))], folder / "images"))
print("torch" in sys.modules, run.finished, os.listdir(folder / "iterations"))
"""
    process = launch("from dataclasses import replace\n" + code, tmp_path)
    assert process.stdout
    # Not communicate(): it misses what was read along with the first line.
    lines = process.stdout.read().splitlines()
    process.wait(30)
    assert [line.partition("cannot write ")[2].split(":")[1] for line in lines[:3]] == [
        " File too large"
    ] * 3
    assert "metrics.json" in lines[0] and ".parquet" in lines[1] and ".png" in lines[2]
    assert lines[3] == "False 0 []"
    assert not list(tmp_path.rglob(".draft-*"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_json_holds_finite_numbers_only(tmp_path: Path, bad: float) -> None:
    path = tmp_path / "metrics.json"
    write_json(path, {"a": 1})
    with pytest.raises(StoreError, match=r"train\.loss\.1 is -?(nan|inf)"):
        write_json(path, {"train": {"loss": (0.5, bad)}})
    assert read_json(path) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]


def test_json_keeps_any_text(tmp_path: Path) -> None:
    value = {"Grüße": ["日本 😀", "\ud83d", "\\ud83d", "\x00"], "none": None, "deep": {"x": 1e-5}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert "日本 😀" in (tmp_path / "a.json").read_text("utf-8")


@pytest.mark.parametrize("data", [b"", b'{"a": ', b'{"a": NaN}', b"\xff\xfe", b"[" * 100_000])
def test_broken_json_is_named(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "metrics.json"
    path.write_bytes(data)
    with pytest.raises(StoreError, match=r"metrics\.json is damaged: not valid JSON"):
        read_json(path)
    with pytest.raises(StoreError, match=r"other\.json is missing"):
        read_json(tmp_path / "other.json")


def test_json_is_valid_for_others(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"x": [1.5, True, "a"]})
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text) == {"x": [1.5, True, "a"]} and text.endswith("}\n")
