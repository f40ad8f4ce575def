"""The learner: one plain loop, the only place with gradients. Knows losses, no trainer."""

import math
import os
import random
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from accelerate import Accelerator  # pyright: ignore[reportMissingTypeStubs]
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from ...core.errors import LearnerError, ModelError
from ...core.models import canary, optimizer
from ...core.models.frozen import open_frozen
from ...core.models.open import open_model
from ...core.models.origin import note_base
from ...core.models.vision import eye_of
from ...core.seeds import derive
from ...core.types import (
    AdversarialLoss,
    Batch,
    Loss,
    Metrics,
    Need,
    StepLoss,
)
from .adapted import adapted, beside_language
from .config import LearnerConfig
from .forward import Forward
from .likely import Canaries
from .memory import fits
from .pack import Row, pack, token_weights, units
from .reader import Reader, moved
from .shard import sharding
from .targets import unknown_targets

FILE = "learner.safetensors"
NO_GPU = "learner.device is cuda, but there is no GPU; use auto or cpu"


def accelerator(device: str) -> Any:
    """This process among all that learn together, on a device of that kind.

    No mixed precision here: accelerate keeps one for the whole process, whoever asks first.
    """
    # By itself accelerate takes several processes without a GPU for as many that stand alone.
    return Accelerator(cpu=device == "cpu" or (several() and not torch.cuda.is_available()))


