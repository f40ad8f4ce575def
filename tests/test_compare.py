"""Evaluation files are written whole and read strictly; comparisons are of like with like."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from selfwright.core import evaluation
from selfwright.core.errors import StoreError
from selfwright.core.evaluation import EvaluationResult, TaskResult, summarise
from selfwright.core.statistics import introspection_table, mcnemar_exact, wilson
from selfwright.evidence.compare import compare, render


def result(task: int, solved: bool, steps: int = 1, error: str = "") -> TaskResult:
    return TaskResult(f"task-{task}", solved, bool(error), float(solved), steps, error)


def evaluated(results: list[TaskResult], **changes: Any) -> EvaluationResult:
    settings: dict[str, Any] = {
        "checkpoint": "base",
        "environment": {"use": "countdown", "numbers": 4, "parallel": 64},
        "agent": {"use": "chat"},
        "split": "test",
        "seed": 0,
        "temperature": 0.0,
        "undecided": 0,
        "environment_steps": 10,
        "tokens_sampled": 100,
        "wall_s": 1.5,
    }
    return EvaluationResult(**(settings | changes), **summarise(results), results=tuple(results))


def test_a_summary_by_hand() -> None:
    summary = summarise(
        [
            result(0, True, steps=1),
            result(1, True, steps=3),
            result(2, False, steps=4),
            result(3, False, steps=2, error="TimeoutError: step took over 30 s"),
        ]
    )
    assert (summary["tasks"], summary["successes"], summary["failed"]) == (4, 2, 1)
    assert summary["success_rate"] == 0.5
    assert summary["interval"] == wilson(2, 4)
    assert summary["failures"] == {"TimeoutError": 1}
    assert (summary["mean_reward"], summary["mean_steps"]) == (0.5, 2.5)
    assert summary["success_by_turn"] == (0.25, 0.25, 0.5, 0.5)
    assert summarise([])["success_rate"] == 0.0


def test_what_is_written_is_read_back(tmp_path: Path) -> None:
    table = introspection_table([[("1", True)]], [[("1", True)]], [[True]])
    written = evaluated([result(0, True), result(1, False, error="X: y")], introspection=table)
    path = evaluation.write(tmp_path / "a", written)
    assert evaluation.read(path) == evaluation.read(tmp_path / "a") == written
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["evaluation.json"]
    assert json.loads(path.read_text())["schema"] == 1


def cut_short(text: str) -> str:
    return text[:50]


def damaged(change: Callable[[dict[str, Any]], None]) -> Callable[[str], str]:
    def apply(text: str) -> str:
        data = json.loads(text)
        change(data)
        return json.dumps(data)

    return apply


@pytest.mark.parametrize(
    ("damage", "complaint"),
    [
        (cut_short, "Invalid JSON"),
        (damaged(lambda data: data.update(schema=2)), "schema"),
        (damaged(lambda data: data.update(seed="0")), "seed"),
        (damaged(lambda data: data.update(surprise=1)), "surprise"),
        (damaged(lambda data: data.pop("split")), "split: Field required"),
        (damaged(lambda data: data["results"].pop()), "tasks is 2, but its results say 1"),
        (damaged(lambda data: data["results"][0].update(success=1)), "results.0.success"),
        (damaged(lambda data: data["results"][1].update(task="task-0")), "occur twice"),
        (damaged(lambda data: data.update(successes=2)), "successes is 2"),
        (damaged(lambda data: data["results"][0].update(failed=True)), "both succeeded and failed"),
    ],
)
def test_a_damaged_file_says_what_is_wrong(
    tmp_path: Path, damage: Callable[[str], str], complaint: str
) -> None:
    path = evaluation.write(tmp_path, evaluated([result(0, True), result(1, False)]))
    path.write_text(damage(path.read_text()))
    with pytest.raises(StoreError) as caught:
        evaluation.read(tmp_path)
    assert complaint in str(caught.value)


def test_a_contradiction_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="contradicts itself"):
        evaluation.write(tmp_path, replace(evaluated([result(0, True)]), tasks=2))
    with pytest.raises(StoreError, match="not finite"):
        bad = TaskResult("t", False, False, float("nan"), 1)
        evaluation.write(tmp_path, evaluated([bad]))
    assert not list(tmp_path.iterdir())


def test_a_missing_evaluation_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"evaluation\.json"):
        compare(tmp_path / "nothing", tmp_path)


def test_a_comparison_of_folders_files_and_runs(tmp_path: Path) -> None:
    before = [result(i, i < 10) for i in range(40)]
    after = [result(i, 2 <= i < 30, error="Boom: x" if i == 39 else "") for i in range(40)]
    a = evaluation.write(tmp_path / "a", evaluated(before))
    final = tmp_path / "run" / "evaluations" / "final"
    evaluation.write(final, evaluated(after, checkpoint="iteration-3", temperature=1.0))
    found = compare(a, tmp_path / "run")
    assert (found["only_a"], found["only_b"], found["both"], found["neither"]) == (2, 20, 8, 10)
    assert found["p_value"] == mcnemar_exact(2, 20)
    assert found["verdict"] == "better"
    assert {**found, "a": 0, "b": 0} == {**compare(tmp_path / "a", final), "a": 0, "b": 0}
    assert any("temperatures" in note for note in found["notes"])
    assert any("1 episodes of B broke" in note for note in found["notes"])
    assert json.loads(json.dumps(found))["interval"][0] > 0
    text = render(found)
    assert "verdict: better" in text and "+45.0 points" in text and "1 broke" in text
    assert compare(final, a)["verdict"] == "worse"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"seed": 1}, "seed (0 and 1)"),
        ({"split": "validation"}, "split ('test' and 'validation')"),
        ({"environment": {"use": "countdown", "numbers": 5}}, "environment.numbers (4 and 5)"),
        ({"environment": {"use": "countdown"}}, "environment.numbers (4 and not given)"),
    ],
)
def test_different_worlds_are_not_paired(
    tmp_path: Path, changes: dict[str, Any], complaint: str
) -> None:
    evaluation.write(tmp_path / "a", evaluated([result(0, True)]))
    evaluation.write(tmp_path / "b", evaluated([result(0, True)], **changes))
    with pytest.raises(StoreError) as caught:
        compare(tmp_path / "a", tmp_path / "b")
    assert complaint in str(caught.value)


def test_hosting_may_differ_but_tasks_may_not(tmp_path: Path) -> None:
    evaluation.write(tmp_path / "a", evaluated([result(0, True), result(1, True)]))
    world = {"use": "countdown", "numbers": 4, "isolation": "process"}
    evaluation.write(tmp_path / "b", evaluated([result(0, True)], environment=world))
    with pytest.raises(StoreError, match="A has 2 tasks and B 1"):
        compare(tmp_path / "a", tmp_path / "b")
    evaluation.write(tmp_path / "b", evaluated([result(1, True), result(0, True)]))
    assert compare(tmp_path / "a", tmp_path / "b")["verdict"] == "inconclusive"
