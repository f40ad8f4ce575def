"""Models that see: sampler, learner and the model itself agree, whoever made it."""

import asyncio
import io
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image as Pillow
from prompts import prompt_of
from seeing import KINDS, make, noise

from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.core.errors import LearnerError, ModelError, PromptError
from selfwright.core.images import STORE
from selfwright.core.models import canary
from selfwright.core.models.canary import canaries_of
from selfwright.core.models.open import open_model, save_merged
from selfwright.core.models.scalar import ScalarConfig, ScalarModel
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.models.vision import Eye, Vision
from selfwright.core.types import (
    Batch,
    Completion,
    Example,
    Image,
    Message,
    Prompt,
    Sampling,
)
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.likely import QUESTION
from selfwright.trainers.learning.loss import NLL, Clip, MomentGap
from selfwright.trainers.learning.pack import pack

FIRST = KINDS[:3]
kinds = pytest.mark.parametrize(
    "kind", [*FIRST, *(pytest.param(kind, marks=pytest.mark.multi) for kind in KINDS[3:])]
)
HOT = Sampling(1.0, 1.0, 6)


@pytest.fixture(scope="module")
def seeing(
    model_folder: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], str]:
    """The folder of a model of that kind."""
    root = tmp_path_factory.mktemp("seeing")

    def folder(kind: str) -> str:
        if not (root / kind).exists():
            make(kind, model_folder("scratch"), root / kind)
        return str(root / kind)

    return folder


@pytest.fixture(scope="module")
def album() -> list[Image]:
    """Uneven pictures, the last two of one size."""
    sizes = ((20, 30), (40, 10), (16, 16), (16, 16))
    return [STORE.keep(noise(*size, seed)) for seed, size in enumerate(sizes)]


def asked(album: Sequence[Image]) -> list[Prompt]:
    """Of several pictures, of one, of one twice, of none."""
    a, b, c, _ = album
    return [
        prompt_of("Make 1 ", a, " from ", b, "?"),
        prompt_of(c, "with"),
        prompt_of(a, "each ", a),
        prompt_of("number"),
    ]


def eye_of(model: Any, tokens: ChatTokens) -> Eye:
    assert isinstance(tokens.vision, Vision)
    return Eye(tokens.vision, model)


def policy_of(folder: str) -> TransformersPolicy:
    config = TransformersConfig.model_validate({"model": folder, "dtype": "float32"})
    return TransformersPolicy(config, folder, 0)


def learner_of(folder: str, **keys: Any) -> PlainLearner:
    return PlainLearner(
        LearnerConfig.model_validate({"rank": 4, "learning_rate": 1e-3, **keys}), folder, 0
    )


def learned(learner: PlainLearner, examples: Sequence[Example]) -> list[float]:
    """Log-probabilities of all the examples' tokens under the learner, in the examples' order."""
    rows = pack(examples, learner._tokens)  # pyright: ignore[reportPrivateUsage]
    learner._model.eval()  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        found = learner._forward.arrays(rows, NLL())  # pyright: ignore[reportPrivateUsage]
    at, by_example = 0, dict[int, list[float]]()
    for span in (span for row in rows for span in row.spans):
        size = span.end - span.begin
        by_example[span.example] = found.logprobs[at : at + size].tolist()
        at += size
    return [x for k in range(len(examples)) for x in by_example[k]]


def flat(completions: Sequence[Completion]) -> list[float]:
    return [x for one in completions for x in one.logprobs]


def then(prompts: Sequence[Prompt], said: Sequence[Completion], *parts: Any) -> list[Prompt]:
    """The same conversations, answered, and one turn more."""
    return [
        Prompt(
            (
                *prompt.messages,
                Message("assistant", (one.text,), one.token_ids, one.tokenizer),
                Message("user", parts),
            )
        )
        for prompt, one in zip(prompts, said, strict=True)
    ]


