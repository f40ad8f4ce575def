"""Calls of functions in what a model says: read in the common forms, and written in one of them."""

import ast
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any, Literal, TypeAlias, cast

from ..core.actions import DECODER, Call, tight
from ..core.files import canonical_json
from ..core.thoughts import spoken
from ..core.types import Tool

Form: TypeAlias = Literal["hermes", "json", "mistral"]
"""How a call is written: Hermes' (also Qwen's, SmolLM's, Granite's), Llama 3's, Mistral's."""

AROUND: dict[Form, tuple[str, str, str]] = {
    "hermes": ("<tool_call>\n", "arguments", "\n</tool_call>"),
    "json": ("", "parameters", ""),
    "mistral": ("[", "arguments", "]"),
}
"""What stands before and after a call, and what the form calls its arguments."""
ARGUMENTS = ("arguments", "parameters", "args", "input")
PYTHON = re.compile(r"^\s*\[?\s*(\w+)\((.*?)\)\s*\]?\s*$", re.S)
"""A call in Python's syntax, as Gemma and Llama 3.2 write it."""
NAMED = re.compile(r"(?:function|to=functions\.|functions\.)\W*?(\w+)[^{\n]*(?:\n```json)?\s*$")
"""What stands before arguments that are alone in their JSON, as DeepSeek and GPT-OSS write them."""
LONGEST = 4000
"""Characters of arguments in Python's syntax, whose parser is not made for texts of strangers."""
FENCE = re.compile(r"```(?:tool_code|tool_call|python|json)?\s*\n(.*?)```", re.S)


def read_calls(text: str, tools: Sequence[str]) -> list[Call]:
    """All that ``text`` calls, in order, thoughts aside; of the functions named ``tools`` or any.

    Understood are JSON objects with a ``name`` and ``arguments`` (or ``parameters``), alone, in
    lists, in ``<tool_call>`` tags or after ``[TOOL_CALLS]``; arguments in JSON after the name of a
    function; and calls in Python's syntax with JSON's or Python's plain values.
    """
    said_aloud = spoken(text)
    found = list(_json_calls(said_aloud))
    return found or list(_python_calls(said_aloud, set(tools)))


def _json_calls(text: str) -> Iterator[Call]:
    at = text.find("{")
    while at >= 0:
        try:
            value, end = DECODER.raw_decode(text, at)
        except (ValueError, RecursionError):
            at = text.find("{", at + 1)
            continue
        call = _call_of(value)
        named = NAMED.search(text[:at]) if call is None else None
        if call is not None:
            yield call
        elif named is not None:
            yield Call(named[1], value)
        at = text.find("{", end)


def _call_of(value: Any) -> Call | None:
    if not isinstance(value, dict):
        return None
    known = cast(dict[str, Any], value)
    if isinstance(known.get("function"), dict):
        known = cast(dict[str, Any], known["function"])
    name = known.get("name")
    given = next((known[key] for key in ARGUMENTS if key in known), None)
    if isinstance(given, str):
        try:
            given = json.loads(given)
        except ValueError:
            return None
    if not isinstance(name, str) or not isinstance(given, dict):
        return None
    return Call(name, cast(dict[str, Any], given))


def _python_calls(text: str, tools: set[str]) -> Iterator[Call]:
    fenced = FENCE.findall(text)
    for line in fenced or text.splitlines():
        match = PYTHON.match(line.strip())
        if match is None or (tools and match[1] not in tools):
            continue
        arguments = _keywords(match[2])
        if arguments is not None:
            yield Call(match[1], arguments)


def _keywords(text: str) -> dict[str, Any] | None:
    if len(text) > LONGEST:
        return None
    try:
        call = ast.parse(f"f({text})", mode="eval").body
        if not isinstance(call, ast.Call) or call.args:
            return None
        return {str(one.arg): ast.literal_eval(one.value) for one in call.keywords}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def call_text(call: Call, form: Form) -> str:
    """``call`` as a model of that form writes it."""
    before, arguments, after = AROUND[form]
    name, given = (json.dumps(one, ensure_ascii=False) for one in call)
    return f'{before}{{"name": {name}, "{arguments}": {given}}}{after}'


def calls_grammar(tools: Sequence[Tool], form: Form) -> str:
    """In Lark, as llguidance reads it: exactly one call, of a function and of its schema."""
    before, arguments, after = (json.dumps(one) for one in AROUND[form])
    rules: list[str] = []
    for k, tool in enumerate(tools):
        head = json.dumps(f'{{"name": {json.dumps(tool.name)}, {arguments}: ')
        rules.append(f'c{k}: {head} a{k} "}}"')
        schema = {"type": "object", **json.loads(tool.parameters)}
        rules.append(f"a{k}: %json {canonical_json(tight(schema))}")
    choice = " | ".join(f"c{k}" for k in range(len(tools)))
    around = [f"({choice})", *([after] if after != '""' else [])]
    lead = [before] if before != '""' else []
    return "\n".join([f"start: {' '.join([*lead, *around])}", *rules])
