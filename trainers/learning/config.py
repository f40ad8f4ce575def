"""What learners are told."""

from typing import Literal, Self

from pydantic import Field, model_validator

from ...core.config import Config
from ...core.models.optimizer import Kind
from ...core.models.quantization import MISSING, Quantization, installed
from .targets import Targets


class LearnerConfig(Config):
    method: Literal["lora", "full"] = "lora"
    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    """LoRA's scale is alpha / rank."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: Targets = "all-linear"
    """The last parts of the names of the layers that get a LoRA. Of a model that sees, only those
    of its language model do, and train with ``method: full``; with ``vision`` all linear ones, of
    what looks at pictures, too."""
    learning_rate: float = Field(default=1e-4, gt=0)
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Over the whole run, or phase."""
    warmup: int = Field(default=0, ge=0)
    """Updates over which the rate rises from 0."""
    batch_size: int = Field(default=64, ge=1)
    """Examples per optimiser step, about: a row of several turns is never split."""
    weight_decay: float = Field(default=0.0, ge=0)
    max_grad_norm: float = Field(default=1.0, gt=0)
    optimizer: Kind = "adamw"
    """``adamw_8bit``: what AdamW remembers of each tensor of 4,096 numbers or more takes 2 bytes a
    number in place of 8, by bitsandbytes (``pip install 'selfwright[qlora]'``)."""
    token_budget: int | None = Field(default=None, ge=1)
    """Padded tokens per micro-batch; gradients of a step's micro-batches are accumulated. None:
    2,048 on a CPU, whose caches small ones suit, and 16,384 on a GPU."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Layers keep little for their gradients and run again for them, in a third more time.
    ``auto``: if what they keep of a full micro-batch, as measured on two short rows before the
    first update, would take more than 70 % of the memory that is free; not of sharded models."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """``bfloat16``: frozen weights and activations in bf16; what is trained stays float32.
    ``auto``: that on a GPU, else float32."""
    quantization: Quantization = "none"
    """``nf4``: QLoRA. The language model's frozen linear layers are in 4 bits, by bitsandbytes,
    and the LoRA beside them in float32. ``policy.quantization`` has to be the same."""
    compile: bool = False
    """Have torch compile the layers: for GPUs. That takes a minute or two at first; steps are then
    up to twice as fast."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    trust_remote_code: bool = False

    @model_validator(mode="after")
    def _frozen(self) -> Self:
        if self.quantization != "none" and self.method == "full":
            raise ValueError(
                f"quantization: {self.quantization} is for weights that stay as they are, and "
                "method: full trains them; wanted method: lora"
            )
        return self

    @property
    def of_bitsandbytes(self) -> list[str]:
        """What is asked of that library, as a recipe says it."""
        keys = {"optimizer": self.optimizer, "quantization": self.quantization}
        usual = ("adamw", "none")
        return [f"learner.{key}: {value}" for key, value in keys.items() if value not in usual]

    def unmet(self, sharded: bool) -> list[str]:
        """What is asked of bitsandbytes and cannot be had; ``sharded``: the model is to be."""
        wanted = self.of_bitsandbytes
        if not installed():
            return [f"{one} {MISSING}" for one in wanted]
        if sharded:
            return [
                f"{one} cannot be sharded; let each process hold the model whole, as in "
                "recipes/accelerate/ddp.yaml"
                for one in wanted
            ]
        return []

    def budget(self, device: str) -> int:
        """``token_budget`` on a device of that type."""
        return self.token_budget or (2048 if device == "cpu" else 16_384)

    def dtype(self, device: str) -> Literal["float32", "bfloat16"]:
        """``precision`` on a device of that type."""
        if self.precision == "auto":
            return "bfloat16" if device == "cuda" else "float32"
        return self.precision
