"""A policy served by vLLM: servers of our own, or running ones, with adapters swapped in live."""

import asyncio
import hashlib
import os
import shutil
import sys
import tempfile
import uuid
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from ...core.config import PolicyConfig
from ...core.errors import DiskError, PolicyError, PromptTooLong
from ...core.files import DRAFT, hard_link
from ...core.models.adapters import changes, fits
from ...core.models.canary import LENGTH, Canary, canaries_of, usual_ids
from ...core.models.constraints import in_any_tokens
from ...core.models.open import bare, config_of, open_tokens, placeholder_of, save_merged, unready
from ...core.models.origin import ADAPTER, WEIGHTS, belongs, parts_of
from ...core.models.tokens import cut
from ...core.thoughts import thinks_still
from ...core.types import Completion, Prompt, Sampling
from .vllm_canary import Spoken, doubts, spoken
from .vllm_request import SCORING, after, request, scores
from .vllm_server import MODEL, Answer, Gone, Replica, launched

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM can be told to make room for."""
MISSED = 3
"""A request whose server went away is asked so many times in all."""


class VLLMConfig(PolicyConfig):
    url: list[str] = Field(default_factory=list[str])
    """Running servers, such as ``http://127.0.0.1:8000``, of one and the same model; without any,
    servers are started here and end with the run."""
    python: str = ""
    """The interpreter that has vLLM; empty: ``$SELFWRIGHT_VLLM_PYTHON``, or else this one."""
    replicas: int = Field(default=1, ge=1)
    """Servers to start."""
    devices: list[str] = Field(default_factory=list[str])
    """``CUDA_VISIBLE_DEVICES`` of each replica; empty: as it is."""
    batch_size: int = Field(default=256, ge=1)
    """Completions sampled together, per replica; others wait their turn."""
    memory_gb: float = Field(default=2.0, gt=0)
    """For keys and values, per replica."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: as the model was saved."""
    context: int | None = Field(default=None, ge=1)
    """The most tokens of a prompt and its answer; None: as many as the model can."""
    max_rank: int = Field(default=16, ge=1, le=RANKS[-1])
    """The highest rank of adapters; more costs speed and memory."""
    arguments: dict[str, Any] = Field(default_factory=dict[str, Any])
    """More of vLLM's own: ``{tensor-parallel-size: 2}``."""
    adapters: str = ""
    """A folder that running servers can read too, for adapters; empty: a temporary one."""
    start_timeout_s: float = Field(default=300.0, gt=0)
    stall_timeout_s: float = Field(default=60.0, gt=0)
    """A server that makes no token for so long, while it is asked for some, is hung."""
    restarts: int = Field(default=3, ge=0)
    """So many times, per replica, a server that died or hung is started again."""
    canary_tolerance: float = Field(default=0.05, gt=0)
    """How far, in nats and on average, a server's log-probabilities may be from the learner's."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.url and (self.replicas > 1 or self.devices or self.arguments):
            raise ValueError(
                "url: those servers run already; replicas, devices and arguments are "
                "for servers started here"
            )
        if self.devices and len(self.devices) != self.replicas:
            raise ValueError(
                f"devices: wanted one for each of {self.replicas} replicas, got {len(self.devices)}"
            )
        if self.python and shutil.which(self.python) is None:
            raise ValueError(
                f"python: {self.python} is no program; wanted the interpreter of an "
                "environment with vLLM, such as .venv-vllm/bin/python"
            )
        return self


class VLLMPolicy:
    """Completions over HTTP from vLLM, exact to the token.

    Prompts go out as token ids, sampled ids and log-probabilities come back, so that nothing is
    ever tokenised twice. Each adapter gets a name of its own: an old one cannot answer for it, and
    neither can what was cached under it. After each load the servers must agree with what the
    learner wrote into the checkpoint (``core.canary``). A server that dies or hangs is started
    again, and what it owed is asked again with the same seeds.
    """

    Config = VLLMConfig

    @staticmethod
    def unready(config: VLLMConfig, model: str) -> str:
        """Why ``model`` could not be opened; empty if it can."""
        return unready(model, elsewhere=True) if model else ""

    @staticmethod
    def unfit(config: VLLMConfig, learner: Mapping[str, Any]) -> str:
        """Why vLLM could not serve what such a learner makes; empty if it can."""
        if learner.get("method") == "full":
            return "vLLM swaps adapters, not whole models; wanted learner.method: lora"
        if (bits := learner.get("quantization", "none")) != "none":
            return (
                f"vLLM would sample with other weights than those of learner.quantization: {bits}; "
                "wanted none, or policy.use: transformers with the same quantization"
            )
        if (rank := learner.get("rank", 0)) > config.max_rank:
            return f"adapters of rank {rank} need policy.max_rank: {room_for(rank)}"
        if learner.get("targets") == "vision":
            return "vLLM serves no adapter on what looks at pictures; leave targets: vision out"
        outer = {"lm_head", "embed_tokens"} & set(learner.get("targets") or ())
        if outer:
            return f"vLLM serves no adapter on {', '.join(sorted(outer))}; leave it out"
        return ""

    def __init__(self, config: VLLMConfig, model: str, seed: int) -> None:
        """Raises: ModelError: no such model, or no chat template. PolicyError: cannot start."""
        self._config = config
        self._name = model
        self._placeholder = placeholder_of(model)
        self.tokens = open_tokens(model, placeholder=self._placeholder)
        self.checkpoint = "base"
        ids = usual_ids(self.tokens.tokenizer, 1 + LENGTH)
        self._unknown = Canary(ids, LENGTH * (0.0,))
        """Asked about where a checkpoint has no canary: nobody knows what is right."""
        self._mark = uuid.uuid4().hex[:8]
        self._temporary = tempfile.TemporaryDirectory(prefix="selfwright-vllm-")
        self._adapters = Path(config.adapters or self._temporary.name)
        self._serving = ""
        """The adapter that answers now; empty: the base."""
        self._digest = ""
        self._layers: Any = None
        """The base's, without values: to hold adapters against."""
        self._canaries: tuple[Canary, ...] = ()
        self._count = 0
        self._busy: Counter[str] = Counter()
        self._answered = asyncio.Condition()
        self._loading = asyncio.Lock()
        self._opening: asyncio.Task[None] | None = None
        self._closed = False
        self._replicas = self._started(model)

    def _started(self, model: str) -> list[Replica]:
        import torch

        config = self._config
        limits = (config.start_timeout_s, config.stall_timeout_s)
        if config.url:
            return [Replica(url, *limits) for url in config.url]
        base, adapter = parts_of(model)
        if adapter is None:
            model = base
        else:
            whole = Path(self._temporary.name) / "model"
            save_merged(model, whole)
            model = str(whole)
        python = config.python or os.environ.get("SELFWRIGHT_VLLM_PYTHON") or sys.executable
        arguments = {
            "dtype": saved_dtype(model) if config.dtype == "auto" else config.dtype,
            "max-num-seqs": config.batch_size,
            "kv-cache-memory-bytes": int(config.memory_gb * 2**30),
            "max-lora-rank": room_for(config.max_rank),
            "max-loras": 2,
            "max-cpu-loras": 4,
            "enable-scale-out": True,  # Else it has no place where ids alone go in and come out.
            **({} if torch.cuda.is_available() else cautious(model)),
            **({"max-model-len": config.context} if config.context else {}),
            **config.arguments,
        }
        logs = Path(self._temporary.name)
        return [
            launched(
                python,
                model,
                arguments,
                config.devices[k] if config.devices else None,
                logs / f"server-{k}.log",
                limits,
                config.restarts,
            )
            for k in range(config.replicas)
        ]

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        """Raises: PromptError: no room in the context. PolicyError: no server answers."""
        return await self.stream(prompt, sampling, seed, None)

    async def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
        heard: Callable[[Sequence[int]], None] | None,
    ) -> Completion:
        """As ``complete``. A server that is lost on the way is asked again, from the beginning."""
        if sampling.max_tokens < 1 or "" in sampling.stop:
            raise PolicyError(f"wanted max_tokens of at least 1 and no empty stop, got {sampling}")
        ids, held = self.tokens.prompt(prompt), sampling.constraint
        # A choice is never cut, whatever tokens it is written in.
        bytes_ = [len(text.encode()) for text in held.choices] if held else []
        most = max(bytes_) + 1 if bytes_ else sampling.max_tokens
        await self._fit(len(ids), most)
        lead = self.tokens.lead(prompt)
        ends = self.tokens.ends_of(sampling.stop)
        first = min(most, sampling.thought or most) if held is None else most
        answer = await self._ask(prompt, ids, request(sampling, seed, first, ends), heard)
        if answer.finish == "length" and first < most:
            text = lead + self.tokens.text(answer.ids)
            if not thinks_still(text):
                rest = request(sampling, seed + 1, most - first, ends)
                more = await self._ask(prompt, (*ids, *answer.ids), rest, after(answer, heard))
                answer = answer.joined(more)
        completion = self._completion(answer, sampling, lead)
        if held is None:
            return completion
        # Then it tells the log-probabilities that are left after all else is ruled out.
        free = await self.score(prompt, completion)
        return replace(free, constraint=in_any_tokens(held), constrained=completion.logprobs)

    def _completion(self, answer: Answer, sampling: Sampling, lead: str) -> Completion:
        ids, logprobs = answer.ids, answer.logprobs
        if len(ids) != len(logprobs):
            raise PolicyError(
                f"the server sampled {len(ids)} tokens and gave {len(logprobs)} log-probabilities"
            )
        text = lead + cut(self.tokens.text(ids), () if sampling.constraint else sampling.stop)
        finish = "stop" if answer.finish == "stop" else "length"
        return Completion(text, ids, logprobs, finish, self.tokens.fingerprint)

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        before, ids = self.tokens.prompt(prompt), self.tokens.answer(completion)
        await self._fit(len(before), len(ids) + 1)  # It has to sample one more.
        answer = await self._ask(prompt, (*before, *ids), SCORING)
        logprobs = scores(answer, ids)
        return Completion(
            completion.text, ids, logprobs, completion.finish, self.tokens.fingerprint
        )

    async def _fit(self, prompt: int, more: int) -> None:
        await self._ready()
        context = self._replicas[0].context
        if prompt + more > context:
            raise PromptTooLong(
                f"a prompt of {prompt} tokens and {more} to sample exceed the server's context of "
                f"{context}; shorten the agent's window or max_tokens, or raise policy.context"
            )

    async def _ready(self) -> None:
        """Every server has come up, and speaks our tokens."""
        if self._closed:
            raise PolicyError("this policy was closed")
        if self._opening is None:
            self._opening = asyncio.create_task(self._open())
        await asyncio.shield(self._opening)

    async def _open(self) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for replica in self._replicas:
                    group.create_task(self._begin(replica))
        except* PolicyError as several:
            raise several.exceptions[0] from None

    async def _begin(self, replica: Replica) -> None:
        await replica.up()
        await self._spoken(replica, "")

    async def _ask(
        self,
        prompt: Prompt,
        ids: Sequence[int],
        sampling: Mapping[str, Any],
        heard: Callable[[Sequence[int]], None] | None = None,
    ) -> Answer:
        """By the adapter that answers now; what begins alike goes to one replica and its cache."""
        await self._ready()
        replica = self._replicas[home(prompt) % len(self._replicas)]
        adapter = self._serving
        self._busy[adapter] += 1
        try:
            for left in reversed(range(MISSED)):
                known = replica.generation
                try:
                    return await replica.answer(
                        adapter or MODEL, ids, prompt.images, sampling, heard=heard
                    )
                except Gone as gone:
                    if not left:
                        raise PolicyError(str(gone)) from gone
                    await self._revive(replica, known, gone)
        finally:
            self._busy[adapter] -= 1
            async with self._answered:
                self._answered.notify_all()
        raise AssertionError("unreachable")

    async def _revive(self, replica: Replica, known: int, gone: Gone) -> None:
        """Have ``replica`` answer again, as before, unless somebody else has seen to that."""
        async with replica.mending:
            if replica.generation != known:
                return
            if await replica.again(gone):
                await self._begin(replica)
            if self._serving and self._serving not in await replica.names():
                await self._give(replica, self._serving)
            replica.generation += 1

    async def load(self, checkpoint: Path | None) -> None:
        """Raises: PolicyError: it is no adapter, or the servers do not answer as it must."""
        await self._ready()
        async with self._loading:
            if checkpoint is None:
                await self._switch("", ())
                self._digest, self.checkpoint = "", "base"
                return
            digest = await asyncio.to_thread(self._checked, checkpoint)
            if digest != self._digest:
                self._count += 1
                name = f"{self._mark}-{self._count:06d}"
                self._publish(checkpoint, name)
                await self._switch(name, canaries_of(checkpoint))
                self._digest = digest
            self.checkpoint = str(checkpoint)

    def _checked(self, folder: Path) -> str:
        """What tells adapters apart. Raises: PolicyError: it is none that vLLM can serve."""
        if not all((folder / name).is_file() for name in (ADAPTER, WEIGHTS)):
            raise PolicyError(
                f"{folder} holds no adapter ({ADAPTER} and {WEIGHTS}), and vLLM swaps nothing else;"
                " to serve a whole model, name it as policy.model"
            )
        belongs(folder, self._name)
        if self._placeholder is None:  # Models that see are built otherwise here than there.
            self._layers = self._layers or bare(config_of(self._name))
            fits(folder, self._layers)
        return hashlib.sha256(
            b"".join((folder / name).read_bytes() for name in (ADAPTER, WEIGHTS))
        ).hexdigest()

    def _publish(self, folder: Path, name: str) -> None:
        """Under a name that was never used before, and only as a whole."""
        draft = self._adapters / f"{DRAFT}{name}"
        try:
            draft.mkdir(parents=True)
            for file in (ADAPTER, WEIGHTS):
                hard_link(str(folder / file), str(draft / file))
            draft.rename(self._adapters / name)
        except OSError as error:
            shutil.rmtree(draft, ignore_errors=True)
            raise DiskError(
                f"cannot publish an adapter in {self._adapters}: {error.strerror or error}"
            ) from error

    async def _switch(self, name: str, canaries: tuple[Canary, ...]) -> None:
        """Have every replica answer with the adapter of that name, and drop the old one."""
        old, learned = self._serving, self._canaries
        self._canaries = canaries
        try:
            if name:
                async with asyncio.TaskGroup() as group:
                    for replica in self._replicas:
                        group.create_task(self._give(replica, name, learned))
        except* PolicyError as several:
            self._canaries = learned
            await self._drop(name)
            raise several.exceptions[0] from None
        self._serving = name
        if old and old != name:
            await self._drop(old)

    async def _give(self, replica: Replica, name: str, learned: tuple[Canary, ...] = ()) -> None:
        """Load the adapter there, and see that it is what answers.

        ``learned``: the canaries of the adapter before.

        Raises:
            PolicyError: it could not be loaded, or the answers are another model's.
        """
        await replica.load(name, self._adapters / name)
        answers = await self._spoken(replica, name)
        fault = ""
        if self._canaries:
            tolerance = self._config.canary_tolerance
            fault = await doubts(replica, name, answers, self._canaries, learned, tolerance)
        elif changes(self._adapters / name) and answers == await self._spoken(replica, ""):
            fault = (
                f"{replica.url} answers as the base model does, though the adapter {name} changes "
                "it: its weights' names are not those vLLM looks for"
            )
        if fault:
            raise PolicyError(fault)
        replica.spoken = answers

    async def _spoken(self, replica: Replica, name: str) -> Spoken:
        return await spoken(replica, name or MODEL, self._canaries or (self._unknown,))

    async def _drop(self, name: str) -> None:
        """Unload once nobody is being answered by it; its files go too."""
        with suppress(TimeoutError):  # Those that hang are asked again, of the new one.
            async with asyncio.timeout(self._config.stall_timeout_s), self._answered:
                await self._answered.wait_for(lambda: not self._busy[name])
        for replica in self._replicas:
            with suppress(PolicyError):  # A server that lost it has nothing to unload.
                await replica.unload(name)
        shutil.rmtree(self._adapters / name, ignore_errors=True)

    async def close(self) -> None:
        self._closed = True
        if self._opening is not None:
            self._opening.cancel()
        for replica in self._replicas:
            if self._config.url and self._serving:
                with suppress(PolicyError):
                    await replica.unload(self._serving)
            await replica.close()
        self._temporary.cleanup()


