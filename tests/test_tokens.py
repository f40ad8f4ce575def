"""Ids stored are ids sampled are ids trained, whatever the conversation and the chat template."""

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from prompts import grey, prompt_of, seeing
from transformers import AutoTokenizer

from selfwright.core.errors import PolicyError, PromptError
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.types import Completion, Example, Message, Part, Prompt, Tool
from selfwright.trainers.learning.pack import pack

OPEN = "{% for m in messages %}<|{{ m.role }}|>"
CLOSE = "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
APPENDING = {
    "plain": OPEN + "{{ m.content }}<|end|>" + CLOSE,
    "lines": OPEN
    + "\n{{ m.content }}<|end|>\n"
    + "{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "trims": OPEN + "{{ m.content | trim }}<|end|>" + CLOSE,
    "no end": OPEN + "{{ m.content }}\n" + CLOSE,
    "header": "<|system|>be brief<|end|>" + OPEN + "{{ m.content }}<|end|>" + CLOSE,
}
FORGETTING = (
    OPEN + "{% if m.role == 'assistant' %}{{ m.content.split('</think>')[-1] }}"
    "{% else %}{{ m.content }}{% endif %}<|end|>" + CLOSE
)


@dataclass(frozen=True)
class Turn:
    said: str
    """By the user."""
    ids: tuple[int, ...]
    """Sampled in answer, without the end token."""
    finish: Literal["end", "length"]


