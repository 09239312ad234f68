"""The benchmark of pipelines runs on CPU processes, and refuses to time what is wrong."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
SMALL = ["--device", "cpu", "--channels", "16", "--blocks", "4", "--length", "8",
         "--microbatches", "4", "--repeats", "1", "--dtype", "fp32"]  # fmt: skip


def launch(*arguments, script="benchmarks/pipeline_steps.py", launcher=True):
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*(start if launcher else [sys.executable]), str(ROOT / script), *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)


def test_two_processes(tmp_path):
    path = tmp_path / "pipeline.json"
    done = launch(*SMALL, "--only", "plain", "--only", "mhc", "--json", str(path))
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["ranks"] == 2 and list(found["rows"]) == ["plain", "mhc"]
    for row in found["rows"].values():
        assert row["status"] == "ok" and row["error"] < 1e-6
        assert row["step ms"] > 0 and row["predicted ms"] > 0
    assert "| mhc" in done.stdout and "2 ranks, dense, C = 16, 4 blocks" in done.stdout


def test_a_wrong_gradient_is_not_timed(tmp_path):
    """On the last rank a parameter's is off by a thousandth of the largest."""
    broken = tmp_path / "broken.py"
    broken.write_text(f"""
import sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import pipeline_steps
from pipeline_steps import Pipeline, dist
step = Pipeline.step
def wrong(self):
    loss = step(self)
    if dist.get_rank() == 1:
        grads = [p.grad for p in self.runner.parameters() if p.grad is not None]
        grads[0].view(-1)[0] += 1e-3 * max(float(g.abs().max()) for g in grads)
    return loss
Pipeline.step = wrong
pipeline_steps.main()
""")
    done = launch(*SMALL, "--only", "mhc", script=broken)
    assert done.returncode == 0, done.stderr
    assert "wrong: off by" in done.stdout


def test_without_torchrun_or_a_gpu():
    done = launch("--device", "cpu", launcher=False)
    assert done.returncode == 2 and "torchrun --nproc-per-node" in done.stderr
