"""The learner: its gradients against plain ones, its schedules by hand, its memory bit for bit."""

# torch, transformers and peft are partly untyped; gradients are no part of the learner's interface.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false

import math
import random
import shutil
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from prompts import prompt_of
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.core.errors import LearnerError
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.seeds import derive
from selfwright.core.types import (
    Aggregation,
    Batch,
    Completion,
    Example,
    Loss,
    Message,
    Need,
    Prompt,
    TokenArrays,
)
from selfwright.trainers.learning import head, memory
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import (
    DPO,
    NLL,
    Clip,
    ContestedGap,
    CovarianceClip,
    MomentGap,
    SequenceClip,
)
from selfwright.trainers.learning.pack import Row, Span, micro_batches, pack, units
from selfwright.trainers.parts.critic import Critic, CriticConfig

Folder = Callable[[str], Path]
Gradients = dict[str, torch.Tensor]


def learner_of(folder: Path, seed: int = 0, **keys: Any) -> PlainLearner:
    given = {"device": "cpu", "rank": 4, "alpha": 8, "learning_rate": 1e-2} | keys
    return PlainLearner(LearnerConfig.model_validate(given), str(folder), seed)


def talks(tokens: ChatTokens, count: int, seed: int = 0, turns: int = 3) -> list[Example]:
    """Turns of trajectories of uneven length, with the log-probabilities of some sampler."""
    rng = random.Random(seed)
    examples: list[Example] = []
    for _ in range(count):
        messages: list[Message] = []
        for _ in range(rng.randrange(1, turns + 1)):
            messages.append(Message("user", ("make " + "9 " * rng.randrange(1, 12),)))
            ids = (*(rng.randrange(5, 250) for _ in range(rng.randrange(1, 7))), tokens.end)
            said = Completion(tokens.text(ids), ids, tuple(rng.uniform(-9, -2) for _ in ids))
            examples.append(Example(Prompt(tuple(messages)), said, rng.uniform(-2, 2)))
            messages.append(Message("assistant", (said.text,), token_ids=ids))
    return examples


@contextmanager
def gradients(learner: PlainLearner) -> Generator[list[Gradients]]:
    """Those of every optimiser step."""
    seen: list[Gradients] = []

    def see(*_: Any) -> None:
        seen.append({n: w.grad.clone() for n, w in learner._trained.items() if w.grad is not None})

    hook = learner._optimizer.register_step_pre_hook(see)
    try:
        yield seen
    finally:
        hook.remove()


def gradient(learner: PlainLearner, batch: Batch) -> Gradients:
    """Of one step, whatever is clipped away."""
    with gradients(learner) as seen:
        learner.update(batch, 0.0)
    (only,) = seen
    return only


def close(one: Gradients, other: Gradients, tolerance: float = 1e-5) -> bool:
    return one.keys() == other.keys() and all(
        torch.allclose(one[name], other[name], rtol=tolerance, atol=tolerance) for name in one
    )


def state(learner: PlainLearner) -> Gradients:
    return {name: w.detach().clone() for name, w in learner._model.named_parameters()}


def equal(one: Gradients, other: Gradients) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def opened(folder: Path) -> Any:
    untyped: Any = transformers.AutoModelForCausalLM
    return untyped.from_pretrained(folder)


def logprobs(model: Any, prompt: Sequence[int], said: Sequence[int]) -> torch.Tensor:
    """(T,) nats, by one plain pass over one row."""
    logits = model(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1).gather(1, torch.tensor(said)[:, None])[:, 0]


LOOSE: dict[str, Any] = {"max_grad_norm": 1e9, "batch_size": 10_000}


