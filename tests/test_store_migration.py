"""Runs of older schemas are read as if they were of today's."""

# pyarrow has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import asyncio
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_store import png

from selfwright.core.errors import StoreError
from selfwright.core.images import STORE, picture, place
from selfwright.core.store import (
    STEPS,
    TRAJECTORIES,
    judge_identity,
    read_episode,
    read_origin,
    read_trajectories,
    write_trajectories,
    write_verdicts,
)
from selfwright.core.store.schema import STEP
from selfwright.core.types import Image, Prompt, Task, Verdict
from selfwright.evidence.compare import compare
from selfwright.evidence.report import report
from selfwright.loop.evaluate import evaluate_checkpoint

RUN = Path(__file__).parent / "data" / "run-schema-2"
FILES = sorted(RUN.rglob(TRAJECTORIES))


def test_the_run_is_of_schema_2() -> None:
    assert len(FILES) == 4
    for path in FILES:
        metadata: Any = pq.read_schema(path).metadata
        assert json.loads(metadata[b"selfwright"])["schema"] == 2


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.parent.name)
def test_every_episode_of_schema_2_comes_back(path: Path) -> None:
    rows = pq.read_table(path).to_pylist()
    judged = read_trajectories(path)
    assert read_trajectories(path.parent) == judged
    assert len(judged) == len(rows) > 0
    for one, row in zip(judged, rows, strict=True):
        t = one.trajectory
        assert t.task == Task(**row["task"]) and one.verdict == Verdict(**row["verdict"])
        same = ("seed", "attempt", "policy", "replayed", "stop", "success", "error")
        assert {name: getattr(t, name) for name in same} == {name: row[name] for name in same}
        assert t.final.text == row["final"]["text"] and t.parent == ""
        assert len(t.steps) == len(row["steps"])
        for step, was in zip(t.steps, row["steps"], strict=True):
            told = was["action"]["completion"]
            made = step.action.completion
            assert {name: getattr(made, name) for name in told} == told | {
                "token_ids": tuple(told["token_ids"]),
                "logprobs": tuple(told["logprobs"]),
            }
            assert (step.action.text, step.reward) == (was["action"]["text"], was["reward"])
            assert step.observation.text == was["observation"]["text"]
            assert list(step.observation.actions) == was["observation"]["actions"]
            assert step.action.prompt == Prompt() and step.action.invalid == ""
            assert step.answer is None and step.actor == ""


def test_ids_are_the_same_whenever_they_are_made(tmp_path: Path) -> None:
    path = FILES[0]
    judged = read_trajectories(path)
    ids = [one.trajectory.id for one in judged]
    assert all(ids) and len(set(ids)) == len(ids)
    assert read_trajectories(path) == judged
    assert read_episode(path.parent, ids[3]) == judged[3]
    assert read_origin(path) == {}
    with pytest.raises(StoreError, match="holds no episode 'nobody'"):
        read_episode(path, "nobody")
    # Written anew they keep them, and whoever names the old file finds the new ones.
    write_trajectories(tmp_path, judged, tmp_path / "images")
    assert read_trajectories(tmp_path / TRAJECTORIES) == judged
    write_verdicts(tmp_path, judge_identity("late", {}), {ids[0]: Verdict(1.0, "", "late")})


def with_images(folder: Path, names: list[str]) -> Path:
    """A file of schema 2 whose first episode ends with these images."""
    table = pq.read_table(FILES[0])
    rows: list[Any] = table.to_pylist()
    rows[0]["final"]["images"] = names
    path = folder / "some" / "where" / "kept.parquet"
    path.parent.mkdir(parents=True)
    pq.write_table(table.from_pylist(rows, schema=table.schema), path)
    return path


def test_images_of_schema_2_get_their_sizes(tmp_path: Path) -> None:
    image = picture(png(30))
    STORE.save([image], tmp_path / "images")
    path = with_images(tmp_path, [image.sha256] * 2)
    bare = Image(image.sha256, 1, 1)
    assert read_trajectories(path)[0].trajectory.final.images == (bare, bare)
    assert STORE.read(bare) == image.png
    kept = place(tmp_path / "images", image)
    kept.write_bytes(png(31))
    with pytest.raises(StoreError, match=rf"{kept.name} is damaged"):
        read_trajectories(path)
    kept.unlink()
    with pytest.raises(StoreError, match=rf"{kept.name}: No such file"):
        read_trajectories(path)


