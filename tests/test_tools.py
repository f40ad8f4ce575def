"""The agent that calls functions: what it reads, says, refuses; the forms of calls; the wire."""

import asyncio
import json
import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfwright.agents.calls import Form, call_text, calls_grammar, read_calls
from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.agents.tools import Tools, ToolsConfig
from selfwright.agents.wire import as_text, calls_in, calls_out, with_calls
from selfwright.core.actions import Call
from selfwright.core.config import Fleet, Shot, Turn
from selfwright.core.files import canonical_json
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.models.constraints import Constraints
from selfwright.core.play.draw import draw, starts
from selfwright.core.play.players import ExpertPlayer, PolicyPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.protocols import Briefing
from selfwright.core.store.trajectories import read_trajectories
from selfwright.core.store.writing import write_trajectories
from selfwright.core.types import (
    Action,
    Completion,
    Constraint,
    Judged,
    Message,
    Observation,
    Prompt,
    Sampling,
    Start,
    Step,
    Task,
    Tool,
    Trajectory,
    Verdict,
)
from selfwright.environments.countdown import TOOL
from selfwright.trainers.learning.examples import imitate, reinforce
from selfwright.trainers.parts.advantage import followed, own_turns
from selfwright.trainers.parts.feedback import Item
from selfwright.trainers.parts.lessons import Lesson, texts
from selfwright.trainers.parts.replay import returns

TASK, HERE = Task("t", "Make 7 from 3 4.", 3), Observation("")
FORMS: tuple[Form, ...] = ("hermes", "json", "mistral")
CALL = Call("answer", {"expression": "3+4"})
MOVE = Tool(
    "move",
    "Go.",
    canonical_json(
        {
            "type": "object",
            "properties": {"to": {"type": "string"}, "steps": {"type": "integer"}},
            "required": ["to"],
            "additionalProperties": False,
        }
    ),
)


def agent_of(*tools: Tool, **keys: Any) -> Tools:
    return Tools(Tools.briefed(ToolsConfig.model_validate(keys), Briefing(tools, ())))


SAID = {
    "hermes": '<tool_call>\n{"name": "answer", "arguments": {"expression": "3+4"}}\n</tool_call>',
    "after words": "I try.\n"
    '<tool_call>{"name":"answer","arguments":{"expression":"3+4"}}</tool_call>',
    "after thoughts": '<think>{"name": "no", "arguments": {}}</think>\n'
    '<tool_call>\n{"name": "answer", "arguments": {"expression": "3+4"}}\n</tool_call>',
    "llama 3": '{"name": "answer", "parameters": {"expression": "3+4"}}',
    "llama 3.1": '{"type": "function", "name": "answer", "parameters": {"expression": "3+4"}}',
    "mistral": '[TOOL_CALLS] [{"name": "answer", "arguments": {"expression": "3+4"}}]',
    "mistral, its token unseen": ' [{"name": "answer", "arguments": {"expression": "3+4"}}]',
    "smollm": '<tool_call>[{"name": "answer", "arguments": {"expression": "3+4"}}]</tool_call>',
    "gemma": '```tool_code\nanswer(expression="3+4")\n```',
    "llama 3.2": '[answer(expression="3+4")]',
    "deepseek": 'functionanswer\n```json\n{"expression": "3+4"}\n```',
    "gpt-oss": 'commentary to=functions.answer json{"expression": "3+4"}',
    "openai": '{"function": {"name": "answer", "arguments": "{\\"expression\\": \\"3+4\\"}"}}',
}


@pytest.mark.parametrize("text", SAID.values(), ids=SAID)
def test_a_call_is_read_in_every_common_form(text: str) -> None:
    assert read_calls(text, ["answer"]) == [CALL]
    parsed = agent_of(TOOL).parse(text, HERE)
    assert (parsed.action, parsed.invalid) == ("3+4", "")


