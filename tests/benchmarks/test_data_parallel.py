"""The benchmark of DDP and FSDP2 runs on CPU processes, with right gradients."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["--device", "cpu", "--channels", "16", "--blocks", "2", "--length", "8", "--repeats", "1",
         "--dtype", "fp32"]  # fmt: skip


def launch(*arguments, launcher=True):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*(start if launcher else [sys.executable]), "benchmarks/data_parallel.py"]
    return subprocess.run(
        [*command, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=240
    )


def test_two_processes(tmp_path):
    path = tmp_path / "found.json"
    names = [word for name in ("plain, eager", "mhc, eager") for word in ("--only", name)]
    done = launch(*SMALL, *names, "--json", str(path))
    assert done.returncode == 0, done.stderr
    rows = json.loads(path.read_text())["rows"]
    assert len(rows) == 8
    wrappers = {key.split(": ")[0] for key in rows}
    assert wrappers == {"alone", "ddp", "ddp by blocks", "fsdp"}
    for key, row in rows.items():
        assert row["status"] == "ok", (key, row["status"])
        assert row["error"] < 1e-5 and row["step ms"] > 0
    assert "| fsdp          | mhc, eager" in done.stdout and "1.000" in done.stdout


def test_without_torchrun():
    done = launch("--device", "cpu", launcher=False)
    assert done.returncode == 2 and "torchrun --nproc-per-node" in done.stderr
