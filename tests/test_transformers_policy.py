"""The in-process policy: batching, sampling, adapters, whole models, and what it refuses."""

# torch, transformers and peft are partly untyped.
# pyright: reportUnknownMemberType=false

import asyncio
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from prompts import prompt_of
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]

from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.core.errors import ModelError, PolicyError
from selfwright.core.types import Completion, Constraint, Message, Prompt, Sampling

Folder = Callable[[str], Path]
USER = prompt_of("make 24 from 3 5 8")
PROMPTS = [prompt_of(f"make {k} from 3 {k * 7}" + " 8" * (k % 4)) for k in range(12)]


def policy_of(folder: Path, **keys: Any) -> TransformersPolicy:
    given = {"model": "", "device": "cpu"} | keys
    return TransformersPolicy(TransformersConfig.model_validate(given), str(folder), 0)


@pytest.fixture(scope="module")
def shared(model_folder: Folder) -> TransformersPolicy:
    """For tests that leave it as they found it."""
    return policy_of(model_folder("qwen3"))


def ask(
    policy: TransformersPolicy,
    prompts: Sequence[Prompt] = PROMPTS,
    sampling: Sampling | None = None,
) -> list[Completion]:
    sampling = sampling or Sampling(0.0, max_tokens=6)

    async def all_at_once() -> list[Completion]:
        asked = [policy.complete(prompt, sampling, k) for k, prompt in enumerate(prompts)]
        return await asyncio.wait_for(asyncio.gather(*asked), 60)

    return asyncio.run(all_at_once())


def load(policy: TransformersPolicy, folder: Path | None) -> None:
    asyncio.run(policy.load(folder))


def weights(policy: TransformersPolicy) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in policy.model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def adapter(base: Path, folder: Path, seed: int = 0, **settings: Any) -> Path:
    """A LoRA adapter with random weights, none of them zero."""
    given: dict[str, Any] = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"} | settings
    untyped: Any = peft
    models: Any = transformers.AutoModelForCausalLM
    torch.manual_seed(seed)
    model = untyped.get_peft_model(
        models.from_pretrained(base), untyped.LoraConfig(task_type="CAUSAL_LM", **given)
    )
    for name, weight in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


def unmerged(base: Path, folder: Path, ids: Sequence[int]) -> torch.Tensor:
    """(T, V) log-probabilities of ``ids``, with the adapter beside the weights."""
    untyped: Any = peft.PeftModel
    models: Any = transformers.AutoModelForCausalLM
    model = untyped.from_pretrained(models.from_pretrained(base), folder).eval()
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0].log_softmax(-1)


def test_a_completion_is_what_was_sampled(shared: TransformersPolicy) -> None:
    (one,) = ask(shared, [USER], Sampling(1.0, max_tokens=9))
    assert len(one.token_ids) == len(one.logprobs) <= 9
    assert one.text == shared.tokens.text(one.token_ids)
    assert one.finish == ("stop" if one.token_ids[-1] == shared.tokens.end else "length")
    # As a plain pass sees it, and as the policy itself scores it.
    prompt = shared.tokens.prompt(USER)
    with torch.inference_mode():
        logits = shared.model(torch.tensor([[*prompt, *one.token_ids]])).logits[0].log_softmax(-1)
    expected = [float(logits[len(prompt) - 1 + k, x]) for k, x in enumerate(one.token_ids)]
    assert one.logprobs == pytest.approx(expected, abs=1e-4)
    scored = asyncio.run(shared.score(USER, Completion("3 + 5")))
    ids = shared.tokens.completion("3 + 5")
    with torch.inference_mode():
        logits = shared.model(torch.tensor([[*prompt, *ids]])).logits[0].log_softmax(-1)
    assert (scored.text, scored.token_ids) == ("3 + 5", ids)
    expected = [float(logits[len(prompt) - 1 + k, x]) for k, x in enumerate(ids)]
    assert scored.logprobs == pytest.approx(expected, abs=1e-4)


