"""The report of a made-up run: complete, honest in words, safe against what a model may say."""

import hashlib
import json
import random
import re
import shutil
from base64 import b64encode
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from prompts import grey, png

from selfwright.core import evaluation
from selfwright.core.errors import StoreError
from selfwright.core.evaluation import EvaluationResult, TaskResult, summarise
from selfwright.core.images import picture, place
from selfwright.core.statistics import Sample, compare_outcomes, introspection_table, wilson
from selfwright.core.store import write_trajectories
from selfwright.core.types import (
    Action,
    Completion,
    Image,
    Judged,
    Observation,
    Step,
    Stop,
    Task,
    Trajectory,
    Verdict,
)
from selfwright.evidence.charts import ticks, visible
from selfwright.evidence.numbers import p_value, seconds, signed
from selfwright.evidence.report import TURNS_SHOWN, report

NASTY = (
    "<script>alert(1)</script></style></pre>\"'`<!-- ]]> &amp; {{ 7 * 7 }} "
    "\x1b[31mred\x1b[0m \x00\x07 \u202egnp.exe\u202c zero\u200bwidth \u2028 javascript:alert(1)"
)


def square(red: int) -> Image:
    """16 x 16 pixels of one colour."""
    return picture(png(16, 16, rows=(b"\x00" + bytes([red, 90, 160]) * 16) * 16))


def episode(task: int, solved: bool, turns: int, text: str = "", broken: str = "") -> Judged:
    numbers = "3, 7, 8, 25"
    steps: list[Step] = []
    seen = f"Numbers: {numbers}. Reach {40 + task}. {text}"
    for turn in range(turns):
        right = solved and turn == turns - 1
        action = "25 + 8 + 7" if right else f"(25 - {turn}) * 3"
        said = Completion(f"{action} = ? {text}" if turn else action)
        image = (square(40 * turn % 256),) if task % 2 else ()
        steps.append(Step(Observation(seen, image), Action(action, said), float(right)))
        seen = f"{action} gives {41 + turn}, not {40 + task}."
    trajectory = Trajectory(
        task=Task(f"countdown/test/{task}", f"Reach {40 + task} from {numbers}. {text}", 4),
        steps=tuple(steps),
        final=Observation("Right!" if solved else seen),
        stop=Stop.FAILED if broken else Stop.TERMINATED,
        policy="policy",
        seed=task,
        success=solved,
        error=broken,
    )
    return Judged(trajectory, Verdict(float(solved), f"the world paid {float(solved)}", "reward"))


def play(tasks: int, skill: float, seed: int, text: str, turns: int) -> list[Judged]:
    draw = random.Random(seed)
    episodes = [
        episode(i, draw.random() < skill, draw.randint(1, turns), text) for i in range(tasks)
    ]
    episodes[-1] = episode(tasks - 1, False, 1, text, "TimeoutError: step took over 30 s " + text)
    return episodes


def table_of(tasks: int, skill: float, seed: int) -> Any:
    draw = random.Random(seed)

    def sample(rate: float) -> Sample:
        right = draw.random() < rate
        return ("right" if right else draw.choice(["x", "y", "z"]), right)

    parallel = [[sample(skill) for _ in range(5)] for _ in range(tasks)]
    turns = [[sample(skill + 0.04 * t) for t in range(5)] for _ in range(tasks)]
    return introspection_table(parallel, turns, [[draw.random() < skill + 0.2] for _ in turns])


def evaluated(played: list[Judged], name: str, introspection: Any) -> EvaluationResult:
    results = tuple(
        TaskResult(t.task.id, t.success, bool(t.error), t.reward, len(t.steps), t.error)
        for t in (judged.trajectory for judged in played)
    )
    return EvaluationResult(
        checkpoint=name,
        environment={"use": "countdown"},
        agent={"use": "chat"},
        split="test",
        seed=0,
        temperature=0.0,
        undecided=0,
        environment_steps=sum(r.steps for r in results),
        tokens_sampled=9_000,
        wall_s=12.0,
        introspection=introspection,
        results=results,
        **summarise(results),
    )


