"""The README's example and the one-screen example run as printed."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_readme_example_runs(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "model.layers.0.self_attn" in done.stdout
    assert "composite forward" in done.stdout
    assert (tmp_path / "out/checkpoint/mhc_compile.json").exists()


def test_own_module_example_learns() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples/own_module.py"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert len(losses) == 3 and losses[-1] < 0.1 < losses[0]


@pytest.mark.parametrize("streams", [1, 3])
def test_demo_runs_on_own_text(tmp_path: Path, streams: int) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 2000)
    done = subprocess.run(
        [sys.executable, ROOT / "examples/train_text.py", "--steps", "2", "--batch", "2",
         "--length", "16", "--device", "cpu", "--streams", str(streams), "--text", str(text),
         "--out", str(tmp_path / "out")], capture_output=True, text=True,
    )  # fmt: skip
    if streams == 1:
        assert done.returncode == 2 and "--streams" in done.stderr
        return
    assert done.returncode == 0, done.stderr
    assert all(version in done.stdout for version in ("baseline", "HC", "mHC"))
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"results.json", "loss_gap.png", "loss_gap.svg", "gain_per_layer.png"} <= files
