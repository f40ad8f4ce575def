"""An agent that talks: the task first, then what the world said and the model answered, in turn."""

from collections.abc import Sequence

from ..core.types import Message, Observation, Parsed, Prompt, Step, Task
from .conversation import ConversationConfig, conversation, variables


class ChatConfig(ConversationConfig):
    system: str = ""
    """A system message for every prompt; empty for none."""


class Chat:
    """Completion and action are the same text; what a model thinks aloud is the world's to read.

    Prompts only ever grow at their end (unless ``window`` cuts them), so a whole episode is one
    row of tokens to the learner.
    """

    Config = ChatConfig

    def __init__(self, config: ChatConfig) -> None:
        self._config = config

    def prompt(self, task: Task, history: Sequence[Step], observation: Observation) -> Prompt:
        config = self._config
        system = [Message("system", (config.system,))] if config.system else []
        turns = conversation(task, history, observation, config)
        return Prompt((*system, *turns), template=variables(config.template))

    def parse(self, text: str, observation: Observation) -> Parsed:
        return Parsed(text.strip())
