"""Several processes that learn together: process 0 leads the run, the others follow its learner.

``accelerate launch`` starts them. The leader plays, judges, decides and writes; whatever it asks of
its learner it first tells the others, which then do the same with theirs (``PlainLearner`` takes
its share of the micro-batches by itself). Orders are announced in the store through which the
processes found one another, so that a follower may wait for as long as a rollout takes; beside
that, all of them say every second that they are alive, and none outlives the leader.

The machines must see the run's folder, and the models, under the same paths.
"""

# torch is partly untyped, accelerate wholly.
# pyright: reportUnknownMemberType=false, reportMissingTypeStubs=false

import asyncio
import os
import pickle
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import psutil
import torch.distributed as dist
from torch.distributed.distributed_c10d import (
    _get_default_store,  # pyright: ignore[reportPrivateUsage]
)

from ..core.config import Config
from ..core.errors import LearnerError, RecipeError, SelfwrightError
from ..core.protocols import Learner, LearnerFactory
from ..core.recipe import Recipe
from ..core.types import Batch, Metrics
from ..trainers.learning.learner import LearnerConfig, accelerator

POLL_S = 0.02
"""Seconds between two looks at what was announced."""
BEAT_S = 1.0
"""Seconds between two signs of life."""
SILENT_S = 120.0
"""A process that gave none for so long is taken for dead; one on this machine that has died is
known to have at once."""
GRACE_S = 15.0
"""How long the leader may take to end by itself once a follower is lost; a collective operation
that waits for the dead would otherwise keep it."""
LEAVE_S = 30.0
"""How long followers may take to leave when the run is over."""

GONE = "process 0, or what launched all of them, is gone"
"""Said when nobody holds the store any more."""

BOOT = Path("/proc/sys/kernel/random/boot_id")
"""Names the running kernel: unlike a host's name, and the number of its first PID namespace, no two
machines share it."""

T = TypeVar("T")


