"""The key of a cache tells apart all code that made its content, and no more."""

import asyncio
import importlib
import io
import sys
from collections.abc import Generator
from pathlib import Path

import pytest
from rich.console import Console

from selfwright.commands.console import Display
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.plugins import load
from selfwright.core.protocols import make_learner
from selfwright.core.recipe import differences, read
from selfwright.core.sources import code_of
from selfwright.core.store.folder import RunFolder
from selfwright.loop.progress import Progress
from selfwright.loop.run import begun
from selfwright.loop.warm_start import key_of, made_as

FILES = {
    "lone.py": "from .. import nothing\n",
    "unrelated.py": "",
    "parrot.py": """
from perches import Perch
class Parrot(Perch):
    def say(self):
        import phrases.long as deep
        return deep
""",
    "perches.py": "import json\nfrom perch_base import Base\nclass Perch(Base): pass\n",
    "perch_base.py": "class Base: pass\n",
    "phrases/__init__.py": "raise RuntimeError('not to be imported')\n",
    "phrases/long.py": "from . import short\nfrom .short import word\n",
    "phrases/short.py": "word = 'a'\n",
    "phrases/other.py": "",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[Path]:
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    importlib.invalidate_caches()
    yield tmp_path
    for name in ("parrot", "perches", "perch_base", "filed"):
        sys.modules.pop(name, None)


def test_all_that_is_imported_counts_wherever_and_whenever_it_is(folder: Path) -> None:
    parrot = load("environments", "parrot:Parrot")
    before = code_of(parrot)
    assert set(before) == {
        *("parrot", "perches", "perch_base"),
        *("phrases", "phrases.long", "phrases.short"),
    }
    for name in ("unrelated.py", "phrases/other.py"):
        (folder / name).write_text("changed = True\n")
    assert code_of(parrot) == before == code_of(parrot)
    for name in ("parrot.py", "perches.py", "perch_base.py", "phrases/short.py"):
        (folder / name).write_text(FILES[name] + "# another\n")
        after = code_of(parrot)
        changed = {one for one in after if after[one] != before[one]}
        assert changed == {name.removesuffix(".py").replace("/", ".")}
        (folder / name).write_text(FILES[name])


def test_our_own_plug_ins_count_by_their_files_and_others_by_their_version() -> None:
    found = code_of(load("environments", "countdown"), load("agents", "chat"))
    assert {"selfwright.environments.countdown", "selfwright.agents.chat"} <= found.keys()
    assert "selfwright.loop.warm_start" not in found, "whatever is not imported does not count"
    import pydantic

    assert found["pydantic of pydantic"] == pydantic.VERSION
    express = code_of(load("environments", "textworld_express"))
    assert "selfwright.environments.textworld_express" in express
    assert "selfwright.environments.countdown" not in express


def test_code_that_cannot_be_read_is_never_the_same() -> None:
    scope: dict[str, type] = {}
    exec("class World: pass", {"__name__": "nowhere_at_all"}, scope)
    assert code_of(scope["World"]) != code_of(scope["World"])


WORLD = """
from selfwright.core.config import Config
from selfwright.core.types import Observation, Task, TimeStep
class Settings(Config):
    file: str
class Filed:
    Config, isolation = Settings, "inline"
    def __init__(self, config): pass
    def tasks(self, split): return [Task(f"{split} {k}", "Do.", 2) for k in range(40)]
    async def reset(self, task, seed): return Observation("go")
    async def step(self, action): return TimeStep(Observation("no"), 1.0, True, success=True)
    async def expert(self): return "x"
    async def close(self): pass
"""
RECIPE = """
environment: {use: "filed:Filed", file: data.txt}
policy: {model: "scratch:32x1"}
trainer: {use: imitation}
"""


def test_the_key_of_a_base_holds_code_and_the_files_that_settings_name(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    Path("filed.py").write_text(WORLD)
    Path("data.txt").write_text("one")
    Path("r.yaml").write_text(RECIPE)
    importlib.invalidate_caches()
    recipe = read("r.yaml", [])
    keys = [key_of(recipe), key_of(recipe)]
    Path("data.txt").write_text("two")
    keys.append(key_of(recipe))
    Path("filed.py").write_text(WORLD + "# two")
    keys.append(key_of(recipe))
    assert keys[0] == keys[1] and len(set(keys)) == 3


def test_a_run_that_committed_nothing_begins_with_a_base_of_the_world_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(folder / "cache"))
    Path("data.txt").write_text("one")
    Path("r.yaml").write_text(RECIPE)

    async def base() -> str:
        recipe, said = read("r.yaml", []), io.StringIO()
        settings = recipe.environment.config.model_dump(mode="json")
        with RunFolder.open(folder / "run", recipe.dump(), differences) as kept:
            async with await open_worlds("filed:Filed", settings, recipe.fleet) as worlds:
                progress = Progress(Display(Console(file=said)))
                made = await begun(recipe, worlds, kept, progress, make_learner)
        assert made_as(Path(made)) == key_of(recipe)
        return said.getvalue().split(":")[0]

    for change, said in (
        ("", "base model"),
        ("", ""),  # It is kept with the run.
        ("# two", "base model"),
        ("", "base model made earlier"),
    ):
        Path("filed.py").write_text(WORLD + change)
        importlib.invalidate_caches()
        assert asyncio.run(base()) == said
