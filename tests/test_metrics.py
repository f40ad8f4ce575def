"""Every metric has a name, a unit and a meaning. ``components.played`` looks at those of runs."""

import ast
import re
from pathlib import Path

from selfwright.core.metrics import METRICS, described, table

PACKAGE = Path(__file__).parents[1]
AREAS = {name.split("/")[0] for name in METRICS}


def written() -> tuple[set[str], set[str]]:
    """The metrics that the code names, and the areas of those whose names it makes up."""
    names, areas = set[str](), set[str]()
    for room in ("loop", "trainers", "judges"):
        for file in (PACKAGE / room).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    area, slash, rest = node.value.partition("/")
                    if slash and area in AREAS:
                        names |= {node.value} if re.fullmatch("[a-z_]+", rest) else set()
                        areas |= set() if rest else {area}
    return names, areas


def test_what_the_code_writes_is_known_and_what_is_known_is_written() -> None:
    names, areas = written()
    assert names and not [name for name in names if described(name) is None]
    assert not {name for name in METRICS.keys() - names if name.split("/")[0] not in areas}


def test_the_table_has_them_all() -> None:
    lines = table().splitlines()
    assert len(lines) == 2 + len(METRICS) + 1
    assert all(line.count("|") == 4 for line in lines)
    known = described("failures/WorldError")
    assert known is not None and known.unit == "count"
    assert described("failures") is None and described("train/lose") is None
