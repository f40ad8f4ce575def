"""Methods compared: the same base and budget for all, or nothing is compared."""

import asyncio
import json
from pathlib import Path

import pytest
from components import SINGLE, played
from hypothesis import given
from hypothesis import strategies as st

from selfwright.core.config import Budget
from selfwright.core.errors import RecipeError
from selfwright.loop.bench import bench, page, planned, render

pytestmark = pytest.mark.method


@pytest.fixture
def recipes(player: Path, tmp_path: Path) -> list[str]:
    """Two methods, in files of their own."""
    plain = SINGLE.replace("MODEL", str(player))
    (tmp_path / "first.yaml").write_text(plain)
    (tmp_path / "second.yaml").write_text(plain.replace("use: grpo", "use: rloo"))
    return [str(tmp_path / "first.yaml"), str(tmp_path / "second.yaml")]


SPEND = ["iterations=9", "budget.environment_steps=150"]


def test_every_method_meets_the_same_base_and_budget(recipes: list[str], tmp_path: Path) -> None:
    plans = planned(recipes, 2, SPEND)
    assert list(plans) == ["imitation", "first", "second"]
    assert plans["imitation"][0].phases[0].trainer.dump()["source"] == "self"
    found = asyncio.run(bench(plans, tmp_path / "out"))
    assert json.loads((tmp_path / "out" / "bench.json").read_text()) == found
    for method in found["methods"].values():
        assert [run["seed"] for run in method["runs"]] == [0, 1]
        gains = [run["final"] - run["base"] for run in method["runs"]]
        assert method["mean_difference"] == pytest.approx(sum(gains) / 2)
        assert method["standard_error"] == pytest.approx(abs(gains[0] - gains[1]) / 2)
        # 48 episodes of one or two steps each: two or three iterations, not nine.
        assert all(2 <= run["iterations"] <= 4 for run in method["runs"])
        assert all(135 <= run["environment_steps"] <= 165 for run in method["runs"])
    bases = [[run["base"] for run in m["runs"]] for m in found["methods"].values()]
    assert bases[0] == bases[1] == bases[2]
    own = found["methods"]["imitation"]["runs"][0]["baseline"]
    assert (own["difference"], own["verdict"]) == (0.0, "inconclusive")
    assert len(render(found).splitlines()) == 1 + 6 + 1 + 3
    for name, others in found["pairs"].items():
        for other, one in others.items():
            gains = [found["methods"][n]["mean_difference"] for n in (name, other)]
            assert one["difference"] == pytest.approx(gains[0] - gains[1])
            assert found["pairs"][other][name]["p_value"] == pytest.approx(one["p_value"])
    assert sorted(found["pairs"]["second"]) == ["first", "imitation"]
    # Asked again, nothing is run again.
    assert asyncio.run(bench(plans, tmp_path / "out")) == found


def test_the_baseline_is_the_same_whoever_comes_first(recipes: list[str], tmp_path: Path) -> None:
    (tmp_path / "voted.yaml").write_text("extends: first.yaml\njudge: {use: majority}\n")
    chained = "extends: first.yaml\nphases:\n  - {trainer: {use: rloo}, iterations: 2}\n"
    (tmp_path / "chained.yaml").write_text(chained)
    for name, attempts in (("voted", 4), ("chained", 8)):
        added = planned([str(tmp_path / f"{name}.yaml"), *recipes], 1, SPEND[1:])["imitation"][0]
        assert (added.phases[0].judge.use, added.judge.use) == ("reward", "reward")
        assert added.phases[0].trainer.dump()["source"] == "self"
        assert added.phases[0].trainer.dump()["attempts_per_task"] == attempts


def test_any_method_may_be_the_one_to_beat(recipes: list[str], tmp_path: Path) -> None:
    plans = planned(recipes, 1, SPEND, "second")
    assert list(plans) == ["second", "first"]
    found = asyncio.run(bench(plans, tmp_path / "out"))
    assert found["baseline"] == "second"
    mine, other = (found["methods"][name]["runs"][0] for name in ("first", "second"))
    assert other["baseline"]["difference"] == 0
    assert mine["baseline"]["difference"] == pytest.approx(mine["final"] - other["final"])
    assert "over second" in render(found) and "imitation" not in render(found) + page(found)
    with pytest.raises(RecipeError, match="no recipe is called 'secnd'; did you mean 'second'"):
        planned(recipes, 1, SPEND, "secnd")


def test_names_are_escaped(recipes: list[str]) -> None:
    one = {
        "seed": 0,
        "tasks": 9,
        "base": 0.1,
        "final": 0.2,
        "difference": 0.1,
        "p_value": 0.5,
        "verdict": "inconclusive",
        "baseline": {"difference": 0.0, "verdict": "inconclusive"},
        "stopped": None,
        "spent": 1.0,
        "environment_steps": 1,
        "tokens_sampled": 1,
        "wall_s": 1.0,
    }
    method = {
        "runs": [one],
        "mean_difference": 0.1,
        "standard_error": None,
        "better": 0,
        "better_than_baseline": 0,
    }
    html = page({"baseline": "imitation", "methods": {"<script>x</script>": method}, "pairs": {}})
    assert "<script>" not in html and "&lt;script&gt;" in html


def test_unequal_conditions_are_refused(recipes: list[str], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="equal budget, and none is given"):
        planned(recipes, 1, [])
    other = tmp_path / "third.yaml"
    other.write_text(Path(recipes[0]).read_text().replace("largest: 9", "largest: 8"))
    with pytest.raises(RecipeError, match=r"first and third: environment\.largest: 9 -> 8"):
        planned([recipes[0], str(other)], 1, SPEND)
    with pytest.raises(RecipeError, match="two methods are called 'first'"):
        planned([recipes[0], recipes[0]], 1, SPEND)


def test_a_run_ends_when_its_budget_is_spent(recipes: list[str], tmp_path: Path) -> None:
    result = played(Path(recipes[0]), ["iterations=9", "budget.tokens=800"], tmp_path / "run")
    spent = [cost["tokens_sampled"] for cost in result["costs"]]
    assert 720 <= sum(spent) <= 880 and sum(spent[:-1]) < 800
    assert result["stopped"] is None


@given(st.integers(1, 99), st.integers(1, 99), st.integers(0, 200), st.integers(0, 200))
def test_shares_of_a_budget(steps: int, tokens: int, a: int, b: int) -> None:
    assert Budget().share(a, b) == 0
    assert Budget(environment_steps=steps).share(a, b) == a / steps
    both = Budget(environment_steps=steps, tokens=tokens).share(a, b)
    assert (both >= 1) == (a >= steps or b >= tokens)