@pytest.mark.parametrize(
    ("text", "invalid"),
    [
        ("3+4", "No call: call answer."),
        ("", "No call: call answer."),
        ('<tool_call>{"name": "answer"}</tool_call>', "No call: call answer."),
        ('{"name": "answer", "arguments": {"expression": "3+4"}', "No call: call answer."),
        ('{"name": "reply", "arguments": {}}', "There is no 'reply': call answer."),
        ('{"name": "answer", "arguments": {}}', "answer: 'expression' is a required property"),
        ('{"name": "answer", "arguments": {"expression": 7}}', "answer: expression: 7 is not of"),
        ('{"name": "answer", "arguments": {"expression": "seven"}}', "answer: expression: 'seven'"),
        (f"<think>{SAID['hermes']}", "The thought did not end."),
        (SAID["hermes"] + SAID["hermes"], "2 calls at once: make one a turn."),
        ("{" * 3000, "No call: call answer."),
        ("answer(" * 3000, "No call: call answer."),
    ],
)
def test_anything_else_is_no_action_and_the_model_is_told_why(text: str, invalid: str) -> None:
    parsed = agent_of(TOOL).parse(text, HERE)
    assert parsed.action == "" and parsed.invalid.startswith(invalid)


def test_the_first_of_several_may_be_played() -> None:
    text = SAID["hermes"] + SAID["hermes"].replace("3+4", "4+3")
    assert agent_of(TOOL, several="first").parse(text, HERE).action == "3+4"


@dataclass
class Says:
    """Says these in turn, one each time it is asked; remembers how often it was."""

    words: Sequence[str]
    asked: int = 0
    checkpoint: str = "says"

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        self.asked += 1
        return Completion(self.words[self.asked - 1])

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        raise NotImplementedError

    async def load(self, checkpoint: Path | None) -> None: ...
    async def close(self) -> None: ...


def in_countdown(
    agent: Tools, answers: Sequence[str], turns: int | None = None
) -> tuple[Says, Trajectory]:
    """An episode of six attempts at making 99 of 3, 4 and 5, which cannot be done."""
    policy = Says(answers)

    async def played() -> Trajectory:
        fleet = Fleet(parallel=1, isolation="inline")
        async with await open_worlds("countdown", {"attempts": 6}, fleet) as worlds:
            task = await worlds.tasks("train").at(0)
            player = PolicyPlayer(agent, policy, Sampling())
            (one,) = await rollouts(player, worlds, [Start(task, 0, turns=turns)], 0)
            return one

    return policy, asyncio.run(played())


def several(*expressions: str) -> str:
    return as_text("", [Call("answer", {"expression": one}) for one in expressions])


def test_several_calls_are_played_in_order_a_step_each() -> None:
    agent = agent_of(TOOL, several="in_order")
    policy, one = in_countdown(agent, [several("1+1", "2+2"), several("3+3"), several(*"4567")])
    assert [step.action.text for step in one.steps] == ["1+1", "2+2", "3+3", *"456"]
    assert [step.action.place for step in one.steps] == [0, 1, 0, 0, 1, 2]
    assert policy.asked == 3 and one.answers == one.turns == (0, 2, 3)
    # Its results follow one another, and nobody was asked between them.
    prompt = one.steps[2].action.prompt
    assert [m.role for m in prompt.messages] == ["user", "assistant", "tool", "tool"]
    assert [m.text for m in prompt.messages[2:]] == [s.observation.text for s in one.steps[1:3]]
    assert one.steps[1].action == Action("2+2", Completion(""), place=1)
    # An answer is learned once, whatever it holds.
    assert [e.completion.text for e in imitate(one)] == policy.words
    assert [e.advantage for e in reinforce(one, [1.0, 2.0, 3.0])] == [1.0, 2.0, 3.0]
    assert [turn for turn, _ in own_turns(Judged(one, Verdict(0.0, "", "test")))] == [0, 2, 3]
    with TemporaryDirectory() as room:
        judged = [Judged(one, Verdict(0.0, "", "test"))]
        write_trajectories(Path(room), judged, Path(room, "images"))
        assert read_trajectories(Path(room))[0].trajectory.steps == one.steps


def test_an_answer_of_several_actions_is_one_turn_to_whoever_learns() -> None:
    agent = agent_of(TOOL, several="in_order")
    _, one = in_countdown(agent, [several("1+1", "2+2"), several("3+3"), several(*"4567")])
    judged = Judged(one, Verdict(1.0, "", "test"))
    assert followed(one) == {0: 2, 2: 1, 3: 0}
    assert returns(judged, 0.5) == [0.25, 0.5, 1.0]
    assert texts(one.steps) == ["1+1\n2+2", "3+3", "4\n5\n6"]
    # What was paid at the end counts for the whole of the last answer.
    weights = [e.advantage for e in Lesson(judged, 0.0, None, 0, []).examples(1.0, 0.0)]
    assert weights == pytest.approx([1.0, 1.0, math.e])
    item = Item(judged, 3, "")
    assert (item.end, item.old_text) == (6, "4\n5\n6")
    assert Item(judged, 0, "").end == 2
    # Somebody else's turn does not go on with it.
    player = PolicyPlayer(agent, Says([]), Sampling())
    assert player.more(one.steps[:1], HERE) is not None
    assert player.more(one.steps[:1], Observation("", actor="other")) is None