def test_same_seed_same_completion_whatever_the_batch(model_folder: Folder) -> None:
    policy = policy_of(model_folder("qwen3"), batch_size=5)
    sampling = Sampling(1.0, max_tokens=10)
    together = ask(policy, PROMPTS, sampling)

    async def one_by_one() -> list[Completion]:
        return [await policy.complete(p, sampling, k) for k, p in enumerate(PROMPTS)]

    alone = asyncio.run(one_by_one())
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.token_ids for c in ask(policy, PROMPTS, sampling)] == [c.token_ids for c in alone]
    other = asyncio.run(policy.complete(PROMPTS[0], sampling, 99))
    assert other.token_ids != alone[0].token_ids


def test_choices_and_stops(shared: TransformersPolicy) -> None:
    choices = ("go north", "go", "look\naround twice", "")
    # Neither the length nor a stop text cuts a choice.
    listed = Sampling(30.0, max_tokens=2, stop=("\n",), constraint=Constraint(choices))
    answers = ask(shared, [USER] * 200, listed)
    assert {answer.text for answer in answers} == set(choices)
    assert {answer.finish for answer in answers} == {"stop"}
    free = ask(shared, PROMPTS, Sampling(0.0, max_tokens=12))
    for prompt, whole in zip(PROMPTS, free, strict=True):
        stop = whole.text[3:5]
        cut = ask(shared, [prompt], Sampling(0.0, max_tokens=12, stop=("nowhere", stop)))[0]
        assert cut.text == whole.text.split(stop)[0]
        # All ids are kept, those of the stop text too, and nothing is sampled after it.
        assert cut.token_ids == whole.token_ids[: len(cut.token_ids)]
        assert stop in shared.tokens.text(cut.token_ids)
        assert stop not in shared.tokens.text(cut.token_ids[:-1])
        assert cut.finish == "stop"
    for senseless in (Sampling(max_tokens=0), Sampling(stop=("",))):
        with pytest.raises(PolicyError, match="max_tokens of at least 1 and no empty stop"):
            ask(shared, [USER], senseless)


def test_ids_beyond_the_tokenizer_are_survived(model_folder: Folder) -> None:
    # Models are often padded to a rounder vocabulary than their tokenizer's.
    policy = policy_of(model_folder("wide"))
    answers = ask(policy, PROMPTS, Sampling(50.0, max_tokens=20))
    assert any(i >= len(policy.tokens.tokenizer) for a in answers for i in a.token_ids)
    then = [
        Prompt(
            (
                *prompt.messages,
                Message("assistant", (answer.text,), answer.token_ids),
                *USER.messages,
            )
        )
        for prompt, answer in zip(PROMPTS, answers, strict=True)
    ]
    ask(policy, then)
    assert policy.tokens.breaks == 0


def test_too_long_for_the_context_is_an_error_for_that_one_only(shared: TransformersPolicy) -> None:
    async def scenario() -> list[Completion | BaseException]:
        long = prompt_of("8 " * 600)
        asked = [shared.complete(p, Sampling(max_tokens=3), 0) for p in (USER, long, USER)]
        return await asyncio.gather(*asked, return_exceptions=True)

    first, second, third = asyncio.run(scenario())
    assert isinstance(second, PolicyError) and "context of 512" in str(second)
    assert isinstance(first, Completion) and isinstance(third, Completion)
    assert first.token_ids == third.token_ids
    with pytest.raises(PolicyError, match="context of 512"):
        asyncio.run(shared.score(USER, Completion("8 " * 600)))


