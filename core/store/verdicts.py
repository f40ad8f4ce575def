"""What judges say of a folder's episodes: a file a judge, by what the judge is."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..errors import DiskError, StoreError
from ..files import canonical_json, read_json, sync_folder, write_json
from ..types import Verdict
from .parquet import damaged, read_rows, reading, writing
from .schema import EPISODE, EPISODES, VERDICT, VERDICTS, VerdictRow
from .shapes import FAULTS


@dataclass(frozen=True, slots=True)
class JudgeIdentity:
    """All that a judge's verdicts depend on. Made by ``judge_identity``."""

    use: str
    """The plug-in's name; empty if nobody said."""
    config: str = "{}"
    """Its settings, as canonical JSON."""
    content: tuple[tuple[str, str], ...] = ()
    """Files that the settings name, sorted, each with its SHA-256."""

    @property
    def hash(self) -> str:
        """16 hexadecimal digits."""
        return hashlib.sha256(canonical_json(self.payload()).encode()).hexdigest()[:16]

    def payload(self) -> dict[str, Any]:
        """As JSON has it."""
        config = json.loads(self.config)
        return {"use": self.use, "config": config, "content": dict(self.content)}


UNKNOWN = JudgeIdentity("")
"""Whose verdicts those are that were stored without saying."""


def judge_identity(
    use: str, config: Mapping[str, Any], files: Mapping[str, Path] | None = None
) -> JudgeIdentity:
    """What the judge ``use`` is with these settings.

    Args:
        use: its name.
        config: all settings, defaults included; JSON-serialisable.
        files: those whose content counts, such as a rubric, by the name that ``config`` has.

    Raises:
        StoreError: a file cannot be read, or a setting is not for JSON.
    """
    try:
        content = {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name, path in (files or {}).items()
        }
    except OSError as error:
        raise StoreError(f"cannot read {error.filename}: {error.strerror}") from error
    try:
        text = canonical_json(dict(config))
        text.encode()
    except (TypeError, ValueError) as error:
        raise StoreError(f"the settings of the judge {use!r} are not for JSON: {error}") from error
    return JudgeIdentity(use, text, tuple(sorted(content.items())))


def write_verdicts(folder: Path, judge: JudgeIdentity, verdicts: Mapping[str, Verdict]) -> None:
    """What ``judge`` says of episodes that ``folder`` holds, by id, instead of what it said before.

    It may be about some of them only.

    Raises:
        StoreError: an episode is not there, a score is none of ours, or the disk is full.
    """
    lengths = _lengths(folder)
    for episode, verdict in verdicts.items():
        if episode not in lengths:
            raise StoreError(f"{folder} holds no episode {episode!r}, so nobody can judge it there")
        check(f"episode {episode!r}", verdict, lengths[episode])
    save(folder, judge, ((one, verdicts[one]) for one in lengths if one in verdicts))


def read_verdicts(folder: Path, judge_hash: str) -> dict[str, Verdict]:
    """What that judge said, by the episode's id.

    Raises:
        StoreError: it said nothing here, or the file is damaged.
    """
    path = folder / VERDICTS / f"{judge_hash}.parquet"
    if not path.exists():
        known = ", ".join(f"{one.hash} ({one.use or 'unknown'})" for one in judges_of(folder))
        raise StoreError(f"{path} is missing; judges of these episodes: {known or 'none'}")
    rows = cast("list[VerdictRow]", read_rows(path, VERDICT)[0])
    verdicts = {row.episode: Verdict(row.score, row.feedback, row.judge, row.steps) for row in rows}
    if len(verdicts) < len(rows):
        raise damaged(path, "it judges an episode twice")
    return verdicts


def judges_of(folder: Path) -> list[JudgeIdentity]:
    """Whoever judged the episodes that ``folder`` holds, by their hashes.

    Raises:
        StoreError: what is told of one of them is damaged.
    """
    found: list[JudgeIdentity] = []
    for path in sorted((folder / VERDICTS).glob("*.json")):
        if not path.with_suffix(".parquet").exists():
            continue
        payload: Any = read_json(path)
        try:
            content = tuple(sorted(payload["content"].items()))
            one = JudgeIdentity(payload["use"], canonical_json(payload["config"]), content)
        except (*FAULTS, LookupError) as error:
            raise damaged(path, error) from error
        if one.hash != path.stem:
            raise damaged(path, f"what it tells has the hash {one.hash}")
        found.append(one)
    return found


def save(folder: Path, judge: JudgeIdentity, verdicts: Iterable[tuple[str, Verdict]]) -> None:
    """Write them as they are. Raises: StoreError: one cannot be kept, or the disk is full."""
    inside = folder / VERDICTS
    try:
        table = VERDICT.table(
            [VerdictRow(one, v.score, v.feedback, v.judge, v.steps) for one, v in verdicts]
        )
    except FAULTS as error:
        raise StoreError(f"cannot write {inside}: {error}") from error
    try:
        inside.mkdir(exist_ok=True)
        sync_folder(folder)
    except OSError as error:
        raise DiskError(f"cannot write {inside}: {error.strerror}") from error
    write_json(inside / f"{judge.hash}.json", judge.payload() | {"hash": judge.hash})
    path = inside / f"{judge.hash}.parquet"
    with writing(path, VERDICT.schema, {"judge": judge.hash}) as file:
        file.write_table(table)


def check(label: str, verdict: Verdict, steps: int) -> None:
    """Whether it may be kept, of an episode of so many steps. Raises: StoreError."""
    for score in (verdict.score, *verdict.steps):
        if score is not None and not 0 <= score <= 1:
            raise StoreError(
                f"{label}: judge {verdict.judge!r} gave the score {score}; "
                "a score lies in [0, 1], and is None if undecided"
            )
    if len(verdict.steps) not in (0, steps):
        raise StoreError(
            f"{label}: judge {verdict.judge!r} gave {len(verdict.steps)} scores of steps, "
            f"but the episode has {steps}"
        )


def _lengths(folder: Path) -> dict[str, int]:
    """How many steps each episode has."""
    found: dict[str, int] = {}
    with reading(folder / EPISODES, EPISODE) as reader:
        for k in reader.groups:
            columns = reader.group(k, ["id", "steps"]).to_pydict()
            found |= zip(columns["id"], columns["steps"], strict=True)
    return found
