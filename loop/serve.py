"""``selfwright serve``: a checkpoint's agent behind HTTP, until it is told to stop."""

import asyncio
import ipaddress
import os
import socket
import threading
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from ..core import strict_yaml
from ..core.config import Fleet
from ..core.errors import ModelError, RecipeError
from ..core.faults import validate
from ..core.hosting.pool import Worlds, open_worlds
from ..core.models.open import open_tokens
from ..core.models.origin import ADAPTER
from ..core.models.tokens import ChatTokens
from ..core.play.briefing import shots_wanted
from ..core.protocols import HasTokens, Judge, Policy
from ..core.recipe import Section, section
from ..core.statistics import Comparison, compare_outcomes
from .evaluate import (
    EvalSpec,
    agent_of,
    by_section,
    engine_of,
    evaluate,
    player_of,
    read_card,
    settle,
    weights_of,
)
from .events import Listener, ignore
from .progress import Progress

try:
    import uvicorn

    from ..agents.serving.adapter_cache import AdapterCache
    from ..agents.serving.app import make_app
    from ..agents.serving.connections import protocol
    from ..agents.serving.limits import Limits
    from ..agents.serving.room import Served
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] not in ("fastapi", "prometheus_client", "uvicorn"):
        raise
    raise RecipeError(
        f"serving needs {error.name}, which is not installed: pip install 'selfwright[serve]'"
    ) from None

if TYPE_CHECKING:
    from fastapi import FastAPI

    from ..agents.serving.games import Opener

TOKEN = "SELFWRIGHT_TOKEN"
"""The environment variable that holds a server's token, unless another is named."""
GRACE_S = 15.0
"""After the drain's deadline, how long a policy may take to close."""
KEEP_S = 15
"""How long a connection may be idle between two requests."""
KEYS = ("environment", "agent", "policy", "limits")
"""Sections that the command line can change."""


@dataclass(frozen=True)
class Asked:
    """What the command line says."""

    checkpoint: str
    engine: str = "transformers"
    host: str = "127.0.0.1"
    port: int = 8000
    token_env: str = TOKEN
    name: str | None = None
    worlds: tuple[str, ...] = ()
    adapters: Path | None = None
    tasks: int | None = None
    seed: int = 0
    temperature: float | None = None
    overrides: tuple[str, ...] = ()


async def serve(asked: Asked, listener: Listener = ignore) -> dict[str, Any]:
    """Serve until SIGTERM or SIGINT; then finish what is in flight.

    Raises:
        RecipeError: an option is wrong, or the address needs a token and there is none.
        StoreError, ModelError: there is no such checkpoint, or it cannot be opened.
    """
    progress = Progress(listener)
    mine = by_section(asked.checkpoint, asked.overrides, KEYS, "serve")
    limits = limits_of(mine.pop("limits"))
    # What is read from a file ends with a newline, which no header can hold.
    token = os.environ.get(asked.token_env, "").strip()
    hosts = hosts_of(asked.host, asked.token_env, token)
    if asked.adapters is not None and not asked.adapters.is_dir():
        raise RecipeError(f"--adapters {asked.adapters}: no such folder")
    card = read_card(asked.checkpoint)
    engine = engine_of(card or {}, asked.checkpoint, mine["policy"], asked.engine)
    base, weights = weights_of(asked.checkpoint, card)
    spec = eval_spec_of(asked, card, mine)
    agent = spec.agent if spec else agent_of(card or {}, mine["agent"])
    if shots_wanted(agent):
        raise RecipeError(
            "agent.shots: what is served is shown what its run was; serve the checkpoint of a run, "
            "or write shots of your own as agent.examples"
        )
    worlds = openers(asked, spec, limits)
    heat = asked.temperature
    if heat is None:
        heat = spec.temperature if spec else 0.0
    with bound(asked.host, asked.port) as listening, closing(AdapterCache()) as adapter_cache:
        if weights is not None and asked.adapters is not None and (weights / ADAPTER).is_file():
            # They are loaded again when others win, or fail: they had better be the same then.
            weights = adapter_cache.keep(weights)
        with progress.stage(f"opening {asked.checkpoint}"):
            policy: Policy = engine.make(base, asked.seed)
        try:
            # Without weights, too: once that is done, servers that it had to start do answer.
            with progress.stage(f"waiting for {asked.engine}"):
                await policy.load(weights)
            served = Served(
                asked.name or Path(asked.checkpoint).resolve().name,
                player_of(engine.config, agent.make(), policy, heat),
                weights,
                tokens_of(policy, base, progress),
                worlds,
                asked.adapters,
                Trial(spec, engine, base, progress) if spec else None,
            )
            app = make_app(served, limits, token=token, hosts=hosts)
            address = f"http://{_shown(asked.host)}:{listening.getsockname()[1]}"
            progress.say(f"serving {served.name} at {address}/")
            await Server(app, limits).serve([listening])
        finally:
            await policy.close()
    progress.say("stopped")
    return {"model": served.name, "address": address}


