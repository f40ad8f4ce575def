"""Episodes: every wait under a deadline, whatever goes wrong is data."""

import asyncio
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prompts import grey, png

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.core.config import Fleet
from selfwright.core.errors import PromptTooLong, TooManyFailures
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.images import STORE
from selfwright.core.play.draw import draw, starts
from selfwright.core.play.players import (
    ExpertPlayer,
    Player,
    PolicyPlayer,
    RandomPlayer,
    omissions,
    sharing,
    without,
)
from selfwright.core.play.rollout import failures_by_name, rollouts
from selfwright.core.types import (
    Action,
    Completion,
    Judged,
    Message,
    Observation,
    Parsed,
    Prompt,
    Sampling,
    Start,
    Step,
    Stop,
    Task,
    Trajectory,
    Verdict,
)
from selfwright.loop.measure import summary


@pytest.fixture(autouse=True)
def _fixtures_importable(monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])


def played(kind: str, fault: str, player: Player, count: int = 4, **fleet: Any) -> list[Trajectory]:
    settings = Fleet.model_validate({"parallel": 2, "max_failures": 1.0, **fleet})

    async def run() -> list[Trajectory]:
        opened = await open_worlds(f"faulty_worlds:{kind}", {"fault": fault}, settings)
        async with opened as worlds:
            return await rollouts(
                player, worlds, starts(await draw(worlds.tasks("train"), count, 0), 1, 0), 0
            )

    return asyncio.run(run())


@pytest.mark.parametrize("player", [ExpertPlayer(timeout_s=0.2), RandomPlayer(timeout_s=0.2)])
@pytest.mark.parametrize("kind", ["Faulty", "Together"])
def test_an_expert_that_thinks_for_ever_is_a_failed_episode(kind: str, player: Player) -> None:
    trajectories = played(kind, "pensive", player)
    assert failures_by_name(trajectories) == {"TimeoutError": 4}
    assert all("took longer than 0.2 s" in t.error for t in trajectories)
    assert all(t.stop == Stop.FAILED and not t.steps for t in trajectories)


