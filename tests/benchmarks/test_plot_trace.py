"""Pictures of the traces that are in docs."""

import itertools
from pathlib import Path

import plot_trace

TRACE = Path(__file__).parents[2] / "docs" / "traces" / "mhc.json.gz"


def test_lanes():
    found = plot_trace.lanes(TRACE)
    assert {rank for rank, _ in found} == {0, 1}
    for rank in (0, 1):  # two stages, and messages
        assert len([lane for r, lane in found if r == rank]) == 3 and (rank, "messages") in found
    for spans in found.values():
        assert all(a + length < b + 1e-9 for (a, length), (b, _) in itertools.pairwise(spans))


def test_picture(tmp_path):
    plot_trace.main([str(TRACE), str(TRACE), "--out", str(tmp_path / "new" / "trace.png")])
    assert (tmp_path / "new" / "trace.png").read_bytes().startswith(b"\x89PNG")