def make_run(
    folder: Path,
    skills: tuple[float, float] = (0.46, 0.66),
    tasks: int = 400,
    text: str = "",
    turns: int = 4,
    iterations: int = 8,
) -> Path:
    """A complete run folder, as ``selfwright run`` leaves it."""
    sides: dict[str, EvaluationResult] = {}
    tables: dict[str, Any] = {}
    for seed, (name, skill) in enumerate(zip(("base", "final"), skills, strict=True)):
        played = play(tasks, skill, seed, text, turns)
        tables[name] = table_of(tasks, skill - 0.1, seed)
        sides[name] = evaluated(played, name, tables[name])
        path = evaluation.write(folder / "evaluations" / name, sides[name])
        (folder / "images").mkdir(exist_ok=True)
        write_trajectories(path.parent, played, folder / "images")
    draw = random.Random(5)
    curve: list[dict[str, Any]] = []
    for i in range(iterations + 1):
        solved = round(128 * (skills[0] + (skills[1] - skills[0]) * i / iterations))
        solved = min(128, max(0, solved + draw.randint(-4, 4)))
        point = {"iteration": i, "success_rate": solved / 128, "tasks": 128}
        curve.append({**point, "interval": wilson(solved, 128)})
    for i in range(iterations):
        metrics = {
            "train/loss": 1.4 * 0.85**i + draw.random() / 20,
            "train/grad_norm": 1 + draw.random(),
            "train/learning_rate": 3e-4 * (1 - i / iterations),
            "rollout/success": 0.4 + 0.02 * i,
            "rollout/steps": 3.1 - 0.1 * i,
            "judge/undecided": 0.0,
            "time/rollout_s": 21.5,
            "time/update_s": 9.0 + draw.random(),
            "time/evaluate_s": 4.2,
        }
        path = folder / "iterations" / f"{i:04d}" / "metrics.json"
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(metrics))
    outcome = compare_outcomes(sides["base"].outcomes, sides["final"].outcomes)
    keys = ("tasks", "successes", "success_rate", "interval")
    result = {
        "recipe": "quickstart" + text,
        "seed": 7,
        **{name: {key: getattr(side, key) for key in keys} for name, side in sides.items()},
        "comparison": asdict(outcome),
        "introspection": {name: asdict(table) for name, table in tables.items()},
        "curve": curve,
        "costs": [
            {"iteration": i, "environment_steps": 4096, "tokens_sampled": 81_920, "episodes": 1024}
            | {"tokens_trained": 120_000, "failures": {"WorldError": 1}}
            for i in range(iterations)
        ],
        "wall_s": 402.7,
        "warm_start": {"wall_s": 61.4, "updates": 100},
        "environment_steps": 34_000,
        "tokens_sampled": 690_112,
        "tokens_trained": 960_000,
    }
    (folder / "result.json").write_text(json.dumps(result))
    settings = {"seed": 7, "trainer": {"use": "rise", "note": text}}
    (folder / "recipe.json").write_text(json.dumps(settings))
    return folder


def page_of(folder: Path) -> str:
    """The page, checked to be well-formed, to act on nothing and to load nothing."""
    text = report(folder).read_text("utf-8")
    root = ElementTree.fromstring(text)
    assert root.tag == "html"
    for node in root.iter():
        assert node.tag not in {"script", "iframe", "object", "embed", "base", "form"}
        for name, value in node.attrib.items():
            assert not name.startswith("on"), f"{node.tag} has the handler {name}"
            if name in {"href", "src", "srcset", "action"}:
                assert value.startswith(("#", "data:image/png;base64,", "data:,")), value
    assert "@import" not in text and "url(" not in text
    ids = [node.attrib["id"] for node in root.iter() if "id" in node.attrib]
    assert len(ids) == len(set(ids))
    for link in root.iter("a"):
        assert link.attrib["href"].removeprefix("#") in ids
    for chart in root.iter("svg"):
        assert chart.attrib.get("aria-hidden") == "true" or chart.attrib["aria-label"]
    assert all(table.find("caption") is not None for table in root.iter("table"))
    assert all(image.attrib["alt"] for image in root.iter("img"))
    return text


def words(page: str) -> str:
    body = ElementTree.fromstring(page).find("body")
    assert body is not None
    return re.sub(r"\s+", " ", " ".join(body.itertext()))


