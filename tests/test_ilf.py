"""ILF: who is refined, by which words, which refinement is learned, and from where on."""

import asyncio
import json
import math
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from components import context_of, episode
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from selfwright.core.errors import PolicyError, RecipeError
from selfwright.core.play.asking import with_deadline, yes_share
from selfwright.core.protocols import HasEmbeddings
from selfwright.core.store import write_trajectories
from selfwright.core.types import (
    Batch,
    Completion,
    Judged,
    Observation,
    Prompt,
    Sampling,
    Start,
    Stop,
    Task,
    Trajectory,
    Verdict,
)
from selfwright.trainers.methods.ilf import ILF, ILFConfig
from selfwright.trainers.parts.feedback import NO_FEEDBACK, Item, read_feedback, shuffled
from selfwright.trainers.parts.selection import QUESTIONS, cosine, instruct, pick, shares


@dataclass
class Refiner:
    """Refines to what the feedback names; says "yes" as likely as ``sure`` has it."""

    checkpoint: str = "base"
    asked: list[Prompt] = field(default_factory=list[Prompt])
    said: int = 0
    sure: dict[str, float] = field(default_factory=dict[str, float])

    def batch_slot(self) -> AbstractContextManager[None]:
        return nullcontext()

    async def complete(self, prompt: Prompt, sampling: Sampling, seed: int) -> Completion:
        self.asked.append(prompt)
        self.said += 1
        word = prompt.messages[-1].text.split("say ")[-1].split()[0]
        return Completion(f"{word} {self.said}", (self.said,), (-1.0,))

    async def score(self, prompt: Prompt, completion: Completion) -> Completion:
        chosen = next((p for text, p in self.sure.items() if text in prompt.messages[-1].text), 0.0)
        return replace(completion, logprobs=(chosen if completion.text == "yes" else 0.0,))

    async def load(self, checkpoint: Path | None) -> None: ...
    async def close(self) -> None: ...

    async def embed(self, texts: Sequence[str]) -> list[list[float]]:
        return [[float(text.count(letter)) for letter in "abc 2"] for text in texts]


class Deaf:
    """Makes no embeddings."""

    checkpoint = "base"

    def __init__(self) -> None:
        inner = Refiner()
        self.batch_slot, self.complete, self.score = inner.batch_slot, inner.complete, inner.score

    async def load(self, checkpoint: Path | None) -> None: ...
    async def close(self) -> None: ...


@dataclass
class World:
    """An answer is right if it names the task, then a number of which ``right`` approves."""

    right: Callable[[int], bool] = field(default=bool)
    starts: list[Start] = field(default_factory=list[Start])

    async def attempt(self, starts: Sequence[Start]) -> list[Judged]:
        self.starts += starts
        return [self.play(start) for start in starts]

    def play(self, start: Start) -> Judged:
        word, number = start.prefix[-1].action.text.split()
        score = float(word == start.task.id and self.right(int(number)))
        trajectory = Trajectory(
            start.task,
            start.prefix,
            Observation("over"),
            Stop.TRUNCATED,
            "base",
            start.seed,
            start.attempt,
            len(start.prefix),
        )
        return Judged(trajectory, Verdict(score, "", "world"))


def failure(task: str, attempt: int = 0, feedback: str | None = None) -> Judged:
    one = episode(0.0, ("o", f"wrong{attempt}"), task=task, attempt=attempt)
    final = Observation(feedback or f"no, say {task} now")
    return replace(one, trajectory=replace(one.trajectory, final=final))


def success(task: str, attempt: int = 0) -> Judged:
    return episode(1.0, ("o", "right"), task=task, attempt=attempt)


class OwnTask(Task):
    """A task as some world has it."""