def test_an_answer_is_played_to_its_end_but_for_what_cannot_be_read() -> None:
    agent = agent_of(TOOL, several="in_order")
    wrong = Call("answer", {"expression": 7})
    text = as_text("", [CALL, wrong, CALL])
    policy, one = in_countdown(agent, [text, several("1+1", "2+2"), "none"], turns=2)
    assert [(s.action.text, bool(s.action.invalid)) for s in one.steps] == [
        ("3+4", False),
        ("", True),
        ("1+1", False),
        ("2+2", False),
    ]
    assert policy.asked == 2 and one.steps[1].action.place == 1
    roles = [m.role for m in one.steps[2].action.prompt.messages]
    assert roles == ["user", "assistant", "tool", "user"]
    # A window counts answers.
    narrow = agent_of(TOOL, several="in_order", window=2)
    roles = [m.role for m in narrow.prompt(TASK, one.steps, HERE).messages]
    assert roles == ["user", "assistant", "tool", "tool"]
    # Going on from its midst, what is left of it comes first.
    left = PolicyPlayer(agent, Says([]), Sampling()).more(one.steps[:3], HERE)
    assert left is not None and left.text == "2+2"


values = st.dictionaries(
    st.sampled_from(["to", "steps", "x"]),
    st.text(max_size=9) | st.integers() | st.lists(st.booleans(), max_size=2),
    max_size=3,
)


@given(st.sampled_from(["move", "answer_2"]), values, st.sampled_from(FORMS))
def test_what_is_written_is_read(name: str, arguments: dict[str, Any], form: Form) -> None:
    assert read_calls(call_text(Call(name, arguments), form), []) == [Call(name, arguments)]
    assert calls_in(calls_out([Call(name, arguments)])) == [Call(name, arguments)]


@pytest.mark.method
@pytest.mark.parametrize("form", FORMS)
def test_the_grammar_is_of_calls(form: Form, model_folder: Callable[[str], Path]) -> None:
    config = TransformersConfig.model_validate({"model": "", "device": "cpu"})
    policy = TransformersPolicy(config, str(model_folder("qwen3")), 0)
    constraints = Constraints(policy.tokens)

    def holds(grammar: str, text: str) -> bool:
        follower = constraints.follow(Constraint(grammar=grammar))
        for token in policy.tokens.completion(text):
            if token not in follower.allowed():
                return False
            follower.take(token)
        return follower.over

    both = calls_grammar([TOOL, MOVE], form)
    assert holds(both, call_text(CALL, form))
    assert holds(both, call_text(Call("move", {"steps": 3, "to": "a"}), form))
    assert holds(both, call_text(Call("move", {"to": "a"}), form))
    for wrong in (Call("move", {}), Call("go", {"to": "a"}), Call("answer", {"expression": "x"})):
        assert not holds(both, call_text(wrong, form))
    # Whatever is sampled under it, the agent reads; of a world without tools, too.
    listed = Observation("here", actions=("go north", "wait"))
    for agent, seen in ((agent_of(TOOL, form=form), HERE), (agent_of(form=form), listed)):
        player = PolicyPlayer(agent, policy, Sampling(1.0, max_tokens=120), constrain=True)

        async def answers(player: PolicyPlayer = player, seen: Observation = seen) -> list[Action]:
            asked = (player.answer(TASK, (), seen, k) for k in range(16))
            return await asyncio.wait_for(asyncio.gather(*asked), 60)

        done = [one for one in asyncio.run(answers()) if one.completion.finish == "stop"]
        assert done and not any(one.invalid for one in done)
        assert not seen.actions or {one.text for one in done} <= set(seen.actions)


