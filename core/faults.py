"""Checks values against a config class and says in plain words what is wrong with them."""

import json
import re
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar, cast, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from .checked import all_unicode
from .plugins import nearest
from .strict_yaml import KeyPath

M = TypeVar("M", bound=BaseModel)

_WANTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "bool_type": "true or false",
    "string_type": "text",
    "list_type": "a list",
    "tuple_type": "a list",
    "set_type": "a list",
    "frozen_set_type": "a list",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "dataclass_type": "a mapping",
    "none_required": "null",
    "greater_than": "a number above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "a number below {lt}",
    "less_than_equal": "at most {le}",
    "multiple_of": "a multiple of {multiple_of}",
    "literal_error": "{expected}",
    "enum": "{expected}",
    "too_short": "at least {min_length} items",
    "too_long": "at most {max_length} items",
    "string_too_short": "text of at least {min_length} characters",
    "string_too_long": "text of at most {max_length} characters",
    "string_pattern_mismatch": "text like {pattern}",
}
_PLAIN = {str: "text", int: "a whole number", float: "a number", bool: "true or false"}


def validate(
    model: type[M], values: Mapping[str, Any], also: Iterable[str] = ()
) -> tuple[M | None, list[tuple[KeyPath, str]]]:
    """``values`` as a ``model``, or None and each fault with its key path.

    Args:
        also: keys that may stand beside the model's own, to be named when one is misspelled.
    """
    half: list[tuple[KeyPath, str]] = []
    for key, value in values.items():
        try:
            all_unicode(value)
        except ValueError as error:
            half.append(((key,), str(error)))
    if half:
        return None, half
    try:
        # As JSON, so that a strict model takes a list for a tuple and text for a path or an enum.
        return model.model_validate_json(json.dumps(values)), []
    except ValidationError as error:
        alternatives: dict[KeyPath, list[ErrorDetails]] = {}
        for one in error.errors(include_url=False):
            alternatives.setdefault(_path(one, values), []).append(one)
    return None, [(path, _say(path, errors, model, also)) for path, errors in alternatives.items()]


def show(value: Any) -> str:
    """A value as the author of a recipe knows it."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return f"the text {value!r}" if len(value) <= 60 else f"the text {value[:57]!r}..."
    if isinstance(value, Mapping):
        return "a mapping"
    return "a list" if isinstance(value, list) else str(value)[:60]


def _path(error: ErrorDetails, values: Any) -> KeyPath:
    """Where in ``values`` an error lies: pydantic's location without the names of union members."""
    path: list[str | int] = []
    for part in error["loc"]:
        if isinstance(values, dict) and part in values:
            values = cast("dict[str | int, Any]", values)[part]
        elif isinstance(values, list) and isinstance(part, int):
            values = cast("list[Any]", values)[part]
        elif error["type"] != "missing" or part != error["loc"][-1]:
            continue
        path.append(part)
    return tuple(path)


def _say(
    path: KeyPath, errors: list[ErrorDetails], model: type[BaseModel], also: Iterable[str]
) -> str:
    error = errors[0]
    got = error["input"]
    if error["type"] == "missing":
        return f"missing; {_needed(path, model)}"
    if error["type"] == "extra_forbidden":
        known = {*_fields(path[:-1], model), *(also if len(path) == 1 else ())}
        return f"unknown key; {nearest(str(path[-1]), known)}"
    if error["type"] in ("value_error", "assertion_error"):
        message = error["msg"].split(", ", 1)[-1]
        return message if isinstance(got, Mapping) else f"{message}, got {show(got)}"
    wanted = " or ".join(dict.fromkeys(_wanted(one) for one in errors))
    return f"wanted {wanted}, got {_came(error)}{_advice(wanted, got)}"


def _wanted(error: ErrorDetails) -> str:
    template = _WANTED.get(error["type"])
    if template is None:
        return error["msg"].removeprefix("Input should be ").removeprefix("Value should be ")
    return template.format_map(error.get("ctx", {}))


def _came(error: ErrorDetails) -> str:
    count = error.get("ctx", {}).get("actual_length")
    return show(error["input"]) if count is None else str(count)


def _advice(wanted: str, got: Any) -> str:
    """What to write instead, where the slip is a common one."""
    if wanted == "true or false" and isinstance(got, str):
        word = {"yes": "true", "on": "true", "no": "false", "off": "false"}.get(got.lower())
        quoted = f"{got.lower()} without quotes" if got.lower() in ("true", "false") else word
        return f"; write {quoted}" if quoted else ""
    if wanted == "text" and isinstance(got, int | float):
        return "; put it in quotes"
    if wanted == "a list" and isinstance(got, str | int | float):
        return "; write [...] even for one item"
    if not isinstance(got, str):
        return ""
    if re.search(r"number|at least|at most", wanted) and re.fullmatch(r"[-+\d._eE]+", got):
        return "; write it plainly, without quotes or underscores"
    choices = re.findall(r"'([^']+)'", wanted)
    near = nearest(got, choices) if choices else ""
    return f"; {near}" if near.startswith("did") else ""


def _needed(path: KeyPath, model: type[BaseModel]) -> str:
    annotation = getattr(_fields(path[:-1], model).get(str(path[-1])), "annotation", None)
    plain = _PLAIN.get(annotation) if isinstance(annotation, type) else None
    return f"it has no default, give {plain}" if plain else "it has no default"


def _fields(path: KeyPath, model: type[BaseModel]) -> dict[str, Any]:
    """The fields, by the name a recipe uses, of whatever models may stand at ``path``."""
    models: list[type[BaseModel]] = [model]
    for part in path:
        if isinstance(part, str) and (
            inner := [
                one.model_fields[part].annotation for one in models if part in one.model_fields
            ]
        ):
            models = [found for annotation in inner for found in _models(annotation)]
    return {
        field.alias or name: field for one in models for name, field in one.model_fields.items()
    }


def _models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in _models(part)]