def made(
    world: World | None = None, policy: Refiner | None = None, **keys: Any
) -> tuple[ILF, Refiner, World]:
    world, policy = world or World(), policy or Refiner()

    async def opened(name: str) -> Refiner:
        assert name == "policy", name
        return policy

    async def named(id: str) -> Task:
        if id not in "abc":
            raise ValueError(f"there is no training task {id!r}")
        return OwnTask(id, f"do {id}", 9)

    context = context_of(
        policy=policy, attempt=world.attempt, open=keys.pop("open", opened), named=named
    )
    config = ILFConfig.model_validate({"refinements": 3} | keys)
    trainer = ILF(config, context)
    asyncio.run(trainer.begin())
    return trainer, policy, world


def fed(trainer: ILF, judged: Sequence[Judged]) -> list[Batch]:
    return asyncio.run(trainer.batches(judged))


def texts(batch: Batch) -> list[str]:
    return [example.completion.text for example in batch.examples]


def test_failures_are_refined_and_only_what_passes_is_learned() -> None:
    trainer, refiner, world = made(World(right=lambda n: n % 3 == 2))
    judged = [failure("a"), failure("a", 1), success("b"), failure("b", 1), failure("c")]
    (batch,) = fed(trainer, judged)
    # b was solved by some attempt: its failure is not for refining. Two tasks, three times.
    assert refiner.said == 6 and len(world.starts) == 6
    assert sorted(texts(batch)) == ["a 2", "c 5"]
    assert batch.fresh and all(e.advantage == 1 for e in batch.examples)
    # The sampled ids are learned, and neither x0 nor the feedback stands in the prompt.
    for example in batch.examples:
        assert example.completion.token_ids
        said = " ".join(message.text for message in example.prompt.messages)
        assert "wrong" not in said and "say" not in said and "now" not in said
    # The refiner saw both.
    shown = " ".join(message.text for message in refiner.asked[0].messages)
    assert "wrong" in shown and "say a now" in shown


def test_any_failure_may_be_asked_for() -> None:
    trainer, refiner, _ = made(pool="failed")
    (batch,) = fed(trainer, [success("b"), failure("b", 1), success("c")])
    assert refiner.said == 3 and [text.split()[0] for text in texts(batch)] == ["b"]


def test_nothing_passes_nothing_is_learned() -> None:
    trainer, _, _ = made(World(right=lambda n: False))
    assert fed(trainer, [failure("a")]) == []
    assert fed(trainer, [success("a")]) == fed(trainer, []) == []


def test_every_round_learns_the_union_from_the_base() -> None:
    trainer, _, _ = made()
    (first,) = fed(trainer, [failure("a")])
    (second,) = fed(trainer, [failure("b")])
    assert [text.split()[0] for text in texts(second)] == ["a", "b"]
    assert second.examples[0] == first.examples[0] and second.fresh
    going_on, _, _ = made(restart=False)
    fed(going_on, [failure("a")])
    (second,) = fed(going_on, [failure("b")])
    assert [text.split()[0] for text in texts(second)] == ["b"] and not second.fresh


def test_one_of_those_that_pass_is_drawn_evenly() -> None:
    drawn: Counter[str] = Counter()
    for seed in range(300):
        trainer, _, _ = made()
        trainer._context = replace(trainer._context, seed=seed)  # pyright: ignore
        (batch,) = fed(trainer, [failure("a")])
        drawn[texts(batch)[0]] += 1
    assert set(drawn) == {"a 1", "a 2", "a 3"} and min(drawn.values()) > 70
    alone, _, _ = made(refinements=1)
    assert texts(fed(alone, [failure("a")])[0]) == ["a 1"]


def test_shuffled_feedback_misleads() -> None:
    tasks = [failure(name) for name in "abcdef"]
    true, _, _ = made()
    false, _, world = made(shuffle=True)
    assert len(fed(true, tasks)[0].examples) == 6
    assert fed(false, tasks) == [] and len(world.starts) == 18


