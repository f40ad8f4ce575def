"""Pictures as a model takes them: words in its prompt, then features in place of those words.

A model of texts and pictures comes with a processor. It says what stands for a picture in the
prompt, which may be many tokens and depend on the picture's size, and makes tensors of it; the
model's own eye makes features of those. They are made once for each picture, by its content.

torch is imported when called.
"""

# transformers' processors and torch are only partly typed.
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false

import io
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from ..errors import ModelError, PromptError
from ..files import write_json
from ..images import STORE
from ..types import Image
from .tokens import ChatTokens

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor: TypeAlias = Any

REMEMBERED = 1 << 28
"""Bytes of features that are kept."""
PICTURES = 1 << 16
"""Of so many it is kept how they are spelt."""
AT_ONCE = 1 << 23
"""Numbers that an eye is given at once, about."""
HIDDEN = "\ue000\uf8ff"
"""Stands for a model's mark in what somebody says: characters of no meaning."""


@dataclass(frozen=True)
class Features:
    """What a model's eye makes of a picture: a vector for each of its tokens."""

    tokens: Tensor
    """(T, D)."""
    deeper: tuple[Tensor, ...] = ()
    """(T, D) each: what is added behind the first layers, in models that do that."""

    @property
    def nbytes(self) -> int:
        return sum(one.nbytes for one in (self.tokens, *self.deeper))


class Vision:
    """What a model's processor knows of pictures. Knows no prompts but their words."""

    def __init__(self, processor: Any, placeholder: int, settings: Mapping[str, Any]) -> None:
        """``settings``: what its processor was opened with, but for its parts."""
        self._processor = processor
        self._opened = settings
        self.mark: str = processor.image_token
        """What a chat template writes for a picture."""
        self.placeholder = placeholder
        """The id of each token that a picture's features stand in for."""
        self.marks_kinds = "token_type_ids" in processor.model_input_names
        """Whether the model is told which tokens are a picture's: they see one another."""
        # As the processor itself would be called.
        defaults = processor._merge_kwargs(
            processor.valid_processor_kwargs, tokenizer_init_kwargs={}
        )
        self._settings: dict[str, Any] = defaults["images_kwargs"]
        self._token: str = processor.tokenizer.convert_ids_to_tokens(placeholder)
        self._sizes: OrderedDict[str, Spelt] = OrderedDict()
        self._same: dict[str, str] = {}

    def worded(self, text: str) -> str:
        """``text``, in which nothing passes for a picture until ``expanded`` puts it back."""
        return text.replace(self.mark, HIDDEN)

    def expanded(self, text: str, images: Sequence[Image]) -> str:
        """``text``, in which all that stands for ``images`` is spelt out.

        Raises:
            PromptError: there is not one mark for each.
        """
        parts = text.split(self.mark)
        if len(parts) != len(images) + 1:
            raise PromptError(
                f"the prompt holds {len(images)} images, but {len(parts) - 1} times "
                f"{self.mark!r}, which stands for one"
            )
        words = [*(self._spelt(image).words for image in images), ""]
        whole = "".join(part + word for part, word in zip(parts, words, strict=True))
        return whole.replace(HIDDEN, self.mark)

    def size(self, image: Image) -> int:
        """Tokens that its features stand in for."""
        return self._spelt(image).size

    def grid(self, image: Image) -> tuple[int, ...]:
        """Its patches in time, rows and columns, of models that are told; else nothing."""
        return self._spelt(image).grid

    def _spelt(self, image: Image) -> "Spelt":
        found = self._sizes.get(image.sha256)
        if found is None:
            tensors, words = self._read(image)
            # Most are spelt as another one is, and that is long: each way is kept once.
            words = self._same.setdefault(words, words)
            grid: list[int] = tensors["image_grid_thw"][0].tolist() if self._grids(tensors) else []
            found = Spelt(words, words.count(self._token), tuple(grid))
            if len(self._sizes) >= PICTURES:
                self._sizes.popitem(last=False)
            self._sizes[image.sha256] = found
        return found

    @staticmethod
    def _grids(tensors: Mapping[str, Any]) -> bool:
        return "image_grid_thw" in tensors

    def tensors(self, image: Image) -> dict[str, Tensor]:
        """What the model's eye is given."""
        return self._read(image)[0]

    def _read(self, image: Image) -> tuple[dict[str, Tensor], str]:
        from PIL import Image as Pillow

        processor = self._processor
        with Pillow.open(io.BytesIO(STORE.read(image))) as opened:
            layout = processor.prepare_inputs_layout(
                images=[opened.convert("RGB")], text=[self.mark]
            )
        found = processor.image_processor(layout[0], return_tensors="pt", **self._settings)
        words = processor.replace_image_token(found, 0, **self._settings)
        unused = {*processor.unused_input_names, "rows", "cols"}
        return {k: v for k, v in found.items() if k not in unused}, words

    def save(self, folder: Path) -> None:
        """Write all that ``open_vision`` reads beside the model's config and its tokenizer."""
        self._processor.image_processor.save_pretrained(folder)
        write_json(folder / "processor_config.json", self._opened)


