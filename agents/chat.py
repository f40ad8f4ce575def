"""An agent that talks: the task first, then what the world said and the model answered, in turn."""

from collections.abc import Sequence

from pydantic import Field

from ..core.config import Config
from ..core.types import Message, Observation, Parsed, Prompt, Step, Task


class ChatConfig(Config):
    system: str = ""
    """A system message for every prompt; empty for none."""
    window: int | None = Field(default=None, ge=1)
    """How many turns the model sees, the present one included: the task, then the last
    ``window - 1`` attempts with their answers. None shows all. (RISE uses 2.)"""
    list_actions: bool = True
    """Show every action that a world lists, below what it says."""


class Chat:
    """Completion and action are the same text; what a model thinks aloud is the world's to read.

    Prompts only ever grow at their end (unless ``window`` cuts them), so a whole episode is one
    row of tokens to the learner.
    """

    Config = ChatConfig

    def __init__(self, config: ChatConfig) -> None:
        self._config = config

    def prompt(self, task: Task, history: Sequence[Step], observation: Observation) -> Prompt:
        messages = [Message("system", (self._config.system,))] if self._config.system else []
        seen = [step.observation for step in history] + [observation]
        window = self._config.window
        # A cut window still opens with the first observation: it may hold the problem.
        first = 0 if window is None else max(0, len(history) - (window - 1))
        opening = f"{task.instruction}\n{self._shown(seen[0])}".strip()
        messages.append(Message("user", (*seen[0].images, opening)))
        for k in range(first, len(history)):
            completion = history[k].action.completion
            messages.append(
                Message("assistant", (completion.text,), completion.token_ids, completion.tokenizer)
            )
            messages.append(Message("user", (*seen[k + 1].images, self._shown(seen[k + 1]))))
        return Prompt(tuple(messages))

    def _shown(self, observation: Observation) -> str:
        if not (self._config.list_actions and observation.actions):
            return observation.text
        return f"{observation.text}\nActions: {'; '.join(observation.actions)}".strip()

    def parse(self, text: str, observation: Observation) -> Parsed:
        return Parsed(text.strip())
