"""Learning through TRL's stable trainers: a learner for the loop, and preference training on pairs.

TRL is an optional part: ``pip install 'selfwright[trl]'``.
"""

# datasets has no types, transformers has few.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import copy
import importlib.util
import logging
import math
import random
from collections.abc import Callable, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeAlias

from ...core.errors import LearnerError, PolicyError
from ...core.models.adapters import merge
from ...core.models.open import open_model, open_tokens
from ...core.models.origin import layers_of, note_base
from ...core.models.tokens import PAD, ChatTokens
from ...core.seeds import derive
from ...core.types import Batch, Example, Image, Loss, Metrics, Need, Pair, TokenArrays
from .collate import apart, collated, own_forward, seeing
from .export import to_preferences
from .learner import LearnerConfig, PlainLearner

EYE = "what looks at pictures is not trained by learner.use: trl; leave targets: vision out"
MISSING = "TRL is not installed; pip install 'selfwright[trl]', or use learner.use: plain"
Weights: TypeAlias = Literal["refuse", "ignore", "repeat"]


class TRLConfig(LearnerConfig):
    weights: Weights = "refuse"
    """What to do with examples of unequal weight, which TRL cannot tell apart. ``refuse``: stop
    and say so. ``ignore``: all with a weight above 0 count the same. ``repeat``: each is learned
    as often as its weight says, rounded at random but never by more than one."""


class TRLLearner(PlainLearner):
    """Every update is one run of TRL's ``SFTTrainer``, on token ids as they were sampled.

    Weights, optimiser and schedule go on from update to update, and the seeds of an update follow
    from its number, so a restored learner goes on as if nothing had happened. What differs from
    ``plain``: the only loss is NLL, and it is always the mean over the trained tokens of an
    optimiser step, whatever aggregation the loss asks for; turns do not share rows; what looks at
    pictures is not trained; one process.
    """

    Config = TRLConfig
    shares: ClassVar[bool] = False
    serves: ClassVar = frozenset[Need]()

    @staticmethod
    def unfit(config: LearnerConfig, bare: Callable[[], Any]) -> list[str]:
        there = importlib.util.find_spec("trl") is not None
        faults = [] if there else [f"learner.use: {MISSING}"]
        if config.targets == "vision":
            faults.append(EYE)
        return [*faults, *_unknown(config), *PlainLearner.unfit(config, bare)]

    def __init__(self, config: TRLConfig, model: str, seed: int) -> None:
        """Raises: LearnerError: no TRL, what is for ``plain`` alone, or several processes."""
        _trl()
        _refuse(config)
        super().__init__(config, model, seed)
        self._weights: Weights = config.weights
        if self._accelerator.num_processes > 1:
            raise LearnerError(
                f"the learner trl works in one process, not in {self._accelerator.num_processes}; "
                "use learner.use: plain"
            )

    def update(self, batch: Batch, progress: float) -> Metrics:
        """``batch.epochs`` passes over the examples, in optimiser steps of ``batch_size``.

        Raises:
            LearnerError: no examples, a loss that is not NLL, weights that TRL cannot honour, or a
                loss that is not finite (the weights are spoiled then: restore an earlier state).
        """
        self._look_at(batch.loss)
        if batch.fresh:
            self._begin()
            progress = 0.0
        seed = derive(self._seed, "trl", self._updates)
        before = self._tokens.breaks
        examples = weighed(batch.examples, self._weights, seed)
        rows = [
            (self._tokens.prompt(e.prompt), self._tokens.answer(e.completion)) for e in examples
        ]
        images = [example.prompt.images for example in examples]
        log = self._fit(rows, images, batch.epochs, progress, seed)
        trained = sum(len(prompt) + len(completion) for prompt, completion in rows) * batch.epochs
        return {
            "train/loss": sum(entry["loss"] for entry in log) / len(log),
            "train/grad_norm": sum(entry["grad_norm"] for entry in log) / len(log),
            "train/token_accuracy": sum(entry["mean_token_accuracy"] for entry in log) / len(log),
            "train/examples": float(len(batch.examples)),
            "train/rows": float(len(rows)),
            "train/updates": float(len(log)),
            "train/tokens": float(trained),
            "train/prefix_breaks": float(self._tokens.breaks - before),
            "train/learning_rate": log[-1]["learning_rate"],
        }

    def _look_at(self, loss: Loss) -> None:
        """TRL computes a loss of its own; any other one would not be asked at all."""
        super()._look_at(loss)
        if not imitates(loss):
            raise LearnerError(
                "TRL's SFTTrainer knows no loss but NLL, and the trainer asks for "
                f"{type(loss).__name__}; use learner.use: plain"
            )

    def _fit(
        self,
        rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
        images: Sequence[tuple[Image, ...]],
        epochs: int,
        progress: float,
        seed: int,
    ) -> list[Metrics]:
        from datasets import Dataset
        from torch.optim.lr_scheduler import LambdaLR

        base = self._config.learning_rate
        for group in self._optimizer.param_groups:
            group["lr"] = base
        begin = self._updates

        def share(step: int) -> float:
            self._updates = begin + step
            return self._rate(progress) / base

        labelled: dict[str, Any] = {
            "input_ids": [[*prompt, *completion] for prompt, completion in rows],
            "labels": [[-100] * len(prompt) + list(completion) for prompt, completion in rows],
        }
        longest = max(map(len, labelled["input_ids"]))
        kind, eye, more = _trl().SFTTrainer, self._reader.eye, dict[str, Any]()
        if eye is not None:
            kind, more = seeing(kind, eye, images), {"data_collator": collated}
            labelled["row"] = range(len(rows))
        # TRL replaces the forward of the model it is given, once more for every trainer.
        with (
            apart() as folder,
            own_forward(self._model, self._model.get_base_model())
            if self._config.method == "lora"
            else own_forward(self._model),
        ):
            trainer = kind(
                self._model,
                _trl().SFTConfig(
                    **_arguments(self._config, longest, epochs, seed, folder),
                    dataset_kwargs={"skip_prepare_dataset": True},
                ),
                train_dataset=Dataset.from_dict(labelled),
                processing_class=_padding(self._tokens.tokenizer, self._model),
                optimizers=(self._optimizer, LambdaLR(self._optimizer, share)),
                **more,
            )
            log = _run(trainer)
        self._updates = begin + len(log)
        return log