@given(st.lists(st.text(min_size=1), min_size=2, max_size=9, unique=True), st.integers(0, 9))
def test_shuffling_gives_everybody_somebody_elses(words: list[str], seed: int) -> None:
    items = [Item(failure(f"t{k}"), 0, word) for k, word in enumerate(words)]
    moved = [item.feedback for item in shuffled(items, seed)]
    assert sorted(moved) == sorted(words)
    assert all(a != b for a, b in zip(words, moved, strict=True))


def test_feedback_may_come_from_judge_policy_or_nobody() -> None:
    one = failure("a")
    said = replace(one, verdict=Verdict(0.0, "you should say a please", "judge"))
    trainer, refiner, _ = made(feedback="judge")
    fed(trainer, [said])
    assert "should say a please" in refiner.asked[0].messages[-1].text
    trainer, refiner, _ = made(feedback="none")
    assert fed(trainer, [said]) == [] and NO_FEEDBACK in refiner.asked[0].messages[-1].text
    trainer, refiner, _ = made(feedback="policy")
    fed(trainer, [said])
    # The question first; its answer, "what 1" or so, is the feedback then.
    assert "what is wrong" in refiner.asked[0].messages[-1].text
    answer = refiner.asked[1].messages[-1].text
    assert answer.endswith(" 1") and refiner.said == 4
    silent = replace(one, verdict=Verdict(0.0, "", "judge"))
    trainer, refiner, _ = made(feedback="judge")
    assert fed(trainer, [silent]) == [] and refiner.said == 0


def test_blocks_keep_the_prompt_and_label_the_rest() -> None:
    trainer, refiner, _ = made(layout="blocks")
    fed(trainer, [failure("a")])
    (last,) = refiner.asked[0].messages
    assert last.role == "user" and last.text.startswith("do a\no\n\nOLD ANSWER:\nwrong0\n\n")
    assert "FEEDBACK:\nno, say a now" in last.text


def test_a_teacher_may_refine() -> None:
    teacher, names = Refiner(), list[str]()

    async def opened(name: str) -> Refiner:
        names.append(name)
        return teacher

    trainer, policy, _ = made(refiner="some/model", open=opened)
    assert len(fed(trainer, [failure("a")])) == 1
    assert (names, teacher.said, policy.said) == (["some/model"], 3, 0)


def test_an_episode_is_refined_where_the_feedback_is_about_and_played_on() -> None:
    one = episode(0.0, ("o", "first"), ("p", "second"), ("say t", "third"))
    one = replace(one, trajectory=replace(one.trajectory, id="failed"))
    trainer, refiner, world = made(unit="episode", refinements=1)
    trainer._given = [Item(one, 1)]  # pyright: ignore[reportPrivateUsage]
    (batch,) = fed(trainer, [])
    (start,) = world.starts
    assert [s.action.text for s in start.prefix] == ["first", "t 1"] and start.turns is None
    assert start.prefix[1].observation.text == "p" and start.parent == "failed"
    # What was sampled from is told as it was; what is learned is an answer to the task alone.
    assert start.prefix[1].action.prompt == refiner.asked[0]
    assert start.prefix[0].action.prompt == one.trajectory.steps[0].action.prompt
    (learned,) = batch.examples
    assert [m.text for m in learned.prompt.messages] == ["do t\no", "first", "p"]
    assert learned.prompt == one.trajectory.steps[1].action.prompt


def test_the_policy_itself_may_pick_what_follows_the_feedback() -> None:
    refiner = Refiner(sure={"NEW ANSWER:\na 2": 2.0, "NEW ANSWER:\na 3": 1.0})
    trainer, _, world = made(policy=refiner, select="instruct")
    assert texts(fed(trainer, [failure("a")])[0]) == ["a 2"]
    assert len(world.starts) == 1
    trainer, _, _ = made(select="embedding")
    about = failure("a", feedback="say a 2 2 2")
    assert texts(fed(trainer, [about])[0]) == ["a 2"]


