"""What the pages say is so: links, recipes, code, commands, and the tables made of the code."""

import ast
import asyncio
import importlib
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import made
import pytest
import typer.main
import yaml
from components import context_of, episode
from pydantic import ValidationError

from selfwright.commands.cli import app
from selfwright.core.config import Fleet
from selfwright.core.metrics import METRICS
from selfwright.core.plugins import KINDS
from selfwright.core.recipe import read, section, shipped
from selfwright.core.types import Observation, Parsed, Task

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").glob("*.md")]
)
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
"""What it is marked by, and what stands in it."""
every_page = pytest.mark.parametrize("page", PAGES, ids=NAMES)


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language; those marked further, such as ``python plain``, too."""
    return [
        code for kind, code in FENCE.findall(page.read_text()) if kind.split(" ")[0] == language
    ]


def anchors(page: Path) -> set[str]:
    """Of the headings, as GitHub makes them."""
    text = FENCE.sub("", page.read_text())
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    text = FENCE.sub("", page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_recipes_are_recipes(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole ones are read; parts of one have keys that there are."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))  # pyright: ignore[reportUnknownMemberType]
    for number, block in enumerate(blocks(page, "yaml")):
        given: dict[str, Any] = yaml.safe_load(block)
        if "trainer" in given or "phases" in given:
            (tmp_path / f"{number}.yaml").write_text(block)
            read(tmp_path / f"{number}.yaml")
        for key, value in given.items():
            if key in ("environment", "policy", "judge", "trainer", "learner", "agent"):
                section(key, value["use"], (), value) if "use" in value else None


@every_page
def test_code_is_whole_and_imports_what_there_is(page: Path) -> None:
    for block in blocks(page, "python"):
        tree = ast.parse("async def page():\n" + re.sub("^", " ", block, flags=re.MULTILINE))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("selfwright."):
                module = importlib.import_module(node.module or "")
                for name in node.names:
                    assert hasattr(module, name.name), f"{node.module} has no {name.name}"


def commands(page: Path) -> list[list[str]]:
    """The command lines of ours that a page shows, each in its words."""
    text = page.read_text()
    fenced = "\n".join(code for _, code in FENCE.findall(text)).replace("\\\n", " ")
    spans = re.findall(r"`(selfwright [a-z][^`]*)`", FENCE.sub("", text))
    lines = re.findall(r"^(?:.* -m )?(selfwright .+)$", fenced, re.MULTILINE)
    return [line.split("#")[0].split()[1:] for line in (*lines, *spans)]


def defined(page: str, name: str) -> Any:
    """The class that a page shows."""
    (code,) = [one for one in blocks(ROOT / "docs" / page, "python") if f"class {name}" in one]
    space: dict[str, Any] = {"__name__": "page"}
    exec(code, space)
    return space[name]


def test_the_agent_shown_reads_and_acts() -> None:
    kind = defined("agents.md", "Terse")
    agent, seen = kind(kind.Config()), Observation("a door")
    assert agent.prompt(Task("t", "Go.", 3), (), seen).messages[0].text == "Go.\na door"
    assert agent.parse("I think.\nopen", seen) == Parsed("open")
    assert agent.parse(" ", seen).invalid


def test_the_judge_and_the_trainer_shown_go_together() -> None:
    kind = defined("judges.md", "Careful")
    given = [episode(1.0, ("a", "b")), episode(0.0, ("a", "c"))]
    judge = kind(kind.Config.model_validate({}))
    verdicts = asyncio.run(judge.judge([one.trajectory for one in given]))
    assert [one.score for one in verdicts] == [1.0, 0.0]
    judged = [replace(one, verdict=v) for one, v in zip(given, verdicts, strict=True)]
    clone = defined("trainers.md", "Clone")
    trainer = clone(clone.Config(), context_of())
    (batch,) = asyncio.run(trainer.batches([*judged, episode(None, ("a", "d"))]))
    assert [one.completion.text for one in batch.examples] == ["b"]
    assert asyncio.run(trainer.batches(judged[1:])) == [] and trainer.plan.attempts == 8


@every_page
def test_commands_and_their_options_are_there(page: Path) -> None:
    group: Any = typer.main.get_command(app)
    for words in commands(page):
        assert words[0] in group.commands, words
        known = {name for option in group.commands[words[0]].params for name in option.opts}
        assert {word for word in words if word.startswith("-")} <= known, words


def test_commands_are_found() -> None:
    assert ["check", "countdown"] in commands(ROOT / "docs" / "worlds.md")
    found = [words for words in commands(ROOT / "docs" / "results.md") if len(words) > 8]
    assert found and "countdown/dr_grpo" in found[0]


def test_recipes_and_plugins_that_are_named_are_there() -> None:
    recipes, said = shipped(), (ROOT / "docs" / "recipes.md").read_text()
    for name in recipes:
        assert f"`{name}`" in said, name
    for page in PAGES:
        for name in re.findall(r"(?<![\w/])((?:countdown|coin)/\w+)", page.read_text()):
            assert name in recipes, f"{page.name}: {name}"


def test_every_plugin_of_ours_has_its_place() -> None:
    pages = {"judges": "judges.md", "trainers": "trainers.md", "agents": "agents.md"}
    for kind in KINDS:
        text = (ROOT / "docs" / pages.get(kind, "recipes.md")).read_text()
        for name, one in made.names(kind).items():
            if one.target.startswith("selfwright."):
                assert f"`{name}`" in text, f"{kind}: {name}"


def test_paths_that_are_served_are_there() -> None:
    code = "".join(file.read_text() for file in (ROOT / "agents" / "serving").glob("*.py"))
    routes = {
        re.sub(r"{\w+}", "ID", path) for path in re.findall(r"@app\.\w+\(\s*\"(/.*?)\"", code)
    }
    text = (ROOT / "docs" / "serving.md").read_text()
    named = {path for row in re.findall(r"^\| (`/.*?) \|", text, re.M) for path in row.split(", ")}
    assert {path.strip("`") for path in named} - {"/openapi.json"} <= routes
    assert "openapi_url=None" not in code


@every_page
def test_what_is_made_from_the_code_is_todays(page: Path) -> None:
    text = page.read_text()
    assert made.written(text) == text, "run: python tests/made.py"


def test_every_metric_is_there() -> None:
    text = (ROOT / "docs" / "metrics.md").read_text()
    assert not [name for name in METRICS if f"`{name}`" not in text]


def test_every_result_is_told_of_and_every_file_is_there() -> None:
    folder = ROOT / "benchmarks" / "results"
    text = (ROOT / "docs" / "results.md").read_text()
    named = set(re.findall(r"`([\w-]+\.(?:json|txt))`", text))
    assert named == {file.name for file in folder.iterdir()}
    for script in re.findall(r"`(\w+\.py)`", text):
        assert (ROOT / "benchmarks" / script).is_file(), script


def test_keys_are_found_where_classes_have_them() -> None:
    """The makers themselves: inherited keys, changed defaults, what must be given."""
    rows = made.keys("selfwright.trainers.methods.group:RLOOConfig").splitlines()
    assert '| `baseline` | `grpo`, `rloo`, `dr_grpo` | `"rloo"` |' in "\n".join(rows)
    own = made.keys(
        "selfwright.trainers.methods.group:RLOOConfig",
        "selfwright.trainers.parts.group_relative:GroupConfig",
    )
    assert len(own.splitlines()) == 4 and "`aggregation`" in own
    assert "*required*" in made.keys("selfwright.agents.engines.openai:OpenAIConfig")
    assert made.keys("selfwright.core.config:Fleet", "selfwright.core.config:Fleet") == ""
    with pytest.raises(ValidationError):
        Fleet.model_validate({"parallel": 0})
    with pytest.raises(KeyError):
        made.made("nothing")
