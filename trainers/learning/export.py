"""What was played, as datasets in TRL's own formats, for whoever goes on without us."""

# datasets has no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from ...core.errors import LearnerError
from ...core.store import read_trajectories
from ...core.types import Completion, Example, Pair, Prompt, Stop, Trajectory
from .examples import asked, imitate

if TYPE_CHECKING:
    import datasets

Chat: TypeAlias = list[dict[str, str]]
"""``[{"role": ..., "content": ...}, ...]``"""


def to_sft(examples: Sequence[Example]) -> "datasets.Dataset":
    """Columns ``prompt`` and ``completion`` (conversational), and ``weight``, which TRL overlooks.

    Texts, not token ids: they fit any tokenizer, and TRL renders them with its chat template.

    Raises:
        LearnerError: no examples, or a prompt with images.
    """
    return _dataset(
        {
            "prompt": _chat(example.prompt),
            "completion": _answer(example.completion),
            "weight": example.advantage,
        }
        for example in examples
    )


def to_preferences(pairs: Sequence[Pair]) -> "datasets.Dataset":
    """Columns ``prompt``, ``chosen`` and ``rejected`` (conversational). Raises: as ``to_sft``."""
    return _dataset(
        {
            "prompt": _chat(pair.prompt),
            "chosen": _answer(pair.chosen),
            "rejected": _answer(pair.rejected),
        }
        for pair in pairs
    )


def to_messages(trajectories: Sequence[Trajectory]) -> "datasets.Dataset":
    """Column ``messages``: a row per trajectory, as its last turn saw it, with its last answer.

    For ``SFTConfig(assistant_only_loss=True)``. An agent that shows only a window of the past
    leaves the turns before it out; then take ``to_sft``. Raises: as ``to_sft``.
    """
    rows: list[dict[str, object]] = []
    for trajectory in trajectories:
        if trajectory.steps:
            last = trajectory.answers[-1]
            answer = _answer(trajectory.steps[last].action.completion)
            rows.append({"messages": _chat(asked(trajectory, last)) + answer})
    return _dataset(rows)


def read_sft(paths: Sequence[Path], threshold: float = 1.0) -> "datasets.Dataset":
    """Every turn of the stored trajectories that scored ``threshold`` or more, as ``to_sft`` does.

    Args:
        paths: folders of episodes, as runs store them.
        threshold: the least score; trajectories that failed or were not decided are left out.

    Raises:
        StoreError: a file is missing or damaged.
        LearnerError: nothing scored enough, or a prompt holds images.
    """
    stored = [judged for path in paths for judged in read_trajectories(path)]
    good = [
        judged.trajectory
        for judged in stored
        if judged.verdict.score is not None
        and judged.verdict.score >= threshold
        and judged.trajectory.stop != Stop.FAILED
    ]
    if not good:
        raise LearnerError(
            f"none of {len(stored)} stored trajectories scored {threshold} or more; "
            "lower the threshold"
        )
    return to_sft([example for trajectory in good for example in imitate(trajectory)])


def _dataset(rows: Iterable[dict[str, object]]) -> "datasets.Dataset":
    import datasets

    listed = list(rows)
    if not listed:
        raise LearnerError("nothing to export: no examples were given")
    return datasets.Dataset.from_list(listed)


def _chat(prompt: Prompt) -> Chat:
    if prompt.images or prompt.tools:
        raise LearnerError("only text can be exported, but a prompt holds images or tools")
    return [{"role": message.role, "content": message.text} for message in prompt.messages]


def _answer(completion: Completion) -> Chat:
    return [{"role": "assistant", "content": completion.text}]
