"""Recipes are strict; every fault is found at once and said with its place and a remedy."""

import json
from pathlib import Path
from typing import Literal

import pytest
import yaml
from pydantic import Field, model_validator

from selfwright.core import recipe as recipes
from selfwright.core import strict_yaml
from selfwright.core.config import Config, JudgeConfig, PolicyConfig
from selfwright.core.errors import PluginError, RecipeError
from selfwright.core.recipe import Recipe, differences, read, section
from selfwright.core.sections import DEFAULTS


class Inner(Config):
    kl: float = 0.1
    clip: tuple[float, float] | None = None


class WorldConfig(Config):
    size: int = Field(default=3, ge=1, le=9)
    mode: Literal["easy", "hard"] = "easy"
    cap: int | Literal["auto"] = "auto"
    names: tuple[str, ...] = ()
    inner: Inner = Inner()
    listed: bool = False
    rate: float = 0.1

    @model_validator(mode="after")
    def _hard_enough(self) -> "WorldConfig":
        if self.size == 9 and self.mode == "easy":
            raise ValueError("size 9 needs mode: hard")
        return self


class World:
    Config = WorldConfig

    def __init__(self, config: WorldConfig, *more: int) -> None:
        self.config, self.more = config, more


class ModelConfig(PolicyConfig):
    path: Path = Path("here")


class Player:
    Config = ModelConfig


class SlowConfig(Config):
    tau: float = 0.5
    retries: int = 4


class Slow:
    Config = SlowConfig


class QuickConfig(Config):
    retries: int = 1


class Quick:
    Config = QuickConfig


class Critic:
    Config = JudgeConfig


class Shapeless:
    """Has no Config."""