def test_an_instance_that_cannot_be_made_is_a_failed_episode(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from faulty_worlds import Faulty  # pyright: ignore

    untyped: Any = Faulty
    monkeypatch.setattr(untyped, "made", 0)
    # The one that could be made plays on; whoever wanted another gets none.
    trajectories = played("Faulty", "two only", ExpertPlayer(), count=6)
    failed = [t for t in trajectories if t.stop == Stop.FAILED]
    assert 1 <= len(failed) < 6
    assert {t.error for t in failed} == {"RuntimeError: there were only two"}
    assert all(t.success for t in trajectories if t not in failed)


def test_too_many_failures_say_the_first() -> None:
    with pytest.raises(TooManyFailures, match=r"max_failures=0.2 .*") as caught:
        played("Faulty", "pensive", ExpertPlayer(timeout_s=0.1), max_failures=0.2)
    assert "the world's expert took longer than 0.1 s" in str(caught.value)


class Picky(Chat):
    """Takes one word for an action, and nothing else."""

    def parse(self, text: str, observation: Observation) -> Parsed:
        if len(text.split()) == 1:
            return Parsed(text)
        return Parsed("", f"Say one word, not {text!r}. You saw {observation.text!r}.")


@dataclass
class Script:
    """Says these in turn, whatever it is asked; goes on with the last one."""

    words: Sequence[str]
    checkpoint: str = "script"

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        turn = sum(message.role == "assistant" for message in prompt.messages)
        return Completion(self.words[min(turn, len(self.words) - 1)])

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        raise NotImplementedError

    async def load(self, checkpoint: Path | None) -> None: ...
    async def close(self) -> None: ...


def said(*words: str) -> PolicyPlayer:
    return PolicyPlayer(Picky(ChatConfig()), Script(words), Sampling())


def gone_on(
    name: str, player: Player, *begin: Start, seed: int = 0, origin: str = "", **fleet: Any
) -> list[Trajectory]:
    """Episodes of the world ``faulty_worlds:NAME`` from there; at its first task, if not said."""
    settings = Fleet.model_validate({"parallel": 4, "max_failures": 1.0, **fleet})

    async def run() -> list[Trajectory]:
        async with await open_worlds(f"faulty_worlds:{name}", {}, settings) as worlds:
            first = begin or (Start(await worlds.tasks("train").at(0), 5),)
            return await rollouts(player, worlds, first, seed, origin=origin)

    return asyncio.run(run())


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_what_is_no_action_is_answered_in_words_and_counts(isolation: str) -> None:
    player = said("not so", "left", "or so", "right")
    (played,) = gone_on("Faulty", player, isolation=isolation)
    opening = played.steps[0].observation
    seen = [step.observation for step in played.steps]
    # The world has met two of four actions; the picture it showed last is still what is seen.
    assert [one.text for one in seen[1:]] == [
        f"Say one word, not 'not so'. You saw {opening.text!r}.",
        "1: left",
        "Say one word, not 'or so'. You saw '1: left'.",
    ]
    assert seen[1].images == opening.images and STORE.read(opening.images[0]) == png()
    assert (played.final.text, played.success) == ("2: right", True)
    assert [(s.action.text, bool(s.action.invalid), s.reward, s.answer) for s in played.steps] == [
        ("", True, 0.0, None),
        ("left", False, 0.0, None),
        ("", True, 0.0, None),
        ("right", False, 1.0, None),
    ]
    # What was said is kept, and shown again, as it was said.
    assert played.steps[0].action.completion.text == "not so"
    assert [m.text for m in played.steps[1].action.prompt.messages][1:] == ["not so", seen[1].text]
    (never,) = gone_on("Faulty", said("so it is"), isolation=isolation)
    assert len(never.steps) == never.task.max_steps == 4 and never.stop == Stop.TRUNCATED


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_what_is_no_action_is_an_attempt_without_an_answer(isolation: str) -> None:
    (played,) = gone_on("Sum", said("I think", "five", "5"), isolation=isolation)
    assert [step.answer for step in played.steps] == ["", "", "5"]
    (played,) = gone_on("Faulty", said("left"), isolation=isolation)
    assert {step.answer for step in played.steps} == {None}


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_what_was_no_action_is_none_when_it_is_replayed(isolation: str) -> None:
    (whole,) = gone_on("Faulty", said("not so", "left", "or so", "right"), isolation=isolation)
    for cut in range(1, 4):
        start = Start(whole.task, whole.seed, 1, whole.steps[:cut], parent=whole.id)
        (again,) = gone_on("Faulty", said("a", "b b", "c", "right"), start, isolation=isolation)
        assert again.error == "" and again.steps[:cut] == whole.steps[:cut]
        assert (again.replayed, again.parent) == (cut, whole.id) and len(again.steps) == 4
        assert again.id != whole.id
        # Who acts now is shown what was said and answered then.
        told = [message.text for message in again.steps[cut].action.prompt.messages]
        assert told[1::2] == ["not so", "left", "or so"][:cut]


@pytest.mark.parametrize(
    ("change", "said_of_it"),
    [
        ({"text": "elsewhere"}, "the text 'train 0"),
        ({"images": ()}, "the images"),
        ({"images": (grey(1),)}, "the images"),
        ({"actions": ("go",)}, "the actions '()' where \"('go',)\" was before"),
        ({"actor": "me"}, "the actor '' where 'me' was before"),
    ],
)
def test_a_replay_meets_all_that_was_seen_before_or_fails(
    change: dict[str, Any], said_of_it: str
) -> None:
    (whole,) = gone_on("Faulty", said("left", "right"))
    first = whole.steps[0]
    other = replace(first, observation=replace(first.observation, **change))
    (again,) = gone_on("Faulty", said("right"), Start(whole.task, whole.seed, 0, (other,)))
    assert again.stop == Stop.FAILED and not again.steps
    assert "did not repeat itself: replaying action 1 met" in again.error
    assert said_of_it in again.error


def test_episodes_are_named_by_where_they_come_from() -> None:
    task, other = Task("a", "", 4), Task("b", "", 4)
    begin = [Start(task, 1, 0), Start(task, 1, 1), Start(task, 2, 0), Start(other, 1, 0)]
    begin += [Start(task, 1, 0), Start(task, 1, 0, parent="p")]

    def ids(**how: Any) -> list[str]:
        return [one.id for one in gone_on("Faulty", said("left"), *begin, **how)]

    first = ids(origin="run")
    assert len(set(first)) == len(begin), "also of two that begin alike"
    assert ids(origin="run", parallel=1) == ids(origin="run", isolation="process") == first
    for others in (ids(origin="run 2"), ids(origin="run", seed=1)):
        assert not set(others) & set(first) and len(set(others)) == len(begin)
    broken = played("Faulty", "pensive", ExpertPlayer(timeout_s=0.1))
    assert len({one.id for one in broken}) == 4 and "" not in {one.id for one in broken}


def test_the_prompts_of_an_episode_share_their_messages() -> None:
    agent = Picky(ChatConfig())
    for player in (said("left"), ExpertPlayer(agent), RandomPlayer(agent)):
        (whole,) = gone_on("Faulty", said("left", "so so", "left", "left"))
        begin = Start(whole.task, whole.seed, 0, whole.steps[:3])
        (again,) = gone_on("Faulty", player, begin)
        prompts = [step.action.prompt.messages for step in again.steps]
        assert [len(messages) for messages in prompts] == [1, 3, 5, 7]
        assert len({id(message) for messages in prompts for message in messages}) == 7


@dataclass
class Narrow(Script):
    """Reads so many messages at most."""

    room: int = 5

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        if len(prompt.messages) > self.room:
            raise PromptTooLong(f"{len(prompt.messages)} messages exceed {self.room}")
        return Completion("left")


LONG = Start(Task("train 0", "Say right, 0.", 11), 5)


@pytest.mark.parametrize("window", [None, 3])
def test_a_prompt_that_is_too_long_leaves_the_oldest_turns_out(window: int | None) -> None:
    player = PolicyPlayer(Chat(ChatConfig(window=window)), Narrow(()), Sampling())
    (one,) = gone_on("Faulty", player, LONG)
    prompts = [step.action.prompt.messages for step in one.steps]
    # Two turns fit. The number doubles, but one turn stays.
    wanted = [0, 0, 0, 1, 2, 4, 4, 6, 6, 8, 8] if window is None else [0] * 11
    assert [step.action.left_out for step in one.steps] == wanted
    assert max(map(len, prompts)) == 5
    for k, messages in enumerate(prompts):
        assert messages[0] == prompts[0][0]  # What was seen first may hold the task.
        assert messages[-1].text.endswith(one.steps[k].observation.text)
    if window is None:
        assert prompts[8][:3] == prompts[7]
        measured = summary([Judged(one, Verdict(None, "", "test"))])
        assert measured["rollout/left_out"] == 8 / 11


def test_what_is_too_long_by_itself_fails() -> None:
    player = PolicyPlayer(Chat(ChatConfig()), Narrow((), room=0), Sampling())
    (one,) = gone_on("Faulty", player, LONG)
    assert one.stop == Stop.FAILED and one.error.startswith("PromptTooLong: 1 messages exceed 0")
    narrow = PolicyPlayer(Chat(ChatConfig()), Narrow((), room=2), Sampling())
    (one,) = gone_on("Faulty", narrow, LONG)
    # One turn stays, as there was an answer to be shown: three messages.
    assert len(one.steps) == 1 and one.error.startswith("PromptTooLong: 3 messages exceed 2")


places = st.lists(st.integers(1, 3), max_size=12)


@given(places, st.integers(0, 9))
def test_what_is_left_out_doubles_and_spares_one_turn(actions: list[int], before: int) -> None:
    steps = [
        Step(Observation(f"{k} {place}"), Action("x", Completion("x"), place=place), 0.0)
        for k, count in enumerate(actions)
        for place in range(count)
    ]
    most = max(0, len(actions) - 1)
    if steps:
        asked = next(k for k in reversed(range(len(steps))) if not steps[k].action.place)
        said = replace(steps[asked].action, left_out=min(before, most))
        steps[asked] = replace(steps[asked], action=said)
    counts = list(omissions(steps))
    assert counts[0] == min(before, most if steps else 0) and counts[-1] == most
    assert all(b in (max(1, 2 * a), most) and b > a for a, b in pairwise(counts))
    for count in counts:
        kept = without(steps, count)
        assert sum(not step.action.place for step in kept) == len(actions) - count
        assert [step.observation for step in kept[:1]] == [step.observation for step in steps[:1]]
        assert [s.action for s in kept] == [s.action for s in steps[len(steps) - len(kept) :]]


messages = st.lists(
    st.builds(
        Message,
        st.sampled_from(["user", "assistant"]),
        st.lists(st.sampled_from(["a", "b", grey(1)]), max_size=2).map(tuple),
        st.sampled_from([(), (1,)]),
    ),
    max_size=5,
)


@given(messages, messages, messages)
def test_sharing_changes_nothing_but_whose_messages_they_are(
    common: list[Message], old: list[Message], new: list[Message]
) -> None:
    before = Prompt((*common, *old))
    now = Prompt((*map(copied, common), *new))
    step = Step(Observation("o"), Action("x", Completion("x"), before), 0.0)
    shared = sharing(now, [step])
    assert shared == now and sharing(now, []) is now
    for mine, theirs in zip(shared.messages[: len(common)], before.messages, strict=False):
        assert mine is theirs


def copied(message: Message) -> Message:
    return replace(message)
