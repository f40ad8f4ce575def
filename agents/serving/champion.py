"""The weights that answer, and how others take their place: by winning a paired comparison."""

import asyncio
import logging
import secrets
from collections import OrderedDict
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Field, TypeAdapter

from ...core.errors import DiskError, SelfwrightError
from ...core.models.origin import ADAPTER
from ...core.play.waiting import deadline
from ...core.protocols import Policy
from ...core.statistics import Comparison
from .adapter_cache import AdapterCache
from .limits import Limits, Refusal
from .metrics import Metrics

log = logging.getLogger(__name__)

Trial: TypeAlias = Callable[[Path | None, Path], Awaitable[Comparison]]
"""Plays the present weights (None: the base) and the new ones on the same held-out tasks; it asks
a policy of its own, so that the server goes on answering. Neither folder is ever rewritten, so its
path stands for what is in it."""

REMEMBERED = 100
"""Offers whose results can still be asked for."""


class Gate:
    """Many read at once, or one writes. Who wants to write goes before who comes to read later."""

    def __init__(self) -> None:
        self._readers = 0
        self._writers = 0
        """Who writes, or waits to."""
        self._one = asyncio.Lock()
        self._free = asyncio.Event()
        """Nobody writes or wants to."""
        self._quiet = asyncio.Event()
        """Nobody reads."""
        self._free.set()
        self._quiet.set()

    @asynccontextmanager
    async def reading(self) -> AsyncGenerator[None]:
        while self._writers:
            await self._free.wait()
        self._readers += 1
        self._quiet.clear()
        try:
            yield
        finally:
            self._readers -= 1
            if not self._readers:
                self._quiet.set()

    @asynccontextmanager
    async def writing(self) -> AsyncGenerator[None]:
        self._writers += 1
        self._free.clear()
        try:
            async with self._one:
                await self._quiet.wait()
                yield
        finally:
            self._writers -= 1
            if not self._writers:
                self._free.set()


@dataclass
class Offer:
    """An adapter that is to take the champion's place."""

    id: str
    path: str
    """Below the folder of adapters."""
    forced: bool
    status: Literal["running", "swapped", "kept", "failed"] = "running"
    message: Annotated[str, Field(serialization_alias="said")] = ""
    """Why it failed."""
    comparison: Comparison | None = None
    """With the weights that answered before; None if it was forced, or is still running."""

    def payload(self) -> dict[str, Any]:
        """As JSON has it."""
        return TypeAdapter(Offer).dump_python(self, mode="json", by_alias=True)


class Champion:
    """Owns what the policy has loaded."""

    def __init__(
        self,
        policy: Policy,
        weights: Path | None,
        folder: Path | None,
        trial: Trial | None,
        limits: Limits,
        metrics: Metrics,
    ) -> None:
        """``weights``: what is loaded now, from files that stay as they are; ``folder``: where new
        ones may lie, None for nowhere.
        """
        self.weights = weights
        self._broken = False
        self._policy = policy
        self._folder = None if folder is None else folder.resolve()
        self._trial = trial
        self._gate = Gate()
        self._limits = limits
        self._metrics = metrics
        self._offers: OrderedDict[str, Offer] = OrderedDict()
        self._running: asyncio.Task[None] | None = None
        self._adapter_cache = AdapterCache()
        self._copying = False

    def check(self) -> None:
        """Raises: Refusal: what is loaded is anybody's guess, so it may not answer."""
        if self._broken:
            message = "neither the new weights nor the old ones could be loaded; offer others"
            raise Refusal(503, message, "no_weights")

    @asynccontextmanager
    async def answering(self) -> AsyncGenerator[None]:
        """The weights stay as they are. Raises: Refusal: there are none."""
        async with self._gate.reading():
            self.check()
            yield

    @property
    def offers(self) -> list[Offer]:
        """The last ones, oldest first."""
        return list(self._offers.values())

    def offer(self, id: str) -> Offer:
        if id not in self._offers:
            raise Refusal(404, "there was no such offer", "no_offer")
        return self._offers[id]

    async def challenge(self, path: str, force: bool) -> Offer:
        """Offer an adapter. If forced it is in place on return; else its trial has begun, and its
        files may change.

        Raises:
            Refusal: it may not be offered, is not there, or another's trial is running.
        """
        found = self._found(path)
        if not force and self._trial is None:
            message = (
                "there is no world to compare adapters in; name one at the start, or use force"
            )
            raise Refusal(400, message, "no_trial", "force")
        if self._copying or self._running is not None:
            raise Refusal(409, "another adapter is being tried; one at a time", "trial_running")
        self._copying = True
        try:
            kept = await asyncio.to_thread(self._adapter_cache.keep, found)
        except DiskError as error:
            log.error("%s", error)
            raise Refusal(503, str(error), "no_copy", retry_s=5) from error
        finally:
            self._copying = False
        offer = Offer(secrets.token_urlsafe(8), path, force)
        self._offers[offer.id] = offer
        while len(self._offers) > REMEMBERED:
            self._offers.popitem(last=False)
        self._running = asyncio.create_task(self._try(offer, kept))
        if force:
            await asyncio.shield(self._running)
        return offer

    async def close(self) -> None:
        """A trial that is running is given up."""
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        self._adapter_cache.close()

    def _found(self, path: str) -> Path:
        if self._folder is None:
            message = "this server takes no adapters; start it with --adapters DIR"
            raise Refusal(403, message, "no_adapters")
        try:
            found = (self._folder / path).resolve()
            inside = found.is_relative_to(self._folder)
            there = inside and (found / ADAPTER).is_file()
        except (OSError, ValueError, RuntimeError):
            there, found = False, self._folder
        if not there:
            # The same words for what is elsewhere and what is nowhere: paths are not to be probed.
            message = "there is no adapter of that path in the folder of adapters"
            raise Refusal(404, message, "no_adapter", "path")
        return found

    async def _try(self, offer: Offer, path: Path) -> None:
        try:
            if offer.forced or await self._wins(offer, path):
                # Without a deadline: a policy that loads in a thread would go on, and answer with
                # weights of which we had said that they failed.
                await self._swap(path)
                offer.status = "swapped"
            else:
                offer.status = "kept"
        except asyncio.CancelledError:
            offer.status, offer.message = "failed", "the server is stopping"
            raise
        except Exception as cause:
            offer.status = "failed"
            # What we did not foresee may hold anything: its name must do.
            known = isinstance(cause, SelfwrightError | TimeoutError)
            offer.message = f"{type(cause).__name__}: {cause}" if known else type(cause).__name__
        finally:
            self._running = None
            self._adapter_cache.clear(but=self.weights)
            self._metrics.swaps.labels(offer.status).inc()

    async def _wins(self, offer: Offer, path: Path) -> bool:
        assert self._trial is not None
        async with deadline(self._limits.trial_s, "the comparison"):
            offer.comparison = await self._trial(self.weights, path)
        return offer.comparison.verdict == "better"

    async def _swap(self, path: Path) -> None:
        """Once nobody is being answered; if the new weights cannot be loaded, the old ones are."""
        async with self._gate.writing():
            try:
                await self._policy.load(path)
            except Exception:
                await self._restore()
                raise
            self.weights, self._broken = path, False

    async def _restore(self) -> None:
        try:
            await self._policy.load(self.weights)
        except Exception:  # A plug-in may raise anything.
            log.exception("neither new nor old weights could be loaded")
            self._broken = True
        else:
            self._broken = False
