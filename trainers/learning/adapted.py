"""Which of a model's weights are trained."""

from typing import Any

from ...core.errors import LearnerError, ModelError
from ...core.models.lora import with_lora
from .config import LearnerConfig


def adapted(weights: Any, config: LearnerConfig, name: str, language: bool) -> Any:
    """peft's model around ``weights``, called ``name``; its random numbers are the caller's.

    ``language``: only on the layers of its language model.

    Raises:
        LearnerError: it has no such layers.
    """
    targets = "all-linear" if config.targets == "vision" else config.targets
    try:
        return with_lora(weights, config.rank, config.alpha, config.dropout, targets, language)
    except ModelError as cause:
        raise LearnerError(f"{name!r} with learner.targets: {config.targets}: {cause}") from cause


def beside_language(weights: Any) -> list[Any]:
    """The weights that are not the language model's own: those of what looks at pictures."""
    parts = (weights.get_decoder(), weights.get_output_embeddings())
    language = {id(weight) for part in parts for weight in part.parameters()}
    return [weight for weight in weights.parameters() if id(weight) not in language]
