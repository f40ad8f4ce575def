"""Tiny models that see, of the architectures people use, with random weights; and pictures."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image as Pillow

from selfwright.core.images import picture
from selfwright.core.types import Image

hf: Any = transformers
KINDS = ("idefics3", "qwen3_vl", "gemma3", "internvl", "llava", "qwen2_5_vl", "smolvlm")
TEXT: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.3,
    "bos_token_id": None,
    "pad_token_id": 0,
}
SIGHT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}
QWEN: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "out_hidden_size": 64,
    "initializer_range": 0.3,
}
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{% for part in m.content %}"
    "{% if part.type == 'image' %}MARK{% else %}{{ part.text }}{% endif %}{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def noise(width: int, height: int, seed: int) -> Image:
    """A picture with its bytes."""
    rng = np.random.default_rng(seed)
    file = io.BytesIO()
    Pillow.fromarray(rng.integers(0, 255, (height, width, 3), dtype=np.uint8)).save(file, "PNG")
    return picture(file.getvalue())


def make(kind: str, base: Path, folder: Path) -> None:
    """Write a model of that kind, with the words of the tokenizer in ``base``."""
    rng: Any = torch.random
    with rng.fork_rng():
        rng.manual_seed(0)
        model, name, images, tokenizer, mark, settings = _BUILD[kind](base)
    tokenizer.chat_template = TEMPLATE.replace("MARK", mark)
    for part in (model, tokenizer, images):
        part.save_pretrained(folder)
    settings |= {"processor_class": name}
    (folder / "processor_config.json").write_text(json.dumps(settings))


def _tokens(base: Path, *more: str, **named: str) -> Any:
    tokenizer = hf.AutoTokenizer.from_pretrained(base, extra_special_tokens=named or None)
    tokenizer.add_tokens(list(more), special_tokens=True)
    return tokenizer


def _text(tokenizer: Any, **more: Any) -> dict[str, Any]:
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    return {**TEXT, **sizes, **more}


def _idefics3(base: Path, name: str = "Idefics3") -> Any:
    grid = [f"<row_{i}_col_{j}>" for i in range(1, 7) for j in range(1, 7)]
    marks = {
        "fake_image_token": "<fake_token_around_image>",
        "image_token": "<image>",
        "end_of_utterance_token": "<end_of_utterance>",
        "global_image_token": "<global-img>",
    }
    tokenizer = _tokens(base, *grid, **marks)
    images = getattr(hf, f"{name}ImageProcessorPil")(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 16}
    )
    config = getattr(hf, f"{name}Config")(
        text_config=hf.LlamaConfig(**_text(tokenizer, tie_word_embeddings=True)).to_dict(),
        vision_config=SIGHT,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        pad_token_id=0,
        tie_word_embeddings=True,
    )
    model = getattr(hf, f"{name}ForConditionalGeneration")(config)
    return model, f"{name}Processor", images, tokenizer, "<image>", {"image_seq_len": 4}


def _qwen(base: Path, name: str, text: dict[str, Any], vision: dict[str, Any]) -> Any:
    words = ("<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>")
    tokenizer = _tokens(base, *words)
    ids = [tokenizer.convert_tokens_to_ids(word) for word in words]
    images = hf.Qwen2VLImageProcessorPil(
        patch_size=4,
        merge_size=2,
        temporal_patch_size=2,
        size={"shortest_edge": 64, "longest_edge": 1024},
    )
    rope = {"rope_type": "default", "mrope_section": [4, 2, 2], "rope_theta": 10_000.0}
    config = getattr(hf, f"{name}Config")(
        text_config=_text(tokenizer, rope_parameters={**rope, **text.pop("rope", {})}, **text),
        vision_config={**QWEN, **vision},
        image_token_id=ids[0],
        video_token_id=ids[1],
        vision_start_token_id=ids[2],
        vision_end_token_id=ids[3],
        tie_word_embeddings=True,
    )
    model = getattr(hf, f"{name}ForConditionalGeneration")(config)
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    return model, f"{name}Processor", images, tokenizer, mark, {}


def _qwen3(base: Path) -> Any:
    deep = {"depth": 3, "num_position_embeddings": 64, "deepstack_visual_indexes": [0, 1]}
    text = {"head_dim": 16, "rope": {"mrope_interleaved": True}}
    return _qwen(base, "Qwen3VL", text, deep)


def _qwen2_5(base: Path) -> Any:
    return _qwen(
        base, "Qwen2_5_VL", {}, {"depth": 2, "window_size": 16, "fullatt_block_indexes": [1]}
    )


def _gemma3(base: Path) -> Any:
    marks = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    tokenizer = _tokens(base, **marks)
    ids = [tokenizer.convert_tokens_to_ids(word) for word in marks.values()]
    text = _text(
        tokenizer,
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=16,
        layer_types=["sliding_attention", "full_attention"],
    )
    config = hf.Gemma3Config(
        text_config=text,
        vision_config={k: v for k, v in SIGHT.items() if k != "initializer_range"},
        mm_tokens_per_image=4,
        boi_token_index=ids[0],
        eoi_token_index=ids[1],
        image_token_index=ids[2],
        initializer_range=0.3,
    )
    images = hf.Gemma3ImageProcessorPil(size={"height": 16, "width": 16})
    model = hf.Gemma3ForConditionalGeneration(config)
    settings = {"image_seq_length": 4}
    return model, "Gemma3Processor", images, tokenizer, "<start_of_image>", settings


def _internvl(base: Path) -> Any:
    marks = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    tokenizer = _tokens(base, **marks)
    config = hf.InternVLConfig(
        text_config=hf.Qwen2Config(**_text(tokenizer)).to_dict(),
        vision_config={**SIGHT, "image_size": [16, 16], "patch_size": [4, 4]},
        image_token_id=tokenizer.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        downsample_ratio=0.5,
    )
    images = hf.GotOcr2ImageProcessorPil(
        size={"height": 16, "width": 16}, crop_to_patches=True, max_patches=4
    )
    model = hf.InternVLForConditionalGeneration(config)
    settings = {"image_seq_length": 4}
    return model, "InternVLProcessor", images, tokenizer, "<IMG_CONTEXT>", settings


def _llava(base: Path) -> Any:
    tokenizer = _tokens(base, image_token="<image>")
    config = hf.LlavaConfig(
        text_config=hf.LlamaConfig(**_text(tokenizer)),
        vision_config=hf.SiglipVisionConfig(
            **{k: v for k, v in SIGHT.items() if k != "initializer_range"}
        ),
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
    )
    images = hf.LlavaImageProcessorPil(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    settings = {"patch_size": 4, "vision_feature_select_strategy": "full"}
    model = hf.LlavaForConditionalGeneration(config)
    return model, "LlavaProcessor", images, tokenizer, "<image>", settings


def _smolvlm(base: Path) -> Any:
    return _idefics3(base, "SmolVLM")


_BUILD: dict[str, Callable[[Path], Any]] = {
    "idefics3": _idefics3,
    "smolvlm": _smolvlm,
    "qwen3_vl": _qwen3,
    "qwen2_5_vl": _qwen2_5,
    "gemma3": _gemma3,
    "internvl": _internvl,
    "llava": _llava,
}
