"""An episode as a conversation: what was seen is the user's turn, what was answered the model's."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from ..core.config import Config, Shot, Variables
from ..core.files import canonical_json
from ..core.types import Image, Message, Observation, Step, Task

GONE = "(a picture that was shown here)\n"
"""Stands for one that is shown no more."""


class ConversationConfig(Config):
    """What of an episode the model sees."""

    window: int | None = Field(default=None, ge=1)
    """How many turns of the task at hand the model sees, the present one included: the task, then
    the last ``window - 1`` answers and what they came to. None shows all. (RISE uses 2.)"""
    images: int | None = Field(default=None, ge=0)
    """The most pictures that the model sees, the newest ones; words stand for those before. None
    shows all. Each time one is left out, the conversation begins otherwise: that turn is read anew,
    and is a row of its own to the learner."""
    list_actions: bool = True
    """Show the actions that a world lists, below what it says."""
    most_actions: int = Field(default=100, ge=1)
    """The most actions of a list to show: the first ones, and how many more there are. Those can be
    done, too."""
    template: Variables = Field(default_factory=dict)
    """The chat template's own variables, such as ``enable_thinking: false``."""


class ShownConfig(ConversationConfig):
    """The same of an agent that is shown how it is done."""

    shots: int = Field(default=0, ge=0, le=64)
    """How many training tasks to show, done by the world's expert, before the one at hand."""
    examples: tuple[Shot, ...] = ()
    """Those shots. A run fills them in, drawn by its seed, and its checkpoints keep them; or say
    them here. One of the very task at hand is left out."""


def sampled(step: Step) -> Message:
    """What the model answered then, as it was sampled."""
    completion = step.action.completion
    return Message("assistant", (completion.text,), completion.token_ids, completion.tokenizer)


def conversation(
    task: Task,
    history: Sequence[Step],
    observation: Observation,
    config: ConversationConfig,
    answered: Callable[[Step], Message] = sampled,
    seen_as: Literal["user", "tool"] = "user",
) -> list[Message]:
    """The task and its first observation, then in turn what was ``answered`` and seen.

    ``seen_as``: whose message an observation is that follows an action; after an answer that was
    none, it is always the user's.
    """
    seen = [step.observation for step in history] + [observation]
    texts = [shown(one.text, one.actions, config) for one in seen]
    # A cut window still opens with the first observation: it may hold the problem.
    answers = [k for k, step in enumerate(history) if not step.action.place]
    first = 0
    if config.window is not None and config.window <= len(answers):
        first = answers[1 - config.window] if config.window > 1 else len(history)
    messages = [Message("user", (*seen[0].images, opening(task.instruction, texts[0])))]
    for k in range(first, len(history)):
        if not history[k].action.place:
            messages.append(answered(history[k]))
        role = "user" if history[k].action.invalid else seen_as
        messages.append(Message(role, (*seen[k + 1].images, texts[k + 1])))
    return messages if config.images is None else newest(messages, config.images)


def newest(messages: Sequence[Message], most: int) -> list[Message]:
    """The same, with ``most`` of the pictures in them, the last ones, and words for the others."""
    seen: list[Message] = []
    for message in reversed(messages):
        parts: list[str | Image] = []
        for part in reversed(message.parts):
            parts.append(part if isinstance(part, str) or most > 0 else GONE)
            most -= not isinstance(part, str)
        seen.append(replace(message, parts=tuple(reversed(parts))))
    return seen[::-1]


def before(
    task: Task,
    config: ShownConfig,
    phrase: Callable[[str], str],
    seen_as: Literal["user", "tool"] = "user",
) -> list[Message]:
    """The tasks that were done, as conversations before that of ``task``.

    It is not shown itself: one more is known than is wanted, in case it is among them.
    """
    messages: list[Message] = []
    others = [shot for shot in config.examples if shot.task != task.id]
    for shot in others[: config.shots or len(others)]:
        for k, turn in enumerate(shot.turns):
            text = shown(turn.text, turn.actions, config)
            words = text if k else opening(shot.instruction, text)
            messages.append(Message(seen_as if k else "user", (words,)))
            messages.append(Message("assistant", (phrase(turn.action),)))
    return messages


def variables(given: Variables) -> str:
    """A chat template's variables as a prompt has them."""
    return canonical_json(given) if given else ""


def opening(instruction: str, text: str) -> str:
    """What is said first: the task, and what is seen."""
    return f"{instruction}\n{text}".strip()


def shown(text: str, actions: Sequence[str], config: ConversationConfig) -> str:
    """An observation in words."""
    if not (config.list_actions and actions):
        return text
    more = len(actions) - config.most_actions
    ending = f"; and {more} more" if more > 0 else ""
    return f"{text}\nActions: {'; '.join(actions[: config.most_actions])}{ending}".strip()
