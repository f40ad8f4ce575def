"""An agent that acts by calling functions, through the model's own template for them."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, cast

from ..core.actions import Call, listed, read_call, written
from ..core.config import Function
from ..core.files import canonical_json
from ..core.protocols import Briefing
from ..core.thoughts import thinks_still
from ..core.types import Constraint, Message, Observation, Parsed, Prompt, Step, Task, Tool
from .calls import Form, call_text, calls_grammar, read_calls
from .conversation import ShownConfig, before, conversation, sampled, variables

SHOWN = 80
"""Characters of a fault, or of a pattern, that the model is told."""


class ToolsConfig(ShownConfig):
    system: str = ""
    """A system message for every prompt; empty for none of the agent's."""
    form: Form = "hermes"
    """How calls are written that the model did not sample itself: in shots, in demonstrations, and
    under ``policy.constrain``. What it samples is read in every common form."""
    several: Literal["refuse", "first", "in_order"] = "refuse"
    """What becomes of an answer with several calls: it is invalid, the first one is played, or all
    are, one a step, until one cannot be read or the episode is over."""
    functions: tuple[Function, ...] = ()
    """What may be called. A run fills in what its world declares; of a world that declares nothing
    it is ``act(action)``, of its listed actions."""


class Tools:
    """The action is what the model's call of a function comes to.

    Functions are those that the world declares (``WorldSpec.tools``), given to the model's chat
    template; where that drops them, they stand in the system words (``core.models.tokens``). What
    the world answers comes as a function's result. A call must be of a known function, with
    arguments of its schema; anything else is no action, and the model is told why.
    """

    Config = ToolsConfig

    def __init__(self, config: ToolsConfig) -> None:
        self._config = config
        self._own = tuple(
            Tool(one.name, one.description, one.parameters, one.text) for one in config.functions
        )
        self._system = (Message("system", (config.system,)),) if config.system else ()

    @staticmethod
    def shots(config: ToolsConfig) -> int:
        """How many it wants to be told of; none if it was."""
        return 0 if config.examples else config.shots

    @staticmethod
    def briefed(config: ToolsConfig, briefing: Briefing) -> ToolsConfig:
        """The same, told of its world."""
        functions = config.functions or tuple(
            Function(
                name=tool.name,
                description=tool.description,
                parameters=tool.parameters,
                text=tool.text,
            )
            for tool in briefing.tools
        )
        examples = config.examples or briefing.shots
        return config.model_copy(update={"functions": functions, "examples": examples})

    def prompt(self, task: Task, history: Sequence[Step], observation: Observation) -> Prompt:
        config = self._config
        messages = [*self._system, *before(task, config, self.phrase, "tool")]
        messages += conversation(task, history, observation, config, sampled, "tool")
        # The list of a step would make of every prompt another; it stands in what is seen.
        tools = tuple(map(_offered, self._own or (listed(()),)))
        return Prompt(tuple(messages), tools, variables(config.template))

    def phrase(self, action: str) -> str:
        """The call that comes to ``action``: what ``parse`` reads as that."""
        call = read_call(self._own or (listed(()),), action)
        return call_text(call, self._config.form) if call else action

    def constraint(self, observation: Observation) -> Constraint:
        """One call, of its schema; where a world lists actions, of one of those."""
        tools = self._own or (listed(observation.actions),)
        return Constraint(grammar=_grammar(tools, self._config.form))

    def parse(self, text: str, observation: Observation) -> Parsed:
        tools = self._own or (listed(observation.actions),)
        if thinks_still(text):
            return Parsed("", "The thought did not end.")
        calls = read_calls(text, [tool.name for tool in tools])
        if not calls:
            return Parsed("", f"No call: call {_names(tools)}.")
        if len(calls) > 1 and self._config.several == "refuse":
            return Parsed("", f"{len(calls)} calls at once: make one a turn.")
        return _parsed(calls[0], tools)

    def parse_more(self, text: str, place: int, observation: Observation) -> Parsed | None:
        """The call at ``place`` of those in ``text``; None: there is none, or it is not played."""
        if self._config.several != "in_order":
            return None
        tools = self._own or (listed(observation.actions),)
        calls = read_calls(text, [tool.name for tool in tools])
        return _parsed(calls[place], tools) if place < len(calls) else None


def _parsed(call: Call, tools: Sequence[Tool]) -> Parsed:
    tool = next((tool for tool in tools if tool.name == call.name), None)
    if tool is None:
        return Parsed("", f"There is no {call.name[:SHOWN]!r}: call {_names(tools)}.")
    if fault := fault_of(call, tool):
        return Parsed("", f"{tool.name}: {fault}")
    return Parsed(written(tool, call.arguments))


@lru_cache(1 << 12)
def _offered(tool: Tool) -> Tool:
    """As models are told of it: without regular expressions that no model would read."""

    def short(schema: Any) -> Any:
        if not isinstance(schema, dict):
            return schema
        known = cast(dict[str, Any], schema)
        return {
            key: short(value)
            for key, value in known.items()
            if not (key == "pattern" and len(str(value)) > SHOWN)
        }

    parameters = canonical_json(short(json.loads(tool.parameters)))
    return Tool(tool.name, tool.description, parameters)


def fault_of(call: Call, tool: Tool) -> str:
    """What of the call is not of its function's schema; empty if all is."""
    error = next(_checker(tool.parameters).iter_errors(call.arguments), None)
    if error is None:
        return ""
    where = ".".join(map(str, error.absolute_path))
    return (f"{where}: " if where else "") + str(error.message)[:SHOWN]


@lru_cache(256)
def _checker(parameters: str) -> Any:
    import jsonschema

    return jsonschema.Draft202012Validator(json.loads(parameters))


@lru_cache(1 << 12)
def _grammar(tools: tuple[Tool, ...], form: Form) -> str:
    return calls_grammar(tools, form)


def _names(tools: Sequence[Tool]) -> str:
    return " or ".join(tool.name for tool in tools)
