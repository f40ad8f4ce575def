"""The command line: what it prints where, and one clear message for every slip."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from selfwright import __version__
from selfwright.commands.cli import call

SCRIPT = Path(sys.executable).with_name("selfwright")
RECIPE = """\
seed: 1
environment: {use: countdown, numbers: 3}
agent: {use: chat}
trainer: {use: imitation}
evaluatoin: {tasks: 5}
"""
MODEL = "policy: {model: scratch:32x1}\n"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own, with a faulty recipe in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.yaml").write_text(RECIPE)
    (tmp_path / "good.yaml").write_text(RECIPE.replace("evaluatoin", "evaluation") + MODEL)
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "broken.yaml").write_text("environment: {use: countdown\ntrainer: x: y\n")
    return tmp_path


MISTAKES = [
    ("rnu bad.yaml", "No such command 'rnu'. Did you mean 'run'?"),
    ("run", "Missing argument 'recipe'"),
    ("run bad.yaml extra", "Got unexpected extra argument"),
    ("run bad.yaml --outptu x", "No such option: --outptu (Possible options: --output)"),
    ("run bad.yaml --output", "Option '--output' requires an argument"),
    ("run bad.yaml --output empty.yaml", "is a file"),
    ("run bad.yaml", "bad.yaml:5: evaluatoin: unknown key; did you mean 'evaluation'?"),
    ("run bad.yaml --json", "bad.yaml:5: evaluatoin: unknown key; did you mean 'evaluation'?"),
    ("run empty.yaml", "empty.yaml:1: a recipe is a mapping with the keys"),
    ("run broken.yaml", "broken.yaml:2: not valid YAML"),
    ("run nowhere.yaml", "nowhere.yaml: no such file, nor a recipe that comes with selfwright"),
    ("run .", ".: is a folder; a recipe is a YAML file"),
    ('run good.yaml -o agent.system="\\ud83d"', "agent.system: no Unicode: U+D83D at character 0"),
    ("run bad.yaml -o trainer", "-o trainer: wanted key.path=value, such as trainer.use=rise"),
    ("run bad.yaml -o", "Option '-o' requires an argument"),
    ("run bad.yaml -o environment.numbers=x", "numbers: wanted a whole number, got the text 'x'"),
    ("run bad.yaml -o environment.use=countdwn", "did you mean 'countdown'?"),
    ("run bad.yaml -o environment.numbesr=3", "did you mean 'numbers'?"),
    ("check countdwn", "no entry 'countdwn' in selfwright.environments; did you mean 'countdown'?"),
    ("check countdown -o environment.numbers=99", "numbers: wanted at most 6, got 99"),
    ("check countdown -o trainer.use=rise", "only environment.KEY=VALUE can be set here"),
    ("check no_such_module:World", "there is no module 'no_such_module'"),
    ("check os:Environ", "module 'os' has no 'Environ'"),
    ("compare a", "Missing argument 'b'"),
    ("compare a b", "no evaluation at a"),
    ("evaluate", "Missing argument 'checkpoint'"),
    ("evaluate expert --split tset", "'tset' is not one of 'train', 'validation', 'test'"),
    ("evaluate expert --tasks 0", "Invalid value for '--tasks'"),
    ("evaluate expert --seed one", "Invalid value for '--seed'"),
    ("evaluate expert", "say in which world expert is to play: --environment NAME"),
    ("evaluate runs/quickstar", "there is no folder runs/quickstar; if it is a model's hub id"),
    ("evaluate . --environment countdown", "cannot open the model '.'"),
    ("evaluate . --environment countdown -o agent.use=raect", "did you mean 'react'"),
    ("evaluate ./nothing --environment countdown", "there is no checkpoint at ./nothing"),
    ("evaluate expert --environment countdown -o policy.temperature=1", "--temperature"),
    ("evaluate expert --environment countdown -o trainer.tau=1", "'trainer' is none of them"),
    ("evaluate expert --environment countdown --output empty.yaml/x", "Not a directory; use"),
    ("run good.yaml --output empty.yaml/x", "cannot use empty.yaml/x for a run: Not a directory"),
    (
        "bench-methods good.yaml -o budget.tokens=9 -o trainer.source=self --output empty.yaml/x",
        "cannot use empty.yaml/x/good-0 for a run: Not a directory",
    ),
    (
        "run good.yaml -o policy.model=./nowhere",
        "cannot open the model './nowhere': there is no such folder",
    ),
    ("run good.yaml -o policy.model=scratch:100x4", "a width that is a multiple of 32"),
    ("run good.yaml -o environment.largest=2 -o environment.numbers=2", "no puzzle for"),
    ("list", "Missing argument 'kind'"),
    ("list trainer", "nothing to list is called 'trainer'; did you mean 'trainers'?"),
    ("--verison", "No such option: --verison (Possible options: --version)"),
]


@pytest.mark.parametrize(("line", "said"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_clear_message(
    line: str, said: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert call(line.split()) == 2
    out, err = capfd.readouterr()
    assert out == ""
    assert said in err
    assert "Traceback" not in err and "pydantic" not in err
    assert len(err.splitlines()) <= 4, "the recipe's own faults are three"


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_made(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable, place in (("SELFWRIGHT_CACHE", "empty.yaml/a"), ("HOME", "empty.yaml")):
        monkeypatch.delenv("SELFWRIGHT_CACHE", raising=False)
        monkeypatch.setenv(variable, place)
        assert call(["run", "good.yaml", "--output", variable]) == 2
        (said,) = capfd.readouterr().err.splitlines()
        assert said.startswith(f"cannot write to {place}/") and "Not a directory" in said
        assert said.endswith("set $SELFWRIGHT_CACHE to a folder that can be written to")


def test_an_argument_that_is_not_in_utf_8_is_refused(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["evaluate", os.fsdecode(b"caf\xe9"), "--environment", "countdown"]) == 2
    assert capfd.readouterr().err.startswith("selfwright: 'caf\\udce9' is not in UTF-8")


def test_an_evaluation_tells_how_many_tasks_it_was_asked_for(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    line = "evaluate expert --environment faulty_worlds:Faulty --json --tasks"
    for asked, there in ((50, 40), (30, 30)):
        assert call([*line.split(), str(asked)]) == 0
        out, err = capfd.readouterr()
        told = json.loads(out)
        assert (told["tasks"], told["tasks_asked"]) == (there, asked)
        note = "note: 50 test tasks were asked for, and the world has 40"
        assert err.count(note) == (asked == 50)


def test_two_tasks_of_one_name_are_not_evaluated_on(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path, str(Path(__file__).parent)])
    line = "evaluate expert --environment faulty_worlds:Faulty -o environment.fault=namesakes"
    assert call(line.split()) == 1
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("two tasks are called 'test ") and "Traceback" not in err


def script(*arguments: str, code: str = "") -> subprocess.CompletedProcess[str]:
    """The real command, or ``code`` in a fresh interpreter."""
    command = [sys.executable, "-c", code] if code else [str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


def test_the_installed_command() -> None:
    done = script("--version")
    assert (done.stdout, done.stderr, done.returncode) == (f"selfwright {__version__}\n", "", 0)
    done = script("run", "bad.yaml")
    assert (done.stdout, done.returncode) == ("", 2)
    assert "Traceback" not in done.stderr
    helped = script()
    assert helped.returncode == 0
    assert {"run", "evaluate", "check", "compare", "list"} <= set(helped.stdout.split())


def test_help_waits_for_nothing_that_only_runs_need() -> None:
    slow = {"asyncio", "numpy", "pydantic", "selfwright.core.types", "torch"}
    code = f"import sys, selfwright.commands.cli; print(sorted({slow} & sys.modules.keys()))"
    assert script(code=code).stdout == "[]\n"


def test_list_prints_one_object(capfd: pytest.CaptureFixture[str]) -> None:
    assert call(["list", "environments", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert listed["countdown"] == {
        "target": "selfwright.environments.countdown:Countdown",
        "distribution": "selfwright",
    }
    assert call(["list", "environments"]) == 0
    assert capfd.readouterr().out.splitlines()[0].split()[0] == "countdown"
    assert call(["list", "recipes", "--json"]) == 0
    assert all(one["about"] for one in json.loads(capfd.readouterr().out).values())


NOISY = """
import os, sys
from selfwright.commands import options
with options.stdout_for_results() as stdout:
    print("python")
    os.write(1, b"native\\n")
    os.system("echo child")
    options.emit({"a": float("nan"), "b": [1, (2.5, float("inf"))], "c": {"d": None}}, stdout, None)