def test_a_conversation_is_calls_and_results() -> None:
    shot = Shot(task="s", instruction="Make 5.", turns=(Turn(text="", action="2+3"),))
    agent = agent_of(TOOL, examples=(shot,), system="Be brief.", template={"date": "today"})
    said = call_text(CALL, "hermes")
    first = Step(HERE, Action("3+4", Completion(said)), 0.0)
    second = Step(Observation("wrong"), Action("", Completion("hm"), invalid="No call."), 0.0)
    prompt = agent.prompt(TASK, (first, second), Observation("No call."))
    assert [(m.role, m.text) for m in prompt.messages] == [
        ("system", "Be brief."),
        ("user", "Make 5."),
        ("assistant", said.replace("3+4", "2+3")),
        ("user", "Make 7 from 3 4."),
        ("assistant", said),
        ("tool", "wrong"),
        ("assistant", "hm"),
        ("user", "No call."),
    ]
    (offered,) = prompt.tools
    schema = json.loads(TOOL.parameters)
    del schema["properties"]["expression"]["pattern"]  # Which no model would read.
    assert offered == Tool(TOOL.name, TOOL.description, canonical_json(schema))
    assert prompt.template == '{"date":"today"}'
    # An expert's action is a call; of a world without tools, of its listed actions.
    assert agent.phrase("3+4") == said
    assert agent_of().phrase("go") == call_text(Call("act", {"action": "go"}), "hermes")
    assert (
        agent_of().parse(agent_of().phrase("go"), Observation("", actions=("go",))).action == "go"
    )


def test_the_expert_plays_countdown_through_it() -> None:
    async def played() -> None:
        fleet = Fleet(parallel=8, isolation="inline")
        async with await open_worlds("countdown", {}, fleet) as worlds:
            agent = agent_of(*worlds.spec.tools)
            tasks = await draw(worlds.tasks("train"), 6, 0)
            for one in await rollouts(ExpertPlayer(agent), worlds, starts(tasks, 1, 0), 0):
                assert one.success
                for step in one.steps:
                    read = agent.parse(step.action.completion.text, step.observation)
                    assert read.action == step.action.text and not read.invalid

    asyncio.run(played())


def test_the_protocol_has_calls_and_results_with_ids() -> None:
    said = as_text("", [CALL])
    messages = [
        {"role": "user", "content": "Make 7."},
        {"role": "assistant", "content": said},
        {"role": "tool", "content": "wrong"},
        {"role": "assistant", "content": "hm"},
        {"role": "tool", "content": "stray"},
    ]
    sent = list(with_calls(messages, (TOOL,)))
    assert [one["role"] for one in sent] == ["user", "assistant", "tool", "assistant", "user"]
    (call,) = sent[1]["tool_calls"]
    assert sent[1]["content"] is None and sent[2]["tool_call_id"] == call["id"]
    assert json.loads(call["function"]["arguments"]) == {"expression": "3+4"}
    assert as_text("", calls_in(sent[1]["tool_calls"])) == said
    # Every call has a result, also one that was not played.
    twice = [{"role": "assistant", "content": as_text("", [CALL, CALL])}, *messages[2:3]]
    for after in ([], [{"role": "user", "content": "No."}]):
        sent = list(with_calls([messages[0], *twice[:1], *after, *twice], (TOOL,)))
        results = [one["tool_call_id"] for one in sent if one["role"] == "tool"]
        made = [call["id"] for one in sent for call in one.get("tool_calls", ())]
        assert results == made and [one["role"] for one in sent][2:4] == ["tool", "tool"]
    # Without functions an assistant's text is text.
    assert list(with_calls(messages[:2], ())) == messages[:2]
    listless: tuple[Any, ...] = ("x", [1], [{"function": {}}])
    for wrong in (*listless, [{"function": {"name": "a", "arguments": "[1]"}}]):
        with pytest.raises(ValueError):
            calls_in(wrong)


def test_the_prompt_shows_tools_where_a_template_drops_them(
    model_folder: Callable[[str], Path],
) -> None:
    from selfwright.core.models.open import open_tokens

    tokens = open_tokens(str(model_folder("qwen3")))
    words = Message("system", ("Be brief.",))
    for messages in ((words, Message("user", ("go",))), (Message("user", ("go",)),)):
        text = tokens.text(tokens.prompt(Prompt(messages, (MOVE,))))
        assert '"name": "move"' in text and text.count("go") >= 1
        plain = tokens.text(tokens.prompt(Prompt(messages)))
        assert "move" not in plain
