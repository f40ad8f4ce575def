"""Trajectories on disk: what goes in comes out, and damage is named."""

# pyarrow and datasets have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import hashlib
import subprocess
import sys
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfwright.core import store
from selfwright.core.errors import StoreError
from selfwright.core.store import TRAJECTORIES, dataset, read_trajectories, write_trajectories
from selfwright.core.types import (
    Action,
    Completion,
    Judged,
    Observation,
    Step,
    Stop,
    Task,
    Trajectory,
    Verdict,
)

texts = st.text(max_size=12)
floats = st.floats(allow_nan=False, width=64)
images = st.lists(st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"red", b"blue"]), max_size=3)
observations = st.builds(
    Observation, texts, images.map(tuple), st.lists(texts, max_size=3).map(tuple)
)
completions = st.builds(
    Completion,
    texts,
    st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple),
    st.lists(st.floats(max_value=0, width=32), max_size=4).map(tuple),
    st.sampled_from(["stop", "length", ""]),
)
steps = st.builds(Step, observations, st.builds(Action, texts, completions), floats)
trajectories = st.builds(
    Trajectory,
    st.builds(Task, texts, texts, st.integers(1, 2**31 - 1)),
    st.lists(steps, max_size=3).map(tuple),
    observations,
    st.sampled_from(Stop),
    texts,
    st.integers(0, 2**63 - 1),
    st.integers(0, 2**31 - 1),
    st.integers(0, 2**31 - 1),
    st.booleans(),
    texts,
)
verdicts = st.builds(Verdict, st.none() | st.floats(0, 1), texts, texts)


@given(st.lists(st.builds(Judged, trajectories, verdicts), max_size=4))
@settings(max_examples=60, deadline=None)
def test_what_is_written_is_read(judged: list[Judged]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "iterations", "0000", TRAJECTORIES)
        path.parent.mkdir(parents=True)
        write_trajectories(path, judged, Path(folder, "images"))
        assert read_trajectories(path) == judged
        assert read_trajectories(path, Path(folder, "images")) == judged


def episode(*frames: bytes, task: str = "t", score: float | None = 0.5) -> Judged:
    """An episode of one step per frame, which sees the frame."""
    logprobs = tuple(cast("list[float]", np.array([-0.1, -0.7], np.float32).tolist()))
    said = Completion("go", (5, 6), logprobs, "stop")
    taken = tuple(Step(Observation("see", (frame,)), Action("go", said), 0.25) for frame in frames)
    return Judged(
        Trajectory(
            Task(task, "walk", 8), taken, Observation("end"), Stop.TERMINATED, "base", seed=2**62
        ),
        Verdict(score, "fine", "reward"),
    )