def several() -> bool:
    """Whether other processes learn with this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


class PlainLearner:
    """AdamW on LoRA or full weights.

    A step's loss is normalised over all of its examples, whatever micro-batches or processes they
    are cut into. The model's head sees only trained positions.
    """

    Config = LearnerConfig
    shares: ClassVar[bool] = True
    """Several processes may each have one, and call it alike: each does its share."""
    serves: ClassVar = frozenset(Need)
    """What losses may need of it."""

    @staticmethod
    def unfit(config: LearnerConfig, bare: Callable[[], Any]) -> list[str]:
        """Why it could not learn here; ``bare()``: the model in question, without values."""
        faults = [NO_GPU] if config.device == "cuda" and not torch.cuda.is_available() else []
        if config.compile and (config.device == "cpu" or not torch.cuda.is_available()):
            faults.append("learner.compile is for a GPU; without one it only takes time")
        faults += config.unmet(several() and sharding())
        if config.method == "lora" and isinstance(config.targets, list):
            faults += unknown_targets(config.targets, bare())
        return faults

    def __init__(self, config: LearnerConfig, model: str, seed: int) -> None:
        self._config = config
        self._seed = seed
        self._accelerator: Any = accelerator(config.device)
        self._device: torch.device = self._accelerator.device
        if config.device == "cuda" and self._device.type != "cuda":
            raise LearnerError(NO_GPU)
        processes = self._accelerator.num_processes
        self._mesh: Any = None
        sharded = processes > 1 and sharding()
        if unmet := config.unmet(sharded):
            raise LearnerError("\n".join(unmet))
        if sharded:
            self._mesh = init_device_mesh(self._device.type, (processes,))
            if config.targets == "vision":
                raise LearnerError(
                    "what looks at pictures is not sharded, so that it cannot be trained "
                    "(learner.targets: vision) where the model is; let each process hold it whole"
                )
        if self._device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            torch.backends.cudnn.allow_tf32 = True
        self._base = model
        self._teachers: dict[str, Reader] = {}
        self._canaries: Canaries | None = None
        self._tight: bool | None = None
        """Whether there is little memory; None: not known yet."""
        self._begin()

    def _begin(self) -> None:
        """The base model, weights to train and an optimiser that has seen nothing."""
        config = self._config
        precision = config.dtype(self._device.type)
        lora = config.method == "lora"
        # What is trained whole, or cut up, is nobody else's.
        opener = open_frozen if lora and self._mesh is None else open_model
        weights, self._tokens = opener(
            self._base,
            # Sharding moves a layer at a time: the whole may be more than a device holds.
            str(self._device) if self._mesh is None else "cpu",
            "bfloat16" if precision == "bfloat16" and lora else "float32",
            config.trust_remote_code,
            config.quantization,
        )
        looks = config.targets == "vision"
        # What a frozen eye makes of a picture stays as it is.
        eye = eye_of(self._tokens, weights, 0) if looks else eye_of(self._tokens, weights)
        beside = beside_language(weights)
        if eye is not None and not looks:
            for weight in beside:
                weight.requires_grad_(False)
        self._model: Any = weights
        if lora:
            with self._randomness("lora"):
                language = self._tokens.vision is not None and not looks
                self._model = adapted(weights, config, self._base, language)
        self._model.train()
        self._reader = Reader(
            self._model,
            weights,
            self._device,
            config.budget(self._device.type),
            precision,
            eye,
            looks,
            # Dropout would draw other numbers where fewer positions are read.
            narrow=not config.compile and not config.dropout,
        )
        if config.gradient_checkpointing is True or self._tight:
            self._checkpointed()
        self._forward = Forward(
            self._reader, self._tokens, config.trust_remote_code, self._teachers
        )
        self._spread(weights, beside)
        self._trained: dict[str, Tensor] = {
            name: p for name, p in self._model.named_parameters() if p.requires_grad
        }
        self._optimizer: Any = optimizer.adamw(
            self._trained.values(), config.optimizer, config.learning_rate, config.weight_decay
        )
        self._updates = 0

    def _checkpointed(self) -> None:
        """Have layers keep little for their gradients, and run again for them."""
        weights: Any = self._reader.weights
        weights.gradient_checkpointing_enable({"use_reentrant": False})
        weights.enable_input_require_grads()
        self._reader.narrow = False

    def _weigh_memory(self) -> None:
        """Whether layers may keep what they like; asked once, before the first update."""
        if self._config.gradient_checkpointing != "auto" or self._mesh is not None:
            return
        if self._tight is None:
            with self._randomness("memory"):
                tight = torch.tensor(float(not fits(self._reader)), device=self._device)
            if self._accelerator.num_processes > 1:
                tight = self._accelerator.reduce(tight, "sum")
            self._tight = bool(tight)
            if self._tight:
                self._checkpointed()

    def _spread(self, weights: Any, beside: Sequence[Any]) -> None:
        """Have the layers compiled and sharded, if they are to be."""
        if self._config.compile:
            # Each way in which a layer is called is compiled: there is to be no other than this.
            weights.enable_input_require_grads()
            _ = self._mesh is None and (self._reader.plants, self._reader.scale)
            for layer in self._reader.layers:
                layer.compile(dynamic=True)
        if self._mesh is None:
            return
        for layer in self._reader.layers:
            fully_shard(layer, mesh=self._mesh)
        # What looks at pictures does so before the model is asked, and stays whole in each.
        for weight in beside:
            weight.data = weight.data.to(self._device)
        fully_shard(self._model, mesh=self._mesh, ignored_params={*beside})

    @contextmanager
    def _randomness(self, *parts: int | str) -> Generator[None]:
        """Random numbers that follow from our seed and ``parts`` alone.

        Whatever else draws in this process neither changes them nor is changed: a restored
        learner drops out the same activations as one that never stopped.
        """
        rng: Any = torch.random
        gpus = [self._device] if self._device.type == "cuda" else []
        with rng.fork_rng(devices=gpus):
            rng.manual_seed(derive(self._seed, *parts))
            yield

    def update(self, batch: Batch, progress: float) -> Metrics:
        """One pass per epoch over the examples, in optimiser steps of about ``batch_size``.

        Rows that have no gradient, as their advantages are 0, are left out of the computation but
        not of the means; a step of such rows only is no step.

        Raises:
            LearnerError: no examples, a loss that needs what is not served (such as a frozen base,
                which full training has not got), or a loss that is not finite (the weights are
                then those before it).
        """
        if not batch.examples:
            raise LearnerError("the batch holds no examples: nothing can be learned from it")
        self._look_at(batch.loss)
        if batch.fresh:
            self._begin()
            progress = 0.0  # A whole training of its own: the run's schedule is not its.
        self._weigh_memory()
        before = self._tokens.breaks
        rows = pack(batch.examples, self._tokens)
        totals = {"loss": 0.0, "grad_norm": 0.0, "ratio": 0.0, "kl_old": 0.0, "tokens": 0.0}
        steps, rate, begun = 0, 0.0, self._updates
        for epoch in range(batch.epochs):
            for chunk in self._steps(rows, len(batch.examples), epoch):
                rate = self._rate(progress)
                for key, value in self._step(chunk, batch.loss, rate).items():
                    totals[key] += value
                steps += 1
        self._model.zero_grad(set_to_none=True)
        tokens = totals.pop("tokens")
        metrics = {f"train/{key}": value / steps for key, value in totals.items()}
        return metrics | {
            "train/examples": float(len(batch.examples)),
            "train/rows": float(len(rows)),
            "train/updates": float(self._updates - begun),
            "train/tokens": tokens,
            "train/prefix_breaks": float(self._tokens.breaks - before),
            "train/learning_rate": rate,
        }

    def _look_at(self, loss: Loss) -> None:
        """Raises: LearnerError: it needs what cannot be served here."""
        if missing := loss.needs - self.serves:
            raise LearnerError(
                f"the loss {type(loss).__name__} needs {', '.join(sorted(missing))}, and "
                f"{type(self).__name__} serves {', '.join(sorted(self.serves)) or 'no such need'}"
            )
        if Need.REFERENCE in loss.needs and self._config.method == "full":
            raise LearnerError(
                "KL to the base needs learner.method: lora; full weights keep no base"
            )

    def _steps(self, rows: Sequence[Row], examples: int, epoch: int) -> Iterable[list[Row]]:
        order = units(rows)
        random.Random(derive(self._seed, "order", self._updates, epoch)).shuffle(order)
        steps = min(len(order), max(1, round(examples / self._config.batch_size)))
        cuts = [len(order) * k // steps for k in range(steps + 1)]
        return ([row for unit in order[a:b] for row in unit] for a, b in pairwise(cuts))

    def _step(self, rows: list[Row], loss: Loss, rate: float) -> dict[str, float]:
        every = token_weights(rows, loss.aggregation, loss.length)
        self._optimizer.zero_grad(set_to_none=True)
        live = [
            k
            for k, row in enumerate(rows)
            if Need.REFERENCE in loss.needs or any(span.advantage for span in row.spans)
        ]
        if Need.WHOLE_STEP in loss.needs and live:
            every = self._weighed(rows, every, cast(StepLoss, loss))
        rows, weights = [rows[k] for k in live], [every[k] for k in live]
        if not rows:
            return dict.fromkeys(("loss", "grad_norm", "ratio", "kl_old", "tokens"), 0.0)
        mine = [
            ([rows[k] for k in group], [weights[k] for k in group])
            for group in self._mine(rows, loss)
        ]
        if Need.ADVERSARY in loss.needs:
            self._challenge(mine, cast(AdversarialLoss, loss))
        sums = torch.zeros(4, device=self._device)
        with self._randomness("step", self._updates, self._accelerator.process_index):
            for part, scale in mine:
                sums += self._backward(part, scale, loss)
        if self._accelerator.num_processes > 1:
            sums = self._add_up(sums)
        most = self._config.max_grad_norm
        norm = optimizer.whole(torch.nn.utils.clip_grad_norm_(self._trained.values(), most))
        total, ratio, kl_old, trained = map(float, sums)
        if not (torch.isfinite(norm) and math.isfinite(total)):
            self._optimizer.zero_grad(set_to_none=True)
            raise LearnerError(
                f"update {self._updates + 1} has loss {total} and gradient norm {float(norm)}; "
                "lower learner.learning_rate or look for extreme advantages"
            )
        for settings in self._optimizer.param_groups:
            settings["lr"] = rate
        self._optimizer.step()
        self._updates += 1
        return {
            "loss": total,
            "grad_norm": float(norm),
            "ratio": ratio / trained,
            "kl_old": kl_old / trained,
            "tokens": float(sum(len(row.ids) for row in rows)),
        }

    def _mine(self, rows: Sequence[Row], loss: Loss) -> list[list[int]]:
        """This process's share of the micro-batches.

        Where the model is sharded, all of them have as many, for each takes part in every pass of
        the others; some are then of no row at all.
        """
        groups = self._forward.groups(rows, loss)
        processes = self._accelerator.num_processes
        if self._mesh is not None:
            groups += [[]] * (-len(groups) % processes)
        return groups[self._accelerator.process_index :: processes]

    def _weighed(
        self, rows: Sequence[Row], weights: Sequence[list[list[float]]], loss: StepLoss
    ) -> list[list[list[float]]]:
        """The weights, times what the loss, having seen the whole step, says of each token."""
        sizes = [sum(span.end - span.begin for span in row.spans) for row in rows]
        offsets = [0, *accumulate(sizes)]
        found = torch.zeros(2, offsets[-1], device=self._device)
        self._model.eval()
        with torch.no_grad():
            for group in self._mine(rows, loss):
                # Rows come back one after another, as the spans inside each.
                computed = self._forward.arrays([rows[k] for k in group], loss)
                both = (computed.logprobs, computed.reference_logprobs)
                at = 0
                for k in group:
                    for where, values in zip(found, both, strict=True):
                        if values is not None:
                            where[offsets[k] : offsets[k + 1]] = values[at : at + sizes[k]]
                    at += sizes[k]
        self._model.train()
        if self._accelerator.num_processes > 1:
            found = self._accelerator.reduce(found, "sum")
        arrays = self._forward.given(rows, found[0])
        if Need.REFERENCE in loss.needs:
            arrays = replace(arrays, reference_logprobs=found[1])
        token_weights = iter(
            loss.weigh(arrays, derive(self._seed, "weigh", self._updates)).tolist()
        )
        return [[[w * next(token_weights) for w in span] for span in row] for row in weights]

    def _challenge(
        self, mine: Sequence[tuple[list[Row], list[list[list[float]]]]], loss: AdversarialLoss
    ) -> None:
        """One step of the loss's own parameters, up."""
        sizes = self._reader.sizes
        adversary = loss.meet(sizes.hidden_size, sizes.vocab_size, self._device)
        for weight in adversary:
            weight.grad = None  # What the last descent has left there.
        self._model.eval()
        for rows, weights in mine:
            with torch.no_grad():
                arrays = self._forward.arrays(rows, loss)
            if rows:
                (-(loss(arrays) * self._flat(weights)).sum()).backward()
        self._model.train()
        if self._accelerator.num_processes > 1:
            for weight in adversary:
                mine_only = torch.zeros_like(weight) if weight.grad is None else weight.grad
                weight.grad = self._accelerator.reduce(mine_only, "sum")
        loss.climb()

    def _add_up(self, sums: Tensor) -> Tensor:
        """Gradients and sums over all processes. By hand: some may hold no row at all.

        Of a model that is sharded, the gradients were added up as they came.
        """
        for weight in self._trained.values():
            if weight.grad is None:
                weight.grad = torch.zeros_like(weight)
            if self._mesh is None:
                weight.grad = self._accelerator.reduce(weight.grad, "sum")
        return self._accelerator.reduce(sums, "sum")

    def _backward(
        self, rows: Sequence[Row], weights: Sequence[list[list[float]]], loss: Loss
    ) -> Tensor:
        """Gradients of a micro-batch; sums of loss, ratio, estimated KL to the sampler, tokens."""
        arrays = self._forward.arrays(rows, loss)
        total = arrays.logprobs.sum()  # Of nothing, if there are no rows.
        if rows:
            total = (loss(arrays) * self._flat(weights)).sum()
        # Where it is sharded, torch has means of the processes' gradients made, not sums.
        parts = 1 if self._mesh is None else self._accelerator.num_processes
        self._accelerator.backward(total * parts)
        old, logprobs = arrays.old_logprobs, arrays.logprobs
        gap = (old - logprobs).detach()
        return torch.stack(
            [
                total.detach(),
                (-gap).exp().sum(),
                (gap.expm1() - gap).sum(),
                gap.new_full((), len(gap)),
            ]
        )

    def _flat(self, weights: Sequence[list[list[float]]]) -> Tensor:
        return moved([w for row in weights for span in row for w in span], self._device)

    def _rate(self, progress: float) -> float:
        left = 1 - min(max(progress, 0.0), 1.0)
        match self._config.schedule:
            case "constant":
                share = 1.0
            case "linear":
                share = left
            case "cosine":
                share = (1 - math.cos(math.pi * left)) / 2
        if self._config.warmup:
            share *= min(1.0, (self._updates + 1) / self._config.warmup)
        return self._config.learning_rate * share

    def export(self, folder: Path) -> None:
        lora = self._config.method == "lora"
        canaries = self._canary()  # By everybody, as each may hold a part of the model.
        arguments: dict[str, Any] = {}
        if self._mesh is not None:
            named = self._trained if lora else self._model.state_dict()
            arguments["state_dict"] = {
                name: optimizer.whole(value).detach() for name, value in named.items()
            }
        if self._accelerator.is_main_process:
            if lora:
                # Embeddings are not trained, and to ask whether they were resized peft may phone.
                arguments["save_embedding_layers"] = False
            self._model.save_pretrained(folder, **arguments)
            if lora:
                note_base(folder, self._base)
            else:
                self._tokens.save(folder)
            canary.write(folder, canaries)

    def _canary(self) -> list[canary.Canary]:
        """What these weights, served by anybody, have to answer."""
        self._model.eval()
        if self._canaries is None:
            lora = self._config.method == "lora"
            bare = self._model.disable_adapter() if lora else nullcontext()
            # Not worth compiling for.
            with torch.compiler.set_stance("force_eager"), bare:
                self._canaries = Canaries(
                    self._reader, self._tokens, self._base, self._config.trust_remote_code
                )
        found = self._canaries.now(self._reader)
        self._model.train()
        return found

    def save(self, folder: Path) -> None:
        """Weights in training, optimiser state and the count that random numbers follow from."""
        state = optimizer.state_of(self._trained, self._optimizer)  # By everybody, as above.
        if not self._accelerator.is_main_process:
            return
        folder.mkdir(parents=True, exist_ok=True)
        state["updates"] = torch.tensor(self._updates)
        if self._tight is not None:
            state["tight"] = torch.tensor(self._tight)
        optimizer.write(folder / FILE, state)

    def restore(self, folder: Path) -> None:
        """Raises: LearnerError: the folder is of a learner with other weights, or damaged."""
        try:
            state = optimizer.restore(folder / FILE, self._trained, self._optimizer)
        except ModelError as cause:
            raise LearnerError(str(cause)) from cause
        self._updates = int(state["updates"])
        # What goes on does so as it began, whatever memory there is now.
        if (
            "tight" in state
            and self._config.gradient_checkpointing == "auto"
            and self._mesh is None
        ):
            self._tight = bool(state["tight"])
            if self._tight:
                self._checkpointed()
