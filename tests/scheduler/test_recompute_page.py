"""docs/recompute.md: its tables are what the command prints, its example runs."""

import re
import runpy
from pathlib import Path

import pytest

from mhc_compile.__main__ import main

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "recompute.md").read_text()


@pytest.mark.parametrize("arguments", [[], ["--kept", "8"]], ids=["kept 1", "kept 8"])
def test_table(arguments, capsys):
    runpy.run_path(str(ROOT / "benchmarks" / "recompute_objectives.py"))["main"](arguments)
    assert capsys.readouterr().out in PAGE


def test_example():
    code, *_ = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code, {})


def test_command(capsys):
    (command,) = re.findall(r"^    mhc-compile (.*)$", PAGE, re.MULTILINE)
    assert main(command.split()) == 0
    assert "timeline" in capsys.readouterr().out
