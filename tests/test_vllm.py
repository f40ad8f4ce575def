"""Policies served by vLLM: real servers on the CPU, in the environment that `make vllm` makes."""

import asyncio
import os
import shutil
import signal
import struct
import threading
import zlib
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias, TypeVar

import httpx2
import psutil
import pytest
import torch
import transformers
from casting import SINGLE, played
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from test_learner import learner_of, talks
from test_supervised import within

from selfwright.agents import scratch
from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.agents.engines.vllm import RANKS, VLLMConfig, VLLMPolicy, room_for
from selfwright.core.canary import Canary
from selfwright.core.errors import DiskError, PolicyError, RecipeError
from selfwright.core.files import read_json, write_json
from selfwright.core.recipe import read
from selfwright.core.tokens import ChatTokens
from selfwright.core.types import Batch, Completion, Example, Message, Sampling
from selfwright.trainers.loss import NLL
from selfwright.trainers.pack import pack

PYTHON = os.environ.get(
    "SELFWRIGHT_VLLM_PYTHON", str(Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python")
)
PROMPTS = [(Message("user", f"make {k} from 3 {k * 7}" + " 8" * (k % 4)),) for k in range(24)]
T = TypeVar("T")
Prompt: TypeAlias = tuple[Message, ...]
Folder = Callable[[str], Path]
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    """One event loop for all tests: a policy's connections belong to it."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()

    def wait(coroutine: Coroutine[Any, Any, T], seconds: float = 240) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result(seconds)

    yield wait
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)


async def policy_of(folder: Path, **keys: Any) -> VLLMPolicy:
    given_ = {"model": "", "python": PYTHON, "memory_gb": 0.25} | keys
    return VLLMPolicy(VLLMConfig.model_validate(given_), str(folder), 0)


@pytest.fixture
def policy(run: Run, server: VLLMPolicy) -> Iterator[VLLMPolicy]:
    """With the base model."""
    yield server
    run(server.load(None))


@pytest.fixture(scope="module")
def server(run: Run, model_folder: Folder) -> Iterator[VLLMPolicy]:
    made = run(policy_of(model_folder("vllm")))
    run(made.score(PROMPTS[0], Completion("1 + 2")))
    yield made
    run(made.close())


@pytest.fixture(scope="module")
def checkpoints(model_folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """What a learner exports after one update, and after two."""
    learner = learner_of(model_folder("vllm"), learning_rate=3e-2)
    tokens = ChatTokens(learner._tokens.tokenizer)  # pyright: ignore[reportPrivateUsage]
    room = tmp_path_factory.mktemp("checkpoints")
    for k in range(2):
        learner.update(Batch(NLL(), tuple(talks(tokens, 8, k)), 2), 0.0)
        (room / str(k)).mkdir()
        learner.export(room / str(k))
    return [room / "0", room / "1"]


def in_process(folder: Path, checkpoint: Path | None = None) -> TransformersPolicy:
    config = TransformersConfig.model_validate({"model": "", "device": "cpu"})
    made = TransformersPolicy(config, str(folder), 0)
    asyncio.run(made.load(checkpoint))
    return made


async def ask(policy: VLLMPolicy, sampling: Sampling, seed: int = 0) -> list[Completion]:
    return await asyncio.gather(
        *(policy.complete(prompt, sampling, seed + k) for k, prompt in enumerate(PROMPTS))
    )


def gap(one: Completion, other: Completion) -> float:
    assert one.token_ids == other.token_ids
    return max(abs(a - b) for a, b in zip(one.logprobs, other.logprobs, strict=True))


async def served(policy: VLLMPolicy) -> set[str]:
    """Names of the adapters that the server holds."""
    (replica,) = policy._replicas  # pyright: ignore[reportPrivateUsage]
    async with httpx2.AsyncClient() as client:
        told = (await client.get(f"{replica.url}/v1/models")).json()
    return {one["id"] for one in told["data"]} - {"base"}


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
    text = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128}
    text |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    text |= {"max_position_embeddings": 512, "bos_token_id": None, "tie_word_embeddings": True}
    text |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text["rope_parameters"] = {
        "rope_type": "default",
        "rope_theta": 1e4,
        "mrope_section": [4, 6, 6],
    }
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 64, "num_heads": 1, "mlp_ratio": 2}
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
    shown = {"image_processor_type": "Qwen2VLImageProcessor", "patch_size": PATCH}
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


def test_it_shows_images(run: Run, seeing: Path) -> None:
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

    run(all_of_it())


def test_it_is_the_same_model(run: Run, policy: VLLMPolicy, model_folder: Folder) -> None:
    mine = in_process(model_folder("vllm"))
    sampled = run(ask(policy, Sampling(max_tokens=60)))
    for prompt, said in zip(PROMPTS, sampled, strict=True):
        assert gap(asyncio.run(mine.score(prompt, said)), said) < 1e-3
        assert gap(run(policy.score(prompt, said)), said) < 1e-3
        ended = said.token_ids[-1] == policy.tokens.end
        assert said.finish == ("stop" if ended else "length")
        assert ended or len(said.token_ids) == 60
    assert {said.finish for said in sampled} == {"stop", "length"}
    greedy = run(ask(policy, Sampling(0.0, max_tokens=8)))
    for prompt, said in zip(PROMPTS, greedy, strict=True):
        theirs = asyncio.run(mine.complete(prompt, Sampling(0.0, max_tokens=8), 0))
        assert theirs.token_ids == said.token_ids and theirs.text == said.text


def test_log_probabilities_are_those_of_temperature_one(run: Run, policy: VLLMPolicy) -> None:
    for said, prompt in zip(
        run(ask(policy, Sampling(0.5, 0.8, max_tokens=6))), PROMPTS, strict=True
    ):
        assert gap(run(policy.score(prompt, said)), said) < 1e-3


def test_seeds_decide_what_is_sampled(run: Run, policy: VLLMPolicy) -> None:
    once, again, other = (run(ask(policy, Sampling(max_tokens=12), k)) for k in (0, 0, 99))
    assert [a.token_ids for a in once] == [a.token_ids for a in again]
    assert [a.token_ids for a in once] != [a.token_ids for a in other]


def test_stop_texts_and_choices(run: Run, policy: VLLMPolicy) -> None:
    whole = run(ask(policy, Sampling(0.0, max_tokens=12)))
    text = next(said.text for said in whole if len(said.text) > 4)
    at = next(k for k, said in enumerate(whole) if said.text == text)
    stop = text[3]
    cut = run(policy.complete(PROMPTS[at], Sampling(0.0, max_tokens=12, stop=(stop,)), 0))
    assert cut.text == text.split(stop)[0] and cut.finish == "stop"
    assert whole[at].token_ids[: len(cut.token_ids)] == cut.token_ids
    held = Sampling(max_tokens=1, choices=("1 + 2", "3 * 4"))
    said = [run(policy.complete(PROMPTS[0], held, seed)) for seed in range(8)]
    assert {one.text for one in said} <= set(held.choices)
    # Of the model's own distribution: as likely as the model would find them unasked.
    assert all(gap(one, run(policy.score(PROMPTS[0], one))) < 1e-3 for one in said)
    assert all(sum(one.logprobs) < -1 for one in said)


TURNS = st.lists(st.text("0123456789 +-*make", min_size=1, max_size=12), min_size=1, max_size=4)


@pytest.mark.parametrize("template", ["plain", "thinking", "trimmed"])
@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(turns=TURNS, seed=st.integers(0, 2**31))
def test_ids_stored_are_ids_sampled_are_ids_trained_on(
    run: Run,
    policy: VLLMPolicy,
    model_folder: Folder,
    template: str,
    turns: list[str],
    seed: int,
) -> None:
    tokens = templated(policy, model_folder, template)
    heard: list[tuple[list[int], list[int]]] = []

    async def talk() -> list[Example]:
        replica = policy._replicas[0]  # pyright: ignore[reportPrivateUsage]
        post = replica.post

        async def listening(path: str, body: Any, first: bool = False) -> Any:
            answer = await post(path, body, first)
            choice = answer["choices"][0]
            heard.append((choice["prompt_token_ids"], choice["token_ids"]))
            return answer

        own, policy.tokens = policy.tokens, tokens
        replica.post = listening
        try:
            said: list[Example] = []
            messages: list[Message] = []
            for k, turn in enumerate(turns):
                messages.append(Message("user", turn))
                one = await policy.complete(messages, Sampling(max_tokens=5), seed + k)
                said.append(Example(tuple(messages), one))
                messages.append(Message("assistant", one.text, (), one.token_ids, one.tokenizer))
            return said
        finally:
            replica.post = post
            policy.tokens = own

    examples = run(talk())
    assert [one.completion.token_ids for one in examples] == [tuple(ids) for _, ids in heard]
    trained: list[tuple[list[int], list[int]]] = []
    for row in pack(examples, tokens):
        for span in row.spans:
            trained.append((row.ids[: span.begin], row.ids[span.begin : span.end]))
    assert sorted(trained) == sorted(heard)


def templated(policy: VLLMPolicy, model_folder: Folder, template: str) -> ChatTokens:
    import copy

    from conftest import THINKING

    tokenizer = copy.deepcopy(policy.tokens.tokenizer)
    if template == "thinking":  # Not append-only: a new row for every turn, the same ids still.
        tokenizer.chat_template = THINKING.replace("</think>", "m")
    elif template == "trimmed":
        tokenizer.chat_template = THINKING.replace(
            "{{ m.content.split('</think>')[-1] }}", "{{ m.content.strip() }}"
        )
    return ChatTokens(tokenizer)


def test_adapters_are_swapped_in_live(
    run: Run, policy: VLLMPolicy, model_folder: Folder, checkpoints: list[Path]
) -> None:
    base = run(ask(policy, Sampling(max_tokens=6)))
    names: list[set[str]] = []
    for checkpoint in (*checkpoints, checkpoints[0]):
        run(policy.load(checkpoint))
        assert policy.checkpoint == str(checkpoint)
        names.append(run(served(policy)))
        mine = in_process(model_folder("vllm"), checkpoint)
        for prompt, said in zip(PROMPTS, run(ask(policy, Sampling(max_tokens=6))), strict=True):
            assert gap(asyncio.run(mine.score(prompt, said)), said) < 1e-3
    assert all(len(one) == 1 for one in names) and len({name for one in names for name in one}) == 3
    # The same content at another place, such as a draft that was renamed, is not loaded again.
    moved = checkpoints[0].with_name("moved")
    shutil.copytree(checkpoints[0], moved)
    run(policy.load(moved))
    assert policy.checkpoint == str(moved) and run(served(policy)) == names[-1]
    run(policy.load(None))
    assert policy.checkpoint == "base" and not run(served(policy))
    again = run(ask(policy, Sampling(max_tokens=6)))
    assert [a.token_ids for a in again] == [b.token_ids for b in base]


def edited(checkpoint: Path, folder: Path, change: Callable[[str], str]) -> Path:
    """The same adapter with other names for its weights."""
    shutil.copytree(checkpoint, folder)
    file = folder / "adapter_model.safetensors"
    save_file({change(name): value for name, value in load_file(file).items()}, file)
    return folder


def test_a_broken_adapter_is_found_out(
    run: Run, policy: VLLMPolicy, checkpoints: list[Path], tmp_path: Path
) -> None:
    run(policy.load(checkpoints[0]))
    good = run(ask(policy, Sampling(max_tokens=6)))
    before = run(served(policy))

    def wrong(name: str) -> str:
        return name.replace("model.layers", "model.language_model.layers")

    def refused(folder: Path) -> str:
        with pytest.raises(PolicyError) as caught:
            run(policy.load(folder))
        # Who answered before still does.
        assert run(served(policy)) == before and policy.checkpoint == str(checkpoints[0])
        assert [a.token_ids for a in run(ask(policy, Sampling(max_tokens=6)))] == [
            a.token_ids for a in good
        ]
        return str(caught.value)

    said = refused(edited(checkpoints[1], tmp_path / "prefixes", wrong))
    assert "canary" in said or "was not loaded" in said
    # Nor without a canary.
    blind = edited(checkpoints[1], tmp_path / "blind", wrong)
    (blind / "canary.json").unlink()
    said = refused(blind)
    assert "as the base model does" in said or "was not loaded" in said
    # The last adapter's weights under a new name: what a stale server would answer.
    stale = shutil.copytree(checkpoints[0], tmp_path / "stale")
    (stale / "adapter_config.json").write_text(
        (stale / "adapter_config.json").read_text().replace('"CAUSAL_LM"', '"CAUSAL_LM" ')
    )
    shutil.copy(checkpoints[1] / "canary.json", stale)
    assert "as its last adapter does" in refused(stale)
    assert "holds no adapter" in refused(tmp_path)


def test_a_full_disk_is_named(
    run: Run, model_folder: Folder, policy: VLLMPolicy, checkpoints: list[Path], tmp_path: Path
) -> None:
    import resource

    (replica,) = policy._replicas  # pyright: ignore[reportPrivateUsage]
    # On another file system, so that files are copied.
    adapters = Path("/dev/shm") / f"selfwright-{os.getpid()}"
    second = run(policy_of(model_folder("vllm"), url=[replica.url], adapters=str(adapters)))
    try:
        run(second.score(PROMPTS[0], Completion("1")))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        try:
            with pytest.raises(DiskError, match=r"cannot publish an adapter in .*too large"):
                run(second.load(checkpoints[0]))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert not list(adapters.iterdir())
        run(second.load(checkpoints[0]))
        assert len(run(served(second))) == 1
    finally:
        run(second.close())
        shutil.rmtree(adapters, ignore_errors=True)
    # It was not ours to end; only what we had put there is gone.
    assert not run(served(policy))


def test_no_room_in_the_context(run: Run, policy: VLLMPolicy) -> None:
    with pytest.raises(PolicyError, match="exceed the server's context of"):
        run(policy.complete((Message("user", "9 " * 3000),), Sampling(max_tokens=5), 0))
    with pytest.raises(PolicyError, match="at least 1"):
        run(policy.complete(PROMPTS[0], Sampling(max_tokens=0), 0))


@pytest.mark.timeout(600)
def test_a_server_that_dies_or_hangs_is_started_again_but_not_for_ever(
    run: Run, model_folder: Folder, checkpoints: list[Path]
) -> None:
    made = run(policy_of(model_folder("vllm"), restarts=1, stall_timeout_s=10))
    try:
        run(made.load(checkpoints[0]))
        expected = run(ask(made, Sampling(max_tokens=8)))
        (replica,) = made._replicas  # pyright: ignore[reportPrivateUsage]

        async def disturbed(how: int) -> list[Completion]:
            asked = [asyncio.create_task(ask(made, Sampling(max_tokens=200), k)) for k in range(4)]
            await asyncio.sleep(0.3)
            for process in everybody(replica.process.pid):
                process.send_signal(how)
            await asyncio.gather(*asked)
            return await ask(made, Sampling(max_tokens=8))

        # The adapter answers again, not the base.
        after = run(disturbed(signal.SIGKILL))
        assert [a.token_ids for a in after] == [b.token_ids for b in expected]
        with pytest.raises(PolicyError, match=r"made no token for(?s:.*)started again 1 times"):
            run(disturbed(signal.SIGSTOP))
    finally:
        run(made.close())
    # Stopped ones too; the dying may take a moment.
    assert within(10, lambda: not everybody(replica.process.pid))


def everybody(group: int) -> list[psutil.Process]:
    """The server's processes; not the one that watches over them."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            mine = os.getpgid(process.pid) == group and process.pid != group
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found


def test_a_run_learns_from_what_vllm_samples(
    policy: VLLMPolicy, player: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(player)))
    overrides = ["policy.use=vllm", f"policy.python={PYTHON}", "policy.memory_gb=0.25"]
    result = played(recipe, [*overrides, "iterations=2"], tmp_path / "run")
    assert result["final"]["tasks"] == 12 and result["stopped"] is None
    metrics = [read_json(f) for f in sorted((tmp_path / "run").glob("iterations/*/metrics.json"))]
    assert len(metrics) == 2 and all(m["rollout/failed"] == 0 for m in metrics)
    # The first update sees the very weights that sampled: their ratio is 1.
    assert abs(metrics[0]["train/ratio"] - 1) < 0.2 and metrics[0]["train/tokens"] > 0
    canary = Canary.of(tmp_path / "run" / "iterations" / "0001" / "checkpoint")
    assert canary is not None


