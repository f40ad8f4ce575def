"""An episode as a conversation: what was seen is the user's turn, what was answered the model's."""

from collections.abc import Callable, Sequence

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
) -> list[Message]:
    """The task and its first observation, then in turn what was ``answered`` and seen.

    ``window``, ``list_actions``: as in ``chat``.
    """
    seen = [step.observation for step in history] + [observation]
    texts = [shown(one.text, one.actions, list_actions) for one in seen]
    # A cut window still opens with the first observation: it may hold the problem.
    first = 0 if window is None else max(0, len(history) - (window - 1))
    messages = [Message("user", (*seen[0].images, opening(task.instruction, texts[0])))]
    for k in range(first, len(history)):
        messages.append(answered(history[k]))
        messages.append(Message("user", (*seen[k + 1].images, texts[k + 1])))
    return messages


def opening(instruction: str, text: str) -> str:
    """What is said first: the task, and what is seen."""
    return f"{instruction}\n{text}".strip()


def shown(text: str, actions: Sequence[str], list_actions: bool) -> str:
    """An observation in words."""
    if not (list_actions and actions):
        return text
    return f"{text}\nActions: {'; '.join(actions)}".strip()