@kinds
def test_it_is_read_as_its_own_processor_has_it(
    kind: str, seeing: Callable[[str], str], album: list[Image]
) -> None:
    model, tokens = open_model(seeing(kind), "cpu", "float32", False)
    model.eval()
    eye = eye_of(model, tokens)
    prompts = asked(album)
    rows = [tokens.prompt(prompt) for prompt in prompts]
    processor: Any = eye.vision._processor  # pyright: ignore[reportPrivateUsage]
    plain: list[torch.Tensor] = []
    with torch.no_grad():
        for prompt, ids in zip(prompts, rows, strict=True):
            words = "".join(
                eye.vision.mark if isinstance(part, Image) else part
                for part in prompt.messages[0].parts
            )
            if kind.startswith("qwen"):
                words = words.replace(
                    eye.vision.mark, f"<|vision_start|>{eye.vision.mark}<|vision_end|>"
                )
            opened = [Pillow.open(io.BytesIO(STORE.read(one))) for one in prompt.images]
            given = processor(
                images=opened or None,
                text=f"<|user|>{words}<|end|><|assistant|>",
                return_tensors="pt",
            )
            assert given["input_ids"][0].tolist() == list(ids)
            plain.append(model(**given).logits[0])
    longest = max(map(len, rows))
    for left in (False, True):
        ids = torch.zeros((len(rows), longest), dtype=torch.long)
        real = torch.zeros((len(rows), longest), dtype=torch.bool)
        for k, row in enumerate(rows):
            where = slice(longest - len(row), None) if left else slice(len(row))
            ids[k, where], real[k, where] = torch.tensor(row), True
        images = [prompt.images for prompt in prompts]
        with torch.no_grad():
            given = {"position_ids": eye.positions(ids, real, images)}
            given |= eye.arguments(ids, images)
            together = model(input_ids=ids, attention_mask=real.long(), **given).logits
        for k, alone in enumerate(plain):
            torch.testing.assert_close(together[k][real[k]], alone, atol=1e-4, rtol=0)


@kinds
def test_sampler_and_learner_agree(
    kind: str, seeing: Callable[[str], str], album: list[Image], tmp_path: Path
) -> None:
    async def main() -> None:
        policy = policy_of(seeing(kind))

        async def answers(prompts: Sequence[Prompt]) -> list[Completion]:
            waits = [policy.complete(prompt, HOT, k) for k, prompt in enumerate(prompts)]
            return list(await asyncio.gather(*waits))

        first = asked(album)
        with policy.batch_slot():  # It remembers the conversations as long as this is open.
            said = await answers(first)
            second = then(first, said, "from ", album[3], "?")
            more = await answers(second)
        # Not remembered, and one by one.
        fresh = [await policy.complete(one, HOT, k) for k, one in enumerate(second)]
        assert [one.token_ids for one in fresh] == [one.token_ids for one in more]
        assert flat(more) == pytest.approx(flat(fresh), abs=1e-4)
        scored = [await policy.score(*two) for two in zip(second, more, strict=True)]
        assert flat(scored) == pytest.approx(flat(more), abs=1e-4)

        both = zip([*first, *second], [*said, *more], strict=True)
        examples = [Example(prompt, one, 1.0) for prompt, one in both]
        learner = learner_of(seeing(kind))
        assert learned(learner, examples) == pytest.approx(flat([*said, *more]), abs=1e-4)
        metrics = learner.update(Batch(NLL(), tuple(examples), 2), 0.0)
        assert metrics["train/rows"] == 4 and metrics["train/prefix_breaks"] == 0
        learner.export(tmp_path)
        await policy.load(tmp_path)
        after = [await policy.score(*two) for two in zip(second, more, strict=True)]
        assert learned(learner, examples[4:]) == pytest.approx(flat(after), abs=1e-4)
        assert max(abs(a - b) for a, b in zip(flat(after), flat(more), strict=True)) > 1e-4
        await policy.close()

    asyncio.run(main())


def test_other_pictures_behind_the_same_ids_are_other_prompts(
    seeing: Callable[[str], str], album: list[Image]
) -> None:
    async def main() -> None:
        policy = policy_of(seeing("idefics3"))
        one, other = prompt_of(album[2], "with"), prompt_of(album[3], "with")
        assert policy.tokens.prompt(one) == policy.tokens.prompt(other)
        with policy.batch_slot():
            said = await policy.complete(one, HOT, 0)
            # The same answer to the other picture: only what was seen tells these apart.
            again = [then([prompt], [said], "each")[0] for prompt in (one, other)]
            together = [await policy.complete(prompt, HOT, 1) for prompt in again]
        apart = [await policy.complete(prompt, HOT, 1) for prompt in again]
        for a, b in zip(together, apart, strict=True):
            assert flat([a]) == pytest.approx(flat([b]), abs=1e-4)
        mine, theirs = [flat([await policy.score(p, said)]) for p in (one, other)]
        assert max(abs(a - b) for a, b in zip(mine, theirs, strict=True)) > 0.01
        # Nor do they share a row, though a prompt goes on from the other's ids.
        tokens = policy.tokens
        examples = [Example(one, said, 1.0), Example(again[1], together[1], 1.0)]
        rows = pack(examples, tokens)
        assert [row.images for row in rows] == [one.images, other.images]
        assert len(pack([examples[0], Example(again[0], together[0], 1.0)], tokens)) == 1
        await policy.close()

    asyncio.run(main())