def imitates(loss: Loss) -> bool:
    """Whether a loss without needs is the weighted negative log-likelihood, by two numbers."""
    import torch

    logprobs, advantages = torch.tensor([-0.5, -3.0]), torch.tensor([1.0, -2.0])
    value = loss(TokenArrays(logprobs, torch.tensor([-1.0, -2.0]), advantages))
    return torch.allclose(value, -advantages * logprobs)


def weighed(examples: Sequence[Example], mode: Weights, seed: int) -> list[Example]:
    """The examples to learn, all with the same say, so that together they mean the weighted ones.

    Raises:
        LearnerError: none are left, a weight is negative or no number, or they are unequal and
            ``mode`` is ``refuse``.
    """
    weights = [example.advantage for example in examples]
    if not any(weights):
        raise LearnerError("the batch holds no examples of any weight: nothing can be learned")
    low, high = min(weights), max(weights)
    if low < 0 or not math.isfinite(high):
        raise LearnerError(
            f"TRL's SFTTrainer can only imitate, but weights range from {low:g} to {high:g}; "
            "use learner.use: plain"
        )
    if low == high:
        return list(examples)
    if mode == "refuse":
        raise LearnerError(
            f"TRL's SFTTrainer cannot weigh examples, and their weights range from {low:g} to "
            f"{high:g}; use learner.use: plain, or learner.weights: repeat or ignore"
        )
    if mode == "ignore":
        return [example for example in examples if example.advantage > 0]
    # Systematic resampling: one random offset, so that every count is its expectation, rounded.
    offset, share = random.Random(seed).random(), len(weights) / sum(weights)
    edges = [0, *(math.floor(total * share + offset) for total in accumulate(weights))]
    return [e for e, a, b in zip(examples, edges, edges[1:], strict=False) for _ in range(b - a)]


