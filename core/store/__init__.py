"""Episodes on disk, in any folder: an iteration's, an evaluation's, a trainer's memory.

    episodes.parquet        a row an episode, in the order given
    steps.parquet           a row a step, in the order of the episodes, then of the turns
    verdicts/HASH.parquet   what one judge says of them, a row an episode; there may be several
    verdicts/HASH.json      what that judge is

Images lie once each, by content, in a folder ``images`` here or further up (``core.images``).

The columns are in ``schema``, nested as in ``core.types``, of plain types: DuckDB asks all runs at
once, as they lie::

    select e.task_id, s.turn, s.action, s.reward
    from 'runs/*/iterations/*/steps.parquet' s
    join 'runs/*/iterations/*/episodes.parquet' e on e.id = s.episode

A prompt is what it has in common with the one before it, and the rest: an episode takes room in
proportion to its turns (``prompts``). Row groups hold whole episodes, so that one is read without
the others. Log-probabilities are 32-bit, as engines make them. The metadata of ``episodes`` and
``steps`` is JSON under ``selfwright``: ``schema`` (the version of all this), ``images`` (that
folder's name), ``judge`` (the hash of the one whose verdicts go with the episodes unless another is
asked for) and ``origin`` (what the caller says of where they come from).
"""

from .dataset import dataset
from .parquet import VERSION
from .schema import EPISODES, STEPS
from .trajectories import TRAJECTORIES, holds_episodes, read_episode, read_origin, read_trajectories
from .verdicts import (
    JudgeIdentity,
    judge_identity,
    judges_of,
    read_verdicts,
    write_verdicts,
)
from .writing import write_trajectories

__all__ = [
    "EPISODES",
    "STEPS",
    "TRAJECTORIES",
    "VERSION",
    "JudgeIdentity",
    "dataset",
    "holds_episodes",
    "judge_identity",
    "judges_of",
    "read_episode",
    "read_origin",
    "read_trajectories",
    "read_verdicts",
    "write_trajectories",
    "write_verdicts",
]
