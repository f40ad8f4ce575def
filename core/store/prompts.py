"""The prompts of an episode as what is new in each.

A chat agent shows its whole history at every turn. Each prompt is kept as the number of messages
that it begins with like the one before it *of the same actor*, and the rest; where several act, one
another's prompts have little in common. A prompt that is empty (nobody was asked) is none before.
"""

from collections.abc import Sequence

from ..types import Message, Prompt, Step, Tool
from .schema import PromptRow

NOBODY = Prompt()


def shared(steps: Sequence[Step]) -> list[PromptRow | None]:
    """The prompts of a whole episode."""
    before: dict[str, Prompt] = {}
    rows: list[PromptRow | None] = []
    for step in steps:
        prompt = step.action.prompt
        if prompt == NOBODY:
            rows.append(None)
            continue
        actor = step.observation.actor
        last = before.get(actor)
        count = _common(last.messages, prompt.messages) if last else 0
        tools = None if last and last.tools == prompt.tools else prompt.tools
        rows.append(PromptRow(count, prompt.messages[count:], tools, prompt.template))
        before[actor] = prompt
    return rows


class Unfolder:
    """Makes the prompts of one episode whole again; what they have in common is there once."""

    def __init__(self) -> None:
        self._before: dict[str, Prompt] = {}

    def whole(self, actor: str, row: PromptRow | None) -> Prompt:
        """The next one.

        Raises:
            ValueError: it goes on from what was never said.
        """
        if row is None:
            return NOBODY
        last = self._before.get(actor, NOBODY)
        if not 0 <= row.shared <= len(last.messages) or (
            row.tools is None and actor not in self._before
        ):
            raise ValueError(f"prompt: shares {row.shared} messages with one that has not as many")
        messages: tuple[Message, ...] = (*last.messages[: row.shared], *row.messages)
        tools: tuple[Tool, ...] = last.tools if row.tools is None else row.tools
        self._before[actor] = prompt = Prompt(messages, tools, row.template)
        return prompt


def _common(one: tuple[Message, ...], other: tuple[Message, ...]) -> int:
    for count, (this, that) in enumerate(zip(one, other, strict=False)):
        if this is not that and this != that:
            return count
    return min(len(one), len(other))
