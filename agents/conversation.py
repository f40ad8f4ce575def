"""An episode as a conversation: what was seen is the user's turn, what was answered the model's."""

from collections.abc import Callable, Sequence
from typing import Literal

from ..core.config import Shot, Variables
from ..core.files import canonical_json
from ..core.types import Message, Observation, Step, Task


def sampled(step: Step) -> Message:
    """What the model answered then, as it was sampled."""
    completion = step.action.completion
    return Message("assistant", (completion.text,), completion.token_ids, completion.tokenizer)


def conversation(
    task: Task,
    history: Sequence[Step],
    observation: Observation,
    window: int | None,
    list_actions: bool,
    answered: Callable[[Step], Message] = sampled,
    seen_as: Literal["user", "tool"] = "user",
) -> list[Message]:
    """The task and its first observation, then in turn what was ``answered`` and seen.

    ``window``, ``list_actions``: as in ``chat``. ``seen_as``: whose message an observation is that
    follows an action; after an answer that was none, it is always the user's.
    """
    seen = [step.observation for step in history] + [observation]
    texts = [shown(one.text, one.actions, list_actions) for one in seen]
    # A cut window still opens with the first observation: it may hold the problem.
    first = 0 if window is None else max(0, len(history) - (window - 1))
    messages = [Message("user", (*seen[0].images, opening(task.instruction, texts[0])))]
    for k in range(first, len(history)):
        messages.append(answered(history[k]))
        role = "user" if history[k].action.invalid else seen_as
        messages.append(Message(role, (*seen[k + 1].images, texts[k + 1])))
    return messages


def before(
    task: Task,
    examples: Sequence[Shot],
    count: int,
    phrase: Callable[[str], str],
    list_actions: bool,
    seen_as: Literal["user", "tool"] = "user",
) -> list[Message]:
    """``count`` tasks that were done, or all if 0, as conversations before that of ``task``.

    It is not shown itself: one more is known than is wanted, in case it is among them.
    """
    messages: list[Message] = []
    others = [shot for shot in examples if shot.task != task.id]
    for shot in others[: count or len(others)]:
        for k, turn in enumerate(shot.turns):
            text = shown(turn.text, turn.actions, list_actions)
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


def shown(text: str, actions: Sequence[str], list_actions: bool) -> str:
    """An observation in words."""
    if not (list_actions and actions):
        return text
    return f"{text}\nActions: {'; '.join(actions)}".strip()