def change(folder: Path, **changes: Any) -> None:
    path = folder / "result.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_complete_page(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    assert "://" not in page
    text = words(page)
    for heading in ("Proof", "Learning", "Introspection", "Episodes", "Costs", "Failures"):
        assert heading in text
    assert "Better: solves" in text and "of 400 test tasks" in text
    assert all(name in text for name in ("m1@t1", "m5@t1", "m1@t5", "p1@t5", "train/loss"))
    assert "TimeoutError" in text and "WorldError" in text
    assert "690,112" in text and "6 min 43 s" in text
    assert "warm start 1 min 1 s" in text and "tests before and after" in text
    assert page.count('class="episode"') == 6
    assert "data:image/png;base64," in page


def test_the_discordant_table_agrees_with_the_results(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path))
    result = json.loads((tmp_path / "result.json").read_text())["comparison"]
    cells = re.findall(r'<td class="differs">(\d+)</td>', page)
    assert [int(cell) for cell in cells] == [result["only_a"], result["only_b"]]


@pytest.mark.parametrize(
    ("skills", "opening"),
    [
        ((0.3, 0.7), "Better: solves"),
        ((0.7, 0.3), "Worse: solves"),
        ((0.50, 0.52), "Inconclusive: solves"),
    ],
)
def test_the_headline_says_what_the_test_says(
    tmp_path: Path, skills: tuple[float, float], opening: str
) -> None:
    text = words(page_of(make_run(tmp_path, skills, tasks=150)))
    assert opening in text
    assert ("proves neither gain nor loss" in text) == opening.startswith("Inconclusive")


def test_no_change_is_called_no_change(tmp_path: Path) -> None:
    make_run(tmp_path, tasks=20)
    same = json.loads((tmp_path / "result.json").read_text())["base"]
    nothing = {"difference": 0, "interval": [0, 0], "p_value": 1, "verdict": "inconclusive"}
    change(tmp_path, final=same, comparison=nothing)
    text = words(page_of(tmp_path))
    assert "No measurable change" in text
    assert "0.0 points (0.0 to 0.0)" in text


def test_hostile_text_is_shown_and_does_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path, tasks=30, text=NASTY)
    page = page_of(folder)
    assert "<script" not in page and "alert(1)" in page
    assert page.count("</style>") == 1
    assert "{{ 7 * 7 }}" in page
    for hidden in "\x1b\x00\x07\u202e\u202c\u200b\u2028":
        assert hidden not in page
    text = words(page)
    assert "⟨U+001B⟩[31mred⟨U+001B⟩[0m ⟨U+0000⟩⟨U+0007⟩" in text
    assert "⟨U+202E⟩gnp.exe⟨U+202C⟩" in text and "zero⟨U+200B⟩width" in text
    assert text.count("<script>alert(1)</script></style></pre>\"'`<!-- ]]> &amp;") > 10


def test_hostile_names_reach_no_attribute(tmp_path: Path) -> None:
    make_run(tmp_path, tasks=10)
    path = tmp_path / "iterations" / "0000" / "metrics.json"
    path.write_text(json.dumps({'x" onload="alert(1)\u202e': 1.0, "time/<b>_s": 2.0}))
    change(tmp_path, costs=[{"<i>odd</i>": 3, "failures": {"<u>": 2}}])
    page = page_of(tmp_path)
    assert "<i>" not in page and "<u>" not in page and "<b>_" not in page
    assert "\u202e" not in page


@pytest.mark.parametrize(
    "missing",
    ["comparison", "base", "final", "introspection", "curve", "costs", "wall_s", "recipe", "seed"],
)
def test_a_result_may_lack_any_part(tmp_path: Path, missing: str) -> None:
    make_run(tmp_path, tasks=12)
    path = tmp_path / "result.json"
    result = json.loads(path.read_text())
    del result[missing]
    path.write_text(json.dumps(result))
    page_of(tmp_path)


def test_an_almost_empty_run_has_a_page(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{}")
    text = words(page_of(tmp_path))
    assert "No verdict" in text and "Nothing is recorded." in text
    assert "Introspection" not in text and "Costs" not in text


@pytest.mark.parametrize("name", ["base", "final"])
def test_a_run_may_lack_an_evaluation(tmp_path: Path, name: str) -> None:
    make_run(tmp_path, tasks=12, iterations=1)
    shutil.rmtree(tmp_path / "evaluations" / name)
    change(tmp_path, introspection={name: None})
    assert "m1@t5" in words(page_of(tmp_path))


def test_damaged_episodes_leave_the_page_whole(tmp_path: Path) -> None:
    make_run(tmp_path, tasks=12)
    (tmp_path / "evaluations" / "final" / "episodes.parquet").write_bytes(b"PAR1")
    assert "Some episodes could not be read" in words(page_of(tmp_path))


@pytest.mark.parametrize("content", ["", "[]", '{"seed": "x"}', '{"base": {"tasks": 3}}'])
def test_a_damaged_result_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "result.json").write_text(content)
    with pytest.raises(StoreError, match=r"result\.json"):
        report(tmp_path)
    assert not (tmp_path / "report.html").exists()


