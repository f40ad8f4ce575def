"""Episodes on disk: what goes in comes out, damage is named, and long ones stay small."""

# pyarrow and datasets have no types.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false
# pyright: reportUnknownVariableType=false, reportUnknownArgumentType=false

import json
import struct
import subprocess
import sys
import tempfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selfwright.core.errors import StoreError, WorldError
from selfwright.core.images import STORE, picture, place
from selfwright.core.store import (
    EPISODES,
    STEPS,
    TRAJECTORIES,
    dataset,
    judge_identity,
    judges_of,
    parquet,
    read_episode,
    read_origin,
    read_trajectories,
    read_verdicts,
    write_trajectories,
    write_verdicts,
    writing,
)
from selfwright.core.tasks import StoredTask, task_of
from selfwright.core.types import (
    Action,
    Completion,
    Constraint,
    Image,
    Judged,
    Message,
    Observation,
    Prompt,
    Step,
    Stop,
    Task,
    Tool,
    Trajectory,
    Verdict,
)


def png(red: int) -> bytes:
    """A picture of one pixel."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = struct.pack(">IIBBBBB", 1, 1, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        (
            chunk(b"IHDR", head),
            chunk(b"IDAT", zlib.compress(bytes([0, red, 0, 0]))),
            chunk(b"IEND", b""),
        )
    )


def few(items: st.SearchStrategy[Any], most: int = 3) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=most).map(tuple)


texts = st.text(max_size=12)
floats = st.floats(allow_nan=False, width=64)
pictures = st.sampled_from([picture(png(red)) for red in range(4)])
token_ids = few(st.integers(0, 2**31 - 1), 4)
logprobs = few(st.floats(max_value=0, width=32), 4)
actors = st.sampled_from(["", "attacker", "defender"])
observations = st.builds(Observation, texts, few(pictures), few(texts), actors)
completions = st.builds(
    Completion,
    texts,
    token_ids,
    logprobs,
    st.sampled_from(["stop", "length", ""]),
    texts,
    st.integers(-1, 2**31 - 1),
    st.none() | st.builds(Constraint, few(texts), texts),
    logprobs,
)
messages = st.builds(
    Message,
    st.sampled_from(["system", "user", "assistant"]),
    few(texts | pictures),
    token_ids,
    texts,
)
tools = few(st.builds(Tool, texts, texts, texts), 2)
variables = st.sampled_from(["", '{"enable_thinking":false}'])


@st.composite
def walks(draw: st.DrawFn) -> tuple[Step, ...]:
    """Steps whose prompts go on from one another, move their windows, or begin anew."""
    said: list[Message] = []
    offered: tuple[Tool, ...] = ()
    steps: list[Step] = []
    for _ in range(draw(st.integers(0, 5))):
        said += draw(few(messages, 2))
        drop = draw(st.sampled_from([slice(0, 0), slice(0, 0), slice(0, 1), slice(1, 2)]))
        del said[drop]
        if draw(st.integers(0, 3)) == 0:
            offered = draw(tools)
        prompt = draw(
            st.sampled_from([Prompt(tuple(said), offered, draw(variables))] * 3 + [Prompt()])
        )
        counts = draw(st.integers(0, 2**31 - 1)), draw(st.integers(0, 2**31 - 1))
        action = Action(draw(texts), draw(completions), prompt, draw(texts), *counts)
        steps.append(Step(draw(observations), action, draw(floats), draw(st.none() | texts)))
    return tuple(steps)


scores = st.none() | st.floats(0, 1)


@st.composite
def judged_episodes(draw: st.DrawFn, id: str) -> Judged:
    steps = draw(walks())
    trajectory = Trajectory(
        draw(st.builds(Task, texts, texts, st.integers(1, 2**31 - 1))),
        steps,
        draw(observations),
        draw(st.sampled_from(Stop)),
        draw(texts),
        draw(st.integers(-(2**63), 2**63 - 1)),
        draw(st.integers(0, 2**31 - 1)),
        draw(st.integers(0, 2**31 - 1)),
        draw(st.booleans()),
        draw(texts),
        id,
        draw(texts),
    )
    each = st.lists(scores, min_size=len(steps), max_size=len(steps)).map(tuple)
    return Judged(
        trajectory, Verdict(draw(scores), draw(texts), draw(texts), draw(st.just(()) | each))
    )


@st.composite
def many_episodes(draw: st.DrawFn) -> list[Judged]:
    ids = draw(st.lists(st.text(min_size=1, max_size=6), max_size=4, unique=True))
    return [draw(judged_episodes(id)) for id in ids]


@given(many_episodes(), st.integers(1, 6))
@settings(max_examples=40, deadline=None)
def test_what_is_written_is_read(judged: list[Judged], group: int) -> None:
    with tempfile.TemporaryDirectory() as room, pytest.MonkeyPatch.context() as patch:
        patch.setattr(writing, "GROUP", group)
        folder = Path(room, "a:b #1%20", "0000")
        folder.mkdir(parents=True)
        write_trajectories(folder, judged, folder.parent / "images", origin={"recipe": "ab"})
        assert read_trajectories(folder) == judged
        for one in judged[:2]:
            assert read_episode(folder, one.trajectory.id) == one
        assert read_origin(folder) == {"recipe": "ab"}


def test_every_path_that_names_the_episodes_will_do(tmp_path: Path) -> None:
    write_trajectories(tmp_path, [episode(png(1))], tmp_path / "images")
    for name in ("", EPISODES, STEPS, TRAJECTORIES):
        assert read_trajectories(tmp_path / name) == [episode(png(1))]


def said(text: str, *token_ids: int) -> Completion:
    logprobs = np.linspace(-0.1, -0.7, len(token_ids), dtype=np.float32)
    return Completion(text, token_ids, tuple(logprobs.tolist()), "stop")


def episode(
    *frames: bytes, task: str = "t", id: str = "", score: float | None = 0.5, feedback: str = "fine"
) -> Judged:
    """An episode of one step per frame, which sees the frame."""
    taken = tuple(
        Step(Observation("see", (picture(frame),)), Action("go", said("go", 5, 6)), 0.25)
        for frame in frames
    )
    return Judged(
        Trajectory(
            Task(task, "walk", 8),
            taken,
            Observation("end"),
            Stop.TERMINATED,
            "base",
            seed=2**62,
            id=id or task,
        ),
        Verdict(score, feedback, "reward"),
    )


def chat(turns: int, tokens: int = 40, number: int = 0) -> Trajectory:
    """An episode of an agent that shows its whole history, in words that hardly compress."""
    random = np.random.default_rng([turns, number])
    history: tuple[Message, ...] = ()
    steps: list[Step] = []
    for _ in range(turns):
        seen = random.bytes(100).hex()
        history = (*history, Message("user", (seen,)))
        prompt = Prompt(history, (Tool("go", "walk", "{}"),))
        ids = tuple(random.integers(0, 2**17, tokens).tolist())
        completion = said(random.bytes(50).hex(), *ids)
        steps.append(Step(Observation(seen), Action("go", completion, prompt), 0.0))
        history = (*history, Message("assistant", (completion.text,), ids, "t"))
    task = Task(f"{turns} turns", "walk", turns)
    return Trajectory(
        task, tuple(steps), Observation(""), Stop.TRUNCATED, "base", number, id=f"{number}"
    )


def test_an_episode_takes_room_in_proportion_to_its_turns(tmp_path: Path) -> None:
    compressed: dict[int, float] = {}
    plain: dict[int, float] = {}
    for turns in (10, 20, 40, 80):
        folder = tmp_path / str(turns)
        folder.mkdir()
        judged = [Judged(chat(turns, number=k), Verdict(1.0, "", "j")) for k in range(3)]
        write_trajectories(folder, judged, tmp_path / "images")
        assert read_trajectories(folder) == judged
        group = pq.ParquetFile(folder / STEPS).metadata.row_group(0)
        columns = [group.column(k) for k in range(group.num_columns)]
        compressed[turns] = (folder / STEPS).stat().st_size / turns
        plain[turns] = sum(one.total_uncompressed_size for one in columns) / turns
    for size in (compressed, plain):
        assert max(size.values()) == size[10], size  # what every file has weighs most there
        assert size[80] > 0.5 * size[20], size


def test_several_actors_take_no_more_room_than_one(tmp_path: Path) -> None:
    """Their prompts have nothing in common, but each goes on from its own one before."""
    one, two = chat(40), chat(40, number=1)
    pairs = zip(one.steps, two.steps, strict=True)
    turns = [
        replace(step, observation=replace(step.observation, actor=actor))
        for pair in pairs
        for step, actor in zip(pair, ("attacker", "defender"), strict=True)
    ]
    both = replace(one, steps=tuple(turns), id="both")
    sizes: list[int] = []
    for name, some in {"apart": (one, two), "both": (both,)}.items():
        (tmp_path / name).mkdir()
        judged = [Judged(t, Verdict(1.0, "", "j")) for t in some]
        write_trajectories(tmp_path / name, judged, tmp_path / "images")
        assert read_trajectories(tmp_path / name) == judged
        sizes.append((tmp_path / name / STEPS).stat().st_size)
    assert sizes[1] < 1.1 * sizes[0]


def test_what_prompts_have_in_common_is_read_once(tmp_path: Path) -> None:
    write_trajectories(tmp_path, [Judged(chat(30), Verdict(1.0, "", "j"))], tmp_path / "images")
    steps = read_trajectories(tmp_path)[0].trajectory.steps
    prompts = [step.action.prompt for step in steps]
    assert sum(len(prompt.messages) for prompt in prompts) == 30 * 30
    assert len({id(message) for prompt in prompts for message in prompt.messages}) == 59
    assert len({id(prompt.tools) for prompt in prompts}) == 1


def test_one_episode_is_read_without_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(writing, "GROUP", 8)
    judged = [Judged(chat(k % 5, number=k), Verdict(1.0, "", "j")) for k in range(1, 15)]
    judged.append(Judged(chat(20, number=99), Verdict(1.0, "", "j")))
    write_trajectories(tmp_path, judged, tmp_path / "images")
    path = tmp_path / STEPS
    about = pq.ParquetFile(path).metadata
    sizes = [about.row_group(k).num_rows for k in range(about.num_row_groups)]
    assert len(sizes) > 3 and sizes[-1] == 20 and max(sizes[:-1]) <= 8
    ends = set(np.cumsum(sizes).tolist())
    assert ends <= set(np.cumsum([len(one.trajectory.steps) for one in judged]).tolist())
    # Everything of every other group is overwritten.
    whole = path.read_bytes()
    table = pq.read_table(path, columns=["episode"]).column("episode").to_pylist()
    for k in (0, 2, len(sizes) - 1):
        group = about.row_group(k)
        columns = [group.column(c) for c in range(group.num_columns)]
        first = min(c.dictionary_page_offset or c.data_page_offset for c in columns)
        size = sum(c.total_compressed_size for c in columns)
        footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
        blank = bytearray(b"\xff" * footer + whole[footer:])
        blank[first : first + size] = whole[first : first + size]
        path.write_bytes(bytes(blank))
        mine = set(table[sum(sizes[:k]) : sum(sizes[: k + 1])])
        for one in judged:
            if one.trajectory.id in mine or not one.trajectory.steps:
                assert read_episode(tmp_path, one.trajectory.id) == one
            else:
                with pytest.raises(StoreError, match=r"steps\.parquet is damaged"):
                    read_episode(tmp_path, one.trajectory.id)
    with pytest.raises(StoreError, match="holds no episode 'nobody'"):
        read_episode(tmp_path, "nobody")


def test_tasks_come_back_with_their_fields(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Sum(Task):
        numbers: tuple[int, ...]

    special = Sum("t", "walk", 8, (1, 2))
    judged = episode(png(1))
    write_trajectories(
        tmp_path,
        [replace(judged, trajectory=replace(judged.trajectory, task=special))],
        tmp_path / "i",
    )
    (read,) = read_trajectories(tmp_path)
    task = read.trajectory.task
    assert task == StoredTask("t", "walk", 8, '{"numbers":[1,2]}')
    assert isinstance(task, StoredTask)
    assert task_of(Sum, task.id, task.instruction, task.max_steps, task.data) == special
    (tmp_path / "again").mkdir()
    write_trajectories(tmp_path / "again", [read], tmp_path / "i")
    assert read_trajectories(tmp_path / "again") == [read]


def test_a_task_that_cannot_be_kept_is_refused(tmp_path: Path) -> None:
    @dataclass(frozen=True)
    class Odd(Task):
        found: Any

    odd = replace(episode().trajectory, task=Odd("t", "walk", 8, np.int64(3)))
    with pytest.raises(WorldError, match=r"tasks 't'\.found: numpy\.int64"):
        write_trajectories(tmp_path, [Judged(odd, episode().verdict)], tmp_path / "images")
    assert list(tmp_path.iterdir()) == []


def test_each_image_is_kept_once_and_never_rewritten(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    for name in "ab":
        (tmp_path / name).mkdir()
    x, y, z = png(10), png(11), png(12)
    write_trajectories(tmp_path / "a", [episode(x, y, x), episode(x, id="other")], folder)
    kept = place(folder, picture(x))
    assert kept.read_bytes() == x
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 2
    before = kept.stat()
    write_trajectories(tmp_path / "b", [episode(x, z)], folder)
    assert kept.stat().st_ino == before.st_ino and kept.stat().st_mtime_ns == before.st_mtime_ns
    assert len([path for path in folder.rglob("*") if path.is_file()]) == 3
    for path in (tmp_path / "a").rglob("*.parquet"):
        assert x not in path.read_bytes()
    read = read_trajectories(tmp_path / "b")[0].trajectory.steps[0].observation.images[0]
    assert read.png == b"" and STORE.read(read) == x


def test_images_of_prompts_and_of_the_end_are_kept_too(tmp_path: Path) -> None:
    first, last = picture(png(20)), picture(png(21))
    prompt = Prompt((Message("user", ("look", first, "what is it?")),))
    step = Step(Observation("see"), Action("go", said("go"), prompt), 0.0)
    t = replace(episode().trajectory, steps=(step,), final=Observation("", (last,)))
    # A handle of the same image that has lost its bytes does not stand in the way.
    bare = replace(step, observation=Observation("see", (replace(first, png=b""),)))
    other = replace(t, steps=(bare, step), id="other")
    judged = [Judged(other, Verdict(1.0, "", "j")), Judged(t, Verdict(1.0, "", "j"))]
    write_trajectories(tmp_path, judged, tmp_path / "images")
    assert read_trajectories(tmp_path) == judged
    for image in (first, last):
        assert place(tmp_path / "images", image).read_bytes() == image.png


def test_an_image_that_is_nowhere_is_named(tmp_path: Path) -> None:
    lost = Image("ab" * 32, 1, 1)
    t = replace(episode().trajectory, final=Observation("", (lost,)))
    with pytest.raises(StoreError, match=lost.sha256):
        write_trajectories(tmp_path, [Judged(t, Verdict(1.0, "", "j"))], tmp_path / "images")
    assert not list(tmp_path.glob("*.parquet"))


def test_trajectories_hold_no_image_bytes(tmp_path: Path) -> None:
    """Episodes of 20 steps of 20 images each, in a process of their own."""
    episodes = 200
    script = """