@pytest.mark.parametrize(
    ("learner", "said"),
    [
        ("{method: full}", "not whole models"),
        ("{rank: 20}", "policy.max_rank: 32"),
        ("{rank: 4, alpha: 8, targets: [q_proj, lm_head]}", "no adapter on lm_head"),
    ],
)
def test_adapters_that_vllm_cannot_serve_are_refused_at_once(
    tmp_path: Path, learner: str, said: str
) -> None:
    recipe = tmp_path / "bad.yaml"
    recipe.write_text(SINGLE.replace("MODEL", "m").replace("{rank: 4, alpha: 8", learner[:-1]))
    with pytest.raises(RecipeError, match=said):
        read(recipe, ["policy.use=vllm"])


def test_settings_that_contradict_each_other() -> None:
    for keys, said in [
        ({"url": ["http://127.0.0.1:1"], "replicas": 2}, "run already"),
        ({"devices": ["0", "1"]}, "one for each of 1"),
        ({"python": "/nowhere/python"}, "is no program"),
    ]:
        with pytest.raises(ValidationError, match=said):
            VLLMConfig.model_validate({"model": "m"} | keys)


@given(st.integers(1, RANKS[-1]))
def test_there_is_room_for_every_rank(rank: int) -> None:
    assert room_for(rank) >= rank and not any(rank <= one < room_for(rank) for one in RANKS)


def test_an_interpreter_without_vllm(run: Run, model_folder: Folder) -> None:
    import sys

    made = run(policy_of(model_folder("vllm"), python=sys.executable))
    with pytest.raises(PolicyError, match=r"policy.python.*(?s:.*)No module named 'vllm'"):
        run(made.complete(PROMPTS[0], Sampling(), 0))
    run(made.close())


def test_nobody_at_that_address(run: Run, model_folder: Folder) -> None:
    made = run(
        policy_of(model_folder("vllm"), python="", url=["http://127.0.0.1:9"], start_timeout_s=1)
    )
    with pytest.raises(PolicyError, match=r"http://127.0.0.1:9 did not come up within"):
        run(made.complete(PROMPTS[0], Sampling(), 0))
    run(made.close())