GOOD = f"""\
# A recipe for these tests.
environment:
  use: {__name__}:World
  parallel: 8
  size: 4
policy: {{use: "{__name__}:Player", model: tiny}}
agent: {{use: chat}}
judge: {{use: "{__name__}:Critic"}}
trainer:
  use: {__name__}:Slow
  tau: 1e-5
learner: {{use: "{__name__}:Quick"}}
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = Path("mine.yaml")
    path.write_text(GOOD)
    return path


def faults(text: str, *overrides: str) -> list[str]:
    """What is said of ``text`` as a recipe, without the name of this module."""
    Path("mine.yaml").write_text(text)
    with pytest.raises(RecipeError) as caught:
        read("mine.yaml", overrides)
    return str(caught.value).replace(__name__, "here").splitlines()


def test_a_good_recipe(file: Path) -> None:
    recipe = read(file)
    assert (recipe.name, recipe.seed, recipe.iterations) == ("mine", 0, 10)
    assert recipe.fleet.parallel == 8
    assert recipe.environment.plugin is World
    assert recipe.environment.config == WorldConfig.model_validate({"size": 4})
    assert recipe.phases[0].trainer.config == SlowConfig.model_validate({"tau": 1e-5})
    assert recipe.evaluation.tasks == 400
    assert recipe.notes == ()
    assert recipe.environment.make(5, 6).more == (5, 6)


def test_a_dump_is_itself_a_recipe(file: Path) -> None:
    before = read(file)
    dump = before.dump()
    assert dump["environment"]["size"] == 4
    assert dump["environment"]["step_timeout_s"] == 30.0
    assert dump["policy"] == {
        "use": f"{__name__}:Player",
        **PolicyConfig(model="tiny").model_dump(),
        "path": "here",
    }
    assert json.loads(json.dumps(dump)) == dump
    file.write_text(yaml.safe_dump(dump))
    after = read(file)
    assert after == before
    assert after.dump() == dump


def test_sections_left_out_use_what_is_usual() -> None:
    assert DEFAULTS == {
        "agent": "chat",
        "policy": "transformers",
        "judge": "reward",
        "learner": "plain",
    }


def test_overrides(file: Path) -> None:
    recipe = read(
        file,
        [
            "trainer.tau=2e-3",
            "environment.parallel=2",
            "environment.inner.clip=[0.1, 0.2]",
            "environment.cap=5",
            "evaluation.split=validation",
            "seed=7",
            "seed=8",
        ],
    )
    assert recipe.phases[0].trainer.config == SlowConfig.model_validate({"tau": 2e-3})
    assert recipe.fleet.parallel == 2
    config = recipe.environment.config
    assert isinstance(config, WorldConfig)
    assert (config.inner.clip, config.cap, config.size) == ((0.1, 0.2), 5, 4)
    assert (recipe.seed, recipe.evaluation.split) == (8, "validation")


def test_another_plug_in_leaves_out_the_keys_it_does_not_have(file: Path) -> None:
    use = f"trainer.use={__name__}:Quick"
    recipe = read(file, ["trainer.retries=3", use])  # The order does not matter.
    assert recipe.phases[0].trainer.config == QuickConfig.model_validate({"retries": 3})
    name = f"{__name__}:Quick"
    left_out = f"left out trainer.tau (mine.yaml:11), which {name!r} does not have"
    assert recipe.notes == (f"-o {use}: {left_out}",)
    assert read(file, [f"trainer.use={__name__}:Slow"]).notes == ()


def test_another_plug_in_does_not_excuse_a_misspelling(file: Path) -> None:
    text = GOOD.replace("tau: 1e-5", "tua: 1e-5")
    said = faults(text, f"trainer.use={__name__}:Quick")
    assert said == ["mine.yaml:11: trainer.tua: unknown key; known: retries, use"]


def test_an_override_can_replace_a_section(file: Path) -> None:
    recipe = read(file, [f'trainer={{use: "{__name__}:Quick", retries: 2}}'])
    assert recipe.phases[0].trainer.config == QuickConfig.model_validate({"retries": 2})


# What stands in place of a line of GOOD, and what is said about it.
BAD: list[tuple[str, str, list[str]]] = [
    ("agent", "agnet: {use: chat}", [":7: agnet: unknown key; did you mean 'agent'?"]),
    (
        "  size",
        "  sise: 4",
        [":5: environment.sise: unknown key; did you mean 'size'?"],
    ),
    (
        "  parallel",
        "  paralel: 4",
        [":4: environment.paralel: unknown key; did you mean 'parallel'?"],
    ),
    (
        "  size",
        "  size: four",
        [":5: environment.size: wanted a whole number, got the text 'four'"],
    ),
    ("  size", "  size: 4.5", [":5: environment.size: wanted a whole number, got 4.5"]),
    ("  size", "  size: true", [":5: environment.size: wanted a whole number, got true"]),
    ("  size", "  size:", [":5: environment.size: wanted a whole number, got nothing (null)"]),
    ("  size", "  size: [4]", [":5: environment.size: wanted a whole number, got a list"]),
    ("  size", "  size: 12", [":5: environment.size: wanted at most 9, got 12"]),
    ("  size", "  size: 9", [":2: environment: size 9 needs mode: hard"]),
    (
        "  size",
        "  size: 1_0",
        [
            ":5: environment.size: wanted a whole number, got the text '1_0'; write it plainly, "
            "without quotes or underscores"
        ],
    ),
    ("  size", "  size: 1e999", [":5: environment.size: 1e999 is too large a number"]),
    (
        "  size",
        "  rate: .nan",
        [":5: environment.rate: wanted a number, got the text '.nan'"],
    ),
    (
        "  size",
        "  listed: yes",
        [":5: environment.listed: wanted true or false, got the text 'yes'; write true"],
    ),
    (
        "  size",
        "  mode: esay",
        [
            ":5: environment.mode: wanted 'easy' or 'hard', got the text 'esay'; "
            "did you mean 'easy'?"
        ],
    ),
    (
        "  size",
        "  cap: soon",
        [":5: environment.cap: wanted a whole number or 'auto', got the text 'soon'"],
    ),
    (
        "  size",
        "  names: one",
        [":5: environment.names: wanted a list, got the text 'one'; write [...] even for one item"],
    ),
    (
        "  size",
        "  names: [one, 2]",
        [":5: environment.names.1: wanted text, got 2; put it in quotes"],
    ),
    (
        "  size",
        "  inner:\n    kll: 1\n    clip: [1, x]",
        [
            ":6: environment.inner.kll: unknown key; did you mean 'kl'?",
            ":7: environment.inner.clip.1: wanted a number, got the text 'x'",
        ],
    ),
    (
        "  size",
        "  size: 1\n  size: 2",
        [":6: environment.size: given twice, first on line 5; keep one of them"],
    ),
    (
        "policy",
        'policy: {use: "here:Player"}',
        [":6: policy.model: missing; it has no default, give text"],
    ),
    (
        "agent",
        "agent: chat",
        [
            ":7: agent: wanted a mapping {use: NAME, ...}, got the text 'chat'; "
            "did you mean agent: {use: chat}?"
        ],
    ),
    ("agent", "agent:", [":7: agent: wanted a mapping {use: NAME, ...}, got nothing (null)"]),
    (
        "agent",
        "agent: {use: caht}",
        [":7: agent.use: no entry 'caht' in selfwright.agents; did you mean 'chat'?"],
    ),
    ("agent", "agent: {use: 3}", [":7: agent: got 3 for use: agent: {use: NAME, ...}"]),
    (
        "agent",
        'agent: {use: "here:Shapeless"}',
        [
            ":7: agent.use: here:Shapeless lacks a nested class Config that derives from "
            "core.config.Config"
        ],
    ),
    ("agent", "seed: -1", [":7: seed: wanted at least 0, got -1"]),
    ("agent", "seed: '1'", [":7: seed: wanted a whole number, got the text '1'"]),
    ("agent", "1: 2", [":7: keys are text, got 1; put it in quotes"]),
    ("agent", "evaluation: {tasks: 0}", [":7: evaluation.tasks: wanted at least 1, got 0"]),
]


@pytest.mark.parametrize(("old", "new", "said"), BAD, ids=[new for _, new, _ in BAD])
@pytest.mark.usefixtures("file")
def test_a_fault_is_said_with_its_place(old: str, new: str, said: list[str]) -> None:
    lines = GOOD.splitlines()
    (index,) = (i for i, line in enumerate(lines) if line.startswith(old))
    lines[index] = new.replace("here:", f"{__name__}:")
    for expected, line in zip(said, faults("\n".join(lines)), strict=True):
        assert line.startswith("mine.yaml" + expected)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "mine.yaml:1: a recipe is a mapping with the keys environment, agent, policy,"),
        ("# nothing", "mine.yaml:1: a recipe is a mapping"),
        ("- a\n- b", "mine.yaml:1: a recipe is a mapping"),
        ("rise", "mine.yaml:1: a recipe is a mapping"),
        ("a: 1\nb: [1, 2\nc: 3", "mine.yaml:3: not valid YAML: while parsing a flow sequence"),
        ("a: b: c", "mine.yaml:1: not valid YAML: mapping values are not allowed here"),
        ("a: 1\n\tb: 2", "mine.yaml:2: not valid YAML: "),
        ("a: 1\nb: \x07", "mine.yaml:2: not valid YAML: special characters are not allowed"),
        ("a: 1\n---\nb: 2", "mine.yaml:2: not valid YAML: expected a single document"),
        ("a: &x 1\nb: *x", "mine.yaml:1: not valid YAML: anchors and aliases are not supported"),
        ("a: !!python/name:os.system", "mine.yaml:1: not valid YAML: the tag"),
        ("a: " + "[" * 5000, "mine.yaml:1: nested too deeply"),
    ],
)
@pytest.mark.usefixtures("file")
def test_what_is_no_mapping_is_one_fault(text: str, said: str) -> None:
    (line,) = faults(text)
    assert line.startswith(said)


@pytest.mark.usefixtures("file")
def test_all_faults_come_at_once_in_the_order_of_the_file() -> None:
    text = GOOD.replace("size: 4", "size: 40").replace("chat", "caht").replace("tau", "tua")
    text += "sede: 1\nagent: {}\n"
    places = [line.split(" ")[0] for line in faults(text, "oops", "trainer.tau=x")]
    assert places == [*(f"mine.yaml:{n}:" for n in (5, 7, 11, 13, 14)), "-o", "-o"]


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("trainer.use", "wanted key.path=value, such as trainer.use=rise, got 'trainer.use'"),
        ("=3", "wanted key.path=value"),
        ("trainer..tau=3", "wanted key.path=value"),
        ("trainer .tau=3", "wanted key.path=value"),
        ("trainer.tau=[1", "trainer.tau: not valid YAML: "),
        ("trainer.tau=@", "trainer.tau: not valid YAML: "),
        ("trainer.tau=x", "trainer.tau: wanted a number, got the text 'x'"),
        ("trainer.tau=", "trainer.tau: wanted a number, got nothing (null)"),
        ("trainer.tua=1", "trainer.tua: unknown key; did you mean 'tau'?"),
        ("trainr.tau=1", "trainr: unknown key; did you mean 'trainer'?"),
        ("trainer.tau.x=1", "trainer.tau.x: trainer.tau is 1e-05, not a mapping"),
        ("trainer=rise", "trainer: wanted a mapping {use: NAME, ...}, got the text 'rise'; did "),
        ("trainer.use=ries", "trainer.use: no entry 'ries' in selfwright.trainers; did you mean"),
        ("iterations=0", "iterations: wanted at least 1, got 0"),
        ("environment.parallel=0", "environment.parallel: wanted at least 1, got 0"),
        ("environment.size=1.5", "environment.size: wanted a whole number, got 1.5"),
    ],
)
@pytest.mark.usefixtures("file")
def test_a_bad_override_is_named_as_it_was_typed(override: str, said: str) -> None:
    (line,) = faults(GOOD, override)
    assert line.startswith(f"-o {override}: {said}")


@pytest.mark.usefixtures("file")
def test_files_that_are_none() -> None:
    def said(path: str) -> str:
        with pytest.raises(RecipeError) as caught:
            read(path)
        return str(caught.value)

    Path("folder").mkdir()
    assert said("folder") == "folder: is a folder; a recipe is a YAML file"
    assert said("nowhere.yaml").startswith("nowhere.yaml: no such file, nor a recipe that comes")
    Path("latin.yaml").write_bytes(b"a: 1\nb: \xe9\n")
    assert said("latin.yaml") == "latin.yaml:2: not UTF-8 text: byte 0xe9; save it as UTF-8"
    Path("utf16.yaml").write_text(GOOD, encoding="utf-16")
    assert said("utf16.yaml").startswith("utf16.yaml:1: not UTF-8 text")


def test_a_byte_order_mark_is_no_fault(file: Path) -> None:
    file.write_text(GOOD, encoding="utf-8-sig")
    assert read(file).fleet.parallel == 8


def test_scalars_are_those_of_yaml_1_2() -> None:
    document = strict_yaml.parse(
        "[1e-5, 1E3, .5, 5., -0, 010, 0x1f, 0o17, no, on, Yes, True, null, ~, 1:30, 2026-01-01,"
        " 1_000, =, <<, 'true']"
    )
    assert not document.faults
    assert document.value == [
        *(1e-5, 1e3, 0.5, 5.0, 0, 10, 31, 15, "no", "on", "Yes", True, None, None),
        *("1:30", "2026-01-01", "1_000", "=", "<<", "true"),
    ]
    assert isinstance(document.value[0], float)


def test_a_section_alone() -> None:
    world, fleet = section(
        "environment", f"{__name__}:World", ["environment.size=2", "environment.parallel=3"]
    )
    assert world.config == WorldConfig.model_validate({"size": 2})
    assert fleet.parallel == 3
    kept, _ = section("environment", f"{__name__}:World", (), world.dump())
    assert kept == world
    with pytest.raises(PluginError, match="did you mean 'countdown'"):
        section("environment", "countdwn")
    with pytest.raises(RecipeError) as caught:
        wrong = ["trainer.tau=1", "environment.size=x", "environment.use=y", "environment"]
        section("environment", f"{__name__}:World", wrong, {"sise": 3})
    assert str(caught.value).splitlines() == [
        "settings: environment.sise: unknown key; did you mean 'size'?",
        "-o environment.size=x: environment.size: wanted a whole number, got the text 'x'",
        "-o environment: environment: only environment.KEY=VALUE can be set here",
        "-o environment.use=y: environment.use: only environment.KEY=VALUE can be set here",
        "-o trainer.tau=1: trainer.tau: only environment.KEY=VALUE can be set here",
    ]


def test_differences_name_each_key_with_both_values(file: Path) -> None:
    before = read(file).dump()
    assert differences(before, before) == []
    after = read(file, ["environment.size=5", "environment.inner.kl=0.2", "seed=1"]).dump()
    del after["policy"]["path"]
    assert differences(before, after) == [
        "seed: 0 -> 1",
        "environment.size: 4 -> 5",
        "environment.inner.kl: 0.1 -> 0.2",
        'policy.path: "here" -> absent',
    ]


@pytest.mark.parametrize("name", recipes.shipped())
def test_every_shipped_recipe_loads_and_is_short(name: str) -> None:
    recipe: Recipe = read(name)
    assert recipe.name == Path(name).name
    assert recipe.notes == ()
    text = recipes.shipped()[name].read_text()
    assert text.startswith("# "), "opens with a comment that says what it does"
    assert len(text.splitlines()) < 40
    assert "\nseed: " in text or "\nextends: " in text


PHASED = (
    GOOD.replace(f"trainer:\n  use: {__name__}:Slow\n  tau: 1e-5\n", "")
    + f"""\
