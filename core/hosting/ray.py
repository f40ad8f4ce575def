"""Worlds on the machines of a Ray cluster: ``environment: {..., on: ray}``.

An actor per CPU, a host, starts the very processes that ``core.hosting`` starts here and passes
on what is said, so that leases, deadlines and discards are the same. Only the loss of a host is
news: what was played in it is played again elsewhere (see ``core.play.rollout``).

Ray is an optional part: ``pip install 'selfwright[ray]'``. A cluster's machines need selfwright and
the world's package, in the same versions.
"""

# ray is partly untyped.
# pyright: reportMissingTypeStubs=false, reportUnknownMemberType=false

import asyncio
import logging
import os
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any, ClassVar

from ..errors import WorkerLost, WorldError
from .wire import Reply, answered, error_from, error_to
from .worker import GRACE_S, Launch, LocalWorker

INSTALL = "pip install 'selfwright[ray]'"
OBJECT_STORE_BYTES = 80 * 2**20
"""Of a Ray started here; hardly anything goes through it."""


class RayHost:
    """Starts world processes on its machine. Runs as a Ray actor; they die with it."""

    def __init__(self, path: Sequence[str]) -> None:
        sys.path += [folder for folder in path if folder not in sys.path]
        self._workers: dict[int, LocalWorker] = {}

    async def pid(self) -> int:
        return os.getpid()

    async def begin(self, number: int, launch: Launch) -> dict[str, Any]:
        try:
            worker = self._workers[number] = LocalWorker(launch)
        except WorldError as error:
            return {"error": error_to(error), "dead": str(error)}
        answer = await answered(worker.opened)
        return answer | {"dead": worker.dead}

    async def ask(self, number: int, what: str, details: dict[str, Any]) -> dict[str, Any]:
        worker = self._workers[number]
        answer = await answered(worker.ask(what, **details))
        return answer | {"dead": worker.dead}

    async def kill(self, number: int, reason: str) -> None:
        if worker := self._workers.pop(number, None):
            worker.kill(reason)

    async def stop(self, number: int) -> dict[str, Any]:
        if worker := self._workers.pop(number, None):
            await worker.stop()
        return {"value": None, "blobs": []}


class RayHandle:
    """A ``RayHost`` as it is seen from here."""

    def __init__(self, name: str) -> None:
        import ray

        # Worlds mostly wait; with a CPU reserved for each, they would wait for one another.
        settings: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_concurrency": 100_000}
        remote: Any = ray.remote
        kind: Any = remote(**settings, scheduling_strategy="SPREAD")
        self.actor: Any = kind(RayHost).remote(sys.path)
        self.workers = set[int]()
        """The numbers of those that are alive, as far as is known here."""
        self.lost = ""
        """How it was lost; empty while it is there."""
        self._name = name

    def lose(self, error: Exception) -> None:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        self.lost = self.lost or f"a Ray worker that hosted {self._name} was lost: {first}"

    def end(self) -> None:
        import ray

        self.lost = self.lost or f"the worlds of {self._name} are closed; open them again"
        ray.kill(self.actor)