class ProcessGroup:
    """This process among the others."""

    def __init__(self, recipe: Recipe) -> None:
        """Meet the others.

        Raises:
            RecipeError: the recipe's learner works in one process only.
        """
        _refuse_lonely(recipe.learner.use, recipe.learner.plugin)
        config = recipe.learner.config
        device = config.device if isinstance(config, LearnerConfig) else "auto"
        state: Any = accelerator(device)
        self.rank: int = state.process_index
        self.size: int = state.num_processes
        self.trouble = ""
        """Why the run cannot go on: what became of another process."""
        self._orders = 0
        self._over = threading.Event()
        self._alarm: Callable[[], object] | None = None
        # Of its own, on the CPU: what is said here is no tensor, and may wait beside those.
        self._group: Any = dist.new_group(backend="gloo")
        store: Any = _get_default_store()
        self._store: Any = store.clone()
        self._store.set(f"host/{self.rank}", socket.gethostname())
        self._store.set(f"place/{self.rank}", f"{_place()} {os.getpid()}")
        self._rounds = 0
        """Of the watch; they stop when the store does not answer."""
        self._watch = threading.Thread(target=self._keep_watch, daemon=True)
        self._watch.start()
        threading.Thread(target=self._mind_watch, daemon=True).start()

    def make_learner(self, plugin: type[Any], config: Config, model: str, seed: int) -> Learner:
        """A learner that all processes share from now on, in place of the one before."""
        _refuse_lonely(plugin.__name__, plugin)
        self.order("make_learner", plugin, config, model, seed)
        return Shared(self, plugin(config, model, seed))

    def order(self, what: str, *details: Any) -> None:
        """Have the followers do ``what``; they begin at once.

        Raises:
            LearnerError: a process is lost, or ``details`` cannot be sent.
        """
        if self.trouble:
            raise LearnerError(self.trouble)
        try:
            # From one of our own processes to another, never to or from a disk.
            sent = pickle.dumps((what, details))
        except Exception as cause:
            raise LearnerError(
                f"what {what!r} needs cannot be sent to the other processes: {cause}; start the "
                "run in one process"
            ) from cause
        self._orders += 1
        self._store.set(f"order/{self._orders}", what)
        dist.broadcast_object_list([sent], src=0, group=self._group)

    def next_order(self) -> tuple[str, Sequence[Any]]:
        """What the leader asks for next, however long that takes; the watch ends a vain wait."""
        self._orders += 1
        while not self._store.check([f"order/{self._orders}"]):
            time.sleep(POLL_S)
        came: list[Any] = [None]
        dist.broadcast_object_list(came, src=0, group=self._group)
        return pickle.loads(came[0])

    async def guarded(self, whole: Coroutine[Any, Any, T]) -> T:
        """``whole``, ended at once when a follower is lost.

        Raises:
            LearnerError: one was; says which, and what is known of it.
        """
        loop = asyncio.get_running_loop()
        task = asyncio.ensure_future(whole)
        self._alarm = lambda: loop.call_soon_threadsafe(task.cancel)
        loop.add_signal_handler(signal.SIGTERM, self._told_to_stop)
        try:
            return await task
        except SelfwrightError:
            raise
        except BaseException:
            # What was raised here may be no more than the echo of a process that died.
            if isinstance(sys.exception(), Exception):
                await asyncio.to_thread(self.look_around)
            if not self.trouble:
                raise
        finally:
            self._alarm = None
            loop.remove_signal_handler(signal.SIGTERM)
        raise LearnerError(self.trouble) from None

    def _told_to_stop(self) -> None:
        # Launchers do so when one of their processes has died, which may have come first.
        self.look_around()
        self._lost(self.trouble or "told to stop (SIGTERM)")

    def look_around(self) -> None:
        """Give what has befallen another process a moment to be known."""
        until = time.monotonic() + 2 * BEAT_S
        while not self.trouble and time.monotonic() < until:
            try:
                self.trouble = self._found(self._store, {}) or self.trouble
            except dist.DistError:
                self.trouble = self.trouble or GONE
            time.sleep(POLL_S)

    def leave(self, error: BaseException | None = None) -> None:
        """Tell the others that it is over, and why if it failed; wait for them if it did not."""
        # The launcher may have taken the store away, and what is done is done.
        with suppress(dist.DistError, LearnerError):
            if error is not None:
                message = str(error) or type(error).__name__
                if not isinstance(error, SelfwrightError):
                    message = f"{type(error).__name__}: {message}"
                self._store.set(f"word/{self.rank}", message)
            elif self.rank:
                self._store.set(f"left/{self.rank}", "")
            else:
                self.order("end")
                until = time.monotonic() + LEAVE_S
                left = [f"left/{rank}" for rank in range(1, self.size)]
                while not self._store.check(left) and time.monotonic() < until:
                    time.sleep(POLL_S)
        self._over.set()
        self._watch.join(2 * BEAT_S)

    def _keep_watch(self) -> None:
        store, beats, missed = self._store.clone(), 0, 0
        heard: dict[int, tuple[bytes, float]] = {}
        while not self._over.wait(BEAT_S):
            try:
                beats += 1
                store.set(f"beat/{self.rank}", str(beats))
                found, missed = self._found(store, heard), 0
            except dist.DistError:
                missed += 1
                found = GONE if missed > 1 else ""
            if found and not self._over.is_set():
                self._lost(found)
                return
            self._rounds += 1

    def _mind_watch(self) -> None:
        """A store whose host has left the network lets the watch wait until TCP gives up."""
        rounds, waited = 0, 0.0
        while not self._over.wait(BEAT_S) and self._watch.is_alive():
            # Counted, not read from a clock, which runs on while all of this process is stopped.
            waited = waited + BEAT_S if self._rounds == rounds else 0.0
            rounds = self._rounds
            if waited > SILENT_S:
                self._lost(GONE)
                return

    def _found(self, store: Any, heard: dict[int, tuple[bytes, float]]) -> str:
        """What is wrong with the processes that this one depends on; empty if nothing is."""
        for rank in range(1, self.size) if not self.rank else (0,):
            who = f"process {rank} of {self.size}"
            if store.check([f"word/{rank}"]):
                return f"{who} failed: {store.get(f'word/{rank}').decode()}"
            if not store.check([f"place/{rank}"]) or store.check([f"left/{rank}"]):
                continue
            place, _, pid = store.get(f"place/{rank}").decode().rpartition(" ")
            if place == _place() and not _alive(int(pid)):
                return f"{who} (pid {pid}) has died"
            beat = store.get(f"beat/{rank}") if store.check([f"beat/{rank}"]) else b""
            now = time.monotonic()
            if heard.setdefault(rank, (beat, now))[0] != beat:
                heard[rank] = (beat, now)
            elif now - heard[rank][1] > SILENT_S:
                where = f"(pid {pid} on {store.get(f'host/{rank}').decode()})"
                return f"{who} {where} has given no sign of life for {SILENT_S:g} s"
        return ""

    def _lost(self, trouble: str) -> None:
        self.trouble = self.trouble or trouble
        if self.rank:
            # It may be in the midst of an operation that will never end, and has nothing to save.
            self._end(f"process {self.rank} of {self.size} ends: {self.trouble}")
        if self._alarm is not None:
            self._alarm()
        threading.Thread(target=self._end_late, daemon=True).start()

    def _end_late(self) -> None:
        if not self._over.wait(GRACE_S):
            self._end(self.trouble)

    def _end(self, message: str) -> NoReturn:
        print(message, file=sys.stderr, flush=True)
        os._exit(1)


