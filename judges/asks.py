"""What judges that ask a model share: how they find it, and what it is shown of an answer."""

import re
from collections.abc import Awaitable, Callable, Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import Field

from ..core.errors import JudgeError
from ..core.protocols import Policy
from ..core.types import Image, Trajectory

LONGEST = 4000
"""Characters of an answer that a judge gets to see."""


Images: TypeAlias = Annotated[int, Field(ge=0)]
"""How many pictures a judge is shown."""


class Asks:
    """What judges that ask a model have in common: the run tells them where to find it."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._open: Callable[[str], Awaitable[Policy]] | None = None

    def ask_through(self, open: Callable[[str], Awaitable[Policy]]) -> None:
        self._open = open

    async def policy(self) -> Policy:
        """Raises: JudgeError: nobody said where to find it."""
        if self._open is None:
            raise JudgeError(f"nobody told the judge where to find {self._model!r}: ask_through")
        return await self._open(self._model)


def answer_of(trajectory: Trajectory) -> str:
    """What the last action answers, as the world reads it; its own text in most worlds."""
    if not trajectory.steps:
        return ""
    last = trajectory.steps[-1]
    return last.action.text if last.answer is None else last.answer


def seen_by(trajectory: Trajectory, most: int) -> tuple[Image, ...]:
    """The pictures that were seen last: what the last answer is about. At most ``most``."""
    for step in reversed(trajectory.steps):
        if step.observation.images:
            return step.observation.images[-most:] if most else ()
    return ()


def illustrated(words: str, images: Sequence[Image], text: str) -> tuple[str | Image, ...]:
    """The parts of a message: ``words``, the pictures, ``text``."""
    return (f"{words}\n\n", *images, text) if images else (words + text,)


def cleaned(text: str, keep: Literal["begin", "end"] = "begin") -> str:
    """One's own words only: no control characters, no tags, no marks, no verdicts.

    At most ``LONGEST`` characters: of what happened, the end tells more than the beginning.
    """
    text = "".join(c if c.isprintable() or c == "\n" else " " for c in text)
    text = re.sub(r"<[^<>\n]*>|\[\[.*?\]\]|<<<|>>>", " ", text)
    text = re.sub(r"(?i)\b(verdict|score)\s*[:=]", r"\1 ", text)
    text = text.strip()
    return (text[:LONGEST] if keep == "begin" else text[-LONGEST:]).strip()