import dataclasses, hashlib, resource, sys
from pathlib import Path
from selfwright.core.images import STORE, picture
from selfwright.core.store import read_trajectories, write_trajectories
from selfwright.core.types import *

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10

import pyarrow.parquet, pandas
folder = Path(sys.argv[1])
head = b"\\x89PNG\\r\\n\\x1a\\n" + (13).to_bytes(4, "big") + b"IHDR" + bytes([0, 0, 0, 1] * 2)
with STORE.kept_in(folder / "images"):
    kept = []
    for k in range(60):
        kept.append(STORE.keep(picture(head + k.to_bytes(4, "big") * 262144)))
judged = []
for e in range(int(sys.argv[2])):
    steps = []
    for s in range(20):
        images = tuple(kept[(e + s + k) % 60] for k in range(20))
        prompt = Prompt((Message("user", images),))
        steps.append(Step(Observation("", images), Action("a", Completion("a"), prompt), 0.0))
    t = Trajectory(Task(str(e), "", 20), tuple(steps), Observation(""), Stop.TRUNCATED, "b", 0,
                   id=str(e))
    judged.append(Judged(t, Verdict(None, "", "j")))
before = peak()
write_trajectories(folder, judged, folder / "images")
del judged
count = 0
for one in read_trajectories(folder):
    for step in one.trajectory.steps:
        count += sum(not image.png for image in step.observation.images)
        count += sum(not image.png for image in step.action.prompt.images)
