"""The command line. Imports of weight stand inside the commands, so that ``--help`` is instant."""

import json
import math
import os
import sys
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TextIO, cast

import typer

from .. import __version__
from ..core.checked import no_unicode
from ..core.errors import (
    DiskError,
    ModelError,
    PluginError,
    RecipeError,
    SelfwrightError,
    StoreError,
)

if TYPE_CHECKING:
    from .console import Display

BAD_INPUT = (RecipeError, PluginError, ModelError, StoreError)
"""Faults of what was typed or of the files it names: exit code 2."""

app = typer.Typer(
    help="Agents that improve themselves, and prove it.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--override",
        metavar="KEY.PATH=VALUE",
        help="Set one key, such as trainer.use=imitation. May be given again.",
    ),
]
Json = Annotated[
    bool, typer.Option("--json", help="Print one JSON object, and nothing else, to stdout.")
]
Output = Annotated[
    Path | None, typer.Option(metavar="DIR", file_okay=False, help="The folder to write to.")
]


def main() -> None:
    """The ``selfwright`` command."""
    sys.exit(call(sys.argv[1:]))


def call(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code.

    0 is success; 1 a run or a check that failed; 2 a bad recipe, file or command line; 130 an
    interrupt. Only faults nobody foresaw leave as exceptions.
    """
    for argument in arguments:
        if fault := no_unicode(argument):
            # Paths and names are kept with results, as UTF-8.
            print(f"selfwright: {argument!a} is not in UTF-8: {fault}", file=sys.stderr)
            return 2
    try:
        code = app(list(arguments) or ["--help"], "selfwright", standalone_mode=False)
    except typer.TyperException as error:
        said = error.format_message().replace("Value error, ", "").rstrip(".")
        print(f"selfwright: {said}; selfwright --help tells more", file=sys.stderr)
        return error.exit_code
    except SelfwrightError as error:
        rank, size = _processes()
        where = f"process {rank} of {size}: " if rank else ""
        print(where + (str(error) or type(error).__name__), file=sys.stderr)
        return 2 if isinstance(error, BAD_INPUT) and not isinstance(error, DiskError) else 1
    except KeyboardInterrupt:
        code = 130
    if code == 130:
        print("selfwright: interrupted", file=sys.stderr)
    return int(code or 0)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"selfwright {__version__}")
        raise typer.Exit


def _processes() -> tuple[int, int]:
    """This one's rank and how many there are, as launchers tell those that they start."""
    names = (
        ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
        ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    )
    rank, size = (next((os.environ[n] for n in some if n in os.environ), "") for some in names)
    return (int(rank), int(size)) if rank and size else (0, 1)


@app.callback()
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    _, size = _processes()
    if size > 1 and context.invoked_subcommand not in ("run", None):
        raise RecipeError(
            f"{context.invoked_subcommand} works in one process, not in {size}; start it without "
            "accelerate launch"
        )


@app.command()
def run(
    recipe: Annotated[str, typer.Argument(help="A YAML file, or the name of one that is shipped.")],
    override: Overrides = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Run a recipe, or resume its run; in several processes under `accelerate launch`."""
    import asyncio

    from ..core.recipe import read

    rank, size = _processes()
    with _stdout_for_results() as stdout:
        plan = read(recipe, override or ())
        if rank:
            from ..loop.process_group import follow

            return follow(plan)
        display = _display()
        for note in plan.notes:
            display.say(f"note: {note}")
        from ..loop.events import each
        from ..loop.run import run
        from ..loop.trackers import Trackers

        listener = each(display, Trackers(display))
        whole = partial(run, plan, output or Path("runs") / plan.name, listener)
        if size > 1:
            from ..loop.process_group import lead

            result = lead(plan, whole)
        else:
            result = asyncio.run(whole())
        from .words import run_words

        _emit(result, stdout, None if as_json else run_words(result))


@app.command()
def evaluate(
    checkpoint: Annotated[
        str,
        typer.Argument(help="A run's checkpoint, a model folder or hub id, `expert` or `random`."),
    ],
    environment: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="The world; a run's checkpoint knows its own."),
    ] = None,
    split: Annotated[
        Literal["train", "validation", "test"], typer.Option(help="Which tasks.")
    ] = "test",
    tasks: Annotated[
        int | None, typer.Option(min=1, help="How many; by default as many as its recipe says.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds worlds and sampling.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; by default as its recipe says.")
    ] = None,
    judge: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="Who scores; by default as its recipe says."),
    ] = None,
    override: Overrides = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Play a checkpoint and count its successes."""
    import asyncio

    with _stdout_for_results() as stdout:
        from ..loop.evaluate import evaluate_checkpoint
        from .words import evaluation_words

        asked = (checkpoint, environment, override or (), split, tasks, seed, temperature)
        result = asyncio.run(evaluate_checkpoint(*asked, output, _display(), judge))
        _emit(result, stdout, None if as_json else evaluation_words(result))


@app.command()
def serve(
    checkpoint: Annotated[
        str, typer.Argument(help="A run, an iteration's or other checkpoint, a model folder or id.")
    ],
    engine: Annotated[
        str, typer.Option(metavar="NAME", help="The policy plug-in that runs it.")
    ] = "transformers",
    host: Annotated[str, typer.Option(help="Beyond loopback a token is required.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any free one.")] = 8000,
    token_env: Annotated[
        str, typer.Option(metavar="NAME", help="The environment variable with the token.")
    ] = "SELFWRIGHT_TOKEN",
    name: Annotated[
        str | None, typer.Option(help="What the model is called; by default as its folder.")
    ] = None,
    world: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="On the playground; may be given again."),
    ] = None,
    adapters: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where new adapters may come from; none else may."),
    ] = None,
    tasks: Annotated[
        int | None, typer.Option(min=1, help="On which adapters are compared.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seeds worlds and comparisons.")] = 0,
    temperature: Annotated[
        float | None, typer.Option(min=0, help="0 is greedy; by default as its recipe evaluates.")
    ] = None,
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Serve an agent over HTTP, with a playground."""
    import asyncio

    with _stdout_for_results() as stdout:
        from ..loop.serve import Asked, serve

        asked = Asked(
            checkpoint,
            engine,
            host,
            port,
            token_env,
            name,
            tuple(world or ()),
            adapters,
            tasks,
            seed,
            temperature,
            tuple(override or ()),
        )
        result = asyncio.run(serve(asked, _display()))
        _emit(result, stdout, None if as_json else f"served {result['model']}")


@app.command()
def check(
    environment: Annotated[str, typer.Argument(help="A world's name, or module:Class.")],
    override: Overrides = None,
    as_json: Json = False,
) -> None:
    """Test a world against its contract."""
    import asyncio

    from ..core.recipe import section

    with _stdout_for_results() as stdout:
        world, fleet = section("environment", environment, override or ())
        from ..environments.contract import check, render

        report = asyncio.run(check(environment, world.config.model_dump(mode="json"), fleet))
        _emit(report.to_json(), stdout, None if as_json else render(report))
    if not report.ok:
        raise typer.Exit(1)


@app.command()
def compare(
    a: Annotated[Path, typer.Argument(help="An evaluation's folder, or a run's.")],
    b: Annotated[Path, typer.Argument(help="The one that may be better.")],
    as_json: Json = False,
) -> None:
    """Compare two evaluations, paired by task."""
    with _stdout_for_results() as stdout:
        from ..evidence.compare import compare, render

        result = compare(a, b)
        _emit(result, stdout, None if as_json else render(result))


@app.command("bench-methods")
def bench_methods(
    recipes: Annotated[
        list[str], typer.Argument(help="Recipes that differ in trainer and learner only.")
    ],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each.")] = 3,
    against: Annotated[
        str,
        typer.Option(metavar="NAME", help="Whom the others must beat; by default imitation."),
    ] = "",
    override: Overrides = None,
    output: Output = None,
    as_json: Json = False,
) -> None:
    """Compare methods: same bases, same budget, every seed, against base and one another."""
    import asyncio

    with _stdout_for_results() as stdout:
        from ..loop.bench import bench, planned, render
        from ..loop.events import each
        from ..loop.trackers import Trackers

        plans, display = planned(recipes, seeds, override or (), against), _display()
        listener = each(display, Trackers(display))
        result = asyncio.run(bench(plans, output or Path("runs") / "bench-methods", listener))
        _emit(result, stdout, None if as_json else render(result))


@app.command()
def doctor(
    vllm_python: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The Python that serves with vLLM; by default $SELFWRIGHT_VLLM_PYTHON, "
            ".venv-vllm here, or this one.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Look for what is missing or at odds on this machine."""
    import asyncio

    with _stdout_for_results() as stdout:
        from ..loop.doctor import doctor, show, to_json
        from ..loop.progress import Progress

        with Progress(_display()).stage("looking at this machine"):
            findings = asyncio.run(doctor(vllm_python))
        result = to_json(findings)
        if as_json:
            _emit(result, stdout, None)
        else:
            show(findings, stdout)
    if not result["ok"]:
        raise typer.Exit(1)


