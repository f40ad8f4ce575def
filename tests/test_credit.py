"""Steps to examples: what was sampled from is learned from, and nobody makes it up; and configs."""

from dataclasses import replace

import pytest
from components import AGENT, episode

from selfwright.core import plugins
from selfwright.core.config import Config
from selfwright.core.errors import LearnerError
from selfwright.core.types import Prompt, Trajectory
from selfwright.trainers.learning.examples import asked, imitate, prompted, reinforce
from selfwright.trainers.parts.feedback import asking_more

PLAYED = episode(1.0, ("o", "a"), ("p", "b"), ("q", "c"), replayed=1).trajectory


def without(trajectory: Trajectory, *turns: int) -> Trajectory:
    """As a version stored it that kept no prompts."""
    steps = list(trajectory.steps)
    for turn in turns:
        steps[turn] = replace(steps[turn], action=replace(steps[turn].action, prompt=Prompt()))
    return replace(trajectory, id="old", steps=tuple(steps))


def test_the_prompt_of_an_example_is_the_one_that_was_sampled_from() -> None:
    """Also where the agent would make another one of it today."""
    other = asking_more(PLAYED.steps[2].action.prompt, "and be quick")
    last = replace(PLAYED.steps[2], action=replace(PLAYED.steps[2].action, prompt=other))
    changed = replace(PLAYED, steps=(*PLAYED.steps[:2], last))
    for examples in (imitate(changed), reinforce(changed, [0.5, -0.5])):
        assert [one.prompt for one in examples] == [PLAYED.steps[1].action.prompt, other]
    assert [one.completion.text for one in imitate(changed)] == ["b", "c"]
    assert [one.advantage for one in reinforce(changed, [0.5, -0.5])] == [0.5, -0.5]


def test_what_holds_no_prompt_is_refused_by_name() -> None:
    old, said = without(PLAYED, 2), r"the episode 'old' of 't' holds no prompts"
    with pytest.raises(LearnerError, match=said):
        imitate(old)
    with pytest.raises(LearnerError, match=said):
        reinforce(old, [1.0, 1.0])
    with pytest.raises(LearnerError, match=said):
        asked(old, 2)
    assert asked(old, 1) == PLAYED.steps[1].action.prompt


def test_only_what_is_missing_is_made_by_the_agent_of_today() -> None:
    assert prompted(without(PLAYED, 0, 1, 2), AGENT).steps == PLAYED.steps
    other = asking_more(PLAYED.steps[1].action.prompt, "and be quick")
    kept = replace(PLAYED.steps[1], action=replace(PLAYED.steps[1].action, prompt=other))
    mixed = without(replace(PLAYED, steps=(PLAYED.steps[0], kept, PLAYED.steps[2])), 0, 2)
    made = prompted(mixed, AGENT)
    assert made.steps == (PLAYED.steps[0], kept, PLAYED.steps[2]) and made.id == "old"


def ours(one: type) -> list[type]:
    """Itself and what it inherits from, as far as it is of this package, without ``Config``."""
    mine = [other for other in one.__mro__ if other.__module__.startswith("selfwright.")]
    return [other for other in mine if other is not Config]


@pytest.mark.parametrize("kind", ["trainers", "learners", "judges"])
def test_methods_and_their_configs_inherit_once(kind: str) -> None:
    for name, entry in plugins.names(kind).items():
        if entry.target.startswith("selfwright."):
            plugin = plugins.load(kind, name)
            assert len(ours(plugin)) <= 2, name
            configs = [plugin.Config]
            for config in configs:
                assert len(ours(config)) <= 2, f"{name}: {config}"
                # Groups of keys are fields, and configs, too.
                for field in config.model_fields.values():
                    if isinstance(field.default, Config):
                        configs.append(type(field.default))