def test_a_deadline_takes_no_ability_away() -> None:
    assert isinstance(with_deadline(Refiner(), 9.0), HasEmbeddings)
    assert not isinstance(with_deadline(with_deadline(Deaf(), 9.0), 9.0), HasEmbeddings)
    trainer, _, _ = made(policy=with_deadline(Refiner(), 9.0), select="embedding")  # pyright: ignore
    assert len(fed(trainer, [failure("a", feedback="say a 2 2 2")])) == 1
    deaf, _, _ = made(policy=Deaf(), select="embedding")  # pyright: ignore
    with pytest.raises(PolicyError, match="needs a policy that embeds"):
        fed(deaf, [failure("a")])


@given(st.floats(-30, 0), st.floats(-30, 0))
def test_the_share_of_yes(yes: float, no: float) -> None:
    @dataclass
    class Two:
        async def score(self, prompt: Prompt, completion: Completion) -> Completion:
            return replace(completion, logprobs=({"yes": yes, "no": no}[completion.text],))

    policy: Any = Two()
    share = asyncio.run(yes_share(policy, Prompt()))
    assert 0 <= share <= 1
    assert asyncio.run(yes_share(policy, Prompt(), "no", "yes")) == pytest.approx(1 - share)
    if yes == no:
        assert share == 0.5


def test_an_ensemble_is_the_mean_of_its_questions() -> None:
    # One question is sure of a 1, the others cannot tell.
    sure = {QUESTIONS[0]: math.log(3)}
    policy = Refiner(sure=sure)
    item = Item(failure("a"), 0, "say a")
    (score,) = asyncio.run(instruct(context_of(policy=policy), item, [Completion("a 1")]))
    assert score == pytest.approx((0.75 + 4 * 0.5) / 5)


def test_equal_scores_are_picked_evenly() -> None:
    picked = Counter(pick([1.0, 0.0, 1.0], seed) for seed in range(200))
    assert set(picked) == {0, 2} and min(picked.values()) > 60
    assert pick([0.2, 0.9], 0) == 1


def test_weights_of_the_target_distribution() -> None:
    assert shares([0.0, 1.0, 0.5], 0.0) == pytest.approx([1 / 3] * 3)
    assert shares([0.7, 0.7], 9.0) == pytest.approx([0.5, 0.5])
    assert shares([1.0, 0.0], 2.0) == pytest.approx([0.880797, 0.119203], abs=1e-6)
    trainer, _, _ = made(World(right=lambda n: n == 2), beta=2.0)
    (batch,) = fed(trainer, [failure("a")])
    low, high = 1 / (2 + 7.389056), 7.389056 / (2 + 7.389056)
    assert [e.advantage for e in batch.examples] == pytest.approx([low, high, low])


def test_cosines() -> None:
    assert cosine([1, 0], [0, 2]) == 0 and cosine([1, 1], [2, 2]) == pytest.approx(1)
    assert cosine([0, 0], [1, 2]) == 0


def lines(path: Path, *rows: dict[str, Any] | str) -> Path:
    text = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(text) + "\n")
    return path


@pytest.fixture
def stored(tmp_path: Path) -> Path:
    path = tmp_path / "played"
    path.mkdir()
    write_trajectories(path, [failure("a"), failure("b"), success("c")], tmp_path / "images")
    return path


def test_people_may_say_what_was_wrong(stored: Path, tmp_path: Path) -> None:
    about = {"trajectory": 1, "step": 0, "feedback": "rather say b here"}
    file = lines(tmp_path / "said.jsonl", about, "")
    keys: dict[str, Any] = {"feedback": "file", "file": str(file), "trajectories": str(stored)}
    trainer, refiner, world = made(**keys)
    assert (trainer.plan.tasks, trainer.plan.attempts) == (0, 0)
    (batch,) = fed(trainer, [])
    assert [text.split()[0] for text in texts(batch)] == ["b"]
    assert "rather say b here" in refiner.asked[0].messages[-1].text
    # A stored task is a plain one; what is played is the world's own.
    assert {type(start.task) for start in world.starts} == {OwnTask}
    # Another round, another refinement of the same; never two of one round.
    (batch,) = fed(trainer, [])
    assert len(batch.examples) == 2


