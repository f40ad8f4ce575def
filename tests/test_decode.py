"""The sampler against transformers' own ``generate``, a plain forward pass, and the softmax."""

# torch, transformers and scipy are partly untyped.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

import random
from collections import Counter
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from scipy.stats import chisquare  # pyright: ignore[reportUnknownVariableType]

from selfwright.agents.engines.cache import PrefixCache
from selfwright.agents.engines.decode import Sampled, Want, sample
from selfwright.core.models.constraints import Chosen, Follower, tree

NEVER = frozenset[int]()
"""No token ends what is sampled."""
END = {1}
KINDS = ("qwen3", "llama", "mistral", "qwen3 eager", "wide", "hybrid")


@pytest.fixture(scope="module")
def model(model_folder: Callable[[str], Path]) -> Callable[[str], Any]:
    opened: dict[str, Any] = {}
    untyped: Any = transformers.AutoModelForCausalLM

    def get(kind: str) -> Any:
        if kind not in opened:
            name, _, attention = kind.partition(" ")
            opened[kind] = untyped.from_pretrained(
                model_folder(name), attn_implementation=attention or "sdpa"
            ).eval()
        return opened[kind]

    return get


@pytest.fixture(scope="module")
def small() -> Any:
    """Eight tokens only, so that every outcome can be counted."""
    torch.manual_seed(3)
    config: Any = transformers.Qwen3Config(
        vocab_size=8,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        initializer_range=0.15,
    )
    return transformers.Qwen3ForCausalLM(config).eval()


def prompts_of(lengths: Sequence[int], seed: int = 0) -> list[tuple[int, ...]]:
    rng = random.Random(seed)
    return [tuple(rng.randrange(5, 250) for _ in range(length)) for length in lengths]


def logprobs_of(model: Any, prompt: Sequence[int], ids: Sequence[int]) -> list[float]:
    """By one plain forward pass over one unpadded row."""
    with torch.inference_mode():
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()


@contextmanager
def shapes_read(model: Any) -> Generator[list[tuple[int, int]]]:
    """(rows, columns) of every forward pass."""
    shapes: list[tuple[int, int]] = []

    def see(_: Any, args: Any, kwargs: Any) -> None:
        shapes.append(tuple(kwargs["input_ids"].shape))

    hook = model.register_forward_pre_hook(see, with_kwargs=True)
    try:
        yield shapes
    finally:
        hook.remove()


def one_of(*choices: tuple[int, ...]) -> Callable[[], Follower]:
    root = tree(choices)
    return lambda: Chosen(root)


def ids(results: Sequence[Sampled]) -> list[list[int]]:
    return [result.ids for result in results]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lengths", [(3, 17, 9, 1, 12, 17), (8, 8, 8)], ids=["uneven", "even"])
def test_greedy_is_generate_token_for_token(
    model: Callable[[str], Any], kind: str, lengths: tuple[int, ...]
) -> None:
    net = model(kind)
    prompts = prompts_of(lengths)
    wants = [Want(prompt, 0, temperature=0.0, max_tokens=14) for prompt in prompts]
    endless = sample(net, wants, NEVER)
    # A token that some row says in mid-sentence becomes the end, so that rows end unevenly.
    said = next(x for x in endless[0].ids[3:] if x != endless[0].ids[0])
    longest = max(lengths)
    width = [(0,) * (longest - len(prompt)) + prompt for prompt in prompts]
    with torch.inference_mode():
        made = net.generate(
            torch.tensor(width),
            attention_mask=torch.tensor([[0] * (longest - n) + [1] * n for n in lengths]),
            do_sample=False,
            max_new_tokens=14,
            eos_token_id=said,
            pad_token_id=0,
        )[:, longest:].tolist()
    for result, row in zip(sample(net, wants, {said}), made, strict=True):
        expected = row[: row.index(said) + 1] if said in row else row
        assert result.ids == expected
        assert result.finish == ("stop" if said in row else "length")


