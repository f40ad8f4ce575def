"""Constraints: what they allow, what is sampled under them, and what a learner makes of that."""

# torch and transformers are partly untyped; arrays are no part of the learner's interface.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false

import asyncio
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import prompt_of

from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.agents.react import React, ReactConfig
from selfwright.core.actions import Call, in_words, listed, read_call, texts_grammar, written
from selfwright.core.errors import LearnerError, PolicyError
from selfwright.core.files import canonical_json
from selfwright.core.models.constraints import Constraints, in_any_tokens
from selfwright.core.play.players import PolicyPlayer
from selfwright.core.protocols import Briefing
from selfwright.core.types import (
    Completion,
    Constraint,
    Example,
    Observation,
    Sampling,
    Task,
    Tool,
)
from selfwright.environments.countdown import EXPRESSION, TOOL, Illegal, evaluate
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import Clip
from selfwright.trainers.learning.pack import pack

Folder = Callable[[str], Path]
PROMPTS = [prompt_of(f"make {k} from 3 {k * 7}") for k in range(6)]
CHOICES = ("go north", "go", "look\naround twice", "open 7")
SUM = Constraint(grammar="start: NUMBER (/[+*]/ NUMBER)*\nNUMBER: /[1-9][0-9]?/")
CLICK = Tool(
    "click",
    "Click it.",
    canonical_json(
        {
            "type": "object",
            "properties": {
                "ref": {"type": "string"},
                "times": {"type": "integer"},
                "button": {"type": "string", "enum": ["left", "right"]},
            },
            "required": ["ref"],
        }
    ),
)


@pytest.fixture(scope="module")
def policy(model_folder: Folder) -> TransformersPolicy:
    config = TransformersConfig.model_validate({"model": "", "device": "cpu"})
    return TransformersPolicy(config, str(model_folder("qwen3")), 0)


def ask(policy: TransformersPolicy, sampling: Sampling, count: int = 1) -> list[Completion]:
    async def all_at_once() -> list[Completion]:
        asked = [
            policy.complete(prompt, sampling, 10 * k + turn)
            for k, prompt in enumerate(PROMPTS)
            for turn in range(count)
        ]
        return await asyncio.wait_for(asyncio.gather(*asked), 60)

    return asyncio.run(all_at_once())


def logits_of(policy: TransformersPolicy, k: int, ids: Sequence[int]) -> torch.Tensor:
    """(T, V) by one plain forward pass."""
    prompt = policy.tokens.prompt(PROMPTS[k])
    with torch.inference_mode():
        row = torch.tensor([[*prompt, *ids]])
        return policy.model(row).logits[0, len(prompt) - 1 : -1].double()


def by_hand(policy: TransformersPolicy, k: int, ids: Sequence[int]) -> list[float]:
    """Log-probabilities of a choice's ids among the beginnings of ``CHOICES``."""
    spelt = [policy.tokens.completion(text) for text in CHOICES]
    found: list[float] = []
    for at, token in enumerate(ids):
        after = {one[at] for one in spelt if one[:at] == tuple(ids[:at]) and len(one) > at}
        logits = logits_of(policy, k, ids)[at]
        total = math.log(sum(math.exp(float(logits[one])) for one in after))
        found.append(float(logits[token]) - total)
    return found


