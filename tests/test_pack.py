"""Packed rows lose nothing: the same losses and gradients, at the cost of every token once."""

# torch and transformers are partly untyped.
# pyright: reportUnknownMemberType=false

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from prompts import grey, prompt_of, seeing

from selfwright.core.errors import LearnerError
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.types import (
    Aggregation,
    Completion,
    Example,
    Image,
    Message,
    Prompt,
    TokenArrays,
)
from selfwright.trainers.learning.loss import NLL, Clip
from selfwright.trainers.learning.pack import Row, Span, micro_batches, pack, token_weights


@pytest.fixture(scope="module")
def tokens(model_folder: Callable[[str], Path]) -> ChatTokens:
    untyped: Any = transformers.AutoTokenizer
    return ChatTokens(untyped.from_pretrained(model_folder("qwen3")))


@pytest.fixture(scope="module")
def model(model_folder: Callable[[str], Path]) -> Any:
    untyped: Any = transformers.AutoModelForCausalLM
    return untyped.from_pretrained(model_folder("qwen3")).double()


def talk(tokens: ChatTokens, turns: int, seed: int, length: int = 0) -> list[Example]:
    """The turns of one trajectory, as a policy sampled them."""
    rng = random.Random(seed)
    messages: list[Message] = []
    examples: list[Example] = []
    for _ in range(turns):
        messages.append(Message("user", (f"make {rng.randrange(10, 99)}",)))
        ids = [rng.randrange(5, 250) for _ in range(length or rng.randrange(1, 9))]
        completion = Completion(
            tokens.text(ids), (*ids, tokens.end), tuple(rng.uniform(-6, 0) for _ in (*ids, 0))
        )
        examples.append(Example(Prompt(tuple(messages)), completion, rng.uniform(-2, 2)))
        messages.append(Message("assistant", (completion.text,), token_ids=completion.token_ids))
    return examples


def apart(examples: Sequence[Example], tokens: ChatTokens) -> list[Row]:
    """Every example as a row of its own."""
    rows: list[Row] = []
    for k, one in enumerate(examples):
        prompt, said = tokens.prompt(one.prompt), one.completion
        end = len(prompt) + len(said.token_ids)
        span = Span(len(prompt), end, one.advantage, said.logprobs, k)
        rows.append(Row([*prompt, *said.token_ids], one.prompt.images, [span]))
    return rows


def learned(
    model: Any, rows: Sequence[Row], loss: NLL | Clip
) -> tuple[dict[int, list[float]], float, list[torch.Tensor], list[torch.Tensor]]:
    """Token losses by example, their aggregate, its gradients by weight, and by logit of a row."""
    losses: dict[int, list[float]] = {}
    total = torch.zeros((), dtype=torch.float64)
    tables: list[torch.Tensor] = []
    for row, scales in zip(rows, token_weights(rows, loss.aggregation, loss.length), strict=True):
        logits = model(torch.tensor([row.ids])).logits[0]
        logits.retain_grad()
        tables.append(logits)
        for span, scale in zip(row.spans, scales, strict=True):
            ids = torch.tensor(row.ids[span.begin : span.end])
            table = logits[span.begin - 1 : span.end - 1].log_softmax(-1)
            logprobs = table.gather(1, ids[:, None])[:, 0]
            one = loss(
                TokenArrays(
                    logprobs,
                    torch.tensor(span.old_logprobs, dtype=torch.float64),
                    torch.full((len(ids),), span.advantage, dtype=torch.float64),
                )
            )
            losses[span.example] = one.tolist()
            total = total + (one * torch.tensor(scale)).sum()
    weights: list[Any] = list(model.parameters())
    model.zero_grad()
    total.backward()  # pyright: ignore[reportUnknownMemberType]
    slopes = [weight.grad.clone() for weight in weights]
    return losses, total.item(), slopes, [table.grad for table in tables if table.grad is not None]