def fit_dpo(
    model: str,
    pairs: Sequence[Pair],
    config: LearnerConfig,
    output: Path,
    *,
    beta: float = 0.1,
    epochs: int = 1,
    seed: int = 0,
) -> list[Metrics]:
    """Direct preference optimisation (Rafailov et al. 2023, arXiv:2305.18290) by ``DPOTrainer``.

    Args:
        model: a folder or hub id; also the reference that ``beta`` ties the result to.
        pairs: token ids are used as they were sampled, and made from the text where there are none.
        config: as for the loop; ``batch_size`` counts pairs.
        output: gets the adapter, or the model with ``method: full``.

    Returns:
        What TRL logged at each optimiser step: ``loss``, ``rewards/margins``,
        ``rewards/accuracies``, ``logps/chosen``, ...

    Raises:
        LearnerError: no pairs, TRL is not installed, or a loss that is not finite.
        PolicyError: the model cannot be opened.
    """
    _some(pairs)
    _refuse(config)
    trl = _trl()
    weights, tokens = open_model(
        model, config.device, _dtype(config), trust_remote_code=config.trust_remote_code
    )
    rows = _pair_ids(pairs, tokens)
    longest = max(
        len(r["prompt_ids"]) + max(len(r["chosen_ids"]), len(r["rejected_ids"])) for r in rows
    )
    with apart() as folder:
        trainer = trl.DPOTrainer(
            weights,
            args=trl.DPOConfig(
                **_arguments(config, 2 * longest, epochs, seed, folder),
                beta=beta,
                disable_dropout=not config.dropout,
            ),
            # TRL would tokenise all of it again: it gets one to look at, then the ids.
            train_dataset=to_preferences(pairs[:1]),
            processing_class=_padding(tokens.tokenizer, weights),
            peft_config=_lora(config, "CAUSAL_LM"),
        )
        trainer.train_dataset = _listed(rows)
        log = _run(trainer)
        trainer.model.save_pretrained(output)
        note_base(output, model)
    return log


def fit_reward(
    model: str,
    pairs: Sequence[Pair],
    config: LearnerConfig,
    output: Path,
    *,
    epochs: int = 1,
    seed: int = 0,
) -> list[Metrics]:
    """A reward model (``model`` with a scalar head, Bradley-Terry loss) by TRL's ``RewardTrainer``.

    Args, Raises: as ``fit_dpo``. ``output`` gets the adapter with its head, or the whole
    sequence-classification model.

    Returns:
        What TRL logged at each optimiser step: ``loss``, ``accuracy``, ``margin``, ...
    """
    _some(pairs)
    _refuse(config)
    trl = _trl()
    weights, tokens = _open_scorer(model, config)
    rows = [
        {side: row["prompt_ids"] + row[side] for side in ("chosen_ids", "rejected_ids")}
        for row in _pair_ids(pairs, tokens)
    ]
    longest = max(len(ids) for row in rows for ids in row.values())
    with apart() as folder:
        trainer = trl.RewardTrainer(
            weights,
            args=trl.RewardConfig(
                **_arguments(config, 2 * longest, epochs, seed, folder),
                disable_dropout=not config.dropout,
            ),
            train_dataset=_listed(rows),
            processing_class=_padding(tokens.tokenizer, weights),
            peft_config=_lora(config, "SEQ_CLS", modules_to_save=["score"]),
        )
        log = _run(trainer)
        trainer.model.save_pretrained(output)
        note_base(output, model)
    return log


def _unknown(config: LearnerConfig) -> list[str]:
    return [f"{one} is for learner.use: plain" for one in config.of_bitsandbytes]


def _refuse(config: LearnerConfig) -> None:
    if unknown := _unknown(config):
        raise LearnerError("\n".join(unknown))


def _trl() -> Any:
    """TRL, told to keep quiet and to call nobody.

    Raises:
        LearnerError: it is not installed.
    """
    try:
        trl = importlib.import_module("trl")
    except ImportError as cause:
        raise LearnerError(MISSING) from cause
    from datasets import disable_progress_bars
    from huggingface_hub import constants

    # TRL reports to its hub whenever a trainer is made. The variable that forbids it
    # (HF_HUB_DISABLE_TELEMETRY) is read on import, and that is long past.
    constants.HF_HUB_DISABLE_TELEMETRY = True
    logging.getLogger("trl").setLevel(logging.ERROR)
    disable_progress_bars()
    return trl