@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_those_of_a_plain_forward_pass(model: Callable[[str], Any], kind: str) -> None:
    net = model(kind)
    prompts = prompts_of((2, 30, 11, 11, 5))
    wants = [
        Want(prompt, k, temperature=0.5 + k, top_p=0.9, max_tokens=5 + 3 * k)
        for k, prompt in enumerate(prompts)
    ]
    for want, result in zip(wants, sample(net, wants, NEVER), strict=True):
        assert len(result.ids) == want.max_tokens and result.finish == "length"
        assert result.logprobs == pytest.approx(logprobs_of(net, want.prompt, result.ids), abs=1e-4)


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.6, 1.0), (1.7, 0.8), (1.0, 0.7)])
def test_frequencies_are_the_softmax(small: Any, temperature: float, top_p: float) -> None:
    prompt, count = (1, 5, 2), 4000
    wants = [Want(prompt, seed, temperature, top_p, max_tokens=2) for seed in range(7, 7 + count)]
    seen = Counter(tuple(result.ids) for result in sample(small, wants, NEVER))

    def distribution(before: Sequence[int]) -> list[float]:
        with torch.inference_mode():
            logits = small(torch.tensor([before])).logits[0, -1].double()
        probs = (logits / temperature).softmax(-1).tolist()
        kept, total = set[int](), 0.0
        for k in sorted(range(8), key=lambda k: -probs[k]):
            if total < top_p:
                kept.add(k)
            total += probs[k]
        norm = sum(probs[k] for k in kept)
        return [probs[k] / norm if k in kept else 0.0 for k in range(8)]

    first = distribution(prompt)
    expected: dict[tuple[int, ...], float] = {
        (a, b): count * first[a] * p
        for a in range(8)
        for b, p in enumerate(distribution((*prompt, a)))
    }
    assert all(expected[pair] > 0 for pair in seen)
    rare = [pair for pair, times in expected.items() if times < 5]
    common = [pair for pair in expected if pair not in rare]
    observed = [seen[pair] for pair in common] + [sum(seen[pair] for pair in rare)]
    wanted = [expected[pair] for pair in common] + [sum(expected[pair] for pair in rare)]
    if not wanted[-1]:
        observed.pop()
        wanted.pop()
    assert chisquare(observed, wanted).pvalue > 0.001


def test_the_tiniest_top_p_or_temperature_is_greedy(model: Callable[[str], Any]) -> None:
    net = model("qwen3")
    prompts = prompts_of((6, 9))
    greedy = sample(net, [Want(p, 1, 0.0, max_tokens=6) for p in prompts], NEVER)
    narrow = sample(net, [Want(p, 1, 1.0, 1e-9, max_tokens=6) for p in prompts], NEVER)
    cold = sample(net, [Want(p, 1, 1e-6, max_tokens=6) for p in prompts], NEVER)
    assert ids(greedy) == ids(narrow) == ids(cold)