phases:
  - trainer: {{use: "{__name__}:Slow", tau: 0.5}}
    iterations: 2
  - trainer: {{use: "{__name__}:Quick"}}
    judge: {{use: reward}}
    iterations: 3
"""
)


@pytest.mark.usefixtures("file")
def test_phases_follow_one_another() -> None:
    Path("mine.yaml").write_text(PHASED)
    recipe = read("mine.yaml", ["phases.1.iterations=4", "phases.0.trainer.tau=0.25"])
    use = f"phases.0.trainer.use={__name__}:Quick"
    (note,) = read("mine.yaml", [use]).notes
    assert "left out phases.0.trainer.tau (mine.yaml:11), which" in note
    first, second = recipe.phases
    assert (first.iterations, second.iterations, recipe.iterations) == (2, 4, 6)
    assert first.trainer.config == SlowConfig.model_validate({"tau": 0.25})
    assert first.judge is recipe.judge and second.judge.use == "reward"
    dump = recipe.dump()
    assert "trainer" not in dump and [p["iterations"] for p in dump["phases"]] == [2, 4]
    Path("again.yaml").write_text(json.dumps(dump))
    assert read("again.yaml").dump() == dump


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("tau: 0.5", "tua: 0.5", "mine.yaml:11: phases.0.trainer.tua: unknown key; did you mean"),
        ("iterations: 3", "iterations: 0", "mine.yaml:15: phases.1.iterations: wanted at least 1"),
        ("judge: {use: reward}", "judge: {use: rewrd}", "mine.yaml:14: phases.1.judge.use: no en"),
        ("iterations: 2", "seed: 2", "mine.yaml:12: phases.0.seed: unknown key; "),
        ("phases:\n", "iterations: 9\nphases:\n", "mine.yaml:10: iterations: stands in each of th"),
        (':Quick"}\n    judge', ':Quix"}\n    judge', "mine.yaml:13: phases.1.trainer.use: "),
        (f'trainer: {{use: "{__name__}:Quick"}}\n    ', "", "mine.yaml:13: phases.1: trainer is m"),
        (PHASED[PHASED.index("phases:") :], "phases: 3", "mine.yaml:10: phases: wanted a list of"),
        (PHASED[PHASED.index("phases:") :], "phases: []", "mine.yaml:10: phases: wanted a list"),
        (PHASED[PHASED.index("phases:") :], "phases: [3]", "mine.yaml:10: phases.0: wanted {tra"),
    ],
)
@pytest.mark.usefixtures("file")
def test_what_is_wrong_in_a_phase_is_said_with_its_place(old: str, new: str, said: str) -> None:
    assert old in PHASED
    (line,) = faults(PHASED.replace(old, new, 1))
    assert line.startswith(said)


def test_a_recipe_extends_another(file: Path) -> None:
    Path("more").mkdir()
    # Beside it, or shipped, or from here; what it says itself goes first.
    Path("more/own.yaml").write_text(
        f"extends: ../mine.yaml\nseed: 4\nenvironment: {{size: 2}}\nlearner: {{retries: 7}}\n"
        f'trainer: {{use: "{__name__}:Quick"}}\n'
    )
    recipe, base = read("more/own.yaml"), read(file)
    assert (recipe.name, recipe.seed, recipe.fleet.parallel) == ("own", 4, 8)
    assert recipe.environment.config == WorldConfig.model_validate({"size": 2})
    assert recipe.learner.config == QuickConfig.model_validate({"retries": 7})
    # Another plug-in's keys stay behind.
    assert recipe.phases[0].trainer.config == QuickConfig()
    assert recipe.policy == base.policy
    Path("phased.yaml").write_text("extends: mine.yaml\n" + PHASED[PHASED.index("phases:") :])
    assert len(read("phased.yaml").phases) == 2
    Path("plain.yaml").write_text(f'extends: phased.yaml\ntrainer: {{use: "{__name__}:Slow"}}\n')
    assert read("plain.yaml").phases[0].trainer.config == SlowConfig()
    # How long is said by each phase; who says it once must say by which trainer.
    Path("longer.yaml").write_text("extends: phased.yaml\niterations: 3\n")
    with pytest.raises(RecipeError, match="iterations: stands in each of the phases"):
        read("longer.yaml")
    assert read("plain.yaml").iterations == 10


@pytest.mark.usefixtures("file")
def test_one_phase_keeps_its_judge() -> None:
    text = (
        PHASED[: PHASED.index("phases:")]
        + """\
