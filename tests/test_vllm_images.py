"""Images shown to a real vLLM server, against the same model in this process."""

# torch is partly untyped, transformers wholly.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from prompts import png, prompt_of
from test_vllm import gap, policy_of

from selfwright.agents import scratch
from selfwright.agents.engines.vllm import VLLMPolicy
from selfwright.core.errors import PolicyError, PromptError
from selfwright.core.files import write_json
from selfwright.core.images import picture
from selfwright.core.models.canary import canaries_of, write
from selfwright.core.types import (
    Batch,
    Completion,
    Constraint,
    Example,
    Image,
    Message,
    Prompt,
    Sampling,
)
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import NLL

SIDE, TOKENS = 56, 4
"""An image's pixels along a side, and what it is worth in tokens."""
VISION = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>")


def noise(seed: int) -> tuple[Image, torch.Tensor]:
    """A picture, and what is in it as (3, H, W) of 0 to 255."""
    pixels = torch.randint(
        0, 256, (3, SIDE, SIDE), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )
    rows = pixels.permute(1, 2, 0).reshape(SIDE, -1).tolist()
    return picture(png(SIDE, SIDE, rows=b"".join(b"\0" + bytes(row) for row in rows))), pixels


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of text and images, of the kind Idefics3, untrained.

    One of few that vLLM reads without torchvision, which has no build beside a torch for CPUs.
    """
    folder = tmp_path_factory.mktemp("seeing")
    tokenizer = scratch._tokenizer(["what is red green blue 1 2 3"] * 3)  # pyright: ignore[reportPrivateUsage]
    tokenizer.add_special_tokens({"additional_special_tokens": [*scratch.ROLES, *VISION]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
        "{% endfor %}<|end|>{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    known: dict[str, Any] = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    known |= {"pad_token_id": tokenizer.pad_token_id, "tie_word_embeddings": True}
    size = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 2}
    text = {"model_type": "llama", "vocab_size": len(tokenizer), "num_hidden_layers": 2}
    text |= {"num_key_value_heads": 1, "max_position_embeddings": 256}
    vision = {"num_hidden_layers": 1, "image_size": SIDE, "patch_size": 14}
    config: Any = transformers.Idefics3Config(
        text_config={**size, **text, **known},
        vision_config={**size, **vision},
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = transformers.Idefics3ForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shown = {
        "image_processor_type": "Idefics3ImageProcessor",
        "processor_class": "Idefics3Processor",
        "do_image_splitting": False,
        "size": {"longest_edge": SIDE},
        "max_image_size": {"longest_edge": SIDE},
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    write_json(folder / "preprocessor_config.json", shown)
    worth = {"processor_class": "Idefics3Processor", "image_seq_len": TOKENS}
    write_json(folder / "processor_config.json", worth)
    return folder


@pytest.mark.vllm
def test_it_shows_images(seeing: Path, tmp_path: Path) -> None:
    """What it samples is what the model thinks of those pixels, there and here."""
    pictures = [noise(seed) for seed in range(3)]
    model: Any = transformers.Idefics3ForConditionalGeneration.from_pretrained(seeing)

    def here(policy: VLLMPolicy, shown: Sequence[int], prompt: Prompt, said: Completion) -> Any:
        """The log-probabilities of what was said, after these pictures."""
        image, around, whole = policy.tokens.tokenizer.convert_tokens_to_ids(list(VISION[:3]))
        expanded = [around, whole, *[image] * TOKENS, around]
        prompted = policy.tokens.prompt(prompt)
        ids = [copy for one in prompted for copy in (expanded if one == image else [one])]
        pixels = torch.stack([pictures[k][1] for k in shown]) / 255 * 2 - 1
        with torch.inference_mode():
            logits = model(
                input_ids=torch.tensor([[*ids, *said.token_ids]]),
                pixel_values=pixels[None],
                pixel_attention_mask=torch.ones(1, len(shown), SIDE, SIDE, dtype=torch.long),
            ).logits[0, len(ids) - 1 : -1]
        chosen = torch.tensor(said.token_ids)[:, None]
        return logits.log_softmax(-1).gather(1, chosen)[:, 0].tolist()

    async def all_of_it() -> None:
        policy = await policy_of(seeing, arguments={"limit-mm-per-prompt": '{"image": 3}'})
        try:
            told: set[tuple[float, ...]] = set()
            for shown in ([0], [1], [2, 1]):
                prompt = prompt_of(*(pictures[k][0] for k in shown), "what is 1")
                said = await policy.complete(prompt, Sampling(max_tokens=12), 7)
                assert said.logprobs == pytest.approx(here(policy, shown, prompt, said), abs=1e-3)
                assert gap(await policy.score(prompt, said), said) < 1e-3
                again = await policy.complete(prompt, Sampling(max_tokens=12), 7)
                assert gap(again, said) < 1e-3
                told.add((await policy.score(prompt, Completion("red 1 2"))).logprobs)
                # A conversation goes on by the ids that were sampled, and another image.
                answer = Message("assistant", (said.text,), said.token_ids, said.tokenizer)
                then = Message("user", (pictures[0][0], "and 2"))
                more = Prompt((*prompt.messages, answer, then))
                last = await policy.complete(more, Sampling(max_tokens=4), 8)
                wanted = here(policy, [*shown, 0], more, last)
                assert last.logprobs == pytest.approx(wanted, abs=1e-3)
            assert len(told) == 3
            choice = await policy.complete(
                prompt, Sampling(constraint=Constraint(("red", "green 2"))), 1
            )
            assert choice.text in ("red", "green 2")
            # Whoever writes the placeholder into a text shows no image by that.
            for images in ((), (pictures[0][0],)):
                with pytest.raises(PromptError, match=f"holds {len(images)} images, but"):
                    await policy.complete(prompt_of(*images, "a <image>"), Sampling(), 0)
            many = prompt_of(*(pictures[0][0],) * 4, "1")
            with pytest.raises(PolicyError, match="refused: 400"):
                await policy.complete(many, Sampling(), 0)
            # It answers to what a learner wrote down of a picture, and is found out if it does not.
            learner = PlainLearner(LearnerConfig(device="cpu", rank=4), str(seeing), 0)
            learner.export(tmp_path / "first")
            await policy.load(tmp_path / "first")
            learner.update(Batch(NLL(), (Example(prompt, Completion("red"), 1.0),)), 0.0)
            learner.export(tmp_path / "other")
            text, seen = canaries_of(tmp_path / "other")
            wrong = replace(seen, logprobs=tuple(one - 1.0 for one in seen.logprobs))
            write(tmp_path / "other", [text, wrong])
            with pytest.raises(PolicyError, match=r"canary failed.* 1 nats"):
                await policy.load(tmp_path / "other")
            plain = prompt_of("what is 2")
            assert (await policy.score(plain, said)).token_ids == said.token_ids
        finally:
            await policy.close()

    asyncio.run(all_of_it())
