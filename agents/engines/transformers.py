"""A policy inside this process: transformers, with concurrent requests sampled as one batch."""

import asyncio
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ...core.config import PolicyConfig
from ...core.errors import PolicyError
from ...core.models import open_model
from ...core.types import Completion, Message, Sampling


class TransformersConfig(PolicyConfig):
    batch_size: int = Field(512, ge=1)
    """Completions sampled together."""
    memory_gb: float = Field(1.0, ge=0)
    """For keys and values of conversations in play, so that each turn reads only what is new."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: as the model was saved."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Off, because it is somebody else's code on your machine."""


@dataclass
class Request:
    prompt: tuple[int, ...]
    sampling: Sampling
    seed: int
    answer: asyncio.Future[Completion]


class TransformersPolicy:
    """Batches what is asked at the same time; a batch starts when every seat's holder has asked.

    Adapters are merged into the weights when they are loaded, so they cost nothing per token.
    """

    Config = TransformersConfig

    def __init__(self, config: TransformersConfig, model: str, seed: int) -> None:
        """Raises: PolicyError: the model cannot be loaded, or has no chat template."""
        self._config = config
        self._seed = seed
        self.model, self.tokens = open_model(
            model, config.device, config.dtype, config.trust_remote_code
        )
        self.model.eval()
        self.checkpoint = "base"
        limit = getattr(self.model.config, "max_position_embeddings", None)
        self._context: int = limit or 1 << 30
        self._merged: list[tuple[Any, Any]] = []
        self._whole: dict[str, Any] | None = None
        self._seats = 0
        self._waiting: list[Request] = []
        self._batch: asyncio.Task[None] | None = None
        self._memory = memory(config.memory_gb)
        # One thread: a model answers one batch at a time, and the event loop stays free.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")

    @contextmanager
    def seat(self) -> Generator[None]:
        self._seats += 1
        try:
            yield
        finally:
            self._seats -= 1
            if not self._seats:
                # Nobody is in a conversation. To forget now also makes what follows independent
                # of what came before, rounding included.
                self._forget()
            self._kick()

    async def complete(
        self, prompt: Sequence[Message], sampling: Sampling, seed: int
    ) -> Completion:
        ids = self.tokens.prompt(prompt)
        if len(ids) + sampling.max_tokens > self._context:
            raise PolicyError(
                f"a prompt of {len(ids)} tokens and {sampling.max_tokens} to sample exceed the "
                f"model's context of {self._context}; shorten the agent's window or max_tokens"
            )
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        self._waiting.append(Request(ids, sampling, seed, answer))
        self._kick()
        return await answer

    async def score(self, prompt: Sequence[Message], text: str) -> Completion:
        before, ids = self.tokens.prompt(prompt), self.tokens.completion(text)
        loop = asyncio.get_running_loop()
        logprobs = await loop.run_in_executor(self._thread, self._score, before, ids)
        return Completion(text, ids, logprobs, "stop")

    async def load(self, checkpoint: Path | None) -> None:
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._load, checkpoint)
        self.checkpoint = "base" if checkpoint is None else str(checkpoint)

    async def close(self) -> None:
        if self._batch is not None:
            self._batch.cancel()
        for request in self._waiting:
            request.answer.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _kick(self) -> None:
        if self._batch is None and self._waiting and len(self._waiting) >= self._seats:
            self._batch = asyncio.ensure_future(self._answer())

    async def _answer(self) -> None:
        # One turn of the event loop lets whoever asks in the same breath join the batch.
        await asyncio.sleep(0)
        asked, self._waiting = self._waiting, []
        # A fixed order, whoever came first, so that a run's batches repeat exactly; equal
        # prompts stand together and are read once.
        asked.sort(key=lambda r: (len(r.prompt), r.prompt, r.seed))
        loop = asyncio.get_running_loop()
        try:
            for group in self._batches(asked):
                batch = [request for request in group if not request.answer.done()]
                if not batch:
                    continue
                try:
                    answers = await loop.run_in_executor(self._thread, self._generate, batch)
                except Exception as cause:
                    for request in batch:
                        if not request.answer.done():
                            request.answer.set_exception(
                                PolicyError(f"sampling failed: {type(cause).__name__}: {cause}")
                            )
                    continue
                for request, answer in zip(batch, answers, strict=True):
                    if not request.answer.done():
                        request.answer.set_result(answer)
        finally:
            self._batch = None
            self._kick()

    def _batches(self, asked: Sequence[Request]) -> Iterator[Sequence[Request]]:
        """Conversations that memory knows, then new ones, which are read from the start."""
        known = [self._memory is not None and bool(self._memory.find(r.prompt)) for r in asked]
        for wanted in (True, False):
            group = [r for r, k in zip(asked, known, strict=True) if k == wanted]
            for k in range(0, len(group), self._config.batch_size):
                yield group[k : k + self._config.batch_size]

    def _forget(self) -> None:
        if self._memory is not None:
            self._memory.clear()

    def _generate(self, requests: Sequence[Request]) -> list[Completion]:
        from .decode import Want, sample

        tokens = self.tokens
        wants = [
            Want(
                request.prompt,
                request.seed,
                request.sampling.temperature,
                request.sampling.top_p,
                request.sampling.max_tokens,
                tuple(tokens.completion(choice) for choice in request.sampling.choices),
                self._stopper(request.sampling.stop),
            )
            for request in requests
        ]
        answers: list[Completion] = []
        for request, made in zip(
            requests,
            sample(self.model, wants, tokens.end, tokens.pad, self._memory),
            strict=True,
        ):
            text = tokens.text(made.ids)
            for stop in request.sampling.stop:
                text = text.split(stop)[0]
            finish = "stop" if made.finish == "stop" else "length"
            answers.append(Completion(text, tuple(made.ids), tuple(made.logprobs), finish))
        return answers

    def _stopper(self, stops: tuple[str, ...]) -> Any:
        if not stops:
            return None
        return lambda ids: any(stop in self.tokens.text(ids) for stop in stops)

    def _score(self, prompt: tuple[int, ...], ids: tuple[int, ...]) -> tuple[float, ...]:
        import torch

        with torch.inference_mode():
            row = torch.tensor([[*prompt, *ids]], device=self.model.device)
            logits = self.model(row[:, :-1], logits_to_keep=len(ids)).logits[0].float()
            chosen = logits.gather(1, row[0, -len(ids) :, None])[:, 0]
            return tuple((chosen - logits.logsumexp(-1)).tolist())

    def _load(self, folder: Path | None) -> None:
        self._forget()
        self._restore_base()
        if folder is None:
            return
        if (folder / "adapter_config.json").is_file():
            self._merge(folder)
        elif (folder / "model.safetensors").is_file():
            self._replace(folder)
        else:
            raise PolicyError(
                f"{folder} holds no checkpoint: neither adapter_config.json (an adapter) nor "
                "model.safetensors (a whole model) is there"
            )

    def _merge(self, folder: Path) -> None:
        from peft import PeftModel
        from peft.tuners.tuners_utils import BaseTunerLayer

        if not (folder / "adapter_model.safetensors").is_file():
            raise PolicyError(f"{folder} has no adapter_model.safetensors; no other form is read")
        peft: Any = PeftModel.from_pretrained(self.model, str(folder))
        for module in peft.modules():
            if isinstance(module, BaseTunerLayer):
                inner = module.get_base_layer()
                self._merged.append((inner.weight, inner.weight.detach().clone()))
        self.model = peft.merge_and_unload()
        self.model.eval()

    def _replace(self, folder: Path) -> None:
        from safetensors.torch import load_file

        self._whole = {name: t.clone() for name, t in self.model.state_dict().items()}
        missing, strange = self.model.load_state_dict(
            load_file(folder / "model.safetensors"), strict=False
        )
        # Tied weights are saved once, under one of their names.
        tied = set(getattr(self.model, "_tied_weights_keys", None) or ())
        if strange or set(missing) - tied:
            self._restore_base()
            raise PolicyError(
                f"{folder}/model.safetensors is of another architecture: "
                f"{len(missing)} tensors missing, {len(strange)} unknown"
            )

    def _restore_base(self) -> None:
        # Copies, not subtraction of the adapter: weights come back bit for bit, whatever the
        # number of adapters before, and a resumed run samples as an uninterrupted one.
        for weight, original in self._merged:
            weight.data.copy_(original)
        self._merged.clear()
        if self._whole is not None:
            self.model.load_state_dict(self._whole)
            self._whole = None


def memory(gigabytes: float) -> Any:
    """Room for keys and values, or None for no room. torch is imported here, not with this file."""
    from .decode import Memory

    return Memory(int(gigabytes * 1e9)) if gigabytes else None
