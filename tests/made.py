"""What docs repeat of the code, made from it. ``python tests/made.py`` writes it into docs/*.md.

In a page it stands between ``<!-- made: WHAT -->`` and ``<!-- end -->``, where WHAT is one of:

    keys CLASS [BESIDE]   the fields of a config or a dataclass, as a table; without those that
                          another one has just so. Classes as ``module:Class``
    methods               the trainers, in the words of their docstrings
    metrics               the table of ``core.metrics``
    bench FILE            what ``bench-methods`` found, of benchmarks/results/FILE.json
"""

import ast
import inspect
import json
import re
import sys
import textwrap
import types
from collections.abc import Iterator
from dataclasses import MISSING, is_dataclass
from dataclasses import fields as data_fields
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple, Union, cast, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from selfwright.core.metrics import table
from selfwright.core.plugins import load, names
from selfwright.core.recipe import read, shipped
from selfwright.trainers.parts.credit import TrainerConfig
from selfwright.trainers.parts.group_relative import GroupConfig

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PART = re.compile(r"(<!-- made: (.+?) -->\n).*?(<!-- end -->)", re.DOTALL)


class Key(NamedTuple):
    name: str
    kind: str
    default: str
    words: str


def words_of(plugin: type[Any]) -> dict[str, str]:
    """The texts under the fields of a class and of what it derives from."""
    found: dict[str, str] = {}
    for one in reversed(plugin.__mro__):
        if not one.__module__.startswith("selfwright."):
            continue
        (body,) = ast.parse(textwrap.dedent(inspect.getsource(one))).body
        assert isinstance(body, ast.ClassDef)
        for line, after in zip(body.body, [*body.body[1:], None], strict=True):
            if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
                text = after.value if isinstance(after, ast.Expr) else None
                said = text.value if isinstance(text, ast.Constant) else ""
                if said or line.target.id not in found:
                    found[line.target.id] = " ".join(str(said).split())
    return found


def kind_of(kind: Any) -> str:
    """A type, in words."""
    inner, home = get_args(kind), get_origin(kind)
    if home is Literal:
        return ", ".join(f"`{one}`" for one in inner)
    if home in (Union, types.UnionType):
        return " or ".join(kind_of(one) for one in inner)
    if home in (list, tuple) and inner:
        every = [one for one in inner if one is not ...]
        if home is tuple and ... not in inner:
            return f"[{', '.join(map(kind_of, every))}]"
        return f"list of {kind_of(every[0])}"
    if home is type:
        return "a class"
    return "mapping" if home is dict else class_in_words(kind)


def class_in_words(kind: type[Any]) -> str:
    plain: dict[Any, str] = {str: "text", type(None): "null"}
    return "keys of its own" if issubclass(kind, BaseModel) else plain.get(kind, kind.__name__)


def value_of(value: Any) -> str:
    """A default, as a recipe would say it."""
    if isinstance(value, BaseModel):
        return ""
    if isinstance(value, type):
        return f"`{value.__name__}`"
    return f"`{json.dumps(value, ensure_ascii=False)}`"


def keys_of(plugin: type[Any]) -> Iterator[Key]:
    """The fields of a class."""
    words, kinds = words_of(plugin), get_type_hints(plugin)
    if is_dataclass(plugin):
        every: Any = {f.name: f.default for f in data_fields(plugin)}
        required = {name for name, default in every.items() if default is MISSING}
    else:
        model = cast("type[BaseModel]", plugin)
        every = {
            name: None if field.is_required() else field.get_default(call_default_factory=True)
            for name, field in model.model_fields.items()
            if not field.exclude
        }
        required = {name for name in every if model.model_fields[name].is_required()}
    for name, default in every.items():
        said = "*required*" if name in required else value_of(default)
        told = re.sub(r"\bNone\b", "`null`", words[name].replace("``", "`"))
        yield Key(name, kind_of(kinds[name]), said, told)


def keys(target: str, beside: str = "") -> str:
    """The table of a class, without the rows that another one has just so."""
    known = set(keys_of(load("environments", beside)) if beside else ())
    rows = [
        f"| `{key.name}` | {key.kind} | {key.default} | {key.words} |"
        for key in keys_of(load("environments", target))
        if key not in known
    ]
    head = ["| key | kind | default | meaning |", "| --- | --- | --- | --- |"]
    return "\n".join(re.sub(r" +\|", " |", row) for row in (head + rows if rows else ()))


@cache
def trainers_of_recipes() -> dict[str, set[str]]:
    """Whom each recipe that comes with the package uses."""
    return {
        name: {phase.trainer.use for phase in read(file).phases} for name, file in shipped().items()
    }


def methods() -> str:
    """A part for each trainer, as its docstring has it."""
    parts: list[str] = []
    for name in names("trainers"):
        if not names("trainers")[name].target.startswith("selfwright."):
            continue
        plugin = load("trainers", name)
        told = re.sub(r"``", "`", inspect.cleandoc(plugin.__doc__ or ""))
        lines = [f"### `{name}`", "", told, ""]
        if found := [one for one, uses in trainers_of_recipes().items() if name in uses]:
            lines += [f"Recipes: {', '.join(f'`{one}`' for one in found)}.", ""]
        group = issubclass(plugin.Config, GroupConfig)
        shared, which = (GroupConfig, "group-relative") if group else (TrainerConfig, "other")
        own = keys(target_of(plugin.Config), target_of(shared))
        lines += [f"Keys of the {which} methods" + (", and:\n\n" + own if own else "."), ""]
        parts.append("\n".join(lines))
    return "\n".join(parts)


def target_of(plugin: type[Any]) -> str:
    return f"{plugin.__module__}:{plugin.__qualname__}"


def bench(name: str) -> str:
    told: Any = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    rows: list[str] = []
    for method, found in told["methods"].items():
        runs: Any = found["runs"]
        if not rows:
            bases = ", ".join(f"{100 * run['base']:.1f}" for run in runs)
            rows.append(f"| (base) | {bases} | | | |")
        finals = ", ".join(f"{100 * run['final']:.1f}" for run in runs)
        spent = ", ".join(f"{100 * run['spent']:.0f}" for run in runs)
        better = f"{found['better']} of {len(runs)}"
        gain = f"{100 * found['mean_difference']:+.1f}"
        rows.append(f"| `{method}` | {finals} | {gain} | {better} | {spent} |")
    seeds = ", ".join(str(k) for k in range(told["seeds"]))
    head = f"| recipe | solved, %, seeds {seeds} | mean gain | better than base | budget spent, % |"
    return "\n".join([head, "| --- | --- | --- | --- | --- |", *rows])


def made(what: str) -> str:
    """Raises: KeyError: there is no such thing."""
    verb, *arguments = what.split()
    return {"keys": keys, "methods": methods, "metrics": table, "bench": bench}[verb](*arguments)


def written(page: str) -> str:
    """A page, with all that is made in it made anew."""
    return PART.sub(lambda part: f"{part[1]}{made(part[2])}\n{part[3]}", page)


def main() -> None:
    for page in DOCS.glob("*.md"):
        page.write_text(written(page.read_text()))
        print(page.relative_to(ROOT), file=sys.stderr)


if __name__ == "__main__":
    main()
