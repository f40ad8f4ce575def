"""LoRA adapters: whether one fits a model, and how it becomes part of its weights."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import ModelError
from .origin import ADAPTER, WEIGHTS, belongs

Shapes: TypeAlias = Mapping[str, Sequence[int]]
"""Of tensors, by name."""

Undo: TypeAlias = Callable[[], None]
"""Takes a change of one layer back."""

UNTOUCHED = (True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin a LoRA that leave the base's own weights as they are."""


def merge(model: Any, folder: Path, base: str, beside: bool = True) -> list[Undo]:
    """Make the adapter in ``folder`` part of ``model``, in place.

    Weights in float32 take it up. To those in 16 bits most of what an adapter learns is less than
    their last digit, so it is computed beside them; with ``beside`` False, and in layers that are
    not linear, it is added in float32 and rounded once. Beside those in 4 bits it always is.

    Args:
        base: what ``model`` was opened as.

    Returns:
        What undoes it, a layer each.

    Raises:
        ModelError: it is another base's, is damaged, does not fit, or changes more than weights.
            The model is then as it was.
    """
    import peft
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    untyped: Any = peft
    belongs(folder, base)
    settings, given = _settings(folder), shapes_in(folder)
    trained = [(weight, weight.requires_grad) for weight in model.parameters()]
    before: list[Undo] = []
    try:
        wrapped: Any = untyped.get_peft_model(model, settings)
        _fit(wrapped, given)
        tensors = load_file(folder / WEIGHTS)
        if spoiled := [name for name, value in tensors.items() if not value.isfinite().all()]:
            raise ValueError(f"{min(spoiled)} holds values that are not finite")
        untyped.set_peft_model_state_dict(wrapped, tensors)
        for layer in _layers(wrapped):
            before.append(_put(layer, beside))
    except Exception as cause:
        restore(before)
        raise _unfit(folder, cause) from cause
    finally:
        _bare(model)
        for weight, wanted in trained:
            weight.requires_grad_(wanted)  # peft freezes all of them.
    return before


def restore(before: Sequence[Undo]) -> None:
    """Take out again what ``merge`` put in.

    By copies, not by subtraction: weights come back bit for bit, whatever was merged before, and a
    resumed run samples as an uninterrupted one.
    """
    for undo in reversed(before):
        undo()


def fits(folder: Path, bare: Any) -> None:
    """The checks of ``merge`` without any values; ``bare``: the base on torch's meta device.

    Raises:
        ModelError: as ``merge``.
    """
    import peft

    untyped: Any = peft
    try:
        _fit(untyped.get_peft_model(bare, _settings(folder)), shapes_in(folder))
    except Exception as cause:
        raise _unfit(folder, cause) from cause
    finally:
        _bare(bare)


def shapes_in(folder: Path) -> Shapes:
    """What the adapter's file holds. Raises: ModelError: it is missing or damaged."""
    from safetensors import safe_open  # pyright: ignore[reportUnknownVariableType]

    file = folder / WEIGHTS
    if not file.is_file():
        raise ModelError(f"{folder} has no {WEIGHTS}; no other form is read")
    opener: Any = safe_open
    try:
        with opener(file, "pt") as opened:
            return {name: opened.get_slice(name).get_shape() for name in list(opened.keys())}
    except Exception as cause:
        raise _unfit(folder, cause) from cause


def changes(folder: Path) -> bool:
    """Whether the adapter changes anything: B of LoRA is 0 before the first update."""
    from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]

    found = load_file(folder / WEIGHTS)
    return any(bool(value.any()) for key, value in found.items() if "lora_B" in key)