def test_a_special_task_comes_back_plain(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Sum(Task):
        numbers: tuple[int, ...]

    judged = episode()
    special = replace(judged.trajectory, task=Sum("t", "walk", 8, (1, 2)))
    write_trajectories(tmp_path / "a.parquet", [Judged(special, judged.verdict)], tmp_path / "i")
    assert read_trajectories(tmp_path / "a.parquet") == [judged]


def test_each_image_is_kept_once_and_never_rewritten(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    write_trajectories(tmp_path / "a.parquet", [episode(b"x", b"y", b"x"), episode(b"x")], folder)
    digest = hashlib.sha256(b"x").hexdigest()
    kept = folder / digest[:2] / f"{digest}.png"
    assert kept.read_bytes() == b"x"
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 2
    before = kept.stat()
    write_trajectories(tmp_path / "b.parquet", [episode(b"x", b"z")], folder)
    assert kept.stat().st_ino == before.st_ino and kept.stat().st_mtime_ns == before.st_mtime_ns
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 3
    assert b"x" * 3 not in (tmp_path / "a.parquet").read_bytes()


def test_a_missing_or_changed_image_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_trajectories(path, [episode(b"x")], tmp_path / "images")
    (kept,) = (tmp_path / "images").rglob("*.png")
    kept.write_bytes(b"y")
    with pytest.raises(StoreError, match=rf"{kept.name} is damaged"):
        read_trajectories(path)
    kept.unlink()
    with pytest.raises(StoreError, match=rf"{kept.name}: No such file"):
        read_trajectories(path)


def test_a_file_cut_anywhere_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    write_trajectories(path, [episode(b"x", b"y")], tmp_path / "images")
    whole = path.read_bytes()
    for length in (0, 1, 4, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=r"a\.parquet is damaged"):
            read_trajectories(path)
    path.unlink()
    with pytest.raises(StoreError, match=r"a\.parquet is missing"):
        read_trajectories(path)


def test_a_flipped_byte_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    judged = [episode(b"x", task=str(number)) for number in range(50)]
    write_trajectories(path, judged, tmp_path / "images")
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    seen = 0
    for place in range(10, len(whole) - footer, 97):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x55]) + whole[place + 1 :])
        try:
            assert read_trajectories(path) == judged
        except StoreError:
            seen += 1
    assert seen > 10


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.parquet"
    with monkeypatch.context() as patch:
        patch.setattr(store, "VERSION", 3)
        write_trajectories(path, [episode()], tmp_path / "images")
    with pytest.raises(StoreError, match=r"has schema version 3.* reads 2"):
        read_trajectories(path)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(None), path)
    with pytest.raises(StoreError, match="has schema version None"):
        read_trajectories(path)


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.1, 1.5])
def test_a_score_that_is_none_of_ours_is_refused(tmp_path: Path, score: float) -> None:
    with pytest.raises(StoreError, match=r"task 't', attempt 0: judge 'reward' gave the score"):
        write_trajectories(tmp_path / "a.parquet", [episode(score=score)], tmp_path / "images")
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_kept_names_its_trajectory(tmp_path: Path) -> None:
    broken = episode(b"x", task="half an emoji")
    step = replace(broken.trajectory.steps[0], observation=Observation("\ud83d"))
    surrogate = Judged(replace(broken.trajectory, steps=(step,)), broken.verdict)
    with pytest.raises(StoreError, match=r"task 'half an emoji', attempt 0.*surrogate"):
        write_trajectories(tmp_path / "a.parquet", [episode(), surrogate], tmp_path / "images")
    nan = Judged(
        replace(broken.trajectory, steps=(replace(step, reward=float("nan")),)), broken.verdict
    )
    with pytest.raises(StoreError, match="step 0 has a reward or logprob that is NaN"):
        write_trajectories(tmp_path / "a.parquet", [nan], tmp_path / "images")
    assert not (tmp_path / "a.parquet").exists()


def test_a_script_that_wrote_and_read_ends_well(tmp_path: Path) -> None:
    path = tmp_path / "seed=3" / "a.parquet"  # No column of its folder's name.
    path.parent.mkdir()
    write_trajectories(path, [episode(b"x")], tmp_path / "images")
    code = (
        "import sys\nfrom pathlib import Path\n"
        "from selfwright.core.store import read_trajectories, write_trajectories\n"
        "one = read_trajectories(Path(sys.argv[1]))\n"
        "write_trajectories(Path(sys.argv[1]), one, Path(sys.argv[2]))\n"
        "assert read_trajectories(Path(sys.argv[1])) == one\n"
    )
    command = [sys.executable, "-c", code, str(path), str(tmp_path / "images")]
    for _ in range(4):
        assert subprocess.run(command, timeout=60).returncode == 0


def test_a_run_reads_as_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when datasets is first imported
    import datasets

    for index in range(2):
        folder = tmp_path / f"iterations/{index:04d}"
        folder.mkdir(parents=True)
        judged = [episode(b"x", task=f"{index}-{number}") for number in range(3)]
        undecided = [episode(score=None)] * index
        write_trajectories(folder / TRAJECTORIES, judged + undecided, tmp_path / "images")
    whole = dataset(tmp_path, split="train")
    assert whole["iteration"][:] == [0, 0, 0, 1, 1, 1, 1]
    assert str(whole.split) == "train"
    assert whole[4]["task"]["id"] == "1-1"
    assert whole[6]["verdict"]["score"] is None and whole[6]["steps"] == []

    cache = str(tmp_path / "cache")
    file = str(tmp_path / "iterations/0001" / TRAJECTORIES)
    one = datasets.Dataset.from_parquet(file, cache_dir=cache)
    assert isinstance(one, datasets.Dataset)
    other = datasets.load_dataset("parquet", data_files=file, cache_dir=cache)["train"]
    for found in (one, other):
        assert found.column_names == whole.column_names[1:]
        assert found[0]["steps"][0]["action"]["completion"]["token_ids"] == [5, 6]
        assert found[0]["steps"][0]["observation"]["images"] == [hashlib.sha256(b"x").hexdigest()]
        assert found[3]["verdict"]["score"] is None


def test_a_run_without_iterations_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no committed iteration"):
        dataset(tmp_path)