class Spelt(NamedTuple):
    """How a picture stands in a prompt."""

    words: str
    size: int
    grid: tuple[int, ...]


def open_vision(model: str, config: Any, tokenizer: Any) -> tuple[Vision, Any]:
    """What a model's processor knows of pictures, and its tokenizer.

    Videos are left out: their part of a processor wants libraries that nothing else does.

    Raises whatever transformers does; ModelError: it has parts that nothing here knows.
    """
    import transformers
    from transformers.models.auto import processing_auto

    hf: Any = transformers
    known: Any = processing_auto
    kind: Any = getattr(hf, known.PROCESSOR_MAPPING_NAMES[config.model_type])
    wanted = kind.get_attributes()
    if others := {*wanted} - {"image_processor", "tokenizer", "video_processor"}:
        raise ModelError(f"{kind.__name__} wants {', '.join(others)}, which nothing here knows")
    given, _ = kind.get_processor_dict(model)
    parts: dict[str, Any] = {
        "image_processor": hf.AutoImageProcessor.from_pretrained(model),
        "tokenizer": tokenizer,
        "video_processor": None,
    }
    silent = type(kind.__name__, (_WithoutVideo, kind), {})
    settings = {k: one for k, one in given.items() if k not in parts}
    arguments = [parts[name] for name in wanted]
    processor = silent.from_args_and_dict(arguments, dict(settings))
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = processor.chat_template
    settings = {**settings, "processor_class": kind.__name__}
    return Vision(processor, config.image_token_id, settings), tokenizer


def eye_of(tokens: ChatTokens, model: Any, limit: int = REMEMBERED) -> "Eye | None":
    """What looks at pictures for ``model``, having seen none; None if it sees none."""
    return Eye(tokens.vision, model, limit) if isinstance(tokens.vision, Vision) else None


