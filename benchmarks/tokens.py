"""What a trajectory costs the learner as it grows: tokens against turns, packed and not.

    python benchmarks/tokens.py [--trajectories 200]

The conversations are the chat agent's, with observations of various lengths and completions whose
ids are drawn at random from the tokenizer's vocabulary: what a model samples is seldom what a
tokenizer would have made of the same text. One in eight was cut before it ended. Packed: the tokens
of the rows that the learner trains on. Unpacked: every turn with its own prompt, as it would be
without packing. Fails unless packed tokens are linear in turns.
"""

import argparse
import importlib
import platform
import random
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from selfwright.agents import scratch
from selfwright.agents.chat import Chat, ChatConfig
from selfwright.core.files import write_json
from selfwright.core.models.tokens import ChatTokens
from selfwright.core.types import Action, Completion, Example, Observation, Step, Task
from selfwright.trainers.learning.pack import pack

RESULTS = Path(__file__).parent / "results" / "tokens.json"
TURNS = (1, 2, 4, 8, 16)
LINEAR = 0.999
"""The least R^2 of a line through packed tokens over turns."""
SEEN, SAID = (2, 40), (4, 16)
"""The least and most words of an observation, and tokens of a completion."""
LEXICON = [a + b + c for a in "bdfglmnprst" for b in "aeiou" for c in ("ck", "ll", "n", "st")]


@dataclass(frozen=True)
class Counted:
    """Per trajectory, on average."""

    turns: int
    packed: float
    unpacked: float
    rows: float


def main() -> int:
    """0 if packed tokens are linear in turns."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trajectories", type=int, default=200, help="of each number of turns")
    parser.add_argument("--output", type=Path, default=RESULTS, help="a JSON file")
    arguments = parser.parse_args()
    tokens = tokenizer()
    found = [counted(turns, arguments.trajectories, tokens) for turns in TURNS]
    turns = [float(one.turns) for one in found]
    packed = [one.packed for one in found]
    line = statistics.linear_regression(turns, packed)
    r2 = {
        "packed": statistics.correlation(turns, packed) ** 2,
        "unpacked": statistics.correlation(turns, [one.unpacked for one in found]) ** 2,
    }
    Console().print(table(found))
    print(f"packed: {line.intercept:.1f} + {line.slope:.1f} per turn, R^2 = {r2['packed']:.6f}")
    packages = ("selfwright", "transformers", "tokenizers")
    data: dict[str, Any] = {
        "versions": {"python": platform.python_version()} | {p: version(p) for p in packages},
        "trajectories": arguments.trajectories,
        "observation_words": SEEN,
        "completion_tokens": SAID,
        "turns": [
            {
                "turns": one.turns,
                "packed": round(one.packed, 2),
                "unpacked": round(one.unpacked, 2),
                "ratio": round(one.unpacked / one.packed, 3),
                "rows": round(one.rows, 3),
            }
            for one in found
        ],
        "line": {"intercept": round(line.intercept, 3), "slope": round(line.slope, 3)},
        "r2": {name: round(value, 6) for name, value in r2.items()},
        "prefix_breaks": tokens.breaks,
        "target_r2": LINEAR,
        "met": r2["packed"] >= LINEAR,
    }
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(arguments.output, data)
    return 0 if data["met"] else 1


def tokenizer() -> ChatTokens:
    """One made of the lexicon."""
    transformers: Any = importlib.import_module("transformers")
    rng = random.Random(0)
    with tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        texts = [words(rng, SEEN) for _ in range(500)]
        scratch.make("scratch:32x1", texts, Path(folder), seed=0)
        return ChatTokens(transformers.AutoTokenizer.from_pretrained(folder))


def counted(turns: int, trajectories: int, tokens: ChatTokens) -> Counted:
    rng = random.Random(turns)
    examples = [
        example
        for k in range(trajectories)
        for example in conversation(rng, Task(f"{k}", f"Do number {k}.", turns), tokens)
    ]
    rows = pack(examples, tokens)
    apart = sum(len(tokens.prompt(e.prompt)) + len(e.completion.token_ids) for e in examples)
    together = sum(len(row.ids) for row in rows)
    return Counted(turns, together / trajectories, apart / trajectories, len(rows) / trajectories)


def conversation(rng: random.Random, task: Task, tokens: ChatTokens) -> list[Example]:
    """An example per turn."""
    agent = Chat(ChatConfig.model_validate({}))
    examples: list[Example] = []
    steps: list[Step] = []
    for _ in range(task.max_steps):
        seen, said = Observation(words(rng, SEEN)), sampled(rng, tokens)
        prompt = agent.prompt(task, steps, seen)
        examples.append(Example(prompt, said))
        parsed = agent.parse(said.text, seen)
        steps.append(Step(seen, Action(parsed.action, said, prompt, parsed.invalid), 0.0))
    return examples


def sampled(rng: random.Random, tokens: ChatTokens) -> Completion:
    """As from a model that finds every token equally likely."""
    special = set(tokens.tokenizer.all_special_ids)
    allowed = [i for i in range(len(tokens.tokenizer)) if i not in special]
    ids = tuple(rng.choices(allowed, k=rng.randint(*SAID)))
    cut = rng.random() < 1 / 8
    finish = "length" if cut else "stop"
    return Completion(tokens.text(ids), ids if cut else (*ids, tokens.end), finish=finish)


def words(rng: random.Random, sizes: tuple[int, int]) -> str:
    return " ".join(rng.choices(LEXICON, k=rng.randint(*sizes)))


def table(found: Sequence[Counted]) -> Table:
    shown = Table(title="tokens trained per trajectory")
    for title in ("turns", "packed", "unpacked", "ratio", "rows"):
        shown.add_column(title, justify="right")
    for one in found:
        sizes = (f"{one.packed:.0f}", f"{one.unpacked:.0f}", f"{one.unpacked / one.packed:.2f}")
        shown.add_row(str(one.turns), *sizes, f"{one.rows:g}")
    return shown


if __name__ == "__main__":
    sys.exit(main())