print(count, peak() - before)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path), str(episodes)],
        capture_output=True,
        text=True,
        check=True,
    )
    count, grown = map(int, done.stdout.split())
    assert count == 2 * episodes * 20 * 20
    # 160 000 images of 1 MiB each time.
    assert grown < 200, grown


def damaged_files(folder: Path) -> list[Path]:
    return [folder / EPISODES, folder / STEPS, *(folder / "verdicts").glob("*.parquet")]


def test_a_file_cut_anywhere_is_named(tmp_path: Path) -> None:
    write_trajectories(tmp_path, [episode(png(1), png(2))], tmp_path / "images")
    for path in damaged_files(tmp_path):
        whole = path.read_bytes()
        for length in (0, 1, 4, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
            path.write_bytes(whole[:length])
            with pytest.raises(StoreError, match=rf"{path.name} is damaged"):
                read_trajectories(tmp_path)
        path.unlink()
        with pytest.raises(StoreError, match=rf"{path.name} is missing"):
            read_trajectories(tmp_path)
        path.write_bytes(whole)
    assert len(read_trajectories(tmp_path)) == 1


@pytest.mark.parametrize("name", [EPISODES, STEPS])
def test_a_flipped_byte_is_seen(tmp_path: Path, name: str) -> None:
    judged = [episode(png(1), task=str(number)) for number in range(50)]
    write_trajectories(tmp_path, judged, tmp_path / "images")
    path = tmp_path / name
    whole = path.read_bytes()
    footer = int.from_bytes(whole[-8:-4], "little") + 8
    seen = 0
    for at in range(10, len(whole) - footer, 97):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1 :])
        try:
            assert read_trajectories(tmp_path) == judged
        except StoreError:
            seen += 1
    assert seen > 10


