"""Tells trackers (TensorBoard, Weights & Biases, trackio, MLflow) of runs that report to them.

They are accelerate's. Each lives in a thread of its own: one that is slow keeps nobody waiting, one
that breaks is left out from then on, and a note says so.
"""

# accelerate is untyped.
# pyright: reportMissingTypeStubs=false

import math
import queue
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias, cast

from ..core.evaluation import EvaluationResult
from ..core.seeds import identify
from .events import Evaluated, Event, IterationEnded, Listener, Note, RunBegan, RunEnded

PROJECT = "selfwright"
"""What trackers file runs under."""
END_S = 60.0
"""How long a tracker may take to send what is left, once the run is over."""

Numbers: TypeAlias = dict[str, float]


class Trackers:
    """A listener. What a run reports to is opened when there is something to report."""

    def __init__(self, tell: Listener) -> None:
        """``tell`` is told what became of trackers that broke."""
        self._tell = tell
        self._open: list[Tracker] = []
        self._last = 0
        """The iteration that was reported last."""

    def __call__(self, event: Event) -> None:
        match event:
            case RunBegan():
                self._last = event.finished
                for name in event.report_to:
                    self._open.append(Tracker(name, partial(opened, name, event), self._tell))
            case Evaluated(name, finished, result):
                self._log(evaluation_numbers(name, result), finished)
            case IterationEnded(index, _, metrics):
                self._last = index + 1
                self._log(metrics, index + 1)
            case RunEnded(result):
                if result is not None:
                    self._log(comparison_numbers(result), self._last)
                self._end()
            case _:
                pass

    def _end(self) -> None:
        until = time.monotonic() + END_S
        for one in self._open:
            one.finish()
        for one in self._open:
            one.join(until - time.monotonic())
        self._open.clear()

    def _log(self, numbers: Mapping[str, float], iteration: int) -> None:
        finite = {name: value for name, value in numbers.items() if math.isfinite(value)}
        for one in self._open:
            one.log(finite, iteration)


class Tracker:
    """One of accelerate's, in a thread."""

    def __init__(self, name: str, make: Callable[[], Any], tell: Listener) -> None:
        self._name = name
        self._make = make
        self._tell = tell
        self._todo: queue.SimpleQueue[tuple[Numbers, int] | None] = queue.SimpleQueue()
        # Nobody waits for it when the process ends.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, numbers: Numbers, iteration: int) -> None:
        self._todo.put((numbers, iteration))

    def finish(self) -> None:
        """There is no more to come."""
        self._todo.put(None)

    def join(self, timeout_s: float) -> None:
        """Wait until all has been sent; but no longer than that."""
        self._thread.join(max(0.0, timeout_s))
        if self._thread.is_alive():
            self._note(f"has not ended within {END_S:g} s, and may lack the last iterations")

    def _note(self, what: str) -> None:
        self._tell(Note(f"report_to: {self._name} {what}"))

    def _work(self) -> None:
        tracker: Any = None
        try:
            # Not before there is something to report: accelerate's state, which its trackers ask
            # for, is the learner's to set up.
            while (wanted := self._todo.get()) is not None:
                if tracker is None:
                    tracker = self._make()
                tracker.log(*wanted)
            if tracker is not None:
                tracker.finish()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}".strip().splitlines()[0]
            self._note(f"broke and is left out from here on: {message}")


def opened(name: str, run: RunBegan) -> Any:
    """Raises whatever the tracker does."""
    from accelerate.state import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()
    tracker: Any = LOGGER_TYPE_TO_CLASS[name](**settings(name, run.name, run.folder.resolve()))
    tracker.main_process_only = False  # Only the process that plays has a listener.
    tracker.start()
    tracker.store_init_configuration(flat(run.recipe))
    return tracker


def settings(name: str, run: str, folder: Path) -> dict[str, Any]:
    """What accelerate's tracker of that name is made with."""
    id = identify(str(folder))  # The same whenever the run is gone on with.
    match name:
        case "tensorboard":
            return {"run_name": name, "logging_dir": folder}
        case "wandb":
            again = {"id": id, "resume": "allow", "dir": folder}
            return {"run_name": PROJECT, "name": run, **again}
        case "trackio":
            return {"run_name": PROJECT, "name": f"{run}-{id}", "resume": "allow"}
        case _:
            return {"experiment_name": PROJECT, "run_name": run}


def flat(recipe: Mapping[str, Any], before: str = "") -> dict[str, bool | int | float | str]:
    """A recipe by its keys' paths; what is neither number nor text is written as it is in YAML."""
    found: dict[str, bool | int | float | str] = {}
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            found |= flat(cast("Mapping[str, Any]", value), f"{before}{key}.")
        else:
            plain = isinstance(value, bool | int | float | str)
            found[f"{before}{key}"] = value if plain else str(value)
    return found


def evaluation_numbers(name: str, result: EvaluationResult) -> Numbers:
    low, high = result.interval
    return {
        f"evaluation/{name}/success_rate": result.success_rate,
        f"evaluation/{name}/interval_low": low,
        f"evaluation/{name}/interval_high": high,
        f"evaluation/{name}/failed": float(result.failed),
        f"evaluation/{name}/mean_reward": result.mean_reward,
    }


def comparison_numbers(result: Mapping[str, Any]) -> Numbers:
    """Of the run's end against its beginning."""
    compared: Mapping[str, Any] = result["comparison"]
    low, high = compared["interval"]
    return {
        "comparison/difference": compared["difference"],
        "comparison/interval_low": low,
        "comparison/interval_high": high,
        "comparison/p_value": compared["p_value"],
        "comparison/better": float(compared["verdict"] == "better"),
        "comparison/worse": float(compared["verdict"] == "worse"),
    }