def test_a_missing_result_is_named(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"result\.json"):
        report(tmp_path)


def test_long_episodes_and_texts_are_cut_and_say_so(tmp_path: Path) -> None:
    make_run(tmp_path, tasks=12, text="word " * 2_000, turns=40)
    page = page_of(tmp_path)
    assert "turns left out" in page and "more characters]" in page
    turns = max(block.count("<dt>reward</dt>") for block in page.split('<div class="play">')[1:])
    assert turns == TURNS_SHOWN
    assert len(page) < 1_500_000


def test_what_is_no_png_is_not_embedded(tmp_path: Path) -> None:
    make_run(tmp_path, tasks=12)
    for name in ("base", "final"):
        judged = episode(1, name == "final", 1)
        svg = b"<svg onload='alert(1)'/>"
        # No world can show this, but whoever made the folder may have put it there.
        forged = Image(hashlib.sha256(svg).hexdigest(), 1, 1, svg)
        final = Observation("look", (forged,))
        odd = replace(judged, trajectory=replace(judged.trajectory, final=final))
        write_trajectories(tmp_path / "evaluations" / name, [odd], tmp_path / "images")
    page = page_of(tmp_path)
    assert "onload" not in page and "PHN2Zy" not in page and "not a PNG" in page


def test_a_picture_that_is_gone_leaves_the_page_whole(tmp_path: Path) -> None:
    make_run(tmp_path, tasks=12)
    gone, there = grey(123), grey(124)
    for name in ("base", "final"):
        judged = episode(1, name == "final", 1)
        final = Observation("look", (gone, there))
        odd = replace(judged, trajectory=replace(judged.trajectory, final=final))
        write_trajectories(tmp_path / "evaluations" / name, [odd], tmp_path / "images")
    place(tmp_path / "images", gone).unlink()
    page = page_of(tmp_path)
    assert page.count("One image is left out") == page.count(b64encode(there.png).decode()) > 0


def test_many_iterations_stay_small(tmp_path: Path) -> None:
    make_run(tmp_path, tasks=12, iterations=1_500)
    page = page_of(tmp_path)
    assert len(page) < 1_500_000


def test_numbers_are_written_for_reading() -> None:
    assert [signed(x) for x in (0.118, -0.031, 0.0, -0.0001)] == ["+11.8", "−3.1", "0.0", "0.0"]
    assert p_value(0.0312) == "p = 0.031"
    assert p_value(3.1e-7) == "p = 3 × 10⁻⁷"
    assert p_value(0.0) == "p < 10⁻¹⁵"
    assert [seconds(s) for s in (5.26, 402.7, 7_260.0)] == ["5.3 s", "6 min 43 s", "2 h 1 min"]


def test_ticks_are_round_and_cover_the_range() -> None:
    assert ticks(0.43, 0.68, 4) == pytest.approx([0.4, 0.5, 0.6, 0.7])
    assert ticks(5.0, 5.0, 4) == [5.0]


def test_visible_keeps_ordinary_text() -> None:
    ordinary = "Grüße, 你好, שלום!\n\tπ ≈ 3.14 🙂"
    assert visible(ordinary) == ordinary
    assert visible("a\r\nb\rc") == "a\nb⟨U+000D⟩c"
    assert visible("\ud800\ufeff\x85\uffff") == "⟨U+D800⟩⟨U+FEFF⟩⟨U+0085⟩⟨U+FFFF⟩"


def test_a_base_short_of_its_skill_is_no_secret(tmp_path: Path) -> None:
    make_run(tmp_path)
    for skill, told in ((0.21, True), (0.38, False)):
        change(tmp_path, warm_start={"wall_s": 61.4, "skill": skill, "wanted": 0.38})
        short = "Its warm start came to solve 21.0%, not the 38.0% asked for"
        assert (short in words(page_of(tmp_path))) == told
