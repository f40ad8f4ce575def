"""What screenshots cost a run: memory and disk, with 20 of them an episode and without.

    python benchmarks/pictures.py [--episodes 1000]

Episodes are played and stored in a process of their own, once with a new picture in every
observation and once with none; what is compared is the most memory that each took. Then how the
file of steps grows with the turns, and how much is read of it for one episode. Results go to
``benchmarks/results/pictures.json``.
"""

import argparse
import asyncio
import json
import random
import resource
import struct
import subprocess
import sys
import tempfile
import zlib
from pathlib import Path
from typing import Any, ClassVar

from selfwright.agents.chat import Chat, ChatConfig
from selfwright.core.config import Config, Fleet
from selfwright.core.hosting.pool import open_worlds
from selfwright.core.images import STORE, picture
from selfwright.core.play.draw import starts
from selfwright.core.play.players import RandomPlayer
from selfwright.core.play.rollout import rollouts
from selfwright.core.store import read_episode, write_trajectories
from selfwright.core.types import Judged, Observation, Task, TimeStep, Verdict, WorldSpec

RESULT = Path(__file__).with_name("results") / "pictures.json"
WIDTH, HEIGHT = 160, 100


def png(seed: int, width: int, height: int, size: int) -> bytes:
    """A PNG file of about ``size`` bytes: so much of its rows is noise."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    row, noise = 3 * width, random.Random(seed).randbytes(size)
    share = size // height
    rows = b"".join(
        b"\0" + noise[k * share : (k + 1) * share][:row].ljust(row, b"\0") for k in range(height)
    )
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows, 1))
        + chunk(b"IEND", b"")
    )


class ShowsConfig(Config):
    turns: int = 20
    pictures: bool = True


class Shows:
    """Every step shows a new screen."""

    Config = ShowsConfig
    spec: ClassVar[WorldSpec] = WorldSpec(isolation="inline")

    def __init__(self, config: ShowsConfig) -> None:
        self._config = config
        self._number = self._turn = 0

    def tasks(self, split: str) -> list[Task]:
        return [Task(f"{k}", "Look.", self._config.turns) for k in range(100_000)]

    async def reset(self, task: Task, seed: int) -> Observation:
        self._number, self._turn = int(task.id), 0
        return self._screen()

    async def step(self, action: str) -> TimeStep:
        self._turn += 1
        return TimeStep(self._screen(), 0.0, False)

    async def close(self) -> None:
        pass

    def _screen(self) -> Observation:
        if not self._config.pictures:
            return Observation(f"screen {self._turn}", actions=("on",))
        shot = png(1000 * self._number + self._turn, WIDTH, HEIGHT, 40_000)
        return Observation(f"screen {self._turn}", (picture(shot),), ("on",))


async def played(folder: Path, episodes: int, turns: int, pictures: bool) -> dict[str, Any]:
    fleet = Fleet.model_validate({"parallel": 64})
    config = {"turns": turns, "pictures": pictures}
    with STORE.kept_in(folder / "images"):
        async with await open_worlds("pictures:Shows", config, fleet) as worlds:
            tasks = await worlds.tasks("train").take(range(episodes))
            player = RandomPlayer(Chat(ChatConfig()))
            done = await rollouts(player, worlds, starts(tasks, 1, 0), 0)
        judged = [Judged(one, Verdict(1.0, "", "none")) for one in done]
        write_trajectories(folder, judged, folder / "images")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    before = read_bytes()
    read_episode(folder, done[len(done) // 2].id)
    return {
        "peak_mib": round(peak),
        "steps_bytes": (folder / "steps.parquet").stat().st_size,
        "read_for_one_bytes": read_bytes() - before,
    }


def read_bytes() -> int:
    """What this process has read so far."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith("rchar")))


def apart(episodes: int, turns: int, pictures: bool) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as room:
        asked = json.dumps([room, episodes, turns, pictures])
        command = [sys.executable, __file__, "--apart", asked]
        out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=3000)
        return json.loads(out.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--episodes", type=int, default=1000)
    parser.add_argument("--apart", default="")
    asked = parser.parse_args()
    if asked.apart:
        room, episodes, turns, pictures = json.loads(asked.apart)
        sys.path.append(str(Path(__file__).parent))
        print(json.dumps(asyncio.run(played(Path(room), episodes, turns, pictures))))
        return
    shown, bare = (apart(asked.episodes, 20, pictures) for pictures in (True, False))
    growth = {turns: apart(100, turns, True)["steps_bytes"] for turns in (10, 20, 40, 80)}
    found = {
        "episodes": asked.episodes,
        "pictures_each": 21,
        "peak_mib": {"with": shown["peak_mib"], "without": bare["peak_mib"]},
        "over_mib": shown["peak_mib"] - bare["peak_mib"],
        "steps_bytes": shown["steps_bytes"],
        "read_for_one_bytes": shown["read_for_one_bytes"],
        "steps_bytes_of_100_episodes_by_turns": growth,
    }
    print(json.dumps(found, indent=1))
    RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