def test_files_that_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    for name, ids in {"a": "xy", "b": "yx", "c": "x"}.items():
        (tmp_path / name).mkdir()
        judged = [episode(png(1), id=id) for id in ids]
        write_trajectories(tmp_path / name, judged, tmp_path / "images")
    steps = {name: (tmp_path / name / STEPS).read_bytes() for name in "abc"}
    for name, other in ("ab", "ac", "ca"):
        (tmp_path / name / STEPS).write_bytes(steps[other])
        with pytest.raises(StoreError, match="is damaged"):
            read_trajectories(tmp_path / name)
        (tmp_path / name / STEPS).write_bytes(steps[name])


def test_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(parquet, "VERSION", 6)
        write_trajectories(tmp_path, [episode()], tmp_path / "images")
    for path in (tmp_path, tmp_path / EPISODES):
        with pytest.raises(StoreError, match=r"has schema version 6.* reads 2 to 5"):
            read_trajectories(path)
    table = pq.read_table(tmp_path / EPISODES)
    pq.write_table(table.replace_schema_metadata(None), tmp_path / EPISODES)
    with pytest.raises(StoreError, match="has schema version None"):
        read_trajectories(tmp_path)
    with pytest.raises(StoreError, match=r"nowhere\.parquet is missing"):
        read_trajectories(tmp_path / "nowhere.parquet")