def tied_weight(model: Any) -> Any:
    """The weight that a model both embeds and predicts with; None if there is no such one."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    weights = [getattr(layer, "base_layer", layer).weight for layer in (head, embeddings) if layer]
    return weights[0] if len(weights) == 2 and weights[0] is weights[1] else None


def _settings(folder: Path) -> Any:
    """Raises: ModelError: it is no LoRA, or changes more than weight matrices: all we take out."""
    import peft

    if not (folder / ADAPTER).is_file():
        raise ModelError(f"{folder} has no {ADAPTER}")
    untyped: Any = peft
    try:
        settings: Any = untyped.PeftConfig.from_pretrained(str(folder))
    except Exception as cause:
        raise _unfit(folder, cause) from cause
    more = ("modules_to_save", "lora_bias", "trainable_token_indices", "target_parameters")
    if (
        not isinstance(settings, peft.LoraConfig)
        or settings.bias != "none"
        or any(getattr(settings, key, None) for key in more)
    ):
        message = "only LoRA on weights is read, no biases or modules_to_save"
        raise _unfit(folder, ValueError(message))
    begun: Any = settings.init_lora_weights
    if begun not in UNTOUCHED:
        message = (
            f"init_lora_weights {begun!r} changes the base's own weights too; have peft convert it"
        )
        raise _unfit(folder, ValueError(message))
    settings.inference_mode = True
    settings.base_model_name_or_path = None  # peft warns of other names; we know better.
    return settings


def _fit(wrapped: Any, given: Shapes) -> None:
    """Raises: ValueError: not all tensors are there, or some have no place, or a shared one."""
    import peft

    untyped: Any = peft
    # To peft, tensors that fit nowhere are worth a warning; the base would answer.
    wanted: dict[str, Any] = untyped.get_peft_model_state_dict(wrapped, save_embedding_layers=False)
    if unlike := wanted.keys() ^ given.keys():
        first = min(unlike)
        how = "which is missing" if first in wanted else "which has no place in the model"
        raise ValueError(f"{len(unlike)} tensors do not match, such as {first}, {how}")
    for name, value in wanted.items():
        if list(given[name]) != list(value.shape):
            shapes = f"{list(given[name])}, where the model needs {list(value.shape)}"
            raise ValueError(f"{name} has the shape {shapes}")
    tied = tied_weight(wrapped.get_base_model())
    if any(layer.get_base_layer().weight is tied for layer in _layers(wrapped)):
        raise ValueError("it changes the output layer, whose weights are the embeddings'")


def _layers(model: Any) -> list[Any]:
    """Those with an adapter around them."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    return [module for module in model.modules() if isinstance(module, BaseTunerLayer)]


def _put(layer: Any, beside: bool) -> Undo:
    """Put one layer's adapter into it, or beside it."""
    import torch

    inner: Any = layer.get_base_layer()
    weight = inner.weight
    plain = not getattr(layer, "lora_variant", None)
    if not weight.is_floating_point():
        if not plain:
            raise ValueError("beside quantised weights only plain LoRA is computed")
        return _beside(layer, inner, inner.compute_dtype)
    if beside and plain and type(inner) is torch.nn.Linear and weight.element_size() == 2:
        return _beside(layer, inner, weight.dtype)
    original = weight.detach().clone()
    weight.data = original.to(torch.promote_types(original.dtype, torch.float32), copy=True)
    layer.merge()
    weight.data = weight.data.to(original.dtype)

    def undo() -> None:
        weight.data = original

    return undo


def _beside(layer: Any, inner: Any, dtype: Any) -> Undo:
    """As the learner computes it under autocast: the same operations on the same numbers."""
    name = layer.active_adapters[0]
    down, up = (
        part[name].weight.detach().to(inner.weight.device, dtype)
        for part in (layer.lora_A, layer.lora_B)
    )
    scale = layer.scaling[name]

    def add(_: Any, args: tuple[Any, ...], output: Any) -> Any:
        return output + (args[0] @ down.T @ up.T) * scale

    handle = inner.register_forward_hook(add)
    return handle.remove


def _bare(model: Any) -> None:
    """Take the adapter's layers away from around the model's own."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in list(model.named_modules()):
        if isinstance(module, BaseTunerLayer):
            model.set_submodule(name, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def _unfit(folder: Path, cause: Exception) -> ModelError:
    if isinstance(cause, ModelError):
        return cause
    first = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
    return ModelError(f"cannot load the adapter {folder}: {first}")