def home(prompt: Prompt) -> int:
    """The same number for all turns of a conversation: of what was said before its first answer."""
    messages = prompt.messages
    first = next((k for k, message in enumerate(messages) if message.token_ids), len(messages))
    parts = [part for message in messages[:first] for part in message.parts]
    keys = [part if isinstance(part, str) else part.sha256 for part in parts]
    return zlib.crc32("\0".join(keys).encode())


def room_for(rank: int) -> int:
    """The least rank that vLLM can be told which holds ``rank``."""
    return next((most for most in RANKS if most >= rank), RANKS[-1])


def cautious(model: str) -> dict[str, Any]:
    """What vLLM has to be told on a CPU."""
    import torch
    from transformers import AutoConfig, AutoModel

    configs: Any = AutoConfig
    models: Any = AutoModel
    with torch.device("meta"):
        headless = models.from_config(configs.from_pretrained(model))
    layers = {
        name.rpartition(".")[2]
        for name, module in headless.named_modules()
        if isinstance(module, torch.nn.Linear)
    }
    return {
        # Only whole blocks of a prompt are remembered, and left to itself one has 128 tokens.
        "block-size": 32,
        # It breaks on a prompt that is read in parts while its answer has a seed.
        "no-enable-chunked-prefill": True,
        # And, where it is ready for adapters on the head, on prompts scored beside others.
        "lora-target-modules": sorted(layers),
    }


def saved_dtype(model: str) -> str:
    """Of the model's weights, as vLLM calls it: left to itself it would halve float32."""
    dtype = str(getattr(config_of(model), "dtype", None)).removeprefix("torch.")
    return dtype if dtype in ("float32", "bfloat16", "float16") else "auto"
