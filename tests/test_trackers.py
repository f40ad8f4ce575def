"""Runs that report to trackers: what these are told, and that a broken one ends nothing."""

import asyncio
import importlib.util
import json
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from components import SINGLE

from selfwright.commands.cli import call
from selfwright.core.errors import RecipeError
from selfwright.core.evaluation import read as evaluation
from selfwright.core.recipe import read
from selfwright.loop import trackers
from selfwright.loop.events import Event, IterationEnded, Note, RunBegan, RunEnded
from selfwright.loop.run import run
from selfwright.loop.trackers import Tracker, Trackers, flat


@pytest.fixture(scope="module")
def tiny(player: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.yaml"
    file.write_text(SINGLE.replace("MODEL", str(player)) + "report_to: [tensorboard]\n")
    return file


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """What TensorBoard reads from a folder of event files, by name and step."""
    reader: Any = import_module("tensorboard.backend.event_processing.event_accumulator")
    found: Any = reader.EventAccumulator(str(folder))
    found.Reload()
    return {
        name: {one.step: one.value for one in found.Scalars(name)}
        for name in found.Tags()["scalars"]
    }


def test_tensorboard_has_every_iteration_evaluation_and_the_end(tiny: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert call(["run", str(tiny), "-o", "iterations=2", "--output", str(output)]) == 0
    found = scalars(output / "tensorboard")
    for index in (0, 1):
        metrics = json.loads((output / f"iterations/{index:04}/metrics.json").read_text())
        for name, value in metrics.items():
            assert found[name][index + 1] == pytest.approx(value, rel=1e-5)
    result = json.loads((output / "result.json").read_text())
    for name, step in (("base", 0), ("final", 2)):
        rate = evaluation(output / "evaluations" / name).success_rate
        assert found[f"evaluation/{name}/success_rate"] == {step: pytest.approx(rate)}
    difference = result["comparison"]["difference"]
    assert found["comparison/difference"] == {2: pytest.approx(difference)}
    # The recipe lies beside them, as TensorBoard's table of settings has it.
    (settings,) = (output / "tensorboard").glob("*/hparams.yml")
    told = yaml.safe_load(settings.read_text())
    assert told["trainer.use"] == "grpo" and told["learner.learning_rate"] == 1e-3
    # Whom it reports to is no part of what a run is: with another list, it is the same run.
    plain = read(tiny, ["report_to=[]", "iterations=2"])
    assert plain.identity == read(tiny, ["iterations=2"]).identity
    assert asyncio.run(run(plain, output)) == result


def test_a_tracker_that_is_not_there_is_missed_before_anything_is_played(
    tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def without(name: str) -> Any:
        return None if name in ("wandb", "mlflow") else find(name)

    monkeypatch.setattr("selfwright.core.draft.find_spec", without)
    with pytest.raises(RecipeError) as error:
        read(tiny, ["report_to=[wandb, tensorboard, mlflow]"])
    lines = str(error.value).splitlines()
    assert [line.partition(": ")[2] for line in lines] == [
        f"report_to: {name} is not installed: pip install 'selfwright[{name}]'"
        for name in ("mlflow", "wandb")
    ]
    with pytest.raises(RecipeError, match=r"report_to.*tensorbord.*did you mean 'tensorboard'"):
        read(tiny, ["report_to=[tensorbord]"])


class Kept:
    """A tracker that keeps what it is told; from the ``broken``-th time on it raises."""

    def __init__(self, broken: int = 99) -> None:
        self.told: list[tuple[dict[str, float], int]] = []
        self.ended = False
        self._broken = broken

    def log(self, numbers: dict[str, float], step: int) -> None:
        if len(self.told) == self._broken:
            raise ConnectionError("no route to host\nand more")
        self.told.append((numbers, step))

    def finish(self) -> None:
        self.ended = True


def reported(count: int, make: Callable[[], Kept], monkeypatch: pytest.MonkeyPatch) -> list[Event]:
    """What is said of a run of so many iterations whose only tracker is that one."""

    def opened(name: str, run: RunBegan) -> Kept:
        return make()

    monkeypatch.setattr(trackers, "opened", opened)
    heard: list[Event] = []
    listener = Trackers(heard.append)
    listener(RunBegan("r", Path("r"), {}, ("wandb",), count, 0))
    for index in range(count):
        listener(IterationEnded(index, count, {"train/loss": float(index), "judge/score": 0.5}))
    listener(RunEnded(None))
    return heard


def test_a_tracker_that_breaks_is_left_out_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole, broken = Kept(), Kept(broken=2)
    assert reported(5, lambda: whole, monkeypatch) == []
    assert [step for _, step in whole.told] == [1, 2, 3, 4, 5] and whole.ended
    assert whole.told[3][0] == {"train/loss": 3.0, "judge/score": 0.5}
    said = "report_to: wandb broke and is left out from here on: ConnectionError: no route to host"
    assert reported(5, lambda: broken, monkeypatch) == [Note(said)]
    assert len(broken.told) == 2

    def unopened() -> Kept:
        raise ValueError("no key")

    (note,) = reported(5, unopened, monkeypatch)
    assert isinstance(note, Note) and note.text.endswith("ValueError: no key")


def test_a_tracker_that_hangs_keeps_nobody_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    monkeypatch.setattr(trackers, "END_S", 0.2)
    free = threading.Event()

    class Stuck(Kept):
        def log(self, numbers: dict[str, float], step: int) -> None:
            free.wait(60)

    (note,) = reported(5, Stuck, monkeypatch)
    free.set()
    assert isinstance(note, Note) and "has not ended within 0.2 s" in note.text


def test_nothing_is_opened_before_there_is_something_to_tell() -> None:
    made: list[Kept] = []

    def make() -> Kept:
        made.append(Kept())
        return made[-1]

    tracker = Tracker("wandb", make, lambda event: None)
    tracker.finish()
    tracker.join(20)
    assert made == []


def test_a_recipe_as_settings_holds_numbers_and_text_only() -> None:
    told = flat({"a": {"b": [1, 2], "c": None}, "d": True, "e": {"f": {"g": 0.5}}, "h": "x"})
    assert told == {"a.b": "[1, 2]", "a.c": "None", "d": True, "e.f.g": 0.5, "h": "x"}
