"""A policy inside this process: transformers, with concurrent requests sampled as one batch."""

import asyncio
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field

from ...core.config import PolicyConfig
from ...core.errors import ModelError, PolicyError, PromptTooLong
from ...core.models.adapters import Undo, merge, restore
from ...core.models.constraints import Constraints, Follower
from ...core.models.open import device_of, open_model, open_weights, unready
from ...core.models.origin import ADAPTER
from ...core.models.quantization import MISSING, Quantization, installed
from ...core.models.tokens import cut
from ...core.thoughts import thinks_still
from ...core.types import Completion, Image, Prompt, Sampling

if TYPE_CHECKING:
    from ...core.models.vision import Eye


class TransformersConfig(PolicyConfig):
    batch_size: int = Field(default=512, ge=1)
    """Completions sampled together."""
    memory_gb: float = Field(default=1.0, ge=0)
    """For keys and values of conversations in play, so that each turn reads only what is new."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """``auto``: as the model was saved."""
    quantization: Quantization = "none"
    """``nf4``: its linear layers in 4 bits, by bitsandbytes, as ``learner.quantization`` has them;
    ``dtype: auto`` is then bf16 on a GPU, else float32. ``pip install 'selfwright[qlora]'``."""
    trust_remote_code: bool = False
    """Run code that comes with a model. Off, because it is somebody else's code on your machine."""


@dataclass
class Request:
    prompt: tuple[int, ...]
    images: tuple[Image, ...]
    sampling: Sampling
    most: int
    """Tokens."""
    lead: str
    """What the template begins the answer with."""
    seed: int
    answer: asyncio.Future[Completion]
    heard: Callable[[Sequence[int]], None] | None
    """Told of the ids sampled so far, in the event loop's thread."""

    @property
    def read(self) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """What the model reads, by content."""
        return self.prompt, tuple(image.sha256 for image in self.images)