def test_a_damaged_file_of_schema_2_is_named(tmp_path: Path) -> None:
    path = tmp_path / TRAJECTORIES
    whole = FILES[0].read_bytes()
    for length in (0, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(StoreError, match=rf"{TRAJECTORIES} is damaged"):
            read_trajectories(path)
    table = pq.read_table(FILES[0])
    pq.write_table(table.drop_columns(["seed"]), path)
    with pytest.raises(StoreError, match="its columns are not those of schema version 2"):
        read_trajectories(tmp_path)
    path.write_bytes(whole)
    with pytest.raises(StoreError, match="does not say who judged"):
        read_trajectories(path, "0123")
    judged = read_trajectories(path)
    assert judged[0] != replace(judged[0], verdict=Verdict(None, "", ""))


@pytest.mark.parametrize("version", [3, 4])
def test_a_folder_of_an_older_schema_lacks_only_what_came_later(
    version: int, tmp_path: Path
) -> None:
    judged = read_trajectories(FILES[0])
    write_trajectories(tmp_path, judged, tmp_path / "images")
    for path in sorted(tmp_path.rglob("*.parquet")):
        table = pq.read_table(path)
        metadata = dict(table.schema.metadata)
        about = json.loads(metadata[b"selfwright"]) | {"schema": version}
        if path.name == STEPS:
            rows = table.to_pylist()
            for row in rows:
                del row["place"], row["left_out"]
                if version < 4:
                    del row["completion"]["constraint"], row["completion"]["constrained"]
                    if row["prompt"]:
                        del row["prompt"]["template"]
            table = pa.Table.from_pylist(rows, STEP.older[version].schema)
        metadata = {b"selfwright": json.dumps(about).encode()}
        pq.write_table(table.replace_schema_metadata(metadata), path)
    assert read_trajectories(tmp_path) == judged
    first = judged[0].trajectory
    assert read_episode(tmp_path, first.id) == judged[0]
    # Verdicts of today may stand beside it.
    other = judge_identity("other", {})
    verdicts = {one.trajectory.id: Verdict(0.5, "", other.hash) for one in judged}
    write_verdicts(tmp_path, other, verdicts)
    assert {one.verdict.score for one in read_trajectories(tmp_path, other.hash)} == {0.5}
    # Columns that it never had are damage, not something to be guessed at.
    table = pq.read_table(tmp_path / STEPS)
    pq.write_table(table.drop_columns(["reward"]), tmp_path / STEPS)
    with pytest.raises(StoreError, match="its columns are not those of its schema version"):
        read_trajectories(tmp_path)


@pytest.fixture
def moved(tmp_path: Path) -> Path:
    """A copy, that may be written to."""
    return Path(shutil.copytree(RUN, tmp_path / "run"))


def test_a_run_of_schema_2_is_reported_and_compared(moved: Path) -> None:
    page = report(moved).read_text()
    result = json.loads((RUN / "result.json").read_text())
    final = result["final"]
    assert f"{final['successes']} of {final['tasks']}" in page
    compared = compare(moved / "evaluations" / "base", moved / "evaluations" / "final")
    told = result["comparison"]
    assert (compared["difference"], compared["p_value"]) == (told["difference"], told["p_value"])


def test_a_checkpoint_of_such_a_run_is_evaluated_as_its_recipe_says(
    moved: Path, model_folder: Callable[[str], Path]
) -> None:
    folder = moved / "iterations" / "0001" / "checkpoint"
    shutil.copytree(model_folder("scratch"), folder)  # Of a size to be kept in a repository: none.
    told = asyncio.run(
        evaluate_checkpoint(str(folder), None, [], "test", 4, 3, None, moved / "again")
    )
    recipe = json.loads((RUN / "recipe.json").read_text())
    assert told["tasks"] == 4 and told["environment"]["largest"] == 20
    assert told["environment"]["use"] == recipe["environment"]["use"]
    assert len(read_trajectories(moved / "again")) == 4
