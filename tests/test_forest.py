"""Rows as trees: what stands once is what each row has alone, forwards and backwards."""

# torch and transformers are partly untyped.
# pyright: reportUnknownMemberType=false, reportPrivateUsage=false

import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import pad, scaled_dot_product_attention

from selfwright.agents import scratch
from selfwright.core.errors import LearnerError
from selfwright.trainers.learning import reader
from selfwright.trainers.learning.attention import BLOCK, Tree, attention, block_mask
from selfwright.trainers.learning.forest import Forest, groves, plant
from selfwright.trainers.learning.head import LOGITS, Head
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import NLL
from selfwright.trainers.learning.pack import Row, Span

Folder = Callable[[str], Path]
CPU = torch.device("cpu")
rows_of = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=8)


def arrays(rows: Sequence[Sequence[int]]) -> list[Any]:
    return [np.array(row) for row in rows]


def sight(forest: Forest) -> Any:
    """(T, T) bool, by following every row."""
    seen = np.zeros((len(forest), len(forest)), bool)
    for places in forest.places:
        for at in range(len(places)):
            seen[places[at], places[: at + 1]] = True
    return seen


@settings(max_examples=200)
@given(rows_of)
def test_every_beginning_stands_once(rows: list[list[int]]) -> None:
    forest = plant(arrays(rows), 1)
    assert len(forest) == len({tuple(row[: at + 1]) for row in rows for at in range(len(row))})
    for row, places in zip(rows, forest.places, strict=True):
        # Where its tokens stand, some row has the same ones up to there.
        for at, place in enumerate(places):
            owner = rows[forest.owners[place]]
            assert forest.depths[place] == at and owner[: at + 1] == row[: at + 1]
    # What stands behind a token, up to its end, is what sees it.
    here = np.arange(len(forest))
    assert np.array_equal(sight(forest), (here <= here[:, None]) & (here[:, None] < forest.ends))


@settings(max_examples=100)
@given(rows_of, st.integers(1, 12), st.integers(1, 3))
def test_groves_keep_to_their_budget(rows: list[list[int]], budget: int, step: int) -> None:
    found = groves(arrays(rows), budget, step)
    assert sorted(k for group in found for k in group) == list(range(len(rows)))
    for group in found:
        assert len(plant(arrays([rows[k] for k in group]), step)) <= budget or len(group) == 1


@settings(max_examples=100)
@given(rows_of, st.integers(1, 3), st.sampled_from([None, 2, 3]), st.booleans(), st.integers(0, 99))
def test_attention_is_that_of_a_mask(
    rows: list[list[int]], step: int, window: int | None, pictures: bool, seed: int
) -> None:
    forest = plant(arrays(rows), step)
    seen, blocks = sight(forest), None
    if window is not None:
        seen &= forest.depths[:, None] - forest.depths < window
    if pictures:  # Two that follow one another in a segment see each other.
        blocks = np.full(len(forest), -1)
        for number, one in enumerate(forest.segments):
            if one.end - one.begin >= 2:
                blocks[one.begin : one.begin + 2] = number
        seen |= (blocks[:, None] == blocks) & (blocks >= 0)
    torch.manual_seed(seed)
    query, key, value = (
        torch.randn(1, heads, len(forest), 8, dtype=torch.double, requires_grad=True)
        for heads in (4, 2, 2)
    )
    grouped = [one.repeat_interleave(2, 1) for one in (key, value)]
    wanted = scaled_dot_product_attention(query, *grouped, attn_mask=torch.tensor(seen))
    found, _ = attention(
        None, query, key, value, None, sliding_window=window, tree=Tree(forest, CPU, blocks)
    )
    torch.testing.assert_close(found, wanted.transpose(1, 2))
    slopes = [torch.autograd.grad(out.pow(3).sum(), (query, key, value)) for out in (found, wanted)]
    torch.testing.assert_close(*slopes)