class TransformersPolicy:
    """Batches what is asked at the same time; a batch starts when every slot's holder has asked.

    Adapters are merged into weights of float32 when they are loaded, so they cost nothing per
    token; beside those of 16 bits they are computed.
    """

    Config = TransformersConfig

    @staticmethod
    def unready(config: TransformersConfig, model: str) -> str:
        """Why ``model`` could not be opened; empty if it can. Without one: why none could be."""
        try:
            device_of(config.device)
        except PolicyError as error:
            return str(error)
        if config.quantization != "none" and not installed():
            return f"quantization: {config.quantization} {MISSING}"
        return unready(model, config.trust_remote_code) if model else ""

    @staticmethod
    def unfit(config: TransformersConfig, learner: Mapping[str, Any]) -> str:
        """Why it would not sample with what such a learner trains; empty if it would."""
        mine, theirs = config.quantization, learner.get("quantization", "none")
        if mine != theirs:
            return (
                f"policy.quantization is {mine} and learner.quantization {theirs}: what is sampled "
                "would not be what is trained; wanted the same for both"
            )
        precision = learner.get("precision", "auto")
        if mine != "none" and config.dtype != precision:
            return (
                f"policy.dtype is {config.dtype} and learner.precision {precision}: other weights "
                "come to other 4 bits; wanted the same for both"
            )
        return ""

    def __init__(self, config: TransformersConfig, model: str, seed: int) -> None:
        """Raises: PolicyError: the model cannot be loaded or run, or has no chat template."""
        self._config = config
        self._name = model
        self._seed = seed
        dtype = config.dtype
        if config.quantization != "none" and dtype == "auto":
            # What the learner quantises, however the model was saved.
            dtype = "bfloat16" if device_of(config.device).startswith("cuda") else "float32"
        opened = open_model(
            model, config.device, dtype, config.trust_remote_code, config.quantization
        )
        self.model: Any = frozen(opened[0])
        self.tokens = opened[1]
        _try(self.model, model, self.tokens.end)
        self._eye = self._opened_eye()
        self.checkpoint = "base"
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        self._context: int = limit or 1 << 30
        self._merged: list[Undo] = []
        self._base: Any = None
        self._constraints = Constraints(self.tokens)
        self._seats = 0
        self._waiting: list[Request] = []
        self._batch: asyncio.Task[None] | None = None
        self._closed = False
        self._memory = memory(config.memory_gb)
        # One thread: a model answers one batch at a time, and the event loop stays free.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")

    @contextmanager
    def batch_slot(self) -> Generator[None]:
        self._seats += 1
        try:
            yield
        finally:
            self._seats -= 1
            if not self._seats:
                # Nobody is in a conversation. To forget now also makes what follows independent
                # of what came before, rounding included. What conversations begin with is the
                # same whenever it is read, and stays until the weights change.
                self._forget(shared=False)
            self._kick()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        """Raises: PolicyError: no room in the context, senseless sampling, or sampling broke."""
        return await self.stream(prompt, sampling, seed, None)

    async def stream(
        self,
        prompt: Prompt,
        sampling: Sampling,
        seed: int,
        heard: Callable[[Sequence[int]], None] | None,
    ) -> Completion:
        """Raises: as ``complete``."""
        if sampling.max_tokens < 1 or "" in sampling.stop:
            raise PolicyError(f"wanted max_tokens of at least 1 and no empty stop, got {sampling}")
        ids = self.tokens.prompt(prompt)
        held = sampling.constraint
        if held:
            self._constraints.follow(held)  # What is no grammar is that for this one alone.
        most = (held and self._constraints.longest(held)) or sampling.max_tokens
        self._fit(len(ids), most)
        lead = self.tokens.lead(prompt)
        answer: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
        images = prompt.images
        self._waiting.append(Request(ids, images, sampling, most, lead, seed, answer, heard))
        self._kick()
        return await answer

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        before, ids = self.tokens.prompt(prompt), self.tokens.answer(completion)
        self._fit(len(before), len(ids))
        loop = asyncio.get_running_loop()
        logprobs = await loop.run_in_executor(self._thread, self._score, before, ids, prompt.images)
        return Completion(
            completion.text, ids, logprobs, completion.finish, self.tokens.fingerprint
        )

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        """(H,) each: the mean over the text's tokens of the last layer's hidden states."""
        ids = [self.tokens.completion(text) for text in texts]
        for one in ids:
            self._fit(0, len(one))
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, lambda: [self._embed(one) for one in ids])

    def _fit(self, prompt: int, more: int) -> None:
        if self._closed:
            raise PolicyError("this policy was closed")
        if prompt + more > self._context:
            raise PromptTooLong(
                f"a prompt of {prompt} tokens and {more} to sample exceed the "
                f"model's context of {self._context}; shorten the agent's window or max_tokens"
            )

    async def load(self, checkpoint: Path | None) -> None:
        """Raises: PolicyError: the folder holds nothing that fits; the base then answers."""
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._thread, self._load, checkpoint)

    async def close(self) -> None:
        """Whoever still waits for a completion gets a PolicyError."""
        self._closed = True
        if self._batch is not None:
            self._batch.cancel()
        self._give_up(self._waiting)
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _give_up(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if not request.answer.done():
                request.answer.set_exception(PolicyError("this policy was closed"))

    def _kick(self) -> None:
        if self._batch is not None or self._closed or len(self._waiting) < self._seats:
            return
        # Whoever gave up waiting has no say in when the batch is full.
        self._waiting = [request for request in self._waiting if not request.answer.done()]
        if self._waiting and len(self._waiting) >= self._seats:
            self._batch = asyncio.ensure_future(self._answer())

    async def _answer(self) -> None:
        # One turn of the event loop lets whoever asks in the same breath join the batch.
        await asyncio.sleep(0)
        asked, self._waiting = self._waiting, []
        # A fixed order, whoever came first, so that a run's batches repeat exactly; equal
        # prompts stand together and are read once.
        asked.sort(key=lambda r: (len(r.prompt), *r.read, r.seed))
        loop = asyncio.get_running_loop()
        try:
            for group, shared in self._batches(asked):
                batch = [request for request in group if not request.answer.done()]
                if not batch:
                    continue
                try:
                    answers = await loop.run_in_executor(
                        self._thread, self._generate, batch, shared
                    )
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
            self._give_up(asked)
            self._kick()

    def _batches(self, asked: Sequence[Request]) -> Iterator[tuple[Sequence[Request], int]]:
        """What is sampled together, and how many ids it all begins with that are read once."""
        from .plan import plan

        for which, shared in plan([request.read for request in asked], self._memory):
            for k in range(0, len(which), self._config.batch_size):
                yield [asked[i] for i in which[k : k + self._config.batch_size]], shared

    def _forget(self, shared: bool = True) -> None:
        if self._memory is not None:
            self._memory.clear(shared)

    def _generate(self, requests: Sequence[Request], shared: int) -> list[Completion]:
        from .decode import Want, sample

        tokens = self.tokens
        wants = [
            Want(
                request.prompt,
                request.seed,
                request.sampling.temperature,
                request.sampling.top_p,
                request.most,
                self._follow(request.sampling),
                self._stopper(request),
                request.images,
            )
            for request in requests
        ]
        samples = sample(self.model, wants, tokens.ends, self._memory, shared, self._eye)
        return [
            Completion(
                self._text(request, tuple(one.ids)),
                tuple(one.ids),
                tuple(one.logprobs),
                "length" if one.finish != "stop" or self._rambles(request, one.ids) else "stop",
                tokens.fingerprint,
                constraint=request.sampling.constraint,
                constrained=tuple(one.constrained),
            )
            for request, one in zip(requests, samples, strict=True)
        ]

    def _follow(self, sampling: Sampling) -> Callable[[], Follower] | None:
        held = sampling.constraint
        return partial(self._constraints.follow, held) if held else None

    def _text(self, request: Request, ids: Sequence[int]) -> str:
        held = request.sampling.constraint
        if held and held.choices:
            return self._constraints.choice(held, tuple(ids))
        return request.lead + cut(self.tokens.text(ids), () if held else request.sampling.stop)

    def _rambles(self, request: Request, ids: Sequence[int]) -> bool:
        """Whether its thought is longer than it may be."""
        most = request.sampling.thought
        late = most is not None and len(ids) >= most and ids[-1] not in self.tokens.ends
        return late and thinks_still(self._text(request, ids))

    def _stopper(self, request: Request) -> Callable[[Sequence[int]], bool] | None:
        """Looks at every token as it is sampled, and has it heard."""
        tokens, heard = self.tokens, request.heard
        stops = () if request.sampling.constraint else request.sampling.stop
        if not stops and heard is None and request.sampling.thought is None:
            return None
        ends, text = tokens.ends_of(stops), tokens.growing()
        longest, before = max(map(len, stops), default=0), ""

        def stopped(ids: Sequence[int]) -> bool:
            if heard is not None:
                request.answer.get_loop().call_soon_threadsafe(heard, tuple(ids))
            if ids[-1] in ends or (
                len(ids) == request.sampling.thought and self._rambles(request, ids)
            ):
                return True
            if not stops:
                return False
            nonlocal before
            settled = text.settled
            # What was settled before was looked at then, but a stop text may begin there.
            fresh = before + text.since(ids)
            before = fresh[: len(before) + text.settled - settled][-longest:]
            return any(stop in fresh for stop in stops)

        return stopped

    def _score(
        self, prompt: tuple[int, ...], ids: tuple[int, ...], images: tuple[Image, ...]
    ) -> tuple[float, ...]:
        import torch

        with torch.inference_mode():
            row = torch.tensor([[*prompt, *ids]], device=self.model.device)
            read = row[:, :-1]
            given = self._eye.given(read, [images]) if self._eye and images else {}
            logits = self.model(read, logits_to_keep=len(ids), **given).logits[0].float()
            chosen = logits.gather(1, row[0, -len(ids) :, None])[:, 0]
            return tuple((chosen - logits.logsumexp(-1)).tolist())

    def _embed(self, ids: tuple[int, ...]) -> list[float]:
        import torch

        with torch.inference_mode():
            row = torch.tensor([ids], device=self.model.device)
            hidden = self.model(row, output_hidden_states=True).hidden_states[-1]
            return hidden[0].float().mean(0).tolist()

    def _load(self, folder: Path | None) -> None:
        self._forget()
        try:
            self._put(folder)
        finally:
            self._eye = self._opened_eye()

    def _opened_eye(self) -> "Eye | None":
        from ...core.models.vision import eye_of

        return eye_of(self.tokens, self.model)

    def _put(self, folder: Path | None) -> None:
        self._restore_base()
        self.checkpoint = "base"
        if folder is None:
            return
        if (folder / ADAPTER).is_file():
            self._merged = merge(self.model, folder, self._name)
            self.model = frozen(self.model)
        elif (folder / "config.json").is_file():
            self._replace(folder)
        else:
            raise PolicyError(
                f"{folder} holds no checkpoint: neither adapter_config.json (an adapter) nor "
                "config.json (a whole model) is there"
            )
        self.checkpoint = str(folder)

    def _replace(self, folder: Path) -> None:
        from .attention import attend, shares

        config = self._config
        dtype = str(self.model.dtype).removeprefix("torch.")
        whole = open_weights(
            str(folder),
            str(self.model.device),
            dtype,
            config.trust_remote_code,
            quantization=config.quantization,
        )
        if _shapes(whole) != _shapes(self.model):
            raise PolicyError(f"the model in {folder} is of another architecture than the base")
        if shares(self.model):
            attend(whole)
        self._base, self.model = self.model, frozen(whole)

    def _restore_base(self) -> None:
        restore(self._merged)
        self._merged = []
        if self._base is not None:
            self.model, self._base = self._base, None


def frozen(model: Any) -> Any:
    """For answering only. torch rounds otherwise where weights want gradients, used or not."""
    return model.eval().requires_grad_(False)


def _try(model: Any, name: str, token: int) -> None:
    """Have the engine sample a little. Raises: ModelError: it cannot run such a model."""
    from ...core.models.layers import kinds_of
    from .attention import attend, forgo
    from .decode import Want, sample

    wants = [Want((token,) * length, 0, 0.0, max_tokens=2) for length in (2, 3)]
    try:
        plain = sample(model, wants, frozenset())
        if attend(model) and not _alike(model, wants, plain):
            forgo(model)
    except FloatingPointError:
        pass  # A matter of these weights: a checkpoint may have others.
    except Exception as cause:
        kinds = ", ".join(sorted(kinds_of(model)))
        raise ModelError(
            f"policy.use: transformers cannot run {name!r} ({type(model).__name__}, layers of "
            f"{kinds}): {type(cause).__name__}: {cause}; policy.use: vllm runs more kinds"
        ) from cause


def _alike(model: Any, wants: Sequence[Any], plain: Sequence[Any]) -> bool:
    """Whether it says the same where the first id of its prompts stands by itself."""
    from .decode import sample

    try:
        shared = sample(model, wants, frozenset(), None, shared=1)
    except ValueError:
        return False
    return all(
        abs(a - b) < 0.05
        for one, other in zip(shared, plain, strict=True)
        for a, b in zip(one.logprobs, other.logprobs, strict=True)
    )


def _shapes(model: Any) -> dict[str, Any]:
    return {name: weight.shape for name, weight in model.named_parameters()}


def memory(gigabytes: float) -> Any:
    """Room for keys and values, or None for no room. torch is imported here, not with this file."""
    from .cache import PrefixCache

    return PrefixCache(int(gigabytes * 1e9)) if gigabytes else None
