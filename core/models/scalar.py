"""A language model's body with one number on top, read at a text's last token.

torch is imported when called.
"""

# torch is partly untyped.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias

from pydantic import Field, model_validator

from ..config import Config
from ..types import Completion, Image, Prompt
from . import optimizer
from .frozen import open_frozen
from .lora import with_lora
from .open import device_of, open_model
from .quantization import Quantization
from .tokens import PAD

DISCRIMINATOR = "discriminator.safetensors"
"""What a trainer with a discriminator keeps of it in an iteration's folder, for judges to find."""
BITS: tuple[Quantization, ...] = ("none", "nf4")
Text: TypeAlias = tuple[Prompt, Completion]
"""A prompt and what was answered; an answer that was not sampled and is empty adds nothing."""


class Row(list[int]):
    """A text's ids, and the pictures that placeholders among them stand for."""

    def __init__(self, ids: Iterable[int], images: tuple[Image, ...]) -> None:
        super().__init__(ids)
        self.images = images


class ScalarConfig(Config):
    method: Literal["lora", "full"] = "lora"
    """``lora``: on the frozen model that the learner holds too; ``full``: a copy, trained whole."""
    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    """LoRA's scale is alpha / rank."""
    quantization: Quantization = "none"
    """Of the frozen model: the learner's, else the model is there twice (as it is on a GPU with
    ``learner.precision: float32``)."""
    learning_rate: float = Field(default=1e-4, gt=0)
    batch_size: int = Field(default=32, ge=1)
    """Pairs, or texts, per optimiser step."""
    token_budget: int = Field(default=4096, ge=1)
    """Padded tokens computed at once."""
    device: Literal["auto", "cpu", "cuda"] = "auto"

    @model_validator(mode="after")
    def _frozen(self) -> Self:
        if self.quantization != "none" and self.method == "full":
            raise ValueError("what is trained whole is not quantised; wanted method: lora")
        return self


def config_in(file: Path) -> dict[str, Any]:
    """What a ``ScalarConfig`` has to say for ``restore`` to take ``file``.

    Raises: ModelError: the file is missing or damaged.
    """
    lora = optimizer.read(file, "lora")
    if not lora:
        return {"method": "full"}
    rank, alpha, bits = lora["lora"].tolist()
    return {"method": "lora", "rank": rank, "alpha": alpha, "quantization": BITS[bits]}


class ScalarModel:
    """z(text), a float; 0 for every text at first."""

    def __init__(self, config: ScalarConfig, model: str, seed: int = 0) -> None:
        """Raises: ModelError, PolicyError: the model cannot be opened there."""
        import torch

        from .vision import eye_of

        self._config = config
        device = device_of(config.device)
        lora = config.method == "lora"
        # As the learner opens it, to hold the same tensors.
        self._dtype = torch.bfloat16 if lora and device.startswith("cuda") else torch.float32
        opener = open_frozen if lora else open_model
        name = str(self._dtype).removeprefix("torch.")
        whole, self._tokens = opener(model, device, name, False, config.quantization)
        self._whole = whole  # While it is held, whoever opens the same holds the same.
        self._eye = eye_of(self._tokens, whole)
        # A model that sees reads pictures around its decoder; what looks at them stays frozen.
        self.body: Any = whole.model if self._eye else whole.get_decoder()
        self.head = torch.nn.Linear(whole.config.get_text_config().hidden_size, 1).to(device)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)
        self._named: dict[str, Any]
        if lora:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                adapted = with_lora(
                    whole, config.rank, config.alpha, language_only=self._eye is not None
                )
            self._named = {k: w for k, w in adapted.named_parameters() if w.requires_grad}
            self._named |= {f"head.{k}": w for k, w in self.head.named_parameters()}
        else:
            trained = [*whole.get_decoder().parameters(), *self.head.parameters()]
            self._named = {str(k): weight for k, weight in enumerate(trained)}
        self._trained = [*self._named.values()]
        self._optimizer = torch.optim.AdamW(self._trained, lr=config.learning_rate, weight_decay=0)
        self.updates = 0

    def ids(self, text: Text) -> Row:
        prompt, completion = text
        answer = self._tokens.answer(completion) if completion.text or completion.token_ids else ()
        return Row((*self._tokens.prompt(prompt), *answer), prompt.images)

    def values(self, texts: Sequence[Text]) -> list[float]:
        """z of each, without gradient."""
        import torch

        rows = [self.ids(text) for text in texts]
        found = [0.0] * len(rows)
        order = sorted(range(len(rows)), key=lambda k: len(rows[k]))
        with torch.no_grad():
            for part in self.parts(order, rows):
                outputs: list[float] = self.forward([rows[k] for k in part]).tolist()
                for k, value in zip(part, outputs, strict=True):
                    found[k] = value
        return found

    def parts(
        self, order: Sequence[int], rows: Sequence[Sequence[int]], each: int = 1
    ) -> list[list[int]]:
        """``order``, shortest rows first, in groups of at most ``token_budget`` padded tokens."""
        parts: list[list[int]] = []
        for k in order:
            size = each * (len(parts[-1]) + 1) * len(rows[k]) if parts else 0
            if parts and size <= self._config.token_budget:
                parts[-1].append(k)
            else:
                parts.append([k])
        return parts

    def forward(self, rows: Sequence[Row]) -> Any:
        """(B,) z, read at each row's last token; carries the gradient."""
        import torch

        longest, device = max(map(len, rows)), self.head.weight.device
        ids = torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], device=device)
        last = torch.tensor([len(row) - 1 for row in rows], device=device)
        seen: dict[str, Any] = {}
        images = [row.images for row in rows]
        if self._eye and any(images):
            real = torch.arange(longest, device=device)[None] <= last[:, None]
            with torch.no_grad():
                seen = self._eye.given(ids, images, real)
        mixed = self._dtype == torch.bfloat16
        with torch.autocast(device.type, torch.bfloat16, enabled=mixed):
            hidden = self.body(input_ids=ids, use_cache=False, **seen).last_hidden_state
        return self.head(hidden[torch.arange(len(rows), device=device), last].float())[:, 0]

    def clear(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def step(self) -> None:
        """One optimiser step along the gradients, clipped to a norm of 1."""
        import torch

        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()
        self.updates += 1

    def save(self, file: Path) -> None:
        import torch

        state = optimizer.state_of(self._named, self._optimizer)
        state["updates"] = torch.tensor(self.updates)
        if self._config.method == "lora":
            config = self._config
            bits = BITS.index(config.quantization)
            state["lora"] = torch.tensor([config.rank, config.alpha, bits])
        optimizer.write(file, state)

    def restore(self, file: Path) -> None:
        """Raises: ModelError: the file is missing, damaged or of another model."""
        self.updates = int(optimizer.restore(file, self._named, self._optimizer)["updates"])