print("after")
"""


def test_only_the_result_reaches_stdout() -> None:
    done = script(code=NOISY)
    first, last = done.stdout.splitlines()
    assert json.loads(first) == {"a": None, "b": [1, [2.5, None]], "c": {"d": None}}
    assert last == "after"
    assert set(done.stderr.split()) == {"python", "native", "child"}


def raising(error: str) -> str:
    """A program whose ``list`` command raises ``error``."""
    return (
        "import sys\nfrom selfwright.core import errors, plugins\n"
        "from selfwright.commands.cli import call\n"
        f"def names(kind): raise {error}\n"
        "plugins.names = names\nsys.exit(call(['list', 'agents']))"
    )


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        ("errors.StoreError('a damaged file')", 2, "a damaged file\n"),
        ("errors.DiskError('the disk is full')", 1, "the disk is full\n"),
        ("errors.TooManyFailures('most episodes broke')", 1, "most episodes broke\n"),
        ("KeyboardInterrupt", 130, "selfwright: interrupted\n"),
    ],
)
def test_faults_we_know_are_told_plainly(error: str, code: int, said: str) -> None:
    done = script(code=raising(error))
    assert (done.returncode, done.stderr, done.stdout) == (code, said, "")


def test_faults_we_do_not_know_keep_their_traceback() -> None:
    done = script(code=raising("ZeroDivisionError('unforeseen')"))
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "ZeroDivisionError: unforeseen" in done.stderr


def test_an_interrupt_while_waiting_is_one_line() -> None:
    code = (
        "import asyncio, sys\nfrom selfwright.core import plugins\n"
        "from selfwright.commands.cli import call\n"
        "async def wait():\n print('ready', flush=True)\n await asyncio.sleep(60)\n"
        "plugins.names = lambda kind: asyncio.run(wait())\nsys.exit(call(['list', 'agents']))"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdout=pipe, stderr=pipe, text=True) as one:
        assert one.stdout and one.stdout.readline() == "ready\n"
        os.kill(one.pid, signal.SIGINT)
        _, err = one.communicate(timeout=240)
    assert (one.returncode, err) == (130, "selfwright: interrupted\n")
