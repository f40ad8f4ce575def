"""Images shown to a real vLLM server, against the same model in this process."""

# torch is partly untyped, transformers wholly.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import asyncio
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import pytest
import torch
import transformers
from test_vllm import gap, policy_of

from selfwright.agents import scratch
from selfwright.agents.engines.vllm import VLLMPolicy
from selfwright.core.errors import PolicyError
from selfwright.core.files import write_json
from selfwright.core.types import Completion, Message, Sampling

Prompt: TypeAlias = tuple[Message, ...]
VISION = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
PATCH, PATCHES = 14, 2
"""Pixels of a patch's side, and patches of a token's side."""


def colour(width: int, height: int, *rgb: int) -> tuple[bytes, torch.Tensor]:
    """One colour, but for a black pixel in the corner: as PNG, and as (3, H, W) of 0 to 255."""
    pixels = torch.tensor(rgb, dtype=torch.uint8)[:, None, None].repeat(1, height, width)
    pixels[:, 0, 0] = 0
    rows = pixels.permute(1, 2, 0).reshape(height, -1).tolist()
    data = zlib.compress(b"".join(b"\0" + bytes(row) for row in rows))
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    ), pixels


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of text and images, of the kind Qwen2-VL, untrained."""
    folder = tmp_path_factory.mktemp("seeing")
    tokenizer = scratch._tokenizer(["what is red green blue 1 2 3"] * 3)  # pyright: ignore[reportPrivateUsage]
    tokenizer.add_special_tokens({"additional_special_tokens": [*scratch.ROLES, *VISION]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{% for part in m['content'] %}"
        "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% else %}{{ part['text'] }}{% endif %}{% endfor %}<|end|>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION))
    text: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
    }
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"max_position_embeddings": 512, "bos_token_id": None, "tie_word_embeddings": True}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 6, 6],
    }
    vision: dict[str, Any] = {
        "depth": 1,
        "embed_dim": 32,
        "hidden_size": 64,
        "num_heads": 1,
        "mlp_ratio": 2,
    }
    vision |= {"patch_size": PATCH, "spatial_merge_size": PATCHES, "temporal_patch_size": 2}
    config: Any = transformers.Qwen2VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model: Any = transformers.Qwen2VLForConditionalGeneration(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = PATCH * PATCHES
    shown: dict[str, Any] = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": PATCH}
    shown |= {"size": {"shortest_edge": side**2, "longest_edge": 16 * side**2}}
    shown |= {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "merge_size": PATCHES}
    shown["temporal_patch_size"] = 2
    write_json(folder / "preprocessor_config.json", shown)
    shown["video_processor_type"] = "Qwen2VLVideoProcessor"
    del shown["image_processor_type"]
    write_json(folder / "video_preprocessor_config.json", shown)
    return folder


def patched(pixels: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    """What Qwen2-VL reads of an image that needs no resizing: (N, 1176) pixels, and its grid."""
    _, height, width = pixels.shape
    rows, columns = height // PATCH, width // PATCH
    frames = (pixels / 255 * 2 - 1).repeat(2, 1, 1, 1)
    cut = (1, 2, 3, rows // 2, PATCHES, PATCH, columns // 2, PATCHES, PATCH)
    order = (0, 3, 6, 4, 7, 2, 1, 5, 8)
    return frames.reshape(cut).permute(order).reshape(rows * columns, -1), [1, rows, columns]


def test_it_shows_images(seeing: Path) -> None:
    """What it samples is what the model thinks of those pixels, there and here."""
    pictures = [colour(56, 28, 255, 0, 0), colour(28, 28, 0, 0, 255), colour(56, 56, 0, 255, 0)]
    model: Any = transformers.Qwen2VLForConditionalGeneration.from_pretrained(seeing)
    image = model.config.image_token_id

    def here(policy: VLLMPolicy, shown: Sequence[int], prompt: Prompt, said: Completion) -> Any:
        seen = [patched(pictures[k][1]) for k in shown]
        counts = iter([grid[1] * grid[2] // PATCHES**2 for _, grid in seen])
        ids = [
            copy
            for one in policy.tokens.prompt(prompt)
            for copy in [one] * (next(counts) if one == image else 1)
        ]
        whole = torch.tensor([[*ids, *said.token_ids]])
        with torch.inference_mode():
            logits = model(
                input_ids=whole,
                pixel_values=torch.cat([pixels for pixels, _ in seen]),
                image_grid_thw=torch.tensor([grid for _, grid in seen]),
                mm_token_type_ids=(whole == image).int(),
            ).logits[0, len(ids) - 1 : -1]
        found = logits.log_softmax(-1).gather(1, whole[0, len(ids) :, None])[:, 0]
        return found.tolist()

    async def all_of_it() -> None:
        policy = await policy_of(seeing, arguments={"limit-mm-per-prompt": '{"image": 2}'})
        try:
            told: list[tuple[float, ...]] = []
            for shown in ([0], [1], [2, 1]):
                prompt = (Message("user", "what is 1", tuple(pictures[k][0] for k in shown)),)
                said = await policy.complete(prompt, Sampling(max_tokens=12), 7)
                assert said.logprobs == pytest.approx(here(policy, shown, prompt, said), abs=1e-3)
                assert gap(await policy.score(prompt, said), said) < 1e-3
                again = await policy.complete(prompt, Sampling(max_tokens=12), 7)
                assert again.token_ids == said.token_ids
                fixed = Completion("red 1 2")
                told.append((await policy.score(prompt, fixed)).logprobs)
                # A conversation goes on by the ids that were sampled, and another image.
                more = (
                    *prompt,
                    Message("assistant", said.text, (), said.token_ids, said.tokenizer),
                    Message("user", "and 2", (pictures[0][0],)),
                )
                if len(shown) == 1:
                    next_ = await policy.complete(more, Sampling(max_tokens=4), 8)
                    wanted = here(policy, [*shown, 0], more, next_)
                    assert next_.logprobs == pytest.approx(wanted, abs=1e-3)
                    with pytest.raises(PolicyError, match="refused: 400"):
                        await policy.complete((*more, *prompt), Sampling(max_tokens=4), 8)
            assert len({round(one[0], 3) for one in told}) == 3
            choice = await policy.complete(prompt, Sampling(choices=("red", "green 2")), 1)
            assert choice.text in ("red", "green 2")
            # Whoever writes placeholders into a text shows no image by that.
            with pytest.raises(PolicyError, match="refused"):
                text = "<|vision_start|><|image_pad|><|vision_end|>"
                await policy.complete((Message("user", text, (pictures[0][0],)),), Sampling(), 0)
            plain = await policy.complete((Message("user", "what is 2"),), Sampling(), 0)
            assert plain.token_ids
        finally:
            await policy.close()

    asyncio.run(all_of_it())