def test_a_batch_waits_for_every_seat(shared: TransformersPolicy) -> None:
    async def scenario() -> None:
        sampling = Sampling(0.0, max_tokens=2)
        with shared.batch_slot(), shared.batch_slot():
            third = shared.batch_slot()
            third.__enter__()
            first = asyncio.ensure_future(shared.complete(PROMPTS[0], sampling, 0))
            second = asyncio.ensure_future(shared.complete(PROMPTS[1], sampling, 0))
            await asyncio.sleep(0.2)
            assert not first.done() and not second.done()
            # One that gave up is no longer counted, even if its holder asks again.
            second.cancel()
            await asyncio.sleep(0)
            again = asyncio.ensure_future(shared.complete(PROMPTS[1], sampling, 0))
            await asyncio.sleep(0.2)
            assert not first.done() and not again.done()
            last = asyncio.ensure_future(shared.complete(PROMPTS[2], sampling, 0))
            await asyncio.wait_for(asyncio.gather(first, again, last), 30)
            # A slot that is given up lets the others go.
            two = [asyncio.ensure_future(shared.complete(p, sampling, 0)) for p in PROMPTS[:2]]
            await asyncio.sleep(0.1)
            assert not any(one.done() for one in two)
            third.__exit__(None, None, None)
            await asyncio.wait_for(asyncio.gather(*two), 30)

    asyncio.run(scenario())


def test_a_cancelled_request_does_not_harm_the_batch(shared: TransformersPolicy) -> None:
    expected = ask(shared, PROMPTS[:3], Sampling(0.0, max_tokens=40))

    async def scenario() -> None:
        sampling = Sampling(0.0, max_tokens=40)
        asked = [asyncio.ensure_future(shared.complete(p, sampling, 0)) for p in PROMPTS[:3]]
        await asyncio.sleep(0)
        asked[0].cancel()
        await asyncio.sleep(0.002)
        asked[1].cancel()
        done = await asyncio.wait_for(asyncio.gather(*asked, return_exceptions=True), 30)
        assert isinstance(done[0], asyncio.CancelledError) and isinstance(done[2], Completion)
        assert done[2].text == expected[2].text
        assert (await shared.complete(PROMPTS[1], sampling, 0)).text == expected[1].text

    asyncio.run(scenario())


def test_sampling_that_breaks_is_a_policy_error(model_folder: Folder) -> None:
    policy = policy_of(model_folder("qwen3"))
    original = weights(policy)
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(PolicyError, match="not finite"):
        ask(policy)
    policy.model.load_state_dict(original)
    assert len(ask(policy)) == len(PROMPTS)


def test_an_answer_ends_where_generate_would_stop(model_folder: Folder, tmp_path: Path) -> None:
    shutil.copytree(model_folder("qwen3"), tmp_path / "several")
    file = tmp_path / "several" / "generation_config.json"
    # So many that every answer meets one, the tokenizer's own not among them.
    ends = list(range(20, 120))
    file.write_text(json.dumps({"eos_token_id": ends}))
    policy = policy_of(tmp_path / "several")
    assert policy.tokens.ends == {*ends, policy.tokens.end}
    finished = 0
    for prompt, said in zip(
        PROMPTS, ask(policy, PROMPTS, Sampling(0.0, max_tokens=9)), strict=True
    ):
        row = torch.tensor([policy.tokens.prompt(prompt)])
        with torch.inference_mode():
            made = policy.model.generate(row, do_sample=False, max_new_tokens=9, pad_token_id=0)
        assert tuple(made[0, row.shape[1] :].tolist()) == said.token_ids
        ended = said.token_ids[-1] in ends
        assert said.finish == ("stop" if ended else "length")
        assert said.text == policy.tokens.text(said.token_ids[: len(said.token_ids) - ended])
        finished += ended
    assert finished > 3


def test_a_padding_token_without_an_embedding_harms_nobody(
    model_folder: Folder, tmp_path: Path
) -> None:
    base = model_folder("qwen3")
    shutil.copytree(base, tmp_path / "padded")
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(base)  # pyright: ignore
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(tmp_path / "padded")
    said, usual = ask(policy_of(tmp_path / "padded")), ask(policy_of(base))
    assert [one.token_ids for one in said] == [one.token_ids for one in usual]