def test_a_refiner_learns_what_people_wrote_if_it_passes(stored: Path, tmp_path: Path) -> None:
    said = [
        {"trajectory": 0, "step": 0, "feedback": "more a", "refinement": "a 7"},
        {"trajectory": 1, "step": 0, "feedback": "more b", "refinement": "c 8"},
    ]
    keys: dict[str, Any] = {"feedback": "file", "trajectories": str(stored)}
    keys["file"] = str(lines(tmp_path / "said.jsonl", *said))
    trainer, refiner, world = made(learns="refiner", layout="blocks", **keys)
    (batch,) = fed(trainer, [])
    # Nobody was asked; both were tried, and only one of them was right.
    assert refiner.said == 0 and [s.prefix[0].action.text for s in world.starts] == ["a 7", "c 8"]
    (only,) = batch.examples
    assert (only.completion, only.advantage) == (Completion("a 7"), 1.0) and batch.fresh
    assert only.prompt.messages[-1].text == (
        "do a\no\n\nOLD ANSWER:\nwrong0\n\nFEEDBACK:\nmore a\n\nNEW ANSWER:"
    )
    # Where nobody wrote one, it is asked for, as often as ever.
    keys["file"] = str(lines(tmp_path / "said.jsonl", said[0], said[1] | {"refinement": ""}))
    keys["select"] = "random"
    _, refiner, world = found = made(learns="refiner", **keys)
    (batch,) = fed(found[0], [])
    assert refiner.said == 3 and texts(batch)[0] == "a 7" and len(world.starts) == 2


def test_a_policy_may_learn_to_refine_beside_what_it_refined(tmp_path: Path) -> None:
    judged = [failure("a"), failure("b")]
    (plain,) = fed(made(refinements=1)[0], judged)
    (asked,) = fed(made(refinements=1, learns="refiner")[0], judged)
    trainer, refiner, _ = made(refinements=1, learns="both")
    (both,) = fed(trainer, judged)
    assert both.examples == (*plain.examples, *asked.examples)
    assert [e.completion for e in asked.examples] == [e.completion for e in plain.examples]
    # From task, attempt and feedback, as it was sampled; the other way from the task alone.
    assert [e.prompt for e in asked.examples] == refiner.asked
    assert [m.text for m in asked.examples[0].prompt.messages] == [
        "do a\no",
        "wrong0",
        "no, say a now",
    ]
    assert [m.text for m in plain.examples[0].prompt.messages] == ["do a\no"]
    (tmp_path / "trainer").mkdir()
    trainer.save(tmp_path / "trainer", tmp_path / "images")
    again, _, _ = made(policy=refiner, refinements=1, learns="both")
    again.restore(tmp_path / "trainer")
    (more,) = fed(again, [failure("c")])
    assert len(more.examples) == 6 and set(both.examples) < set(more.examples)


def test_of_an_episode_a_refiner_learns_the_refined_action_alone() -> None:
    one = episode(0.0, ("o", "first"), ("say t", "second"))

    @dataclass
    class On(World):
        """Plays on by another action."""

        def play(self, start: Start) -> Judged:
            done = super().play(start)
            more = episode(1.0, ("o", "t 1"), ("p", "t 2")).trajectory.steps[1:]
            trajectory = replace(done.trajectory, steps=(*start.prefix, *more))
            return replace(done, trajectory=trajectory)

    counts: dict[str, list[str]] = {}
    for learns in ("policy", "refiner"):
        trainer, _, _ = made(On(), unit="episode", refinements=1, learns=learns)
        trainer._given = [Item(one, 0)]  # pyright: ignore[reportPrivateUsage]
        (batch,) = fed(trainer, [])
        counts[learns] = texts(batch)
    assert counts == {"policy": ["t 1", "t 2"], "refiner": ["t 1"]}


