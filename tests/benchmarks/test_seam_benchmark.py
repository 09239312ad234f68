"""What the benchmark of seams makes of its times; the times are made up, for they need a GPU."""

import argparse
import copy
import math

import pytest
import seam
import torch
from seam import PLAIN, Size, run_size, sizes_of, table

CPU = torch.device("cpu")


@pytest.fixture
def made_up(monkeypatch):
    """A copy moves 100 bytes a microsecond; a library takes 40 us forward and 120 in all."""
    monkeypatch.setattr(seam, "copy_rate", lambda size, device: 100.0)
    monkeypatch.setattr(seam, "plain", lambda *_: ("forward", "both"))
    fixed = {"forward": 8.0, "both": 18.0}
    monkeypatch.setattr(seam, "measure", lambda call: ({"median": fixed[call]}, "graph"))
    row = {"status": "ok", "error": 1e-3, "by": "graph", "forward us": 40.0, "both us": 120.0}
    monkeypatch.setattr(seam, "run_one", lambda name, size, device: dict(row))


def test_shares_are_of_the_least_that_a_seam_moves(made_up):
    size = Size(tokens=10, hidden=10, streams=4, dtype=torch.bfloat16)  # 1 C is 200 bytes, 2 us
    found = run_size(size, ["these kernels"], CPU, math.inf)
    first, result = (copy.deepcopy(rows) for rows in found)
    assert list(first["rows"]) == [PLAIN]  # each row can be written as soon as it is there
    rows = result["rows"]
    assert rows["these kernels"]["forward of copy"] == 10 * 2 / 40
    assert rows["these kernels"]["both of copy"] == 25 * 2 / 120
    assert rows[PLAIN]["forward of copy"] == rows[PLAIN]["both of copy"] == 1
    text = table(result, 2)
    assert "40 (20.0 C)" in text and "1 C at the rate of a copy" in text and "n = 4" in text


def test_what_there_is_no_time_for_is_said(made_up):
    size = Size(10, 10, 4, torch.bfloat16)
    *_, result = run_size(size, ["these kernels"], CPU, 0.0)
    rows = result["rows"]
    assert "budget" in rows["these kernels"]["status"]
    assert "budget" in table({"tokens": 1, "hidden": 1, "streams": 4, "copy_bytes_per_us": 1.0,
                              "rows": rows}, 2)  # fmt: skip


def test_sizes():
    given = argparse.Namespace(sweep=True, dtype="bf16", tokens=None, hidden=None, streams=None)
    every = sizes_of(given)
    assert len(every) == 75 and every[0] == Size(8192, 4096, 4, torch.bfloat16)
    given.tokens, given.hidden = [1], [1280, 1920]
    assert len(sizes_of(given)) == 6
    given.sweep, given.tokens, given.hidden = False, None, [2560]
    assert sizes_of(given) == [Size(8192, 2560, 4, torch.bfloat16)]


def test_a_chain_that_was_slow_once_counts_by_its_faster_time(monkeypatch):
    medians = iter([50.0, 900.0, 20.0, 60.0, 10.0, 30.0, 40.0, 70.0])  # forward and both, 2 4 2 4
    monkeypatch.setattr(seam, "Chain", lambda *_: argparse.Namespace(forward=None, both=None))
    monkeypatch.setattr(seam, "kernel_time", lambda call: (1.0, 5))

    def measure(call):
        median = next(medians)
        return {"median": median, "low": median - 1, "high": median + 1}, "graph"

    monkeypatch.setattr(seam, "measure", measure)
    row = seam.time_peer(None, Size(10, 10, 4, torch.bfloat16), CPU)
    assert row["forward us"] == (20 - 10) / 2 and row["both us"] == (60 - 30) / 2
    assert row["forward spread us"] == 1.0