phases:
  - trainer: {use: grpo}
    judge: {use: majority}
"""
    )
    Path("mine.yaml").write_text(text)
    dump = read("mine.yaml").dump()
    assert dump["phases"][0]["judge"]["use"] == "majority" and dump["judge"]["use"] != "majority"


@pytest.mark.usefixtures("file")
def test_what_is_wrong_with_extending() -> None:
    (line,) = faults(GOOD, "extends=quickstart")
    assert line.endswith("extends: is for files; name that recipe in place of this one")
    assert faults("extends: 3\n" + GOOD) == [
        "mine.yaml:1: extends: wanted a recipe's name or file, got 3"
    ]
    (line,) = faults("extends: quikstart\n" + GOOD)
    assert line.startswith("mine.yaml:1: extends: quikstart: no such file") and "quickstart" in line
    (line,) = faults("extends: mine.yaml\n" + GOOD)
    assert line == "mine.yaml:1: extends: mine.yaml extends this recipe again: a circle"
    Path("base.yaml").write_text(GOOD.replace("tau", "tua"))
    (line,) = faults("extends: base.yaml\nseed: 3\n")
    assert line.startswith("base.yaml:11: trainer.tua: unknown key; did you mean 'tau'?")


OTHERS = f"""
policies:
  big: {{use: "{__name__}:Player", model: large}}
