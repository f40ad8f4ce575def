"""The benchmark for GPUs, on a tiny shape, so that it runs when there is one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "gpu.py"


@pytest.mark.multi
def test_a_dry_run_measures_every_part(tmp_path: Path) -> None:
    output = tmp_path / "gpu.json"
    # As on a machine where nothing is installed: it makes the package importable by itself.
    bare = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--shape", "tiny", "--output", str(output)],
        env=bare | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert not done.returncode, done.stdout + done.stderr
    found = json.loads(output.read_text())["shapes"]["tiny"]
    for part in ("learn", "learn_compiled", "learn_checkpointed"):
        assert found[part]["tokens_per_s"] > 0 and found[part]["rows"] == 4
    for part in ("sample", "sample_shots"):
        assert found[part]["tokens_per_s"] > 0
    assert found["learn_shots"]["ratio"] > 0
    # An adapter that learned something, computed beside bf16 weights: the two agree.
    gap, moved = found["agree"]["gap"], found["agree"]["moved"]
    assert gap["p99"] < 0.02 < moved["p99"]
