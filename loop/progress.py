"""Tells listeners how it goes."""

from collections.abc import Generator
from contextlib import contextmanager
from itertools import chain, count

from ..core.types import Step
from .events import (
    Listener,
    Message,
    Note,
    StageAdvanced,
    StageBegan,
    StageEnded,
    Stepped,
    ignore,
)


class Progress:
    def __init__(self, listener: Listener = ignore) -> None:
        self.tell = listener
        self._noted: set[str] = set()
        self._open: set[str] = set()
        """The stages that are."""

    def say(self, text: str) -> None:
        self.tell(Message(text))

    def note(self, text: str) -> None:
        """Say ``text``, once however often it is noted."""
        if text not in self._noted:
            self._noted.add(text)
            self.tell(Note(text))

    @contextmanager
    def stage(self, name: str, total: int = 0, unit: str = "episodes") -> "Generator[Stage]":
        """``total``: how many units it has; 0: nobody counts.

        Of several of one name at a time, the later ones are numbered.
        """
        several = (f"{name} ({number})" for number in count(2))
        name = next(one for one in chain([name], several) if one not in self._open)
        self._open.add(name)
        self.tell(StageBegan(name, total, unit))
        try:
            yield Stage(name, self.tell)
        finally:
            self._open.remove(name)
            self.tell(StageEnded(name))


class Stage:
    """What is told of while it lasts."""

    def __init__(self, name: str, tell: Listener) -> None:
        self._name = name
        self._tell = tell
        self._steps = self._tokens = 0

    def advance(self, done: int) -> None:
        """``done``: how many of its units have ended so far."""
        self._tell(StageAdvanced(self._name, done))

    def stepped(self, step: Step) -> None:
        self._steps += 1
        self._tokens += len(step.action.completion.token_ids)
        self._tell(Stepped(self._name, self._steps, self._tokens))