class RayWorker:
    """A world process at a host."""

    def __init__(self, handle: RayHandle, number: int, launch: Launch) -> None:
        self.instances = 0
        self.episodes = 0
        self.pid: int | None = None
        self._handle = handle
        self._number = number
        self._name = launch.opening.world
        self._dead: str | None = None
        handle.workers.add(number)
        self.opened = asyncio.wrap_future(self._send("begin", launch))

    @property
    def dead(self) -> str | None:
        return self._dead or self._handle.lost or None

    async def ask(self, what: str, **details: Any) -> Reply:
        if self._dead is not None:
            raise WorldError(self._dead)
        if self._handle.lost:
            raise WorkerLost(self._handle.lost)
        return await asyncio.wrap_future(self._send("ask", what, details))

    def tell(self, what: str, **details: Any) -> None:
        if self.dead is None:
            self._send("ask", what, details)

    def kill(self, reason: str) -> None:
        # Also called by the thread that hears Ray's answers; said twice does no harm.
        if self._dead is None:
            self._dead = reason
            self._handle.workers.discard(self._number)
            self._handle.actor.kill.remote(self._number, reason)

    async def stop(self) -> None:
        if self.dead is None:
            with suppress(TimeoutError, WorldError):
                async with asyncio.timeout(2 * GRACE_S):
                    await asyncio.wrap_future(self._send("stop"))
        self.kill(f"the worlds of {self._name} are closed; open them again")

    def last_words(self) -> str:
        return ""

    def _send(self, method: str, *details: Any) -> Future[Reply]:
        future: Future[Reply] = Future()
        asked: Any = getattr(self._handle.actor, method).remote(self._number, *details)
        asked.future().add_done_callback(partial(self._settle, future))
        return future

    def _settle(self, future: Future[Reply], done: Future[dict[str, Any]]) -> None:
        from ray.exceptions import RayActorError

        try:
            answer = done.result()
            error = error_from(**answer["error"]) if "error" in answer else None
        except RayActorError as cause:
            self._handle.lose(cause)
            answer, error = {}, WorkerLost(self._handle.lost)
        except Exception as cause:
            message = self._dead or f"Ray could not ask {self._name}: {cause}"
            answer, error = {}, WorldError(message)
        # Its process may die while the host lives on; before the answer, so that whoever asks
        # again finds another one.
        if dead := answer.get("dead"):
            self.kill(dead)
        if not future.set_running_or_notify_cancel():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result((answer["value"], answer["blobs"]))


class Cluster:
    """Where world processes are started: at the host that has the fewest."""

    _users: ClassVar[int] = 0
    _ours: ClassVar[bool] = False
    _lock: ClassVar[threading.Lock] = threading.Lock()
    """Nobody joins while the last one leaves; of threads, for event loops come and go."""

    def __init__(self, name: str) -> None:
        self.hosts = 0
        """How many hosts there are at most, once it is joined."""
        self._name = name
        self._handles: list[RayHandle] = []
        self._started = 0
        self._open = True

    def join(self, parallel: int) -> None:
        """Join the cluster at ``RAY_ADDRESS``, or start a small one on this machine; takes seconds.

        Raises:
            WorldError: Ray is not installed, or neither could be done.
        """
        with Cluster._lock:
            if self._open:  # Whoever waited for it may have given up.
                _join()
                self.hosts = min(parallel, _cpus())
                Cluster._users += 1

    def start(self, launch: Launch) -> RayWorker:
        self._handles = [handle for handle in self._handles if not handle.lost]
        if len(self._handles) < self.hosts:
            self._handles.append(RayHandle(self._name))
        self._started += 1
        fewest = min(self._handles, key=lambda handle: len(handle.workers))
        return RayWorker(fewest, self._started, launch)

    async def close(self) -> None:
        if self._open:
            self._open = False
            await asyncio.to_thread(self._leave)

    def _leave(self) -> None:
        with Cluster._lock:
            if not self.hosts:
                return
            import ray

            whole: Any = ray
            for handle in self._handles:
                if not handle.lost:
                    handle.end()
            Cluster._users -= 1
            if not Cluster._users and Cluster._ours:
                whole.shutdown()
                Cluster._ours = False


def _join() -> None:
    address = os.environ.get("RAY_ADDRESS", "")
    if not address:
        # Read when ray is imported. Without the second it takes the machine's outer address, in
        # place of any loopback address it is given, and listens everywhere.
        os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
        os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
    try:
        import ray
    except ModuleNotFoundError:
        raise WorldError(f"on: ray needs Ray: {INSTALL}") from None
    if ray.is_initialized():
        return
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    try:
        if address:
            ray.init(address=address, **quiet)
        else:
            ray.init(
                address="local",
                num_cpus=len(os.sched_getaffinity(0)),
                num_gpus=0,
                object_store_memory=OBJECT_STORE_BYTES,
                include_dashboard=False,
                _node_ip_address="127.0.0.1",
                **quiet,
            )
    except Exception as cause:
        where = f"join the Ray cluster at {address}" if address else "start Ray on this machine"
        raise WorldError(f"cannot {where}: {cause}") from cause
    Cluster._ours = True  # pyright: ignore[reportPrivateUsage]


def _cpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("CPU", 1)))