@pytest.mark.parametrize("kind", ["qwen3", "llama", "mistral"])
def test_the_gradient_is_the_plain_one(model_folder: Folder, kind: str) -> None:
    """One padded batch of packed rows, against every example by itself."""
    folder = model_folder(kind)
    learner = learner_of(folder, method="full", **LOOSE)
    tokens = learner._tokens
    examples, model = talks(tokens, 5), opened(folder)
    total = torch.zeros(())
    for one in examples:
        said = logprobs(model, tokens.prompt(one.prompt), one.completion.token_ids)
        total = total - one.advantage * said.mean() / len(examples)
    total.backward()
    plain: Gradients = {name: w.grad for name, w in model.named_parameters()}
    with gradients(learner) as seen:
        metrics = learner.update(Batch(NLL(), tuple(examples)), 0.0)
    assert metrics["train/loss"] == pytest.approx(total.item(), abs=1e-5)
    norm = math.sqrt(sum(float(slope.square().sum()) for slope in plain.values()))
    assert metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-5)
    assert close(seen[0], plain)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_what_rows_begin_with_is_read_once(model_folder: Folder, kind: str, method: str) -> None:
    words = Message("system", ("play as shown: " + "3 + 5 = 8, 8 * 3 = 24; " * 12,))

    def shown(tokens: ChatTokens) -> tuple[Example, ...]:
        return tuple(
            replace(one, prompt=Prompt((words, *one.prompt.messages))) for one in talks(tokens, 6)
        )

    found: list[tuple[Gradients, float]] = []
    for once in (True, False):
        learner = learner_of(model_folder(kind), method=method, token_budget=600, **LOOSE)
        examples = shown(learner._tokens)
        whole = sum(len(row.ids) for row in pack(examples, learner._tokens))
        read: list[int] = []

        def see(_: Any, args: Any, kwargs: Any, read: list[int] = read) -> None:
            read.append(kwargs["input_ids"].numel())

        assert learner._reader.plants
        learner._model.register_forward_pre_hook(see, with_kwargs=True)
        with gradients(learner) as seen, pytest.MonkeyPatch.context() as patch:
            if not once:
                patch.setattr(learner._reader, "plants", False)
            metrics = learner.update(Batch(NLL(), examples), 0.0)
        found.append((seen[0], metrics["train/loss"]))
        assert sum(read) < whole / 2 if once else sum(read) >= whole
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-5)
    assert close(found[0][0], found[1][0])


def contested(teacher: Path, own: bool) -> ContestedGap:
    return ContestedGap(str(teacher), own, critic=Critic(CriticConfig(learning_rate=0.05), 0))


LOSSES: dict[str, Callable[[Path], Loss]] = {
    "nll": lambda _: NLL(),
    "nll per token": lambda _: NLL("token-mean"),
    "clip": lambda _: Clip(dual=3.0, kl=0.1, aggregation="seq-mean-token-mean"),
    "covariance": lambda _: CovarianceClip(
        aggregation="seq-mean-token-sum-norm", share=0.3, above=0.1
    ),
    "sequences": lambda _: SequenceClip(low=0.9, high=9.0),
    "dpo": lambda _: DPO(0.1),
    "exact moments": lambda teacher: MomentGap(str(teacher), own=True),
    "moments": lambda teacher: contested(teacher, True),
}
"""By name, given a teacher."""