@pytest.fixture(scope="module")
def tokenizer(model_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    folder = model_folder("scratch")
    untyped: Any = AutoTokenizer

    def make(template: str) -> Any:
        made = untyped.from_pretrained(folder)
        made.chat_template = template
        return made

    return make


def turns() -> st.SearchStrategy[list[Turn]]:
    """Ids from all of the vocabulary but the end token: most do not re-tokenise to themselves."""
    said = st.text(max_size=12) | st.sampled_from(["", "<|end|>", "a<|assistant|>b", " 3 + 4\n"])
    ids = st.lists(st.sampled_from([0, *range(2, 260)]), max_size=8).map(tuple)
    finish: st.SearchStrategy[Literal["end", "length"]] = st.sampled_from(["end", "length"])
    turn = st.builds(Turn, said, ids, finish)
    # A policy samples at least one token.
    return st.lists(turn.filter(lambda t: t.finish == "end" or bool(t.ids)), min_size=1, max_size=4)


def play(
    tokens: ChatTokens, conversation: Sequence[Turn]
) -> tuple[list[tuple[int, ...]], list[Example]]:
    """The prompts a policy saw, and what it said to each, as a rollout stores it."""
    messages: list[Message] = []
    prompts: list[tuple[int, ...]] = []
    examples: list[Example] = []
    for turn in conversation:
        messages.append(Message("user", (turn.said,)))
        ids = (*turn.ids, tokens.end) if turn.finish == "end" else turn.ids
        completion = Completion(tokens.text(ids), ids)
        prompts.append(tokens.prompt(Prompt(tuple(messages))))
        examples.append(Example(Prompt(tuple(messages)), completion))
        messages.append(Message("assistant", (completion.text,), token_ids=ids))
    return prompts, examples


PIECES = (64, 128)
"""Two halves of nothing: bytes that are no UTF-8 by themselves."""


@pytest.mark.parametrize("template", APPENDING)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(conversation=turns())
@example(conversation=[Turn("a", PIECES, "length"), Turn("b", (), "end"), Turn("", (0,), "end")])
def test_ids_stored_are_ids_sampled_are_ids_trained(
    tokenizer: Callable[[str], Any], template: str, conversation: list[Turn]
) -> None:
    sampling = ChatTokens(tokenizer(APPENDING[template]))
    prompts, examples = play(sampling, conversation)
    assert sampling.breaks == 0
    said = [e.completion.token_ids for e in examples]
    for before, ids, after in zip(prompts, said, prompts[1:], strict=False):
        assert after[: len(before) + len(ids)] == before + ids
    # Whoever learns renders anew, and a learner may meet the last turn first.
    learning = ChatTokens(tokenizer(APPENDING[template]), remember=20)
    assert [learning.prompt(e.prompt) for e in reversed(examples)] == prompts[::-1]
    assert learning.breaks == 0
    (row,) = pack(examples, learning)
    assert tuple(row.ids) == prompts[-1] + said[-1]
    assert [tuple(row.ids[s.begin : s.end]) for s in row.spans] == said


def test_ids_that_spell_the_end_token_are_not_taken_for_it(
    tokenizer: Callable[[str], Any],
) -> None:
    tokens = ChatTokens(tokenizer(APPENDING["plain"]))
    spelled = tuple(
        i for piece in ("<", "|", "end", "|", ">") for i in tokens.completion(piece)[:-1]
    )
    assert tokens.text(spelled) == "<|end|>" and tokens.end not in spelled
    prompts, _ = play(tokens, [Turn("a", spelled, "end"), Turn("b", (), "end")])
    assert prompts[1][: len(prompts[0]) + len(spelled) + 1] == (*prompts[0], *spelled, tokens.end)


def test_text_after_a_stop_stays_in_the_conversation(tokenizer: Callable[[str], Any]) -> None:
    # Sampled "3 + 4" and a newline that was the stop text: the message is shorter than its ids.
    tokens = ChatTokens(tokenizer(APPENDING["plain"]))
    ids = tokens.completion("3 + 4\n")[:-1]
    first = Message("user", ("go",))
    answer = Message("assistant", ("3 + 4",), token_ids=ids)
    then = Prompt((first, answer, Message("user", ("no",))))
    assert tokens.prompt(then)[: len(tokens.prompt(Prompt((first,)))) + len(ids)] == (
        tokens.prompt(Prompt((first,))) + ids
    )
    assert tokens.breaks == 0


def test_a_template_that_forgets_thoughts_breaks_and_is_counted(
    tokenizer: Callable[[str], Any],
) -> None:
    tokens = ChatTokens(tokenizer(FORGETTING))
    thought = tokens.completion("<think>hm</think>4")
    short = tokens.completion("4")
    user = Message("user", ("2 + 2",))
    one = Prompt((user, Message("assistant", ("<think>hm</think>4",), token_ids=thought), user))
    two = Prompt((user, Message("assistant", ("4",), token_ids=short), user))
    assert tokens.prompt(one) == tokens.prompt(Prompt((user, Message("assistant", ("4",)), user)))
    assert (tokens.breaks, tokens.prompts) == (1, 2)
    # Every prompt counts, also one that was met before.
    tokens.prompt(one)
    assert (tokens.breaks, tokens.prompts) == (2, 3)
    assert tokens.prompt(two)[: len(tokens.prompt(Prompt((user,)))) + len(short)] == (
        tokens.prompt(Prompt((user,))) + short
    )
    assert tokens.breaks == 2
    # After the break the conversation goes on from what the template made of it.
    five = Message("assistant", ("5",), token_ids=tokens.completion("5"))
    three = Prompt((*one.messages, five, user))
    before, broken = tokens.prompt(one) + tokens.completion("5"), tokens.breaks
    assert tokens.prompt(three)[: len(before)] == before
    assert tokens.breaks == broken


def tool(name: str, parameters: str = '{"properties":{},"type":"object"}') -> Tool:
    return Tool(name, f"It will {name}.", parameters)


def shown(tokens: ChatTokens, prompt: Prompt) -> str:
    return tokens.tokenizer.decode(tokens.prompt(prompt), clean_up_tokenization_spaces=False)


def test_parts_are_read_in_their_order(tokenizer: Callable[[str], Any]) -> None:
    tokens = seeing(tokenizer(APPENDING["plain"]))
    red, blue = grey(1), grey(2)
    for parts, said in (
        (("1", red, "2"), "1<image>2"),
        ((red, "1", "2", blue), "<image>12<image>"),
        ((red, blue), "<image><image>"),
        (("1",), "1"),
    ):
        assert shown(tokens, prompt_of(*parts)) == f"<|user|>{said}<|end|><|assistant|>"
    # A model of texts alone is told the words, in their order.
    blind = ChatTokens(tokenizer(APPENDING["plain"]))
    assert blind.prompt(prompt_of("1", "2")) == blind.prompt(prompt_of("12"))


def test_a_text_that_spells_a_picture_is_none(tokenizer: Callable[[str], Any]) -> None:
    tokens = seeing(tokenizer(APPENDING["plain"]))
    with pytest.raises(PromptError, match=r"holds 1 images, but 2 times '<image>'"):
        tokens.prompt(prompt_of(grey(1), "<image>"))
    with pytest.raises(PromptError, match=r"holds 0 images, but 1 times"):
        tokens.prompt(prompt_of("<image>"))


def test_tools_are_told_as_their_schemas(tokenizer: Callable[[str], Any]) -> None:
    tokens = seeing(tokenizer(APPENDING["plain"]))
    schema = '{"properties":{"to":{"type":"string"}},"required":["to"],"type":"object"}'
    go = tool("go", schema)
    text = shown(tokens, replace(prompt_of("1"), tools=(go, tool("stay"))))
    before, told, _ = re.split(r"<\|system\|>|<\|end\|><\|user\|>", text)
    assert before == "" and told.count('"type": "function"') == 2
    first, end = json.JSONDecoder().raw_decode(told)
    assert first == {
        "type": "function",
        "function": {
            "name": "go",
            "description": "It will go.",
            "parameters": json.loads(schema),
        },
    }
    assert json.loads(told[end:])["function"]["name"] == "stay"
    assert "system" not in shown(tokens, prompt_of("1"))


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    st.lists(
        st.tuples(
            st.lists(st.sampled_from(["1", "2", grey(1), grey(2)]), min_size=1, max_size=3),
            st.lists(st.sampled_from(["go", "stay"]), max_size=2, unique=True),
            st.booleans(),
        ),
        min_size=2,
        max_size=5,
    )
)
def test_what_is_remembered_is_never_anothers(
    tokenizer: Callable[[str], Any], drawn: list[tuple[list[Part], list[str], bool]]
) -> None:
    """Prompts that differ in a tool or in a picture only, in whatever order they come."""
    tokens = seeing(tokenizer(APPENDING["plain"]))
    said = Message("assistant", ("3",), tokens.completion("3"))
    for parts, tools, more in drawn:
        first = prompt_of(*parts)
        messages = (*first.messages, said, *first.messages) if more else first.messages
        prompt = Prompt(messages, tuple(tool(name) for name in tools))
        fresh = seeing(tokenizer(APPENDING["plain"]))
        assert tokens.prompt(prompt) == fresh.prompt(prompt)
    known = list(tokens._known)  # pyright: ignore[reportPrivateUsage]
    assert not any(image.png for prompt in known for image in prompt.images), (
        "what is remembered would hold every picture that was ever shown"
    )
    pictures = {prompt.images for prompt in known}
    assert {prompt_of(*parts).images for parts, _, more in drawn if not more} <= pictures


