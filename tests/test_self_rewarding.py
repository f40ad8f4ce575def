"""Pairs of one's own attempts: the best against the worst, or none."""

import asyncio
import json
from collections.abc import Sequence
from pathlib import Path

import pytest
from components import SINGLE, context_of, episode, played
from pydantic import ValidationError

from selfwright.core.types import Completion, Example, Judged, Message, Prompt
from selfwright.trainers.learning.loss import DPO, NLL
from selfwright.trainers.methods.imitation import Imitation, ImitationConfig
from selfwright.trainers.methods.self_rewarding import SelfRewarding, SelfRewardingConfig


def group(task: str, *scores: float | None) -> list[Judged]:
    return [
        episode(score, ("o", f"{task}{k}"), ("p", f"{task}{k}!"), task=task, attempt=k)
        for k, score in enumerate(scores)
    ]


def test_the_best_is_preferred_to_the_worst_where_they_differ() -> None:
    trainer = SelfRewarding(SelfRewardingConfig(beta=0.2), context_of())
    judged = [
        *group("a", 0.4, 0.8, 0.2, 0.6),
        *group("b", 0.6, 0.6, 0.6),  # nothing to prefer,
        *group("c", None, 0.4),  # nothing to compare with: what cannot be read is dropped,
        *group("d", None, 1.0, 0.0),
    ]
    (batch,) = asyncio.run(trainer.batches(judged))
    assert batch.loss == DPO(0.2)
    told = [(e.completion.text, e.advantage, e.group) for e in batch.examples]
    assert told == [
        ("a1", 1.0, 0),
        ("a1!", 1.0, 0),
        ("a2", -1.0, 0),
        ("a2!", -1.0, 0),
        ("d1", 1.0, 3),
        ("d1!", 1.0, 3),
        ("d2", -1.0, 3),
        ("d2!", -1.0, 3),
    ]
    # The reference is the policy that sampled them.
    assert all(e.completion.logprobs == (-1.0,) for e in batch.examples)
    assert asyncio.run(trainer.batches(group("b", 0.6, 0.6))) == []


def conversations(path: Path, *rows: Sequence[tuple[str, str]]) -> str:
    lines = [{"messages": [{"role": role, "content": text} for role, text in row]} for row in rows]
    path.write_text("\n".join(json.dumps(line, ensure_ascii=False) for line in lines) + "\n\n")
    return str(path)


INSTRUCTION = [("system", "be brief"), ("user", "make 8"), ("assistant", "3 + 5\u2028")]
EVALUATION = [("user", "Task: make 8\n<<<\n3 + 5\n>>>"), ("assistant", "Right.\nSCORE: 5")]


def test_a_seed_of_instructions_and_evaluations_is_imitated(tmp_path: Path) -> None:
    file = conversations(tmp_path / "seed.jsonl", INSTRUCTION, EVALUATION)
    keys = {"source": "conversations", "conversations": file}
    trainer = Imitation(ImitationConfig.model_validate(keys), context_of())
    assert trainer.plan.tasks == 0
    (batch,) = asyncio.run(trainer.batches([]))
    assert batch.loss == NLL() and batch.examples == (
        Example(
            Prompt((Message("system", ("be brief",)), Message("user", ("make 8",)))),
            Completion("3 + 5\u2028"),
        ),
        Example(Prompt((Message("user", (EVALUATION[0][1],)),)), Completion("Right.\nSCORE: 5")),
    )


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ([("user", "a")], "line 2: messages: List should have at least 2"),
        ([("user", "a"), ("user", "b")], "line 2: messages: the last one is of the user"),
        ([("user", "a"), ("assistant", "")], r"line 2: messages\.1\.content: String should have"),
        ([("judge", "a"), ("assistant", "b")], r"line 2: messages\.0\.role: Input should be"),
    ],
)
def test_what_is_no_conversation_is_refused(
    tmp_path: Path, row: list[tuple[str, str]], said: str
) -> None:
    file = conversations(tmp_path / "seed.jsonl", INSTRUCTION, row)
    keys = {"source": "conversations", "conversations": file}
    with pytest.raises(ValidationError, match=said):
        ImitationConfig.model_validate(keys)
    for odd in ({"source": "conversations"}, {"conversations": file}):
        with pytest.raises(ValidationError, match="source: conversations and conversations: PATH"):
            ImitationConfig.model_validate(odd)
    with pytest.raises(ValidationError, match="there is no conversation in it"):
        ImitationConfig.model_validate(keys | {"conversations": conversations(tmp_path / "none")})


@pytest.mark.method
def test_the_seeds_model_is_the_base_of_what_rewards_itself(player: Path, tmp_path: Path) -> None:
    """M0 to M1 by imitation, then on from there."""
    file = conversations(tmp_path / "seed.jsonl", INSTRUCTION, EVALUATION)
    head, _, _ = SINGLE.replace("MODEL", str(player)).replace("iterations: 3\n", "").partition("tr")
    seed = f"{{use: imitation, source: conversations, conversations: {file}}}"
    loop = "{use: self_rewarding, tasks_per_iteration: 12}"
    (tmp_path / "recipe.yaml").write_text(
        f"{head}phases:\n  - {{trainer: {seed}, iterations: 1}}\n"
        f"  - {{trainer: {loop}, iterations: 1}}\n"
        "learner: {rank: 4, alpha: 8, learning_rate: 1e-3}\n"
        "evaluation: {tasks: 12, validation_tasks: 8, turns: 0}\n"
    )
    result = played(tmp_path / "recipe.yaml", [], tmp_path / "run")
    first, second = result["costs"]
    # The seed costs no episode; the first pairs are of the model that it made.
    assert (first["episodes"], second["episodes"]) == (0, 48)
    assert first["tokens_trained"] > 0 and second["tokens_trained"] > 0