AGGREGATIONS: list[Aggregation] = [
    "token-mean",
    "seq-mean-token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
]


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("kind", [NLL, Clip])
def test_packed_is_unpacked(
    model: Any, tokens: ChatTokens, kind: type[NLL] | type[Clip], aggregation: Aggregation
) -> None:
    examples = [*talk(tokens, 4, 1), *talk(tokens, 1, 2), *talk(tokens, 3, 3)]
    random.Random(0).shuffle(examples)
    loss = kind(aggregation=aggregation, length=7)
    rows = pack(examples, tokens)
    assert [len(row.spans) for row in rows].count(1) == 1 and len(rows) == 3
    losses, total, slopes, _ = learned(model, rows, loss)
    losses_apart, total_apart, slopes_apart, _ = learned(model, apart(examples, tokens), loss)
    assert losses.keys() == losses_apart.keys()
    for k, values in losses.items():
        assert values == pytest.approx(losses_apart[k], abs=1e-5)
    assert total == pytest.approx(total_apart, abs=1e-5)
    for one, other in zip(slopes, slopes_apart, strict=True):
        assert torch.allclose(one, other, rtol=1e-5, atol=1e-5)


def test_only_what_was_sampled_has_a_gradient(model: Any, tokens: ChatTokens) -> None:
    examples = talk(tokens, 4, 5)
    (row,) = pack(examples, tokens)
    _, _, _, (slopes,) = learned(model, [row], NLL())
    sampled = {at for span in row.spans for at in range(span.begin, span.end)}
    assert sum(len(e.completion.token_ids) for e in examples) == len(sampled) < len(row.ids)
    for at in range(len(row.ids)):
        # The logits at a position are about the token after it.
        assert bool((slopes[at] != 0).any()) == (at + 1 in sampled)


def test_tokens_grow_linearly_with_turns(tokens: ChatTokens) -> None:
    packed: list[int] = []
    for turns in range(1, 17):
        (row,) = pack(talk(tokens, turns, 0, length=6), tokens)
        assert len(row.spans) == turns
        packed.append(len(row.ids))
    grown = {b - a for a, b in pairwise(packed)}
    assert len(grown) == 1
    alone = sum(len(row.ids) for row in apart(talk(tokens, 16, 0, length=6), tokens))
    assert alone > 8 * packed[-1]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=12))
def test_every_example_is_in_one_row_behind_its_own_prompt(
    tokens: ChatTokens, picks: list[tuple[int, int]]
) -> None:
    # Any turns of any trajectories, in any order, some of them twice or with gaps between.
    examples = [talk(tokens, 4, seed)[turn] for seed, turn in picks]
    rows = pack(examples, tokens)
    spans = {span.example: (row, span) for row in rows for span in row.spans}
    assert sorted(spans) == list(range(len(examples)))
    for k, (row, span) in spans.items():
        assert tuple(row.ids[: span.begin]) == tokens.prompt(examples[k].prompt)
        assert tuple(row.ids[span.begin : span.end]) == examples[k].completion.token_ids
        assert span.old_logprobs == examples[k].completion.logprobs
        assert span.advantage == examples[k].advantage
    for row in rows:
        ends = [0, *(span.end for span in row.spans)]
        assert all(span.begin >= end for span, end in zip(row.spans, ends, strict=False))
        assert len(row.ids) == ends[-1]
    first = [min(span.example for span in row.spans) for row in rows]
    assert first == sorted(first)
    # As few rows as there can be: one per trajectory, and one per further copy of a turn.
    copies = {pick: picks.count(pick) for pick in picks}
    assert len(rows) == sum(
        max(copies.get((seed, turn), 0) for turn in range(4)) for seed in {s for s, _ in picks}
    )


def test_branches_share_no_row(tokens: ChatTokens) -> None:
    one, two = talk(tokens, 2, 1), talk(tokens, 2, 1)
    # Another second answer: the first turn's row can be gone on from only once.
    other = Example(two[1].prompt, Completion("8", tokens.completion("8")))
    rows = pack([one[0], one[1], other], tokens)
    assert [[span.example for span in row.spans] for row in rows] == [[0, 1], [2]]


