"""Policies served by vLLM: real servers on the CPU, in the environment that `make vllm` makes."""

import asyncio
import os
import re
import shutil
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import httpx2
import pytest
import torch
from components import SINGLE, played
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prompts import prompt_of
from pydantic import ValidationError
from safetensors.torch import load_file, save_file  # pyright: ignore[reportUnknownVariableType]
from test_learner import learner_of, talks

from selfwright.agents.engines.transformers import TransformersConfig, TransformersPolicy
from selfwright.agents.engines.vllm import RANKS, VLLMConfig, VLLMPolicy, home, room_for
from selfwright.agents.engines.vllm_server import Gone, Replica
from selfwright.core.config import JudgeConfig
from selfwright.core.errors import DiskError, PolicyError, RecipeError
from selfwright.core.files import read_json
from selfwright.core.models.canary import canaries_of, write
from selfwright.core.models.constraints import Constraints
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.recipe import read
from selfwright.core.types import (
    Batch,
    Completion,
    Constraint,
    Example,
    Message,
    Prompt,
    Sampling,
    Trajectory,
    Verdict,
)
from selfwright.trainers.learning.loss import NLL
from selfwright.trainers.learning.pack import pack

PYTHON = os.environ.get(
    "SELFWRIGHT_VLLM_PYTHON", str(Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python")
)
PROMPTS = [prompt_of(f"make {k} from 3 {k * 7}" + " 8" * (k % 4)) for k in range(24)]
# On CPUs a server computes in a third process, which imports all once more. With this, its engine
# computes itself, as on one GPU.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
T = TypeVar("T")
Folder = Callable[[str], Path]
Runner = Callable[..., Any]


@pytest.fixture(scope="module")
def run() -> Iterator[Runner]:
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
def policy(run: Runner, server: VLLMPolicy) -> Iterator[VLLMPolicy]:
    """With the base model."""
    yield server
    run(server.load(None))


@pytest.fixture(scope="module")
def server(run: Runner, model_folder: Folder) -> Iterator[VLLMPolicy]:
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


def check_held(policy: VLLMPolicy, folder: Path, one: Completion) -> None:
    """Its held log-probabilities are those that a learner works out."""
    assert one.constraint is not None and len(one.constrained) == len(one.token_ids)
    net, prompt = in_process(folder).model, policy.tokens.prompt(PROMPTS[0])
    with torch.inference_mode():
        logits = net(torch.tensor([[*prompt, *one.token_ids]])).logits[0, len(prompt) - 1 : -1]
    masks = Constraints(policy.tokens).masks(one.constraint, one.token_ids, logits.shape[1])
    held = logits.float().masked_fill(~torch.as_tensor(masks), -torch.inf).log_softmax(-1)
    expected = [float(held[k, token]) for k, token in enumerate(one.token_ids)]
    assert one.constrained == pytest.approx(expected, abs=2e-3)


async def served(policy: VLLMPolicy, number: int = 0) -> set[str]:
    """Names of the adapters that the server holds."""
    replica = policy._replicas[number]  # pyright: ignore[reportPrivateUsage]
    async with httpx2.AsyncClient() as client:
        told = (await client.get(f"{replica.url}/v1/models")).json()
    return {one["id"] for one in told["data"]} - {"base"}


@pytest.fixture(params=[True, False], ids=["generate", "completions"])
def either(policy: VLLMPolicy, request: pytest.FixtureRequest) -> Iterator[VLLMPolicy]:
    """As a server of ours, and as one that somebody started without --enable-scale-out."""
    (replica,) = policy._replicas  # pyright: ignore[reportPrivateUsage]
    assert replica.generates
    replica.generates = request.param
    yield policy
    replica.generates = True


@pytest.mark.vllm
def test_it_is_the_same_model(run: Runner, either: VLLMPolicy, model_folder: Folder) -> None:
    policy = either
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


@pytest.mark.vllm
def test_log_probabilities_are_those_of_temperature_one(run: Runner, policy: VLLMPolicy) -> None:
    for said, prompt in zip(
        run(ask(policy, Sampling(0.5, 0.8, max_tokens=6))), PROMPTS, strict=True
    ):
        assert gap(run(policy.score(prompt, said)), said) < 1e-3


@pytest.mark.vllm
def test_seeds_decide_what_is_sampled(run: Runner, policy: VLLMPolicy) -> None:
    once, again, other = (run(ask(policy, Sampling(max_tokens=12), k)) for k in (0, 0, 99))
    assert [a.token_ids for a in once] == [a.token_ids for a in again]
    assert [a.token_ids for a in once] != [a.token_ids for a in other]


@pytest.mark.vllm
def test_stop_texts_and_constraints(run: Runner, either: VLLMPolicy, model_folder: Folder) -> None:
    policy, folder = either, model_folder("vllm")
    whole = run(ask(policy, Sampling(0.0, max_tokens=12)))
    text = next(said.text for said in whole if len(said.text) > 4)
    at = next(k for k, said in enumerate(whole) if said.text == text)
    stop = text[3]
    cut = run(policy.complete(PROMPTS[at], Sampling(0.0, max_tokens=12, stop=(stop,)), 0))
    assert cut.text == text.split(stop)[0] and cut.finish == "stop"
    assert whole[at].token_ids[: len(cut.token_ids)] == cut.token_ids
    held = Sampling(max_tokens=1, constraint=Constraint(("1 + 2", "3 * 4")))
    said = [run(policy.complete(PROMPTS[0], held, seed)) for seed in range(8)]
    assert {one.text for one in said} <= {"1 + 2", "3 * 4"}
    grammar = Constraint(grammar="start: /[1-9]( \\+ [1-9]){0,3}/")
    summed = [
        run(policy.complete(PROMPTS[0], Sampling(2.0, max_tokens=30, constraint=grammar), seed))
        for seed in range(8)
    ]
    assert all(re.fullmatch(r"[1-9]( \+ [1-9]){0,3}", one.text) for one in summed)
    assert len({one.text for one in summed}) > 2
    for one in (*said, *summed):
        check_held(policy, folder, one)
    # Of the model's own distribution: as likely as the model would find them unasked.
    assert all(gap(one, run(policy.score(PROMPTS[0], one))) < 1e-3 for one in said)
    assert all(sum(one.logprobs) < -1 for one in said)


@pytest.mark.vllm
def test_it_is_heard_while_it_speaks(run: Runner, either: VLLMPolicy) -> None:
    heard: list[Sequence[int]] = []
    sampling = Sampling(max_tokens=40)
    said = run(either.stream(PROMPTS[0], sampling, 3, heard.append))
    whole = run(either.complete(PROMPTS[0], sampling, 3))
    assert (said.text, said.finish) == (whole.text, whole.finish) and gap(said, whole) < 1e-3
    (replica,) = either._replicas  # pyright: ignore[reportPrivateUsage]
    if replica.generates:
        assert len(heard) > 2 and heard[-1] == said.token_ids
        assert all(one == said.token_ids[: len(one)] for one in heard)
        assert [len(one) for one in heard] == sorted({len(one) for one in heard})
    else:
        assert not heard


TURNS = st.lists(st.text("0123456789 +-*make", min_size=1, max_size=12), min_size=1, max_size=4)


@pytest.mark.vllm
@pytest.mark.parametrize("template", ["plain", "thinking", "trimmed"])
@settings(
    deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(turns=TURNS, seed=st.integers(0, 2**31))
def test_ids_stored_are_ids_sampled_are_ids_trained_on(
    run: Runner,
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

        async def listening(path: str, body: Any, first: bool = False, line: Any = None) -> Any:
            answer = await post(path, {**body, "return_token_ids": True}, first)
            heard.append((answer["prompt_token_ids"], answer["choices"][0]["token_ids"]))
            return answer

        own, policy.tokens = policy.tokens, tokens
        replica.post = listening
        try:
            said: list[Example] = []
            messages: list[Message] = []
            for k, turn in enumerate(turns):
                messages.append(Message("user", (turn,)))
                one = await policy.complete(
                    Prompt(tuple(messages)), Sampling(max_tokens=5), seed + k
                )
                said.append(Example(Prompt(tuple(messages)), one))
                messages.append(Message("assistant", (one.text,), one.token_ids, one.tokenizer))
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


@pytest.mark.vllm
def test_adapters_are_swapped_in_live(
    run: Runner, policy: VLLMPolicy, model_folder: Folder, checkpoints: list[Path]
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


@pytest.mark.vllm
def test_a_broken_adapter_is_found_out(
    run: Runner, policy: VLLMPolicy, checkpoints: list[Path], tmp_path: Path
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

    # Seen in the file itself, before any server is asked.
    said = refused(edited(checkpoints[1], tmp_path / "prefixes", wrong))
    assert "tensors do not match" in said and "language_model" in said
    # Its own canary, which is not what these weights come to.
    other = shutil.copytree(checkpoints[1], tmp_path / "other")
    (canary,) = canaries_of(other)
    write(other, [replace(canary, logprobs=tuple(one - 1.0 for one in canary.logprobs))])
    assert "answers otherwise than it should" in refused(other)
    # The last adapter's weights under a new name: what a stale server would answer.
    stale = shutil.copytree(checkpoints[0], tmp_path / "stale")
    (stale / "adapter_config.json").write_text(
        (stale / "adapter_config.json").read_text().replace('"CAUSAL_LM"', '"CAUSAL_LM" ')
    )
    shutil.copy(checkpoints[1] / "canary.json", stale)
    assert "as its last adapter does" in refused(stale)
    assert "holds no adapter" in refused(tmp_path)


@pytest.mark.vllm
def test_a_full_disk_is_named(
    run: Runner, model_folder: Folder, policy: VLLMPolicy, checkpoints: list[Path], tmp_path: Path
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


@pytest.mark.vllm
def test_no_room_in_the_context(run: Runner, policy: VLLMPolicy) -> None:
    with pytest.raises(PolicyError, match="exceed the server's context of"):
        run(policy.complete(prompt_of("9 " * 3000), Sampling(max_tokens=5), 0))
    with pytest.raises(PolicyError, match="at least 1"):
        run(policy.complete(PROMPTS[0], Sampling(max_tokens=0), 0))


class Short:
    """Short answers are good: whoever knows nothing of the task can learn that."""

    Config = JudgeConfig

    def __init__(self, config: JudgeConfig) -> None:
        pass

    async def judge(self, trajectories: Sequence[Trajectory]) -> list[Verdict]:
        return [
            Verdict(1 / (1 + len(one.steps[-1].action.text)), "", "short") for one in trajectories
        ]


@pytest.mark.vllm
def test_a_run_learns_from_what_vllm_samples(
    policy: VLLMPolicy, model_folder: Folder, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.yaml"
    recipe.write_text(SINGLE.replace("MODEL", str(model_folder("vllm"))))
    url = policy._replicas[0].url  # pyright: ignore[reportPrivateUsage]
    overrides = ["policy.use=vllm", f"policy.url=['{url}']", "judge.use=test_vllm:Short"]
    # Two iterations, of which the second is played while the first is learned and loaded.
    overrides += ["iterations=2", "rollout.max_staleness=1"]
    result = played(recipe, overrides, tmp_path / "run")
    assert result["final"]["tasks"] == 12 and result["stopped"] is None
    metrics = [read_json(f) for f in sorted((tmp_path / "run").glob("iterations/*/metrics.json"))]
    assert len(metrics) == 2 and all(m["rollout/failed"] == 0 for m in metrics)
    assert [m["rollout/staleness_max"] for m in metrics] == [0, 1]
    # The first update sees the very weights that sampled: their ratio is 1.
    assert abs(metrics[0]["train/ratio"] - 1) < 0.2 and metrics[0]["train/tokens"] > 0
    assert canaries_of(tmp_path / "run" / "iterations" / "0001" / "checkpoint")


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


def test_an_interpreter_without_vllm(run: Runner, model_folder: Folder) -> None:
    import sys

    made = run(policy_of(model_folder("vllm"), python=sys.executable))
    with pytest.raises(PolicyError, match=r"policy.python.*(?s:.*)No module named 'vllm'"):
        run(made.complete(PROMPTS[0], Sampling(), 0))
    run(made.close())


def test_nobody_at_that_address(run: Runner, model_folder: Folder) -> None:
    made = run(
        policy_of(model_folder("vllm"), python="", url=["http://127.0.0.1:9"], start_timeout_s=1)
    )
    with pytest.raises(PolicyError, match=r"http://127.0.0.1:9 did not come up within"):
        run(made.complete(PROMPTS[0], Sampling(), 0))
    run(made.close())


@pytest.mark.parametrize(
    ("answer", "kind", "why"),
    [
        (b"<html>Bad Gateway</html>", PolicyError, "answered otherwise than vLLM: <html>Bad"),
        (b'{"error": {"code": 429}}', PolicyError, "answered otherwise than vLLM: .*429"),
        (b'{"choices": []}', PolicyError, "answered otherwise than vLLM"),
        (b'data: {"error": {"code": 400, "message": "too long"}}\n', PolicyError, "too long"),
        (b'data: {"error": {"code": 500, "message": "out of"}}\n', Gone, "out of"),
        (b'data: {"error": "gone"}\n', Gone, "gone"),
    ],
)
def test_what_is_no_answer_is_named(answer: bytes, kind: type[PolicyError], why: str) -> None:
    async def odd(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n%s" % (len(answer), answer))
        await writer.drain()
        writer.close()

    def heard(ids: Sequence[int]) -> None:
        raise AssertionError("there was nothing to hear")

    async def main() -> None:
        server = await asyncio.start_server(odd, "127.0.0.1", 0)
        replica = Replica(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", 20, 20)
        replica.generates = True
        try:
            with pytest.raises(PolicyError, match=why) as caught:
                streams = answer.startswith(b"data")
                await replica.answer("base", (1, 2), (), {}, heard=heard if streams else None)
            assert type(caught.value) is kind
        finally:
            await replica.close()
            server.close()

    asyncio.run(main())


def test_conversations_behind_the_same_shots_are_spread_and_keep_their_place() -> None:
    shots = (Message("user", ("2 and 3",)), Message("assistant", ("5",)))
    firsts = [(*shots, Message("user", (f"{k} and 4",))) for k in range(32)]
    assert len({home(Prompt(one)) % 4 for one in firsts}) == 4
    answer = Message("assistant", ("8",), token_ids=(1, 2))
    for one in firsts:
        later = Prompt((*one, answer, Message("user", ("no",))))
        assert home(later) == home(Prompt(one))