def _padding(tokenizer: Any, model: Any) -> Any:
    """A copy whose padding token the embeddings of ``model`` have: TRL also writes to it."""
    padded = copy.deepcopy(tokenizer)
    rows = model.get_input_embeddings().weight.shape[0]
    if padded.pad_token_id is None or padded.pad_token_id >= rows:
        padded.pad_token = padded.convert_ids_to_tokens(PAD)
    return padded


def _arguments(
    config: LearnerConfig, longest: int, epochs: int, seed: int, folder: str
) -> dict[str, Any]:
    """What all of TRL's trainers are told. ``longest``: tokens of the longest example."""
    import torch

    # The largest share of a step whose padded rows keep to the budget.
    fits = max(1, config.budget(_device(config)) // longest)
    size = config.batch_size
    at_once = next(k for k in range(min(size, fits), 0, -1) if size % k == 0)
    return {
        "output_dir": folder,
        "per_device_train_batch_size": at_once,
        "gradient_accumulation_steps": size // at_once,
        "num_train_epochs": epochs,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": {"constant": "constant_with_warmup"}.get(
            config.schedule, config.schedule
        ),
        "warmup_steps": config.warmup,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "gradient_checkpointing": config.gradient_checkpointing is True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "bf16": config.dtype(_device(config)) == "bfloat16",
        "use_cpu": _device(config) == "cpu",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "max_length": None,
        "remove_unused_columns": False,
        "seed": seed % 2**32,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
    }


def _run(trainer: Any) -> list[Metrics]:
    """Train; what was logged at each optimiser step."""
    from transformers import PrinterCallback

    trainer.remove_callback(PrinterCallback)
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    for entry in log:
        if not (math.isfinite(entry["loss"]) and math.isfinite(entry["grad_norm"])):
            raise LearnerError(
                f"step {entry['step']} has loss {entry['loss']} and gradient norm "
                f"{entry['grad_norm']}; lower learner.learning_rate"
            )
    return log


def _lora(config: LearnerConfig, task: str, **more: Any) -> Any:
    from peft import LoraConfig

    if config.method == "full":
        return None
    return LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules="all-linear" if config.targets == "vision" else config.targets,
        task_type=task,
        **more,
    )


def _open_scorer(model: str, config: LearnerConfig) -> tuple[Any, ChatTokens]:
    transformers: Any = importlib.import_module("transformers")
    base, adapters = layers_of(model)
    tokens = open_tokens(model, config.trust_remote_code)
    torch: Any = importlib.import_module("torch")
    try:
        # Its head is new: of these random numbers, and nobody else's are touched.
        with torch.random.fork_rng():
            torch.manual_seed(0)
            scorer = transformers.AutoModelForSequenceClassification.from_pretrained(
                base,
                num_labels=1,
                dtype=_dtype(config),
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
            )
    except (OSError, ValueError) as cause:
        raise PolicyError(f"cannot make a reward model of {model!r}: {cause}") from cause
    for adapter in adapters:
        merge(scorer, adapter, base)
        base = str(adapter)
    return scorer, tokens


def _device(config: LearnerConfig) -> str:
    import torch

    return "cpu" if config.device == "cpu" or not torch.cuda.is_available() else "cuda"


def _dtype(config: LearnerConfig) -> str:
    frozen = config.dtype(_device(config)) == "bfloat16" and config.method == "lora"
    return "bfloat16" if frozen else "float32"


def _pair_ids(pairs: Sequence[Pair], tokens: ChatTokens) -> list[dict[str, list[int]]]:
    if any(pair.prompt.images for pair in pairs):
        raise LearnerError("TRL reads text only here, but there are pictures in the pairs")
    return [
        {
            "prompt_ids": list(tokens.prompt(pair.prompt)),
            "chosen_ids": list(tokens.answer(pair.chosen)),
            "rejected_ids": list(tokens.answer(pair.rejected)),
        }
        for pair in pairs
    ]


def _listed(rows: list[dict[str, list[int]]]) -> Any:
    from datasets import Dataset

    return Dataset.from_list(rows)


def _some(pairs: Sequence[Pair]) -> None:
    if not pairs:
        raise LearnerError("no pairs were given: nothing can be learned")
