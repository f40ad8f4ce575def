"""The columns of schema 5, and where 4 and 3 differ. Nothing is null but by ``Maybe``."""

# pyarrow has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import pyarrow as pa

from ..types import Completion, Constraint, Image, Message, Observation, Part, Tool
from .shapes import Leaf, Many, Maybe, Record

EPISODES = "episodes.parquet"
STEPS = "steps.parquet"
VERDICTS = "verdicts"
"""The folder of them."""


class EpisodeRow(NamedTuple):
    id: str
    parent: str
    task_id: str
    instruction: str
    max_steps: int
    task_data: str
    """The fields of the task's class, as ``core.tasks.task_data`` writes them."""
    seed: int
    attempt: int
    policy: str
    replayed: int
    restored: int
    stop: str
    success: bool
    reward: float | None
    """The sum of its steps'; empty if that is no number. Not read back."""
    error: str
    final: Observation
    steps: int
    """How many."""
    first_step: int
    """Which row of the steps is its first, counted from 0."""


class PromptRow(NamedTuple):
    shared: int
    """How many of its first messages are those of the prompt before it (see ``prompts``)."""
    messages: tuple[Message, ...]
    """The rest."""
    tools: tuple[Tool, ...] | None
    """None: those of the prompt before it."""
    template: str = ""


class StepRow(NamedTuple):
    episode: str
    turn: int
    observation: Observation
    action: str
    invalid: str
    answer: str | None
    reward: float
    completion: Completion
    prompt: PromptRow | None
    """None: nobody was asked."""
    place: int = 0
    left_out: int = 0


class VerdictRow(NamedTuple):
    episode: str
    score: float | None
    feedback: str
    judge: str
    steps: tuple[float | None, ...]


class PartShape:
    """Text or an image: a struct of both, of which one is null."""

    _text = Maybe(Leaf(pa.string()))

    def __init__(self, image: Record) -> None:
        self._image = Maybe(image)
        self.type = pa.struct({"text": pa.string(), "image": image.type})

    def encode(self, values: Sequence[Part]) -> Any:
        texts = [None if isinstance(part, Image) else part for part in values]
        images = [part if isinstance(part, Image) else None for part in values]
        arrays = [self._text.encode(texts), self._image.encode(images)]
        if len(values) - arrays[0].null_count != arrays[1].null_count:
            raise TypeError("None, wanted a text or an image")
        return pa.StructArray.from_arrays(arrays, fields=list(self.type))

    def decode(self, array: Any) -> list[Part]:
        texts, images = array.field(0), array.field(1)
        pairs = zip(self._text.decode(texts), self._image.decode(images), strict=True)
        parts = [image if text is None else text for text, image in pairs]
        if None in parts or len(array) - texts.null_count != images.null_count:
            raise ValueError("a part that is not either a text or an image")
        return parts


TEXT = Leaf(pa.string())
INT32 = Leaf(pa.int32())
INT64 = Leaf(pa.int64())
DOUBLE = Leaf(pa.float64())
BOOL = Leaf(pa.bool_())
# Many steps show the same image: their handles are one object.
IMAGE = Record(lru_cache(1 << 14)(Image), sha256=TEXT, width=INT32, height=INT32)
OBSERVATION = Record(Observation, text=TEXT, images=Many(IMAGE), actions=Many(TEXT), actor=TEXT)
LOGPROBS = Many(Leaf(pa.float32()))
_COMPLETION_3 = {
    "text": TEXT,
    "token_ids": Many(INT32),
    "logprobs": LOGPROBS,
    "finish": TEXT,
    "tokenizer": TEXT,
    "version": INT32,
}
CONSTRAINT = Record(lru_cache(1 << 12)(Constraint), choices=Many(TEXT), grammar=TEXT)
COMPLETION = Record(Completion, **_COMPLETION_3, constraint=Maybe(CONSTRAINT), constrained=LOGPROBS)
MESSAGE = Record(
    Message, role=TEXT, parts=Many(PartShape(IMAGE)), token_ids=Many(INT32), tokenizer=TEXT
)
TOOL = Record(Tool, name=TEXT, description=TEXT, parameters=TEXT)
_PROMPT_3 = {"shared": INT32, "messages": Many(MESSAGE), "tools": Maybe(Many(TOOL))}
PROMPT = Record(PromptRow, **_PROMPT_3, template=TEXT)
EPISODE = Record(
    EpisodeRow,
    id=TEXT,
    parent=TEXT,
    task_id=TEXT,
    instruction=TEXT,
    max_steps=INT32,
    task_data=TEXT,
    seed=INT64,
    attempt=INT32,
    policy=TEXT,
    replayed=INT32,
    restored=INT32,
    stop=TEXT,
    success=BOOL,
    reward=Maybe(DOUBLE),
    error=TEXT,
    final=OBSERVATION,
    steps=INT32,
    first_step=INT64,
)
_STEP = {
    "episode": TEXT,
    "turn": INT32,
    "observation": OBSERVATION,
    "action": TEXT,
    "invalid": TEXT,
    "answer": Maybe(TEXT),
    "reward": DOUBLE,
}
_STEP_4 = {**_STEP, "completion": COMPLETION, "prompt": Maybe(PROMPT)}
STEP = Record(StepRow, **_STEP_4, place=INT32, left_out=INT32)
STEP.older[4] = Record(StepRow, **_STEP_4)
STEP.older[3] = Record(
    StepRow,
    **_STEP,
    completion=Record(Completion, **_COMPLETION_3),
    prompt=Maybe(Record(PromptRow, **_PROMPT_3)),
)
VERDICT = Record(
    VerdictRow,
    episode=TEXT,
    score=Maybe(DOUBLE),
    feedback=TEXT,
    judge=TEXT,
    steps=Many(Maybe(DOUBLE)),
)
for _same in (EPISODE, VERDICT):
    _same.older |= {3: _same, 4: _same}
