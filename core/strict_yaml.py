"""YAML as recipes use it: YAML 1.2's scalars, no tags or anchors, and the line of every key."""
# pyright: reportUnknownMemberType=false, reportUnknownVariableType=false, reportUnknownArgumentType=false

import math
import re
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeAlias

import yaml
from yaml.composer import ComposerError
from yaml.reader import ReaderError

KeyPath: TypeAlias = tuple[str | int, ...]
_TAG = "tag:yaml.org,2002:"


@dataclass
class Document:
    value: Any = None
    """Mappings, lists, text, numbers, booleans and None; None if there is nothing."""
    lines: dict[KeyPath, int] = field(default_factory=dict[KeyPath, int])
    """Where each key, or item of a list, stands; the first line is 1."""
    faults: list[tuple[KeyPath, int, str]] = field(default_factory=list[tuple[KeyPath, int, str]])
    """Path, line and what is wrong. ``value`` leaves out what is at fault."""


def parse(text: str) -> Document:
    """Read one document. Never raises: what is wrong with it is in ``faults``."""
    document = Document()
    try:
        node = yaml.compose(text, Loader=_Loader)
        if node is not None:
            document.value = _build(node, (), document)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        message = ", ".join(part for part in (error.context, error.problem) if part)
        document.faults.append(((), mark.line + 1 if mark else 1, f"not valid YAML: {message}"))
    except ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        document.faults.append(((), line, f"not valid YAML: {error.reason}"))
    except RecursionError:
        document.faults.append(((), 1, "nested too deeply"))
    return document


class _Loader(yaml.SafeLoader):
    """Composes nodes. The parent reads YAML 1.1, where ``1e-5`` is text and ``no`` a boolean."""

    yaml_implicit_resolvers: ClassVar[dict[str, Any]] = {}  # pyright: ignore

    def compose_node(self, parent: Any, index: Any) -> Any:
        event: Any = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            message = "anchors and aliases are not supported; write the value out"
            raise ComposerError(None, None, message, event.start_mark)
        if getattr(event, "tag", None) is not None:
            message = f"the tag {event.tag!r} is not supported; leave it out"
            raise ComposerError(None, None, message, event.start_mark)
        return super().compose_node(parent, index)


for _name, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
):
    _Loader.add_implicit_resolver(_TAG + _name, re.compile(rf"(?:{_pattern})\Z"), _first)


def _build(node: yaml.Node, path: KeyPath, document: Document) -> Any:
    line = node.start_mark.line + 1
    document.lines.setdefault(path, line)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        items: list[yaml.Node] = node.value
        return [_build(item, (*path, index), document) for index, item in enumerate(items)]
    try:
        return _scalar(node)
    except (ValueError, OverflowError):
        document.faults.append((path, line, f"{str(node.value)[:40]} is too large a number"))
        return None


def _mapping(node: yaml.MappingNode, path: KeyPath, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    pairs: list[tuple[yaml.Node, yaml.Node]] = node.value
    for key_node, value_node in pairs:
        line = key_node.start_mark.line + 1
        key: Any = key_node.value
        if key_node.tag != _TAG + "str":
            what = key if isinstance(key_node, yaml.ScalarNode) else "a list or a mapping"
            document.faults.append((path, line, f"keys are text, got {what}; put it in quotes"))
        elif key in result:
            first = document.lines[*path, key]
            document.faults.append(
                ((*path, key), line, f"given twice, first on line {first}; keep one of them")
            )
        else:
            document.lines[*path, key] = line
            result[key] = _build(value_node, (*path, key), document)
    return result


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
    text: str = node.value
    match node.tag.removeprefix(_TAG):
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, 0) if text[:2] in ("0x", "0o") else int(text)
        case "float":
            number = float(text)
            if not math.isfinite(number):
                raise OverflowError(text)
            return number
        case _:
            return text