def test_feedback_about_tasks_that_are_not_for_training_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "played"
    path.mkdir()
    write_trajectories(path, [failure("x"), failure("a"), failure("y")], tmp_path / "images")
    file = lines(
        tmp_path / "said.jsonl",
        *({"trajectory": k, "step": 0, "feedback": "no"} for k in (0, 1, 2)),
    )
    keys: dict[str, Any] = {"feedback": "file", "file": str(file), "trajectories": str(path)}
    with pytest.raises(RecipeError, match=r"training task 'x'; there is no training task 'y'$"):
        made(**keys)


@given(
    st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), min_size=1, max_size=4),
    st.sampled_from(["\n", "\r\n", "\n\n", " \n\t\r\n"]),
    st.booleans(),
    st.booleans(),
)
@settings(deadline=None, max_examples=60)
def test_a_line_ends_where_its_line_feed_stands(
    words: list[str], end: str, mark: bool, ascii: bool
) -> None:
    words = [*words, "U+2028\u2028U+2029\u2029U+0085\x85."]
    rows = [{"trajectory": 0, "step": 0, "feedback": text} for text in words]
    text = end.join(json.dumps(row, ensure_ascii=ascii) for row in rows)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "said.jsonl")
        file.write_bytes(text.encode("utf-8-sig" if mark else "utf-8"))
        items = read_feedback(file, [failure("a")], 1.0)
        assert [item.feedback for item in items] == words
        file.write_bytes(text.encode("utf-16"))
        with pytest.raises(ValueError, match=r"said\.jsonl is not in UTF-8"):
            read_feedback(file, [failure("a")], 1.0)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"trajectory": 0, "step": 0, "feedback": "\ud83d"}, "feedback: Input should be a valid"),
        ("\u2028", "Expecting value"),
        ({"trajectory": 7, "step": 0, "feedback": "x"}, "trajectory 7 is unknown, there are 3"),
        ({"trajectory": 0, "step": 4, "feedback": "x"}, "step 4 of trajectory 0 is none of its 1"),
        ({"trajectory": 2, "step": 0, "feedback": "x"}, "trajectory 2 did not fail"),
        ({"trajectory": 0, "step": 0}, "feedback: Field required"),
        ({"trajectory": 0, "step": 0, "feedback": ""}, "feedback: String should have"),
        ("{", "Expecting property name"),
    ],
)
def test_bad_feedback_files_are_refused_with_the_recipe(
    stored: Path, tmp_path: Path, row: Any, said: str
) -> None:
    good = {"trajectory": 0, "step": 0, "feedback": "x"}
    file = lines(tmp_path / "said.jsonl", good, row)
    keys: dict[str, Any] = {"feedback": "file", "file": str(file), "trajectories": str(stored)}
    with pytest.raises(ValidationError, match=f"line 2: .*{said}"):
        ILFConfig.model_validate(keys)
    with pytest.raises(ValidationError, match="go together"):
        ILFConfig.model_validate({"feedback": "file", "file": str(file)})
    with pytest.raises(ValidationError, match="no feedback in it"):
        ILFConfig.model_validate(keys | {"file": str(lines(tmp_path / "empty.jsonl"))})
    with pytest.raises(ValidationError, match=r"cannot read none\.jsonl"):
        ILFConfig.model_validate(keys | {"file": "none.jsonl"})


def test_restored_it_goes_on_as_it_would_have(tmp_path: Path) -> None:
    through, _, _ = made()
    first, refiner, _ = made()
    for trainer in (through, first):
        fed(trainer, [failure("a"), failure("b")])
    (tmp_path / "trainer").mkdir()
    first.save(tmp_path / "trainer", tmp_path / "images")
    second, _, _ = made(policy=refiner)
    second.restore(tmp_path / "trainer")
    assert fed(second, [failure("c")]) == fed(through, [failure("c")])