def test_what_is_sampled_is_of_the_grammar(policy: TransformersPolicy) -> None:
    answers = ask(policy, Sampling(3.0, max_tokens=40, constraint=SUM), count=4)
    ended = [one for one in answers if one.finish == "stop"]
    assert len(ended) > 10 and len({one.text for one in ended}) > 10
    for one in ended:
        assert re.fullmatch(r"[1-9][0-9]?([+*][1-9][0-9]?)*", one.text)
        assert one.token_ids[-1] in policy.tokens.ends
    for k, one in enumerate(answers):
        assert one.constraint == SUM
        # Free ones are those of the model, held ones are never less likely.
        logits = logits_of(policy, k // 4, one.token_ids).log_softmax(-1)
        free = [float(logits[at, token]) for at, token in enumerate(one.token_ids)]
        assert one.logprobs == pytest.approx(free, abs=1e-4)
        assert all(a <= b + 1e-5 for a, b in zip(one.logprobs, one.constrained, strict=True))
    (plain, *_) = ask(policy, Sampling(1.0, max_tokens=4))
    assert plain.constraint is None and plain.constrained == ()


def test_held_log_probabilities_are_those_among_what_is_allowed(
    policy: TransformersPolicy,
) -> None:
    answers = ask(policy, Sampling(5.0, constraint=Constraint(CHOICES)), count=6)
    assert {one.text for one in answers} == set(CHOICES)
    for k, one in enumerate(answers):
        assert one.constrained == pytest.approx(by_hand(policy, k // 6, one.token_ids), abs=1e-5)


@pytest.mark.parametrize("constraint", [Constraint(CHOICES), SUM], ids=["choices", "grammar"])
def test_a_learner_rules_out_what_the_sampler_did(
    policy: TransformersPolicy, model_folder: Folder, constraint: Constraint
) -> None:
    answers = ask(policy, Sampling(2.0, max_tokens=12, constraint=constraint), count=2)
    free = ask(policy, Sampling(1.0, max_tokens=5), count=1)
    asked = [PROMPTS[k // 2] for k in range(len(answers))] + PROMPTS
    examples = [
        Example(prompt, one, 1.0) for prompt, one in zip(asked, [*answers, *free], strict=True)
    ]
    config = LearnerConfig.model_validate({"device": "cpu", "precision": "float32"})
    learner = PlainLearner(config, str(model_folder("qwen3")), 0)
    rows = pack(examples, learner._tokens)
    arrays = learner._forward.arrays(rows, Clip())
    ratio = (arrays.logprobs - arrays.old_logprobs).exp()
    assert ratio.tolist() == pytest.approx([1.0] * len(ratio), abs=1e-5)
    # And not because they are of the model's whole distribution.
    spans = [span for row in rows for span in row.spans]
    held = [x for span in spans for x in span.old_logprobs]
    whole = [x for span in spans for x in examples[span.example].completion.logprobs]
    assert max(abs(a - b) for a, b in zip(held, whole, strict=True)) > 0.1
    assert arrays.logprobs.tolist() == pytest.approx(held, abs=1e-5)


def test_a_token_that_was_not_allowed_is_refused(
    policy: TransformersPolicy, model_folder: Folder
) -> None:
    (one, *_) = ask(policy, Sampling(2.0, max_tokens=12, constraint=SUM))
    other = replace(one, constraint=Constraint(grammar='start: "no"'))
    learner = PlainLearner(
        LearnerConfig.model_validate({"device": "cpu"}), str(model_folder("qwen3")), 0
    )
    with pytest.raises(LearnerError, match="none that its constraint allows"):
        learner._forward.arrays(pack([Example(PROMPTS[0], other)], learner._tokens), Clip())


def test_a_grammar_that_is_none_harms_nobody_else(policy: TransformersPolicy) -> None:
    async def both() -> Sequence[Any]:
        wrong = Sampling(constraint=Constraint(grammar="start: ("))
        return await asyncio.gather(
            policy.complete(PROMPTS[0], wrong, 0),
            policy.complete(PROMPTS[1], Sampling(max_tokens=3), 0),
            return_exceptions=True,
        )

    wrong, right = asyncio.run(both())
    assert isinstance(wrong, PolicyError) and "grammar is none" in str(wrong)
    assert isinstance(right, Completion) and right.token_ids


def test_choices_are_a_grammar_too(policy: TransformersPolicy) -> None:
    constraints = Constraints(policy.tokens)
    grammar = in_any_tokens(Constraint(CHOICES))
    for text in CHOICES:
        ids = policy.tokens.completion(text)
        masks = constraints.masks(grammar, ids, 400)
        follower = constraints.follow(grammar)
        for token in ids:
            assert token in follower.allowed() and not follower.over
            follower.take(token)
        assert follower.over and masks.sum() > len(ids)
    with pytest.raises(PolicyError, match="none that its constraint allows"):
        constraints.masks(grammar, policy.tokens.completion("go south"), 400)


names = st.sampled_from(["ref", "times", "button"])
arguments = st.fixed_dictionaries(
    {"ref": st.text(max_size=12)},
    optional={"times": st.integers(-9, 10**6), "button": st.sampled_from(["left", "right"])},
)


@given(arguments)
def test_a_call_that_is_written_is_read(given_: dict[str, Any]) -> None:
    assert read_call([TOOL, CLICK], written(TOOL, {"expression": "1+2"})) == Call(
        "answer", {"expression": "1+2"}
    )
    assert read_call([CLICK], written(CLICK, given_)) == Call("click", given_)


@pytest.mark.parametrize("text", ["click", "click(", "click(ref=)", "click(ref=1 2)", "press()"])
def test_what_is_no_call_is_none(text: str) -> None:
    assert read_call([CLICK], text) is None


def test_a_tool_in_words() -> None:
    assert in_words(CLICK) == "click(button, ref, times): Click it."
    assert in_words(TOOL).startswith("<expression>: Try an expression. expression: ")
    assert in_words(listed(("go", "stay"))) == "<action>: Do this in the world."


def accepts(policy: TransformersPolicy, grammar: str, text: str) -> bool:
    constraints = Constraints(policy.tokens)
    try:
        constraints.masks(Constraint(grammar=grammar), policy.tokens.completion(text), 400)
    except PolicyError:
        return False
    return True


@pytest.mark.method
@settings(max_examples=30)
@given(given_=arguments)
def test_the_grammar_of_tools_holds_every_call(
    policy: TransformersPolicy, given_: dict[str, Any]
) -> None:
    grammar = "start: action\n" + texts_grammar([TOOL, CLICK])
    # The order is the grammar's: what is required, then the rest.
    ordered = {name: given_[name] for name in ("ref", "button", "times") if name in given_}
    if "times" not in given_ or "button" in given_:
        text = written(CLICK, ordered)
        if text.isascii():
            assert accepts(policy, grammar, text)
    assert not accepts(policy, grammar, "click(times=3)")
    assert accepts(policy, grammar, "3 * (4 - 1)")


@pytest.mark.method
@given(st.from_regex(EXPRESSION, fullmatch=True, alphabet="123+*-/() "))
def test_countdowns_grammar_is_of_expressions(text: str) -> None:
    try:
        evaluate(text, [int(one) for one in re.findall(r"[0-9]+", text)], "+-*/")
    except Illegal as fault:
        assert str(fault) in ("division by zero", "too long")


@pytest.mark.method
@pytest.mark.parametrize("thoughts", [False, True])
@pytest.mark.parametrize("actions", [(), ("go north", 'say "x"')])
@pytest.mark.parametrize("tools", [(), (TOOL,)])
def test_react_reads_an_action_in_whatever_its_constraint_allows(
    policy: TransformersPolicy, thoughts: bool, actions: tuple[str, ...], tools: tuple[Tool, ...]
) -> None:
    config = React.briefed(ReactConfig(thoughts=thoughts), Briefing(tools, ()))
    agent = React(config)
    task, seen = Task("t", "do it", 3), Observation("here", actions=actions)
    player = PolicyPlayer(agent, policy, Sampling(1.5, max_tokens=60), constrain=True)

    async def answers() -> list[Any]:
        return await asyncio.gather(*(player.answer(task, (), seen, k) for k in range(8)))

    done = [one for one in asyncio.run(answers()) if one.completion.finish == "stop"]
    assert done or not (actions or tools), "any text may go on for longer than that"
    for one in done:
        assert not one.invalid
        assert not actions or one.text in actions
        assert actions or not tools or re.fullmatch(r"[0-9+*/() -]+", one.text)
        assert one.completion.text.count("\n") == thoughts