class Server(uvicorn.Server):
    """Ends well when it is told to end; uvicorn would then raise the signal again."""

    def __init__(self, app: "FastAPI", limits: Limits) -> None:
        config = uvicorn.Config(
            app,
            http=protocol(limits),
            log_level="warning",
            access_log=False,
            server_header=False,
            ws="none",
            timeout_graceful_shutdown=limits.drain_s,
            # Clients keep idle connections for 5 s, as it would by itself: sooner or later one is
            # closed just as the next request is on its way.
            timeout_keep_alive=KEEP_S,
        )
        super().__init__(config)

    @contextmanager
    def capture_signals(self) -> Generator[None]:
        with super().capture_signals():
            try:
                yield
            finally:
                self._captured_signals.clear()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        super().handle_exit(sig, frame)
        # A model or a world that hangs in a thread would keep the process for ever.
        limit = (self.config.timeout_graceful_shutdown or 0) + GRACE_S
        watch = threading.Timer(limit, os._exit, (1,))
        watch.daemon = True
        watch.start()


class Trial:
    """Plays two checkpoints on the same held-out tasks, each as ``evaluate`` would.

    With a policy of its own, opened for it and closed after it: the one that serves goes on.
    """

    def __init__(self, spec: EvalSpec, engine: Section, base: str, progress: Progress) -> None:
        # The table of turns is not what is compared.
        self._spec = replace(spec, turns=0)
        self._engine = engine
        self._base = base
        self._progress = progress
        self._known: dict[Path | None, Mapping[str, bool]] = {}
        """What was found of the present weights, and of the last ones that were offered."""

    async def __call__(self, champion: Path | None, challenger: Path) -> Comparison:
        spec = self._spec
        # Opening a model takes a while, in which requests are answered.
        policy: Policy = await asyncio.to_thread(self._engine.make, self._base, spec.seed)
        try:
            world = spec.environment
            settings = world.config.model_dump(mode="json")
            async with await open_worlds(world.use, settings, spec.fleet) as worlds:
                before = self._known.get(champion)
                if before is None:
                    before = await self._played(champion, policy, worlds)
                after = await self._played(challenger, policy, worlds)
        finally:
            await policy.close()
        self._known = {champion: before, challenger: after}
        found = compare_outcomes(before, after)
        self._progress.say(f"{challenger}: {found.verdict}, {100 * found.difference:+.1f} points")
        return found

    async def _played(
        self, weights: Path | None, policy: Policy, worlds: Worlds
    ) -> Mapping[str, bool]:
        spec = self._spec
        await policy.load(weights)
        player = player_of(self._engine.config, spec.agent.make(), policy, spec.temperature)
        judge: Judge = spec.judge.make()
        name = str(weights)
        result, _ = await evaluate(spec, player, judge, worlds, self._progress, name, name)
        return result.outcomes


