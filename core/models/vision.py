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
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from ..errors import ModelError, PromptError
from ..images import STORE
from ..types import Image
from .tokens import ChatTokens

if TYPE_CHECKING:
    from torch import Tensor
else:
    Tensor: TypeAlias = Any

REMEMBERED = 1 << 28
"""Bytes of features that are kept."""


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

    def __init__(self, processor: Any, placeholder: int) -> None:
        self._processor = processor
        self.mark: str = processor.image_token
        """What a chat template writes for a picture."""
        self.placeholder = placeholder
        """The id of each token that a picture's features stand in for."""
        self.marks_kinds = "token_type_ids" in processor.model_input_names
        """Whether the model is told which tokens are a picture's: they see one another."""
        # As the processor itself would be called.
        settings = processor._merge_kwargs(
            processor.valid_processor_kwargs, tokenizer_init_kwargs={}
        )
        self._settings: dict[str, Any] = settings["images_kwargs"]
        self._token: str = processor.tokenizer.convert_ids_to_tokens(self.placeholder)
        self._words: dict[str, str] = {}
        self._same: dict[str, str] = {}

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
        words = [*map(self.words, images), ""]
        return "".join(part + word for part, word in zip(parts, words, strict=True))

    def words(self, image: Image) -> str:
        """What stands for a picture in the prompt."""
        if image.sha256 not in self._words:
            words = self._read(image)[1]
            # Most are those of another one: they are long, and kept once.
            self._words[image.sha256] = self._same.setdefault(words, words)
        return self._words[image.sha256]

    def size(self, image: Image) -> int:
        """Tokens that its features stand in for."""
        return self.words(image).count(self._token)

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
        words = processor.replace_image_token(found, 0)
        unused = {*processor.unused_input_names, "rows", "cols"}
        return {k: v for k, v in found.items() if k not in unused}, words

    def save(self, folder: Path) -> None:
        """Write all that ``open_vision`` reads beside the model's config."""
        self._processor.save_pretrained(folder)


def open_vision(model: str, config: Any, tokenizer: Any) -> tuple[Vision, Any]:
    """What a model's processor knows of pictures, and its tokenizer.

    Videos are left out: their part of a processor wants libraries that nothing else does.
    """
    import transformers
    from transformers.models.auto import processing_auto

    hf: Any = transformers
    images: Any = hf.AutoImageProcessor
    known: Any = processing_auto
    kind: Any = getattr(hf, known.PROCESSOR_MAPPING_NAMES[config.model_type])
    settings, _ = kind.get_processor_dict(model)
    parts: dict[str, Any] = {
        "image_processor": images.from_pretrained(model),
        "tokenizer": tokenizer,
        "video_processor": None,
    }
    wanted = kind.get_attributes()
    if others := [name for name in wanted if name not in parts]:
        raise ModelError(f"{kind.__name__} wants {', '.join(others)}, which nothing here knows")
    silent = type(kind.__name__, (_WithoutVideo, kind), {})
    settings = {k: one for k, one in settings.items() if k not in parts}
    processor = silent.from_args_and_dict([parts[name] for name in wanted], settings)
    if not getattr(tokenizer, "chat_template", None):
        tokenizer.chat_template = processor.chat_template
    return Vision(processor, config.image_token_id), tokenizer


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
        self._grids: dict[str, Tensor] = {}
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

    def features(self, images: Sequence[Image]) -> list[Features]:
        """Of each picture; equal ones are looked at once."""
        found = {
            image.sha256: self._known[image.sha256]
            for image in images
            if image.sha256 in self._known
        }
        new = {one.sha256: one for one in images if one.sha256 not in found}
        found |= self._looked([*new.values()])
        return [found[image.sha256] for image in images]

    def _looked(self, images: Sequence[Image]) -> dict[str, Features]:
        """Those of one size are looked at together."""
        import torch

        alike: dict[Any, list[tuple[Image, dict[str, Tensor]]]] = {}
        for image in images:
            tensors = self.vision.tensors(image)
            shapes = tuple((key, *value.shape) for key, value in sorted(tensors.items()))
            alike.setdefault(shapes, []).append((image, tensors))
        found: dict[str, Features] = {}
        device = self.device
        for several in alike.values():
            given = {
                key: torch.cat([tensors[key] for _, tensors in several]).to(device)
                for key in several[0][1]
            }
            out = self._inner.get_image_features(**given, return_dict=True)
            self._listed = isinstance(out.pooler_output, list | tuple)
            if not self._listed and out.pooler_output.dim() == 3:
                self._block = out.pooler_output.shape[1]
            whole = _flat(out.pooler_output)
            deeper = [_flat(one) for one in getattr(out, "deepstack_features", None) or ()]
            for k, (image, tensors) in enumerate(several):
                own = [one.chunk(len(several))[k] for one in (whole, *deeper)]
                found[image.sha256] = one = Features(own[0], tuple(own[1:]))
                if "image_grid_thw" in tensors:
                    self._grids[image.sha256] = tensors["image_grid_thw"]
                if self._limit:
                    self._known[image.sha256] = one
        while self._known and sum(one.nbytes for one in self._known.values()) > self._limit:
            self._known.popitem(last=False)
        return found

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
        features = [self.features(row) for row in images]
        for k, (row, mine) in enumerate(zip(marks, features, strict=True)):
            tokens, wanted = int(row.sum()), sum(len(one.tokens) for one in mine)
            if tokens != wanted:
                raise ModelError(
                    f"row {k} holds {tokens} placeholders, but its {len(mine)} images are "
                    f"{wanted} tokens to the model"
                )
        shown = marks[:, -read:] if read else marks
        # Of what was read before, nothing is given again.
        counts = [int(row.sum()) for row in shown]
        if not sum(counts):
            return {}

        def last(of: Sequence[Sequence[Tensor]]) -> Tensor:
            parts = [
                torch.cat([*row])[-count:] for row, count in zip(of, counts, strict=True) if count
            ]
            return torch.cat(parts)

        tokens = last([[one.tokens for one in row] for row in features])
        if self._block:
            tokens = tokens.unflatten(0, (-1, self._block))
        levels = max((len(one.deeper) for row in features for one in row), default=0)
        out: Any = _output(
            [tokens] if self._listed else tokens,
            [
                [last([[one.deeper[level] for one in row] for row in features])]
                for level in range(levels)
            ],
        )
        given: dict[str, Any] = {"mm_encoder_outputs": {"image": out}}
        return given | ({"token_type_ids": shown.int()} if self.vision.marks_kinds else {})

    def whole_from(self, ids: Tensor, column: int) -> int:
        """The last column up to that one at which no row of (B, T) ``ids`` is in a picture."""
        marks = ids == self.vision.placeholder
        while column and (marks[:, column - 1] & marks[:, column]).any():
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
        every = [image for row in images for image in row]
        self.features(every)
        grids = [self._grids[image.sha256] for image in every]
        kinds = (ids == self.vision.placeholder).int()
        found, _ = self._inner.get_rope_index(
            ids,
            kinds,
            image_grid_thw=torch.cat(grids).to(ids.device) if grids else None,
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
