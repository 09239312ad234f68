"""`mhc-compile`: what it writes, and one line with exit code 2 for mistakes."""

import ast
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import mhc_compile as mc
from mhc_compile.__main__ import main
from mhc_compile.scheduler import solve_recompute

PLAN = ["plan", "--ranks", "4", "--microbatches", "8"]
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


def test_plan(tmp_path, capsys):
    assert main([*PLAN, "--variant", "dualpipe", "--out", str(tmp_path / "new")]) == 0
    out = capsys.readouterr().out
    assert "makespan   26" in out and "bubble     2" in out
    names = {"plan.json", "plan.csv", "plan.trace.json", "plan.svg", "plan.png"}
    assert {file.name for file in (tmp_path / "new").iterdir()} == names
    assert all(str(tmp_path / "new" / name) in out for name in names)


def test_plan_without_what_cannot_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mhc_compile.scheduler.write_plan.MOST_EVENTS", 10)
    monkeypatch.setattr("mhc_compile.scheduler.plot_plan.MOST_CELLS", 10)
    assert main([*PLAN, "--out", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert {file.name for file in tmp_path.iterdir()} == {"plan.json", "plan.csv"}
    assert "plan.trace.json not written" in out and "plan.png not written" in out


def test_plan_json(capsys):
    assert main([*PLAN, "--json", "--costs", "F=2,B=4,W=2,FB=6"]) == 0
    plan = mc.OverlapPlan.from_json(capsys.readouterr().out)
    assert plan == mc.plan_pipeline(4, 8, costs={"F": 2, "B": 4, "I": 2, "W": 2, "FB": 6})


def test_plan_of_ops(tmp_path, capsys):
    assert main([*PLAN, "--hidden", "512", "--tokens", "128", "--layers", "2"]) == 0
    assert "modelled" in capsys.readouterr().out
    costs = mc.model_op_costs(hidden=512, tokens=128, layers=2)
    (tmp_path / "costs.json").write_text(json.dumps(costs.to_dict()))
    assert main([*PLAN, "--op-costs", str(tmp_path / "costs.json"), "--json"]) == 0
    plan = mc.OverlapPlan.from_json(capsys.readouterr().out)
    assert plan == mc.plan_pipeline(4, 8, costs=costs)


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
        (["plan", "--ranks", "4"], "required: --microbatches"),
        ([*PLAN, "--variant", "dualpip"], "did you mean 'dualpipe'"),
        (["plan", "--ranks", "3", "--microbatches", "8", "--variant", "dualpipe"], "even number"),
        (["plan", "--ranks", "4", "--microbatches", "7", "--out", "x"], "at least 2 * ranks = 8"),
        (["plan", "--ranks", "four", "--microbatches", "8"], "invalid int value: 'four'"),
        ([*PLAN, "--costs", "F=1,B"], "costs must look like F=1,B=2,W=1,FB=3, got 'B'"),
        ([*PLAN, "--costs", "F=nan,B=2,I=1,W=1"], "cost F must be a finite number"),
        ([*PLAN, "--out", __file__], "File exists"),
        ([*PLAN, "--hidden", "64"], "need both --hidden and --tokens"),
        ([*PLAN, "--hidden", "64", "--tokens", "8", "--costs", "F=1"], "give one of --costs"),
        ([*PLAN, "--op-costs", "nothing.json"], "No such file"),
        ([*PLAN, "--op-costs", __file__], "Extra data"),
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
