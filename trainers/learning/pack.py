"""Examples to rows of tokens: turns of one trajectory share a row and cost their tokens once."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ...core.errors import LearnerError
from ...core.models.tokens import ChatTokens
from ...core.types import Aggregation, Constraint, Example, Image


@dataclass
class Span:
    """One example's completion inside a row."""

    begin: int
    """Index of its first token in the row, at least 1."""
    end: int
    advantage: float
    old_logprobs: tuple[float, ...]
    """(end - begin,) nats, or empty if unknown."""
    example: int
    """Its place among the examples."""
    group: int = -1
    """The example's."""
    constraint: Constraint | None = None
    """What was sampled was held to; ``old_logprobs`` are then over what that allowed."""


@dataclass
class Row:
    ids: list[int]
    images: tuple[Image, ...] = ()
    """Those that its placeholders stand for, in order."""
    spans: list[Span] = field(default_factory=list[Span])


def pack(examples: Sequence[Example], tokens: ChatTokens) -> list[Row]:
    """Rows that hold every example's prompt and completion, in the order of their first example.

    An example joins the row whose tokens and images its prompt begins with, exactly. Under causal
    attention its log-probabilities there are those it has alone. A prompt that is no continuation
    (a window that moved on, a template that rewrites earlier turns) starts a row of its own.

    Raises:
        LearnerError: a completion with another number of log-probabilities than of tokens, or with
            a token that stands for a picture.
    """
    encoded = [(tokens.prompt(e.prompt), tokens.answer(e.completion)) for e in examples]
    rows: list[Row] = []
    # Rows by their whole content; short prompts first, so that a row grows turn by turn.
    whole: dict[tuple[int, ...], list[Row]] = {}
    lengths: set[int] = set()
    lasts: set[int] = set()
    for k in sorted(range(len(examples)), key=lambda k: len(encoded[k][0])):
        prompt, completion = encoded[k]
        images = examples[k].prompt.images
        row = _row_to_extend(prompt, images, whole, lengths, lasts)
        if row is None:
            row = Row(list(prompt))
            rows.append(row)
        else:
            row.ids += prompt[len(row.ids) :]
        if tokens.vision is not None and tokens.vision.placeholder in completion:
            raise LearnerError(
                f"the answer of example {k} holds what stands for a picture: "
                f"{examples[k].completion.text[:80]!r}"
            )
        row.images = images
        begin = len(row.ids)
        row.ids += completion
        answer = examples[k].completion
        # Those of another tokenizer's ids are of no use here.
        sampled = tokens.sampled(answer)
        held = answer.constraint if sampled else None
        logprobs = (answer.constrained if held else answer.logprobs) if sampled else ()
        if logprobs and len(logprobs) != len(completion):
            raise LearnerError(
                f"example {k} has {len(completion)} tokens and {len(logprobs)} log-probabilities; "
                "there must be one each, or none"
            )
        one = examples[k]
        row.spans.append(Span(begin, len(row.ids), one.advantage, logprobs, k, one.group, held))
        whole.setdefault(tuple(row.ids), []).append(row)
        lengths.add(len(row.ids))
        lasts.add(row.ids[-1])
    return sorted(rows, key=lambda row: min(span.example for span in row.spans))


def _row_to_extend(
    prompt: tuple[int, ...],
    images: tuple[Image, ...],
    whole: dict[tuple[int, ...], list[Row]],
    lengths: set[int],
    lasts: set[int],
) -> Row | None:
    for end in range(len(prompt), 0, -1):
        # Most cuts are ruled out by two set look-ups; only the rest are compared in full.
        if end in lengths and prompt[end - 1] in lasts:
            for row in whole.get(prompt[:end], ()):
                # The same ids stand for any picture.
                if len(row.ids) == end and row.images == images[: len(row.images)]:
                    return row
    return None


def units(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows, in order, those together that share a group."""
    merged: list[list[Row]] = []
    known: dict[int, list[Row]] = {}
    for row in rows:
        groups = {span.group for span in row.spans if span.group >= 0}
        joined = list(
            {id(known[group]): known[group] for group in groups if group in known}.values()
        )
        unit = joined[0] if joined else []
        if not joined:
            merged.append(unit)
        for other in joined[1:]:
            unit += other
            merged = [one for one in merged if one is not other]
            known |= {group: unit for group, one in known.items() if one is other}
        unit.append(row)
        known |= dict.fromkeys(groups, unit)
    return merged


def token_weights(
    rows: Sequence[Row], aggregation: Aggregation, length: int
) -> list[list[list[float]]]:
    """What each trained token's loss is multiplied by, so that the sum is the aggregate.

    Per row, per span, per token. The denominators are those of all ``rows`` together: split into
    micro-batches or over processes, the parts still add up to the same loss.
    """
    spans = [span for row in rows for span in row.spans]
    trained = sum(span.end - span.begin for span in spans)

    def weight(span: Span) -> float:
        size = span.end - span.begin
        match aggregation:
            case "token-mean":
                return 1 / trained
            case "seq-mean-token-mean":
                return 1 / (len(spans) * size)
            case "seq-mean-token-sum":
                return 1 / len(spans)
            case "seq-mean-token-sum-norm":
                return 1 / (len(spans) * length)

    return [[[weight(span)] * (span.end - span.begin) for span in row.spans] for row in rows]


def micro_batches(
    rows: Sequence[Row], budget: int, trained_budget: int | None = None
) -> list[list[int]]:
    """Indices of ``rows``, alike in length, in groups of at most ``budget`` padded tokens.

    Nor does a group hold more than ``trained_budget`` trained tokens, if there is such a limit. A
    single row may exceed both.
    """
    groups: list[list[int]] = []
    trained = 0
    for k in sorted(range(len(rows)), key=lambda k: -len(rows[k].ids)):
        mine = sum(span.end - span.begin for span in rows[k].spans)
        # Longest first, so the group's first row sets its width.
        if (
            groups
            and len(rows[groups[-1][0]].ids) * (len(groups[-1]) + 1) <= budget
            and (trained_budget is None or trained + mine <= trained_budget)
        ):
            groups[-1].append(k)
            trained += mine
        else:
            groups.append([k])
            trained = mine
    return groups
