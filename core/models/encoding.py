"""Text to token ids, as where it stands, and ids to text, while they come. Imports no torch."""

import copy
import json
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

OPENING = {
    ("Prepend", "prepend"): "",
    ("Metaspace", "prepend_scheme"): "never",
    ("ByteLevel", "add_prefix_space"): False,
    ("Strip", "strip_left"): False,
}
"""What a tokenizer does to the beginning of a text, or of what follows a special token: the part
of it that does so, its setting, and the value that leaves a beginning as it is."""
BYTE = re.compile("<0x[0-9A-F]{2}>")
"""A token that is one byte; a decoder reads those that stand together all at once."""
BEFORE = ("\n", "a", ".", "0")
"""Texts to stand before another; one of them does not grow together with it."""


class Encoder:
    """A tokenizer for the pieces of a conversation, which are put together as ids.

    Many put a space before the first word of a text, some also after each special token. A piece
    gets the ids that it has behind the token it follows, as if no token could reach across the
    border between them.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        # What is inside does the same at a fifth of the cost; a copy, which nobody else sets up.
        self._whole: Any = copy.deepcopy(getattr(tokenizer, "backend_tokenizer", None))
        if self._whole is not None:
            self._whole.no_truncation()
            self._whole.no_padding()
        self._inner: Any = _unopened(self._whole)
        """The same tokenizer if it treats beginnings as all else."""
        self._added = {i: one.content for i, one in tokenizer.added_tokens_decoder.items()}

    def __call__(self, text: str, after: int | None = None) -> tuple[int, ...]:
        """``after``: the token that the text follows; None if it begins everything."""
        if after is None or not text:
            return self._ids(text)
        if after in self._added:
            ids = self._ids(self._added[after] + text)
            if ids[:1] == (after,):  # Else the two together spell another token.
                return ids[1:]
        if self._whole is None:
            return self._behind_text(text)
        if self._inner is self._whole:
            return self._ids(text)
        found = self._whole.encode(text, add_special_tokens=False)
        first = next((k for k, i in enumerate(found.ids) if i in self._added), len(found.ids))
        head = text[: found.offsets[first][0]] if first < len(found.ids) else text
        inside: list[int] = self._inner.encode(head, add_special_tokens=False).ids
        return (*inside, *found.ids[first:])

    def _behind_text(self, text: str) -> tuple[int, ...]:
        for before in BEFORE:
            known, ids = self._ids(before), self._ids(before + text)
            if ids[: len(known)] == known:
                return ids[len(known) :]
        return self._ids(text)

    def _ids(self, text: str) -> tuple[int, ...]:
        if self._whole is not None:
            return tuple(self._whole.encode(text, add_special_tokens=False).ids)
        return tuple(self._tokenizer(text, add_special_tokens=False)["input_ids"])


def _unopened(tokenizer: Any) -> Any:
    """A fast tokenizer that does nothing to beginnings: itself if it never did, or a changed copy.

    Parts that are written in Python cannot tell their settings, and are left as they are.
    """
    changed = tokenizer
    for name in ("normalizer", "pre_tokenizer"):
        part: Any = getattr(tokenizer, name, None)
        try:
            settings: Any = json.loads(part.__getstate__()) if part is not None else {}
        except Exception:
            continue
        plain = _plain(settings)
        if plain != settings:
            if changed is tokenizer:
                changed = copy.deepcopy(tokenizer)
            part = copy.deepcopy(part)
            part.__setstate__(json.dumps(plain).encode())
            setattr(changed, name, part)
    return changed


def _plain(settings: Any) -> Any:
    """Of a normalizer or pre-tokenizer, and all that it is made of: with no ``OPENING``."""
    if isinstance(settings, list):
        return [_plain(one) for one in cast(list[Any], settings)]
    if not isinstance(settings, dict):
        return settings
    known = cast(dict[str, Any], settings)
    return {k: OPENING.get((known.get("type", ""), k), _plain(v)) for k, v in known.items()}


class Growing:
    """The text of ids that come one after another; each is decoded a few times, not all every time.

    What it says is what all of the ids together say: what is decoded anew begins where no character
    is cut in two, with some text before it, for decoders treat what stands first in another way.
    """

    def __init__(self, text: Callable[[Sequence[int]], str], piece: Callable[[int], str]) -> None:
        """``text``: of any ids. ``piece``: a token by itself; empty if no text shows it."""
        self._decode = text
        self._piece = piece
        self._clear()

    def _clear(self) -> None:
        self._begin = 0
        """Of what is decoded anew."""
        self._held: list[int] = []
        """Ids from there on whose text is known: it is the end of ``_settled``."""
        self._shown = 0
        """Characters that they alone make."""
        self._settled: list[str] = []
        self.settled = 0
        """Characters at the beginning of the text that ids to come leave as they are."""

    def __call__(self, ids: Sequence[int]) -> str:
        """``ids``: those of the last call and more; any others begin anew."""
        self._known(ids)
        before = "".join(self._settled)
        return before + self.since(ids)

    def since(self, ids: Sequence[int]) -> str:
        """The same but for what was settled before, in a time that does not grow with that."""
        middle = self._known(ids)
        text = self._decode(ids[self._begin :])
        new = text[self._shown :]
        piece = self._piece(ids[-1]) if new and not new.endswith("\ufffd") else ""
        if piece and not BYTE.fullmatch(piece):
            held = list(ids[middle:])
            self._begin, self._held, self._shown = middle, held, len(self._decode(held))
            self._settled.append(new)
            self.settled += len(new)
        return new

    def _known(self, ids: Sequence[int]) -> int:
        """How many of ``ids`` have a text that is known."""
        middle = self._begin + len(self._held)
        if list(ids[self._begin : middle]) == self._held:
            return middle
        self._clear()
        return 0