@pytest.mark.parametrize("score", [float("nan"), float("inf"), -0.1, 1.5])
def test_a_score_that_is_none_of_ours_is_refused(tmp_path: Path, score: float) -> None:
    wrong = episode(png(1), score=score)
    step = replace(wrong, verdict=replace(wrong.verdict, score=0.5, steps=(score,)))
    for one in (wrong, step):
        with pytest.raises(StoreError, match=r"task 't', attempt 0: judge 'reward' gave the score"):
            write_trajectories(tmp_path, [one], tmp_path / "images")
    assert list(tmp_path.iterdir()) == []


def observed(t: Trajectory, **changes: Any) -> Trajectory:
    step = t.steps[-1]
    seen = replace(step.observation, **changes)
    return replace(t, steps=(*t.steps[:-1], replace(step, observation=seen)))


def acted(t: Trajectory, **changes: Any) -> Trajectory:
    step = t.steps[-1]
    return replace(t, steps=(*t.steps[:-1], replace(step, action=replace(step.action, **changes))))


WRONG: dict[str, Callable[[Trajectory], Trajectory]] = {
    "step 1: observation: text: .*surrogate": lambda t: observed(t, text="\ud83d"),
    "step 1: observation: actions: str, wanted a tuple": lambda t: observed(t, actions="go"),
    "step 1: observation: actions: None, wanted": lambda t: observed(t, actions=(None,)),
    "step 1: observation: images: ": lambda t: observed(t, images=(b"",)),
    "step 1: completion: logprobs: NaN": lambda t: acted(
        t, completion=Completion("", (1,), (float("nan"),))
    ),
    "step 1: completion: token_ids: ": lambda t: acted(t, completion=Completion("", (2**31,))),
    "step 1: prompt: messages: parts: ": lambda t: acted(
        t,
        prompt=Prompt((Message("user", ("a", 3)),)),  # pyright: ignore[reportArgumentType]
    ),
    "step 1: prompt: messages: parts: None": lambda t: acted(
        t,
        prompt=Prompt((Message("user", ("a", None)),)),  # pyright: ignore[reportArgumentType]
    ),
    "step 1: reward: NaN": lambda t: replace(
        t, steps=(t.steps[0], replace(t.steps[1], reward=float("nan")))
    ),
    "final: text: .*surrogate": lambda t: replace(t, final=Observation("\ud83d")),
    "seed: ": lambda t: replace(t, seed=2**64),
    "error: .*surrogate": lambda t: replace(t, error="\udc00"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_cannot_be_kept_names_its_trajectory(tmp_path: Path, what: str) -> None:
    fine = episode(png(1), png(2), task="half an emoji")
    broken = replace(fine, trajectory=WRONG[what](fine.trajectory))
    with pytest.raises(StoreError, match=rf"task 'half an emoji', attempt 0: {what}"):
        write_trajectories(tmp_path, [episode(), broken], tmp_path / "images")
    assert list(tmp_path.glob("*.parquet")) == []


def test_an_id_names_one_episode(tmp_path: Path) -> None:
    two = [episode(task="a", id="x"), episode(task="b", id="x")]
    with pytest.raises(
        StoreError, match=r"task 'b', attempt 0 has the id 'x', but so has task 'a'"
    ):
        write_trajectories(tmp_path, two, tmp_path / "images")
    bare = [replace(one, trajectory=replace(one.trajectory, id="")) for one in two]
    ids: list[list[str]] = []
    for many in (bare, bare, [*bare, bare[0]]):
        write_trajectories(tmp_path, many, tmp_path / "images")
        read = read_trajectories(tmp_path)
        ids.append([one.trajectory.id for one in read])
        assert [replace(one, trajectory=replace(one.trajectory, id="")) for one in read] == many
    assert ids[0] == ids[1] == ids[2][:2]
    assert all(ids[2]) and len(set(ids[2])) == 3


def test_a_folder_is_written_anew(tmp_path: Path) -> None:
    write_trajectories(tmp_path, [episode(png(1), id="x")], tmp_path / "images")
    write_verdicts(tmp_path, judge_identity("other", {}), {"x": Verdict(0.0, "", "other")})
    (tmp_path / TRAJECTORIES).write_bytes(b"of an older version")
    new = [episode(png(1), png(2), id="y")]
    write_trajectories(tmp_path, new, tmp_path / "images", judge_identity("mine", {}))
    assert read_trajectories(tmp_path / TRAJECTORIES) == new
    assert [one.use for one in judges_of(tmp_path)] == ["mine"]


def test_many_judges_can_judge_one_episode(tmp_path: Path) -> None:
    rubric = tmp_path / "rubric.txt"
    rubric.write_text("Be kind.")
    kind = judge_identity("model", {"rubric": "rubric.txt"}, {"rubric.txt": rubric})
    judged = [episode(png(1), png(2), id="x"), episode(png(1), id="y")]
    write_trajectories(tmp_path, judged, tmp_path / "images", kind)
    rubric.write_text("Be strict.")
    strict = judge_identity("model", {"rubric": "rubric.txt"}, {"rubric.txt": rubric})
    assert strict.hash != kind.hash and strict.config == kind.config
    said = {
        "x": Verdict(0.0, "no", "strict", (None, 0.25)),
        "y": Verdict(None, "who knows", "strict"),
    }
    write_verdicts(tmp_path, strict, {"x": said["x"]})
    with pytest.raises(StoreError, match=r"all but 1 of these 2 episodes.*'y'"):
        read_trajectories(tmp_path, strict.hash)
    write_verdicts(tmp_path, strict, said)
    assert read_verdicts(tmp_path, strict.hash) == said
    assert [one.verdict for one in read_trajectories(tmp_path, strict.hash)] == [*said.values()]
    assert read_episode(tmp_path, "y", strict.hash).verdict == said["y"]
    assert read_trajectories(tmp_path) == judged
    assert judges_of(tmp_path) == sorted([kind, strict], key=lambda one: one.hash)
    told = json.loads((tmp_path / "verdicts" / f"{kind.hash}.json").read_text())
    assert told["use"] == "model" and told["config"] == {"rubric": "rubric.txt"}
    assert list(told["content"]) == ["rubric.txt"] and told["hash"] == kind.hash
    with pytest.raises(StoreError, match=rf"nobody\.parquet is missing.*{kind.hash} \(model\)"):
        read_trajectories(tmp_path, "nobody")


def test_verdicts_on_what_is_not_there_are_refused(tmp_path: Path) -> None:
    write_trajectories(tmp_path, [episode(png(1), id="x")], tmp_path / "images")
    judge = judge_identity("other", {})
    for verdicts, words in (
        ({"z": Verdict(0.0, "", "o")}, "holds no episode 'z'"),
        ({"x": Verdict(2.0, "", "o")}, "episode 'x': judge 'o' gave the score 2.0"),
        ({"x": Verdict(1.0, "", "o", (1.0, 0.0))}, "gave 2 scores of steps.* has 1"),
        ({"x": Verdict(1.0, "\ud83d", "o")}, "feedback: .*surrogate"),
    ):
        with pytest.raises(StoreError, match=words):
            write_verdicts(tmp_path, judge, verdicts)
    assert len(judges_of(tmp_path)) == 1
    with pytest.raises(StoreError, match="not for JSON"):
        judge_identity("other", {"threshold": float("nan")})
    with pytest.raises(StoreError, match=r"its metadata, .*surrogate"):
        write_trajectories(tmp_path, [], tmp_path / "images", origin={"base": "\ud83d"})
    with pytest.raises(StoreError, match=r"cannot read .*none\.txt"):
        judge_identity("other", {}, {"none.txt": tmp_path / "none.txt"})
    (path,) = (tmp_path / "verdicts").glob("*.json")
    path.write_text(path.read_text().replace('""', '"reward"'))
    with pytest.raises(StoreError, match="is damaged"):
        judges_of(tmp_path)


def test_a_run_reads_as_a_dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # read when datasets is first imported
    import datasets

    for index in range(2):
        folder = tmp_path / f"iterations/{index:04d}"
        folder.mkdir(parents=True)
        t = replace(chat(3), id=f"{index}")
        judged = [Judged(t, Verdict(None, "", "j")), episode(png(1), task=f"task {index}")]
        write_trajectories(folder, judged, tmp_path / "images")
    whole = dataset(tmp_path, split="train")
    assert whole["iteration"][:] == [0, 0, 0, 0, 1, 1, 1, 1]
    assert whole["turn"][:] == [0, 1, 2, 0, 0, 1, 2, 0]
    assert str(whole.split) == "train"
    assert [len(prompt["messages"]) for prompt in whole["prompt"]] == [1, 3, 5, 0] * 2
    last = chat(3).steps[2].action.prompt.messages[4]
    assert whole[6]["prompt"]["messages"][4]["parts"] == [{"text": last.text, "image": None}]
    assert whole[6]["score"] is None and whole[7]["score"] == 0.5
    assert whole[7]["task_id"] == "task 1"
    assert whole[7]["observation"]["images"][0]["sha256"] == picture(png(1)).sha256

    files = [str(path) for path in sorted(tmp_path.glob("iterations/*/steps.parquet"))]
    cache = str(tmp_path / "cache")
    found: Any = datasets.load_dataset("parquet", data_files=files, cache_dir=cache)["train"]
    assert found[3]["completion"]["token_ids"] == [5, 6]
    assert [row["episode"] for row in found] == ["0"] * 3 + ["task 0"] + ["1"] * 3 + ["task 1"]


def test_a_run_without_iterations_is_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="holds no committed iteration"):
        dataset(tmp_path)