@settings(max_examples=30)
@given(st.randoms(use_true_random=False), st.sampled_from([None, 50, 200]))
def test_blocks_leave_out_nothing_that_is_seen(rng: random.Random, window: int | None) -> None:
    """What FlexAttention is given, against torch's own asking of each pair."""
    stem = [rng.randrange(3) for _ in range(rng.randrange(1, 300))]
    rows = [
        stem[: rng.randrange(len(stem)) + 1] + [rng.randrange(3) for _ in range(rng.randrange(200))]
        for _ in range(rng.randrange(1, 6))
    ]
    forest = plant(arrays(rows))
    room = -len(forest) % BLOCK
    ends = torch.cat([torch.tensor(forest.ends), torch.arange(len(forest), len(forest) + room) + 1])
    depths = pad(torch.tensor(forest.depths), (0, room))
    blocks = None
    if rng.random() < 0.5:
        begin = rng.randrange(len(forest))
        blocks = torch.full_like(depths, -1)
        blocks[begin : begin + 20] = 1
    mask = block_mask(ends, depths, blocks, window)
    exact = create_block_mask(mask.mask_mod, None, None, len(ends), len(ends), device="cpu")
    partly = kept(mask.kv_num_blocks, mask.kv_indices)
    whole = kept(mask.full_kv_num_blocks, mask.full_kv_indices)
    wanted = kept(exact.full_kv_num_blocks, exact.full_kv_indices)
    assert whole <= wanted and not partly & whole
    assert partly | whole >= wanted | kept(exact.kv_num_blocks, exact.kv_indices)


def kept(counts: Any, indices: Any) -> set[tuple[int, int]]:
    """Blocks of queries and of the keys that each looks at."""
    return {
        (at, int(key))
        for at, count in enumerate(counts[0, 0])
        for key in indices[0, 0, at, : int(count)]
    }


def learner_of(folder: Path, **keys: Any) -> PlainLearner:
    loose = {"device": "cpu", "rank": 4, "learning_rate": 1e-2, "max_grad_norm": 1e9}
    learner = PlainLearner(LearnerConfig.model_validate(loose | keys), str(folder), 0)
    with torch.no_grad():
        for name, weight in learner._trained.items():
            if "lora_B" in name:  # So that all of a LoRA has a gradient.
                torch.nn.init.normal_(weight, std=0.1)
    return learner


def branching(rng: random.Random) -> list[Row]:
    """Rows of a tree at random, some of whose tokens are trained; also what others share."""
    rows: list[Row] = []
    for k in range(rng.randrange(2, 9)):
        stem = rng.choice(rows).ids if rows and rng.random() < 0.8 else []
        ids = stem[: rng.randrange(len(stem) + 1)]
        ids = ids + [rng.randrange(5, 250) for _ in range(rng.randrange(2, 40))]
        begin, end = sorted(rng.sample(range(1, len(ids) + 1), 2))
        rows.append(Row(ids, spans=[Span(begin, end, rng.uniform(-2, 2), (), k)]))
    return rows


def slopes(learner: PlainLearner, rows: Sequence[Row], forest: bool) -> dict[str, torch.Tensor]:
    """Gradients of all that is trained, of one pass, or of each row's own."""
    learner._model.zero_grad()
    weights = [0.1 + k for k in range(sum(s.end - s.begin for row in rows for s in row.spans))]
    at = 0
    for part in [rows] if forest else [[row] for row in rows]:
        learner._reader.__dict__["plants"] = forest
        assert not forest or learner._reader.layout(part).forest is not None
        found = learner._forward.arrays(part, NLL())
        size = len(found.logprobs)
        (NLL()(found) * torch.tensor(weights[at : at + size])).sum().backward()
        at += size
    return {n: w.grad.clone() for n, w in learner._trained.items() if w.grad is not None}


