"""All probes, side by side."""

import asyncio
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from .machine import chromium, disk, java, machine, node, ports, textworld
from .models import apart, torch, torchvision, vllm
from .packages import conflicts, known, python, requirements
from .probe import (
    STATUSES,
    Finding,
    Probe,
    Status,
    in_thread,
)

LIGHT_S, HEAVY_S = 20.0, 120.0
"""Deadlines: of a look at something small, and of what imports torch, maybe from a cold disk."""


def probes(vllm_python: Path | None) -> dict[str, tuple[Probe, float]]:
    """Each with its deadline in seconds."""
    here = (python, requirements, conflicts, known, ports, disk, machine)
    programs = (chromium, java, textworld, node)
    heavy = {"vllm": partial(vllm, vllm_python), "adapter": partial(apart, "adapter")}
    return {
        **{look.__name__: (partial(in_thread, look), LIGHT_S) for look in here},
        **{look.__name__: (look, LIGHT_S) for look in programs},
        **{look.__name__: (look, HEAVY_S) for look in (torch, torchvision)},
        **{name: (look, HEAVY_S) for name, look in heavy.items()},
    }


async def doctor(vllm_python: Path | None = None) -> list[Finding]:
    """What all probes found, in their order."""
    asked = probes(vllm_python).items()
    found = await asyncio.gather(*(looked(name, *probe) for name, probe in asked))
    return [finding for some in found for finding in some]


async def looked(name: str, probe: Probe, deadline_s: float) -> list[Finding]:
    """The probe's findings; that it broke, or was cut off, is one too."""
    limit = asyncio.timeout(deadline_s)
    try:
        async with limit:
            return list(await probe())
    except Exception as error:
        if limit.expired():
            remedy = "find out what it waits for, or look again when less is going on"
            return [Finding(name, "failed", f"no answer within {deadline_s:g} s", remedy)]
        message = f"could not be looked at: {type(error).__name__}: {error}"
        return [Finding(name, "failed", message, "mend what it names, and look again")]


def counted(findings: Sequence[Finding]) -> dict[Status, int]:
    return {status: sum(one.status == status for one in findings) for status in STATUSES}


def to_json(findings: Sequence[Finding]) -> dict[str, Any]:
    counts = counted(findings)
    listed = [asdict(finding) for finding in findings]
    return {"ok": not counts["failed"], "counts": counts, "findings": listed}
