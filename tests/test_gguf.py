"""Models in GGUF files, written here, and turned into folders."""

# gguf, torch and transformers are partly untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false
# pyright: reportUnknownArgumentType=false

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from selfwright.core.errors import ModelError
from selfwright.core.models.gguf import file_of, folder_of, is_gguf
from selfwright.core.models.open import open_model
from selfwright.core.models.origin import digest, layers_of
from selfwright.core.types import Message, Prompt

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
"""What transformers calls a tensor, and what GGUF does."""


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # pyright: ignore[reportUnusedFunction]
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(tmp_path / "cache"))


def spelt(name: str) -> str:
    if name.startswith("model.layers."):
        number, rest = name.removeprefix("model.layers.").split(".", 1)
        return f"blk.{number}.{NAMES[rest.removesuffix('.weight')]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def paired(name: str, tensor: torch.Tensor, config: dict[str, Any]) -> torch.Tensor:
    """GGUF has what is turned together side by side, transformers half a head apart."""
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}
    kind = name.split(".")[-2]
    if kind not in heads:
        return tensor
    split = tensor.reshape(config[heads[kind]], 2, -1, tensor.shape[1])
    return split.swapaxes(1, 2).reshape(tensor.shape).contiguous()


def written(model: Path, file: Path, **more: Any) -> Path:
    """The Llama in the folder ``model`` as a GGUF file."""
    config = json.loads((model / "config.json").read_text())
    words = json.loads((model / "tokenizer.json").read_text())
    numbers = words["model"]["vocab"] | {one["content"]: one["id"] for one in words["added_tokens"]}
    tokens = sorted(numbers, key=lambda token: numbers[token])
    tokens = ["(none)" if token == more.get("lost") else token for token in tokens]
    special = {one["content"] for one in words["added_tokens"]}
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(more.get("pre", "default"))
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    writer.add_token_merges([" ".join(pair) for pair in words["model"]["merges"]])
    writer.add_eos_token_id(tokens.index("<|end|>"))
    writer.add_pad_token_id(tokens.index("<|pad|>"))
    writer.add_chat_template((model / "chat_template.jinja").read_text())
    for name, tensor in load_file(model / "model.safetensors").items():
        values = paired(name, tensor, config).numpy()
        if more.get("bad") and name == "model.norm.weight":
            values = np.full_like(values, np.nan)
        if more.get("quantised") and values.ndim == 2:
            kind = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(spelt(name), gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(spelt(name), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_it_opens_as_the_model_that_was_written(
    model_folder: Callable[[str], Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = model_folder("llama")
    file = written(model, tmp_path / "tiny.gguf")
    with caplog.at_level(logging.WARNING):
        weights, tokens = open_model(str(file), "cpu", "auto", False)
    assert "turning" in caplog.text and str(file) in caplog.text
    wanted, mine = open_model(str(model), "cpu", "auto", False)
    ids = torch.arange(5, 25)[None]
    assert torch.equal(weights(ids).logits, wanted(ids).logits)
    prompt = Prompt((Message("user", ("Make 23 from 3 4 12.",)),))
    assert tokens.prompt(prompt) == mine.prompt(prompt) and tokens.ends == mine.ends
    # Made once, and known by what is in it: under another name it is the same.
    caplog.clear()
    again = file.rename(tmp_path / "renamed.gguf")
    base, adapters = layers_of(str(again))
    assert Path(base).parent == tmp_path / "cache" / "models" and adapters == ()
    assert folder_of(str(again)) == base and "turning" not in caplog.text
    assert digest(str(again)) == digest(base) is not None


def test_quantised_values_become_those_they_stand_for(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = model_folder("llama")
    found = load_file(
        Path(folder_of(str(written(model, tmp_path / "q.gguf", quantised=True))))
        / "model.safetensors"
    )
    for name, wanted in load_file(model / "model.safetensors").items():
        assert found[name].dtype == torch.float32
        if wanted.ndim == 1:
            assert torch.equal(found[name], wanted)
            continue
        # Q8_0: every 32 values share a scale, their largest over 127, kept in 16 bits.
        blocks = wanted.reshape(-1, 32)
        step = blocks.abs().amax(1, keepdim=True) / 127
        gap = (found[name].reshape(-1, 32) - blocks).abs()
        assert (gap <= 0.5 * step + 127 * step * 2**-10).all() and gap.max() > 0


def test_what_does_not_come_out_as_it_went_in_is_refused(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    model = model_folder("llama")
    with pytest.raises(ModelError, match=r"model\.norm\.weight is not finite"):
        folder_of(str(written(model, tmp_path / "bad.gguf", bad=True)))
    (tmp_path / "noise.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(ModelError, match=r"cannot open .*noise\.gguf"):
        folder_of(str(tmp_path / "noise.gguf"))
    with pytest.raises(ModelError, match=r"no file nothing\.gguf"):
        folder_of("nothing.gguf")
    # A tokenizer that has no token for the first byte of an emoji.
    with pytest.raises(ModelError, match=r"does not give .*🙂.* back"):
        folder_of(str(written(model, tmp_path / "loses.gguf", lost="ð")))
    assert not [*(tmp_path / "cache" / "models").iterdir()]


def test_numbers_are_cut_as_the_file_says(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    file = written(model_folder("llama"), tmp_path / "digits.gguf", pre="smollm")
    _, tokens = open_model(str(file), "cpu", "auto", False)
    words = tokens.tokenizer.convert_ids_to_tokens(tokens.tokenizer("a 12 b").input_ids)
    assert [word for word in words if any(sign.isdigit() for sign in word)] == ["1", "2"]


def test_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    assert is_gguf("package:x") and is_gguf("a/b.gguf")
    assert not is_gguf("Qwen/Qwen3-0.6B") and not is_gguf("package")

    def installed(name: str, files: list[str]) -> None:
        info = tmp_path / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "RECORD").write_text("".join(f"{file},,\n" for file in files))

    installed("one", ["one/__init__.py", "one/m.gguf"])
    installed("none", ["none/__init__.py"])
    installed("two", ["two/a.gguf", "two/b.gguf"])
    # It is not imported: that would run somebody's code.
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "__init__.py").write_text("raise SystemExit")
    with pytest.raises(ModelError, match="found no GGUF file"):
        file_of("package:one")  # It is listed, but somebody has removed it.
    for name in ("one/m.gguf", "two/a.gguf", "two/b.gguf"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"GGUF")
    assert file_of("package:one") == tmp_path / "one" / "m.gguf"
    for name, said in [
        ("none", "wanted one GGUF file in it, found no GGUF file"),
        ("two", "found a.gguf, b.gguf"),
        ("absent", "no package 'absent' is installed here"),
        ("", "no package '' is installed"),
    ]:
        with pytest.raises(ModelError, match=said):
            file_of(f"package:{name}")