@pytest.mark.parametrize(
    ("kind", "keys"),
    [
        ("qwen3", {}),
        ("qwen3", {"method": "full"}),
        ("qwen3", {"gradient_checkpointing": True}),
        ("llama", {}),
        ("mistral", {"method": "full"}),
    ],
)
def test_gradients_of_trees_are_those_of_rows(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch, kind: str, keys: dict[str, Any]
) -> None:
    learner = learner_of(model_folder(kind), **keys)
    assert learner._reader.plants
    monkeypatch.setattr(reader, "WORTH", 1e9)

    @settings(max_examples=10)
    @given(st.randoms(use_true_random=False))
    def holds(rng: random.Random) -> None:
        rows = branching(rng)
        found, wanted = slopes(learner, rows, True), slopes(learner, rows, False)
        assert found.keys() == wanted.keys() and found
        size = max(float(one.abs().max()) for one in wanted.values())
        for name, one in wanted.items():
            torch.testing.assert_close(found[name], one, rtol=1e-5, atol=1e-5 * max(1.0, size))

    holds()


class Dropped(torch.nn.Module):
    """A dropout whose mask is given: of each token of a row, or of a forest."""

    mask: torch.Tensor

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        return states * Dropped.mask[:, : states.shape[2]].to(states.dtype)


def test_a_shared_token_is_dropped_out_once(
    model_folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One mask for each token of a forest: its rows then have that token's, each."""
    learner = learner_of(model_folder("qwen3"), dropout=0.5)
    assert learner._reader.plants and learner._reader.scale == 1  # Tried before masks are set.
    monkeypatch.setattr(reader, "WORTH", 1e9)
    learner._reader.narrow = False  # Else the last layer sees fewer tokens than there are masks.
    layers = [one for one in learner._model.modules() if hasattr(one, "lora_dropout")]
    for one in layers:
        assert isinstance(one.lora_dropout["default"], torch.nn.Dropout)
        one.lora_dropout["default"] = Dropped()
    rows = branching(random.Random(5))
    forest = plant(arrays([row.ids for row in rows]))
    assert len(forest) < sum(len(row.ids) for row in rows)
    torch.manual_seed(0)
    whole = (torch.rand(len(forest), 512) < 0.5) * 2.0
    Dropped.mask = whole
    found = slopes(learner, rows, True)
    at = 0
    learner._model.zero_grad()
    learner._reader.__dict__["plants"] = False
    for row, places in zip(rows, forest.places, strict=True):
        Dropped.mask = whole[places]
        arrays_of = learner._forward.arrays([row], NLL())
        weights = torch.arange(len(arrays_of.logprobs)) + 0.1 + at
        (NLL()(arrays_of) * weights).sum().backward()
        at += len(weights)
    wanted = {n: w.grad for n, w in learner._trained.items() if w.grad is not None}
    size = max(float(one.abs().max()) for one in wanted.values())
    for name, one in wanted.items():
        torch.testing.assert_close(found[name], one, rtol=1e-5, atol=1e-5 * size)


def test_models_that_keep_states_read_rows(model_folder: Folder) -> None:
    assert not learner_of(model_folder("hybrid"))._reader.plants


HEADS = {
    "llama": {},
    "gemma2": {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16},
    "granite": {"logits_scaling": 4.0},
    "cohere": {"logit_scale": 0.25},
}


def tiny(kind: str) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 90}
    ends = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    untyped: Any = transformers
    torch.manual_seed(0)
    config = untyped.AutoConfig.for_model(kind, **sizes, **heads, **ends, **HEADS[kind])
    model = untyped.AutoModelForCausalLM.from_config(config).double()
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.4)
    return model


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("barred", [True, False])
def test_heads_say_what_their_models_do(
    monkeypatch: pytest.MonkeyPatch, kind: str, frozen: bool, barred: bool
) -> None:
    """Chunk by chunk, values and slopes of what the model itself returns."""
    monkeypatch.setitem(LOGITS, "cpu", 90 * 4)
    model = tiny(kind)
    layer, ids = model.get_output_embeddings(), torch.randint(90, (1, 11))
    layer.weight.requires_grad_(not frozen)
    states: list[torch.Tensor] = []

    def see(_: Any, given: tuple[torch.Tensor]) -> None:
        states.append(given[0])

    hook = layer.register_forward_pre_hook(see)
    logits = model(ids).logits[0].float()
    hook.remove()
    targets = torch.randint(90, (11,))
    ruled_out = torch.rand(11, 90) < 0.3
    ruled_out[torch.arange(11), targets] = False
    if barred:
        logits = logits.masked_fill(ruled_out, -torch.inf)
    wanted = logits.log_softmax(-1)[torch.arange(11), targets]

    def bars(part: slice) -> torch.Tensor | None:
        return ruled_out[part] if barred else None

    found = Head(model).logprobs(states[0][0], targets, bars)
    torch.testing.assert_close(found.double(), wanted.double(), atol=1e-5, rtol=1e-5)
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    upon = torch.rand(11) - 0.5
    both = [
        torch.autograd.grad((out * upon).sum(), trained, retain_graph=True, allow_unused=True)
        for out in (found, wanted)
    ]
    for one, other in zip(*both, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-4)
    with torch.no_grad():
        again = Head(model).logprobs(states[0][0], targets, bars)
    torch.testing.assert_close(again, found.detach().to(again.dtype))
    assert not len(Head(model).logprobs(states[0][0][:0], targets[:0]))