class _WithoutVideo:
    """A processor that has none for videos."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        checked: Any = super()
        if argument is not None:
            checked.check_argument_for_proper_class(argument_name, argument)


class Eye:
    """A model's own way from pictures to features, and where those belong in rows of tokens."""

    def __init__(self, vision: Vision, model: Any, limit: int = REMEMBERED) -> None:
        """``model``: the model itself, whatever is wrapped around it.

        ``limit``: bytes of features to keep; 0 where they change, as the eye is trained.
        """
        self.vision = vision
        self._inner: Any = model.model
        self._limit = limit
        self._known: OrderedDict[str, Features] = OrderedDict()
        self._bytes = 0
        self._listed = False
        """Whether features come as a list of a picture's each,"""
        self._block = 0
        """or else in blocks of so many tokens; 0: in none."""
        self.winds: bool = hasattr(self._inner, "get_rope_index")
        """Whether a picture's tokens have positions in its rows and columns."""

    @property
    def device(self) -> Any:
        return self._inner.device

    def forget(self) -> None:
        """What was made of pictures: the weights are others now."""
        self._known.clear()
        self._bytes = 0

    def features(self, images: Sequence[Image]) -> list[Features]:
        """Of each picture; equal ones are looked at once."""
        found: dict[str, Features] = {}
        new: dict[str, Image] = {}
        for image in images:
            kept = self._known.get(image.sha256)
            if kept is None:
                new[image.sha256] = image
            else:
                self._known.move_to_end(image.sha256)
                found[image.sha256] = kept
        for name, one in self._looked([*new.values()]):
            found[name] = one
            self._keep(name, one)
        return [found[image.sha256] for image in images]

    def _keep(self, name: str, one: Features) -> None:
        if one.nbytes > self._limit:
            return
        self._known[name] = one
        self._bytes += one.nbytes
        while self._bytes > self._limit:
            self._bytes -= self._known.popitem(last=False)[1].nbytes

    def _looked(self, images: Sequence[Image]) -> Iterator[tuple[str, Features]]:
        """Those of one size are looked at together, as many as ``AT_ONCE`` lets."""
        alike: dict[Any, list[tuple[Image, dict[str, Tensor]]]] = {}
        for image in images:
            tensors = self.vision.tensors(image)
            shape = tuple((key, *value.shape) for key, value in sorted(tensors.items()))
            several = alike.setdefault(shape, [])
            several.append((image, tensors))
            if len(several) * sum(value.numel() for value in tensors.values()) >= AT_ONCE:
                yield from self._look(alike.pop(shape))
        for several in alike.values():
            yield from self._look(several)

    def _look(
        self, several: Sequence[tuple[Image, dict[str, Tensor]]]
    ) -> Iterator[tuple[str, Features]]:
        import torch

        given = {
            key: torch.cat([tensors[key] for _, tensors in several]).to(self.device)
            for key in several[0][1]
        }
        out = self._inner.get_image_features(**given, return_dict=True)
        self._listed = isinstance(out.pooler_output, list | tuple)
        if not self._listed and out.pooler_output.dim() == 3:
            self._block = out.pooler_output.shape[1]
        sizes = [self.vision.size(image) for image, _ in several]
        layers = [out.pooler_output, *(getattr(out, "deepstack_features", None) or ())]
        parts: list[Any] = [_flat(one).split(sizes) for one in layers]
        for k, (image, _) in enumerate(several):
            yield image.sha256, Features(parts[0][k], tuple(part[k] for part in parts[1:]))

    def arguments(
        self, ids: Tensor, images: Sequence[Sequence[Image]], read: int | None = None
    ) -> dict[str, Any]:
        """What a forward pass over the last ``read`` columns of ``ids`` is given beside them.

        Args:
            ids: (B, T), whole prompts, each as far as it goes.
            images: those of each row, in order.
            read: None: all columns. They begin in the midst of no picture (``whole_from``).

        Raises:
            ModelError: a row has more or fewer placeholders than its pictures have tokens.
        """
        import torch

        marks = ids == self.vision.placeholder
        if not any(images) and not marks.any():
            return {}
        shown = marks[:, -read:] if read else marks
        wanted: list[Image] = []
        for k, (row, mine) in enumerate(zip(images, marks, strict=True)):
            sizes = [self.vision.size(image) for image in row]
            if sum(sizes) != int(mine.sum()):
                raise ModelError(
                    f"row {k} holds {int(mine.sum())} placeholders, but its {len(row)} images are "
                    f"{sum(sizes)} tokens to the model"
                )
            # Of what was read before, nothing is given again.
            left, first = int(shown[k].sum()), len(row)
            while left > 0:
                first -= 1
                left -= sizes[first]
            if left:
                raise ModelError(f"row {k} is read from the midst of a picture on")
            wanted += row[first:]
        if not wanted:
            return {}
        features = self.features(wanted)
        tokens: Any = torch.cat([one.tokens for one in features])
        if self._block:
            tokens = tokens.unflatten(0, (-1, self._block))
        deeper = [
            [torch.cat(layer)] for layer in zip(*(one.deeper for one in features), strict=True)
        ]
        out = _output([tokens] if self._listed else tokens, deeper)
        given: dict[str, Any] = {"mm_encoder_outputs": {"image": out}}
        return given | ({"token_type_ids": shown.int()} if self.vision.marks_kinds else {})

    def owners(self, ids: Sequence[int], images: Sequence[Image]) -> Any:
        """(T,) which of its ``images`` each of a row's ids stands for; -1: none.

        Raises:
            ModelError: it has more or fewer placeholders than its pictures have tokens.
        """
        import numpy as np

        marks = np.array(ids) == self.vision.placeholder
        sizes = [self.vision.size(image) for image in images]
        if sum(sizes) != marks.sum():
            raise ModelError(
                f"a row holds {marks.sum()} placeholders, but its {len(images)} images are "
                f"{sum(sizes)} tokens to the model"
            )
        found = np.full(len(ids), -1)
        found[marks] = np.repeat(np.arange(len(images)), sizes)
        return found

    def whole_from(self, ids: Tensor, images: Sequence[Sequence[Image]], column: int) -> int:
        """The last column up to that one at which no row of (B, T) ``ids`` is in a picture."""
        marks = ids == self.vision.placeholder
        # How many placeholders may follow: those of the last picture, of the last two, and so on.
        whole = [
            {0, *accumulate(self.vision.size(image) for image in reversed(row))} for row in images
        ]
        while column:
            after: list[int] = marks[:, column:].sum(1).tolist()
            if all(count in mine for count, mine in zip(after, whole, strict=True)):
                break
            column -= 1
        return column

    def given(
        self,
        ids: Tensor,
        images: Sequence[Sequence[Image]],
        real: Tensor | None = None,
        read: int | None = None,
    ) -> dict[str, Any]:
        """``arguments``, and ``position_ids`` where they are not those of text."""
        import torch

        found = self.arguments(ids, images, read)
        if self.winds and any(images):
            real = torch.ones_like(ids, dtype=torch.bool) if real is None else real
            positions = self.positions(ids, real, images)
            found["position_ids"] = positions[..., -read:] if read else positions
        return found

    def positions(self, ids: Tensor, real: Tensor, images: Sequence[Sequence[Image]]) -> Tensor:
        """(B, T), or (3, B, T) for models whose pictures have rows and columns.

        ``real``: (B, T) bool, which columns are no padding.
        """
        import torch

        if not self.winds:
            return (real.cumsum(1) - 1).clamp(min=0)
        grids = [self.vision.grid(image) for row in images for image in row]
        kinds = (ids == self.vision.placeholder).int()
        found, _ = self._inner.get_rope_index(
            ids,
            kinds,
            image_grid_thw=torch.tensor(grids, device=ids.device) if grids else None,
            attention_mask=real.int(),
        )
        return found


def _flat(features: Any) -> Tensor:
    """(T, D), of all pictures one after another."""
    import torch

    whole = torch.cat([*features]) if isinstance(features, list | tuple) else features
    return whole.reshape(-1, whole.shape[-1])


def _output(tokens: Any, deeper: list[list[Tensor]]) -> Any:
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    out: Any = BaseModelOutputWithPooling(pooler_output=tokens)
    if deeper:
        out.deepstack_features = deeper
    return out
