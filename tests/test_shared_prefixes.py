"""What many prompts begin with: planned, read once, kept, no different from reading it again."""

# torch and transformers are partly untyped.
# pyright: reportUnknownMemberType=false

import asyncio
import copy
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from test_decode import NEVER, shapes_read

from selfwright.agents.engines import attention
from selfwright.agents.engines.attention import attend, shares
from selfwright.agents.engines.cache import PrefixCache, Read
from selfwright.agents.engines.decode import Sampled, Want, sample
from selfwright.agents.engines.plan import plan
from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.core.models.prefixes import LEAST, STEP
from selfwright.core.types import Completion, Message, Prompt, Sampling

Folder = Callable[[str], Path]


def opened(folder: Path, attention: str = "sdpa") -> Any:
    untyped: Any = transformers.AutoModelForCausalLM
    return untyped.from_pretrained(folder, attn_implementation=attention).eval()


def prompts_of(beginning: Sequence[int], lengths: Sequence[int]) -> list[tuple[int, ...]]:
    rng = random.Random(7)
    return [(*beginning, *(rng.randrange(5, 250) for _ in range(n))) for n in lengths]


def long(passes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Those over more than one column."""
    return [one for one in passes if one[1] > 1]


def check_same(results: Sequence[Sampled], others: Sequence[Sampled]) -> None:
    for one, other in zip(results, others, strict=True):
        assert one.ids == other.ids
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("memory", [False, True])
@pytest.mark.parametrize(
    ("kind", "can"),
    [("qwen3", True), ("llama", True), ("wide", True), ("mistral", False), ("qwen3 eager", False)],
)
def test_reading_it_once_changes_nothing(
    model_folder: Folder, kind: str, can: bool, memory: bool
) -> None:
    name, _, implementation = kind.partition(" ")
    plain = opened(model_folder(name), implementation or "sdpa")
    net = opened(model_folder(name), implementation or "sdpa")
    assert attend(net) == shares(net) == can
    kept = PrefixCache(1 << 30) if memory else None
    talks = prompts_of(range(5, 35), (1, 6, 11, 3, 3, 2))
    for turn in range(3):
        wants = [Want(talk, 10 * turn + k, max_tokens=2 + k) for k, talk in enumerate(talks)]
        with shapes_read(net) as passes:
            results = sample(net, wants, NEVER, kept, shared=30)
        shapes = long(passes)
        check_same(results, sample(plain, wants, NEVER))
        if not memory or turn == 0:
            assert shapes[0] == (1, 30)
            assert shapes[1] == (6, max(len(talk) for talk in talks) - 30)
        else:
            # The last token of each answer, and what came since.
            assert shapes == [(6, 4)]
        talks = [(*w.prompt, *r.ids, 8, 9, 10) for w, r in zip(wants, results, strict=True)]


def test_conversations_hold_nothing_of_what_they_share(model_folder: Folder) -> None:
    net, kept = opened(model_folder("qwen3")), PrefixCache(1 << 30)
    attend(net)
    prompts = prompts_of([9] * 200, (4,) * 20)
    sample(net, [Want(p, 0, max_tokens=4) for p in prompts], NEVER, kept, shared=200)
    alone = PrefixCache(1 << 30)
    sample(net, [Want(prompts[0][:204], 0, max_tokens=1)], NEVER, alone)
    # 200 columns once and 20 rows of eight, where rows that held all would have 20 of 208.
    assert kept.nbytes == alone.nbytes // 205 * (200 + 20 * 8)
    kept.clear(shared=False)
    assert kept.nbytes == alone.nbytes // 205 * 200
    kept.clear()
    assert kept.nbytes == 0


def test_a_model_that_attends_otherwise_does_so_still(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wrong(query: torch.Tensor, *others: Any) -> torch.Tensor:
        return query.transpose(1, 2) * 3

    with monkeypatch.context() as patch:
        patch.setattr(attention, "_merged", wrong)
        assert not shares(policy_of(model_folder("qwen3")).model)
    # And where the model does something to the keys that its cache does not know of.
    find: Callable[..., Any] = getattr(attention, "_shared_before")  # noqa: B009
    with monkeypatch.context() as patch:
        patch.setattr(attention, "_shared_before", lambda module, key: find(module, key.clone()))  # pyright: ignore[reportUnknownLambdaType, reportUnknownArgumentType]
        assert not shares(policy_of(model_folder("qwen3")).model)
    assert shares(policy_of(model_folder("qwen3")).model)


def policy_of(folder: Path, **keys: Any) -> TransformersPolicy:
    given = {"model": "", "device": "cpu"} | keys
    return TransformersPolicy(TransformersConfig.model_validate(given), str(folder), 0)


def test_it_is_kept_across_turns_and_rounds_until_the_weights_change(
    model_folder: Folder, tmp_path: Path
) -> None:
    policy = policy_of(model_folder("qwen3"))
    plain = policy_of(model_folder("qwen3"), memory_gb=0.0)
    words = Message("system", ("play as shown: " + "3 + 5 = 8, 8 * 3 = 24; " * 12,))

    async def round_of(player: TransformersPolicy, count: int) -> list[Completion]:
        with player.batch_slot():
            asked = [
                player.complete(
                    Prompt((words, Message("user", (f"make {k * 7}",)))), Sampling(max_tokens=4), k
                )
                for k in range(count)
            ]
            return await asyncio.wait_for(asyncio.gather(*asked), 60)

    async def all_rounds() -> None:
        whole = len(policy.tokens.prompt(Prompt((words, Message("user", ("make 7",))))))
        for count, first in ((5, True), (5, False), (3, False), (1, False)):
            with shapes_read(policy.model) as passes:
                answers = await round_of(policy, count)
            shapes = long(passes)
            assert sum(shape[0] == 1 and shape[1] > whole // 2 for shape in shapes) == first
            assert max(columns for _, columns in shapes[first:]) < whole // 4
            expected = await round_of(plain, count)
            assert [a.token_ids for a in answers] == [a.token_ids for a in expected]
        await policy.load(None)
        with shapes_read(policy.model) as passes:
            await round_of(policy, 5)
        shapes = long(passes)
        assert shapes[0][0] == 1 and shapes[0][1] > whole // 2

    asyncio.run(all_rounds())


def test_lone_prompts_that_follow_one_another_share_too(model_folder: Folder) -> None:
    memory = PrefixCache(1 << 30)
    first, second, third = prompts_of(range(5, 105), (9, 7, 30))
    assert plan([(first, ())], memory) == [([0], 0)]
    ((which, length),) = plan([(second, ())], memory)
    assert which == [0] and length == 96
    net = opened(model_folder("qwen3"))
    sample(net, [Want(second, 0, max_tokens=2)], NEVER, memory, shared=length)
    memory.last = ()
    assert plan([(third, ())], memory) == [([0], 96)]
    memory.clear()
    assert plan([(third, ())], memory) == [([0], 0)]


def test_each_worlds_beginning_is_its_own() -> None:
    one, other = prompts_of([7] * 300, (5, 6, 8)), prompts_of([8] * 200, (9, 9))
    (short,) = prompts_of([9], (20,))
    prompts: list[Read] = [(ids, ()) for ids in (one[0], other[0], short, *one[1:], other[1])]
    assert sorted(plan(prompts, None)) == [([0, 3, 4], 288 + 0), ([1, 5], 192), ([2], 0)]
    # A few words more that some of them have in common are not worth a batch of their own.
    near = [*prompts_of([7] * 300, (5, 6, 8)), *prompts_of([*[7] * 300, *[8] * 40], (3, 4))]
    assert plan([(ids, ()) for ids in near], None) == [([0, 1, 2, 3, 4], 288)]


@given(
    st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 150), st.lists(st.integers(0, 2), max_size=40)),
        min_size=1,
        max_size=12,
    )
)
def test_every_prompt_is_read_once_and_has_more_than_what_is_shared(
    drawn: list[tuple[int, int, list[int]]],
) -> None:
    prompts: list[Read] = [((first, *[first] * n, *rest), ()) for first, n, rest in drawn]
    groups = plan(prompts, None)
    assert sorted(k for which, _ in groups for k in which) == list(range(len(prompts)))
    for which, length in groups:
        assert length == 0 or (length >= LEAST and length % STEP == 0)
        assert len({prompts[k][0][:length] for k in which}) == 1
        assert all(len(prompts[k][0]) > length for k in which)
    # Copies of one prompt are read once anyhow.
    assert len(plan([prompts[0]] * 3, None)) == 1


def test_a_copy_of_the_model_attends_alike(model_folder: Folder) -> None:
    net = opened(model_folder("llama"))
    attend(net)
    again = copy.deepcopy(net)
    wants = [Want(p, 0, max_tokens=4) for p in prompts_of([9] * 20, (4, 6))]
    check_same(
        sample(again, wants, NEVER, None, shared=20), sample(net, wants, NEVER, None, shared=20)
    )
