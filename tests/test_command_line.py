"""`mhc-compile`: what it writes, and one line with exit code 2 for mistakes."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from mhc_compile.__main__ import main
from mhc_compile.scheduler import solve_recompute

EMIT = ["emit", "--streams", "2", "--hidden", "48"]
SOLVE = ["recompute", "--layers", "12", "--streams", "4"]


def test_emit(tmp_path, capsys):
    assert main([*EMIT, "--out", str(tmp_path / "new")]) == 0
    files = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert sorted(files) == sorted((tmp_path / "new").iterdir())
    assert {"project_mix.py", "gates.py", "read_rms_weight.py"} <= {file.name for file in files}
    for file in files:
        ast.parse(file.read_text())


def test_emit_json(tmp_path, capsys):
    arguments = ["--json", "--dtype", "fp32", "--convention", "deepseek_v4"]
    assert main([*EMIT, "--out", str(tmp_path), *arguments]) == 0
    kernels = json.loads(capsys.readouterr().out)["kernels"]
    assert all(Path(kernel["file"]).is_file() and kernel["dtype"] == "fp32" for kernel in kernels)
    (gates,) = (kernel for kernel in kernels if kernel["op"] == "gates")
    assert gates["rule"]["name"] == "deepseek_v4"


def test_recompute(capsys):
    assert main(SOLVE) == 0
    assert capsys.readouterr().out == f"{solve_recompute(12, 4)}\n"
    assert main([*SOLVE, "--objective", "timeline", "--kept", "8"]) == 0
    assert "8, 3, 1" in capsys.readouterr().out


def test_recompute_json(capsys):
    pipeline = ["--stages", "2", "--in-flight", "2,1", "--hidden", "2560", "--head", "1.5"]
    sizes = ["--transient", "6", "--kept", ",".join("12" * 6), "--embedding", "1"]
    limit = ["--objective", "budget", "--budget", "2e5"]
    assert main([*SOLVE, "--json", *pipeline, *sizes, *limit]) == 0
    plan = solve_recompute(
        12, 4, stages=2, in_flight=(2, 1), hidden=2560, head=1.5, transient=6, kept=[1, 2] * 6,
        embedding=1, objective="budget", memory_budget=200_000,
    )  # fmt: skip
    assert json.loads(capsys.readouterr().out) == plan.to_dict()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "required: command"),
        (["emit", "--out", "x", "--streams", "2"], "required: --hidden"),
        ([*EMIT, "--out", "x", "--dtype", "int8"], "invalid choice: 'int8'"),
        ([*EMIT, "--out", "x", "--hidden", "-1"], "channels must be at least 1, got -1"),
        ([*EMIT, "--out", "x", "--streams", "9"], "streams must be 1 to 8, got 9"),
        ([*EMIT, "--out", __file__], "File exists"),
        (SOLVE[:3], "required: --streams"),
        ([*SOLVE, "--layers", "0"], "layers must be 1 to 100000, got 0"),
        ([*SOLVE, "--stages", "13"], "stages must be at most layers=12"),
        ([*SOLVE, "--in-flight", "2,x"], "invalid number: 'x'"),
        ([*SOLVE, "--in-flight", "2,1"], "in_flight must be one number or a sequence of 1"),
        ([*SOLVE, "--hidden", "nan"], "hidden must be a finite number above 0, got nan"),
        ([*SOLVE, "--hidden", "x"], "argument --hidden: invalid number"),
        ([*SOLVE, "--objective", "best"], "invalid choice: 'best'"),
        ([*SOLVE, "--objective", "budget"], "memory_budget=SIZE belong together"),
        ([*SOLVE, "--objective", "budget", "--budget", "9"], "memory_budget must be at least 39"),
    ],
)
def test_mistakes(arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        code = main(arguments)
    except SystemExit as exit:
        code = exit.code
    out, err = capsys.readouterr()
    assert code == 2 and not out
    assert message in err and len(err.splitlines()) == 1
    assert not any(tmp_path.iterdir())


def test_as_a_module(tmp_path):
    command = [sys.executable, "-m", "mhc_compile", *EMIT, "--out", str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "gates.py" in result.stdout
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())
    assert project["project"]["scripts"] == {"mhc-compile": "mhc_compile.__main__:main"}