def test_marks_and_pictures_must_be_as_many(
    seeing: Callable[[str], str], album: list[Image]
) -> None:
    model, tokens = open_model(seeing("idefics3"), "cpu", "float32", False)
    with pytest.raises(PromptError, match=r"holds 1 images of 20 tokens, but 21 times '<image>'"):
        tokens.prompt(prompt_of("an <image> ", album[0]))
    with pytest.raises(PromptError, match=r"holds 0 images of 0 tokens, but 1 times"):
        tokens.prompt(prompt_of("<image>"))
    # What a model says itself shows nothing.
    mark = tokens.tokenizer.convert_tokens_to_ids("<image>")
    answer = Message("assistant", ("",), (mark, tokens.end), tokens.fingerprint)
    asked_ = prompt_of(album[0], "?").messages
    with pytest.raises(PromptError, match="images of"):
        tokens.prompt(Prompt((*asked_, answer, Message("user", ("so",)))))
    with pytest.raises(LearnerError, match="holds what stands for a picture"):
        pack([Example(Prompt(asked_), Completion("an <image>"), 1.0)], tokens)
    # Nor does it if it spells it in letters, and then nothing else is wrong.
    spelt = (
        *(i for part in ("<", "image", ">") for i in tokens.tokenizer.encode(part)),
        tokens.end,
    )
    answer = Message("assistant", (tokens.text(spelt),), spelt, tokens.fingerprint)
    assert answer.text == "<image>"
    before = tokens.prompt(Prompt(asked_))
    ids = tokens.prompt(Prompt((*asked_, answer, Message("user", ("so",)))))
    assert ids[: len(before) + len(spelt)] == (*before, *spelt)
    ids = torch.tensor([tokens.prompt(prompt_of(album[0], album[1]))])
    with pytest.raises(ModelError, match="its 1 images are"):
        eye_of(model, tokens).arguments(ids, [album[:1]])
    with pytest.raises(ModelError, match="its 0 images are 0 tokens"):
        eye_of(model, tokens).arguments(ids, [()])


def test_a_picture_is_looked_at_once(seeing: Callable[[str], str], album: list[Image]) -> None:
    model, tokens = open_model(seeing("qwen3_vl"), "cpu", "float32", False)
    looked: list[int] = []
    plain = model.model.get_image_features

    def counted(pixel_values: Any, image_grid_thw: Any, **more: Any) -> Any:
        looked.append(len(image_grid_thw))
        return plain(pixel_values, image_grid_thw, **more)

    model.model.get_image_features = counted
    eye = eye_of(model, tokens)
    with torch.no_grad():
        found = eye.features([album[2], album[0], album[2], album[3]])
        assert sorted(looked) == [1, 2], "those of one size together, each once"
        assert found[0] is found[2]
        eye.features(album[:1])
        assert len(looked) == 2
        eye.forget()
        eye.features(album[:1])
        assert len(looked) == 3


