"""A world's action grammar: from its tools, how a call is written, read, put in words, constrained.

A tool says how ``step`` wants a call written (``Tool.text``, arguments in braces); if it does not,
a call is ``name(argument=JSON, ...)``, arguments in the order of the tool's schema.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

from .files import canonical_json
from .types import Tool

DECODER = json.JSONDecoder()
HOLE = re.compile(r"\{(\w+)\}")
ANY = r"[^\n]+"
"""A text in a line."""
VALUES = {"integer": r"-?[0-9]{1,18}", "number": r"-?[0-9]{1,18}(\.[0-9]{1,18})?"}
"""What arguments of these types are written as in a text of a tool's own."""


class Call(NamedTuple):
    """A tool and what it is given."""

    name: str
    arguments: dict[str, Any]


def written(tool: Tool, arguments: Mapping[str, Any]) -> str:
    """The action's text. ``arguments`` are those that the tool's schema names."""
    if tool.text:
        return HOLE.sub(lambda hole: _plain(arguments.get(hole[1], "")), tool.text)
    given = ", ".join(f"{name}={_json(value)}" for name, value in arguments.items())
    return f"{tool.name}({given})"


def read_call(tools: Sequence[Tool], text: str) -> Call | None:
    """What ``text`` calls; None if it is written as no call of one of them."""
    for tool in tools:
        found = _holes(tool).fullmatch(text) if tool.text else None
        if found is not None:
            kinds = {name: _schema(tool, name).get("type") for name in found.groupdict()}
            return Call(
                tool.name,
                {
                    name: _typed(value, kinds[name])
                    for name, value in found.groupdict().items()
                    if value or name in _properties(tool)
                },
            )
        if not tool.text and text.startswith(f"{tool.name}(") and text.endswith(")"):
            arguments = _arguments(text[len(tool.name) + 1 : -1])
            if arguments is not None:
                return Call(tool.name, arguments)
    return None


def in_words(tool: Tool) -> str:
    """A tool in one line: how a call is written, and what for."""
    names = _properties(tool)
    form = HOLE.sub(r"<\1>", tool.text) or f"{tool.name}({', '.join(names)})"
    about = [
        f"{name}: {one['description']}"
        for name, one in names.items()
        if isinstance(one, dict) and "description" in one
    ]
    words = " ".join(part for part in (tool.description, "; ".join(about)) if part)
    return f"{form}: {words}" if words else form


def listed(actions: Sequence[str]) -> Tool:
    """The tool of a world that has none: one of its listed actions, or any text."""
    kind: dict[str, Any] = {"type": "string"} | ({"enum": [*actions]} if actions else {})
    schema = {"type": "object", "properties": {"action": kind}, "required": ["action"]}
    return Tool("act", "Do this in the world.", canonical_json(schema), "{action}")


def texts_grammar(tools: Sequence[Tool]) -> str:
    """Rules of a Lark grammar (as llguidance reads it): ``action`` is the text of a call."""
    rules: list[str] = []
    for k, tool in enumerate(tools):
        parts: list[str] = []
        if tool.text:
            for j, piece in enumerate(HOLE.split(tool.text)):
                if j % 2:
                    rules.append(f"A{k}_{j}: {regex_term(argument_regex(_schema(tool, piece)))}")
                    parts.append(f"A{k}_{j}")
                elif piece:
                    parts.append(_json(piece))
        else:
            given: list[str] = []
            needed = _parsed(tool.parameters).get("required", ())
            names = sorted(_properties(tool), key=lambda name: name not in needed)
            for j, name in enumerate(names):
                schema = canonical_json(tight(_schema(tool, name)))
                rules.append(f"a{k}_{j}: %json {schema}")
                given.append(f"{_json(', ' * bool(j) + name + '=')} a{k}_{j}")
            # What is left out may only be at the end, so that commas stand between.
            optional = given[len(needed) :]
            closing = f"({' ('.join(optional)}{')?' * len(optional)}" if optional else ""
            parts += [_json(f"{tool.name}("), *given[: len(needed)], closing, '")"']
        rules.append(f"t{k}: {' '.join(parts)}")
    choice = " | ".join(f"t{k}" for k in range(len(tools)))
    return "\n".join([*rules, f"action: {choice}"])


def regex_term(regex: str) -> str:
    """A terminal that matches ``regex``, in Lark."""
    return "/" + regex.replace("/", "\\/") + "/"


def argument_regex(schema: Mapping[str, Any]) -> str:
    """What an argument of a ``Tool.text`` may be."""
    if "enum" in schema:
        return "|".join(re.escape(_plain(one)).replace("\\ ", " ") for one in schema["enum"])
    if "pattern" in schema:
        return str(schema["pattern"]).removeprefix("^").removesuffix("$")
    return VALUES.get(str(schema.get("type")), ANY)


def tight(schema: Any) -> dict[str, Any]:
    """The same, without free white space, so that a constrained model cannot dwell in it."""
    return {
        **cast(dict[str, Any], schema),
        "x-guidance": {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "},
    }


@lru_cache(1024)
def _parsed(parameters: str) -> dict[str, Any]:
    return json.loads(parameters)


def _properties(tool: Tool) -> dict[str, Any]:
    return _parsed(tool.parameters).get("properties", {})


def _schema(tool: Tool, name: str) -> dict[str, Any]:
    found: Any = _properties(tool).get(name, {})
    return cast(dict[str, Any], found) if isinstance(found, dict) else {}


@lru_cache(1024)
def _holes(tool: Tool) -> re.Pattern[str]:
    pieces = [
        f"(?P<{piece}>.*)" if k % 2 else re.escape(piece)
        for k, piece in enumerate(HOLE.split(tool.text))
    ]
    return re.compile("".join(pieces), re.S)


def _arguments(text: str) -> dict[str, Any] | None:
    found: dict[str, Any] = {}
    at = 0
    while at < len(text):
        name = re.compile(r"\s*(\w+)\s*=\s*").match(text, at)
        if name is None:
            return None
        try:
            found[name[1]], at = DECODER.raw_decode(text, name.end())
        except ValueError:
            return None
        comma = re.compile(r"\s*(,|$)").match(text, at)
        if comma is None:
            return None
        at = comma.end()
    return found


def _typed(value: str, kind: Any) -> Any:
    if kind in ("integer", "number", "boolean"):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)