"""


@pytest.mark.usefixtures("file")
def test_other_policies_have_names() -> None:
    Path("mine.yaml").write_text(GOOD + OTHERS)
    recipe = read("mine.yaml", ["policies.big.max_tokens=7"])
    assert recipe.policies["big"].plugin is Player
    assert recipe.policies["big"].config == ModelConfig(model="large", max_tokens=7)
    dump = recipe.dump()
    Path("again.yaml").write_text(json.dumps(dump))
    assert read("again.yaml").dump() == dump


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("big:", "expert:", "mine.yaml:15: policies.expert: expert has a meaning already"),
        (", model: large", "", "mine.yaml:15: policies.big.model: missing"),
        ("model: large", "model: 'scratch:8x1'", "mine.yaml:15: policies.big: only the policy in"),
        ("model: large", "model: large, modle: x", "mine.yaml:15: policies.big.modle: unknown"),
        (OTHERS, "\npolicies: big\n", "mine.yaml:14: policies: wanted a mapping {NAME: {use"),
        (OTHERS, "\npolicies: {big: 3}\n", "mine.yaml:14: policies.big: wanted a mapping {use"),
    ],
)
@pytest.mark.usefixtures("file")
def test_what_is_wrong_with_other_policies(old: str, new: str, said: str) -> None:
    assert old in OTHERS
    first, *_ = faults(GOOD + OTHERS.replace(old, new, 1))
    assert first.startswith(said)
