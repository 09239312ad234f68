"""Measured costs: every number is there, and says where it is from."""

import json
import sys
from dataclasses import fields

import pytest
import torch
from torch import nn

import mhc_compile as mc
from mhc_compile.__main__ import main

SMALL = {"hidden": 32, "tokens": 16, "device": "cpu", "dtype": torch.float32, "repeats": 1}
COMMAND = ["plan", "--ranks", "2", "--microbatches", "4", "--measure", "--hidden", "32",
           "--tokens", "16", "--device", "cpu", "--dtype", "float32"]  # fmt: skip


def test_each_number_is_measured_or_modelled():
    costs = mc.measure_op_costs(**SMALL, link_us=7.0, link_gbs=0.5, contention=0.2, layers=2)
    assert costs.contention == 0.2
    assert costs.send == pytest.approx(7.0 + 4 * 32 * 16 * 4 / 0.5 * 1e-3)
    text = costs.provenance
    assert text.startswith("measured on cpu, float32, torch ")
    measured, modelled = text.split("; modelled: ")
    for field in fields(costs):
        if field.type == "float":
            assert (field.name in measured.replace(":", ",").replace(";", ",").split(", ")) != (
                field.name in modelled.replace(";", ",").split(", ")
            ), field.name
            if field.name in measured:
                assert getattr(costs, field.name) > 0, field.name
    plan = mc.plan_pipeline(2, 4, costs=costs)
    assert text in str(plan)
    assert mc.OverlapPlan.from_json(plan.to_json()) == plan


def test_modules_of_ones_own_and_one_stream():
    calls = []

    class Noted(nn.Linear):
        def forward(self, x):
            calls.append(x.shape)
            return super().forward(x)

    costs = mc.measure_op_costs(**SMALL, streams=1, attention=Noted(32, 32), mlp=Noted(32, 32))
    assert calls and set(calls) == {(1, 16, 32)}
    assert costs.pre_F == costs.post_res_B == costs.recompute == 0 and costs.mlp_W > 0


def test_command(capsys):
    assert main([*COMMAND, "--link-us", "5", "--contention", "0.25", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["ops"]["costs"]
    assert table["provenance"].startswith("measured on cpu") and table["send"] > 5
    assert table["contention"] == 0.25


def test_refusals(capsys):
    with pytest.raises(mc.MHCError, match="hidden must be an integer of at least 1, got 0"):
        mc.measure_op_costs(**{**SMALL, "hidden": 0})
    with pytest.raises(mc.MHCError, match="link_gbs must be greater than 0"):
        mc.measure_op_costs(**SMALL, link_gbs=0)
    assert main(["plan", "--ranks", "2", "--microbatches", "4", "--measure"]) == 2
    assert "--measure needs the sizes --hidden and --tokens" in capsys.readouterr().err


def test_command_with_sublayers_of_ones_own(tmp_path, monkeypatch, capsys):
    (tmp_path / "sublayers.py").write_text(
        "import torch\n"
        "calls = []\n"
        "class Mine(torch.nn.Linear):\n"
        "    def forward(self, x):\n"
        "        calls.append(x.shape)\n"
        "        return super().forward(x)\n"
        "def make():\n"
        "    import lazily\n"
        "    return Mine(32, 32)\n"
        "ready = torch.nn.Linear(32, 32)\n"
        "number = int\n"
    )
    (tmp_path / "lazily.py").touch()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "sublayers", raising=False)
    own = ["--mlp", "sublayers:make", "--attention", "sublayers:ready", "--json"]
    assert main([*COMMAND, *own]) == 0
    assert sys.modules["sublayers"].calls
    capsys.readouterr()
    for wrong in ("sublayers:nothing", "no_such_module:make", "no such", "sublayers:number",
                  "sublayers", "math:pi", "torch.nn:Linear"):  # fmt: skip
        assert main([*COMMAND, "--mlp", wrong]) == 2
        assert wrong in capsys.readouterr().err
    assert main([*(word for word in COMMAND if word != "--measure"), *own]) == 2
    assert "--measure" in capsys.readouterr().err