def test_lora_is_on_the_language_model_or_on_all(
    seeing: Callable[[str], str], album: list[Image], tmp_path: Path
) -> None:
    folder, said = seeing("idefics3"), Completion("1+1")
    examples = [Example(prompt, said, 1.0) for prompt in asked(album)]
    for targets, sees in (("all-linear", False), ("vision", True)):
        learner = learner_of(folder, targets=targets, batch_size=2)
        names = list(learner._trained)  # pyright: ignore[reportPrivateUsage]
        assert any("text_model" in name for name in names)
        assert any("vision_model" in name or "connector" in name for name in names) is sees
        learner.update(Batch(NLL(), tuple(examples), 2), 0.0)
        moved = {
            name.split(".lora_B")[0]
            for name, weight in learner._trained.items()  # pyright: ignore[reportPrivateUsage]
            if "lora_B" in name and bool(weight.detach().any())
        }
        # All of them but of what sees nothing of the gradient: none.
        assert any("vision_model" in name for name in moved) is sees
        out = tmp_path / targets
        out.mkdir()
        learner.export(out)

        async def scored(out: Path = out) -> list[float]:
            policy = policy_of(folder)
            await policy.load(out)
            found = [await policy.score(prompt, said) for prompt in asked(album)]
            await policy.close()
            return flat(found)

        assert learned(learner, examples) == pytest.approx(asyncio.run(scored()), abs=1e-4)
    # What its drift is measured by looks with the base's own eye.
    loss = Clip(kl=0.1)
    rows = pack(examples, learner._tokens)  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        arrays = learner._forward.arrays(rows, loss)  # pyright: ignore[reportPrivateUsage]
        base = learner_of(folder)._forward.arrays(rows, NLL())  # pyright: ignore[reportPrivateUsage]
    torch.testing.assert_close(arrays.reference_logprobs, base.logprobs, atol=1e-4, rtol=0)


@kinds
def test_what_a_checkpoint_has_to_answer(
    seeing: Callable[[str], str], tmp_path: Path, kind: str
) -> None:
    folder = seeing(kind)
    learner, policy = learner_of(folder), policy_of(folder)
    learner.export(tmp_path / "first")
    text, *pictured = canaries_of(tmp_path / "first")
    if kind == "gemma3":  # What its template writes is not the token that features stand for.
        assert not pictured
        return
    (seen,) = pictured
    prompt = Prompt((Message("user", (canary.shown(), QUESTION)),))
    asyncio.run(policy.load(tmp_path / "first"))
    here = policy.tokens.prompt(prompt)
    assert not text.pictured and seen.pictured
    # Asked of others, the picture is one placeholder; whoever samples spells it out.
    vision = policy.tokens.vision
    assert vision is not None and seen.ids.count(vision.placeholder) == 1
    assert here.count(vision.placeholder) == vision.size(canary.shown()) > 1
    for before, one in ((text.ids[: canary.BEGIN], text), (here, seen)):
        found = policy._score(before, one.asked, one.images)  # pyright: ignore[reportPrivateUsage]
        assert found == pytest.approx(one.logprobs, abs=1e-4)
    grey = noise(canary.SIDE, canary.SIDE, 0)
    other = policy._score(here, seen.asked, (grey,))  # pyright: ignore[reportPrivateUsage]
    assert canary.distance(other, seen.logprobs) > 0.05
    # They ask about the same tokens ever after, which the base finds likely, not any ones.
    learner.update(Batch(NLL(), (Example(prompt, Completion("red"), 1.0),)), 0.0)
    learner.export(tmp_path / "second")
    again = canaries_of(tmp_path / "second")
    assert [one.ids for one in again] == [text.ids, seen.ids]
    assert again[1].logprobs != seen.logprobs
    unlikely = canary.usual_ids(policy.tokens.tokenizer, canary.BEGIN + canary.LENGTH)
    random = policy._score(  # pyright: ignore[reportPrivateUsage]
        unlikely[: canary.BEGIN], unlikely[canary.BEGIN :], ()
    )
    assert sum(text.logprobs) > sum(random) + canary.LENGTH


@kinds
@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_whole_model_that_was_saved_still_sees(
    method: str, kind: str, seeing: Callable[[str], str], album: list[Image], tmp_path: Path
) -> None:
    learner = learner_of(seeing(kind), method=method)
    prompt = asked(album)[0]
    learner.update(Batch(NLL(), (Example(prompt, Completion("1+1"), 1.0),), 1), 0.0)
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    learner.export(adapter)
    if method == "lora":
        save_merged(str(adapter), tmp_path / "whole")
    else:
        shutil.copytree(adapter, tmp_path / "whole")

    async def scored(folder: str, checkpoint: Path | None) -> list[float]:
        policy = policy_of(folder)
        await policy.load(checkpoint)
        found = await policy.score(prompt, Completion("1+1"))
        await policy.close()
        return flat([found])

    mine = asyncio.run(scored(seeing(kind), adapter))
    assert mine == pytest.approx(asyncio.run(scored(str(tmp_path / "whole"), None)), abs=1e-4)
    assert mine != pytest.approx(asyncio.run(scored(seeing(kind), None)), abs=1e-4)