def test_a_model_that_the_engine_cannot_run_is_refused_when_it_is_opened(
    model_folder: Folder, tmp_path: Path
) -> None:
    shutil.copytree(model_folder("qwen3"), tmp_path / "recurrent")
    for file in ("model.safetensors", "config.json", "generation_config.json"):
        (tmp_path / "recurrent" / file).unlink()
    hf: Any = transformers
    config = hf.RwkvConfig(vocab_size=300, hidden_size=32, num_hidden_layers=2, eos_token_id=1)
    hf.RwkvForCausalLM(config).save_pretrained(tmp_path / "recurrent")
    with pytest.raises(ModelError, match=r"cannot run .*RwkvForCausalLM.*policy\.use: vllm"):
        policy_of(tmp_path / "recurrent")


def test_closing_answers_everybody(model_folder: Folder) -> None:
    policy = policy_of(model_folder("qwen3"))

    async def scenario() -> None:
        sampling = Sampling(1.0, max_tokens=400)
        running = asyncio.ensure_future(policy.complete(USER, sampling, 0))
        await asyncio.sleep(0.05)
        waiting = asyncio.ensure_future(policy.complete(USER, sampling, 0))
        await asyncio.sleep(0)
        await policy.close()
        for asked in (running, waiting, policy.complete(USER, sampling, 0)):
            with pytest.raises(PolicyError, match="closed"):
                await asyncio.wait_for(asked, 30)
        await policy.close()

    asyncio.run(scenario())


def test_an_adapter_changes_the_answers_and_the_base_comes_back(
    model_folder: Folder, tmp_path: Path
) -> None:
    base = model_folder("qwen3")
    policy = policy_of(base)
    before, answers = weights(policy), ask(policy)
    one, two = adapter(base, tmp_path / "one", 1), adapter(base, tmp_path / "two", 2, r=2)
    assert policy.checkpoint == "base"
    load(policy, one)
    assert policy.checkpoint == str(one)
    merged, first = weights(policy), ask(policy)
    assert [c.text for c in first] != [c.text for c in answers]
    for prompt, said in zip(PROMPTS, first, strict=True):
        ids = policy.tokens.prompt(prompt)
        table = unmerged(base, one, [*ids, *said.token_ids])
        expected = [float(table[len(ids) - 1 + k, x]) for k, x in enumerate(said.token_ids)]
        assert said.logprobs == pytest.approx(expected, abs=1e-4)
    for folder in (two, one, None, two, None, one):
        load(policy, folder)
    # Any number of loads later: the very same numbers, merged and base.
    assert same(weights(policy), merged)
    assert [c.token_ids for c in ask(policy)] == [c.token_ids for c in first]
    load(policy, None)
    assert policy.checkpoint == "base" and same(weights(policy), before)
    assert ask(policy) == answers


def test_a_whole_model_replaces_the_base_and_goes_again(
    model_folder: Folder, tmp_path: Path
) -> None:
    base = model_folder("qwen3")
    policy = policy_of(base)
    before, answers = weights(policy), ask(policy)
    models: Any = transformers.AutoModelForCausalLM
    other = models.from_pretrained(base)
    with torch.no_grad():
        for weight in other.parameters():
            weight += 0.1 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(5))
    other.save_pretrained(tmp_path / "whole")
    load(policy, tmp_path / "whole")
    assert policy.checkpoint == str(tmp_path / "whole")
    assert same(weights(policy), other.state_dict()) and ask(policy) != answers
    load(policy, adapter(base, tmp_path / "adapter"))
    load(policy, tmp_path / "whole")
    assert same(weights(policy), other.state_dict())
    load(policy, None)
    assert same(weights(policy), before) and ask(policy) == answers