def test_rows_hold_the_pictures_that_their_prompts_show(
    model_folder: Callable[[str], Path],
) -> None:
    """The ids are the same for any picture: rows are kept apart by what was shown."""
    untyped: Any = transformers.AutoTokenizer
    tokens = seeing(untyped.from_pretrained(model_folder("qwen3")))
    red, blue = grey(1), grey(2)

    def turns(*pictures: Image) -> list[Example]:
        """A conversation in which each of these is shown with a question."""
        messages: list[Message] = []
        made: list[Example] = []
        for image in pictures:
            messages.append(Message("user", (image, "what is it")))
            said = Completion("3", tokens.completion("3"))
            made.append(Example(Prompt(tuple(messages)), said))
            messages.append(Message("assistant", (said.text,), said.token_ids))
        return made

    def packed(*examples: Example) -> list[tuple[list[int], tuple[Image, ...]]]:
        assert len({tokens.prompt(e.prompt) for e in examples}) <= 2, "alike but for pictures"
        rows = pack(examples, tokens)
        for row in rows:
            for span in row.spans:
                (whole,) = pack([examples[span.example]], tokens)
                assert row.ids[: span.end] == whole.ids
                assert row.images[: len(whole.images)] == whole.images
        return [([span.example for span in row.spans], row.images) for row in rows]

    one, two = turns(red, blue), turns(blue, blue)
    assert packed(*one) == [([0, 1], (red, blue))]
    # The second turns of both; the first turn of the other alone would go with either by its ids.
    assert packed(one[1], two[0]) == [([0], (red, blue)), ([1], (blue,))]
    assert packed(one[0], two[1]) == [([0], (red,)), ([1], (blue, blue))]
    assert packed(one[0], one[1], two[0], two[1]) == [
        ([0, 1], (red, blue)),
        ([2, 3], (blue, blue)),
    ]
    # By content: another handle of the same picture is the same picture.
    again = turns(replace(red, png=b""), replace(blue, png=b""))
    assert packed(one[0], again[1]) == [([0, 1], (red, blue))]


def test_a_prompt_that_is_rewritten_starts_a_row(model_folder: Callable[[str], Path]) -> None:
    untyped: Any = transformers.AutoTokenizer
    forgetful = ChatTokens(untyped.from_pretrained(model_folder("llama")))
    user = Message("user", ("2 + 2",))
    examples: list[Example] = []
    messages: tuple[Message, ...] = (user,)
    for text in ("<think>hm</think>4", "4", "5"):
        ids = forgetful.completion(text)
        examples.append(Example(Prompt(messages), Completion(text, ids)))
        messages = (*messages, Message("assistant", (text,), token_ids=ids), user)
    rows = pack(examples, forgetful)
    assert [[span.example for span in row.spans] for row in rows] == [[0], [1, 2]]
    assert forgetful.breaks == 1


def test_what_was_not_sampled_is_tokenised_with_its_end(tokens: ChatTokens) -> None:
    (row,) = pack([Example(prompt_of("a"), Completion("3 + 4"))], tokens)
    assert tuple(row.ids[row.spans[0].begin :]) == tokens.completion("3 + 4")
    (row,) = pack([Example(prompt_of("a"), Completion(""))], tokens)
    assert row.ids[row.spans[0].begin :] == [tokens.end]


def test_log_probabilities_must_be_one_per_token(tokens: ChatTokens) -> None:
    wrong = Completion("3", (9, 8, tokens.end), (-1.0, -1.0))
    with pytest.raises(LearnerError, match="example 1 has 3 tokens and 2 log-probabilities"):
        pack([talk(tokens, 1, 0)[0], Example(prompt_of("a"), wrong)], tokens)


shapes = st.lists(st.tuples(st.integers(1, 40), st.integers(1, 40)), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(shapes, st.integers(1, 120), st.integers(1, 60))
def test_micro_batches_keep_to_their_budgets(
    rows: list[tuple[int, int]], budget: int, trained_budget: int
) -> None:
    made = [
        Row([0] * (prompt + said), spans=[Span(prompt, prompt + said, 1.0, (), k)])
        for k, (prompt, said) in enumerate(rows)
    ]
    groups = micro_batches(made, budget, trained_budget)
    assert sorted(k for group in groups for k in group) == list(range(len(made)))
    for group in groups:
        widest = max(len(made[k].ids) for k in group)
        assert widest * len(group) <= budget or len(group) == 1
        assert sum(rows[k][1] for k in group) <= trained_budget or len(group) == 1
    # Alike in length: no group reaches into the next one's lengths.
    for one, after in pairwise(groups):
        assert min(len(made[k].ids) for k in one) >= max(len(made[k].ids) for k in after)
