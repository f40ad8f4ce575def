"""Several vLLM servers of ours, and what becomes of one that is lost."""

# Fixtures come by their names, and as parameters hide them.
# ruff: noqa: F401, F811
# pyright: reportUnusedImport=false

import asyncio
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import httpx2
import psutil
import pytest
from test_supervised import within
from test_vllm import (
    PROMPTS,
    Folder,
    Runner,
    ask,
    checkpoints,
    gap,
    in_process,
    policy_of,
    run,
    served,
)

from selfwright.agents.engines.vllm_server import metric
from selfwright.core.errors import PolicyError
from selfwright.core.types import Completion, Sampling


@pytest.mark.vllm
@pytest.mark.timeout(600)
def test_replicas_share_the_work_and_one_that_dies_or_hangs_is_started_again(
    run: Runner, model_folder: Folder, checkpoints: list[Path]
) -> None:
    made = run(policy_of(model_folder("vllm"), replicas=2, restarts=1, stall_timeout_s=20))
    replicas = made._replicas  # pyright: ignore[reportPrivateUsage]
    lost = replicas[0]
    mine = in_process(model_folder("vllm"), checkpoints[1])

    def right(said: Sequence[Completion]) -> None:
        for prompt, one in zip(PROMPTS, said, strict=True):
            assert gap(asyncio.run(mine.score(prompt, one)), one) < 1e-3

    async def answered(url: str) -> float:
        async with httpx2.AsyncClient() as client:
            told = (await client.get(f"{url}/metrics")).text
        return metric(told, "vllm:request_success_total")

    async def disturbed(how: int) -> None:
        asked = [asyncio.create_task(ask(made, Sampling(max_tokens=200), k)) for k in range(4)]
        await asyncio.sleep(0.3)
        for process in everybody(lost.process.pid):
            process.send_signal(how)
        await asyncio.gather(*asked)

    try:
        run(made.load(checkpoints[0]))
        run(made.load(checkpoints[1]))
        at_first = [(one, run(answered(one.url))) for one in replicas]
        held = [run(served(made, number)) for number in (0, 1)]
        assert len(held[0]) == 1 and held[0] == held[1]
        right(run(ask(made, Sampling(max_tokens=6))))
        # Some of the prompts are at home with either.
        assert all(run(answered(one.url)) > before for one, before in at_first)
        # One is lost on the way. It comes back with the adapter: the base would answer otherwise.
        run(disturbed(signal.SIGKILL))
        right(run(ask(made, Sampling(max_tokens=6))))
        assert run(served(made, 0)) == held[0]
        # But not for ever.
        with pytest.raises(PolicyError, match=r"made no token for(?s:.*)started again 1 times"):
            run(disturbed(signal.SIGSTOP))
    finally:
        run(made.close())
    # Stopped ones too; the dying may take a moment.
    assert within(10, lambda: not everybody(lost.process.pid))


def everybody(group: int) -> list[psutil.Process]:
    """The server's processes; not the one that watches over them."""
    found: list[psutil.Process] = []
    for process in psutil.process_iter():
        try:
            mine = os.getpgid(process.pid) == group and process.pid != group
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.Error):
            continue
    return found