def mixed(count: int, seed: int = 0) -> list[Want]:
    """Wants as unlike each other as can be."""
    rng = random.Random(seed)
    prompts = prompts_of([rng.randrange(1, 30) for _ in range(count)], seed)
    return [
        Want(
            prompts[k] if k % 3 else prompts[k // 2],
            seed=k,
            temperature=rng.choice([0.0, 0.7, 1.0]),
            top_p=rng.choice([0.5, 1.0]),
            max_tokens=rng.randrange(1, 20),
            follow=one_of((7, 8, 1), (7, 9, 9, 1), (1,)) if k % 5 == 0 else None,
            stopped=(lambda so_far: len(so_far) == 4) if k % 7 == 0 else None,
        )
        for k in range(count)
    ]


@pytest.mark.parametrize("kind", ["qwen3", "mistral"])
def test_company_does_not_matter(model: Callable[[str], Any], kind: str) -> None:
    # Rows end at many different times, so finished ones ride along and are dropped again.
    net, wants = model(kind), mixed(40)
    with shapes_read(net) as shapes:
        together = sample(net, wants, END)
    rows = [rows for rows, _ in shapes]
    assert rows[0] == len({want.prompt for want in wants}) < 40
    assert rows[1:] == sorted(rows[1:], reverse=True) and rows[-1] <= 5
    for want, result in zip(wants, together, strict=True):
        (alone,) = sample(net, [want], END)
        assert alone.ids == result.ids and alone.finish == result.finish
        assert alone.logprobs == pytest.approx(result.logprobs, abs=1e-4)
        assert len(result.ids) <= want.max_tokens
        if want.stopped is not None and len(result.ids) == 4:
            assert result.finish == "stop"


def test_equal_prompts_are_read_once_and_answered_apart(model: Callable[[str], Any]) -> None:
    net, (prompt,) = model("qwen3"), prompts_of((12,))
    wants = [Want(prompt, seed, 3.0, max_tokens=4) for seed in range(30)]
    with shapes_read(net) as shapes:
        results = sample(net, wants, NEVER)
    assert shapes[0] == (1, 12) and shapes[1] == (30, 1)
    assert len({tuple(result.ids) for result in results}) > 25
    again = sample(net, [*wants, wants[4]], NEVER)
    assert again[-1].ids == results[4].ids and ids(again[:-1]) == ids(results)


def test_few_rows_are_not_copied_every_token(model: Callable[[str], Any]) -> None:
    net = model("qwen3")
    wants = [Want(prompt, 0, max_tokens=10) for prompt in prompts_of((5, 6))]
    with shapes_read(net) as shapes:
        sample(net, [*wants, replace(wants[0], seed=1, max_tokens=3)], NEVER)
    assert [rows for rows, _ in shapes] == [2, 3, 3, *[2] * 7]


def test_choices_are_the_only_answers(model: Callable[[str], Any]) -> None:
    net, end = model("qwen3"), 1
    # One is the beginning of another; two differ in the middle; one is the end token alone.
    choices = ((20, 21, end), (20, 21, 22, end), (20, 30, 22, end), (40, end), (end,))
    prompts = prompts_of([4, 9, 6])
    wants = [
        Want(prompts[k % 3], k, temperature=8.0, max_tokens=9, follow=one_of(*choices))
        for k in range(300)
    ]
    results = sample(net, wants, {end})
    seen = Counter(tuple(result.ids) for result in results)
    assert set(seen) == set(choices)
    assert {result.finish for result in results} == {"stop"}
    for want, result in zip(wants[:20], results, strict=False):
        # Log-probabilities are the model's own, as if nothing had been forbidden.
        assert result.logprobs == pytest.approx(logprobs_of(net, want.prompt, result.ids), abs=1e-4)


def test_greedy_takes_the_likelier_choice(model: Callable[[str], Any]) -> None:
    net, end = model("llama"), 1
    for prompt in prompts_of([5] * 12):
        choices = ((50, end), (60, end), (70, end))
        (result,) = sample(net, [Want(prompt, 0, 0.0, follow=one_of(*choices))], {end})
        first = [logprobs_of(net, prompt, choice)[0] for choice in choices]
        assert tuple(result.ids) == choices[first.index(max(first))]


def test_ends_at_the_end_token_at_a_stop_or_at_the_length(model: Callable[[str], Any]) -> None:
    net, (prompt,) = model("qwen3"), prompts_of((7,))
    want = Want(prompt, 3, max_tokens=12)
    (endless,) = sample(net, [want], NEVER)
    (ended,) = sample(net, [want], {endless.ids[5]})
    assert ended.ids == endless.ids[: endless.ids.index(endless.ids[5]) + 1]
    assert (endless.finish, ended.finish) == ("length", "stop")

    def said_third(so_far: Sequence[int]) -> bool:
        return endless.ids[2] in so_far

    stop = replace(want, stopped=said_third)
    (stopped,) = sample(net, [stop], NEVER)
    assert stopped.ids == endless.ids[: endless.ids.index(endless.ids[2]) + 1]
    assert stopped.finish == "stop"
    (one,) = sample(net, [replace(want, max_tokens=1)], NEVER)
    assert one.ids == endless.ids[:1]


@pytest.mark.parametrize("kind", ["qwen3", "mistral", "qwen3 eager"])
def test_remembered_conversations_go_on_as_if_read_anew(
    model: Callable[[str], Any], kind: str
) -> None:
    net, memory, rng = model(kind), PrefixCache(1 << 30), random.Random(4)
    talks = prompts_of([rng.randrange(3, 25) for _ in range(30)])
    for turn in range(4):
        wants = [
            Want(talk, 100 * turn + k, max_tokens=rng.randrange(1, 9))
            for k, talk in enumerate(talks)
        ]
        with shapes_read(net) as shapes:
            kept = sample(net, wants, END, memory)
        # From the second turn on only what is new is read: the last token, and what came since.
        assert shapes[0][1] == max(map(len, talks)) if turn == 0 else shapes[0][1] <= 12
        anew = sample(net, wants, END)
        assert ids(kept) == ids(anew)
        for one, other in zip(kept, anew, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
        since = [tuple(rng.randrange(5, 250) for _ in range(rng.randrange(1, 11))) for _ in talks]
        talks = [
            (*talk, *result.ids, *new) for talk, result, new in zip(talks, kept, since, strict=True)
        ]


def test_memory_forgets_the_oldest_and_may_be_cleared(model: Callable[[str], Any]) -> None:
    net, memory = model("qwen3"), PrefixCache(1 << 30)
    first, second, third = prompts_of((8, 9, 10))

    def talk(prompt: tuple[int, ...]) -> tuple[int, ...]:
        (said,) = sample(net, [Want(prompt, 0, max_tokens=3)], NEVER, memory)
        return (*prompt, *said.ids, 5)

    one = talk(first)
    # The last token was sampled, never read.
    known = memory.find((one, ()))
    assert known is not None and known.length == 8 + 2
    assert memory.find((first, ())) is None and memory.find(((5, 6), ())) is None
    # Room for two of a kind, not for three.
    memory = PrefixCache(2 * memory.nbytes + memory.nbytes // 2)
    talks = [talk(prompt) for prompt in (first, second, third)]
    assert [memory.find((prompt, ())) is not None for prompt in talks] == [False, True, True]
    memory.clear()
    assert memory.find((talks[2], ())) is None and memory.nbytes == 0
    # No room at all: it is a limit, not a wish.
    memory = PrefixCache(1)
    assert memory.find((talk(first), ())) is None and memory.nbytes == 0


def test_known_and_new_conversations_may_be_asked_together(model: Callable[[str], Any]) -> None:
    net, memory = model("qwen3"), PrefixCache(1 << 30)
    talks = prompts_of((8, 15))
    said = sample(net, [Want(talk, 0, max_tokens=3) for talk in talks], NEVER, memory)
    longer = [(*talk, *result.ids, 9, 8, 7) for talk, result in zip(talks, said, strict=True)]
    wants = [Want(talk, 5, max_tokens=4) for talk in (*longer, *prompts_of((4, 30), seed=9))]
    assert ids(sample(net, wants, NEVER, memory)) == ids(sample(net, wants, NEVER))


def test_a_model_that_keeps_states_reads_one_length_at_a_time(model: Callable[[str], Any]) -> None:
    net, wants, memory = model("hybrid"), mixed(24), PrefixCache(1 << 30)
    with shapes_read(net) as shapes:
        together = sample(net, wants, END, memory)
    lengths = {len(want.prompt) for want in wants}
    assert [columns for _, columns in shapes if columns > 1] == [
        *(n for n in dict.fromkeys(len(want.prompt) for want in wants) if n > 1)
    ]
    assert len(lengths) > 5 and memory.nbytes == 0
    for want, result in zip(wants, together, strict=True):
        (alone,) = sample(net, [want], END)
        assert alone.ids == result.ids and alone.finish == result.finish
        expected = logprobs_of(net, want.prompt, result.ids)
        assert result.logprobs == pytest.approx(expected, abs=1e-4)


def test_layers_are_masked_as_their_kind_wants_it() -> None:
    # Attention within chunks: the masks of other kinds would let tokens see too much.
    torch.manual_seed(0)
    config: Any = transformers.Llama4TextConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        intermediate_size_mlp=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=2,
        attention_chunk_size=8,
        layer_types=["chunked_attention", "full_attention"],
        initializer_range=0.3,
        pad_token_id=None,
    )
    net: Any = transformers.Llama4ForCausalLM(config).eval()
    prompts = [tuple(k % 60 for k in prompt) for prompt in prompts_of((19, 6, 11))]
    wants = [Want(prompt, k, max_tokens=7) for k, prompt in enumerate(prompts)]
    for want, result in zip(wants, sample(net, wants, NEVER), strict=True):
        expected = logprobs_of(net, want.prompt, result.ids)
        assert result.logprobs == pytest.approx(expected, abs=1e-4)


def test_choices_may_hold_an_end_token(model: Callable[[str], Any]) -> None:
    choices = ((20, 1, 21, 1), (30, 1))
    wants = [Want((5, 6), k, 9.0, follow=one_of(*choices)) for k in range(20)]
    assert {tuple(one.ids) for one in sample(model("qwen3"), wants, END)} == set(choices)


def test_weights_that_overflow_are_an_error_not_an_answer(small: Any) -> None:
    weight = small.model.embed_tokens.weight
    original = weight.detach().clone()
    with torch.no_grad():
        weight[2] = torch.nan
    try:
        with pytest.raises(FloatingPointError, match="not finite"):
            sample(small, [Want((1, 2), 0, max_tokens=2)], NEVER)
    finally:
        with torch.no_grad():
            weight.copy_(original)