@pytest.fixture(scope="session")
def other(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of the same vocabulary as ``qwen3``, with other weights."""
    folder = tmp_path_factory.mktemp("other")
    shutil.copytree(model_folder("qwen3"), folder, dirs_exist_ok=True)
    model = opened(folder)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.5)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", LOSSES)
def test_micro_batches_do_not_matter(model_folder: Folder, other: Path, name: str) -> None:
    folder = model_folder("qwen3")
    tokens = learner_of(folder)._tokens
    examples = [replace(one, group=k) for k, one in enumerate(talks(tokens, 12))]
    if name == "dpo":
        examples = [
            replace(one, group=k // 2, advantage=1.0 - 2 * (k % 2))
            for k, one in enumerate(examples)
        ]
    rows = pack(examples, tokens)
    found: dict[int, Gradients] = {}
    for budget in range(1200, 0, -10):
        count = len(micro_batches(rows, budget, 10**9))
        if count not in found and count in (1, 2, 4, len(rows)):
            batch = Batch(LOSSES[name](other), tuple(examples))
            found[count] = gradient(learner_of(folder, token_budget=budget, **LOOSE), batch)
    assert sorted(found) == [1, 2, 4, len(rows)]
    assert all(close(found[1], one) for one in found.values())
    assert any(bool((slope != 0).any()) for slope in found[1].values())


def test_a_group_is_learned_in_one_step(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    given = talks(tokens_of(folder), 24, turns=1)
    examples = tuple(replace(one, group=k % 12) for k, one in enumerate(given))
    seen: list[list[int]] = []

    @dataclass(frozen=True)
    class Seeing(CovarianceClip):
        def weigh(self, arrays: TokenArrays, seed: int) -> Any:
            seen.append(sorted(set(arrays.groups.tolist())))
            return torch.ones(len(arrays.logprobs))

    learner_of(folder, batch_size=4).update(Batch(Seeing(), examples), 0.0)
    assert len(seen) == 6
    assert sorted(group for groups in seen for group in groups) == list(range(12))


def test_rows_of_a_group_stay_together() -> None:
    def row(*groups: int) -> Row:
        return Row([], spans=[Span(0, 1, 1.0, (), 0, group) for group in groups])

    a, b, c, d, e = row(1), row(-1), row(2, 3), row(-1, 1), row(3, 1)
    assert units([a, b, c, d]) == [[a, d], [b], [c]]
    f, g, h = row(1), row(2, 3), row(1, 2, 3)
    assert units([f, g, h]) == [[f, g, h]]
    # The last one joins two groups that were apart.
    assert [sorted(map(id, unit)) for unit in units([a, b, c, d, e])] == [
        sorted(map(id, (a, c, d, e))),
        [id(b)],
    ]


def test_moments_against_plain_ones(model_folder: Folder, other: Path) -> None:
    """The closed form: the gradient of the total variation, one row at a time."""
    folder = model_folder("qwen3")
    learner = learner_of(folder, method="full", **LOOSE)
    tokens = learner._tokens
    examples = talks(tokens, 4, turns=1)
    batch = tuple(replace(one, advantage=1.0, group=k) for k, one in enumerate(examples))
    got = gradient(learner, Batch(MomentGap(str(other)), batch))
    model, teacher = opened(folder), opened(other)
    gaps: list[torch.Tensor] = []
    for one in batch:
        prompt, said = tokens.prompt(one.prompt), one.completion.token_ids
        mine, theirs = (
            m(torch.tensor([[*prompt, *said]])).logits[0, len(prompt) - 1 : -1].softmax(-1)
            for m in (model, teacher)
        )
        gaps.append((mine - theirs.detach()).abs().sum(-1))
    torch.cat(gaps).mean().backward()
    assert close(got, {name: w.grad for name, w in model.named_parameters()})
    # Nothing is left to learn from oneself.
    still = gradient(learner_of(folder, **LOOSE), Batch(MomentGap(str(folder)), batch))
    assert all(slope.abs().max() < 1e-5 for slope in still.values())


def test_a_critic_climbs_before_the_weights_descend(model_folder: Folder, other: Path) -> None:
    folder = model_folder("qwen3")
    loss = contested(other, False)
    learner = learner_of(folder, learning_rate=1e-9)
    batch = Batch(loss, tuple(replace(one, advantage=1.0) for one in talks(tokens_of(folder), 6)))
    seen = [learner.update(batch, 0.0)["train/loss"] for _ in range(30)]
    exact = learner.update(replace(batch, loss=MomentGap(str(other))), 0.0)["train/loss"]
    # It sees ever more of what tells the two apart, and never more than there is.
    assert 0 < seen[0] < seen[9] < seen[29] < exact
    assert seen[29] > 0.5 * exact


def test_a_teacher_of_another_vocabulary_is_refused(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    loss = MomentGap(str(model_folder("wide")))
    with pytest.raises(LearnerError, match=r"another vocabulary .*distributions cannot be comp"):
        learner_of(folder).update(Batch(loss, tuple(talks(tokens_of(folder), 2))), 0.0)


def test_what_has_no_gradient_is_counted_but_not_computed(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    examples = talks(tokens_of(folder), 8, turns=1)
    half = [replace(e, advantage=float(k % 2)) for k, e in enumerate(examples)]
    told = learner_of(folder, **LOOSE).update(Batch(NLL(), tuple(half)), 0.0)
    alone = learner_of(folder, **LOOSE).update(Batch(NLL(), tuple(half[1::2])), 0.0)
    assert told["train/tokens"] == alone["train/tokens"]
    assert told["train/loss"] == pytest.approx(alone["train/loss"] / 2)
    assert told["train/grad_norm"] == pytest.approx(alone["train/grad_norm"] / 2, rel=1e-4)
    assert (told["train/examples"], told["train/updates"]) == (8, 1)


def test_a_step_without_a_gradient_is_no_step(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    learner, examples = trained(folder)
    before = state(learner)
    idle = tuple(replace(e, advantage=0.0) for e in examples)
    for loss in (Clip(), CovarianceClip()):
        assert learner.update(Batch(loss, idle), 0.0)["train/updates"] == 0
    # Momentum would have moved them.
    assert equal(before, state(learner))
    pulled = learner.update(Batch(Clip(kl=0.1), idle), 0.0)
    assert pulled["train/updates"] == 1 and not equal(before, state(learner))


def test_tokens_that_a_loss_leaves_out_have_no_gradient(model_folder: Folder) -> None:
    """It decides on all of the step's tokens, in their order, whatever the micro-batches."""
    folder = model_folder("qwen3")
    examples = talks(tokens_of(folder), 5)
    seen: list[TokenArrays] = []

    @dataclass(frozen=True)
    class FirstHalf(CovarianceClip):
        def weigh(self, arrays: TokenArrays, seed: int) -> Any:
            seen.append(arrays)
            return (torch.arange(len(arrays.logprobs)) < len(arrays.logprobs) // 2).float()

    for budget in (10_000, 60):
        learner = learner_of(folder, token_budget=budget, **LOOSE)
        got = gradient(learner, Batch(FirstHalf(aggregation="token-mean"), tuple(examples)))
        fresh = learner_of(folder)
        rows = pack(examples, fresh._tokens)
        random.Random(derive(0, "order", 0, 0)).shuffle(rows)
        spans = [(row, span) for row in rows for span in row.spans]
        count = sum(span.end - span.begin for _, span in spans)
        total, left = torch.zeros(()), count // 2
        told: list[torch.Tensor] = []
        for row, span in spans:
            said = logprobs(fresh._model, row.ids[: span.begin], row.ids[span.begin : span.end])
            ratio = (said - torch.tensor(span.old_logprobs)).exp()
            worth = (ratio * span.advantage).minimum(ratio.clip(0.8, 1.2) * span.advantage)
            total = total - worth[: max(0, left)].sum() / count
            left -= len(said)
            told.append(said.detach())
        total.backward()
        plain = {n: w.grad for n, w in fresh._trained.items() if w.grad is not None}
        assert close(got, plain)
        assert torch.allclose(seen[-1].logprobs, torch.cat(told), atol=1e-4)
        flat = [span.advantage for _, span in spans for _ in range(span.begin, span.end)]
        assert seen[-1].advantages.tolist() == pytest.approx(flat)


def test_a_fresh_start_is_the_first_one(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    examples = tuple(talks(tokens_of(folder), 6))
    for method in ("lora", "full"):
        first = learner_of(folder, method=method)
        first.update(Batch(NLL(), examples), 0.0)
        again = learner_of(folder, method=method)
        for _ in range(2):
            again.update(Batch(NLL(), examples[:3]), 0.0)
        again.update(Batch(NLL(), examples, fresh=True), 0.0)
        assert equal(state(first), state(again))
    # Late in the run, too: it is a training of its own.
    late = learner_of(folder, schedule="cosine")
    assert late.update(Batch(NLL(), examples, fresh=True), 0.9)["train/learning_rate"] == 1e-2
    assert late.update(Batch(NLL(), examples), 0.9)["train/learning_rate"] < 1e-3


def test_few_logits_at_a_time_do_not_matter(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = model_folder("wide")
    batch = Batch(NLL(), tuple(talks(learner_of(folder)._tokens, 6)))
    whole = gradient(learner_of(folder, **LOOSE), batch)
    learner = learner_of(folder, **LOOSE)
    assert learner._reader.plants and learner._reader.scale == 1  # Tried before we look.
    monkeypatch.setitem(head.LOGITS, "cpu", 12_000 * 10)
    seen: list[int] = []

    def see(_: Any, args: Any, output: Any) -> None:
        seen.append(output.shape[:-1].numel())

    hook = learner._model.get_output_embeddings().register_forward_hook(see)
    cut = gradient(learner, batch)
    hook.remove()
    assert close(whole, cut)
    # Only trained positions meet the head, and never many of them; one of each pass besides.
    trained = sum(len(e.completion.token_ids) for e in batch.examples)
    assert trained < sum(seen) < trained * 1.2
    assert len(seen) > 1 and max(seen) <= 10


@dataclass(frozen=True)
class Halved:
    """No loss of ours, nor derived from one: what it is given is what it says it needs."""

    needs: frozenset[Need] = frozenset()
    aggregation: Aggregation = "token-mean"
    length: int = 1

    def __call__(self, arrays: TokenArrays) -> Any:
        assert (arrays.reference_logprobs is not None) == (Need.REFERENCE in self.needs)
        assert arrays.distribution is arrays.teacher is arrays.states is None
        return -arrays.advantages * arrays.logprobs

    def weigh(self, arrays: TokenArrays, seed: int) -> Any:
        return torch.full_like(arrays.logprobs, 0.5)


def test_needs_are_served_whoever_has_them(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    examples = tuple(talks(learner_of(folder)._tokens, 4))
    plain, halved, both, wanted = (
        gradient(learner_of(folder, **LOOSE), Batch(loss, examples))
        for loss in (
            Halved(),
            Halved(frozenset({Need.WHOLE_STEP})),
            Halved(frozenset({Need.WHOLE_STEP, Need.REFERENCE})),
            NLL("token-mean"),
        )
    )
    assert close(plain, wanted)
    half = {name: slope / 2 for name, slope in plain.items()}
    assert close(halved, half) and close(both, half)
    odd: Any = frozenset({"omens"})
    with pytest.raises(LearnerError, match="Halved needs omens, and PlainLearner serves adversary"):
        learner_of(folder).update(Batch(Halved(odd), examples), 0.0)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_checkpointed_gradients_are_the_same(model_folder: Folder, method: str) -> None:
    folder = model_folder("qwen3")
    batch = Batch(Clip(kl=0.1 if method == "lora" else 0.0), tuple(talks(tokens_of(folder), 6)))
    plain = gradient(learner_of(folder, method=method, **LOOSE), batch)
    saved = learner_of(folder, method=method, gradient_checkpointing=True, **LOOSE)
    assert close(plain, gradient(saved, batch))


def test_layers_run_again_where_memory_is_short(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    folder = model_folder("qwen3")
    batch = Batch(Clip(kl=0.1), tuple(talks(tokens_of(folder), 6)))
    loose = learner_of(folder, **LOOSE)
    wanted = gradient(loose, batch)
    reader = loose._reader  # pyright: ignore[reportPrivateUsage]
    assert not reader.weights.is_gradient_checkpointing
    # What two short rows tell is what a long one takes.
    each = memory.per_token(reader)
    kept = memory._kept  # pyright: ignore[reportPrivateUsage]
    assert each * 500 == pytest.approx(kept(reader, 900) - kept(reader, 400), rel=0.05)
    taken = each * reader.budget / memory.SHARE
    for room, again in ((1.01 * taken, False), (0.99 * taken, True)):

        def free(device: torch.device, room: float = room) -> int:
            return int(room)

        monkeypatch.setattr(memory, "free", free)
        learner = learner_of(folder, **LOOSE)
        assert close(wanted, gradient(learner, batch))
        found = learner._reader.weights  # pyright: ignore[reportPrivateUsage]
        assert found.is_gradient_checkpointing == again
    # It then keeps far less, and what begins anew goes on so.
    assert memory.per_token(learner._reader) < each / 2  # pyright: ignore[reportPrivateUsage]
    learner.update(replace(batch, fresh=True), 0.0)
    assert learner._reader.weights.is_gradient_checkpointing  # pyright: ignore[reportPrivateUsage]
    # Whoever goes on from it does as it did, whatever memory there is by then.
    learner.save(tmp_path)
    monkeypatch.setattr(memory, "free", lambda device: 1 << 60)  # pyright: ignore
    other = learner_of(folder, **LOOSE)
    other.restore(tmp_path)
    other.update(batch, 0.0)
    assert other._reader.weights.is_gradient_checkpointing  # pyright: ignore[reportPrivateUsage]


def tokens_of(folder: Path) -> ChatTokens:
    untyped: Any = transformers.AutoTokenizer
    return ChatTokens(untyped.from_pretrained(folder))


@pytest.mark.parametrize(
    "keys", [{"dropout": 0.3}, {"method": "full", "weight_decay": 0.1}], ids=["lora", "full"]
)
def test_saved_and_restored_goes_on_bit_for_bit(
    model_folder: Folder, tmp_path: Path, keys: dict[str, Any]
) -> None:
    folder = model_folder("qwen3")
    settings: dict[str, Any] = {"batch_size": 4, "warmup": 5, "token_budget": 90} | keys
    examples = talks(tokens_of(folder), 16)
    batches = [Batch(Clip(), tuple(examples[k : k + 8])) for k in range(0, 24, 4)]

    def learn(learner: PlainLearner, part: slice) -> None:
        for k, batch in list(enumerate(batches))[part]:
            learner.update(batch, k / 6)
            # What others draw meanwhile is not the same when a run is resumed.
            torch.rand(k)

    through = learner_of(folder, **settings)
    learn(through, slice(0, 6))
    first = learner_of(folder, **settings)
    learn(first, slice(0, 3))
    first.save(tmp_path)
    torch.manual_seed(77)
    second = learner_of(folder, **settings)
    second.restore(tmp_path)
    learn(second, slice(3, 6))
    assert equal(state(through), state(second))
    assert not equal(state(first), state(second))
    for learner, name in ((through, "one"), (second, "two")):
        learner.save(tmp_path / name)
    one, two = (load_file(tmp_path / name / "learner.safetensors") for name in ("one", "two"))
    assert equal(one, two)


def test_dropout_follows_the_seed(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    batch = Batch(NLL(), tuple(talks(tokens_of(folder), 6)))
    found: list[Gradients] = []
    for seed in (0, 0, 1):
        learner = learner_of(folder, seed, dropout=0.5)
        learner.update(batch, 0.0)
        found.append(state(learner))
    assert equal(found[0], found[1]) and not equal(found[0], found[2])


def test_what_cannot_be_restored_is_refused(model_folder: Folder, tmp_path: Path) -> None:
    folder = model_folder("qwen3")
    learner = learner_of(folder, rank=1)
    before = state(learner)
    with pytest.raises(LearnerError, match="cannot read"):
        learner.restore(tmp_path)
    (tmp_path / "learner.safetensors").write_bytes(b"garbage")
    with pytest.raises(LearnerError, match="cannot read"):
        learner.restore(tmp_path)
    # A rank of 4 would be copied out of a rank of 1 without complaint, if only names counted.
    for other in (learner_of(folder, rank=4), learner_of(folder, method="full")):
        other.save(tmp_path)
        with pytest.raises(LearnerError, match="another model or config"):
            learner.restore(tmp_path)
    assert equal(state(learner), before)


def trained(folder: Path, **keys: Any) -> tuple[PlainLearner, list[Example]]:
    learner = learner_of(folder, **keys)
    examples = talks(learner._tokens, 6)
    for _ in range(3):
        learner.update(Batch(NLL(), tuple(examples)), 0.0)
    return learner, examples


@pytest.mark.parametrize("method", ["lora", "full"])
def test_what_is_exported_answers_as_what_was_learned(
    model_folder: Folder, tmp_path: Path, method: str
) -> None:
    folder = model_folder("qwen3")
    learner, examples = trained(folder, method=method)
    learner.export(tmp_path / "out")
    untyped: Any = peft.PeftModel
    model: Any = (
        untyped.from_pretrained(opened(folder), tmp_path / "out")
        if method == "lora"
        else opened(tmp_path / "out")
    )
    settings = TransformersConfig.model_validate({"model": "", "device": "cpu"})
    policy = TransformersPolicy(settings, str(folder), 0)
    policy._load(tmp_path / "out")
    learner._model.eval()
    for one in examples:
        prompt, said = learner._tokens.prompt(one.prompt), one.completion.token_ids
        with torch.no_grad():
            own = logprobs(learner._model, prompt, said)
            assert torch.equal(own, logprobs(model.eval(), prompt, said))
            # Merged into the weights, as the policy has it.
            assert torch.allclose(own, logprobs(policy.model, prompt, said), atol=1e-4)
            assert not torch.allclose(own, logprobs(opened(folder), prompt, said), atol=0.1)


def test_only_the_adapter_changes(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    learner, _ = trained(folder)
    base = opened(folder).state_dict()
    for name, weight in learner._model.named_parameters():
        plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
        assert ("lora_" in name) == weight.requires_grad
        assert "lora_" in name or torch.equal(weight, base[plain])
    assert all("lora_" in name for name in learner._trained)
    whole, _ = trained(folder, method="full")
    assert not any(torch.equal(w, base[name]) for name, w in whole._model.named_parameters())


def test_schedules_by_hand(model_folder: Folder) -> None:
    folder = model_folder("scratch")
    batch = Batch(NLL(), (Example(prompt_of("a"), Completion("1")),))

    def rates(progress: Sequence[float], **keys: Any) -> list[float]:
        learner = learner_of(folder, learning_rate=1.0, **keys)
        return [learner.update(batch, p)["train/learning_rate"] for p in progress]

    assert rates([0.0, 0.5, 1.0]) == [1.0, 1.0, 1.0]
    assert rates([0.0, 0.25, 0.9], schedule="linear") == pytest.approx([1.0, 0.75, 0.1])
    cosine = [1.0, (1 + math.cos(math.pi / 4)) / 2, 0.5, 0.0]
    assert rates([0.0, 0.25, 0.5, 1.0], schedule="cosine") == pytest.approx(cosine)
    # The first update already counts: none is lost to a rate of 0.
    assert rates([0.0] * 5, warmup=4) == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
    assert rates([0.5, 0.5], schedule="linear", warmup=4) == pytest.approx([0.125, 0.25])


def test_the_rate_reaches_the_weights(model_folder: Folder) -> None:
    folder = model_folder("scratch")
    batch = Batch(NLL(), (Example(prompt_of("a"), Completion("1")),))
    learner = learner_of(folder, learning_rate=1.0, schedule="linear", method="full")
    before = state(learner)
    learner.update(batch, 1.0)
    assert equal(state(learner), before)
    learner.update(batch, 0.999)
    moved = max(float((w - before[n]).abs().max()) for n, w in state(learner).items())
    # Adam moves a weight by about its rate.
    assert 5e-4 < moved < 2e-3


def test_gradients_are_clipped(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    batch = Batch(NLL(), tuple(talks(tokens_of(folder), 4)))
    whole = gradient(learner_of(folder, **LOOSE), batch)
    clipped = learner_of(folder, max_grad_norm=0.01)
    with gradients(clipped) as seen:
        metrics = clipped.update(batch, 0.0)
    norm = math.sqrt(sum(float(slope.square().sum()) for slope in whole.values()))
    assert norm > 0.1 and metrics["train/grad_norm"] == pytest.approx(norm, rel=1e-4)
    scaled = {name: slope * 0.01 / norm for name, slope in whole.items()}
    assert close(seen[0], scaled, 1e-6)


def test_steps_epochs_and_what_is_counted(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    learner = learner_of(folder, batch_size=4)
    examples = [one for one in talks(learner._tokens, 30) if len(one.prompt.messages) == 1][:16]
    metrics = learner.update(Batch(NLL(), tuple(examples), epochs=3), 0.0)
    rows = pack(examples, learner._tokens)
    assert metrics["train/examples"] == 16 and metrics["train/rows"] == len(rows) == 16
    assert metrics["train/updates"] == 12 == learner._updates
    assert metrics["train/tokens"] == 3 * sum(len(row.ids) for row in rows)
    # Fewer rows than steps asked for: a row is never split.
    alone = learner_of(folder, batch_size=1)
    assert alone.update(Batch(NLL(), tuple(talks(alone._tokens, 1, 3))), 0.0)["train/updates"] == 1


def test_ratio_and_distance_to_the_sampler(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    learner = learner_of(folder)
    one = Example(prompt_of("a"), Completion("", (9, 7, learner._tokens.end)))
    assert learner.update(Batch(Clip(), (one,)), 0.0)["train/ratio"] == 1.0
    fresh, prompt = learner_of(folder), learner._tokens.prompt(one.prompt)
    with torch.no_grad():
        new = logprobs(opened(folder), prompt, one.completion.token_ids)
    old = new - torch.tensor([math.log(2), 0.0, -math.log(4)])
    said = Completion("", one.completion.token_ids, tuple(float(x) for x in old))
    metrics = fresh.update(Batch(Clip(), (Example(one.prompt, said),)), 0.0)
    assert metrics["train/ratio"] == pytest.approx((2 + 1 + 0.25) / 3, rel=1e-4)
    kl = (0.5 - 1 + math.log(2)) / 3 + (4 - 1 - math.log(4)) / 3
    assert metrics["train/kl_old"] == pytest.approx(kl, rel=1e-3)


def test_kl_is_to_the_base_without_the_adapter(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    learner, examples = trained(folder, learning_rate=1e-3)
    model = opened(folder)
    learner._model.eval()
    gaps: list[torch.Tensor] = []
    for one in examples:
        prompt, said = learner._tokens.prompt(one.prompt), one.completion.token_ids
        with torch.no_grad():
            gaps.append(logprobs(model, prompt, said) - logprobs(learner._model, prompt, said))
    learner._model.train()
    gap = torch.cat(gaps)
    free = tuple(Example(e.prompt, e.completion, 0.0) for e in examples)
    metrics = learner.update(Batch(Clip(kl=0.5), free), 0.0)
    expected = 0.5 * float((gap.exp() - gap - 1).mean())
    assert expected > 0.001
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-3)


def test_nothing_and_nonsense_are_refused(model_folder: Folder) -> None:
    folder = model_folder("qwen3")
    learner, examples = trained(folder)
    before, updates = state(learner), learner._updates
    with pytest.raises(LearnerError, match="no examples"):
        learner.update(Batch(NLL(), ()), 0.0)
    for advantage in (math.nan, math.inf, 1e38):
        bad = Example(examples[0].prompt, examples[0].completion, advantage)
        with pytest.raises(LearnerError, match="learning_rate or look for extreme advantages"):
            learner.update(Batch(NLL(), (bad, *examples[1:])), 0.0)
    assert equal(state(learner), before) and learner._updates == updates
    again, _ = trained(folder)
    for one in (learner, again):
        one.update(Batch(NLL(), tuple(examples)), 0.0)
    assert equal(state(learner), state(again))
    whole = learner_of(folder, method="full")
    with pytest.raises(LearnerError, match="KL to the base needs"):
        whole.update(Batch(Clip(kl=0.1), tuple(examples)), 0.0)
    if not torch.cuda.is_available():
        with pytest.raises(LearnerError, match="no GPU"):
            learner_of(folder, device="cuda")


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bfloat16_beside_float32_in_one_process(
    model_folder: Folder, tmp_path: Path, method: str
) -> None:
    # A warm start in float32 comes before a learner in bfloat16.
    folder = model_folder("scratch")
    exact, half = (
        learner_of(folder, method=method, precision=precision)
        for precision in ("float32", "bfloat16")
    )
    batch = Batch(NLL(), tuple(talks(exact._tokens, 4)))
    one, other = exact.update(batch, 0.0), half.update(batch, 0.0)
    assert other["train/loss"] != one["train/loss"]
    assert other["train/loss"] == pytest.approx(one["train/loss"], abs=0.05)
    assert {weight.dtype for weight in half._trained.values()} == {torch.float32}
    kinds = {weight.dtype for weight in half._model.parameters()}
    assert (torch.bfloat16 in kinds) == (method == "lora")
    half.save(tmp_path)
    half.restore(tmp_path)
    half.update(batch, 0.0)


def test_a_tiny_model_learns_what_is_rewarded(model_folder: Folder) -> None:
    learner = learner_of(model_folder("scratch"), learning_rate=1e-2, batch_size=16)
    tokens = learner._tokens
    prompts = [prompt_of(f"make {k}") for k in range(8)]

    def margin() -> float:
        total = 0.0
        with torch.no_grad():
            for prompt in prompts:
                ids = tokens.prompt(prompt)
                good, bad = (
                    logprobs(learner._model, ids, tokens.completion(text)).sum()
                    for text in ("3 + 4", "7 - 2")
                )
                total += float(good - bad) / len(prompts)
        return total

    before = margin()
    examples = tuple(
        Example(prompt, Completion(text, tokens.completion(text)), advantage)
        for prompt in prompts
        for text, advantage in (("3 + 4", 1.0), ("7 - 2", -1.0))
    )
    for _ in range(12):
        learner.update(Batch(Clip(), examples), 0.0)
    # e^3 times as likely, compared with the other one, as before.
    assert abs(before) < 1 and margin() > before + 3
