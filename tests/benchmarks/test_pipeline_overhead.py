"""The modelled overhead of n streams: of plain DualPipe, and with what mHC adds to it."""

import sys

import pytest
from pipeline_overhead import EXTENSIONS, main, overheads


def test_extensions_expose_less():
    plain = overheads(4, 16, 1, 40.0)
    assert plain["plain DualPipe"][0] == 0
    found = overheads(4, 16, 4, 40.0)
    assert found.keys() == EXTENSIONS.keys()
    over, exposed = zip(*found.values(), strict=True)
    assert max(over[1], over[3]) < over[0] and over[4] <= min(over)
    assert max(exposed[1], exposed[3], exposed[4]) < exposed[0]
    assert overheads(4, 16, 4, 80.0)["plain DualPipe"][0] < over[0]


def test_table_and_picture(tmp_path, monkeypatch, capsys):
    path = tmp_path / "overhead.png"
    given = ["--ranks", "2", "--streams", "2", "--links", "80", "--picture", str(path)]
    monkeypatch.setattr(sys, "argv", ["pipeline_overhead.py", *given])
    pytest.importorskip("matplotlib")
    main()
    assert path.read_bytes().startswith(b"\x89PNG")
    assert "| streams = 2" in capsys.readouterr().out
