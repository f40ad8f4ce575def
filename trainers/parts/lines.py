"""Files of JSON lines that somebody wrote: feedback, conversations."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ...core.files import read_words
from ...core.types import Completion, Example, Message, Prompt

T = TypeVar("T")
BLANK = " \t\r"
"""White space of JSON within a line."""


def read_lines(path: Path, read: Callable[[Any], T], what: str) -> list[T]:
    """What ``read`` makes of each line that is not blank.

    A line ends where its line feed stands: JSON may hold other line separators as they are.

    Raises:
        ValueError: listing every line that is no JSON or that ``read`` refuses, or there is none.
    """
    found: list[T] = []
    faults: list[str] = []
    for number, text in enumerate(read_words(path).split("\n"), 1):
        if not text.strip(BLANK):
            continue
        try:
            found.append(read(json.loads(text)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            faults.append(f"line {number}: {'.'.join(map(str, first['loc']))}: {first['msg']}")
        except ValueError as error:
            faults.append(f"line {number}: {error}")
    if faults or not found:
        raise ValueError(f"{path}: {'; '.join(faults) or f'there is no {what} in it'}")
    return found


class Said(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str = Field(min_length=1)


class Conversation(BaseModel):
    """A line ``{"messages": [{"role": "user", "content": "..."}, ...]}``, of which the last one, an
    assistant's, is an answer to those before it."""

    model_config = ConfigDict(extra="forbid", strict=True)
    messages: list[Said] = Field(min_length=2)


def read_conversations(path: Path) -> list[Example]:
    """Raises: ValueError: listing every line that is no conversation."""
    return read_lines(path, _example, "conversation")


def _example(line: Any) -> Example:
    *before, last = Conversation.model_validate(line).messages
    if last.role != "assistant":
        raise ValueError(f"messages: the last one is of the {last.role}; wanted the assistant's")
    prompt = Prompt(tuple(Message(one.role, (one.content,)) for one in before))
    return Example(prompt, Completion(last.content))