def broken(kind: str, base: Path, folder: Path, other: Path) -> Path:
    """A folder that holds no checkpoint of this base."""
    file = folder / "adapter_model.safetensors"
    match kind:
        case "missing":
            return folder / "nowhere"
        case "pickle":
            adapter(base, folder)
            torch.save(load_file(file), folder / "adapter_model.bin")
            file.unlink()
        case "prefixes":
            adapter(base, folder)
            save_file({f"wrong.{k}": v for k, v in load_file(file).items()}, file)
        case "half":
            adapter(base, folder)
            tensors = load_file(file)
            save_file({k: tensors[k] for k in sorted(tensors)[1:]}, file)
        case "shapes":
            adapter(base, folder)
            save_file({k: v[:, :3].clone() for k, v in load_file(file).items()}, file)
        case "truncated":
            adapter(base, folder)
            file.write_bytes(file.read_bytes()[:-64])
        case "saved modules":
            adapter(base, folder, modules_to_save=["norm"])
        case "biases":
            adapter(base, folder, bias="all")
        case "tied head":
            adapter(base, folder, target_modules=["lm_head"])
        case "no such layer":
            adapter(base, folder)
            config = (folder / "adapter_config.json").read_text()
            (folder / "adapter_config.json").write_text(config.replace("q_proj", "x_proj"))
        case "other architecture":
            return other
        case "whole pickle":
            shutil.copytree(base, folder)
            (folder / "model.safetensors").unlink()
            torch.save({}, folder / "pytorch_model.bin")
        case "whole half":
            shutil.copytree(base, folder)
            tensors = load_file(folder / "model.safetensors")
            first = min(k for k in tensors if "q_proj" in k)
            del tensors[first]
            save_file(tensors, folder / "model.safetensors", {"format": "pt"})
        case _:
            raise ValueError(kind)
    return folder


REFUSED = {
    "missing": "holds no checkpoint",
    "pickle": "no adapter_model.safetensors",
    "prefixes": "tensors do not match",
    "half": "1 tensors do not match",
    "shapes": "cannot load the adapter",
    "truncated": "cannot load the adapter",
    "saved modules": "only LoRA on weights",
    "biases": "only LoRA on weights",
    "tied head": "whose weights are the embeddings'",
    "no such layer": "tensors do not match",
    "other architecture": "another architecture",
    "whole pickle": "cannot open the model",
    "whole half": "incomplete",
}


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
def test_what_is_no_checkpoint_is_refused_and_the_base_answers(
    model_folder: Folder, tmp_path: Path
) -> None:
    base = model_folder("qwen3")
    policy = policy_of(base)
    before, good = weights(policy), adapter(base, tmp_path / "good", 3)
    load(policy, good)
    merged = weights(policy)
    for k, (kind, message) in enumerate(REFUSED.items()):
        folder = broken(kind, base, tmp_path / str(k), model_folder("llama"))
        with pytest.raises(PolicyError, match=message):
            load(policy, folder)
        assert policy.checkpoint == "base" and same(weights(policy), before), kind
        load(policy, good)
        assert policy.checkpoint == str(good) and same(weights(policy), merged), kind


def test_models_that_cannot_be_opened(model_folder: Folder, tmp_path: Path) -> None:
    base = model_folder("qwen3")
    with pytest.raises(PolicyError, match="cannot open the model"):
        policy_of(tmp_path / "nowhere")
    for kind, message in {"whole pickle": "cannot open", "whole half": "incomplete"}.items():
        with pytest.raises(PolicyError, match=message):
            policy_of(broken(kind, base, tmp_path / kind, base))
    shutil.copytree(base, tmp_path / "garbage")
    (tmp_path / "garbage" / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(PolicyError, match="cannot open"):
        policy_of(tmp_path / "garbage")
    shutil.copytree(base, tmp_path / "mute")
    (tmp_path / "mute" / "chat_template.jinja").unlink()
    with pytest.raises(PolicyError, match="no chat template"):
        policy_of(tmp_path / "mute")
    if not torch.cuda.is_available():
        with pytest.raises(PolicyError, match="no GPU"):
            policy_of(base, device="cuda")