def test_many_turns_neither_recurse_nor_pile_up(tokenizer: Callable[[str], Any]) -> None:
    tokens = ChatTokens(tokenizer(APPENDING["plain"]), remember=1000)
    said = tokens.completion("1")
    user, answer = Message("user", ("a",)), Message("assistant", ("1",), token_ids=said)
    opening = tokens.prompt(Prompt((user,)))
    # Deeper than Python's own stack.
    prompt = tokens.prompt(Prompt((user, answer) * 550))
    assert prompt == (opening + said) * 550 + opening[-1:]


def test_an_end_of_turn_that_is_not_the_end_token(tokenizer: Callable[[str], Any]) -> None:
    made = tokenizer(APPENDING["plain"])
    made.eos_token = "<|pad|>"
    tokens = ChatTokens(made)
    assert tokens.end == made.convert_tokens_to_ids("<|end|>") != made.eos_token_id
    assert tokens.ends == {tokens.end, made.eos_token_id}
    assert tokens.completion("1")[-1] == tokens.end
    prompts, _ = play(tokens, [Turn("a", (70,), "end"), Turn("b", (), "end")])
    assert prompts[1][: len(prompts[0]) + 2] == (*prompts[0], 70, tokens.end)
    assert ChatTokens(tokenizer(APPENDING["no end"])).end == tokens.end


def test_what_cannot_be_rendered_is_refused(tokenizer: Callable[[str], Any]) -> None:
    with pytest.raises(PolicyError, match="chat template"):
        ChatTokens(tokenizer(""))
    endless = tokenizer(APPENDING["plain"])
    endless.eos_token = None
    with pytest.raises(PolicyError, match="end token"):
        ChatTokens(endless)
    with pytest.raises(PolicyError, match="images"):
        ChatTokens(tokenizer(APPENDING["plain"])).prompt(prompt_of(grey(1), ""))
    fussy = "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokens = ChatTokens(tokenizer(fussy + APPENDING["plain"]))
    with pytest.raises(PolicyError, match="of system: no system"):
        tokens.prompt(Prompt((Message("system", ("x",)),)))
    # With somebody else's words behind them, the system's stand in those.
    both = tokens.prompt(Prompt((Message("system", ("x",)), Message("user", ("y",)))))
    assert both == tokens.prompt(Prompt((Message("user", ("x\n\ny",)),)))


def test_ids_of_another_tokenizer_are_not_taken_for_ours(tokenizer: Callable[[str], Any]) -> None:
    tokens, other = ChatTokens(tokenizer(APPENDING["plain"])), tokenizer(APPENDING["plain"])
    other.add_tokens(["strange"])
    strange = ChatTokens(other).fingerprint
    assert strange != tokens.fingerprint == ChatTokens(tokenizer(FORGETTING)).fingerprint
    text, ids = "3 + 4", (9, 9, 9)
    for mine in ("", tokens.fingerprint):
        completion = Completion(text, ids, (-1.0,) * 3, "stop", mine)
        assert tokens.answer(completion) == ids
        (row,) = pack([Example(prompt_of("?"), completion)], tokens)
        assert row.spans[0].old_logprobs == (-1.0,) * 3
    foreign = Completion(text, ids, (-1.0,) * 3, "stop", strange)
    assert tokens.answer(foreign) == tokens.completion(text)
    (row,) = pack([Example(prompt_of("?"), foreign)], tokens)
    assert tuple(row.ids[row.spans[0].begin :]) == tokens.completion(text)
    assert row.spans[0].old_logprobs == ()
    said = Message("assistant", (text,), token_ids=ids, tokenizer=strange)
    before, after = Message("user", ("?",)), Message("user", ("!",))
    assert tokens.prompt(Prompt((before, said, after))) == tokens.prompt(
        Prompt((before, Message("assistant", (text,)), after))
    )
