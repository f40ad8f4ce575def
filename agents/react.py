"""An agent for pretrained models: told how to answer, shown how it is done, read by one rule.

Thoughts and actions take turns, as in ReAct (Yao et al. 2022, arXiv:2210.03629). Departures: shots
are those of a world's own expert, which has actions but no thoughts; what the world shows comes as
the user's turn, not as a line of the same text.
"""

import json
import re
from collections.abc import Sequence

from ..core.actions import in_words, texts_grammar
from ..core.protocols import Briefing
from ..core.thoughts import spoken, thinks_still
from ..core.types import Constraint, Message, Observation, Parsed, Prompt, Step, Task
from .conversation import ShownConfig, before, conversation, sampled, variables

MARK = "Action:"
"""What the line of the action begins with."""
SHOWN = 80
"""Characters of an action that an answer to it repeats."""


class ReactConfig(ShownConfig):
    system: str | None = None
    """The system message; None: words made here, of what the world says may be done and of how to
    answer. Empty: none."""
    thoughts: bool = False
    """Ask for a thought before each action, in words. What stands in ``<think>`` tags is a thought
    whether asked for or not."""
    keep_thoughts: bool = True
    """Whether the model sees what it thought in earlier turns. If not, those turns are its action
    alone, and a conversation is several rows to the learner."""
    tools: tuple[str, ...] = ()
    """What may be done, a line each. A run fills in what its world declares."""
    grammar: str = ""
    """What a text of these tools may be, in Lark, with a rule ``action``, for ``policy.constrain``.
    A run fills it in."""


class React:
    """The action is what follows ``Action:`` on the first line that begins so, thoughts aside.

    Thoughts are all before the last ``</think>``, and all lines before that one. Where a world
    lists actions it must be one of them, whatever its case and spaces. A completion without such a
    line, or with a ``<think>`` that does not end, is no action; the model is told why.
    """

    Config = ReactConfig

    def __init__(self, config: ReactConfig) -> None:
        self._config = config
        words = instructions(config) if config.system is None else config.system
        self._system = (Message("system", (words,)),) if words else ()

    @staticmethod
    def shots(config: ReactConfig) -> int:
        """How many it wants to be told of; none if it was."""
        return 0 if config.examples else config.shots

    @staticmethod
    def briefed(config: ReactConfig, briefing: Briefing) -> ReactConfig:
        """The same, told of its world."""
        examples = config.examples or briefing.shots
        tools = config.tools or tuple(map(in_words, briefing.tools))
        grammar = config.grammar or (texts_grammar(briefing.tools) if briefing.tools else "")
        return config.model_copy(update={"examples": examples, "tools": tools, "grammar": grammar})

    def prompt(self, task: Task, history: Sequence[Step], observation: Observation) -> Prompt:
        config = self._config
        messages = [*self._system, *before(task, config, self.phrase)]
        messages += conversation(task, history, observation, config, self._answered)
        return Prompt(tuple(messages), template=variables(config.template))

    def _answered(self, step: Step) -> Message:
        if self._config.keep_thoughts or step.action.invalid:
            return sampled(step)
        return Message("assistant", (self.phrase(step.action.text),))

    def phrase(self, action: str) -> str:
        """How the agent says an action: what ``parse`` reads as that."""
        return f"{MARK} {action}"

    def constraint(self, observation: Observation) -> Constraint | None:
        """Only what ``parse`` reads an action in; with ``thoughts``, after a line of one."""
        lead = json.dumps(f"{MARK} ")
        if not (observation.actions or self._config.grammar):
            action = "action: /[^\\n]+/"
        elif self._config.thoughts or not observation.actions:
            quoted = (json.dumps(one, ensure_ascii=False) for one in observation.actions)
            listed = f"action: {' | '.join(quoted)}"
            action = listed if observation.actions else self._config.grammar
        else:
            return Constraint(tuple(map(self.phrase, observation.actions)))
        thought = 'THOUGHT "\\n"' if self._config.thoughts else ""
        rules = f"start: {thought} {lead} action\n{action}"
        return Constraint(grammar=rules + ("\nTHOUGHT: /[^\\n]+/" if thought else ""))

    def parse(self, text: str, observation: Observation) -> Parsed:
        if thinks_still(text):
            return Parsed("", "The thought did not end.")
        found = re.search(rf"^[ \t]*{MARK}(.*)$", spoken(text), re.M | re.I)
        if found is None:
            return Parsed("", f"No action: begin a line with {MARK!r}.")
        action = found[1].strip()
        if not action:
            return Parsed("", f"No action: nothing follows {MARK!r}.")
        if not observation.actions or action in observation.actions:
            return Parsed(action)
        alike = [one for one in observation.actions if _plain(one) == _plain(action)]
        if len(alike) == 1:
            return Parsed(alike[0])
        return Parsed("", f"{action[:SHOWN]!r} is none of the listed actions.")


def instructions(config: ReactConfig) -> str:
    """What a model is told first."""
    lines = ["You act in a world, one action a turn, until the task is done."]
    if config.tools:
        lines += ["You can do this:", *(f"- {tool}" for tool in config.tools)]
    if config.thoughts:
        lines.append("First write what you think, in one line.")
        lines.append(f"Then write {MARK} and the action, in a line of its own.")
    else:
        lines.append(f"Answer with one line: {MARK} and the action.")
    return "\n".join(lines)


def _plain(action: str) -> str:
    return " ".join(action.lower().strip(" .").split())