class Shared:
    """The learner of all processes, as the leader has it."""

    def __init__(self, group: ProcessGroup, mine: Learner) -> None:
        self._group = group
        self._mine = mine

    def update(self, batch: Batch, progress: float) -> Metrics:
        # A loss with networks of its own goes along as it is now: all of them take the same steps
        # from there, and the next batch brings the leader's again.
        self._group.order("update", batch, progress)
        return self._mine.update(batch, progress)

    def export(self, folder: Path) -> None:
        self._group.order("export", folder.resolve())
        self._mine.export(folder)

    def save(self, folder: Path) -> None:
        self._group.order("save", folder.resolve())
        self._mine.save(folder)

    def restore(self, folder: Path) -> None:
        self._group.order("restore", folder.resolve())
        self._mine.restore(folder)


def lead(recipe: Recipe, main: Callable[[LearnerFactory], Coroutine[Any, Any, T]]) -> T:
    """Run ``main`` here, with learners that the other processes share.

    Raises:
        LearnerError: another process was lost.
    """
    group = ProcessGroup(recipe)
    try:
        result = asyncio.run(group.guarded(main(group.make_learner)))
    except BaseException as error:
        group.leave(error)
        raise
    group.leave()
    return result


def follow(recipe: Recipe) -> None:
    """Do what the leader says, until it says that the run is over.

    Raises:
        LearnerError: the leader is gone.
        Exception: what the learner raised; the leader was told.
    """
    learner: Any = None
    group = ProcessGroup(recipe)
    try:
        while (order := group.next_order())[0] != "end":
            what, details = order
            if what == "make_learner":
                plugin, *details = details
                learner = None  # Before there is another: it may fill the device.
                learner = plugin(*details)
            else:
                getattr(learner, what)(*details)
    except BaseException as error:
        if isinstance(error, RuntimeError) and not isinstance(error, SelfwrightError):
            group.look_around()
            if group.trouble:
                error = LearnerError(group.trouble)
        group.leave(error)
        raise error from None
    group.leave()


def _refuse_lonely(name: str, plugin: type[Any]) -> None:
    if not getattr(plugin, "shares", False):
        raise RecipeError(
            f"the learner {name} works in one process only; start it without accelerate launch, or "
            "use learner.use: plain"
        )


def _place() -> str:
    """This machine; in a container, its processes."""
    with suppress(OSError):
        return f"{BOOT.read_text().strip()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _alive(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