def eval_spec_of(
    asked: Asked, card: dict[str, Any] | None, mine: Mapping[str, Sequence[str]]
) -> EvalSpec | None:
    """How checkpoints are compared here; None where no world is known."""
    own = (card or {}).get("environment", {}).get("use")
    world = own or (asked.worlds[0] if asked.worlds else None)
    if world is None:
        if mine["environment"]:
            raise RecipeError(f"-o {mine['environment'][0]}: name the world: --world NAME")
        return None
    spec, _ = settle(
        card,
        asked.checkpoint,
        world,
        [one for key in ("environment", "agent") for one in mine[key]],
        "test",
        asked.tasks,
        asked.seed,
        asked.temperature,
        "reward",
        asked.engine,
    )
    return spec


def openers(asked: Asked, spec: EvalSpec | None, limits: Limits) -> "dict[str, Opener]":
    """The worlds of the playground: those that were named, else the checkpoint's own."""
    names = asked.worlds or ((spec.environment.use,) if spec else ())
    found: dict[str, Opener] = {}
    for name in names:
        if spec and name == spec.environment.use:
            world, fleet = spec.environment, spec.fleet
        else:
            world, fleet = section("environment", name)
        found[name] = opener(world, fleet.model_copy(update={"parallel": limits.games}))
    return found


def opener(world: Section, fleet: Fleet) -> "Opener":
    async def open() -> Worlds:
        return await open_worlds(world.use, world.config.model_dump(mode="json"), fleet)

    return open


def limits_of(overrides: Sequence[str]) -> Limits:
    """Raises: RecipeError: listing every fault."""
    values: dict[str, Any] = {}
    places: dict[str, str] = {}
    faults: list[str] = []
    for override in overrides:
        path, equals, raw = override.partition("=")
        key = path.removeprefix("limits.")
        document = strict_yaml.parse(raw)
        if not equals or document.faults or "." in key or key == path:
            faults.append(f"-o {override}: wanted limits.KEY=VALUE, such as limits.sessions=64")
        values[key], places[key] = document.value, override
    limits, more = validate(Limits, values)
    faults += [f"-o {places[str(path[0])]}: {message}" for path, message in more]
    if faults or limits is None:
        raise RecipeError("\n".join(faults))
    return limits


def hosts_of(host: str, variable: str, token: str) -> tuple[str, ...]:
    """The names that requests may call the server by; none where a token protects it.

    Raises:
        RecipeError: others could reach it, and there is no token.
    """
    if loopback(host):
        return (host.lower(), "localhost", "127.0.0.1", "::1")
    if not token:
        raise RecipeError(
            f"--host {host} can be reached by others: put a token into the environment variable "
            f"{variable} (or name another with --token-env), or serve on 127.0.0.1"
        )
    return ()


def loopback(host: str) -> bool:
    """Whether all that ``host`` stands for is this machine itself."""
    try:
        found = socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"--host {host!r} is no address of this machine: {error}") from None
    return all(ipaddress.ip_address(one[4][0]).is_loopback for one in found)


@contextmanager
def bound(host: str, port: int) -> Generator[socket.socket]:
    """A socket of that address. Raises: RecipeError: it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # The protocol is named, or asyncio would not know it for TCP and leave Nagle's algorithm on:
    # 40 ms for every answer.
    with socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
            listening.listen(1024)
        except OSError as error:
            raise RecipeError(
                f"cannot listen on {host}, port {port}: {error.strerror}; --port 0 takes a free one"
            ) from None
        yield listening


def tokens_of(policy: Policy, base: str, progress: Progress) -> ChatTokens | None:
    """The policy's tokenizer, to measure and check prompts with."""
    if isinstance(policy, HasTokens):
        return policy.tokens
    if Path(base).is_dir():
        try:
            return open_tokens(base)
        except ModelError:
            pass
    progress.note("no tokenizer is here, so prompts are not checked for control tokens")
    return None


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
