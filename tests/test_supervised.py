"""Processes that go when we go."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from selfwright.core.hosting.supervised import Supervised

STUBBORN = "trap '' TERM; sleep 600 & while true; do sleep 1; done"
"""Starts another one, and does not end when it is asked to."""


def group(pid: int) -> list[int]:
    """Who is left of a process group, the dead that nobody has buried yet aside."""
    left: list[int] = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                left.append(process.pid)
        except (ProcessLookupError, psutil.Error):
            continue
    return left


def within(seconds: float, true: Callable[[], bool]) -> bool:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if true():
            return True
        time.sleep(0.05)
    return False


def test_stopping_ends_everybody(tmp_path: Path) -> None:
    one = Supervised(["bash", "-c", STUBBORN], os.environ, tmp_path / "log")
    assert within(10, lambda: len(group(one.pid)) >= 3)  # ours, bash, sleep
    assert one.alive
    one.stop()
    assert not one.alive
    assert within(5, lambda: not group(one.pid))


@pytest.mark.parametrize("asked", [False, True])
def test_stopping_ends_everybody_although_who_stands_between_is_dead(
    asked: bool, tmp_path: Path
) -> None:
    one = Supervised(["bash", "-c", STUBBORN], os.environ, tmp_path / "log")
    assert within(10, lambda: len(group(one.pid)) >= 3)
    os.kill(one.pid, signal.SIGKILL)
    if asked:
        assert within(10, lambda: not one.alive)
    one.stop()
    assert within(5, lambda: not group(one.pid))


def test_what_it_leaves_behind_goes_too(tmp_path: Path) -> None:
    one = Supervised(["bash", "-c", "sleep 600 & echo bye"], os.environ, tmp_path / "log")
    assert within(10, lambda: not one.alive)
    assert within(5, lambda: not group(one.pid))
    assert one.last_words() == "bye"
    one.stop()  # Twice does no harm.


def test_it_dies_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import os, pathlib, sys, time\n"
            "from selfwright.core.hosting.supervised import Supervised\n"
            "one = Supervised(['bash', '-c', sys.argv[1]], os.environ, pathlib.Path(sys.argv[2]))\n"
            "print(one.pid, flush=True)\n"
            "time.sleep(600)\n",
            STUBBORN,
            str(tmp_path / "log"),
        ],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent.stdout:
        pid = int(parent.stdout.readline())
    assert within(10, lambda: len(group(pid)) >= 3)
    parent.send_signal(signal.SIGKILL)
    parent.wait(10)
    assert within(15, lambda: not group(pid))
