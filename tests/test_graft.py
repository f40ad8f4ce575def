"""An eye on a pretrained language model: what it knew of text is left, and pictures change it."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from components import played
from prompts import prompt_of
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from seeing import noise

from selfwright.agents import graft
from selfwright.core.errors import ModelError, RecipeError
from selfwright.core.files import read_json
from selfwright.core.models.open import open_model, open_tokens
from selfwright.core.models.vision import eye_of
from selfwright.core.recipe import Recipe, read
from selfwright.core.seeds import derive
from selfwright.core.types import Batch, Completion, Example, Message, Prompt
from selfwright.loop.warm_start import STORY, key_of
from selfwright.trainers.learning.learner import LearnerConfig, PlainLearner
from selfwright.trainers.learning.loss import NLL

LOOKING = """
seed: 3
iterations: 1
environment: {use: pictures, questions: [colour], listed: true, parallel: 16}
policy: {model: "graft:MODEL", max_tokens: 4, constrain: true}
trainer: {use: imitation, source: expert, tasks_per_iteration: 16}
learner: {targets: vision, rank: 4, alpha: 8, learning_rate: 1e-3, batch_size: 8}
evaluation: {tasks: 8, validation_tasks: 4, turns: 0}
"""
TALK = (Message("user", ("Make 24 from 3 5 8.",)), Message("assistant", ("3*8",)))
SYSTEM = Message("system", ("Count.",))


@pytest.fixture(scope="module")
def base(model_folder: Callable[[str], Path]) -> Path:
    return model_folder("llama")


@pytest.fixture(scope="module")
def grafted(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("grafts") / "grafted"
    graft.make(f"graft:{base}", folder, 0)
    return folder


def opened(folder: Path) -> tuple[Any, Any]:
    return open_model(str(folder), "cpu", "auto", False)


def logits(model: Any, ids: Any, **more: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.tensor([ids]), **more).logits[0].float()


def test_it_says_of_text_what_the_language_model_says(base: Path, grafted: Path) -> None:
    (plain, words), (model, tokens) = opened(base), opened(grafted)
    ids = tokens.prompt(Prompt(TALK[:1]))
    assert ids == words.prompt(Prompt(TALK[:1]))
    before, after = logits(plain, ids), logits(model, ids)
    known = before.shape[-1]
    assert after.shape[-1] == known + 4
    assert torch.allclose(after[:, :known].log_softmax(-1), before.log_softmax(-1), atol=1e-5)
    # By Jensen the share of a row that is the mean of all is no more than theirs on average.
    lost = before.log_softmax(-1) - after.log_softmax(-1)[:, :known]
    assert 0 <= float(lost.max()) < torch.log(torch.tensor(1 + 4 / known)) + 1e-5


@pytest.mark.parametrize(
    "messages", [TALK[:1], TALK, (SYSTEM, *TALK), (*TALK, TALK[0]), (SYSTEM, TALK[0])]
)
@pytest.mark.parametrize("asked", [False, True])
def test_its_template_says_of_text_what_the_own_one_says(
    base: Path, grafted: Path, messages: tuple[Message, ...], asked: bool
) -> None:
    own, new = open_tokens(str(base)).tokenizer, open_tokens(str(grafted)).tokenizer
    plain = [{"role": one.role, "content": one.text} for one in messages]
    parts = [
        {"role": one.role, "content": [{"type": "text", "text": one.text}]} for one in messages
    ]
    wanted = own.apply_chat_template(plain, tokenize=False, add_generation_prompt=asked)
    for given in (plain, parts):
        found = new.apply_chat_template(given, tokenize=False, add_generation_prompt=asked)
        assert found == wanted


@pytest.mark.parametrize(
    "template", ["\n  {% if messages %}\n{{ messages[0].content }}\n{% endif %}\n", "{{ 1 }} \n"]
)
def test_white_space_of_the_own_template_is_kept(base: Path, template: str) -> None:
    tokenizer = open_tokens(str(base)).tokenizer
    talk: list[dict[str, Any]] = [
        {"role": "user", "content": "7"},
        {"role": "tool", "tool_calls": []},
    ]
    found: list[str] = []
    for one in (template, graft.LEAD + template):
        tokenizer.chat_template = one
        found.append(tokenizer.apply_chat_template(talk, tokenize=False))
    assert found[0] == found[1]


def test_pictures_stand_where_they_stood_and_change_what_it_says(grafted: Path) -> None:
    model, tokens = opened(grafted)
    eye = eye_of(tokens, model)
    assert eye is not None
    pictures = [noise(32, 32, seed) for seed in (0, 1)]
    said: list[torch.Tensor] = []
    for picture in pictures:
        ids = tokens.prompt(prompt_of("Make", picture, "24"))
        assert ids.count(eye.vision.placeholder) == 16
        text = tokens.tokenizer.decode(ids)
        assert text.index("Make") < text.index("<image>") < text.index("24")
        said.append(logits(model, ids, **eye.given(torch.tensor([ids]), [(picture,)])))
    assert not torch.allclose(said[0][-1], said[1][-1], atol=1e-3)


def test_a_seed_makes_an_eye_and_no_other_weight(base: Path, grafted: Path, tmp_path: Path) -> None:
    state = torch.get_rng_state()
    graft.make(f"graft:{base}", tmp_path / "same", 0)
    graft.make(f"graft:{base}", tmp_path / "other", 1)
    assert torch.equal(state, torch.get_rng_state())
    for file in sorted(grafted.iterdir()):
        assert file.read_bytes() == (tmp_path / "same" / file.name).read_bytes(), file.name
    weights, others = (opened(folder)[0].state_dict() for folder in (grafted, tmp_path / "other"))
    changed = {name for name, one in weights.items() if not torch.equal(one, others[name])}
    assert changed and not any("text_model" in name or "lm_head" in name for name in changed)
    assert "model.connector.modality_projection.proj.weight" in changed


def test_an_adapter_on_a_base_in_16_bits_comes_along(base: Path, tmp_path: Path) -> None:
    weights, tokens = open_model(str(base), "cpu", "bfloat16", False)
    weights.save_pretrained(tmp_path / "half")
    tokens.save(tmp_path / "half")
    learner = PlainLearner(
        LearnerConfig(device="cpu", learning_rate=0.03), str(tmp_path / "half"), 0
    )
    lesson = Example(Prompt(TALK[:1]), Completion("8*3"), 1.0)
    for _ in range(3):
        learner.update(Batch(NLL(), (lesson,)), 0.0)
    learner.export(tmp_path / "lora")
    graft.make(f"graft:{tmp_path / 'lora'}", tmp_path / "grafted", 0)
    ids = tokens.prompt(Prompt(TALK[:1]))
    (bare, _), (adapted, _), (model, _) = (
        opened(tmp_path / name) for name in ("half", "lora", "grafted")
    )
    without, with_it = (logits(one, ids).log_softmax(-1) for one in (bare, adapted))
    found = logits(model, ids)[:, : with_it.shape[-1]].log_softmax(-1)
    learned = (with_it - without).abs().max()
    assert learned > 0.3
    # It is rounded to 16 bits there, once.
    assert (found - with_it).abs().max() < learned / 5


def test_a_tied_head_stays_tied(base: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "tied"
    shutil.copytree(base, folder)
    config = LlamaConfig.from_pretrained(base)
    config.tie_word_embeddings = True
    LlamaForCausalLM(config).save_pretrained(folder)
    graft.make(f"graft:{folder}", tmp_path / "grafted", 0)
    model, _ = opened(tmp_path / "grafted")
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_architecture_is_known_before_it_is_made(base: Path, grafted: Path) -> None:
    known, found = graft.config_of(f"graft:{base}"), opened(grafted)[0].config
    assert known.text_config.vocab_size == found.text_config.vocab_size
    assert known.image_token_id == found.image_token_id


@pytest.mark.parametrize(
    ("kind", "words"),
    [("qwen3", r"LlamaForCausalLM\) alone, and .* is Qwen3ForCausalLM"), ("mistral", "is Mistral")],
)
def test_other_architectures_are_refused(
    kind: str, words: str, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    with pytest.raises(ModelError, match=words):
        graft.make(f"graft:{model_folder(kind)}", tmp_path / "none", 0)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("graft:", "the form is graft:MODEL"),
        ("graft:scratch:32x1", "is not there yet"),
        ("graft:graft:x", "is not there yet"),
        ("graft:/nowhere", "there is no such folder"),
    ],
)
def test_what_is_no_model_is_refused(name: str, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        graft.config_of(name)


def test_a_run_begins_with_one_and_keeps_it(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(tmp_path / "cache"))
    recipe = recipe_for(str(base), tmp_path)
    result = played(tmp_path / "looking.yaml", [], tmp_path / "run")
    assert result["warm_start"]["updates"] == 0 and result["warm_start"]["grafted"]
    folder = tmp_path / "cache" / "models" / key_of(recipe)
    for file in folder.iterdir():
        assert file.read_bytes() == (tmp_path / "run" / "base" / file.name).read_bytes()
    trained = adapter_keys(tmp_path / "run" / "iterations")
    for part in ("vision_model", "modality_projection", "text_model"):
        assert any(part in name for name in trained), part


def test_worlds_do_not_matter_to_it_but_weights_and_seed_do(
    base: Path, model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    key = key_of(recipe_for(str(base), tmp_path))
    assert key == key_of(recipe_for(str(base), tmp_path, "environment.grey=true"))
    assert key != key_of(recipe_for(str(base), tmp_path, "seed=4"))
    other = tmp_path / "other"
    shutil.copytree(base, other)
    assert key == key_of(recipe_for(str(other), tmp_path))
    template = other / "chat_template.jinja"
    template.write_text(template.read_text() + "!")
    assert key != key_of(recipe_for(str(other), tmp_path))


def test_a_warm_start_trains_its_eye_too(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SELFWRIGHT_CACHE", str(tmp_path / "cache"))
    warm = "policy.warm_start={updates: 4, batch_size: 4, demonstrations: 16, rank: 4}"
    recipe = recipe_for(str(base), tmp_path, warm)
    played(tmp_path / "looking.yaml", [warm], tmp_path / "run")
    folder = tmp_path / "cache" / "models" / key_of(recipe)
    assert read_json(folder / STORY)["updates"] == 4
    assert not [one for one in folder.iterdir() if one.is_dir()]
    graft.make(f"graft:{base}", tmp_path / "plain", derive(3, "graft"))
    before, after = (opened(one)[0].state_dict() for one in (tmp_path / "plain", folder))
    changed = {name for name, one in before.items() if not torch.equal(one, after[name])}
    for part in ("vision_model", "modality_projection", "text_model"):
        assert any(part in name for name in changed), part


def test_a_run_says_what_cannot_be_given_an_eye(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    recipe_for(str(model_folder("qwen3")), tmp_path)
    with pytest.raises(RecipeError, match=r"policy: .*LlamaForCausalLM\) alone"):
        played(tmp_path / "looking.yaml", [], tmp_path / "run")


def test_other_policies_are_no_grafts(base: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="only the policy in training is made here"):
        recipe_for(str(base), tmp_path, f"policies={{eye: {{model: 'graft:{base}'}}}}")


def recipe_for(model: str, folder: Path, *overrides: str) -> Recipe:
    file = folder / "looking.yaml"
    file.write_text(LOOKING.replace("MODEL", model))
    return read(file, overrides)


def adapter_keys(folder: Path) -> set[str]:
    (file,) = folder.rglob("adapter_model.safetensors")
    return set(load_file(file))
