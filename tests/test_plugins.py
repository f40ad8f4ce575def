"""Plug-ins are found by name, one at a time, and a wrong name is told what would be right."""

import sys
from pathlib import Path

import pytest

from selfwright.core import plugins
from selfwright.core.errors import PluginError


def register(site: Path, distribution: str, group: str, *lines: str) -> None:
    """Make ``site`` hold an installed distribution with these entry points."""
    info = site / f"{distribution}-1.0.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("\n".join([f"[selfwright.{group}]", *lines]))


def said(kind: str, name: str) -> str:
    with pytest.raises(PluginError) as caught:
        plugins.load(kind, name)
    return str(caught.value)


def test_a_built_in_is_loaded_and_nothing_else_of_its_group() -> None:
    sys.modules.pop("selfwright.environments.textworld_express", None)
    assert plugins.load("environments", "countdown").__name__ == "Countdown"
    assert "selfwright.environments.textworld_express" not in sys.modules


def test_a_class_is_loaded_by_its_path() -> None:
    assert plugins.load("agents", "pathlib:Path") is Path


@pytest.mark.parametrize(
    ("kind", "name", "message"),
    [
        ("trainers", "ries", "no entry 'ries' in selfwright.trainers; did you mean 'rise'?"),
        ("learners", "zzz", "no entry 'zzz' in selfwright.learners; known: plain, trl"),
        ("trainer", "rise", "no kind of plug-in is called 'trainer'; did you mean 'trainers'?"),
        ("agents", "pathlib:Paht", "module 'pathlib' has no 'Paht'; did you mean 'Path'?"),
        ("agents", "pathlib:", "wanted module:Class, got 'pathlib:'"),
        ("agents", "os:getcwd", "'os:getcwd' is not a class but builtin_function_or_method"),
        (
            "agents",
            "no_such.thing:X",
            "'no_such.thing:X': there is no module 'no_such'; is its package installed, or its "
            "folder on PYTHONPATH?",
        ),
    ],
)
def test_a_wrong_name_is_told_what_is_right(kind: str, name: str, message: str) -> None:
    assert said(kind, name) == message


def test_two_packages_with_one_name_are_both_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    register(tmp_path, "apple", "judges", "fair = apple:Fair")
    register(tmp_path, "berry", "judges", "fair = berry:Fair")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    message = said("judges", "fair")
    assert "claimed by apple and berry; uninstall one" in message
    assert "apple:Fair or berry:Fair" in message
    assert plugins.names("judges")["fair"].distribution == "apple and berry"


def test_listing_imports_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path, "cherry", "agents", "broken = cherry_broken:Agent")
    (tmp_path / "cherry_broken.py").write_text("raise RuntimeError('imported')")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    listed = plugins.names("agents")
    assert listed["broken"] == plugins.Registered("cherry_broken:Agent", "cherry")
    assert list(listed) == sorted(listed)
    with pytest.raises(RuntimeError, match="imported"):  # The plug-in's own fault stays its own.
        plugins.load("agents", "broken")


def test_a_missing_requirement_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    register(tmp_path, "damson", "agents", "needy = damson_needy:Agent")
    (tmp_path / "damson_needy.py").write_text("import not_installed_anywhere")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    needs = "'needy' of selfwright.agents needs the module 'not_installed_anywhere'"
    assert said("agents", "needy").startswith(needs)