@kinds
def test_rows_of_pictures_share_what_they_begin_with(
    seeing: Callable[[str], str], album: list[Image], kind: str
) -> None:
    """Computed together, what they begin with once, pictures too, they are what each is alone."""
    words = "Make 1 from 1 with + - *, each number once. " * 8
    learner = learner_of(seeing(kind))
    assert learner._reader.plants  # pyright: ignore[reportPrivateUsage]
    examples = [
        Example(prompt_of(words, one, "each", two), Completion(said), 1.0)
        for one in (album[0], *album[2:])
        for two in album[:2]
        for said in ("1+1", "1-1", "22")
    ]
    random.Random(0).shuffle(examples)
    alone = [x for one in examples for x in learned(learner, [one])]
    rows = pack(examples, learner._tokens)  # pyright: ignore[reportPrivateUsage]
    forest = learner._reader.layout(rows).forest  # pyright: ignore[reportPrivateUsage]
    # Three answers to each prompt; the words stand once, the first picture once for two.
    assert forest is not None and len(forest) < sum(len(row.ids) for row in rows) / 3
    assert learned(learner, examples) == pytest.approx(alone, abs=1e-4)


def test_discriminators_and_values_see(seeing: Callable[[str], str], album: list[Image]) -> None:
    net = ScalarModel(ScalarConfig(learning_rate=1e-2), seeing("qwen3_vl"))
    texts = [(prompt_of(one, "?"), Completion("1+1")) for one in album[2:]]
    # Only the pictures tell these two apart.
    assert list(net.ids(texts[0])) == list(net.ids(texts[1]))
    for _ in range(10):
        net.clear()
        first, second = net.forward([net.ids(text) for text in texts])
        (second - first).backward()
        net.step()
    low, high = sorted(net.values(texts), reverse=True)
    assert net.values(texts) == [low, high] and low - high > 0.1
    together = net.values([*texts, (prompt_of("no picture"), Completion(""))])[:2]
    assert together == pytest.approx([low, high], abs=1e-4)


def test_a_teacher_looks_for_itself(seeing: Callable[[str], str], album: list[Image]) -> None:
    folder = seeing("idefics3")
    learner = learner_of(folder)
    loss = MomentGap(teacher=folder)
    example = Example(asked(album)[0], Completion("1+1"), 1.0)
    rows = pack([example], learner._tokens)  # pyright: ignore[reportPrivateUsage]
    learner._model.eval()  # pyright: ignore[reportPrivateUsage]
    with torch.no_grad():
        arrays = learner._forward.arrays(rows, loss)  # pyright: ignore[reportPrivateUsage]
    # A fresh adapter changes nothing: both are the same model, and see the same picture.
    torch.testing.assert_close(arrays.distribution, arrays.teacher, atol=1e-4, rtol=0)


def test_nothing_is_read_from_the_midst_of_a_picture_on(
    seeing: Callable[[str], str], album: list[Image]
) -> None:
    """Though a picture may be several squares, with words between them."""
    model, tokens = open_model(seeing("idefics3"), "cpu", "float32", False)
    eye = eye_of(model, tokens)
    prompt = prompt_of("Make ", album[0], " and ", album[1])
    ids = torch.tensor([tokens.prompt(prompt)])
    marks = [i == eye.vision.placeholder for i in tokens.prompt(prompt)]
    sizes = [eye.vision.size(image) for image in prompt.images]
    assert marks.count(True) == sum(sizes)
    for column in range(len(marks)):
        found = eye.whole_from(ids, [prompt.images], column)
        assert found <= column and sum(marks[found:]) in (0, sizes[1], sum(sizes))
        # As far to the right as can be.
        assert all(
            sum(marks[k:]) not in (0, sizes[1], sum(sizes)) for k in range(found + 1, column + 1)
        )
        with torch.no_grad():
            eye.arguments(ids, [prompt.images], len(marks) - found)
    with pytest.raises(ModelError, match="from the midst of a picture on"):
        eye.arguments(ids, [prompt.images], 2 + len(marks) - marks.index(True) - 4)
