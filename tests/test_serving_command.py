"""``selfwright serve`` as a process: what it refuses to start with, and how it stops."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from test_serving_swap import adapter

from selfwright.commands.cli import call
from selfwright.core.errors import RecipeError
from selfwright.loop.evaluate import read_card
from selfwright.loop.serve import limits_of, loopback

pytestmark = pytest.mark.server

DEADLINE_S = 240.0


@contextmanager
def server(*arguments: str, **variables: str) -> Generator[tuple[str, "subprocess.Popen[str]"]]:
    """The real command on a free port, and its address."""
    command = [sys.executable, "-P", "-m", "selfwright", "serve", *arguments, "--port", "0"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", **variables},
    )
    watch = threading.Timer(DEADLINE_S, process.kill)
    watch.start()
    try:
        assert process.stderr
        lines = list[str]()
        for line in process.stderr:
            lines.append(line)
            if line.startswith("serving "):
                yield line.split(" at ")[1].strip().rstrip("/"), process
                break
        else:
            raise AssertionError("".join(lines))
    finally:
        watch.cancel()
        process.kill()
        process.communicate()


def test_told_to_stop_it_finishes_what_it_has_begun(model_folder: Callable[[str], Path]) -> None:
    # An untrained model does not know when to end: its answers are as long as they may be.
    asked = {"messages": [{"role": "user", "content": "Make"}], "max_tokens": 300}
    with server(str(model_folder("qwen3")), "--json") as (url, process):
        answers = list[httpx2.Response]()

        def ask() -> None:
            answers.append(httpx2.post(f"{url}/v1/chat/completions", json=asked, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        until = time.monotonic() + 30
        while "selfwright_requests_in_flight 1.0" not in httpx2.get(f"{url}/metrics").text:
            assert time.monotonic() < until and not answers, "the answer came too soon to be seen"
        process.send_signal(signal.SIGTERM)
        asking.join(60)
        assert answers[0].status_code == 200
        assert answers[0].json()["usage"]["completion_tokens"] > 1
        with pytest.raises(httpx2.TransportError):
            httpx2.get(f"{url}/health")
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        told: dict[str, Any] = json.loads(out)
        assert told == {"model": "qwen3", "address": url}
        assert "Traceback" not in err and err.rstrip().endswith("stopped")


def test_the_weights_it_began_with_can_be_loaded_again_though_their_files_are_lost(
    model_folder: Callable[[str], Path], tmp_path: Path
) -> None:
    first = adapter(model_folder("qwen3"), tmp_path / "adapters" / "first", 1.0)
    (tmp_path / "adapters" / "broken").mkdir()
    (tmp_path / "adapters" / "broken" / "adapter_config.json").write_text("{}")
    line = (str(first), "--adapters", str(tmp_path / "adapters"))
    with (
        # As `$(cat FILE)` does not leave it, but a container's secret may.
        server(*line, SELFWRIGHT_TOKEN="sesame\n") as (url, _),
        httpx2.Client(
            base_url=url, headers={"authorization": "Bearer sesame"}, timeout=60
        ) as client,
    ):
        (first / "adapter_model.safetensors").unlink()
        offer = {"path": "broken", "force": True}
        told = client.post("/v1/adapters", json=offer).json()
        assert told["status"] == "failed"
        assert client.get("/health").status_code == 200
        now = client.get("/v1/adapters").json()["checkpoint"]
        assert now.endswith(str(first))


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (
            "serve MODEL --host 0.0.0.0",
            "put a token into the environment variable SELFWRIGHT_TOKEN",
        ),
        ("serve MODEL --host 0.0.0.0 --token-env MINE", "variable MINE"),
        ("serve MODEL --host no.such.host.invalid", "is no address of this machine"),
        ("serve MODEL -o limits.sesions=3", "-o limits.sesions=3: unknown key; did you mean 'sess"),
        ("serve MODEL -o limits.sessions=0", "wanted at least 1, got 0"),
        ("serve MODEL -o trainer.tau=1", "serve knows the keys environment, agent, policy, limits"),
        ("serve MODEL -o policy.temperature=1", "serve has --temperature"),
        ("serve MODEL --engine transfromers", "did you mean 'transformers'?"),
        ("serve MODEL --world countdwn", "did you mean 'countdown'?"),
        ("serve MODEL --adapters ./nowhere", "--adapters nowhere: no such folder"),
        ("serve MODEL -o environment.numbers=2", "name the world: --world NAME"),
        ("serve MODEL -o agent.use=react -o agent.shots=2", "is shown what its run was; serve the"),
        ("serve ./nothing", "there is no checkpoint at ./nothing"),
        ("serve MODEL --port TAKEN", "--port 0 takes a free one"),
    ],
)
def test_what_it_does_not_start_with(
    line: str,
    said: str,
    model_folder: Callable[[str], Path],
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("SELFWRIGHT_TOKEN", raising=False)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = {"MODEL": str(model_folder("scratch")), "TAKEN": str(taken.getsockname()[1])}
        assert call([words.get(word, word) for word in line.split()]) == 2
    out, err = capfd.readouterr()
    assert out == "" and said in err and "Traceback" not in err


def test_it_is_not_there_before_its_engine_is(
    model_folder: Callable[[str], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    settings = {"url": "[http://127.0.0.1:9]", "start_timeout_s": "1"}
    given = [word for key, value in settings.items() for word in ("-o", f"policy.{key}={value}")]
    line = ["serve", str(model_folder("scratch")), "--port", "0", "--engine", "vllm", *given]
    assert call(line) == 1
    said = capfd.readouterr().err
    assert "did not come up within start_timeout_s=1" in said and "serving scratch at" not in said


def test_without_the_extra_it_says_what_to_install() -> None:
    code = (
        "import sys\nfrom selfwright.commands.cli import call\n"
        "sys.modules['uvicorn'] = None\nsys.exit(call(['serve', 'x']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 2
    assert done.stderr == (
        "serving needs uvicorn, which is not installed: pip install 'selfwright[serve]'\n"
    )


def test_the_client_needs_no_server_installed() -> None:
    code = (
        "import sys\nfor name in ('fastapi', 'uvicorn', 'prometheus_client', 'torch'):\n"
        "    sys.modules[name] = None\n"
        "from selfwright.agents.serving.client import Client, ServedPlayer"
    )
    subprocess.run([sys.executable, "-c", code], timeout=240, check=True)


def test_an_iteration_knows_the_recipe_of_its_run(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "iterations" / "0002" / "checkpoint"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "/the/base"}')
    assert read_card(str(folder)) is None
    recipe = {"environment": {"use": "countdown", "on": "ray"}, "agent": {"use": "chat"}}
    (tmp_path / "run" / "recipe.json").write_text(json.dumps(recipe))
    # The cluster was the run's: who plays its checkpoint elsewhere has none.
    wanted = recipe | {"environment": {"use": "countdown", "on": "local"}}
    for given in (folder, folder.parent):
        card = read_card(str(given))
        assert card == {
            **wanted,
            "base": "/the/base",
            "base_inside": False,
            "folder": str(folder.resolve()),
        }
    assert read_card(str(tmp_path / "run")) is None, "it has learned nothing yet"


def test_limits_are_read_and_addresses_known() -> None:
    found = limits_of(["limits.sessions=3", "limits.idle_s=1.5"])
    assert (found.sessions, found.idle_s) == (3, 1.5)
    with pytest.raises(RecipeError, match=r"wanted limits\.KEY=VALUE"):
        limits_of(["limits.sessions"])
    assert loopback("127.0.0.1") and loopback("127.3.2.1") and loopback("::1")
    assert not loopback("0.0.0.0") and not loopback("::")