@app.command("list")
def list_(
    kind: Annotated[
        str, typer.Argument(help="recipes, environments, agents, policies, judges, ...")
    ],
    as_json: Json = False,
) -> None:
    """List recipes, or installed plug-ins."""
    from ..core.plugins import KINDS, names, nearest

    if kind not in (*KINDS, "recipes"):
        said = f"nothing to list is called {kind!r}; {nearest(kind, (*KINDS, 'recipes'))}"
        raise PluginError(said)
    found: dict[str, Any]
    if kind == "recipes":
        found = {name: {"about": _about(file)} for name, file in _shipped().items()}
    else:
        found = {
            name: {"target": one.target, "distribution": one.distribution}
            for name, one in names(kind).items()
        }
    width = max(map(len, found), default=0)
    lines = [
        f"{name:{width}}  {'  '.join(map(str, one.values()))}".rstrip()
        for name, one in found.items()
    ]
    _emit(found, sys.stdout, None if as_json else "\n".join(lines) or f"no {kind}")


def _shipped() -> dict[str, Path]:
    from ..core.recipe import shipped

    return shipped()


def _about(file: Path) -> str:
    """The first comment line of a recipe."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return next((line.lstrip("# ") for line in lines if line.startswith("#")), "")


@contextmanager
def _stdout_for_results() -> Generator[TextIO]:
    """Whatever else writes to stdout, native libraries and child processes too, goes to stderr."""
    sys.stdout.flush()
    kept, python_stdout = os.dup(1), sys.stdout
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        with open(kept, "w", -1, "utf-8", "backslashreplace", closefd=False) as results:
            yield results
    finally:
        sys.stdout = python_stdout
        os.dup2(kept, 1)
        os.close(kept)


def _display() -> "Display":
    from rich.console import Console

    from .console import Display

    # Where nobody watches, a line stays one line, whatever its length.
    return Display(Console(stderr=True, highlight=False, soft_wrap=not sys.stderr.isatty()))


def _emit(result: Mapping[str, Any], stdout: TextIO, text: str | None) -> None:
    """Print ``text``, or ``result`` as JSON if there is none."""
    print(json.dumps(_finite(result), allow_nan=False) if text is None else text, file=stdout)


def _finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: null stands for them."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in cast("Mapping[Any, Any]", value).items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in cast("list[Any]", value)]
    return value
