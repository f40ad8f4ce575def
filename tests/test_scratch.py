"""Models made here: repeatable, of every size that is offered, with a lossless tokenizer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from prompts import prompt_of
from seeing import noise

from selfwright.agents import scratch
from selfwright.core.errors import PolicyError
from selfwright.core.models.open import open_model
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.models.vision import eye_of

TEXTS = ["Make 24 from 3 5 8.", "3 * 5 + 9 = 24, right"] * 20


@pytest.mark.parametrize("model", ["scratch:32x1", "scratch-vlm:32x1"])
def test_the_same_seed_makes_the_same_files(model: str, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        state = torch.get_rng_state()
        scratch.make(model, TEXTS, tmp_path / name, seed)
        assert torch.equal(state, torch.get_rng_state())
    for file in sorted((tmp_path / "a").iterdir()):
        same = file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()
        other = file.read_bytes() == (tmp_path / "c" / file.name).read_bytes()
        assert same and other == (file.name != "model.safetensors"), file.name


@pytest.mark.parametrize("width", [32, 64, 96, 160, 224])
def test_every_width_runs(tmp_path: Path, width: int) -> None:
    scratch.make(f"scratch:{width}x2", TEXTS, tmp_path, 0)
    model, tokens = open_model(str(tmp_path), "cpu", "auto", False)
    assert model.config.hidden_size == width and model.config.num_hidden_layers == 2
    with torch.inference_mode():
        logits = model(torch.tensor([tokens.completion("3 + 5")])).logits
    assert logits.shape[-1] == len(tokens.tokenizer) and bool(logits.isfinite().all())


@pytest.mark.parametrize(
    "name",
    [
        *("scratch:", "scratch:32", "scratch:33x1", "scratch:0x1", "scratch:32x0", "scrach:32x1"),
        *("scratch-vlm:", "scratch-vlm:33x1", "scratch-vl:32x1"),
    ],
)
def test_other_sizes_are_refused(name: str) -> None:
    with pytest.raises(PolicyError, match=r"the form is scratch:WIDTHxLAYERS"):
        scratch.parse(name)


@pytest.mark.parametrize("side", [8, 32, 200])
def test_one_that_sees_shows_each_picture_as_sixteen_tokens(side: int, tmp_path: Path) -> None:
    scratch.make("scratch-vlm:64x2", TEXTS, tmp_path, 0)
    model, tokens = open_model(str(tmp_path), "cpu", "auto", False)
    eye = eye_of(tokens, model)
    assert eye is not None
    picture = noise(side, max(1, side // 2), 0)
    ids = tokens.prompt(prompt_of(picture, "Make 24"))
    assert ids.count(eye.vision.placeholder) == 16 and len(ids) < 32
    with torch.inference_mode():
        (seen,) = eye.features([picture])
        given = eye.given(torch.tensor([ids]), [(picture,)])
        logits = model(torch.tensor([ids]), **given).logits
    assert seen.tokens.shape == (16, 64) and bool(logits.isfinite().all())


@pytest.fixture(scope="module")
def tokens(model_folder: Callable[[str], Path]) -> ChatTokens:
    return open_model(str(model_folder("scratch")), "cpu", "auto", False)[1]


@settings(deadline=None)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=20))
def test_any_text_survives_the_tokenizer(tokens: ChatTokens, text: str) -> None:
    # But for the names of special tokens, which every tokenizer takes for the tokens themselves.
    assume("<|" not in text)
    ids = tokens.completion(text)
    assert tokens.text(ids) == text and ids[-1] == tokens.end
    assert ids.count(tokens.end) == 1


def test_digits_are_one_token_each(tokens: ChatTokens) -> None:
    pieces = [tokens.text([i]).strip() for i in tokens.completion("make 1234 from 56")]
    assert [piece for piece in pieces if piece.isdigit()] == list("123456")