def test_what_a_model_does_to_its_logits_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """That of a model of which nothing is known: a factor is taken over, anything else refused."""
    for kind, by in (("llama", 1.0), ("granite", 1.0), ("cohere", 1.0), ("gemma2", 1.0)):
        model = tiny(kind).float()
        assert reader.Reader(model, model, CPU, 99, "float32").scale == by
    for kind in ("granite", "gemma2"):
        model = tiny(kind).float()
        unknowing = reader.Reader(model, model, CPU, 99, "float32")
        monkeypatch.setattr(unknowing.head, "_behind", [])
        if kind == "granite":
            assert unknowing.scale == pytest.approx(0.25, rel=1e-3)
            row = Row([5, 6, 7, 8], spans=[Span(1, 4, 0.0, (), 0)])
            layout = unknowing.layout([row])
            found = unknowing.logprobs(unknowing.states(layout), layout.targets)
            wanted = model(torch.tensor([row.ids])).logits[0, :-1].log_softmax(-1)
            torch.testing.assert_close(found, wanted[range(3), row.ids[1:]], atol=1e-5, rtol=1e-5)
        else:
            with pytest.raises(LearnerError, match="Gemma2ForCausalLM does something"):
                _ = unknowing.scale


MEMORY = """
import random
import sys
from pathlib import Path

from selfwright.core.types import Batch, Completion, Example, Message, Prompt
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import NLL


def resident(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:")) / 1024


config = LearnerConfig(device="cpu", rank=8, gradient_checkpointing=True)
learner = PlainLearner(config, sys.argv[1], 0)
rng = random.Random(0)


def one(count):
    ids = tuple(rng.randrange(5, 20) for _ in range(count))
    said = Completion(learner._tokens.text(ids), ids)
    return Example(Prompt((Message("user", ("go",)),)), said, 1.0)


learner.update(Batch(NLL(), (one(50),)), 0.0)
Path("/proc/self/clear_refs").write_text("5")  # From now on the peak is that of what follows.
before = resident("VmRSS")
learner.update(Batch(NLL(), (one(int(sys.argv[2])),)), 0.0)
print(resident("VmHWM") - before)
"""


@pytest.mark.multi
def test_a_long_row_is_learned_in_little_memory(tmp_path: Path) -> None:
    """4,000 trained tokens and as many logits each as Qwen's vocabulary: 2.3 GiB, held whole.

    (16,000 take under 1 GiB, too, but a minute or two.)
    """
    scratch.make("scratch:128x4", ["make 3 + 4 - 7 each number once"] * 99, tmp_path, seed=0)
    untyped: Any = transformers.AutoModelForCausalLM
    model = untyped.from_pretrained(tmp_path)
    model.resize_token_embeddings(152_000, mean_resizing=False)
    model.config.max_position_embeddings = 32_768
    model.save_pretrained(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, str(tmp_path), "4000"],
        env=os.environ | {"OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stderr
    assert float(done.stdout) < 512
